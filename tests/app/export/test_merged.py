"""Merged export: timm or transformers loads the model, and its logits equal those of the adapted module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from jsonargparse import ArgumentError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from app.commands import export
from app.export.load_run import find_checkpoint, load_module
from app.export.merged import write_merged
from modules.adapters import AdapterConfig, adapted_layers, adapters_disabled
from modules.base import AdaptedModule
from modules.image_classification import ImageClassifier
from tests.app.commands.test_export import SHORT, assert_only, run_export
from tests.app.conftest import CommandLine
from tests.support.small_data import CLASSES

TEXTS = ["w1 good film w2 w3", "the film was bad ."]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[AdaptedModule]:
    """Collect the module of each fit at its end. An export must compute the same logits."""
    modules: list[AdaptedModule] = []
    monkeypatch.setattr(AdaptedModule, "on_fit_end", lambda module: modules.append(module))
    return modules


@torch.no_grad()
def assert_same(found: torch.Tensor, expected: torch.Tensor, frozen: torch.Tensor) -> None:
    """Check that logits equal those of the adapted module, and that the frozen module's logits differ."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - frozen).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- models


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
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1  # all files have the same permissions
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
    assert cli("fit", *SHORT, "--seed_everything=3") == 0  # weights: none draws the frozen weights from this seed
    output = tmp_path / "model"
    output.mkdir()  # an empty directory may exist
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
    # JSON turns tuples into lists
    assert json.loads(json.dumps(prepared)) == json.loads(json.dumps(module.preprocessing))
    assert prepared["input_size"] == (3, 16, 16)


def image_classifier(backbone: str, **args: Any) -> ImageClassifier:
    """Return a module with random adapters and a random head."""
    adapter = AdapterConfig(rank=2, targets=["mlp_in"])
    module = ImageClassifier(backbone, weights="none", backbone_args=args, class_names=["a", "b", "c"], adapter=adapter)
    for layer in adapted_layers(module.backbone).values():
        for factors in layer.factors():
            nn.init.normal_(factors.B)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1]}),  # its head pools
        # it has two heads and returns the mean of their logits
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 1}),
    ],
)
def test_heads_of_other_families(tmp_path: Path, backbone: str, args: dict[str, Any]) -> None:
    module = image_classifier(backbone, **args)
    image = torch.randn(2, 3, 224, 224)
    with adapters_disabled(module.backbone):
        frozen = module(image)
    expected = module(image)
    write_merged(module, torch.float32, tmp_path)
    assert_same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image), expected, frozen)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [("levit_128s", "head.bn.weight"), ("repvit_m0_9", "head.head.bn.weight")],
)
def test_a_head_that_normalises_is_refused(tmp_path: Path, backbone: str, reason: str) -> None:
    module = ImageClassifier(backbone, weights="none", class_names=["a", "b"], tuning="head")
    with pytest.raises(ArgumentError, match=reason):
        write_merged(module, torch.float32, tmp_path)
    assert_only(tmp_path)


def test_an_export_with_other_logits_is_refused(tmp_path: Path) -> None:
    module = image_classifier("vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=1)
    module.backbone.register_forward_hook(lambda *_: torch.randn(2, 16))
    with pytest.raises(ArgumentError, match="logits would differ"):
        write_merged(module, torch.float32, tmp_path)
    assert_only(tmp_path)


# ------------------------------------------------------------------------------------------------------------- rounding

STEP = 2.0**-7  # distance from 1 to the next number in bfloat16


@pytest.fixture
def uniform(fitted_text_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Return a run whose weights are ones. The update is STEP in three layers, and STEP / 4 in the layer QUARTER."""
    module = load_module(find_checkpoint(str(fitted_text_cli.run())), {})
    with torch.no_grad():
        for i, layer in enumerate(adapted_layers(module.backbone).values()):
            layer.weight.fill_(1)
            (factors,) = layer.factors()
            factors.A.fill_(1)
            factors.B.fill_(STEP / (4 if i == 2 else 1) / layer.scale / len(factors.A))
    monkeypatch.setattr(export, "load_module", lambda *_: module)
    return fitted_text_cli


def test_the_card_of_a_task_without_a_pipeline_tag(
    fitted_text_cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.export.model_card.TASKS", {})
    assert run_export(fitted_text_cli.run(), tmp_path / "model") == 0
    _, front, body = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    assert "pipeline_tag" not in front
    assert "model-index" not in front
    assert "val/score" in body


QUARTER = "roberta.encoder.layer.1.attention.self.query"


def test_a_warning_has_the_share_of_the_update_that_is_rounded_away(
    uniform: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding loses QUARTER alone: 1/16 of ‖Δ‖² = 3 + 1/16, which is 1/7 of the norm."""
    assert run_export(uniform.run(), tmp_path / "model", "--dtype=bfloat16") == 0
    captured = capsys.readouterr()
    (warning,) = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    for part in ("bfloat16", f"off by 14.3 % of its norm, most in {QUARTER} with 100 %", "--dtype float32"):
        assert part in warning
    assert captured.out.splitlines()[-1] == f"Exported: {tmp_path / 'model'}"
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| Update, rounded to bfloat16 | `off by 14.3 % of its norm, most in {QUARTER} with 100 %` |" in card
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert set(weights[f"{QUARTER}.weight"].flatten().tolist()) == {1}
    assert set(weights[f"{QUARTER.replace('.1.', '.0.')}.weight"].flatten().tolist()) == {1 + STEP}


def test_float32_rounds_nothing(uniform: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_export(uniform.run(), tmp_path / "model", "--dtype=float32") == 0
    assert "warning:" not in capsys.readouterr().err
    assert "rounded" not in (tmp_path / "model" / "README.md").read_text()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert set(weights[f"{QUARTER}.weight"].flatten().tolist()) == {1 + STEP / 4}


def test_no_warning_below_one_percent(uniform: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With 20 steps in the other layers, QUARTER is 1/16 of 3 · 400, or 0.7 % of the norm: in the card alone."""
    module = export.load_module(Path(), {})
    with torch.no_grad():
        for name, layer in adapted_layers(module.backbone).items():
            layer.factors()[0].B.mul_(1 if name == QUARTER else 20)
    assert run_export(uniform.run(), tmp_path / "model", "--dtype=bfloat16") == 0
    assert "warning:" not in capsys.readouterr().err
    assert "`off by 0.722 % of its norm" in (tmp_path / "model" / "README.md").read_text()
