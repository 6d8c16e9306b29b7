"""A finished run becomes a directory that PEFT loads, and such a directory the start of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from app.cli import main
from app.commands.export import find_checkpoint, load_module, write_compact
from modules.adapters import AdapterConfig, AdapterError, adapter_state
from modules.base import ModelError
from modules.image_classification import ImageClassifier
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine, recording
from tests.app.test_bad_input import refused
from tests.backbones import save_backbone

NO_TRAINING = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.logger=false")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
START = torch.tensor([[2, 0, 44], [2, 0, 49]])


def run_export(run: Path, output: Path, *options: str) -> int:
    return main(["export", str(run), "--format", "peft", "--output", str(output), *options])


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def image_base(backbone: Any, **options: Any) -> Any:
    """The frozen backbone of a run on images, which the seed alone gives, with a classifier of timm's own."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **VIT)
    state = {k: t for k, t in backbone.state_dict().items() if ".adapters." not in k}
    model.load_state_dict(state | {k: t for k, t in model.state_dict().items() if k.startswith("head.")})
    return model


# one row a task: what has PEFT's base model, and what asks a model
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
def test_every_task(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    cli: CommandLine = request.getfixturevalue(f"fitted_{name}")
    output = tmp_path / "peft"
    assert run_export(cli.run(), output) == 0
    assert_only(output, CONFIG, WEIGHTS, "README.md")
    assert_only(cli.run() / "adapter", CONFIG, WEIGHTS)  # written when the fit ended
    for file in (CONFIG, WEIGHTS):
        assert (cli.run() / "adapter" / file).read_bytes() == (output / file).read_bytes()
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


def test_the_adapter_is_of_the_best_checkpoint(text_cli: CommandLine) -> None:
    """Of an epoch at a rate of zero and one that spoils the head, the first is best by the loss."""
    options = ("--checkpoint.monitor=val/loss", "--checkpoint.mode=min", "--model.learning_rate=5")
    assert (
        text_cli("fit", "--trainer.max_epochs=2", "--model.schedule=constant", "--trainer.logger=false", *options) == 0
    )
    states = {name: text_cli.checkpoint(name=name)["state_dict"] for name in ("best", "last")}
    written = load_file(text_cli.run() / "adapter" / WEIGHTS)
    name = "classifier.dense.weight"
    assert not torch.equal(states["best"][f"backbone.{name}"], states["last"][f"backbone.{name}"])
    torch.testing.assert_close(written[f"base_model.model.{name}"], states["best"][f"backbone.{name}"], atol=0, rtol=0)


def test_what_has_no_adapter(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    monkeypatch.setattr("app.commands.peft.write_peft_files", full)
    assert cli("fit", *NO_TRAINING) == 0
    assert "adapter was not written" in capsys.readouterr().err
    assert not [path.name for path in cli.run().iterdir() if "adapter" in path.name]
    assert (cli.run() / "metrics.json").is_file()


@torch.no_grad()
def test_bfloat16(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    """Of the backbone: factors stay float32. Of what is written: they are rounded."""
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


# --------------------------------------------------------------------------------------------------------------- import


def test_training_goes_on_from_a_file_and_resumes_without_it(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    cli = fitted_text_cli
    start = Path(shutil.copytree(cli.run() / "adapter", tmp_path / "start"))
    given = module_of(cli.run()).state_dict()
    new_targets = ("--model.adapter.rank=7", "--model.adapter.targets=[mlp_in]")  # of no effect: the file says
    options = (f"--model.adapter_path={start}", "--model.adapter.train=A", "--trainer.logger=false", *new_targets)
    with recording("on_fit_start", "on_fit_end") as states:
        assert cli("fit", "--trainer.max_epochs=1", *options) == 0
    for key, tensor in states["on_fit_start"].items():  # factors, head and all that is frozen
        assert torch.equal(tensor, given[key]), key
    changed = {k for k, t in states["on_fit_end"].items() if not torch.equal(t, states["on_fit_start"][k])}
    factors = {k for k in given if ".adapters." in k}
    assert changed & factors == {k for k in factors if k.endswith(".A")}
    assert changed - factors == {k for k in given if "classifier" in k}
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
    assert all(torch.equal(resumed[k], given[k]) for k in factors if k.endswith(".B"))
    assert run_export(cli.run(1), tmp_path / "again") == 0
    assert (cli.run(1) / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_evaluation_of_a_file_is_that_of_the_run(fitted_cli: CommandLine) -> None:
    adapter = fitted_cli.run() / "adapter"
    assert fitted_cli("test", f"--ckpt_path={fitted_cli.run()}", "--trainer.logger=false") == 0
    assert fitted_cli("test", f"--model.adapter_path={adapter}", "--trainer.logger=false") == 0
    expected = {key: value for key, value in fitted_cli.metrics().items() if key.startswith("test/")}
    assert expected == {key: value for key, value in fitted_cli.metrics(1).items() if key.startswith("test/")}
    assert expected["test/acc1"] > 0.5


def test_a_compact_file(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
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
def test_pefts_lora_of_a_whole_fused_layer(tmp_path: Path, backbone: str) -> None:
    """With the head where timm has it; the distilled model has two, which must be one."""
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
        backbone, str(tmp_path / "base.safetensors"), adapter_path=str(tmp_path / "peft"), **options
    ).eval()
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module(image), model(image), atol=1e-5, rtol=1e-5)
    assert {p.role for p in module.projections} == {"other"}
    (compact := tmp_path / "compact").mkdir()
    write_compact(module, torch.float32, compact)
    again = ImageClassifier(backbone, str(tmp_path / "base.safetensors"), adapter_path=str(compact), **options).eval()
    torch.testing.assert_close(again(image), module(image), atol=0, rtol=0)
    if "distilled" in backbone:
        tensors = load_file(tmp_path / "peft" / WEIGHTS)
        tensors["base_model.model.head.bias"] += 1
        save_file(tensors, tmp_path / "peft" / WEIGHTS)
        with pytest.raises(AdapterError, match="head and head_dist differ in bias"):
            ImageClassifier(
                backbone, str(tmp_path / "base.safetensors"), adapter_path=str(tmp_path / "peft"), **options
            )


def test_a_file_without_a_head_starts_a_new_one(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fitted_text_cli.run() / "adapter", tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if "classifier" not in k}, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"adapter has no backbone\.classifier"):
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(folder), class_names=["a", "b"])
    del tensors["base_model.model.classifier.dense.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"1 missing: backbone\.classifier\.dense\.bias"):
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(folder), class_names=["a", "b"])


def test_from_the_hub(fitted_text_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(fitted_text_cli.run() / "adapter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    TextClassifier(fitted_text_cli.backbone[1], adapter_path="owner/lora", class_names=["a", "b"])
    assert [name for name, _ in asked] == ["owner/lora"]
    assert set(asked[0][1]) == {CONFIG, WEIGHTS, "adapter_compact.safetensors"}  # nothing that is pickled


# ------------------------------------------------------------------------------------------------------------ bad input


def edit(folder: Path, **keys: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | keys))


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
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), [WEIGHTS, "cut off"]),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), [WEIGHTS, "cut off"]),
        (lambda folder: edit(folder, peft_type="PREFIX_TUNING"), ["peft_type", "PREFIX_TUNING", "LORA"]),
        (lambda folder: edit(folder, use_dora=True), ["use_dora"]),
        (lambda folder: edit(folder, r=5), ["rank 4", "5 by r"]),
    ],
)
def test_damaged(fitted_text_cli: CommandLine, tmp_path: Path, damage: Callable[[Path], Any], parts: list[str]) -> None:
    folder = Path(shutil.copytree(fitted_text_cli.run() / "adapter", tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(AdapterError) as error:
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(folder), class_names=["a", "b"])
    message = str(error.value)
    assert message.startswith("model.adapter_path")
    assert all(part in message for part in parts), message


def test_other_backbones_and_other_classes(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    folder = str(fitted_text_cli.run() / "adapter")
    wide = save_backbone(tmp_path / "wide", "roberta", hidden_size=64)
    with pytest.raises(AdapterError, match=r"does not fit this backbone: 8 of another shape"):
        TextClassifier(str(wide), adapter_path=folder, class_names=["a", "b"])
    bert = save_backbone(tmp_path / "bert", "bert")
    with pytest.raises(AdapterError, match=r"does not fit this backbone: .*roberta\.encoder"):
        TextClassifier(str(bert), adapter_path=folder, class_names=["a", "b"])
    with pytest.raises(
        ModelError, match=r"head of .* is not this task's: .*out_proj\.weight is \(2, 32\), not \(3, 32\)"
    ):
        TextClassifier(fitted_text_cli.backbone[1], adapter_path=folder, class_names=["a", "b", "c"])


def test_bad_files_end_the_command(fitted_text_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    code = fitted_text_cli("fit", *NO_TRAINING, f"--model.adapter_path={fitted_text_cli.run()}")
    refused(capsys, code, "model.adapter_path", "no adapter_config.json")
    starts = ("--model.adapter.init_a=given", "--model.adapter.init_b=given")
    refused(capsys, fitted_text_cli("fit", *NO_TRAINING, *starts), "adapter.init_a", "model.adapter_path")
    refused(capsys, fitted_text_cli("fit", *NO_TRAINING, starts[0]), "adapter.init_a", "both or not at all")
