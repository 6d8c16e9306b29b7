"""Write a model's adapters as PEFT's LoRA files; `modules.formats.peft` describes the format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.adapters import AdaptedLinear, AdapterConfig, AdapterError, Projection, adapted_layers
from modules.adapters.functional import block_diagonal
from modules.adapters.patterns import name_endings, short_patterns
from modules.formats.peft import PREFIX, Heads, rescaled_alpha

PEFT_HEADS = {"SEQ_CLS": ("classifier", "score")}  # Modules that PEFT adds to modules_to_save for a task type.


def to_peft(
    model: nn.Module,
    config: AdapterConfig,
    state: Mapping[str, Tensor],
    heads: Heads,
    task_type: str | None = None,
    base: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert the adapters of a model to the content of PEFT's two files.

    Args:
        model: A model with adapters; only names and shapes are used.
        config: Configuration of the attached adapters.
        state: The factors by the names of `adapter_state`.
        heads: Tensors of fully trained modules, by their names in the model that PEFT will wrap.
        task_type: PEFT's name of the task, such as `SEQ_CLS`. Null is written if PEFT would take another module for a
            head of this task.
        base: Source of the model's weights.

    Returns:
        The content of adapter_config.json, and the tensors by name.

    Raises:
        AdapterError: If PEFT, which matches the ends of names, would mistake another module for a head.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, adapted in adapted_layers(model).items():
        parts = [f.projection for f in adapted.factors()]
        a, b = _stacked(layer, adapted, state)
        tensors |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
        ranks[layer] = a.shape[0]
        alphas[layer] = rescaled_alpha(config.scaling, config.alpha_of(parts[0]), a.shape[0] / config.rank_of(parts[0]))
    for head, content in heads.items():
        tensors |= {f"{PREFIX}{head}.{name}": tensor for name, tensor in content.items()}
    others = [n for n, _ in model.named_modules() if n and ".adapters" not in n and not _within(n, heads)]
    if mistaken := [n for n in others if f"{PREFIX}{n}".endswith(tuple(heads))]:
        raise AdapterError(
            f"PEFT would mistake {mistaken[0]} for a head, since its name ends like {' or '.join(heads)}. Export in "
            "another format."
        )
    if any(f"{PREFIX}{n}".endswith(ending) for n in others for ending in PEFT_HEADS.get(task_type or "", ())):
        task_type = None
    rank = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else config.rank
    alpha = next(iter(alphas.values())) if len(set(alphas.values())) == 1 else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _int_if_whole(alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "target_modules": name_endings(list(ranks), others) or sorted(ranks),
        "rank_pattern": short_patterns(ranks, rank),
        "alpha_pattern": {key: _int_if_whole(value) for key, value in short_patterns(alphas, alpha).items()},
        "modules_to_save": list(heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }, tensors


def _stacked(layer: str, adapted: AdaptedLinear, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (R, d_in) and B (d_out, R) of a whole layer, for the scale of its first part."""
    parts = adapted.factors()
    a, b = ([state[f"{layer}.adapters.{f.projection.role}.{factor}"] for f in parts] for factor in "AB")
    return stack_parts([f.projection for f in parts], [f.scale for f in parts], a, b, adapted.out_features)


def stack_parts(
    parts: Sequence[Projection], scales: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor], d_out: int
) -> tuple[Tensor, Tensor]:
    """Return A (R, d_in) and B (d_out, R) of a whole layer, for the scale of its first part.

    Args:
        parts: The adapted projections of the layer.
        scales: Scale s of each part.
        a: A of each part, (r, d_in).
        b: B of each part, (rows, r).
        d_out: Number of outputs of the layer.
    """
    b = [part if s == scales[0] else s / scales[0] * part for s, part in zip(scales, b, strict=True)]
    return torch.cat(list(a)), block_diagonal([(p.start, p.stop) for p in parts], b, d_out)


def _int_if_whole(alpha: float) -> float:
    """Return a whole alpha as an int, the type that PEFT declares."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _within(name: str, roots: Collection[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)
