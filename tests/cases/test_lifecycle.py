"""Runs that stop, resume, are killed or get checkpoints and callbacks that do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.app.conftest import *  # noqa: F403
from tests.app.test_resume import assert_same_end

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

STOPPING = "tests.support.stopping.StopAt"


def stop_at(batch: int, hook: str = "on_train_batch_end") -> list[str]:
    callback = [f"--trainer.callbacks+={STOPPING}", f"--trainer.callbacks.hook={hook}"]
    return ["--allow_imports", "tests.support", *callback, f"--trainer.callbacks.batch={batch}"]


def assert_same_best(cli: CommandLine, whole: int, resumed: int) -> None:
    one, other = cli.checkpoint(whole, "best"), cli.checkpoint(resumed, "best")
    assert one["global_step"] == other["global_step"]
    assert all(torch.equal(tensor, other["state_dict"][name]) for name, tensor in one["state_dict"].items())


MAX_STEPS = [
    "--model.schedule=constant",
    "--model.warmup_ratio=0",
]  # the others are planned for the steps that a run is told


@pytest.mark.parametrize(
    ("options", "stop", "saved"),
    [
        (MAX_STEPS, ["--trainer.max_steps=3"], 3),
        (MAX_STEPS, ["--trainer.max_steps=11"], 11),
        (MAX_STEPS, ["--trainer.max_steps=8"], 8),
        ([], stop_at(3), 3),
        ([], stop_at(8), 8),
        ([], stop_at(12, "on_train_batch_start"), 12),
        ([], stop_at(12, "on_before_zero_grad"), 12),
        (["--trainer.accumulate_grad_batches=3"], stop_at(4), 2),
        (["--trainer.accumulate_grad_batches=3"], stop_at(11), 4),
        ([*MAX_STEPS, "--trainer.accumulate_grad_batches=3"], ["--trainer.max_steps=2"], 2),
        (["--trainer.val_check_interval=4"], stop_at(3), 3),
        (["--trainer.val_check_interval=4"], stop_at(4), 4),
        (["--trainer.val_check_interval=3"], stop_at(8), 8),
        (["--trainer.val_check_interval=4"], stop_at(4, "on_validation_end"), 4),
        ([*MAX_STEPS, "--trainer.val_check_interval=4"], ["--trainer.max_steps=4"], 4),
        ([*MAX_STEPS, "--trainer.val_check_interval=0.5"], ["--trainer.max_steps=13"], 13),
        (["--trainer.val_check_interval=4", "--trainer.accumulate_grad_batches=3"], stop_at(4, "on_validation_end"), 1),
        (["--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null"], stop_at(10), 10),
        (["--trainer.check_val_every_n_epoch=2"], stop_at(8), 8),
        (["--trainer.limit_train_batches=5"], stop_at(7), 7),
        (["--trainer.limit_train_batches=5", "--trainer.limit_val_batches=1"], stop_at(5), 5),
        (["--trainer.max_steps=20", "--trainer.max_epochs=-1"], stop_at(8), 8),
        (["--trainer.max_steps=20", "--trainer.max_epochs=-1"], stop_at(11), 11),
        (["--data.num_workers=1"], stop_at(5), 5),
    ],
)
def test_case_01_a_stop_without_a_signal_is_a_pause(
    cli: CommandLine, options: list[str], stop: list[str], saved: int
) -> None:
    assert cli("fit", *options) == 0
    assert cli("fit", *options, *stop) == 0
    assert cli.checkpoint(1)["global_step"] == saved
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert_same_end(cli, whole=0, resumed=1)
    assert_same_best(cli, whole=0, resumed=1)
