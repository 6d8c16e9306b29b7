"""Draw a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

MOST_NAMES = 20  # with more classes, names and counts are left out


def draw_confusion(matrix: Tensor, names: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix: colours show shares of the true class. A cell without samples is blank.

    With at most 20 classes and their names, each cell shows its count, and each row its name and recall.

    Args:
        matrix: (classes, classes), counts; a row for each true class.
        names: Names by label.

    Returns:
        (height, width, 3) uint8.
    """
    counts = matrix.cpu().numpy()
    true = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(true, 1)
    figure = Figure(figsize=(6.5, 5.8), dpi=140, layout="constrained")  # TensorBoard shows 350 pixels of the 910
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_equal(shares, 0), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    axes.set_title(f"accuracy {counts.trace() / max(counts.sum(), 1):.3f}, n = {counts.sum():,}", fontsize=15)
    axes.set_xlabel("Predicted class", fontsize=15)
    axes.set_ylabel("True class, with its recall", fontsize=15)
    if 0 < len(names) <= MOST_NAMES:
        recalls = [
            f"{share:.2f}" if rows else "none" for share, rows in zip(shares.diagonal(), true[:, 0], strict=True)
        ]
        rows = [f"{name}  {recall}" for name, recall in zip(names, recalls, strict=True)]
        font, size = min(10, 140 // len(names)), min(12, 110 // len(names))  # points, of names and counts
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=font, parse_math=False)
        axes.set_yticks(range(len(names)), rows, fontsize=font, parse_math=False)
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=size, color=colour)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
