"""Growth of a step's time and memory with depth, width, rank and tokens of ViT blocks, varied one at a time.

The base point is depth 6, width 384, rank 8 and 256 tokens, with one sequence, bfloat16 and all linear layers adapted.
The benchmark measures seconds of forward, backward and optimizer, and the bytes saved for backward. `power` is the
slope on logarithmic axes: 1 means proportional growth. The tables also show the cost of one more block, unit of width,
rank or token. The last section measures the gradients that two processes exchange (`benchmarks.gradient_bytes`).

    python -m benchmarks.scaling --output docs/results/benchmark_scaling.json \
        --figure docs/results/benchmark_scaling.png
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import ticker
from matplotlib.figure import Figure

from benchmarks import gradient_bytes
from benchmarks.harness import MIB, load, measured, paired_ratio, parse, parser, section, table, take_turns
from benchmarks.stacks import FAMILIES, arms_for, random_batches, random_stack

ARMS = {
    "floor": ("0.5", "o"),
    "PEFT": ("tab:red", "v"),
    "PEFT autocast": ("tab:orange", "^"),
    "ours B": ("tab:blue", "s"),
}
MIDDLE = {"depth": 6, "width": 384, "rank": 8, "tokens": 256}
SIZES = {
    "depth": [3, 6, 12, 24],
    "width": [384, 768, 1024],
    "rank": [4, 8, 16, 32, 64, 128, 256],
    "tokens": [64, 128, 256, 512, 1024],
}
QUICK_MIDDLE = {"depth": 2, "width": 192, "rank": 8, "tokens": 64}
QUICK_SIZES = {"depth": [1, 2, 4], "width": [128, 192, 256], "rank": [4, 16, 64], "tokens": [32, 64, 128]}
PROCESSES = {"threads": 1, "clock": "wall"}  # Fixed settings of the section `processes`.
QUANTITIES = (("median_seconds", 1000, "ms"), ("saved_bytes", 1 / MIB, "MiB"))
LABELS = {"median_seconds": "step, ms", "saved_bytes": "saved for backward, MiB"}
UNITS = {"depth": "blocks", "width": "width", "rank": "rank", "tokens": "tokens"}


def measure(size: dict[str, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds and saved bytes of each arm at one size."""
    family = replace(FAMILIES["vit"], width=size["width"], depth=size["depth"])
    arms = arms_for(list(ARMS), random_stack(family, torch.bfloat16), ["all"], size["rank"])
    batches = random_batches([(1, size["tokens"])], size["width"], torch.bfloat16)
    saved = {name: arm.saved(batches) for name, arm in arms.items()}
    turns = {name: partial(arm.step, batches) for name, arm in arms.items()}
    seconds = take_turns(turns, arguments.rounds, warm_up=1, clock=arguments.clock)
    return {
        **size,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_of_the_floor": {name: paired_ratio(values, seconds["floor"]) for name, values in seconds.items()},
        "saved_bytes": saved,
    }


def slopes(sizes: list[int], points: list[dict[str, Any]], quantity: str) -> dict[str, dict[str, float]]:
    """Return for each arm the slope on logarithmic axes, `power`, and on linear axes, `each`."""
    arms = {}
    for name in ARMS:
        values = [point[quantity][name] for point in points]
        arms[name] = {
            "power": round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 4) + 0.0,  # Turns -0.0 into 0.0.
            "each": float(np.polyfit(sizes, values, 1)[0]),
        }
    return arms


def sweep(varied: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all sizes of one quantity, with the other quantities at the base point."""
    middle, sizes = (QUICK_MIDDLE, QUICK_SIZES) if arguments.quick else (MIDDLE, SIZES)
    points = [measure(middle | {varied: size}, arguments) for size in sizes[varied]]
    return {
        "varied": varied,
        "sizes": sizes[varied],
        "points": points,
        "slopes": {quantity: slopes(sizes[varied], points, quantity) for quantity in LABELS},
    }


def show(name: str, figures: dict[str, Any]) -> None:
    """Print two tables of one sweep: time and memory."""
    for quantity, factor, unit in QUANTITIES:
        heads = [*(f"{size}" for size in figures["sizes"]), "power", f"{unit} each"]
        rows = [
            [
                arm,
                *(f"{factor * point[quantity][arm]:.1f}" for point in figures["points"]),
                f"{figures['slopes'][quantity][arm]['power']:.2f}",
                f"{factor * figures['slopes'][quantity][arm]['each']:.3f}",
            ]
            for arm in ARMS
        ]
        table(f"{name}: {LABELS[quantity]}", ["arm", *heads], rows)


def plot(sweeps: list[dict[str, Any]], path: Path) -> None:
    """Plot step times (top) and saved activations (bottom) on logarithmic axes, one column for each varied quantity."""
    figure = Figure(figsize=(3.4 * len(sweeps), 6), layout="constrained")
    axes = figure.subplots(2, len(sweeps), sharex="col", squeeze=False)
    for column, figures in enumerate(sweeps):
        for row, (quantity, factor, _) in enumerate(QUANTITIES):
            axis = axes[row, column]
            for name, (colour, marker) in ARMS.items():
                values = [factor * point[quantity][name] for point in figures["points"]]
                power = figures["slopes"][quantity][name]["power"]
                axis.plot(figures["sizes"], values, marker=marker, color=colour, label=f"{name}: slope {power:.2f}")
            axis.set(xscale="log", yscale="log", ylabel=LABELS[quantity] if column == 0 else None)
            axis.set_xticks(figures["sizes"], [str(size) for size in figures["sizes"]])
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            for side in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                side(ticker.LogFormatter(minor_thresholds=(2, 1)))
            axis.grid(alpha=0.3, which="both")
            axis.set_ylim(top=2.2 * axis.get_ylim()[1])  # Room for the legend.
            axis.legend(fontsize="small", loc="upper left")
        axes[1, column].set_xlabel(UNITS[figures["varied"]])
        fixed = {key: value for key, value in figures["points"][0].items() if key in UNITS and key != figures["varied"]}
        axes[0, column].set_title(", ".join(f"{key} {value}" for key, value in fixed.items()), fontsize="medium")
    first = sweeps[0]
    figure.suptitle(
        f"ViT blocks, bfloat16, all linear layers, one sequence; {first['cpu']}, {first['threads']} thread(s)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> None:
    """Measure, print, write and plot."""
    common = parser(__doc__, rounds=5, quick_rounds=2, processor=True)
    common.add_argument("--vary", nargs="+", choices=[*SIZES, "processes"], default=[*SIZES, "processes"])
    common.add_argument("--figure", type=Path, help="PNG file for a plot of the sweeps in this run and in --output")
    arguments = parse(common, words)
    known = load(arguments.output).keys() | arguments.vary
    if arguments.figure and not known & SIZES.keys():
        common.error(f"--figure: there is nothing to plot. Give --vary one of {', '.join(SIZES)}.")
    sweeps: dict[str, Any] = {}
    for varied in arguments.vary:
        figures = measured(arguments, varied, PROCESSES if varied == "processes" else None)
        if figures is None:
            with section(arguments, varied) as figures:
                if varied == "processes":
                    figures |= PROCESSES
                    figures["rows"] = gradient_bytes.measure(arguments.quick, arguments.rounds)
                else:
                    figures.update(sweep(varied, arguments))
        if varied == "processes":
            gradient_bytes.show(figures["rows"])
        else:
            show(varied, figures)
            sweeps[varied] = figures
    if arguments.figure:
        known = load(arguments.output) | sweeps
        plot([known[varied] for varied in SIZES if varied in known], arguments.figure)


if __name__ == "__main__":
    main()
