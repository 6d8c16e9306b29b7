"""Load the model of a finished run, with the weights of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L

from app.config.constructors import construct
from app.config.yaml_files import read_yaml
from app.export.low_rank import flatten_chain
from app.run.checkpoint_io import read_checkpoint, run_of_checkpoint, saved_configuration
from app.run.run_directory import resolve_checkpoint
from datamodules.errors import CheckpointError
from modules.base import AdaptedModule


def find_checkpoint(name: str) -> Path:
    """Return the checkpoint that the argument RUN names.

    Raises:
        CheckpointError: If RUN names no checkpoint, or a run without an intact checkpoint.
    """
    if not Path(name).exists():
        raise CheckpointError(
            f"RUN: there is no run directory or checkpoint {name}. The command `runs` lists the runs."
        )
    checkpoint = resolve_checkpoint(os.path.abspath(name), Path(), prefer_best=True)
    if not checkpoint.is_file():
        raise CheckpointError(
            f"RUN: {name} has no {checkpoint.parent.name}/{checkpoint.name}; give a run directory that fit has written "
            "(runs/<recipe>/version_K), or a checkpoint file."
        )
    return checkpoint


def load_module(path: Path, changes: dict[str, Any]) -> AdaptedModule:
    """Return the module of a checkpoint with its weights, in eval mode on the CPU.

    A chain of adapters becomes one adapter over the pretrained weights (`flatten_chain`).

    Args:
        path: The checkpoint.
        changes: Arguments of the module that replace the saved arguments.

    Raises:
        UsageError: If the saved configuration or config.yaml cannot be used.
        CheckpointError: If the checkpoint cannot be read, or does not name its model.
        ModelError: If the module cannot be built, or its frozen weights differ from the checkpoint's.
    """
    checkpoint = read_checkpoint(path)
    saved = saved_configuration(checkpoint).get("model")
    if saved is None:
        raise CheckpointError(
            f"RUN: {path} does not name its model: this program has not written the file. Use another checkpoint."
        )
    saved["init_args"] |= changes
    run_directory = run_of_checkpoint(path)
    if run_directory is not None and (run_directory / "config.yaml").is_file():  # the seed draws random frozen weights
        L.seed_everything(read_yaml(str(run_directory / "config.yaml")).get("seed_everything", 0), verbose=False)
    module = construct(AdaptedModule, saved)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    flatten_chain(module)
    return module.eval()
