from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules.loading.partition import dirichlet_partition, iid_partition

LABELS = torch.arange(5).repeat_interleave(torch.tensor([400, 300, 200, 90, 13]))
SIZE = len(LABELS)


def split(alpha: float | None, clients: int = 8, seed: int = 0) -> list[Tensor]:
    return iid_partition(SIZE, clients, seed) if alpha is None else dirichlet_partition(LABELS, clients, alpha, seed)


@pytest.mark.parametrize("alpha", [None, 1e-9, 0.3, 100.0])
@pytest.mark.parametrize("clients", [1, 7, 8, SIZE])
def test_every_row_has_one_client_and_sizes_differ_by_one_at_most(alpha: float | None, clients: int) -> None:
    parts = split(alpha, clients)
    assert torch.cat(parts).sort().values.equal(torch.arange(SIZE))
    assert len(parts) == clients
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.equal(part.sort().values) for part in parts)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_seed_alone_decides(alpha: float | None) -> None:
    first, again, other = (split(alpha, seed=seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not all(a.equal(b) for a, b in zip(first, other, strict=True))


def test_alpha_decides_how_far_the_mixes_are_from_the_mix_of_all_rows() -> None:
    prior = LABELS.bincount() / SIZE

    def distance(alpha: float) -> float:
        """Return the mean total variation from the mix of all rows."""
        mixes = [LABELS[part].bincount(minlength=5) / len(part) for part in split(alpha)]
        return sum(float((mix - prior).abs().sum() / 2) for mix in mixes) / len(mixes)

    distances = [distance(alpha) for alpha in (0.1, 1.0, 10.0, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5
    assert distances[-1] < 0.1


def test_a_tiny_alpha_gives_the_first_client_one_class() -> None:
    first, *_ = dirichlet_partition(LABELS, 16, 1e-9, 0)
    assert len(LABELS[first].unique()) == 1


def test_labels_need_not_be_consecutive() -> None:
    labels = torch.tensor([7, 7, -1, -1, 3, 3])
    assert torch.cat(dirichlet_partition(labels, 2, 0.5, 0)).sort().values.tolist() == [0, 1, 2, 3, 4, 5]
