"""List the runs below a directory: variant, data, best metric, trained parameters, time and date of each.

Only config.yaml and metrics.json of each run are read, so that a thousand runs take a few seconds.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonargparse import ArgumentParser, Namespace

from app.console import escape_controls, seconds_text
from datamodules.atomic import atomic_write
from datamodules.errors import UsageError, counted

if TYPE_CHECKING:
    from rich.table import Table

    from app.commands.run_records import RunRecord

Column = Literal["name", "state", "variant", "data", "best", "parameters", "seconds", "date"]
TITLES = {"seconds": "time"}  # titles of columns whose cells have units, unlike the values of CSV and JSON
FIELDS = ("name", "state", "variant", "path", "task", "metric", "best", "parameters", "seconds", "date")
MISSING = "–"
UNLIMITED = 10_000  # characters of a line, so that each run is one line for grep and for a pager


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "root", metavar="ROOT", type=str, nargs="?", default="runs", help="Directory of the runs. Default: runs."
    )
    parser.add_argument(
        "--sort",
        type=Column,
        default="name",
        help="Column to sort by. With best, the best run of each metric comes first; with date, the newest run.",
    )
    parser.add_argument("--csv", metavar="FILE", type=str | None, help="Write the table to a CSV file instead.")
    parser.add_argument("--json", action="store_true", help="Print the table as JSON instead.")


def run(arguments: Namespace) -> None:
    """List the runs.

    Raises:
        UsageError: If there is no such directory, or both --csv and --json are given.
        WriteError: If the CSV file cannot be written.
    """
    from rich.console import Console

    from app.commands.run_records import STATES, find_runs, read_record

    root = Path(arguments.root)
    if not root.is_dir():
        raise UsageError(f"ROOT: there is no directory {root}. Give the directory that holds the runs.")
    if arguments.csv and arguments.json:
        raise UsageError("--csv and --json exclude each other. Give one of the options.")
    records = sort_records([read_record(run) for run in find_runs(root)], arguments.sort)
    rows = [row_of(record, root) for record in records]
    if arguments.json:
        print(json.dumps(rows, indent=2), flush=True)
        return
    if arguments.csv:
        write_csv(rows, Path(arguments.csv))
        print(f"Runs: {len(rows)} in {escape_controls(arguments.csv)}", flush=True)
        return
    if records:
        Console(width=UNLIMITED).print(table_of(rows))
    for state in STATES:
        if state != "finished" and (count := sum(record.state == state for record in records)):
            print(f"{count} {state}: {STATES[state]}.")
    print(f"{counted(len(records), 'run')} below {escape_controls(str(root))}", flush=True)


def sort_records(records: Sequence[RunRecord], column: Column) -> list[RunRecord]:
    """Return the runs sorted by a column; runs without a value come last.

    Args:
        records: The runs, sorted by name.
        column: The column.
    """

    def best(record: RunRecord) -> Any:
        if record.best is None:
            return None
        metric, value = record.best
        return metric, value if record.keys.get("checkpoint.mode") == "min" else -value

    keys: dict[str, Callable[[RunRecord], Any]] = {
        "state": lambda record: record.state,
        "variant": lambda record: record.variant,
        "data": data_of,
        "best": best,
        "parameters": lambda record: record.number("params/trainable"),
        "seconds": lambda record: record.number("time/fit_seconds"),
        "date": lambda record: -record.date.timestamp(),
    }
    if column == "name":
        return list(records)
    pairs = [(keys[column](record), record) for record in records]
    missing = [record for value, record in pairs if value is None]
    ordered = sorted((pair for pair in pairs if pair[0] is not None), key=lambda pair: pair[0])
    return [record for _, record in ordered] + missing


def data_of(record: RunRecord) -> tuple[str, str] | None:
    """Return path and task of a run's data; None if config.yaml names no path."""
    path, task = (record.keys.get(f"data.{key}") for key in ("path", "task"))
    return None if path is None else (str(path), str(task or ""))


def row_of(record: RunRecord, root: Path) -> dict[str, Any]:
    """Return the values of a run for CSV and JSON."""
    metric, best = record.best or (None, None)
    path, task = data_of(record) or (None, None)
    name = record.directory.relative_to(root).as_posix()
    return {
        "name": record.directory.absolute().name if name == "." else name,
        "state": record.state,
        "variant": record.variant,
        "path": path,
        "task": task or None,
        "metric": metric,
        "best": best,
        "parameters": record.number("params/trainable"),
        "seconds": record.number("time/fit_seconds"),
        "date": record.date.isoformat(" ", "seconds"),
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table for the terminal, one line for each run. An absolute data path is cut to its last part."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in get_args(Column):
        is_number = column in ("parameters", "seconds")
        table.add_column(TITLES.get(column, column), justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        path = row["path"] or MISSING
        data = [Path(path).name if Path(path).is_absolute() else path, row["task"] or ""]
        cells = [
            row["name"],
            row["state"],
            row["variant"] or MISSING,
            " ".join(dict.fromkeys(data)).strip(),  # A folder often has the name of the task.
            MISSING if row["best"] is None else f"{row['metric']} {row['best']:.4g}",
            MISSING if row["parameters"] is None else f"{row['parameters']:,}",
            MISSING if row["seconds"] is None else seconds_text(row["seconds"]),
            row["date"].rpartition(":")[0],
        ]
        table.add_row(*(Text(escape_controls(cell)) for cell in cells))
    return table


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the table as CSV, one row for each run. A missing value is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
