"""Run directories: create and lock runs/<recipe>/version_K, and find the checkpoint to use in a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.run.checkpoint_io import BEST, CHECKPOINTS, LAST, PREVIOUS, read_checkpoint, saved_step
from datamodules.atomic import remove_stale
from datamodules.errors import CheckpointError

_log = logging.getLogger(__name__)
LOCK = ".lock"
ADAPTER = "adapter"  # folder of the adapter in PEFT's format
# files of a run that are only read, or replaced by a rename, which does not follow links
LINKABLE = re.compile(
    r"checkpoints/(best|last|previous)\.ckpt|config(-[\dT]+)?\.yaml|(metrics|evaluations)\.json|spectrum\.parquet"
)
VERSION = re.compile(r"version_(\d+)(-.*)?")  # name of a run directory: its number, and the label of the run
LOCK_HELD = (errno.EACCES, errno.EAGAIN)


class RunDirectoryError(OSError):
    """A run directory cannot be made or written. The message names the directory and the remedy."""


class RunTaken(CheckpointError):
    """Another process trains in the run directory."""


def versions(root: Path) -> list[Path]:
    """Return the run directories below a root, oldest first."""
    matches = {p: match for p in root.glob("version_*") if (match := VERSION.fullmatch(p.name)) and p.is_dir()}
    return sorted(matches, key=lambda path: int(matches[path][1]))


def new_run_directory(root: Path, label: str = "") -> Path:
    """Create the next version directory below a root. Runs that start at the same moment get different directories.

    Args:
        root: Directory of the recipe's runs.
        label: End of the directory's name, after the number.

    Raises:
        RunDirectoryError: If no directory can be made there.
    """
    earlier = versions(root)
    number = int(VERSION.fullmatch(earlier[-1].name)[1]) + 1 if earlier else 0  # type: ignore[index]
    while True:
        path = root / f"version_{number}{label}"
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if not (isinstance(error, FileExistsError) and root.is_dir()):
                raise RunDirectoryError(
                    f"trainer.default_root_dir: no run directory can be made in {root} ({error.strerror}); choose "
                    "another place."
                ) from error
            number += 1


def remove_links(run: Path) -> None:
    """Remove the links in a run directory through which a command would write to files outside.

    A run directory may come from a stranger. Links to files that are only read or replaced atomically stay
    (`LINKABLE`).

    Raises:
        RunDirectoryError: If the run directory or a folder in it is a link that leads elsewhere.
    """
    real = Path(os.path.realpath(run))
    if run.is_symlink() and real.parent != Path(os.path.realpath(run.parent)):
        raise RunDirectoryError(f"{run} is a link to {real}, outside of its folder. Give {real} itself.")
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in [*folders, *files]):
            target = Path(os.path.realpath(path))
            if not path.is_symlink() or target.is_relative_to(real):
                continue
            if path.is_dir():
                raise RunDirectoryError(
                    f"{path} is a link to {target}, outside of the run directory, where the run would write. Replace "
                    "the link by a folder."
                )
            if not LINKABLE.fullmatch(path.relative_to(run).as_posix()):
                path.unlink()
                _log.warning(f"{path} was a link to {target}, outside of the run directory. The link is removed.")


@contextmanager
def remove_if_empty(run: Path | None) -> Iterator[None]:
    """Remove a new run directory if the command fails before a configuration or metrics are written."""
    try:
        yield
    except BaseException:
        if run is not None and not any((run / name).exists() for name in ("config.yaml", "metrics.json")):
            shutil.rmtree(run, ignore_errors=True)
        raise


@contextmanager
def locked(run: Path, option: str = "ckpt_path") -> Iterator[None]:
    """Lock a run directory against training by other processes. The kernel releases the lock when this process ends.

    If the file system has no locks, warn and continue without a lock.

    The lock belongs to this process, not to the file's handle. Worker processes inherit the handle, and may live on for
    seconds after this process was killed.

    Args:
        run: The directory.
        option: Option or key that names the directory, for the message.

    Raises:
        RunTaken: If another process holds the lock.
        RunDirectoryError: If the directory cannot be written, or holds a link to a folder elsewhere.
    """
    remove_links(run)
    try:
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunDirectoryError(f"{run} cannot be written ({error.strerror}); choose another place.") from error
    with open(handle, "r+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCK_HELD:
                file.seek(0)
                remedy = "start a new run from a copy of the checkpoint" if option == "ckpt_path" else "choose another"
                raise RunTaken(
                    f"{option}: {file.read().strip() or 'another process'} trains in {run}. Wait until "
                    f"the training ends, or {remedy}."
                ) from error
            _log.warning(f"{run} cannot be locked here ({error.strerror}): do not train in it twice at once.")
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
            for folder in (run, run / CHECKPOINTS):  # temporary files of a fit that was killed
                remove_stale(folder)
        yield


def locate_checkpoint(ckpt_path: str, root: Path, prefer_best: bool) -> Path:
    """Return the file that `--ckpt_path` means, without reading any file.

    Args:
        ckpt_path: A checkpoint file, a run directory, or `last`, the newest run below the root that has a checkpoint.
        root: Directory of the recipe's runs.
        prefer_best: If true, a run directory means its best checkpoint, if there is one. Otherwise it means the last.

    Raises:
        CheckpointError: For `last`, if no run below the root has a checkpoint.
    """
    if ckpt_path == "last":
        run = next((v for v in reversed(versions(root)) if _checkpoints(v)), None)
        if run is None:
            raise CheckpointError(f"ckpt_path: no run below {root} has a checkpoint. Give a file, or start a new run.")
        return run / CHECKPOINTS / LAST
    path = Path(ckpt_path)
    if not path.is_dir():
        return path
    best = path / CHECKPOINTS / BEST
    return best if prefer_best and best.is_file() else path / CHECKPOINTS / LAST


def load_checkpoint(ckpt_path: str, wanted: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint to use, and its content.

    Args:
        ckpt_path: The option `--ckpt_path`. If the option names a file, there is no fallback.
        wanted: The file that the option means. If this file is damaged or missing, the fallback is the newest intact
            checkpoint of the run, with a warning.

    Raises:
        CheckpointError: If no checkpoint can be used.
    """
    others = [path for path in _checkpoints(wanted.parent.parent) if path != wanted]
    if wanted == Path(ckpt_path) or not (wanted.is_file() or others):
        return wanted, read_checkpoint(wanted)
    problems: list[str] = []
    others.sort(key=lambda path: saved_step(path) or 0, reverse=True)
    for path in [wanted, *others]:
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error).partition(" Use another checkpoint")[0])
            continue
        if path != wanted:
            step = content.get("global_step", 0)
            for line in (*problems, f"{path} of step {step} is used instead: the newest intact checkpoint."):
                _log.warning(line)
        return path, content
    raise CheckpointError(" ".join([*problems, f"{wanted.parent} has no intact checkpoint. Start a new run."]))


def resolve_checkpoint(ckpt_path: str, root: Path, prefer_best: bool) -> Path:
    """Return the path of the checkpoint to use. The file need not exist. See `locate_checkpoint`.

    Raises:
        CheckpointError: For `last`, if no run below the root has a checkpoint. If no checkpoint of the run is intact.
    """
    wanted = locate_checkpoint(ckpt_path, root, prefer_best)
    is_named = wanted == Path(ckpt_path) or not _checkpoints(wanted.parent.parent)
    return wanted if is_named else load_checkpoint(ckpt_path, wanted)[0]


def _checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints. Among checkpoints of the same step, the first is preferred."""
    return [p for p in (run / CHECKPOINTS / name for name in (LAST, PREVIOUS, BEST)) if p.is_file()]
