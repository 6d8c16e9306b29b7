"""`export --format bank`, the command `bank` and `predict --bank`, on runs that share a frozen A."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from app.cli import main
from app.commands import bank as bank_command
from app.export.load_run import find_checkpoint, load_module
from modules.formats.bank import Bank
from tests.app.conftest import CommandLine
from tests.app.export.test_peft import TASKS, logits
from tests.support.data import put
from tests.support.refusals import refused
from tests.support.rows import write_rows
from tests.support.small_data import colour_image, png

INPUTS = torch.arange(4, 18).view(2, 7)


def copied_run(cli: CommandLine, version: int, **changes: Any) -> Path:
    """Copy version_0 with a different B and a different head.

    Args:
        cli: A command line with a finished run.
        version: Number of the copy.
        changes: `scale`, by which A is multiplied, or `classes`, the class names of a new head.
    """
    target = cli.run().with_name(f"version_{version}")
    shutil.copytree(cli.run(), target)
    for path in (target / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        generator = torch.Generator().manual_seed(version)
        for name, tensor in content["state_dict"].items():
            if name.endswith(".B") or "classifier" in name or name.startswith("head."):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith(".A"):
                tensor.mul_(changes.get("scale", 1.0))
        if classes := changes.get("classes"):
            content["hyper_parameters"]["class_names"] = classes
            for name, tensor in content["state_dict"].items():
                if name.startswith(("backbone.classifier.out_proj.", "head.")):
                    shape = (len(classes), *tensor.shape[1:])
                    content["state_dict"][name] = torch.randn(shape, generator=generator)
        torch.save(content, path)
    return target


@pytest.fixture
def runs(fitted_text_cli: CommandLine) -> list[Path]:
    """Return two finished runs over one A."""
    return [fitted_text_cli.run(), copied_run(fitted_text_cli, 1)]


def export(runs: list[Path], output: Path, *options: str) -> int:
    return main(["export", *map(str, runs), "--format", "bank", "--output", str(output), *options])


def module_of(run: Path) -> Any:
    return load_module(find_checkpoint(str(run)), {})


@torch.no_grad()
def test_unpacked_adapters_have_the_logits_of_their_runs_in_peft(runs: list[Path], tmp_path: Path) -> None:
    assert export(runs, tmp_path / "bank", "--names", "ada,bob") == 0
    assert main(["bank", "unpack", str(tmp_path / "bank"), "--output", str(tmp_path / "out")]) == 0
    for name, run in zip(("ada", "bob"), runs, strict=True):
        module = module_of(run)
        folder = tmp_path / "out" / name
        assert json.loads((folder / "labels.json").read_text()) == module.class_names
        base = AutoModelForSequenceClassification.from_pretrained(module.hparams["backbone"])
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        expected = module.backbone(input_ids=INPUTS).logits
        torch.testing.assert_close(model(input_ids=INPUTS).logits, expected, atol=1e-5, rtol=1e-5)
    peft_run = tmp_path / "peft"
    assert main(["export", str(runs[1]), "--format", "peft", "--output", str(peft_run)]) == 0
    for file in ("adapter_config.json", "adapter_model.safetensors", "labels.json"):
        assert (peft_run / file).read_bytes() == (tmp_path / "out" / "bob" / file).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("name", ["cli", "text_cli"])
def test_a_bank_works_with_the_models_of_timm_and_transformers(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    cli: CommandLine = request.getfixturevalue(f"fitted_{name}")
    runs = [cli.run(), copied_run(cli, 1)]
    assert export(runs, tmp_path / "bank", "--names", "ada,bob") == 0
    modules = [module_of(run) for run in runs]
    base = TASKS[name][0](modules[0], Path(cli.backbone[1]) if cli.backbone else Path()).eval()
    bank = Bank.open(tmp_path / "bank")
    bank.attach(base)
    with bank.batch(["bob", "ada"]):
        actual = TASKS[name][1](base)
    ada, bob = (logits(name, module) for module in modules)
    torch.testing.assert_close(actual, torch.stack([bob[0], ada[1]]), atol=1e-5, rtol=1e-5)
    assert (ada - bob).abs().max() > 1e-2


def test_adapters_are_listed_added_and_removed(
    runs: list[Path], fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bank"
    assert export(runs, path, "--dtype", "bfloat16") == 0
    third = copied_run(fitted_text_cli, 2)
    assert main(["bank", "add", str(path), str(third), "--names", "eve"]) == 0
    bank = Bank.open(path)
    assert (bank.names, bank.dtype) == (["version_0", "version_1", "eve"], torch.bfloat16)
    before = bank.read("eve")
    assert main(["bank", "remove", str(path), "version_0"]) == 0
    bank = Bank.open(path)
    assert bank.names == ["version_1", "eve"]
    assert all(torch.equal(tensor, before.bs[name]) for name, tensor in bank.read("eve").bs.items())
    capsys.readouterr()
    assert main(["bank", "list", str(path)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    row = ("eve", str(bank.config("eve").rank), f"{bank.config('eve').alpha:g}", "unacceptable, acceptable")
    assert " ".join((*row, bank.digest("eve")[:12])) in output
    assert "2 adapters of" in output
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"bank", "bank.lock"}  # no temporary file is left


def test_an_unpacked_adapter_can_be_added_again(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, out = str(tmp_path / "bank"), tmp_path / "out"
    assert export(runs, tmp_path / "bank", "--names", "ada,bob") == 0
    assert main(["bank", "unpack", bank, "bob", "--output", str(out)]) == 0
    before = Bank.open(bank).read("bob")
    assert main(["bank", "remove", bank, "bob"]) == 0
    assert main(["bank", "add", bank, str(out / "bob")]) == 0
    added = Bank.open(bank)
    assert added.names == ["ada", "bob"]
    after = added.read("bob")
    assert (after.labels, after.config.alpha) == (before.labels, before.config.alpha)
    assert (after.bs | after.heads).keys() == (before.bs | before.heads).keys()
    for name, tensor in (before.bs | before.heads).items():
        assert torch.equal((after.bs | after.heads)[name], tensor), name
    assert main(["bank", "remove", bank, "ada"]) == 0  # The added adapter is now the first.
    assert main(["bank", "unpack", bank, "--output", str(tmp_path / "again")]) == 0
    for path in (out / "bob").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "bob" / path.name).read_bytes()
    capsys.readouterr()

    tensors = out / "bob/adapter_model.safetensors"
    content = load_file(tensors)

    def without_labels() -> None:
        (out / "bob/labels.json").unlink()

    def without_head() -> None:
        save_file({k: t for k, t in content.items() if "lora" in k}, tensors)

    def other_head() -> None:
        save_file({k: t[:1] if "classifier.dense" in k else t for k, t in content.items()}, tensors)

    def other_a() -> None:
        save_file({k: 2 * t if "lora_A" in k else t for k, t in content.items()}, tensors)

    for change, message in (
        (other_a, "eve was trained over another frozen A"),
        (other_head, "has backbone.classifier.dense."),
        (without_labels, "no class names. Write the class names into labels.json"),
        (without_head, "has the head tensors none, but the bank's adapters have"),
    ):
        change()
        assert main(["bank", "add", bank, str(out / "bob"), "--names", "eve"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("action", ["add", "remove"])
def test_changes_of_a_bank_hold_its_lock(
    runs: list[Path], tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank"
    assert export(runs, path, "--names", "ada,bob") == 0
    checks: list[bool] = []

    def check_lock() -> None:
        with pytest.raises(Timeout), FileLock(f"{path}.lock", blocking=False):
            pass
        checks.append(True)

    write_bank = bank_command.write_bank
    monkeypatch.setattr(bank_command, "write_bank", lambda *arguments: (check_lock(), write_bank(*arguments)))
    chosen = [str(runs[0]), "--names", "eve"] if action == "add" else ["bob"]
    assert main(["bank", action, str(path), *chosen]) == 0
    assert checks == [True]
    with FileLock(f"{path}.lock", blocking=False):  # The lock is free again.
        pass


def test_wrong_use_is_an_error(
    runs: list[Path], fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "bank", copied_run(fitted_text_cli, 3, scale=2.0)
    assert export(runs, path, "--names", "ada,bob") == 0
    before = path.read_bytes()
    bank, first = str(path), str(runs[0])
    cases: list[tuple[list[str], str]] = [
        (["bank", "add", bank, str(other)], r"version_3 was trained over another frozen A: in \S+ the digest of A is"),
        (["bank", "add", bank, first, "--names", "ada"], "the name ada is taken. Give other names"),
        (["bank", "add", bank, first, "--names", "a,b"], "2 names are given for 1 run."),
        (["bank", "add", bank, first, "--names", "a/b"], "'a/b' cannot be the name of an adapter"),
        (["bank", "add", bank], "RUN: bank add needs at least one RUN"),
        (["bank", "remove", bank, "adda"], r"no adapter 'adda'\. Did you mean ada"),
        (["bank", "remove", bank, "ada", "bob"], "would be empty"),
        (["bank", "unpack", bank, "ada"], "--output: bank unpack needs a directory"),
        (["bank", "list", bank, "ada"], "NAME: bank list takes only a file"),
        (["bank", "list", bank, "--names", "x"], "--names: bank list adds no adapters"),
        (["bank", "list", str(runs[0] / "config.yaml")], "cannot be read as a bank"),
        (["bank", "lst", bank], "lst"),
        (["export", first, str(runs[1]), "--format", "peft", "--output", bank], "--format peft takes one run"),
        (["export", first, "--format", "bank", "--output", bank], "exists already. Give a new file"),
        (["export", first, first, "--format", "bank", "--output", f"{bank}2"], "the name version_0 is taken"),
    ]
    for command, message in cases:
        capsys.readouterr()
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert re.search(message, " ".join(error.split())), (command, error)
    assert path.read_bytes() == before
    assert not (tmp_path / "bank2").exists()


# ----------------------------------------------------------------------------------------------------- mixed batches


def predicted(cli: CommandLine, version: int, number: int = 0) -> list[dict[str, str]]:
    """Return the rows of a table of predictions."""
    name = "predictions.csv" if number == 0 else f"predictions-{number}.csv"
    with (cli.run(version) / name).open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: dict[str, list[str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


NAMES = ["bob", "ada", "ada", "bob", "bob", "ada", "bob"]
SENTENCES = ["the film was good .", "bad", "w1 w2 w3 it is", "", "good good", "a w4", "w5 w6 w7 w8 w9 w10"]


Rows = list[dict[str, str]]


def alone_and_mixed(
    cli: CommandLine, runs: list[Path], table: Path, *options: str, of_bank: tuple[str, ...] = ()
) -> tuple[dict[str, Rows], Rows]:
    """Predict a table with each run alone, and with a bank of the runs.

    Args:
        cli: Command line whose root holds the runs of ada, version_0, and of bob, version_1.
        runs: The runs.
        table: Rows to predict. The column `who` names the adapters.
        options: Options of all predictions.
        of_bank: Options of the prediction with the bank.

    Returns:
        The predicted rows by the name of the run, and the rows that the bank has predicted.
    """
    bank = table.with_name("bank")
    assert export(runs, bank, "--names", "ada,bob") == 0
    given = (f"--data.predict_path={table}", *options)
    alone = {}
    for version, (name, run) in enumerate(zip(("ada", "bob"), runs, strict=True)):
        assert cli("predict", f"--ckpt_path={run}", *given) == 0
        alone[name] = predicted(cli, version)
    assert cli("predict", f"--bank={bank}", "--data.adapter_column=who", *given, *of_bank) == 0
    return alone, predicted(cli, 2)


def assert_close(row: dict[str, str], expected: dict[str, str], prefix: str) -> None:
    """Check that two rows agree in all numbers whose column has a prefix. Cells of missing columns are empty."""
    numbers = [{k: float(v) for k, v in each.items() if k.startswith(prefix) and v} for each in (row, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-5)


@pytest.mark.parametrize("classes", [None, ["x", "y", "z"]])
def test_each_row_is_classified_by_its_adapter(
    fitted_text_cli: CommandLine, tmp_path: Path, classes: list[str] | None
) -> None:
    cli = fitted_text_cli
    runs = [cli.run(), copied_run(cli, 1, classes=classes)]
    table = write_table(tmp_path / "new.csv", {"sentence": SENTENCES, "who": NAMES})
    alone, rows = alone_and_mixed(cli, runs, table, of_bank=("--model.adapter.seed=5",))
    for i, (row, name) in enumerate(zip(rows, NAMES, strict=True)):
        expected = alone[name][i]
        if SENTENCES[i] == "":
            assert row["error"] == expected["error"] != ""
            continue
        assert (row["adapter"], row["sentence"]) == (name, SENTENCES[i])
        assert row["prediction"] == expected["prediction"]
        assert len([key for key in expected if key.startswith("probab")]) == (4 if name == "bob" and classes else 3)
        assert_close(row, expected, "probab")
    differs = [a["probability"] != b["probability"] for a, b in zip(alone["ada"], alone["bob"], strict=True)]
    assert any(differs)


@pytest.mark.parametrize(("suffix", "classes"), [(".csv", ["x", "y"]), (".parquet", ["p", "q", "r", "s"])])
def test_each_image_is_classified_by_its_adapter(
    fitted_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, classes: list[str]
) -> None:
    cli, damaged = fitted_cli, 3
    runs = [cli.run(), copied_run(cli, 1, classes=classes)]
    random = np.random.default_rng(0)
    images = [png(colour_image(i % 3, random)) for i in range(len(NAMES))]
    images[damaged] = b""
    files = [put(tmp_path / f"photos/{i}.png", image).name for i, image in enumerate(images)]
    if suffix == ".csv":  # as the hub's image folders have it
        table = write_table(tmp_path / "photos/metadata.csv", {"file_name": files, "Who": NAMES})
    else:
        cells = [{"bytes": image, "path": file} for image, file in zip(images, files, strict=True)]
        table = tmp_path / "new.parquet"
        datasets.Dataset.from_dict({"image": cells, "who": NAMES}).to_parquet(str(table))
    alone, rows = alone_and_mixed(cli, runs, table)
    assert [(row["name"], row["adapter"]) for row in rows] == list(zip(files, NAMES, strict=True))
    for i, (row, name) in enumerate(zip(rows, NAMES, strict=True)):
        expected = alone[name][i]
        assert (row["prediction"], row["error"]) == (expected["prediction"], expected["error"])
        assert bool(row["error"]) is (i == damaged)
        assert_close(row, expected, "probab")
    assert {row["prediction"] for row in alone["bob"]} <= {"", *classes}
    capsys.readouterr()
    options = (f"--bank={table.with_name('bank')}", "--data.adapter_column=who")
    refused(
        capsys,
        cli("predict", *options, f"--data.predict_path={tmp_path / 'photos'}"),
        f"data.predict_path: {tmp_path / 'photos'} is not a table",
        "Give a table, such as a CSV file, with the columns image (paths of the images) and who.",
    )


@pytest.mark.parametrize(
    ("any_cli", "column", "answer"),
    [("fitted_summary_cli", "document", "summary"), ("fitted_instruction_cli", "instruction", "response")],
    indirect=["any_cli"],
)
def test_each_text_is_generated_by_its_adapter(any_cli: CommandLine, tmp_path: Path, column: str, answer: str) -> None:
    runs = [any_cli.run(), copied_run(any_cli, 1)]
    texts = [text or "w3" for text in SENTENCES]
    table = write_table(tmp_path / "new.csv", {column: texts, "who": NAMES})
    alone, rows = alone_and_mixed(any_cli, runs, table, "--data.prediction_format=csv")
    assert [(row["adapter"], row[answer]) for row in rows] == [
        (name, alone[name][i][answer]) for i, name in enumerate(NAMES)
    ]
    assert [row[answer] for row in alone["ada"]] != [row[answer] for row in alone["bob"]]


def test_each_question_is_answered_by_its_adapter(
    fitted_instruction_cli: CommandLine, questions_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    runs = [fitted_instruction_cli.run(), copied_run(fitted_instruction_cli, 1)]
    cli = CommandLine(fitted_instruction_cli.root, questions_path, "questions", llama_path)
    questions = [json.loads(line) for line in (questions_path / "test.jsonl").read_text().splitlines()]
    asked = [row | {"who": name} for row, name in zip(questions, NAMES, strict=False)]
    alone, rows = alone_and_mixed(cli, runs, write_rows(tmp_path / "new.jsonl", asked))
    for i, (row, name) in enumerate(zip(rows, NAMES, strict=True)):
        assert (row["adapter"], row["prediction"]) == (name, alone[name][i]["prediction"])
        assert_close(row, alone[name][i], "log_probability")
    names = [key for key in rows[0] if key.startswith("log_probability")]
    assert all(abs(float(a[k]) - float(b[k])) > 1e-3 for a, b in zip(*alone.values(), strict=True) for k in names)


def test_a_bank_of_truncated_adapters_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    refused(capsys, export(runs, tmp_path / "bank", "--rank=1"), "--rank, --keep, --validate", "share no A")
    assert not (tmp_path / "bank").exists()


def test_wrong_use_of_a_bank_in_predict_is_an_error(
    runs: list[Path],
    fitted_text_cli: CommandLine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(runs, tmp_path / "bank", "--names", "ada,bob") == 0
    bank, column = f"--bank={tmp_path / 'bank'}", "--data.adapter_column=who"
    table = write_table(tmp_path / "new.csv", {"sentence": ["good", "bad"], "who": ["ada", "adda"], "gap": ["ada", ""]})
    path = f"--data.predict_path={table}"
    cases: list[tuple[list[str], list[str]]] = [
        ([bank, column, path], ["no adapter 'adda'. Did you mean ada?"]),
        ([bank, path], ["data.adapter_column: --bank needs the column"]),
        ([bank, path, "--data.adapter_column=whom"], ["data.adapter_column: ", "has no column whom"]),
        ([bank, path, "--data.adapter_column=gap"], ["data.adapter_column: row 1 of", "has no gap"]),
        ([column, path], ["data.adapter_column: who names adapters of a bank. Give --bank FILE."]),
        ([bank, column, path, f"--ckpt_path={runs[0]}"], ["ckpt_path: the adapters of --bank replace"]),
        ([f"--bank={table}", column, path], ["cannot be read as a bank"]),
    ]
    for options, parts in cases:
        capsys.readouterr()
        refused(capsys, fitted_text_cli("predict", *options), *parts)
