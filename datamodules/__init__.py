"""What models are trained on: one LightningDataModule a file."""
