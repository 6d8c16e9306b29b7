"""Bad input: one message that says what, where and how to mend it, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from app.callbacks import RunSummary
from app.cli import main
from app.run.checkpoint_io import AtomicCheckpointIO
from datamodules.image_classification import ImageClassificationData
from modules.image_classification import ImageClassifier
from tests.conftest import colour_image, png, write_parquet
from tests.support.disks import no_room_for

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


def refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    """One line on stderr that begins with `error:` and has all the parts."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert "Union" not in lines[0]
    assert "<class" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main([]), "No command is given", "fit, validate, test, predict")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["frobnicate"]), "frobnicate")


def test_missing_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["fit", "--config", "conf/nothing.yaml"]), "conf/nothing.yaml")


def test_configuration_that_is_no_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: {a: [1, 2")
    refused(capsys, main(["fit", "--config", str(path)]), "broken.yaml")


def test_config_without_a_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["fit", "--config"]), "config")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--model.bakbone=x", ["bakbone", "did you mean backbone"]),
        ("--model.adapter.rnk=3", ["adapter.rnk", "adapter.rank"]),
        ("--data.batchsize=3", ["batchsize", "batch_size"]),
        ("--trainer.max_epoch=3", ["max_epoch"]),
        ("--optimizer.lr=3", ["optimizer.lr"]),
        ("--model.adapter.train=C", ["adapter.train", "'B', 'A', 'both'", "C"]),
        ("--model.tuning=everything", ["tuning", "everything"]),
        ("--model.learning_rate=fast", ["learning_rate", "float", "fast"]),
        ("--trainer.max_epochs=many", ["trainer.max_epochs", "many"]),
        ("--model.adapter.rank=0", ["adapter.rank", "1 or more"]),
        ("--model.adapter.rank=33", ["adapter.rank", "33", "blocks.0.attn.qkv.query", "32 × 32"]),
        ("--model.adapter.init_b=orthogonal", ["adapter.init_a", "adapter.init_b", "zero"]),
        ("--model.adapter.train=A", ["adapter.train", "init_b: orthogonal"]),
        ("--model.adapter.init_a=zero", ["adapter.init_a", "neither factor"]),
        ("--model.adapter.dropout=1.0", ["adapter.dropout", "[0, 1)"]),
        ("--model.adapter.alpha=-1", ["adapter.alpha"]),
        ("--model.adapter.targets=[quary]", ["adapter.targets", "quary", "query"]),
        ("--model.adapter.targets=[mlp_gate]", ["mlp_gate", "blocks.*.attn.qkv.query (query)", "blocks.*.mlp.fc1"]),
        ("--model.adapter.targets=regex:decoder.*", ["regex:decoder.*", "blocks.*.attn.proj (output)"]),
        ("--model.adapter.targets=regex:(", ["regex:(", "regular expression"]),
        ("--model.backbone=vit_bass_patch16_224", ["model.backbone", "vit_bass_patch16_224"]),
        ("--model.image_size=15", ["model.image_size", "15", "4 pixels"]),
        ("--model.weights=nothing.safetensors", ["model.weights", "nothing.safetensors"]),
        ("--model.weights=README.md", ["model.weights", "README.md", ".safetensors"]),
        ("--model.label_smoothing=1.5", ["model.label_smoothing", "[0, 1)"]),
        ("--model.learning_rate=-0.1", ["model.learning_rate"]),
        ("--model.warmup_ratio=1", ["model.warmup_ratio"]),
        ("--spectrum.every_n_epochs=0", ["spectrum.every_n_epochs"]),
        ("--checkpoint.last_every_n_steps=0", ["checkpoint.last_every_n_steps"]),
        ("--data.path=/nowhere/at/all", ["data.path", "/nowhere/at/all"]),
        ("--data.path=some/hub-name", ["data.path", "some/hub-name", "--data.path DIRECTORY", "--model.weights FILE"]),
        ("--data.batch_size=0", ["data.batch_size"]),
        ("--data.batch_size=1000", ["data.batch_size", "48", "smaller"]),
        ("--data.val_fraction=1", ["data.val_fraction"]),
        ("--data.label_column=lable", ["data.label_column", "lable", "img, label"]),
        ("--data.max_train_samples=0", ["data.max_train_samples"]),
        ("--trainer.accelerator=gpu", ["accelerator", "conf/cpu.yaml"]),
        ("--trainer.strategy=ddpp", ["ddpp"]),
        ("--trainer.precision=bf16-true", ["trainer.precision", "bf16-mixed"]),
        ("--trainer.max_epochs=-1", ["trainer.max_epochs"]),
        ("--trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches"]),
        ("--trainer.use_distributed_sampler=true", ["trainer.use_distributed_sampler", "Set it to false"]),
        ("--trainer.val_check_interval=100", ["val_check_interval", "100"]),
        ("--checkpoint.monitor=val/f1", ["val/f1", "val/acc1"]),
        ("--ckpt_path=last", ["ckpt_path", "no run"]),
        ("--ckpt_path=nothing.ckpt", ["ckpt_path", "nothing.ckpt"]),
    ],
)
def test_wrong_value(cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str, parts: list[str]) -> None:
    refused(capsys, cli("fit", option), *parts)


def test_the_model_is_checked_before_any_data_is_read(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(ImageClassificationData, "setup", read)
    refused(capsys, cli("fit", "--model.adapter.targets=[mlp_gate]"), "mlp_gate")


# --------------------------------------------------------------------------------------------------------------- data


def broken_parquet(folder: Path) -> str:
    write_parquet(folder, {"train": 30})
    file = folder / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return "train.parquet"


def missing_column(folder: Path) -> str:
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), folder / "train.parquet")
    return "picture, label"


def corrupt_image(folder: Path) -> str:
    whole = png(colour_image(0, np.random.default_rng(0)))
    rows = {"img": [{"bytes": whole, "path": None}] * 20, "label": [0, 1] * 10}
    rows["img"][7] = {"bytes": whole[: len(whole) // 2], "path": None}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    return "train.parquet row 7"


def label_out_of_range(folder: Path) -> str:
    image = {"bytes": png(colour_image(0, np.random.default_rng(0))), "path": None}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [image] * 20, "label": [0, 1] * 9 + [1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    return "is -1 in row 19, outside 0 to 1"


def empty_folder(folder: Path) -> str:
    return "no images"


@pytest.mark.parametrize("damage", [broken_parquet, missing_column, corrupt_image, label_out_of_range, empty_folder])
def test_damaged_data(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    part = damage(folder)
    refused(capsys, cli("fit", f"--data.path={folder}"), "data.", part)
    assert not cli.run().exists()


def test_a_missing_test_split_is_told_before_training(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data", {"train": 30})
    refused(capsys, cli("fit", f"--data.path={tmp_path / 'data'}", "--test_after_fit=true"), "no test split")
    assert not cli.run().exists()


def test_predict_without_a_folder(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(capsys, fitted_cli("predict", "--ckpt_path=last"), "data.predict_path")
    (tmp_path / "none").mkdir()
    refused(
        capsys,
        fitted_cli("predict", "--ckpt_path=last", f"--data.predict_path={tmp_path / 'none'}"),
        "holds no image",
        "none",
    )


# ----------------------------------------------------------------------------------------------- weights, checkpoints


def test_weights_of_another_model(cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, path)
    refused(capsys, cli("fit", f"--model.weights={path}"), "does not fit", "missing", "unexpected: conv1.weight")


def test_truncated_weights(cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"conv1.weight": torch.zeros(300)}, path)
    path.write_bytes(path.read_bytes()[:200])
    refused(capsys, cli("fit", f"--model.weights={path}"), "cut.safetensors", "cannot be read")


def test_pickled_code_is_not_run(cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "code-ran"
    for name, option in (("evil.pth", "--model.weights"), ("evil.ckpt", "--ckpt_path")):
        torch.save({"state_dict": Malicious(trace)}, tmp_path / name)
        refused(capsys, cli("fit", f"{option}={tmp_path / name}"), name)
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(trace)))
        refused(capsys, cli("fit", f"{option}={tmp_path / name}"), name)
    assert not trace.exists()


def test_truncated_checkpoint(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    path = fitted_cli.run() / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:2000])
    refused(capsys, fitted_cli("fit", f"--ckpt_path={path}"), "last.ckpt", "truncated")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--model.adapter.rank=2", ["of another shape", "is (4, 32), not (2, 32)"]),
        ("--model.adapter.targets=[query, value, key]", ["4 missing", "adapters.key.A"]),
        ("--model.adapter.targets=[query]", ["4 unexpected", "adapters.value.B"]),
        ("--model.tuning=head", ["model.tuning", "with tuning adapter", "has tuning head"]),
        ("--model.class_names=[a, b, c]", ["a, b, c", "red, green, blue"]),
    ],
)
def test_checkpoint_of_another_model(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str, parts: list[str]
) -> None:
    before = (fitted_cli.run() / "checkpoints" / "last.ckpt").read_bytes()
    refused(capsys, fitted_cli("fit", "--ckpt_path=last", option), *parts)
    assert (fitted_cli.run() / "checkpoints" / "last.ckpt").read_bytes() == before


def test_checkpoint_that_lost_the_frozen_factor(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    path = fitted_cli.run() / "checkpoints" / "last.ckpt"
    checkpoint = fitted_cli.checkpoint()
    del checkpoint["state_dict"]["backbone.blocks.1.attn.qkv.adapters.query.A"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    refused(capsys, fitted_cli("test", "--ckpt_path=last"), "1 missing", "blocks.1.attn.qkv.adapters.query.A")


# ----------------------------------------------------------------------------------------------------------- in the run


def test_weights_that_are_not_finite_are_not_saved(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: ImageClassifier) -> None:
        if self.global_step == 7:  # a finite loss whose gradient is not
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]

    monkeypatch.setattr(ImageClassifier, "on_after_backward", spoil)
    code = cli("fit", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "--ckpt_path last")
    assert all(tensor.isfinite().all() for tensor in cli.checkpoint()["state_dict"].values())
    assert cli.checkpoint()["global_step"] == 7


def test_checkpoint_over_other_frozen_weights(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    # weights: none draws the backbone from the run's seed
    refused(
        capsys, fitted_cli("test", "--ckpt_path=last", "--seed_everything=1"), "other frozen weights", "model.weights"
    )


def test_loss_that_is_not_finite(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ImageClassifier.forward

    def forward(self: ImageClassifier, image: torch.Tensor) -> torch.Tensor:
        return original(self, image) * (float("nan") if self.training and self.global_step == 11 else 1.0)

    monkeypatch.setattr(ImageClassifier, "forward", forward)
    code = cli("fit", "--trainer.max_epochs=3", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "nan at step 11", "--ckpt_path last", "learning_rate")
    kept = cli.checkpoint()
    assert kept["global_step"] == 10
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_full_disk(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    with no_room_for(".last.ckpt.", after=10):  # twice each: five checkpoints
        code = cli("fit", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "could not be written", "No space left on device", "--ckpt_path last")
    names = {p.name for p in (cli.run() / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert cli.checkpoint()["global_step"] > 0


def test_a_defect_keeps_its_traceback(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(RunSummary, "on_fit_start", hook)
    with pytest.raises(ZeroDivisionError):
        cli("fit")


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("summarization.Summarizer", "language_modeling.LanguageModelingData"),
        ("language_modeling.LanguageModel", "summarization.SummarizationData"),
        ("text_classification.TextClassifier", "image_classification.ImageClassificationData"),
    ],
)
def test_data_of_another_kind_than_the_model_takes(capsys: pytest.CaptureFixture[str], model: str, data: str) -> None:
    code = main(["fit", f"--model=modules.{model}", f"--data=datamodules.{data}", "--data.path=x"])
    refused(capsys, code, f"data: datamodules.{data} gives ", f"modules.{model} takes", "change one of them")
