"""Export of a run as a directory that PEFT loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from app.cli import main
from app.export.load_run import find_checkpoint, load_module
from datamodules.errors import ModelError
from modules.adapters import adapter_state
from modules.image_classification import ImageClassifier
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine
from tests.support.refusals import refused

NO_TRAINING = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.logger=false")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
START = torch.tensor([[2, 0, 44], [2, 0, 49]])


def run_export(run: Path, output: Path, *options: str) -> int:
    return main(["export", str(run), "--format", "peft", "--output", str(output), *options])


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def image_base(backbone: Any, **options: Any) -> Any:
    """Return timm's model with its classifier and the frozen weights of `backbone`."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **VIT)
    state = {k: t for k, t in backbone.state_dict().items() if ".adapters." not in k}
    model.load_state_dict(state | {k: t for k, t in model.state_dict().items() if k.startswith("head.")})
    return model


# for each task: a function that returns PEFT's base model, and a function that returns a model's logits
TASKS: dict[str, tuple[Callable[[Any, Path], Any], Callable[[Any], Tensor]]] = {
    "cli": (
        lambda module, _: image_base(module.backbone),
        lambda model: model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))),
    ),
    "text_cli": (
        lambda _, path: AutoModelForSequenceClassification.from_pretrained(path),
        lambda model: model(input_ids=torch.arange(4, 18).view(2, 7)).logits,
    ),
    "summary_cli": (
        lambda _, path: AutoModelForSeq2SeqLM.from_pretrained(path),
        lambda model: model(input_ids=torch.arange(4, 18).view(2, 7), decoder_input_ids=START).logits,
    ),
    "instruction_cli": (
        lambda _, path: AutoModelForCausalLM.from_pretrained(path),
        lambda model: model(input_ids=torch.arange(4, 18).view(2, 7)).logits,
    ),
}


def logits(name: str, module: Any) -> Tensor:
    return TASKS[name][1](module if name == "cli" else module.backbone)


def module_of(run: Path) -> Any:
    return load_module(find_checkpoint(str(run)), {})


# --------------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
@pytest.mark.parametrize("name", TASKS)
def test_peft_loads_the_export_of_every_task(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    cli: CommandLine = request.getfixturevalue(f"fitted_{name}")
    output = tmp_path / "peft"
    assert run_export(cli.run(), output) == 0
    texts = () if name == "cli" else ("tokenizer.json", "tokenizer_config.json")
    labels = ("labels.json",) if name in ("cli", "text_cli") else ()
    templates = ("chat_template.jinja",) if name == "instruction_cli" else ()
    assert_only(output, CONFIG, WEIGHTS, "README.md", *texts, *labels, *templates)
    assert_only(cli.run() / "adapter", CONFIG, WEIGHTS)  # `fit` has written the same files
    assert (cli.run() / "adapter" / WEIGHTS).read_bytes() == (output / WEIGHTS).read_bytes()
    in_run, exported = (json.loads((folder / CONFIG).read_text()) for folder in (cli.run() / "adapter", output))
    base = "base_model_name_or_path"
    assert in_run | {base: None} == exported | {base: None}
    assert in_run[base] == (cli.backbone[1] if cli.backbone else "vit_tiny_patch16_224")
    # with weights: none there is no name to share
    assert exported[base] == (Path(cli.backbone[1]).name if cli.backbone else None)
    module = module_of(cli.run())
    make_base, ask = TASKS[name]
    base = make_base(module, Path(cli.backbone[1]) if cli.backbone else Path()).eval()
    frozen = ask(base)
    model = peft.PeftModel.from_pretrained(base, output).eval()
    expected = logits(name, module)
    torch.testing.assert_close(ask(model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - frozen).abs().max() > 1e-3
    kinds = {"text_cli": "SEQ_CLS", "summary_cli": "SEQ_2_SEQ_LM", "instruction_cli": "CAUSAL_LM"}
    content = json.loads((output / CONFIG).read_text())
    assert (content["task_type"], content["lora_dropout"]) == (kinds.get(name), 0.1)


AUTO = {
    "text_cli": peft.AutoPeftModelForSequenceClassification,
    "summary_cli": peft.AutoPeftModelForSeq2SeqLM,
    "instruction_cli": peft.AutoPeftModelForCausalLM,
}


@torch.no_grad()
@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_of_peft_load_an_export_by_the_line_of_its_card(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes the names of the classes from the backbone's configuration alone, so that the line gives them."""
    cli: CommandLine = request.getfixturevalue(name)
    if name == "text_cli":  # two classes are what a configuration has without any names
        rows = ["text,label", *(f"text {i} about {['one', 'two', 'three'][i % 3]},{'xyz'[i % 3]}" for i in range(24))]
        (tmp_path / "own.csv").write_text("\n".join(rows))
        cli.data = tmp_path / "own.csv"
    assert cli("fit", *NO_TRAINING, *(["--data.task=null"] if name == "text_cli" else [])) == 0
    output = tmp_path / "peft"
    assert run_export(cli.run(), output) == 0
    (call,) = re.findall(r"^# model = peft\.(.*)$", (output / "README.md").read_text(), re.MULTILINE)
    assert call.startswith(f"{AUTO[name].__name__}.from_pretrained(ADAPTER")
    monkeypatch.chdir(Path(cli.backbone[1]).parent)  # the folder of the backbone stands for the hub
    module = module_of(cli.run())
    model = eval(f"peft.{call}", {"peft": peft, "ADAPTER": str(output), "LABELS": module.class_names}).eval()
    torch.testing.assert_close(TASKS[name][1](model), logits(name, module), atol=1e-5, rtol=1e-5)
    if name == "text_cli":
        assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
        assert model.config.label2id == {"x": 0, "y": 1, "z": 2}


def test_the_adapter_is_of_the_best_checkpoint(text_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def rising(self: TextClassifier, stage: str) -> dict[str, torch.Tensor]:
        return {f"{stage}/loss": torch.tensor(float(self.trainer.global_step))}

    monkeypatch.setattr(TextClassifier, "scores", rising)
    options = ("--checkpoint.monitor=val/loss", "--checkpoint.mode=min", "--trainer.logger=false")
    assert text_cli("fit", "--trainer.max_epochs=2", *options) == 0
    states = {name: text_cli.checkpoint(name=name)["state_dict"] for name in ("best", "last")}
    written = load_file(text_cli.run() / "adapter" / WEIGHTS)
    name = "classifier.dense.weight"
    assert not torch.equal(states["best"][f"backbone.{name}"], states["last"][f"backbone.{name}"])
    torch.testing.assert_close(written[f"base_model.model.{name}"], states["best"][f"backbone.{name}"], atol=0, rtol=0)


def test_a_run_without_adapters_is_refused(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("fit", *NO_TRAINING, "--model.tuning=head") == 0
    assert not (cli.run() / "adapter").exists()
    refused(capsys, run_export(cli.run(), tmp_path / "peft"), "--format", "tuning: head")
    with pytest.raises(ModelError, match=r"model\.adapter_path: with tuning head"):
        ImageClassifier(tuning="head", adapter_path=str(tmp_path))


def test_an_adapter_that_cannot_be_written_does_not_fail_the_run(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.export.peft.write_peft_files", full)
    assert cli("fit", *NO_TRAINING) == 0
    assert "adapter could not be written" in capsys.readouterr().err
    assert not [path.name for path in cli.run().iterdir() if "adapter" in path.name]
    assert (cli.run() / "metrics.json").is_file()


@torch.no_grad()
def test_dtypes_of_the_backbone_and_of_the_export(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    """A bfloat16 backbone keeps float32 factors. An export in bfloat16 rounds the factors."""
    for dtype in ("float32", "bfloat16"):
        assert run_export(fitted_text_cli.run(), tmp_path / dtype, f"--dtype={dtype}") == 0
    exact, rounded = (load_file(tmp_path / dtype / WEIGHTS) for dtype in ("float32", "bfloat16"))
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    options = {"weights": "pretrained", "class_names": ["unacceptable", "acceptable"], "backbone_dtype": "bfloat16"}
    module = TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(tmp_path / "float32"), **options).eval()
    state = module.state_dict()
    for name, tensor in exact.items():
        if "classifier" in name:
            assert torch.equal(state[name.replace("base_model.model", "backbone")], tensor)
    assert all(torch.equal(t, exact[_peft_name(name)]) for name, t in adapter_state(module.backbone).items())
    base = AutoModelForSequenceClassification.from_pretrained(fitted_text_cli.backbone[1], dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "float32").eval()
    ids = torch.arange(4, 18).view(2, 7)
    hidden = model.base_model.model.roberta(input_ids=ids)[0].float()
    torch.testing.assert_close(hidden, module.backbone.roberta(input_ids=ids)[0].float(), atol=0.05, rtol=0.05)


def _peft_name(name: str) -> str:
    layer, _, rest = name.partition(".adapters.")
    return f"base_model.model.{layer}.lora_{rest[-1]}.weight"
