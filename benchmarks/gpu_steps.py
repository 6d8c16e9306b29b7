"""Seconds, memory and TFLOP/s of a step of whole backbones: ours, PEFT and the floor (a part of `benchmarks.gpu`).

A step is forward, backward with a fixed gradient of the output, and fused AdamW over the trained parameters. LoRA-FA
has its own optimizer. Backbones have random bfloat16 weights and full depth, without word embeddings and head. All
linear layers are adapted at rank 8. The input requires a gradient in every arm except `head`. The floor is thus the
minimum work of any arm with an adapter in the first block. All arms share the frozen weights.

    python -m benchmarks.gpu_steps --device cuda --output docs/results/gpu_steps.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.harness import (
    Deadline,
    interval,
    measured,
    paired_ratio,
    parse,
    parser,
    ratio_text,
    section,
    table,
    take_turns,
)
from benchmarks.layer import PlainLayer
from benchmarks.stacks import Arm, Vision, bart, llama, roberta
from modules.adapters import adapted_layers
from modules.scaling.compilation import compile_blocks

GIB = 2**30
RANK = 8
ARMS = (
    "forward only",
    "floor",
    "head",
    "full",
    "PEFT",
    "PEFT autocast",
    "PEFT LoRA-FA",
    "ours B",
    "ours A",
    "ours both",
)
COMPILED = ("floor", "PEFT", "ours B")  # Also measured with compilation, for models with `variants`.
GOALS = {"ours B over the floor": "≤ 1.05", "PEFT over ours B": "≥ 1.3", "memory of ours B over PEFT's": "≤ 0.75"}


@dataclass(frozen=True)
class Model:
    """A whole backbone and its arms.

    Args:
        build: Function that builds the backbone in the default dtype on the default device.
        shape: Shape of the input.
        arms: Arms to measure.
        variants: If true, also measure `plain` and compiled arms.
        checkpointing: If true, use gradient checkpointing.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    arms: tuple[str, ...] = ARMS
    variants: bool = False
    checkpointing: bool = False


_LLAMA_1B = partial(llama, 2048, 16)  # Blocks of LLaMA-3.2-1B.
_LLAMA_7B = partial(llama, 4096, 32, mlp=11008, head=128, kv_group=1)  # Blocks of LLaMA-2-7B.
_WITHOUT_FULL = tuple(name for name in ARMS if name != "full")  # For AdamW states beyond the GPU's memory.
MODELS = {
    "vit-b": Model(partial(Vision, "vit_base_patch16_224"), (64, 3, 224, 224), variants=True),
    "roberta-large": Model(partial(roberta, 1024, 24), (32, 128, 1024), variants=True),
    "llama-1b": Model(_LLAMA_1B, (8, 512, 2048), variants=True),
    "vit-l": Model(partial(Vision, "vit_large_patch16_224"), (64, 3, 224, 224)),
    "bart-large": Model(partial(bart, 1024, 24), (16, 256, 1024)),
    "llama-7b": Model(_LLAMA_7B, (4, 512, 4096), _WITHOUT_FULL),
    "llama-7b, checkpointing": Model(_LLAMA_7B, (4, 512, 4096), _WITHOUT_FULL, checkpointing=True),
    "llama-1b, checkpointing": Model(_LLAMA_1B, (8, 512, 2048), checkpointing=True),
    "vit-l, checkpointing": Model(partial(Vision, "vit_large_patch16_224"), (64, 3, 224, 224), checkpointing=True),
}
QUICK = {
    "vit-b": Model(
        partial(Vision, "vit_base_patch16_224", embed_dim=128, depth=2, num_heads=2), (2, 3, 224, 224), variants=True
    ),
    "roberta-large": Model(partial(roberta, 128, 2), (2, 32, 128)),
    "bart-large": Model(partial(bart, 128, 4), (2, 32, 128)),
    "llama-1b, checkpointing": Model(partial(llama, 128, 2, mlp=256, kv_group=2), (2, 32, 128), checkpointing=True),
}


class Step:
    """One arm of a model with its batch, for `take_turns`.

    Args:
        arm: The arm.
        x: Input.
        device: Device of the step.
    """

    def __init__(self, arm: Arm, x: Tensor, device: torch.device) -> None:
        self.arm, self.x, self.device = arm, x, device
        self.gradient: Tensor | None = None
        self.head: nn.Linear | None = None
        if arm.name == "head":
            with torch.no_grad():
                width = arm.forward(x).shape[-1]
            self.head = nn.Linear(width, 10, device=device)
            self.optimizer = torch.optim.AdamW(self.head.parameters(), 1e-5, fused=True)

    def __call__(self) -> None:
        """Run a step and wait for the device."""
        if self.head is not None:
            with torch.no_grad():
                hidden = self.arm.forward(self.x)
            self.head(hidden.float().mean(1)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            if self.gradient is None:
                with torch.no_grad():
                    self.gradient = torch.randn_like(self.arm.forward(self.x))
            self.arm.step([(self.x, self.gradient)])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def resident(self) -> int:
        """Return the bytes of the weights and of the optimizer states."""
        optimizer = self.optimizer if self.head is not None else self.arm.optimizer
        states = optimizer.state.values() if optimizer else ()
        state_bytes = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
        return state_bytes + sum(p.nbytes for p in self.arm.model.parameters())

    def peak(self) -> int | None:
        """Return the resident bytes of this arm plus the peak growth within a step; None without CUDA."""
        if self.device.type != "cuda":
            return None
        self()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self()
        return self.resident() + torch.cuda.max_memory_allocated(self.device) - before

    def operations(self) -> int:
        """Return the FLOPs of a step's matrix products, including attention if torch counts its kernel."""
        self()  # The first step draws the gradient of the output, which must not count.
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


def build(model: Model, device: torch.device, seed: int = 0) -> nn.Module:
    """Build a frozen backbone with random bfloat16 weights on the device, in train mode."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            stack = model.build()
    finally:
        torch.set_default_dtype(default)
    stack.requires_grad_(False).train()
    inner: Any = stack.model
    if model.checkpointing and isinstance(inner, PreTrainedModel):
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    elif model.checkpointing:
        inner.set_grad_checkpointing(True)
    return stack


def arms_of(model: Model, stack: nn.Module, device: torch.device) -> dict[str, Arm]:
    """Return the arms of a model by name, with plain and compiled arms if the model has `variants`."""
    arms = {}
    for name in model.arms:
        arms[name] = Arm("floor" if name == "head" else name, stack, ["all"], RANK)
        arms[name].name = name
    if model.variants:
        arms["ours B, plain"] = plain = Arm("ours B", stack, ["all"], RANK)
        for layer, module in list(adapted_layers(plain.model).items()):
            owner, _, name = layer.rpartition(".")
            setattr(plain.model.get_submodule(owner), name, PlainLayer(module))
        for name in COMPILED:
            compiled = copy_of(name, stack)
            arms[f"{name}, compiled"] = compiled
            compile_blocks(compiled.model, device)
    return arms


def copy_of(name: str, stack: nn.Module) -> Arm:
    """Return an arm with copied modules and shared weights, since compilation changes modules in place."""
    copied = copy.deepcopy(stack, {id(p): p for p in stack.parameters()})
    return Arm(name, copied, ["all"], RANK)


def measure(model: Model, device: torch.device, rounds: int, ceiling: float) -> dict[str, Any]:
    """Measure all arms of one model."""
    stack = build(model, device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(*model.shape, generator=generator, device=device, dtype=torch.bfloat16)
    steps = {name: Step(arm, x, device) for name, arm in arms_of(model, stack, device).items()}
    operations = {name: step.operations() for name, step in steps.items() if "compiled" not in name}
    seconds = take_turns(cast(Any, steps), rounds, warm_up=3 if device.type == "cuda" else 1)
    memory = {name: step.peak() for name, step in steps.items()}
    rates = {name: n / statistics.median(seconds[name]) / 1e12 for name, n in operations.items()}
    return {
        "shape": list(model.shape),
        "parameters": sum(p.numel() for p in stack.parameters()),
        "trained": {n: sum(p.numel() for p in s.arm.model.parameters() if p.requires_grad) for n, s in steps.items()},
        "seconds": seconds,
        "milliseconds": {name: interval([1000 * s for s in values]) for name, values in seconds.items()},
        "times_of_the_floor": {name: paired_ratio(values, seconds["floor"]) for name, values in seconds.items()},
        "times_faster_than_peft": {name: paired_ratio(seconds["PEFT"], values) for name, values in seconds.items()},
        "peak_bytes": memory,
        "tflop_per_second": rates,
        "share_of_peak": {name: rate / ceiling for name, rate in rates.items()},
    }


def measured_peak(device: torch.device, size: int) -> float:
    """Return the TFLOP/s of a square bfloat16 product on this device, as a measured peak instead of the datasheet's."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = take_turns({"product": product}, 10)["product"]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def show(name: str, figures: dict[str, Any]) -> None:
    """Print the table of a model and the goals."""
    memory = figures["peak_bytes"]
    rows = [
        [
            arm,
            f"{ms['median']:.1f}",
            ratio_text(figures["times_of_the_floor"][arm]),
            ratio_text(figures["times_faster_than_peft"][arm]),
            f"{memory[arm] / GIB:.2f}" if memory[arm] else "",
            f"{figures['tflop_per_second'][arm]:.1f}" if arm in figures["tflop_per_second"] else "",
            f"{figures['share_of_peak'][arm]:.0%}" if arm in figures["share_of_peak"] else "",
        ]
        for arm, ms in figures["milliseconds"].items()
    ]
    table(name, ["arm", "step, ms", "over the floor", "faster than PEFT", "peak, GiB", "TFLOP/s", "of the peak"], rows)
    reached = {
        "ours B over the floor": ratio_text(figures["times_of_the_floor"]["ours B"]),
        "PEFT over ours B": ratio_text(figures["times_faster_than_peft"]["ours B"]),
    }
    if memory["PEFT"]:
        reached["memory of ours B over PEFT's"] = f"{memory['ours B'] / memory['PEFT']:.2f}"
    table(f"goals: {name}", ["figure", "measured", "goal"], [[key, text, GOALS[key]] for key, text in reached.items()])


def sections(arguments: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """Yield the models to measure, the most important first."""
    yield from (QUICK if arguments.quick else MODELS).items()


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write until the budget is spent."""
    common = parser(__doc__, rounds=12, quick_rounds=2, device=True)
    arguments = parse(common, words)
    device, deadline = torch.device(arguments.device), Deadline(arguments.budget)
    ceiling = measured_peak(device, 256 if arguments.quick else 8192 if device.type == "cuda" else 1024)
    for name, model in sections(arguments):
        figures = measured(arguments, name)
        if figures is None:
            if deadline.passed(name):
                continue
            with section(arguments, name) as figures:
                started = time.monotonic()
                figures |= measure(model, device, arguments.rounds, ceiling)
                figures |= {"tflop_per_second_of_a_product": ceiling, "section_seconds": time.monotonic() - started}
        show(name, figures)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    deadline.exit()


if __name__ == "__main__":
    main()
