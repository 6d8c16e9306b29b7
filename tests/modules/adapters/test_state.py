"""The state of adapters: reading, loading and validating factors by name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.adapters import (
    AdapterConfig,
    AdapterError,
    adapted_layers,
    adapted_projections,
    adapter_state,
    attach,
    load_adapter_state,
    merge,
    unmerge,
)
from modules.adapters.state import frozen_fingerprint, state_problems
from tests.support.adapters import copied, randomize

if TYPE_CHECKING:
    from tests.support.bare_backbones import Backbone

only_vit = pytest.mark.parametrize("backbone", ["vit"], indirect=True)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_names_and_values_equal_those_of_the_state_dict(backbone: Backbone) -> None:
    model = backbone.attach(targets="all")
    state = adapter_state(model)
    own = model.state_dict()
    assert set(state) == {name for name in own if ".adapters." in name}
    assert all(torch.equal(tensor, own[name]) for name, tensor in state.items())
    # frozen factors are included
    assert len(state) == 2 * sum(n for role, n in backbone.counts.items() if role != "other")
    assert not any(tensor.requires_grad for tensor in state.values())


@only_vit
def test_names_of_a_fused_layer(backbone: Backbone) -> None:
    state = adapter_state(backbone.attach(targets=["query", "value"], rank=3))
    shapes = {f"blocks.{i}.attn.qkv.adapters.{role}": ((3, 24), (24, 3)) for i in (0, 1) for role in ("query", "value")}
    expected = {f"{name}.{f}": shape for name, pair in shapes.items() for f, shape in zip("AB", pair, strict=True)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_layers_and_projections_are_found_by_name(backbone: Backbone) -> None:
    model = backbone.attach(targets="attention")
    layers = adapted_layers(model)
    for name, (layer, factors) in adapted_projections(model).items():
        assert factors.projection.name == name
        assert layers[factors.projection.layer] is layer
        assert factors in layer.factors()


def test_a_plain_model_has_no_state(backbone: Backbone) -> None:
    assert adapter_state(backbone.model) == {}
    assert adapted_layers(backbone.model) == {}


def test_round_trip_is_bit_exact(backbone: Backbone, tmp_path: Path) -> None:
    other = copy.deepcopy(backbone.model)
    model = backbone.attach(targets="all")
    randomize(model)
    save_file(adapter_state(model), tmp_path / "adapter.safetensors")

    attach(other, AdapterConfig(rank=4, targets="all", seed=1), exclude=backbone.head)
    assert not torch.allclose(backbone.run(other), backbone.run(), atol=1e-3)
    load_adapter_state(other, load_file(tmp_path / "adapter.safetensors"))
    assert_same(adapter_state(other), adapter_state(model))
    assert torch.equal(backbone.run(other), backbone.run())


@only_vit
def test_loading_keeps_the_parameters_themselves(backbone: Backbone) -> None:
    """An optimizer keeps references to the parameters."""
    model = backbone.attach()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    state = {name: tensor + 1 for name, tensor in adapter_state(model).items()}
    load_adapter_state(model, state)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert_same(adapter_state(model), state)


@only_vit
def test_loading_keeps_the_models_precision(backbone: Backbone) -> None:
    model = backbone.attach()
    state = {name: (tensor + 1).bfloat16() for name, tensor in adapter_state(model).items()}
    load_adapter_state(model, state)
    assert_same(adapter_state(model), {name: tensor.float() for name, tensor in state.items()})


# states that do not fit

Q0 = "blocks.0.attn.qkv.adapters.query"


def without(state: dict[str, Tensor]) -> None:
    del state[f"{Q0}.B"]


def with_more(state: dict[str, Tensor]) -> None:
    state["head.weight"] = torch.zeros(2)


def with_another_rank(state: dict[str, Tensor]) -> None:
    state[f"{Q0}.A"] = torch.zeros(5, 24)


def that_would_broadcast(state: dict[str, Tensor]) -> None:
    state[f"{Q0}.A"] = torch.zeros(1, 24)


@only_vit
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, f"1 missing: {Q0}.B"),
        (with_more, "1 unexpected: head.weight"),
        (with_another_rank, f"1 of another shape: {Q0}.A is (5, 24), not (4, 24)"),
        (that_would_broadcast, f"1 of another shape: {Q0}.A is (1, 24), not (4, 24)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_not_loaded(
    backbone: Backbone, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = backbone.attach()
    before = copied(adapter_state(model))
    state = {name: torch.full_like(tensor, 7.0) for name, tensor in before.items()}
    change(state)
    with pytest.raises(AdapterError) as error:
        load_adapter_state(model, state)
    assert message in str(error.value)
    assert str(error.value).count(";") == 0  # the message has this problem alone
    assert_same(adapter_state(model), before)


@only_vit
def test_all_problems_of_a_state_are_reported_at_once(backbone: Backbone) -> None:
    model = backbone.attach()
    state = copied(adapter_state(model))
    with_another_rank(state)
    without(state)
    with_more(state)
    with pytest.raises(AdapterError, match=r"1 missing.*; 1 unexpected.*; 1 of another shape"):
        load_adapter_state(model, state)


def test_long_lists_of_names_are_shortened_and_counted() -> None:
    expected = {f"p{i}": torch.zeros(1) for i in range(7)}
    assert state_problems(expected, {}) == ["7 missing: p0, p1, p2, p3, p4, …"]
    assert state_problems(expected, {}, most=7) == ["7 missing: p0, p1, p2, p3, p4, p5, p6"]
    assert state_problems({}, expected, most=1) == ["7 unexpected: p0, …"]
    assert state_problems(expected, expected) == []


@only_vit
def test_loading_into_merged_adapters_does_not_change_the_frozen_weight(backbone: Backbone) -> None:
    model = backbone.attach()
    randomize(model)
    state = {name: 2 * tensor for name, tensor in adapter_state(model).items()}
    merge(model)
    with contextlib.suppress(AdapterError):  # raising an error is allowed too
        load_adapter_state(model, state)
    unmerge(model)
    weight = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(model.get_parameter(weight), backbone.reference.get_parameter(weight), atol=1e-5, rtol=0)


def test_the_fingerprint_on_the_meta_device_depends_on_shapes() -> None:
    first, equal, different = (nn.Linear(4, rows, device="meta").requires_grad_(False) for rows in (3, 3, 5))
    assert frozen_fingerprint(first) == frozen_fingerprint(equal) != frozen_fingerprint(different)
