"""Simulated full disks."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Limit the files of this process to `size` bytes. A longer write fails with "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_room_for(part: str, after: int = 0) -> Iterator[None]:
    """Let fsync fail as on a full disk for paths that contain `part`, after `after` successful calls."""
    original, remaining = os.fsync, after

    def fsync(handle: int) -> None:
        nonlocal remaining
        if part in os.readlink(f"/proc/self/fd/{handle}"):
            remaining -= 1
            if remaining < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield
