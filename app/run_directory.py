"""Where a run writes: runs/<recipe>/version_K, a new one for each run, the same one on resume, by one process alone."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from app.checkpoint_io import BEST, CHECKPOINTS, IDENTITY, LAST, PREVIOUS, read_checkpoint
from datamodules.atomic import WriteError, atomic_write, remove_stale
from datamodules.errors import CheckpointError

_log = logging.getLogger(__name__)
LOCK = ".lock"
# files of a run that are read, and replaced by a rename, which does not follow a link
READ = re.compile(
    r"checkpoints/(best|last|previous)\.ckpt|config(-\d+)?\.yaml|(metrics|evaluations)\.json|spectrum\.parquet|\.run"
)
TAKEN = (errno.EACCES, errno.EAGAIN)


class RunDirectoryError(OSError):
    """A run directory cannot be made or written; the message names the place and the remedy."""


class RunTaken(CheckpointError):
    """Another process trains in the run directory."""


def versions(root: Path) -> list[Path]:
    """The run directories below a root, oldest first."""
    found = [p for p in root.glob("version_*") if p.is_dir() and p.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("version_")))


def new_run_directory(root: Path) -> Path:
    """Create the next version directory below a root, with an identity; two runs that start at once get two.

    Raises:
        RunDirectoryError: If none can be made there.
        WriteError: If nothing can be written to it.
    """
    existing = versions(root)
    number = int(existing[-1].name.removeprefix("version_")) + 1 if existing else 0
    while True:
        path = root / f"version_{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if not root.is_dir():
                raise _no_directory(root, error) from error
            number += 1
        except OSError as error:
            raise _no_directory(root, error) from error
        else:
            try:
                with atomic_write(path / IDENTITY) as file:
                    file.write(f"{uuid.uuid4().hex}\n".encode())
            except WriteError:
                path.rmdir()
                raise
            return path


def _no_directory(root: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"trainer.default_root_dir: no run directory can be made in {root} ({error.strerror}); choose another place."
    )


def remove_links(run: Path) -> None:
    """Remove the links in a run directory through which a command would write to files outside.

    A run directory may come from a stranger. Links to files that are only read, or replaced atomically, stay (`READ`).

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
            if not READ.fullmatch(path.relative_to(run).as_posix()):
                path.unlink()
                _log.warning(f"{path} was a link to {target}, outside of the run directory. The link is removed.")


@contextmanager
def remove_if_empty(run: Path | None) -> Iterator[None]:
    """Remove a run directory that was made for a command which is refused before it wrote more than empty events."""
    try:
        yield
    except BaseException:
        if run is not None and not any((run / name).exists() for name in ("config.yaml", "metrics.json")):
            shutil.rmtree(run, ignore_errors=True)
        raise


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run directory against other processes that would train in it; the kernel lets go of it when this one ends.

    The lock belongs to this process and not to the file's handle, which worker processes inherit and which they may
    hold for seconds after this one was killed.

    Raises:
        RunTaken: If another process holds it.
        RunDirectoryError: If the directory cannot be written, or holds links that lead elsewhere.
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
            if error.errno in TAKEN:
                file.seek(0)
                raise RunTaken(
                    f"ckpt_path: {file.read().strip() or 'another process'} trains in {run}: wait for it or end it, or "
                    "start a new run from a copy of the checkpoint."
                ) from error
            _log.warning(f"{run} cannot be locked here ({error.strerror}): do not resume it twice at once.")
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
            _remove_stale_files(run)
        yield


def _remove_stale_files(run: Path) -> None:
    """Remove what a killed fit has left in a run directory that this process has locked."""
    for folder in (run, run / CHECKPOINTS):
        remove_stale(folder)
    for name in (LAST, PREVIOUS, BEST):  # temporary names of earlier versions
        with suppress(OSError):
            (run / CHECKPOINTS / f".{name}.tmp").unlink()
    shutil.rmtree(run / ".adapter.old", ignore_errors=True)


def locate_checkpoint(ckpt_path: str, root: Path, prefer_best: bool) -> Path:
    """Return the file that a `--ckpt_path` means, as far as names tell.

    Args:
        ckpt_path: A checkpoint file, a run directory, or `last`, the newest run below the root that has a checkpoint.
        root: Directory of the recipe's runs.
        prefer_best: Whether a run directory means its best checkpoint, if it has one, rather than its last.

    Raises:
        CheckpointError: If no run below the root has a checkpoint.
    """
    if ckpt_path == "last":
        run = next((v for v in reversed(versions(root)) if _checkpoints(v)), None)
        if run is None:
            raise CheckpointError(f"ckpt_path: no run below {root} has a checkpoint yet; give a file, or start anew.")
        return run / CHECKPOINTS / LAST
    path = Path(ckpt_path)
    if path.is_dir():
        best = path / CHECKPOINTS / BEST
        return best if prefer_best and best.is_file() else path / CHECKPOINTS / LAST
    return path


def load_checkpoint(ckpt_path: str, wanted: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint to be used, and its content.

    Args:
        ckpt_path: As it was given. A file that is named itself is used or is an error.
        wanted: The file that it means. If that is damaged or not there, the newest intact one of its run is used, with
            a warning.

    Raises:
        CheckpointError: If it cannot be used, and no other either.
    """
    others = [p for p in _checkpoints(wanted.parent.parent) if p != wanted]
    if wanted == Path(ckpt_path) or not (wanted.is_file() or others):
        return wanted, read_checkpoint(wanted)
    problems: list[str] = []
    if not wanted.is_file():
        problems.append(f"ckpt_path: there is no {wanted}.")
    elif (content := _read(wanted, problems)) is not None:
        return wanted, content
    newest: tuple[Path, dict[str, Any]] | None = None
    for path in others:
        content = _read(path, problems)
        if content is not None and (newest is None or _step(content) > _step(newest[1])):
            newest = path, content
    if newest is None:
        raise CheckpointError(" ".join([*problems, f"{wanted.parent} has no intact checkpoint: start anew."]))
    for problem in problems:
        _log.warning(problem)
    _log.warning(f"{newest[0]} is used instead, of step {_step(newest[1])}: the newest intact one.")
    return newest


def resolve_checkpoint(ckpt_path: str, root: Path, prefer_best: bool) -> Path:
    """The checkpoint to be used, or, if there is none, where it would lie; arguments as for `locate_checkpoint`.

    Raises:
        CheckpointError: If there is none below the root, or none that is intact.
    """
    wanted = locate_checkpoint(ckpt_path, root, prefer_best)
    named = wanted == Path(ckpt_path) or not _checkpoints(wanted.parent.parent)
    return wanted if named else load_checkpoint(ckpt_path, wanted)[0]


def _checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, those before others that are to be preferred at the same step."""
    return [p for p in (run / CHECKPOINTS / name for name in (LAST, PREVIOUS, BEST)) if p.is_file()]


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None if it cannot be used, with the reason added to `problems`."""
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        problems.append(str(error).partition(" Use another checkpoint")[0])
        return None


def _step(content: dict[str, Any]) -> int:
    """Optimizer steps behind a checkpoint."""
    return int(content.get("global_step", 0))
