"""Training: freezing, learning rates and optimizer, checks, and checkpoint contents."""
