"""Heat maps: position and color of values, size of the picture."""

from __future__ import annotations

import numpy as np
import pytest

from app.reports.heat_map import HEIGHT, TOP, TYPE, HeatMap

pytestmark = pytest.mark.drawn
BRIGHTEST = np.array([253, 231, 36])  # the last color of viridis


@pytest.mark.parametrize("is_share", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 60])
def test_the_largest_value_has_the_brightest_cell_at_its_position(rows: int, is_share: bool) -> None:
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
        assert down.mean() < height * (0.3 if rows > 1 else 0.6)  # the first row is at the top
    assert edges[0] < 0.2
    assert 0.6 < edges[1] < 0.85  # the color bar to the right ends in the same color


def test_the_colour_of_a_value_does_not_depend_on_other_values() -> None:
    chart = HeatMap(["query", "value"])
    centre = [chart.render([[0.1], [other]], "A title")[TOP + HEIGHT // 4, chart.left + 9] for other in (0.0, 5.0)]
    assert (centre[0] == centre[1]).all()


def test_tensorboard_shows_a_picture_without_scaling() -> None:
    """TensorBoard's cards are about 350 pixels wide. Scaling a picture to that width makes its letters unreadable."""
    chart = HeatMap([role for role in ("query", "key", "value", "output", "mlp_gate") for _ in range(32)])
    assert 330 < chart.empty.width < 370
    assert TYPE >= 12


def test_a_matrix_of_zeros_can_be_drawn() -> None:
    picture = HeatMap(["a", "b"]).render([[0.0, 0.0], [0.0, 0.0]], "Zeros")
    assert picture.std() > 0
