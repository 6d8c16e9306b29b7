"""Batches for decoders: padding on either side, and packs that have every row once."""

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
    """Return a row of tokens whose first `prompt` tokens are not in the loss."""
    return {"input_ids": [*tokens], "labels": [-100] * prompt + [*tokens][prompt:], "index": index}


ROWS = [row(4, 1, 2, 3, prompt=2), row(7, 5), row(2, 6, 7, 8, 9, prompt=3)]

# ------------------------------------------------------------------------------------------------------------- padding


def test_padding_on_the_right_is_masked_and_not_in_the_loss() -> None:
    batch = PadSequences(FILL)(ROWS)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 9], [5, 9, 9, 9], [6, 7, 8, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, -100, 3, -100], [-100] * 4, [-100, -100, -100, 9]],  # the last 9 is a real token, not padding
        "index": [4, 7, 2],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_prompts_are_padded_on_the_left() -> None:
    rows = [{key: r[key] for key in ("input_ids", "index")} for r in ROWS]
    assert {key: value.tolist() for key, value in PadSequences(FILL, "left")(rows).items()} == {
        "input_ids": [[9, 1, 2, 3], [9, 9, 9, 5], [6, 7, 8, 9]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
        "index": [4, 7, 2],
    }


def test_positions_restart_with_each_sequence_of_a_pack() -> None:
    batch = PadPacks(FILL)([[ROWS[0], ROWS[2]], [ROWS[1], ROWS[0]]])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 6, 7, 8, 9], [5, 1, 2, 3, 9, 9, 9]],
        "labels": [[-100, -100, 3, -100, -100, -100, 9], [-100, -100, -100, 3, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 0, 1, 2]],  # padding is one more sequence
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_the_loss_leaves_out_the_first_token_of_each_sequence_in_a_pack() -> None:
    batch = PadPacks(FILL)([[row(0, 1, 2, prompt=0), row(1, 3, 4, prompt=0)]])
    assert batch["labels"].tolist() == [[-100, 2, -100, 4]]


@pytest.mark.parametrize("collate", [PadSequences(FILL, "left"), PadPacks(FILL)])
def test_collators_can_be_pickled(collate: Any) -> None:
    assert pickle.loads(pickle.dumps(collate)) == collate


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([], []),
        ([10], [[0]]),
        ([10, 10], [[0], [1]]),
        ([4, 6], [[1, 0]]),
        ([4, 7, 6, 3], [[1, 3], [2, 0]]),  # both packs are full
        ([5, 5, 5], [[0, 1], [2]]),
        ([6, 7, 3], [[1, 2], [0]]),  # best fit rather than first fit
        ([1] * 20, [[*range(10)], [*range(10, 20)]]),
        ([9, 2, 2, 2, 2, 2, 1], [[0, 6], [1, 2, 3, 4, 5]]),
    ],
)
def test_best_fit_packs(lengths: list[int], packs: list[list[int]]) -> None:
    assert best_fit(lengths, 10) == packs


def test_packs_of_any_lengths_have_every_row_once_and_respect_the_limit() -> None:
    draw = random.Random(0)
    for _ in range(100):
        most = draw.randrange(1, 60)
        lengths = [draw.randrange(1, most + 1) for _ in range(draw.randrange(1, 80))]
        packs = best_fit(lengths, most)
        assert sorted(index for pack in packs for index in pack) == [*range(len(lengths))]
        assert all(0 < sum(lengths[index] for index in pack) <= most for pack in packs)
        sizes = sorted(sum(lengths[index] for index in pack) for pack in packs)
        assert len(packs) == 1 or sizes[0] + sizes[1] > most  # no two packs fit into one


@pytest.mark.parametrize("bins", [3, 20, 61])
def test_packs_are_at_most_eleven_ninths_of_the_optimum(bins: int) -> None:
    draw = random.Random(bins)
    for _ in range(20):
        lengths = []
        for _ in range(bins):  # full bins, so that the optimum is known
            edges = sorted(draw.sample(range(1, 100), draw.randrange(1, 8)))
            lengths += [b - a for a, b in zip([0, *edges], [*edges, 100], strict=True)]
        draw.shuffle(lengths)
        assert bins <= len(best_fit(lengths, 100)) <= 11 / 9 * bins + 2 / 3  # bound of Dósa (2007)


def token_dataset(lengths: list[int]) -> TokenDataset:
    """Return rows of these lengths. All tokens of row i are i."""
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
    assert [r["index"] for r in packed[(1, 12345)]] == packed.packs[1]  # an index with a seed, as the sampler draws


def test_the_order_of_packs_resumes_at_its_position() -> None:
    draw = random.Random(0)
    packed = PackedDataset(token_dataset([draw.randrange(1, 11) for _ in range(90)]), 10)
    same_packs = PackedDataset(token_dataset([len(packed.rows[i]["input_ids"]) for i in range(90)]), 10)
    assert same_packs.packs == packed.packs  # packing is deterministic

    def order(data: PackedDataset, skipped: int) -> list[list[Row]]:
        sampler = EpochSampler(len(data), 1, 0, 2, seed=3, lengths=data.lengths)
        sampler.seek(1, skipped)
        draws = list(sampler)
        return [pack for i in range(0, len(draws), 2) for pack in data.__getitems__(draws[i : i + 2])]

    all_packs = order(packed, 0)
    assert order(same_packs, 5) == all_packs[10:]
    assert len(all_packs) == len(packed) // 2 * 2
