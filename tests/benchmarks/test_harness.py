"""The benchmark harness: statistics, order of arms and result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import harness


def test_paired_ratio_is_not_moved_by_slow_rounds() -> None:
    base = [1.0, 1.0, 9.0, 1.0, 5.0]  # both arms are slow in two of the rounds
    ratio = harness.paired_ratio([2 * seconds for seconds in base], base)
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_few_rounds_have_a_range_instead_of_an_interval() -> None:
    assert harness.interval([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_interval_covers_a_known_median_and_narrows_with_rounds() -> None:
    draws = torch.randn(400, dtype=torch.float64).add(3).tolist()
    few, many = harness.interval(draws[:25]), harness.interval(draws)
    for figures in (few, many):
        assert figures["low"] <= figures["median"] <= figures["high"]
    assert many["low"] < 3 < many["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])


def test_paired_share_is_robust_to_rounds_with_a_tiny_denominator() -> None:
    whole = [0.001, 10.0, 10.0, 11.0, 9.0, 10.0, 10.0]
    # the share of the first round alone is 5000
    share = harness.paired_share([5.0, 7.0, 7.0, 7.7, 6.3, 7.0, 7.0], whole)
    assert share["median"] == pytest.approx(0.7)
    assert share["low"] == pytest.approx(0.7, abs=0.05) and share["high"] == pytest.approx(0.7, abs=0.05)


def test_every_arm_runs_once_per_round_in_changing_order() -> None:
    ran: list[str] = []
    arms = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    seconds = harness.take_turns(arms, rounds=12, warm_up=1)
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert len(rounds) == 13 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 12, "b": 12, "c": 12}


def test_an_arm_may_time_itself() -> None:
    assert harness.take_turns({"own": lambda: 0.25}, rounds=2) == {"own": [0.25, 0.25]}


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    x = torch.randn(10, 4, requires_grad=True)
    frozen = nn.Linear(4, 6).requires_grad_(False)
    assert harness.saved_bytes(lambda: frozen(x), frozen) == 0
    # the weight of another module counts
    assert harness.saved_bytes(lambda: nn.Linear(4, 6)(x), nn.Linear(4, 6)) == (10 * 4 + 4 * 6) * 4
    trained = nn.Linear(4, 6)
    # two views of one storage
    assert harness.saved_bytes(lambda: trained(x[:5]) + trained(x[5:]), trained) == 10 * 4 * 4


def test_sections_merge_into_one_file_and_resume(tmp_path: Path) -> None:
    output = tmp_path / "new" / "layer.json"
    words = ["--output", str(output), "--quick", "--rounds", "3"]
    arguments = harness.parse(harness.parser("", rounds=5), words)
    with harness.section(arguments, "first") as record:
        record["seconds"] = {"a": [0.123456789]}
    with harness.section(arguments, "second"):
        pass
    with pytest.raises(ZeroDivisionError), harness.section(arguments, "third"):
        _ = 1 / 0  # a failed section is not written
    stored = json.loads(output.read_text())
    assert list(stored) == ["first", "second"]
    assert stored["first"]["seconds"] == {"a": [0.123457]}
    assert stored["first"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert stored["first"]["rounds"] == 3 and stored["first"]["quick"]
    assert {"cpu", "commit", "load_before", "load_after", "threads", "date", "command"} <= stored["first"].keys()
    assert harness.measured(arguments, "first") is None
    arguments.resume = True
    assert harness.measured(arguments, "first") == stored["first"]
    assert harness.measured(arguments, "third") is None
    assert harness.measured(arguments, "first", {"rate": 0.1}) is None
    arguments.rounds = 4  # another setting is another measurement
    assert harness.measured(arguments, "first") is None
