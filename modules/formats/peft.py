"""PEFT's LoRA format: file names, supported keys, reading and writing, without PEFT.

A PEFT directory has adapter_config.json and adapter_model.safetensors. The tensors are `lora_A` (R, d_in) and `lora_B`
(d_out, R) of each layer, and fully trained modules (`modules_to_save`). All names start with `base_model.model.`. The
update is alpha / R · B·A, or alpha / √R · B·A with `use_rslora`. `rank_pattern` and `alpha_pattern` list the layers
with another R or alpha.

PEFT cannot adapt parts of a fused layer. `peft_writing` combines the parts into one LoRA. Its rank R is the sum of the
parts' ranks, with A stacked and B block-diagonal (`modules.adapters.functional.block_diagonal`). Alpha is multiplied so
that the scale does not change. If the scales of the parts differ, the LoRA has the scale of the first part. The B of
each other part is then multiplied by the ratio of the scales. `peft_reading` splits such a B at its zeros. Any other
LoRA of a fused layer becomes an adapter of the whole layer.

vLLM ignores both patterns and uses one rank and one scale for all layers. vLLM therefore supports only adapters without
patterns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.adapters import AdapterError
from modules.adapters.config import Scaling

Heads = dict[str, dict[str, Tensor]]  # Tensors of fully trained modules, by module name and tensor name.

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
KEY = "model.adapter_path"

# Keys of adapter_config.json that change what the adapter computes, and are supported.
READ_KEYS = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
# Keys that do not change what the adapter computes. `_check_init` checks init_lora_weights.
IGNORED_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
    *("qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "runtime_config"),
}
# Values of init_lora_weights in PEFT 0.21.2, besides true, false and null.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # The base weights do not change.
SUBTRACTED_INITS = re.compile(r"pissa|pissa_niter_\d+|olora|corda|lora_ga")  # PEFT subtracts the initial B·A from W.
QUANTISED_INITS = ("loftq",)  # PEFT quantises the base weights, and B·A compensates the error.


def rescaled_alpha(scaling: Scaling, alpha: float, ratio: float) -> float:
    """Return the alpha that keeps the scale when the rank is multiplied by a ratio."""
    return alpha * (math.sqrt(ratio) if scaling == "rslora" else ratio)


def read_peft_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read adapter_config.json and adapter_model.safetensors of a directory.

    Raises:
        AdapterError: If either file is missing or damaged.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not config.is_file():
        raise AdapterError(f"{KEY}: {folder} has no {CONFIG}. Give a directory from PEFT's save_pretrained.")
    if not weights.is_file():
        pickled = f"; its {PICKLE} is not read, since a pickle can run code" if (folder / PICKLE).exists() else ""
        raise AdapterError(
            f"{KEY}: {folder} has no {WEIGHTS}{pickled}. If you trust the adapter, load and save the adapter with "
            "PEFT (save_pretrained)."
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{KEY}: {config} cannot be read as JSON ({error}). Get the file again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{KEY}: {config} holds no JSON object. Get the file again.")
    try:
        return content, load_file(weights)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{KEY}: {weights} cannot be read as safetensors ({error}). The file is damaged or truncated. Get the "
            "file again."
        ) from error


def write_peft_files(
    folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: An existing directory.
        content: Content of adapter_config.json.
        tensors: Content of adapter_model.safetensors.
        dtype: Dtype of the floating-point tensors in the file.
    """
    copies = {  # safetensors rejects tensors that share memory.
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_supported(content: Mapping[str, Any]) -> None:
    """Check that the content of adapter_config.json is supported.

    Raises:
        AdapterError: If a key or its value is not supported. The message has both.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{KEY}: peft_type is {kind!r:.80}, and only LORA can be loaded. Merge the adapter with PEFT."
        )
    numbers: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float)}
    for key, types in numbers.items():
        value: Any = content.get(key)
        if type(value) not in types or not 0 < value < 1e9:
            raise AdapterError(
                f"{KEY}: {key} of adapter_config.json is {value!r:.80}, not a number above 0. Correct the value."
            )
    dropout = content.get("lora_dropout") or 0.0
    if not isinstance(dropout, float | int) or isinstance(dropout, bool):
        raise AdapterError(
            f"{KEY}: lora_dropout of adapter_config.json is {dropout!r:.80}, not a number. Correct the value."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = content.get(key) or {}
        if not (isinstance(patterns, dict) and all(type(v) in (int, float) and 0 < v < 1e9 for v in patterns.values())):
            raise AdapterError(
                f"{KEY}: {key} of adapter_config.json does not map names to numbers above 0. Correct the key."
            )
    _check_init(content.get("init_lora_weights", True))
    if content.get("bias", "none") != "none":
        raise AdapterError(
            f"{KEY}: bias is {content['bias']!r:.80}, and only 'none' can be loaded. Merge the adapter with PEFT."
        )
    for key, value in content.items():
        if value and key not in READ_KEYS | IGNORED_KEYS:
            raise AdapterError(
                f"{KEY}: {key} ({value!r:.80}) is not supported. Merge the adapter with PEFT and give the result as "
                "model.backbone. If the key does not change the adapter's output, delete the key."
            )


def _check_init(start: Any) -> None:
    """Check that an initialisation has not changed the base weights.

    Raises:
        AdapterError: If the initialisation has changed the base weights, or may have.
    """
    name = start.lower() if isinstance(start, str) else start
    if name is None or isinstance(name, bool) or name in PLAIN_INITS:
        return
    key = f"{KEY}: init_lora_weights is {start!r:.80}"
    if isinstance(name, str) and SUBTRACTED_INITS.fullmatch(name):
        raise AdapterError(
            f"{key}, which changed the weights of the base model: PEFT subtracted the initial B·A from the weights. "
            "Save the adapter again as LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if name in QUANTISED_INITS:
        raise AdapterError(
            f"{key}, which changed the weights of the base model: PEFT quantised the weights. Merge the adapter with "
            "PEFT into the quantised weights, and give the result as model.backbone."
        )
    raise AdapterError(
        f"{key}, which is unknown here (known: true, false, {', '.join(PLAIN_INITS)}). The initialisation may have "
        "changed the weights of the base model. If the weights did not change, set the key to true. Otherwise merge "
        "the adapter with PEFT and give the result as model.backbone."
    )
