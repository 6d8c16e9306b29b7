"""Error of a rounded update, compared with closed forms and with merging."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from modules.adapters import AdapterConfig, adapted_layers, attach, merge
from modules.formats.rounding import merge_rounding

if TYPE_CHECKING:
    from tests.support.bare_backbones import Backbone

STEPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # distance from 1 to the next number
DTYPES = pytest.mark.parametrize("dtype", list(STEPS))


@torch.no_grad()
def uniform(weights: list[float], updates: list[float]) -> nn.Module:
    """Return adapted layers whose weights are constant and whose updates are constant."""
    model = nn.ModuleDict({f"query{i}": nn.Linear(6, 4) for i in range(len(weights))})
    attach(model, AdapterConfig(rank=2, targets="regex:.*"))
    for layer, weight, update in zip(adapted_layers(model).values(), weights, updates, strict=True):
        layer.weight.fill_(weight)
        (factors,) = layer.factors()
        factors.A.fill_(1)
        factors.B.fill_(update / layer.scale / 2)
    return model


@DTYPES
@pytest.mark.parametrize(
    ("above", "steps", "error"),  # W − 1 and the update, both in steps
    [
        (0, 1 / 4, 1),  # the update is lost
        (0, 2.0**-10, 1),
        (0, 1, 0),
        (0, -1, 0),
        (0, 3 / 4, 1 / 3),  # the sum is rounded up to one step
        (0, 5 / 4, 1 / 5),
        (3 / 8, 1 / 4, 3),  # the weight is rounded down without the update, and up with the update
        (1 / 8, 1 / 4, 1),  # rounded down with and without the update
    ],
)
def test_rounding_of_one_layer(dtype: torch.dtype, above: float, steps: float, error: float) -> None:
    step = STEPS[dtype]
    rounding = merge_rounding(uniform([1 + above * step], [steps * step]), dtype)
    assert rounding is not None
    assert rounding == (pytest.approx(error, abs=1e-4), rounding.overall, "query0")


@DTYPES
def test_the_total_error_weights_layers_by_their_updates(dtype: torch.dtype) -> None:
    step = STEPS[dtype]
    rounding = merge_rounding(uniform([1, 1, 1, 1], [step, 0, step / 4, step]), dtype)
    assert rounding is not None
    assert rounding == (pytest.approx((1 / 16 / (2 + 1 / 16)) ** 0.5), 1, "query2")


def test_models_without_rounding_have_no_error() -> None:
    assert merge_rounding(uniform([1], [2.0**-9]), torch.float32) is None
    assert merge_rounding(uniform([1], [0]), torch.bfloat16) is None
    assert merge_rounding(nn.Linear(2, 2), torch.bfloat16) is None


@torch.no_grad()
def test_the_error_equals_the_loss_of_merging_in_every_family(backbone: Backbone) -> None:
    """The frozen weights are in bfloat16. Some adapted projections are parts of fused layers."""
    model = backbone.attach(targets="all").to(torch.bfloat16)
    for layer in adapted_layers(model).values():
        for factors in layer.factors():
            factors.float()
            factors.A.normal_(std=0.02)
            factors.B.normal_(std=0.02)
    before = copy.deepcopy(model)
    rounding = merge_rounding(model, torch.bfloat16)
    merge(model)
    errors, updates = [], []
    for name, layer in adapted_layers(model).items():
        original = adapted_layers(before)[name]
        assert torch.equal(original.delta(), layer.delta())
        updates.append(original.delta().double().norm())
        errors.append((layer.weight.double() - original.weight.double() - original.delta().double()).norm())
    total = torch.stack(errors).norm() / torch.stack(updates).norm()
    assert rounding is not None
    assert rounding.overall == pytest.approx(float(total), rel=1e-3)
    assert rounding.worst == pytest.approx(max(float(e / u) for e, u in zip(errors, updates, strict=True)), rel=1e-3)
    assert rounding.overall > 1e-3
