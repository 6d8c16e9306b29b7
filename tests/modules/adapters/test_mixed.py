"""Mixed batches against the same model with one adapter at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.adapters import AdapterError, adapted_layers, adapted_projections, adapters_disabled, merge, mixed_batch
from modules.adapters.mixed import RowLinear, RowWeights
from tests.modules.adapters.test_linear import D_IN, RANK, make_layer
from tests.support.bare_backbones import BACKBONES, Backbone

Bs = dict[str, Tensor]


def random_bs(model: nn.Module, count: int, std: float = 0.3) -> list[Bs]:
    """Return B of every projection for several adapters."""
    return [{n: std * torch.randn(f.B.shape) for n, (_, f) in adapted_projections(model).items()} for _ in range(count)]


def of_rows(adapters: list[Bs], index: list[int]) -> tuple[Bs, Tensor]:
    """Return the arguments of `mixed_batch` for rows with the adapters of these indices."""
    return {name: torch.stack([adapter[name] for adapter in adapters]) for name in adapters[0]}, torch.tensor(index)


@torch.no_grad()
def load(model: nn.Module, bs: Bs) -> None:
    for name, (_, factors) in adapted_projections(model).items():
        factors.B.copy_(bs[name])


@torch.no_grad()
def one_by_one(backbone: Backbone, adapters: list[Bs], index: list[int]) -> Tensor:
    """Return the outputs of each row with its own adapter, from runs of the whole batch with a single adapter."""
    outputs = []
    for row, i in enumerate(index):
        load(backbone.model, adapters[i])
        outputs.append(backbone.run()[row])
    return torch.stack(outputs)


@torch.no_grad()
def test_each_row_has_its_own_adapter(backbone: Backbone) -> None:
    model = backbone.attach(targets="all", rank_pattern={"query": 2}, alpha_pattern={"value": 3.0}, layers=None)
    adapters = random_bs(model, 3)
    expected = one_by_one(backbone, adapters, [2, 0])
    load(model, adapters[1])
    own = backbone.run()
    with mixed_batch(model, *of_rows(adapters, [2, 0])):
        actual = backbone.run()
        with adapters_disabled(model):
            torch.testing.assert_close(backbone.run(), backbone.pretrained_output())
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert (actual - own).abs().max() > 1e-3
    assert torch.equal(backbone.run(), own)  # the model's own adapter is back


@torch.no_grad()
@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_beam_search_keeps_the_adapter_of_each_row(family: str) -> None:
    backbone = BACKBONES[family]()
    model: Any = backbone.attach(targets="all")
    adapters = random_bs(model, 3, std=0.5)
    inputs = backbone.inputs["input_ids"].repeat(2, 1)[:3]
    keys: dict[str, Any] = {
        "num_beams": 3,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if family == "t5":
        keys["decoder_start_token_id"] = 0
    expected = []
    for i, row in zip((1, 2, 0), inputs, strict=True):
        load(model, adapters[i])
        expected.append(model.generate(input_ids=row[None], **keys)[0])
    with mixed_batch(model, *of_rows(adapters, [1, 2, 0])):
        actual = model.generate(input_ids=inputs, **keys)
    assert torch.equal(actual, torch.stack(expected))
    assert len({tuple(row.tolist()) for row in actual}) > 1


@pytest.mark.parametrize("roles", [(), ("query", "value"), ("query", "key", "value"), ("key",)])
def test_gradients_pass_through_the_adapter_of_each_row(roles: tuple[str, ...]) -> None:
    layer = make_layer(roles)
    x = torch.randn(4, 5, D_IN, requires_grad=True)
    names = [f.projection.name for f in layer.factors()]
    bs = {n: torch.randn(4, *f.B.shape) for n, f in zip(names, layer.factors(), strict=True)}
    with mixed_batch(nn.ModuleDict({"layer": layer}), bs, torch.arange(len(x))):
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    for row in range(4):
        with torch.no_grad():
            for name, factors in zip(names, layer.factors(), strict=True):
                factors.B.copy_(bs[name][row])
        single = x[row].detach().requires_grad_()
        expected = layer(single)
        torch.testing.assert_close(out[row], expected)
        alone = torch.autograd.grad(expected.square().sum(), single)[0]
        torch.testing.assert_close(gradient[row], alone, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_has_the_dtype_of_the_product_with_w(autocast: bool) -> None:
    layer = make_layer(base=nn.Linear(D_IN, 8).to(torch.float32 if autocast else torch.bfloat16))
    x = torch.randn(2, 3, D_IN)
    bs = {"layer": layer.factors()[0].B.detach().expand(2, -1, RANK)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = x if autocast else x.bfloat16()
        expected = layer(x)
        with mixed_batch(nn.ModuleDict({"layer": layer}), bs, torch.arange(len(x))):
            actual = layer(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_dropout_applies_to_the_adapter_alone() -> None:
    layer = make_layer(dropout=0.999999)
    bs = {"layer": torch.randn(2, 8, RANK)}
    x = torch.randn(2, 3, D_IN)
    with mixed_batch(nn.ModuleDict({"layer": layer.train()}), bs, torch.arange(2)):
        torch.testing.assert_close(layer(x), layer.frozen.matmul(x, layer.bias))
        assert not torch.allclose(layer.eval()(x), layer.frozen.matmul(x, layer.bias))


def test_another_number_of_rows_is_an_error() -> None:
    layer = make_layer()
    model = nn.ModuleDict({"layer": layer})
    with mixed_batch(model, {"layer": torch.zeros(1, 8, RANK)}, torch.zeros(3, dtype=torch.long)):
        with pytest.raises(AdapterError, match=r"3 rows .* input of 4 rows"):
            layer(torch.randn(4, 6, D_IN))
        with pytest.raises(AdapterError, match="within a mixed batch"), mixed_batch(model, {}, torch.arange(2)):
            pass
        assert layer(torch.randn(6, 6, D_IN)).shape == (6, 6, 8)
    assert layer(torch.randn(4, 6, D_IN)).shape == (4, 6, 8)  # The inner error has not changed the model.


def test_positions_that_are_projected_once_for_all_rows_are_an_error() -> None:
    backbone = BACKBONES["deberta_v3"]()
    model = backbone.attach(targets=["query", "key"])
    with mixed_batch(model, *of_rows(random_bs(model, 2), [0, 1])), pytest.raises(AdapterError, match="once for the"):
        backbone.run()


def test_merged_adapters_are_an_error() -> None:
    backbone = BACKBONES["vit"]()
    model = backbone.attach()
    merge(model)
    with pytest.raises(AdapterError, match="merged"), mixed_batch(model, {}, torch.arange(2)):
        pass
    assert all(layer.mixed is None for layer in adapted_layers(model).values())


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_has_its_own_head(bias: bool) -> None:
    heads = [nn.Linear(5, 3, bias=bias) for _ in range(4)]
    weight = torch.stack([head.weight for head in heads])
    index = torch.tensor([2, 0, 2, 3])
    rows = RowLinear(RowWeights(weight, torch.stack([head.bias for head in heads]) if bias else None, index))
    for shape in ((4, 5), (4, 7, 5), (8, 5)):
        x = torch.randn(shape)
        chunks = x.chunk(4)
        expected = torch.cat([heads[i](part) for i, part in zip(index, chunks, strict=True)])
        torch.testing.assert_close(rows(x), expected)
        assert rows(x.double()).dtype == torch.float32


@torch.no_grad()
def test_a_head_inside_the_model_is_replaced_and_restored() -> None:
    backbone = BACKBONES["vit"]()
    model = backbone.attach()
    head = model.get_submodule("head")
    pooled = model.forward_head(model.forward_features(backbone.inputs["x"]), pre_logits=True)
    weights = RowWeights(torch.randn(2, 5, 24), torch.randn(2, 5), torch.arange(2))
    bs = {n: f.B.detach().expand(2, *f.B.shape) for n, (_, f) in adapted_projections(model).items()}
    with mixed_batch(model, bs, torch.arange(2), {"head": weights}):
        actual = backbone.run()
    torch.testing.assert_close(actual, torch.einsum("bd,bcd->bc", pooled, weights.weight) + weights.bias)
    assert model.get_submodule("head") is head


def test_outputs_without_autocast_are_not_rounded() -> None:
    bias = torch.tensor([[683.4], [12.3]])
    rows = RowLinear(RowWeights(torch.zeros(2, 1, D_IN), bias, torch.tensor([0, 1])), autocasts=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rows(torch.zeros(2, D_IN, dtype=torch.bfloat16)), bias)
