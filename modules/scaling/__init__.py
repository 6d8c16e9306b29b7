"""Scaling to larger models: sharded, compiled or cached blocks."""
