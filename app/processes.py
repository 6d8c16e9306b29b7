"""Processes of a run: which one reports an error, and how they leave their process group."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.distributed_c10d import _get_default_store

WORKER = "DataLoader worker"  # how torch's messages of a lost worker process begin


def is_first_rank() -> bool:
    """Return True on the process that prints and writes for all processes of a run."""
    first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets the rank when it is imported
    return first


def is_worker_lost(error: BaseException) -> bool:
    """Return True if an error says that a worker process of a data loader has died."""
    return isinstance(error, RuntimeError) and WORKER in str(error)


def is_peer_lost(error: BaseException) -> bool:
    """Return True if an error is what is left of a worker or of another process of the run."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return (
        isinstance(error, ConnectionError)
        or is_worker_lost(error)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in lost))
    )


def should_report() -> bool:
    """Return True on the first process that calls it: that one reports the error.

    Before the processes of a run have found each other, the first of each node reports, since what is wrong with a
    command is so for all of them. When process 0 is gone, which counts the calls, nobody knows whether it has reported;
    process 1 prints that.
    """
    if not is_distributed():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return int(_get_default_store().add("onesided/errors", 1)) == 1
    except RuntimeError:
        if dist.get_rank() == 1:
            text = "Process 0 of the run ended before the others: if it has not said why, it was killed."
            print(text, file=sys.stderr, flush=True)
        return False


def is_distributed() -> bool:
    """Return True if this process has found the others of the run."""
    return dist.is_available() and dist.is_initialized()


def leave_process_group() -> None:
    """Leave gloo's process group, whose threads would abort a process that ends in it. Lightning leaves NCCL's."""
    if is_distributed() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
