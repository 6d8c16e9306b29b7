"""The command `federate` on tiny images: arithmetic, results, resume and messages."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.cli import main
from app.commands.federate import write_table
from app.federated import server
from app.federated.server import ROUND, Round, read_round
from app.federated.training import Client, ClientResult, Job, Learner
from app.run.run_directory import locked
from datamodules.errors import CheckpointError, ModelError
from tests.app.conftest import CommandLine
from tests.conftest import ROOT
from tests.support.refusals import refused, refuses
from tests.support.small_data import write_parquet

SHORT = ("--clients", "3", "--rounds", "2", "--local_steps", "2")
# Without momentum, dropout and schedule, a step depends on the model and the batch alone.
SGD = (
    *("--model.optimizer={class_path: torch.optim.SGD}", "--model.weight_decay=0", "--model.schedule=constant"),
    *("--model.warmup_ratio=0", "--model.adapter.dropout=0", "--model.learning_rate=0.1"),
    "--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
)


def federate(cli: CommandLine, output: Path, *options: str) -> int:
    return main([*cli.words("federate", *options), "--output", str(output)])


def tensors(output: Path, arm: str = "ffa") -> dict[str, torch.Tensor]:
    return load_file(output / arm / ROUND)


def test_all_arms_give_tables_adapters_and_round_files(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert federate(cli, output, *SHORT, "--partition", "dirichlet:0.5") == 0
    printed = capsys.readouterr().out
    assert [line.partition(" (")[0] for line in printed.splitlines() if line.startswith("client ")] == [
        f"client {number}: 16 rows" for number in range(3)
    ]
    table = json.loads((output / "arms.json").read_text())
    assert [row["arm"] for row in table] == ["ffa", "lora", "rolora", "centralised"]
    with (output / "arms.csv").open() as file:
        assert [row["test/acc1"] for row in csv.DictReader(file)] == [str(row["test/acc1"]) for row in table]
    with (output / "rounds.csv").open() as file:
        assert [(row["arm"], row["round"]) for row in csv.DictReader(file)] == [
            (arm, str(number)) for arm in ("ffa", "lora", "rolora", "centralised") for number in range(3)
        ]
    errors = {row["arm"]: row["average_error"] for row in table}
    assert max(errors["ffa"], errors["rolora"], errors["centralised"]) < 1e-7 < 1e-4 < errors["lora"]
    sent = {row["arm"]: row["bytes"] for row in table}
    assert sent["ffa"] == sent["rolora"] < sent["lora"]
    # The written adapter has the metrics of the table.
    assert main(cli.words("test", f"--model.adapter_path={output}/lora/adapter")) == 0
    assert cli.metrics()["test/acc1"] == pytest.approx(table[1]["test/acc1"])
    assert cli.metrics()["test/loss"] == pytest.approx(table[1]["test/loss"], rel=1e-5)


def test_one_step_of_each_client_is_a_step_along_the_mean_gradient(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain SGD, Σ nᵢ/n·(Bᵢ - lr·gᵢ) = B - lr·Σ nᵢ/n·gᵢ."""
    steps: list[tuple[int, dict[str, torch.Tensor]]] = []
    train = Learner.train

    def spy(learner: Learner, client: Client, job: Job, state: dict[str, torch.Tensor]) -> ClientResult:
        result = train(learner, client, job, state)
        gradients = {n: p.grad.clone() for n, p in learner.module.named_parameters() if p.grad is not None}
        steps.append((result.rows, gradients))
        return result

    monkeypatch.setattr(Learner, "train", spy)
    written: list[Round] = []
    monkeypatch.setattr(server, "write_round", lambda folder, state: written.append(state))
    sizes = ("--clients", "5", "--rounds", "1", "--local_steps", "1", "--arms", "ffa")  # 48 rows: 10, 10, 10, 9, 9
    assert federate(cli, tmp_path / "out", *sizes, *SGD) == 0
    before, after = (state.tensors for state in written)
    assert [rows for rows, _ in steps] == [10, 10, 10, 9, 9]
    moved = [name for name in before if not before[name].equal(after[name])]
    assert len(moved) == 4 + 2  # B of query and value in two blocks, weight and bias of the head
    for name in moved:
        mean = sum(rows / 48 * gradients[name] for rows, gradients in steps)
        torch.testing.assert_close(after[name], before[name] - 0.1 * mean, rtol=1e-5, atol=1e-7)


def test_centralised_has_all_rows_and_the_steps_of_the_trained_clients(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[int, int, int]] = []
    train = Learner.train

    def spy(learner: Learner, client: Client, job: Job, state: dict[str, torch.Tensor]) -> ClientResult:
        trained.append((len(client.rows), job.steps, job.total_steps))
        return train(learner, client, job, state)

    monkeypatch.setattr(Learner, "train", spy)
    sizes = ("--clients", "5", "--rounds", "1", "--local_steps", "2", "--data.batch_size", "10")
    assert federate(cli, tmp_path / "out", *sizes, "--arms", "ffa", "centralised") == 0
    assert capsys.readouterr().out.count("; skipped") == 2  # 48 rows: 10, 10, 10, 9, 9
    assert trained == [(10, 2, 2)] * 3 + [(48, 6, 6)]


def test_rounds_of_one_client_equal_one_uninterrupted_training(cli: CommandLine, tmp_path: Path) -> None:
    """The schedule of the learning rate and the order of the batches continue in each round."""
    options = ("--clients", "1", "--arms", "ffa", *SGD, "--model.schedule=cosine", "--model.warmup_ratio=0.2")
    for name, rounds, local_steps in (("rounds", 10, 1), ("uninterrupted", 1, 10)):
        sizes = ("--rounds", str(rounds), "--local_steps", str(local_steps))
        assert federate(cli, tmp_path / name, *sizes, *options) == 0
    rounds_of_one, expected = (tensors(tmp_path / name) for name in ("rounds", "uninterrupted"))
    assert all(rounds_of_one[name].equal(tensor) for name, tensor in expected.items())


def test_rolora_alternates_b_and_a(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Round] = []
    monkeypatch.setattr(server, "write_round", lambda folder, state: written.append(state))
    sizes = ("--clients", "2", "--rounds", "3", "--local_steps", "2")
    assert federate(cli, tmp_path / "out", *sizes, "--arms", "rolora") == 0
    for number, (before, after) in enumerate(pairwise(written), start=1):
        changed = {
            name.rpartition(".")[2]
            for name, tensor in after.tensors.items()
            if ".adapters." in name and not tensor.equal(before.tensors[name])
        }
        assert changed == ({"B"} if number % 2 else {"A"})
        assert not after.tensors["head.weight"].equal(before.tensors["head.weight"])


slow = pytest.mark.slow


@pytest.mark.parametrize(("number", "client"), [(2, 1), pytest.param(2, 0, marks=slow), pytest.param(3, 0, marks=slow)])
def test_a_killed_command_resumes_bit_exactly(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, client: int
) -> None:
    options = ("--clients", "2", "--rounds", "3", "--local_steps", "2", "--arms", "rolora", "ffa")
    assert federate(cli, tmp_path / "uninterrupted", *options) == 0

    class Killed(BaseException):
        pass

    train = Learner.train

    def train_or_die(learner: Learner, trained: Client, job: Job, state: Any) -> ClientResult:
        if (job.number, trained.number) == (number, client):
            raise Killed
        return train(learner, trained, job, state)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train", train_or_die)
        with pytest.raises(Killed):
            federate(cli, tmp_path / "killed", *options)
    state = read_round(tmp_path / "killed" / "ffa")
    assert state is not None and state.number == number - 1
    assert federate(cli, tmp_path / "killed", *options) == 0
    for arm in ("ffa", "rolora"):
        files = [(tmp_path / name / arm / ROUND).read_bytes() for name in ("uninterrupted", "killed")]
        assert files[0] == files[1]
    for file in ("arms.csv", "rounds.csv", "arms.json"):
        assert (tmp_path / "uninterrupted" / file).read_text() == (tmp_path / "killed" / file).read_text()


def test_rounds_csv_has_the_last_round_of_a_command_killed_before_the_csv(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / "out", (*SHORT, "--arms", "ffa")

    class Killed(BaseException):
        pass

    def die_after_round_2(folder: Path) -> None:
        state = read_round(folder / "ffa")
        if state is not None and state.number == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(server, "write_rounds", die_after_round_2)
        with pytest.raises(Killed):
            federate(cli, output, *options)
    assert federate(cli, output, *options) == 0
    with (output / "rounds.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["0", "1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_once_and_the_same_command_continues(
    cli: CommandLine, tmp_path: Path, number: int, code: int
) -> None:
    options = ("--clients", "2", "--rounds", "30", "--local_steps", "2", "--arms", "ffa")
    assert federate(cli, tmp_path / "uninterrupted", *options) == 0
    command = [*cli.words("federate", *options), "--output", str(tmp_path / "stopped")]
    process = subprocess.Popen([sys.executable, "main.py", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stopped/rounds.csv").is_file():
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    if number != signal.SIGKILL:
        assert "the same command continues: python main.py federate" in errors
    assert main(command) == 0
    files = [(tmp_path / name / "ffa" / ROUND).read_bytes() for name in ("uninterrupted", "stopped")]
    assert files[0] == files[1]


def test_each_client_has_its_own_data(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"ada": 20, "bob": 40, "eve": 5}  # A fifth is held out, and a batch has 6 rows.
    folders = [str(write_parquet(tmp_path / name, {"train": size})) for name, size in sizes.items()]
    output = tmp_path / "out"
    options = ("--clients", *folders, "--rounds", "2", "--local_steps", "2")
    assert federate(cli, output, *options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("client ")]
    assert [line.partition(" (")[0] for line in lines] == [
        f"client {number}: {rows} rows" for number, rows in enumerate((16, 32, 4))
    ]
    assert lines[2].endswith("skipped, since a batch has 6 rows (data.batch_size)")
    rows = json.loads((output / "arms.json").read_text())
    assert [(row["arm"], row["clients"]) for row in rows] == [("ffa", 2), ("lora", 2), ("rolora", 2)]


@pytest.mark.parametrize("any_cli", ["cli", "text_cli"], indirect=True)
def test_the_cached_prefix_gives_the_same_adapter(any_cli: CommandLine, tmp_path: Path) -> None:
    """Each client has its own rows, and reads the outputs of these rows from the cache."""
    fixed_inputs = ["--data.horizontal_flip=false", "--data.crop_scale=[1, 1]", "--model.adapter.layers=2"]
    fixed_inputs += ["--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 3, num_heads: 2}"]
    if any_cli.config == "text":
        fixed_inputs = ["--model.backbone_args={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"]
        fixed_inputs += ["--model.adapter.layers=1", "--data.batch_size=4"]
    for cached in ("true", "false"):
        options = (*SHORT, "--arms", "ffa", *fixed_inputs, f"--data.cache_prefix={cached}")
        assert federate(any_cli, tmp_path / cached, *options) == 0
    cached, computed = (tensors(tmp_path / name) for name in ("true", "false"))
    for name, tensor in computed.items():  # The cache pads texts to other lengths, so sums round differently.
        torch.testing.assert_close(cached[name], tensor, rtol=1e-4, atol=1e-6)


def test_clients_can_train_a_regression(text_cli: CommandLine, tmp_path: Path) -> None:
    data = tmp_path / "scores"
    data.mkdir()
    for split, rows in (("train", 24), ("val", 8)):
        lines = [f"a text of number {row},{0.37 * row:.2f}" for row in range(rows)]
        (data / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    options = [f"--data.path={data}", "--data.task=null", "--data.batch_size=4", *SHORT, "--arms", "ffa"]
    assert federate(text_cli, tmp_path / "out", *options) == 0
    assert "val/spearman" in json.loads((tmp_path / "out" / "arms.json").read_text())[0]


def test_clients_can_train_a_text_classifier(text_cli: CommandLine, tmp_path: Path) -> None:
    options = (*SHORT, "--arms", "ffa", "--partition", "dirichlet:0.3", "--data.batch_size=4")
    assert federate(text_cli, tmp_path / "out", *options) == 0
    assert (tmp_path / "out/ffa/adapter/adapter_model.safetensors").is_file()


def test_tasks_without_labels_are_split_at_random(
    instruction_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*SHORT, "--arms", "ffa")
    assert federate(instruction_cli, tmp_path / "out", *options, "--partition", "dirichlet:0.3") == 2
    assert "--partition: dirichlet:0.3 draws classes, and the training rows have none. Use iid." in (
        capsys.readouterr().err
    )
    assert federate(instruction_cli, tmp_path / "other", *options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "--rounds: 0 is too small. Give 1 or more."),
        (["--local_steps=-1"], "--local_steps: -1 is too small. Give 1 or more."),
        (["--clients", "0"], "--clients: 0 is too small. Give 1 or more."),
        (["--clients", "nowhere"], "--clients: 'nowhere' is not an existing folder or file. Give one number"),
        (["--clients", "tests"], "--clients: 'tests' is one client. Give two or more, or use fit."),
        (["--clients", "49"], "--clients: 48 training rows are fewer than 49 clients. Give a smaller number."),
        (["--clients", "12"], "data.batch_size: no client has the rows of one batch."),
        (["--partition=dirichlet:0"], "--partition: 'dirichlet:0' is not known. Use iid, or dirichlet:ALPHA"),
        (["--partition=dirichlet:1e308"], "with ALPHA above 0 and at most 1e+09."),
        (["--partition=nid"], "--partition: 'nid' is not known."),
        (["--arms", "ffa", "fedex"], "--arms: 'fedex' is not known. Choose from ffa, lora, rolora, centralised."),
        (["--model.tuning=head"], "model.tuning: head has no factors to average. Set model.tuning to adapter."),
        (
            ["--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"],
            "init_b: orthogonal is not allowed, since every arm trains B in the first round.",
        ),
        (["--model.adapter.chain.every_n_epochs=1"], "chain.every_n_epochs: 1 is not supported"),
        (["--model.learning_rat=1"], "learning_rat"),
    ],
)
def test_bad_input_is_one_message(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    output = tmp_path / "out"
    code = federate(cli, output, *(() if options[0] == "--clients" else SHORT), *options)
    refused(capsys, code, message)


def test_ignored_keys_are_logged(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ignored = {
        **{"trainer.devices": "2", "trainer.limit_train_batches": "1", "trainer.default_root_dir": str(cli.root)},
        **{"spectrum.every_n_epochs": "3", "checkpoint.mode": "min", "generalization.rows": "7"},
        **{"forgetting.path": str(tmp_path), "find_lr": "true", "name": "mine"},
    }
    used = {
        **{"trainer.accumulate_grad_batches": "2", "trainer.accelerator": "cpu", "checkpoint.monitor": "val/loss"},
        **{"seed_everything": "3", "test_after_fit": "true"},
        **{"data.batch_size": "60", "model.learning_rate": "0.1"},
    }
    options = [f"--{key}={value}" for key, value in {**ignored, **used}.items()]
    assert federate(cli, tmp_path / "out", *SHORT, *options) == 2  # No client has the rows of a batch.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": ignored. --rounds" in line]
    logged = set(re.findall(r"[\w.]+", line.partition(": ignored")[0]))
    assert ignored.keys() <= logged
    assert not used.keys() & logged


def test_a_checkpoint_of_fit_is_refused(
    fitted_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = federate(fitted_cli, tmp_path / "out", *SHORT, "--ckpt_path", str(fitted_cli.run()))
    refused(capsys, code, "is a checkpoint of fit", "model.adapter_path")


def test_an_output_cannot_change_its_plan(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert federate(cli, output, *SHORT, "--data.batch_size=60") == 2  # The record of a failed command is replaced.
    assert federate(cli, output, *SHORT, "--arms", "ffa") == 0
    before = (output / "ffa" / ROUND).read_bytes()
    for options, message in (
        (["--rounds=3"], "--rounds: 3 differs from 2"),
        (["--seed_everything=1"], "seed_everything: 1 differs from 0"),
        (["--model.learning_rate=0.5"], "model.learning_rate: 0.5 differs from 0.01"),
    ):
        assert federate(cli, output, *SHORT, *options, "--arms", "ffa") == 2
        assert message in capsys.readouterr().err
    assert federate(cli, output, *SHORT, "--arms", "rolora") == 0  # The table gets further arms.
    assert [row["arm"] for row in json.loads((output / "arms.json").read_text())] == ["ffa", "rolora"]
    assert (output / "ffa" / ROUND).read_bytes() == before
    (output / "ffa" / ROUND).write_bytes(before[:-100])
    assert federate(cli, output, *SHORT, "--arms", "ffa") == 2
    assert "Remove the file to train this arm again." in capsys.readouterr().err
    for arm in ("ffa", "rolora"):
        (output / arm / ROUND).unlink()
    assert federate(cli, output, *SHORT, "--arms", "ffa") == 0  # Without round files, the arm starts again.
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link").symlink_to("/")
    assert federate(cli, tmp_path / "other", *SHORT) == 2
    assert "holds other files (link)" in capsys.readouterr().err
    assert (tmp_path / "other/link").is_symlink()  # A lock would remove the link.
    (tmp_path / "other/letter.txt").write_text("mine")
    assert federate(cli, tmp_path / "other", *SHORT) == 2
    assert "holds other files (letter.txt)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensors": {}}, "missing"),
        ({"tensors": {"b": torch.zeros(3), "w": torch.zeros(1)}}, "b is (3,), not (2,)"),
        ({"tensors": {"b": torch.zeros(2), "w": torch.zeros(1), "a": torch.zeros(2)}}, "unexpected"),
        ({"tensors": {"b": torch.zeros(2, dtype=torch.float64), "w": torch.zeros(1)}}, "b is torch.float64"),
        ({"tensors": {"b": torch.tensor([0.0, torch.nan]), "w": torch.zeros(1)}}, "b of client 7 is no longer finite"),
        ({"rows": 0}, "the client has no rows"),
    ],
)
def test_a_result_that_cannot_be_averaged_names_its_client(changed: dict[str, Any], message: str) -> None:
    good = {"client": 7, "rows": 5, "loss": 1.0, "tensors": {"b": torch.zeros(2), "w": torch.zeros(1)}}
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2), "w": torch.zeros(1)}
    server.check_result(ClientResult(**good), tensors, {"b", "w"}, "ffa, round 1")
    with refuses("ffa, round 1", message, error=ModelError):
        server.check_result(ClientResult(**good | changed), tensors, {"b", "w"}, "ffa, round 1")


@pytest.mark.parametrize("name", ["ffa", "ffa/mine", "lora/adapter/mine", "federation.json"])
def test_a_directory_with_other_files_is_refused_and_unchanged(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    user_file = tmp_path / "out" / name
    user_file.parent.mkdir(parents=True)
    user_file.write_text("mine")
    refused(capsys, federate(cli, tmp_path / "out", *SHORT), "--output", name.partition("/")[0])
    assert user_file.read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name.partition("/")[0]]


def test_a_locked_output_is_refused(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    held, refusal = context.Event(), context.Event()

    def hold() -> None:
        with locked(folder):
            held.set()
            refusal.wait(60)

    process = context.Process(target=hold)
    process.start()
    assert held.wait(60)
    try:
        refused(capsys, federate(cli, folder, *SHORT), f"--output: process {process.pid} on ", "choose another")
    finally:
        refusal.set()
        process.join()


HISTORY = [{"arm": "ffa", "round": 0, "val/loss": 1.0}]


@pytest.mark.parametrize(
    ("tensor", "history", "message"),
    [
        (torch.tensor([torch.nan]), HISTORY, "a tensor is not finite"),
        (torch.ones(1, dtype=torch.float64), HISTORY, "a is torch.float64, not torch.float32"),
        (torch.ones(1), [None], "the history lacks metrics"),
        (torch.ones(1), [{"arm": "ffa", "round": 0, "val/loss": "x"}], "the history lacks metrics"),
        (torch.ones(1), [*HISTORY, {"arm": "ffa", "round": 1}], "the history lacks metrics"),
    ],
)
def test_a_damaged_round_is_refused(tmp_path: Path, tensor: torch.Tensor, history: list[Any], message: str) -> None:
    server.write_round(tmp_path, Round(len(history) - 1, {"a": tensor}, history))
    with refuses(ROUND, message, "Remove the file to train this arm again.", error=CheckpointError):
        read_round(tmp_path, {"a": torch.zeros(1)})


@pytest.mark.parametrize("text", ["null", "3", "{}", "[1]", '[{"x": 1}]', "[" * 100_000])
def test_a_damaged_table_is_written_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "arms.json").write_text(text)
    write_table([{"arm": "ffa", "rounds": 2}], tmp_path)
    assert json.loads((tmp_path / "arms.json").read_text()) == [{"arm": "ffa", "rounds": 2}]
