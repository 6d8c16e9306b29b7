from __future__ import annotations

import pytest
import torch

from datamodules.loading.batching import PartSampler

ROWS = torch.tensor([3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377])
LENGTHS = torch.arange(400) % 17


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_parts_draw_the_batches_of_an_uncut_training(lengths: torch.Tensor | None) -> None:
    def draws(first: int, batches: int) -> list[tuple[int, int]]:
        sampler = PartSampler(ROWS, first, batches, batch_size=2, seed=1, lengths=lengths)
        assert len(sampler) == 2 * batches
        return list(sampler)

    uncut = draws(0, 17)  # An epoch has 5 batches.
    assert [d for first, batches in ((0, 3), (3, 3), (6, 11)) for d in draws(first, batches)] == uncut
    epochs = [{index for index, _ in uncut[10 * epoch : 10 * epoch + 10]} for epoch in range(3)]
    assert all(len(epoch) == 10 and epoch <= set(ROWS.tolist()) for epoch in epochs)
    assert len({seed for _, seed in uncut}) == 4  # Each epoch has other seeds of augmentation.
