"""Heat maps show the matrix they are given, the second time as the first."""

from __future__ import annotations

import numpy as np
import pytest

from app.reports.heat_map import HEIGHT, TOP, TYPE, HeatMap

pytestmark = pytest.mark.drawn
BRIGHTEST = np.array([253, 231, 36])  # the end of viridis


@pytest.mark.parametrize("is_share", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 60])
def test_the_largest_value_is_where_it_belongs(rows: int, is_share: bool) -> None:
    chart = HeatMap(["query"] * (rows - rows // 2) + ["value"] * (rows // 2), is_share)
    edges = []
    for column in (0, 7):
        values = np.zeros((rows, 8))
        values[0, column] = 1.0 if is_share else 10.0
        picture = chart.render(values.tolist(), "A title")
        assert picture.dtype == np.uint8
        height, width, _ = picture.shape
        down, across = np.nonzero((np.abs(picture.astype(int) - BRIGHTEST) < 12).all(axis=-1))
        edges.append(across.min() / width)
        assert down.mean() < height * (0.3 if rows > 1 else 0.6)  # the first row is above
    assert edges[0] < 0.2
    assert 0.6 < edges[1] < 0.85  # before the bar of colours, which ends in the same colour


def test_a_value_has_one_colour_whatever_else_is_shown() -> None:
    chart = HeatMap(["query", "value"])
    centre = [chart.render([[0.1], [other]], "A title")[TOP + HEIGHT // 4, chart.left + 9] for other in (0.0, 5.0)]
    assert (centre[0] == centre[1]).all()


def test_tensorboard_shows_a_picture_without_scaling() -> None:
    """Its cards are about 350 pixels wide; smaller ones would lose strokes of the letters."""
    chart = HeatMap([role for role in ("query", "key", "value", "output", "mlp_gate") for _ in range(32)])
    assert 330 < chart.empty.width < 370
    assert TYPE >= 12


def test_nothing_but_zeros_can_be_drawn() -> None:
    picture = HeatMap(["a", "b"]).render([[0.0, 0.0], [0.0, 0.0]], "Zeros")
    assert picture.std() > 0
