"""Correlation of length and label, compared with SciPy."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from datamodules.loading.length_effect import rank_eta_squared, strong_effect


def lengths_and_labels(size: int, classes: int, effect: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return lengths with many ties, and classes that shift their median."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    lengths = 10 * (0.5 * torch.randn(size, generator=generator) + effect * labels).exp()
    return lengths.round().clamp(3, 128).int(), labels


@pytest.mark.parametrize("effect", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("size", "classes"), [(40, 2), (300, 4), (1000, 77)])
def test_rank_eta_squared_equals_that_of_kruskal_and_wallis(size: int, classes: int, effect: float) -> None:
    lengths, labels = lengths_and_labels(size, classes, effect)
    groups = [lengths[labels == label].numpy() for label in labels.unique()]
    expected = (stats.kruskal(*groups).statistic - len(groups) + 1) / (size - len(groups))
    assert rank_eta_squared(lengths, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("effect", [-1.0, 1.0])
def test_spearmans_rho_of_a_regression_equals_scipys(effect: float) -> None:
    lengths, labels = lengths_and_labels(200, 6, effect)
    scores = labels + 0.5 * torch.rand(200).round()
    expected = stats.spearmanr(lengths.numpy(), scores.numpy()).statistic
    assert strong_effect(lengths, scores) == f"Spearman's rank correlation {expected:.2f}"


@pytest.mark.parametrize(
    "labels", [torch.zeros(9).long(), torch.arange(9), torch.arange(9) % 3, torch.zeros(9), torch.arange(9.0)]
)
def test_equal_lengths_and_single_classes_have_no_effect(labels: Tensor) -> None:
    assert strong_effect(torch.full((9,), 7), labels) is None


def test_many_small_classes_have_no_effect_by_chance() -> None:
    values = [rank_eta_squared(*lengths_and_labels(300, 100, 0.0, seed)) for seed in range(20)]
    assert abs(sum(values) / 20) < 0.05  # the biased estimate H / (n - 1) would be 0.33


@pytest.mark.parametrize(
    ("effect", "regression", "expected"),
    [(0.0, False, None), (1.0, False, "explains 8"), (0.0, True, None), (-1.0, True, "correlation -0.8")],
)
def test_only_a_strong_effect_is_reported(effect: float, regression: bool, expected: str | None) -> None:
    lengths, labels = lengths_and_labels(400, 4, effect)
    found = strong_effect(lengths, labels.float() if regression else labels)
    assert found is None if expected is None else expected in (found or "")
