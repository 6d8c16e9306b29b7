"""Compare the subspaces that A and B of several runs have learnt, with chance level and permutation interval."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from app.config.precedence import add_report_output, output_directory
from app.console import escape_controls


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=str,
        help="Two or more run directories (their best checkpoints), checkpoints, or adapters in PEFT's format, over "
        "one backbone. Adapter ranks may differ.",
    )
    add_report_output(parser)


def run(arguments: Namespace) -> None:
    """Write the report.

    Raises:
        UsageError: If fewer than two runs have adapters, their backbones differ, no projection is adapted by all
            runs, or the output is no directory.
        CheckpointError: If a run cannot be read.
        WriteError: If a file cannot be written.
    """
    # Imported here, since the import of pandas and matplotlib takes a second.
    from app.commands.finished_runs import check_same_backbone, read_runs, write_results
    from app.commands.similarity_report import REPORT_FILES, build_report, build_tables

    output = output_directory(arguments.output)
    runs = read_runs(arguments.runs, least=2)
    check_same_backbone(runs)
    tables = build_tables(runs)
    page = write_results(output, build_report(runs, tables), tables, REPORT_FILES)
    print(escape_controls(f"Report: {page}"), flush=True)
