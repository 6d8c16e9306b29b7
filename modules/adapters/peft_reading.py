"""PEFT's LoRA files as our adapters; `modules.adapters.peft_format` says what they are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.adapters.config import AdapterConfig, AdapterError
from modules.adapters.peft_format import PREFIX, WHERE, Heads, check_supported
from modules.adapters.roles import ROLES, Projection, find_projections, fused_layers, select
from modules.adapters.state import state_problems


class PeftAdapter(NamedTuple):
    """An adapter that was read.

    Args:
        config: The configuration to attach it with; both factors are `given`.
        factors: Both factors of every adapter under the names of `adapter_state`, float32.
        heads: What was trained whole: the tensors of each module by name, float32.
    """

    config: AdapterConfig
    factors: dict[str, Tensor]
    heads: Heads


def from_peft(
    model: nn.Module,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    own: AdapterConfig,
    exclude: Collection[str] = (),
    heads: Collection[str] = (),
) -> PeftAdapter:
    """The adapter that a PEFT directory holds, as ours for a model.

    Args:
        model: The model without adapters; it is not changed.
        content: adapter_config.json.
        tensors: adapter_model.safetensors.
        own: Says the factor that is to be trained; all else comes from the file.
        exclude: Names of modules that take no adapter, as for `attach`.
        heads: Names, in the model that PEFT wrapped, of the modules that may be in the file whole.

    Raises:
        AdapterError: For what our adapters cannot express, naming its key, and for names and shapes that do not fit the
            model.
    """
    check_supported(content)
    factors, wholes, unexpected = _sorted_out(tensors, heads)
    projections = find_projections(model, exclude)
    _check_layers(model, factors, projections, unexpected)
    ranks = {layer: pair["A"].shape[0] for layer, pair in factors.items()}
    scale = _common_scale(content, ranks)
    parts = {layer: [p for p in projections if p.layer == layer] for layer in factors}
    rank, chosen = _common_rank(parts, {layer: pair["B"] for layer, pair in factors.items()})
    rslora = bool(content.get("use_rslora"))
    same = set(ranks.values()) == {rank} and not content.get("alpha_pattern")
    alpha = content["lora_alpha"] if same else float(f"{scale * (math.sqrt(rank) if rslora else rank):.12g}")
    try:
        config = replace(
            own,
            rank=rank,
            alpha=float(alpha),
            scaling="rslora" if rslora else "standard",
            dropout=float(content.get("lora_dropout") or 0.0),
            init_a="given",
            init_b="given",
            targets=_targets([p for layer in chosen.values() for p in layer], projections),
            layers=None,
        )
    except AdapterError as error:
        raise AdapterError(f"{WHERE}: adapter_config.json has a value out of range ({error}).") from error
    state: dict[str, Tensor] = {}
    for layer, layer_parts in chosen.items():
        a, b = factors[layer]["A"].float(), factors[layer]["B"].float()
        for i, p in enumerate(layer_parts):
            columns = slice(i * rank, (i + 1) * rank)
            state[f"{layer}.adapters.{p.role}.A"] = a[columns].contiguous()
            state[f"{layer}.adapters.{p.role}.B"] = b[p.rows, columns].contiguous()
    return PeftAdapter(config, state, wholes)


_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")


def _sorted_out(
    tensors: Mapping[str, Tensor], heads: Collection[str]
) -> tuple[dict[str, dict[str, Tensor]], Heads, list[str]]:
    """Factors by layer, what is trained whole by module, and the names that are neither."""
    factors: dict[str, dict[str, Tensor]] = {}
    wholes: Heads = {}
    unexpected: list[str] = []
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"{WHERE}: {name!r:.120} holds {tensor.dtype}, which is no dtype of factors or heads.")
        if not tensor.isfinite().all():
            raise AdapterError(f"{WHERE}: {name!r:.120} holds values that are not finite.")
        own = name.removeprefix(PREFIX)
        home = next((head for head in heads if own.startswith(f"{head}.")), None)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif name.startswith(PREFIX) and home is not None:
            wholes.setdefault(home, {})[own.removeprefix(f"{home}.")] = tensor
        else:
            unexpected.append(name)
    return factors, wholes, unexpected


def _check_layers(
    model: nn.Module, factors: dict[str, dict[str, Tensor]], projections: list[Projection], unexpected: list[str]
) -> None:
    """See that each LoRA is complete and of a linear layer with its shape."""
    modules = dict(model.named_modules())
    known = {p.layer for p in projections}
    expected: dict[str, Tensor] = {}
    given: dict[str, Tensor] = dict.fromkeys((f"{name!r:.120}" for name in unexpected), torch.empty(0))
    for layer, pair in factors.items():
        module = modules.get(layer)
        if module is not None and layer not in known:
            raise AdapterError(
                f"{WHERE}: {layer!r:.120} is adapted in the file, and here it cannot be: it is a "
                f"{type(module).__name__} that is tied, trained whole, or no linear layer. Merge the adapter with PEFT "
                "and give the result as model.backbone."
            )
        shown = layer if module is not None else f"{layer!r:.120}"  # a stranger's name
        given |= {f"{shown}.lora_{factor}": tensor for factor, tensor in pair.items()}
        rank = next((pair[f].shape[i] for f, i in (("A", 0), ("B", 1)) if f in pair and pair[f].ndim == 2), 0)
        if isinstance(module, nn.Linear):
            expected[f"{layer}.lora_A"] = torch.empty(rank, module.in_features, device="meta")
            expected[f"{layer}.lora_B"] = torch.empty(module.out_features, rank, device="meta")
    if problems := state_problems(expected, given):
        raise AdapterError(
            f"{WHERE}: the file does not fit this backbone: {'; '.join(problems)}. Take the model it was made for; "
            "only LoRA of linear layers and the task's own head can be loaded, no embeddings or norms."
        )
    if not factors:
        raise AdapterError(f"{WHERE}: the file has no LoRA of any layer.")


def _common_scale(content: Mapping[str, Any], ranks: dict[str, int]) -> float:
    """The scale that all layers share.

    Raises:
        AdapterError: If there is none, or the tensors have other ranks than the configuration says.
    """
    scales: dict[str, float] = {}
    for layer, rank in ranks.items():
        said = _patterned(content, "rank_pattern", layer, content["r"])
        if said != rank:
            raise AdapterError(
                f"{WHERE}: {layer!r:.120} has rank {rank} in the file, and {said} by r and rank_pattern of "
                "adapter_config.json; the two do not belong together."
            )
        alpha = _patterned(content, "alpha_pattern", layer, content["lora_alpha"])
        scales[layer] = alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)
    low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
    if not math.isclose(scales[low], scales[high], rel_tol=1e-9):
        raise AdapterError(
            f"{WHERE}: alpha_pattern and rank_pattern give {low!r:.120} the scale {scales[low]:g} and {high!r:.120} "
            f"{scales[high]:g}, and here all adapters share one; merge the adapter with PEFT and give the result as "
            "model.backbone."
        )
    return scales[low]


def _patterned(content: Mapping[str, Any], key: str, layer: str, default: float) -> float:
    """The value that PEFT gives a layer: that of the first pattern its name ends with."""
    for pattern, value in (content.get(key) or {}).items():
        if len(re.findall(r"[*+?{]", pattern)) > 4 or re.search(r"\)[*+{]", pattern):  # could take for ever
            raise AdapterError(f"{WHERE}: {key} has {pattern!r:.120}, a pattern too involved; write out the layers.")
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise AdapterError(f"{WHERE}: {key} has {pattern!r:.120}, no regular expression ({error}).") from error
    return default


def _common_rank(parts: dict[str, list[Projection]], b: dict[str, Tensor]) -> tuple[int, dict[str, list[Projection]]]:
    """The rank that all adapters share, and what each layer's LoRA adapts: the layer, or parts of a fused one.

    Raises:
        AdapterError: If there is no such rank.
    """
    ranks = {layer: tensor.shape[1] for layer, tensor in b.items()}
    least = min(ranks.values())
    for k in range(max(len(of_layer) for of_layer in parts.values()), 0, -1):
        rank = least // k
        if least % k or any(r % rank for r in ranks.values()):
            continue
        chosen = {layer: _parts(b[layer], rank, of_layer) for layer, of_layer in parts.items()}
        if all(chosen.values()):
            return rank, chosen
    raise AdapterError(
        f"{WHERE}: rank_pattern gives ranks from {least} to {max(ranks.values())}, and here all adapters share one; "
        "merge the adapter with PEFT and give the result as model.backbone."
    )


def _parts(b: Tensor, rank: int, parts: list[Projection]) -> list[Projection]:
    """What a B (d_out, k·rank) adapts: k parts of its layer, the layer as a whole, or neither."""
    if len(parts) > 1:
        blocks = [[p for p in parts if block[p.rows].any()] for block in b.split(rank, dim=1)]
        starts = [hit[0].start for hit in blocks if len(hit) == 1]
        if len(starts) == len(blocks) and starts == sorted(set(starts)):
            return [hit[0] for hit in blocks]
        parts = fused_layers(parts)
    return parts if b.shape[1] == rank else []


def _targets(chosen: list[Projection], projections: list[Projection]) -> list[str]:
    """The shortest targets that stand for the chosen projections and no others."""
    names = [p.name for p in chosen]
    roles = [role for role in ROLES if any(p.role == role for p in chosen)]
    folded = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    for targets in (roles, [f"regex:{pattern}" for pattern in folded]):
        if targets and {p.name for p in select(projections, targets)} == set(names):
            return targets
    return [f"regex:{re.escape(name)}" for name in names]
