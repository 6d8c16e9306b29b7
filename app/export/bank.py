"""Format `bank`: the adapters of several runs that share the frozen A, in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError

from app.export.load_run import find_checkpoint, load_module
from app.export.peft import LABELS, peft_content, shared_base_name
from app.run.checkpoint_io import run_of_checkpoint
from datamodules.atomic import atomic_directory, atomic_write
from datamodules.errors import counted
from modules.adapters import adapter_state
from modules.base import AdaptedModule
from modules.formats.bank import Bank, BankAdapter, Member, Shared, check_member, member_of, save_bank
from modules.formats.peft import write_peft_files


def split_names(names: str | None) -> list[str] | None:
    """Return the names of `--names A,B`."""
    return None if names is None else [name.strip() for name in names.split(",")]


def read_members(
    runs: Sequence[str], names: Sequence[str] | None, taken: Mapping[str, Any], changes: dict[str, Any]
) -> dict[str, Member]:
    """Return the adapters of runs by name, ready for a bank.

    Args:
        runs: Run directories or checkpoints.
        names: Names of the adapters in the order of the runs; None takes the names of the run directories.
        taken: Names that the bank has already.
        changes: Arguments of the modules that replace the saved arguments.

    Raises:
        ArgumentError: If a name is taken, the numbers of names and runs differ, or a run has no adapters.
        AdapterError: If the adapters do not share the backbone, the projections, the ranks or A.
    """
    checkpoints = [find_checkpoint(run) for run in runs]
    if names is None:
        names = [(run_of_checkpoint(path) or path.with_suffix("")).name for path in checkpoints]
    if len(names) != len(runs):
        raise ArgumentError(
            None,
            f"--names: {counted(len(names), 'name is', 'names are')} given for {counted(len(runs), 'run')}. Give one "
            "for each run.",
        )
    for i, name in enumerate(names):
        if name in names[:i] or name in taken:
            raise ArgumentError(None, f"RUN: the name {name} is taken. Give other names with --names A,B.")
    members: dict[str, Member] = {}
    for name, path in zip(names, checkpoints, strict=True):
        members[name] = member_of_run(load_module(path, changes), str(path))
        check_member(next(iter(members.values())).shared, members[name].shared, name)
    return members


def member_of_run(module: AdaptedModule, source: str) -> Member:
    """Return the adapter of a run for a bank.

    Raises:
        ArgumentError: If the run has no adapters.
        AdapterError: If the run trains A.
    """
    if module.tuning != "adapter":
        raise ArgumentError(
            None,
            f"RUN: a bank holds adapters, and {source} has tuning: {module.tuning}. Use runs with tuning: adapter.",
        )
    state = module.saved_state()
    factors = {f"backbone.{name}" for name in adapter_state(module.backbone)}
    heads = {name: tensor for name, tensor in state.items() if name not in factors}
    content, _ = peft_content(module, state)
    content["base_model_name_or_path"] = shared_base_name(module)
    return member_of(module.backbone, module.adapter, heads, module.class_names, content, module.peft_head_names())


def write_bank(
    path: Path,
    shared: Shared,
    frozen: Mapping[str, torch.Tensor],
    adapters: Sequence[tuple[str, BankAdapter]],
    dtype: torch.dtype,
) -> None:
    """Write a bank atomically.

    Raises:
        AdapterError: If a name is not allowed.
        WriteError: If the file cannot be written.
    """
    with atomic_write(path) as file:
        save_bank(file, shared, frozen, adapters, dtype)


def unpack(bank: Bank, name: str, folder: Path) -> None:
    """Write one adapter of a bank as a PEFT directory: PEFT's two files, and labels.json for a classifier.

    Raises:
        AdapterError: If the bank has no such adapter, or its numbers are damaged.
        WriteError: If the directory cannot be written.
    """
    adapter = bank.read(name)
    with atomic_directory(folder) as temporary:
        write_peft_files(temporary, adapter.peft, bank.peft_tensors(name), bank.dtype)
        if adapter.labels:
            (temporary / LABELS).write_text(json.dumps(adapter.labels, ensure_ascii=False) + "\n", encoding="utf-8")
