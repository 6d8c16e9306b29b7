"""Tasks to train: one LightningModule a file, on the adapters of `modules.adapters`."""
