"""The adapted layer: (W + s·B·A)·x + b, with W frozen and one or both factors trained."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .config import AdapterConfig, AdapterError, Projection
from .functional import block_diagonal, by_row, fused, plain
from .init import init_factor
from .weight import FrozenWeight


def check_rank(config: AdapterConfig, projection: Projection, d_in: int) -> int:
    """Check that the rank of a projection is at most min(d_in, d_out), and return the rank.

    Raises:
        AdapterError: With the projection and its shape.
    """
    rank, d_out = config.rank_of(projection), projection.stop - projection.start
    if rank > min(d_out, d_in):
        key = "rank" if rank == config.rank else "rank_pattern"
        raise AdapterError(
            f"adapter.{key}: {rank} is larger than {projection.name} allows, a weight of {d_out} × {d_in}. Use "
            f"{min(d_out, d_in)} or less, or other targets."
        )
    return rank


def check_rows(x: Tensor, batch: int) -> None:
    """Check that the input of a layer has the rows of a mixed batch, each repeated equally often.

    Beam search repeats each row next to itself. Layers that cut images into windows do so too.

    Raises:
        AdapterError: With both numbers of rows.
    """
    if len(x) % batch:
        raise AdapterError(
            f"A mixed batch of {batch} rows cannot be applied to an input of {len(x)} rows. Give one name for each row "
            "of the batch. A backbone that computes a part once for the whole batch is not supported."
        )


class MixedFactors(NamedTuple):
    """Factors of a layer in a mixed batch, in which each row has its own B.

    Args:
        bts: Bᵀ of each slice and each adapter, (adapters, r, rows).
        adapter_index: Adapter of each row of the batch, (batch,).
    """

    bts: list[Tensor]
    adapter_index: Tensor


class LowRankFactors(nn.Module):
    """The factors A (rank, d_in) and B (d_out, rank) of one projection, float32.

    A frozen factor is a Parameter without gradient, since DDP would broadcast a buffer in every forward pass. Products
    use the detached frozen factor. Setting `requires_grad` on a frozen factor, as PEFT does, therefore trains nothing.
    """

    def __init__(self, weight: Tensor, config: AdapterConfig, projection: Projection) -> None:
        super().__init__()
        rank, name = check_rank(config, projection, weight.shape[1]), projection.name
        a = init_factor(config.init_a, "A", weight, rank, config.seed, name)
        b = init_factor(config.init_b, "B", weight, rank, config.seed, name)
        self.A = nn.Parameter(a.to(weight.device), requires_grad=config.trains_a)
        self.B = nn.Parameter(b.to(weight.device), requires_grad=config.trains_b)
        self.trains_a, self.trains_b = config.trains_a, config.trains_b
        self.scale = config.scale_of(projection)
        self.projection = projection

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return A and B for a product, with the frozen factor detached."""
        return (self.A if self.trains_a else self.A.detach()), (self.B if self.trains_b else self.B.detach())

    def named_factors(self, trained: bool) -> dict[str, nn.Parameter]:
        """Return the trained or the frozen factors by name."""
        flags = {"A": self.trains_a, "B": self.trains_b}
        return {factor: getattr(self, factor) for factor, flag in flags.items() if flag is trained}


class AdaptedLinear(nn.Linear):
    """A wrapped linear layer with one adapter for each adapted slice of its output.

    The wrapped layer keeps its parameters, class and hooks; `unwrap` returns the wrapped layer. Both layers share one
    dictionary of parameters, so code that moves, shards or replaces W does so in both layers. The state-dict names
    `weight` and `bias` do not change. The factors are `adapters.<role>.A` and `adapters.<role>.B`. A layer that is not
    fused has one slice.

    Args:
        base: The layer to adapt. Its parameters are frozen.
        config: The adapter configuration.
        projections: The slices of `base`'s output to adapt, in the order of their rows, without overlap.
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig, projections: list[Projection]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self._base = (base,)  # The tuple hides the submodule, whose name would prefix the state-dict names of W and b.
        self._parameters = base._parameters
        self.requires_grad_(False)
        self.dropout = nn.Dropout(config.dropout)
        weight = self.frozen.dense()
        self.adapters = nn.ModuleDict({p.role: LowRankFactors(weight[p.rows], config, p) for p in projections})
        self.scale = self.factors()[0].scale
        self._rows = tuple((p.start, p.stop) for p in projections)
        self.enabled = True
        self.merged = False
        self.mixed: MixedFactors | None = None
        self.train(base.training)

    @property
    def frozen(self) -> FrozenWeight:
        """Return the frozen weight W."""
        return FrozenWeight(self.weight)

    def factors(self) -> list[LowRankFactors]:
        """Return the factors of each slice, in the order of their rows."""
        return [cast(LowRankFactors, f) for f in self.adapters.values()]

    def operands(self) -> tuple[Tensor, list[Tensor]]:
        """Return the factors of all slices for a product with one scale, the scale of the first slice.

        Returns:
            A of all slices, stacked, (k·r, d_in), and B of each slice, (rows, r). If a slice has another scale, its B
            is multiplied by the ratio of the two scales.
        """
        pairs = [f.operands() for f in self.factors()]
        ratios = [f.scale / self.scale for f in self.factors()]
        bs = [b if ratio == 1 else ratio * b for (_, b), ratio in zip(pairs, ratios, strict=True)]
        return pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _ in pairs]), bs

    def forward(self, x: Tensor) -> Tensor:
        """Apply (W + s·B·A)·x + b (Zhu et al. 2024, section 3; Hu et al. 2022, equation 3).

        Shapes in the comments: n tokens of all sequences, k adapted slices, rank r. Example: in the fused qkv of a
        ViT-B/16 with query and value adapted, n = 197 for each image, k = 2, r = 8, d_in = 768, d_out = 2304.

        Args:
            x: (..., d_in).

        Returns:
            (..., d_out), in the dtype of W·x.
        """
        # out = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ
        if self.merged or not self.enabled:
            return self.frozen.matmul(x, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # Otherwise each product would cast x again.
        flat = x.reshape(-1, self.in_features)  # (n, d_in)
        dropped = self.dropout(flat) if self.dropout.p and self.training else None
        a, bs = self.operands()
        if self.mixed is not None:
            check_rows(x, len(self.mixed.adapter_index))
            out = by_row(flat, self.frozen, self.bias, self.scale, self._rows, a, *self.mixed, dropped)
        else:
            compute = plain if self._takes_plain() else fused
            out = compute(flat, self.frozen, self.bias, self.scale, self._rows, a, bs, dropped)
        return out.view(*x.shape[:-1], self.out_features)

    def _takes_plain(self) -> bool:
        """Return True if gradients are off, or if W or b is trained. `fused` gives W and b no gradient."""
        trains_base = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trains_base or not torch.is_grad_enabled()

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the update s·B·A of the whole weight, (d_out, d_in), float32. Rows that are not adapted are zero."""
        a, bs = self.operands()
        return self.scale * (block_diagonal(self._rows, bs, self.out_features).float() @ a.float())

    def merge(self) -> None:
        """Add s·B·A to W, so that the layer is as fast as the wrapped layer. A second merge has no effect.

        Raises:
            AdapterError: If the adapter is switched off.
        """
        if not self.enabled:
            raise AdapterError("The adapters are switched off. Switch the adapters on before merging.")
        if not self.merged:
            self.frozen.add_(self.delta())
            self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`, exact up to rounding in W's dtype."""
        if self.merged:
            self.frozen.add_(-self.delta())
            self.merged = False

    def unwrap(self) -> nn.Linear:
        """Return the wrapped layer. A merged weight stays merged."""
        return self._base[0].train(self.training)

    def extra_repr(self) -> str:
        """Return the slices and their ranks for `repr`."""
        ranks = ", ".join(f"{f.projection.role} r={f.A.shape[0]}" for f in self.factors())
        return f"{super().extra_repr()}, adapters: {ranks}"
