"""The command `memory`: predictions against closed forms and against PyTorch's measured peak of training steps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import LlamaConfig

from app.cli import main, parse_fit
from app.commands.memory import device_line
from app.commands.memory_estimate import training_memory
from app.commands.memory_prediction import Prediction, predict
from modules.adapters import AdapterConfig, adapter_state
from modules.base import AdaptedModule
from tests.app.conftest import CommandLine
from tests.causal_backbones import CONFIGS
from tests.support.allocations import peak_of
from tests.support.refusals import refused

GIB = 2**30
BATCH = 6
CLASSES = {"cli": 3, "text_cli": 2, "summary_cli": 0, "instruction_cli": 0}


def fit_words(cli: CommandLine, *options: str) -> list[str]:
    return cli.words("memory", *options)[1:]


def real_module(words: list[str], classes: int) -> AdaptedModule:
    """Return the module that `fit` builds, with real weights."""
    keys = parse_fit([*words]).model.as_dict()
    if "class_names" in keys["init_args"]:
        keys["init_args"]["class_names"] = [str(number) for number in range(classes)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AdaptedModule, "model", required=True)
    module: AdaptedModule = parser.instantiate_classes(parser.parse_object({"model": keys})).model
    return module


def real_batch(name: str) -> dict[str, Tensor]:
    def tokens(length: int) -> Tensor:
        return torch.randint(3, 40, (BATCH, length))

    label = torch.zeros(BATCH, dtype=torch.long)
    if name == "cli":
        return {"image": torch.randn(BATCH, 3, 16, 16), "label": label}
    if name == "text_cli":
        ids = tokens(32)
        return {"input_ids": ids, "attention_mask": padded(ids), "label": label}
    ids = tokens(32 if name == "summary_cli" else 96)
    labels = tokens(12) if name == "summary_cli" else ids
    return {"input_ids": ids, "attention_mask": padded(ids), "labels": labels}


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return mask


def predicted(words: list[str]) -> Prediction:
    return predict(parse_fit, words, classes=1000)


@pytest.mark.parametrize("name", CLASSES)
def test_a_real_step_of_each_family_allocates_what_was_predicted(name: str, request: pytest.FixtureRequest) -> None:
    cli: CommandLine = request.getfixturevalue(name)
    module, batch = real_module(fit_words(cli), CLASSES[name]), real_batch(name)
    for precision in ("32-true", "bf16-mixed"):
        prediction = predicted(fit_words(cli, f"--trainer.precision={precision}"))
        check_real_step(module, batch, precision, prediction)


def check_real_step(module: AdaptedModule, batch: dict[str, Tensor], precision: str, prediction: Prediction) -> None:
    optimizer = torch.optim.AdamW(module.trained_groups())

    def step() -> None:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            warnings.simplefilter("ignore")  # Lightning warns that the module has no trainer
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert (prediction.trained, prediction.total) == (
        sum(p.numel() for p in trained),
        sum(p.numel() for p in module.parameters()),
    )
    size = {key: sum(t.numel() * t.element_size() for t in tensors) for key, tensors in parts(module).items()}
    estimate = prediction.estimate
    assert (estimate.weights, estimate.factors, estimate.heads) == (size["weights"], size["factors"], size["heads"])
    bytes_trained = sum(4 * p.numel() for p in trained)
    assert estimate.gradients == bytes_trained
    # two moments, and one step counter for each parameter
    assert estimate.optimizer == 2 * bytes_trained + 4 * len(trained)
    assert estimate.activations + estimate.logits == pytest.approx(peak_of(step), rel=0.05)


def parts(module: AdaptedModule) -> dict[str, list[Tensor]]:
    factors = {t.data_ptr(): t for t in adapter_state(module.backbone).values()}
    heads = {p.data_ptr(): p for name in module.head_names for p in module.get_submodule(name).parameters()}
    everything = {t.data_ptr(): t for t in [*module.parameters(), *module.buffers()]}
    weights = [t for place, t in everything.items() if place not in factors and place not in heads]
    return {"weights": weights, "factors": list(factors.values()), "heads": list(heads.values())}


@pytest.mark.slow
def test_a_recipe_is_predicted_without_weights_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    """Compare two blocks of conf/vit_cifar.yaml's ViT-B/16 with a closed form. Nothing is downloaded."""
    width, depth, tokens, classes, rank = 768, 2, 197, 1000, 8
    words = ["--config", "conf/vit_cifar.yaml", f"--model.backbone_args={{depth: {depth}}}"]
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width  # attention, MLP, two norms
    patches = 3 * 16 * 16 * width + width + width + tokens * width  # embedding, class token, positions
    frozen = depth * block + patches + 2 * width
    head = classes * (width + 1)
    trained = depth * 2 * rank * width + head
    prediction = predict(parse_fit, words, classes)
    assert prediction.estimate.weights == 4 * frozen
    assert prediction.estimate.factors == 2 * 4 * depth * 2 * rank * width
    assert prediction.estimate.heads == 4 * head
    assert (prediction.trained, prediction.total) == (trained, frozen + depth * 4 * rank * width + head)
    assert prediction.setting == (
        "64 images a step of 224 × 224 pixels, a head of 1,000 classes (--classes), precision bf16-mixed"
    )
    other = predict(parse_fit, [*words, "--model.adapter.train=both", "--data.batch_size=32"], classes)
    assert other.estimate.gradients == 4 * (trained + depth * 2 * rank * width)
    assert 0.4 * prediction.estimate.activations < other.estimate.activations < 0.8 * prediction.estimate.activations


@pytest.mark.slow
def test_the_number_of_classes_is_read_from_local_data(cli: CommandLine, text_cli: CommandLine, tmp_path: Path) -> None:
    assert ", a head of 3 classes, " in predicted(fit_words(cli)).setting
    assert ", a head of 1,000 classes (--classes), " in predicted(fit_words(cli, "--data.path=elsewhere")).setting
    rows = "".join(f"text {number},{label}\n" for number, label in enumerate("abcd" * 3))
    (tmp_path / "train.csv").write_text(f"sentence,label\n{rows}")
    assert ", a head of one score, " in predicted(fit_words(text_cli, "--data.task=stsb")).setting
    own = ("--data.task=null", "--data.text_columns=[sentence]", f"--data.path={tmp_path}")
    assert ", a head of 4 classes, " in predicted(fit_words(text_cli, *own)).setting


def test_the_table_lists_each_part_and_describes_the_step(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(text_cli.words("memory")) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row[-1:] == ["%"]] == [
        *("frozen", "factors", "heads", "gradients", "optimizer", "activations", "total"),
    ]
    assert "For 6 texts a step of 32 tokens, a head of 2 classes, precision 32-true." in out
    assert "parameters are trained." in out
    assert not text_cli.root.exists()  # no run directory


@pytest.mark.parametrize("tuning", ["head", "full", "adalora", "ia3"])
def test_other_tunings_are_predicted_too(cli: CommandLine, tuning: str) -> None:
    words = fit_words(cli, f"--model.tuning={tuning}", "--model.adapter.targets=[key,value,mlp_out]")
    module, found = real_module(words, classes=3), predicted(words)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found.estimate.gradients == 4 * trained
    everything = found.estimate.weights + found.estimate.factors + found.estimate.heads
    assert everything == 4 * sum(p.numel() for p in module.parameters())
    assert found.tuning == tuning


def test_a_decoder_is_predicted_from_its_configuration(instruction_cli: CommandLine) -> None:
    adapter = AdapterConfig(rank=4, dropout=0.1)
    keys: dict[str, Any] = {"batch_size": BATCH, "tokens": 96, "backbone_dtype": "float32"}
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "attention_dropout": 0.1})
    assert predicted(fit_words(instruction_cli)).estimate == training_memory(config, adapter, **keys)


def test_sharded_frozen_weights_are_counted_as_one_share(instruction_cli: CommandLine) -> None:
    shard_options = ("--model.shard_frozen=true", "--trainer.strategy=ddp", "--trainer.devices=4")
    unsharded, sharded = (predicted(fit_words(instruction_cli, *options)) for options in ((), shard_options))
    assert sharded.estimate.weights < unsharded.estimate.weights
    assert sharded.estimate.gathered > 0
    assert sharded.setting == f"{unsharded.setting}, frozen weights shared by 4 processes"


def test_model_adapter_path_determines_the_rank(fitted_cli: CommandLine) -> None:
    path = fitted_cli.run() / "adapter"
    given = predicted(fit_words(fitted_cli, "--model.adapter.rank=2", f"--model.adapter_path={path}"))
    assert given.estimate.factors == predicted(fit_words(fitted_cli)).estimate.factors


def test_the_prediction_is_compared_with_a_gpu() -> None:
    assert device_line("H100", 80 * GIB, 20 * GIB) == "H100 has 81,920 MiB: the fit needs 25% of it."
    assert "Choose a smaller data.batch_size" in device_line("T4", 16 * GIB, 20 * GIB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes=1"], "--classes: 1 is too small. Give 2 or more."),
        (["--trainer.precision=64-true"], "trainer.precision: 64-true is none of 32-true, bf16-mixed and 16-mixed."),
        (["--model.adapter.rnk=3"], "rnk"),
        (["--data.max_length=65"], "data.max_length: 65 tokens are more than the 64 that the backbone has positions"),
    ],
)
def test_wrong_use_is_one_message(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    refused(capsys, main(text_cli.words("memory", *options)), message)


def test_data_without_training_is_refused(question_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys, main(question_cli.words("memory")), "MultipleChoiceData gives questions, which no task is trained on"
    )


def test_a_model_whose_control_flow_needs_tensor_values_is_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def classify(module: Any, features: Tensor) -> Tensor:
        return features * features.sum().item()

    monkeypatch.setattr("modules.image_classification.ImageClassifier._classify", classify)
    refused(capsys, main(cli.words("memory")), "model.backbone: the memory of vit_tiny_patch16_224 cannot be predicted")
