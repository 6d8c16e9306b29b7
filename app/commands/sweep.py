"""Compare variants over learning rates and seeds: a study in one table, on one machine or many."""

from __future__ import annotations

import logging
import shlex
import time
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from app.config.imports import OPTION
from app.config.program_files import program_command
from app.console import escape_controls

RESUME_OPTIONS = ("config", "base", "set", "minutes", "workers", "storage", "output")  # options that continue a sweep

_log = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--config", metavar="FILE", type=str, required=True, help="The sweep, as in conf/sweeps/.")
    parser.add_argument(
        "--base",
        metavar="FILE",
        type=str,
        action="append",
        default=[],
        help="Recipe that replaces the file's `base`. Give --base again for overlays.",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=str,
        action="append",
        default=[],
        help="Key of all trials, added to the file's `set`, such as data.task=rte. Give --set again for more.",
    )
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        help="Minutes that this command may take. First each variant's point is chosen. Then one seed after another "
        "confirms the choice, as long as a seed of all variants fits into the time. Repeat the command to continue.",
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="Number of trials that run at once on this machine."
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        type=str,
        help="Database of the study, which several machines share: postgresql+psycopg://USER@HOST/DATABASE or "
        "mysql+pymysql://… Default: a journal in the output directory.",
    )
    parser.add_argument("--output", metavar="DIR", type=str, help="Directory of the results. Default: runs/NAME.")
    parser.add_argument("--report", action="store_true", help="Write the report of the trials so far. Run no trial.")


def run(arguments: Namespace) -> None:
    """Run or continue a sweep.

    Raises:
        UsageError: If an option, the sweep's file or a recipe is wrong, or the sweep was started with a plan that
            does not fit. `SweepError` is a kind of UsageError.
    """
    from rich.console import Console

    from app.sweep.budget import Budget
    from app.sweep.check import check_plan
    from app.sweep.findings import time_used
    from app.sweep.plan import SweepError, read_plan
    from app.sweep.report import rich_table
    from app.sweep.run import Sweep, report
    from app.sweep.start import open_ledger

    began = time.monotonic()
    if arguments.workers < 1:
        raise SweepError(f"--workers: {arguments.workers} must be 1 or more.")
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        raise SweepError(f"--minutes: {arguments.minutes:g} must be above 0. Leave the option out to run to the end.")
    plan = read_plan(arguments.config, arguments.fit.parse, arguments.base, arguments.set)
    for note in plan.notes:
        _log.info(note)
    output = Path(arguments.output or Path("runs") / plan.name)
    imports = [word for prefix in arguments.allowed_imports for word in (OPTION, prefix)]
    command = _command_words(arguments, imports, ("config", "base", "set"))
    if arguments.report:
        facts, frame = report(plan, open_ledger(plan, arguments.storage, output, must_exist=True), output, command)
    else:
        check_plan(plan, arguments.fit.parse)
        ledger = open_ledger(plan, arguments.storage, output)
        budget = Budget(plan, arguments.minutes, arguments.workers, began) if arguments.minutes else None
        resume_command = shlex.join(_command_words(arguments, imports, RESUME_OPTIONS))
        facts, frame = Sweep(plan, ledger, output, arguments.workers, imports, command, resume_command, budget).run()
    Console().print(rich_table(facts, frame))
    for sentence in time_used(facts, frame):
        print(escape_controls(sentence))
    print(f"Results: {escape_controls(str(output))}", flush=True)


def _command_words(arguments: Namespace, imports: list[str], keys: tuple[str, ...]) -> list[str]:
    """Return the words of this command line, with the given options alone."""
    from sqlalchemy import make_url

    words = [*program_command(), *imports, "sweep"]
    for key in keys:
        value = arguments[key]
        if key == "storage" and value is not None:
            value = make_url(value).render_as_string(hide_password=True)
        if key == "minutes" and value is not None:
            value = f"{value:g}"
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [word for item in values for word in (f"--{key}", str(item))]
    return words
