"""A training step of whole backbones and of blocks: ours, PEFT and full tuning against the floor (`benchmarks.stacks`).

A step is forward, backward and fused AdamW over the trained parameters. LoRA-FA has its own optimizer. The arms "floor"
and "forward only" train nothing. All arms have the same inputs and the same gradients of the output. There is no
dropout. The weights are random, in the dtype of the section. PEFT and our arms adapt a fused qkv as one layer. Only
"ours B, slices" has separate factors for each targeted q, k and v.

    python -m benchmarks.model --output docs/results/benchmark_model.json
    python -m benchmarks.model --family vit --dtype bfloat16 --targets all --rank 8 64 \
        --output docs/results/benchmark_model.json

Without --dtype, --targets, --rank, --batches and --attention, the benchmark measures `PLAN`. With any of these options,
the benchmark measures all combinations of their values.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.harness import (
    MIB,
    Seconds,
    measured,
    paired_ratio,
    paired_share,
    parse,
    parser,
    ratio_text,
    section,
    table,
    take_turns,
)
from benchmarks.stacks import (
    ARMS,
    FAMILIES,
    WHOLE,
    Arm,
    Batches,
    Family,
    arms_for,
    layers_of,
    random_batches,
    random_stack,
)


class Setting(NamedTuple):
    """Setting of one section."""

    dtype: str = "bfloat16"
    targets: str = "all"
    rank: int = 8
    batches: str = "fixed"
    attention: str = "sdpa"


PLAN = (
    Setting(),
    Setting(rank=64),
    Setting(targets="query,value"),
    Setting(batches="buckets"),
    Setting(attention="eager"),
    Setting("float32"),
    Setting("float32", targets="query,value"),
)
GOALS = {  # For the arm "ours B".
    "times faster than PEFT": "≥ 1.5",
    "times faster than PEFT autocast": "≥ 1.2",
    "closed of PEFT's gap to the floor": "≥ 0.70",
    "closed of PEFT autocast's gap to the floor": "≥ 0.70",
    "saved over the floor's": "≤ 1.02",
}


def measure(family: Family, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the shapes and the figures of one section."""
    dtype, targets = getattr(torch, setting.dtype), setting.targets.split(",")
    stack = random_stack(family, dtype, setting.attention)
    shapes = family.batches(bucketed=setting.batches == "buckets")
    arms = arms_for(arguments.arms, stack, targets, setting.rank)
    return {
        "shapes": shapes,
        "width": family.width,
        "depth": family.depth,
        "layers": layers_of(stack, targets),
        **compare(arms, random_batches(shapes, family.width, dtype, image=family.image), arguments),
    }


def compare(
    arms: Mapping[str, Arm], batches: Batches, arguments: argparse.Namespace, optimize: bool = True
) -> dict[str, Any]:
    """Measure seconds by arm and round and saved bytes by arm, and return them with derived figures."""
    saved = {name: arm.saved(batches) for name, arm in arms.items()}
    turns = {name: partial(arm.step, batches, optimize) for name, arm in arms.items()}
    seconds = take_turns(turns, arguments.rounds, warm_up=1, clock=arguments.clock)
    return {
        "trained": {name: trained(arm) for name, arm in arms.items()},
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "saved_bytes": saved,
        "times_of_the_floor": {name: paired_ratio(values, seconds["floor"]) for name, values in seconds.items()},
        "ours": {name: derive(name, seconds, saved) for name in arms if name.startswith("ours")},
    }


def trained(arm: Arm) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in arm.model.parameters() if parameter.requires_grad)


def derive(ours: str, seconds: Seconds, saved: Mapping[str, int]) -> dict[str, Any]:
    """Return the speed-up of one of our arms over each PEFT arm, and the closed share of the gap to the floor."""
    floor = seconds["floor"]
    figures: dict[str, Any] = {"saved over the floor's": saved[ours] / saved["floor"] if saved["floor"] else None}
    for name in (name for name in seconds if name.startswith("PEFT")):
        figures[f"times faster than {name}"] = paired_ratio(seconds[name], seconds[ours])
        gain = [peft - our for peft, our in zip(seconds[name], seconds[ours], strict=True)]
        gap = [peft - lowest for peft, lowest in zip(seconds[name], floor, strict=True)]
        figures[f"closed of {name}'s gap to the floor"] = paired_share(gain, gap)
    return figures


def show(name: str, figures: Mapping[str, Any], goals: Mapping[str, str]) -> None:
    """Print two tables: all arms, and "ours B" with its goals."""
    saved, floor = figures["saved_bytes"], figures["saved_bytes"]["floor"]
    rows = [
        [
            arm,
            f"{1000 * seconds:.1f}",
            ratio_text(figures["times_of_the_floor"][arm]),
            f"{saved[arm] / MIB:.1f}",
            f"{saved[arm] / floor:.3f}" if floor else "",
            f"{figures['trained'][arm]:,}",
        ]
        for arm, seconds in figures["median_seconds"].items()
    ]
    table(name, ["arm", "step, ms", "over the floor", "saved, MiB", "over the floor's", "trained"], rows)
    if ours := figures["ours"].get("ours B"):
        texts = {
            key: ratio_text(value) if isinstance(value, dict) else f"{value:.3f}"
            for key, value in ours.items()
            if value
        }
        rows = [[key, text, goals.get(key, "")] for key, text in texts.items()]
        table(f"ours B: {name}", ["against", "median (interval)", "goal"], rows)


def settings_of(arguments: argparse.Namespace, whole: bool) -> list[Setting]:
    """Return the settings to measure for a family. For whole backbones, `PLAN` means its first two settings."""
    options = (arguments.dtype, arguments.targets, arguments.rank, arguments.batches, arguments.attention)
    if not any(options):
        if whole:
            return list(PLAN[: 1 if arguments.quick else 2])
        return [PLAN[0], PLAN[3]] if arguments.quick else list(PLAN)
    choices = [values or [default] for values, default in zip(options, Setting(), strict=True)]
    return [Setting(*values) for values in itertools.product(*choices)]


def main(words: list[str] | None = None) -> None:
    """Measure, print and write."""
    common = parser(__doc__, rounds=5, quick_rounds=2, processor=True)
    common.add_argument("--family", nargs="+", choices=[*WHOLE, *FAMILIES], default=[*WHOLE, *FAMILIES])
    common.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"])
    common.add_argument("--targets", nargs="+", help="comma-separated roles, such as: all query,value")
    common.add_argument("--rank", nargs="+", type=int)
    common.add_argument("--batches", nargs="+", choices=["fixed", "buckets"], help="one length, or 16 to 128 tokens")
    common.add_argument("--attention", nargs="+", choices=["sdpa", "eager"], help="sdpa is the libraries' default")
    common.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="always includes the floor")
    arguments = parse(common, words)
    arguments.arms = [name for name in ARMS if name in {*arguments.arms, "floor"}]
    named = [(name, setting) for name in arguments.family for setting in settings_of(arguments, name in WHOLE)]
    for family_name, setting in named:
        family = WHOLE[family_name] if family_name in WHOLE else FAMILIES[family_name]
        if setting.batches == "buckets" and not family.bucket:
            continue
        if arguments.quick:
            family = replace(family, shape=(1, family.shape[1]), bucket=128)
        dtype, targets, rank, lengths, attention = setting
        name = f"{family_name}, {dtype}, {targets}, rank {rank}, {lengths} batches, {attention}"
        figures = measured(arguments, name)
        if figures is None:
            with section(arguments, name) as figures:
                figures.update(measure(family, setting, arguments))
        show(name, figures, GOALS)


if __name__ == "__main__":
    main()
