"""Sharding of frozen weights among processes. Trained parameters are not sharded, and DDP averages their gradients.

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP") stores a shard of each block on every process. FSDP2
gathers a block for its forward pass and again for its backward pass, and then frees the other shards. Embeddings and
output layer are not sharded, since these layers are small and often tied.
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
    """Shard a model's frozen blocks among the trainer's processes, in place, before the model moves to its device.

    Args:
        module: The whole model.
        backbone: The backbone of the model, with frozen blocks.
        fingerprint: Fingerprint of the frozen weights.
        trainer: The trainer.

    Returns:
        The shards; None if there is only one process.

    Raises:
        ModelError: If the strategy is not DDP, adapters are merged, the backbone has no stack of blocks or drops blocks
            at random, or the processes have loaded different weights.
    """
    if trainer.world_size == 1:
        return None
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ModelError(
            f"model.shard_frozen: true needs --trainer.strategy ddp, not {type(trainer.strategy).__name__}, since DDP "
            "averages the gradients of the trained parameters."
        )
    if any(layer.merged for layer in adapted_layers(backbone).values()):
        raise ModelError("model.shard_frozen: the adapters are merged into the weights. Unmerge the adapters first.")
    fingerprints: list[str] = [""] * trainer.world_size
    dist.all_gather_object(fingerprints, fingerprint)
    if len(set(fingerprints)) > 1:
        raise ModelError(
            "model.shard_frozen: the processes have loaded different weights. Use the same model.backbone on all "
            "processes. With model.weights: none, also use the same seed_everything."
        )
    shards = FrozenShards(backbone, trainer.strategy.root_device)
    names = [n for n, p in module.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return shards


class FrozenShards:
    """Blocks of a backbone whose frozen weights are sharded among all processes.

    A forward pass gathers weights from all processes, so all processes must run the same number of forward passes.
    Training satisfies this condition. In evaluation, a process can have more batches than its peers, or generate a
    longer text.

    Therefore a process announces each forward pass without gradients to all peers. If the processes announce different
    passes, the first pass in the backbone's order runs. For instance, one process may still decode while its peer
    encodes the next batch. A process that has not announced this pass takes part in gathering without computing, and
    then announces its own pass again. A process without batches takes part in gathering until no process announces a
    pass.

    Args:
        backbone: A model of timm or transformers, sharded in place.
        device: The device of this process.

    Raises:
        ModelError: If the backbone has no stack of blocks, or drops blocks at random.
    """

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        stacks = sharded_stacks(backbone)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        unsharded = {p for p in backbone.parameters() if p.requires_grad}
        for layer in adapted_layers(backbone).values():  # Frozen factors are not sharded either.
            unsharded |= set(layer.adapters.parameters())
        passes: dict[nn.Module, list[nn.Module]] = {}  # A module may call several stacks in one forward pass.
        for stack in stacks:
            passes.setdefault(stack.owner, []).extend(stack.blocks)
            for block in stack.blocks:
                fully_shard(block, mesh=mesh, ignored_params=unsharded)
        for number, owner in enumerate(passes):
            # A common root without weights lets FSDP2 prefetch the next block.
            fully_shard(owner, mesh=mesh, ignored_params=set(owner.parameters()))
            owner.register_forward_pre_hook(partial(self._announce, number))
        self._passes = [[cast(FSDPModule, block) for block in blocks] for blocks in passes.values()]
        self._device = device

    def _announce(self, number: int, *_: object) -> None:
        if torch.is_grad_enabled():
            return
        while (chosen := self._agree(number)) is not None and chosen != number:
            self._gather(chosen)

    def _agree(self, number: int | None) -> int | None:
        """Announce a forward pass by number, and return the first announced pass; None if there is none."""
        announced = torch.zeros(len(self._passes), device=self._device)
        if number is not None:
            announced[number] = 1
        dist.all_reduce(announced)
        numbers = announced.nonzero().flatten().tolist()
        return numbers[0] if numbers else None

    def _gather(self, number: int) -> None:
        """Take part in gathering the blocks of a forward pass that peers compute."""
        for block in self._passes[number]:
            block.unshard()
            block.reshard()

    def after_batch(self, trainer: L.Trainer, batch: int, loader: int) -> None:
        """Take part in gathering for peers that have more batches, after the last batch of this process.

        Args:
            trainer: The trainer, in validation, test or prediction.
            batch: Index of the batch in its loader.
            loader: Index of the loader.
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
    """Return the stacks whose blocks are sharded.

    Raises:
        ModelError: If the backbone has no stack of blocks, or drops blocks at random.
    """
    for key, rate in layerdrop_rates(backbone).items():
        raise ModelError(
            f"model.shard_frozen: with model.backbone_args.{key}: {rate} the processes would drop different blocks and "
            f"wait forever. Set {key} to 0."
        )
    stacks = block_stacks(backbone)
    if not stacks:
        raise ModelError(
            f"model.shard_frozen: {type(backbone).__name__} has no stack of blocks to shard. Set the key to false."
        )
    return stacks
