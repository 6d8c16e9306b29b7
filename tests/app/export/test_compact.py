"""Export of a run as a compact directory, and loading of the module from that directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError
from safetensors.torch import load_file
from torch import Tensor

from app.cli import main
from app.commands import export
from app.export.compact import write_compact
from app.export.load_run import find_checkpoint, load_module
from modules.adapters import adapter_state
from modules.base import AdaptedModule
from modules.formats.compact import FILE_NAME, load_compact
from modules.image_classification import ImageClassifier
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine
from tests.backbones import save_backbone
from tests.support.refusals import refused

SHORT = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"),
    *("--trainer.logger=false", "--model.learning_rate=0.1", "--model.adapter.init_a=signs"),
)


def run_export(run: Path, output: Path, *options: str) -> int:
    return main(["export", str(run), "--format", "compact", "--output", str(output), *options])


def trained_module(cli: CommandLine) -> AdaptedModule:
    return load_module(find_checkpoint(str(cli.run())), {})


def read_back(folder: Path, module: AdaptedModule) -> dict[str, Tensor]:
    """Return the tensors of a compact directory under the names of the module's state."""
    heads = [name.removeprefix("backbone.") for name in module.head_names if name.startswith("backbone.")]
    compact = load_compact(folder, module.backbone, exclude=heads)
    assert compact.adapter == module.adapter
    return {f"backbone.{name}": tensor for name, tensor in compact.factors.items()} | compact.heads


@torch.no_grad()
def test_signs_are_left_out_and_other_frozen_weights_are_warned_about(
    text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert text_cli("fit", *SHORT) == 0
    capsys.readouterr()
    assert run_export(text_cli.run(), tmp_path / "compact") == 0
    out = capsys.readouterr().out
    assert "Left out: the frozen factors of 4 projections, which loading draws again." in out
    assert "Stored" not in out
    assert f"--model.adapter_path {tmp_path / 'compact'}" in out
    module = trained_module(text_cli)
    names = {name.partition(".")[0] for name in load_file(tmp_path / "compact" / FILE_NAME)}
    assert names == {"adapter", "head"}
    assert not any(name.endswith(".A") for name in load_file(tmp_path / "compact" / FILE_NAME))

    fresh: Any = TextClassifier(**module.hparams).eval()  # type: ignore[arg-type]
    batch = fresh.tokenizer(["w1 good film w2 w3", "the film was bad ."], padding=True, return_tensors="pt")
    before = fresh(batch)
    fresh.load_state_dict(read_back(tmp_path / "compact", fresh))
    assert torch.equal(fresh(batch), module(batch))
    assert (fresh(batch) - before).abs().max() > 1e-3

    args: dict[str, Any] = {**module.hparams, "adapter_path": str(tmp_path / "compact")}
    warning = r"model.adapter_path: .*compact was trained over other frozen weights"
    other = save_backbone(tmp_path / "other", "roberta", seed=1)
    for change in ({}, {"backbone": str(other)}, {"backbone_dtype": "bfloat16"}):
        caplog.clear()
        TextClassifier(**{**args, **change})
        assert bool(re.search(warning, caplog.text)) is bool(change)


def test_training_and_testing_start_from_a_compact_directory(
    text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text_cli("fit", *SHORT, "--model.adapter.seed=3") == 0
    assert run_export(text_cli.run(), tmp_path / "first") == 0
    path = f"--model.adapter_path={tmp_path / 'first'}"
    assert text_cli("test", "--ckpt_path", str(text_cli.run()), "--data.test_on_validation=true") == 0
    expected = text_cli.metrics()
    assert text_cli("test", path, "--data.test_on_validation=true") == 0
    assert text_cli.metrics(1)["test/loss"] == expected["test/loss"]

    still = "--model.learning_rate=1e-30"
    for train in ("B", "A"):
        assert text_cli("fit", *SHORT, path, still, f"--model.adapter.train={train}") == 0
    before = text_cli.checkpoint()["state_dict"]
    for version in (2, 3):
        after = text_cli.checkpoint(version)["state_dict"]
        assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    capsys.readouterr()
    assert run_export(text_cli.run(2), tmp_path / "again") == 0
    assert "Left out" in capsys.readouterr().out  # B was trained again, so A still has the signs that loading draws
    assert run_export(text_cli.run(3), tmp_path / "other") == 0
    assert "Stored: both factors of 4 projections" in capsys.readouterr().out


def test_singular_vectors_are_read_and_not_computed_again(
    text_cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text_cli("fit", *SHORT, "--model.adapter.init_a=svd") == 0
    assert run_export(text_cli.run(), tmp_path / "compact") == 0
    trained = trained_module(text_cli)
    monkeypatch.setattr(torch.linalg, "svd", None)
    args = {**trained.hparams, "adapter_path": str(tmp_path / "compact")}
    loaded = TextClassifier(**args)  # type: ignore[arg-type]
    loaded.load_adapter_heads()
    state = trained.saved_state()
    assert loaded.saved_state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.saved_state().items())
    assert (loaded.adapter.init_a, loaded.adapter.init_b, loaded.adapter.train) == ("given", "given", "B")


def test_a_damaged_directory_is_refused(
    text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"damage")
    code = text_cli("fit", f"--model.adapter_path={tmp_path}")
    refused(capsys, code, "model.adapter_path", str(tmp_path / FILE_NAME), "cannot be read")


def test_factors_of_other_initialisations_are_stored(
    fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_export(fitted_text_cli.run(), tmp_path / "compact", "--dtype=bfloat16") == 0
    out = capsys.readouterr().out
    assert "Stored: both factors of 4 projections, since only init signs can be drawn again." in out
    assert "Left out" not in out
    assert "bfloat16" in out
    module = trained_module(fitted_text_cli)
    read, state = read_back(tmp_path / "compact", module), module.saved_state()
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor.bfloat16().float()) for name, tensor in state.items())


def test_the_default_dtype_is_float32_on_a_bfloat16_backbone(fitted_cli: CommandLine, tmp_path: Path) -> None:
    """Factors and heads are float32 even on a backbone in bfloat16, so the export is float32 too."""
    module = trained_module(fitted_cli)
    module.backbone_dtype = torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load_module", lambda *_: module)
        assert run_export(fitted_cli.run(), tmp_path / "compact") == 0
    read, state = read_back(tmp_path / "compact", module), module.saved_state()
    assert read.keys() == state.keys()
    assert "head.weight" in read
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert len(adapter_state(module.backbone)) + 2 == len(read)


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    args = {"embed_dim": 16, "depth": 1, "num_heads": 1}
    module = ImageClassifier(
        "vit_tiny_patch16_224", weights="none", backbone_args=args, class_names=["a", "b"], tuning="head"
    )
    with pytest.raises(ArgumentError, match=r"compact is for adapters.*tuning: head"):
        write_compact(module, torch.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(tmp_path), "--format", "tiny", "--output", str(tmp_path / "compact")]
    refused(capsys, main(words), "format", "'compact'", "tiny")
