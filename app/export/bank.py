"""Format `bank`: the adapters of several runs that share the frozen A, in one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from app.export.load_run import find_checkpoint, load_module
from app.export.peft import LABELS, peft_content, shared_base_name
from app.run.checkpoint_io import run_of_checkpoint
from datamodules.atomic import atomic_directory, atomic_write
from datamodules.errors import UsageError, counted
from modules.adapters import adapter_state
from modules.base import AdaptedModule
from modules.formats.bank import Bank, BankAdapter, Member, Shared, check_member, member_of, save_bank
from modules.formats.peft import CONFIG, write_peft_files


def split_names(names: str | None) -> list[str] | None:
    """Return the names of `--names A,B`."""
    return None if names is None else [name.strip() for name in names.split(",")]


def read_members(
    runs: Sequence[str], names: Sequence[str] | None, taken: Mapping[str, Any], read: Callable[[str], Member]
) -> dict[str, Member]:
    """Return the adapters of runs by name, ready for a bank.

    Args:
        runs: Run directories, checkpoints, or directories in PEFT's format.
        names: Names of the adapters in the order of the runs; None takes the names of the directories.
        taken: Names that the bank has already.
        read: Function that reads one adapter.

    Raises:
        UsageError: If a name is taken, the numbers of names and runs differ, or a run has no adapters.
        AdapterError: If the adapters do not share the backbone, the projections, the ranks or A.
    """
    if names is None:
        names = [_default_name(run) for run in runs]
    if len(names) != len(runs):
        raise UsageError(
            f"--names: {counted(len(names), 'name is', 'names are')} given for {counted(len(runs), 'run')}. Give one "
            "name for each run."
        )
    for i, name in enumerate(names):
        if name in names[:i] or name in taken:
            raise UsageError(f"RUN: the name {name} is taken. Give other names with --names A,B.")
    members: dict[str, Member] = {}
    for name, run in zip(names, runs, strict=True):
        members[name] = read(run)
        check_member(next(iter(members.values())).shared, members[name].shared, name)
    return members


def is_peft_directory(run: str) -> bool:
    """Return True if RUN is a directory in PEFT's format."""
    return (Path(run) / CONFIG).is_file()


def _default_name(run: str) -> str:
    if is_peft_directory(run):
        return Path(run).resolve().name
    checkpoint = find_checkpoint(run)
    return (run_of_checkpoint(checkpoint) or checkpoint.with_suffix("")).name


def member_of_checkpoint(run: str, changes: dict[str, Any]) -> Member:
    """Return the adapter of a run directory or a checkpoint for a bank.

    Args:
        run: The argument RUN.
        changes: Arguments of the module that replace the saved arguments.
    """
    checkpoint = find_checkpoint(run)
    return member_of_run(load_module(checkpoint, changes), str(checkpoint))


def member_of_run(module: AdaptedModule, source: str) -> Member:
    """Return the adapter of a run for a bank.

    Raises:
        UsageError: If the run has no adapters.
        AdapterError: If the run trains A.
    """
    if module.tuning != "adapter":
        raise UsageError(
            f"RUN: {source} has tuning: {module.tuning}, but a bank holds adapters. Use runs with tuning: adapter."
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
