"""The benchmark of complete fits on GLUE: options of its arms, and summaries of its results."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import glue
from benchmarks.fits import Arm, Clock, Fit
from benchmarks.fits_ours import words
from benchmarks.harness import parse, parser


def record(seconds: float, epochs: int = 3, score: float = 0.2, **more: Any) -> dict[str, Any]:
    memory = {"libraries": 100, "training_peak": 300, "peak": 350}
    times = {"train_seconds": [seconds] * epochs, "train_cpu_seconds": [seconds] * epochs, "process_seconds": 9.0}
    others = {"epochs": epochs, "scores": [0.0, score], "trained_parameters": 7, "adapter_file_bytes": 8}
    return {**times, **others, "memory": memory, **more}


def test_ratios_are_paired_by_round() -> None:
    ours, grouped, padded = "ours, B", "peft, grouped", "peft, padded to 128"
    results = [
        {ours: record(1.0, spectrum_seconds=0.1, fit_seconds=10.0), grouped: record(2.0), padded: record(9.0, 1)},
        {ours: record(10.0, score=0.4, spectrum_seconds=0.1, fit_seconds=10.0), grouped: record(20.0)},
    ]
    summary = glue.summarize(results, Namespace(arms=[ours, grouped, padded], epochs=3))
    row = summary[ours]
    assert row["peft, grouped over this"]["median"] == 2.0
    assert row["peft, padded to 128 over this"]["median"] == 9.0  # only one round has both arms
    assert row["score"]["mean"] == pytest.approx(0.3)
    assert row["score"]["standard_error"] == pytest.approx(0.1)
    assert row["spectrum_share"]["mean"] == pytest.approx(0.01)
    assert row["training_growth_bytes"] == 200
    assert "score" not in summary[padded]


def test_a_ratio_compares_as_many_epochs_as_both_arms_have() -> None:
    ours, padded = "ours, B", "peft, padded to 128"
    results = [{ours: record(1.0) | {"train_seconds": [2.0, 1.0, 1.0]}, padded: record(9.0, 1)}]
    row = glue.summarize(results, Namespace(arms=[ours, padded], epochs=3))[ours]
    assert row["peft, padded to 128 over this"]["median"] == 4.5
    assert row["epoch_seconds"]["mean"] == 1.0


def test_learning_rates_are_given_by_kind_of_arm() -> None:
    assert glue.rate("B16=0.002") == ("B16", 0.002)
    assert {glue.kind(arm) for arm in glue.ARMS.values()} == {"B", "B16", "both", "peft"}
    with pytest.raises(ArgumentTypeError, match="is not one of B"):
        glue.rate("A=0.1")


def test_an_epoch_lasts_from_the_start_of_its_first_step_to_the_end_of_its_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 2.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr(Path, "write_text", lambda *_: 0)  # `Clock` would reset the peak memory of this process
    clock = Clock()
    for epoch, steps in ((0, 2), (1, 1)):
        for _ in range(steps):
            clock.begin(epoch)
            clock.end()
    assert clock.steps == [2, 1]
    assert clock.seconds == [3.0, 4.0]


def test_options_of_our_arm(tmp_path: Path) -> None:
    fit = Fit(Arm("ours", "A", "bfloat16"), "cola", "data", "minilm", epochs=2, rate=0.5, rows=9)
    options = words(fit, str(tmp_path))
    for word in (
        "--model.adapter.train=A",
        "--model.backbone_dtype=bfloat16",
        "--model.learning_rate=0.5",
        "--data.max_train_samples=9",
        "--model.adapter.init_b=orthogonal",
        "--trainer.max_epochs=2",
    ):
        assert word in options


def test_results_of_other_fits_are_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run(fit: Fit, threads: int) -> dict[str, Any]:
        ran.append(fit.seed)
        return {"process_seconds": 1.0, "scores": [0.0]}

    monkeypatch.setattr(glue, "run", run)
    words = ["--resume", "--threads", "1", "--output", str(tmp_path / "f.json")]
    fit = Fit(Arm("ours", "B"), "cola", "data", "minilm", epochs=1, rate=0.5)
    for resumed_fit, rounds in ((fit, "3"), (fit, "3"), (replace(fit, seed=1), "3"), (replace(fit, seed=1), "2")):
        glue.once(parse(parser("", rounds=3), [*words, "--rounds", rounds]), "a", resumed_fit)
    assert ran == [0, 1, 1]
