"""The command `export`: options, bad input, and failures that leave no partial output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from app.cli import main
from app.commands import export
from modules.base import AdaptedModule
from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused
from tests.backbones import save_backbone
from tests.conftest import ROOT
from tests.support.disks import no_file_larger_than
from tests.support.small_data import write_sentences

SHORT = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"),
    *("--trainer.logger=false", "--model.learning_rate=0.1"),
)


def run_export(run: Path, output: Path, *options: str) -> int:
    return main(["export", str(run), "--format", "merged", "--output", str(output), *options])


def assert_only(folder: Path, *names: str) -> None:
    """Check that the folder contains these files and nothing else, hidden files included."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


# -------------------------------------------------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run of text classification in bfloat16, and its backbone."""
    folder = tmp_path_factory.mktemp("finished")
    backbone = save_backbone(folder / "backbone", "roberta")
    data = write_sentences(folder / "cola", {"train": 50, "validation": 9})
    cli = CommandLine(folder / "runs", data, "text", backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli("fit", *SHORT, "--model.backbone_dtype=bfloat16") == 0
    return cli.run(), backbone


def test_factors_are_merged_in_float32_and_rounded_to_the_backbones_dtype(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    run, backbone = finished
    assert run_export(run, tmp_path / "own") == 0
    assert run_export(run, tmp_path / "exact", "--dtype=float32") == 0
    own, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "exact"))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    before = load_file(backbone / "model.safetensors")
    layer = "encoder.layer.0.attention.self.query"
    factors = [state[f"backbone.roberta.{layer}.adapters.query.{factor}"] for factor in "BA"]
    merged = before[f"{layer}.weight"].bfloat16().float() + 4 * factors[0] @ factors[1]  # s = alpha 16 / rank 4
    torch.testing.assert_close(exact[f"roberta.{layer}.weight"], merged, atol=1e-6, rtol=0)
    torch.testing.assert_close(own[f"roberta.{layer}.weight"], merged.bfloat16(), rtol=0, atol=0)
    assert {t.dtype for t in own.values()} == {torch.bfloat16}
    assert {t.dtype for t in exact.values()} == {torch.float32}
    torch.testing.assert_close(exact["classifier.dense.weight"], state["backbone.classifier.dense.weight"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "own").dtype == torch.bfloat16


def test_a_moved_backbone_is_refused_unless_its_new_path_is_given(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, backbone = finished
    elsewhere = Path(shutil.copytree(backbone, tmp_path / "elsewhere"))
    backbone.rename(backbone.with_name("gone"))
    try:
        refused(capsys, run_export(run, tmp_path / "model"), "model.backbone", str(backbone))
        assert run_export(run, tmp_path / "model", "--model.backbone", str(elsewhere)) == 0
    finally:
        backbone.with_name("gone").rename(backbone)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "RUN" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "export" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--format=zip"], ["format", "'merged'", "zip"]),
        (["--dtype=float16"], ["dtype", "'float32', 'bfloat16'", "float16"]),
        (["--backbon=x"], ["backbon"]),
        (["--model.weights=nothing.safetensors"], ["model.weights", "nothing.safetensors"]),
    ],
)
def test_wrong_values_are_refused(
    finished: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    parts: list[str],
) -> None:
    refused(capsys, run_export(finished[0], tmp_path / "model", *options), *parts)
    assert_only(tmp_path)


def test_other_frozen_weights_are_refused(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_backbone(tmp_path / "other", "roberta", seed=1)
    code = run_export(finished[0], tmp_path / "model", "--model.backbone", str(other))
    refused(capsys, code, "other frozen weights", "model.backbone")
    assert_only(tmp_path, "other")


def test_missing_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["export"]), "run", "format", "output")


def test_a_configuration_file_before_the_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export.yaml").write_text("export: {dtype: float32}")
    words = ["export", "RUN", "--format", "merged", "--output", str(tmp_path / "model")]
    refused(capsys, main(["--config", str(tmp_path / "export.yaml"), *words]), "export must come first")


def test_a_missing_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, run_export(tmp_path / "nowhere", tmp_path / "model"), "RUN", "no run directory", "nowhere")


def test_a_run_without_checkpoints_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    refused(capsys, run_export(tmp_path / "run", tmp_path / "model"), "RUN", "checkpoints/last.ckpt", str(tmp_path))


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    code = run_export(tmp_path / "other.ckpt", tmp_path / "model")
    refused(capsys, code, "RUN", "other.ckpt", "does not name its model")


def test_output_is_never_overwritten(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    refused(capsys, run_export(finished[0], tmp_path), "--output", str(tmp_path), "exists already")
    refused(capsys, run_export(finished[0], tmp_path / "note.txt"), "--output", "note.txt", "exists already")
    refused(capsys, run_export(finished[0], tmp_path / "note.txt" / "model"), "--output", "could not be written")
    assert_only(tmp_path, "note.txt")
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("size", [100, 4_000, 30_000])
def test_a_full_disk_leaves_no_files(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    with no_file_larger_than(size):
        code = run_export(finished[0], tmp_path / "model")
    refused(capsys, code, "--output", str(tmp_path / "model"), "too large")
    assert_only(tmp_path)


def test_an_interrupted_export_leaves_no_files(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> str:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_export(finished[0], tmp_path / "model")
    assert_only(tmp_path)
