"""The adapted layer: (W + s·B·A)·x + b, with W frozen and one factor or both trained."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .config import AdapterConfig, AdapterError, Projection
from .functional import block_diagonal, fused, plain
from .init import init_factor
from .weight import FrozenWeight


def check_rank(config: AdapterConfig, projection: Projection, d_in: int) -> int:
    """Return the rank of a projection, and check that it is at most min(d_in, d_out).

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
        """Return A and B as they enter a product: a frozen factor is detached."""
        return (self.A if self.trains_a else self.A.detach()), (self.B if self.trains_b else self.B.detach())

    def named_factors(self, trained: bool) -> dict[str, nn.Parameter]:
        """Return the trained factors, or the frozen factors, by name."""
        flags = {"A": self.trains_a, "B": self.trains_b}
        return {factor: getattr(self, factor) for factor, flag in flags.items() if flag is trained}


class AdaptedLinear(nn.Linear):
    """A wrapped linear layer with one adapter for each adapted slice of its output.

    The wrapped layer keeps its parameters, class and hooks; `unwrap` returns it. Both layers have one dictionary of
    parameters, so whatever moves, shards or replaces W does so for both. The names in a state dict do not change:
    `weight` and `bias`, and beside them the factors, `adapters.<role>.A` and `adapters.<role>.B`. A layer that is not
    fused has one slice.

    Args:
        base: The layer to adapt. Its parameters are frozen.
        config: The adapter.
        projections: The slices of `base`'s output to adapt, in the order of their rows, without overlap.
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig, projections: list[Projection]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self._base = (base,)  # in a tuple, since a submodule's name would stand before the names of W and b
        self._parameters = base._parameters
        self.requires_grad_(False)
        self.dropout = nn.Dropout(config.dropout)
        weight = self.frozen.dense()
        self.adapters = nn.ModuleDict({p.role: LowRankFactors(weight[p.rows], config, p) for p in projections})
        self.scale = self.factors()[0].scale
        self._rows = tuple((p.start, p.stop) for p in projections)
        self.enabled = True
        self.merged = False
        self.train(base.training)

    @property
    def frozen(self) -> FrozenWeight:
        """Return the frozen weight W."""
        return FrozenWeight(self.weight)

    def factors(self) -> list[LowRankFactors]:
        """Return the factors of each slice, in the order of their rows."""
        return [cast(LowRankFactors, f) for f in self.adapters.values()]

    def operands(self) -> tuple[Tensor, list[Tensor]]:
        """Return the factors as they enter the products, with the scale of the first slice as the layer's one scale.

        Returns:
            A of all slices one below the other, (k·r, d_in), and B of each slice, (rows, r). B of a slice of another
            scale is multiplied by the quotient of the two scales.
        """
        pairs = [f.operands() for f in self.factors()]
        ratios = [f.scale / self.scale for f in self.factors()]
        bs = [b if ratio == 1 else ratio * b for (_, b), ratio in zip(pairs, ratios, strict=True)]
        return pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _ in pairs]), bs

    def forward(self, x: Tensor) -> Tensor:
        """Apply (W + s·B·A)·x + b (Zhu et al. 2024, section 3; Hu et al. 2022, equation 3).

        In the comments n is the number of tokens of all sequences, k that of adapted slices, r the rank: for a fused
        qkv of ViT-B/16 with query and value adapted, 197 a picture, 2 and 8, d_in = 768 and d_out = 2304.

        Args:
            x: (..., d_in).

        Returns:
            (..., d_out), in the dtype of W·x.
        """
        # out = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ
        if self.merged or not self.enabled:
            return self.frozen.matmul(x, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once for all products
        flat = x.reshape(-1, self.in_features)  # (n, d_in)
        dropped = self.dropout(flat) if self.dropout.p and self.training else None
        compute = plain if self._takes_plain() else fused
        out = compute(flat, self.frozen, self.bias, self.scale, self._rows, *self.operands(), dropped)
        return out.view(*x.shape[:-1], self.out_features)

    def _takes_plain(self) -> bool:
        """Return True where `fused` would save nothing, and where somebody trains W or b, which `fused` cannot."""
        trains_base = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trains_base or not torch.is_grad_enabled()

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the update s·B·A of the whole weight, (d_out, d_in), float32; zero in rows that are not adapted."""
        a, bs = self.operands()
        return self.scale * (block_diagonal(self._rows, bs, self.out_features).float() @ a.float())

    def merge(self) -> None:
        """Add s·B·A to W, so that the layer costs what the wrapped layer costs. Merging twice is merging once.

        Raises:
            AdapterError: If the adapter is switched off: merging would switch it on.
        """
        if not self.enabled:
            raise AdapterError("The adapters are switched off; switch them on before merging.")
        if not self.merged:
            self.frozen.add_(self.delta())
            self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`: exact up to rounding in W's dtype."""
        if self.merged:
            self.frozen.add_(-self.delta())
            self.merged = False

    def unwrap(self) -> nn.Linear:
        """Return the wrapped layer, with the weight as it is now: merged or not."""
        return self._base[0].train(self.training)

    def extra_repr(self) -> str:
        """Show the slices and their rank."""
        ranks = ", ".join(f"{f.projection.role} r={f.A.shape[0]}" for f in self.factors())
        return f"{super().extra_repr()}, adapters: {ranks}"
