"""Which sample comes when, for any number of processes and from any position on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.base import ResumableDataModule
from datamodules.batching import Draw, EpochSampler, seeded


def sampler(size: int, world: int = 1, rank: int = 0, seed: int = 0, epoch: int = 0) -> EpochSampler:
    made = EpochSampler(range(size), world, rank, seed)
    made.set_epoch(epoch)
    return made


def order(size: int, seed: int, epoch: int) -> list[int]:
    return [index for index, _ in sampler(size, seed=seed, epoch=epoch)]


def whole_batches(draws: list[Draw], size: int) -> list[list[Draw]]:
    return [draws[i : i + size] for i in range(0, len(draws) - size + 1, size)]


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    ("size", "world", "batch"), [(24, 2, 3), (24, 4, 6), (25, 2, 3), (29, 3, 2), (31, 4, 3), (17, 5, 3), (40, 8, 1)]
)
def test_processes_share_each_batch_that_one_process_would_see(size: int, world: int, batch: int, epoch: int) -> None:
    one = whole_batches(list(sampler(size, seed=7, epoch=epoch)), world * batch)
    ranks = [whole_batches(list(sampler(size, world, r, 7, epoch)), batch) for r in range(world)]
    assert {len(batches) for batches in ranks} == {len(one)}  # as many steps
    for k, expected in enumerate(one):
        shares = [draw for batches in ranks for draw in batches[k]]
        assert len(set(shares)) == world * batch
        assert set(shares) == set(expected)


@pytest.mark.parametrize(("size", "world"), [(24, 1), (24, 4), (25, 4), (27, 4), (3, 3)])
def test_nothing_twice_and_fewer_than_one_round_left_out(size: int, world: int) -> None:
    shares = [list(sampler(size, world, rank)) for rank in range(world)]
    assert {len(share) for share in shares} == {size // world} == {len(sampler(size, world))}
    indices = [index for share in shares for index, _ in share]
    assert len(set(indices)) == len(indices) == size - size % world
    assert set(indices) <= set(range(size))


@pytest.mark.parametrize("epoch", [0, 1, 9])
def test_draws_carry_their_epoch(epoch: int) -> None:
    assert {drawn for _, drawn in sampler(11, 2, 1, epoch=epoch)} == {epoch}


# --------------------------------------------------------------------------------------------------------------- order


def test_order_is_shuffled_and_a_function_of_seed_and_epoch() -> None:
    assert order(30, 1, 2) == order(30, 1, 2)
    assert order(30, 1, 2) != list(range(30))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert order(30, 1, 2) == order(30, 1, 2)
    torch.set_rng_state(state)
    order(30, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_order_each_epoch_and_each_seed() -> None:
    assert len({tuple(order(30, 0, epoch)) for epoch in range(6)}) == 6
    assert len({tuple(order(30, seed, 0)) for seed in range(6)}) == 6


@pytest.mark.xfail(strict=True, reason="torch seeds with seed + epoch: seed 0 in epoch 1 is seed 1 in epoch 0")
def test_no_order_comes_back_under_another_seed() -> None:
    assert len({tuple(order(30, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("size", "world", "rank"), [(9, 1, 0), (19, 2, 1)])
def test_resume_from_any_position_gives_the_draws_that_remain(size: int, world: int, rank: int) -> None:
    whole = list(sampler(size, world, rank, seed=4, epoch=2))
    for position in range(1, len(whole)):
        first = sampler(size, world, rank, seed=4, epoch=2)
        draws = iter(first)
        assert list(islice(draws, position)) == whole[:position]
        state = first.state_dict()
        resumed = sampler(size, world, rank, seed=0, epoch=0)  # seed and epoch are part of the position
        resumed.load_state_dict(state)
        assert list(resumed) == whole[position:]
        assert list(resumed) == whole  # only the first iterator starts there
        assert list(draws) == whole[position:]  # asking for the state disturbed nothing


def test_a_resumed_position_goes_on_counting() -> None:
    first = sampler(10, seed=4)
    list(islice(first, 3))
    second = sampler(10)
    second.load_state_dict(first.state_dict())
    list(islice(second, 4))
    third = sampler(10)
    third.load_state_dict(second.state_dict())
    assert list(third) == list(sampler(10, seed=4))[7:]


def test_end_of_an_epoch_starts_afresh() -> None:
    first = sampler(10, 3, 1, seed=5, epoch=1)
    whole = list(first)
    resumed = sampler(10, 3, 1)
    resumed.load_state_dict(first.state_dict())
    assert list(resumed) == whole
    resumed.load_state_dict(first.state_dict())
    resumed.set_epoch(2)  # as Lightning does before the next epoch
    assert list(resumed) == list(sampler(10, 3, 1, seed=5, epoch=2))


def test_state_goes_through_a_checkpoint() -> None:
    first = sampler(10, seed=2**40, epoch=3)
    list(islice(first, 6))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded == {"yielded": 6, "epoch": 3, "seed": 2**40}
    resumed = sampler(10)
    resumed.load_state_dict(loaded)
    assert next(iter(resumed)) == list(sampler(10, seed=2**40, epoch=3))[6]
    assert resumed.state_dict() == {**loaded, "yielded": 7}


# ------------------------------------------------------------------------------------------------------------- loaders


class Keys(Dataset[list[int]]):
    """Gives back what it is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | Draw) -> list[int]:
        return list(key) if isinstance(key, tuple) else [key]


def module(batch: int = 3, workers: int = 0, world: int = 1) -> ResumableDataModule:
    made = ResumableDataModule(batch, workers)
    made.trainer = SimpleNamespace(world_size=world, global_rank=world - 1)  # type: ignore[assignment]
    return made


def batches(loader: StatefulDataLoader, begun: int = 0, epochs: int = 2) -> Iterator[list[list[int]]]:
    """What Lightning takes from batch `begun` on.

    It makes its first iterator before it tells the sampler the epoch, and stops at the length without looking on.
    """
    first, done = divmod(begun, len(loader))
    iterator = iter(loader)
    for epoch in range(first, epochs):
        loader.sampler.set_epoch(epoch)
        if epoch > first:
            iterator, done = iter(loader), 0
        for batch in islice(iterator, len(loader) - done):
            yield torch.stack(batch).tolist()


def continued(size: int, taken: int, before: ResumableDataModule, behind: ResumableDataModule) -> list[list[list[int]]]:
    """Batches of a loader that continues behind `taken` batches of another."""
    list(islice(batches(before.train_loader(Keys(size), seed=8)), taken))
    behind.load_state_dict(before.state_dict())
    return list(batches(behind.train_loader(Keys(size), seed=8), taken))


INCOMPLETE = "batching.py, load_state_dict: an end of epoch with an incomplete batch left over is taken for its middle"
AHEAD = "batching.py, load_state_dict: at an epoch's end workers load ahead before Lightning says that a new one begins"
KINDS = "torchdata's states with and without workers are of two kinds"


def defect(*values: int, reason: str) -> object:
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))


@pytest.mark.parametrize(
    ("size", "world", "taken", "workers"),
    [
        (12, 1, 1, 0),
        (12, 1, 3, 0),
        (14, 1, 2, 0),
        (14, 2, 1, 0),
        (12, 1, 6, 0),
        (12, 1, 4, 0),  # the first epoch's end
        defect(14, 1, 4, 0, reason=INCOMPLETE),
        defect(16, 2, 2, 0, reason=INCOMPLETE),
        (12, 1, 3, 1),
        defect(12, 1, 4, 1, reason=AHEAD),
    ],
)
def test_training_loader_continues_where_the_state_was_taken(size: int, world: int, taken: int, workers: int) -> None:
    whole = list(batches(module(world=world).train_loader(Keys(size), seed=8)))
    assert len(whole) == 2 * (size // world // 3)
    rest = continued(size, taken, module(workers=workers, world=world), module(workers=workers, world=world))
    assert rest == whole[taken:]


@pytest.mark.xfail(strict=True, raises=AssertionError, reason=KINDS)
@pytest.mark.parametrize(("before", "behind"), [(0, 1), (1, 0)])
def test_training_loader_continues_with_other_workers(before: int, behind: int) -> None:
    whole = list(batches(module().train_loader(Keys(12), seed=8)))
    assert continued(12, 2, module(workers=before), module(workers=behind)) == whole[2:]


def test_loading_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    assert len(list(module().train_loader(Keys(12), seed=8))) == 4
    assert len(list(module(5).evaluation_loader(Keys(12)))) == 3
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------------------------- seeded


def draw(*keys: int) -> list[float]:
    with seeded(*keys):
        return torch.rand(3).tolist()


def test_seeded_draws_are_a_function_of_the_keys_alone() -> None:
    expected = draw(1, 2, 3)
    torch.manual_seed(123)
    torch.rand(17)
    assert draw(1, 2, 3) == expected
    others = [draw(*keys) for keys in [(1, 2, 4), (1, 3, 3), (2, 2, 3), (2, 1, 3), (3, 2, 1), (1, 2)]]
    assert len({tuple(values) for values in [expected, *others]}) == 7


def test_seeded_accepts_any_seed_of_torch() -> None:
    assert draw(2**64 - 1, 0, 5) != draw(2**63, 0, 5)


def test_seeded_gives_the_global_state_back() -> None:
    torch.rand(5)
    state = torch.get_rng_state()
    expected = torch.rand(4)
    torch.set_rng_state(state)
    with seeded(1, 2):
        torch.rand(100)
        torch.randperm(9)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(4), expected)


def test_seeded_gives_the_global_state_back_behind_an_exception() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="inside"), seeded(1):
        torch.rand(8)
        raise KeyError("inside")
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_nests() -> None:
    with seeded(1):
        expected = torch.rand(4)
    with seeded(1):
        first = torch.rand(2)
        with seeded(2):
            torch.rand(50)
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), expected)
