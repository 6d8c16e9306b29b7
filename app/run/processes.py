"""Ranks of a distributed run: which process writes, which one reports an error, and how all leave the process group."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.distributed_c10d import _get_default_store

SWEEP_PROCESS = "ONESIDED_SWEEP_PID"  # environment variable with the number of the process that has started a trial


def is_first_rank() -> bool:
    """Return True on the rank that prints and writes for all ranks of a run."""
    first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets the rank when it is imported
    return first


def is_distributed() -> bool:
    """Return True if this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def should_report() -> bool:
    """Return True on the first rank that calls it.

    Before the ranks have joined their process group, the first rank of each node reports: an error of the command is
    the same on all ranks. Rank 0 holds the counter of the calls. If rank 0 is gone, rank 1 prints that.
    """
    if not is_distributed():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return int(_get_default_store().add("onesided/errors", 1)) == 1
    except RuntimeError:
        if dist.get_rank() == 1:
            text = "Process 0 of the run ended before the others. If process 0 has not reported why, it was killed."
            print(text, file=sys.stderr, flush=True)
        return False


def leave_process_group() -> None:
    """Leave gloo's process group, whose threads would abort a process that ends in it. Lightning leaves NCCL's."""
    if is_distributed() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
