"""Survival of runs: damaged checkpoints, signals, a full disk, a second process in the run directory."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.callbacks import AdapterCheckpoint, PredictionWriter, Termination
from app.callbacks.prediction_writer import write_rows
from app.cli import main
from app.console import console_logging
from app.run.checkpoint_io import (
    SEAL_START,
    AtomicCheckpointIO,
    _file_problem,
    checkpoint_problem,
    read_checkpoint,
)
from app.run.failures import LOADERS
from app.run.full_disk import reraise_disk_full
from app.run.run_directory import LOCK, load_checkpoint, locked, new_run_directory, resolve_checkpoint
from datamodules.atomic import WriteError
from datamodules.errors import CheckpointError
from tests.app.processes import DDP, run_on_two
from tests.app.run.test_failures import raise_in
from tests.app.test_resume import STEPS_AN_EPOCH, assert_same_end
from tests.conftest import ROOT
from tests.support.disks import no_file_larger_than
from tests.support.refusals import refused
from tests.support.small_data import png

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """Return a run directory after checkpoints of steps 0, 1 and 2: previous.ckpt has step 1, last.ckpt has step 2."""
    directory = new_run_directory(tmp_path / "runs")
    save(directory, 0, 1, 2)
    with console_logging():
        yield directory


def save(run: Path, *steps: int, name: str = "last.ckpt") -> None:
    writer = AtomicCheckpointIO()
    for step in steps:
        state = {"state_dict": {"x": torch.full((1000,), float(step))}, "global_step": step}
        writer.save_checkpoint(state, run / "checkpoints" / name)


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def steps(run: Path) -> dict[str, int]:
    return {p.name: read_checkpoint(p)["global_step"] for p in sorted((run / "checkpoints").iterdir())}


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Check that weights and random states are bit-identical."""
    assert first["global_step"] == second["global_step"]
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert torch.equal(first["random_states"][0]["torch"], second["random_states"][0]["torch"])


# --------------------------------------------------------------------------------------------------- digest, rotation


def flipped(content: bytes, position: float = 0.5) -> bytes:
    """Return the content with one flipped bit."""
    changed = bytearray(content)
    changed[int(position * (len(content) - 1))] ^= 4
    return bytes(changed)


def flip(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-20], "digest is truncated"),
        (lambda content: content[: content.rindex(SEAL_START) + 3], "truncated"),
        (lambda content: content[:-200], "truncated"),
        (lambda content: flipped(content, 0.0), "does not match its digest"),
        (lambda content: flipped(content, 0.6), "does not match its digest"),
        (lambda content: flipped(content, 1.0), "digest is truncated or altered"),
        (lambda content: b"", "truncated"),
    ],
)
def test_damage_is_found_before_unpickling(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    reason: str,
) -> None:
    last(run).write_bytes(damage(last(run).read_bytes()))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", mock.Mock(side_effect=AssertionError))
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(last(run))
    assert reason in str(checkpoint_problem(last(run)))
    assert resolve_checkpoint(str(run), run.parent, prefer_best=False).name == "previous.ckpt"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert str(last(run)) in lines[0] and reason in lines[0]
    assert "previous.ckpt of step 1 is used instead" in lines[1]
    # the next save must not replace the intact previous.ckpt by the damaged file
    save(run, 2)
    assert steps(run) == {"last.ckpt": 2, "previous.ckpt": 1}


def test_a_checkpoint_is_one_file_that_torch_loads(run: Path, tmp_path: Path) -> None:
    assert steps(run) == {"last.ckpt": 2, "previous.ckpt": 1}
    assert checkpoint_problem(last(run)) is None
    assert torch.load(last(run), weights_only=True)["global_step"] == 2
    assert torch.load(last(run), weights_only=True, mmap=True)["state_dict"]["x"].eq(2).all()
    elsewhere = tmp_path / "some.ckpt"
    elsewhere.write_bytes(last(run).read_bytes())
    assert read_checkpoint(elsewhere)["global_step"] == 2


def with_identity(content: bytes) -> bytes:
    """Return the content in the format of an earlier version, whose digest covers the identity of the run."""
    identity = b"0123456789abcdef" * 2
    digest = hashlib.sha256(content + identity).hexdigest().encode()
    return content + SEAL_START + digest + b" run=" + identity + b"\n"


@pytest.mark.parametrize("seal", [bytes, with_identity], ids=["Lightning", "identity"])
def test_checkpoints_of_lightning_and_of_an_earlier_version_are_read(
    tmp_path: Path, seal: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "global_step": 5}, path)
    content = seal(path.read_bytes())
    if seal is with_identity:
        path.write_bytes(flipped(content))
        assert "does not match its digest" in str(checkpoint_problem(path))
    path.write_bytes(content)
    assert resolve_checkpoint("last", tmp_path, prefer_best=False) == path
    save(tmp_path / "version_0", 6)
    assert steps(tmp_path / "version_0") == {"last.ckpt": 6, "previous.ckpt": 5}


def test_last_is_the_newest_intact_checkpoint_of_the_newest_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_checkpoint("last", run.parent, prefer_best=False) == last(run)
    save(run, 4, name="best.ckpt")
    assert resolve_checkpoint(str(run), run.parent, prefer_best=True).name == "best.ckpt"
    assert capsys.readouterr().err == ""
    last(run).unlink()
    assert resolve_checkpoint("last", run.parent, prefer_best=False).name == "best.ckpt"
    log = capsys.readouterr().err
    assert "there is no" in log and "best.ckpt of step 4 is used instead" in log
    # a newest run without an intact checkpoint is refused rather than replaced by an older run
    newer = new_run_directory(run.parent)
    save(newer, 8)
    last(newer).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged.*no intact checkpoint"):
        resolve_checkpoint("last", run.parent, prefer_best=False)


def test_later_checkpoints_become_stale_when_a_run_resumes_from_an_earlier_step(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume from step 0 beside checkpoints of steps 1 and 2, then damage the new checkpoint of step 1."""
    save(run, 0, name="best.ckpt")
    best, content = load_checkpoint(str(run), run / "checkpoints" / "best.ckpt")
    writer = AtomicCheckpointIO(best, content)
    state = {"state_dict": {"x": torch.ones(1000)}, "global_step": 1}
    writer.save_checkpoint(state, run.parent / "elsewhere" / "last.ckpt")  # as a callback of the user saves
    assert steps(run) == {"best.ckpt": 0, "last.ckpt": 2, "previous.ckpt": 1}
    writer.save_checkpoint(state, last(run))
    stale = {"last.ckpt.stale": 2, "previous.ckpt.stale": 1}
    assert steps(run) == {"best.ckpt": 0, "last.ckpt": 1, **stale}
    log = capsys.readouterr().err
    assert "previous.ckpt of step 1 is now previous.ckpt.stale: the run was resumed from step 0." in log
    flip(last(run))
    assert resolve_checkpoint(str(run), run.parent, prefer_best=False) == best
    save(run, 2)
    writer.save_checkpoint(state, last(run))  # only the first save of a resumed run renames later checkpoints
    assert steps(run) == {"best.ckpt": 0, "last.ckpt": 1, "previous.ckpt": 2, **stale}
    AtomicCheckpointIO(best, content).save_checkpoint(state, last(run))  # a second resume from step 0
    second_stale = {"last.ckpt.1.stale": 1, "previous.ckpt.1.stale": 2}
    assert steps(run) == {"best.ckpt": 0, "last.ckpt": 1, **stale, **second_stale}


def test_a_run_resumed_from_before_its_best_has_a_new_best(
    cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=min", "--model.schedule=constant"]
    assert cli("fit", *options) == 0
    assert steps(cli.run()) == {"best.ckpt": 16, "last.ckpt": 16, "previous.ckpt": 15}
    before = cli.metrics()["best/val/loss"]
    files = {name: (cli.run() / "checkpoints" / name).read_bytes() for name in ("best.ckpt", "last.ckpt")}
    capsys.readouterr()
    # at this learning rate the second epoch ends worse than the first
    previous = cli.run() / "checkpoints" / "previous.ckpt"
    assert cli("fit", *options, "--model.learning_rate=100", f"--ckpt_path={previous}") == 0
    log = capsys.readouterr().err
    assert (
        "best.ckpt is of step 16, ahead of 15, from which the run is resumed. The best checkpoint from here on" in log
    )
    assert "last.ckpt of step 16 is now last.ckpt.stale" in log
    stale = {"best.ckpt.stale": 16, "last.ckpt.stale": 16}
    assert steps(cli.run()) == {"best.ckpt": 16, "last.ckpt": 16, "previous.ckpt": 15, **stale}
    assert all((cli.run() / "checkpoints" / f"{name}.stale").read_bytes() == content for name, content in files.items())
    best, end = cli.checkpoint(name="best")["state_dict"], cli.checkpoint()["state_dict"]
    assert all(torch.equal(tensor, best[name]) for name, tensor in end.items())
    assert cli.metrics()["best/val/loss"] == cli.metrics()["val/loss"] > before


def test_a_resume_reads_its_checkpoint_once(fitted_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, loaded = [], []

    def problem(file: Any) -> str | None:
        hashed.append(Path(file.name).name)
        return _file_problem(file)

    def load(file: Any, **options: Any) -> Any:
        if not options.get("mmap"):  # with mmap, no tensor is read
            loaded.append(Path(file.name).name)
        return original(file, **options)

    original = torch.load
    monkeypatch.setattr("app.run.checkpoint_io._file_problem", problem)
    monkeypatch.setattr(torch, "load", load)
    assert fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert hashed == ["last.ckpt", "best.ckpt", "best.ckpt"]  # the second read of best.ckpt is for RUN/adapter
    assert loaded == ["last.ckpt", "best.ckpt"]


def test_a_loaded_checkpoint_is_reused_once(run: Path) -> None:
    path, content = load_checkpoint(str(run), last(run))
    reader = AtomicCheckpointIO(path, content)
    assert reader.load_checkpoint(str(path)) is content
    reread = reader.load_checkpoint(str(path))
    assert reread is not content and reread["global_step"] == content["global_step"]


def test_a_kill_between_the_two_renames_keeps_the_last_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def replace(source: str, target: Path) -> None:
        if Path(source).name.startswith(".last.ckpt."):
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save(run, 3)
    assert steps(run) == {"last.ckpt": 2, "previous.ckpt": 2}  # hard links to one file
    save(run, 3)
    assert steps(run) == {"last.ckpt": 3, "previous.ckpt": 2}


def test_previous_ckpt_is_kept_without_hard_links(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EPERM, "Operation not permitted")))
    save(run, 3)
    assert steps(run) == {"last.ckpt": 3, "previous.ckpt": 2}


def test_last_falls_back_to_an_intact_checkpoint_but_a_named_damaged_file_is_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = fitted_cli.checkpoint()
    flip(last(fitted_cli.run()))
    before = last(fitted_cli.run()).read_bytes()
    for command in ("fit", "test"):
        refused(capsys, fitted_cli(command, f"--ckpt_path={last(fitted_cli.run())}"), "last.ckpt is damaged", "digest")
    assert last(fitted_cli.run()).read_bytes() == before
    (fitted_cli.run() / "checkpoints" / "best.ckpt").write_bytes(b"")
    capsys.readouterr()
    assert fitted_cli("fit", "--trainer.max_epochs=1", "--ckpt_path=last") == 0
    log = capsys.readouterr().err
    assert "last.ckpt is damaged" in log
    assert f"previous.ckpt of step {STEPS_AN_EPOCH - 1} is used instead" in log
    assert_same_state(uninterrupted, fitted_cli.checkpoint())


# ------------------------------------------------------------------------------------------------------------ SIGTERM


@contextmanager
def sigterm(hook: str, step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Send the process one signal in this hook of AdapterCheckpoint, after `step` optimizer steps."""

    def send(self: AdapterCheckpoint, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == step and not trainer.sanity_checking and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)
        return original(self, trainer, *args, **kwargs)

    sent: list[bool] = []
    original = getattr(AdapterCheckpoint, hook)
    with mock.patch.object(AdapterCheckpoint, hook, send):
        yield


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Restore Python's handler of SIGINT, which a shell ignores for tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize(
    ("hook", "step", "saved", "number"),
    [
        pytest.param("on_train_batch_start", 4, 5, signal.SIGTERM, marks=pytest.mark.slow),
        ("on_train_batch_start", 4, 5, signal.SIGINT),  # the current step is finished first
        # the last step of an epoch is not begun, since validation would follow
        ("on_train_batch_start", 7, 7, signal.SIGTERM),
        ("on_validation_batch_start", 8, 7, signal.SIGTERM),  # a validation that has begun is stopped
    ],
)
def test_sigterm_and_ctrl_c_save_a_checkpoint_and_name_it(
    fitted_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    hook: str,
    step: int,
    saved: int,
    number: signal.Signals,
) -> None:
    handler = signal.getsignal(number)
    with sigterm(hook, step, number):
        assert fitted_cli("fit", "--trainer.max_epochs=1") == 128 + number
    assert signal.getsignal(number) == handler
    log = capsys.readouterr().err
    assert f"{number.name}: stopped; resume with --ckpt_path {last(fitted_cli.run(1))}." in log
    assert "Traceback" not in log
    assert fitted_cli.checkpoint(1)["global_step"] == saved
    assert fitted_cli("fit", "--trainer.max_epochs=1", "--ckpt_path=last") == 0
    assert_same_state(fitted_cli.checkpoint(0), fitted_cli.checkpoint(1))
    if step == 4:
        assert_same_end(fitted_cli, whole=0, resumed=1)


@pytest.mark.parametrize(
    ("hook", "step", "option", "saved"),
    [
        ("on_train_batch_start", 1, "accumulate_grad_batches=3", 2),  # in the first of three accumulated batches
        ("on_train_epoch_end", 8, "accumulate_grad_batches=1", 8),
        # the last step but one was saved, so one step is lost
        ("on_validation_batch_start", 4, "val_check_interval=2", 3),
    ],
)
def test_sigterm_saves_after_a_complete_step(cli: CommandLine, hook: str, step: int, option: str, saved: int) -> None:
    with sigterm(hook, step):
        assert cli("fit", f"--trainer.{option}") == 143
    assert cli.checkpoint()["global_step"] == saved


def test_sigterm_before_the_first_checkpoint(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    with sigterm("setup", 0):
        assert cli("fit") == 143
    assert "SIGTERM: stopped; no checkpoint was written." in capsys.readouterr().err


def test_sigterm_stops_an_evaluation(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    before = (fitted_cli.run() / "metrics.json").read_bytes()
    with sigterm("on_test_batch_start", 0):
        assert fitted_cli("test", "--ckpt_path=last") == 143
    assert "SIGTERM: stopped" in capsys.readouterr().err
    assert (fitted_cli.run() / "metrics.json").read_bytes() == before


def test_an_ignored_sigint_stays_ignored() -> None:
    """A shell ignores SIGINT for jobs that a script starts with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Termination():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_lost_worker_after_sigterm_is_no_error_and_a_defect_is_raised(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the worker processes get the signal too, torch raises this error for a lost worker."""
    lost = raise_in(LOADERS[1], RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated."))

    def fail(self: AdapterCheckpoint, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise errors.pop(0)

    errors: list[Exception] = [lost, KeyError("a defect")]
    monkeypatch.setattr(AdapterCheckpoint, "on_train_batch_start", fail)
    assert cli("fit", "--checkpoint.last_every_n_steps=2") == 143
    assert cli.checkpoint()["global_step"] == 2
    with pytest.raises(KeyError, match="a defect"):
        cli("fit")


def test_the_adapter_is_from_the_best_checkpoint(cli: CommandLine, tmp_path: Path) -> None:
    """A ModelCheckpoint of the user does not change this choice."""
    callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss"]
    assert cli("fit", *callback, "--trainer.callbacks.mode=min", "--trainer.callbacks.filename=own") == 0
    assert main(["export", str(cli.run()), "--format=peft", f"--output={tmp_path / 'best'}"]) == 0
    best, written = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "best", cli.run() / "adapter"))
    assert best.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in best.items())


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked process. Return its exit code, which is negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_a_second_sigterm_stops_at_once() -> None:
    def twice() -> None:
        with Termination() as termination:
            termination._deferred = True  # as during a step
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.requested
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(twice) == -signal.SIGTERM


def test_a_worker_process_ends_at_the_first_sigterm() -> None:
    with Termination():
        assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM


def test_sigterm_to_one_of_two_processes(cli: CommandLine, tmp_path: Path) -> None:
    def send(self: AdapterCheckpoint, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(AdapterCheckpoint, "on_train_batch_start", send):
        run_on_two(cli.words("fit"), tmp_path, code=143)
    assert cli.checkpoint()["global_step"] == 3
    assert len(cli.checkpoint()["random_states"]) == 2
    assert "SIGTERM: stopped" in (tmp_path / "rank0.log").read_text()


def started(cli: CommandLine, *options: str) -> subprocess.Popen[bytes]:
    """Start a fit in a new session, and return its process after the first checkpoint."""
    words = cli.words("fit", "--trainer.max_epochs=400", "--checkpoint.last_every_n_steps=3", *options)
    with (cli.root.parent / "said.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "main.py", *words], cwd=ROOT, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 300
    while not last(cli.run()).is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("options", [DDP, ["--data.num_workers=2"]], ids=["two processes", "data workers"])
@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("target", ["one", "group", "Ctrl-C"])
def test_a_signal_to_a_process_or_group_ends_all_processes(cli: CommandLine, options: list[str], target: str) -> None:
    process = started(cli, *options)
    number = signal.SIGINT if target == "Ctrl-C" else signal.SIGTERM
    if target == "one":
        process.terminate()
    else:  # schedulers and terminals may send signals to the whole group
        os.killpg(process.pid, number)
    log = cli.root.parent / "said.log"
    assert process.wait(120) == 128 + number, log.read_text()
    assert log.read_text().count(f"{number.name}: stopped; resume with --ckpt_path {last(cli.run())}.") == 1
    assert "Traceback" not in log.read_text()
    assert cli.checkpoint()["global_step"] > 0
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # other processes of the group may still be ending
            os.killpg(process.pid, 0)
            time.sleep(0.1)


# ------------------------------------------------------------------------- two processes in a directory, full disk


def hold(run: Path, children: Any) -> None:
    """Lock a run as a fit does, with a forked child that outlives this process. Report the child's number."""
    with locked(run):
        child = os.fork()
        if child:
            children.put(child)
        time.sleep(60)
        os._exit(0)


def test_a_run_is_resumed_by_one_process_at_a_time(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    children = context.SimpleQueue()
    process = context.Process(target=hold, args=(fitted_cli.run(), children))
    process.start()
    child = children.get()
    before = last(fitted_cli.run()).read_bytes()
    refused(capsys, fitted_cli("fit", "--ckpt_path=last"), f"process {process.pid} on ", "trains in", "version_0")
    assert last(fitted_cli.run()).read_bytes() == before
    assert fitted_cli("validate", "--ckpt_path=last") == 0  # a locked run can be read
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with locked(fitted_cli.run()):  # the lock is free although the child of the killed process still runs
        assert f"process {os.getpid()} on" in (fitted_cli.run() / LOCK).read_text()
        os.kill(child, signal.SIGKILL)


def test_runs_that_start_at_once_get_a_directory_each(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "recipe"
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: new_run_directory(root), range(64)))
    assert len(set(made)) == 64


def test_only_errors_of_the_disk_become_a_checkpoint_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = steps(run)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error"),
        RuntimeError("x"),
    ):
        with monkeypatch.context() as patch, pytest.raises(type(error), match=str(error)):
            patch.setattr(torch, "save", mock.Mock(side_effect=error))
            save(run, 3)
    assert steps(run) == before
    # torch's zip writer raises another error after that of the disk
    large = {"state_dict": {"x": torch.zeros(100_000)}, "global_step": 3}
    reason = r"last\.ckpt could not be written \(File too large.*untouched"
    for size in (10_000, 399_000, 400_900):
        with no_file_larger_than(size), pytest.raises(CheckpointError, match=reason):
            AtomicCheckpointIO().save_checkpoint(large, last(run))
    assert steps(run) == before


def test_a_full_disk_keeps_the_earlier_predictions(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_rows(path, [{"label": "red"}])
    before = path.read_text()
    with no_file_larger_than(3000), pytest.raises(WriteError, match=r"predictions\.csv could not be written"):
        write_rows(path, [{"label": "green"}] * 3000)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_in_training_keeps_all_files(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = fitted_cli.metrics()
    files = {p: p.read_bytes() for p in fitted_cli.run().rglob("*") if p.suffix in (".ckpt", ".json", ".parquet")}
    del files[fitted_cli.run() / "metrics.json"]
    with no_file_larger_than(8000):  # large enough for config.yaml
        code = fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last")
    refused(capsys, code, str(fitted_cli.run()), "File too large", "untouched")
    for path, content in files.items():
        assert path.read_bytes() == content, path
    del metrics["time/fit_seconds"]  # the run is unfinished
    assert fitted_cli.metrics() == metrics
    assert not [p for p in fitted_cli.run().rglob(".*") if p.name != ".lock"]
    assert fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0


def test_a_writing_thread_on_a_full_disk_prints_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = mock.Mock()
    monkeypatch.setattr(threading, "excepthook", shown)

    def fail(error: Exception) -> None:
        raise error

    with reraise_disk_full(tmp_path):
        for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a defect")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert [call.args[0].exc_type for call in shown.call_args_list] == [ValueError]
    assert threading.excepthook is shown


def test_a_full_disk_while_predicting_is_one_message(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.png").write_bytes(png(np.zeros((16, 16, 3), np.uint8)))
    with mock.patch.object(
        PredictionWriter, "write_on_epoch_end", side_effect=OSError(errno.ENOSPC, "No space left on device")
    ):
        code = fitted_cli("predict", "--ckpt_path=last", f"--data.predict_path={pictures}")
    refused(capsys, code, str(fitted_cli.run()), "No space left on device")


def test_a_file_in_the_place_of_a_directory_is_refused(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    cli.root.write_text("")
    refused(capsys, cli("fit"), "trainer.default_root_dir", str(cli.root), "choose another place")
    cli.root.unlink()

    def block_checkpoints(root: Path, label: str) -> Path:
        directory = new_run_directory(root, label)
        (directory / "checkpoints").write_text("")
        return directory

    with mock.patch("app.cli.new_run_directory", block_checkpoints):
        refused(capsys, cli("fit"), "Checkpoints cannot be written to", str(cli.run() / "checkpoints"))
