"""CLIP's tokenizer as transformers reads it; build.py made the files."""
