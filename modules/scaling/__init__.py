"""Larger models: blocks that are divided among processes, compiled, or computed once."""
