"""Benchmark of own texts: generated data sets, command line of the arm `ours`, and summary of both arms."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import made_texts, own_texts
from benchmarks.harness import parse, parser


@pytest.mark.parametrize("name", made_texts.MAKERS)
def test_made_rows_depend_only_on_the_seed(name: str) -> None:
    train, test = made_texts.make(name)
    assert (train, test) == made_texts.make(name)
    assert train != made_texts.make(name, seed=1)[0]
    assert (len(train), len(test)) == made_texts.SIZES[name]
    assert not {text for text, _ in train} & {text for text, _ in test}


def test_lengths_of_tickets_differ_by_class_and_vocabularies_overlap() -> None:
    rows = [row for part in made_texts.make("tickets") for row in part]
    words = {label: [len(text.split()) for text, given in rows if given == label] for label in made_texts.TICKETS}
    means = [statistics.mean(lengths) for lengths in words.values()]
    assert means == sorted(means)
    assert means[-1] > 2.5 * means[0]
    assert max(words["billing"]) > min(words["delivery"])
    known = [{word for text, given in rows if given == label for word in text.split()} for label in words]
    assert all(len(one & other) > len(one) / 2 for one in known for other in known)


def test_spam_is_rare() -> None:
    rows = [row for part in made_texts.make("spam") for row in part]
    assert 0.06 < statistics.mean(label == "spam" for _, label in rows) < 0.1


def test_written_files_are_read_back(tmp_path: Path) -> None:
    folder = made_texts.write("spam", tmp_path)
    assert [own_texts.read(folder / f"{split}.csv") for split in ("train", "test")] == [*made_texts.make("spam")]
    with (folder / "train.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["text", "label"]


def test_our_arm_leaves_the_recipe_alone() -> None:
    given = own_texts.words(own_texts.Fit("ours", "DATA", "minilm", seed=3), "FOLDER")
    keys = {word.partition("=")[0] for word in given if "=" in word}
    assert keys == {
        *("--model.backbone", "--data.path", "--seed_everything"),
        *("--trainer.default_root_dir", "--trainer.enable_progress_bar"),
    }


def record(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "macro_f1": accuracy - 0.1, **dict.fromkeys(own_texts.COSTS, 2.0)}


def test_differences_are_paired_by_seed() -> None:
    arms = {"ours": [record(0.90), record(0.80)], "trainer": [record(0.91), record(0.81)]}
    summary = own_texts.summarize(arms)
    difference = summary["macro_f1, ours minus trainer"]
    assert summary["ours"]["accuracy"]["mean"] == pytest.approx(0.85)
    assert summary["ours"]["accuracy"]["standard_error"] == pytest.approx(0.05)
    assert difference["mean"] == pytest.approx(-0.01)
    assert difference["high"] - difference["low"] == pytest.approx(0)
    assert difference["within_one_standard_error"]


def test_the_learning_rate_is_chosen_on_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[own_texts.Fit] = []

    def run(fit: own_texts.Fit) -> dict[str, Any]:
        tried.append(fit)
        return {"cpu_seconds": 1.0, "val_score": 0.9 if fit.rate in own_texts.GRID[1:3] else 0.8}

    monkeypatch.setattr(own_texts, "run", run)
    arguments = parse(parser("", rounds=5), [])
    fit = own_texts.Fit("trainer", "DATA", "minilm", seed=0)
    assert own_texts.best_rate(arguments, "tickets", fit) == own_texts.GRID[1]
    assert [fit.seed for fit in tried] == [100] * 5 + [101] * 2
    assert not any(fit.test for fit in tried)
    assert {(fit.seed, fit.val_seed, fit.val_fraction) for fit in tried} == {(100, 100, 0.25), (101, 101, 0.25)}
