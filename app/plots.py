"""Pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class HeatMap:
    """A matrix of layers × index, drawn again and again into one figure, which spares most of the drawing.

    Args:
        rows: Names of the rows; of more than 24, some are left out.
    """

    def __init__(self, rows: Sequence[str]) -> None:
        self.figure = Figure(figsize=(5, 1.2 + 0.17 * min(len(rows), 40)), dpi=110, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_subplot()
        step = -(-len(rows) // 24)
        self.axes.set_yticks(range(0, len(rows), step), list(rows)[::step], fontsize=7)
        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        self.axes.set_xlabel("index of the singular value", fontsize=8)
        self.image = self.axes.imshow(np.zeros((len(rows), 1)), aspect="auto", interpolation="nearest")
        self.bar = self.figure.colorbar(self.image)

    def render(self, values: Sequence[Sequence[float]], title: str) -> np.ndarray:
        """Draw.

        Args:
            values: (rows, columns), not negative; the colours run from 0 to the largest.
            title: Shown above.

        Returns:
            (height, width, 3) uint8.
        """
        data = np.asarray(values)
        columns = data.shape[1]
        self.image.set_data(data)
        self.image.set_extent((0.5, columns + 0.5, len(data) - 0.5, -0.5))
        self.image.set_clim(0, max(float(data.max()), 1e-12))
        self.axes.set_xlim(0.5, columns + 0.5)
        self.axes.set_title(title, fontsize=10)
        self.canvas.draw()
        self.figure.set_layout_engine("none")  # settled by the first drawing; again it would take most of the time
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()
