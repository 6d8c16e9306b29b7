"""PEFT's LoRA files and our adapters, each as the other, in pure torch.

A PEFT directory has adapter_config.json and adapter_model.safetensors. Its tensors are `lora_A` (R, d_in) and `lora_B`
(d_out, R) of each layer, and whatever else was trained whole (`modules_to_save`), all below `base_model.model.`; the
update is alpha / R · B·A, or alpha / √R · B·A with `use_rslora`.

PEFT knows no parts of a fused layer. k parts of rank r become one LoRA of rank k·r, with A stacked and B on a block
diagonal (`modules.adapters.linear.stack`), and alpha grows so that the scale stays. Read back, such a B is taken apart
again, since its zeros say where the parts are; any other LoRA of a fused layer becomes an adapter of the whole layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from modules.adapters.config import AdapterConfig, AdapterError
from modules.adapters.linear import stack
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
    *("init_lora_weights", "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "fan_in_fan_out"),
    *("ensure_weight_tying", "runtime_config"),
}
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")  # besides true and false; others change the base weights


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
    for layer, adapted in adapted_layers(model).items():
        parts = [f.projection for f in adapted.factors()]
        names = [f"{layer}.adapters.{p.role}" for p in parts]
        a, b = stack(parts, [(state[f"{n}.A"], state[f"{n}.B"]) for n in names], adapted.out_features)
        tensors |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
    ranks = {layer: tensors[f"{PREFIX}{layer}.lora_A.weight"].shape[0] for layer in adapted_layers(model)}
    for home, content in heads.items():
        tensors |= {f"{PREFIX}{home}.{name}": tensor for name, tensor in content.items()}
    others = [n for n, _ in model.named_modules() if n and ".adapters" not in n and not _within(n, heads)]
    if taken := [n for n in others if f"{PREFIX}{n}".endswith(tuple(heads))]:
        raise AdapterError(f"PEFT would train {taken[0]} whole too: its name ends as one of {', '.join(heads)} does.")
    if any(f"{PREFIX}{n}".endswith(ending) for n in others for ending in SAVED_FOR.get(task_type or "", ())):
        task_type = None
    uniform = len(set(ranks.values())) == 1
    rank = next(iter(ranks.values())) if uniform else config.rank
    keys = _rank_keys({layer: r for layer, r in ranks.items() if r != rank}, list(ranks))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _alpha(config, rank),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "target_modules": _endings(list(ranks), others) or sorted(ranks),
        "rank_pattern": keys,
        "alpha_pattern": {key: _alpha(config, r) for key, r in keys.items()},
        "modules_to_save": list(heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }, tensors


def _alpha(config: AdapterConfig, rank: int) -> float:
    """The alpha that gives a LoRA of another rank the same scale."""
    parts = rank // config.rank
    alpha = config.alpha * (math.sqrt(parts) if config.scaling == "rslora" else parts)
    return int(alpha) if float(alpha).is_integer() else alpha


def _rank_keys(ranks: dict[str, int], layers: list[str]) -> dict[str, int]:
    """Keys of rank_pattern for the layers of another rank than most."""
    groups = {rank: [layer for layer, r in ranks.items() if r == rank] for rank in sorted(set(ranks.values()))}
    return {key: rank for rank, group in groups.items() for key in _endings(group, layers) or sorted(group)}


def _endings(chosen: list[str], names: list[str]) -> list[str]:
    """The fewest last parts of names that stand for the chosen ones and no others; none if there are no such."""
    for length in (1, 2, 3):
        endings = sorted({".".join(name.split(".")[-length:]) for name in chosen})
        hits = [n for n in names if any(n == ending or n.endswith(f".{ending}") for ending in endings)]
        if set(hits) == set(chosen):
            return endings
    return []


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
    start = content.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in HARMLESS_STARTS:
        raise AdapterError(
            f"{WHERE}: init_lora_weights is {start!r:.80}, which changed the weights of the base model; save it again "
            "as ordinary LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )
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
