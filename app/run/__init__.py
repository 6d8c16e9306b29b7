"""Run directory: checkpoints, metrics, lock, full disks, ranks and failures."""
