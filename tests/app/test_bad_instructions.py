"""Bad input of instruction tuning and multiple choice: one message that says what, where and how to mend it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartForConditionalGeneration,
    BertForMaskedLM,
    BloomConfig,
    CTRLConfig,
    PreTrainedTokenizerFast,
)

from datamodules.text import TextData
from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused
from tests.backbones import CONFIGS, word_tokenizer
from tests.causal_backbones import POSITIONS, VOCABULARY, byte_tokenizer, save_decoder
from tests.conftest import instructions, questions, write_instructions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Rows = list[dict[str, Any]]
Damage = Callable[[Path], list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def write_rows(folder: Path, split: str, rows: Rows) -> Path:
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused_without_a_run(cli: CommandLine, capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    refused(capsys, code, *parts)
    assert not cli.run().exists()


# -------------------------------------------------------------------------------------------------------------- options

# refused once the configuration is kept: the batch with its loader, packing with the model's setup, the monitored name
# with the first validation
LATE = ("--data.batch_size=51", "--checkpoint.monitor", "--data.packing")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--model.bakbone=x", ["LanguageModel", "bakbone", "did you mean backbone"]),
        ("--model.adapter.ran=3", ["adapter.ran", "did you mean adapter.rank"]),
        ("--model.generation.num_beams=3", ["generation.num_beams", "max_new_tokens", "top_p"]),
        ("--model.generation.max_new=3", ["generation.max_new", "did you mean generation.max_new_tokens"]),
        ("--data.max_lenght=64", ["LanguageModelingData", "max_lenght", "did you mean max_length"]),
        ("--model.tuning=head", ["model", "tuning", "'adapter', 'full'", "head"]),
        ("--model.tuning=full --model.backbone_dtype=bfloat16", ["model.backbone_dtype", "bfloat16", "use float32"]),
        ("--model.learning_rate=1e39", ["model.learning_rate", "finite", "above 0"]),
        ("--model.generation.max_new_tokens=512", ["model.generation.max_new_tokens", "512", "no room for a prompt"]),
        ("--model.generation.max_new_tokens=0", ["model.generation.max_new_tokens", "0", "1 or more"]),
        ("--model.generation.temperature=0", ["model.generation.temperature", "above 0", "do_sample: false"]),
        ("--model.generation.top_p=2", ["model.generation", "top_p 2.0", "(0, 1]"]),
        ("--model.generation.top_k=-1", ["model.generation", "top_k -1", "negative"]),
        ("--model.adapter.targets=[fc1]", ["adapter.targets", "fc1", "mlp_gate"]),
        ("--model.adapter.rank=17", ["adapter.rank", "17", "v_proj", "16 × 32"]),
        ("--model.backbone_args={hiden_size: 1}", ["model.backbone_args", "hiden_size", "hidden_size"]),
        ("--model.backbone=/nowhere/model.gguf", ["model.backbone", "/nowhere/model.gguf", "no file"]),
        ("--model.backbone=some/hub-name/model.gguf", ["model.backbone", "some/hub-name/model.gguf", "connection"]),
        ("--data.template=vicuna", ["data", "template", "'alpaca', 'chat'", "vicuna"]),
        ("--data.max_length=513", ["data.max_length", "513", "512", "positions"]),
        ("--data.max_length=15", ["data.max_length", "15", "16 or more"]),
        (
            "--data.instruction_column=prompt",
            ["data.instruction_column", "train.jsonl", "prompt", "instruction, input"],
        ),
        (
            "--data.response_column=answer",
            ["data.response_column", "train.jsonl", "answer", "instruction, input, outp"],
        ),
        ("--data.input_column=context", ["data.input_column", "train.jsonl", "context", "instruction, input, output"]),
        ("--data.batch_size=51", ["data.batch_size", "50", "51", "smaller"]),
        ("--data.packing=true --data.batch_size=50", ["packs", "smaller batch"]),
        ("--checkpoint.monitor=val/rougeL", ["val/rougeL", "val/perplexity"]),
    ],
)
def test_wrong_value(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], options: str, parts: list[str]
) -> None:
    words = options.replace(" --", "\n--").split("\n")
    refused(capsys, instruction_cli("fit", *words), *parts)
    assert instruction_cli.run().exists() is options.startswith(LATE)


@pytest.mark.parametrize(
    ("group", "key", "hint"),
    [
        ("generation", "num_beams", "There are generation.max_new_tokens"),
        ("adapter", "rnk", "did you mean adapter.rank"),
    ],
)
def test_unknown_key_in_a_file(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, group: str, key: str, hint: str
) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {group: {key: 3}}}}))
    code = instruction_cli("fit", "--config", str(tmp_path / "more.yaml"))
    refused_without_a_run(instruction_cli, capsys, code, "LanguageModel", f"{group}.{key}", hint)


def test_the_model_is_checked_before_any_data_is_read(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(TextData, "setup", read)
    refused(capsys, instruction_cli("fit", "--model.generation.top_p=0"), "top_p")


# ----------------------------------------------------------------------------------------------------------------- data


def turns(*messages: tuple[str, str | None]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


TALK = turns(("user", "Say w1."), ("assistant", "w1"))


def empty_response(folder: Path) -> list[str]:
    write_rows(folder, "train", [row | ({"output": " "} if i == 7 else {}) for i, row in enumerate(instructions(20))])
    write_rows(folder, "validation", instructions(6))
    return ["data.response_column", "row 7 of", "train.jsonl", "no response", "empty_responses skip"]


def empty_response_of_held_out_rows(folder: Path) -> list[str]:
    # row 7 of the file, whichever row it is of those that are left to train or held out
    write_rows(folder, "train", [row | ({"output": ""} if i == 7 else {}) for i, row in enumerate(instructions(20))])
    return ["data.response_column", "row 7 of", "train.jsonl"]


def response_of_a_mark_alone(folder: Path) -> list[str]:
    rows = [row | ({"output": "<|endoftext|>"} if i == 3 else {}) for i, row in enumerate(instructions(20))]
    write_rows(folder, "train", rows)
    return ["data.response_column", "row 3 of", "no response"]


def nothing_but_empty_responses(folder: Path) -> list[str]:
    write_rows(folder, "train", [row | {"output": ""} for row in instructions(20)])
    return ["data.response_column", "train.jsonl", "no response"]


def empty_instruction(folder: Path) -> list[str]:
    write_rows(folder, "train", [*instructions(20), {"instruction": None, "input": "", "output": "w1"}])
    return ["data.instruction_column", "row 20 of", "train.jsonl", "no text in column instruction"]


def unknown_role(folder: Path) -> list[str]:
    write_rows(folder, "train", [TALK] * 8 + [turns(("tool", "Say w1."), ("assistant", "w1"))])
    return ["data.messages_column", "row 8 of", "train.jsonl", "system, user, assistant", "tool"]


def message_without_content(folder: Path) -> list[str]:
    write_rows(folder, "train", [TALK] * 8 + [turns(("user", None), ("assistant", "w1"))])
    return ["data.messages_column", "row 8 of", "train.jsonl", "content"]


def no_messages(folder: Path) -> list[str]:
    write_rows(folder, "train", [TALK] * 8 + [turns()])
    return ["data.messages_column", "row 8 of", "train.jsonl"]


def messages_as_text(folder: Path) -> list[str]:
    write_rows(folder, "train", [{"messages": "Say w1."}] * 8)
    return ["data.messages_column", "train.jsonl", "list of messages", "Say w1."]


def nobody_answers(folder: Path) -> list[str]:
    write_rows(folder, "train", [TALK] * 8 + [turns(("user", "Say w1."))])
    return ["data.messages_column", "row 8 of", "train.jsonl", "no response"]


@pytest.mark.parametrize(
    "damage",
    [
        empty_response,
        empty_response_of_held_out_rows,
        response_of_a_mark_alone,
        nothing_but_empty_responses,
        empty_instruction,
        unknown_role,
        message_without_content,
        no_messages,
        messages_as_text,
        nobody_answers,
    ],
)
def test_damaged_data(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, damage: Damage
) -> None:
    parts = damage(folder)
    code = instruction_cli("fit", f"--data.path={folder}", "--data.val_fraction=0.2", "--data.batch_size=2")
    refused_without_a_run(instruction_cli, capsys, code, *parts)


def test_empty_responses_are_all_there_is(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    nothing_but_empty_responses(folder)
    code = instruction_cli("fit", f"--data.path={folder}", "--data.empty_responses=skip")
    refused_without_a_run(instruction_cli, capsys, code, "data.path", "train.jsonl", "no row with a response")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("nothing.jsonl", None, ["nothing.jsonl", "no file"]),
        ("rows.txt", "Say w1.", ["rows.txt", ".jsonl"]),
        ("rows.jsonl", "", ["rows.jsonl", "empty file"]),
        ("rows.csv", "instruction\n", ["rows.csv", "no rows"]),
        ("rows.jsonl", "Say w1.\nSay w2.\n", ["rows.jsonl", "cannot be read", "json"]),
        ("rows.jsonl", '{"question": "w1"}\n', ["data.instruction_column", "rows.jsonl", "it has question"]),
        ("rows.csv", "instruction,input\n,w1\n,w2\n", ["data.instruction_column", "rows.csv", "is empty in every row"]),
        (
            "rows.jsonl",
            json.dumps(turns(("tool", "w1"))) + "\n",
            ["data.messages_column", "row 0 of", "rows.jsonl", "system, user, assistant", "tool"],
        ),
        ("rows.jsonl", json.dumps(turns(("assistant", "w1"))) + "\n", ["row 0 of", "rows.jsonl", "user"]),
        ("rows.jsonl", json.dumps(turns(("system", "w1"))) + "\n", ["row 0 of", "rows.jsonl", "user"]),
    ],
)
def test_prompts_that_cannot_be_read(
    instruction_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    content: str | None,
    parts: list[str],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    code = instruction_cli("predict", f"--data.predict_path={path}")
    refused_without_a_run(instruction_cli, capsys, code, "data.", *parts)


# ------------------------------------------------------------------------------------------------------------- backbone


def no_chat_template(path: Path) -> list[str]:
    for file in path.glob("chat_template*"):
        file.unlink()
    byte_tokenizer(chat_template=None).save_pretrained(path)
    return ["data.template", "no chat template", "alpaca"]


def broken_chat_template(path: Path) -> list[str]:
    byte_tokenizer(chat_template="{% for message in messages %}{{ message").save_pretrained(path)
    return ["data.template", "chat template"]


def tokenizer_of_a_larger_model(path: Path) -> list[str]:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(path)
    return ["model.backbone", str(path), f"{len(VOCABULARY) + 1} tokens", f"{len(VOCABULARY)} embeddings"]


def tokenizer_without_an_end(path: Path) -> list[str]:
    byte_tokenizer(eos_token=None).save_pretrained(path)
    return ["model.backbone", str(path), "eos_token", "tokenizer_config.json"]


def no_tokenizer(path: Path) -> list[str]:
    for file in path.glob("tokenizer*"):
        file.unlink()
    return ["model.backbone", str(path), "tokenizer", "beside config.json"]


def no_output_layer(path: Path) -> list[str]:
    save_decoder(path, tie_word_embeddings=False)
    state = load_file(path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return ["model.weights", str(path), "lm_head.weight"]


def truncated_weights(path: Path) -> list[str]:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    return ["model.weights", str(path), "could not be loaded", "model.safetensors"]


def encoder(path: Path) -> list[str]:
    shutil.rmtree(path)
    BertForMaskedLM(CONFIGS["bert"]).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return ["model.backbone", str(path), "bert", "Choose a decoder"]


def encoder_and_decoder(path: Path) -> list[str]:
    shutil.rmtree(path)
    BartForConditionalGeneration(CONFIGS["bart"]).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return ["model.backbone", str(path), "is a bart", "no model for CausalLM", "Choose another"]


@pytest.mark.parametrize(
    "damage",
    [
        no_chat_template,
        broken_chat_template,
        tokenizer_of_a_larger_model,
        tokenizer_without_an_end,
        no_tokenizer,
        no_output_layer,
        truncated_weights,
        encoder,
        encoder_and_decoder,
    ],
)
def test_damaged_backbone(
    instruction_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    llama_path: Path,
    tmp_path: Path,
    damage: Damage,
) -> None:
    path = shutil.copytree(llama_path, tmp_path / "backbone")
    parts = damage(path)
    words = [f"--model.backbone={path}", "--model.backbone_args={}", "--data.max_length=64"]
    refused_without_a_run(instruction_cli, capsys, instruction_cli("fit", *words), *parts)


def test_gguf_that_cannot_be_read(
    instruction_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(40))
    words = ["fit", f"--model.backbone={path}", "--model.backbone_args={}"]
    refused_without_a_run(instruction_cli, capsys, instruction_cli(*words), "model.backbone", str(path), "GGUF")
    path.unlink()
    refused_without_a_run(instruction_cli, capsys, instruction_cli(*words), "model.backbone", str(path), "no file")
    monkeypatch.setattr("modules.backbones.gguf.is_gguf_available", lambda: False)
    refused_without_a_run(instruction_cli, capsys, instruction_cli(*words), "model.backbone", "pip install gguf")


SMALL = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
OTHERS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(hidden_size=32, n_layer=1, n_head=2, **SMALL),
    "ctrl": CTRLConfig(n_positions=POSITIONS, n_embd=32, dff=64, n_layer=1, n_head=2, **SMALL),
}


@pytest.mark.parametrize(
    ("kind", "option", "parts"),
    [
        ("bloom", "--data.packing=true", ["data.packing", "BloomForCausalLM", "Set the key to false"]),
        (
            "ctrl",
            "--model.gradient_checkpointing=true",
            ["model.gradient_checkpointing", "CTRL", "Set the key"],
        ),
    ],
)
def test_what_a_backbone_cannot_do(
    instruction_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    option: str,
    parts: list[str],
) -> None:
    monkeypatch.setattr("tests.causal_backbones.CONFIGS", OTHERS)
    path = save_decoder(tmp_path / kind, kind)
    words = [f"--model.backbone={path}", "--model.backbone_args={}", "--model.tuning=full"]
    refused(capsys, instruction_cli("fit", *words, option), *parts)
    assert instruction_cli.run().exists() is option.startswith(LATE)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_of_another_model(
    fitted_instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli = fitted_instruction_cli
    other = save_decoder(tmp_path / "other", seed=1)
    before = (cli.run() / "checkpoints" / "last.ckpt").read_bytes()
    for command, option, *parts in (
        ("fit", "model.adapter.rank=2", "of another shape", "is (4, 32), not (2, 32)", "config.yaml"),
        ("predict", "model.adapter.targets=[query, value, key]", "missing", "adapters.key.A"),
        ("test", "model.tuning=full", "model.tuning", "with tuning adapter"),
        ("validate", f"model.backbone={other}", "other frozen weights", "model.backbone"),
        ("predict", "model.backbone_dtype=bfloat16", "other frozen weights", "model.backbone_dtype"),
        ("fit", "data.template=alpaca", "data.template", "another prompt template", "Set data.template"),
        ("predict", "data.template=alpaca", "data.template", "another prompt template", "Set data.template"),
    ):
        refused(capsys, cli(command, "--ckpt_path=last", f"--{option}"), *parts)
    assert (cli.run() / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not cli.run(1).exists()


def test_checkpoint_of_another_task(
    fitted_summary_cli: CommandLine,
    instruction_cli: CommandLine,
    question_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = f"--ckpt_path={fitted_summary_cli.run()}"
    for cli, command in ((instruction_cli, "fit"), (instruction_cli, "predict"), (question_cli, "test")):
        refused(capsys, cli(command, run), "ckpt_path", "Summarizer", "LanguageModel", "config.yaml")


# ------------------------------------------------------------------------------------------------------ multiple choice


def no_shots(folder: Path) -> list[str]:
    write_rows(folder, "test", questions(4))
    return ["data.shots_split", str(folder), "no dev split", "data.shots"]


def too_few_shots(folder: Path) -> list[str]:
    write_rows(folder, "dev", questions(3))
    write_rows(folder, "test", questions(4))
    return ["data.shots", "dev.jsonl", "1 questions of philosophy for 2 shots"]


def no_questions(folder: Path) -> list[str]:
    write_rows(folder, "dev", questions(10))
    return ["data.path", str(folder), "no test split"]


def damaged_questions(folder: Path, **damage: Any) -> None:
    write_rows(folder, "dev", questions(10))
    write_rows(folder, "test", [*questions(4), questions(1)[0] | damage])


def answer_out_of_range(folder: Path) -> list[str]:
    damaged_questions(folder, answer=4)
    return ["data.answer_column", "test.jsonl", "from 0 to 3", "row 4 of", "has 4"]


def hidden_answer(folder: Path) -> list[str]:
    damaged_questions(folder, answer=-1)
    return ["data.answer_column", "test.jsonl", "from 0 to 3", "row 4 of", "has -1"]


def fewer_choices(folder: Path) -> list[str]:
    damaged_questions(folder, choices=["w", "x", "y"])
    return ["data.choices_column", "test.jsonl", "as many in each row", "row 4 of", "has ['w', 'x', 'y']"]


def no_choices(folder: Path) -> list[str]:
    write_rows(folder, "dev", questions(10))
    write_rows(folder, "test", [{k: v for k, v in row.items() if k != "choices"} for row in questions(4)])
    return ["data.choices_column", "test.jsonl", "no column choices", "question, subject, answer"]


def long_question(folder: Path) -> list[str]:
    damaged_questions(folder, question="w " * POSITIONS)
    return ["data.max_length", "astronomy", "without a shot", str(POSITIONS), "data.subjects"]


@pytest.mark.parametrize(
    "damage",
    [
        no_shots,
        too_few_shots,
        no_questions,
        answer_out_of_range,
        hidden_answer,
        fewer_choices,
        no_choices,
        long_question,
    ],
)
def test_damaged_questions(
    question_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, damage: Damage
) -> None:
    parts = damage(folder)
    refused_without_a_run(question_cli, capsys, question_cli("test", f"--data.path={folder}"), *parts)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("shots=-1", ["data.shots", "-1", "negative"]),
        ("shots=many", ["data", "shots", "int", "many"]),
        ("shots_split=test", ["data.shots_split", "test.jsonl", "among the questions"]),
        ("subjects=[anatomy]", ["data.subjects", "anatomy", "astronomy, philosophy"]),
        ("max_length=513", ["data.max_length", "513", "512"]),
        ("max_length=50", ["data.max_length", "50"]),
        ("answer_column=target", ["data.answer_column", "no column target"]),
        ("templat=chat", ["MultipleChoiceData", "templat"]),
        ("predict_path=rows.txt", ["data.predict_path", "rows.txt"]),
    ],
)
def test_wrong_value_for_questions(
    question_cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str, parts: list[str]
) -> None:
    command = "predict" if option.startswith("predict_path") else "test"
    refused_without_a_run(question_cli, capsys, question_cli(command, f"--data.{option}"), *parts)


def test_letters_of_several_tokens(
    question_cli: CommandLine, capsys: pytest.CaptureFixture[str], llama_path: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(llama_path, tmp_path / "backbone")
    tokenizer = Tokenizer(models.BPE(VOCABULARY, [], unk_token="<unk>"))  # ` A` is a space and an A
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(path)
    code = question_cli("test", f"--model.backbone={path}")
    refused_without_a_run(question_cli, capsys, code, "tokenizer", "one token", "A to D", "another backbone")


def test_questions_are_no_training_data(question_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    refused_without_a_run(
        question_cli, capsys, question_cli("fit"), "MultipleChoiceData", "no training rows", "LanguageModelingData"
    )


def test_a_run_is_not_resumed_on_questions(
    question_cli: CommandLine, fitted_instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    code = question_cli("fit", f"--ckpt_path={fitted_instruction_cli.run()}")
    refused(capsys, code, "ckpt_path", "LanguageModelingData", "MultipleChoiceData", "config.yaml")


# ----------------------------------------------------------------------------------------------------------- in the run


def test_a_run_that_diverges_saves_nothing(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    data = write_instructions(folder, {"train": 30})
    code = instruction_cli("fit", f"--data.path={data}", "--model.learning_rate=1e37", "--trainer.max_epochs=1")
    refused(capsys, code, "at step", "were not saved", "learning_rate")
    assert not list(instruction_cli.run().rglob("*.ckpt"))
