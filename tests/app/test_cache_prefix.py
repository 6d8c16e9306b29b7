"""A fit that reads its frozen prefix's output from disk is the fit that computes it each time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from app.cli import AsymmetryCLI
from datamodules import base
from datamodules.loading import prefix_cache
from tests.app.processes import run_on_two
from tests.app.test_resume import interrupt_and_resume
from tests.backbones import save_backbone
from tests.support.small_data import write_parquet, write_sentences

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# no dropout in the prefix: what is kept is in eval mode
VIT = "{patch_size: 4, embed_dim: 32, depth: 3, num_heads: 2}"
STILL = ["--data.horizontal_flip=false", "--data.crop_scale=[1, 1]"]
OPTIONS = {
    "image": [f"--model.backbone_args={VIT}", "--model.adapter.layers=2", *STILL],
    "text": [
        "--model.backbone_args={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, classifier_dropout: 0.1}",
        "--model.adapter.layers=1",
    ],
    "instructions": ["--model.backbone_args={attention_dropout: 0.0}", "--model.adapter.layers=1"],
}
CACHED = "--data.cache_prefix=true"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of hidden states for each test; that of tokens stays the session's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "onesided"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """One entry for each forward pass of a fit's first block, which is whether it was in train mode."""
    calls: list[bool] = []
    original = AsymmetryCLI.fit

    def count(self: AsymmetryCLI, **arguments: Any) -> None:
        block = next(m for m in self.model.backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential))[0]
        attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
        attention.register_forward_hook(lambda module, *_: calls.append(module.training))
        original(self, **arguments)

    monkeypatch.setattr(AsymmetryCLI, "fit", count)
    yield calls


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("prefix-*"))


def same_fit(cli: CommandLine, one: int, other: int, exact: bool = True) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for tag in ("train/loss", "val/loss"):
        losses, others = cli.scalars(tag, one), cli.scalars(tag, other)
        assert losses.keys() == others.keys()
        torch.testing.assert_close(
            torch.tensor(list(losses.values())), torch.tensor(list(others.values())), **tolerance
        )
    state, another = cli.checkpoint(one)["state_dict"], cli.checkpoint(other)["state_dict"]
    assert state.keys() == another.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(another[name], tensor, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- same losses


@pytest.mark.parametrize(
    ("any_cli", "more"),
    [
        ("cli", []),
        ("cli", ["--model.tuning=head", "--data.num_workers=1"]),
        ("text_cli", ["--model.backbone_dtype=bfloat16", "--trainer.precision=bf16-mixed"]),
        ("text_cli", ["--model.tuning=head", "--data.padding=max_length", "--data.bucket_by_length=false"]),
        ("instruction_cli", ["--model.gradient_checkpointing=true"]),
        ("instruction_cli", ["--data.packing=true", "--data.batch_size=2"]),
    ],
    indirect=["any_cli"],
)
def test_losses_are_those_of_the_uncached_fit(
    any_cli: CommandLine, cache: Path, ran: list[bool], capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    cli, kind = any_cli, any_cli.config
    options = [*OPTIONS[kind], *more, "--trainer.max_epochs=1"]
    assert cli("fit", *options) == 0
    assert any(ran)
    assert not files(cache)
    ran.clear()
    capsys.readouterr()
    assert cli("fit", *options, CACHED) == 0
    same_fit(cli, 0, 1, exact=False)
    rows = {"image": ("48", "12"), "text": ("50", "20"), "instructions": ("50", "10")}[kind]
    kept = capsys.readouterr().err
    for split, size in zip(("train", "val"), rows, strict=True):
        assert f"output for {size} rows of {split} (" in kept
    assert "GiB." in kept
    assert not any(ran)  # the prefix never runs in train mode
    assert len(files(cache)) == 2


def test_the_next_run_reads_what_the_first_has_written(
    cli: CommandLine, cache: Path, ran: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1"]
    assert cli("fit", *options) == 0
    ran.clear()
    capsys.readouterr()
    assert cli("fit", *options) == 0
    same_fit(cli, 0, 1)
    assert not ran
    assert len(files(cache)) == 2
    assert "The frozen prefix's output for 48 rows of train is read from" in capsys.readouterr().err


def test_validate_and_test_go_by_the_whole_backbone(cli: CommandLine, cache: Path) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1"]
    assert cli("fit", *options, "--test_after_fit=true") == 0
    fitted = cli.metrics()
    assert cli("test", *options, "--ckpt_path=last") == 0
    assert cli.metrics()["test/loss"] == fitted["test/loss"]
    assert cli("validate", *options, "--ckpt_path=last") == 0
    assert cli.metrics()["val/loss"] == pytest.approx(fitted["val/loss"], rel=1e-4)
    assert len(files(cache)) == 2


def test_resume_in_the_middle_of_an_epoch(cli: CommandLine) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=2", "--checkpoint.last_every_n_steps=3"]
    assert interrupt_and_resume(cli, options, cut=11) == 9


# ---------------------------------------------------------------------------------------------- what is not used again


def test_other_weights_data_or_depth_are_computed_anew(cli: CommandLine, cache: Path, tmp_path: Path) -> None:
    short = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    short += ["--trainer.limit_val_batches=1", "--trainer.logger=false", "--generalization.rows=0"]
    counts = []
    for more in (
        ["--data.batch_size=4"],
        ["--model.adapter.rank=2", "--model.learning_rate=0.1"],  # nothing of the prefix
        ["--seed_everything=1"],  # other random weights
        ["--model.adapter.layers=1"],
        ["--trainer.precision=bf16-mixed"],
        ["--data.max_train_samples=30"],  # validation rows are the same
        ["--data.path", str(write_parquet(tmp_path / "other", {"train": 60, "test": 30}, seed=1))],
        [f"--model.backbone_args={VIT.replace('num_heads: 2', 'num_heads: 4')}"],  # the same weights, used otherwise
    ):
        assert cli("fit", *short, *more) == 0
        counts.append(len(files(cache)))
    assert counts == [2, 2, 4, 6, 8, 9, 11, 13]


def test_one_changed_weight_or_word_is_enough(text_cli: CommandLine, cache: Path, tmp_path: Path) -> None:
    short = [*OPTIONS["text"], CACHED, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    short += ["--trainer.limit_val_batches=1", "--trainer.logger=false", "--generalization.rows=0"]
    folder = Path(shutil.copytree(text_cli.backbone[1], tmp_path / "moved"))
    assert text_cli("fit", *short) == 0
    assert text_cli("fit", *short, f"--model.backbone={folder}") == 0  # wherever it lies
    assert text_cli("fit", *short, "--data.max_length=31") == 0  # no row is as long
    assert len(files(cache)) == 2
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layer.0.output.dense.weight"))
    weights[name][16, 16] += 1  # in its middle
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert text_cli("fit", *short, f"--model.backbone={folder}") == 0
    assert len(files(cache)) == 4
    other = write_sentences(tmp_path / "cola", {"validation": 20, "train": 50, "test": 9})  # other sentences
    assert text_cli("fit", *short, f"--data.path={other}") == 0
    assert len(files(cache)) == 6


def test_a_file_that_is_not_whole_is_written_anew(cli: CommandLine, cache: Path) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1"]
    assert cli("fit", *options) == 0
    one, other = sorted(cache.glob("prefix-*"))
    one.write_bytes(one.read_bytes()[:-1])
    other.rename(other.with_name(f".{other.stem}.1.npy"))  # as a killed process leaves it
    assert cli("fit", *options) == 0
    same_fit(cli, 0, 1)


# --------------------------------------------------------------------------------------------------------------- errors


def failure(cli: CommandLine, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli("fit", *options, CACHED) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.crop_scale=[0.5, 1]"], "data.horizontal_flip to false, data.crop_scale to [1, 1]"),
        (
            ["--model.adapter.layers=3"],
            "(blocks.0.attn.qkv.query). Adapt only the last blocks with model.adapter.layers: 2",
        ),
        (["--model.tuning=full"], "data.cache_prefix: with model.tuning: full"),
        (["--model.compile=true"], "model.compile: true does not support"),
    ],
)
def test_what_cannot_be_cached(
    cli: CommandLine, cache: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    error = failure(cli, capsys, *OPTIONS["image"], *options)
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not files(cache)


def test_backbones_that_cannot_go_on(
    cli: CommandLine, text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--model.backbone=vit_relpos_small_patch16_224", *OPTIONS["image"]]
    error = failure(cli, capsys, *other)
    assert "supports only timm's plain ViTs, and vit_relpos_small_patch16_224 is a VisionTransformerRelPos" in error
    folder = save_backbone(tmp_path / "deberta", "deberta")
    error = failure(text_cli, capsys, f"--model.backbone={folder}", "--model.adapter.layers=1")
    assert "data.cache_prefix: DebertaV2ForSequenceClassification cannot continue from the output of one" in error


def test_a_full_disk(
    cli: CommandLine, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))
        error = failure(cli, capsys, *OPTIONS["image"])
        assert "has 0.00 GiB left, and" in error
        assert "set HF_DATASETS_CACHE to another folder" in error

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_cache.np.lib.format, "write_array_header_1_0", full)
    error = failure(cli, capsys, *OPTIONS["image"])
    assert "could not be written (No space left on device); free some space" in error
    assert not list(cache.iterdir())


def test_two_processes_share_what_the_first_writes(
    cli: CommandLine, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BEAT", 0.0)  # the second is told of each batch
    options = [*OPTIONS["image"], CACHED, "--model.adapter.dropout=0", "--trainer.max_epochs=1"]
    assert cli("fit", *options, "--data.batch_size=12") == 0
    shutil.rmtree(cache)
    run_on_two(cli.words("fit", *options, "--data.batch_size=6"), tmp_path)
    assert len(files(cache)) == 2
    assert [(tmp_path / f"rank{i}.log").read_text().count("is kept in") for i in (0, 1)] == [2, 0]
    for name, tensor in cli.checkpoint(0)["state_dict"].items():
        torch.testing.assert_close(cli.checkpoint(1)["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)
