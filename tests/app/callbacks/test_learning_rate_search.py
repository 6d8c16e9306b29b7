"""The learning rate at the steepest decrease of the loss. `test_names.py` searches through the command line."""

from __future__ import annotations

import math

import pytest

from app.callbacks.learning_rate_search import steepest_decrease

RATES = [1e-5 * 30_000 ** (step / 100) for step in range(100)]


def curve(centre: float) -> list[float]:
    """Return losses that decrease from 2 to 1, most steeply over the logarithm of the learning rate at `centre`."""
    return [2 - 1 / (1 + math.exp(-2 * math.log(rate / centre))) for rate in RATES]


@pytest.mark.parametrize("centre", [RATES[30], RATES[60]])
def test_the_steepest_decrease_is_over_the_logarithm_of_the_learning_rate(centre: float) -> None:
    assert steepest_decrease(RATES, curve(centre)) == pytest.approx(centre)
    divergent = curve(centre)[:80] + [math.nan] * 20
    assert steepest_decrease(RATES, divergent) == pytest.approx(centre)


def test_too_few_steps_give_no_learning_rate() -> None:
    assert steepest_decrease(RATES[:12], curve(RATES[30])[:12]) is None
