"""Collate sequences for decoders: padded at the right or left, or packed one after the other without padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from datamodules.contract import IGNORE_INDEX
from datamodules.loading.batching import Draw, index_of
from datamodules.tokens.tokenizing import TokenDataset

Row = dict[str, Any]


@dataclass(frozen=True)
class PadSequences:
    """Collate rows of tokens into a padded batch. Padding is masked, and has no loss.

    Args:
        token: Padding token.
        side: Side of the padding: `right` for training, `left` for generation.
    """

    token: int
    side: str = "right"

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `labels` of rows with labels (batch, tokens), and `index` (batch,)."""
        filling = {"input_ids": self.token, "attention_mask": 0, "labels": IGNORE_INDEX}
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        batch = {
            key: pad_sequence([torch.tensor(row[key]) for row in rows], True, value, self.side)
            for key, value in filling.items()
            if key in rows[0]
        }
        return batch | {"index": torch.tensor([row["index"] for row in rows])}


@dataclass(frozen=True)
class PadPacks:
    """Collate packs of rows into a batch.

    Args:
        token: Padding token. The padding of a shorter pack is one more sequence, without a loss.
    """

    token: int

    def __call__(self, packs: list[list[Row]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids` (batch, tokens). Each sequence has positions from 0 on.

        The first token of a sequence has no loss, since the previous token belongs to another sequence.
        """
        longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for pack in packs:
            empty = longest - sum(len(row["input_ids"]) for row in pack)
            rows = [*pack, {"input_ids": [self.token] * empty, "labels": [IGNORE_INDEX] * empty}] if empty else pack
            batch["input_ids"].append([token for row in rows for token in row["input_ids"]])
            batch["labels"].append([label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])])
            batch["position_ids"].append([position for row in rows for position in range(len(row["input_ids"]))])
        return {key: torch.tensor(value) for key, value in batch.items()}


class PackedDataset(Dataset[list[Row]]):
    """Packs of rows, the same in each epoch.

    Args:
        rows: The rows.
        length: Largest number of tokens of a pack, at least the length of the longest row.
    """

    def __init__(self, rows: TokenDataset, length: int) -> None:
        self.rows = rows
        self.packs = best_fit(rows.lengths.tolist(), length)
        self.lengths = torch.tensor([int(rows.lengths[pack].sum()) for pack in self.packs])

    def __len__(self) -> int:
        return len(self.packs)

    def rows_digest(self) -> str:
        """Return a digest of the rows and of the number of packs."""
        return f"{self.rows.rows_digest()} {len(self)}"

    def __getitem__(self, key: int | Draw) -> list[Row]:
        """Return the rows of one pack."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[list[Row]]:
        """Return the packs of a batch."""
        packs = [self.packs[index_of(key)] for key in keys]
        rows = iter(self.rows.__getitems__([row for pack in packs for row in pack]))
        return [[next(rows) for _ in pack] for pack in packs]


def best_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Pack by best fit, longest first (Johnson 1973). There are at most 11/9 as many packs as needed, plus a few.

    Args:
        lengths: Lengths by index, each at most `most`.
        most: Largest sum of lengths in a pack.

    Returns:
        The indices of each pack.
    """
    packs: list[list[int]] = []
    shortest = min(lengths, default=0)
    rooms: list[tuple[int, int]] = []  # (Room left, pack), ascending.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[index], -1))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room, pack = most, len(packs)
            packs.append([])
        packs[pack].append(index)
        if room - lengths[index] >= shortest:
            insort(rooms, (room - lengths[index], pack))
    return packs
