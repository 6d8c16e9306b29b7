"""A finished run becomes a model of transformers or timm that computes what the adapted one did."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from jsonargparse import ArgumentError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from app.cli import main
from app.commands import export
from modules.adapters import AdapterConfig, adapted_layers, adapters_disabled
from modules.base import AdaptedModule
from modules.image_classification import ImageClassifier
from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused
from tests.backbones import save_backbone
from tests.conftest import CLASSES, ROOT, write_sentences

SHORT = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"),
    *("--trainer.logger=false", "--model.learning_rate=0.1"),
)
TEXTS = ["w1 good film w2 w3", "the film was bad ."]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[AdaptedModule]:
    """The modules themselves, as they are at the end of each fit: what an export must compute."""
    modules: list[AdaptedModule] = []
    monkeypatch.setattr(AdaptedModule, "on_fit_end", lambda module: modules.append(module))
    return modules


def run_export(run: Path, output: Path, *options: str) -> int:
    return main(["export", str(run), "--format", "merged", "--output", str(output), *options])


def assert_only(folder: Path, *names: str) -> None:
    """Nothing else lies there, hidden or not."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@torch.no_grad()
def assert_same(found: torch.Tensor, expected: torch.Tensor, frozen: torch.Tensor) -> None:
    """Logits are those of the adapted module, which are not those of the frozen one."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - frozen).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- the models


@torch.no_grad()
def test_text_classifier(
    text_cli: CommandLine, trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text_cli("fit", *SHORT) == 0
    output = tmp_path / "new" / "model"
    capsys.readouterr()
    assert run_export(text_cli.run(), output) == 0
    assert_only(output.parent, "model")
    assert_only(output, "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    out = capsys.readouterr().out
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    assert f"model.safetensors, tokenizer.json, tokenizer_config.json: {size:.1f} MB, float32" in out
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1  # the weights are as readable as the rest
    assert out.splitlines()[-1] == f"Exported: {output}"

    model = AutoModelForSequenceClassification.from_pretrained(output)
    batch = AutoTokenizer.from_pretrained(output)(TEXTS, padding=True, return_tensors="pt")
    module = trained[0].eval()
    assert dict(batch).keys() == dict(module.tokenizer(TEXTS)).keys()
    with adapters_disabled(module.backbone):
        frozen = module(batch)
    assert_same(model(**batch).logits, module(batch), frozen)
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    assert model.config.label2id == {"unacceptable": 0, "acceptable": 1}


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 2])  # with one beam, transformers refuses to save settings of beam search
def test_summarizer(summary_cli: CommandLine, trained: list[Any], tmp_path: Path, num_beams: int) -> None:
    beams = ("--model.generation.num_beams", str(num_beams), "--model.generation.length_penalty=1.5")
    assert summary_cli("fit", *SHORT, *beams) == 0
    assert run_export(summary_cli.run(), tmp_path / "model") == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    module = trained[0].eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    start = torch.tensor([[2, 0, 44], [2, 0, 49]])
    with adapters_disabled(module.backbone):
        frozen = module.backbone(**batch, decoder_input_ids=start).logits
    expected = module.backbone(**batch, decoder_input_ids=start).logits
    assert_same(model(**batch, decoder_input_ids=start).logits, expected, frozen)
    torch.testing.assert_close(model.generate(**batch), module.backbone.generate(**batch), rtol=0, atol=0)


@torch.no_grad()
def test_image_classifier(cli: CommandLine, trained: list[Any], tmp_path: Path) -> None:
    assert cli("fit", *SHORT, "--seed_everything=3") == 0  # frozen weights that the seed alone gives
    output = tmp_path / "model"
    output.mkdir()  # empty
    assert run_export(cli.run() / "checkpoints" / "last.ckpt", output) == 0
    assert_only(output, "README.md", "config.json", "model.safetensors")
    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    module = trained[0].eval()
    image = torch.randn(3, 3, 16, 16)
    with adapters_disabled(module.backbone):
        frozen = module(image)
    assert_same(model(image), module(image), frozen)
    config = json.loads((output / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("vit_tiny_patch16_224", 3)
    assert config["label_names"] == CLASSES
    prepared = timm.data.resolve_model_data_config(model)
    assert json.loads(json.dumps(prepared)) == json.loads(json.dumps(module.preprocessing))  # lists for tuples
    assert prepared["input_size"] == (3, 16, 16)


def image_classifier(backbone: str, **args: Any) -> ImageClassifier:
    """One whose adapters and head are random."""
    adapter = AdapterConfig(rank=2, targets=["mlp_in"])
    module = ImageClassifier(backbone, "none", backbone_args=args, class_names=["a", "b", "c"], adapter=adapter)
    for layer in adapted_layers(module.backbone).values():
        for factors in layer.factors():
            nn.init.normal_(factors.B)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1]}),  # a head that pools
        # two heads, whose mean counts
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 1}),
    ],
)
def test_heads_of_other_families(tmp_path: Path, backbone: str, args: dict[str, Any]) -> None:
    module = image_classifier(backbone, **args)
    image = torch.randn(2, 3, 224, 224)
    with adapters_disabled(module.backbone):
        frozen = module(image)
    expected = module(image)
    export.write_merged(module, torch.float32, tmp_path)
    assert_same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image), expected, frozen)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [("levit_128s", "head.bn.weight"), ("repvit_m0_9", "head.head.bn.weight")],
)
def test_a_head_that_normalises_is_refused(tmp_path: Path, backbone: str, reason: str) -> None:
    module = ImageClassifier(backbone, "none", class_names=["a", "b"], tuning="head")
    with pytest.raises(ArgumentError, match=reason):
        export.write_merged(module, torch.float32, tmp_path)
    assert_only(tmp_path)


def test_other_logits_are_refused(tmp_path: Path) -> None:
    module = image_classifier("vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=1)
    module.backbone.register_forward_hook(lambda *_: torch.randn(2, 16))
    with pytest.raises(ArgumentError, match="logits would differ"):
        export.write_merged(module, torch.float32, tmp_path)
    assert_only(tmp_path)


# ------------------------------------------------------------------------------------------------------ what can be set


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of text classification in bfloat16, and its backbone."""
    folder = tmp_path_factory.mktemp("finished")
    backbone = save_backbone(folder / "backbone", "roberta")
    data = write_sentences(folder / "cola", {"train": 50, "validation": 9})
    cli = CommandLine(folder / "runs", data, "text", backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli("fit", *SHORT, "--model.backbone_dtype=bfloat16") == 0
    return cli.run(), backbone


def test_merging_is_done_in_float32_and_rounded_to_the_backbones_own_dtype(
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
    merged = before[f"{layer}.weight"].bfloat16().float() + 4 * factors[0] @ factors[1]  # s is alpha 16 over rank 4
    torch.testing.assert_close(exact[f"roberta.{layer}.weight"], merged, atol=1e-6, rtol=0)
    torch.testing.assert_close(own[f"roberta.{layer}.weight"], merged.bfloat16(), rtol=0, atol=0)
    assert {t.dtype for t in own.values()} == {torch.bfloat16}
    assert {t.dtype for t in exact.values()} == {torch.float32}
    torch.testing.assert_close(exact["classifier.dense.weight"], state["backbone.classifier.dense.weight"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "own").dtype == torch.bfloat16


def test_a_backbone_that_has_moved(
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
def test_wrong_value(
    finished: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    parts: list[str],
) -> None:
    refused(capsys, run_export(finished[0], tmp_path / "model", *options), *parts)
    assert_only(tmp_path)


def test_other_frozen_weights(finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_backbone(tmp_path / "other", "roberta", seed=1)
    code = run_export(finished[0], tmp_path / "model", "--model.backbone", str(other))
    refused(capsys, code, "other frozen weights", "model.backbone")
    assert_only(tmp_path, "other")


def test_missing_words(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["export"]), "run", "format", "output")


def test_a_configuration_file_before_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export.yaml").write_text("export: {dtype: float32}")
    words = ["export", "RUN", "--format", "merged", "--output", str(tmp_path / "model")]
    refused(capsys, main(["--config", str(tmp_path / "export.yaml"), *words]), "before export")


def test_no_such_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, run_export(tmp_path / "nowhere", tmp_path / "model"), "RUN", "no run directory", "nowhere")


def test_run_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    refused(capsys, run_export(tmp_path / "run", tmp_path / "model"), "RUN", "checkpoints/last.ckpt", str(tmp_path))


def test_checkpoint_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    refused(capsys, run_export(tmp_path / "other.ckpt", tmp_path / "model"), "RUN", "other.ckpt", "what model")


def test_output_is_never_written_over(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    refused(capsys, run_export(finished[0], tmp_path), "--output", str(tmp_path), "there already")
    refused(capsys, run_export(finished[0], tmp_path / "note.txt"), "--output", "note.txt", "there already")
    refused(capsys, run_export(finished[0], tmp_path / "note.txt" / "model"), "--output", "could not be written")
    assert_only(tmp_path, "note.txt")
    assert (tmp_path / "note.txt").read_text() == "mine"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 4_000, 30_000])
def test_full_disk(finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    with file_size_limit(size):
        code = run_export(finished[0], tmp_path / "model")
    refused(capsys, code, "--output", str(tmp_path / "model"), "too large")
    assert_only(tmp_path)


def test_interruption_leaves_nothing(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> str:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_export(finished[0], tmp_path / "model")
    assert_only(tmp_path)
