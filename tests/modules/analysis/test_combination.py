"""Combined and truncated updates, compared with dense float64 matrices, closed forms and PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.utils.merge_utils import ties as pefts_ties
from torch import Tensor, nn

from modules.adapters import AdapterError
from modules.analysis.combination import (
    Sparsity,
    Update,
    combine_updates,
    decompose,
    drop_and_rescale,
    relative_loss,
    ties_merge,
    weighted_sum,
)

D_OUT, D_IN, RANK = 12, 10, 3
WEIGHTS = {"average": [0.25] * 4, "difference": [1.0, -1.0, 0.5, -2.0], "sum": [1.0] * 4}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def updates(count: int = 4, shared: str = "A", rank: int = RANK) -> list[Update]:
    """Return updates with different scales. `shared` names the shared factor, or is `none`."""
    return [
        Update(
            random(rank, D_IN, seed=0 if shared == "A" else i),
            random(D_OUT, rank, seed=9 if shared == "B" else 10 + i),
            scale=2.0 + i,
        )
        for i in range(count)
    ]


def dense(parts: list[Update], weights: list[float]) -> Tensor:
    """Return Σ wᵢ·sᵢ·Bᵢ·Aᵢ in float64."""
    return sum(
        (w * u.scale * u.b.double() @ u.a.double() for u, w in zip(parts, weights, strict=True)), torch.zeros(())
    )


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("shared", ["A", "B"])
def test_a_weighted_sum_over_a_shared_factor_is_exact(shared: str, weights: list[float]) -> None:
    parts = updates(shared=shared)
    combined = combine_updates(parts, weights, shared)  # type: ignore[arg-type]
    assert torch.equal(combined.factor(shared), parts[0].factor(shared))  # type: ignore[arg-type]
    assert (combined.scale, combined.b.dtype, combined.a.shape[0]) == (2.0, torch.float32, RANK)
    assert error(dense([combined], [1.0]), dense(parts, weights)) < 1e-7


def test_sums_are_computed_in_float64() -> None:
    parts = [Update(torch.ones(1, 1), torch.full((1, 1), value), 1.0) for value in (1e9, 1.0, 1.0, 1e9)]
    assert float(combine_updates(parts, [1.0, 1.0, 1.0, -1.0], "A").b) == 2.0  # In float32, 1e9 + 1 is 1e9.


@pytest.mark.parametrize("shared", ["A", "B"])
def test_a_differing_factor_is_refused(shared: str) -> None:
    parts = updates(shared="none")
    with pytest.raises(AdapterError, match=f"{shared} of layer differs between adapter 1 and adapter 2"):
        combine_updates(parts, [0.25] * 4, shared, name="layer")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- TIES


def test_ties_trims_elects_and_averages() -> None:
    """Trim to two of four entries, elect signs, and average the entries with the elected sign."""
    first, second, third = (torch.tensor(t) for t in ([3.0, -2.0, 0.1, 1.0], [5.0, 4.0, 0.2, 1.0], [-1.0, 6.0, 0.0, 2]))
    merged = ties_merge([first, second, third], [1 / 3] * 3, density=0.5)
    torch.testing.assert_close(merged, torch.tensor([4.0, 5.0, 0.0, 2.0], dtype=torch.float64))


def test_ties_weighs_the_agreeing_entries_and_inverts_negative_weights() -> None:
    tensor = torch.tensor
    assert float(ties_merge([tensor([2.0]), tensor([8.0])], [1.0, 2.0], 1.0)) == pytest.approx(3 * (2 + 2 * 8) / 3)
    assert float(ties_merge([tensor([2.0]), tensor([8.0])], [1.0, -1.0], 1.0)) == pytest.approx(2 * -8)
    assert float(ties_merge([tensor([2.0]), tensor([-2.0])], [1.0, 1.0], 1.0)) == 0  # A tie elects no sign.


def test_ties_with_equal_weights_is_pefts_times_the_number_of_adapters() -> None:
    """PEFT multiplies by the weights and divides by the count, so weights 1/n shrink its result n times."""
    tensors = [random(6, 5, seed=i) for i in range(3)]
    pefts = pefts_ties(tensors, torch.full((3,), 1 / 3), 0.4)
    torch.testing.assert_close(ties_merge(tensors, [1 / 3] * 3, 0.4).float(), 3 * pefts)


# ----------------------------------------------------------------------------------------------------------------- DARE


def test_dare_keeps_and_rescales_a_share_of_the_entries() -> None:
    vector = random(100, 100)
    kept = drop_and_rescale(vector, 0.3, torch.Generator().manual_seed(0))
    assert float((kept != 0).double().mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(kept[kept != 0], vector[kept != 0].double() / 0.3, check_dtype=False)
    draws = [drop_and_rescale(vector[:1], 0.3, torch.Generator().manual_seed(i)) for i in range(4000)]
    assert error(torch.stack(draws).mean(0).double(), vector[:1].double()) < 0.1  # sqrt(0.7 / 0.3 / 4000) = 0.024


def test_dare_drops_entries_by_seed_name_and_adapter() -> None:
    equal_updates = [updates(1)[0]] * 2
    b = {
        key: combine_updates(equal_updates, [1.0, 1.0], "A", "dare", Sparsity(0.5, seed), name).b
        for key, seed, name in [("first", 0, "x"), ("again", 0, "x"), ("seed", 1, "x"), ("name", 0, "y")]
    }
    assert torch.equal(b["first"], b["again"])
    assert not torch.equal(b["first"], b["seed"]) and not torch.equal(b["first"], b["name"])
    ratio = b["first"] / equal_updates[0].b  # Each of the two adapters adds 0 or 2.
    assert {round(float(value), 5) for value in ratio.flatten()} == {0.0, 2.0, 4.0}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_scales_are_folded_into_the_factors_before_sparse_methods(method: str) -> None:
    parts = updates(2)
    folded = [Update(u.a, u.scale / 2 * u.b, 2.0) for u in parts]
    results = [combine_updates(p, [0.5, 0.5], "A", method, Sparsity(0.5)) for p in (parts, folded)]  # type: ignore[arg-type]
    torch.testing.assert_close(results[0].b, results[1].b)


# ------------------------------------------------------------------------------------------------------ smaller ranks


@pytest.mark.parametrize("count, shape", [(1, "less"), (4, "more")])
def test_the_decomposition_is_that_of_the_dense_sum(count: int, shape: str) -> None:
    """Four adapters of rank 3 have a larger total rank than a weight of 12 × 10."""
    parts, weights = updates(count, shared="none"), [0.7, -1.0, 0.5, 2.0][:count]
    whole = dense(parts, weights)
    decomposition = decompose(parts, weights)
    u, sigma, vh = torch.linalg.svd(whole, full_matrices=False)
    size = len(decomposition.sigma)
    assert size == min(count * RANK, D_IN)
    torch.testing.assert_close(decomposition.sigma, sigma[:size], rtol=1e-10, atol=1e-10)
    for rank in range(1, size + 1):
        best = u[:, :rank] * sigma[:rank] @ vh[:rank]
        for orthonormal in ("A", "B"):
            truncated = decomposition.truncate(rank, orthonormal)  # type: ignore[arg-type]
            assert (truncated.a.shape, truncated.b.shape) == ((rank, D_IN), (D_OUT, rank))
            assert error(dense([truncated], [1.0]), best) < 2e-7
            vectors = truncated.a if orthonormal == "A" else truncated.b.T
            torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank), atol=1e-6, rtol=0)
        loss = relative_loss(decomposition.lost_square(rank), decomposition.square)
        assert loss == pytest.approx(error(best, whole), abs=1e-9)


def test_the_kept_rank_is_the_smallest_that_keeps_the_share() -> None:
    b, a = torch.eye(4), torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # squares 16, 9, 4, 1 of 30
    decomposition = decompose([Update(a, b, 1.0)])
    shares = {0.1: 1, 16 / 30: 1, 0.54: 2, 25 / 30: 2, 0.9: 3, 29 / 30: 3, 0.99: 4, 1.0: 4}
    assert {share: decomposition.rank_to_keep(share) for share in shares} == shares
    zero = decompose([Update(a, 0 * b, 1.0)])
    assert (zero.rank_to_keep(0.99), relative_loss(zero.lost_square(1), zero.square)) == (1, 0.0)


# ----------------------------------------------------------------------------------------------------------------- PEFT


class Layer(nn.Module):
    """A model with one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT)


@torch.no_grad()
def pefts_update(parts: list[Update], weights: list[float], kind: str, **options: float) -> Tensor:
    """Return the update that PEFT's `add_weighted_adapter` combines, in float64."""
    model = peft.PeftModel(
        Layer(),
        peft.LoraConfig(r=RANK, lora_alpha=RANK * parts[0].scale, target_modules=["linear"]),  # type: ignore[arg-type]
        adapter_name="0",
    )
    for i, part in enumerate(parts):
        if i:
            model.add_adapter(
                str(i),
                peft.LoraConfig(r=RANK, lora_alpha=RANK * part.scale, target_modules=["linear"]),  # type: ignore[arg-type]
            )
        layer = model.base_model.model.linear
        layer.lora_A[str(i)].weight.copy_(part.a)
        layer.lora_B[str(i)].weight.copy_(part.b)
    names = [str(i) for i in range(len(parts))]
    model.add_weighted_adapter(names, copy.copy(weights), "sum", combination_type=kind, **options)
    layer = model.base_model.model.linear
    return layer.scaling["sum"] * layer.lora_B["sum"].weight.double() @ layer.lora_A["sum"].weight.double()


def test_pefts_linear_multiplies_the_average_of_equal_adapters_by_their_number() -> None:
    """PEFT puts √(wᵢ·sᵢ) on both factors: (Σ √(wᵢ·sᵢ)·Bᵢ)·(Σ √(wᵢ·sᵢ)·A), which has products of different adapters."""
    parts, weights = [updates(1)[0]] * 4, WEIGHTS["average"]
    exact = dense(parts, weights)
    assert error(dense([combine_updates(parts, weights, "A")], [1.0]), exact) < 1e-7
    assert error(pefts_update(parts, weights, "linear"), 4 * exact) < 1e-6


def test_of_pefts_types_only_cat_and_svd_are_the_dense_sum() -> None:
    parts, weights = updates(), WEIGHTS["average"]
    exact = dense(parts, weights)
    assert error(dense([combine_updates(parts, weights, "A")], [1.0]), exact) < 1e-7
    assert error(pefts_update(parts, weights, "cat"), exact) < 1e-6
    assert error(pefts_update(parts, weights, "svd"), exact) < 1e-5  # Over one A, the sum has rank 3.
    roots = [(w * u.scale) ** 0.5 for u, w in zip(parts, weights, strict=True)]
    linear = weighted_sum([u.b for u in parts], roots) @ weighted_sum([u.a for u in parts], roots)
    assert error(pefts_update(parts, weights, "linear"), linear) < 1e-6
    assert error(linear, exact) > 1
    for kind in ("ties", "dare_linear", "magnitude_prune"):
        assert error(pefts_update(parts, weights, kind, density=0.999), exact) > 0.5, kind


def test_pefts_svd_of_different_factors_is_the_truncated_decomposition() -> None:
    parts, weights = updates(3, shared="none"), [0.5, 0.3, 0.2]
    truncated = decompose(parts, weights).truncate(RANK)
    pefts = pefts_update(parts, weights, "svd", svd_rank=RANK)
    assert error(dense([truncated], [1.0]), pefts) < 1e-5
