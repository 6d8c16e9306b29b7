"""Read PEFT's LoRA files as adapters of a model; `modules.formats.peft` describes the format."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import accumulate
from statistics import mode
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.adapters.config import AdapterConfig, AdapterError, Projection, Scaling
from modules.adapters.patterns import pattern_problem, short_patterns, value_of
from modules.adapters.roles import ROLES, find_projections, fused_layers, select
from modules.adapters.state import state_problems
from modules.formats.peft import KEY, PREFIX, Heads, check_supported, rescaled_alpha


class PeftAdapter(NamedTuple):
    """An adapter from PEFT's files.

    Args:
        config: The configuration to attach the adapter with; both factors are `given`.
        factors: Both factors of every adapter by the names of `adapter_state`, float32.
        heads: Tensors of fully trained modules by module name and tensor name.
    """

    config: AdapterConfig
    factors: dict[str, Tensor]
    heads: Heads


def from_peft(
    model: nn.Module,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    configured: AdapterConfig,
    exclude: Collection[str] = (),
    heads: Collection[str] = (),
) -> PeftAdapter:
    """Convert the content of PEFT's files to an adapter of a model.

    Args:
        model: The model without adapters, which is not changed.
        content: Content of adapter_config.json.
        tensors: Content of adapter_model.safetensors.
        configured: The configured adapter. Only `train` is used; the file has the other keys.
        exclude: Names of modules that take no adapter, as for `attach`.
        heads: Names of fully trained modules that the file may have, in the model that PEFT wrapped.

    Raises:
        AdapterError: If a key or a dtype is not supported, a tensor is not finite, or names or shapes do not fit the
            model.
    """
    check_supported(content)
    factors, head_tensors, unexpected = _split_tensors(tensors, heads)
    projections = find_projections(model, exclude)
    _check_layers(model, factors, projections, unexpected)
    _check_patterns(content)
    parts = _parts(factors, projections)
    scaling: Scaling = "rslora" if content.get("use_rslora") else "standard"
    sizes = _sizes(content, factors, parts, scaling)
    try:
        config = replace(
            configured,
            scaling=scaling,
            dropout=float(content.get("lora_dropout") or 0.0),
            init_a="given",
            init_b="given",
            targets=_targets([part.projection for part in parts], projections),
            layers=None,
            **sizes,
        )
    except AdapterError as error:
        raise AdapterError(
            f"{KEY}: adapter_config.json has a value out of range ({error}). Correct the value."
        ) from error
    state: dict[str, Tensor] = {}
    for p, columns in parts:
        a, b = (factors[p.layer][factor].float() for factor in "AB")
        state[f"{p.layer}.adapters.{p.role}.A"] = a[columns].contiguous()
        state[f"{p.layer}.adapters.{p.role}.B"] = b[p.rows, columns].contiguous()
    return PeftAdapter(config, state, head_tensors)


_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")


def _split_tensors(
    tensors: Mapping[str, Tensor], heads: Collection[str]
) -> tuple[dict[str, dict[str, Tensor]], Heads, list[str]]:
    """Return the factors by layer, the tensors of heads by module, and the names of all other tensors."""
    factors: dict[str, dict[str, Tensor]] = {}
    head_tensors: Heads = {}
    unexpected: list[str] = []
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(
                f"{KEY}: {name!r:.120} has dtype {tensor.dtype}, which is not supported. Save the adapter in float32."
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"{KEY}: {name!r:.120} holds values that are not finite. Use another adapter.")
        short_name = name.removeprefix(PREFIX)
        head = next((head for head in heads if short_name.startswith(f"{head}.")), None)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif name.startswith(PREFIX) and head is not None:
            head_tensors.setdefault(head, {})[short_name.removeprefix(f"{head}.")] = tensor
        else:
            unexpected.append(name)
    return factors, head_tensors, unexpected


def _check_layers(
    model: nn.Module, factors: dict[str, dict[str, Tensor]], projections: list[Projection], unexpected: list[str]
) -> None:
    """Check that each LoRA is complete and has the shape of its linear layer."""
    modules = dict(model.named_modules())
    known = {p.layer for p in projections}
    expected: dict[str, Tensor] = {}
    in_file: dict[str, Tensor] = dict.fromkeys((f"{name!r:.120}" for name in unexpected), torch.empty(0))
    for layer, pair in factors.items():
        module = modules.get(layer)
        if module is not None and layer not in known:
            raise AdapterError(
                f"{KEY}: the file adapts {layer!r:.120}, which cannot be adapted here: a {type(module).__name__} "
                "that is tied, fully trained, or no linear layer. Merge the adapter with PEFT and give the result as "
                "model.backbone."
            )
        shown = layer if module is not None else f"{layer!r:.120}"  # An unknown name is escaped and truncated.
        in_file |= {f"{shown}.lora_{factor}": tensor for factor, tensor in pair.items()}
        rank = next((pair[f].shape[i] for f, i in (("A", 0), ("B", 1)) if f in pair and pair[f].ndim == 2), 0)
        if isinstance(module, nn.Linear):
            expected[f"{layer}.lora_A"] = torch.empty(rank, module.in_features, device="meta")
            expected[f"{layer}.lora_B"] = torch.empty(module.out_features, rank, device="meta")
    if problems := state_problems(expected, in_file):
        raise AdapterError(
            f"{KEY}: the file does not fit this backbone: {'; '.join(problems)}. Use the adapter's base model. Only "
            "LoRA of linear layers and the task's head can be loaded, no embeddings or norms."
        )
    if not factors:
        raise AdapterError(f"{KEY}: the file has no LoRA of any layer. Use another adapter.")


def _check_patterns(content: Mapping[str, Any]) -> None:
    """Check that the keys of the patterns are regular expressions that match fast."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in content.get(key) or {}:
            if problem := pattern_problem(pattern):
                raise AdapterError(f"{KEY}: {key} has {pattern!r:.120}, which is {problem}.")


class _Part(NamedTuple):
    """Columns of a LoRA's B, and the projection that the columns adapt."""

    projection: Projection
    columns: slice

    @property
    def rank(self) -> int:
        return self.columns.stop - self.columns.start


def _parts(factors: Mapping[str, Mapping[str, Tensor]], projections: list[Projection]) -> list[_Part]:
    """Return the projections that each LoRA adapts.

    If the B of any fused layer is not block-diagonal, all LoRAs adapt whole layers.
    """
    of_layer = {layer: [p for p in projections if p.layer == layer] for layer in factors}
    blocks = {layer: _blocks(factors[layer]["B"], parts) for layer, parts in of_layer.items() if len(parts) > 1}
    if not all(blocks.values()):
        blocks = {}
    adapted: list[_Part] = []
    for layer, parts in of_layer.items():
        unsplit = fused_layers(parts) if len(parts) > 1 else parts
        adapted += blocks.get(layer) or [_Part(unsplit[0], slice(0, factors[layer]["A"].shape[0]))]
    return adapted


def _blocks(b: Tensor, parts: list[Projection]) -> list[_Part]:
    """Split B (d_out, R) of a fused layer into the parts that B adapts; return [] if B is not block-diagonal.

    The owner of a column is the part with nonzero entries. A column of zeros has no visible owner. Blocks of equal
    width are preferred. Otherwise a column of zeros belongs to the owner of the previous column.
    """
    hits = torch.stack([b[p.rows].any(dim=0) for p in parts])  # (parts, R)
    known = hits.any(dim=0)
    owners = hits.int().argmax(dim=0)  # (R,), valid where the owner is known
    present = owners[known].unique_consecutive()
    if (hits.sum(dim=0) > 1).any() or not len(present) or (present.diff() <= 0).any():
        return []
    equal = present.repeat_interleave(b.shape[1] // len(present))
    if len(equal) != len(owners) or (equal != owners)[known].any():
        last = known.cumsum(0).sub(1).clamp(min=0)  # Index of the previous known column among all known columns.
        equal = owners[known][last]
    widths = [int((equal == owner).sum()) for owner in present]
    return [
        _Part(parts[owner], slice(stop - width, stop))
        for owner, width, stop in zip(present.tolist(), widths, accumulate(widths), strict=True)
    ]


def _sizes(
    content: Mapping[str, Any], factors: Mapping[str, Mapping[str, Tensor]], parts: list[_Part], scaling: Scaling
) -> dict[str, Any]:
    """Return ranks and alphas as keys of `AdapterConfig`. The most frequent values become `rank` and `alpha`.

    Raises:
        AdapterError: If ranks of the tensors differ from adapter_config.json.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for part in parts:
        layer, name = part.projection.layer, part.projection.name
        rank = factors[layer]["A"].shape[0]
        configured = value_of(content.get("rank_pattern") or {}, layer, content["r"])
        if configured != rank:
            raise AdapterError(
                f"{KEY}: {layer!r:.120} has rank {rank} in the file, but {configured} by r and rank_pattern of "
                "adapter_config.json. Use the two files of the same adapter."
            )
        alpha = float(value_of(content.get("alpha_pattern") or {}, layer, content["lora_alpha"]))
        ranks[name] = part.rank
        alphas[name] = float(f"{rescaled_alpha(scaling, alpha, part.rank / rank):.12g}") if part.rank != rank else alpha
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": short_patterns(ranks, rank, reserved=ROLES),
        "alpha_pattern": short_patterns(alphas, alpha, reserved=ROLES),
    }


def _targets(chosen: list[Projection], projections: list[Projection]) -> list[str]:
    """Return short targets that select exactly the chosen projections."""
    names = [p.name for p in chosen]
    roles = [role for role in ROLES if any(p.role == role for p in chosen)]
    folded = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    for targets in (roles, [f"regex:{pattern}" for pattern in folded]):
        if targets and {p.name for p in select(projections, targets)} == set(names):
            return targets
    return [f"regex:{re.escape(name)}" for name in names]
