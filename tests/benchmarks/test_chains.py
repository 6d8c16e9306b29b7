"""Benchmark of chains: ranks and links of the arms, choice of the learning rate, table, and a quick run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chains


def value(options: list[str], key: str) -> str:
    return next(option.partition("=")[2] for option in options if option.startswith(f"--{key}="))


def test_arms_have_the_ranks_of_the_comparison() -> None:
    arms = chains.arm_options([*chains.ARMS, *chains.OTHER_ARMS], rank=4, epochs=8)
    ranks = {
        arm: (value(options, "variant"), int(value(options, "model.adapter.rank"))) for arm, options in arms.items()
    }
    assert ranks == {
        "chain": ("B", 4),
        "B, rank 4r": ("B", 16),
        "B, rank r": ("B", 4),
        "LoRA, rank r": ("lora", 4),
        "chain, one schedule": ("B", 4),
    }
    for arm, options in arms.items():
        assert float(value(options, "model.adapter.alpha")) == 2 * ranks[arm][1]
        assert any("chain" in option for option in options) == ("chain" in arm)
    assert json.loads(value(arms["chain"], "model.adapter.chain")) == {"every_n_epochs": 2, "schedule": "restart"}


def test_the_learning_rate_is_chosen_on_held_out_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[tuple[float, int, bool]] = []

    def fit(arguments: Any, name: str, arm: str, lr: float, seed: int, tests: bool) -> dict[str, float]:
        tried.append((lr, seed, tests))
        return {"score": {0.001: 0.5, 0.003: 0.7, 0.01: 0.6}[lr] + 0.01 * seed}

    monkeypatch.setattr(chains, "fit", fit)
    arguments = argparse.Namespace(rates=[0.001, 0.003, 0.01], choice_seeds=[100, 101])
    assert chains.choose(arguments, "cola", "chain") == 0.003
    assert tried == [(lr, seed, False) for lr in arguments.rates for seed in (100, 101)]
    assert not capsys.readouterr().out
    arguments.rates = [0.003, 0.01]
    assert chains.choose(arguments, "cola", "chain") == 0.003
    assert "at an end of the grid" in capsys.readouterr().out


def test_table_has_mean_standard_error_and_paired_interval() -> None:
    def fits(*scores: float) -> list[chains.Record]:
        same = {"cpu_seconds": 2.0, "trained_parameters": 30, "file_bytes": 500_000, "rate": 0.003}
        return [{"score": score, **same} for score in scores]

    chain, other = chains.rows({"chain": fits(0.80, 0.82, 0.84), "B, rank r": fits(0.80, 0.80, 0.83)})
    # Standard error: 2 / √3. Differences 0, 2 and 1 points: mean 1, t(0.975, 2) · 1 / √3 = 4.3027 / √3 = 2.48.
    assert chain == ["chain", "0.003", "82.0 ± 1.2", "", "2", "30", "0.50"]
    assert other[3] == "+1.0 (-1.5 to +3.5)"


@pytest.mark.slow
def test_quick_run(cola_path: Path, roberta_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "chains.json"
    argv = ["--quick", "--tasks", "cola", "--cola", str(cola_path), "--minilm", str(roberta_path)]
    argv += ["--rank", "2", "--rates", "0.003", "0.01", "--seeds", "0", "--output", str(output), "--resume"]
    chains.run(argv)
    record = json.loads(output.read_text())
    assert {name for name in record if "choice" not in name} == {f"cola, {arm}, seed 0" for arm in chains.ARMS}
    assert len(record) == 3 * len(chains.ARMS)
    numbers = {arm: record[f"cola, {arm}, seed 0"]["trained_parameters"] for arm in chains.ARMS}
    assert numbers["chain"] == numbers["B, rank r"] < numbers["B, rank 4r"]
    for arm in chains.ARMS:
        choice = {lr: record[f"cola, {arm}, choice, learning rate {lr}, seed 100"]["score"] for lr in (0.003, 0.01)}
        assert record[f"cola, {arm}, seed 0"]["rate"] == max(choice, key=lambda lr: choice[lr])
    before = output.read_text()
    chains.run(argv)  # Nothing is fitted again.
    assert output.read_text() == before
