"""Ranks of a distributed run: which rank writes, which rank reports an error, and leaving the process group."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.distributed_c10d import _get_default_store

SWEEP_PROCESS = "ONESIDED_SWEEP_PID"  # environment variable: id of the process that started a trial


def is_first_rank() -> bool:
    """Return True on the rank that prints and writes for all ranks of a run."""
    first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets `rank` at its import
    return first


def is_distributed() -> bool:
    """Return True if this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def should_report() -> bool:
    """Return True on the first rank that calls this function.

    Before the ranks join a process group, the first rank of each node reports: all ranks then fail with the same error.
    Rank 0 holds the counter of the calls. If rank 0 has ended, rank 1 reports the end of rank 0.
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
    """Leave gloo's process group: its threads would abort a process that exits as a member. Lightning leaves NCCL's."""
    if is_distributed() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
