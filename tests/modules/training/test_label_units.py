"""Output layer of a regression: training equals the training of a plain layer on standardized labels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import ModelError
from modules.training.label_units import LabelUnitsLinear, check_label_scaling
from modules.training.optimization import OptimizerSpec, parameter_groups

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"eps": 1e-3},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True},
    "Adafactor": {},  # its steps depend on the size of the weights
    "ASGD": {"lambd": 0.1},  # decays the weights too
}
SCALES = [(683.0, 241.0), (-0.002, 1e-4), (1e6, 1.0)]


def train(model: nn.Sequential, inputs: Tensor, labels: Tensor, optimizer: str) -> None:
    """Take 30 steps with clipped gradients."""
    layers = [layer for layer in model if isinstance(layer, LabelUnitsLinear)]
    unit = layers[0].unit if layers else 1.0
    spec = OptimizerSpec({"class_path": f"torch.optim.{optimizer}", "init_args": OPTIMIZERS[optimizer]}, 0.1)
    groups = parameter_groups(
        nn.Identity(),
        dict(model.named_parameters()),
        tuning="head",
        learning_rate=0.01,
        weight_decay=0.1,
        lr_ratio_b=1.0,
        lr_ratio_head=2.0,
    )
    stepper = spec.build(groups)
    for _ in range(30):
        stepper.zero_grad()
        (F.mse_loss(model(inputs).squeeze(-1), labels) / unit**2).backward()
        for layer in layers:
            layer.standardize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        stepper.step()
        for layer in layers:
            layer.restore()


@pytest.mark.parametrize(("mean", "deviation"), SCALES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_training_on_standardized_labels(optimizer: str, mean: float, deviation: float) -> None:
    torch.manual_seed(0)
    output = LabelUnitsLinear(8, bias=True).double()
    model = nn.Sequential(nn.Linear(5, 8).double(), nn.Tanh(), output)
    plain = copy.deepcopy(model)
    plain[2] = nn.Linear(8, 1).double()
    plain[2].load_state_dict(output.state_dict())
    inputs = torch.randn(16, 5, dtype=torch.float64)
    standardized = inputs.sum(-1).sin()
    output.set_units(mean, deviation)
    train(model, inputs, mean + deviation * standardized, optimizer)
    train(plain, inputs, standardized, optimizer)
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(output.weight / deviation, plain[2].weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((output.bias - mean) / deviation, plain[2].bias, rtol=1e-6, atol=1e-8)


def test_predictions_are_float32_under_autocast() -> None:
    output = LabelUnitsLinear(4, bias=True)
    output.set_units(683.4, 241.0)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = output(torch.zeros(1, 4, dtype=torch.bfloat16))
    assert prediction.dtype == torch.float32
    assert float(prediction - output.bias) == 0
    assert 683.4 - 241 < float(prediction) < 683.4 + 241  # bfloat16 has only multiples of 4 there
    assert float(prediction) % 4 != 0


def test_only_random_weights_are_scaled() -> None:
    loaded, random = LabelUnitsLinear(4, bias=True), LabelUnitsLinear(4, bias=True)
    loaded.load_state_dict(random.state_dict())
    before = random.weight.detach().clone()
    for layer in (loaded, random):
        for _ in range(2):  # every setup of a run sets the units
            layer.set_units(10.0, 3.0)
    assert torch.equal(loaded.weight, before)
    assert torch.equal(random.weight, 3 * before)
    assert loaded.unit == random.unit == 3


@pytest.mark.parametrize(
    ("bias", "mean", "deviation", "unit"),
    [(True, 4.0, 3.0, 3.0), (False, 4.0, 3.0, 5.0)],
)
def test_unit_of_layers_with_and_without_bias(bias: bool, mean: float, deviation: float, unit: float) -> None:
    output = LabelUnitsLinear(4, bias=bias)
    output.set_units(mean, deviation)
    assert output.unit == unit


@pytest.mark.parametrize(
    "scaling", [[], [1.0], [1.0, 2.0, 3.0], [math.nan, 1.0], [0.0, math.inf], [0.0, -1.0], [0.0, 0.0]]
)
def test_a_wrong_scaling_is_refused(scaling: list[float]) -> None:
    with pytest.raises(ModelError, match=r"model\.label_scaling: .* must be two finite numbers: the mean"):
        check_label_scaling(scaling)
