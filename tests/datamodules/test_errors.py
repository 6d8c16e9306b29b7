"""Numbers with their nouns in messages."""

from __future__ import annotations

import pytest

from datamodules.errors import counted


@pytest.mark.parametrize(
    ("count", "one", "expected"),
    [
        (1, "row", "1 row"),
        (1200, "row", "1,200 rows"),
        (0, "class", "0 classes"),
        (2, "epoch", "2 epochs"),
        (2, "batch", "2 batches"),
    ],
)
def test_nouns_agree_with_numbers(count: int, one: str, expected: str) -> None:
    assert counted(count, one) == expected


def test_words_that_agree_with_the_noun() -> None:
    assert [counted(n, "row is", "rows are") for n in (1, 2)] == ["1 row is", "2 rows are"]
