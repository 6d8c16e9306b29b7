"""Order of samples: the same for any number of ranks, and resumable from any position."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules import base
from datamodules.base import ResumableDataModule
from datamodules.loading.batching import ORDER, Draw, EpochSampler, derive_seed, seeded
from tests.support.refusals import refuses
from tests.support.trainers import stub_trainer


def skewed(size: int, seed: int = 0) -> Tensor:
    """Return log-normal lengths from 4 to 512: many short texts and few long ones."""
    normal = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return (40 * (0.8 * normal).exp()).round().clamp(4, 512).int()


def sampler(
    size: int,
    world: int = 1,
    rank: int = 0,
    batch: int = 1,
    *,
    seed: int = 0,
    epoch: int = 0,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> EpochSampler:
    sampler_of_epoch = EpochSampler(size, world, rank, batch, seed, lengths, labels)
    sampler_of_epoch.set_epoch(epoch)
    return sampler_of_epoch


def mixed(size: int, by: str) -> dict[str, Tensor]:
    """Return the lengths and labels that determine an order."""
    classes = (skewed(size, 1) % 3).long()
    return {
        "chance": {},
        "length": {"lengths": skewed(size)},
        "one length": {"lengths": torch.full((size,), 7, dtype=torch.int32)},
        "length and class": {"lengths": skewed(size) + 100 * classes.int(), "labels": classes},
        "length and score": {"lengths": skewed(size), "labels": skewed(size).double()},
    }[by]


ORDERS = ("chance", "length", "one length", "length and class", "length and score")


def order(size: int, **keys: Any) -> list[int]:
    return [index for index, _ in sampler(size, **keys)]


def in_batches(draws: list[Draw], size: int) -> list[list[Draw]]:
    assert len(draws) % size == 0
    return [draws[i : i + size] for i in range(0, len(draws), size)]


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize(
    ("size", "world", "batch"),
    [(24, 1, 1), (24, 2, 3), (25, 2, 3), (29, 3, 2), (31, 4, 3), (40, 8, 1), (3, 3, 1), (1003, 2, 3), (450, 3, 1)],
)
def test_ranks_share_each_batch_of_a_single_process(size: int, world: int, batch: int, by: str) -> None:
    keys: dict[str, Any] = {"seed": 7, "epoch": 2, **mixed(size, by)}
    one = in_batches(list(sampler(size, batch=world * batch, **keys)), world * batch)
    ranks = [in_batches(list(sampler(size, world, rank, batch, **keys)), batch) for rank in range(world)]
    # equally many batches on each rank
    assert {len(batches) for batches in ranks} == {len(one)} == {size // (world * batch)}
    assert len(sampler(size, world, 0, batch, **keys)) == len(one) * batch
    for k, expected in enumerate(one):
        assert sorted(draw for batches in ranks for draw in batches[k]) == sorted(expected)
    indices = [index for batch in one for index, _ in batch]
    assert len(set(indices)) == len(indices)  # no sample is repeated
    assert set(indices) <= set(range(size))


@pytest.mark.parametrize("by", ORDERS)
def test_order_is_a_function_of_seed_and_epoch(by: str) -> None:
    columns: dict[str, Any] = mixed(400, by)
    expected = order(400, batch=4, seed=1, epoch=2, **columns)
    assert sorted(expected) == list(range(400)) != expected
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert order(400, batch=4, seed=1, epoch=2, **columns) == expected
    assert torch.equal(torch.get_rng_state(), state)
    # `seed + epoch` would give seed 0 in epoch 1 the same order as seed 1 in epoch 0
    keys = [{"seed": seed, "epoch": epoch} for seed in (*range(4), 2**63, 2**64 - 1) for epoch in range(4)]
    assert len({tuple(order(400, batch=4, **columns, **each)) for each in keys}) == 24


def test_draws_of_an_epoch_have_its_seed() -> None:
    def carried(**keys: int) -> set[int]:
        return {seed for rank in range(2) for _, seed in sampler(11, 2, rank, **keys)}

    seeds = [carried(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
    assert {len(each) for each in seeds} == {1}  # the same seed on both ranks
    assert len(set.union(*seeds)) == 16
    assert carried(seed=2, epoch=3) == carried(seed=2, epoch=3, batch=2)


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize(
    ("size", "world", "rank", "batch"), [(9, 1, 0, 1), (19, 2, 1, 1), (33, 1, 0, 4), (131, 2, 1, 3), (600, 2, 0, 2)]
)
def test_resume_from_any_position_gives_the_remaining_draws(
    size: int, world: int, rank: int, batch: int, by: str
) -> None:
    keys: dict[str, Any] = {"seed": 4, **mixed(size, by)}
    all_draws = list(sampler(size, world, rank, batch, epoch=2, **keys))
    for position in range(0, len(all_draws) // batch, 1 + size // 100):
        resumed = sampler(size, world, rank, batch, **keys)
        resumed.seek(2, position)
        assert len(resumed) == len(all_draws)  # Lightning expects the length of the complete epoch
        assert list(resumed) == all_draws[position * batch :]
        assert list(resumed) == all_draws  # the next iterator has the complete epoch
    resumed.seek(1, len(all_draws) // batch)  # the end of epoch 1 is the start of epoch 2
    assert list(resumed) == all_draws
    resumed.seek(1, 1)
    first = list(resumed)
    resumed.set_epoch(2)  # Lightning calls `set_epoch` after the sampler's iterator was made
    assert list(resumed) == all_draws != first


# -------------------------------------------------------------------------------------------------------------- length


def lengths_of(draws: EpochSampler, lengths: Tensor) -> Tensor:
    """Return the lengths of each batch, (batches, batch)."""
    return lengths[[index for index, _ in draws]].view(-1, draws.batch_size)


def padding_share(batches: Tensor) -> float:
    """Return the share of padding in batches that are padded to their longest sample."""
    return 1 - float(batches.sum() / (batches.amax(1) * batches.shape[1]).sum())


def test_buckets_have_little_padding_and_drop_samples_regardless_of_length() -> None:
    lengths = skewed(4000)
    plain = padding_share(lengths_of(sampler(4000, batch=16), lengths))
    assert plain > 0.5
    assert padding_share(lengths_of(sampler(4000, batch=16, lengths=lengths), lengths)) < 0.2 * plain
    for epoch in (0, 3):
        chosen = set(order(103, batch=4, epoch=epoch, lengths=skewed(103)))
        assert chosen == set(order(103, batch=4, epoch=epoch))  # the same samples are dropped with and without lengths


def test_ranks_get_batches_of_similar_length_at_each_step() -> None:
    lengths = skewed(1000)
    first, second = (
        lengths_of(sampler(1000, 2, rank, 8, lengths=lengths), lengths).amax(1).float() for rank in range(2)
    )
    assert (first - second).abs().mean() < 0.1 * first.mean()


def test_batches_are_composed_differently_in_each_epoch() -> None:
    lengths = skewed(2000)
    company = [
        {frozenset(index for index, _ in batch) for batch in in_batches(list(draws), 4)}
        for draws in (sampler(2000, batch=4, epoch=epoch, lengths=lengths) for epoch in range(2))
    ]
    assert len(company[0] & company[1]) < 0.05 * len(company[0])


def test_buckets_are_not_sorted_by_length() -> None:
    lengths = skewed(4000)
    means = lengths_of(sampler(4000, batch=8, lengths=lengths), lengths).float().mean(1)  # 500 batches
    ranks = means.argsort().argsort().float()
    time = torch.arange(len(ranks)).float()
    assert abs(float(torch.corrcoef(torch.stack([ranks, time]))[0, 1])) < 0.15  # 3.4 standard deviations by chance
    neighbours = torch.stack([ranks[1:], ranks[:-1]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.15


# ------------------------------------------------------------------------------------------------------------- loaders


class Keys(Dataset[list[int]]):
    """A data set whose item is the key itself."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | Draw) -> list[int]:
        return list(key) if isinstance(key, tuple) else [key]


def module(batch: int = 3, workers: int = 0, world: int = 1, rank: int = 0, **keys: Any) -> ResumableDataModule:
    data = ResumableDataModule(batch, workers)
    data.trainer = stub_trainer(world, rank, **keys)
    return data


def batches(loader: DataLoader[Any], begun: int = 0, epochs: int = 3) -> Iterator[list[Draw]]:
    """Yield the batches that Lightning takes, from batch number `begun` on.

    Lightning creates its first iterator before it sets the sampler's epoch. It stops after `len(loader)` batches.
    """
    first, done = divmod(begun, len(loader))
    iterator = iter(loader)
    for epoch in range(first, epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        if epoch > first:
            iterator, done = iter(loader), 0
        for indices, seeds in islice(iterator, len(loader) - done):
            yield list(zip(indices.tolist(), seeds.tolist(), strict=True))


def stopped(size: int, taken: int, **keys: Any) -> dict[str, Any]:
    """Return the state of a data module after `taken` batches.

    After the last batch of an epoch, the epoch counter of Lightning still has the number of this epoch.
    """
    data = module(**keys)
    length = len(data.train_loader(Keys(size)))
    epoch, done = divmod(taken, length)
    if taken and done == 0:
        epoch, done = epoch - 1, length
    world, rank = data.trainer.world_size, data.trainer.global_rank  # type: ignore[union-attr]
    data.trainer = stub_trainer(world, rank, epoch=epoch, batches_done=done, epoch_batches=length)
    return data.state_dict()


def restored(state: dict[str, Any], **keys: Any) -> ResumableDataModule:
    """Return a new data module with this state, under another global seed."""
    torch.manual_seed(12345)
    data = module(**keys)
    data.load_state_dict(state)
    return data


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("size", "world"), [(12, 1), (14, 1), (14, 2), (17, 2), (40, 1)])
def test_training_loader_continues_at_the_saved_position(size: int, world: int, by_length: bool) -> None:
    keys, lengths = {"world": world, "rank": world - 1}, skewed(size) if by_length else None
    torch.manual_seed(8)
    whole = list(batches(module(**keys).train_loader(Keys(size), lengths)))
    assert len(whole) == 3 * (size // (world * 3))
    for taken in range(0, len(whole), 1 + size // 20):
        torch.manual_seed(8)
        state = stopped(size, taken, **keys)
        assert list(batches(restored(state, **keys).train_loader(Keys(size), lengths), taken)) == whole[taken:]


@pytest.mark.parametrize("taken", [0, 1, 4, 6])  # start, middle and end of the first epoch, and middle of the second
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (2, 2)])
def test_workers_change_neither_order_nor_position(before: int, after: int, taken: int) -> None:
    torch.manual_seed(8)
    whole = list(batches(module().train_loader(Keys(14)), epochs=2))
    torch.manual_seed(8)
    state = stopped(14, taken, workers=before)
    assert list(batches(restored(state, workers=after).train_loader(Keys(14)), taken, epochs=2)) == whole[taken:]


@pytest.mark.parametrize(
    ("batch", "world", "step"),
    [(2, 1, 6), (4, 1, 3), (6, 1, 2), (3, 2, 2), (1, 4, 3), (5, 1, 2), (12, 1, 1), (24, 1, 0)],  # 12 samples were taken
)
def test_another_batch_size_continues_after_the_same_samples(batch: int, world: int, step: int) -> None:
    torch.manual_seed(8)
    state = stopped(24, 8 + 4, batch=3)
    torch.manual_seed(8)
    whole = module(batch, world=world).train_loader(Keys(24))
    expected = list(batches(whole, epochs=2))[len(whole) + step :]
    loader = restored(state, batch=batch, world=world).train_loader(Keys(24))
    assert list(batches(loader, len(loader) + step, epochs=2)) == expected


def test_a_position_after_the_last_full_batch_starts_the_next_epoch() -> None:
    torch.manual_seed(8)
    state = stopped(25, 24, batch=1)  # 24 of 25 samples: batches of 8 take no more
    following = list(batches(restored(state, batch=8).train_loader(Keys(25)), 2, epochs=2))
    torch.manual_seed(8)
    assert following == list(batches(module(8).train_loader(Keys(25)), epochs=2))[2:]


def test_a_state_survives_a_checkpoint_and_shortens_one_loader() -> None:
    torch.manual_seed(2**40)
    buffer = io.BytesIO()
    torch.save(stopped(12, 6), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state == {"epoch": 1, "samples": 6, "seed": 2**40, "order": ORDER}
    data = restored(state)
    assert [len(list(data.train_loader(Keys(12)))) for _ in range(2)] == [2, 4]


@pytest.mark.parametrize(("taken", "order", "warns"), [(6, 1, True), (6, ORDER, False), (12, 1, False)])
def test_a_position_in_an_epoch_of_another_order_is_warned_about(
    taken: int, order: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(8)
    state = stopped(12, taken // 3)
    state.pop("order")
    whole = list(batches(module().train_loader(Keys(12)), epochs=2))
    data = restored(state if order == 1 else {**state, "order": order})
    assert caplog.text == ""  # the warning waits for a training loader
    assert list(batches(data.train_loader(Keys(12)), taken // 3, epochs=2)) == whole[taken // 3 :]
    assert ("some samples come twice and others not at all" in caplog.text) is warns


@pytest.mark.parametrize(("done", "expected"), [(0, (2, 0)), (3, (2, 18)), (4, (3, 0))])
def test_state_counts_the_samples_of_all_ranks(done: int, expected: tuple[int, int]) -> None:
    state = module(3, world=2, epoch=2, batches_done=done, epoch_batches=4).state_dict()
    assert (state["epoch"], state["samples"]) == expected


def test_rank_0_broadcasts_the_seed_of_the_order() -> None:
    ranks = []
    for rank in range(2):
        torch.manual_seed(rank)
        strategy = SimpleNamespace(broadcast=lambda _: 77, root_device=torch.device("cpu"))
        ranks.append(list(batches(module(world=2, rank=rank, strategy=strategy).train_loader(Keys(12)), epochs=1)))
    torch.manual_seed(77)
    one = list(batches(module(6).train_loader(Keys(12)), epochs=1))
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == [set(batch) for batch in one]


def test_training_loader_with_lengths_has_batches_of_similar_length() -> None:
    lengths = torch.arange(30, dtype=torch.int32)[torch.randperm(30)]
    for batch in batches(module().train_loader(Keys(30), lengths), epochs=2):
        batch_lengths = sorted(lengths[[index for index, _ in batch]].tolist())
        assert batch_lengths == list(range(batch_lengths[0], batch_lengths[0] + 3))


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("size", "world"), [(40, 1), (41, 2), (13, 3), (12, 2), (2, 1), (3, 3)])
def test_evaluation_takes_every_sample_once_in_order_or_by_length(size: int, world: int, workers: int) -> None:
    lengths = skewed(size)
    longest = sorted(range(size), key=lambda index: -int(lengths[index]))
    shares = []
    for rank in range(world):
        data = module(workers=workers, world=world, rank=rank)
        plain = [int(index) for (indices,) in data.evaluation_loader(Keys(size)) for index in indices]
        assert plain == list(range(rank, size, world))
        batches_shown = [indices.tolist() for (indices,) in data.evaluation_loader(Keys(size), lengths)]
        shares.append([index for batch in batches_shown for index in batch])
        first, *others = (longest[rank::world][i : i + 3] for i in range(0, len(shares[-1]), 3))
        assert batches_shown[0] == first  # the longest samples come first, so that a lack of memory shows at once
        assert sorted(batches_shown[1:]) == sorted(others)  # batches of similar length
        assert all(len(batch) == 3 for batch in batches_shown[:-1])  # only the last batch may be smaller
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert max(len(share) for share in shares) - min(len(share) for share in shares) <= 1


def test_evaluation_with_lengths_has_a_fixed_shuffled_order() -> None:
    orders = []
    for seed in range(2):
        torch.manual_seed(seed)
        loader = module().evaluation_loader(Keys(62), torch.arange(62))
        orders += [[indices.tolist() for (indices,) in loader] for _ in range(2)]
    assert orders == orders[:1] * 4
    first, *others, last = (max(batch) for batch in orders[0])
    assert (first, last) == (61, 1)
    assert sorted(others) == list(range(4, 60, 3))
    assert others not in (sorted(others), sorted(others, reverse=True))
    # samples of equal length keep their order
    loader = module().evaluation_loader(Keys(20), torch.tensor([5] * 10 + [9] * 10))
    order = [*range(10, 20), *range(10)]
    in_order = sorted(order[i : i + 3] for i in range(0, 20, 3))
    assert sorted(indices.tolist() for (indices,) in loader) == in_order


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_unchanged(workers: int) -> None:
    state = torch.get_rng_state()
    data = module(workers=workers)
    assert len(list(data.train_loader(Keys(12)))) == 4
    assert [len(list(data.evaluation_loader(Keys(13), lengths))) for lengths in (None, skewed(13))] == [5, 5]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_collate_function_makes_the_batches() -> None:
    def collate(rows: list[list[int]]) -> str:
        return "-".join(str(row[0]) for row in rows)

    data = module()
    assert list(data.evaluation_loader(Keys(7), collate=collate)) == ["0-1-2", "3-4-5", "6"]
    assert [len(batch.split("-")) for batch in data.train_loader(Keys(7), collate=collate)] == [3, 3]


@pytest.mark.parametrize(("rank", "expected"), [(0, ["own", "beat", "wait", "wait"]), (1, ["wait", "wait", "own"])])
@pytest.mark.parametrize("fails", [False, True])
def test_local_rank_0_of_each_node_runs_first(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[str], fails: bool
) -> None:
    done: list[str] = []
    other_node_is_done = iter([False, True])  # the other node finishes at the second wait

    def all_done(own: bool) -> bool:
        done.append("wait" if own else "beat")
        return own and next(other_node_is_done)

    monkeypatch.setattr(base, "BEAT", 0.0)
    data = module(world=4, rank=2 + rank, local_rank=rank, strategy=SimpleNamespace(reduce_boolean_decision=all_done))
    with pytest.raises(KeyError) if fails else nullcontext(), data.first_process_first() as beat:
        done.append("own")
        beat()
        if fails:
            raise KeyError("an error leaves nobody waiting")
    assert done == expected


def test_impossible_loaders_and_states_are_refused() -> None:
    with refuses("2 samples to evaluate are fewer than the 3 processes"):
        module(world=3).evaluation_loader(Keys(2))
    for size, world in ((2, 1), (8, 3)):
        with refuses(f"data.batch_size: {size} training samples", f"one batch of 3 for {world} process"):
            module(world=world).train_loader(Keys(size))
    for state in ({}, {"epoch": -1, "samples": 0, "seed": 1}, {"epoch": 0, "samples": "1", "seed": 1}, None):
        with refuses("ckpt_path: the checkpoint's position in the data is damaged"):
            module().load_state_dict(state)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- seeded


def test_derived_seeds_are_reproducible_and_depend_on_each_key() -> None:
    assert derive_seed(0, 1) == 9_017_893_900_260_303_862
    # hash(-1) == hash(-2) in Python
    keys = [(0,), (-1,), (-2,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (10,), (2**64 - 1,)]
    seeds = [derive_seed(*each) for each in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def draw(*keys: int) -> list[float]:
    with seeded(*keys):
        return torch.rand(3).tolist()


def test_seeded_draws_depend_on_the_keys_alone() -> None:
    expected = draw(1, 2, 3)
    torch.manual_seed(123)
    torch.rand(17)
    assert draw(1, 2, 3) == expected
    others = [(1, 2, 4), (1, 3, 3), (2, 2, 3), (2, 1, 3), (3, 2, 1), (1, 2), (2**64 - 1, 0, 5), (2**63, 0, 5)]
    assert len({tuple(values) for values in [expected, *(draw(*keys) for keys in others)]}) == 9


def test_seeded_restores_the_global_state_and_nests() -> None:
    torch.rand(5)
    state = torch.get_rng_state()
    with seeded(1):
        expected = torch.rand(4)
    with pytest.raises(KeyError, match="inside"), seeded(1):
        first = torch.rand(2)
        with seeded(2):
            torch.randperm(50)
        second = torch.rand(2)
        raise KeyError("inside")
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(torch.get_rng_state(), state)
