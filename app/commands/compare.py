"""Show the keys and the metrics in which runs differ, one column for each run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from app.console import escape_controls, quantity_text
from datamodules.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from app.commands.run_records import RunRecord

MISSING = object()  # stands for the value of a key that a run lacks
ABSENT = "–"
WIDEST = 48  # characters of a column; longer values are folded


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "runs", metavar="RUN", type=str, nargs="+", help="Two or more run directories, or checkpoints in them."
    )
    parser.add_argument("--all", action="store_true", help="Also show the keys and metrics that are equal.")
    parser.add_argument("--json", action="store_true", help="Print the values as JSON instead, without units.")


def run(arguments: Namespace) -> None:
    """Compare runs.

    Raises:
        UsageError: For fewer than two runs.
        CheckpointError: If a run is missing or damaged.
    """
    from rich.console import Console

    from app.commands.runs import UNLIMITED

    if len(arguments.runs) < 2:
        raise UsageError("RUN: one run cannot be compared. Give two or more.")
    records = [_read_run(name) for name in arguments.runs]
    names = short_names([record.directory for record in records])
    keys = compare_values([record.keys for record in records], arguments.all)
    metrics = compare_values([record.metrics for record in records], arguments.all)
    if arguments.json:
        content = {"runs": names, "keys": keys, "metrics": metrics}
        print(json.dumps(content, indent=2, default=lambda value: None if value is MISSING else str(value)), flush=True)
        return
    for title, chosen in (("Keys of config.yaml", keys), ("Metrics of metrics.json", metrics)):
        if chosen:
            Console(width=UNLIMITED).print(_table(title, names, chosen))
        else:
            print(f"{title}: no difference.", flush=True)


def _read_run(name: str) -> RunRecord:
    from app.commands.run_records import CONFIG, read_record
    from app.run.checkpoint_io import run_of_checkpoint
    from datamodules.errors import CheckpointError

    path = Path(name)
    directory = path if path.is_dir() else run_of_checkpoint(path)
    if directory is None or not directory.is_dir():
        raise CheckpointError(
            f"RUN: {name} is neither a run directory nor a checkpoint in a run directory. The command "
            "`runs` lists the runs."
        )
    record = read_record(directory)
    if record.state == "damaged":
        raise CheckpointError(
            f"RUN: config.yaml or metrics.json of {name} cannot be read. Restore the file, or leave the run out."
        )
    if not record.keys and not record.metrics:
        raise CheckpointError(f"RUN: {name} has no {CONFIG} and no metrics.json. The command `runs` lists the runs.")
    return record


def short_names(directories: Sequence[Path]) -> list[str]:
    """Return the paths of runs without their common leading folders."""
    parts = [directory.absolute().parts for directory in directories]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == parts[0][shared] for path in parts):
        shared += 1
    return ["/".join(path[shared:]) for path in parts]


def compare_values(runs: Sequence[Mapping[str, Any]], with_equal: bool) -> dict[str, list[Any]]:
    """Return the values of all runs by key, grouped by the first part of the key; MISSING in runs without the key.

    Args:
        runs: Values of each run by key.
        with_equal: True also returns the keys whose values are equal in all runs.
    """
    unsorted = dict.fromkeys(key for values in runs for key in values)
    sections = list(dict.fromkeys(_section(key) for key in unsorted))
    keys = sorted(unsorted, key=lambda key: sections.index(_section(key)))
    cells: dict[str, list[Any]] = {key: [values.get(key, MISSING) for values in runs] for key in keys}
    return {key: row for key, row in cells.items() if with_equal or len({_text(value) for value in row}) > 1}


def _section(key: str) -> str:
    """Return the first part of a key or of a metric's name."""
    return re.split("[./]", key)[0]


def cell_text(key: str, value: Any) -> str:
    """Return a value as text of the table. Metrics have units, and separators of thousands."""
    from app.commands.run_records import LARGEST

    if "/" in key and type(value) in (int, float) and abs(value) < LARGEST:
        return quantity_text(key, value) or _text(value)
    return _text(value)


def _text(value: Any) -> str:
    """Return a value as text. Floats with the same six significant digits give the same text."""
    if value is MISSING:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(escape_controls(name)), overflow="fold", max_width=WIDEST)
    for key, cells in rows.items():
        table.add_row(*(Text(escape_controls(cell)) for cell in (key, *(cell_text(key, value) for value in cells))))
    return table
