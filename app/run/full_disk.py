"""Report a full disk during a command."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.atomic import FULL


class DiskFullError(OSError):
    """The disk of a run directory is full; the message names the directory and the remedy."""


@contextmanager
def reraise_disk_full(folder: Path) -> Iterator[None]:
    """Name the run directory in an error of a full disk, since a logger's error names no directory.

    A logger's thread passes its error to this thread. The traceback of the logger's thread is not printed.

    Raises:
        DiskFullError: In place of the error of a full disk.
    """
    hook_before = threading.excepthook

    def excepthook(thread: threading.ExceptHookArgs) -> None:
        if not (isinstance(thread.exc_value, OSError) and thread.exc_value.errno in FULL):
            hook_before(thread)

    threading.excepthook = excepthook
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            f"{folder} cannot be written ({error.strerror}). Earlier checkpoints are untouched. Free some space and "
            "resume with --ckpt_path last."
        ) from error
    finally:
        threading.excepthook = hook_before
