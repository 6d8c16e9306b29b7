"""The adapter equation out = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ for n tokens and rank r, in three implementations.

With g the gradient to out and h = x·Aᵀ:

    gradient to x:  g·W + s·(g·B)·A     (n, d_in)
    gradient to A:  s·(g·B)ᵀ·x          (r, d_in)
    gradient to B:  s·gᵀ·h              (d_out, r)

With dropout, the input of A is x~ instead of x. Then h = x~·Aᵀ, the gradient to A contains x~ instead of x, and
s·(g·B)·A is the gradient to x~.

The gradient to B needs only the activation h. The gradient to A needs only the input of A. The gradient to x needs no
activation.

`plain` consists of ordinary autograd operations. `plain` is the reference, and is faster without gradients. `fused` is
one autograd function for training. `fused` casts W again in backward, so autocast over float32 weights keeps no second
copy of W. `fused` computes s·(g·B)·A and adds the result to g·W in one operation (`addmm_`). Autograd needs two.

`by_row` is for mixed batches, in which each row of the batch has its own B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .weight import FrozenWeight

Rows = tuple[int, int]


def plain(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    scale: float,
    rows: Sequence[Rows],
    a: Tensor,
    bs: Sequence[Tensor],
    dropped: Tensor | None = None,
) -> Tensor:
    """Return x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, differentiated by autograd.

    Zhu et al. 2024, section 3; Hu et al. 2022, equation 3.

    Args:
        x: (n, d_in).
        weight: W, (d_out, d_in).
        bias: (d_out,), or None.
        scale: s.
        rows: (start, stop) of each of the k adapted slices of the output, in order.
        a: A of all slices, stacked, (k·r, d_in), any floating dtype. If slices differ in r, k·r is the sum of the
            ranks.
        bs: B of each slice, (rows, r), any floating dtype.
        dropped: x after dropout, (n, d_in); None without dropout.

    Returns:
        (n, d_out), in the dtype of W·x.
    """
    h = F.linear(x if dropped is None else dropped, a.to(x.dtype))  # (n, k·r)
    out = weight.matmul(x, bias)  # (n, d_out)
    b = block_diagonal(rows, bs, out.shape[1])  # (d_out, k·r)
    # The in-place addition is safe, since the backward pass of W·x + b does not need the output.
    return out.addmm_(h.to(out.dtype), b.to(out.dtype).T, alpha=scale)


def block_diagonal(rows: Sequence[Rows], bs: Sequence[Tensor], d_out: int) -> Tensor:
    """Return one B (d_out, k·r) for all slices, with zeros in the rows that are not adapted.

    A fused (q; k; v) with q and v adapted gives [[B_q, 0], [0, 0], [0, B_v]]. All slices then need only one product.
    """
    if len(bs) == 1 and bs[0].shape[0] == d_out:
        return bs[0]
    blocks, previous_stop = [], 0
    for (start, stop), b in zip(rows, bs, strict=True):
        blocks += [b.new_zeros(start - previous_stop, 0), b]
        previous_stop = stop
    return torch.block_diag(*blocks, bs[-1].new_zeros(d_out - previous_stop, 0))


def by_row(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    scale: float,
    rows: Sequence[Rows],
    a: Tensor,
    bts: Sequence[Tensor],
    index: Tensor,
    dropped: Tensor | None = None,
) -> Tensor:
    """Return x·Wᵀ + b + s·(x·Aᵀ)·Bᵢᵀ, where row i of the batch has its own Bᵢ, differentiated by autograd.

    The time does not depend on the number of different Bᵢ: x·Aᵀ is one product, and all (x·Aᵀ)·Bᵢᵀ are one batched
    product. The Bᵢ of the rows are gathered here, so that only one layer's copies are in memory at a time.

    Args:
        x: (n, d_in): the n / batch tokens of the first row, then the tokens of the second row, …
        weight: As for `plain`, like all arguments that are not listed.
        bias: (d_out,), or None.
        scale: s.
        rows: (start, stop) of each slice of the output.
        a: A of all slices, (k·r, d_in).
        bts: Bᵀ of each slice and each adapter, (adapters, r, rows). BLAS is faster if Bᵀ is contiguous than if B is.
        index: Adapter of each row of the batch, (batch,).
        dropped: x after dropout, (n, d_in), or None.

    Returns:
        (n, d_out), in the dtype of W·x.
    """
    h = F.linear(x if dropped is None else dropped, a.to(x.dtype))  # (n, k·r)
    out = weight.matmul(x, bias)  # (n, d_out)
    h_by_row = h.to(out.dtype).view(len(index), -1, h.shape[1])  # (batch, n / batch, k·r)
    out_by_row = out.view(len(index), -1, out.shape[1])
    hs = h_by_row.split([bt.shape[1] for bt in bts], dim=2)
    for (start, stop), part_h, bt in zip(rows, hs, bts, strict=True):
        of_rows = bt.to(out.dtype).index_select(0, index)  # (batch, r, rows)
        out_by_row[..., start:stop].baddbmm_(part_h, of_rows, alpha=scale)
    return out


def fused(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    scale: float,
    rows: Sequence[Rows],
    a: Tensor,
    bs: Sequence[Tensor],
    dropped: Tensor | None = None,
) -> Tensor:
    """Return the result of `plain`, computed by one autograd function.

    `fused` is differentiable once, gives W and b no gradient, and does not support `torch.func`.

    The arguments are as for `plain`. x and `dropped` have the dtype of W, or the autocast dtype. The gradients to A
    and B have the dtypes of A and B.
    """
    out: Tensor = _LowRankLinear.apply(x, dropped, weight, bias, scale, tuple(rows), a, *bs)
    return out


class _LowRankLinear(torch.autograd.Function):
    """Autograd function of `fused`: save h only if a B is trained, and the input of A only if A is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        scale: float,
        rows: tuple[Rows, ...],
        a: Tensor,
        *bs: Tensor,
    ) -> Tensor:
        dtype = x.dtype
        out = weight.matmul(x, bias)  # (n, d_out)
        a_input = x if dropped is None else dropped
        h = F.linear(a_input, a.to(dtype))  # (n, k·r)
        ranks = [b.shape[1] for b in bs]
        for part, part_h, b in zip(_slices(out, rows), _ranks(h, ranks), bs, strict=True):
            part.addmm_(part_h, b.to(dtype).T, alpha=scale)
        needs_x, needs_dropped, *_, needs_a = ctx.needs_input_grad[:7]
        needs_b = any(ctx.needs_input_grad[7:])
        passes_a = needs_x if dropped is None else needs_dropped  # The gradient to the input of A passes through A.
        ctx.scale, ctx.rows, ctx.ranks = scale, rows, ranks
        ctx.dtypes, ctx.drops = (a.dtype, *(b.dtype for b in bs)), dropped is not None
        ctx.save_for_backward(
            a_input if needs_a else None,
            h if needs_b else None,
            a if passes_a else None,
            *(b if passes_a or needs_a else None for b in bs),
            *(weight if needs_x else ()),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(grad.device.type):  # The caller may run backward within autocast.
            with torch.autocast(grad.device.type, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients to the arguments of `_LowRankLinear.forward`; None for an argument without gradient."""
    a_input, h, a, *others = ctx.saved_tensors
    bs, weight = others[: len(ctx.ranks)], others[len(ctx.ranks) :]
    dtype, scale, rows = grad.dtype, ctx.scale, ctx.rows
    parts = _slices(grad, rows)  # each (n, rows)
    gd = ga = None
    gx = FrozenWeight(*weight).input_gradient(grad) if weight else None  # (n, d_in)
    if a is not None or a_input is not None:
        ghs = [part @ b.to(dtype) for part, b in zip(parts, bs, strict=True)]
        gh = ghs[0] if len(ghs) == 1 else torch.cat(ghs, dim=1)  # (n, k·r)
        if a is not None and ctx.drops:
            gd = (gh @ a.to(dtype)).mul_(scale)
        elif a is not None and gx is not None:
            gx.addmm_(gh, a.to(dtype), alpha=scale)
        if a_input is not None:
            ga = (gh.T @ a_input).to(ctx.dtypes[0]).mul_(scale)
    gbs: list[Tensor | None] = [None] * len(bs)
    if h is not None:
        operands = zip(_ranks(h, ctx.ranks), parts, ctx.dtypes[1:], ctx.needs_input_grad[7:], strict=True)
        gbs = [_gradient_of_b(part_h, part, kind, scale) if needed else None for part_h, part, kind, needed in operands]
    return gx, gd, None, None, None, None, ga, *gbs


def _gradient_of_b(h: Tensor, grad: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return s·gᵀ·h, (rows, r), computed as (hᵀ·g)ᵀ, since BLAS is slower if the larger matrix is transposed."""
    return (h.T @ grad).T.to(dtype, memory_format=torch.contiguous_format).mul_(scale)


def _slices(output: Tensor, rows: tuple[Rows, ...]) -> Sequence[Tensor]:
    """Return views (n, rows) of an output's slices; the output itself if one slice covers it."""
    if rows == ((0, output.shape[1]),):
        return (output,)
    return [output[:, start:stop] for start, stop in rows]


def _ranks(h: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """Return views (n, r) of h, one for each slice."""
    return (h,) if len(ranks) == 1 else h.split(ranks, dim=1)
