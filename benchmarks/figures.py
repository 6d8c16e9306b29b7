"""Draw the adapted layer of README.md, and the many adapters of docs/many-adapters.md.

    python -m benchmarks.figures --output docs/images/layer.svg
    python -m benchmarks.figures --picture many_adapters --output docs/images/many_adapters.svg

docs/images/spectra.png is `singular_values.png` of the command `spectrum` on three runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# the blue and the vermilion of the reports (Okabe and Ito)
FROZEN, TRAINED, COMBINED, INK = "#d9dce1", "#0072B2", "#D55E00", "#222222"


def draw_layer() -> Figure:
    """Return a picture of y = W·x + s·B·(A·x) with A frozen and B trained."""
    figure, axes = _empty()
    _box(axes, 2.2, 1.95, 3.2, 0.85, "W", "d_out × d_in, pretrained, frozen", FROZEN, INK)
    _box(axes, 1.75, 0.45, 1.75, 0.85, "A", "r × d_in, random, frozen", FROZEN, INK)
    _box(axes, 4.45, 0.45, 1.75, 0.85, "B", "d_out × r, trained from zero", TRAINED, "white")
    axes.text(0.35, 1.62, "x", fontsize=17, style="italic", ha="center", va="center", color=INK)
    axes.text(8.1, 1.62, "y", fontsize=17, style="italic", ha="center", va="center", color=INK)
    axes.text(6.75, 0.875, "× s", fontsize=13, ha="center", va="center", color=INK)
    axes.text(7.3, 1.62, "+", fontsize=16, ha="center", va="center", color=INK)
    axes.add_patch(FancyBboxPatch((7.18, 1.5), 0.24, 0.24, boxstyle="circle,pad=0.05", fill=False, edgecolor=INK))
    for start, end in (
        ((0.5, 1.7), (2.2, 2.375)),
        ((0.5, 1.54), (1.75, 0.875)),
        ((3.5, 0.875), (4.45, 0.875)),
        ((6.2, 0.875), (6.5, 0.875)),
        ((5.4, 2.375), (7.15, 1.74)),
        ((7.0, 0.95), (7.22, 1.42)),
        ((7.5, 1.62), (7.95, 1.62)),
    ):
        _arrow(axes, start, end)
    axes.text(3.97, 1.02, "x·Aᵀ", fontsize=10, ha="center", color=INK)
    axes.text(3.97, 0.2, "for backward the adapter keeps x·Aᵀ, r numbers a token", fontsize=10, ha="center", color=INK)
    return figure


def draw_many_adapters() -> Figure:
    """Return a picture of one frozen A, the trained Bs of several tasks, and their weighted sum."""
    figure, axes = _empty()
    axes.text(0.35, 1.62, "x", fontsize=17, style="italic", ha="center", va="center", color=INK)
    _arrow(axes, (0.5, 1.62), (0.95, 1.62))
    _box(axes, 0.95, 1.195, 1.75, 0.85, "A", "frozen, one for all tasks", FROZEN, INK)
    for y, task in ((2.2, "1"), (1.245, "2"), (0.29, "n")):
        _arrow(axes, (2.7, 1.62), (3.45, y + 0.375))
        _box(axes, 3.45, y, 1.6, 0.75, f"$B_{task}$", f"trained on task {task}", TRAINED, "white")
        _arrow(axes, (5.05, y + 0.375), (5.8, 1.62))
    axes.text(4.25, 1.12, "…", fontsize=13, ha="center", va="center", color=INK)
    _box(axes, 5.8, 1.195, 2.3, 0.85, r"$\Sigma\ w_i B_i$", "one adapter of the same rank", COMBINED, "white")
    axes.text(4.25, 0.08, "one A: the sum of the updates is the update of the sum", fontsize=10, ha="center", color=INK)
    return figure


PICTURES = {"layer": draw_layer, "many_adapters": draw_many_adapters}


def _empty() -> tuple[Figure, Axes]:
    """Return a white picture without axes."""
    figure = Figure(figsize=(8.4, 3.1))
    figure.patch.set_facecolor("white")  # A transparent picture would be unreadable on a dark page.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 8.4)
    axes.set_ylim(0, 3.1)
    axes.set_axis_off()
    return figure, axes


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, shrinkA=0, shrinkB=0))


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, name: str, note: str, fill: str, ink: str
) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=fill, edgecolor=INK)
    )
    axes.text(x + width / 2, y + height * 0.63, name, fontsize=17, ha="center", va="center", color=ink)
    axes.text(x + width / 2, y + height * 0.22, note, fontsize=9, ha="center", va="center", color=ink)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", choices=PICTURES, default="layer", help="the picture to draw")
    parser.add_argument("--output", type=Path, required=True, help="file to write; the suffix sets the format")
    with mpl.rc_context({"svg.hashsalt": "onesided"}):  # Each run writes the same bytes.
        arguments = parser.parse_args()
        PICTURES[arguments.picture]().savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
