"""Tasks, one LightningModule in each file, and the adapters that the tasks train."""
