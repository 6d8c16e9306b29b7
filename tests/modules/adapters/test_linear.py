"""The adapted layer against the explicit weight W + s·B·A in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules.adapters.config import AdapterConfig, AdapterError, Projection
from modules.adapters.linear import AdaptedLinear

D_IN, D_OUT, RANK, N = 10, 8, 3, 11  # no other size equals N, so that saved activations of N tokens can be recognised
QKV = ("query", "key", "value")
SUBSETS = [roles for k in (1, 2, 3) for roles in itertools.combinations(QKV, k)]
TRAINS: list[Any] = ["B", "A", "both"]


def make_layer(
    roles: tuple[str, ...] = (), base: nn.Linear | None = None, train: Any = "B", **config: Any
) -> AdaptedLinear:
    """Return an adapted plain layer, or a fused layer with these roles adapted. Neither factor is zero."""
    base = base or nn.Linear(D_IN, 3 * D_OUT if roles else D_OUT)
    projections = [Projection("layer", "query", 0, base.out_features)]
    if roles:
        starts = {role: i * D_OUT for i, role in enumerate(QKV)}
        projections = [Projection("layer", role, starts[role], starts[role] + D_OUT, fused=True) for role in roles]
    zero = {"init_a": "zero", "init_b": "orthogonal"} if train == "A" else {}
    layer = AdaptedLinear(
        base, AdapterConfig(train=train, **{"rank": RANK, "alpha": 2.0, **zero, **config}), projections
    )
    with torch.no_grad():
        for factors in layer.factors():
            factors.A.normal_()
            factors.B.normal_()
    return layer


def dense_weight(layer: AdaptedLinear) -> Tensor:
    """Return W + s·B·A in float64, computed for each row block."""
    weight = layer.weight.detach().double().clone()
    for f in layer.factors():
        weight[f.projection.start : f.projection.stop] += f.scale * f.B.detach().double() @ f.A.detach().double()
    return weight


def explicit(layer: AdaptedLinear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.detach().double()
    return F.linear(x.detach().double(), dense_weight(layer), bias)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# the equation


@pytest.mark.parametrize("roles", [(), *SUBSETS], ids="-".join)
@pytest.mark.parametrize("bias", [True, False])
def test_output_equals_that_of_the_explicit_weight(roles: tuple[str, ...], bias: bool) -> None:
    layer = make_layer(roles, nn.Linear(D_IN, 3 * D_OUT if roles else D_OUT, bias=bias))
    x = torch.randn(2, N, D_IN)
    torch.testing.assert_close(layer(x).double(), explicit(layer, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight.double() + layer.delta(), dense_weight(layer), atol=1e-5, rtol=1e-5)


def test_slices_of_unequal_height_and_a_gap() -> None:
    projections = [Projection("layer", "query", 1, 6, fused=True), Projection("layer", "value", 7, 11, fused=True)]
    layer = AdaptedLinear(nn.Linear(D_IN, 12), AdapterConfig(rank=RANK), projections)
    for factors in layer.factors():
        nn.init.normal_(factors.B)
    x = torch.randn(N, D_IN)
    torch.testing.assert_close(layer(x).double(), explicit(layer, x), atol=1e-5, rtol=1e-5)
    assert layer.delta().any(dim=1).tolist() == [1 <= i < 6 or 7 <= i < 11 for i in range(12)]


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_slices_of_unequal_rank_and_scale(train: Any, scaling: Any, dropout: float) -> None:
    """Output, gradients and merged output equal the formula in plain autograd operations."""
    patterns: dict[str, Any] = {"rank_pattern": {"query": 2, "value": 5}, "alpha_pattern": {"key": 7.0}}
    layer = make_layer(QKV, train=train, scaling=scaling, dropout=dropout, **patterns).double().train()
    power = 0.5 if scaling == "rslora" else 1
    expected_scales = [2 / 2**power, 7 / RANK**power, 2 / 5**power]
    assert [f.scale for f in layer.factors()] == pytest.approx(expected_scales, rel=1e-12)
    x = torch.randn(N, D_IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    actual = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, dropout)
    slices = [s * dropped @ f.A.T @ f.B.T for s, f in zip(expected_scales, layer.factors(), strict=True)]
    expected = F.linear(x, layer.weight, layer.bias) + torch.cat(slices, dim=1)
    torch.testing.assert_close(actual, expected)
    leaves = [x, *(p for f in layer.factors() for p in f.named_factors(trained=True).values())]
    cotangent = torch.randn_like(actual)
    for gradient, expected_value in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(gradient, expected_value)
    layer.eval()
    expected_value = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected_value, atol=1e-5, rtol=1e-5)  # merging computes the update in float32


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("train", TRAINS)
def test_output_and_gradients_equal_pefts(train: Any, rslora: bool) -> None:
    layer = make_layer(train=train, alpha=5.0, scaling="rslora" if rslora else "standard")
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["0"], use_rslora=rslora)
    plain = nn.Sequential(copy.deepcopy(layer).unwrap())
    reference: Any = peft.get_peft_model(plain, config).base_model.model[0]
    a, b = reference.lora_A["default"].weight, reference.lora_B["default"].weight
    (own,) = layer.factors()
    with torch.no_grad():
        a.copy_(own.A)
        b.copy_(own.B)
    layer.double()
    reference.double()

    x = torch.randn(2, N, D_IN, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = layer(x), reference(y)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    torch.testing.assert_close(x.grad, y.grad)
    for actual, expected, trained in ((own.A.grad, a.grad, train != "B"), (own.B.grad, b.grad, train != "A")):
        if trained:
            torch.testing.assert_close(actual, expected)
        else:
            assert actual is None


@pytest.mark.parametrize("shape", [(D_IN,), (N, D_IN), (2, 3, 4, D_IN), (0, D_IN), (2, 0, D_IN)])
def test_any_leading_dimensions_are_accepted(shape: tuple[int, ...]) -> None:
    layer = make_layer(("query", "value"))
    x = torch.randn(*shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 3 * D_OUT)
    torch.testing.assert_close(out.double(), explicit(layer, x), atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert x.grad is not None
    assert all(f.B.grad is not None and f.B.grad.any() == (x.numel() > 0) for f in layer.factors())


def test_input_is_not_changed() -> None:
    x = torch.randn(N, D_IN)
    before = x.clone()
    make_layer()(x)
    assert torch.equal(x, before)


# gradients


@pytest.mark.parametrize("train", ["A", "B"])
def test_frozen_factor_gets_no_gradient_even_after_requires_grad(train: Any) -> None:
    layer = make_layer(("query", "value"), train=train)
    layer.requires_grad_(True)
    layer(torch.randn(N, D_IN)).square().sum().backward()
    for factors in layer.factors():
        (frozen,) = factors.named_factors(trained=False).values()
        (trained,) = factors.named_factors(trained=True).values()
        assert frozen.grad is None
        assert trained.grad is not None
        assert trained.grad.any()


# precision


@pytest.mark.parametrize("roles", [(), ("query", "value")], ids="-".join)
@pytest.mark.parametrize("train", TRAINS)
def test_autocast_is_close_and_gradients_are_float32(train: Any, roles: tuple[str, ...]) -> None:
    layer = make_layer(roles, train=train)
    x = torch.randn(N, D_IN, requires_grad=True)
    leaves = [x, *(p for f in layer.factors() for p in f.named_factors(trained=True).values())]
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert relative_error(half, full) < 0.01
    cotangent = torch.randn_like(full)
    for actual, expected in zip(
        torch.autograd.grad(half, leaves, cotangent.bfloat16()),
        torch.autograd.grad(full, leaves, cotangent),
        strict=True,
    ):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 0.02


class CountCasts(TorchDispatchMode):
    """Count the casts of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape
        return func(*args, **(kwargs or {}))


def test_autocast_casts_the_input_once() -> None:
    layer = make_layer(("query", "value"))
    x = torch.randn(N, D_IN, requires_grad=True).tanh()  # not a leaf, whose cast autocast would cache
    with torch.autocast("cpu", torch.bfloat16), CountCasts((N, D_IN)) as casts:
        layer(x)
    assert casts.count == 1


@pytest.mark.parametrize("train", TRAINS)
def test_bf16_weight_with_float32_factors(train: Any) -> None:
    layer = make_layer(("query", "value"), nn.Linear(D_IN, 3 * D_OUT).bfloat16(), train=train)
    factors = [p for f in layer.factors() for p in (f.A, f.B)]
    assert layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in factors} == {torch.float32}
    x = torch.randn(N, D_IN, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, explicit(layer, x)) < 0.01
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert [p.grad.dtype for p in factors if p.grad is not None] == [torch.float32] * (4 if train == "both" else 2)


# dropout


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = make_layer()
    layer.bias.requires_grad_()
    layer(torch.randn(N, D_IN)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((D_OUT,), float(N)))
    assert layer.factors()[0].B.grad is not None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_input_of_another_dtype_is_refused_as_by_a_plain_layer(dtype: torch.dtype) -> None:
    x = torch.ones(N, D_IN, dtype=dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        make_layer()(x)


def test_dropout_affects_the_adapters_input_alone() -> None:
    layer = make_layer(("query", "value"), dropout=0.4).train()
    x = torch.randn(N, D_IN)
    torch.manual_seed(5)
    actual = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    assert (dropped == 0).any()
    expected = F.linear(x, layer.weight, layer.bias) + F.linear(dropped, layer.delta())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_layer_inherits_the_mode_of_its_base(training: bool) -> None:
    base = nn.Linear(D_IN, D_OUT).train(training)
    layer = make_layer(base=base, dropout=0.4)
    assert {m.training for m in layer.modules()} == {training}
    assert layer.unwrap().training == training


# merging


@pytest.mark.parametrize("roles", [(), ("key",), ("query", "value")], ids="-".join)
def test_merge_and_unmerge_keep_the_output(roles: tuple[str, ...]) -> None:
    layer = make_layer(roles)
    x, before = torch.randn(N, D_IN), layer.weight.clone()
    expected, dense = layer(x), dense_weight(layer)
    layer.merge()
    layer.merge()  # a second merge has no effect
    torch.testing.assert_close(layer.weight.double(), dense, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_merge_into_bf16_is_rounded_once() -> None:
    layer = make_layer(base=nn.Linear(64, 64).bfloat16())
    with torch.no_grad():
        layer.factors()[0].B.mul_(1e-3)
    dense = dense_weight(layer)
    layer.merge()
    assert layer.weight.dtype == torch.bfloat16
    half_ulp = dense.abs() * 2**-8 + 1e-12
    assert ((layer.weight.double() - dense).abs() <= half_ulp * (1 + 1e-4)).all()


def test_a_disabled_layer_equals_the_plain_layer() -> None:
    layer = make_layer()
    x = torch.randn(2, N, D_IN)
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.enabled = True
    torch.testing.assert_close(layer(x).double(), explicit(layer, x), atol=1e-5, rtol=1e-5)


# names and shapes


def test_parameters_of_the_base_are_shared_and_keep_their_names() -> None:
    base = nn.Linear(D_IN, 3 * D_OUT)
    layer = make_layer(("query", "value"), base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    factors = {f"adapters.{role}.{factor}" for role in ("query", "value") for factor in "AB"}
    assert set(layer.state_dict()) == {"weight", "bias"} | factors
    plain = layer.unwrap()
    assert type(plain) is nn.Linear
    assert plain.weight is base.weight
    assert plain.bias is base.bias


def test_unwrap_returns_the_layer_with_its_hooks() -> None:
    base = nn.Linear(D_IN, D_OUT)
    calls: list[Tensor] = []
    base.register_forward_hook(lambda *args: calls.append(args[-1]))
    layer = make_layer(base=base)
    x = torch.randn(N, D_IN)
    layer(x)
    assert not calls  # the adapted layer does not call its base
    layer.merge()
    plain = layer.unwrap()
    assert plain is base
    torch.testing.assert_close(plain(x), layer(x))
    assert len(calls) == 1


def test_wrapper_and_base_share_one_dictionary_of_parameters() -> None:
    """FSDP and `to` replace the parameters of the wrapper. The base must not keep a second copy."""
    layer = make_layer()
    for replaced in (layer.to_empty(device="meta"), layer.to_empty(device="cpu").double(), copy.deepcopy(layer)):
        assert replaced.unwrap().weight is replaced.weight
    new = nn.Parameter(torch.randn(D_OUT, D_IN, dtype=torch.float64))
    layer.weight = new
    assert layer.unwrap().weight is new
    assert dict(layer.unwrap().named_parameters()).keys() == {"weight", "bias"}


def test_without_gradients_the_plain_formula_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(("query", "value"))
    x = torch.randn(N, D_IN)
    expected = layer(x)
    monkeypatch.setattr("modules.adapters.linear.fused", None)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("train", TRAINS)
def test_only_the_trained_factors_require_a_gradient(train: Any) -> None:
    layer = make_layer(("query", "value"), train=train)
    names = {"B": {"B"}, "A": {"A"}, "both": {"A", "B"}}[train]
    assert {n.rpartition(".")[2] for n, p in layer.named_parameters() if p.requires_grad} == names
    for factors in layer.factors():
        assert set(factors.named_factors(trained=True)) == names
        assert set(factors.named_factors(trained=False)) == {"A", "B"} - names


@pytest.mark.parametrize(
    ("projection", "d_in", "limit"),
    [
        (Projection("layer", "query", 0, 24), 7, 7),
        (Projection("layer", "query", 0, 24), 30, 24),
        (Projection("layer", "value", 16, 24, fused=True), 30, 8),  # the slice has 8 rows
    ],
)
def test_rank_is_bounded_by_the_smaller_side(projection: Projection, d_in: int, limit: int) -> None:
    base = nn.Linear(d_in, 24)
    AdaptedLinear(base, AdapterConfig(rank=limit), [projection])
    message = rf"adapter\.rank: {limit + 1} is larger than {projection.name} .* Use {limit} or less"
    with pytest.raises(AdapterError, match=message):
        AdaptedLinear(base, AdapterConfig(rank=limit + 1), [projection])


def test_repr_shows_slices_and_ranks() -> None:
    assert "adapters: query r=3, value r=3" in repr(make_layer(("query", "value")))
