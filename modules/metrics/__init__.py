"""Metrics that torchmetrics lacks or computes in another way."""
