"""Roles: one name for the same projection in every backbone.

A role is the function of a projection, such as `query` or `mlp_out`. The table maps layer names to roles for timm's
ViTs, BERT and similar encoders, BART, T5 and LLaMA. A fused layer has one role for each equal part of its output. For
another family of backbones, add a row or use a target `regex:…`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AdapterError, Projection
from .linear import AdaptedLinear
from .patterns import matches

ATTENTION = ("query", "key", "value", "output")
ROLES = (*ATTENTION, "mlp_in", "mlp_gate", "mlp_out")

# Each entry: the end of a layer's name, and the roles of the equal parts of its output, in the order of weight rows.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # timm ViT, such as blocks.0.attn.qkv. `attn.` excludes the `proj` of the patch embedding.
    (r"attn\.qkv", ("query", "key", "value")),
    (r"attn\.proj", ("output",)),
    (r"mlp\.(fc1|fc1_x)", ("mlp_in",)),
    (r"mlp\.fc1_g", ("mlp_gate",)),
    (r"mlp\.fc2", ("mlp_out",)),
    # BERT and RoBERTa, such as encoder.layer.0.attention.self.query.
    (r"attention\.self\.query", ("query",)),
    (r"attention\.self\.key", ("key",)),
    (r"attention\.self\.value", ("value",)),
    (r"attention\.output\.dense", ("output",)),
    (r"layer\.\d+\.intermediate\.dense", ("mlp_in",)),
    (r"layer\.\d+\.output\.dense", ("mlp_out",)),
    # DeBERTa-v2 and v3. Other layers have BERT's names. The projections of relative positions have no role.
    (r"attention\.self\.query_proj", ("query",)),
    (r"attention\.self\.key_proj", ("key",)),
    (r"attention\.self\.value_proj", ("value",)),
    # DistilBERT
    (r"attention\.q_lin", ("query",)),
    (r"attention\.k_lin", ("key",)),
    (r"attention\.v_lin", ("value",)),
    (r"attention\.out_lin", ("output",)),
    (r"ffn\.lin1", ("mlp_in",)),
    (r"ffn\.lin2", ("mlp_out",)),
    # T5, self and cross attention. In its gated MLP, the activation function follows wi_0, so wi_0 is the gate.
    (r"(SelfAttention|EncDecAttention)\.q", ("query",)),
    (r"(SelfAttention|EncDecAttention)\.k", ("key",)),
    (r"(SelfAttention|EncDecAttention)\.v", ("value",)),
    (r"(SelfAttention|EncDecAttention)\.o", ("output",)),
    (r"DenseReluDense\.(wi|wi_1)", ("mlp_in",)),
    (r"DenseReluDense\.wi_0", ("mlp_gate",)),
    (r"DenseReluDense\.wo", ("mlp_out",)),
    # BART and Pegasus, self and cross attention, and LLaMA
    (r"(self_attn|encoder_attn)\.q_proj", ("query",)),
    (r"(self_attn|encoder_attn)\.k_proj", ("key",)),
    (r"(self_attn|encoder_attn)\.v_proj", ("value",)),
    (r"(self_attn|encoder_attn)\.(out_proj|o_proj)", ("output",)),
    (r"layers\.\d+\.fc1", ("mlp_in",)),
    (r"layers\.\d+\.fc2", ("mlp_out",)),
    (r"mlp\.up_proj", ("mlp_in",)),
    (r"mlp\.gate_proj", ("mlp_gate",)),
    (r"mlp\.down_proj", ("mlp_out",)),
)
_LAYERS = tuple((re.compile(rf"(?:.*\.)?{end}"), roles) for end, roles in LAYERS)


def find_projections(model: nn.Module, exclude: Collection[str] = ()) -> list[Projection]:
    """Return all projections of a model, in the order of its modules.

    These layers cannot be adapted and are skipped:

    - layers that share a weight with another module, such as a head tied to the embedding, since an adapter would untie
      the weight;
    - parametrized layers, which have no weight parameter;
    - layers of `nn.MultiheadAttention`, which reads the weights without calling the layers;
    - subclasses of `nn.Linear` that do not compute x·Wᵀ + b, such as quantised layers and routers of experts.

    Args:
        model: The backbone.
        exclude: Names of modules to skip with all submodules, such as the head.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    projections: list[Projection] = []
    for name, module in modules.items():
        if not name or not _is_linear(module) or owners[id(module.weight)] != 1:
            continue
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            continue
        if any(name == root or name.startswith(f"{root}.") for root in exclude):
            continue
        # timm's MaxViT and TinyViT store q, k and v of each head together, so a third of the rows is not one role.
        by_head = getattr(parent, "head_first", False) or hasattr(parent, "key_dim")
        projections += _split(name, module, by_head)
    return projections


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return True for a layer that computes exactly x·Wᵀ + b, with or without adapters."""
    if isinstance(module, AdaptedLinear):
        return True
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return False
    # Entries of a quantised weight have one byte or less.
    return module.weight.element_size() > 1 and _computes_product(type(module))


def _computes_product(kind: type[nn.Linear]) -> bool:
    """Return True if a class computes exactly x·Wᵀ + b.

    The function calls `forward` of a small layer that has only the attributes of nn.Linear. If `forward`
    needs another attribute, the call fails and the result is False.
    """
    if kind.forward is nn.Linear.forward:
        return True
    layer = kind.__new__(kind)
    nn.Linear.__init__(layer, 3, 2, device="meta")  # On the meta device, no random numbers are drawn.
    numbers = torch.linspace(-2, 3, 20, device="cpu", dtype=torch.float32)
    layer.weight, layer.bias = nn.Parameter(numbers[:6].view(2, 3)), nn.Parameter(numbers[6:8])
    x = numbers[8:].view(4, 3)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            out = layer.forward(x)
        except Exception:
            return False
        return isinstance(out, Tensor) and torch.allclose(out, F.linear(x, layer.weight, layer.bias))


def _split(layer: str, linear: nn.Linear, by_head: bool) -> list[Projection]:
    """Return the projections of one linear layer."""
    rows = linear.out_features
    roles = next((roles for pattern, roles in _LAYERS if pattern.fullmatch(layer)), ("other",))
    if len(roles) > 1 and (by_head or rows != len(roles) * linear.in_features):
        roles = ("other",)  # The parts are not of equal width, as with grouped queries, or not contiguous.
    step = rows // len(roles)
    return [Projection(layer, role, i * step, (i + 1) * step, len(roles) > 1) for i, role in enumerate(roles)]


def select(projections: list[Projection], targets: Collection[str], layers: int | None = None) -> list[Projection]:
    """Return the projections that the targets match.

    A pattern that matches the name of a fused layer selects the whole layer, with the role `other`. If a target matches
    parts of the layer, only the matched parts are selected.

    Args:
        projections: All projections of the model, from `find_projections`.
        targets: `AdapterConfig.targets`.
        layers: `AdapterConfig.layers`.

    Raises:
        AdapterError: If a target is unknown or matches nothing. Also if `layers` exceeds the number of blocks, or no
            targeted projection is in the last blocks.
    """
    candidates = [*projections, *fused_layers(projections)]
    chosen: set[str] = set()
    for target in targets:
        names = {p.name for p in candidates if _matches(p, target)}
        if not names:
            raise AdapterError(
                f"adapter.targets: {target!r} matches nothing in this backbone. {_inventory(projections)}"
            )
        chosen |= names
    in_parts = {p.layer for p in projections if p.name in chosen and p.fused}
    order = {p.layer: i for i, p in enumerate(projections)}
    selected = [p for p in candidates if p.name in chosen and (p.fused or p.layer not in in_parts)]
    selected.sort(key=lambda p: (order[p.layer], p.start))
    return selected if layers is None else _in_last_blocks(selected, projections, layers)


def block_of(layer: str) -> tuple[str, int] | None:
    """Return the stack and the number of a layer's outermost block; None if the layer is in no block.

    `encoder.layer.7.output.dense` is in block 7 of the stack `encoder.layer`.
    """
    match = re.match(r"(?:(.+?)\.)?(\d+)(?:\.|$)", layer)
    return (match[1] or "", int(match[2])) if match else None


def _in_last_blocks(selected: list[Projection], projections: list[Projection], layers: int) -> list[Projection]:
    """Return the selected projections that are in the last blocks of their stack."""
    stacks: dict[str, set[int]] = {}
    for block in filter(None, (block_of(p.layer) for p in projections)):
        stacks.setdefault(block[0], set()).add(block[1])
    blocks = {p.name: block_of(p.layer) for p in selected}
    targeted = {block[0]: len(stacks[block[0]]) for block in blocks.values() if block}
    if any(layers > depth for depth in targeted.values()):
        depths = ", ".join(f"{depth} in {stack}" if stack else str(depth) for stack, depth in targeted.items())
        raise AdapterError(
            f"adapter.layers: {layers} is more than the number of blocks of this backbone ({depths}). Use fewer layers."
        )
    last = {(stack, number) for stack in targeted for number in sorted(stacks[stack])[-layers:]}
    kept = [p for p in selected if blocks[p.name] in last]
    if not kept:
        raise AdapterError(
            f"adapter.layers: none of the targeted projections is in the last {layers} blocks. The projections are "
            f"{', '.join(p.name for p in selected[:5])}{', …' if len(selected) > 5 else ''}. Use more layers or "
            "other targets."
        )
    return kept


def fused_layers(projections: list[Projection]) -> list[Projection]:
    """Return each fused layer of the projections as one projection."""
    rows = {p.layer: p.stop for p in projections if p.fused}
    return [Projection(layer, "other", 0, stop) for layer, stop in rows.items()]


def _matches(projection: Projection, target: str) -> bool:
    if target.startswith("regex:"):
        try:
            return re.fullmatch(target.removeprefix("regex:"), projection.name) is not None
        except re.error as error:
            raise AdapterError(
                f"adapter.targets: {target!r} is not a regular expression: {error}. Correct the pattern."
            ) from error
    groups = {"attention": ATTENTION, "all": ROLES, **{role: (role,) for role in ROLES}}
    if target not in groups:
        raise AdapterError(
            f"adapter.targets: {target!r} is not a role. Choose from {', '.join(groups)}, or use regex:PATTERN "
            "for names of layers."
        )
    return projection.role in groups[target]


def check_patterns(option: str, keys: Collection[str], projections: list[Projection]) -> None:
    """Check that each key of a pattern matches one of the adapted projections.

    Raises:
        AdapterError: If a key matches nothing. The message has the key and the adapted projections.
    """
    for key in keys:
        if not any(matches(key, p.name, p.role) for p in projections):
            raise AdapterError(
                f"adapter.{option}: {key!r:.120} matches none of the adapted projections. The adapted projections are "
                f"{', '.join(f'{kind} ({role})' for kind, role in _kinds(projections).items())}. Correct the key or "
                "remove it."
            )


def _kinds(projections: list[Projection]) -> dict[str, str]:
    """Return the roles of the projections by name, with `*` in place of block numbers."""
    return {re.sub(r"\b\d+\b", "*", p.name): p.role for p in projections}


def _inventory(projections: list[Projection]) -> str:
    """Return a sentence that lists the linear layers of a model, with `*` in place of block numbers."""
    kinds = _kinds(projections)
    if not kinds:
        return "The backbone has no linear layer to adapt."
    listed = ", ".join(f"{kind} ({role})" for kind, role in kinds.items())
    return f"Target a role, or names of linear layers by regex:PATTERN. The linear layers are {listed}."
