"""Prompt benchmarks, such as GenEval: their prompts, and image folders in the layout of their tools."""
