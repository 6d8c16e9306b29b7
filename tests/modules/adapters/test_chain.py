"""Chains of adapters: exact merges, links that are merged again, and factors that depend only on seed and link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.adapters import (
    AdapterConfig,
    AdapterError,
    Chain,
    adapted_layers,
    adapted_projections,
    adapter_state,
    attach,
    merge,
)
from modules.adapters.chain import link_name, ordered_update
from modules.adapters.init import init_factor
from tests.support.adapters import copied, randomize
from tests.support.bare_backbones import BACKBONES
from tests.support.refusals import refuses

B = AdapterConfig(rank=4, targets="all")
A = AdapterConfig(rank=4, targets="all", train="A", init_a="zero", init_b="orthogonal")
LORA = AdapterConfig(rank=4, targets="all", train="both", init_a="kaiming", rank_pattern={"query": 2})
CONFIGS = {"B": B, "A": A, "both": LORA, "svd": replace(B, init_a="svd")}


def adapted(config: AdapterConfig, family: str = "vit", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model with adapters whose trained factors are random. The ViT has fused layers."""
    torch.manual_seed(0)
    model = BACKBONES[family]().model.to(dtype)
    attach(model, config)
    train(model, 1)
    return model


@torch.no_grad()
def train(model: nn.Module, seed: int, std: float = 0.05) -> None:
    """Fill the trained factors with noise, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, factors in adapted_projections(model).values():
        for parameter in factors.named_factors(trained=True).values():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in adapted_layers(model).items()}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    pairs = {name: factors.named_factors(trained=False) for name, (_, factors) in adapted_projections(model).items()}
    return {f"{name}.{side}": t.detach().clone() for name, pair in pairs.items() for side, t in pair.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def run_links(model: nn.Module, config: AdapterConfig, links: int) -> Chain:
    """Train and merge `links` links, and train one further link."""
    chain = Chain()
    for link in range(1, links + 1):
        chain.begin_link(model, config, 10 * link)
        train(model, link + 1)
    return chain


# -------------------------------------------------------------------------------------------------------------- merges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_rounds_the_float64_sum_once(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    model = adapted(config, dtype=dtype)
    exact = {layer: weight.double() for layer, weight in weights(model).items()}
    for _, (layer, f) in adapted_projections(model).items():
        rows = exact[f.projection.layer][f.projection.rows]
        rows += layer.scale * (f.B.detach().double() @ f.A.detach().double()) * (f.scale / layer.scale)
    Chain().begin_link(model, config, 0)
    for layer_name, merged in weights(model).items():
        one_step = torch.finfo(dtype).eps * exact[layer_name].abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((merged.double() - exact[layer_name]).abs() <= 0.51 * one_step).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_does_not_change_the_outputs(name: str) -> None:
    model = adapted(CONFIGS[name], "roberta").eval()
    tokens = torch.arange(4, 18).view(2, 7)
    before = model(input_ids=tokens)[0]
    Chain().begin_link(model, CONFIGS[name], 0)
    torch.testing.assert_close(model(input_ids=tokens)[0], before, rtol=0, atol=2e-6)


def test_the_update_adds_exact_products_in_the_order_of_the_rank() -> None:
    b, a = torch.randn(5, 3), torch.randn(3, 4)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        for j in range(4):
            total = 0.0
            for k in range(3):
                total += float(b[i, k]) * float(a[k, j])
            expected[i, j] = 0.3 * total
    assert torch.equal(ordered_update(b, a, 0.3), expected)


def test_a_merge_refuses_adapters_that_are_merged_for_an_export() -> None:
    model = adapted(B)
    merge(model)
    with refuses("merged", error=AdapterError):
        Chain().begin_link(model, B, 0)


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", CONFIGS)
def test_a_link_has_new_factors_that_depend_on_seed_and_link(name: str) -> None:
    config = CONFIGS[name]
    model, again, other = adapted(config), adapted(config), adapted(config)
    chain = run_links(model, config, 2)
    parameters = chain.begin_link(model, config, 30)
    drawn = copied(adapter_state(model))
    run_links(again, config, 3)
    train(model, 4)
    assert equal(frozen(model), frozen(again))
    run_links(other, replace(config, seed=1), 3)
    assert {id(p) for p in parameters} == {
        id(p) for _, f in adapted_projections(model).values() for p in f.named_factors(trained=True).values()
    }
    for stem in {key.rpartition(".")[0] for key in drawn}:
        sides = {"A": config.init_a, "B": config.init_b}
        for side, init in sides.items():
            factor = drawn[f"{stem}.{side}"]
            assert not factor.any() if init == "zero" else factor.any()
            if init not in ("zero", "svd"):
                assert not any(torch.equal(factor, link[f"{stem}.{side}"]) for link in chain.links)
    if name in ("B", "A"):
        assert not equal(frozen(model), frozen(other))


def test_svd_initialises_the_next_link_from_the_merged_weight() -> None:
    model = adapted(CONFIGS["svd"])
    Chain().begin_link(model, CONFIGS["svd"], 0)
    for name, (layer, f) in adapted_projections(model).items():
        weight = layer.weight.detach()[f.projection.rows]
        assert torch.equal(f.A, init_factor("svd", "A", weight, f.A.shape[0], 0, name))


def test_the_first_link_has_the_seed_of_an_adapter_without_a_chain() -> None:
    assert link_name("blocks.0.attn.qkv.query", 1) == "blocks.0.attn.qkv.query"
    assert len({link_name("q", link) for link in range(1, 20)}) == 19


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_links_of_a_checkpoint_merge_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    model, fresh = adapted(config, dtype=dtype), adapted(config, dtype=dtype)
    chain, loaded = run_links(model, config, 3), Chain()
    loaded.load_state(fresh, chain.state())
    assert equal(weights(model), weights(fresh))
    assert loaded.state()["start"] == 30
    assert all(equal(dict(a), dict(b)) for a, b in zip(chain.links, loaded.links, strict=True))


def test_an_earlier_checkpoint_replaces_the_links_of_a_trained_model() -> None:
    model, fresh = adapted(B), adapted(B)
    pretrained, chain, fresh_chain = weights(fresh), Chain(), Chain()
    chain.begin_link(model, B, 10)
    earlier = chain.state()
    train(model, 2)
    chain.begin_link(model, B, 20)
    chain.load_state(model, earlier)
    fresh_chain.load_state(fresh, earlier)
    assert equal(weights(model), weights(fresh))
    with chain.without_links(model):
        assert equal(weights(model), pretrained)
        assert all(torch.equal(chain.pretrained(n, layer), pretrained[n]) for n, layer in adapted_layers(model).items())
    assert equal(weights(model), weights(fresh))
    chain.load_state(model, None)
    assert equal(weights(model), pretrained)
    assert chain.state() == {"links": [], "start": 0}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state | {"links": None}, "damaged"),
        (lambda state: state | {"start": -1}, "damaged"),
        (lambda state: {"links": state["links"]}, "damaged"),
        (lambda state: state | {"links": [3]}, "Link 1"),
        (lambda state: state | {"links": [state["links"][0], {}]}, "Link 2 of the checkpoint's chain does not fit"),
        (lambda state: state | {"links": [{k: v[:1] for k, v in state["links"][0].items()}]}, "of another shape"),
        (lambda state: state | {"links": [{k: v / 0 for k, v in state["links"][0].items()}]}, "not a finite tensor"),
    ],
)
def test_a_damaged_chain_is_refused_and_the_model_is_unchanged(damage: Callable[[Any], Any], message: str) -> None:
    model = adapted(B)
    chain = run_links(model, B, 1)
    before = weights(model)
    with refuses(message, error=AdapterError):
        chain.load_state(model, damage(chain.state()))
    assert equal(weights(model), before)


def test_the_rounding_of_a_merge_is_measured() -> None:
    rounding = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = randomize(adapted(B, dtype=dtype), std=0.02)
        before = weights(model)
        exact = {n: layer.delta().double() for n, layer in adapted_layers(model).items()}
        chain = Chain()
        chain.begin_link(model, B, 0)
        lost = sum(
            float((w.double() - before[n].double() - exact[n]).square().sum()) for n, w in weights(model).items()
        )
        total = sum(float(update.square().sum()) for update in exact.values())
        assert chain.rounding == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)
        rounding[dtype] = chain.rounding
    assert rounding[torch.float32] < 1e-4 < rounding[torch.bfloat16]
