"""Draw the adapted layer of README.md.

    python -m benchmarks.figures --output docs/images/layer.svg

docs/images/spectra.png is `singular_values.png` of the command `spectrum` on three runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FROZEN, TRAINED, INK = "#d9dce1", "#0072B2", "#222222"  # the blue of the reports (Okabe and Ito)


def draw_layer() -> Figure:
    """Return a picture of y = W·x + s·B·(A·x) with A frozen and B trained."""
    figure = Figure(figsize=(8.4, 3.1))
    figure.patch.set_facecolor("white")  # A transparent picture would be unreadable on a dark page.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 8.4)
    axes.set_ylim(0, 3.1)
    axes.set_axis_off()
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
        axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, shrinkA=0, shrinkB=0)
        )
    axes.text(3.97, 1.02, "x·Aᵀ", fontsize=10, ha="center", color=INK)
    axes.text(3.97, 0.2, "for backward the adapter keeps x·Aᵀ, r numbers a token", fontsize=10, ha="center", color=INK)
    return figure


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
    parser.add_argument("--output", type=Path, required=True, help="file to write; the suffix sets the format")
    with mpl.rc_context({"svg.hashsalt": "onesided"}):  # Each run writes the same bytes.
        draw_layer().savefig(parser.parse_args().output, metadata={"Date": None})


if __name__ == "__main__":
    main()
