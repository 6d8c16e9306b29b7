"""AdaLoRA and IA3 from PEFT, as baselines for comparison."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from datamodules.errors import ModelError, counted
from modules.adapters import AdapterConfig, AdapterError, Projection
from modules.adapters.linear import check_rank
from modules.adapters.roles import find_projections, select

if TYPE_CHECKING:
    from peft import AdaLoraConfig, AdaLoraModel, IA3Model

Method = Literal["adalora", "ia3"]
METHODS = get_args(Method)
ADAPTER = "default"  # PEFT's name of the adapter

_log = logging.getLogger(__name__)


class PeftBaseline:
    """A PEFT method attached to a backbone in place.

    PEFT wraps whole layers. A fused layer, such as timm's `attn.qkv`, has one adapter.

    AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) starts at 1.5 times `adapter.rank` and prunes to `adapter.rank` on
    average. Pruning begins after the first tenth of the optimizer steps and ends before the last half, as in the
    paper's experiments. IA3 (Liu et al. 2022, arXiv 2205.05638) rescales the outputs of the targeted layers. For
    `mlp_out`, IA3 rescales the inputs.

    Args:
        method: `adalora` or `ia3`.
        backbone: A frozen backbone without adapters.
        config: Only `targets`, `layers` and `seed` are used, and for AdaLoRA also `rank`, `alpha` and `dropout`.
        heads: Names of the backbone's modules that are fully trained.

    Raises:
        ModelError: If PEFT is not installed.
        AdapterError: If a target matches nothing, a rank or `layers` is too large, or the configuration has a pattern.
    """

    def __init__(self, method: Method, backbone: nn.Module, config: AdapterConfig, heads: Sequence[str]) -> None:
        if patterns := [key for key in ("rank_pattern", "alpha_pattern") if asdict(config)[key]]:
            raise AdapterError(
                f"adapter.{patterns[0]}: {method} has one rank and alpha for all layers. Remove the key."
            )
        self.projections = select(find_projections(backbone, heads), config.targets, config.layers)
        layers = dict.fromkeys(projection.layer for projection in self.projections)
        if method == "adalora":
            for projection in self.projections:
                check_rank(config, projection, cast(nn.Linear, backbone.get_submodule(projection.layer)).in_features)
        self._method, self._backbone = method, backbone
        with torch.random.fork_rng(devices=[]):  # The head and the data order must not depend on the tuning.
            torch.manual_seed(config.seed)
            self.tuner: Any = _inject(method, backbone, config, list(layers), self.projections)
        self._names = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        for parameter in self.parameters().values():  # PEFT creates adapters in the dtype of the frozen weights.
            parameter.data = parameter.data.float()
        for head in heads:  # PEFT has frozen the heads with the backbone.
            backbone.get_submodule(head).requires_grad_(True)
        self._started = False
        _log.info(
            f"model.tuning: {method} of PEFT wraps {counted(len(layers), 'layer')}: {', '.join(_kinds(list(layers)))}."
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of PEFT's layers by their names in the backbone."""
        parameters = dict(self._backbone.named_parameters())
        return {name: parameters[name] for name in self._names}

    def groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the parameter group for the optimizer. IA3's parameters start at one, so they have no weight decay."""
        decay = 0.0 if self._method == "ia3" else weight_decay
        options = {"lr": learning_rate, "initial_lr": learning_rate, "weight_decay": decay}
        return [{"name": self._method, "params": list(self.parameters().values()), **options}]

    # --------------------------------------------------------------------------------------------- AdaLoRA's training

    def start(self, total_steps: int) -> None:
        """Plan AdaLoRA's pruning for a run, unless a checkpoint has restored a plan.

        Args:
            total_steps: Optimizer steps of the whole run.
        """
        if self._method != "adalora":
            return
        if not self._started:
            self._plan(total_steps)
        allocator, parameters = self._allocator, self.parameters()
        for moments in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
            moments.update({name: tensor.to(parameters[name].device) for name, tensor in moments.items()})

    def _plan(self, total_steps: int) -> None:
        schedule = self._schedule
        schedule.total_step = total_steps
        schedule.tinit = total_steps // 10
        # The last pruning needs an importance score, which takes one step.
        schedule.tfinal = max(min(total_steps // 2, total_steps - 2), 0)
        schedule.deltaT = max(total_steps // 100, 1)
        self._started = True

    def penalty(self) -> Tensor | float:
        """Return AdaLoRA's weighted orthogonal regularisation (equation 4); 0 for IA3."""
        if self._method != "adalora":
            return 0.0
        terms = []
        for name, parameter in self.parameters().items():
            if "lora_A" in name or "lora_B" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self._schedule.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        """Prune with AdaLoRA after an optimizer step, before the gradients are cleared.

        Args:
            step: Number of optimizer steps so far, including this step.
        """
        if self._method == "adalora" and (self._schedule.total_step or 0) >= 2:
            self.tuner.update_and_allocate(step)

    # ----------------------------------------------------------------------------------------------------- checkpoint

    def state(self) -> dict[str, Any]:
        """Return AdaLoRA's importance scores, ranks and pruning plan for a checkpoint; empty for IA3."""
        if self._method != "adalora":
            return {}
        allocator = self._allocator
        return {
            "exp_avg_ipt": dict(allocator.exp_avg_ipt),
            "exp_avg_unc": dict(allocator.exp_avg_unc),
            "rank_pattern": self._schedule.rank_pattern or {},
            "total_steps": self._schedule.total_step,
        }

    def load_state(self, state: Any) -> None:
        """Restore AdaLoRA's state from a checkpoint.

        Raises:
            ModelError: If the state is damaged or belongs to other layers.
        """
        if self._method != "adalora":
            return
        parameters = self.parameters()
        ranks = {name: len(parameter) for name, parameter in parameters.items() if "lora_E" in name}
        if not _is_state(state, {name: parameter.shape for name, parameter in parameters.items()}, ranks):
            raise ModelError(
                "ckpt_path: the checkpoint has no state of AdaLoRA for these layers. Use another checkpoint or start a "
                "new run."
            )
        self._plan(state["total_steps"])
        self._schedule.rank_pattern = state["rank_pattern"] or None
        self._allocator.exp_avg_ipt = dict(state["exp_avg_ipt"])
        self._allocator.exp_avg_unc = dict(state["exp_avg_unc"])
        # PEFT reads `ipt` before computing new scores.
        self._allocator.ipt = {name: torch.zeros_like(t) for name, t in state["exp_avg_ipt"].items()}

    @property
    def _allocator(self) -> Any:
        return self.tuner.rankallocator

    @property
    def _schedule(self) -> AdaLoraConfig:
        return cast("AdaLoraConfig", self.tuner.peft_config[ADAPTER])


def _inject(
    method: Method,
    backbone: nn.Module,
    config: AdapterConfig,
    layers: list[str],
    projections: list[Projection],
) -> AdaLoraModel | IA3Model:
    """Wrap layers of a backbone with PEFT, in place, and freeze everything else."""
    try:
        from peft import AdaLoraConfig, AdaLoraModel, IA3Config, IA3Model
    except ImportError as error:
        raise ModelError(
            f"model.tuning: {method} needs PEFT, which is not installed. Run: pip install 'peft>=0.21.2'"
        ) from error
    if method == "ia3":
        feedforward = list(dict.fromkeys(p.layer for p in projections if p.role == "mlp_out"))
        return IA3Model(
            backbone, IA3Config(target_modules=_exactly(layers), feedforward_modules=_exactly(feedforward)), ADAPTER
        )
    adalora = AdaLoraConfig(
        target_modules=_exactly(layers),
        target_r=config.rank,
        init_r=math.ceil(1.5 * config.rank),
        lora_alpha=cast(int, config.alpha),  # PEFT declares an int, but a float works too.
        lora_dropout=config.dropout,
        total_step=1,  # `start` sets the number of steps.
    )
    return AdaLoraModel(backbone, adalora, ADAPTER)  # type: ignore[no-untyped-call]


def _exactly(names: list[str]) -> str:
    """Return a regular expression that matches whole names. PEFT would match a list against the ends of names."""
    return "|".join(re.escape(name) for name in names)


def _kinds(layers: list[str]) -> list[str]:
    """Return the layers' names without duplicates, with `*` in place of block numbers."""
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in layers))


def _is_state(state: Any, shapes: Mapping[str, torch.Size], ranks: Mapping[str, int]) -> bool:
    """Return True if a value is a state of AdaLoRA for parameters with these shapes and initial ranks."""
    if not isinstance(state, dict) or type(state.get("total_steps")) is not int or state["total_steps"] < 1:
        return False
    moments: list[Any] = [state.get("exp_avg_ipt"), state.get("exp_avg_unc")]
    pattern: Any = state.get("rank_pattern")
    return (
        all(isinstance(m, dict) and (not m or m.keys() == shapes.keys()) for m in moments)
        and all(isinstance(t, Tensor) and t.shape == shapes[name] for m in moments for name, t in m.items())
        and isinstance(pattern, dict)
        and (not pattern or pattern.keys() == ranks.keys())
        and all(isinstance(kept, list) and len(kept) == ranks[name] for name, kept in pattern.items())
    )
