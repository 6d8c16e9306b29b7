"""Self time of the operators in a training step by kind, for a backbone or a stack of blocks, and several arms.

The profiler adds time, mostly to small operators. The tables show the lower quartile over steps for each operator.

    python -m benchmarks.profile --family vit --output docs/results/benchmark_profile.json
    python -m benchmarks.profile --family vit-b --threads 2 --output docs/results/benchmark_profile.json
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import parse, parser, section, table
from benchmarks.stacks import FAMILIES, WHOLE, Arm, Batches, arms_for, random_batches, random_stack

ARMS = ("floor", "PEFT", "PEFT autocast", "PEFT bf16 factors", "ours B", "ours both")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
KINDS = (
    "products with W, attention's",
    "low-rank products",
    "attention, fused",
    "casts, copies",
    "add, mul",
    "the rest",
)
Times = dict[tuple[str, str, str], float]


def kind(event: FunctionEvent, rank: int) -> str:
    """Return the kind of an operator, by its name and the sizes of its operands."""
    name = event.name
    if name in PRODUCTS:
        sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
        return KINDS[1] if rank in sizes else KINDS[0]
    if "attention" in name:
        return KINDS[2]
    if name in ("aten::copy_", "aten::_to_copy"):
        return KINDS[3]
    return KINDS[4] if name.startswith(("aten::add", "aten::mul")) else KINDS[5]


def profiled(arm: Arm, batches: Batches, rank: int) -> Times:
    """Profile a step, and return the self times in ms by kind, operator and sizes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        arm.step(batches)
    times: Counter[tuple[str, str, str]] = Counter()
    for event in record.events():
        times[kind(event, rank), event.name, str(event.input_shapes)] += event.self_cpu_time_total / 1000
    return times


def measure(arms: dict[str, Arm], batches: Batches, rank: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a step by arm and kind."""
    order = random.Random(0)
    steps: dict[str, dict[Any, list[float]]] = {name: defaultdict(list) for name in arms}
    for number in range(-2, rounds):
        for name in order.sample(list(arms), len(arms)):
            times = profiled(arms[name], batches, rank)
            if number >= 0:
                for key, value in times.items():
                    steps[name][key].append(value)
    milliseconds: dict[str, dict[str, float]] = {}
    for name, operators in steps.items():
        milliseconds[name] = dict.fromkeys(KINDS, 0.0)
        for (of_kind, _, _), values in operators.items():
            if len(values) >= rounds / 2:
                milliseconds[name][of_kind] += float(np.quantile(values, 0.25))
    return milliseconds


def main(words: list[str] | None = None) -> None:
    """Measure, print and write."""
    common = parser(__doc__, rounds=24)
    common.add_argument("--family", choices=[*WHOLE, *FAMILIES], default="vit")
    common.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    common.add_argument("--targets", default="all")
    common.add_argument("--rank", type=int, default=8)
    arguments = parse(common, words)
    family, dtype = (WHOLE | FAMILIES)[arguments.family], getattr(torch, arguments.dtype)
    name = f"{arguments.family}, {arguments.dtype}, {arguments.targets}, rank {arguments.rank}"
    if arguments.family in WHOLE:
        name += f", threads {arguments.threads}"
    with section(arguments, name) as record:
        stack = random_stack(family, dtype)
        arms = arms_for(ARMS, stack, arguments.targets.split(","), arguments.rank)
        shapes = [(1, family.shape[1])] if arguments.quick else family.batches(bucketed=False)
        batches = random_batches(shapes, family.width, dtype, image=family.image)
        record["ms"] = times = measure(arms, batches, arguments.rank, arguments.rounds)
    rows = [[of_kind, *(f"{times[arm][of_kind]:.1f}" for arm in times)] for of_kind in KINDS]
    rows.append(["all", *(f"{sum(times[arm].values()):.1f}" for arm in times)])
    table(f"ms a step: {name}", ["kind", *times], rows)


if __name__ == "__main__":
    main()
