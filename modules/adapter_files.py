"""Adapters in directories, local or on the hub: PEFT's files in and out, compact ones in; never a pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.errors import first_line
from modules.adapters.compact import FILE_NAME as COMPACT
from modules.adapters.compact import is_compact, load_compact
from modules.adapters.config import AdapterConfig, AdapterError
from modules.adapters.peft_format import WHERE, Heads
from modules.adapters.peft_reading import from_peft
from modules.adapters.state import frozen_fingerprint, state_problems

_log = logging.getLogger(__name__)
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class LoadedAdapter(NamedTuple):
    """An adapter that was read for a module.

    Args:
        config: The configuration to attach it with.
        factors: Both factors of every adapter under the names of `adapter_state`.
        heads: Tensors of the heads under the module's names.
    """

    config: AdapterConfig
    factors: dict[str, Tensor]
    heads: dict[str, Tensor]


def read_adapter(
    source: str,
    backbone: nn.Module,
    own: AdapterConfig,
    exclude: Collection[str],
    homes: Mapping[str, Collection[str]],
) -> LoadedAdapter:
    """Read an adapter for a backbone that has none yet.

    Args:
        source: A directory as PEFT or `export` writes it, or a name on the hub.
        backbone: The backbone; it is not changed.
        own: Says the factor that is to be trained; all else comes from the file.
        exclude: Names of the backbone's modules that are heads.
        homes: For each head of the module, its names in the model that PEFT wraps.

    Raises:
        AdapterError: If it is not to be had, is damaged, does not fit, or is none that can be expressed here.
    """
    folder = _located(source)
    if is_compact(folder):
        compact = load_compact(folder, backbone, exclude)
        if compact.fingerprint not in (None, frozen_fingerprint(backbone)):
            _log.warning(
                f"{WHERE}: {source} was trained over other frozen weights than this backbone's, or over the same in "
                "another dtype; only over its own does it compute what it did."
            )
        config = compact.adapter
        # the SVD of every W would take long, and what it gives is in the file
        if config.train != own.train or {"svd", "svd_minor"} & {config.init_a, config.init_b}:
            config = replace(config, train=own.train, init_a="given", init_b="given")
        return LoadedAdapter(config, compact.factors, compact.heads)
    names = [name for of_head in homes.values() for name in of_head]
    content, tensors = read_peft_files(folder)
    config, factors, wholes = from_peft(backbone, content, tensors, own, exclude, names)
    if str(content.get("init_lora_weights")).lower() == "mica" and own.train != "A":
        _log.warning(
            f"{WHERE}: {source} is a MiCA adapter, of which PEFT freezes B and trains A, and model.adapter.train is "
            f"{own.train}. Set it to A to train what PEFT trains."
        )
    return LoadedAdapter(config, factors, _rename_heads(wholes, homes))


def write_peft_files(
    folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: An existing directory.
        content: The former.
        tensors: The latter.
        dtype: Of its floats.
    """
    copies = {  # safetensors takes no tensors that share memory
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _located(source: str) -> Path:
    """The local directory of an adapter, fetched from the hub if need be."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AdapterError(f"{WHERE}: {source} is a file; give the directory with {CONFIG} and {WEIGHTS}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS, COMPACT]))
    except Exception as error:  # whatever a network or a name can raise
        raise AdapterError(
            f"{WHERE}: {source} is no directory here, and from the hub it could not be had ({first_line(error)}). "
            f"Give a directory with {CONFIG} and {WEIGHTS}."
        ) from error


def read_peft_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read adapter_config.json and adapter_model.safetensors of a directory.

    Raises:
        AdapterError: If either is missing or damaged.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not config.is_file():
        raise AdapterError(f"{WHERE}: {folder} has no {CONFIG}; give a directory as PEFT's save_pretrained writes it.")
    if not weights.is_file():
        pickled = f"; its {PICKLE} is not read, since a pickle can run code" if (folder / PICKLE).exists() else ""
        raise AdapterError(
            f"{WHERE}: {folder} has no {WEIGHTS}{pickled}. Load it with PEFT where you trust it, and save_pretrained "
            "writes safetensors."
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{WHERE}: {config} cannot be read as JSON ({error}). Get the file anew.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{WHERE}: {config} holds no JSON object. Get the file anew.")
    try:
        return content, load_file(weights)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{WHERE}: {weights} cannot be read as safetensors ({error}): it is damaged, or cut off. Get the file anew."
        ) from error


def _rename_heads(wholes: Heads, homes: Mapping[str, Collection[str]]) -> dict[str, Tensor]:
    """Tensors of heads under the module's names; a head that has several homes must be the same in all."""
    found: dict[str, Tensor] = {}
    for head, names in homes.items():
        for content in (wholes[name] for name in names if name in wholes):
            for key, tensor in content.items():
                known = found.setdefault(f"{head}.{key}", tensor)
                if known.shape != tensor.shape or not torch.equal(known, tensor):
                    raise AdapterError(f"{WHERE}: {' and '.join(names)} differ in {key}, and here they are one head.")
    return found


@torch.no_grad()
def load_heads(module: nn.Module, heads: Collection[str], given: Mapping[str, Tensor]) -> list[str]:
    """Copy the heads that lay with an adapter into a module; all or nothing.

    Args:
        module: The task.
        heads: Names of its heads.
        given: Tensors under the module's names; heads of which there is none stay as they are.

    Returns:
        What does not fit; empty if all is copied.
    """
    had = {head for head in heads if any(name.startswith(f"{head}.") for name in given)}
    own = {n: t for n, t in module.state_dict().items() if any(n.startswith(f"{head}.") for head in had)}
    problems = state_problems(own, given)
    if not problems:
        for name, tensor in given.items():
            own[name].copy_(tensor)
    return problems
