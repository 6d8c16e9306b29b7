"""Compare variants over learning rates and seeds: a study in one table, on one machine or many."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from app.console import escape_controls
from app.imports import OPTION

_log = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--config", metavar="FILE", type=str, required=True, help="The sweep, as in conf/sweeps/.")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="Trials at once on this machine.")
    parser.add_argument(
        "--storage",
        metavar="URL",
        type=str,
        help="Database of the study, which several machines share: postgresql+psycopg://USER@HOST/DATABASE or "
        "mysql+pymysql://… Default: a journal in the output directory.",
    )
    parser.add_argument("--output", metavar="DIR", type=str, help="Directory of the results. Default: runs/NAME.")
    parser.add_argument("--report", action="store_true", help="Write the report of the trials so far, and run none.")


def run(arguments: Namespace) -> None:
    """Run a sweep, or go on with one.

    Raises:
        SweepError: If the file of the sweep is wrong, or the sweep was started with another one.
    """
    from rich.console import Console

    from app.sweep.check import check_plan
    from app.sweep.plan import SweepError, read_plan
    from app.sweep.run import Sweep, report
    from app.sweep.start import open_ledger

    if arguments.workers < 1:
        raise SweepError(f"--workers: {arguments.workers} must be 1 or more.")
    plan = read_plan(arguments.config)
    output = Path(arguments.output or Path("runs") / plan.name)
    if arguments.report:
        table = report(plan, open_ledger(plan, arguments.storage, output, must_exist=True), output)
    else:
        check_plan(plan)
        ledger = open_ledger(plan, arguments.storage, output)
        imports = [word for prefix in arguments.allowed_imports for word in (OPTION, prefix)]
        table = Sweep(plan, ledger, output, arguments.workers, imports, _command(arguments, imports)).run()
    Console().print(table)
    print(f"Results: {escape_controls(str(output))}", flush=True)


def _command(arguments: Namespace, imports: list[str]) -> str:
    from sqlalchemy import make_url

    words = ["python", "main.py", *imports, "sweep"]
    for key in ("config", "workers", "storage", "output"):
        value = arguments[key]
        if key == "storage" and value is not None:
            value = make_url(value).render_as_string(hide_password=True)
        if value is not None:
            words += [f"--{key}", str(value)]
    return shlex.join(words)
