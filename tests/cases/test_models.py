"""Cases 8, 9, 10, 13, 14, 27 and 35: training, scores, exports, predictions and pictures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import ExifTags, Image
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from app.callbacks.adapter_spectrum import AdapterSpectrum, _ratio
from app.callbacks.prediction_writer import unused_paths
from app.callbacks.run_summary import _is_limited
from app.cli import main
from app.config.differences import compare_configurations
from app.export.load_run import find_checkpoint, load_module
from app.export.loader_code import Loader
from app.export.merged import write_merged
from app.export.peft import export_peft
from app.reports.heat_map import HeatMap
from app.run.evaluations import (
    FILE,
    Evaluation,
    add_evaluation,
    evaluations_of_checkpoint,
    read_evaluations,
)
from datamodules.contract import TextModel
from datamodules.image_classification import evaluation_steps, normalise
from datamodules.sources.images import decode_image
from datamodules.tokens.conversations import ConversationEncoder
from modules.adapters import AdapterConfig, adapted_layers, adapters_disabled
from modules.generation.beam_search import Generation
from modules.generation.decoding import Decoding
from modules.image_classification import ImageClassifier
from modules.language_modeling import LanguageModel
from modules.metrics.rouge import KINDS, Rouge, ScriptTokenizer
from modules.summarization import Summarizer
from modules.text_classification import TextClassifier
from modules.training.gradient_averaging import GradientAveraging
from tests.app.conftest import (  # noqa: F401 - fixtures
    CommandLine,
    cli,
    finished_fit,
    fitted_cli,
    fitted_text_cli,
    summary_cli,
    text_cli,
    undrawn,
)
from tests.app.processes import run_on_two
from tests.app.test_distributed import assert_same_weights
from tests.backbones import save_backbone, save_classifier
from tests.causal_backbones import CHAT, byte_tokenizer, save_decoder
from tests.support.adapters import randomize
from tests.support.gguf_files import write_gguf
from tests.support.rows import write_rows
from tests.support.small_data import write_parquet
from tests.support.tasks import encode, summary_batch
from tests.support.trainers import quiet_trainer, ready_loader

EVERY = AdapterConfig(rank=2, targets=["all"])
TEXTS = ["w1 good film w2 w3", "the film was bad ."]
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def moved(module: Any) -> Any:
    """Fill both factors with noise, since one factor starts at zero, and disable dropout."""
    randomize(module.backbone)
    return module.eval()


# ---------------------------------------------------------------------------------------- 8: weights of tokens, samples

SOURCES = ["w1 w2 w3", "good film", "w4 w5 bad", "w6", "w7 w8 w9 good", "bad bad", "film", "w1 good"]
TARGETS = ["w1", "w1 w2 w3 w4 w5 w6 w7", "good", "w1 w2", "the film was good . w3 w4 w5", "bad", "w2 w3 w4", "w9"]


def gradients_of_one_update(module: Any, batches: list[Any], accumulated: int) -> dict[str, Tensor]:
    """Return the gradients of the only optimizer step of an epoch."""
    trainer = quiet_trainer(accumulate_grad_batches=accumulated)
    trainer.fit(module, ready_loader(batches))
    assert trainer.global_step == 1
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("accumulated", [2, 5])  # with 5, the last group has fewer batches
def test_case_08_each_token_has_the_same_weight(tmp_path: Path, smoothing: float, accumulated: int) -> None:
    folder = save_backbone(tmp_path, "bart", init_std=0.3)

    def module() -> Any:
        keys = {"adapter": EVERY, "generation": Generation(max_length=12)}
        return moved(Summarizer(str(folder), label_smoothing=smoothing, **keys))  # type: ignore[arg-type]

    halves = [summary_batch(SOURCES[rows], TARGETS[rows]) for rows in (slice(0, 4), slice(4, 8))]
    lengths = [int((half["labels"] != -100).sum()) for half in halves]
    assert lengths[0] != lengths[1]
    reference = module()
    every = summary_batch(SOURCES, TARGETS)
    logits = reference(every).flatten(0, 1)[every["labels"].flatten() != -100]
    tokens = every["labels"][every["labels"] != -100]
    F.cross_entropy(logits, tokens, label_smoothing=smoothing).backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    actual = gradients_of_one_update(module(), halves, accumulated)
    assert actual.keys() == expected.keys()
    error = math.sqrt(sum(float((actual[name] - gradient).square().sum()) for name, gradient in expected.items()))
    assert error < 1e-5 * math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))


def test_case_08_the_sum_over_tokens_stays_in_the_range_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient scaler multiplies the loss by another factor of 2¹⁶."""
    losses: list[Tensor] = []
    monkeypatch.setattr(L.LightningModule, "backward", lambda self, loss: losses.append(loss))
    module = GradientAveraging()
    module.trainer = L.Trainer(accumulate_grad_batches=1, accelerator="cpu", logger=False)
    module.items_in_batch = torch.tensor(4096)
    module.backward(torch.tensor(2.0))
    assert float(losses[0]) == 8.0


@pytest.mark.slow
def test_case_08_two_processes_train_summaries_to_the_weights_of_one(summary_cli: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "data"
    for split, size in (("train", 50), ("validation", 10), ("test", 9)):
        rows = [{"document": TEXTS[i % 2], "summary": " ".join(["good"] * (1 + i % 7))} for i in range(size)]
        write_rows(data / f"{split}.jsonl", rows)
    options = [f"--data.path={data}", "--model.adapter.dropout=0", "--model.backbone_args={dropout: 0.0}"]
    options += ["--trainer.max_epochs=1"]
    assert summary_cli("fit", *options, "--data.batch_size=12") == 0
    run_on_two(summary_cli.words("fit", *options, "--data.batch_size=6"), tmp_path)
    assert_same_weights(summary_cli, steps=4)


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_case_08_the_gradient_of_a_smaller_last_group_is_a_mean(accumulated: int) -> None:
    """Lightning would divide the sum over the last group by `accumulated`, although the group has fewer batches."""
    torch.manual_seed(0)
    names = ["a", "b", "c"]
    module: Any = moved(
        ImageClassifier("vit_tiny_patch16_224", weights="none", backbone_args=TINY, image_size=16, class_names=names)
    )
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
    used = min(accumulated, 2)
    batches = [{"image": images[i : i + 4], "label": labels[i : i + 4]} for i in (0, 4)][:used]
    F.cross_entropy(module(images[: 4 * used]), labels[: 4 * used]).backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    actual = gradients_of_one_update(module, batches, accumulated)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- 9: scripts

SCRIPTS = {
    "Russian": ("Москва — столица России.", ["москва", "столица", "россии"]),
    "Greek": ("ΟΔΟΣ και οδός", ["οδοσ", "και", "οδόσ"]),
    "Arabic": ("مرحبا بالعالم، ٣٤ يومًا", ["مرحبا", "بالعالم", "٣٤", "يومًا"]),
    "Hebrew": ("שלום עולם", ["שלום", "עולם"]),
    "Hindi": ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
    "Korean": ("한국어 문장입니다.", ["한국어", "문장입니다"]),
    "Chinese": ("今天天气好。我们去玩！", list("今天天气好我们去玩")),
    "Japanese": ("データは良い", list("データは良い")),
    "Thai": ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
    "mixed": ("COVID-19疫情 в Москве, films", ["covid", "19", "疫", "情", "в", "москве", "film"]),
}


def rouge(prediction: str, reference: str) -> dict[str, float]:
    metric = Rouge()
    metric.update([prediction], [reference])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_case_09_tokens_of_every_script(script: str) -> None:
    text, tokens = SCRIPTS[script]
    assert ScriptTokenizer().tokenize(text) == tokens
    assert rouge(text, text) == {**dict.fromkeys(KINDS, 1.0), "rouge2": 1.0 if len(tokens) > 1 else 0.0}


def test_case_09_scores_equal_those_of_the_same_words_in_latin_letters() -> None:
    """Replace each Latin letter by a Cyrillic letter. The score must equal `rouge_score` of the Latin text."""
    plain = ("the cat sat on a mat", "a cat sat by the mat")
    # words have at most three letters, since longer Latin words would be stemmed
    cipher = str.maketrans("abcehmnosty", "абвгдежзийк")
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(plain[1], plain[0])
    scores_of_cipher = rouge(plain[0].translate(cipher), plain[1].translate(cipher))
    for kind, score in scores.items():
        assert scores_of_cipher[kind] == pytest.approx(score.fmeasure, abs=1e-6)


def test_case_09_sentences_of_other_scripts_count_for_rouge_lsum() -> None:
    scores = rouge("我们去玩。今天天气好！", "今天天气好。我们去玩！")
    assert scores["rougeLsum"] == 1.0 > scores["rougeL"]


@pytest.mark.parametrize("text", ["Über größere Häuser", "été à la plage", "Łódź, żółć", "Việt Nam đẹp", "x² ʻokina"])
def test_case_09_scores_of_latin_texts_equal_rouge_score(text: str) -> None:
    other = text.replace("a", "o")
    expected = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(other, text)
    for kind, score in expected.items():
        assert rouge(text, other)[kind] == pytest.approx(score.fmeasure, abs=1e-7)


# ------------------------------------------------------------------------------------------------------- 10: provenance


def card_of(run: Path, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Export a run. Return the front matter and the body of its model card."""
    assert main(["export", str(run), "--format", "peft", "--output", str(output), *options]) == 0
    _, front, body = (output / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def published(front: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of the model index, by split and name."""
    results = [result for entry in front.get("model-index", []) for result in entry["results"]]
    return {
        f"{result['dataset']['split']}/{metric['type']}": metric["value"]
        for result in results
        for metric in result["metrics"]
    }


def test_case_10_keys_with_defaults_that_an_older_version_lacked_are_no_differences() -> None:
    values = {"path": "digits", "max_test_samples": None}
    model = {"class_path": "modules.image_classification.ImageClassifier", "init_args": {"adapter": {"rank": 2}}}
    saved = {"model": model, "data": {"class_path": "datamodules.glue.GlueData", "init_args": values}}
    adapter = asdict(AdapterConfig(rank=2))
    class_path = "datamodules.text_classification.TextClassificationData"
    current = {
        "model": {**model, "init_args": {"adapter": adapter}},
        "data": {"class_path": class_path, "init_args": {**values, "skip_bad_rows": 0}},
    }
    assert compare_configurations(saved, current) == []
    current["data"] = {"class_path": class_path, "init_args": {**values, "skip_bad_rows": 3, "max_test_samples": 5}}
    adapter["rank_pattern"] = {"fc1": 4}
    assert compare_configurations(saved, current) == ["model.adapter", "data.max_test_samples", "data.skip_bad_rows"]


def test_case_10_only_tests_on_the_checkpoints_data_are_published(
    fitted_cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_parquet(tmp_path / "other", {"train": 9, "test": 6}, seed=5)
    run = ("--ckpt_path", str(fitted_cli.run()))
    assert fitted_cli("test", f"--data.path={other}", *run) == 0
    assert "other values of data.path than" in capsys.readouterr().err
    front, body = card_of(fitted_cli.run(), tmp_path / "first")
    assert not any(key.startswith("test/") for key in published(front))
    assert "test/acc1" not in body
    assert "The card leaves out test metrics" in capsys.readouterr().err
    assert fitted_cli("test", *run) == 0
    assert "metrics were computed with other values" not in capsys.readouterr().err
    metrics = fitted_cli.metrics()
    for option in ("--data.max_test_samples=5", "--trainer.limit_test_batches=0.2"):
        assert fitted_cli("test", option, *run) == 0
        assert f"other values of {option[2:].partition('=')[0]} than" in capsys.readouterr().err
        assert fitted_cli.metrics()["test/loss"] != metrics["test/loss"]
    front, body = card_of(fitted_cli.run(), tmp_path / "second")
    for name in ("loss", "acc1"):
        assert published(front)[f"test/{name}"] == metrics[f"test/{name}"]
    assert f"{metrics['test/loss']:.6g}" in body


@pytest.mark.parametrize(("limit", "limited"), [(1, True), (1.0, False), (0.5, True), (0, False), (7, True)], ids=repr)
def test_case_10_a_limit_of_1_is_one_batch_and_of_1_0_the_complete_split(limit: float, limited: bool) -> None:
    trainer = quiet_trainer(limit_test_batches=limit)
    assert _is_limited(trainer, "limit_test_batches") == limited


def test_case_10_only_the_exported_checkpoint_is_published(cli: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    """The card of the best checkpoint and that of the last have the metrics of their own checkpoint."""
    options = (
        "--trainer.max_epochs=3",
        "--checkpoint.monitor=val/loss",
        "--checkpoint.mode=max",
        "--model.learning_rate=0.05",
    )
    assert cli("fit", *options) == 0
    best, last = (cli.run() / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    steps = {path: torch.load(path, weights_only=True)["global_step"] for path in (best, last)}
    assert steps[best] < steps[last]
    assert cli("test", "--ckpt_path", str(last)) == 0
    of_last = cli.metrics()
    front, _ = card_of(best, tmp_path / "best")
    validated = published(front)
    assert not any(key.startswith("test/") for key in validated)
    assert validated["validation/loss"] == cli.metrics()["best/val/loss"] != of_last["val/loss"]
    front, _ = card_of(last, tmp_path / "last")
    assert published(front)["test/loss"] == of_last["test/loss"]
    assert published(front)["validation/loss"] == of_last["val/loss"]
    assert cli("validate", "--ckpt_path", str(best)) == 0
    front, _ = card_of(best, tmp_path / "again")
    assert published(front)["validation/loss"] == pytest.approx(validated["validation/loss"])


def test_case_10_a_test_removes_the_metrics_of_an_earlier_test(fitted_text_cli: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    options = ("--ckpt_path", str(fitted_text_cli.run()), "--data.test_on_validation=true")
    assert fitted_text_cli("test", *options) == 0
    first = {name for name in fitted_text_cli.metrics() if name.startswith("test/")}
    assert fitted_text_cli("test", *options, "--model.metrics=[accuracy, f1]") == 0
    second = {name for name in fitted_text_cli.metrics() if name.startswith("test/")}
    assert "test/matthews" in first - second
    assert {f"test/{name}" for name in ("accuracy", "f1", "loss", "score", "macro_f1", "ece")} == second
    assert fitted_text_cli.metrics()["params/trainable"] > 0
    # the validation rows have selected the checkpoint, so their score is not published as a test score
    front, _ = card_of(fitted_text_cli.run(), tmp_path / "card")
    assert not any(key.startswith("test/") for key in published(front))


def test_case_10_further_training_removes_the_metrics_of_a_test(fitted_cli: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    assert fitted_cli("test", "--ckpt_path=last") == 0
    assert "test/acc1" in fitted_cli.metrics()
    assert fitted_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert not any(name.startswith("test/") for name in fitted_cli.metrics())
    front, _ = card_of(fitted_cli.run() / "checkpoints" / "last.ckpt", tmp_path / "card")
    assert not any(key.startswith("test/") for key in published(front))
    assert published(front)["validation/loss"] == fitted_cli.metrics()["val/loss"]


@pytest.mark.parametrize("content", ["{", "[1, {}]", '[{"split": "test", "step": 8, "metrics": {"test/a": "x"}}]'])
def test_case_10_malformed_evaluations_are_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert read_evaluations(tmp_path) == []
    add_evaluation(tmp_path, Evaluation("test", 8, (), {"test/a": 1.0}))
    assert evaluations_of_checkpoint({"global_step": 8}, tmp_path) == read_evaluations(tmp_path)
    assert evaluations_of_checkpoint({"global_step": 7}, tmp_path) == []


# ---------------------------------------------------------------------------------------- 13: code that loads exports

IDS = torch.arange(4, 18).view(2, 7)
START = torch.tensor([[2, 0, 44], [2, 0, 49]])


def run_program(code: str) -> dict[str, Any]:
    """Run code in a new namespace, and return the names that the code defines."""
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


def run_code(code: str) -> Any:
    """Run code in a new namespace, and return its `model`."""
    return run_program(code)["model"]


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def write_photo(folder: Path) -> None:
    """Write photo.jpg, which is turned upright by its EXIF orientation."""
    pixels = torch.randint(256, (3, 4, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels.numpy()).resize((60, 40)).save(folder / "photo.jpg", exif=exif)


def classified(module: ImageClassifier, photo: Path) -> Tensor:
    """Return the probabilities of a photo in this program's own preprocessing."""
    image = decode_image(photo)
    for step in evaluation_steps(module.preprocessing):
        image = step(image)
    mean, std = (torch.tensor(module.preprocessing[key]) for key in ("mean", "std"))
    return module(normalise(image[None], mean, std)).softmax(-1)[0]


VIT, DINO = "vit_tiny_patch16_224", "vit_small_patch14_dinov2"


def vit_file(folder: Path, suffix: str, size: int = 16, name: str = VIT) -> str:
    """Save the weights of a tiny ViT with five classes and this image size. Return the path."""
    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False, num_classes=5, img_size=size, **TINY)
    path = folder / f"vit{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def image_module(weights: str, name: str = VIT, **keys: Any) -> Any:
    torch.manual_seed(11)
    options = {"backbone_args": TINY, "image_size": 16, "class_names": ["a", "b", "c"], **keys}
    return ImageClassifier(name, weights=weights, adapter=EVERY, **options)


def text_module(folder: Path, kind: str, **keys: Any) -> Any:
    backbone = str(save_backbone(folder / kind, kind))
    torch.manual_seed(11)
    return TextClassifier(backbone, class_names=["no", "yes", "perhaps"], adapter=EVERY, **keys)


def summary_module(folder: Path, kind: str, weights: str = "pretrained") -> Any:
    backbone = str(save_backbone(folder / kind, kind))
    torch.manual_seed(11)
    return Summarizer(backbone, weights=weights, adapter=EVERY, generation=Generation(max_length=12))


def language_module(backbone: Path, weights: str = "pretrained", **keys: Any) -> Any:
    torch.manual_seed(11)
    return LanguageModel(str(backbone), weights=weights, adapter=EVERY, **{"backbone_dtype": "float32", **keys})


def other_weights(folder: Path, kind: str) -> str:
    """Save other weights of a backbone outside of its directory. Return the path."""
    path = folder / "other.safetensors"
    save_file(load_file(save_backbone(folder / "other", kind, seed=5) / "model.safetensors"), path)
    return str(path)


MODULES: dict[str, Callable[[Path], Any]] = {
    "vit none": lambda p: image_module("none"),
    "vit safetensors": lambda p: image_module(vit_file(p, ".safetensors")),
    "vit pth": lambda p: image_module(vit_file(p, ".pth")),
    "vit resized": lambda p: image_module(vit_file(p, ".safetensors", size=32)),
    "dinov2 resized": lambda p: image_module(vit_file(p, ".safetensors", size=518, name=DINO), DINO),
    "vit bfloat16": lambda p: image_module(vit_file(p, ".safetensors"), backbone_dtype="bfloat16"),
    "vit as many classes": lambda p: image_module(vit_file(p, ".pth"), class_names=list("abcde")),
    "bert": lambda p: text_module(p, "bert"),
    "roberta": lambda p: text_module(p, "roberta"),
    "deberta": lambda p: text_module(p, "deberta"),
    "distilbert": lambda p: text_module(p, "distilbert"),
    "backbone_args": lambda p: text_module(p, "bert", backbone_args={"hidden_act": "relu", "layer_norm_eps": 0.1}),
    "bert file": lambda p: text_module(p, "bert", weights=other_weights(p, "bert")),
    "bert none": lambda p: text_module(p, "bert", weights="none"),
    "bert bfloat16": lambda p: text_module(p, "bert", backbone_dtype="bfloat16"),
    "bert none bfloat16": lambda p: text_module(p, "bert", weights="none", backbone_dtype="bfloat16"),
    "another head": lambda p: TextClassifier(
        str(save_classifier(p / "head", "roberta", ["x", "y"])), class_names=["no", "yes", "perhaps"], adapter=EVERY
    ),
    "regression": lambda p: TextClassifier(str(save_backbone(p, "roberta")), class_names=[], adapter=EVERY),
    "regression bfloat16": lambda p: TextClassifier(
        str(save_backbone(p, "roberta")), class_names=[], adapter=EVERY, backbone_dtype="bfloat16"
    ),
    "bart": lambda p: summary_module(p, "bart"),
    "t5": lambda p: summary_module(p, "t5"),
    "bart none": lambda p: summary_module(p, "bart", "none"),
    "llama": lambda p: language_module(save_decoder(p)),
    "llama chats": lambda p: language_module(
        save_decoder(p), prompt_template=CHAT, generation=Decoding(max_new_tokens=6)
    ),
    "llama bfloat16": lambda p: language_module(save_decoder(p), backbone_dtype="bfloat16"),
    "llama none": lambda p: language_module(save_decoder(p), "none"),
    "gguf": lambda p: language_module(write_gguf(save_decoder(p / "llama")), backbone_args={"rms_norm_eps": 0.01}),
}

MERGED = ("vit pth", "another head", "gguf")


def ask(module: Any, model: Any) -> Tensor:
    """Return the logits of a loaded model, on inputs for the task of `module`."""
    if isinstance(module, ImageClassifier):
        return model(images())
    starts = {"decoder_input_ids": START} if isinstance(module, Summarizer) else {}
    return model(input_ids=IDS, **starts).logits.float()


def own_logits(module: Any) -> Tensor:
    return module(images()) if isinstance(module, ImageClassifier) else ask(module, module.backbone)


def prediction_line(module: Any) -> str | None:
    """Return the line that a program for the module prints: the module's own prediction for the text of the program."""
    text, tokenizer = "Write a text here.", module.tokenizer
    if module.class_names is not None:
        outputs = module(tokenizer(text, return_tensors="pt"))[0]
        if not module.class_names:
            return f"{outputs:.5g}"
        probability, label = outputs.softmax(-1).max(-1)
        return f"{module.class_names[label]} {probability:.3f}"
    if isinstance(module, Summarizer):
        return str(module.generate(tokenizer(text, return_tensors="pt"))[0])
    if (template := module.hparams["prompt_template"]) is None:
        return None
    message = {"role": "user", "content": "Write a message here."}
    ids = torch.tensor([ConversationEncoder(tokenizer, template, 100, tokenizer.eos_token_id).prompt([message])])
    return str(module.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0])


def texts_for(loader: Loader, folder: Path, module: Any) -> Iterator[str]:
    """Yield the printed code, then the card's code. The card runs in another folder, with links to local weights."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "photo.jpg").symlink_to(folder.parent / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        yield loader(str(folder))
    folder.rename(elsewhere / folder.name)
    for source in (Path(module.hparams["backbone"]), Path(module.hparams["weights"])):
        source = source.parent if source.suffix == ".gguf" else source  # a GGUF file is named relative to its directory
        if source.exists():
            (elsewhere / source.name).symlink_to(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        yield loader(folder.name, shared=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, export_peft) for name in MODULES),
        *((name, write_merged) for name in MERGED),
        *(pytest.param(name, write_merged, marks=pytest.mark.slow) for name in MODULES if name not in MERGED),
    ],
)
def test_case_13_the_code_of_an_export_gives_the_same_logits(
    tmp_path: Path, name: str, form: Callable[..., Loader], capsys: pytest.CaptureFixture[str]
) -> None:
    module = moved(MODULES[name](tmp_path))
    expected = own_logits(module)
    prediction = None if isinstance(module, ImageClassifier) else prediction_line(module)
    with adapters_disabled(module.backbone):
        frozen = own_logits(module)
    write_photo(tmp_path)
    shares = classified(module, tmp_path / "photo.jpg") if isinstance(module, ImageClassifier) else None
    folder = tmp_path / "it's"
    folder.mkdir()
    for place, code in enumerate(texts_for(form(module, torch.float32, folder), folder, module)):
        torch.rand(3)  # the code must not depend on the random state of this process
        capsys.readouterr()
        names = run_program(code)
        assert not names["model"].training
        if module.class_names == [] and form is export_peft:  # bfloat16 would round a prediction of 683
            assert all(p.dtype == torch.float32 for n, p in names["model"].named_parameters() if "classifier" in n)
        assert prediction is None or "bfloat16" in name or capsys.readouterr().out.strip() == prediction
        error, update = (float((logits - expected).norm()) for logits in (ask(module, names["model"]), frozen))
        assert error < (0.1 if "bfloat16" in name else 1e-3) * update
        if shares is not None:
            torch.testing.assert_close(names["probabilities"], shares, atol=0.01, rtol=0)
            assert names["LABELS"] == module.class_names
        if form is export_peft:
            assert names.get("LABELS", []) == (module.class_names or [])
            if isinstance(module, TextModel):
                text = "the cat sat"
                assert names["tokenizer"](text)["input_ids"] == cast(Any, module.tokenizer)(text)["input_ids"]
                if module.class_names:
                    assert names["model"].config.id2label == dict(enumerate(module.class_names))
        assert place == 0 or str(tmp_path) not in code
    written = [file for file in (tmp_path / "elsewhere" / "it's").iterdir() if file.is_file()]
    assert {file.name for file in written if str(tmp_path).encode() in file.read_bytes()} == set()


@torch.no_grad()
def test_case_13_code_for_weights_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm loads the weights, and a local file replaces the hub."""
    file = vit_file(tmp_path, ".safetensors", size=224)  # the size of timm's weights
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: load_file(file))
    module = moved(image_module("pretrained"))
    (tmp_path / "peft").mkdir()
    code = export_peft(module, torch.float32, tmp_path / "peft")(str(tmp_path / "peft"))
    write_photo(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(run_code(code)(images()), module(images()), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_case_13_the_printed_code_and_the_code_of_the_card_run(
    fitted_cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The printed code runs in any folder. The card's code runs in the folder of the export."""
    module = load_module(find_checkpoint(str(fitted_cli.run())), {})
    for form in ("peft", "merged"):
        words = ["export", str(fitted_cli.run()), "--format", form, "--output", str(tmp_path / form)]
        assert main(words) == 0
        printed = capsys.readouterr().out.partition("Load it with\n\n")[2].partition("\n\nExported")[0]
        card = re.findall(r"```python\n(.*?)\n```", (tmp_path / form / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        write_photo(tmp_path)
        for code in (printed, *card):
            torch.testing.assert_close(run_code(code)(images()), module(images()), atol=1e-5, rtol=1e-4)
        assert len(card) == 1


def test_case_13_the_printed_command_of_a_compact_export_runs(
    fitted_cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fitted_cli("test", "--ckpt_path", str(fitted_cli.run())) == 0
    expected = fitted_cli.metrics()["test/loss"]
    capsys.readouterr()
    words = ["--format", "compact", "--output", str(tmp_path / "compact")]
    assert main(["export", str(fitted_cli.run()), *words]) == 0
    out = capsys.readouterr().out
    size = (tmp_path / "compact" / "adapter_compact.safetensors").stat().st_size
    assert f"Size: {size / 1e6:.3g} MB; as --format peft: " in out
    assert "--model.adapter.init_a signs" in out
    command = next(line for line in out.splitlines() if line.startswith("python main.py test"))
    assert main(command.split()[2:]) == 0
    run = Path(capsys.readouterr().out.rpartition("Run directory: ")[2].strip())
    assert json.loads((run / "metrics.json").read_text())["test/loss"] == pytest.approx(expected, abs=1e-7)


# ------------------------------------------------------------------------------ 14: merged exports in pipelines


def merged(module: Any, folder: Path) -> Path:
    folder.mkdir()
    write_merged(moved(module), torch.float32, folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta", "distilbert"])
def test_case_14_pipelines_classify_pairs_of_sentences(tmp_path: Path, kind: str) -> None:
    """The tokenizer returns token types, although some backbones have no embeddings for them."""
    module = text_module(tmp_path, kind)
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    folder = merged(module, tmp_path / "merged")
    expected = module(dict(module.tokenizer(**pair, return_tensors="pt"))).softmax(-1)[0]
    classify = pipeline("text-classification", model=str(folder), tokenizer=str(folder), top_k=None)
    scores = {row["label"]: row["score"] for row in classify(pair)}
    assert scores == pytest.approx(dict(zip(module.class_names, expected.tolist(), strict=True)), abs=1e-5)


@torch.no_grad()
def test_case_14_pipelines_return_labels_and_scores_and_cut_long_texts(tmp_path: Path) -> None:
    """A regression returns its score without a sigmoid. Long texts are cut to the number of positions."""
    torch.manual_seed(0)
    backbone = save_classifier(tmp_path / "several", "roberta", [], problem_type="multi_label_classification")
    module: Any = TextClassifier(str(backbone), class_names=[], adapter=EVERY)
    folder = merged(module, tmp_path / "merged")
    classify = pipeline("text-classification", model=str(folder), tokenizer=str(folder))
    (row,) = classify(TEXTS[0])
    assert row["score"] == pytest.approx(float(module(encode(TEXTS[:1]))[0]), abs=1e-5)
    assert row["label"] == "score"
    assert AutoTokenizer.from_pretrained(folder).model_max_length == module.position_limit
    classify("w1 " * 1000, truncation=True)
    classes: Any = TextClassifier(str(backbone), class_names=["no", "yes"], adapter=EVERY)
    classify = pipeline("text-classification", model=str(merged(classes, tmp_path / "classes")), top_k=None)
    assert sum(row["score"] for row in classify(TEXTS)[0]) == pytest.approx(1)


@torch.no_grad()
def test_case_14_pipelines_generate_the_responses_of_the_module(tmp_path: Path) -> None:
    backbone = save_decoder(tmp_path / "llama", pad_token_id=None)
    byte_tokenizer(chat_template=None, pad_token=None).save_pretrained(backbone)
    module: Any = language_module(backbone, generation=Decoding(max_new_tokens=6))
    module.hparams["prompt_template"] = "{% for m in messages %}>{{ m['content'] }}{% endfor %}"
    folder = merged(module, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length) == ("left", "<|im_end|>", 512)
    prompts = ["Why?", "A longer question?"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    expected = module.generate(dict(batch))
    generate = pipeline("text-generation", model=str(folder), tokenizer=str(folder), return_full_text=False)
    for found in (generate(prompts), generate(prompts, batch_size=2)):
        assert [rows[0]["generated_text"].strip() for rows in found] == expected
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert chat == ">Why?"


@torch.no_grad()
def test_case_14_summarizers_and_image_classifiers_keep_their_settings(tmp_path: Path) -> None:
    module = summary_module(tmp_path, "bart")
    module.backbone.config.task_specific_params = {"summarization": {"num_beams": 1, "max_length": 3}}
    folder = merged(module, tmp_path / "bart_merged")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert [text.strip() for text in texts] == module.generate(dict(batch))
    assert model.config.to_dict().get("task_specific_params") is None
    images_module = image_module("none", backbone_args={**TINY, "drop_path_rate": 0.3})
    images_module.preprocessing["crop_pct"], images_module.preprocessing["mean"] = 0.8, (0.1, 0.2, 0.3)
    model = timm.create_model(f"local-dir:{merged(images_module, tmp_path / 'vit')}", pretrained=True)
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.8
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.1, 0.2, 0.3]


# ---------------------------------------------------------------------------------------------------- 27: predictions


def test_case_27_each_prediction_has_new_files(tmp_path: Path) -> None:
    names = ["MNLI-m.tsv", "MNLI-mm.tsv"]
    assert [path.name for path in unused_paths(tmp_path, names)] == names
    (tmp_path / "MNLI-mm.tsv").touch()
    assert [path.name for path in unused_paths(tmp_path, names)] == ["MNLI-m-1.tsv", "MNLI-mm-1.tsv"]
    (tmp_path / "MNLI-m-1.tsv").symlink_to("nowhere")
    assert [path.name for path in unused_paths(tmp_path, names)] == ["MNLI-m-2.tsv", "MNLI-mm-2.tsv"]


def test_case_27_a_second_prediction_keeps_the_files_of_the_first(
    fitted_cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = []
    for number, name in enumerate(("predictions.csv", "predictions-1.csv")):
        folder = tmp_path / f"images{number}"
        folder.mkdir()
        for i in range(number + 2):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / f"{number}-{i}.png")
        assert fitted_cli("predict", f"--data.predict_path={folder}", "--ckpt_path", str(fitted_cli.run())) == 0
        assert f"{number + 2} predictions: {fitted_cli.run() / name}" in capsys.readouterr().err
        written.append(fitted_cli.run() / name)
    for number, path in enumerate(written):
        with path.open() as file:
            assert len(list(csv.DictReader(file))) == number + 2


# ------------------------------------------------------------------------------------------------- 35: zero matrices


@pytest.mark.drawn
def test_case_35_the_relative_norm_over_a_zero_weight_is_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning names the zero weight. The relative norms of other layers are logged."""
    state = {**timm.create_model("vit_tiny_patch16_224", img_size=16, **TINY).state_dict()}
    state["blocks.1.mlp.fc1.weight"] = torch.zeros_like(state["blocks.1.mlp.fc1.weight"])
    save_file(state, tmp_path / "zero.safetensors")
    data = write_parquet(tmp_path / "data", {"train": 30, "test": 6})
    cli = CommandLine(tmp_path / "runs", data)  # noqa: F811
    options = ["--model.weights", str(tmp_path / "zero.safetensors"), f"--model.backbone_args={json.dumps(TINY)}"]
    assert cli("fit", "--trainer.max_epochs=1", "--model.adapter.targets=mlp_in", *options) == 0
    assert "frozen weight of 1 adapted projection is zero" in capsys.readouterr().err
    rows = [row for row in pq.read_table(cli.run() / "spectrum.parquet").to_pylist() if row["factor"] == "BA"]
    ratios = {(row["step"], row["projection"]): row["relative_norm"] for row in rows}
    last = max(step for step, _ in ratios)
    for (step, name), ratio in ratios.items():
        zero = name == "blocks.1.mlp.fc1"
        assert ratio == (0.0 if step == 0 else math.inf if zero else pytest.approx(ratio))
        assert zero or math.isfinite(ratio)
    scalars = cli.scalars("spectrum/mlp_in/BA/relative_norm")
    assert scalars[last] == pytest.approx(ratios[last, "blocks.0.mlp.fc1"], rel=1e-6)
    assert all(math.isfinite(value) for value in cli.metrics().values())


@pytest.mark.parametrize("trains", ["A", "B"])
def test_case_35_the_relative_norm_of_a_zero_update_is_zero(trains: str) -> None:
    assert _ratio(0.0, 0.0) == 0.0
    assert _ratio(1.0, 0.0) == math.inf
    assert _ratio(1.0, 2.0) == 0.5
    init = {"A": ("zero", "orthogonal"), "B": ("orthogonal", "zero")}[trains]
    adapter = AdapterConfig(rank=2, train=trains, init_a=init[0], init_b=init[1])  # type: ignore[arg-type]
    module: Any = ImageClassifier(
        "vit_tiny_patch16_224",
        weights="none",
        backbone_args=TINY,
        image_size=16,
        class_names=["a", "b"],
        adapter=adapter,
    )
    for layer in adapted_layers(module.backbone).values():
        nn.init.zeros_(layer.weight)
    callback = AdapterSpectrum()
    callback._measure(quiet_trainer(), module)
    ratios = [row["relative_norm"] for row in callback._rows if row["factor"] == "BA"]
    assert ratios == [0.0] * len(ratios)


@pytest.mark.drawn
@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[3.0, 3.0]], [[1e-20, 5e-21]], [[5e-324, 0.0]]])
def test_case_35_heat_maps_of_equal_and_tiny_values(
    values: list[list[float]], recwarn: pytest.WarningsRecorder
) -> None:
    picture = HeatMap(["a"]).render(values, "A title")
    assert picture.std() > 0
    assert not [warning for warning in recwarn if "invalid value" in str(warning.message)]


@pytest.mark.parametrize("values", [[1.5] * 4, [1e5, *[1e-4] * 40, *[2e-4] * 40]])
def test_case_35_histograms_have_few_bins(values: list[float], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=0)
    row = {"projection": "a", "role": "query", "factor": "B", "singular_values": values, "relative_norm": None}
    AdapterSpectrum(detail="layers")._log_step(trainer, [{**row, "scale": 1.0}])
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    (histogram,) = events.Histograms("spectrum_layers/a/B")
    assert histogram.histogram_value.num == len(values)
    assert len(histogram.histogram_value.bucket) < 20
