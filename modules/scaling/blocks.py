"""Stacks of like blocks in a backbone of any library."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stack:
    """Blocks that are called one behind the other.

    Args:
        name: Of their list within the backbone, `encoder.layer`.
        owner: The module that calls them.
        blocks: The blocks, in their order.
    """

    name: str
    owner: nn.Module
    blocks: list[nn.Module]


def layerdrop_rates(backbone: nn.Module) -> dict[str, float]:
    """Return the rates of blocks that a backbone leaves out at random in training, by their key in config.json."""
    config = getattr(backbone, "config", None)
    shares = {key: getattr(config, key, 0.0) for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")}
    return {key: share for key, share in shares.items() if share}


def block_stacks(backbone: nn.Module) -> list[Stack]:
    """Return the outermost lists of two or more blocks of one class: one of a ViT or a decoder, two of BART.

    Args:
        backbone: A model of timm or transformers.

    Returns:
        The stacks in the order of the backbone's modules; empty if it has none.
    """
    stacks: list[Stack] = []
    for name, module in backbone.named_modules():
        within = any(name.startswith(f"{stack.name}.") for stack in stacks)  # such as the experts of a mixture
        if within or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        blocks = list(module)
        alike = len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].parameters())
        if len(blocks) > 1 and alike:
            stacks.append(Stack(name, backbone.get_submodule(name.rpartition(".")[0]), blocks))
    return stacks
