from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.analysis.averaging import average, average_error
from modules.analysis.combination import Update

ROWS = [10, 30, 60]
SCALE = 2.0


def clients(shared_a: bool, layers: int = 2) -> list[list[Update]]:
    """Return the updates of three clients, float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = [draw(4, 20) for _ in range(layers)]
    return [[Update(a if shared_a else draw(4, 20), draw(12, 4), SCALE) for a in shared] for _ in ROWS]


def averaged(updates: list[list[Update]]) -> list[Update]:
    layers = range(len(updates[0]))
    factors = average([{f"{k}{i}": getattr(u[i], k) for i in layers for k in "ab"} for u in updates], ROWS)
    return [Update(factors[f"a{i}"], factors[f"b{i}"], SCALE) for i in layers]


def dense(update: Update) -> Tensor:
    return update.scale * update.b.double() @ update.a.double()


def exact(updates: list[list[Update]]) -> list[Tensor]:
    return [
        sum((rows / sum(ROWS) * dense(u[i]) for rows, u in zip(ROWS, updates, strict=True)), torch.zeros(12, 20))
        for i in range(len(updates[0]))
    ]


def test_the_average_of_b_over_one_a_is_the_average_of_the_updates() -> None:
    updates = clients(shared_a=True)
    for result, expected in zip(averaged(updates), exact(updates), strict=True):
        torch.testing.assert_close(dense(result), expected, rtol=0, atol=1e-7 * float(expected.norm()))
    assert average_error(averaged(updates), updates, ROWS) < 1e-7


def test_the_error_of_averaging_both_factors_equals_the_dense_error() -> None:
    updates = clients(shared_a=False)
    references = exact(updates)
    differences = [dense(result) - expected for result, expected in zip(averaged(updates), references, strict=True)]
    norms = [torch.cat([t.flatten() for t in tensors]).norm() for tensors in (differences, references)]
    assert average_error(averaged(updates), updates, ROWS) == pytest.approx(float(norms[0] / norms[1]), rel=1e-10)


def test_weights_are_normalised_numbers_of_rows() -> None:
    states = [{"x": torch.tensor([0.0, 4.0])}, {"x": torch.tensor([8.0, 0.0])}]
    assert average(states, [1, 3])["x"].tolist() == [6.0, 1.0]
    assert average(states, [10, 30])["x"].tolist() == [6.0, 1.0]


def test_sums_are_rounded_once() -> None:
    """In float32, 1 + 2⁻²⁵ is 1, so a sum in float32 would lose the small values."""
    small = 2.0**-25
    states = [{"x": torch.tensor([1.0])}, *({"x": torch.tensor([small])} for _ in range(1024))]
    expected = torch.tensor([1.0 + 1024 * small], dtype=torch.float64) / 1025
    assert average(states, [1] * 1025)["x"].item() == expected.float().item()


def test_updates_of_zero_have_no_error() -> None:
    zero = [[Update(torch.randn(2, 5), torch.zeros(3, 2), 1.0)] for _ in range(2)]
    assert average_error(zero[0], zero, [1, 1]) == 0
