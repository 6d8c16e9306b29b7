"""Truncate the adapters of a module to smaller ranks, stack the links of a chain, and replace adapters of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mode
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.errors import UsageError
from modules.adapters import (
    AdapterConfig,
    ChainConfig,
    LowRankFactors,
    Projection,
    adapted_projections,
    adapter_state,
    attach,
    detach,
    load_adapter_state,
)
from modules.adapters.patterns import exact_patterns
from modules.analysis.combination import Decomposition, Side, Update, decompose, relative_loss
from modules.base import AdaptedModule


class Loss(NamedTuple):
    """Relative error of truncated updates in the Frobenius norm.

    Args:
        total: Error of all updates together.
        worst: Largest error of one projection's update.
        projection: Name of the projection with the largest error.
    """

    total: float
    worst: float
    projection: str

    def __str__(self) -> str:
        """Return a clause for messages and the model card."""
        total, worst = (f"{100 * loss:.3g} %" for loss in (self.total, self.worst))
        return f"the update is off by {total} of its norm, most in {self.projection} with {worst}"


class Truncation(NamedTuple):
    """Result of a truncation.

    Args:
        ranks: Ranks before and after, by the name of the projection.
        loss: Error of the truncated updates.
    """

    ranks: dict[str, tuple[int, int]]
    loss: Loss

    def __str__(self) -> str:
        """Return a clause for messages and the model card."""
        before, after = (sorted({pair[i] for pair in self.ranks.values()}) for i in (0, 1))
        return f"from rank {_range_text(before)} to {_range_text(after)}; {self.loss}"


def check_options(rank: int | None, keep: float | None) -> None:
    """Check the options of a truncation.

    Raises:
        UsageError: If a value is out of range, or both values are given.
    """
    if rank is not None and keep is not None:
        raise UsageError("--rank and --keep: both choose the ranks. Give one of the options.")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank: {rank} is too small. Use 1 or more.")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(
            f"--keep: {keep} is out of range. Use a share of the update's squared norm in (0, 1], such as 0.99."
        )


def truncate_adapters(module: AdaptedModule, rank: int | None, keep: float = 1.0) -> Truncation:
    """Replace each update s·B·A of a module by its best approximation of a smaller rank.

    The new updates have the scale 1. The factor that was frozen in training gets orthonormal vectors.

    Args:
        module: A module with adapters, which are replaced in place.
        rank: The largest rank. A projection with a smaller rank keeps its rank.
        keep: If `rank` is None, every projection gets the smallest rank that keeps this share of its squared Frobenius
            norm.

    Raises:
        UsageError: If the module has no adapters, or `rank` exceeds every rank.
    """
    option = "--keep" if rank is None else "--rank"
    if module.tuning != "adapter":
        raise UsageError(f"{option}: this run has tuning: {module.tuning} and no adapters. Export without {option}.")
    updates = {
        name: Update(factors.A.detach().cpu(), factors.B.detach().cpu(), factors.scale)
        for name, (_, factors) in adapted_projections(module.backbone).items()
    }
    ranks = {name: update.a.shape[0] for name, update in updates.items()}
    if rank is not None and rank > max(ranks.values()):
        raise UsageError(
            f"--rank: {rank} is larger than the run's adapter rank ({max(ranks.values())}). Use this rank or less."
        )

    def choose_rank(decomposition: Decomposition) -> int:
        return decomposition.rank_to_keep(keep) if rank is None else min(rank, len(decomposition.sigma))

    truncated, loss = truncated_sums(
        {name: [update] for name, update in updates.items()},
        [1.0],
        choose_rank,
        orthonormal="B" if module.adapter.train == "A" else "A",
    )
    replace_adapters(module, truncated)
    return Truncation({name: (ranks[name], update.a.shape[0]) for name, update in truncated.items()}, loss)


def truncated_sums(
    updates: Mapping[str, Sequence[Update]],
    weights: Sequence[float],
    choose_rank: Callable[[Decomposition], int],
    orthonormal: Side,
) -> tuple[dict[str, Update], Loss]:
    """Return the best approximation of each projection's weighted sum of updates, and the loss.

    Args:
        updates: Updates to add, by the name of the projection.
        weights: Weight of each update.
        choose_rank: Function that returns the rank for a decomposed sum.
        orthonormal: The factor that gets orthonormal vectors.
    """
    truncated: dict[str, Update] = {}
    squares: dict[str, tuple[float, float]] = {}  # squared norms of the lost part and of the sum
    for name, parts in updates.items():
        decomposition = decompose(parts, weights)
        rank = choose_rank(decomposition)
        truncated[name] = decomposition.truncate(rank, orthonormal)
        squares[name] = decomposition.lost_square(rank), decomposition.square
    losses = {name: relative_loss(*pair) for name, pair in squares.items()}
    worst = max(losses, key=lambda name: losses[name])
    total = relative_loss(*(sum(values) for values in zip(*squares.values(), strict=True)))
    return truncated, Loss(total, losses[worst], worst)


def stack_links(links: Sequence[Update]) -> Update:
    """Return the sum of a chain's links as one update. The links have the same scale.

    A and B are stacked, so no number changes. If the ranks add up to more than W allows, the sum is decomposed instead,
    without loss except rounding.
    """
    a, b, scale = torch.cat([link.a for link in links]), torch.cat([link.b for link in links], dim=1), links[0].scale
    largest = min(b.shape[0], a.shape[1])
    if a.shape[0] <= largest:
        return Update(a, b, scale)
    total = decompose(links, [1.0] * len(links)).truncate(largest)
    return Update(total.a, total.b / scale, scale)


def chain_updates(
    backbone: nn.Module, state: Mapping[str, Tensor], links: Sequence[Mapping[str, Tensor]]
) -> dict[str, Update]:
    """Return the update of all links of a chain, by the name of the projection.

    Args:
        backbone: The backbone with adapters; only names and scales are used.
        state: Factors of the last link by the names of `adapter_state`.
        links: Factors of the merged links.
    """

    def update(factors: LowRankFactors, layer: str, link: Mapping[str, Tensor]) -> Update:
        a, b = (link[f"{layer}.adapters.{factors.projection.role}.{side}"].detach().cpu() for side in "AB")
        return Update(a, b, factors.scale)

    return {
        name: stack_links([update(factors, factors.projection.layer, link) for link in (*links, state)])
        for name, (_, factors) in adapted_projections(backbone).items()
    }


def flatten_chain(module: AdaptedModule) -> None:
    """Replace the links of a chain by one adapter over the pretrained weights, of rank up to r × number of links."""
    if links := module.chain.links:
        updates = chain_updates(module.backbone, adapter_state(module.backbone), links)
        module.chain.restore(module.backbone)
        replace_adapters(module, updates)


def replace_adapters(module: AdaptedModule, updates: Mapping[str, Update]) -> None:
    """Replace the adapters of a module by adapters of the same projections, with any ranks and scales."""
    heads = [head.removeprefix("backbone.") for head in module.head_names if head.startswith("backbone.")]
    detach(module.backbone)
    module.adapter = given_config(module.adapter, updates)
    module.projections = attach(module.backbone, module.adapter, exclude=heads)
    load_adapter_state(module.backbone, factor_state(module.projections, updates))


def given_config(base: AdapterConfig, updates: Mapping[str, Update]) -> AdapterConfig:
    """Return a configuration for given factors, with the rank and the scale of each update.

    Args:
        base: Configuration with the targets of the result.
        updates: Updates by the name of the projection.
    """
    ranks = {name: update.a.shape[0] for name, update in updates.items()}
    alphas = {name: float(f"{update.scale * ranks[name]:.15g}") for name, update in updates.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return replace(
        base,
        init_a="given",
        init_b="given",
        chain=ChainConfig(),
        scaling="standard",
        rank=rank,
        alpha=alpha,
        rank_pattern=exact_patterns(ranks, rank),
        alpha_pattern=exact_patterns(alphas, alpha),
    )


def factor_state(projections: Sequence[Projection], updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Return the factors of updates by the names of `adapter_state`."""
    return {
        f"{p.layer}.adapters.{p.role}.{side}": updates[p.name].factor(side)  # type: ignore[arg-type]
        for p in projections
        for side in "AB"
    }


def _range_text(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
