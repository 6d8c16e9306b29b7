"""Errors of combined updates: `combine` beside the combination types of PEFT's `add_weighted_adapter`.

Four untrained random adapters of one weight are combined with weights 1/4 and scale 2: four equal adapters, four Bs
over one A, and four As and Bs. The error is the relative Frobenius distance to Σ wᵢ·sᵢ·Bᵢ·Aᵢ, computed in float64. TIES
and DARE are left out, since both drop entries on purpose.

    python -m benchmarks.combination --output docs/results/combination.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.harness import parse, parser, section, table
from modules.analysis.combination import Update, combine_updates, decompose, first_difference

WIDTH, RANK, COUNT, SCALE = 768, 8, 4, 2.0
WEIGHTS = [1 / COUNT] * COUNT
Result = tuple[Tensor, int]  # The combined update, dense in float64, and its adapter rank.


class OneLinear(nn.Module):
    """A model with one linear layer, for PEFT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


def random_updates(kind: str, width: int, rank: int) -> list[Update]:
    """Return updates with equal or different factors. Factors with equal seeds are equal."""

    def normal(seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    seeds = {
        "four equal adapters": [(0, 1)] * COUNT,
        "four Bs over one A": [(0, i + 1) for i in range(COUNT)],
        "four As and Bs": [(50 + i, i + 1) for i in range(COUNT)],
    }[kind]
    return [Update(normal(a, rank, width) / width**0.5, normal(b, width, rank), SCALE) for a, b in seeds]


def dense(update: Update) -> Tensor:
    """Return s·B·A in float64."""
    return update.scale * update.b.double() @ update.a.double()


def by_peft(updates: Sequence[Update], kind: str, **options: Any) -> Result:
    """Combine updates with PEFT's `add_weighted_adapter`."""
    rank, width = updates[0].a.shape
    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["linear"])  # type: ignore[arg-type]
    model: Any = peft.PeftModel(OneLinear(width), config, adapter_name="0")
    for i in range(1, len(updates)):
        model.add_adapter(str(i), config)
    layer = model.base_model.model.linear
    with torch.no_grad():
        for i, update in enumerate(updates):
            layer.lora_A[str(i)].weight.copy_(update.a)
            layer.lora_B[str(i)].weight.copy_(update.b)
        names = [str(i) for i in range(len(updates))]
        model.add_weighted_adapter(names, WEIGHTS, "sum", combination_type=kind, **options)
    a, b = layer.lora_A["sum"].weight.detach(), layer.lora_B["sum"].weight.detach()
    return dense(Update(a, b, layer.scaling["sum"])), a.shape[0]


def by_svd(updates: Sequence[Update]) -> Result:
    """Combine updates as `combine --via svd` with the rank of one adapter."""
    rank = updates[0].a.shape[0]
    return dense(decompose(updates, WEIGHTS).truncate(rank)), rank


def over_shared_a(updates: Sequence[Update]) -> Result | None:
    """Combine updates as `combine` does; None if A differs, which `combine` refuses."""
    if first_difference(updates, "A") is not None:
        return None
    return dense(combine_updates(updates, WEIGHTS, "A")), updates[0].a.shape[0]


METHODS: dict[str, Callable[[Sequence[Update]], Result | None]] = {
    "combine": over_shared_a,
    "combine --via svd": by_svd,
    "PEFT linear": lambda updates: by_peft(updates, "linear"),
    "PEFT svd": lambda updates: by_peft(updates, "svd", svd_rank=updates[0].a.shape[0]),
    "PEFT cat": lambda updates: by_peft(updates, "cat"),
}
KINDS = ("four equal adapters", "four Bs over one A", "four As and Bs")


def errors(width: int, rank: int) -> dict[str, dict[str, Any]]:
    """Return adapter rank, relative error, and norm over the exact norm of each method, by kind of adapters."""
    records: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    for kind in KINDS:
        updates = random_updates(kind, width, rank)
        exact = sum((w * dense(u) for w, u in zip(WEIGHTS, updates, strict=True)), torch.zeros(()))
        for method, combine in METHODS.items():
            result = combine(updates)
            records[method][kind] = result and {
                "rank": result[1],
                "error": f"{float((result[0] - exact).norm() / exact.norm()):.2g}",
                "norm": f"{float(result[0].norm() / exact.norm()):.3g}",
            }
    return records


def main() -> None:
    """Compute and print the table."""
    arguments = parse(parser(__doc__, rounds=1, quick_rounds=1))
    width = 64 if arguments.quick else WIDTH
    with section(arguments, f"{width} × {width}, rank {RANK}") as record:
        record["errors"] = records = errors(width, RANK)
    rows = []
    for method, of_kinds in records.items():
        ranks = {str(result["rank"]) for result in of_kinds.values() if result}
        rows.append([method, "".join(ranks), *(of_kinds[k]["error"] if of_kinds[k] else "refused" for k in KINDS)])
    table(f"Relative error of the sum of {COUNT} updates", ["combination", "adapter rank", *KINDS], rows)


if __name__ == "__main__":
    main()
