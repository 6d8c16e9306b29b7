"""The processes of one run: which of them says what went wrong, and how they part."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def lost_a_process(error: Exception) -> bool:
    """Whether an error is what is left of a worker or of another process of the run."""
    lost = ("DataLoader worker", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, ConnectionError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in lost)
    )


def first_to_tell() -> bool:
    """Whether this process is to report an error: the first that asks, of those that found each other.

    Before they have, the first of each node, since what is wrong with a command is so for all of them. When process 0,
    which counts, is gone, nobody knows whether it has told, and the next one says that.
    """
    if not together():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return int(_get_default_store().add("onesided/errors", 1)) == 1
    except RuntimeError:
        if dist.get_rank() == 1:
            said = "Process 0 of the run ended before the others: if it has not said why, it was killed."
            print(said, file=sys.stderr, flush=True)
        return False


def together() -> bool:
    """Whether this process has found the others of the run."""
    return dist.is_available() and dist.is_initialized()


def part() -> None:
    """Leave the group of processes: gloo's threads would abort one that ends in it. Of NCCL's Lightning takes care."""
    if together() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
