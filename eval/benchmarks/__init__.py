"""Prompt benchmarks of others: the folders that their tools read."""
