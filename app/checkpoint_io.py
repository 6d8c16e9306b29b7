"""Checkpoints on disk: written whole or not at all, checked by a digest, read without running what is in them.

A checkpoint is a file of torch.save with one line behind it that torch.load does not look at:

    onesided sha256=<of all before it, and of the run> run=<identity of the run, from RUN/.run>

The line is part of the file, so that no kill can part the two. What is truncated or altered fails the digest, and what
belongs to another run the identity; both are found before anything is unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from packaging.version import InvalidVersion, Version

from datamodules.atomic import AtomicFile, WriteError, atomic_write, temporary_name
from datamodules.errors import CheckpointError

_log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
IDENTITY = ".run"
NO_RUN = "0" * 32
SEAL = re.compile(rb"\nonesided sha256=([0-9a-f]{64}) run=([0-9a-f]{32})\n")
SEAL_BYTES = len("\nonesided sha256= run=\n") + 64 + 32
CHUNK = 1 << 20


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, if it lies in one."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def run_identity(checkpoint: Path) -> str | None:
    """Return the identity of a checkpoint's run, 32 hexadecimal digits; None outside of a run or in an older one."""
    run = run_of_checkpoint(checkpoint.absolute())
    try:
        found = (run / IDENTITY).read_text(encoding="ascii").strip() if run else ""
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    return found if re.fullmatch("[0-9a-f]{32}", found) else None


def restore_identity(run: Path) -> None:
    """Write the identity of a run that was copied without its hidden file, from the lines of its checkpoints.

    Without the identity, what is written from here on would be taken for another run's when it is copied back.
    """
    if (run / IDENTITY).exists():
        return
    for name in (LAST, PREVIOUS, BEST):
        path = run / CHECKPOINTS / name
        if path.is_file() and path.stat().st_size > SEAL_BYTES:
            with path.open("rb") as file:
                file.seek(-SEAL_BYTES, os.SEEK_END)
                seal = SEAL.fullmatch(file.read())
            if seal is not None and seal[2].decode() != NO_RUN:
                with atomic_write(run / IDENTITY) as identity:
                    identity.write(seal[2] + b"\n")
                return


# -------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU. Only tensors and plain values are accepted, never pickled code.

    Raises:
        CheckpointError: If it is not there, damaged, not of the run that it lies in, no checkpoint, or holds anything
            else.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"ckpt_path: there is no file {path}; checkpoints lie in RUN/checkpoints.")
    try:
        with Path(path).open("rb") as file:  # one file for both: another may take its name in between
            problem = _problem(file, run_identity(Path(path)))
            checkpoint = None if problem else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"ckpt_path: {path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            reason = "it holds Python objects that are not tensors or plain values, and loading them could run code"
        else:
            reason = "it is truncated or not a PyTorch file"
        raise CheckpointError(f"ckpt_path: {path} cannot be read: {reason}. Use another checkpoint.") from error
    if problem:
        elsewhere = "" if problem.startswith("is damaged") else " If it is whole, a copy of it elsewhere can be used."
        raise CheckpointError(
            f"ckpt_path: {path} {problem}. Use another checkpoint, or give the run directory: the newest intact one of "
            f"it is taken then.{elsewhere}"
        )
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"ckpt_path: {path} is a PyTorch file, but not a checkpoint of a run (no state_dict).")
    return checkpoint


# keys of a checkpoint, and what their values are
TYPES: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "pytorch-lightning_version": str,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "random_states": list,
    "samples_a_step": int,
    "frozen_digest": str,
}
REQUIRED = ("state_dict", "hyper_parameters", "pytorch-lightning_version", "global_step", "loops")
TRAINING = ("callbacks", "optimizer_states", "lr_schedulers")  # what a checkpoint of weights alone lacks


def check_contents(path: Path, checkpoint: dict[str, Any], trains: bool) -> None:
    """Check that a checkpoint has the keys that a command needs, with values of the right types.

    What lies deeper is checked where it is restored, against what is there to take it: by `AdapterCheckpoint`,
    `modules.training.checkpoints` and the data module.

    Args:
        path: Of the checkpoint.
        checkpoint: As `read_checkpoint` gave it.
        trains: Whether training goes on from it.

    Raises:
        CheckpointError: With the first key that is missing or of another type.
    """
    if trains and (missing := [key for key in TRAINING if key not in checkpoint]):
        raise CheckpointError(
            f"ckpt_path: {path} has weights alone ({', '.join(missing)} are missing), so no training can go on from "
            "it. Start a new run from its adapter with --model.adapter_path, after `export --format peft`."
        )
    problem = next((f"{key} is missing" for key in REQUIRED if key not in checkpoint), None)
    for key, kind in TYPES.items():
        value: Any = checkpoint.get(key, kind())
        negative = isinstance(value, int) and value < 0
        if not isinstance(value, kind) or isinstance(value, bool) or negative:
            wanted = {int: "a number, 0 or more", str: "text", dict: "a group of keys", list: "a list"}[kind]
            problem = problem or f"{key} must be {wanted}, and is {shortened(value)}"
    if problem is None:
        problem = _content_problem(checkpoint)
    if problem is None and trains:
        counts = {"epoch_progress": {"current": {"ready": 0, "processed": 0}}}
        problem = structure_problem({"fit_loop": counts}, checkpoint["loops"], "loops")
    if problem is not None:
        raise CheckpointError(f"ckpt_path: {path} is no usable checkpoint: {problem}. Use another checkpoint.")


def _content_problem(checkpoint: dict[str, Any]) -> str | None:
    """Return what is wrong with values whose keys and types are right."""
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"state_dict.{name} must be a tensor, and is {shortened(tensor)}"
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if not _is_plain(checkpoint.get(key)):
            return f"{key} must hold plain values alone"
    try:
        Version(checkpoint["pytorch-lightning_version"])
    except InvalidVersion:
        return f"pytorch-lightning_version is {shortened(checkpoint['pytorch-lightning_version'])}"
    if trained := checkpoint.get("optimizer_states", [{}]):
        return None if isinstance(trained[0], dict) else "optimizer_states must have a group of keys"
    return "optimizer_states has no optimizer"


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return True for what a YAML file can hold."""
    if isinstance(value, dict):
        return depth < 20 and all(isinstance(k, str | int) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return depth < 20 and all(_is_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def shortened(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def structure_problem(expected: Any, found: Any, where: str) -> str | None:
    """Return where a saved state is of another structure than a fresh one; None if it can be loaded.

    Args:
        expected: The fresh state: mappings of the keys that must be there, down to values of the types that they have.
            What is None, or an empty mapping, says nothing of a type.
        found: The saved state. It may have more keys.
        where: Name of the state.
    """
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{where} must be a group of keys, and is {shortened(found)}"
        if missing := [str(key) for key in expected if key not in found]:
            return f"{where}.{missing[0]} is missing"
        problems = (structure_problem(value, found[key], f"{where}.{key}") for key, value in expected.items())
        return next((problem for problem in problems if problem is not None), None)
    numbers = (int, float)
    if expected is None or found is None or type(expected) is type(found):
        is_count = type(found) is int and found < 0
        return f"{where} must be 0 or more, and is {found}" if is_count else None
    if isinstance(expected, numbers) and type(found) in numbers and type(expected) is not bool:
        return None
    return f"{where} must be {type(expected).__name__}, and is {shortened(found)}"


def fault(path: Path) -> str | None:
    """Why a checkpoint is not used, by its digest; None if it is intact, or has no digest and needs none."""
    try:
        with path.open("rb") as file:
            return _problem(file, run_identity(path))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def saved_step(path: Path) -> int | None:
    """Optimizer steps behind a checkpoint, of which no tensor is read; None if it cannot be told."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # torch raises half a dozen kinds for a damaged file
        return None


def first_new_step(checkpoint: dict[str, Any]) -> int:
    """Return the first step of the logs that a run which goes on from a checkpoint writes anew.

    What is logged at the very step of the checkpoint stays at an epoch's end alone: in mid-epoch it is of a stop.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return int(checkpoint["global_step"]) + (epochs["ready"] == epochs["processed"])


def _problem(file: BinaryIO, identity: str | None) -> str | None:
    """Why an open checkpoint is not used; the file is at its beginning again if nothing is wrong.

    Args:
        file: Opened for reading.
        identity: Of the run that it lies in; with one, each of its checkpoints must have a digest.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return "is damaged: it is empty"
    file.seek(max(0, size - SEAL_BYTES))
    seal = SEAL.fullmatch(file.read())
    file.seek(0)
    if seal is None:
        # torch loads a file that lost this line alone: it looks like one of plain Lightning, which never had it
        missing = (
            "is without the digest that each checkpoint of its run has: truncated or altered, or another program's"
        )
        return missing if identity is not None else None
    digest = hashlib.sha256()
    left = size - SEAL_BYTES
    while chunk := file.read(min(CHUNK, left)):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(seal[2])
    if digest.hexdigest().encode() != seal[1]:
        return "is damaged: its content does not match its digest"
    if identity is not None and seal[2].decode() != identity:
        return "is intact, but not a checkpoint of the run that it lies in"
    file.seek(0)
    return None


# -------------------------------------------------------------------------------------------------------------- writing


def _seal(file: AtomicFile, identity: str) -> None:
    """Write the line behind the content, and have all of it on disk before any other checkpoint is touched."""
    assert file.digest is not None
    file.digest.update(identity.encode())
    file.write(f"\nonesided sha256={file.digest.hexdigest()} run={identity}\n".encode())
    os.fsync(file.fileno())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, so that a kill or a full disk leaves the old file.

    - The last.ckpt that a new one replaces stays as previous.ckpt, unless it is damaged.
    - Where a run goes on from an older checkpoint of its own, the newer ones are dropped once its first new one is
      there: or else, if that were damaged, the newest intact one would be of steps that the run has taken back.

    Args:
        given: The checkpoint that a command was given.
        content: What lies in it, as `read_checkpoint` gave it: handed out once, and not read again.
    """

    def __init__(self, given: Path | None = None, content: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._content = {} if given is None or content is None else {given: content}
        self._intact = set(self._content)  # read or written by this process: need not be checked before they are kept
        self._given = None if given is None or content is None else (given, int(content.get("global_step", 0)))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Raises:
            CheckpointError: If it cannot be written; what was there before still is.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, hashlib.sha256()) as file:
                torch.save(checkpoint, file)
                _seal(file, run_identity(target) or NO_RUN)
                newer = self._left_behind(target.parent)
                if target.name == LAST and target not in newer and self._is_intact(target):
                    _keep(target, target.with_name(PREVIOUS))
            self._intact.add(target)
            for other, step in newer.items():
                if other != target:
                    other.unlink()
                    _log.warning(f"{other} of step {step} is dropped: the run went on from an older one.")
        except OSError as error:
            reason = error.reason if isinstance(error, WriteError) else error
            raise CheckpointError(
                f"The checkpoint {target} could not be written ({reason}). The one before is untouched: free some "
                "space and resume with --ckpt_path last."
            ) from error

    def _is_intact(self, path: Path) -> bool:
        return path.is_file() and (path in self._intact or fault(path) is None)

    def _left_behind(self, folder: Path) -> dict[Path, int]:
        """At a resumed run's first checkpoint, those in the folder that are ahead of where it went on, with steps."""
        if self._given is None or self._given[0].parent.resolve() != folder.resolve():
            return {}
        (_, step), self._given = self._given, None
        steps = {path: saved_step(path) for path in (folder / name for name in (LAST, PREVIOUS, BEST))}
        return {path: found for path, found in steps.items() if found is not None and found > step}

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint, with `weights_only` whatever is asked."""
        content = self._content.pop(Path(path), None)
        return read_checkpoint(path) if content is None else content


def _keep(target: Path, name: Path) -> None:
    """Give a file a second name, in the place of what had it; at no moment is either name without a whole file."""
    spare = temporary_name(name)
    try:
        os.link(target, spare)
    except OSError:  # a file system without hard links: for a moment there is the second name alone
        target.replace(name)
        return
    spare.replace(name)
    spare.unlink(missing_ok=True)  # it stays if both were names of one file already
