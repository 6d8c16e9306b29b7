"""Forward and backward of one linear layer of ViT-B, with the gradient to its input: ours and PEFT against the floor.

The floor is the frozen layer, which saves nothing for backward. There is no optimizer. "ours B, plain" is the same
formula in ordinary autograd operations (`modules.adapters.functional.plain`).

    python -m benchmarks.layer --output docs/results/benchmark_layer.json
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import measured, parse, parser, section
from benchmarks.model import compare, show
from benchmarks.stacks import Arm, Batches, arms_for
from modules.adapters import AdaptedLinear
from modules.adapters.functional import plain

SHAPES = {"768-768": (768, 768), "768-3072": (768, 3072), "3072-768": (3072, 768)}
RANKS = {"bfloat16": [8, 64], "float32": [8]}
ARMS = [
    "forward only",
    "floor",
    "full",
    "PEFT",
    "PEFT autocast",
    "PEFT bf16 factors",
    "PEFT A frozen",
    "PEFT A frozen, autocast",
    "ours B",
    "ours A",
    "ours both",
]


class OneLayer(nn.Module):
    """A module with one linear layer, so that the layer has a name."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, d_in) to (batch, tokens, d_out)."""
        return cast(Tensor, self.layer(x))


class PlainLayer(nn.Module):
    """An adapted layer that computes with ordinary autograd operations."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, d_in) to (batch, tokens, d_out)."""
        layer, flat = self.layer, x.reshape(-1, x.shape[-1])
        out = plain(flat, layer.frozen, layer.bias, layer.scale, [(0, layer.out_features)], *layer.operands())
        return out.view(*x.shape[:-1], -1)


def measure(shape: tuple[int, int], dtype: torch.dtype, rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one layer."""
    torch.manual_seed(0)
    d_in, d_out = shape
    layer = OneLayer(d_in, d_out).to(dtype).requires_grad_(False)
    arms = arms_for(ARMS, layer, ["regex:layer"], rank)
    arms["ours B, plain"] = formula = Arm("ours B", layer, ["regex:layer"], rank)
    formula.model.layer = PlainLayer(cast(AdaptedLinear, formula.model.layer))
    batch = 1 if arguments.quick else 8
    x, gradient = torch.randn(batch, 197, d_in).to(dtype), torch.randn(batch, 197, d_out).to(dtype)
    batches: Batches = [(x, gradient)]
    return {"d_in": d_in, "d_out": d_out, "shape": [batch, 197], **compare(arms, batches, arguments, optimize=False)}


def main(words: list[str] | None = None) -> None:
    """Measure, print and write."""
    common = parser(__doc__, rounds=7, quick_rounds=2, processor=True)
    common.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES), help="widths of input and output")
    common.add_argument("--dtype", nargs="+", choices=RANKS, default=list(RANKS))
    common.add_argument("--rank", nargs="+", type=int, help="default: 8 and 64 in bfloat16, 8 in float32")
    arguments = parse(common, words)
    pairs = [(dtype, rank) for dtype in arguments.dtype for rank in arguments.rank or RANKS[dtype]]
    for layer, (dtype, rank) in itertools.product(arguments.layers, pairs):
        name = f"{layer}, {dtype}, rank {rank}"
        figures = measured(arguments, name)
        if figures is None:
            with section(arguments, name) as figures:
                figures.update(measure(SHAPES[layer], getattr(torch, dtype), rank, arguments))
        show(name, figures, goals={})


if __name__ == "__main__":
    main()
