"""Atomic writes: a file or a directory gets its name when it is complete. A failed write leaves nothing behind.

The content is first written to a temporary file beside the target, `.NAME.<16 hexadecimal digits>.tmp`. The writer
holds a lock (flock) on the temporary file. The kernel releases the lock when the process ends, also after a kill or on
another machine. `remove_stale` therefore removes only the temporary files of ended processes. On a file system without
locks, `remove_stale` removes nothing.

No write follows a link: a temporary name is new, and a rename replaces a link instead of the file behind the link.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

# Error numbers of a full disk, a full quota, and a limit on the size of a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
NAME_BYTES = 200  # Bytes of the target's name in a temporary name. File systems allow 255 bytes for a name.

_log = logging.getLogger(__name__)
_held: list[Callable[[], None]] = []  # Functions that close the locked files and directories.


def _close_inherited() -> None:
    """Close inherited handles in a forked worker, which would otherwise hold the locks of a killed parent."""
    while _held:
        _held.pop()()


os.register_at_fork(after_in_child=_close_inherited)


class WriteError(OSError):
    """Raised if a file or a directory cannot be written. The message has the path and what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} could not be written ({reason}). Earlier content is unchanged. Free some space or choose "
            "another path."
        )
        self.reason = reason


class Digest(Protocol):
    """A hash of hashlib or xxhash."""

    def update(self, data: Any, /) -> None:
        """Add data."""

    def hexdigest(self) -> str:
        """Return the hash of all data."""


class AtomicFile(io.FileIO):
    """A new temporary file. Each write is complete or raises, and the first failure is kept.

    Args:
        path: Name of the file.
        digest: Hash to update with the written bytes.
    """

    def __init__(self, path: Path, digest: Digest | None = None) -> None:
        super().__init__(path, "xb", opener=_open_new)
        self.digest = digest
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of a buffer and return its size in bytes."""
        view = memoryview(data)
        if view.nbytes == 0:
            return 0
        view = view.cast("B")
        written = 0
        try:
            while written < len(view):
                written += super().write(view[written:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        if self.digest is not None:
            self.digest.update(view)
        return written


def _open_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def atomic_write(path: Path, digest: Digest | None = None) -> Iterator[AtomicFile]:
    """Open a temporary file that is renamed to `path` at the end of the context, and removed after any error.

    The content and the name are on disk (fsync) when the context ends.

    Args:
        path: The target. A file or a link of that name is replaced.
        digest: Hash to update with the written bytes.

    Raises:
        WriteError: If the file cannot be written. Earlier content is then unchanged.
    """
    with write_errors(path):
        remove_stale(path.parent, path.name)
        file = _new_file(path, digest)
    _held.append(file.close)
    try:
        try:
            yield file
        except Exception as error:  # Libraries wrap the disk's error in other exceptions.
            if file.error is None and not (isinstance(error, OSError) and error.errno in FULL):
                raise
            raise WriteError(path, _reason(file.error or error)) from error
        with write_errors(path):
            os.fsync(file.fileno())
            os.replace(str(file.name), path)
            _sync_directory(path.parent)
    finally:
        with suppress(OSError):
            os.unlink(str(file.name))
        _held.remove(file.close)
        file.close()


@contextmanager
def atomic_write_text(path: Path) -> Iterator[TextIO]:
    """Open a temporary text file as `atomic_write` does: UTF-8, line ends as written.

    Characters without a UTF-8 encoding, as in file names with other bytes, are written as escapes.
    """
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        yield text
        text.detach()  # Flush the text. The file stays open.


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Create a temporary directory that is renamed to `path` at the end of the context, and removed after any error.

    Args:
        path: The target. An empty directory of that name is replaced.
        overwrite: Replace a file or directory of that name.

    Raises:
        WriteError: If the directory cannot be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        temporary, handle = _new_directory(path)
    replaced, close = temporary_name(path), partial(os.close, handle)
    _held.append(close)
    try:
        try:
            yield temporary
        except Exception as error:  # safetensors and tokenizers raise Rust's errors, which quote "os error".
            if not isinstance(error, OSError) and "os error" not in str(error):
                raise
            raise WriteError(path, _reason(error)) from error
        with write_errors(path):
            for file in temporary.rglob("*"):
                if file.is_file():
                    # Files of safetensors are readable only for the owner.
                    file.chmod(temporary.stat().st_mode & 0o666)
                    _sync(file, os.O_RDONLY)
            _sync_directory(temporary)
            if overwrite and os.path.lexists(path):
                os.rename(path, replaced)
            try:
                os.rename(temporary, path)
            except OSError:
                if os.path.lexists(replaced):
                    os.rename(replaced, path)
                raise
            _sync_directory(path.parent)
    finally:
        _remove(temporary)
        _remove(replaced)
        _held.remove(close)
        close()


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and directories of processes that have ended.

    Args:
        folder: Folder of the temporary files.
        name: Name of the target. None means every target, for folders that hold only files of this program.
    """
    target = None if name is None else _shortened(name)
    with suppress(OSError):
        for entry in os.listdir(folder):
            match = TEMPORARY.fullmatch(entry)
            if match and target in (None, match[1]):
                _remove_unless_locked(folder / entry)


def temporary_name(path: Path) -> Path:
    """Return a new temporary name beside a target."""
    return path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(8)}.tmp")


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:NAME_BYTES])


def _new_file(path: Path, digest: Digest | None) -> AtomicFile:
    while True:
        file = AtomicFile(temporary_name(path), digest)
        if _lock(file.fileno(), str(file.name)):
            return file
        file.close()


def _new_directory(path: Path) -> tuple[Path, int]:
    while True:
        temporary = temporary_name(path)
        temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if _lock(handle, str(temporary)):
            return temporary, handle
        os.close(handle)


def _lock(handle: int, name: str) -> bool:
    """Lock a new temporary file. Return False if another process has removed the file as stale."""
    with suppress(OSError):  # Some file systems have no locks.
        fcntl.flock(handle, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(name, follow_symlinks=False), os.fstat(handle))
    return False


def _remove_unless_locked(path: Path) -> None:
    with suppress(OSError):
        if path.is_symlink():
            path.unlink()
            return
        handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(handle)
        _log.info("%s is removed: its process ended before the file was complete.", path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise WriteError, with the path, in place of any OSError in the context."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directory(folder: Path) -> None:
    """Write new names to disk, in case of a power cut. Some network file systems do not support this."""
    with suppress(OSError):
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
