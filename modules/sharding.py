"""Frozen weights divided among processes; what is trained stays whole on each, where DDP averages its gradients.

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP") keeps a share of each block of the decoder on every
process, gathers a block when it is called, in forward and again in backward, and drops the other shares behind it. What
lies around the blocks, embeddings and output layer, stays whole: it is little, often tied, and called on its own.
"""

from __future__ import annotations

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

from modules.adapters import adapted_layers
from modules.base import AdaptedModule, ModelError


def shard_frozen_weights(module: AdaptedModule) -> FrozenShards | None:
    """Divide a model's frozen blocks among the trainer's processes, in place, before the model is on its device.

    Returns:
        The shards; None if there is only one process.

    Raises:
        ModelError: If nothing is frozen, the strategy is another than DDP, adapters are merged, the backbone has not
            exactly one stack of blocks, or the processes have loaded different weights.
    """
    if module.tuning == "full":
        raise ModelError("model.shard_frozen: with tuning: full nothing is frozen; set it to false, or tune adapters.")
    trainer = module.trainer
    if trainer.world_size == 1:
        return None
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ModelError(
            f"model.shard_frozen: needs --trainer.strategy ddp, not {type(trainer.strategy).__name__}: what is trained "
            "is not sharded."
        )
    if any(layer.merged for layer in adapted_layers(module.backbone).values()):
        raise ModelError("model.shard_frozen: the adapters are merged into the weights; unmerge them before.")
    fingerprints: list[str] = [""] * trainer.world_size
    dist.all_gather_object(fingerprints, module.fingerprint)
    if len(set(fingerprints)) > 1:
        raise ModelError(
            "model.shard_frozen: the processes have loaded different weights, which would be mixed; give all the same "
            "model.backbone (and with weights: none the same seed_everything)."
        )
    shards = FrozenShards(module.backbone, trainer.strategy.root_device)
    names = [n for n, p in module.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return shards


class FrozenShards:
    """The blocks of a decoder whose frozen weights are divided among all processes.

    Every forward pass gathers from all processes, so all must have equally many. In training they have. Evaluation
    gives every sample once, so that one process may have a batch more than another, or a longer text to generate. So a
    forward pass without gradients is announced to all, and a process that is through its batches gathers along, without
    computing, until nobody announces another.

    Args:
        backbone: A decoder, in place.
        device: What this process computes on.

    Raises:
        ModelError: If it has not exactly one stack of blocks.
    """

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        owner, blocks = block_stack(backbone)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        kept = {p for p in backbone.parameters() if p.requires_grad}
        for layer in adapted_layers(backbone).values():  # a frozen factor too
            kept |= set(layer.adapters.parameters())
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=kept)
        # without weights of its own, the blocks' common root: it lets them gather ahead of one another
        fully_shard(owner, mesh=mesh, ignored_params=set(owner.parameters()))
        owner.register_forward_pre_hook(self._announce)
        self._blocks = [cast(FSDPModule, block) for block in blocks]
        self._device = device

    def _announce(self, *_: object) -> None:
        if not torch.is_grad_enabled():
            self._forward_passes(1)

    def _forward_passes(self, own: int) -> torch.Tensor:
        """How many processes are about to do a forward pass, (1,) on the device."""
        number = torch.full((1,), own, device=self._device)
        dist.all_reduce(number)
        return number

    def after_batch(self, trainer: L.Trainer, batch: int, loader: int) -> None:
        """Behind the last batch that this process evaluates, gather along with those that have more.

        Args:
            trainer: Which is validating, testing or predicting.
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
        while self._forward_passes(0).item():
            for block in self._blocks:
                block.unshard()
                block.reshard()


def block_stack(backbone: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The blocks of a decoder, and the module that calls them.

    Raises:
        ModelError: If there are none, several stacks, or blocks that are left out at random.
    """
    if layerdrop := getattr(getattr(backbone, "config", None), "layerdrop", 0.0):
        raise ModelError(
            f"model.shard_frozen: with model.backbone_args.layerdrop: {layerdrop} the processes would leave out "
            "different blocks and wait for one another; set it to 0."
        )
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    # not those within blocks, such as the experts of a mixture
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ModelError(
            f"model.shard_frozen: is for decoders, with one stack of blocks; {type(backbone).__name__} has "
            f"{len(outer)} ({', '.join(outer)}). Set it to false."
        )
    return backbone.get_submodule(outer[0].rpartition(".")[0]), lists[outer[0]]
