"""Checkpoint files: atomic writes, a digest after the content, and reading that runs no code.

A checkpoint is a file of torch.save with one more line at its end, which torch.load ignores:

    onesided sha256=<SHA-256 of the content before the line>

The line is part of the file, so that a kill cannot separate line and content. A file that was truncated or altered
fails the digest before anything is unpickled. A file without the line comes from plain Lightning. Earlier
versions also put the run's identity into the line and the digest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from itertools import count
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
STALE = ".stale"  # suffix of checkpoints that are newer than the checkpoint from which a run was resumed
SEAL = re.compile(rb"\nonesided sha256=([0-9a-f]{64})(?: run=([0-9a-f]{32}))?\n")
SEAL_START = b"\nonesided sha256="
LONGEST_SEAL = len(SEAL_START) + 64 + len(" run=\n") + 32
CHUNK = 1 << 20


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """Return the run directory that contains a checkpoint; None for a checkpoint outside of run directories."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


# -------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU. Only tensors and plain values are accepted, never pickled code.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, or holds other objects.
    """
    if not Path(path).is_file():
        run = run_of_checkpoint(Path(path))
        other_folder = run is not None and run.is_dir() and not (run / CHECKPOINTS).exists()
        missing = f"{run} holds no checkpoints" if other_folder else f"there is no file {path}"
        raise CheckpointError(
            f"ckpt_path: {missing}. Give a run directory or a checkpoint. The command `runs` lists the runs."
        )
    try:
        with Path(path).open("rb") as file:  # one handle for both reads, since the file may be replaced in between
            problem = _file_problem(file)
            checkpoint = None if problem else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"ckpt_path: {path} cannot be read ({error.strerror or error}). Use another checkpoint."
        ) from error
    except Exception as error:  # torch.load raises many kinds of errors
        raise CheckpointError(
            f"ckpt_path: {path} cannot be read. The file is no checkpoint, or holds Python objects that are not "
            "tensors or plain values, whose loading could run code. Use another checkpoint."
        ) from error
    if problem:
        raise CheckpointError(
            f"ckpt_path: {path} {problem}. Use another checkpoint, or give the run directory: then the run's newest "
            "intact checkpoint is used."
        )
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"ckpt_path: {path} is a PyTorch file, but no checkpoint (no state_dict). Use another checkpoint."
        )
    return checkpoint


def checkpoint_problem(path: Path) -> str | None:
    """Return why a checkpoint cannot be used, by its digest. Return None if the file is intact."""
    try:
        with path.open("rb") as file:
            return _file_problem(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _file_problem(file: BinaryIO) -> str | None:
    """Return why an open checkpoint cannot be used. For None, the file is rewound to its beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LONGEST_SEAL))
    tail = file.read()
    start = tail.rfind(SEAL_START)
    if start < 0:
        file.seek(0)
        is_complete = tail[-22:-18] == b"PK\5\6"  # torch writes zip files, which end with a record of 22 bytes
        return None if is_complete else "is damaged: truncated, or no PyTorch file"
    seal = SEAL.fullmatch(tail[start:])
    if seal is None:
        return "is damaged: its digest is truncated or altered"
    digest = hashlib.sha256()
    bytes_left = size - len(seal[0])
    file.seek(0)
    while chunk := file.read(min(CHUNK, bytes_left)):
        digest.update(chunk)
        bytes_left -= len(chunk)
    digest.update(seal[2] or b"")
    file.seek(0)
    return None if digest.hexdigest().encode() == seal[1] else "is damaged: its content does not match its digest"


def saved_step(path: Path) -> int | None:
    """Return the optimizer step of a checkpoint, without reading a tensor; None if the file cannot be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # torch.load raises many kinds of errors for a damaged file
        return None


def first_new_step(checkpoint: dict[str, Any]) -> int:
    """Return the first step whose log entries are written again by a run that resumes from a checkpoint.

    At an epoch's end, the entries at the checkpoint's step stay. In mid-epoch, these entries are written again, since
    the interrupted run may have written them only because it stopped.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return int(checkpoint["global_step"]) + (epochs["ready"] == epochs["processed"])


def has_reached_limit(checkpoint: dict[str, Any], max_epochs: int | None, max_steps: int) -> bool:
    """Return True if a checkpoint is at the last epoch or at the last step of a fit with these limits.

    Args:
        checkpoint: Content of the checkpoint.
        max_epochs: Value of `trainer.max_epochs`.
        max_steps: Value of `trainer.max_steps`.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    if max_steps != -1 and checkpoint["global_step"] >= max_steps:
        return True
    is_at_end = epochs["ready"] == epochs["processed"]
    return max_epochs not in (None, -1) and is_at_end and bool(epochs["processed"] >= max_epochs)


def saved_configuration(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the `model` and `data` sections that a checkpoint was trained with."""
    saved: dict[str, Any] = {}
    for section, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        values = checkpoint.get(key)
        if isinstance(values, dict) and isinstance(values.get("_class_path"), str):
            arguments = {k: v for k, v in values.items() if k not in ("_class_path", "_instantiator")}
            saved[section] = {"class_path": values["_class_path"], "init_args": arguments}
    return saved


# ------------------------------------------------------------------------------------------------------------- checking

# keys of a checkpoint with values of the types that they must have
TYPES: dict[str, Any] = {
    "state_dict": {},
    "hyper_parameters": {},
    "datamodule_hyper_parameters": {},
    "pytorch-lightning_version": "",
    "global_step": 0,
    "epoch": 0,
    "loops": {},
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
    "random_states": [],
    "samples_a_step": 0,
    "frozen_digest": "",
    "chain": {"links": [], "start": 0},
}
REQUIRED = ("state_dict", "hyper_parameters", "pytorch-lightning_version", "global_step", "loops")
TRAINING = ("callbacks", "optimizer_states", "lr_schedulers")  # keys that a checkpoint of weights alone lacks
COUNTS = {"fit_loop": {"epoch_progress": {"current": {"ready": 0, "processed": 0}}}}  # in `loops`, for training


def check_contents(path: Path, checkpoint: dict[str, Any], trains: bool) -> None:
    """Check that a checkpoint has the keys that a command needs, with values of the right types.

    `AdapterCheckpoint`, `modules.training.checkpoints` and the data module check nested values when they restore them.

    Args:
        path: Path of the checkpoint.
        checkpoint: Content of the checkpoint, from `read_checkpoint`.
        trains: Whether training resumes from the checkpoint.

    Raises:
        CheckpointError: If a key is missing, or its value has another type or cannot be used. The message names the
            first such key, or all missing keys that only training needs.
    """
    if trains and (missing := [key for key in TRAINING if key not in checkpoint]):
        raise CheckpointError(
            f"ckpt_path: {path} has weights alone ({', '.join(missing)} are missing), so training cannot "
            "resume from this file. Export the adapter (`export --format peft`) and start a new run with "
            "--model.adapter_path."
        )
    expected = {key: value for key, value in TYPES.items() if key in REQUIRED or key in checkpoint}
    if trains:
        expected["loops"] = COUNTS
    problem = structure_problem(expected, checkpoint) or _content_problem(checkpoint)
    if problem is not None:
        raise CheckpointError(f"ckpt_path: {path} is no usable checkpoint: {problem}. Use another checkpoint.")


def _content_problem(checkpoint: dict[str, Any]) -> str | None:
    """Return what is wrong with values whose keys and types are right."""
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"state_dict.{name} must be a tensor, and is {shortened(tensor)}"
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if not _is_plain(checkpoint.get(key)):
            return f"{key} must hold only plain values"
    try:
        Version(checkpoint["pytorch-lightning_version"])
    except InvalidVersion:
        return (
            f"pytorch-lightning_version must be a version, and is {shortened(checkpoint['pytorch-lightning_version'])}"
        )
    if optimizers := checkpoint.get("optimizer_states", [{}]):
        return None if isinstance(optimizers[0], dict) else "optimizer_states must begin with a group of keys"
    return "optimizer_states has no optimizer"


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return True for a value that a YAML file can hold."""
    if isinstance(value, dict):
        return depth < 20 and all(isinstance(k, str | int) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return depth < 20 and all(_is_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def shortened(value: Any) -> str:
    """Return the representation of a value for a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def structure_problem(expected: Any, saved: Any, where: str = "") -> str | None:
    """Return how the structure of a saved state differs from a fresh state; None if the saved state can be loaded.

    A saved integer must not be negative. Integers and floats may replace each other.

    Args:
        expected: The fresh state: nested mappings of the required keys, with values of the required types. None allows
            any type, and an empty mapping any keys.
        saved: The saved state. Further keys are allowed, and None in place of any value but a mapping.
        where: Name of the state in the message.
    """
    if isinstance(expected, Mapping):
        if not isinstance(saved, Mapping):
            return f"{where} must be a group of keys, and is {shortened(saved)}"
        for key, value in expected.items():
            inner = f"{where}.{key}".removeprefix(".")
            problem = structure_problem(value, saved[key], inner) if key in saved else f"{inner} is missing"
            if problem is not None:
                return problem
        return None
    if type(saved) is int and saved < 0:
        return f"{where} must be 0 or more, and is {saved}"
    are_numbers = type(expected) in (int, float) and type(saved) in (int, float)
    if expected is None or saved is None or type(expected) is type(saved) or are_numbers:
        return None
    return f"{where} must be {type(expected).__name__}, and is {shortened(saved)}"


# -------------------------------------------------------------------------------------------------------------- writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, so that a kill or a full disk leaves the old file.

    - Before a new last.ckpt replaces the old file, the old file becomes previous.ckpt. A damaged old file is
      overwritten instead.
    - If a run is resumed from one of its older checkpoints, the first save renames the newer checkpoints to
      `*.stale`. Otherwise the fallback for a damaged last.ckpt could return to steps that the run has undone.

    Args:
        given: Path of the checkpoint that a command loads.
        content: Content of `given`, from `read_checkpoint`, so that the file is not read a second time.
    """

    def __init__(self, given: Path | None = None, content: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._content = {given: content} if given and content else {}
        self._intact = set(self._content)  # checkpoints that this process has read or written, and need not check
        self._resumed = (given, int(content.get("global_step", 0))) if given and content else None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Raises:
            CheckpointError: If the checkpoint cannot be written; the previous file is untouched.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, hashlib.sha256()) as file:
                torch.save(checkpoint, file)
                _seal(file)
                self._set_newer_aside(target.parent)
                if target.name == LAST and (target in self._intact or checkpoint_problem(target) is None):
                    _link_or_move(target, target.with_name(PREVIOUS))
            self._intact.add(target)
        except OSError as error:
            reason = error.reason if isinstance(error, WriteError) else error
            raise CheckpointError(
                f"The checkpoint {target} could not be written ({reason}). The previous checkpoint is untouched. Fix "
                "the cause, such as a full disk, and resume with --ckpt_path last."
            ) from error

    def _set_newer_aside(self, folder: Path) -> None:
        """At a resumed run's first save, rename the checkpoints that are newer than the resumed checkpoint."""
        if self._resumed is None or self._resumed[0].parent.resolve() != folder.resolve():
            return
        step, self._resumed = self._resumed[1], None
        for path in (folder / name for name in (LAST, PREVIOUS, BEST)):
            path_step = saved_step(path)
            if path_step is not None and path_step > step:
                names = (path.with_name(f"{path.name}{f'.{i}' if i else ''}{STALE}") for i in count())
                stale = next(name for name in names if not name.exists())
                path.rename(stale)
                self._intact.discard(path)
                _log.warning(f"{path} of step {path_step} is now {stale.name}: the run was resumed from step {step}.")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint, always with `weights_only`."""
        content = self._content.pop(Path(path), None)
        return read_checkpoint(path) if content is None else content


def _seal(file: AtomicFile) -> None:
    """Write the digest after the content, and sync the file to disk before any other checkpoint is touched."""
    assert file.digest is not None
    file.write(SEAL_START + file.digest.hexdigest().encode() + b"\n")
    os.fsync(file.fileno())


def _link_or_move(target: Path, name: Path) -> None:
    """Give the file `target` the second name `name`, and replace the file there. Without hard links, move `target`."""
    temporary = temporary_name(name)
    try:
        os.link(target, temporary)
    except OSError:  # a file system without hard links: `target` is missing until the new file replaces it
        target.replace(name)
        return
    temporary.replace(name)
    temporary.unlink(missing_ok=True)  # a rename between two names of the same file does nothing
