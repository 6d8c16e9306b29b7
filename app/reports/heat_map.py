"""Draw heat maps of spectra for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

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
LOWEST, HIGHEST = 0.01, 10.0  # ends of the colour scale for singular values, the same for all steps and runs
WIDTH, HEIGHT = 210, 216  # of the matrix, in pixels
TOP, BOTTOM, GAP, BAR, NUMBERS = 28, 40, 6, 12, 52  # heights: title, axis; gap; widths: colour bar, its numbers
TYPE = 13  # font size
INK, PAPER = (0, 0, 0), (255, 255, 255)


class HeatMap:
    """Draw heat maps with a row for each layer and a column for each index of a singular value.

    Row names, axis label and colour bar are the same in all pictures, and are drawn once.

    TensorBoard shows pictures about 350 pixels wide, and scales wider pictures down with loss of detail. So a picture
    has about this width, and consecutive rows of one name share one label. Pillow draws, since importing matplotlib and
    laying out its figures would take most of a measurement's time.

    Args:
        rows: Names of the rows.
        is_share: True for values in [0, 1] on a linear colour scale. False for a logarithmic scale from 0.01 to 10.
            Values outside of the scale get the colours of its ends.
    """

    def __init__(self, rows: Sequence[str], is_share: bool = False) -> None:
        self.is_share = is_share
        self.font, self.title_font = ImageFont.load_default(TYPE), ImageFont.load_default(TYPE + 1)
        self.left = 2 * GAP + max(int(self.font.getlength(name)) for name in rows)
        self.bar = self.left + WIDTH + 2 * GAP
        self.empty = Image.new("RGB", (self.bar + BAR + NUMBERS, TOP + HEIGHT + BOTTOM), PAPER)
        draw = ImageDraw.Draw(self.empty)
        first = 0
        self.borders: list[float] = []  # between rows of different names
        for name, equal in groupby(rows):
            after = first + len(list(equal))
            y = TOP + (first + after) / 2 * HEIGHT / len(rows)
            draw.text((self.left - GAP, y), name, INK, self.font, anchor="rm")
            self.borders.append(TOP + after * HEIGHT / len(rows))
            first = after
        label = "index of the singular value"
        draw.text((self.left + WIDTH / 2, TOP + HEIGHT + BOTTOM - GAP), label, INK, self.font, anchor="ms")
        colours = _coloured(np.linspace(1, 0, HEIGHT)[:, None])
        self.empty.paste(colours.resize((BAR, HEIGHT), Image.Resampling.NEAREST), (self.bar, TOP))
        ticks = ("0", "0.5", "1") if is_share else ("< 0.01", "0.1", "1", "> 10")  # the font has no ≤
        for i, tick in enumerate(ticks):
            y = TOP + (1 - i / (len(ticks) - 1)) * (HEIGHT - TYPE) + TYPE / 2
            draw.text((self.bar + BAR + GAP, y), tick, INK, self.font, anchor="lm")

    def render(self, values: Sequence[Sequence[float]] | np.ndarray, title: str) -> np.ndarray:
        """Draw a matrix under a title.

        Args:
            values: (rows, columns), not negative.
            title: Shown above.

        Returns:
            (height, width, 3) uint8.
        """
        data = np.asarray(values, dtype=float)
        if not self.is_share:
            data = np.log10(np.clip(data, LOWEST, HIGHEST) / LOWEST) / np.log10(HIGHEST / LOWEST)
        columns = data.shape[1]
        picture = self.empty.copy()
        picture.paste(_coloured(data).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST), (self.left, TOP))
        draw = ImageDraw.Draw(picture)
        for y in self.borders[:-1]:
            draw.line((self.left, y, self.left + WIDTH, y), PAPER, 2)
        draw.text((picture.width / 2, TOP / 2), title, INK, self.title_font, anchor="mm")
        for i in range(0, columns, -(-columns // 8)):
            x = self.left + (i + 0.5) * WIDTH / columns
            draw.text((x, TOP + HEIGHT + GAP), str(i + 1), INK, self.font, anchor="mt")
        return np.asarray(picture).copy()


def _coloured(shares: np.ndarray) -> Image.Image:
    """Return shares in [0, 1], (height, width), as a picture in viridis."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(shares, steps, VIRIDIS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
