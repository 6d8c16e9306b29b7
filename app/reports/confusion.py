"""Draw a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

MOST_NAMES = 20  # of classes that are written out


def draw_confusion(matrix: Tensor, names: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix, of few classes with their names and counts.

    Args:
        matrix: (classes, classes), counts; a row for each true class.
        names: Names by label.

    Returns:
        (height, width, 3) uint8.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(matrix.cpu().numpy())
    axes.set_xlabel("Predicted class", fontsize=15)
    axes.set_ylabel("True class", fontsize=15)
    if 0 < len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=45, fontsize=10, parse_math=False)
        axes.set_yticks(range(len(names)), names, rotation=25, fontsize=10, parse_math=False)
        brightest, size = int(matrix.max()), min(15, 150 // len(names))  # of the type, in points
        for row, counts in enumerate(matrix.tolist()):
            for column, count in enumerate(counts):
                colour = "black" if count > brightest / 2 else "white"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
