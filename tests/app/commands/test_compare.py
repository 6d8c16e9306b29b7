"""The command `compare`: keys and metrics that differ, one column for each run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from app.commands.compare import MISSING, cell_text, compare_values, short_names
from tests.app.commands.test_runs import write_run
from tests.support.refusals import refused


def rows(out: str) -> dict[str, list[str]]:
    """Return the cells of each printed row, by its first cell."""
    cells = [line.split() for line in out.splitlines() if line.startswith("  ") and line.strip()]
    return {first: others for first, *others in cells}


def test_real_runs_differ_in_their_options_and_metrics(
    finished_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [finished_runs[name] for name in ("b", "b_other_rank")]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    shown = rows(out)
    assert shown["model.adapter.rank"] == ["4", "2"]
    assert shown["model.adapter.alpha"] == ["16", "4"]
    assert "model.learning_rate" not in shown
    assert "b/version_0" in out
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert shown["params/trainable"] == [f"{run['params/trainable']:,}" for run in (first, second)]
    assert main(["compare", "--all", str(runs[0]), str(runs[1] / "checkpoints" / "last.ckpt")]) == 0
    assert rows(capsys.readouterr().out)["model.learning_rate"] == ["0.02", "0.02"]


def test_classes_and_missing_keys_differ_too() -> None:
    first = {"model.class_path": "a.A", "data.rank": 4, "data.rate": 1, "model.only": None}
    second = {"model.class_path": "b.B", "data.rank": 4, "data.rate": 1.0, "model.other": [1, "a"]}
    expected = {
        "model.class_path": ["a.A", "b.B"],
        "model.only": [None, MISSING],
        "model.other": [MISSING, [1, "a"]],
    }
    assert compare_values([first, second], with_equal=False) == expected
    assert list(compare_values([first, second], with_equal=True)) == [*expected, "data.rank", "data.rate"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("memory/peak_bytes", 5_300_000, "5.3 MB"),
        ("adapter/bytes", 999, "999 bytes"),
        ("time/fit_seconds", 220.4, "3 min 40 s"),
        ("time/fit_seconds", 59.7, "1 min"),
        ("time/fit_seconds", 3599.8, "1 h"),
        ("time/fit_seconds", 5.04, "5.0 s"),
        ("time/fit_seconds", 10**400, "1" + "0" * 400),
        ("time/fit_seconds", "long", "long"),
        ("val/loss", 0.25, "0.25"),
        ("params/trainable", 223_108, "223,108"),
        ("params/trainable", True, "true"),
        ("trainer.max_steps", 10_000, "10000"),  # As on the command line.
        ("trainer.wait_seconds", 90, "90"),  # A key of a configuration gets no unit.
        ("model.only", None, "null"),
        ("model.only", MISSING, "–"),
        ("model.other", [1, "a"], '[1, "a"]'),
    ],
)
def test_values_in_the_table(key: str, value: object, text: str) -> None:
    assert cell_text(key, value) == text


def test_json_has_the_values_without_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name / "version_0", seconds=seconds) for name, seconds in (("a", 220.4), ("b", 7000))]
    assert main(["compare", *map(str, runs)]) == 0
    assert "3 min 40 s" in (out := capsys.readouterr().out)
    assert "1 h 57 min" in out
    assert main(["compare", "--json", *map(str, runs)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["runs"] == ["a/version_0", "b/version_0"]
    assert content["metrics"] == {"time/fit_seconds": [220.4, 7000]}


def test_names_omit_the_folders_that_all_runs_share() -> None:
    paths = [Path("/x/runs/vit/version_0"), Path("/x/runs/vit/version_1"), Path("/x/runs/glue/version_0")]
    assert short_names(paths) == ["vit/version_0", "vit/version_1", "glue/version_0"]
    assert short_names(paths[:1] * 2) == ["version_0", "version_0"]


def test_equal_runs_have_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name / "version_0") for name in "ab"]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert out == "Keys of config.yaml: no difference.\nMetrics of metrics.json: no difference.\n"


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = (str(write_run(tmp_path / name)) for name in "ab")
    refused(capsys, main(["compare", run]), "RUN: one run cannot be compared. Give two or more.")
    refused(capsys, main(["compare", run, str(tmp_path / "c")]), "is neither a run directory")
    refused(capsys, main(["compare", run, str(tmp_path)]), "has no config.yaml and no metrics.json")
    (tmp_path / "b" / "config.yaml").write_text("\x1b[2J: [")
    refused(capsys, main(["compare", run, other]), "config.yaml or metrics.json of", "cannot be read")


def test_control_characters_in_a_run_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, path=path) for name, path in (("a", "\x1b[2J[bold]"), ("b", "c"))]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2J[bold]" in out
