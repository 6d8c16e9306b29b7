"""PEFT's LoRA files and our adapters, each as the other, in pure torch.

A PEFT directory has adapter_config.json and adapter_model.safetensors. Its tensors are `lora_A` (R, d_in) and `lora_B`
(d_out, R) of each layer, and whatever else was trained whole (`modules_to_save`), all below `base_model.model.`; the
update is alpha / R · B·A, or alpha / √R · B·A with `use_rslora`. Layers of another R or alpha than most are named in
`rank_pattern` and `alpha_pattern`.

PEFT knows no parts of a fused layer. The parts become one LoRA, whose rank R is the sum of their ranks, with A stacked
and B on a block diagonal (`modules.adapters.linear.stack`). Alpha grows so that the scale stays. Parts of different
scales share the scale of the first, and the B of each other part is multiplied. Read back, such a B is taken apart
again, since its zeros say where the parts are. Any other LoRA of a fused layer becomes an adapter of the whole layer.

vLLM ignores both patterns: it takes one rank and one scale for all layers, so it serves only adapters without them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from modules.adapters.config import AdapterConfig, AdapterError, Scaling
from modules.adapters.linear import AdaptedLinear, stack
from modules.adapters.patterns import name_endings, short_patterns
from modules.adapters.state import adapted_layers

Heads = dict[str, dict[str, Tensor]]  # tensors of modules that are trained whole, by the module's name and their own

PREFIX = "base_model.model."
WHERE = "model.adapter_path"
SAVED_FOR = {"SEQ_CLS": ("classifier", "score")}  # what PEFT adds to modules_to_save for a task, asked or not

# Keys of adapter_config.json that say nothing of what the adapter computes, or that are read here.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
    *("qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "runtime_config"),
}
# The values of init_lora_weights in PEFT 0.21.2, besides true, false and null. The first leave the base weights as they
# are. PEFT subtracts the first B·A of the second from the base weights, and can undo that in what it saves.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
SUBTRACTED_STARTS = re.compile(r"pissa|pissa_niter_\d+|olora|corda|lora_ga")
QUANTISED_STARTS = ("loftq",)  # the base weights are quantised, and B·A makes up for the error


# -------------------------------------------------------------------------------------------------------------- to PEFT


def to_peft(
    model: nn.Module,
    config: AdapterConfig,
    state: Mapping[str, Tensor],
    heads: Heads,
    task_type: str | None = None,
    base: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapters of a model as PEFT writes them.

    Args:
        model: A model with adapters; only its names and shapes count.
        config: What they were attached with.
        state: The factors, under the names of `adapter_state`.
        heads: What is trained whole, by the names it has in the model that PEFT is to wrap.
        task_type: PEFT's name of the task, `SEQ_CLS`.
        base: Where the model's weights came from.

    Returns:
        The content of adapter_config.json, and the tensors by name.

    Raises:
        AdapterError: If PEFT, which goes by the ends of names, would take another module for one that is trained whole.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, adapted in adapted_layers(model).items():
        parts = [f.projection for f in adapted.factors()]
        a, b = stack(parts, _operands(layer, adapted, state), adapted.out_features)
        tensors |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
        ranks[layer] = a.shape[0]
        alphas[layer] = alpha_at(config.scaling, config.alpha_of(parts[0]), a.shape[0] / config.rank_of(parts[0]))
    for home, content in heads.items():
        tensors |= {f"{PREFIX}{home}.{name}": tensor for name, tensor in content.items()}
    others = [n for n, _ in model.named_modules() if n and ".adapters" not in n and not _within(n, heads)]
    if taken := [n for n in others if f"{PREFIX}{n}".endswith(tuple(heads))]:
        raise AdapterError(f"PEFT would train {taken[0]} whole too: its name ends as one of {', '.join(heads)} does.")
    if any(f"{PREFIX}{n}".endswith(ending) for n in others for ending in SAVED_FOR.get(task_type or "", ())):
        task_type = None
    rank = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else config.rank
    alpha = next(iter(alphas.values())) if len(set(alphas.values())) == 1 else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "target_modules": name_endings(list(ranks), others) or sorted(ranks),
        "rank_pattern": short_patterns(ranks, rank),
        "alpha_pattern": {key: _whole(value) for key, value in short_patterns(alphas, alpha).items()},
        "modules_to_save": list(heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }, tensors


def _operands(layer: str, adapted: AdaptedLinear, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each part of a layer, B multiplied where the part has another scale than the layer's first."""
    pairs = []
    for factors in adapted.factors():
        a, b = (state[f"{layer}.adapters.{factors.projection.role}.{factor}"] for factor in "AB")
        pairs.append((a, b if factors.scale == adapted.scale else factors.scale / adapted.scale * b))
    return pairs


def alpha_at(scaling: Scaling, alpha: float, ratio: float) -> float:
    """Return the alpha that keeps the scale when the rank is multiplied by a ratio."""
    return alpha * (math.sqrt(ratio) if scaling == "rslora" else ratio)


def _whole(alpha: float) -> float:
    """An alpha without the point where it is a whole number, as PEFT declares it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _within(name: str, roots: Collection[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


# ------------------------------------------------------------------------------------------------------- what is read


def check_supported(content: Mapping[str, Any]) -> None:
    """Refuse what our adapters cannot express.

    Raises:
        AdapterError: With the key of adapter_config.json and its value.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{WHERE}: peft_type is {kind!r:.80}, and only LORA can be loaded; merge it with PEFT.")
    numbers: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float)}
    for key, types in numbers.items():
        value: Any = content.get(key)
        if type(value) not in types or not 0 < value < 1e9:
            raise AdapterError(f"{WHERE}: {key} of adapter_config.json is {value!r:.80}, not a number above 0.")
    dropout = content.get("lora_dropout") or 0.0
    if not isinstance(dropout, float | int) or isinstance(dropout, bool):
        raise AdapterError(f"{WHERE}: lora_dropout of adapter_config.json is {dropout!r:.80}, not a number.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = content.get(key) or {}
        if not (isinstance(patterns, dict) and all(type(v) in (int, float) and 0 < v < 1e9 for v in patterns.values())):
            raise AdapterError(f"{WHERE}: {key} of adapter_config.json does not give names numbers above 0.")
    _check_start(content.get("init_lora_weights", True))
    if content.get("bias", "none") != "none":
        raise AdapterError(
            f"{WHERE}: bias is {content['bias']!r:.80}, and only 'none' can be loaded; merge it with PEFT."
        )
    for key, value in content.items():
        if value and key not in READ | NO_MATTER:
            raise AdapterError(
                f"{WHERE}: {key} ({value!r:.80}) is nothing that an adapter here can do; merge the adapter with PEFT "
                "and give the result as model.backbone. Delete the key if it changes nothing of what is computed."
            )


def _check_start(start: Any) -> None:
    """Refuse adapters that belong to other base weights than the published ones, and those of which that is not known.

    Raises:
        AdapterError: With the value, why, and what to do.
    """
    name = start.lower() if isinstance(start, str) else start
    if name is None or isinstance(name, bool) or name in PLAIN_STARTS:
        return
    key = f"{WHERE}: init_lora_weights is {start!r:.80}"
    if isinstance(name, str) and SUBTRACTED_STARTS.fullmatch(name):
        raise AdapterError(
            f"{key}, which changed the weights of the base model: PEFT subtracted the first B·A from them. Save the "
            "adapter again as ordinary LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if name in QUANTISED_STARTS:
        raise AdapterError(
            f"{key}, which changed the weights of the base model: PEFT quantised them. Merge the adapter with PEFT "
            "into those weights, and give the result as model.backbone."
        )
    raise AdapterError(
        f"{key}, which is not known here (known are true, false, {', '.join(PLAIN_STARTS)}). It may have changed the "
        "weights of the base model. If it did not, set the key to true; if it did, merge the adapter with PEFT and "
        "give the result as model.backbone."
    )
