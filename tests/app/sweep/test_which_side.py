"""Sweeps with a recipe from the command line, and sweeps with a time limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from app.cli import parse_fit, restricted_imports
from app.config.yaml_files import checked_yaml
from app.sweep.budget import Budget
from app.sweep.plan import Plan, SweepError, parse_plan, read_plan
from app.sweep.schedule import Job, Outline
from datamodules.errors import DataError
from tests.app.sweep.conftest import SweepCommand
from tests.app.sweep.test_plan import content

POINT = '{"model.learning_rate": 0.004}'
ONE_POINT = {"model.learning_rate": [0.004]}


@pytest.fixture(autouse=True)
def as_in_main() -> Iterator[None]:
    with restricted_imports(), checked_yaml():
        yield


def plan(*options: str, config: str = "image", **changes: Any) -> Plan:
    """Return a plan without the key `base`. A change to None removes a key."""
    return parse_plan(content(base=None, **changes), "tiny", parse_fit, [f"tests/conf/{config}.yaml"], options)


# -------------------------------------------------------------------------------------------------------- --base, --set


def test_recipe_and_keys_of_the_command_line_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: [tests/conf/text.yaml]\nset: {trainer.max_epochs: 1, data.batch_size: 2}\nvariants: [B]\n"
        "search: {model.learning_rate: [0.1]}\nselect: {metric: val/acc1}\n"
    )
    merged = read_plan(
        str(file),
        parse_fit,
        ["tests/conf/image.yaml", "conf/cpu.yaml"],
        ["trainer.max_epochs=3", "data.mean=[0.5, 0.1]", "model.init_args.weight_decay=1e-3", "data.path=a=b"],
    )
    assert merged.base == ("tests/conf/image.yaml", "conf/cpu.yaml")
    assert merged.set == {
        "trainer.max_epochs": 3,
        "data.batch_size": 2,
        "data.mean": [0.5, 0.1],
        "model.weight_decay": 0.001,
        "data.path": "a=b",
    }


def test_started_sweep_keeps_its_recipe(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    del sweep.content["base"]
    sweep.content["confirm"]["seeds"] = [2]
    sweep.content["search"] = ONE_POINT
    options = ["--base", "tests/conf/image.yaml", "--set", "data.batch_size=4", "--set=trainer.max_epochs=2"]
    assert sweep() == 2
    assert "base: the key is missing in the sweep's file. Give a recipe on the command line" in capsys.readouterr().err
    assert sweep(*options) == 0
    page = (sweep.output / "report.html").read_text()
    assert f"main.py sweep --config {sweep.file} {options[0]} {options[1]} --set data.batch_size=4" in page
    capsys.readouterr()
    assert sweep("--base", "tests/conf/domains.yaml", "--set", "data.batch_size=8") == 2
    message = capsys.readouterr().err
    for difference in (
        'base: ["tests/conf/image.yaml"] → ["tests/conf/domains.yaml"]',
        "set.data.batch_size: 4 → 8",
        "set.trainer.max_epochs: 2 → 1",
    ):
        assert difference in message
    assert message.count("error:") == 1
    assert sweep(*options, "--report") == 0


# ------------------------------------------------------------------------------------------------ keys from the recipe


def test_times_rank_multiplies_rank_and_alpha() -> None:
    variants = {"B": {}, "B2r": {"variant": "B", "times_rank": 2}}
    keys = plan(variants=variants).variants[1].keys
    # twice the recipe's rank 4 and twice the default alpha 16
    assert (keys["model.adapter.rank"], keys["model.adapter.alpha"]) == (8, 32)
    keys = plan("model.adapter.rank=3", "model.adapter.alpha=5", variants=variants).variants[1].keys
    assert (keys["model.adapter.rank"], keys["model.adapter.alpha"]) == (6, 10)


@pytest.mark.parametrize(
    ("config", "metric", "mode"), [("text", "val/score", "max"), ("instructions", "val/loss", "min")]
)
def test_the_metric_may_come_from_checkpoint_monitor(config: str, metric: str, mode: str) -> None:
    sweep = plan(config=config, select={"metric": "checkpoint.monitor"})
    assert (sweep.metric, sweep.mode) == (metric, mode)
    assert plan(config=config, select={"metric": "checkpoint.monitor", "mode": mode}).mode == mode


def test_variant_head_is_left_out_for_models_without_a_new_head(
    sweep: SweepCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.content |= {"variants": {"B": {}, "head": {}}, "search": ONE_POINT, "base": ["tests/conf/summary.yaml"]}
    assert sweep() == 0
    note = "head: left out, since the model of tests/conf/summary.yaml has no new head to train alone."
    assert note in capsys.readouterr().err
    assert note in (sweep.output / "table.md").read_text()
    assert set(sweep.results()["variant"]) == {"B"}
    assert [variant.name for variant in plan(variants=["B", "head"]).variants] == ["B", "head"]


WRONG: list[tuple[list[str], dict[str, Any], str]] = [
    (["trainer.max_epochs"], {}, "--set: 'trainer.max_epochs' has no value. Write KEY=VALUE"),
    (["data.x={a"], {}, "--set data.x: '{a' cannot be read as YAML"),
    (["task=cola"], {}, "--set task: write the key with dots"),
    (["seed_everything=1"], {}, "--set seed_everything: the sweep sets this key"),
    ([], {"variants": {"b": {"variant": "B", "times_rank": 0.5}}}, "variants.b.times_rank: 0.5 is no factor"),
    (
        [],
        {"variants": {"b": {"variant": "B", "times_rank": 2, "model.adapter.rank": 4}}},
        "variants.b.model.adapter.rank: times_rank sets this key",
    ),
    (
        ["checkpoint.monitor=null"],
        {"select": {"metric": "checkpoint.monitor"}},
        "select.metric: checkpoint.monitor is not set in tests/conf/image.yaml. Name a metric",
    ),
    (
        [],
        {"select": {"metric": "checkpoint.monitor", "mode": "min"}},
        "select.mode: min contradicts checkpoint.mode max of tests/conf/image.yaml",
    ),
]


@pytest.mark.parametrize(("options", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_options_are_refused(options: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError) as error:
        plan(*options, **changes)
    assert message in str(error.value)


# --------------------------------------------------------------------------------------------------------------- report


def test_the_test_metric_is_reported_if_there_is_a_test_split(parquet_path: Path, cola_path: Path) -> None:
    seeds = {"seeds": [2, 3]}
    tested = plan(f"data.path={parquet_path}", confirm=seeds)
    assert tested.report == ("test/acc1",)
    assert tested.is_tested
    assert not tested.notes
    hidden = plan(f"data.path={cola_path}", config="text", select={"metric": "val/score"}, confirm=seeds)
    assert hidden.report == ("val/score",)
    assert not hidden.is_tested
    assert "no test split with labels, so the table reports val/score" in hidden.notes[0]
    options = [f"data.path={cola_path}", "data.test_on_validation=true"]
    assert plan(*options, config="text", select={"metric": "val/score"}, confirm=seeds).report == ("test/score",)
    with pytest.raises(DataError, match=r"data\.path: nowhere"):
        plan("data.path=nowhere", confirm=seeds)


def test_validation_alone_is_reported_without_a_test(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.content |= {"search": ONE_POINT, "confirm": {"seeds": [2, 3], "report": ["val/acc1"]}}
    assert sweep() == 0
    assert not [name for name in sweep.results().columns if name.startswith("test/")]
    assert "The table reports validation data, which made the choice too." in (sweep.output / "table.md").read_text()
    sweep.content["confirm"]["report"] = ["test/acc1"]
    assert sweep() == 2
    assert 'confirm.report: ["val/acc1"] → ["test/acc1"], but no confirming trial was tested' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- time limit


def finished(job: Job, seconds: float) -> FrozenTrial:
    return optuna.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs={"seconds": seconds})


def test_seeds_begin_one_at_a_time_and_only_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = plan(variants=["B", "lora"], confirm={"seeds": [2, 3, 4], "report": ["val/acc1"]})
    choice = {Job("B", "select", POINT, 0): 10.0, Job("lora", "select", POINT, 0): 30.0}
    trials = {job: finished(job, seconds) for job, seconds in choice.items()}
    jobs = [Job(name, "confirm", POINT, seed) for seed in (2, 3, 4) for name in ("B", "lora")]
    budget = Budget(tiny, minutes=1, workers=2, began=0)
    assert budget.seconds_for(jobs[:2], trials, {}) == 30  # side by side
    assert budget.seconds_for(jobs[:4], trials, {}) == 50  # worker 1: B, B and lora (50 s); worker 2: lora (30 s)
    assert budget.seconds_for(jobs[:2], trials, {jobs[2]: 4.0}) == 36  # one worker is free after 6 seconds
    assert budget.seconds_for(jobs[:2], {}, {}) is None
    seconds_left = 29.0
    monkeypatch.setattr(Budget, "left", property(lambda _: seconds_left))
    assert budget.allowed(Outline(needed=jobs), trials, {}) == []
    seconds_left = 31.0
    assert budget.allowed(Outline(needed=jobs), trials, {}) == jobs[:2]
    seconds_left = 1.0
    assert budget.allowed(Outline(needed=jobs), trials, {}) == jobs[:2]  # a seed that has begun is finished
    running = trials | dict.fromkeys(jobs[:2], optuna.create_trial(state=TrialState.RUNNING))
    assert budget.allowed(Outline(needed=jobs), running, {jobs[0]: 9.0, jobs[1]: 9.0}) == jobs[:2]
    seconds_left = 40.0
    assert budget.allowed(Outline(needed=jobs), running, {jobs[0]: 9.0, jobs[1]: 9.0}) == jobs[:2]
    seconds_left = 42.0  # 1 s until a worker is free, then 10 s for B and 30 s for lora
    assert budget.allowed(Outline(needed=jobs), running, {jobs[0]: 9.0, jobs[1]: 9.0}) == jobs[:4]
    seconds_left = -1.0
    assert budget.allowed(Outline(needed=jobs), trials, {}) == []
    choosing = Outline(needed=list(choice))
    seconds_left = 0.1
    assert budget.allowed(choosing, {}, {}) == list(choice)  # the choice begins however short the time is


def test_a_time_limit_reduces_the_number_of_seeds(
    sweep: SweepCommand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.content |= {"search": ONE_POINT, "confirm": {"seeds": [2, 3, 4], "report": ["test/acc1"]}}
    seconds = lambda self, jobs, *_: 99999.0 if any(job.seed == 4 for job in jobs) else 0.0  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "seconds_for", seconds)
        assert sweep("--minutes=30", "--workers=2") == 0
    output = capsys.readouterr()
    assert (
        "The time limit of 30 minutes was enough for two of three confirming seeds: too few for an interval"
        in output.out
    )
    assert "Seed 4 is not started: all variants would take about 27 h 47 min" in output.err
    rows = sweep.results()
    assert list(rows["seed"][rows["variant"] == "B"]) == list(rows["seed"][rows["variant"] == "B16"]) == [2, 3]
    table = (sweep.output / "table.md").read_text()
    assert "come from other seeds: 2 and 3." in table
    assert "Another seed of all variants would take about 27 h 47 min more. The same command " in table
    assert "has not finished" not in table
    page = (sweep.output / "report.html").read_text()
    assert f"sweep --config {sweep.file} --minutes 30" in page
    assert sweep("--report") == 0
    assert (sweep.output / "table.md").read_text() == table  # the study stores the time limit
    assert sweep("--minutes=30") == 0  # another 30 minutes
    assert "The time limit of" not in (sweep.output / "table.md").read_text()
    assert set(sweep.results()["seed"]) == {2, 3, 4}


def test_a_seed_that_only_some_variants_finished_is_left_out_of_the_table(
    sweep: SweepCommand, monkeypatch: pytest.MonkeyPatch, slowly: Callable[[float], None]
) -> None:
    slowly(0.1)
    sweep.content |= {"search": ONE_POINT, "confirm": {"seeds": [2, 3], "report": ["test/acc1"]}}
    last = sweep.output / "trials" / "B16" / "learning_rate=0.004" / "confirm_seed_3" / "curve.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "left", property(lambda _: 0.0 if last.exists() else 3600.0))
        patch.setattr(Budget, "seconds_for", lambda *_: 0.0)
        assert sweep("--minutes=60") == 0
    assert sweep.results()["state"].eq("complete").sum() == 3
    table = (sweep.output / "table.md").read_text()
    assert "enough for one of two confirming seeds" in table
    assert "The table leaves out seed 3, which not all variants have finished." in table
    (b,) = (line for line in table.splitlines() if line.startswith("| B |"))
    assert b.split("|")[3].strip() == "1"  # the table has one seed of B, although two are complete
    assert sweep() == 0  # finish without a time limit
    assert "The time limit of" not in (sweep.output / "table.md").read_text()
    assert sweep.results()["state"].eq("complete").sum() == 4
    assert not [key for key in sweep.history() if key[1] == "collision"]


def test_a_time_limit_may_end_before_the_choice(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    slowly(0.1)
    sweep.content["select"]["seeds"] = [0]
    sweep.content["search"]["model.learning_rate"] = [0.004, 0.008]
    # 1.2 seconds, and the six trials of the choice take at least 1.5
    assert sweep("--minutes=0.02", "--workers=2") == 0
    table = (sweep.output / "table.md").read_text()
    assert "The time limit of 0.02 minutes ended the sweep before the choice:" in table
    assert set(sweep.results()["phase"]) <= {"select"}


def test_minutes_must_be_positive(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--minutes=0") == 2
    assert "--minutes: 0 must be above 0." in capsys.readouterr().err


def test_successive_halving_stops_poor_trials(sweep: SweepCommand, slowly: Callable[[float], None]) -> None:
    slowly(0.1)
    sweep.content |= {"variants": {"B": {}}, "prune": "halving", "confirm": {}}
    sweep.content["select"]["seeds"] = [0]
    sweep.content["search"]["model.learning_rate"] = [0.002, 0.004, 0.128]
    assert sweep("--workers=1") == 0
    rows = sweep.results().set_index("search/model.learning_rate")
    assert rows["state"].to_dict() == {0.002: "complete", 0.004: "complete", 0.128: "pruned"}
    assert 1 < len(rows.loc[0.128, "curve_steps"]) < 5
    assert "stopped early (successive halving)" in (sweep.output / "table.md").read_text()
