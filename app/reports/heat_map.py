"""Draw heat maps of spectra for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# matplotlib's viridis at ten equal steps
VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 73, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (109, 205, 89),
        (180, 222, 44),
        (253, 231, 37),
    ]
)
WIDTH, ROW, MOST_ROWS, MOST_NAMES = (
    360,
    19,
    40,
    24,
)  # of the matrix in pixels; a row's height; rows at that height; names
TOP, BOTTOM, GAP, BAR, NUMBERS = (
    28,
    40,
    6,
    14,
    56,
)  # title; indices and their label; spaces; bar of colours; its numbers
INK, PAPER = (0, 0, 0), (255, 255, 255)


class HeatMap:
    """A matrix of layers × index; names, frame and bar of colours are drawn once.

    Drawn with Pillow, since importing matplotlib and laying out its figures would be most of a measurement's time.

    Args:
        rows: Names of the rows; of more than 24, some are left out.
    """

    def __init__(self, rows: Sequence[str]) -> None:
        self.small, self.large = ImageFont.load_default(10), ImageFont.load_default(13)
        self.left = GAP + max(int(self.small.getlength(name)) for name in rows) + GAP
        self.height = ROW * min(len(rows), MOST_ROWS)
        self.bar = self.left + WIDTH + 2 * GAP
        size = (self.bar + BAR + NUMBERS, TOP + self.height + BOTTOM)
        self.empty = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(self.empty)
        for i in range(0, len(rows), -(-len(rows) // MOST_NAMES)):
            y = TOP + (i + 0.5) * self.height / len(rows)
            draw.text((self.left - GAP, y), rows[i], INK, self.small, anchor="rm")
        label = "index of the singular value"
        draw.text((self.left + WIDTH / 2, size[1] - GAP), label, INK, self.small, anchor="ms")
        bar = _coloured(np.linspace(1, 0, self.height)[:, None]).resize((BAR, self.height), Image.Resampling.NEAREST)
        self.empty.paste(bar, (self.bar, TOP))

    def render(self, values: Sequence[Sequence[float]], title: str) -> np.ndarray:
        """Draw.

        Args:
            values: (rows, columns), not negative; the colours run from 0 to the largest.
            title: Shown above.

        Returns:
            (height, width, 3) uint8.
        """
        data = np.asarray(values, dtype=float)
        columns, largest = data.shape[1], float(data.max())
        picture = self.empty.copy()
        cells = _coloured(data / (largest or 1.0)).resize((WIDTH, self.height), Image.Resampling.NEAREST)
        picture.paste(cells, (self.left, TOP))
        draw = ImageDraw.Draw(picture)
        draw.text((self.left + WIDTH / 2, TOP / 2), title, INK, self.large, anchor="mm")
        for i in range(0, columns, -(-columns // 16)):
            x = self.left + (i + 0.5) * WIDTH / columns
            draw.text((x, TOP + self.height + GAP), str(i + 1), INK, self.small, anchor="mt")
        for share in (0.0, 0.5, 1.0) if len(data) > 1 else (0.0, 1.0):
            y = TOP + (1 - share) * self.height
            draw.text((self.bar + BAR + GAP, y), f"{share * largest:.3g}", INK, self.small, anchor="lm")
        return np.asarray(picture).copy()


def _coloured(shares: np.ndarray) -> Image.Image:
    """Shares in [0, 1], (height, width), as pixels of viridis."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(shares, steps, VIRIDIS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
