"""Checkpoints on disk: written whole or not at all, and read without running what is in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or written; the message says how to mend it."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU. Only tensors and plain values are accepted, never pickled code.

    Raises:
        CheckpointError: If it is not there, truncated, not a checkpoint, or holds anything else.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"ckpt_path: there is no file {path}; checkpoints lie in RUN/checkpoints.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            reason = "it holds Python objects that are not tensors or plain values, and loading them could run code"
        else:
            reason = "it is truncated or not a PyTorch file"
        raise CheckpointError(f"ckpt_path: {path} cannot be read: {reason}. Use another checkpoint.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"ckpt_path: {path} is a PyTorch file, but not a checkpoint of a run (no state_dict).")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary name in the same folder and rename, so that a kill or a full disk leaves the old file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Raises:
            CheckpointError: If it cannot be written; what was there before still is.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")  # one name: a killed run's is written over
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"The checkpoint {target} could not be written ({error}). The one before is untouched: free some space "
                "and resume with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint, with `weights_only` whatever is asked."""
        return read_checkpoint(path)
