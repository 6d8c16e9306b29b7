"""Instruction tuning and multiple choice through the command line."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.cli import main
from modules.language_modeling import LanguageModel
from tests.app.conftest import CommandLine, States, recording
from tests.app.processes import run_on_two
from tests.conftest import ROOT
from tests.support.rows import write_rows
from tests.support.small_data import write_instructions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCD"


@dataclass(frozen=True)
class Tuned:
    """A finished run, with the states of the model at the start and the end of the fit."""

    cli: CommandLine
    states: States

    @property
    def run(self) -> str:
        return f"--ckpt_path={self.cli.run()}"

    def predictions(self) -> list[dict[str, Any]]:
        return read_rows(self.cli.run())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, llama_path: Path) -> Tuned:
    """Train B until much of twelve rows is memorised. Validation and test use the same rows."""
    folder = tmp_path_factory.mktemp("tuned")
    data = write_instructions(folder / "data", {"train": 12})
    for split in ("validation", "test"):
        (data / f"{split}.jsonl").write_text((data / "train.jsonl").read_text())
    cli = CommandLine(folder / "runs", data, "instructions", llama_path)
    options = ["--model.adapter.rank=16", "--model.adapter.targets=all", "--model.learning_rate=0.02"]
    options += ["--trainer.max_epochs=15", "--trainer.check_val_every_n_epoch=5", "--spectrum.every_n_epochs=15"]
    options += ["--model.adapter.dropout=0", "--model.backbone_args={}", "--test_after_fit=true"]
    with pytest.MonkeyPatch.context() as patch, recording("on_fit_start", "on_fit_end") as states:
        patch.chdir(ROOT)
        assert cli("fit", *options) == 0
    return Tuned(cli, states)


def newest(run: Path, suffix: str) -> Path:
    """Return the newest file of predictions. Each file has another number."""
    return max(run.glob(f"predictions*{suffix}"), key=lambda path: path.stat().st_mtime_ns)


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in newest(run, ".jsonl").read_text().splitlines()]


def read_table(run: Path) -> list[dict[str, str]]:
    with newest(run, ".csv").open() as file:
        return list(csv.DictReader(file))


def asking(path: Path, rows: list[dict[str, Any]]) -> str:
    return f"--data.predict_path={write_rows(path, rows)}"


# ------------------------------------------------------------------------------------------------------------- training


def test_a_run_learns_and_writes_the_files_and_metrics_of_the_contract(tuned: Tuned) -> None:
    metrics = tuned.cli.metrics()
    losses = list(tuned.cli.scalars("train/loss").values())
    validated = list(tuned.cli.scalars("val/loss").values())
    assert losses[-1] < 0.65 * losses[0]
    assert validated == sorted(validated, reverse=True)
    for stage in ("val", "test"):  # same rows and same weights
        assert metrics[f"{stage}/loss"] == pytest.approx(validated[-1], rel=1e-6)
        assert metrics[f"{stage}/perplexity"] == pytest.approx(math.exp(validated[-1]), rel=1e-5)
    assert metrics["val/token_acc"] > 0.4
    assert metrics["params/trainable"] < metrics["params/total"] / 2
    assert {"adapter/bytes", "time/fit_seconds", "memory/peak_bytes", "best/val/loss"} <= metrics.keys()
    checkpoints = [path.name for path in (tuned.cli.run() / "checkpoints").iterdir()]
    assert sorted(checkpoints) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def assert_frozen(state: dict[str, Tensor], start: dict[str, Tensor], backbone: Path) -> None:
    """Check that frozen factors equal their start, and that frozen weights equal the file of the backbone."""
    stored = load_file(backbone / "model.safetensors")
    frozen = {name for name in start if name.startswith("backbone.") and not name.endswith(".B")}
    assert {name for name, tensor in state.items() if not torch.equal(tensor, start[name])} == start.keys() - frozen
    frozen_weights = {name.removeprefix("backbone."): state[name] for name in frozen}
    assert stored.keys() <= frozen_weights.keys()
    assert all(torch.equal(frozen_weights[name], tensor) for name, tensor in stored.items())


def test_frozen_weights_are_bit_identical_after_every_command(tuned: Tuned, llama_path: Path) -> None:
    start = tuned.states["on_fit_start"]
    assert_frozen(tuned.states["on_fit_end"], start, llama_path)
    hooks = {"validate": "on_validation_end", "test": "on_test_end", "predict": "on_predict_end"}
    before = tuned.cli.metrics()
    for command, hook in hooks.items():
        with recording(hook) as states:
            assert tuned.cli(command, tuned.run) == 0
        assert_frozen(states[hook], start, llama_path)
        assert states[hook].keys() == start.keys()
        assert all(torch.equal(tensor, tuned.states["on_fit_end"][name]) for name, tensor in states[hook].items())
    assert tuned.cli.metrics() == before


# ----------------------------------------------------------------------------------------------------------- prediction


def test_prompts_are_answered_in_the_files_order(tuned: Tuned, tmp_path: Path) -> None:
    prompts = [
        {"instruction": "Say w1 and then as much as you like.", "input": "3 times"},
        {"instruction": "Say w2."},
        {"instruction": "Say w3.", "input": "", "output": "w3"},
        {"instruction": "Say w4 please.", "input": "2 times"},
    ]
    predict_path = asking(tmp_path / "prompts.jsonl", prompts)
    assert tuned.cli("predict", tuned.run, predict_path) == 0
    rows = tuned.predictions()
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in prompts]
    assert [row.get("reference") for row in rows] == [None, None, "w3", None]
    assert all(row["response"] for row in rows)
    # the same prompts as messages and as CSV give the same responses
    contents = [f"{row['instruction']}\n\n{row.get('input', '')}".rstrip() for row in prompts]
    messages = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    # a reference, which is not part of the prompt
    messages[2]["messages"].append({"role": "assistant", "content": "w3"})
    assert tuned.cli("predict", tuned.run, asking(tmp_path / "messages.jsonl", messages)) == 0
    assert [row["response"] for row in tuned.predictions()] == [row["response"] for row in rows]
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input"])
        writer.writeheader()
        writer.writerows({key: row.get(key, "") for key in ("instruction", "input")} for row in prompts)
    assert tuned.cli("predict", tuned.run, f"--data.predict_path={tmp_path / 'prompts.csv'}") == 0
    assert [row["response"] for row in tuned.predictions()] == [row["response"] for row in rows]


def test_sampling_depends_on_the_seed(tuned: Tuned, tmp_path: Path) -> None:
    options = [tuned.run, asking(tmp_path / "prompts.jsonl", [{"instruction": f"Say w{i}."} for i in range(4)])]
    options += ["--model.generation.do_sample=true", "--model.generation.temperature=1.5"]
    predictions = []
    for seed in (1, 1, 2):
        assert tuned.cli("predict", *options, f"--seed_everything={seed}") == 0
        predictions.append(tuned.predictions())
    assert predictions[0] == predictions[1] != predictions[2]


def test_predict_uses_the_template_of_the_training(
    tuned: Tuned,
    instruction_cli: CommandLine,
    llama_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tuned.cli.checkpoint()
    tokenizers_template = AutoTokenizer.from_pretrained(llama_path).chat_template
    assert checkpoint["hyper_parameters"]["prompt_template"] == tokenizers_template
    assert checkpoint["datamodule_hyper_parameters"]["template"] == "chat"
    # train with another template than that of the configuration file; predict takes the checkpoint's template
    alpaca = ["--data.template=alpaca", "--data.max_length=400"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    assert instruction_cli("fit", *alpaca, *short) == 0
    template = instruction_cli.checkpoint()["hyper_parameters"]["prompt_template"]
    assert "### Response:" in template
    predict_path = asking(tmp_path / "prompts.jsonl", [{"instruction": "Say w1.", "input": "2 times"}])
    prompts: list[Tensor] = []
    capsys.readouterr()
    original = LanguageModel.generate

    def generate(self: LanguageModel, batch: dict[str, Any]) -> list[str]:
        prompts.append(batch["input_ids"])
        return original(self, batch)

    monkeypatch.setattr(LanguageModel, "generate", generate)
    assert instruction_cli("predict", "--ckpt_path=last", predict_path) == 0
    assert "data.template: alpaca from the checkpoint; the configuration file has chat." in capsys.readouterr().err
    text = AutoTokenizer.from_pretrained(llama_path).decode(prompts[0][0])
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nSay w1.\n\n### Input:\n2 times\n\n### Response:")


def test_an_export_generates_the_responses_of_predict(tuned: Tuned, tmp_path: Path) -> None:
    instructions = [f"Say w{i}." for i in range(5)]
    predict_path = asking(tmp_path / "prompts.jsonl", [{"instruction": text} for text in instructions])
    assert tuned.cli("predict", tuned.run, predict_path) == 0
    folder = tmp_path / "model"
    assert main(["export", str(tuned.cli.run()), "--format", "merged", "--output", str(folder)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tuned.cli.checkpoint()["hyper_parameters"]["prompt_template"]
    responses = []
    for text in instructions:
        batch = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**batch)  # with the generation settings of the export
        responses.append(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert [row["response"] for row in tuned.predictions()] == responses


# ------------------------------------------------------------------------------------------------------ multiple choice


@pytest.fixture
def asked_cli(tuned: Tuned, questions_path: Path) -> CommandLine:
    """Return the command line of multiple choice, with the root of the tuned run."""
    return CommandLine(tuned.cli.root, questions_path, "questions")


def assert_metrics_of_predictions(metrics: dict[str, float], rows: list[dict[str, str]]) -> None:
    accuracy = sum(row["prediction"] == row["answer"] for row in rows) / len(rows)
    assert metrics["test/acc"] == pytest.approx(accuracy, abs=1e-6)
    error = math.sqrt(accuracy * (1 - accuracy) / len(rows))
    assert metrics["test/acc_stderr"] == pytest.approx(error, abs=1e-6)
    for row in rows:
        scores = {letter: float(row[f"log_probability_{letter}"]) for letter in LETTERS}
        assert row["prediction"] == max(scores, key=scores.__getitem__)


def test_multiple_choice_on_a_tuned_run_and_on_the_backbone(
    tuned: Tuned, question_cli: CommandLine, asked_cli: CommandLine, questions_path: Path, llama_path: Path
) -> None:
    before = tuned.cli.metrics()
    for command in ("validate", "test", "predict"):
        assert asked_cli(command, tuned.run) == 0
        assert question_cli(command) == 0  # the backbone without a checkpoint
    assert not tuned.cli.run(1).exists()
    metrics, rows = tuned.cli.metrics(), read_table(tuned.cli.run())
    unrelated = {name: value for name, value in before.items() if not name.startswith(("val/", "test/", "gap/"))}
    assert unrelated and {name: metrics[name] for name in unrelated} == unrelated
    assert_metrics_of_predictions(metrics, rows)
    assert {"val/acc", "val/acc_stderr", "val/acc_stem", "test/subjects/astronomy"} <= metrics.keys()
    untuned_rows = read_table(question_cli.run(2))
    assert_metrics_of_predictions(question_cli.metrics(1), untuned_rows)
    assert "val/acc" in question_cli.metrics(0)
    questions = [json.loads(line) for line in (questions_path / "test.jsonl").read_text().splitlines()]
    for table in (rows, untuned_rows):
        assert [(row["index"], row["subject"], row["answer"]) for row in table] == [
            (str(i), row["subject"], LETTERS[row["answer"]]) for i, row in enumerate(questions)
        ]
    names = [f"log_probability_{letter}" for letter in LETTERS]
    assert torch.allclose(
        scores_of(untuned_rows, names), scores_by_transformers(llama_path, questions_path, questions), atol=1e-4
    )
    assert (scores_of(rows, names) - scores_of(untuned_rows, names)).abs().max() > 0.1


def scores_of(rows: list[dict[str, str]], names: list[str]) -> Tensor:
    return torch.tensor([[float(row[name]) for name in names] for row in rows])


@torch.no_grad()
def scores_by_transformers(backbone: Path, data: Path, rows: list[dict[str, Any]]) -> Tensor:
    """Return the log-probabilities of the letters after each prompt, computed by transformers one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(backbone), AutoTokenizer.from_pretrained(backbone)
    shots = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    letters = [tokenizer(f" {letter}")["input_ids"][-1] for letter in LETTERS]

    def text(row: dict[str, Any]) -> str:
        choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
        return "\n".join([row["question"], *choices, "Answer:"])

    scores = []
    for row in rows:
        examples = [shot for shot in shots if shot["subject"] == row["subject"]][:2]
        prompt = f"The following are multiple choice questions (with answers) about {row['subject']}.\n\n"
        prompt += "".join(f"{text(shot)} {LETTERS[shot['answer']]}\n\n" for shot in examples) + text(row)
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        scores.append(logits.log_softmax(-1)[letters])
    return torch.stack(scores)


def test_the_recipe_mmlu_evaluates_a_tuned_run(tuned: Tuned, asked_cli: CommandLine, questions_path: Path) -> None:
    options = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--data.path={questions_path}"]
    assert main(["test", "--config", "conf/mmlu.yaml", tuned.run, *options]) == 0
    assert 0 <= tuned.cli.metrics()["test/acc"] <= 1


def test_questions_without_answers_are_predicted(tuned: Tuned, asked_cli: CommandLine, tmp_path: Path) -> None:
    row = {"question": "Which is w1?", "subject": "astronomy", "choices": list("wxyz")}
    predict_path = asking(tmp_path / "questions.jsonl", [row, row | {"subject": "philosophy"}])
    assert asked_cli("predict", tuned.run, predict_path) == 0
    assert [(row["subject"], row["answer"]) for row in read_table(tuned.cli.run())] == [
        ("astronomy", ""),
        ("philosophy", ""),
    ]


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_evaluate_to_the_metrics_of_one(tuned: Tuned, asked_cli: CommandLine, tmp_path: Path) -> None:
    assert tuned.cli("validate", tuned.run) == 0
    assert asked_cli("test", tuned.run) == 0
    before = tuned.cli.metrics()
    path = tuned.cli.run() / "metrics.json"
    path.unlink()
    for cli, command in ((tuned.cli, "validate"), (asked_cli, "test")):
        run_on_two(cli.words(command, tuned.run), tmp_path)
    after = tuned.cli.metrics()
    path.write_text(json.dumps(before))
    assert {"val/loss", "val/token_acc", "test/acc", "test/acc_stderr", "test/subjects/astronomy"} <= after.keys()
    for name, value in after.items():
        assert value == pytest.approx(before[name], abs=1e-4), name
