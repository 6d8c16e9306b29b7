"""Cases of a run's life: stops, resumes, kills, unsupported callbacks and malformed checkpoints."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lightning as L
import pytest
import torch

from app.callbacks import AdapterCheckpoint
from modules.base import AdaptedModule
from modules.training.frozen_digest import digest_of
from modules.training.optimization import RangeTest
from tests.app.conftest import *  # noqa: F403
from tests.app.test_bad_input import refused
from tests.app.test_resume import STEPS_AN_EPOCH, assert_same_end

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

STOPPING = "tests.support.stopping.StopAt"


def stop_at(batch: int, hook: str = "on_train_batch_end") -> list[str]:
    callback = [f"--trainer.callbacks+={STOPPING}", f"--trainer.callbacks.hook={hook}"]
    return ["--allow_imports", "tests.support", *callback, f"--trainer.callbacks.batch={batch}"]


def assert_same_best(cli: CommandLine, whole: int, resumed: int) -> None:
    first, second = cli.checkpoint(whole, "best"), cli.checkpoint(resumed, "best")
    assert first["global_step"] == second["global_step"]
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())


# other schedules depend on the planned number of steps, which --trainer.max_steps changes
CONSTANT = ["--model.schedule=constant", "--model.warmup_ratio=0"]
VAL_4, VAL_3, ACCUMULATE = (
    "--trainer.val_check_interval=4",
    "--trainer.val_check_interval=3",
    "--trainer.accumulate_grad_batches=3",
)
BY_STEPS = ["--trainer.max_steps=20", "--trainer.max_epochs=-1"]
EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.7"]
UPDATE_EPOCHS = ["--trainer.callbacks.update_every_n_steps=0", "--trainer.callbacks.update_starting_at_epoch=0"]
# options of both runs, options that stop the second run, and the step of its last checkpoint
STOPS = [
    (CONSTANT, ["--trainer.max_steps=3"], 3),
    ([VAL_4, ACCUMULATE], stop_at(4, "on_validation_end"), 1),
    ([*EMA, "--trainer.callbacks.update_every_n_steps=2", VAL_3], stop_at(6), 6),
]
MORE_STOPS = [
    ([ACCUMULATE], stop_at(11), 4),
    ([VAL_4], stop_at(4), 4),
    (BY_STEPS, stop_at(8), 8),
    (CONSTANT, ["--trainer.max_steps=11"], 11),
    (CONSTANT, ["--trainer.max_steps=8"], 8),
    ([], stop_at(3), 3),
    ([], stop_at(8), 8),
    ([], stop_at(12, "on_train_batch_start"), 12),
    ([], stop_at(12, "on_before_zero_grad"), 12),
    ([ACCUMULATE], stop_at(4), 2),
    ([*CONSTANT, ACCUMULATE], ["--trainer.max_steps=2"], 2),
    ([VAL_4], stop_at(3), 3),
    ([VAL_3], stop_at(8), 8),
    ([VAL_4], stop_at(4, "on_validation_end"), 4),
    ([*CONSTANT, VAL_4], ["--trainer.max_steps=4"], 4),
    ([*CONSTANT, "--trainer.val_check_interval=0.5"], ["--trainer.max_steps=13"], 13),
    (["--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null"], stop_at(10), 10),
    (["--trainer.check_val_every_n_epoch=2"], stop_at(8), 8),
    (["--trainer.limit_train_batches=5"], stop_at(7), 7),
    (["--trainer.limit_train_batches=5", "--trainer.limit_val_batches=1"], stop_at(5), 5),
    (BY_STEPS, stop_at(11), 11),
    (["--data.num_workers=1"], stop_at(5), 5),
    (["--trainer.callbacks+=AdapterAveraging"], stop_at(5), 5),
    (["--trainer.callbacks+=AdapterAveraging", VAL_3], stop_at(6), 6),
    (["--trainer.callbacks+=WeightAveraging", VAL_3, ACCUMULATE], stop_at(7), 2),
    ([*EMA, *UPDATE_EPOCHS], stop_at(5), 5),
    ([*EMA, *UPDATE_EPOCHS], stop_at(7), 8),
    ([*EMA, "--trainer.callbacks.update_starting_at_step=10"], stop_at(5), 5),
    (["--spectrum.every_n_steps=1"], stop_at(5), 5),
]


@pytest.mark.parametrize(
    ("options", "stop", "saved"), [*STOPS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_STOPS)]
)
def test_case_01_a_run_that_stops_early_resumes_bit_for_bit(
    cli: CommandLine, finished_fit: Callable[..., None], options: list[str], stop: list[str], saved: int
) -> None:
    finished_fit(cli, *options)
    assert cli("fit", *options, *stop) == 0
    assert cli.checkpoint(1)["global_step"] == saved
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert_same_end(cli, whole=0, resumed=1)
    assert_same_best(cli, whole=0, resumed=1)


@pytest.mark.slow
def test_case_01_full_tuning_that_stops_early_resumes_bit_for_bit(cli: CommandLine) -> None:
    full = "--model.tuning=full"
    assert cli("fit", full) == 0
    assert cli("fit", full, *stop_at(5)) == 0
    assert cli("fit", full, "--ckpt_path=last") == 0
    assert_same_end_of_weights(cli, 0, 1)
    assert_same_best(cli, whole=0, resumed=1)


def test_case_01_the_schedule_of_a_resumed_run_ends_at_its_last_step(cli: CommandLine) -> None:
    """The first run plans its schedule for 3 steps, the resumed run for all 16 steps of two epochs."""
    assert cli("fit", "--trainer.max_steps=3", "--model.warmup_ratio=0") == 0
    assert cli("fit", "--model.warmup_ratio=0", "--ckpt_path=last") == 0
    rates = cli.scalars("lr-AdamW/B")
    expected = {step: 0.01 * 0.5 * (1 + math.cos(math.pi * step / (3 if step < 3 else 16))) for step in range(16)}
    assert rates == pytest.approx(expected, rel=1e-5)


def test_case_01_the_position_is_read_under_an_old_name_of_the_data_module(
    cli: CommandLine, finished_fit: Callable[..., None]
) -> None:
    finished_fit(cli)
    assert cli("fit", *stop_at(3)) == 0
    checkpoint = cli.checkpoint(1)
    checkpoint["ImageData"] = checkpoint.pop("ImageClassificationData")
    torch.save(checkpoint, cli.root / "old.ckpt")
    assert cli("fit", f"--ckpt_path={cli.root / 'old.ckpt'}") == 0
    assert_same_end_of_weights(cli, 0, 2)


def test_case_01_a_mid_epoch_checkpoint_of_an_older_version_is_repaired(
    cli: CommandLine, finished_fit: Callable[..., None]
) -> None:
    """The old checkpoint counts its epoch as finished, although the data are in mid-epoch. It has no digests."""
    finished_fit(cli, *CONSTANT)
    assert cli("fit", *CONSTANT, "--trainer.max_steps=3") == 0
    checkpoint = cli.checkpoint(1)
    for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        counts["processed"] += 1
    del checkpoint["frozen_digest"], checkpoint["ImageClassificationData"]["rows"]
    torch.save(checkpoint, cli.root / "old.ckpt")
    assert cli("fit", *CONSTANT, f"--ckpt_path={cli.root / 'old.ckpt'}") == 0
    assert_same_end_of_weights(cli, 0, 2)


def assert_same_end_of_weights(cli: CommandLine, one: int, other: int) -> None:
    first, second = cli.checkpoint(one), cli.checkpoint(other)
    assert first["global_step"] == second["global_step"]
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())


# --------------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize(
    ("callback", "options", "instead"),
    [
        ("StochasticWeightAveraging", ["--trainer.callbacks.swa_lrs=0.1"], "EMAWeightAveraging"),
        ("GradientAccumulationScheduler", ["--trainer.callbacks.scheduling={0: 2}"], "accumulate_grad_batches"),
        ("BackboneFinetuning", [], "model.tuning"),
        ("ModelPruning", ["--trainer.callbacks.pruning_fn=l1_unstructured"], "masked copies"),
    ],
)
def test_case_07_and_20_unsupported_callbacks_are_refused_by_name(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], callback: str, options: list[str], instead: str
) -> None:
    code = cli("fit", f"--trainer.callbacks+={callback}", *options)
    refused(capsys, code, f"trainer.callbacks: {callback} ", instead)
    assert not list(cli.root.glob("version_*"))


class Rewriting(L.Callback):
    """Change the content of each checkpoint.

    Args:
        how: `rename` and `drop` change the state dict, and `copy` adds a second state dict.
    """

    def __init__(self, how: str = "rename") -> None:
        self.how = how

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the content of this checkpoint."""
        state = checkpoint["state_dict"]
        if self.how == "rename":
            checkpoint["state_dict"] = {f"ema.{name}": tensor for name, tensor in state.items()}
        elif self.how == "drop":
            state.pop("head.weight")
        else:
            checkpoint["callbacks"]["copy"] = {"model": state}


@pytest.mark.parametrize("how", ["rename", "drop", pytest.param("copy", marks=pytest.mark.slow)])
def test_case_07_a_callback_that_rewrites_checkpoints_is_refused_at_the_first_save(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    callback = ["--allow_imports", "tests.cases", "--trainer.callbacks+=tests.cases.test_lifecycle.Rewriting"]
    code = cli("fit", *callback, f"--trainer.callbacks.how={how}", "--checkpoint.last_every_n_steps=1")
    refused(capsys, code, "trainer.callbacks: a callback has changed")
    assert not (cli.run() / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_case_20_the_learning_rate_finder_sets_model_learning_rate(
    cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run equals a run with this learning rate, and the ratios of the parameter groups are kept."""
    finder = ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=30"]
    options = ["--model.lr_ratio_b=4", "--model.lr_ratio_head=2", "--trainer.max_epochs=4"]
    assert cli("fit", *options, *finder) == 0
    assert "from LearningRateFinder" in capsys.readouterr().err
    learning_rate = cli.checkpoint()["hyper_parameters"]["learning_rate"]
    assert learning_rate != 0.01
    groups = {group["name"]: group["initial_lr"] for group in cli.checkpoint()["optimizer_states"][0]["param_groups"]}
    assert groups["B"] == pytest.approx(4 * learning_rate) and groups["head"] == pytest.approx(2 * learning_rate)
    assert cli("fit", *options, f"--model.learning_rate={learning_rate!r}") == 0
    assert_same_end_of_weights(cli, 0, 1)
    # a resumed run keeps the learning rate
    assert cli("fit", *options, *finder, "--trainer.max_epochs=5", f"--ckpt_path={cli.run()}") == 0
    assert "LearningRateFinder is skipped" in capsys.readouterr().err
    assert cli.checkpoint()["global_step"] == 5 * STEPS_AN_EPOCH
    assert cli.checkpoint()["hyper_parameters"]["learning_rate"] == learning_rate


def test_case_20_a_range_test_applies_the_ratio_of_each_parameter_group() -> None:
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": 0.1} for w in weights])
    test = RangeTest(optimizer, 0.3, [0.3, 1.2])
    for ends in (False, True):
        for w in weights:
            w.grad = torch.ones(())
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
        if not ends:
            assert [float(w) for w in weights] == pytest.approx([-0.1, -0.4])
            test.end()
    assert [float(w) for w in weights] == pytest.approx([-0.2, -0.5])


def test_case_20_a_run_with_a_timer_can_be_resumed(cli: CommandLine) -> None:
    assert cli("fit", "--trainer.callbacks+=Timer", "--trainer.max_epochs=1") == 0
    config = cli.run() / "config.yaml"
    assert cli("fit", f"--config={config}", "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert cli.checkpoint()["global_step"] == 2 * STEPS_AN_EPOCH


def test_case_20_a_checkpoint_of_weights_alone_is_refused_by_fit(
    cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    callback += [f"--trainer.callbacks.dirpath={cli.root}", "--trainer.callbacks.filename=own"]
    assert cli("fit", *callback, "--trainer.max_epochs=1") == 0
    refused(capsys, cli("fit", f"--ckpt_path={cli.root / 'own.ckpt'}"), "weights alone", "--model.adapter_path")
    assert cli("validate", f"--ckpt_path={cli.root / 'own.ckpt'}") == 0


# ----------------------------------------------------------------------------------- changed data or frozen weights


def paused(cli: CommandLine, data: Path) -> None:
    assert cli("fit", f"--data.path={data}", *stop_at(3)) == 0


def rewrite(data: Path, change: Callable[[Any], Any]) -> None:
    """Change the rows of the training split."""
    file = data / "train.parquet"
    change(datasets.Dataset.from_parquet(str(file), cache_dir=str(data / "cache"))).to_parquet(str(file))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "removed": lambda rows: rows.select(range(len(rows) - 1)),
    "added": lambda rows: datasets.concatenate_datasets([rows, rows.select([0])]),
    "shuffled": lambda rows: rows.shuffle(seed=1),
    "edited": lambda rows: datasets.concatenate_datasets([rows.select(range(59)), rows.select([0])]),
}


@pytest.mark.parametrize(
    "change",
    [name if name in ("removed", "edited") else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_case_11_changed_rows_are_refused_in_mid_epoch_and_warned_about_at_its_end(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, parquet_path: Path, change: str
) -> None:
    data = Path(shutil.copytree(parquet_path, tmp_path / "data"))
    paused(cli, data)
    rewrite(data, CHANGES[change])
    code = cli("fit", f"--data.path={data}", "--ckpt_path=last")
    refused(capsys, code, "the training rows have changed since the checkpoint", "middle of an epoch")
    if change == "edited":
        assert cli("fit", f"--data.path={parquet_path}", "--ckpt_path=last", "--trainer.max_epochs=1") == 0
        capsys.readouterr()
        assert cli("fit", f"--data.path={data}", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
        assert "the training rows have changed since the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("same_size", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_case_11_changed_texts_are_refused_in_mid_epoch(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, cola_path: Path, same_size: bool
) -> None:
    data = Path(shutil.copytree(cola_path, tmp_path / "data"))
    paused(text_cli, data)
    rewrite(data, CHANGES["shuffled" if same_size else "removed"])
    code = text_cli("fit", f"--data.path={data}", "--ckpt_path=last")
    refused(capsys, code, "the training rows have changed since the checkpoint")


def test_case_11_a_frozen_matrix_with_one_changed_entry_is_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach_to_others(self: AdaptedModule, heads: Any) -> None:
        with torch.no_grad():
            self.backbone.get_parameter("blocks.1.mlp.fc1.weight")[60, 16] += 1e-6
        attach(self, heads)

    attach = AdaptedModule._attach
    monkeypatch.setattr(AdaptedModule, "_attach", attach_to_others)
    for command in ("fit", "test"):
        refused(capsys, fitted_cli(command, "--ckpt_path=last"), "other frozen weights than this backbone's")


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).flatten()[tensor.numel() * tensor.element_size() // 2] ^= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_case_11_a_digest_depends_on_each_bit_and_on_order_and_shape(dtype: torch.dtype) -> None:
    weights = {"one": torch.randn(300, 200).to(dtype), "two": torch.randn(7).to(dtype)}
    digest = digest_of(weights)
    assert digest_of({name: tensor.clone() for name, tensor in weights.items()}) == digest
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    flip_a_bit(changed["one"])
    swapped = {**weights, "one": weights["one"].flip(0)}
    others = [
        changed,
        swapped,
        {"two": weights["two"], "one": weights["one"]},
        {**weights, "two": weights["two"][None]},
    ]
    assert digest not in [digest_of(other) for other in others]


# --------------------------------------------------------------------------------------------------------- end of a fit


def test_case_25_a_fit_without_a_validation_warns(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "--trainer.max_steps=3") == 0
    log = capsys.readouterr().err
    assert "No validation has run, so there is no best.ckpt" in log
    assert "Training stopped in mid-epoch, after 3 steps" in log
    assert cli("fit", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3") == 0
    assert "No validation" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (["--trainer.max_epochs=2"], "trainer.max_epochs is 2. Raise this value to train on.\n"),
        (["--trainer.max_epochs=1"], "trainer.max_epochs is 1. Raise this value to train on.\n"),
        (
            ["--trainer.max_epochs=-1", "--trainer.max_steps=16", "--trainer.max_time=00:02:00:00"],
            "trainer.max_steps is 16 and trainer.max_time is 2 h. Raise these values to train on.\n",
        ),
    ],
)
def test_case_26_resuming_a_finished_run_changes_nothing(
    cli: CommandLine,
    finished_fit: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    limits: str,
) -> None:
    finished_fit(cli)
    before = (cli.run() / "metrics.json").read_bytes()
    checkpoint = (cli.run() / "checkpoints" / "last.ckpt").read_bytes()
    capsys.readouterr()
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert f"Nothing left to do: 2 epochs and 16 steps are done. {limits}" in capsys.readouterr().err
    assert (cli.run() / "metrics.json").read_bytes() == before
    assert (cli.run() / "checkpoints" / "last.ckpt").read_bytes() == checkpoint


# ----------------------------------------------------------------------------------------- signals, worker processes


class Sending:
    """Send SIGTERM to the own process in `__del__`."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):  # Python runs the signal handler between these instructions
            pass


@pytest.mark.parametrize(
    ("command", "hook"),
    [
        ("test", "setup"),
        ("test", "on_test_batch_start"),
        ("test", "teardown"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("test", "on_test_epoch_end"),
                ("test", "on_test_end"),
                ("validate", "on_validation_batch_start"),
                ("fit", "on_fit_end"),
            )
        ),
    ],
)
def test_case_33_sigterm_in_a_destructor_stops_the_run(
    fitted_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    hook: str,
) -> None:
    def send(*_: object, **__: object) -> None:
        if not sent:
            sent.append(Sending())
            sent[0] = None

    sent: list[Any] = []
    monkeypatch.setattr(AdapterCheckpoint, hook, send)
    assert fitted_cli(command, "--ckpt_path=last", "--trainer.max_epochs=1") == 143
    log = capsys.readouterr().err
    assert log.count("SIGTERM: stopped") == 1
    assert "Traceback" not in log and "Exception ignored" not in log
    assert sys.unraisablehook is not None


def test_case_33_an_error_while_stopping_is_not_reported(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning raises this error when it tears down loaders whose workers have ended."""

    def fail(*_: object) -> None:
        raise RuntimeError("Please call `iter(combined_loader)` first.")

    def send(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(AdapterCheckpoint, "on_test_end", send)
    monkeypatch.setattr(AdapterCheckpoint, "on_exception", fail)
    assert fitted_cli("test", "--ckpt_path=last") == 143
    log = capsys.readouterr().err
    assert log.count("SIGTERM: stopped") == 1 and "error:" not in log


@pytest.mark.parametrize("command", ["fit", "test"])
def test_case_34_a_killed_worker_is_one_message_and_the_run_resumes(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def kill(*_: object) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()

    monkeypatch.setattr(AdapterCheckpoint, f"on_{'train' if command == 'fit' else command}_batch_start", kill)
    code = fitted_cli(command, "--ckpt_path=last", "--data.num_workers=1", "--trainer.max_epochs=2")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 1
    assert len(errors) == 1 and "A worker process of the data loader was killed" in errors[0]
    monkeypatch.undo()
    assert fitted_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert fitted_cli.checkpoint()["global_step"] == 2 * STEPS_AN_EPOCH


# ----------------------------------------------------------------------------------------------- malformed checkpoints


def set_at(tree: Any, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree[int(key) if isinstance(tree, list) else key]
    tree[int(last) if isinstance(tree, list) else last] = value


MISSING = object()
COUNTS = "loops/fit_loop/epoch_progress"
MALFORMED: list[tuple[str, Any]] = [
    ("optimizer_states", MISSING),
    ("loops", []),
    ("hyper_parameters", None),
    ("pytorch-lightning_version", "abc"),
    ("pytorch-lightning_version", MISSING),
    ("hyper_parameters", MISSING),
    ("hyper_parameters/learning_rate", torch.ones(2)),
    ("hyper_parameters/adapter", [1, 2]),
    ("datamodule_hyper_parameters", [1]),
    ("global_step", "3"),
    ("global_step", MISSING),
    ("state_dict", []),
    ("state_dict/head.weight", 5),
    ("state_dict/head.weight", torch.ones(3)),
    ("loops/fit_loop", {}),
    ("loops", {}),
    (COUNTS, None),
    (f"{COUNTS}/current", {"ready": 1}),
    (f"{COUNTS}/current/processed", "one"),
    (f"{COUNTS}/total", [1, 2]),
    ("optimizer_states", []),
    ("optimizer_states/0/param_groups", []),
    ("optimizer_states/0/param_groups/0/betas", "x"),
    ("optimizer_states/0/state", None),
    ("optimizer_states/0/state/0", {"exp_avg": 1}),
    ("optimizer_states/0", None),
    ("lr_schedulers", [{}]),
    ("lr_schedulers", {}),
    ("lr_schedulers/0/last_epoch", None),
    ("callbacks", None),
    ("random_states", {}),
    ("random_states", [None]),
    ("random_states/0/torch", torch.zeros(3)),
    ("ImageClassificationData", MISSING),
    ("ImageClassificationData", []),
    ("ImageClassificationData", {}),
    ("ImageClassificationData/samples", -1),
    ("samples_a_step", "x"),
    ("frozen_digest", 3),
]


@pytest.mark.parametrize("cases", [MALFORMED[:5], pytest.param(MALFORMED[5:], marks=pytest.mark.slow)])
def test_case_36_malformed_checkpoints_are_refused_in_one_message(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, cases: list[tuple[str, Any]]
) -> None:
    intact = fitted_cli.checkpoint()
    for key, value in cases:
        content = copy.deepcopy(intact)
        if value is MISSING:
            del content[key]
        else:
            set_at(content, key, value)
        torch.save(content, tmp_path / "some.ckpt")
        code = fitted_cli("fit", f"--ckpt_path={tmp_path / 'some.ckpt'}", "--trainer.max_epochs=2")
        log = capsys.readouterr().err
        lines = [line for line in log.splitlines() if line.startswith("error:")]
        assert (code, len(lines), "Traceback" in log) == (2, 1, False), (key, value, log)


@pytest.mark.parametrize("state", [None, "some", pytest.param(5, marks=pytest.mark.slow), {"best_model_path": 3}])
def test_case_36_malformed_states_of_callbacks_are_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, state: Any
) -> None:
    content = fitted_cli.checkpoint()
    content["callbacks"] = dict.fromkeys(content["callbacks"], state)
    torch.save(content, tmp_path / "some.ckpt")
    code = fitted_cli("fit", f"--ckpt_path={tmp_path / 'some.ckpt'}", "--trainer.max_epochs=2")
    refused(capsys, code, "callbacks.")
