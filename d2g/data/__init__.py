"""Readers of what people bring: text files, prompts, captions, pictures, folders and image-parquet."""
