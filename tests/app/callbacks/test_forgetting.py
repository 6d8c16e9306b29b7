"""Forgetting: scores of the backbone before and after a fit. Measuring them does not change the fit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from app.callbacks.forgetting_probes import open_probe
from modules.image_classification import ImageClassifier
from modules.language_modeling import LanguageModel
from tests.app.conftest import CommandLine
from tests.support.rows import write_rows
from tests.support.small_data import sentences, write_parquet

A_TRAINED = ("--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal")


@pytest.fixture(scope="module")
def second_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("second"), {"train": 60}, seed=5)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "test.jsonl", ({"text": text} for text in [*sentences(30, seed=8), "", "good"]))
    return folder


def scores(cli: CommandLine, name: str, version: int = 0) -> tuple[float, float, float]:
    metrics = cli.metrics(version)
    lost, before, after = (metrics[f"forgetting/{part}{name}"] for part in ("", "before/", "after/"))
    return lost, before, after


@pytest.mark.parametrize(
    ("options", "tested"),
    [((), True), pytest.param(A_TRAINED, False, marks=pytest.mark.slow), (("--model.tuning=full",), True)],
    ids=["B", "A", "full"],
)
def test_the_first_score_is_of_the_untouched_backbone(
    cli: CommandLine, second_images: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], tested: bool
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    features: list[torch.Tensor] = []
    original = ImageClassifier.configure_tuning

    def hook(self: ImageClassifier, heads: tuple[str, ...] = ()) -> None:
        states.append({name: tensor.clone() for name, tensor in self.backbone.state_dict().items()})
        original(self, heads)

    def record(model: torch.nn.Module, batches: object, labels: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            features.append(torch.cat([model(batch) for batch in batches]))  # type: ignore[attr-defined]
        return {"knn_acc": 0.75 if len(features) == 1 else 0.5}

    monkeypatch.setattr(ImageClassifier, "configure_tuning", hook)
    monkeypatch.setattr("app.callbacks.forgetting_probes.image_scores", record)
    fast = ["--model.learning_rate=0.1", f"--test_after_fit={tested}", "--checkpoint.monitor=null"]
    assert cli("fit", *options, *fast, f"--forgetting.path={second_images}") == 0
    assert scores(cli, "knn_acc") == (0.25, 0.75, 0.5)
    untouched = ImageClassifier(
        "vit_tiny_patch16_224",
        weights="none",
        backbone_args={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "pos_drop_rate": 0.1},
        image_size=16,
        tuning="head",
    )
    untouched.backbone.load_state_dict(states[0])
    assert len(features) == 2
    assert len(features[0]) == 60
    # same images in the same order: the first features are of the untouched model, the second are not
    images: list[torch.Tensor] = []
    monkeypatch.setattr(
        "app.callbacks.forgetting_probes.image_scores", lambda model, batches, labels: images.extend(batches) or {}
    )
    open_probe(untouched, str(second_images), 1000, "text")(untouched)
    with torch.no_grad():
        expected = untouched.backbone.eval()(torch.cat(images))
    assert torch.allclose(features[0], expected, atol=1e-5)
    assert not torch.allclose(features[1], expected, atol=1e-2)


def test_the_second_score_is_of_the_tested_checkpoint(cli: CommandLine, second_images: Path) -> None:
    """The monitor prefers a high loss, so the first epoch is the best. A fit of one epoch must have the same scores."""
    options = ["--model.tuning=full", f"--forgetting.path={second_images}", "--model.schedule=constant"]
    worst = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=max"]
    assert (
        cli("fit", *options, *worst, "--trainer.max_epochs=3", "--test_after_fit=true", "--model.warmup_ratio=0") == 0
    )
    assert cli("fit", *options, "--trainer.max_epochs=1", "--model.warmup_ratio=0") == 0
    assert cli.checkpoint(0, "best")["global_step"] == 8
    assert scores(cli, "knn_acc", 0) == scores(cli, "knn_acc", 1)


def test_a_tuned_head_forgets_nothing(cli: CommandLine, second_images: Path) -> None:
    assert cli("fit", "--model.tuning=head", f"--forgetting.path={second_images}", "--test_after_fit=true") == 0
    lost, before, after = scores(cli, "knn_acc")
    assert lost == 0.0
    assert before == after > 1 / 3


def test_the_fit_is_the_same_without_forgetting_scores(fitted_cli: CommandLine, second_images: Path) -> None:
    assert fitted_cli("fit", "--trainer.max_epochs=1", f"--forgetting.path={second_images}") == 0
    without, with_scores = fitted_cli.checkpoint(0)["state_dict"], fitted_cli.checkpoint(1)["state_dict"]
    assert all(torch.equal(tensor, with_scores[name]) for name, tensor in without.items())
    assert fitted_cli.scalars("train/loss", 0) == fitted_cli.scalars("train/loss", 1)
    assert not any(key.startswith("forgetting") for key in fitted_cli.metrics(0))


@pytest.mark.slow
def test_a_resumed_fit_has_the_same_scores(cli: CommandLine, second_images: Path) -> None:
    options = ["--model.tuning=full", f"--forgetting.path={second_images}", "--forgetting.rows=50"]
    assert cli("fit", *options, "--trainer.max_epochs=2") == 0
    stop = ["--trainer.max_epochs=2", "--trainer.max_steps=5"]
    assert cli("fit", *options, *stop) == 0
    resumed = str(cli.run(1) / "checkpoints" / "last.ckpt")
    assert cli("fit", *options, "--trainer.max_epochs=2", "--trainer.max_steps=-1", "--ckpt_path", resumed) == 0
    assert scores(cli, "knn_acc", 0) == scores(cli, "knn_acc", 1)


@pytest.mark.slow
def test_a_run_stopped_in_its_last_score_keeps_its_metrics_and_is_scored_when_resumed(
    cli: CommandLine, second_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[float] = []

    def score(*_: object) -> dict[str, float]:
        scored.append(len(scored) / 10)
        if len(scored) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"knn_acc": scored[-1]}

    monkeypatch.setattr("app.callbacks.forgetting_probes.image_scores", score)
    options = [f"--forgetting.path={second_images}", "--trainer.max_epochs=1", "--test_after_fit=false"]
    assert cli("fit", *options) == 143
    stopped = cli.metrics()
    assert {"val/loss", "params/trainable"} <= stopped.keys()
    assert not any(key.startswith("forgetting/") for key in stopped)
    assert cli("fit", *options, "--ckpt_path=last") == 0
    assert scores(cli, "knn_acc") == pytest.approx((-0.1, 0.2, 0.3))
    assert stopped.items() <= cli.metrics().items()


@pytest.mark.slow
def test_full_tuning_resumed_with_other_forgetting_rows_is_not_scored(
    cli: CommandLine, second_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.tuning=full", f"--forgetting.path={second_images}"]
    assert cli("fit", *options, "--trainer.max_epochs=1") == 0
    words = ["--trainer.max_epochs=2", "--forgetting.rows=30", "--ckpt_path=last"]
    assert cli("fit", *options, *words) == 0
    assert "no scores of these rows from before the fit" in " ".join(capsys.readouterr().err.split())
    assert not any(key.startswith("forgetting") for key in cli.metrics())


def test_decoders_are_scored_by_perplexity(
    instruction_cli: CommandLine, texts: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--trainer.max_epochs=1", "--model.learning_rate=0.1"]
    assert instruction_cli("fit", *fast, f"--forgetting.path={texts}") == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "with fewer than two tokens" in error
    for name in ("loss", "perplexity"):
        lost, before, after = scores(instruction_cli, name)
        assert lost == pytest.approx(after - before, abs=1e-6)
        assert before != after
    untouched = LanguageModel(str(llama_path), backbone_dtype="float32", tuning="full").eval()
    total, count = 0.0, 0
    for line in (texts / "test.jsonl").read_text().splitlines():
        ids = torch.tensor([untouched.tokenizer(json.loads(line)["text"])["input_ids"]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(untouched.backbone(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert instruction_cli.metrics()["forgetting/before/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("any_cli", "options", "message"),
    [
        ("cli", ["--forgetting.path={images}", "--forgetting.rows=20"], "20 images of"),
        (
            "instruction_cli",
            ["--forgetting.path={texts}", "--forgetting.text_column=words"],
            "forgetting.text_column: ",
        ),
    ],
    indirect=["any_cli"],
)
def test_bad_forgetting_options_are_refused_before_training(
    any_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    second_images: Path,
    texts: Path,
    options: list[str],
    message: str,
) -> None:
    cli = any_cli
    assert cli("fit", *(option.format(images=second_images, texts=texts) for option in options)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "data.path" not in error
    assert not cli.root.exists() or not list(cli.root.iterdir())


def test_images_of_a_hub_without_a_training_split_are_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.sources.images.open_split", lambda *_: None)
    assert cli("fit", "--forgetting.path=owner/test-only") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "forgetting.path: owner/test-only has no training split" in error
    assert "Traceback" not in error


def test_the_message_on_a_damaged_image_names_the_key(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(30):
        file = tmp_path / "set" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(file)
    file.write_bytes(b"damaged")
    assert cli("fit", f"--forgetting.path={tmp_path / 'set'}") == 2
    assert f"forgetting.path: the image {file} cannot be decoded" in " ".join(capsys.readouterr().err.split())
