"""Files of a run that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# a disk, a quota or a limit on the size of a file is full
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(OSError):
    """A file of a run that cannot be written; the message says which, and how to mend it."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its suffix, that takes its name at the end, or is gone if anything goes wrong.

    Raises:
        WriteError: If it cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # two processes may write the same file
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise WriteError(
            f"{path} could not be written ({error.strerror or error}); what was there before is untouched. Free some "
            "space or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reraise_disk_full(folder: Path) -> Iterator[None]:
    """Say where no more could be written, which a logger's own error does not.

    A logger that writes in a thread hands its error on to this one: the thread's own traceback is left out.

    Raises:
        WriteError: In the place of such an error.
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
        raise WriteError(
            f"{folder} takes no more ({error.strerror}). Checkpoints written before are untouched: free some space and "
            "resume with --ckpt_path last."
        ) from error
    finally:
        threading.excepthook = before
