"""Speed of a training step with torch.compile (`model.compile: true`), and compilation time.

The models are stacks of blocks (`benchmarks.stacks`) with adapters on all linear layers, with only B trained. The arms
are compiled and uncompiled blocks, in shuffled rounds. Texts have four lengths. The optimizer is not compiled. The
compiler's disk caches are off. The compilation time is the time of the first pass over all lengths minus the third.

    python -m benchmarks.compilation --output docs/results/benchmark_compilation.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.harness import measured, paired_ratio, parse, parser, ratio_text, section, table, take_turns
from benchmarks.stacks import FAMILIES, Arm, random_batches, random_stack
from modules.scaling.compilation import compile_blocks

DEPTHS = {"vit": 4, "roberta": 4, "bart": 4, "llama": 2}  # Later blocks reuse the compiled code of the first block.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure steps with and without compilation, and the compilation time of a family's blocks."""
    family = replace(FAMILIES[name], depth=DEPTHS[name])
    if arguments.quick:
        family = replace(family, width=256, shape=(2, 65), bucket=min(family.bucket, 128))
    stack = random_stack(family, dtype)
    batches = random_batches(family.batches(bucketed=family.bucket > 0), family.width, dtype)
    arms = {"as written": Arm("ours B", stack, ["all"], 8), "compiled": Arm("ours B", stack, ["all"], 8)}
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(arms["compiled"].model, torch.device("cpu"))
    passes = []
    for _ in range(3):  # The second pass may still compile a length that came before lengths were known to vary.
        start = time.perf_counter()  # Not CPU time, since the compiler also runs in other processes.
        arms["compiled"].step(batches)
        passes.append(time.perf_counter() - start)
    turns = {arm: partial(a.step, batches) for arm, a in arms.items()}
    seconds = take_turns(turns, arguments.rounds, clock=arguments.clock)
    return {
        "blocks": family.depth,
        "width": family.width,
        "batches": [list(x.shape[:2]) for x, _ in batches],
        "seconds": seconds,
        "compile_seconds": passes[0] - passes[2],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "as written over compiled": paired_ratio(seconds["as written"], seconds["compiled"]),
    }


def main() -> None:
    """Measure, print and write each section."""
    common = parser(__doc__, rounds=15, processor=True)
    common.add_argument("--family", nargs="+", choices=list(DEPTHS), help="default: all; with --quick vit, roberta")
    common.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    arguments = parse(common)
    torch.compiler.config.force_disable_caches = True
    rows = []
    for name in arguments.family or (["vit", "roberta"] if arguments.quick else list(DEPTHS)):
        for dtype in arguments.dtype:
            title = f"compile: {name}, {dtype}"
            record = measured(arguments, title)
            if record is None:
                with section(arguments, title) as record:
                    record.update(measure(name, DTYPES[dtype], arguments))
            medians = [statistics.median(record["seconds"][arm]) * 1e3 for arm in ("as written", "compiled")]
            rows.append(
                [
                    f"{name}, {dtype}",
                    *(f"{median:.1f}" for median in medians),
                    ratio_text(record["as written over compiled"]),
                    f"{record['compile_seconds']:.0f}",
                    str(record["graphs"]),
                ]
            )
    columns = ["blocks", "as written (ms)", "compiled (ms)", "as written over compiled", "compiling (s)", "graphs"]
    table("A training step", columns, rows)


if __name__ == "__main__":
    main()
