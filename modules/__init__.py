"""What is trained: one LightningModule a file, on the adapters of `modules.adapters`."""
