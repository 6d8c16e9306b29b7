"""Report the growth of the adapters' singular values in finished runs, and the effect on the frozen weights."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from app.config.precedence import add_report_output, output_directory
from app.console import escape_controls
from datamodules.errors import UsageError

MOST_RUNS = 8  # number of colours that a reader can distinguish


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=str,
        help=f"Run directories (their best checkpoints) or checkpoints, up to {MOST_RUNS}; several are shown side by "
        "side.",
    )
    add_report_output(parser)
    parser.add_argument(
        "--top",
        metavar="K",
        type=int,
        default=10,
        help="Number of leading singular vectors of W + s·B·A that may be intruder dimensions. 0 leaves intruder "
        "dimensions out: they take two singular value decompositions of each adapted weight.",
    )


def run(arguments: Namespace) -> None:
    """Write the report.

    Raises:
        UsageError: If no run has adapters, more than `MOST_RUNS` have adapters, --top is negative, or the output is
            no directory.
        CheckpointError: If a run cannot be read.
        WriteError: If a file cannot be written.
    """
    # Imported here, since the import of pandas and matplotlib takes a second.
    from app.commands.finished_runs import read_runs, read_spectra, write_results
    from app.commands.spectrum_report import REPORT_FILES, build_report, build_tables, measure_weights

    output = output_directory(arguments.output)
    if arguments.top < 0:
        raise UsageError(f"--top: {arguments.top} is negative. Give 0 or more.")
    runs = read_runs(arguments.runs, least=1, most=MOST_RUNS)
    spectra = [read_spectra(run) for run in runs]
    weights = measure_weights(runs, arguments.top)
    tables = build_tables(runs, spectra, weights)
    page = write_results(output, build_report(runs, tables, arguments.top, weights.missing), tables, REPORT_FILES)
    print(escape_controls(f"Report: {page}"), flush=True)
