"""Roles: one name for the same projection in every backbone.

A role names what a projection does (`query`, `mlp_out`, …). The table says which layer, or which third of a fused
layer, has the role in timm's ViTs, BERT and its kin, BART, T5 and LLaMA. A backbone of another family needs one more
row, or a target `regex:…`.
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

# (end of the layer's name, roles of its output's equal parts, in the order of their rows)
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # timm ViT: blocks.0.attn.qkv; the patch embedding's `proj` is not `attn.proj`
    (r"attn\.qkv", ("query", "key", "value")),
    (r"attn\.proj", ("output",)),
    (r"mlp\.(fc1|fc1_x)", ("mlp_in",)),
    (r"mlp\.fc1_g", ("mlp_gate",)),
    (r"mlp\.fc2", ("mlp_out",)),
    # BERT, RoBERTa: encoder.layer.0.attention.self.query; the head's `classifier.dense` is none of these
    (r"attention\.self\.query", ("query",)),
    (r"attention\.self\.key", ("key",)),
    (r"attention\.self\.value", ("value",)),
    (r"attention\.output\.dense", ("output",)),
    (r"layer\.\d+\.intermediate\.dense", ("mlp_in",)),
    (r"layer\.\d+\.output\.dense", ("mlp_out",)),
    # DeBERTa-v2 and v3, otherwise BERT's names; the projections of positions stay as they are
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
    # T5 (self and cross attention); of the two inputs of its gated layer wi_0 passes the activation
    (r"(SelfAttention|EncDecAttention)\.q", ("query",)),
    (r"(SelfAttention|EncDecAttention)\.k", ("key",)),
    (r"(SelfAttention|EncDecAttention)\.v", ("value",)),
    (r"(SelfAttention|EncDecAttention)\.o", ("output",)),
    (r"DenseReluDense\.(wi|wi_1)", ("mlp_in",)),
    (r"DenseReluDense\.wi_0", ("mlp_gate",)),
    (r"DenseReluDense\.wo", ("mlp_out",)),
    # BART, Pegasus (self and cross attention) and LLaMA
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

    These layers are left out:

    - layers whose weight belongs to another module too (a language-modelling head tied to the embedding), since
      adapting one side would untie the two;
    - parametrized layers, which have no weight of their own;
    - layers of `nn.MultiheadAttention`, which reads their weights without calling them;
    - kinds of `nn.Linear` that compute something else than x·Wᵀ + b (quantised layers, routers of experts).

    Args:
        model: The backbone.
        exclude: Names of modules to leave out with all their submodules, such as the task's head.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    found: list[Projection] = []
    for name, module in modules.items():
        if not name or not _is_linear(module) or owners[id(module.weight)] != 1:
            continue
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            continue
        if any(name == root or name.startswith(f"{root}.") for root in exclude):
            continue
        # timm's MaxViT and TinyViT keep q, k and v of one head together: thirds would mix them
        by_head = getattr(parent, "head_first", False) or hasattr(parent, "key_dim")
        found += _split(name, module, by_head)
    return found


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return True for a layer that computes x·Wᵀ + b and nothing else, with or without adapters."""
    if isinstance(module, AdaptedLinear):
        return True
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return False
    return module.weight.element_size() > 1 and _computes_product(type(module))  # a quantised W has a byte or less


def _computes_product(kind: type[nn.Linear]) -> bool:
    """Return True if a class computes x·Wᵀ + b and nothing else.

    A small layer with the attributes of nn.Linear alone is tried. A `forward` that needs another attribute fails there,
    and so computes something else.
    """
    if kind.forward is nn.Linear.forward:
        return True
    layer = kind.__new__(kind)
    nn.Linear.__init__(layer, 3, 2, device="meta")  # draws no random numbers
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
        roles = ("other",)  # not (q; k; v) of one width each: grouped queries, or another layout
    step = rows // len(roles)
    return [Projection(layer, role, i * step, (i + 1) * step, len(roles) > 1) for i, role in enumerate(roles)]


def select(projections: list[Projection], targets: Collection[str], layers: int | None = None) -> list[Projection]:
    """Return the projections that the targets name.

    A pattern that matches the name of a fused layer takes the layer as a whole, with the role `other`, unless any
    target names one of its parts.

    Args:
        projections: What there is, from `find_projections`.
        targets: `AdapterConfig.targets`.
        layers: `AdapterConfig.layers`.

    Raises:
        AdapterError: For a target that is not known, a role or pattern that matches nothing, or more blocks than there
            are; the message lists what there is.
    """
    candidates = [*projections, *fused_layers(projections)]
    chosen: set[str] = set()
    for target in targets:
        names = {p.name for p in candidates if _matches(p, target)}
        if not names:
            raise AdapterError(
                f"adapter.targets: {target!r} matches nothing in this backbone, {_inventory(projections)}"
            )
        chosen |= names
    in_parts = {p.layer for p in projections if p.name in chosen and p.fused}
    order = {p.layer: i for i, p in enumerate(projections)}
    found = [p for p in candidates if p.name in chosen and (p.fused or p.layer not in in_parts)]
    found.sort(key=lambda p: (order[p.layer], p.start))
    return found if layers is None else _in_last_blocks(found, projections, layers)


def block_of(layer: str) -> tuple[str, int] | None:
    """Return the stack of a layer and the number of its block there, the outermost; None outside of any block.

    `encoder.layer.7.output.dense` lies in block 7 of `encoder.layer`.
    """
    match = re.match(r"(?:(.+?)\.)?(\d+)(?:\.|$)", layer)
    return (match[1] or "", int(match[2])) if match else None


def _in_last_blocks(found: list[Projection], projections: list[Projection], layers: int) -> list[Projection]:
    """Return the projections that lie in the last blocks of their stack."""
    stacks: dict[str, set[int]] = {}
    for block in filter(None, (block_of(p.layer) for p in projections)):
        stacks.setdefault(block[0], set()).add(block[1])
    blocks = {p.name: block_of(p.layer) for p in found}
    targeted = {block[0]: len(stacks[block[0]]) for block in blocks.values() if block}
    if any(layers > depth for depth in targeted.values()):
        there = ", ".join(f"{depth} in {stack}" if stack else str(depth) for stack, depth in targeted.items())
        raise AdapterError(f"adapter.layers: {layers} are more blocks than this backbone has ({there}).")
    last = {(stack, number) for stack in targeted for number in sorted(stacks[stack])[-layers:]}
    kept = [p for p in found if blocks[p.name] in last]
    if not kept:
        raise AdapterError(
            f"adapter.layers: none of the targeted projections lies in the last {layers} blocks; they are "
            f"{', '.join(p.name for p in found[:5])}{', …' if len(found) > 5 else ''}."
        )
    return kept


def fused_layers(projections: list[Projection]) -> list[Projection]:
    """Return the layers that hold several of the projections, each layer as one projection."""
    rows = {p.layer: p.stop for p in projections if p.fused}  # of the last part
    return [Projection(layer, "other", 0, stop) for layer, stop in rows.items()]


def _matches(projection: Projection, target: str) -> bool:
    if target.startswith("regex:"):
        try:
            return re.fullmatch(target.removeprefix("regex:"), projection.name) is not None
        except re.error as error:
            raise AdapterError(f"adapter.targets: {target!r} is not a regular expression: {error}.") from error
    groups = {"attention": ATTENTION, "all": ROLES, **{role: (role,) for role in ROLES}}
    if target not in groups:
        raise AdapterError(
            f"adapter.targets: {target!r} is not a role; choose from {', '.join(groups)}, or write regex:PATTERN."
        )
    return projection.role in groups[target]


def check_patterns(option: str, keys: Collection[str], projections: list[Projection]) -> None:
    """Check that each key of a pattern matches one of the adapted projections.

    Raises:
        AdapterError: With the key, perhaps misspelt, and the projections.
    """
    for key in keys:
        if not any(matches(key, p.name, p.role) for p in projections):
            raise AdapterError(
                f"adapter.{option}: {key!r:.120} matches none of the adapted projections, which are "
                f"{', '.join(f'{kind} ({role})' for kind, role in _kinds(projections).items())}. Correct the key, or "
                "take it out."
            )


def _kinds(projections: list[Projection]) -> dict[str, str]:
    """Return the role of each kind of projection, by a name whose block numbers are folded."""
    return {re.sub(r"\b\d+\b", "*", p.name): p.role for p in projections}


def _inventory(projections: list[Projection]) -> str:
    """Return the end of a message that lists the linear layers of a model, block numbers folded."""
    kinds = _kinds(projections)
    if not kinds:
        return "which has no linear layer to adapt."
    return "whose linear layers are " + ", ".join(f"{kind} ({role})" for kind, role in kinds.items()) + "."
