"""Load an adapter from a local directory or the hub, in PEFT's format or as a compact file. Pickles are never read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.errors import first_line
from modules.adapters import AdapterConfig, AdapterError
from modules.adapters.state import frozen_fingerprint, state_problems
from modules.formats.compact import FILE_NAME as COMPACT
from modules.formats.compact import is_compact, load_compact
from modules.formats.peft import CONFIG, KEY, WEIGHTS, Heads, read_peft_files
from modules.formats.peft_reading import from_peft

_log = logging.getLogger(__name__)


class LoadedAdapter(NamedTuple):
    """Content of an adapter directory.

    Args:
        config: The configuration to attach the adapter with.
        factors: Both factors of every adapter by the names of `adapter_state`.
        heads: Tensors of the heads by the module's names.
    """

    config: AdapterConfig
    factors: dict[str, Tensor]
    heads: dict[str, Tensor]


def read_adapter(
    source: str,
    backbone: nn.Module,
    configured: AdapterConfig,
    exclude: Collection[str],
    head_names: Mapping[str, Collection[str]],
) -> LoadedAdapter:
    """Read an adapter for a backbone without adapters.

    Args:
        source: A directory in the format of PEFT or `export`, or a name on the hub.
        backbone: The backbone, which is not changed.
        configured: The configured adapter. Only `train` is used; the file has the other keys.
        exclude: Names of the backbone's modules that are heads.
        head_names: For each head of the module, its possible names in the model that PEFT wraps.

    Raises:
        AdapterError: If the adapter cannot be found, is damaged, does not fit, or is not supported.
    """
    folder = _local_folder(source)
    if is_compact(folder):
        compact = load_compact(folder, backbone, exclude)
        if compact.fingerprint not in (None, frozen_fingerprint(backbone)):
            _log.warning(
                f"{KEY}: {source} was trained over other frozen weights than this backbone's, or over another dtype. "
                "The outputs will differ from the training's. Use the backbone and dtype of the training."
            )
        config = compact.adapter
        # With another `train`, the initialisers of the file can be invalid. An SVD is slow, and not needed, since the
        # file has both factors.
        if config.train != configured.train or {"svd", "svd_minor"} & {config.init_a, config.init_b}:
            config = replace(config, train=configured.train, init_a="given", init_b="given")
        return LoadedAdapter(config, compact.factors, compact.heads)
    names = [name for names_of_head in head_names.values() for name in names_of_head]
    content, tensors = read_peft_files(folder)
    config, factors, heads = from_peft(backbone, content, tensors, configured, exclude, names)
    if str(content.get("init_lora_weights")).lower() == "mica" and configured.train != "A":
        _log.warning(
            f"{KEY}: {source} is a MiCA adapter, for which PEFT freezes B and trains A, but model.adapter.train is "
            f"{configured.train}. Set the key to A to train the same factor as PEFT."
        )
    return LoadedAdapter(config, factors, _rename_heads(heads, head_names))


def _local_folder(source: str) -> Path:
    """Return the local directory of an adapter, after a download if the name is not a local path."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AdapterError(f"{KEY}: {source} is a file. Give the directory with {CONFIG} and {WEIGHTS}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS, COMPACT]))
    except Exception as error:  # The network and an invalid name can raise many exceptions.
        raise AdapterError(
            f"{KEY}: {source} is no directory here, and could not be loaded from the hub ({first_line(error)}). "
            f"Give a directory with {CONFIG} and {WEIGHTS}."
        ) from error


def _rename_heads(heads: Heads, head_names: Mapping[str, Collection[str]]) -> dict[str, Tensor]:
    """Return tensors of heads by the module's names. A PEFT file may have several equal copies of a head."""
    renamed: dict[str, Tensor] = {}
    for head, names in head_names.items():
        for content in (heads[name] for name in names if name in heads):
            for key, tensor in content.items():
                first = renamed.setdefault(f"{head}.{key}", tensor)
                if first.shape != tensor.shape or not torch.equal(first, tensor):
                    raise AdapterError(
                        f"{KEY}: {' and '.join(names)} differ in {key}, but this model has one head for both. Use an "
                        "adapter with equal heads."
                    )
    return renamed


@torch.no_grad()
def load_heads(module: nn.Module, heads: Collection[str], state: Mapping[str, Tensor]) -> list[str]:
    """Copy the heads of an adapter file into a module. If a tensor does not fit, nothing is copied.

    Args:
        module: The task.
        heads: Names of the task's heads.
        state: Tensors by the module's names. Heads without tensors are not changed.

    Returns:
        Descriptions of the names that do not fit; an empty list if all tensors are copied.
    """
    loaded_heads = {head for head in heads if any(name.startswith(f"{head}.") for name in state)}
    targets = {n: t for n, t in module.state_dict().items() if any(n.startswith(f"{head}.") for head in loaded_heads)}
    problems = state_problems(targets, state)
    if not problems:
        for name, tensor in state.items():
            targets[name].copy_(tensor)
    return problems
