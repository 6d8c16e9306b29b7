"""Folders and locks of a sweep's trials."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

from app.sweep.schedule import Job
from datamodules.atomic import atomic_write

TRIALS = "trials"
OWNER = "owner"
PLACE = ".place"


def job_folder(job: Job) -> Path:
    """Return the folder of a job below the output directory, such as `trials/B/learning_rate=0.001/select_seed_0`."""
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in json.loads(job.point).items()]
    name = ",".join(words) or "as_it_is"
    if not re.fullmatch(r"[\w=.,+-]{1,100}", name) or len({word.partition("=")[0] for word in words}) < len(words):
        name = f"{re.sub(r'[^A-Za-z0-9_=.,+-]+', '_', name)[:60]}_{hashlib.sha256(job.point.encode()).hexdigest()[:12]}"
    return Path(TRIALS) / job.variant / name / f"{job.phase}_seed_{job.seed}"


def try_lock(path: Path) -> int | None:
    """Lock a file, and create the file if it is missing. Return the handle, or None if another process has the lock.

    The lock (flock) is held until all copies of the handle are closed, in child processes too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def is_locked(path: Path) -> bool:
    """Return True if a process holds a file's lock."""
    if not path.exists():
        return False
    handle = try_lock(path)
    if handle is not None:
        os.close(handle)
    return handle is None


def place_of(output: Path) -> str:
    """Return the ID of an output directory, and create the ID if it is missing.

    Machines that read the same ID share the directory.
    """
    path = output / PLACE
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip()
    with atomic_write(path) as file:
        file.write(uuid.uuid4().hex.encode())
    return path.read_text(encoding="utf-8").strip()
