"""Data to train on: one LightningDataModule a file."""
