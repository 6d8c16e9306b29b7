"""Training: what is frozen, learning rates and optimizer, checks, and what a checkpoint holds."""
