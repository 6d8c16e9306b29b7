"""Combine adapters of one backbone: exact sums over one frozen factor, TIES, DARE, or a truncated sum.

The output is one adapter in PEFT's format.
"""

from __future__ import annotations

import math
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from app.config.precedence import expanded_path
from app.console import escape_controls
from datamodules.atomic import WriteError, atomic_directory
from datamodules.errors import UsageError, counted


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=str,
        help="Two or more adapters of one backbone: run directories (with their best checkpoints), checkpoints, or "
        "directories in PEFT's format.",
    )
    parser.add_argument(
        "--weights",
        metavar="w,…",
        type=str | None,
        help="Weight of each RUN, such as 0.5,0.5. A negative weight subtracts: --weights=1,-1. Default: 1/n each.",
    )
    parser.add_argument(
        "--method",
        type=Literal["sum", "ties", "dare"],
        default="sum",
        help="sum: the weighted sum of the updates s·B·A. ties: trim each trained factor, elect signs, average the "
        "agreeing entries (Yadav et al. 2023). dare: drop entries at random, rescale, add (Yu et al. 2024).",
    )
    parser.add_argument(
        "--density",
        type=float | None,
        help="For ties and dare: share of the entries of each trained factor that is kept. Default: 0.2.",
    )
    parser.add_argument("--seed", type=int | None, help="For dare: seed of the dropped entries. Default: 0.")
    parser.add_argument(
        "--via",
        metavar="svd",
        type=str | None,
        help="svd: combine adapters that share no factor, by a truncated singular value decomposition of their sum. "
        "The loss is printed.",
    )
    parser.add_argument("--rank", metavar="r", type=int | None, help="For --via svd: adapter rank of the result.")
    parser.add_argument(
        "--heads",
        metavar="HEAD",
        nargs="+",
        type=str,
        default=["combine"],
        help="combine: average the heads by class name. keep RUN: keep the head of this RUN. drop: write no head.",
    )
    parser.add_argument("--output", metavar="DIR", type=str, required=True, help="New or empty directory to write.")


def run(arguments: Namespace) -> None:
    """Combine the adapters and write the result.

    Raises:
        UsageError: If an option has a wrong value, the adapters cannot be combined, or the output is not empty or
            cannot be written.
        CheckpointError: If an adapter cannot be read.
    """
    # Imported here, since `main.py --help` must stay fast.
    from app.commands.combined_adapters import Combination, combine, read_sources

    output = expanded_path("--output", arguments.output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"--output: {output} exists already. Give a new or an empty directory.")
    if len(arguments.runs) < 2:
        raise UsageError("RUN: one adapter cannot be combined. Give two or more.")
    options = Combination(
        weights=_weights(arguments.weights, len(arguments.runs)),
        method=arguments.method,
        density=_density(arguments),
        seed=_seed(arguments),
        rank=_rank(arguments),
        heads=_heads(arguments),
    )
    sources = read_sources(arguments.runs)
    combined = combine(sources, options)
    try:
        with atomic_directory(output) as folder:
            load = combined.write(folder, output.name)
    except WriteError as error:
        raise UsageError(f"--output: {error}") from error
    for fact in combined.facts.items():
        print(escape_controls(": ".join(fact)))
    print(escape_controls(f"Load it with\n\n{load(str(output))}\n"))
    print(escape_controls(f"Combined: {output}"), flush=True)


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights: {text!r:.120} is not a list of numbers. Use the form 0.5,0.5.") from error
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise UsageError(f"--weights: {text!r:.120} is not allowed. Use finite numbers that are not all zero.")
    if len(weights) != count:
        raise UsageError(
            f"--weights: {counted(len(weights), 'weight')} cannot match {counted(count, 'adapter')}. Give one weight "
            "for each RUN."
        )
    return weights


def _density(arguments: Namespace) -> float:
    if arguments.density is None:
        return 0.2
    if arguments.method == "sum":
        raise UsageError("--density: only --method ties and --method dare drop entries. Remove the option.")
    if not 0 < arguments.density <= 1:
        raise UsageError(f"--density: {arguments.density} is out of range. Use a number in (0, 1], such as 0.2.")
    return float(arguments.density)


def _seed(arguments: Namespace) -> int:
    if arguments.seed is not None and arguments.method != "dare":
        raise UsageError("--seed: only --method dare draws random numbers. Remove the option.")
    return arguments.seed or 0


def _rank(arguments: Namespace) -> int | None:
    """Return the rank of a truncated sum, or None for a combination over a shared factor."""
    if arguments.via not in (None, "svd"):
        raise UsageError(f"--via: {arguments.via!r:.80} is unknown. Use svd.")
    if (arguments.via is None) != (arguments.rank is None):
        raise UsageError("--via and --rank: one option is missing. Use --via svd --rank r, or neither option.")
    if arguments.via is None:
        return None
    if arguments.method != "sum":
        raise UsageError(
            f"--method: {arguments.method} combines trained factors over one frozen factor, but --via svd combines "
            "updates. Use --method sum, or remove --via and --rank."
        )
    if arguments.rank < 1:
        raise UsageError(f"--rank: {arguments.rank} is too small. Use 1 or more.")
    return int(arguments.rank)


def _heads(arguments: Namespace) -> str | int:
    """Return `combine`, `drop`, or the position of the RUN whose head is kept."""
    match arguments.heads:
        case ["combine"]:
            return "combine"
        case ["drop"]:
            return "drop"
        case ["keep", name] if name in arguments.runs:
            return int(arguments.runs.index(name))
        case ["keep", name]:
            raise UsageError(f"--heads: keep {name!r:.200} is none of the given RUNs. Give one of the RUNs.")
    raise UsageError(
        f"--heads: {' '.join(arguments.heads)!r:.200} is unknown. Use combine, keep RUN or drop, after the RUNs."
    )
