"""Which sample comes when: the same order for any number of processes, and from any batch on."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

Draw = tuple[int, int]  # (index of the sample, epoch)


class EpochSampler(StatefulDistributedSampler):
    """Shuffled (index, epoch) pairs of one process.

    The order is a function of (seed, epoch): the k-th batches of all processes together are the k-th batch of one
    process with a batch as large as theirs. The epoch goes along to the data set, whose augmentation is a function of
    (seed, epoch, index), so that it too is the same for any number of processes and workers.

    Args:
        data: What is sampled; only its length counts.
        num_replicas: Number of processes.
        rank: This process.
        seed: Seed of the order.
    """

    def __init__(self, data: Sized, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(data, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[Draw]:
        for index in super().__iter__():
            yield index, self.epoch

    def state_dict(self) -> dict[str, Any]:
        """Position in the order, with what the order depends on."""
        return {**super().state_dict(), "epoch": self.epoch, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position; the next iterator starts there, or afresh if the position is the end of an epoch."""
        at_end = state_dict["yielded"] >= self.num_samples
        super().load_state_dict({**state_dict, "yielded": 0} if at_end else state_dict)
        self.epoch, self.seed = state_dict["epoch"], state_dict["seed"]


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Draw from torch's global CPU generator as a function of the keys; its state before comes back at the end.

    For transforms that take no generator of their own. A `torch.random.fork_rng` would also visit every accelerator, at
    15 times the cost of this.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(hash(keys))  # of a tuple of int: the same in every process
    try:
        yield
    finally:
        generator.set_state(state)
