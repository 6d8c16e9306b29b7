"""List, add, remove or unpack the adapters of a bank, a file that `export --format bank` writes.

All adapters of a bank share one frozen A. `add` and `remove` replace the file atomically, under the lock FILE.lock.
Commands that change one bank at the same time wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from filelock import FileLock
from jsonargparse import ArgumentParser, Namespace

from app.console import escape_controls
from app.export.bank import is_peft_directory, member_of_checkpoint, read_members, split_names, unpack, write_bank
from app.export.low_rank import given_config
from app.export.peft import LABELS
from datamodules.atomic import WriteError
from datamodules.errors import UsageError, counted
from modules.formats.bank import Bank, BankAdapter, Member, Shared, Slot, check_member
from modules.formats.compact import factor_digest

Action = Literal["list", "add", "remove", "unpack"]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "action",
        metavar="ACTION",
        type=Action,
        help="list: print the adapters. add: add the adapters of RUNs. remove: remove the adapters of these NAMEs. "
        "unpack: write the adapters of these NAMEs, or all, as directories for PEFT.",
    )
    parser.add_argument("file", metavar="FILE", type=str, help="The bank.")
    parser.add_argument(
        "chosen",
        metavar="RUN|NAME",
        type=str,
        nargs="*",
        help="Runs or directories in PEFT's format to add, or names of adapters to remove or unpack.",
    )
    parser.add_argument(
        "--names",
        metavar="A,B",
        type=str | None,
        help="Names of the added adapters. Default: names of the directories.",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=str | None, help="With unpack: the parent of the directories to write."
    )
    parser.add_argument(
        "--model.backbone", metavar="NAME", type=str | None, help="With add: new path of the backbone, if it has moved."
    )
    parser.add_argument(
        "--model.weights", metavar="FILE", type=str | None, help="With add: new path of the file of weights."
    )


def run(arguments: Namespace) -> None:
    """Run one action on a bank.

    Raises:
        UsageError: If an argument is missing or superfluous, a name is taken, or a path cannot be written.
        AdapterError: If the file is no bank, a name is not in the bank, or a run does not fit the bank.
        CheckpointError: If a checkpoint is missing or damaged.
    """
    action: Action = arguments.action
    required = {"add": "RUN", "remove": "NAME"}.get(action)
    if required and not arguments.chosen:
        raise UsageError(f"{required}: bank {action} needs at least one {required} after the file.")
    if action == "list" and arguments.chosen:
        raise UsageError(f"NAME: bank list takes only a file. Remove {' '.join(arguments.chosen)}.")
    if (action == "unpack") != (arguments.output is not None):
        problem = "needs a directory. Give" if action == "unpack" else "writes no directory. Remove"
        raise UsageError(f"--output: bank {action} {problem} the option.")
    if arguments.names is not None and action != "add":
        raise UsageError(f"--names: bank {action} adds no adapters. Remove the option.")
    try:
        bank = Bank.open(arguments.file)
        if action == "list":
            print_table(bank)
        elif action == "unpack":
            unpack_all(bank, arguments.chosen or bank.names, Path(arguments.output))
        else:
            with FileLock(f"{arguments.file}.lock"):
                bank = Bank.open(arguments.file)  # Another process may have changed the bank.
                if action == "add":
                    changes = {key: value for key, value in arguments.model.as_dict().items() if value is not None}
                    add(bank, arguments.chosen, split_names(arguments.names), changes)
                else:
                    remove(bank, arguments.chosen)
    except (WriteError, PermissionError) as error:
        raise UsageError(f"{'--output' if action == 'unpack' else 'FILE'}: {error}") from error


def print_table(bank: Bank) -> None:
    """Print name, adapter rank, alpha, classes and digest of each adapter."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("name", "rank", "alpha", "classes", "digest"):
        table.add_column(column, no_wrap=True)
    for name in bank.names:
        labels = bank.labels(name)
        classes = "" if not labels else ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
        config = bank.config(name)
        cells = (name, str(config.rank), f"{config.alpha:g}", escape_controls(classes), bank.digest(name)[:12])
        table.add_row(*cells)
    Console(width=200).print(table)
    dtype = str(bank.dtype).removeprefix("torch.")
    size = bank.path.stat().st_size / 1e6
    print(
        f"{counted(len(bank.names), 'adapter')} of {counted(len(bank.shared.slots), 'projection')}, {dtype}, "
        f"{size:.3g} MB",
        flush=True,
    )


def add(bank: Bank, runs: Sequence[str], names: Sequence[str] | None, changes: dict[str, str]) -> None:
    """Add the adapters of runs, or of directories in PEFT's format, to a bank."""

    def read(run: str) -> Member:
        return member_of_directory(bank, run) if is_peft_directory(run) else member_of_checkpoint(run, changes)

    members = read_members(runs, names, dict.fromkeys(bank.names), read)
    for name, member in members.items():
        check_member(bank.shared, member.shared, name)
    adapters = [(name, bank.read(name)) for name in bank.names]
    adapters += [(name, member.adapter) for name, member in members.items()]
    write_bank(bank.path, bank.shared, bank.frozen, adapters, bank.dtype)
    print(
        escape_controls(f"Added {', '.join(members)}: {bank.path} has {counted(len(adapters), 'adapter')}."), flush=True
    )


def member_of_directory(bank: Bank, name: str) -> Member:
    """Return an adapter in PEFT's format as a member of a bank.

    Such a directory has no digest of its backbone. The name of the backbone is compared instead. The caller compares
    the projections, the ranks and A.

    Raises:
        UsageError: If the directory is for another backbone, its head does not fit the bank, or its class names are
            missing.
    """
    # Imported here, since `main.py --help` must stay fast.
    from app.commands.combined_adapters import read_sources

    (source,) = read_sources([name])
    first = bank.read(bank.names[0])
    base = first.peft.get("base_model_name_or_path")
    if base and source.base and Path(base).name != source.base:
        raise UsageError(
            f"RUN: {name} is for the backbone {source.base}, but the bank is for {base}. Add adapters of the bank's "
            "backbone."
        )
    heads = {
        f"{head}.{key.removeprefix(f'{peft_names[0]}.')}": tensor
        for head, peft_names in bank.shared.heads.items()
        for key, tensor in source.others.items()
        if peft_names and key.startswith(f"{peft_names[0]}.")
    }
    if heads.keys() != first.heads.keys():
        raise UsageError(
            f"RUN: {name} has the head tensors {', '.join(source.others) or 'none'}, but the bank's adapters have "
            f"{', '.join(first.heads) or 'none'}. Use adapters of one task."
        )
    if first.labels and not source.labels:
        raise UsageError(
            f"RUN: {name} has no class names. Write the class names into {LABELS} of the directory, as a JSON list."
        )
    classes = len(source.labels or ())
    for key, tensor in first.heads.items():
        shape, expected = tuple(heads[key].shape), tuple(tensor.shape)
        if shape[1:] != expected[1:] or shape[:1] not in (expected[:1], (classes,)):
            raise UsageError(
                f"RUN: {name} has {key} of shape {shape}, but the bank has {expected}. Use adapters of one task."
            )
    slots = []
    for name, update in source.run.updates.items():
        d_out, rank = update.b.shape
        digest = factor_digest(update.a)
        slots.append(Slot(source.run.projections[name], rank, update.a.shape[1], d_out, digest, None))
    config = given_config(first.config, source.run.updates)
    shared = Shared(tuple(slots), bank.shared.heads, bank.shared.fingerprint)
    bs = {key: update.b for key, update in source.run.updates.items()}
    return Member(shared, {}, BankAdapter(config, bs, heads, source.labels, source.content))


def remove(bank: Bank, names: Sequence[str]) -> None:
    """Remove adapters from a bank.

    Raises:
        UsageError: If no adapter would be left.
    """
    for name in names:
        bank.config(name)  # Raises for an unknown name.
    kept = [name for name in bank.names if name not in names]
    if not kept:
        raise UsageError(f"NAME: {bank.path} would be empty. Delete the file instead.")
    adapters = [(name, bank.read(name)) for name in kept]
    write_bank(bank.path, bank.shared, bank.frozen, adapters, bank.dtype)
    print(escape_controls(f"Removed {', '.join(names)}: {bank.path} has {counted(len(kept), 'adapter')}."), flush=True)


def unpack_all(bank: Bank, names: Sequence[str], output: Path) -> None:
    """Write adapters as directories for PEFT, each named after its adapter.

    Raises:
        UsageError: If a directory exists already. No adapter is then written.
    """
    for name in names:
        bank.config(name)  # Raises for an unknown name.
        if (output / name).exists():
            raise UsageError(f"--output: {output / name} exists already. Give another directory.")
    for name in names:
        unpack(bank, name, output / name)
    print(
        escape_controls(f"Unpacked {counted(len(names), 'adapter')}: {', '.join(str(output / n) for n in names)}"),
        flush=True,
    )
