"""Apply the closed forms of linear regression to a recipe's frozen backbone, before any training.

Data and model are built as `fit` builds them. A few training batches give three moments at each adapted projection: the
second moment of the inputs, the gradient to the weight, and the second moment of the gradients to the outputs.
docs/theory.md explains what these moments say about a network, and what they do not say.
"""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from app.config.fit_keys import add_fit_arguments
from app.config.precedence import output_directory
from app.console import escape_controls
from datamodules.errors import UsageError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=str,
        required=True,
        help="Directory of the report. An earlier report in it is overwritten.",
    )
    parser.add_argument("--batches", type=int, default=8, help="Training batches to measure, 1 or more.")
    parser.add_argument(
        "--head_steps",
        type=int,
        default=32,
        help="Optimizer steps in which a new head is trained alone before the measurement. With 0, the gradients "
        "come from a random head.",
    )
    add_fit_arguments(parser)


def run(arguments: Namespace) -> None:
    """Measure a recipe and write its report.

    Raises:
        UsageError: For a wrong value, or for keys that leave nothing to measure.
        WriteError: If a file cannot be written.
    """
    from app.commands.moments import measure
    from app.commands.theory_report import analyse, write_report  # imports pandas and matplotlib

    for name, least in (("batches", 1), ("head_steps", 0)):
        if arguments[name] < least:
            raise UsageError(f"--{name}: {arguments[name]} is too small. Give {least} or more.")
    output = output_directory(arguments.output).resolve()
    analysis = analyse(measure(arguments.fit.parse, arguments.fit_arguments, arguments.batches, arguments.head_steps))
    page = write_report(analysis, output)
    print(escape_controls(f"Report: {page}"), flush=True)
