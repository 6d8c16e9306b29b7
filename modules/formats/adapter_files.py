"""Load an adapter for a module: a directory of PEFT's files or a compact one, local or on the hub; never a pickle."""

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
from modules.formats.peft import CONFIG, WEIGHTS, WHERE, Heads, read_peft_files
from modules.formats.peft_reading import from_peft

_log = logging.getLogger(__name__)


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
        own: Its `train` says which factor is trained; all other keys come from the file.
        exclude: Names of the backbone's modules that are heads.
        homes: For each head of the module, its names in the model that PEFT wraps.

    Raises:
        AdapterError: If the adapter cannot be found, is damaged, does not fit, or is not supported.
    """
    folder = _local_folder(source)
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


def _local_folder(source: str) -> Path:
    """Return the local directory of an adapter, after a download if the name is one of the hub."""
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


def _rename_heads(wholes: Heads, homes: Mapping[str, Collection[str]]) -> dict[str, Tensor]:
    """Return tensors of heads under the module's names; PEFT may have a head several times, if the copies are equal."""
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
    """Copy the heads of an adapter file into a module; all or nothing.

    Args:
        module: The task.
        heads: Names of the task's heads.
        given: Tensors under the module's names. Heads without a tensor stay as they are.

    Returns:
        The names that do not fit; an empty list if all tensors are copied.
    """
    had = {head for head in heads if any(name.startswith(f"{head}.") for name in given)}
    own = {n: t for n, t in module.state_dict().items() if any(n.startswith(f"{head}.") for head in had)}
    problems = state_problems(own, given)
    if not problems:
        for name, tensor in given.items():
            own[name].copy_(tensor)
    return problems
