"""`model.adapter_path`: a run that starts from adapters that PEFT or an export wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from app.cli import main
from app.export.compact import write_compact
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, AdapterError
from modules.image_classification import ImageClassifier
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine, recording
from tests.app.export.test_peft import CONFIG, NO_TRAINING, VIT, WEIGHTS, module_of, run_export
from tests.backbones import save_backbone
from tests.support.refusals import refused
from tests.support.rows import edit_json


def test_training_starts_from_adapters_and_resumes_without_their_files(
    fitted_text_cli: CommandLine, tmp_path: Path
) -> None:
    cli = fitted_text_cli
    start = Path(shutil.copytree(cli.run() / "adapter", tmp_path / "start"))
    exported = module_of(cli.run()).state_dict()
    # ignored: rank and targets come from the file
    new_targets = ("--model.adapter.rank=7", "--model.adapter.targets=[mlp_in]")
    options = (f"--model.adapter_path={start}", "--model.adapter.train=A", "--trainer.logger=false", *new_targets)
    with recording("on_fit_start", "on_fit_end") as states:
        assert cli("fit", "--trainer.max_epochs=1", *options) == 0
    for key, tensor in states["on_fit_start"].items():  # factors, head and frozen weights
        assert torch.equal(tensor, exported[key]), key
    changed = {k for k, t in states["on_fit_end"].items() if not torch.equal(t, states["on_fit_start"][k])}
    factors = {k for k in exported if ".adapters." in k}
    assert changed & factors == {k for k in factors if k.endswith(".A")}
    assert changed - factors == {k for k in exported if "classifier" in k}
    shutil.rmtree(start)
    saved = cli.checkpoint(1)["hyper_parameters"]
    assert saved["adapter_path"] is None
    assert (saved["adapter"]["rank"], saved["adapter"]["train"], saved["adapter"]["init_a"]) == (4, "A", "given")
    assert saved["adapter"]["targets"] == ["query", "value"]
    with recording("on_fit_start") as states:
        code = cli("fit", "--trainer.max_epochs=2", "--trainer.logger=false", f"--ckpt_path={cli.run(1)}")
    assert code == 0
    resumed, last = cli.checkpoint(1)["state_dict"], states["on_fit_start"]
    assert any(not torch.equal(resumed[k], last[k]) for k in factors if k.endswith(".A"))
    assert all(torch.equal(resumed[k], exported[k]) for k in factors if k.endswith(".B"))
    assert run_export(cli.run(1), tmp_path / "again") == 0
    assert (cli.run(1) / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_evaluation_of_exported_adapters_equals_that_of_the_run(fitted_cli: CommandLine) -> None:
    adapter = fitted_cli.run() / "adapter"
    assert fitted_cli("test", f"--ckpt_path={fitted_cli.run()}", "--trainer.logger=false") == 0
    assert fitted_cli("test", f"--model.adapter_path={adapter}", "--trainer.logger=false") == 0
    expected = {key: value for key, value in fitted_cli.metrics().items() if key.startswith("test/")}
    assert expected == {key: value for key, value in fitted_cli.metrics(1).items() if key.startswith("test/")}
    assert expected["test/acc1"] > 0.5


def test_compact_adapters_are_loaded_to_train_either_side(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    run = fitted_text_cli.run()
    assert main(["export", str(run), "--format", "compact", "--output", str(tmp_path / "compact")]) == 0
    options: dict[str, Any] = {"class_names": ["a", "b"], "adapter_path": str(tmp_path / "compact")}
    expected = module_of(run).saved_state()
    for train in ("B", "A"):
        adapter = AdapterConfig(train=train, init_a="given", init_b="given")
        module = TextClassifier(fitted_text_cli.backbone[1], adapter=adapter, **options)
        state = module.saved_state()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert module.adapter.train == train
        trained = {name[-1] for name, p in module.named_parameters() if ".adapters." in name and p.requires_grad}
        assert trained == {train}


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_pefts_lora_on_a_fused_layer_is_loaded(tmp_path: Path, backbone: str) -> None:
    """The head is loaded too. A distilled model has two heads, and their weights must be equal."""
    base = timm.create_model(backbone, pretrained=False, num_classes=3, **VIT)
    save_file({k: t for k, t in base.state_dict().items() if "head" not in k}, tmp_path / "base.safetensors")
    heads = ["head", "head_dist"] if "distilled" in backbone else ["head"]
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["qkv"], modules_to_save=heads)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "head" in name:
            seed = torch.Generator().manual_seed(len(name.replace("_dist", "")))
            torch.nn.init.normal_(parameter, std=0.3, generator=seed)
    model.save_pretrained(tmp_path / "peft")
    args = {key: value for key, value in VIT.items() if key != "img_size"}
    options: dict[str, Any] = {"backbone_args": args, "image_size": 16, "class_names": ["a", "b", "c"]}
    module = ImageClassifier(
        backbone, weights=str(tmp_path / "base.safetensors"), adapter_path=str(tmp_path / "peft"), **options
    ).eval()
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module(image), model(image), atol=1e-5, rtol=1e-5)
    assert {p.role for p in module.projections} == {"other"}
    (compact := tmp_path / "compact").mkdir()
    write_compact(module, torch.float32, compact)
    reloaded = ImageClassifier(
        backbone, weights=str(tmp_path / "base.safetensors"), adapter_path=str(compact), **options
    ).eval()
    torch.testing.assert_close(reloaded(image), module(image), atol=0, rtol=0)
    if "distilled" in backbone:
        tensors = load_file(tmp_path / "peft" / WEIGHTS)
        tensors["base_model.model.head.bias"] += 1
        save_file(tensors, tmp_path / "peft" / WEIGHTS)
        with pytest.raises(AdapterError, match="head and head_dist differ in bias"):
            ImageClassifier(
                backbone, weights=str(tmp_path / "base.safetensors"), adapter_path=str(tmp_path / "peft"), **options
            )


def test_a_file_without_a_head_starts_a_new_one(
    fitted_text_cli: CommandLine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(fitted_text_cli.run() / "adapter", tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if "classifier" not in k}, folder / WEIGHTS)
    TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(folder), class_names=["a", "b"])
    assert "adapter has no backbone.classifier" in caplog.text
    del tensors["base_model.model.classifier.dense.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"1 missing: backbone\.classifier\.dense\.bias"):
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(folder), class_names=["a", "b"])


def test_adapters_are_downloaded_from_the_hub(fitted_text_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        requests.append((name, allow_patterns))
        return str(fitted_text_cli.run() / "adapter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    TextClassifier(fitted_text_cli.backbone[1], adapter_path="owner/lora", class_names=["a", "b"])
    assert [name for name, _ in requests] == ["owner/lora"]
    assert set(requests[0][1]) == {CONFIG, WEIGHTS, "adapter_compact.safetensors"}  # no pickled files


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (shutil.rmtree, ["no directory here", "hub"]),
        (lambda folder: (folder / CONFIG).unlink(), ["no adapter_config.json"]),
        (lambda folder: (folder / WEIGHTS).unlink(), ["no adapter_model.safetensors"]),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
            ["pickle can run code", "safetensors"],
        ),
        (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG, "JSON"]),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), [CONFIG, "JSON"]),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), [CONFIG, "JSON"]),
        (lambda folder: (folder / CONFIG).write_text("[]"), [CONFIG, "object"]),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), [WEIGHTS, "truncated"]),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), [WEIGHTS, "truncated"]),
        (lambda folder: edit_json(folder / CONFIG, peft_type="PREFIX_TUNING"), ["peft_type", "PREFIX_TUNING", "LORA"]),
        (lambda folder: edit_json(folder / CONFIG, use_dora=True), ["use_dora"]),
        (lambda folder: edit_json(folder / CONFIG, r=5), ["rank 4", "5 by r"]),
    ],
)
def test_damaged_adapters_are_refused(
    fitted_text_cli: CommandLine, tmp_path: Path, damage: Callable[[Path], Any], parts: list[str]
) -> None:
    folder = Path(shutil.copytree(fitted_text_cli.run() / "adapter", tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(AdapterError) as error:
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(folder), class_names=["a", "b"])
    message = str(error.value)
    assert message.startswith("model.adapter_path")
    assert all(part in message for part in parts), message


def test_adapters_of_other_backbones_or_classes_are_refused(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    folder = str(fitted_text_cli.run() / "adapter")
    wide = save_backbone(tmp_path / "wide", "roberta", hidden_size=64)
    with pytest.raises(AdapterError, match=r"does not fit this backbone: 8 of another shape"):
        TextClassifier(str(wide), adapter_path=folder, class_names=["a", "b"])
    bert = save_backbone(tmp_path / "bert", "bert")
    with pytest.raises(AdapterError, match=r"does not fit this backbone: .*roberta\.encoder"):
        TextClassifier(str(bert), adapter_path=folder, class_names=["a", "b"])
    with pytest.raises(
        ModelError, match=r"head of .* does not fit this task: .*out_proj\.weight is \(2, 32\), not \(3, 32\)"
    ):
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=folder, class_names=["a", "b", "c"])


def test_bad_files_end_the_command(fitted_text_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    code = fitted_text_cli("fit", *NO_TRAINING, f"--model.adapter_path={fitted_text_cli.run()}")
    refused(capsys, code, "model.adapter_path", "no adapter_config.json")
    starts = ("--model.adapter.init_a=given", "--model.adapter.init_b=given")
    refused(capsys, fitted_text_cli("fit", *NO_TRAINING, *starts), "adapter.init_a", "model.adapter_path")
    refused(capsys, fitted_text_cli("fit", *NO_TRAINING, starts[0]), "adapter.init_a", "only one of them is `given`")
