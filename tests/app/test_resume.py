"""Resume: a run continues bit for bit. The command line overrides the checkpoint, which overrides the file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch
from PIL import Image

from app.callbacks import AdapterCheckpoint, RunSummary
from app.cli import main
from app.commands.run_records import read_record
from app.run.evaluations import add_evaluation, read_evaluations
from app.run.run_directory import LOCK
from tests.conftest import ROOT
from tests.support.refusals import refused
from tests.support.scores import scored

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# an epoch of 48 images has 8 steps with batches of 6; dropout and random crops are on
STEPS_AN_EPOCH = 8


class PowerCut(BaseException):
    """Simulated power cut. No code of Lightning or the callbacks handles this exception."""


def power_cut() -> None:
    raise PowerCut


def cut_power(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise PowerCut after this number of optimizer steps, at the start of the next batch."""
    original = AdapterCheckpoint.on_train_batch_start

    def hook(self: AdapterCheckpoint, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == step:
            raise PowerCut
        original(self, trainer, *args)

    monkeypatch.setattr(AdapterCheckpoint, "on_train_batch_start", hook)


def assert_same_end(cli: CommandLine, whole: int, resumed: int, trained: str = "B") -> None:
    """Check that final weights, optimizer, metrics and every logged loss are bit-identical."""
    uninterrupted, resumed_checkpoint = cli.checkpoint(whole), cli.checkpoint(resumed)
    assert uninterrupted["global_step"] == resumed_checkpoint["global_step"]
    assert uninterrupted["state_dict"].keys() == resumed_checkpoint["state_dict"].keys()
    for name, tensor in uninterrupted["state_dict"].items():
        assert torch.equal(tensor, resumed_checkpoint["state_dict"][name]), name
    for key, state in uninterrupted["optimizer_states"][0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, resumed_checkpoint["optimizer_states"][0]["state"][key][name])
    for tag in ("train/loss", "val/loss", f"spectrum/query/{trained}/largest", f"lr-AdamW/{trained}"):
        assert cli.scalars(tag, whole) == cli.scalars(tag, resumed), tag
    drop = ("time/", "memory/")
    first, second = ({k: v for k, v in cli.metrics(i).items() if not k.startswith(drop)} for i in (whole, resumed))
    assert first == second


def interrupt_and_resume(cli: CommandLine, finished_fit: Callable[..., None], options: list[str], cut: int) -> int:
    """Compare an uninterrupted run with a run that is cut and resumed. Return the step of the resumed checkpoint."""
    # how often last.ckpt is saved must not matter, so several cases share an uninterrupted run
    finished_fit(cli, *(option for option in options if not option.startswith("--checkpoint.last_every_n_steps")))
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, cut)
        with pytest.raises(PowerCut):
            cli("fit", *options)
    saved: int = cli.checkpoint(1)["global_step"]
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert_same_end(cli, whole=0, resumed=1)
    assert not cli.run(2).exists()
    return saved


# dropout of backbone and adapters is on; an epoch of 50 texts has 8 batches of 6 and 2 texts that are dropped
EVERY_3 = ["--checkpoint.last_every_n_steps=3"]
PACKED = ["--data.packing=true", "--data.batch_size=2", "--data.max_length=128", "--model.gradient_checkpointing=true"]


@pytest.mark.parametrize(
    ("any_cli", "options", "cut", "saved"),
    [
        # in the first epoch, two steps after the checkpoint
        pytest.param("cli", EVERY_3, 5, 3, marks=pytest.mark.slow),
        ("cli", EVERY_3, 8, 8),  # at the start of the second epoch, from the checkpoint of the first epoch's end
        # in the second epoch, from a checkpoint in the middle of this epoch
        ("cli", ["--checkpoint.last_every_n_steps=4"], 13, 12),
        # at the end of an epoch whose last images fill no batch, with worker processes that prefetch
        ("cli", ["--checkpoint.last_every_n_steps=5", "--data.batch_size=7", "--data.num_workers=1"], 6, 6),
        ("text_cli", [*EVERY_3, "--trainer.max_epochs=1"], 5, 3),
        # 8 batches an epoch are 3 steps: two of three batches, and one of two; the last step but one is saved
        (
            "text_cli",
            ["--checkpoint.last_every_n_steps=4", "--trainer.accumulate_grad_batches=3"],
            5,
            5,
        ),
        pytest.param(
            "summary_cli",
            ["--checkpoint.last_every_n_steps=2", "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=1"],
            3,
            3,
            marks=pytest.mark.slow,
        ),
        # 50 packed conversations are 4 steps of two batches; the third step is always saved
        (
            "instruction_cli",
            [
                *PACKED,
                *EVERY_3,
                "--data.num_workers=1",
                "--trainer.accumulate_grad_batches=2",
                "--trainer.max_epochs=1",
            ],
            3,
            3,
        ),
        pytest.param("instruction_cli", [*EVERY_3, "--trainer.max_epochs=1"], 5, 3, marks=pytest.mark.slow),
        pytest.param("summary_cli", ["--data.num_workers=1", *EVERY_3], 12, 11, marks=pytest.mark.slow),
    ],
    indirect=["any_cli"],
)
def test_resume_equals_uninterrupted(
    any_cli: CommandLine, finished_fit: Callable[..., None], options: list[str], cut: int, saved: int
) -> None:
    assert interrupt_and_resume(any_cli, finished_fit, options, cut) == saved


def test_the_last_step_but_one_of_an_epoch_is_saved_without_a_validation(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_power(monkeypatch, STEPS_AN_EPOCH - 1)
    with pytest.raises(PowerCut):
        cli("fit", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null")
    assert cli.checkpoint()["global_step"] == STEPS_AN_EPOCH - 1


def kill_and_resume(cli: CommandLine, options: list[str]) -> int:
    """Compare an uninterrupted run with a run that is killed and resumed. Return the step of the last checkpoint."""
    assert cli("fit", *options) == 0
    process = subprocess.Popen([sys.executable, "main.py", *cli.words("fit", *options)], cwd=ROOT)
    last = cli.run(1) / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved: int = cli.checkpoint(1)["global_step"]
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert_same_end(cli, whole=0, resumed=1)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("any_cli", "epochs"),
    [("cli", 40), ("text_cli", 60), ("summary_cli", 30), ("instruction_cli", 30)],
    indirect=["any_cli"],
)
def test_killed_process_resumes_bit_for_bit(any_cli: CommandLine, epochs: int) -> None:
    options = [f"--trainer.max_epochs={epochs}", *EVERY_3, "--model.adapter.targets=all"]
    assert 0 < kill_and_resume(any_cli, options) < epochs * STEPS_AN_EPOCH


def test_command_line_overrides_checkpoint_and_checkpoint_overrides_file(
    cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    # the file has learning rate 0.01; the first command line has 0.02 and adapter rank 2
    assert cli("fit", "--model.learning_rate=0.02", "--model.adapter.rank=2", "--model.schedule=constant") == 0
    capsys.readouterr()
    assert cli("fit", "--ckpt_path=last", "--model.learning_rate=0.5", "--trainer.max_epochs=3") == 0
    log = capsys.readouterr().err
    assert "model.learning_rate: 0.5 from the command line; the checkpoint had 0.02." in log
    assert "model.adapter.rank: 2 from the checkpoint; the configuration file has 4." in log
    assert "trainer.max_epochs: 3 now; the run began with 2." in log
    # the saved optimizer and schedule do not restore the old learning rate
    group = cli.checkpoint()["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.5
    assert cli.scalars("lr-AdamW/B")[max(cli.scalars("lr-AdamW/B"))] == 0.5
    assert cli.checkpoint()["state_dict"]["head.weight"].isfinite().all()


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_resuming_ignores_model_adapter_path(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    """A path that does not exist is ignored too: the checkpoint has all adapters."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {adapter_path: nowhere}}\n")
    option = f"--model.adapter_path={tmp_path}" if command == "fit" else f"--config={overlay}"
    assert fitted_cli(command, "--ckpt_path=last", "--trainer.max_epochs=1", option) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "adapter_path" in line]
    assert warnings == ["model.adapter_path is ignored, since the checkpoint contains the adapters."]
    assert fitted_cli.checkpoint()["hyper_parameters"]["adapter_path"] is None


def test_order_of_options_does_not_matter(cli: CommandLine) -> None:
    arguments = ["fit", "--model.learning_rate=0.05", *cli.words("fit", "--trainer.max_steps=1")[1:]]
    assert main(arguments) == 0
    assert cli.checkpoint()["hyper_parameters"]["learning_rate"] == 0.05


def test_a_resumed_run_updates_its_configuration_and_metrics(fitted_cli: CommandLine) -> None:
    """config.yaml is the newest configuration. Seconds add up over all fits, and peak memory is their maximum."""
    run, before = fitted_cli.run(), fitted_cli.metrics()
    first = (run / "config.yaml").read_text()
    resume = ("fit", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert fitted_cli(*resume) == 0
    assert "max_epochs: 2" in (run / "config.yaml").read_text()
    assert "ckpt_path: null" in (run / "config.yaml").read_text()
    (earlier,) = run.glob("config-2*.yaml")
    assert earlier.read_text() == first
    after = fitted_cli.metrics()
    assert after["time/fit_seconds"] > before["time/fit_seconds"]
    assert after["memory/peak_bytes"] >= before["memory/peak_bytes"]
    assert fitted_cli(*resume) == 0  # nothing is left to do
    assert fitted_cli.metrics() == after
    assert len(list(run.glob("config*.yaml"))) == 2


def test_peak_memory_is_the_maximum_over_all_resumed_fits(
    fitted_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fitted_cli.metrics()["memory/peak_bytes"]
    monkeypatch.setattr("app.callbacks.run_summary._peak_memory", lambda device: 1)
    assert fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert 1 < fitted_cli.metrics()["memory/peak_bytes"] <= before


def test_more_epochs_can_be_trained_from_the_best_checkpoint(fitted_cli: CommandLine) -> None:
    best = fitted_cli.run() / "checkpoints" / "best.ckpt"
    assert fitted_cli("fit", "--trainer.max_epochs=3", f"--ckpt_path={best}") == 0
    assert fitted_cli.checkpoint()["global_step"] == 3 * STEPS_AN_EPOCH
    assert sorted(fitted_cli.scalars("val/loss")) == [7, 15, 23]


def test_resume_with_another_number_of_workers_keeps_the_position(cli: CommandLine) -> None:
    options = ["--trainer.max_epochs=1", "--checkpoint.last_every_n_steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, 5)
        with pytest.raises(PowerCut):
            cli("fit", *options)
    assert cli.checkpoint()["global_step"] == 4  # after 24 of 48 images
    assert cli("fit", *options, "--ckpt_path=last", "--data.num_workers=1") == 0
    assert cli.checkpoint()["global_step"] == STEPS_AN_EPOCH


def test_of_equal_metrics_the_newest_is_the_best_also_after_a_resume(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, {8: 0.5, 16: 0.5, 24: 0.4, 32: 0.5})
    options = ("--checkpoint.monitor=val/acc1", "--checkpoint.mode=max", "--trainer.logger=false")
    for epochs, best in ((2, 16), (3, 16), (4, 32)):
        resumed = () if epochs == 2 else ("--ckpt_path=last",)
        assert cli("fit", f"--trainer.max_epochs={epochs}", *options, *resumed) == 0
        assert cli.checkpoint(name="best")["global_step"] == best


def test_a_moved_run_keeps_its_best(fitted_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    best = (fitted_cli.run() / "checkpoints" / "best.ckpt").read_bytes()
    moved = fitted_cli.root / "elsewhere"
    fitted_cli.run().rename(moved)
    scored(monkeypatch, {})
    assert fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path", str(moved)) == 0
    assert sorted(p.name for p in (moved / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert (moved / "checkpoints" / "best.ckpt").read_bytes() == best


def test_validate_needs_the_checkpoint_alone(fitted_cli: CommandLine) -> None:
    before = fitted_cli.metrics()["val/loss"]
    (fitted_cli.run() / "metrics.json").unlink()
    # no recipe and no data.path: both are in the checkpoint
    assert main(["validate", "--ckpt_path", str(fitted_cli.run()), "--trainer.accelerator=cpu"]) == 0
    assert fitted_cli.metrics()["val/loss"] == before


SAME_METRICS = "model: {init_args: {learning_rate: 1.0, adapter: {rank: 2}}}\ntrainer: {precision: 32-true}\n"
ROUNDED = "trainer: {precision: bf16-mixed}\ndata: {init_args: {val_fraction: 0.4}}\n"
FROM_CHECKPOINT = "data.val_fraction: 0.2 from the checkpoint; the configuration file has 0.4.\n"


@pytest.mark.parametrize(
    ("command", "recipe", "options", "lines", "precision"),
    [
        ("validate", SAME_METRICS, [], "", "32-true"),
        (
            "validate",
            ROUNDED,
            [],
            "trainer.precision: 32-true from the run; the configuration file has bf16-mixed.\n" + FROM_CHECKPOINT,
            "32-true",
        ),
        (
            "validate",
            "{}",
            ["--trainer.precision=bf16-mixed"],
            "trainer.precision: bf16-mixed from the command line; the run has 32-true.\n",
            "bf16-mixed",
        ),
        ("predict", ROUNDED.replace("bf16-mixed", "32-true"), ["--data.predict_path=PHOTOS"], "", "32-true"),
    ],
)
def test_an_evaluation_has_the_precision_of_the_run_and_logs_only_what_can_change_its_result(
    fitted_cli: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    recipe: str,
    options: list[str],
    lines: str,
    precision: str,
) -> None:
    photos, overlay = tmp_path / "photos", tmp_path / "overlay.yaml"
    photos.mkdir()
    Image.new("RGB", (16, 16)).save(photos / "1.png")
    overlay.write_text(recipe)
    used: list[str] = []
    monkeypatch.setattr(RunSummary, "report", lambda _, trainer, run: used.append(trainer.precision))
    options = [option.replace("PHOTOS", str(photos)) for option in options]
    capsys.readouterr()
    assert fitted_cli(command, f"--config={overlay}", f"--ckpt_path={fitted_cli.run()}", *options) == 0
    err = capsys.readouterr().err
    reported = [
        f"{line}\n" for line in err.splitlines() if re.search(" from the (run|checkpoint|command line); ", line)
    ]
    assert ("".join(reported), used) == (lines, [precision])


def test_last_names_the_run_that_it_takes(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    run = fitted_cli.run()
    line = f"ckpt_path: last is {run}, the newest run with a checkpoint below {fitted_cli.root}.\n"
    capsys.readouterr()
    assert fitted_cli("validate", "--ckpt_path=last") == 0
    assert line in capsys.readouterr().err
    words = ["--config=tests/conf/text.yaml", f"--trainer.default_root_dir={fitted_cli.root}", "--ckpt_path=last"]
    for command in ("fit", "test"):
        parts = (f"ckpt_path: {run}/checkpoints/last.ckpt was trained with", "the configuration names modules.text")
        refused(capsys, main([command, *words]), *parts)


def test_for_a_run_directory_fit_uses_the_last_and_validate_the_best_checkpoint(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fitted_cli.run()
    shutil.copy(run / "checkpoints" / "previous.ckpt", run / "checkpoints" / "best.ckpt")
    assert fitted_cli("fit", f"--ckpt_path={run}", "--trainer.max_epochs=1") == 0
    assert f"Nothing left to do: 1 epoch and {STEPS_AN_EPOCH} steps are done" in capsys.readouterr().err
    assert fitted_cli("validate", f"--ckpt_path={run}") == 0
    assert [evaluation.step for evaluation in read_evaluations(run)] == [STEPS_AN_EPOCH - 1]


TESTED = ("--trainer.max_epochs=1", "--test_after_fit=true")


def test_a_resumed_run_keeps_the_test_of_an_earlier_checkpoint(
    cli: CommandLine, finished_fit: Callable[..., None]
) -> None:
    """best.ckpt stays, so a model card needs its test scores. An evaluation of a later step goes."""
    finished_fit(cli, *TESTED)
    (tested,) = read_evaluations(cli.run())
    assert (tested.split, bool(tested.metrics)) == ("test", True)
    add_evaluation(cli.run(), replace(tested, step=STEPS_AN_EPOCH + 1))
    assert cli("fit", "--trainer.max_epochs=2", "--trainer.limit_train_batches=1", "--ckpt_path=last") == 0
    assert read_evaluations(cli.run()) == [tested]


def test_a_finished_run_that_is_resumed_and_killed_is_unfinished(fitted_cli: CommandLine) -> None:
    before = read_record(fitted_cli.run())
    resume = ("fit", "--trainer.max_epochs=2", "--ckpt_path=last")
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, STEPS_AN_EPOCH + 1)
        with pytest.raises(PowerCut):
            fitted_cli(*resume)
    killed = read_record(fitted_cli.run())
    assert (before.state, killed.state, killed.best) == ("finished", "unfinished", before.best)
    # a kill after the last checkpoint, before the figures of training are written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSummary, "on_fit_end", lambda *_: power_cut())
        with pytest.raises(PowerCut):
            fitted_cli(*resume)
    assert read_record(fitted_cli.run()).state == "unfinished"
    assert fitted_cli(*resume) == 0
    assert read_record(fitted_cli.run()).state == "finished"


def files_of(run: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of each file of a run. The lock names the process that used the run last."""
    paths = [path for path in run.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_resuming_a_finished_run_changes_no_file(
    cli: CommandLine, finished_fit: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    finished_fit(cli, *TESTED)
    before = files_of(cli.run())
    for options in ((), ("--find_lr=true", "--name=other")):  # a resumed run ignores both keys
        assert cli("fit", *TESTED, *options, "--ckpt_path=last") == 0
        captured = capsys.readouterr()
        done = f"Nothing left to do: 1 epoch and {STEPS_AN_EPOCH} steps are done. trainer.max_epochs is 1. Raise this"
        assert done in captured.err
        assert captured.out.splitlines()[-1] == f"Run directory: {cli.run()}"
        assert files_of(cli.run()) == before


def test_resuming_a_finished_run_does_what_is_new(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert fitted_cli("fit", *TESTED, "--ckpt_path=last") == 0
    assert "test/acc1" in fitted_cli.metrics()
    assert fitted_cli.checkpoint()["global_step"] == STEPS_AN_EPOCH
    # a kill between the training and its test
    (fitted_cli.run() / "config.yaml").write_text(
        (fitted_cli.run() / "config.yaml").read_text().replace("test_after_fit: false", "test_after_fit: true")
    )
    (fitted_cli.run() / "metrics.json").write_text('{"time/fit_seconds": 1.0}')
    assert fitted_cli("fit", *TESTED, "--ckpt_path=last") == 0
    assert "test/acc1" in fitted_cli.metrics()
