"""Rows of a split: held out by a seed of their own, and cut to a limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules.errors import DataError
from datamodules.sources.splits import check_fraction, check_limits, choose_rows, is_helper, split_of


def rows(split: str, size: int = 50, **keys: Any) -> list[int]:
    options = {"held_out": True, "val_fraction": 0.2, "seed": 0, "limit": None, **keys}
    chosen = choose_rows(size, split, **options)
    assert chosen.dtype == torch.int64
    return chosen.tolist()


@pytest.mark.parametrize(("size", "fraction", "held"), [(50, 0.2, 10), (7, 0.5, 4), (1000, 0.001, 1), (5, 0.01, 1)])
def test_held_out_rows_and_training_rows_are_disjoint_and_cover_the_table(
    size: int, fraction: float, held: int
) -> None:
    train, val = (rows(split, size, val_fraction=fraction) for split in ("train", "val"))
    assert len(val) == held  # rounded, and never none
    assert sorted(train + val) == list(range(size))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_of_its_own_is_taken_whole_and_in_order(split: str) -> None:
    assert rows(split, held_out=False) == list(range(50))


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_held_out_follows_from_the_seed_alone(split: str) -> None:
    expected = rows(split)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert rows(split) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(sorted(rows(split, seed=seed))) for seed in range(5)}) == 5


def test_held_out_rows_are_no_stretch_of_the_table() -> None:
    held = rows("val", 1000)
    assert all(abs(sum(low <= row < low + 250 for row in held) - 50) < 20 for low in range(0, 1000, 250))


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_limit_keeps_a_seeded_sample(split: str, held_out: bool) -> None:
    held_out = held_out and split != "test"
    whole = rows(split, held_out=held_out)
    kept = rows(split, held_out=held_out, limit=5)
    assert len(set(kept)) == len(kept) == 5
    assert set(kept) < set(whole)
    assert kept != whole[:5]
    assert rows(split, held_out=held_out, limit=5) == kept
    assert rows(split, held_out=held_out, limit=5, seed=1) != kept


@pytest.mark.parametrize("limit", [40, 41, 10**9])
def test_a_limit_that_does_not_bind_changes_nothing(limit: int) -> None:
    assert rows("train", limit=limit) == rows("train")


@pytest.mark.parametrize(("size", "fraction"), [(1, 0.1), (2, 0.8), (10, 0.99)])
def test_no_row_left_to_train_on(size: int, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"data\.val_fraction: {fraction} of {size} samples leaves none to train on"):
        rows("train", size, val_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(DataError, match=r"data\.val_fraction: .* must lie in \(0, 1\)"):
        check_fraction("val_fraction", fraction)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_named(limit: int) -> None:
    with pytest.raises(DataError, match=rf"data\.max_val_samples: {limit} must be 1 or more"):
        check_limits({"train": None, "val": limit, "test": 1})


def test_keys_that_will_do() -> None:
    check_fraction("val_fraction", 0.5)
    check_limits({"train": 1, "val": None, "test": 10**9})


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "Training", "TRAIN_SET", "train-images", "trainset", "dataset_train"]),
        ("val", ["val", "Valid", "validation", "dev", "Eval", "dev_set", "images val", "Evaluation"]),
        ("test", ["test", "Testing", "TestData", "test_images"]),
        (None, ["attest", "retrain", "devices", "data", "images", "latest", "value", "", "_"]),
    ],
)
def test_names_that_mean_a_split(split: str | None, names: list[str]) -> None:
    assert [split_of(name) for name in names] == [split] * len(names)


def test_names_that_systems_leave() -> None:
    assert all(is_helper(n) for n in (".ipynb_checkpoints", "__MACOSX", "._x.png", "Thumbs.db", "Desktop.ini"))
    assert not any(is_helper(n) for n in ("ant", "thumbs", "__init__", "x.png"))
