"""Which sample comes when, for any number of processes and from any position on."""

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
from datamodules.errors import DataError
from datamodules.loading.batching import ORDER, Draw, EpochSampler, derive_seed, seeded
from tests.datamodules.stub import stub_trainer


def sampler(size: int, world: int = 1, rank: int = 0, batch: int = 1, seed: int = 0, epoch: int = 0) -> EpochSampler:
    made = EpochSampler(size, world, rank, batch, seed)
    made.set_epoch(epoch)
    return made


def order(size: int, seed: int, epoch: int) -> list[int]:
    return [index for index, _ in sampler(size, seed=seed, epoch=epoch)]


def in_batches(draws: list[Draw], size: int) -> list[list[Draw]]:
    assert len(draws) % size == 0
    return [draws[i : i + size] for i in range(0, len(draws), size)]


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    ("size", "world", "batch"), [(24, 2, 3), (24, 4, 6), (25, 2, 3), (29, 3, 2), (31, 4, 3), (17, 5, 3), (40, 8, 1)]
)
def test_processes_share_each_batch_that_one_process_would_see(size: int, world: int, batch: int, epoch: int) -> None:
    one = in_batches(list(sampler(size, batch=world * batch, seed=7, epoch=epoch)), world * batch)
    ranks = [in_batches(list(sampler(size, world, rank, batch, 7, epoch)), batch) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(one)}  # as many steps
    for k, expected in enumerate(one):
        shares = [draw for batches in ranks for draw in batches[k]]
        assert len(set(shares)) == world * batch
        assert set(shares) == set(expected)


@pytest.mark.parametrize(("size", "world", "batch"), [(24, 1, 1), (24, 4, 3), (25, 4, 1), (27, 4, 2), (3, 3, 1)])
def test_nothing_twice_and_less_than_one_step_left_out(size: int, world: int, batch: int) -> None:
    shares = [list(sampler(size, world, rank, batch)) for rank in range(world)]
    expected = size // (world * batch) * batch
    assert {len(share) for share in shares} == {expected} == {len(sampler(size, world, 0, batch))}
    indices = [index for share in shares for index, _ in share]
    assert len(set(indices)) == len(indices) == expected * world > size - world * batch
    assert set(indices) <= set(range(size))


def test_draws_of_an_epoch_carry_its_seed() -> None:
    def carried(**keys: int) -> set[int]:
        return {seed for rank in range(2) for _, seed in sampler(11, 2, rank, **keys)}

    seeds = [carried(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
    assert {len(each) for each in seeds} == {1}  # on all processes
    assert len(set.union(*seeds)) == 16
    assert carried(seed=2, epoch=3) == carried(seed=2, epoch=3, batch=2)


# --------------------------------------------------------------------------------------------------------------- order


def test_order_is_shuffled_and_a_function_of_seed_and_epoch() -> None:
    expected = order(30, 1, 2)
    assert sorted(expected) == list(range(30)) != expected
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert order(30, 1, 2) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_another_order_each_epoch_and_each_seed() -> None:
    # seed + epoch would give seed 0 in epoch 1 the order of seed 1 in epoch 0
    assert len({tuple(order(30, seed, epoch)) for seed in range(6) for epoch in range(6)}) == 36


def test_any_seed_of_torch_will_do() -> None:
    assert order(30, 2**64 - 1, 0) != order(30, 2**63, 0)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("size", "world", "rank", "batch"), [(9, 1, 0, 1), (19, 2, 1, 1), (30, 2, 1, 3), (33, 1, 0, 4)]
)
def test_resume_from_any_position_gives_the_draws_that_remain(size: int, world: int, rank: int, batch: int) -> None:
    whole = list(sampler(size, world, rank, batch, seed=4, epoch=2))
    for position in range(len(whole) // batch):
        resumed = sampler(size, world, rank, batch, seed=4)
        resumed.seek(2, position)
        assert len(resumed) == len(whole)  # of the whole epoch, as Lightning counts
        assert list(resumed) == whole[position * batch :]
        assert list(resumed) == whole  # only the first iterator is shortened


def test_end_of_an_epoch_is_the_start_of_the_next() -> None:
    resumed = sampler(10, 3, 1, 1, seed=5)
    resumed.seek(1, 3)
    assert list(resumed) == list(sampler(10, 3, 1, 1, seed=5, epoch=2))


def test_another_epoch_may_be_chosen_behind_a_resumed_one() -> None:
    resumed = sampler(10, seed=5)
    resumed.seek(1, 4)
    assert list(resumed) == list(sampler(10, seed=5, epoch=1))[4:]
    resumed.set_epoch(2)  # as Lightning does
    assert list(resumed) == list(sampler(10, seed=5, epoch=2))


# ------------------------------------------------------------------------------------------------------------- lengths


def skewed(size: int, seed: int = 0) -> Tensor:
    """Lengths as texts have them: many short ones and a long tail, from 4 to 512."""
    normal = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return (40 * (0.8 * normal).exp()).round().clamp(4, 512).int()


def bucketed(
    lengths: Tensor, world: int = 1, rank: int = 0, batch: int = 4, seed: int = 0, epoch: int = 0
) -> EpochSampler:
    made = EpochSampler(len(lengths), world, rank, batch, seed, lengths)
    made.set_epoch(epoch)
    return made


def padding_share(draws: EpochSampler, lengths: Tensor) -> float:
    """Padding over all that the batches hold, each padded to its longest."""
    batches = lengths[[index for index, _ in draws]].view(-1, draws.batch_size)
    return 1 - float(batches.sum() / (batches.amax(1) * draws.batch_size).sum())


@pytest.mark.parametrize("size", [3, 4, 1000, 1003])
def test_buckets_are_whole_batches_with_nothing_twice(size: int) -> None:
    draws = bucketed(skewed(size))
    indices = [index for index, _ in draws]
    assert len(indices) == len(draws) == size // 4 * 4
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(size))


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_last_samples_are_left_out_by_chance(epoch: int) -> None:
    drawn = {index for index, _ in bucketed(skewed(103), epoch=epoch)}
    assert drawn == {index for index, _ in sampler(103, batch=4, epoch=epoch)}  # whatever their length


@pytest.mark.parametrize(("size", "world", "batch"), [(1000, 2, 4), (1003, 2, 3), (97, 4, 2), (450, 3, 1)])
def test_processes_share_each_bucket_that_one_process_would_see(size: int, world: int, batch: int) -> None:
    lengths = skewed(size)
    one = in_batches(list(bucketed(lengths, batch=world * batch, seed=7, epoch=2)), world * batch)
    ranks = [in_batches(list(bucketed(lengths, world, rank, batch, 7, 2)), batch) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(one)}
    for k, expected in enumerate(one):
        shares = [draw for batches in ranks for draw in batches[k]]
        assert sorted(shares) == sorted(expected)


def test_processes_get_batches_of_like_length_at_a_time() -> None:
    lengths = skewed(1000)
    widths = [
        lengths[[index for index, _ in bucketed(lengths, 2, rank, 8)]].view(-1, 8).amax(1).float() for rank in range(2)
    ]
    assert (widths[0] - widths[1]).abs().mean() < 0.1 * widths[0].mean()


def test_buckets_are_a_function_of_seed_and_epoch() -> None:
    lengths = skewed(400)
    expected = list(bucketed(lengths, seed=1, epoch=2))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert list(bucketed(lengths, seed=1, epoch=2)) == expected
    assert torch.equal(torch.get_rng_state(), state)
    orders = {tuple(bucketed(lengths, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_sample_shares_its_batch_with_others_in_each_epoch() -> None:
    lengths = skewed(2000)
    company = [
        {frozenset(index for index, _ in batch) for batch in in_batches(list(bucketed(lengths, epoch=epoch)), 4)}
        for epoch in range(2)
    ]
    assert len(company[0] & company[1]) < 0.05 * len(company[0])


@pytest.mark.parametrize(("size", "world", "rank", "batch"), [(130, 1, 0, 4), (131, 2, 1, 3), (600, 2, 0, 2)])
def test_resume_from_any_bucket_gives_the_draws_that_remain(size: int, world: int, rank: int, batch: int) -> None:
    lengths = skewed(size)
    whole = list(bucketed(lengths, world, rank, batch, seed=4, epoch=2))
    for position in range(0, len(whole) // batch, 3):
        resumed = bucketed(lengths, world, rank, batch, seed=4)
        resumed.seek(2, position)
        assert len(resumed) == len(whole)
        assert list(resumed) == whole[position * batch :]
        assert list(resumed) == whole


def test_buckets_hold_little_padding() -> None:
    lengths = skewed(4000)
    plain = padding_share(sampler(4000, batch=16), lengths)
    assert plain > 0.5
    assert padding_share(bucketed(lengths, batch=16), lengths) < 0.2 * plain


def test_buckets_come_in_no_order_of_length() -> None:
    lengths = skewed(4000)
    means = lengths[[index for index, _ in bucketed(lengths, batch=8)]].view(-1, 8).float().mean(1)  # 500 batches
    ranks = means.argsort().argsort().float()
    time = torch.arange(len(ranks)).float()
    assert abs(float(torch.corrcoef(torch.stack([ranks, time]))[0, 1])) < 0.15  # 3.4 deviations of chance
    neighbours = torch.stack([ranks[1:], ranks[:-1]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.15


def test_equal_lengths_leave_the_epoch_to_chance() -> None:
    lengths = torch.full((200,), 7, dtype=torch.int32)
    orders = [[index for index, _ in bucketed(lengths, epoch=epoch)] for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(200))] * 2
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


# ------------------------------------------------------------------------------------------------------------- loaders


class Keys(Dataset[list[int]]):
    """Gives back what it is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | Draw) -> list[int]:
        return list(key) if isinstance(key, tuple) else [key]


def module(batch: int = 3, workers: int = 0, world: int = 1, rank: int = 0, **keys: Any) -> ResumableDataModule:
    made = ResumableDataModule(batch, workers)
    made.trainer = stub_trainer(world, rank, **keys)
    return made


def batches(loader: DataLoader[Any], begun: int = 0, epochs: int = 3) -> Iterator[list[Draw]]:
    """What Lightning takes from batch `begun` on.

    It makes its first iterator before it tells the sampler the epoch, and stops at the length without looking on.
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
    """State of a data module behind so many batches, as Lightning asks for it: an epoch's end still counts to it."""
    made = module(**keys)
    length = len(made.train_loader(Keys(size)))
    epoch, done = divmod(taken, length)
    if taken and done == 0:
        epoch, done = epoch - 1, length
    world, rank = made.trainer.world_size, made.trainer.global_rank  # type: ignore[union-attr]
    made.trainer = stub_trainer(world, rank, epoch=epoch, batches_done=done, epoch_batches=length)
    return made.state_dict()


def restored(state: dict[str, Any], **keys: Any) -> ResumableDataModule:
    """Another data module, in another process whose own seed is of no account."""
    torch.manual_seed(12345)
    made = module(**keys)
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize(("size", "world"), [(12, 1), (14, 1), (14, 2), (17, 2)])
def test_training_loader_continues_where_the_state_was_taken(size: int, world: int) -> None:
    keys = {"world": world, "rank": world - 1}
    torch.manual_seed(8)
    whole = list(batches(module(**keys).train_loader(Keys(size))))
    assert len(whole) == 3 * (size // (world * 3))
    for taken in range(len(whole)):
        torch.manual_seed(8)
        state = stopped(size, taken, **keys)
        assert list(batches(restored(state, **keys).train_loader(Keys(size)), taken)) == whole[taken:]


@pytest.mark.parametrize("taken", [0, 1, 4, 6])  # the start, the middle, the first epoch's end, the second's middle
@pytest.mark.parametrize(("before", "behind"), [(0, 1), (1, 0), (2, 2)])
def test_workers_change_neither_order_nor_position(before: int, behind: int, taken: int) -> None:
    torch.manual_seed(8)
    whole = list(batches(module().train_loader(Keys(14)), epochs=2))
    torch.manual_seed(8)
    state = stopped(14, taken, workers=before)
    assert list(batches(restored(state, workers=behind).train_loader(Keys(14)), taken, epochs=2)) == whole[taken:]


@pytest.mark.parametrize(
    ("batch", "world", "step"),
    [(2, 1, 6), (4, 1, 3), (6, 1, 2), (3, 2, 2), (1, 4, 3), (5, 1, 2), (12, 1, 1), (24, 1, 0)],  # 12 samples are done
)
def test_another_batch_size_goes_on_behind_the_same_samples(batch: int, world: int, step: int) -> None:
    torch.manual_seed(8)
    state = stopped(24, 8 + 4, batch=3)
    assert state == {"epoch": 1, "samples": 12, "seed": 8, "order": ORDER}
    torch.manual_seed(8)
    whole = module(batch, world=world).train_loader(Keys(24))
    expected = list(batches(whole, epochs=2))[len(whole) + step :]
    loader = restored(state, batch=batch, world=world).train_loader(Keys(24))
    assert list(batches(loader, len(loader) + step, epochs=2)) == expected


def test_a_position_behind_the_last_whole_batch_is_before_it() -> None:
    torch.manual_seed(8)
    state = stopped(25, 24, batch=1)  # 24 of 25 samples, all that batches of 8 would take
    following = list(batches(restored(state, batch=8).train_loader(Keys(25)), 2, epochs=2))
    torch.manual_seed(8)
    assert following == list(batches(module(8).train_loader(Keys(25)), epochs=2))[2:]


def test_only_the_first_loader_of_a_restored_module_is_shortened() -> None:
    torch.manual_seed(8)
    made = restored(stopped(12, 2))
    first, second = (list(made.train_loader(Keys(12))) for _ in range(2))
    assert (len(first), len(second)) == (2, 4)


def test_state_goes_through_a_checkpoint() -> None:
    torch.manual_seed(2**40)
    buffer = io.BytesIO()
    torch.save(stopped(12, 6), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"epoch": 1, "samples": 6, "seed": 2**40, "order": ORDER}


@pytest.mark.parametrize(("taken", "order", "warns"), [(6, 1, True), (6, ORDER, False), (12, 1, False)])
def test_a_position_in_an_epoch_of_another_order_is_warned_of(
    taken: int, order: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(8)
    state = stopped(12, taken // 3)
    state.pop("order")
    whole = list(batches(module().train_loader(Keys(12)), epochs=2))
    made = restored(state if order == 1 else {**state, "order": order})
    assert caplog.text == ""  # an evaluation does not go on from there
    assert list(batches(made.train_loader(Keys(12)), taken // 3, epochs=2)) == whole[taken // 3 :]
    assert ("some samples come twice and others not at all" in caplog.text) is warns


@pytest.mark.parametrize(("done", "expected"), [(0, (2, 0)), (3, (2, 18)), (4, (3, 0))])
def test_state_counts_the_samples_of_all_processes(done: int, expected: tuple[int, int]) -> None:
    made = module(3, world=2, epoch=2, batches_done=done, epoch_batches=4)
    state = made.state_dict()
    assert (state["epoch"], state["samples"]) == expected


def test_order_is_of_the_first_process_seed() -> None:
    ranks = []
    for rank in range(2):
        torch.manual_seed(rank)
        strategy = SimpleNamespace(broadcast=lambda _: 77, root_device=torch.device("cpu"))
        ranks.append(list(batches(module(world=2, rank=rank, strategy=strategy).train_loader(Keys(12)), epochs=1)))
    torch.manual_seed(77)
    one = list(batches(module(6).train_loader(Keys(12)), epochs=1))
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == [set(batch) for batch in one]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generator(workers: int) -> None:
    state = torch.get_rng_state()
    made = module(workers=workers)
    assert len(list(made.train_loader(Keys(12)))) == 4
    assert len(list(made.evaluation_loader(Keys(13)))) == 5
    assert len(list(made.evaluation_loader(Keys(13), skewed(13)))) == 5
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("size", "world"), [(13, 1), (13, 3), (3, 3)])
def test_evaluation_takes_every_sample_once(size: int, world: int, workers: int) -> None:
    shares = []
    for rank in range(world):
        loader = module(workers=workers, world=world, rank=rank).evaluation_loader(Keys(size))
        shares.append([int(index) for (indices,) in loader for index in indices])
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert shares == [list(range(rank, size, world)) for rank in range(world)]


def test_training_loader_with_lengths_continues_where_the_state_was_taken() -> None:
    lengths = skewed(40)
    torch.manual_seed(8)
    whole = list(batches(module().train_loader(Keys(40), lengths), epochs=2))
    assert len(whole) == 26
    for taken in (0, 5, 13, 20):
        torch.manual_seed(8)
        state = stopped(40, taken)
        resumed = restored(state).train_loader(Keys(40), lengths)
        assert list(batches(resumed, taken, epochs=2)) == whole[taken:]


def test_training_loader_with_lengths_has_batches_of_like_length() -> None:
    lengths = torch.arange(30, dtype=torch.int32)[torch.randperm(30)]
    for batch in batches(module().train_loader(Keys(30), lengths), epochs=2):
        shown = sorted(lengths[[index for index, _ in batch]].tolist())
        assert shown == list(range(shown[0], shown[0] + 3))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("size", "world"), [(40, 1), (41, 2), (13, 3), (12, 2), (2, 1), (3, 3)])
def test_evaluation_with_lengths_takes_every_sample_once_and_the_longest_batch_first(
    size: int, world: int, workers: int
) -> None:
    lengths = skewed(size)
    longest = sorted(range(size), key=lambda index: -int(lengths[index]))
    shares = []
    for rank in range(world):
        loader = module(workers=workers, world=world, rank=rank).evaluation_loader(Keys(size), lengths)
        shown = [indices.tolist() for (indices,) in loader]
        shares.append([index for batch in shown for index in batch])
        first, *others = (longest[rank::world][i : i + 3] for i in range(0, len(shares[-1]), 3))
        assert shown[0] == first
        assert sorted(shown[1:]) == sorted(others)  # of like length
        assert all(len(batch) == 3 for batch in shown[:-1])  # a smaller one is the last
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert max(len(share) for share in shares) - min(len(share) for share in shares) <= 1


def test_evaluation_with_lengths_is_in_a_shuffled_order_that_is_always_the_same() -> None:
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


def test_evaluation_keeps_the_order_of_samples_of_one_length() -> None:
    loader = module().evaluation_loader(Keys(20), torch.tensor([5] * 10 + [9] * 10))
    order = [*range(10, 20), *range(10)]
    batches_in_order = sorted(order[i : i + 3] for i in range(0, 20, 3))
    assert sorted(indices.tolist() for (indices,) in loader) == batches_in_order


def test_a_collate_function_makes_the_batches() -> None:
    def collate(rows: list[list[int]]) -> str:
        return "-".join(str(row[0]) for row in rows)

    made = module()
    assert list(made.evaluation_loader(Keys(7), collate=collate)) == ["0-1-2", "3-4-5", "6"]
    assert [len(batch.split("-")) for batch in made.train_loader(Keys(7), collate=collate)] == [3, 3]


@pytest.mark.parametrize(("rank", "expected"), [(0, ["own", "beat", "wait", "wait"]), (1, ["wait", "wait", "own"])])
@pytest.mark.parametrize("fails", [False, True])
def test_a_nodes_first_process_comes_first(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[str], fails: bool
) -> None:
    done: list[str] = []
    others = iter([False, True])  # those of another node are not done at first

    def all_done(own: bool) -> bool:
        done.append("wait" if own else "beat")
        return own and next(others)

    monkeypatch.setattr(base, "BEAT", 0.0)
    made = module(world=4, rank=2 + rank, local_rank=rank, strategy=SimpleNamespace(reduce_boolean_decision=all_done))
    with pytest.raises(KeyError) if fails else nullcontext(), made.first_process_first() as beat:
        done.append("own")
        beat()
        if fails:
            raise KeyError("an error leaves nobody waiting")
    assert done == expected


# -------------------------------------------------------------------------------------------------------------- errors


def test_lightnings_own_sampler_is_refused_among_several_processes() -> None:
    own = SimpleNamespace(use_distributed_sampler=True)
    for made in (module(world=2, _accelerator_connector=own), module(world=2, rank=1, _accelerator_connector=own)):
        with pytest.raises(DataError, match="use_distributed_sampler=False"):
            made.train_loader(Keys(12))
        with pytest.raises(DataError, match="use_distributed_sampler=False"):
            made.evaluation_loader(Keys(12))
    assert len(module(_accelerator_connector=own).train_loader(Keys(12))) == 4  # Lightning adds none for one process


def test_fewer_samples_to_evaluate_than_processes() -> None:
    with pytest.raises(DataError, match="2 samples to evaluate are fewer than the 3 processes"):
        module(world=3).evaluation_loader(Keys(2))


@pytest.mark.parametrize(("size", "world"), [(2, 1), (8, 3)])
def test_fewer_samples_than_a_batch(size: int, world: int) -> None:
    with pytest.raises(DataError, match=rf"data\.batch_size: {size} training samples .* 3 × {world} processes"):
        module(world=world).train_loader(Keys(size))


# -------------------------------------------------------------------------------------------------------------- seeded


def test_a_seed_is_the_same_in_every_process_and_depends_on_each_key() -> None:
    assert derive_seed(0, 1) == 9_017_893_900_260_303_862
    keys = [(0,), (-1,), (-2,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (10,), (2**64 - 1,)]  # hash(-1) is hash(-2)
    seeds = [derive_seed(*each) for each in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


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
