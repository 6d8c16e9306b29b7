"""Batches for decoders: padding at either side that nobody sees, and packs that hold every row once."""

from __future__ import annotations

import pickle
import random
from typing import Any

import datasets
import pytest
import torch

from datamodules.loading.batching import EpochSampler
from datamodules.tokens.packing import PackedDataset, PadPacks, PadSequences, best_fit
from datamodules.tokens.tokenizing import TokenDataset

FILL = 9
Row = dict[str, Any]


def row(index: int, *tokens: int, prompt: int = 1) -> Row:
    """Tokens of which the first few are not learnt."""
    return {"input_ids": [*tokens], "labels": [-100] * prompt + [*tokens][prompt:], "index": index}


ROWS = [row(4, 1, 2, 3, prompt=2), row(7, 5), row(2, 6, 7, 8, 9, prompt=3)]

# ------------------------------------------------------------------------------------------------------------- padding


def test_padding_at_the_right_is_not_seen_and_not_learnt() -> None:
    batch = PadSequences(FILL)(ROWS)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 9], [5, 9, 9, 9], [6, 7, 8, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, -100, 3, -100], [-100] * 4, [-100, -100, -100, 9]],  # the last is a real 9
        "index": [4, 7, 2],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_prompts_are_padded_at_the_left() -> None:
    rows = [{key: r[key] for key in ("input_ids", "index")} for r in ROWS]
    assert {key: value.tolist() for key, value in PadSequences(FILL, "left")(rows).items()} == {
        "input_ids": [[9, 1, 2, 3], [9, 9, 9, 5], [6, 7, 8, 9]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
        "index": [4, 7, 2],
    }


def test_positions_begin_anew_with_each_sequence_of_a_pack() -> None:
    batch = PadPacks(FILL)([[ROWS[0], ROWS[2]], [ROWS[1], ROWS[0]]])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 6, 7, 8, 9], [5, 1, 2, 3, 9, 9, 9]],
        "labels": [[-100, -100, 3, -100, -100, -100, 9], [-100, -100, -100, 3, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 0, 1, 2]],  # what fills up is one more
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_the_first_token_of_a_sequence_is_not_learnt_from_the_one_before() -> None:
    batch = PadPacks(FILL)([[row(0, 1, 2, prompt=0), row(1, 3, 4, prompt=0)]])
    assert batch["labels"].tolist() == [[-100, 2, -100, 4]]


@pytest.mark.parametrize("collate", [PadSequences(FILL, "left"), PadPacks(FILL)])
def test_collators_go_to_another_process(collate: Any) -> None:
    assert pickle.loads(pickle.dumps(collate)) == collate


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([], []),
        ([10], [[0]]),
        ([10, 10], [[0], [1]]),
        ([4, 6], [[1, 0]]),
        ([4, 7, 6, 3], [[1, 3], [2, 0]]),  # both full
        ([5, 5, 5], [[0, 1], [2]]),
        ([6, 7, 3], [[1, 2], [0]]),  # where it fits best, not first
        ([1] * 20, [[*range(10)], [*range(10, 20)]]),
        ([9, 2, 2, 2, 2, 2, 1], [[0, 6], [1, 2, 3, 4, 5]]),
    ],
)
def test_best_fit(lengths: list[int], packs: list[list[int]]) -> None:
    assert best_fit(lengths, 10) == packs


def test_packs_of_any_lengths_hold_every_row_once_and_never_too_much() -> None:
    draw = random.Random(0)
    for _ in range(100):
        most = draw.randrange(1, 60)
        lengths = [draw.randrange(1, most + 1) for _ in range(draw.randrange(1, 80))]
        packs = best_fit(lengths, most)
        assert sorted(index for pack in packs for index in pack) == [*range(len(lengths))]
        assert all(0 < sum(lengths[index] for index in pack) <= most for pack in packs)
        sizes = sorted(sum(lengths[index] for index in pack) for pack in packs)
        assert len(packs) == 1 or sizes[0] + sizes[1] > most  # no two packs would go into one


@pytest.mark.parametrize("bins", [3, 20, 61])
def test_packs_are_at_most_eleven_ninths_of_the_fewest(bins: int) -> None:
    draw = random.Random(bins)
    for _ in range(20):
        lengths = []
        for _ in range(bins):  # full bins, so that the fewest are known
            edges = sorted(draw.sample(range(1, 100), draw.randrange(1, 8)))
            lengths += [b - a for a, b in zip([0, *edges], [*edges, 100], strict=True)]
        draw.shuffle(lengths)
        assert bins <= len(best_fit(lengths, 100)) <= 11 / 9 * bins + 2 / 3  # Dósa 2007


def token_dataset(lengths: list[int]) -> TokenDataset:
    """Rows whose tokens say which row they are of."""
    ids = [[i] * n for i, n in enumerate(lengths)]
    return TokenDataset(datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "length": lengths}))


def test_a_packed_data_set_has_the_rows_of_its_packs() -> None:
    lengths = [5, 9, 3, 2, 8, 1, 1, 6]
    packed = PackedDataset(token_dataset(lengths), 10)
    assert len(packed) == len(packed.packs) == len(packed.lengths)
    assert len(packed) < len(lengths)
    for pack, length, rows in zip(packed.packs, packed.lengths, packed.__getitems__(range(len(packed))), strict=True):
        assert [r["index"] for r in rows] == pack
        assert [r["input_ids"] for r in rows] == [[i] * lengths[i] for i in pack]
        assert sum(lengths[i] for i in pack) == length <= 10
    assert [r["index"] for r in packed[1]] == packed.packs[1]
    assert [r["index"] for r in packed[(1, 12345)]] == packed.packs[1]  # as the sampler draws


def test_the_order_of_packs_goes_on_where_it_was() -> None:
    draw = random.Random(0)
    packed = PackedDataset(token_dataset([draw.randrange(1, 11) for _ in range(90)]), 10)
    again = PackedDataset(token_dataset([len(packed.rows[i]["input_ids"]) for i in range(90)]), 10)
    assert again.packs == packed.packs  # the same in every process and run

    def order(data: PackedDataset, skipped: int) -> list[list[Row]]:
        sampler = EpochSampler(len(data), 1, 0, 2, seed=3, lengths=data.lengths)
        sampler.seek(1, skipped)
        draws = list(sampler)
        return [pack for i in range(0, len(draws), 2) for pack in data.__getitems__(draws[i : i + 2])]

    whole = order(packed, 0)
    assert order(again, 5) == whole[10:]
    assert len(whole) == len(packed) // 2 * 2
