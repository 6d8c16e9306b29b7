"""Optimizer, parameter groups and learning rate schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from datamodules.errors import ModelError, first_line
from modules.adapters import adapted_projections

Schedule = Literal["cosine", "linear", "constant"]
Groups = list[dict[str, Any]]
PACKAGE = "torch.optim"
WITHOUT_GROUPS = ("LBFGS", "SparseAdam")  # LBFGS supports only one group, SparseAdam only sparse gradients.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer and name not in WITHOUT_GROUPS
}


class OptimizerSpec:
    """An optimizer class of torch.optim and its arguments.

    Args:
        optimizer: `class_path`, such as `torch.optim.SGD`, and `init_args`; None is AdamW with torch's defaults.
        weight_decay: Weight decay of the parameter groups.

    Raises:
        ModelError: If the class is unknown or does not accept an argument, or if `weight_decay` is not 0 and the class
            has no weight decay.
    """

    def __init__(self, optimizer: Mapping[str, Any] | None, weight_decay: float) -> None:
        optimizer = {"class_path": f"{PACKAGE}.AdamW"} if optimizer is None else optimizer
        self.args: dict[str, Any] = dict(optimizer.get("init_args") or {})
        path = str(optimizer.get("class_path"))
        package, _, name = path.rpartition(".")
        if unknown := optimizer.keys() - {"class_path", "init_args"}:
            raise ModelError(
                f"model.optimizer: {', '.join(sorted(unknown))} is unknown. Give class_path and init_args."
            )
        if package != PACKAGE or name not in OPTIMIZERS:
            raise ModelError(
                f"model.optimizer.class_path: {path} is not a supported optimizer. Choose one of {PACKAGE}: "
                f"{', '.join(OPTIMIZERS)}."
            )
        if reserved := {"params", "lr", "weight_decay"} & self.args.keys():
            raise ModelError(
                f"model.optimizer.init_args: {', '.join(sorted(reserved))} cannot be set here. Set model.learning_rate "
                "and model.weight_decay."
            )
        self.kind = OPTIMIZERS[name]
        if weight_decay and "weight_decay" not in inspect.signature(self.kind).parameters:
            raise ModelError(f"model.weight_decay: {weight_decay} is set, but {name} has no weight decay. Use 0.")
        self._example_states: dict[int, dict[str, Any]] = {}
        self.build([{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": 0.0}])

    def build(self, groups: Groups) -> Optimizer:
        """Return the optimizer for parameter groups.

        Raises:
            ModelError: If torch rejects an argument or a parameter.
        """
        build: Callable[..., Optimizer] = self.kind
        try:
            return build(groups, **self.args)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"model.optimizer: {self.kind.__name__} cannot be created with {self.args} ({first_line(error)}). "
                "Correct model.optimizer.init_args."
            ) from error

    def is_state(self, state: Mapping[str, Any], parameter: Tensor) -> bool:
        """Return True if a state has the names, types and shapes of this optimizer's state for a parameter."""
        shape = (2,) * parameter.ndim
        if parameter.ndim not in self._example_states:
            example = nn.Parameter(torch.zeros(shape))
            example.grad = torch.zeros(shape)
            optimizer = self.build([{"params": [example], "lr": 0.0}])
            optimizer.step()
            self._example_states[parameter.ndim] = dict(optimizer.state[example])
        example_state = self._example_states[parameter.ndim]
        return state.keys() == example_state.keys() and all(
            _is_like(state[key], value, shape, parameter) for key, value in example_state.items()
        )


def _is_like(value: Any, example: Any, shape: tuple[int, ...], parameter: Tensor) -> bool:
    """Return True if a value of a parameter's state has the type and dimensions of an example.

    Args:
        value: The value.
        example: The same value of an example state.
        shape: Shape of the example's parameter.
        parameter: The parameter of the value.
    """
    if not isinstance(example, Tensor):
        return type(value) is type(example)
    if not isinstance(value, Tensor) or value.is_floating_point() != example.is_floating_point():
        return False
    if tuple(example.shape) in ((), shape):
        return value.shape == (parameter.shape if example.ndim else ())
    return value.ndim == example.ndim  # Factored moments, as of Adafactor, have other shapes than the parameter.


# ------------------------------------------------------------------------------------------------------ learning rates


def check_learning_rates(
    learning_rate: float,
    weight_decay: float,
    warmup_ratio: float,
    ratios: Mapping[str, float],
) -> None:
    """Validate learning rates, weight decay and warm-up.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        warmup_ratio: Share of the steps that warm up.
        ratios: Learning rate ratios by key.

    Raises:
        ModelError: If a value is out of range.
    """
    for key, value in {"learning_rate": learning_rate, **ratios}.items():
        if not 0 < value < torch.finfo().max:
            raise ModelError(f"model.{key}: {value} must be finite and above 0.")
    if not 0 <= weight_decay < math.inf:
        raise ModelError(f"model.weight_decay: {weight_decay} must be finite, 0 or more.")
    if not 0 <= warmup_ratio < 1:
        raise ModelError(f"model.warmup_ratio: {warmup_ratio} must lie in [0, 1).")


def parameter_groups(
    backbone: nn.Module,
    head: Mapping[str, nn.Parameter],
    *,
    tuning: str,
    learning_rate: float,
    weight_decay: float,
    lr_ratio_b: float,
    lr_ratio_head: float,
    lr_ratio_role: Mapping[str, float] | None = None,
) -> Groups:
    """Return parameter groups named A, B, head and backbone, each split by weight decay.

    The trained parameters follow from the configuration, not from `requires_grad` flags. A role with a ratio has
    separate groups, such as `B/value`.

    Args:
        backbone: A backbone with or without adapters.
        head: Parameters of the heads by name; a head may be a module of the backbone.
        tuning: Value of `model.tuning`. Only `full` has groups of the backbone.
        learning_rate: Base learning rate.
        weight_decay: Decay of matrices. Vectors have no decay. In timm models, the parameters of
            `no_weight_decay` have no decay either, such as position embeddings and class tokens.
        lr_ratio_b: Learning rate of B divided by the base learning rate.
        lr_ratio_head: Learning rate of the head divided by the base learning rate.
        lr_ratio_role: Additional ratio of both factors by role.

    Returns:
        Groups with `name`, `params`, `lr`, `initial_lr` and `weight_decay`; no group is empty.
    """
    ratios = {"A": 1.0, "B": lr_ratio_b, "head": lr_ratio_head, "backbone": 1.0}
    by_role = lr_ratio_role or {}
    ratios |= {f"{factor}/{role}": ratios[factor] * ratio for role, ratio in by_role.items() for factor in "AB"}
    parts: dict[str, dict[str, nn.Parameter]] = {name: {} for name in ratios}
    parts["head"].update(head)
    if tuning == "full":
        heads = {id(parameter) for parameter in head.values()}
        parts["backbone"].update((n, p) for n, p in backbone.named_parameters() if id(p) not in heads)
    for name, (_, factors) in adapted_projections(backbone).items():
        role = factors.projection.role
        for factor, parameter in factors.named_factors(trained=True).items():
            parts[f"{factor}/{role}" if role in by_role else factor][name] = parameter
    undecayed: set[str] = getattr(backbone, "no_weight_decay", set)()  # timm's own list
    groups = []
    for part, parameters in parts.items():
        lr = learning_rate * ratios[part]
        matrices = [p for name, p in parameters.items() if p.ndim > 1 and name not in undecayed]
        others = [p for name, p in parameters.items() if p.ndim <= 1 or name in undecayed]
        for name, params, decay in ((part, matrices, weight_decay), (f"{part}/no_decay", others, 0.0)):
            if params:
                groups.append({"name": name, "params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    return groups


def schedule_factor(schedule: Schedule, warmup_ratio: float, total_steps: int) -> Callable[[int], float]:
    """Return a schedule: a linear warm-up, then a decay to zero or a constant learning rate.

    Args:
        schedule: Shape after the warm-up; cosine and linear end at zero.
        warmup_ratio: Share of the steps that warm up, in [0, 1).
        total_steps: Optimizer steps of the whole run.

    Returns:
        Function from the step, counted from 0, to the learning rate divided by its peak, in [0, 1].
    """
    warmup = min(round(warmup_ratio * total_steps), total_steps - 1)  # At least one step reaches the peak.

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if schedule == "linear" else 1.0

    return factor


def restart_schedule(scheduler: LambdaLR, groups: Groups, factor_of: Callable[[int], float]) -> None:
    """Overwrite the learning rates and weight decays of a checkpoint with the values of this run.

    Args:
        scheduler: The restored schedule, at its step.
        groups: Parameter groups of this run.
        factor_of: Schedule of this run.
    """
    scheduler.lr_lambdas = [factor_of for _ in scheduler.lr_lambdas]
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factor = factor_of(scheduler.last_epoch)
    for restored, group in zip(scheduler.optimizer.param_groups, groups, strict=True):
        restored.update({key: group[key] for key in ("initial_lr", "weight_decay")}, lr=group["initial_lr"] * factor)


def reset_states(optimizer: Optimizer, fresh: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Reset the optimizer states of some parameters to their values before the first step.

    Args:
        optimizer: The optimizer.
        fresh: A new optimizer of the same parameters. Some classes, such as Adagrad, create states at construction.
        parameters: The parameters.
    """
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        if parameter in fresh.state:
            optimizer.state[parameter] = fresh.state[parameter]


class RangeTest:
    """Keep the ratios between the groups' learning rates while LearningRateFinder sets one value for all groups.

    Args:
        optimizer: The optimizer.
        base: Base learning rate before the test.
        rates: Learning rates of the groups before the test.
    """

    def __init__(self, optimizer: Optimizer, base: float, rates: list[float]) -> None:
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
        for group, lr in zip(self.groups, self._tried, strict=True):
            group["lr"] = lr

    def end(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()


def steps_left(trainer: L.Trainer, end_epoch: int | None = None) -> int:
    """Return the number of optimizer steps from the current position to the end of the run.

    Args:
        trainer: The trainer, in training.
        end_epoch: Epochs after which the count ends, if the run does not end earlier. None is the end of the run.
    """
    loop, accumulated = trainer.fit_loop, trainer.accumulate_grad_batches
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    steps_per_epoch = math.ceil(trainer.num_training_batches / accumulated)
    epoch_is_over = batches.processed >= trainer.num_training_batches
    # Lightning steps after every `accumulated` batches and after the last batch of an epoch.
    steps_so_far = steps_per_epoch if epoch_is_over else batches.processed // accumulated
    # In `on_train_epoch_start`, the epoch is ready and not started. `batches` then counts the previous epoch.
    steps_in_epoch = steps_so_far if min(epochs.ready, epochs.started) > epochs.processed else 0
    ends = [epoch for epoch in (trainer.max_epochs, end_epoch) if epoch not in (None, -1)]
    limits = [(min(ends) - epochs.processed) * steps_per_epoch - steps_in_epoch] if ends else []
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps - trainer.global_step)
    return min(limits)
