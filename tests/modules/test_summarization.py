"""Summarizer, beyond the conformance tests: label smoothing, beam search, ROUGE and bad input."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from transformers import GPT2Config

from app.cli import main
from datamodules.contract import IGNORE_INDEX
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapter_state
from modules.generation.beam_search import Generation
from modules.summarization import Summarizer
from tests.backbones import CONFIGS, POSITIONS, VOCABULARY, save_backbone, word_tokenizer
from tests.support.adapters import changed, copied, randomize
from tests.support.refusals import refused, refuses
from tests.support.rows import edit_json
from tests.support.small_data import sentences
from tests.support.tasks import (
    SOURCES,
    TARGETS,
    TaskFactory,
    encode,
    inputs,
    merged_summarizer,
    searched,
    summary_batch,
)
from tests.support.trainers import ReadyData, quiet_trainer

SEARCHES = {
    "greedy": Generation(num_beams=1, max_length=14, no_repeat_ngram_size=0),
    "beams": Generation(num_beams=3, max_length=14, no_repeat_ngram_size=3),
    "long": Generation(num_beams=3, max_length=20, min_length=9, length_penalty=2.0, no_repeat_ngram_size=2),
    "short": Generation(num_beams=3, max_length=20, length_penalty=-1.0, no_repeat_ngram_size=0),
}
every_kind = pytest.mark.parametrize("kind", ["bart", "t5", "t5_gated", "pegasus"])
two_kinds = pytest.mark.parametrize("kind", ["bart", "t5"])


def summarizer(folder: Path, **keys: Any) -> Any:
    torch.manual_seed(0)
    keys = {"generation": SEARCHES["beams"], **keys}
    return randomize(Summarizer(str(folder), adapter=AdapterConfig(rank=4, targets="all"), **keys)).eval()


# --------------------------------------------------------------------------------------------------------------- loss


@two_kinds
@torch.no_grad()
def test_label_smoothing_equals_its_closed_form(tasks: TaskFactory, kind: str) -> None:
    model = randomize(tasks(kind, label_smoothing=0.3)).eval()
    data = summary_batch()
    logits = merged_summarizer(tasks.folder(kind), model)(**inputs(data), labels=data["labels"]).logits
    real = data["labels"] != IGNORE_INDEX
    log_p = logits.double().log_softmax(-1)[real]  # (tokens, vocabulary)
    right = log_p.gather(-1, data["labels"][real].unsqueeze(-1)).squeeze(-1)
    expected = float(-(0.7 * right + 0.3 * log_p.mean(-1)).mean())
    assert float(model.training_step(data, 0)) == pytest.approx(expected, abs=1e-5)
    model.evaluate("val", {**data, "reference": [""] * len(data["labels"])}, 0)
    # evaluation does not smooth labels
    assert float(model.scores("val")["val/loss"]) == pytest.approx(float(-right.mean()), abs=1e-5)


@every_kind
@torch.no_grad()
def test_logits_do_not_depend_on_padding(tasks: TaskFactory, kind: str) -> None:
    model = randomize(tasks(kind)).eval()
    together = model(summary_batch())
    separate = model(summary_batch(SOURCES[1:2], TARGETS[:1]))
    mixed = model(summary_batch([SOURCES[1], SOURCES[2]], [TARGETS[0], TARGETS[1]]))
    assert separate.shape[1] < mixed.shape[1]
    torch.testing.assert_close(mixed[0, : separate.shape[1]], separate[0], rtol=0, atol=1e-4)
    # the same source with another target
    assert not torch.allclose(together[1, : separate.shape[1]], separate[0], atol=1e-2)


# --------------------------------------------------------------------------------------------------------- generation


@every_kind
@pytest.mark.parametrize("search", list(SEARCHES))
def test_generation_equals_that_of_transformers_with_merged_weights(tasks: TaskFactory, kind: str, search: str) -> None:
    model, data = tasks(kind, generation=SEARCHES[search]).eval(), summary_batch()
    at_start = searched(model, data)
    tokens = searched(randomize(model), data)
    expected = merged_summarizer(tasks.folder(kind), model).generate(**inputs(data), **asdict(SEARCHES[search]))
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, at_start)


def test_each_search_setting_finds_other_texts(tasks: TaskFactory) -> None:
    data = summary_batch(sentences(12))
    texts = [tuple(summarizer(tasks.folder("bart"), generation=s).generate(data)) for s in SEARCHES.values()]
    assert len(set(texts)) == len(SEARCHES)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_summary_does_not_depend_on_its_batch(tasks: TaskFactory, num_beams: int) -> None:
    search = Generation(num_beams=num_beams, max_length=16, no_repeat_ngram_size=2)
    model, sources = summarizer(tasks.folder("bart"), generation=search), sentences(6)
    separate = [model.generate(encode([source]))[0] for source in sources]
    assert len(set(separate)) > 2
    assert model.generate(encode(sources[::-1])) == separate[::-1]
    assert model.generate(encode([sources[0], " ".join(["w3"] * 30)]))[0] == separate[0]


@pytest.mark.parametrize(
    "of_backbone",
    [
        {"num_beams": 2, "max_length": 5, "min_length": 4, "length_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 3},
        {"min_new_tokens": 18},
        {"do_sample": True},
    ],
    ids="-".join,
)
@two_kinds
def test_our_search_settings_override_those_of_the_backbone(
    tasks: TaskFactory, tmp_path: Path, kind: str, of_backbone: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tasks.folder(kind), tmp_path / "own"))
    edit_json(folder / "generation_config.json", **of_backbone)
    expected = summarizer(tasks.folder(kind), generation=SEARCHES["short"]).generate(summary_batch())
    assert any(3 < len(text.split()) < 17 for text in expected)
    assert summarizer(folder, generation=SEARCHES["short"]).generate(summary_batch()) == expected


@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_forced_tokens_come_from_the_repository_for_any_weights(tmp_path: Path, weights: str, file: str) -> None:
    folder = save_backbone(tmp_path, "bart")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    edit_json(folder / file, forced_bos_token_id=7)
    weight_option = {"file": str(folder / "model.safetensors")}.get(weights, weights)
    assert (searched(summarizer(folder, weights=weight_option), summary_batch())[:, 1] == 7).all()


def test_generation_does_not_change_the_model(tasks: TaskFactory) -> None:
    model = summarizer(tasks.folder("bart"))
    before, settings = copied(model), model.backbone.generation_config.to_dict()
    first = model.generate(summary_batch())
    assert model.generate(summary_batch()) == first
    assert changed(before, model) == set()
    assert model.backbone.generation_config.to_dict() == settings


def test_an_untied_output_layer_is_frozen(tmp_path: Path) -> None:
    model = summarizer(save_backbone(tmp_path, "bart", tie_word_embeddings=False))
    head = model.backbone.lm_head.weight
    assert torch.equal(head, load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    assert not torch.equal(head, model.backbone.get_input_embeddings().weight)
    assert model.head_names == []
    assert set(model.saved_state()) == {f"backbone.{name}" for name in adapter_state(model.backbone)}


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_rouge_of_all_texts_and_the_mean_loss_of_all_tokens(tasks: TaskFactory, stage: str) -> None:
    """A second evaluation starts anew and uses its own data set alone."""
    model, run = randomize(tasks("bart")), quiet_trainer()
    evaluate = run.validate if stage == "val" else run.test
    data = [summary_batch(sentences(4), TARGETS), summary_batch(sentences(2, seed=1), ["w25 w25 w1 w5", "good"])]
    (first,) = evaluate(model, datamodule=ReadyData(data[:1]), verbose=False)
    (actual,) = evaluate(model, datamodule=ReadyData(data), verbose=False)
    assert first != actual
    model.eval()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = [pair for b in data for pair in zip(b["reference"], model.generate(b), strict=True)]
    scores = [scorer.score(reference, summary) for reference, summary in pairs]
    expected = {name: sum(s[name].fmeasure for s in scores) / 6 for name in ("rouge1", "rouge2", "rougeL")}
    with torch.no_grad():
        logits = torch.cat([model(b).flatten(0, 1) for b in data])
    expected["loss"] = float(F.cross_entropy(logits, torch.cat([b["labels"].flatten() for b in data])))
    assert set(actual) == {f"{stage}/{name}" for name in (*expected, "rougeLsum")}
    assert expected["rouge1"] > 0
    assert {k: actual[f"{stage}/{k}"] for k in expected} == pytest.approx(expected, abs=1e-5)


def test_predictions_need_no_targets(tasks: TaskFactory) -> None:
    model = randomize(tasks("bart")).eval()
    data = {name: summary_batch()[name] for name in ("input_ids", "attention_mask", "index")}
    assert model.predict_step(data, 0) == {"index": [0, 1, 2, 3], "summary": model.generate(data)}


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_beams": 0}, ".num_beams: 0 must be 1 or more"),
        ({"min_length": 11, "max_length": 10}, ": min_length 11 and max_length 10"),
        ({"min_length": -1}, ": min_length -1"),
        ({"max_length": 1}, ": min_length 0 and max_length 1"),
        ({"no_repeat_ngram_size": -1}, ".no_repeat_ngram_size: -1 must not be negative"),
        ({"length_penalty": math.nan}, ".length_penalty: nan must be finite"),
        (
            {"max_length": POSITIONS + 1},
            f".max_length: {POSITIONS + 1} tokens are more than the backbone's {POSITIONS} positions",
        ),
    ],
    ids=str,
)
def test_a_search_out_of_range_is_refused(tasks: TaskFactory, keys: dict[str, Any], message: str) -> None:
    with refuses(f"model.generation{message}", error=ModelError):
        tasks("bart", generation={"max_length": 20, **keys})


def test_the_position_limit_is_that_of_the_backbone(tasks: TaskFactory) -> None:
    for kind in ("bart", "pegasus"):
        assert tasks(kind, generation=Generation(max_length=POSITIONS)).position_limit == POSITIONS
    assert tasks("t5", generation=Generation(max_length=4096)).position_limit is None  # T5's positions are relative


@pytest.mark.parametrize("label_smoothing", [1.0, 1.5, -0.1])
def test_label_smoothing_out_of_range_is_refused(tasks: TaskFactory, label_smoothing: float) -> None:
    with refuses(f"model.label_smoothing: {label_smoothing} must lie in [0, 1)", error=ModelError):
        tasks("bart", label_smoothing=label_smoothing)


def save_one_sided(folder: Path, kind: str) -> Path:
    """Write the configuration of a model with an encoder alone or a decoder alone."""
    sizes = {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 1, "n_head": 2}
    (GPT2Config(**sizes) if kind == "gpt2" else CONFIGS[kind]).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("deberta", ["model.backbone: ", " is a deberta-v2, which has no model for Seq2SeqLM. Choose another"]),
        ("gpt2", ["model.backbone: ", " is a gpt2, which has no model for Seq2SeqLM. Choose another"]),
        ("bart", ["tuning", "'adapter'", "'full'", "head"]),  # no task head
    ],
)
def test_bad_input_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pairs_path: Path, kind: str, parts: list[str]
) -> None:
    folder = save_backbone(tmp_path / kind, kind) if kind == "bart" else save_one_sided(tmp_path / kind, kind)
    words = ["--trainer.default_root_dir", str(tmp_path / "runs"), "--data.path", str(pairs_path)]
    words += [f"--model.backbone={folder}", *(["--model.tuning=head"] if kind == "bart" else [])]
    refused(capsys, main(["fit", "--config", "tests/conf/summary.yaml", *words]), *parts)
    assert not (tmp_path / "runs/version_0/checkpoints").exists()
