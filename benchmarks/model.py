"""A training step of whole backbones and of blocks: ours, PEFT and full tuning against the floor (`benchmarks.stacks`).

A step is forward, backward and the optimizer, fused AdamW over what is trained, save where an arm brings its own or
trains nothing (floor, forward only). All arms take the same inputs and gradients of the output; there is no dropout.
The weights are random, and in the dtype of the section. PEFT adapts a fused qkv as a whole, since it knows no slices,
and so does ours; "ours B, slices" has a pair of factors for each of q, k and v that is a target.

    python -m benchmarks.model --output docs/results/benchmark_model.json
    python -m benchmarks.model --family vit --dtype bfloat16 --targets all --rank 8 64 \
        --output docs/results/benchmark_model.json

Without --dtype, --targets, --rank, --batches and --attention it measures `PLAN`; with any of them, all combinations of
what they name.
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
    """What a section measures, for a family of blocks."""

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
GOALS = {  # of ours B
    "times faster than PEFT": "≥ 1.5",
    "times faster than PEFT autocast": "≥ 1.2",
    "closed of PEFT's gap to the floor": "≥ 0.70",
    "closed of PEFT autocast's gap to the floor": "≥ 0.70",
    "saved over the floor's": "≤ 1.02",
}


def measure(family: Family, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one section: what was measured, and `compare`."""
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
    """`seconds` of each arm and round, `saved_bytes`, and what follows from them."""
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
    """Entries that have a gradient."""
    return sum(parameter.numel() for parameter in arm.model.parameters() if parameter.requires_grad)


def derive(ours: str, seconds: Seconds, saved: Mapping[str, int]) -> dict[str, Any]:
    """One of our arms against each of PEFT's, round by round: ratios of time and the part of the gap that it closes."""
    floor = seconds["floor"]
    figures: dict[str, Any] = {"saved over the floor's": saved[ours] / saved["floor"] if saved["floor"] else None}
    for name in (name for name in seconds if name.startswith("PEFT")):
        figures[f"times faster than {name}"] = paired_ratio(seconds[name], seconds[ours])
        won = [peft - own for peft, own in zip(seconds[name], seconds[ours], strict=True)]
        gap = [peft - least for peft, least in zip(seconds[name], floor, strict=True)]
        figures[f"closed of {name}'s gap to the floor"] = paired_share(won, gap)
    return figures


def show(name: str, figures: Mapping[str, Any], goals: Mapping[str, str]) -> None:
    """Two tables: the arms, and ours B beside what was to be reached."""
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
    if own := figures["ours"].get("ours B"):
        texts = {
            key: ratio_text(value) if isinstance(value, dict) else f"{value:.3f}" for key, value in own.items() if value
        }
        rows = [[key, text, goals.get(key, "")] for key, text in texts.items()]
        table(f"ours B: {name}", ["against", "median (interval)", "goal"], rows)


def settings_of(arguments: argparse.Namespace, whole: bool) -> list[Setting]:
    """Return what to measure of a family: of whole backbones the first two settings of the plan."""
    given = (arguments.dtype, arguments.targets, arguments.rank, arguments.batches, arguments.attention)
    if not any(given):
        if whole:
            return list(PLAN[: 1 if arguments.quick else 2])
        return [PLAN[0], PLAN[3]] if arguments.quick else list(PLAN)
    choices = [values or [default] for values, default in zip(given, Setting(), strict=True)]
    return [Setting(*values) for values in itertools.product(*choices)]


def main(words: list[str] | None = None) -> None:
    """Measure, print, write."""
    common = parser(__doc__, rounds=5, quick_rounds=2, processor=True)
    common.add_argument("--family", nargs="+", choices=[*WHOLE, *FAMILIES], default=[*WHOLE, *FAMILIES])
    common.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"])
    common.add_argument("--targets", nargs="+", help="roles with commas between: all query,value")
    common.add_argument("--rank", nargs="+", type=int)
    common.add_argument("--batches", nargs="+", choices=["fixed", "buckets"], help="one length, or 16 to 128 tokens")
    common.add_argument("--attention", nargs="+", choices=["sdpa", "eager"], help="sdpa is what the libraries choose")
    common.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the floor is always among them")
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
