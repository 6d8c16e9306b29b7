"""Backbones of timm and transformers, by name, directory or file."""
