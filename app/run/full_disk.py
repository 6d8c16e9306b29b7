"""Full disks during a command."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.atomic import FULL


class DiskFullError(OSError):
    """No more can be written to a run directory; the message names it and the remedy."""


@contextmanager
def reraise_disk_full(folder: Path) -> Iterator[None]:
    """Name the run directory in an error of a full disk, which a logger's own error does not name.

    A logger that writes in a thread hands its error on to this thread; the traceback of its own thread is left out.

    Raises:
        DiskFullError: In place of the error of a full disk.
    """
    before = threading.excepthook

    def excepthook(thread: threading.ExceptHookArgs) -> None:
        if not (isinstance(thread.exc_value, OSError) and thread.exc_value.errno in FULL):
            before(thread)

    threading.excepthook = excepthook
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            f"{folder} takes no more ({error.strerror}). Checkpoints written before are untouched. Free some space and "
            "resume with --ckpt_path last."
        ) from error
    finally:
        threading.excepthook = before
