"""The command `runs`: one row for each run, its state, sorting, CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import main
from app.commands.run_records import dotted, find_runs, read_record
from app.commands.runs import sort_records
from app.config.variants import VARIANTS, variant_keys, variant_name
from app.run.run_directory import locked
from tests.support.refusals import refused


def write_run(
    directory: Path,
    variant: str = "B",
    best: float | None = 0.5,
    metric: str = "val/acc1",
    mode: str = "max",
    seconds: float = 2.0,
    parameters: int = 100,
    **data: Any,
) -> Path:
    """Write the two files of a run that the command reads, in the format of `fit`."""
    model: dict[str, Any] = {"adapter": {"rank": 4, "train": "B", "init_a": "orthogonal", "init_b": "zero"}}
    for key, value in variant_keys(variant).items():
        section = model["adapter"] if key.startswith("model.adapter.") else model
        section[key.rpartition(".")[2]] = value
    content = {
        "model": {"class_path": "modules.image_classification.ImageClassifier", "init_args": model},
        "data": {
            "class_path": "datamodules.text_classification.TextClassificationData",
            "init_args": {"path": "photos", "task": None, **data},
        },
        "checkpoint": {"monitor": metric, "mode": mode},
    }
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(content))
    metrics = {f"best/{metric}": best} if best is not None else {}
    results = {**metrics, "params/trainable": parameters, "time/fit_seconds": seconds}
    (directory / "metrics.json").write_text(json.dumps(results))
    return directory


def listed(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", str(root), "--json", *options]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_a_real_run_is_listed_with_its_metrics(
    finished_runs: dict[str, Path], capsys: pytest.CaptureFixture[str], parquet_path: Path
) -> None:
    root = finished_runs["b"].parents[1]
    rows = {row["name"]: row for row in listed(capsys, root)}
    assert set(rows) == {f"{name}/version_0" for name in finished_runs}
    row = rows["b/version_0"]
    metrics = json.loads((finished_runs["b"] / "metrics.json").read_text())
    assert (row["state"], row["variant"], row["path"], row["task"]) == ("finished", "B", str(parquet_path), None)
    assert (row["metric"], row["best"]) == ("val/acc1", metrics["best/val/acc1"])
    assert (row["parameters"], row["seconds"]) == (metrics["params/trainable"], metrics["time/fit_seconds"])
    assert rows["head/version_0"]["variant"] == "head"
    assert (
        rows["both/version_0"]["variant"] == "custom"
    )  # No built-in variant trains both factors from an orthogonal A.
    assert main(["runs", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"{len(finished_runs)} runs below {root}" in out
    line = next(line for line in out.splitlines() if line.split()[:1] == ["b/version_0"])
    assert f" {parquet_path.name}  " in line
    assert f" val/acc1 {metrics['best/val/acc1']:.4g} " in line


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variant_is_inferred_from_the_keys(tmp_path: Path, name: str) -> None:
    keys = read_record(write_run(tmp_path / "version_0", name)).keys
    assert variant_name(keys) == name
    changed = "model.tuning" if name in ("head", "adalora", "ia3") else list(VARIANTS[name])[-1]
    assert variant_name({**keys, changed: "other"}) == "custom"
    assert variant_name({}) == "custom"


def test_each_state_of_a_run_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a" / "finished")
    for name in ("version_0", "version_1", "version_2", "version_3"):
        write_run(tmp_path / "a" / name)
    (tmp_path / "a" / "version_0" / "metrics.json").unlink()
    (tmp_path / "a" / "version_0" / "checkpoints").mkdir()
    (tmp_path / "a" / "version_0" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "a" / "version_1" / "metrics.json").unlink()
    (tmp_path / "a" / "version_2" / "metrics.json").write_text("{")
    (tmp_path / "a" / "version_3" / "config.yaml").write_text("model: [")
    (tmp_path / "a" / "version_4").mkdir()
    (tmp_path / "a" / "version_5").mkdir()
    (tmp_path / "a" / "version_5" / "metrics.json").write_text('{"test/acc1": 0.5}')
    (tmp_path / "a" / "no_run").mkdir()
    (tmp_path / "a" / "no_run" / "config.yaml").write_text("model: 1")
    rows = {row["name"]: row for row in listed(capsys, tmp_path)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a/finished": "finished",
        "a/version_0": "unfinished",
        "a/version_1": "failed",
        "a/version_2": "damaged",
        "a/version_3": "damaged",
        "a/version_4": "failed",
        "a/version_5": "evaluated",
    }
    assert rows["a/version_2"]["variant"] == "B"  # config.yaml is intact.
    assert rows["a/version_3"]["seconds"] == 2.0
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 unfinished: the fit was stopped, and a checkpoint is there to resume." in out
    assert "2 damaged: config.yaml or metrics.json cannot be read." in out


def test_a_locked_run_is_running(tmp_path: Path) -> None:
    run = write_run(tmp_path / "version_0")
    reader, writer = os.pipe()
    ready, signal_ready = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with locked(run):
                os.write(signal_ready, b"1")
                os.read(reader, 1)
        finally:
            os._exit(0)
    try:
        assert os.read(ready, 1) == b"1"
        assert read_record(run).state == "running"
    finally:
        os.write(writer, b"1")
        os.waitpid(process, 0)
    assert read_record(run).state == "finished"
    with locked(run):  # Reading the record has released the lock.
        pass


def test_names_sort_by_their_numbers_and_runs_inside_runs_are_ignored(tmp_path: Path) -> None:
    for name in ("version_10", "version_9", "version_9/version_0"):
        write_run(tmp_path / "recipe" / name)
    assert [run.name for run in find_runs(tmp_path)] == ["version_9", "version_10"]
    (record,) = [read_record(run) for run in find_runs(tmp_path / "recipe" / "version_10")]
    assert record.variant == "B"


def test_columns_sort_with_missing_values_last(tmp_path: Path) -> None:
    write_run(tmp_path / "version_0", best=0.5, seconds=3.0, parameters=7, path="z")
    write_run(tmp_path / "version_1", "head", best=0.9, seconds=1.0, parameters=8, task="cola")
    write_run(tmp_path / "version_2", best=0.4, metric="val/loss", mode="min", seconds=2.0)
    write_run(tmp_path / "version_3", best=0.3, metric="val/loss", mode="min", seconds=4.0)
    write_run(tmp_path / "version_4", best=None, seconds=5.0)
    for number, run in enumerate(sorted(tmp_path.iterdir())):
        os.utime(run / "config.yaml", (number, number))
    records = [read_record(run) for run in find_runs(tmp_path)]

    def order(column: Any) -> list[int]:
        return [int(record.directory.name[-1]) for record in sort_records(records, column)]

    assert order("name") == [0, 1, 2, 3, 4]
    assert order("best") == [1, 0, 3, 2, 4]
    assert order("seconds") == [1, 2, 0, 3, 4]
    assert order("parameters") == [0, 1, 2, 3, 4]
    assert order("variant") == [0, 2, 3, 4, 1]
    assert order("data") == [2, 3, 4, 1, 0]
    assert order("date") == [4, 3, 2, 1, 0]


def test_csv_has_one_row_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "r" / "version_0", path='a, "b"', task="cola")
    write_run(tmp_path / "runs" / "r" / "version_1", best=None)
    assert main(["runs", str(tmp_path / "runs"), "--csv", str(tmp_path / "table.csv")]) == 0
    assert "Runs: 2 in" in capsys.readouterr().out
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["r/version_0", "r/version_1"]
    assert (rows[0]["path"], rows[0]["task"], rows[0]["best"]) == ('a, "b"', "cola", "0.5")
    assert (rows[1]["metric"], rows[1]["best"], rows[1]["task"]) == ("", "", "")
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty"), "--csv", str(tmp_path / "none.csv")]) == 0
    header = (tmp_path / "table.csv").read_text().splitlines()[0]
    assert (tmp_path / "none.csv").read_text().splitlines() == [header]


def test_malformed_values_and_control_characters_are_shown_without_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "version_0", path="x\x1b[2J[red]y", task=date(2026, 11, 28))
    metrics = {"best/val/\x1b[2J": 10**400, "params/trainable": [1], "time/fit_seconds": {"a": 1}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (row,) = listed(capsys, tmp_path, "--sort=best")
    assert (row["best"], row["parameters"], row["seconds"], row["task"]) == (None, None, None, "2026-11-28")
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "x\\x1b[2J[red]y" in out


def test_listing_reads_two_files_of_each_run_with_the_c_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand runs take seconds. PyYAML's scanner in Python would take ten times as long."""
    write_run(tmp_path / "version_0")
    shutil.copytree(tmp_path / "version_0", tmp_path / "version_1")
    opened: list[str] = []
    read_text = Path.read_text

    def counted(path: Path, *args: Any, **keys: Any) -> str:
        opened.append(path.name)
        return read_text(path, *args, **keys)

    monkeypatch.setattr(Path, "read_text", counted)
    monkeypatch.setattr(yaml.scanner.Scanner, "fetch_more_tokens", None)
    assert [read_record(run).variant for run in find_runs(tmp_path)] == ["B", "B"]
    assert sorted(opened) == ["config.yaml"] * 2 + ["metrics.json"] * 2


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["runs", str(tmp_path / "nothing")]), "ROOT: there is no directory")
    refused(capsys, main(["runs", str(tmp_path), "--sort", "colour"]), "sort")
    refused(capsys, main(["runs", str(tmp_path), "--csv", "x.csv", "--json"]), "--csv and --json exclude each other")
    assert main(["runs", str(tmp_path)]) == 0
    assert f"0 runs below {tmp_path}" in capsys.readouterr().out


def test_dotted_keys_match_the_command_line() -> None:
    tree = {"model": {"class_path": "a.B", "init_args": {"adapter": {"rank": 4}, "args": {}}}, "seed": 0}
    assert dotted(tree) == {"model.class_path": "a.B", "model.adapter.rank": 4, "model.args": {}, "seed": 0}
