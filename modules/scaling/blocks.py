"""Stacks of equal blocks in a backbone of timm or transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stack:
    """Blocks that are called in sequence.

    Args:
        name: Name of the list of blocks in the backbone, such as `encoder.layer`.
        owner: The module that calls the blocks.
        blocks: The blocks, in order.
    """

    name: str
    owner: nn.Module
    blocks: list[nn.Module]


def layerdrop_rates(backbone: nn.Module) -> dict[str, float]:
    """Return the nonzero rates at which a backbone drops blocks in training, by key of config.json."""
    config = getattr(backbone, "config", None)
    rates = {key: getattr(config, key, 0.0) for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")}
    return {key: rate for key, rate in rates.items() if rate}


def block_stacks(backbone: nn.Module) -> list[Stack]:
    """Return the outermost lists of two or more blocks of one class. A ViT has one stack, BART has two.

    Args:
        backbone: A model of timm or transformers.

    Returns:
        The stacks in the order of the backbone's modules; empty if there are none.
    """
    stacks: list[Stack] = []
    for name, module in backbone.named_modules():
        # A block may contain a list, such as a mixture of experts.
        nested = any(name.startswith(f"{stack.name}.") for stack in stacks)
        if nested or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        blocks = list(module)
        equal = len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].parameters())
        if len(blocks) > 1 and equal:
            stacks.append(Stack(name, backbone.get_submodule(name.rpartition(".")[0]), blocks))
    return stacks
