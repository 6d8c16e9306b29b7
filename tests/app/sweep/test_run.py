from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from app.sweep.trial import read_curve
from tests.app.conftest import CommandLine
from tests.app.sweep.conftest import SweepCommand
from tests.app.sweep.fake_fit import score

TIMES = ["seconds", "time/fit_seconds"]


def same_but_times(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first.drop(columns=TIMES), second.drop(columns=TIMES))


def ends_once(sweep: SweepCommand) -> None:
    history = sweep.history()
    assert not [key for key in history if key[1] == "collision"]
    assert {count for (_, event), count in history.items() if event == "end"} == {1}


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):  # the process has ended, or has not made its group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def test_results_have_a_row_for_every_trial(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.content["select"]["seeds"], sweep.content["confirm"]["seeds"] = [0, 1], [2, 3]
    assert sweep("--workers=2") == 0
    rows = sweep.results()
    # three values and the extension to 0.008 with two seeds each, then the best value, 0.004, with two new seeds
    expected = [
        (variant, phase, rate, seed)
        for variant in ("B", "B16")
        for phase, rates, seeds in (("select", [0.001, 0.002, 0.004, 0.008], [0, 1]), ("confirm", [0.004], [2, 3]))
        for rate in rates
        for seed in seeds
    ]
    trials = rows[["variant", "phase", "search/model.learning_rate", "seed"]].itertuples(index=False, name=None)
    assert list(trials) == expected
    assert set(rows["state"]) == {"complete"}
    assert list(rows["chosen"]) == [rate == 0.004 for _, _, rate, _ in expected]
    # rank 4 comes from the recipe, which `fake_fit` does not read: it takes its default, 8
    ranks = rows["variant"].map({"B": 4, "B16": 16})
    ranks = ranks.replace(4, 8)
    values = [score(r, k, s) for r, k, s in zip(rows["search/model.learning_rate"], ranks, rows["seed"], strict=True)]
    np.testing.assert_allclose(rows["val/acc1"], values)
    confirmed = rows["phase"] == "confirm"
    np.testing.assert_allclose(rows["test/acc1"][confirmed], np.array(values)[confirmed] - 0.01)
    assert rows["test/acc1"][~confirmed].isna().all()  # the phase `select` tests nothing
    assert [list(steps) for steps in rows["curve_steps"]] == [[1, 2, 3, 4, 5]] * len(rows)
    np.testing.assert_allclose(np.stack(rows["curve_values"].to_list())[:, -1], values)
    assert all((sweep.output / run / "metrics.json").is_file() for run in rows["run"])
    assert "the grid was extended to 0.008" in (sweep.output / "table.md").read_text()
    ends_once(sweep)
    assert "20 of 20" in capsys.readouterr().err
    before = sweep.history()
    assert sweep() == 0
    assert sweep.history() == before  # nothing is left to run
    same_but_times(rows, sweep.results())


def test_report_without_running(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--report") == 2
    assert "there is no sweep in" in capsys.readouterr().err
    sweep.content["confirm"]["seeds"] = []
    assert sweep() == 0
    (sweep.output / "results.parquet").unlink()
    history = sweep.history()
    assert sweep("--report") == 0
    assert len(sweep.results()) == 8
    assert sweep.history() == history


def test_diverging_trials_are_kept_and_rank_last(sweep: SweepCommand) -> None:
    sweep.content["search"]["model.learning_rate"] = [0.002, 0.004, 4.0]
    assert sweep("--workers=2") == 0
    rows = sweep.results().set_index("search/model.learning_rate")
    failed = rows.loc[4.0]
    assert set(failed["state"]) == {"failed"}
    assert set(failed["error"]) == {"train/loss is nan at step 1. Lower model.learning_rate."}
    assert not failed["chosen"].any()
    assert set(rows[rows["phase"] == "confirm"].index) == {0.004}


def test_trial_that_is_killed_twice_is_kept_as_failed(sweep: SweepCommand) -> None:
    sweep.content["variants"]["large"] = {"variant": "B", "data.batch_size": 100000}
    del sweep.content["variants"]["B16"]
    assert sweep("--workers=2") == 0
    rows = sweep.results()
    large = rows[rows["variant"] == "large"]
    assert set(large["error"]) == {"killed twice (SIGKILL), often because memory is full"}
    assert set(rows["state"][rows["variant"] != "large"]) == {"complete"}


def test_full_disk_stops_the_sweep(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.content["variants"] = {"B": {"data.num_workers": 9}}
    assert sweep() == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert "No space left on device" in message
    sweep.content["variants"] = {"B": {}}  # the same sweep, with space on the disk
    assert sweep() == 0
    assert set(sweep.results()["state"]) == {"complete"}


def test_a_fit_refused_before_its_first_step_ends_the_sweep(
    sweep: SweepCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.content["set"]["data.path"] = "missing"
    assert sweep() == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert "refused before its first step (data.path: missing is not here" in message
    del sweep.content["set"]["data.path"]  # allowed, since no trial has trained with this key
    assert sweep() == 0


def test_sampled_search(sweep: SweepCommand) -> None:
    sweep.content["search"] = {"model.learning_rate": {"low": 0.0005, "high": 0.05, "log": True}}
    sweep.content["trials_per_variant"] = 4
    sweep.content["select"]["seeds"] = [0, 1]
    assert sweep("--workers=2") == 0
    rows = sweep.results()
    selected = rows[rows["phase"] == "select"]
    assert (selected.groupby(["variant", "point"])["seed"].nunique() == 2).all()
    assert (selected.groupby("variant")["point"].nunique() == 4).all()
    assert selected["search/model.learning_rate"].between(0.0005, 0.05).all()
    best = selected.groupby(["variant", "point"])["val/acc1"].mean()
    chosen = rows[rows["phase"] == "confirm"].groupby("variant")["point"].unique()
    assert {name: list(points) for name, points in chosen.items()} == {
        name: [best[name].idxmax()] for name in ("B", "B16")
    }
    ends_once(sweep)


def test_median_pruning_stops_poor_trials(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    slowly(0.05)
    sweep.content["variants"] = {"B": {}}
    sweep.content["search"]["model.learning_rate"] = [0.002, 0.003, 0.004, 0.008, 0.128]
    sweep.content["prune"] = "median"
    assert sweep("--workers=2") == 0
    rows = sweep.results()
    pruned = rows[rows["state"] == "pruned"]
    assert set(pruned["search/model.learning_rate"]) == {0.128}
    assert all(1 < len(steps) < 5 for steps in pruned["curve_steps"])


def test_a_changed_sweep_file_is_refused(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.content["select"]["seeds"], sweep.content["confirm"]["seeds"] = [0, 1], []
    assert sweep("--workers=2") == 0
    capsys.readouterr()
    sweep.content["set"]["trainer.max_epochs"] = 2
    sweep.content["variants"]["B16"]["model.adapter.rank"] = 32
    sweep.content["search"]["model.learning_rate"] = [0.001, 0.002]
    sweep.content["select"]["seeds"] = [0]
    assert sweep() == 2
    message = capsys.readouterr().err
    for difference in (
        "set.trainer.max_epochs: 1 → 2",
        "variants.B16.model.adapter.rank: 16 → 32",
        "search.model.learning_rate: 0.004 removed",
        "select.seeds: 1 removed",
    ):
        assert difference in message


def test_additions_continue_a_sweep(sweep: SweepCommand) -> None:
    assert sweep("--workers=2") == 0
    before = sweep.history()
    sweep.content["variants"]["B32"] = {"variant": "B", "model.adapter.rank": 32}
    sweep.content["search"]["model.learning_rate"].append(0.006)
    sweep.content["confirm"]["seeds"].append(4)
    assert sweep("--workers=2") == 0
    assert not [key for key, count in before.items() if sweep.history()[key] != count]  # no trial ran again
    rows = sweep.results()
    assert set(rows["variant"]) == {"B", "B16", "B32"}
    assert set(rows["seed"][rows["phase"] == "confirm"]) == {2, 4}
    ends_once(sweep)


# ------------------------------------------------------------------------------------------------------ stopped, killed


def test_a_sweep_stopped_by_a_signal_continues(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    slowly(0.2)
    sweep.content["variants"] = {"B": {}}
    process = sweep.start("--workers=2")
    assert process.pid is not None
    _wait_for(lambda: len(_steps(sweep)) > 1)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "SIGINT: stopped; the trials are saved; the same command continues: python main.py sweep" in sweep.log()
    assert ("B/learning_rate=0.001/select_seed_0", "stop") in sweep.history()
    slowly(0)
    assert sweep("--workers=2") == 0
    ends_once(sweep)
    resumed = [json.loads(line)["event"] for line in (sweep.output / "trials" / "history").read_text().splitlines()]
    assert any(event.startswith("start ") and event != "start 0" for event in resumed)


def _steps(sweep: SweepCommand) -> list[int]:
    files = sweep.output.rglob("curve.jsonl")
    return [step for file in files for step in read_curve(file).points]


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("The condition was never met.")


def killed_at_random(
    sweep: SweepCommand, slowly: Callable[[float], None], kills: int, longest: float, pause: float
) -> None:
    """Compare the results of an uninterrupted sweep with those of a sweep that is killed again and again.

    Args:
        sweep: The sweep to run.
        slowly: Fixture that sets the seconds per step.
        kills: Number of kills of the whole process group.
        longest: Largest number of seconds between two kills.
        pause: Seconds per step of the killed sweep.
    """
    assert sweep("--workers=2") == 0
    expected = sweep.results()
    sweep.output = sweep.root / "killed"
    slowly(pause)
    for _ in range(kills):
        process = sweep.start("--workers=2")
        process.join(random.uniform(0.1, longest))
        assert process.exitcode is None  # still running, so that the kill interrupts trials
        kill(process)
    assert sweep("--workers=2") == 0
    same_but_times(expected, sweep.results())
    ends_once(sweep)


@pytest.mark.slow
def test_a_sweep_killed_as_a_group_has_the_same_results(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    random.seed(0)
    sweep.content["variants"] = {"B": {}}
    killed_at_random(sweep, slowly, kills=3, longest=1.0, pause=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(3))
def test_a_sweep_killed_ten_times_has_the_same_results(
    sweep: SweepCommand, slowly: Callable[[float], None], round_: int
) -> None:
    random.seed(round_)
    killed_at_random(sweep, slowly, kills=10, longest=1.5, pause=0.5)


def test_two_processes_share_a_study(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    slowly(0.02)
    processes = [sweep.start("--workers=2"), sweep.start()]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], sweep.log()
    ends_once(sweep)
    history = sweep.history()
    assert {count for (_, event), count in history.items() if event == "start"} == {1}
    assert len(sweep.results()) == 10


@pytest.mark.slow
def test_the_other_process_finishes_when_one_is_killed(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    slowly(0.05)
    first, second = sweep.start(), sweep.start()
    _wait_for(lambda: len(_steps(sweep)) > 2)
    kill(first)
    second.join()
    assert second.exitcode == 0, sweep.log()
    assert set(sweep.results()["state"]) == {"complete"}
    ends_once(sweep)


# ------------------------------------------------------------------------------------------------------------ real fits


def test_a_sweep_of_one_real_fit(tmp_path: Path, parquet_path: Path) -> None:
    sweep = SweepCommand(tmp_path)
    sweep.content |= {"variants": {"B": {}}, "search": {}, "confirm": {"seeds": [2], "report": ["test/acc1"]}}
    sweep.content["set"] = {"data.path": str(parquet_path), "trainer.max_epochs": 2}
    assert sweep() == 0
    (row,) = sweep.results().to_dict("records")
    run = sweep.output / row["run"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert row["state"] == "complete"
    assert row["test/acc1"] == metrics["test/acc1"]
    assert row["val/acc1"] == metrics["best/val/acc1"] == max(row["curve_values"])
    assert list(row["curve_steps"]) == [8, 16]
    config = (run / "config.yaml").read_text()
    assert "seed_everything: 2\n" in config
    assert "init_a: orthogonal" in config


@pytest.mark.slow
def test_a_sweep_of_real_fits_killed_and_restarted(tmp_path: Path, cli: CommandLine) -> None:
    sweep = SweepCommand(tmp_path)
    sweep.content["set"] = {"data.path": str(cli.data), "trainer.max_epochs": 2}
    sweep.content["search"]["model.learning_rate"] = [0.005, 0.02]
    assert sweep("--workers=2") == 0
    expected = sweep.results()
    sweep.output = tmp_path / "killed"
    random.seed(0)
    for _ in range(10):
        process = sweep.start("--workers=2")
        process.join(random.uniform(3, 20))
        kill(process)
    assert sweep("--workers=2") == 0
    restarted = sweep.results()
    varying = [column for column in expected if column in (*TIMES, "memory/peak_bytes") or column.startswith("time/")]
    pd.testing.assert_frame_equal(expected.drop(columns=varying), restarted.drop(columns=varying))
