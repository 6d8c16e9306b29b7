"""Files of the caches: written atomically, verified when they are opened, rebuilt when they are damaged.

A cache file is an Arrow stream or a .npy array. One line follows the content. Readers of both formats skip the line:

    onesided cache=<version> bytes=<length of the content> xxh3=<XXH3 of the content, 128 bits>

`is_intact` reads the whole file and compares length and digest. Any change of the content or the line is detected. A
command checks a file once, when the command opens the file. Later damage by the disk is not detected. XXH3 detects
accidental damage, not forgery. Only trusted users may have write access to the cache folder.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from datamodules.atomic import AtomicFile, atomic_write, remove_stale, write_errors

VERSION = 1  # Version of the line.
SEAL = re.compile(rb"\nonesided cache=(\d{4}) bytes=(\d{20}) xxh3=([0-9a-f]{32})\n")
SEAL_BYTES = len("\nonesided cache= bytes= xxh3=\n") + 4 + 20 + 32
CHUNK = 1 << 22
LEGACY = re.compile(r"tmp\w{8}|\.prefix-[0-9a-f]{40}\..+\.\d+\.npy")
DAY = 24 * 60 * 60
ANNOUNCED = 1 << 30  # Verifying a file of this many bytes takes seconds, and is logged.

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of this program's caches, in the cache folder of the `datasets` library."""
    import datasets  # A run on a folder of images without a cache does not need the library.

    return Path(datasets.config.HF_DATASETS_CACHE) / "onesided"


@contextmanager
def write_cache(path: Path) -> Iterator[AtomicFile]:
    """Open a temporary file that becomes the cache file, with its digest, at the end of the context.

    After any error the file is removed.

    Raises:
        WriteError: If the file cannot be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    digest = xxhash.xxh3_128()
    with atomic_write(path, digest) as file:
        yield file
        seal = f"\nonesided cache={VERSION:04} bytes={file.tell():020} xxh3={digest.hexdigest()}\n"
        file.write(seal.encode())


def is_intact(path: Path, verify: bool = True) -> bool:
    """Return True if a cache file is intact. Warn if the file exists and is not intact.

    Temporary files that killed processes left in the folder are removed.

    Args:
        path: The file.
        verify: If true, compare the digest and the length, otherwise only the length.
    """
    remove_stale(path.parent)
    _remove_legacy(path.parent)
    try:
        with path.open("rb", buffering=0) as file:
            problem = _problem(path, file, verify)
    except FileNotFoundError:
        return False
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    if problem is not None:
        _log.warning(f"The cache file {path} {problem}. It is rebuilt.")
    return problem is None


def _problem(path: Path, file: BinaryIO, verify: bool) -> str | None:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return "is empty"
    file.seek(max(0, size - SEAL_BYTES))
    seal = SEAL.fullmatch(file.read(SEAL_BYTES))
    if seal is None:
        return "has no digest at its end: it is truncated or damaged, or an earlier version wrote it"
    if int(seal[1]) != VERSION:
        return f"is of version {int(seal[1])}, not {VERSION}"
    remaining = size - SEAL_BYTES
    if int(seal[2]) != remaining:
        return f"is damaged: it holds {remaining:,} bytes and should hold {int(seal[2]):,}"
    if not verify:
        return None
    if size >= ANNOUNCED:
        _log.info(f"Verifying the cache file {path}: {size / 2**30:.1f} GiB.")
    file.seek(0)
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(CHUNK, remaining)))
    while remaining and (count := file.readinto(buffer[: min(len(buffer), remaining)])):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        remaining -= count
    return None if digest.hexdigest() == seal[3].decode() else "is damaged: its content does not match its digest"


def _remove_legacy(folder: Path) -> None:
    """Remove temporary files of earlier versions after a day. Earlier versions did not lock these files."""
    with suppress(OSError):
        for path in folder.iterdir():
            if LEGACY.fullmatch(path.name) and time.time() - path.stat().st_mtime > DAY:
                path.unlink()
