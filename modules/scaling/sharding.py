"""Frozen weights divided among processes; what is trained stays whole on each, where DDP averages its gradients.

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP") keeps a share of each block on every process. It
gathers a block when the block is called, in forward and again in backward, and then drops the shares of the others.
Embeddings and output layer stay whole: they are small, often tied, and called on their own.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from datamodules.errors import ModelError
from modules.adapters import adapted_layers
from modules.scaling.blocks import Stack, block_stacks, layerdrop_rates


def shard_frozen_weights(
    module: nn.Module, backbone: nn.Module, fingerprint: str, trainer: L.Trainer
) -> FrozenShards | None:
    """Divide a model's frozen blocks among the trainer's processes, in place, before the model is on its device.

    Args:
        module: The whole model.
        backbone: Its backbone, with frozen blocks.
        fingerprint: Fingerprint of the frozen weights.
        trainer: Knows the processes.

    Returns:
        The shards; None if there is only one process.

    Raises:
        ModelError: If the strategy is another than DDP, adapters are merged, the backbone has no stack of blocks, or
            the processes have loaded different weights.
    """
    if trainer.world_size == 1:
        return None
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ModelError(
            f"model.shard_frozen: needs --trainer.strategy ddp, not {type(trainer.strategy).__name__}: what is trained "
            "is not sharded."
        )
    if any(layer.merged for layer in adapted_layers(backbone).values()):
        raise ModelError("model.shard_frozen: the adapters are merged into the weights; unmerge them before.")
    fingerprints: list[str] = [""] * trainer.world_size
    dist.all_gather_object(fingerprints, fingerprint)
    if len(set(fingerprints)) > 1:
        raise ModelError(
            "model.shard_frozen: the processes have loaded different weights, which would be mixed; give all the same "
            "model.backbone (and with weights: none the same seed_everything)."
        )
    shards = FrozenShards(backbone, trainer.strategy.root_device)
    names = [n for n, p in module.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return shards


class FrozenShards:
    """The blocks of a backbone whose frozen weights are divided among all processes.

    Every forward pass gathers from all processes, so that all processes need equally many. In training they have.
    Evaluation gives every sample once: one process may have a batch more than another, or a longer text to generate.
    A forward pass without gradients is therefore announced to all processes. If they announce different passes (one
    process still decodes, another encodes its next batch), the first in the backbone's order is run. The processes that
    have not announced this pass gather along, without computing, and then announce theirs again. A process that has no
    batch left gathers along until no process announces a pass.

    Args:
        backbone: A model of timm or transformers, in place.
        device: The device of this process.

    Raises:
        ModelError: If the backbone has no stack of blocks.
    """

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        stacks = sharded_stacks(backbone)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        kept = {p for p in backbone.parameters() if p.requires_grad}
        for layer in adapted_layers(backbone).values():  # a frozen factor too
            kept |= set(layer.adapters.parameters())
        passes: dict[nn.Module, list[nn.Module]] = {}  # a module may call several stacks in one forward pass
        for stack in stacks:
            passes.setdefault(stack.owner, []).extend(stack.blocks)
            for block in stack.blocks:
                fully_shard(block, mesh=mesh, ignored_params=kept)
        for number, owner in enumerate(passes):
            # without weights of its own, the blocks' common root: it lets them gather ahead of one another
            fully_shard(owner, mesh=mesh, ignored_params=set(owner.parameters()))
            owner.register_forward_pre_hook(partial(self._announce, number))
        self._passes = [[cast(FSDPModule, block) for block in blocks] for blocks in passes.values()]
        self._device = device

    def _announce(self, own: int, *_: object) -> None:
        if torch.is_grad_enabled():
            return
        while (chosen := self._agree(own)) is not None and chosen != own:
            self._gather(chosen)

    def _agree(self, own: int | None) -> int | None:
        """Return the number of the next forward pass among those that processes announce; None if none does."""
        announced = torch.zeros(len(self._passes), device=self._device)
        if own is not None:
            announced[own] = 1
        dist.all_reduce(announced)
        wanted = announced.nonzero().flatten().tolist()
        return wanted[0] if wanted else None

    def _gather(self, number: int) -> None:
        """Gather and release the blocks of a forward pass that other processes compute."""
        for block in self._passes[number]:
            block.unshard()
            block.reshard()

    def after_batch(self, trainer: L.Trainer, batch: int, loader: int) -> None:
        """Gather along with the processes that have more batches, behind the last batch that this process evaluates.

        Args:
            trainer: The trainer, which is validating, testing or predicting.
            batch: Number of the batch in its loader.
            loader: Number of the loader.
        """
        if trainer.predicting:
            counts = trainer.num_predict_batches
        elif trainer.testing:
            counts = trainer.num_test_batches
        else:
            counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        if any(counts[loader + 1 :]) or batch + 1 < counts[loader]:
            return
        while (chosen := self._agree(None)) is not None:
            self._gather(chosen)


def sharded_stacks(backbone: nn.Module) -> list[Stack]:
    """Return the stacks whose blocks are divided.

    Raises:
        ModelError: If there are none, or if blocks are left out at random.
    """
    for key, share in layerdrop_rates(backbone).items():
        raise ModelError(
            f"model.shard_frozen: with model.backbone_args.{key}: {share} the processes would leave out different "
            "blocks and wait for one another; set it to 0."
        )
    stacks = block_stacks(backbone)
    if not stacks:
        raise ModelError(
            f"model.shard_frozen: {type(backbone).__name__} has no stack of blocks to divide; set it to false."
        )
    return stacks
