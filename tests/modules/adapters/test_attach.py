"""Attach, train, merge, detach, enable and disable adapters on all families of backbones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from modules.adapters import (
    AdaptedLinear,
    AdapterConfig,
    AdapterError,
    adapted_layers,
    adapted_projections,
    adapter_state,
    adapters_disabled,
    attach,
    detach,
    merge,
    set_enabled,
    set_trained,
    unmerge,
)
from modules.adapters.roles import find_projections, select
from tests.support.adapters import randomize
from tests.support.refusals import refuses

if TYPE_CHECKING:
    from tests.support.bare_backbones import Backbone

# a backbone with a fused layer, and one with tied weights
two_kinds = pytest.mark.parametrize("backbone", ["vit", "bart"], indirect=True)
only_vit = pytest.mark.parametrize("backbone", ["vit"], indirect=True)
only_llama = pytest.mark.parametrize("backbone", ["llama"], indirect=True)

STARTS: list[dict[str, Any]] = [
    {"train": "B"},
    {"train": "B", "init_a": "svd"},
    {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
    {"train": "both", "init_a": "kaiming"},
]
starts = pytest.mark.parametrize("start", STARTS, ids=lambda s: "-".join(s.values()))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers except the factors."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if ".adapters." not in name}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def output(backbone: Backbone, model: nn.Module | None = None) -> Tensor:
    return backbone.run(model)


# attaching


@starts
def test_the_output_at_the_start_is_that_of_the_pretrained_model(backbone: Backbone, start: dict[str, Any]) -> None:
    expected = backbone.pretrained_output()
    backbone.attach(targets="all", **start)
    torch.testing.assert_close(output(backbone), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "all", ["query", "value"], "regex:.*"])
def test_only_targeted_layers_are_replaced(backbone: Backbone, targets: Any) -> None:
    config = AdapterConfig(rank=4, targets=targets)
    expected = select(find_projections(backbone.model, backbone.head), config.targets)
    assert attach(backbone.model, config, exclude=backbone.head) == expected
    assert list(adapted_projections(backbone.model)) == [p.name for p in expected]
    assert set(adapted_layers(backbone.model)) == {p.layer for p in expected}
    for name, module in backbone.reference.named_modules():
        adapted = name in adapted_layers(backbone.model)
        assert type(backbone.model.get_submodule(name)) is (AdaptedLinear if adapted else type(module))


@two_kinds
def test_pretrained_weights_keep_names_values_and_storage(backbone: Backbone) -> None:
    addresses = {name: t.data_ptr() for name, t in backbone.model.state_dict().items()}
    model = backbone.attach(targets="all")
    assert_same(weights(model), weights(backbone.reference))
    assert {name: t.data_ptr() for name, t in model.state_dict().items() if ".adapters." not in name} == addresses


@only_vit
def test_head_is_frozen_unless_it_is_excluded(backbone: Backbone) -> None:
    attach(backbone.model, AdapterConfig(rank=4))
    assert not any(p.requires_grad for p in backbone.model.get_submodule("head").parameters())


@two_kinds
def test_attaching_twice_is_an_error(backbone: Backbone) -> None:
    backbone.attach()
    before = {name: id(p) for name, p in backbone.model.named_parameters()}
    with refuses("adapters already", error=AdapterError):
        backbone.attach(targets="output")
    assert {name: id(p) for name, p in backbone.model.named_parameters()} == before


@only_vit
def test_a_target_that_matches_nothing_leaves_the_model_unchanged(backbone: Backbone) -> None:
    with refuses("matches nothing", error=AdapterError):
        backbone.attach(targets=["query", "mlp_gate"])
    assert not adapted_layers(backbone.model)
    assert all(p.requires_grad for p in backbone.model.parameters())


@only_llama
def test_a_rank_that_is_too_large_names_the_projection_and_leaves_the_model_unchanged(backbone: Backbone) -> None:
    with refuses("adapter.rank: 9 is larger than model.layers.0.self_attn.v_proj", error=AdapterError):
        backbone.attach(rank=9)
    assert not adapted_layers(backbone.model)
    assert all(p.requires_grad for p in backbone.model.parameters())


# training


@two_kinds
@starts
def test_frozen_factors_stay_bit_identical_in_all_operations(backbone: Backbone, start: dict[str, Any]) -> None:
    """Call requires_grad_(True), train with weight decay, disable, enable, merge and unmerge."""
    model = backbone.attach(targets="attention", **start)
    trains = {"B": "B", "A": "A", "both": "AB"}[start["train"]]
    before = {name: t.clone() for name, t in adapter_state(model).items()}
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)

    def train_a_little() -> None:
        optimizer.zero_grad()
        backbone.loss().backward()
        optimizer.step()

    train_a_little()
    with adapters_disabled(model):
        train_a_little()
    set_enabled(model, False)
    set_enabled(model, True)
    merge(model)
    train_a_little()
    unmerge(model)
    model.train()
    model.requires_grad_(True)
    train_a_little()
    for name, tensor in adapter_state(model).items():
        assert torch.equal(tensor, before[name]) == (name[-1] not in trains), name


# merging


@two_kinds
def test_merging_twice_equals_merging_once_and_unmerge_restores(backbone: Backbone) -> None:
    model = backbone.attach(targets="all")
    randomize(model)
    before = weights(model)
    merge(model)
    once = weights(model)
    merge(model)
    assert_same(weights(model), once)
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    assert changed == {f"{layer}.weight" for layer in adapted_layers(model)}
    unmerge(model)
    assert_same(weights(model), before, atol=1e-6)
    unmerge(model)
    assert_same(weights(model), before, atol=1e-6)


@two_kinds
def test_train_and_eval_do_not_merge(backbone: Backbone) -> None:
    model = backbone.attach()
    randomize(model)
    before = weights(model)
    model.train()
    model.eval()
    assert_same(weights(model), before)
    merge(model)
    merged = weights(model)
    model.train()
    model.eval()
    assert_same(weights(model), merged)
    assert all(layer.merged for layer in adapted_layers(model).values())


# detaching


@pytest.mark.parametrize("already_merged", [False, True])
def test_detach_with_merge_keeps_the_function(backbone: Backbone, already_merged: bool) -> None:
    model = backbone.attach(targets="all")
    randomize(model)
    expected = output(backbone)
    if already_merged:
        merge(model)
    detach(model, merge_first=True)
    assert not adapted_layers(model)
    assert model.state_dict().keys() == backbone.reference.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in backbone.reference.modules()]
    torch.testing.assert_close(output(backbone), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
def test_detach_restores_the_pretrained_model(backbone: Backbone, merged: bool) -> None:
    model = backbone.attach(targets="all")
    randomize(model)
    if merged:
        merge(model)
    detach(model)
    assert not adapted_layers(model)
    assert_same(weights(model), weights(backbone.reference), atol=1e-6 if merged else 0)


@two_kinds
def test_attach_again_after_detach(backbone: Backbone) -> None:
    first = {name: t.clone() for name, t in adapter_state(backbone.attach()).items()}
    detach(backbone.model)
    assert_same(adapter_state(backbone.attach()), first)


# disabling


def test_disabled_adapters_give_exactly_the_pretrained_model(backbone: Backbone) -> None:
    model = backbone.attach(targets="all")
    randomize(model)
    adapted = output(backbone)
    with adapters_disabled(model):
        assert torch.equal(output(backbone), backbone.pretrained_output())
    assert torch.equal(output(backbone), adapted)
    set_enabled(model, False)
    assert torch.equal(output(backbone), backbone.pretrained_output())
    set_enabled(model, True)
    assert torch.equal(output(backbone), adapted)


@only_vit
def test_adapters_disabled_restores_the_earlier_state_even_after_an_error(backbone: Backbone) -> None:
    layers = list(adapted_layers(backbone.attach()).values())
    layers[0].enabled = False
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(backbone.model):
        with adapters_disabled(backbone.model):
            pass
        assert not any(layer.enabled for layer in layers)
        raise RuntimeError("inside")
    assert [layer.enabled for layer in layers] == [False, True]


@only_vit
def test_disabling_and_enabling_change_no_parameter(backbone: Backbone) -> None:
    model = backbone.attach()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with adapters_disabled(model):
        assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


@only_vit
@pytest.mark.parametrize("enabled", [True, False])
def test_merged_adapters_cannot_be_disabled(backbone: Backbone, enabled: bool) -> None:
    merge(backbone.attach())
    with refuses("Unmerge the adapters before", error=AdapterError):
        set_enabled(backbone.model, enabled)
    with refuses("Unmerge the adapters before", error=AdapterError), adapters_disabled(backbone.model):
        pass


# copies


@two_kinds
def test_a_copy_is_equal_and_independent(backbone: Backbone) -> None:
    model = backbone.attach()
    randomize(model)
    expected = output(backbone)
    twin = copy.deepcopy(model)
    assert torch.equal(output(backbone, twin), expected)
    randomize(twin, seed=2)
    merge(twin)
    assert torch.equal(output(backbone), expected)
    assert not torch.allclose(output(backbone, twin), expected, atol=1e-3)


def test_layers_that_cannot_be_adapted_are_left_out() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "mha": nn.MultiheadAttention(8, 2), "twice": nn.Linear(8, 8)})
    model["again"] = model["twice"]
    model["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    attached = attach(model, AdapterConfig(rank=2, targets="regex:.*"))
    assert [p.layer for p in attached] == ["plain"]


def test_an_unknown_exclusion_is_an_error() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(8, 8)})
    with refuses("haed", error=AdapterError):
        attach(model, AdapterConfig(rank=2, targets="regex:.*"), exclude=["haed"])


@two_kinds
def test_merging_disabled_adapters_is_an_error(backbone: Backbone) -> None:
    model = backbone.attach()
    set_enabled(model, False)
    with refuses("switched off", error=AdapterError):
        merge(model)


@pytest.mark.parametrize("train", ["A", "B", "both"])
def test_set_trained_decides_which_factors_learn(backbone: Backbone, train: Any) -> None:
    attach(backbone.model, AdapterConfig(rank=2, targets="all"))
    randomize(backbone.model)
    set_trained(backbone.model, train)
    backbone.run(backbone.model).square().sum().backward()
    for layer in adapted_layers(backbone.model).values():
        for factors in layer.factors():
            assert (factors.A.grad is not None) == factors.A.requires_grad == (train in ("A", "both"))
            assert (factors.B.grad is not None) == factors.B.requires_grad == (train in ("B", "both"))
            assert factors.named_factors(trained=True).keys() == ({"A", "B"} if train == "both" else {train})
