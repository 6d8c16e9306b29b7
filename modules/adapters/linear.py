"""The equation: a linear layer that computes (W + s·B·A)·x + b, with W frozen and one factor or both trained."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters.config import AdapterConfig, AdapterError
from modules.adapters.functional import fused, plain
from modules.adapters.init import init_factor
from modules.adapters.roles import Projection


def check_rank(config: AdapterConfig, projection: Projection, d_in: int) -> int:
    """Return the rank of a projection, and refuse one above min(d_in, d_out).

    Raises:
        AdapterError: With the projection and its shape.
    """
    rank, d_out = config.rank_of(projection), projection.stop - projection.start
    if rank > min(d_out, d_in):
        key = "rank" if rank == config.rank else "rank_pattern"
        raise AdapterError(
            f"adapter.{key}: {rank} exceeds what {projection.name} can hold, a weight of {d_out} × {d_in}; choose "
            f"{min(d_out, d_in)} or less, or other targets."
        )
    return rank


class LowRankFactors(nn.Module):
    """The factors A (rank, d_in) and B (d_out, rank) of one projection, float32.

    A frozen factor is a Parameter without gradient (a buffer would be broadcast by DDP in every forward), and it enters
    every product detached: setting `requires_grad` on it by hand, as PEFT's toggles do, trains nothing.
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
        """A and B as they enter a product: whichever is frozen is detached."""
        return (self.A if self.trains_a else self.A.detach()), (self.B if self.trains_b else self.B.detach())

    def named_factors(self, trained: bool) -> dict[str, nn.Parameter]:
        """The factors that are trained, or those that are frozen, by name."""
        flags = {"A": self.trains_a, "B": self.trains_b}
        return {factor: getattr(self, factor) for factor, flag in flags.items() if flag is trained}


class AdaptedLinear(nn.Linear):
    """A linear layer with one adapter for each adapted slice of its output.

    `weight` and `bias` are the wrapped layer's own parameters, frozen, so names in a state dict do not change; the
    factors lie beside them at `adapters.<role>.A` and `adapters.<role>.B`. A layer that is not fused has one slice.

    Args:
        base: The layer to adapt; its parameters are shared, not copied.
        config: The adapter.
        projections: The slices of `base`'s output to adapt, in the order of their rows, without overlap.
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig, projections: list[Projection]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.dropout = nn.Dropout(config.dropout)
        self.adapters = nn.ModuleDict(
            {p.role: LowRankFactors(base.weight[p.rows], config, p) for p in projections}  # W of the slice
        )
        self.scale = self.factors()[0].scale
        self._rows = tuple((p.start, p.stop) for p in projections)
        self.enabled = True
        self.merged = False
        self.train(base.training)

    def factors(self) -> list[LowRankFactors]:
        """The factors of each slice, in the order of their rows."""
        return [cast(LowRankFactors, f) for f in self.adapters.values()]

    def operands(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each slice as they enter a product with the layer's one scale, which is the first slice's.

        B of a slice of another scale is multiplied by the quotient of the two.
        """
        pairs = [(*f.operands(), f.scale / self.scale) for f in self.factors()]
        return [(a, b if ratio == 1 else ratio * b) for a, b, ratio in pairs]

    def forward(self, x: Tensor) -> Tensor:
        """Apply (W + s·B·A)·x + b (Zhu et al. 2024, section 3; Hu et al. 2022, equation 3).

        In the comments n is the number of tokens of all sequences, k that of adapted slices, r the rank: for a fused
        qkv of ViT-B/16 with query and value adapted, 197 a picture, 2 and 8, d_in = 768 and d_out = 2304.

        Args:
            x: (..., d_in).

        Returns:
            (..., d_out), in the dtype of W·x.
        """
        if self.merged or not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once for all products
        flat = x.reshape(-1, self.in_features)  # (n, d_in)
        dropped = self.dropout(flat) if self.dropout.p and self.training else None
        if self._takes_plain(x):
            out = plain(flat, self.weight, self.bias, self.scale, *self._stacked_factors(), dropped)
        else:
            a, bs = zip(*self.operands(), strict=True)
            stacked = a[0] if len(a) == 1 else torch.cat(a)  # (k·r, d_in)
            out = fused(flat, self.weight, self.bias, self.scale, self._rows, stacked, bs, dropped)
        return out.view(*x.shape[:-1], self.out_features)

    def _takes_plain(self, x: Tensor) -> bool:
        """Whether this call is for autograd's own operations: where somebody has W or b trained.

        So is another dtype than W's without autocast, for PyTorch's own message.
        """
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return True
        return x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type)

    def _stacked_factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole layer; see `stack`."""
        return stack([f.projection for f in self.factors()], self.operands(), self.out_features)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update s·B·A of the whole weight, (d_out, d_in), float32; zero in rows that are not adapted."""
        a, b = self._stacked_factors()
        return self.scale * (b.float() @ a.float())

    def merge(self) -> None:
        """Add s·B·A to W, in float32 and then cast, so that the layer costs what it did before. Twice is once.

        Raises:
            AdapterError: If the adapter is switched off: merging would switch it on.
        """
        if not self.enabled:
            raise AdapterError("The adapters are switched off; switch them on before merging.")
        if not self.merged:
            self._add_to_weight(self.delta())
            self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`: exact up to rounding in W's dtype."""
        if self.merged:
            self._add_to_weight(-self.delta())
            self.merged = False

    @torch.no_grad()
    def _add_to_weight(self, update: Tensor) -> None:
        self.weight.copy_(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) + update)

    def to_linear(self) -> nn.Linear:
        """The plain layer with this layer's own weight (merged or not) and bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Show the slices and their rank."""
        ranks = ", ".join(f"{f.projection.role} r={f.A.shape[0]}" for f in self.factors())
        return f"{super().extra_repr()}, adapters: {ranks}"


def stack(projections: list[Projection], operands: list[tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """A of all slices one below the other, B of all slices on a block diagonal with zeros in the rows of the rest.

    A fused (q; k; v) with q and v adapted has [A_q; A_v] and [[B_q, 0], [0, 0], [0, B_v]], so
    that one product serves all slices and no slice of the output is written to on its own.

    Args:
        projections: The k slices, in the order of their rows.
        operands: A (r, d_in) and B (rows of the slice, r) of each; slices may differ in r.
        rows: Rows of the whole layer, d_out.

    Returns:
        (R, d_in) and (d_out, R), with R the sum of the ranks.
    """
    if len(operands) == 1 and operands[0][1].shape[0] == rows:
        return operands[0]  # not fused: nothing to stack
    blocks, row = [], 0
    for projection, (_, b) in zip(projections, operands, strict=True):
        blocks += [b.new_zeros(projection.start - row, 0), b]
        row = projection.stop
    blocks.append(blocks[-1].new_zeros(rows - row, 0))
    return torch.cat([a for a, _ in operands]), torch.block_diag(*blocks)
