"""GPU kernels of a training step of ViT-B with adapters on all linear layers, from this program and from PEFT.

The floor is a step without adapters. This module is a part of `benchmarks.gpu`. The profiler adds time to each kernel,
so only the kernels, their number and their shares are meaningful.

    python -m benchmarks.gpu_profile --device cuda --output docs/results/gpu_profile.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_steps import MODELS, QUICK, RANK, Step, build
from benchmarks.harness import Deadline, measured, parse, parser, section, table
from benchmarks.stacks import Arm

ARMS = ("floor", "PEFT", "PEFT autocast", "ours B")
TOP = 15


def kernels(step: Step, steps: int) -> dict[str, Any]:
    """Return milliseconds and launches of a step, in total and for the slowest kernels (on the CPU: operators)."""
    on_gpu = step.device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        for _ in range(steps):
            step()
    milliseconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in record.events():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds[event.name] += microseconds / 1000 / steps
        launches[event.name] += 1
    return {
        "milliseconds": sum(milliseconds.values()),
        "launches": sum(launches.values()) / steps,
        "top": [
            {"kernel": name, "milliseconds": ms, "launches": launches[name] / steps}
            for name, ms in milliseconds.most_common(TOP)
        ],
    }


def main(words: Sequence[str] | None = None) -> None:
    """Profile, print and write."""
    arguments = parse(parser(__doc__, rounds=5, quick_rounds=1, device=True), words)
    device, deadline = torch.device(arguments.device), Deadline(arguments.budget)
    model = (QUICK if arguments.quick else MODELS)["vit-b"]
    stack = build(model, device)
    x = torch.randn(*model.shape, device=device, dtype=torch.bfloat16)
    for name in ARMS:
        record = measured(arguments, name)
        if record is None:
            if deadline.passed(name):
                continue
            with section(arguments, name) as record:
                record |= kernels(Step(Arm(name, stack, ["all"], RANK), x, device), arguments.rounds)
        rows = [[k["kernel"][:80], f"{k['milliseconds']:.2f}", f"{k['launches']:.0f}"] for k in record["top"]]
        rows.append(["all", f"{record['milliseconds']:.2f}", f"{record['launches']:.0f}"])
        table(f"vit-b, {name}", ["kernel", "ms a step", "launches a step"], rows)
    deadline.exit()


if __name__ == "__main__":
    main()
