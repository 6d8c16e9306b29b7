"""Draw a learning rate range test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_range_test(rates: Sequence[float], losses: Sequence[float], suggestion: float | None) -> np.ndarray:
    """Draw the smoothed training loss over the learning rate.

    Args:
        rates: Learning rates in the order of the steps, above 0.
        losses: Smoothed loss at each step.
        suggestion: The learning rate to mark; None if there is none.

    Returns:
        (height, width, 3) uint8.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
    axes.plot(rates, losses)
    if suggestion is not None:
        axes.axvline(suggestion, linestyle="--", color="tab:red")
        axes.set_title(f"suggestion: model.learning_rate {suggestion:.3g}")
    axes.grid(alpha=0.3)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
