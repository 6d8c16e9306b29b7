"""Adapters in files: PEFT's two files in both directions, compact files, and what rounding does to a merged weight."""
