"""Rows of a split: held out by a seed, limited to a sample, and recognised by names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from datamodules.sources.splits import check_fraction, check_limits, choose_rows, is_helper, split_of
from tests.support.refusals import refuses


def rows(split: str, size: int = 50, **keys: Any) -> list[int]:
    options = {"shares": {"val": 0.2}, "seed": 0, "limit": None, **keys}
    state = torch.get_rng_state()
    chosen = choose_rows(size, split, **options)
    assert chosen.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(choose_rows(size, split, **options), chosen)
    return chosen.tolist()


@pytest.mark.parametrize(("size", "fraction", "held"), [(50, 0.2, 10), (7, 0.5, 4), (1000, 0.001, 1), (5, 0.01, 1)])
def test_held_out_rows_and_training_rows_are_disjoint_and_cover_the_table(
    size: int, fraction: float, held: int
) -> None:
    train, val = (rows(split, size, shares={"val": fraction}) for split in ("train", "val"))
    assert len(val) == held  # rounded, and at least 1
    assert sorted(train + val) == list(range(size))


def test_held_out_test_rows_do_not_change_the_validation_rows() -> None:
    shares = {"val": 0.2, "test": 0.3}
    train, val, test = (rows(split, shares=shares) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (25, 10, 15)
    assert sorted(train + val + test) == list(range(50))
    assert val == rows("val")


def test_held_out_rows_depend_on_the_seed_and_are_spread_evenly() -> None:
    assert len({tuple(sorted(rows("val", seed=seed))) for seed in range(5)}) == 5
    held = rows("val", 1000)
    assert all(abs(sum(low <= row < low + 250 for row in held) - 50) < 20 for low in range(0, 1000, 250))


@pytest.mark.parametrize(
    ("split", "held_out"), [("train", True), ("val", True), ("train", False), ("val", False), ("test", False)]
)
def test_a_limit_keeps_a_seeded_sample(split: str, held_out: bool) -> None:
    several: tuple[dict[str, Any], ...] = ({}, {"limit": 5}, {"limit": 5, "seed": 1})
    shares = {"val": 0.2} if held_out else {}
    all_rows, sample, sample_of_other_seed = (rows(split, shares=shares, **keys) for keys in several)
    assert held_out or all_rows == list(range(50))
    assert len(set(sample)) == len(sample) == 5
    assert set(sample) < set(all_rows)
    assert sample not in (all_rows[:5], sample_of_other_seed)
    for limit in (len(all_rows), 10**9):
        assert rows(split, shares=shares, limit=limit) == all_rows


@pytest.mark.parametrize(
    ("check", "message"),
    [
        *(
            (
                partial(rows, "train", size, shares={"val": f}),
                f"val_fraction {f}: of {size} rows none is left to train on",
            )
            for size, f in ((1, 0.1), (2, 0.8), (10, 0.99))
        ),
        *(
            (partial(check_fraction, "val_fraction", f), f"val_fraction: {f} must lie in (0, 1)")
            for f in (0.0, 1.0, -0.1, 1.5, float("nan"))
        ),
        *((partial(check_limits, {"val": n, "test": 1}), f"max_val_samples: {n} must be 1 or more") for n in (0, -3)),
    ],
)
def test_bad_values_are_refused(check: Callable[[], Any], message: str) -> None:
    with refuses(f"data.{message}"):
        check()
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
def test_names_of_splits_are_recognised(split: str | None, names: list[str]) -> None:
    assert [split_of(name) for name in names] == [split] * len(names)


def test_files_of_operating_systems_and_tools_are_recognised() -> None:
    assert all(is_helper(n) for n in (".ipynb_checkpoints", "__MACOSX", "._x.png", "Thumbs.db", "Desktop.ini"))
    assert not any(is_helper(n) for n in ("ant", "thumbs", "__init__", "x.png"))
