"""data.cache_prefix: a fit that reads the frozen prefix's output from disk equals a fit that computes this output."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
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

# no dropout in the prefix, whose cached output is computed in eval mode
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
    """Return a new cache of hidden states for each test. The cache of tokens is shared by the session."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "onesided"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Collect, for each forward pass of the first block in a fit, whether the block was in train mode."""
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


def same_fit(cli: CommandLine, first: int, second: int, exact: bool = True) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for tag in ("train/loss", "val/loss"):
        first_losses, second_losses = cli.scalars(tag, first), cli.scalars(tag, second)
        assert first_losses.keys() == second_losses.keys()
        torch.testing.assert_close(
            torch.tensor(list(first_losses.values())), torch.tensor(list(second_losses.values())), **tolerance
        )
    first_state, second_state = cli.checkpoint(first)["state_dict"], cli.checkpoint(second)["state_dict"]
    assert first_state.keys() == second_state.keys()
    for name, tensor in first_state.items():
        torch.testing.assert_close(second_state[name], tensor, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- same losses


@pytest.mark.parametrize(
    ("any_cli", "extra_options"),
    [
        ("cli", []),
        pytest.param("cli", ["--model.tuning=head", "--data.num_workers=1"], marks=pytest.mark.slow),
        ("text_cli", ["--model.backbone_dtype=bfloat16", "--trainer.precision=bf16-mixed"]),
        pytest.param(
            "text_cli",
            ["--model.tuning=head", "--data.padding=max_length", "--data.bucket_by_length=false"],
            marks=pytest.mark.slow,
        ),
        pytest.param("instruction_cli", ["--model.gradient_checkpointing=true"], marks=pytest.mark.slow),
        ("instruction_cli", ["--data.packing=true", "--data.batch_size=2"]),
    ],
    indirect=["any_cli"],
)
def test_losses_equal_those_of_the_uncached_fit(
    any_cli: CommandLine, cache: Path, ran: list[bool], capsys: pytest.CaptureFixture[str], extra_options: list[str]
) -> None:
    cli, kind = any_cli, any_cli.config
    options = [*OPTIONS[kind], *extra_options, "--trainer.max_epochs=1"]
    assert cli("fit", *options) == 0
    assert any(ran)
    assert not files(cache)
    ran.clear()
    capsys.readouterr()
    assert cli("fit", *options, CACHED) == 0
    same_fit(cli, 0, 1, exact=False)
    rows = {"image": ("48", "12"), "text": ("50", "20"), "instructions": ("50", "10")}[kind]
    messages = capsys.readouterr().err
    for split, size in zip(("train", "val"), rows, strict=True):
        assert f"output for {size} rows of {split} (" in messages
    assert "GiB." in messages
    assert not any(ran)  # the prefix never runs in train mode
    assert len(files(cache)) == 2


def test_the_next_run_reads_the_cache_of_the_first(
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


def test_validate_and_test_run_the_whole_backbone(cli: CommandLine, cache: Path) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1"]
    assert cli("fit", *options, "--test_after_fit=true") == 0
    fitted = cli.metrics()
    assert cli("test", *options, "--ckpt_path=last") == 0
    assert cli.metrics()["test/loss"] == fitted["test/loss"]
    assert cli("validate", *options, "--ckpt_path=last") == 0
    assert cli.metrics()["val/loss"] == pytest.approx(fitted["val/loss"], rel=1e-4)
    assert len(files(cache)) == 2


def test_a_cached_fit_resumes_in_the_middle_of_an_epoch(cli: CommandLine, finished_fit: Callable[..., None]) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=2", "--checkpoint.last_every_n_steps=3"]
    assert interrupt_and_resume(cli, finished_fit, options, cut=11) == 9


# ------------------------------------------------------------------------------------------------------- stale caches


@pytest.mark.slow
def test_other_weights_data_or_depth_get_a_new_cache(cli: CommandLine, cache: Path, tmp_path: Path) -> None:
    short = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    short += ["--trainer.limit_val_batches=1", "--trainer.logger=false", "--generalization.rows=0"]
    counts = []
    for options in (
        ["--data.batch_size=4"],
        ["--model.adapter.rank=2", "--model.learning_rate=0.1"],  # neither key affects the prefix
        ["--seed_everything=1"],  # other random weights
        ["--model.adapter.layers=1"],
        ["--trainer.precision=bf16-mixed"],
        ["--data.max_train_samples=30"],  # same validation rows
        ["--data.path", str(write_parquet(tmp_path / "other", {"train": 60, "test": 30}, seed=1))],
        # same weights with another number of heads
        [f"--model.backbone_args={VIT.replace('num_heads: 2', 'num_heads: 4')}"],
    ):
        assert cli("fit", *short, *options) == 0
        counts.append(len(files(cache)))
    assert counts == [2, 2, 4, 6, 8, 9, 11, 13]


def test_one_changed_weight_or_word_gets_a_new_cache(text_cli: CommandLine, cache: Path, tmp_path: Path) -> None:
    short = [*OPTIONS["text"], CACHED, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    short += ["--trainer.limit_val_batches=1", "--trainer.logger=false", "--generalization.rows=0"]
    folder = Path(shutil.copytree(text_cli.backbone[1], tmp_path / "moved"))
    assert text_cli("fit", *short) == 0
    assert text_cli("fit", *short, f"--model.backbone={folder}") == 0  # same weights in another folder
    assert text_cli("fit", *short, "--data.max_length=31") == 0  # all rows are shorter
    assert len(files(cache)) == 2
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layer.0.output.dense.weight"))
    weights[name][16, 16] += 1  # one weight in the middle of the matrix
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert text_cli("fit", *short, f"--model.backbone={folder}") == 0
    assert len(files(cache)) == 4
    other = write_sentences(tmp_path / "cola", {"validation": 20, "train": 50, "test": 9})  # other sentences
    assert text_cli("fit", *short, f"--data.path={other}") == 0
    assert len(files(cache)) == 6


@pytest.mark.slow
def test_an_incomplete_file_is_written_again(cli: CommandLine, cache: Path) -> None:
    options = [*OPTIONS["image"], CACHED, "--trainer.max_epochs=1"]
    assert cli("fit", *options) == 0
    truncated, renamed = sorted(cache.glob("prefix-*"))
    truncated.write_bytes(truncated.read_bytes()[:-1])
    renamed.rename(renamed.with_name(f".{renamed.stem}.1.npy"))  # the temporary name that a killed process leaves
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
def test_options_that_exclude_the_cache_are_refused(
    cli: CommandLine, cache: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    error = failure(cli, capsys, *OPTIONS["image"], *options)
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not files(cache)


def test_backbones_that_cannot_continue_from_the_cache_are_refused(
    cli: CommandLine, text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--model.backbone=vit_relpos_small_patch16_224", *OPTIONS["image"]]
    error = failure(cli, capsys, *other)
    assert "supports only timm's plain ViTs, and vit_relpos_small_patch16_224 is a VisionTransformerRelPos" in error
    folder = save_backbone(tmp_path / "deberta", "deberta")
    error = failure(text_cli, capsys, f"--model.backbone={folder}", "--model.adapter.layers=1")
    assert "data.cache_prefix: DebertaV2ForSequenceClassification cannot continue from the output of one" in error


def test_a_full_disk_is_one_message(
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


@pytest.mark.slow
def test_two_processes_share_the_cache_that_rank_0_writes(
    cli: CommandLine, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BEAT", 0.0)  # rank 0 reports its progress to rank 1 after each batch
    options = [*OPTIONS["image"], CACHED, "--model.adapter.dropout=0", "--trainer.max_epochs=1"]
    assert cli("fit", *options, "--data.batch_size=12") == 0
    shutil.rmtree(cache)
    run_on_two(cli.words("fit", *options, "--data.batch_size=6"), tmp_path)
    assert len(files(cache)) == 2
    assert [(tmp_path / f"rank{i}.log").read_text().count("is kept in") for i in (0, 1)] == [2, 0]
    for name, tensor in cli.checkpoint(0)["state_dict"].items():
        torch.testing.assert_close(cli.checkpoint(1)["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)
