"""An interrupted run continues bit for bit, and the command line beats the checkpoint, which beats the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import pytest
import torch

from app.callbacks import AdapterCheckpoint
from tests.conftest import ROOT, png

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# 48 images are 8 steps of 6 an epoch (of 7, six and a rest); dropout of two kinds and random crops are on
STEPS_AN_EPOCH = 8


class PowerCut(BaseException):
    """Ends the process as nothing that Lightning or the callbacks handle."""


def cut_power(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Cut the power when a given number of optimizer steps are done and another batch has begun."""
    original = AdapterCheckpoint.on_train_batch_start

    def hook(self: AdapterCheckpoint, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == step:
            raise PowerCut
        original(self, trainer, *args)

    monkeypatch.setattr(AdapterCheckpoint, "on_train_batch_start", hook)


def assert_same_end(cli: CommandLine, whole: int, resumed: int) -> None:
    """Final weights, optimizer, metrics and every logged loss are the same bits."""
    one, other = cli.checkpoint(whole), cli.checkpoint(resumed)
    assert one["global_step"] == other["global_step"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    for key, state in one["optimizer_states"][0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, other["optimizer_states"][0]["state"][key][name])
    for tag in ("train/loss", "val/loss", "spectrum/query/B/largest", "lr-AdamW/B"):
        assert cli.scalars(tag, whole) == cli.scalars(tag, resumed), tag
    drop = ("time/", "memory/")
    first, second = ({k: v for k, v in cli.metrics(i).items() if not k.startswith(drop)} for i in (whole, resumed))
    assert first == second


def interrupt_and_resume(cli: CommandLine, options: list[str], cut: int) -> int:
    """Run once whole and once with a power cut and a resume, to the same end; the step that was resumed from."""
    assert cli("fit", *options) == 0
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, cut)
        with pytest.raises(PowerCut):
            cli("fit", *options)
    saved: int = cli.checkpoint(1)["global_step"]
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert_same_end(cli, whole=0, resumed=1)
    assert not cli.run(2).exists()
    return saved


@pytest.mark.parametrize(
    ("cut", "every", "batch", "workers"),
    [
        (5, 3, 6, 0),  # in the first epoch, two steps behind the checkpoint
        (8, 3, 6, 0),  # at the start of the second: the checkpoint is that of the first epoch's end
        (13, 4, 6, 0),  # in the second epoch, checkpoint in its middle
        pytest.param(21, 1, 6, 0, marks=pytest.mark.slow),  # in the third, right behind a checkpoint
        pytest.param(13, 4, 6, 2, marks=pytest.mark.slow),  # with worker processes that load ahead
        (6, 5, 7, 0),  # an epoch's end with images left over
        (6, 5, 7, 2),  # the same with workers
    ],
)
def test_resume_equals_uninterrupted(cli: CommandLine, cut: int, every: int, batch: int, workers: int) -> None:
    options = ["--trainer.max_epochs=3", f"--checkpoint.last_every_n_steps={every}", f"--data.batch_size={batch}"]
    saved = interrupt_and_resume(cli, [*options, f"--data.num_workers={workers}"], cut)
    assert saved == max(s for s in range(cut + 1) if s % every == 0 or s % (48 // batch) == 0)


def test_resume_from_best_continues_behind_its_epoch(cli: CommandLine) -> None:
    options = ["--trainer.max_epochs=2", "--checkpoint.monitor=null"]
    assert cli("fit", *options) == 0
    whole = cli.checkpoint()["state_dict"]
    assert cli("fit", "--trainer.max_epochs=1", "--checkpoint.monitor=null") == 0
    assert cli("fit", *options, "--ckpt_path", str(cli.run(1) / "checkpoints" / "best.ckpt")) == 0
    assert cli.checkpoint(1)["global_step"] == 2 * STEPS_AN_EPOCH
    assert whole.keys() == cli.checkpoint(1)["state_dict"].keys()


def kill_and_resume(cli: CommandLine, options: list[str]) -> int:
    """Run once whole and once killed and resumed, to the same end; the step of the checkpoint that the kill left."""
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
def test_killed_process_resumes_to_the_same_bits(cli: CommandLine) -> None:
    options = ["--trainer.max_epochs=40", "--checkpoint.last_every_n_steps=3", "--model.adapter.targets=all"]
    assert 0 < kill_and_resume(cli, options) < 40 * STEPS_AN_EPOCH


def test_command_line_beats_checkpoint_beats_file(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    # the file says 0.01, the first command line 0.02 and rank 2
    assert cli("fit", "--model.learning_rate=0.02", "--model.adapter.rank=2", "--model.schedule=constant") == 0
    capsys.readouterr()
    assert cli("fit", "--ckpt_path=last", "--model.learning_rate=0.5", "--trainer.max_epochs=3") == 0
    said = capsys.readouterr().err
    assert "model.learning_rate: 0.5 from the command line; the checkpoint had 0.02." in said
    assert "model.adapter.rank: 2 from the checkpoint; the configuration file has 4." in said
    assert "trainer.max_epochs: 3 now; the run began with 2." in said
    # the saved optimizer and schedule do not bring the old rate back
    group = cli.checkpoint()["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.5
    assert cli.scalars("lr-AdamW/B")[max(cli.scalars("lr-AdamW/B"))] == 0.5
    assert cli.checkpoint()["state_dict"]["head.weight"].isfinite().all()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_beats_adapters_to_start_from(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    """Even those that are not there: the checkpoint has all."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(png(np.zeros((16, 16, 3), np.uint8)))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {adapter_path: nowhere}}\n")
    options = ["--ckpt_path=last", "--trainer.max_epochs=1"]
    options += [f"--data.predict_path={tmp_path / 'pictures'}"] if command == "predict" else []
    given = f"--model.adapter_path={tmp_path}" if command in ("fit", "test") else f"--config={overlay}"
    assert fitted_cli(command, *options, given) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "adapter_path" in line]
    assert said == ["model.adapter_path is not read: the checkpoint has the adapters."]
    assert fitted_cli.checkpoint()["hyper_parameters"]["adapter_path"] is None


def test_order_of_words_does_not_matter(cli: CommandLine) -> None:
    words = ["fit", "--model.learning_rate=0.05", *cli.words("fit", "--trainer.max_epochs=1")[1:]]
    from app.cli import main

    assert main(words) == 0
    assert cli.checkpoint()["hyper_parameters"]["learning_rate"] == 0.05


def test_a_resumed_run_keeps_its_record(fitted_cli: CommandLine) -> None:
    """The newest configuration is config.yaml; seconds add up, and peak memory is the largest of all legs."""
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


def test_peak_memory_is_that_of_all_legs(fitted_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fitted_cli.metrics()["memory/peak_bytes"]
    monkeypatch.setattr("app.callbacks.run_summary._peak_memory", lambda device: 1)
    assert fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert 1 < fitted_cli.metrics()["memory/peak_bytes"] <= before


def test_more_epochs_than_first_meant_can_be_added(fitted_cli: CommandLine) -> None:
    assert fitted_cli("fit", "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    assert fitted_cli.checkpoint()["global_step"] == 3 * STEPS_AN_EPOCH
    assert sorted(fitted_cli.scalars("val/loss")) == [7, 15, 23]


def test_resume_with_other_workers_keeps_the_place(cli: CommandLine) -> None:
    options = ["--trainer.max_epochs=1", "--checkpoint.last_every_n_steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, 5)
        with pytest.raises(PowerCut):
            cli("fit", *options)
    assert cli.checkpoint()["global_step"] == 4  # 24 of 48 images
    assert cli("fit", *options, "--ckpt_path=last", "--data.num_workers=1") == 0
    assert cli.checkpoint()["global_step"] == STEPS_AN_EPOCH


def test_a_moved_run_keeps_its_best(fitted_cli: CommandLine) -> None:
    best = (fitted_cli.run() / "checkpoints" / "best.ckpt").read_bytes()
    moved = fitted_cli.root / "elsewhere"
    fitted_cli.run().rename(moved)
    # at rate 1e-9 nothing improves
    options = ["--trainer.max_epochs=2", "--model.learning_rate=1e-9", "--ckpt_path", str(moved)]
    assert fitted_cli("fit", *options) == 0
    assert sorted(p.name for p in (moved / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert (moved / "checkpoints" / "best.ckpt").read_bytes() == best


def test_a_checkpoint_alone_says_enough(cli: CommandLine) -> None:
    from app.cli import main

    assert cli("fit", "--test_after_fit=true") == 0
    before = cli.metrics()["test/loss"]
    (cli.run() / "metrics.json").unlink()
    # neither a recipe nor the path of the data: the checkpoint holds both
    assert main(["test", "--ckpt_path", str(cli.run()), "--trainer.accelerator=cpu"]) == 0
    assert cli.metrics()["test/loss"] == before
