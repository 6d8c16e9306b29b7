"""Initialisations against their definitions. References are SciPy, hashlib and PEFT."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import peft
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor, nn

from modules.adapters import AdapterConfig, adapter_state
from modules.adapters.config import Init, Projection
from modules.adapters.init import Factor, factor_generator, init_factor
from modules.adapters.linear import AdaptedLinear

if TYPE_CHECKING:
    from tests.support.bare_backbones import Backbone

RANDOM: list[Any] = ["orthogonal", "signs", "gaussian", "uniform", "kaiming"]
FACTORS: list[Any] = ["A", "B"]
D_OUT, D_IN, RANK = 20, 28, 5


def draw(
    init: Init,
    factor: Factor = "A",
    d_out: int = D_OUT,
    d_in: int = D_IN,
    rank: int = RANK,
    seed: int = 0,
    name: str = "layer",
) -> Tensor:
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(9))
    return init_factor(init, factor, weight, rank, seed, name)


def vectors(tensor: Tensor, factor: Factor) -> Tensor:
    """Return the rows of A or the columns of B, as rows (r, n)."""
    return tensor if factor == "A" else tensor.T


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("init", get_args(Init))
def test_shape_and_dtype(init: Init, factor: Factor) -> None:
    tensor = init_factor(init, factor, torch.randn(D_OUT, D_IN).bfloat16(), RANK, 0, "layer")
    assert tensor.shape == ((RANK, D_IN) if factor == "A" else (D_OUT, RANK))
    assert tensor.dtype == torch.float32
    assert tensor.any() == (init != "zero")


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("init", ["orthogonal", "svd", "svd_minor"])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_vectors_are_orthonormal(init: Init, factor: Factor, rank: int) -> None:
    v = vectors(draw(init, factor, rank=rank), factor).double()
    torch.testing.assert_close(v @ v.T, torch.eye(rank, dtype=torch.float64), atol=1e-5, rtol=0)


def test_orthogonal_draws_from_the_haar_measure() -> None:
    """Directions in the plane are uniform on the circle. A plain QR would leave half of the circle empty."""
    directions = torch.cat([draw("orthogonal", d_out=2, d_in=2, rank=1, seed=seed) for seed in range(400)])
    angles = torch.atan2(directions[:, 1], directions[:, 0]).numpy()
    assert scipy.stats.kstest(angles, "uniform", (-math.pi, 2 * math.pi)).pvalue > 1e-3


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("init", ["gaussian", "uniform"])
def test_entries_follow_the_named_distribution(init: Init, factor: Factor) -> None:
    n = 2000  # the long side of the factor
    tensor = draw(init, factor, *((64, n) if factor == "A" else (n, 64)), rank=16)
    entries = (tensor * math.sqrt(n)).flatten().numpy()
    expected = ("norm",) if init == "gaussian" else ("uniform", (-math.sqrt(3), 2 * math.sqrt(3)))
    assert scipy.stats.kstest(entries, *expected).pvalue > 1e-3
    assert np.square(entries).mean() == pytest.approx(1, abs=0.03)  # the mean of the squared norms is 1


@pytest.mark.parametrize(("factor", "fan_in", "norm"), [("A", 1024, 3**-0.5), ("B", 8, (1024 / 24) ** 0.5)])
def test_kaiming_bound_and_norm(factor: Factor, fan_in: int, norm: float) -> None:
    tensor = draw("kaiming", factor, 1024, 1024, rank=8)
    bound = 1 / math.sqrt(fan_in)
    assert 0.99 * bound < tensor.abs().max() <= bound
    assert scipy.stats.kstest(tensor.flatten().numpy(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
    assert vectors(tensor, factor).norm(dim=1).mean() == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize("seed", [0, -3])
@pytest.mark.parametrize("factor", FACTORS)
def test_signs_are_the_bits_of_shake_256(factor: Factor, seed: int) -> None:
    """Compare with the definition bit by bit, using integers alone."""
    v = vectors(draw("signs", factor, seed=seed, name="blocks.0"), factor)
    for i, vector in enumerate(v):
        stream = hashlib.shake_256(f"signs/{seed}/blocks.0/{factor}/{i}".encode()).digest(4)
        number = int.from_bytes(stream, "little")
        assert vector.lt(0).tolist() == [bool(number >> j & 1) for j in range(len(vector))]
        assert vector.abs().unique().tolist() == [np.float32(1 / math.sqrt(len(vector)))]


@pytest.mark.parametrize(
    ("factor", "digest"),
    [
        ("A", "9d786e32632144cd4b7745e856aee9a35e6169653e9bf38a0ae1192a74ae5de3"),
        ("B", "25f90da3665cb78171d9a7ad1bf87e672f6afc27cc962533654845c1cdab52be"),
    ],
)
def test_signs_may_never_change(factor: Factor, digest: str) -> None:
    """Existing compact files rely on these bytes."""
    tensor = init_factor("signs", factor, torch.empty(1000, 1001), 7, 12, "model.layers.0.self_attn.q_proj")
    assert hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest() == digest


@pytest.mark.parametrize("factor", FACTORS)
def test_signs_are_balanced_and_independent(factor: Factor) -> None:
    n, rank = 4096, 64
    v = vectors(draw("signs", factor, n, n, rank=rank), factor).double() * math.sqrt(n)
    assert (v.square() - 1).abs().max() < 1e-6  # every vector has norm 1
    assert abs(v.mean()) * math.sqrt(n * rank) < 4  # 4 standard errors
    assert abs((v[:, 1:] * v[:, :-1]).mean()) * math.sqrt(n * rank) < 4  # neighbouring bits are uncorrelated
    i, j = torch.triu_indices(rank, rank, 1)
    cosines = (v @ v.T / n)[i, j]
    assert cosines.std() * math.sqrt(n) == pytest.approx(1, abs=0.08)  # 2016 pairs: five standard errors
    assert abs(cosines.mean()) * math.sqrt(n * len(cosines)) < 4
    other = vectors(draw("signs", factor, n, n, rank=rank, name="other"), factor).double() * math.sqrt(n)
    assert abs((v * other).mean()) * math.sqrt(n * rank) < 4


@pytest.mark.parametrize("factor", FACTORS)
def test_a_larger_rank_keeps_the_vectors_of_a_smaller_rank(factor: Factor) -> None:
    small, large = (vectors(draw("signs", factor, rank=rank), factor) for rank in (3, 5))
    assert torch.equal(large[:3], small)


def test_kaiming_a_is_pefts_default() -> None:
    config = peft.LoraConfig(r=RANK, target_modules=["0"])
    layer: Any = peft.get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), config).base_model.model[0]
    torch.manual_seed(factor_generator(3, "layer", "A").initial_seed())
    layer.reset_lora_parameters("default", init_lora_weights=True)
    assert torch.equal(draw("kaiming", "A", seed=3), layer.lora_A["default"].weight)
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("init", get_args(Init))
def test_a_draw_neither_uses_nor_changes_the_global_generator(init: Init, factor: Factor) -> None:
    first = draw(init, factor)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = draw(init, factor)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


@pytest.mark.parametrize("init", RANDOM)
def test_seed_name_and_factor_each_change_the_draw(init: Init) -> None:
    square = {"d_out": 16, "d_in": 16, "rank": 16}
    draws = [
        draw(init, **square),
        draw(init, **square, seed=1),
        draw(init, **square, name="other"),
        draw(init, "B", **square),
        draw(init, "B", **square).T,
    ]
    for i, a in enumerate(draws):
        assert all((a - b).abs().max() > 1e-3 for b in draws[i + 1 :])


def test_the_generator_is_the_same_in_every_process() -> None:
    """Python salts `hash` in each process. sha256 is not salted."""
    assert factor_generator(0, "blocks.0.attn.qkv.query", "A").initial_seed() == 9136763183415319441


@pytest.mark.parametrize("backbone", ["vit"], indirect=True)
@pytest.mark.parametrize(
    "targets", [["value"], ["value", "query"], "all", r"regex:blocks\.1\.attn\.qkv\.value", ["mlp_in", "attention"]]
)
@pytest.mark.parametrize("init", ["orthogonal", "signs"])
def test_a_factor_does_not_depend_on_the_other_targets(backbone: Backbone, targets: Any, init: Init) -> None:
    name = "blocks.1.attn.qkv.adapters.value.A"
    reference = init_factor(init, "A", torch.empty(24, 24), 4, 7, "blocks.1.attn.qkv.value")
    torch.rand(11)
    before = torch.get_rng_state()
    model = backbone.attach(targets=targets, seed=7, init_a=init)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(adapter_state(model)[name], reference)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", [(20, 28), (28, 20), (20, 20)])
def test_svd_minor_has_the_smallest_singular_values(factor: Factor, shape: tuple[int, int]) -> None:
    """The factor has the last RANK of the min(d_out, d_in) singular vectors, sorted by falling singular value."""
    weight = torch.randn(shape)
    u, s, vh = scipy.linalg.svd(weight.double().numpy(), full_matrices=False)
    expected = vh[-RANK:] if factor == "A" else u[:, -RANK:].T
    tensor = init_factor("svd_minor", factor, weight, RANK, 0, "layer")
    cosines = np.abs(np.sum(expected * vectors(tensor, factor).numpy(), axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-4)
    images = weight @ tensor.T if factor == "A" else weight.T @ tensor  # their lengths are the singular values
    np.testing.assert_allclose(images.norm(dim=0), s[-RANK:], atol=1e-4)


@pytest.mark.parametrize(
    ("train", "init_a", "init_b", "factor"), [("B", "svd", "zero", "A"), ("A", "zero", "svd", "B")]
)
def test_svd_of_a_fused_layer_is_computed_for_each_slice(train: Any, init_a: Any, init_b: Any, factor: Factor) -> None:
    base = nn.Linear(D_IN, 3 * D_OUT)
    projections = [
        Projection("qkv", role, i * D_OUT, (i + 1) * D_OUT, fused=True) for i, role in ((0, "query"), (2, "value"))
    ]
    layer = AdaptedLinear(base, AdapterConfig(train=train, rank=RANK, init_a=init_a, init_b=init_b), projections)
    for factors in layer.factors():
        u, _, vh = np.linalg.svd(base.weight[factors.projection.rows].detach().double().numpy())
        v = vectors(getattr(factors, factor).detach(), factor).numpy()
        expected = vh[:RANK] if factor == "A" else u[:, :RANK].T
        np.testing.assert_allclose(np.abs(np.sum(expected * v, axis=1)), 1, atol=1e-5)
        if factor == "A":  # the complete weight has other right-singular vectors
            of_fused_layer = np.linalg.svd(base.weight.detach().double().numpy())[2][:RANK]
            assert np.square(of_fused_layer @ v.T).sum() / RANK < 0.9


def allowed_pairs() -> list[tuple[Any, Any, Any]]:
    learning = [i for i in get_args(Init) if i != "zero"]
    a_random = [(train, init, "zero") for train in ("B", "both") for init in learning]
    b_random = [(train, "zero", init) for train in ("A", "both") for init in learning]
    return a_random + b_random


@pytest.mark.parametrize(("train", "init_a", "init_b"), allowed_pairs())
def test_training_starts_at_the_pretrained_weight_and_has_a_gradient(train: Any, init_a: Any, init_b: Any) -> None:
    base = nn.Linear(D_IN, D_OUT)
    config = AdapterConfig(train=train, rank=RANK, init_a=init_a, init_b=init_b)
    layer = AdaptedLinear(base, config, [Projection("layer", "query", 0, D_OUT)])
    assert not layer.delta().any()
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(layer(x), base(x))
    layer(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("factor", FACTORS)
def test_svd_sign_does_not_depend_on_the_weights_sign(factor: Factor) -> None:
    weight = torch.randn(D_OUT, D_IN)
    plus, minus = (init_factor("svd", factor, sign * weight, RANK, 0, "layer") for sign in (1, -1))
    torch.testing.assert_close(plus, minus, atol=1e-5, rtol=0)
    v = vectors(plus, factor)
    assert (v.max(dim=1).values == v.abs().max(dim=1).values).all()
