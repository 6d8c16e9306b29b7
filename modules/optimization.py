"""Parameter groups and the schedule of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from modules.adapters import adapted_layers

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(
    backbone: nn.Module,
    head: Mapping[str, nn.Parameter],
    *,
    tuning: str,
    learning_rate: float,
    weight_decay: float,
    lr_ratio_b: float,
    lr_ratio_head: float,
) -> list[dict[str, Any]]:
    """Groups for AdamW, named A, B, head and backbone, each split into decayed and not decayed.

    What is trained follows from the configuration, not from `requires_grad` flags that somebody may have flipped.

    Args:
        backbone: With adapters or without.
        head: Parameters of the task's heads by name, which may lie inside the backbone.
        tuning: `adapter`, `head` or `full`.
        learning_rate: Base learning rate.
        weight_decay: Decay of matrices; vectors, biases, position embeddings and class tokens have none.
        lr_ratio_b: Learning rate of B over the base one.
        lr_ratio_head: Learning rate of the head over the base one.

    Returns:
        Groups with `name`, `params`, `lr`, `initial_lr` and `weight_decay`; empty ones are left out.
    """
    parts: dict[str, tuple[float, dict[str, nn.Parameter]]] = {
        "A": (1.0, {}),
        "B": (lr_ratio_b, {}),
        "head": (lr_ratio_head, dict(head)),
        "backbone": (1.0, {}),
    }
    if tuning == "full":
        heads = {id(parameter) for parameter in head.values()}
        parts["backbone"][1].update((n, p) for n, p in backbone.named_parameters() if id(p) not in heads)
    for name, layer in adapted_layers(backbone).items():
        for factors in layer.factors():
            for factor, parameter in factors.named_factors(trained=True).items():
                parts[factor][1][f"{name}.{factors.projection.role}"] = parameter
    undecayed: set[str] = getattr(backbone, "no_weight_decay", set)()  # timm's own list
    groups = []
    for part, (ratio, parameters) in parts.items():
        rate = learning_rate * ratio
        matrices = [p for name, p in parameters.items() if p.ndim > 1 and name not in undecayed]
        others = [p for name, p in parameters.items() if p.ndim <= 1 or name in undecayed]
        for name, params, decay in ((part, matrices, weight_decay), (f"{part}/no_decay", others, 0.0)):
            if params:
                groups.append({"name": name, "params": params, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    return groups


def schedule_factor(schedule: Schedule, warmup_ratio: float, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate at an optimizer step over its peak: a linear climb, then the chosen descent.

    Args:
        schedule: Shape after the warm-up; cosine and linear end at zero.
        warmup_ratio: Share of the steps that climb, in [0, 1).
        total_steps: Optimizer steps of the whole run.

    Returns:
        Function from the step, 0 for the first, to a factor in [0, 1].
    """
    warmup = min(round(warmup_ratio * total_steps), total_steps - 1)  # some descent is left

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if schedule == "linear" else 1.0

    return factor


class RangeTest:
    """Keep the ratios of the groups' learning rates while LearningRateFinder tries one learning rate for all of them.

    Args:
        optimizer: The optimizer.
        base: Learning rate before the test.
        rates: Learning rates of the groups before the test.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, base: float, rates: list[float]) -> None:
        self.groups, self.base = optimizer.param_groups, base
        self.ratios = [rate / base for rate in rates]
        self._tried: list[float] = []
        self._hooks = (
            optimizer.register_step_pre_hook(self._multiply),
            optimizer.register_step_post_hook(self._restore),
        )

    def _multiply(self, *_: Any) -> None:
        self._tried = [group["lr"] for group in self.groups]
        for group, ratio in zip(self.groups, self.ratios, strict=True):
            group["lr"] = group["lr"] * ratio

    def _restore(self, *_: Any) -> None:
        for group, rate in zip(self.groups, self._tried, strict=True):
            group["lr"] = rate

    def end(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()


def steps_left(trainer: L.Trainer) -> int:
    """Optimizer steps from the place that a run goes on from to its end."""
    loop, accumulated = trainer.fit_loop, trainer.accumulate_grad_batches
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    an_epoch = math.ceil(trainer.num_training_batches / accumulated)
    over = batches.processed >= trainer.num_training_batches
    # a place between two steps is before the step: Lightning takes one at each multiple, and at the end
    within = an_epoch if over else batches.processed // accumulated
    done = within if epochs.ready > epochs.processed else 0
    left = ((trainer.max_epochs or 0) - epochs.processed) * an_epoch - done
    if trainer.max_epochs == -1 or trainer.max_steps != -1:
        most = trainer.max_steps - trainer.global_step
        return most if trainer.max_epochs == -1 else min(left, most)
    return left
