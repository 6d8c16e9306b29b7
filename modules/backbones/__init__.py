"""Backbones from timm and transformers, by name, directory or file."""
