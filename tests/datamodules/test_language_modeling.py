"""Instructions and chats: tokens in the loss, packs, prompts to predict, and bad rows."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from datamodules.errors import DataError
from datamodules.language_modeling import LanguageModelingData
from datamodules.tokens.conversations import ALPACA
from tests.causal_backbones import CHAT, byte_tokenizer
from tests.support.data import put, set_up
from tests.support.refusals import refuses
from tests.support.rows import write_rows
from tests.support.trainers import stub_trainer, text_model

Row = dict[str, Any]
SIZES = {"train": 24, "validation": 7, "test": 5}
TOKENIZER = byte_tokenizer()
# a template that refuses some conversations, as the templates of several models do
STRICT = (
    "{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}" + CHAT
)


def row_of(split: str, i: int) -> Row:
    """Return a row of Alpaca's columns that names its split and number. Lengths differ; every second input is empty."""
    output = f"{split} {i}" + " yes" * (i * 5 % 7)
    return {"instruction": f"Do {i}" + "!" * (i * 7 % 11), "input": "" if i % 2 else f"it {i}", "output": output}


def chat_of(row: Row) -> list[Row]:
    """Return the same row as messages."""
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return turns(question, row["output"])


def turns(*contents: Any) -> list[Row]:
    """Return messages of a user and an assistant in turn."""
    return [{"role": ["user", "assistant"][i % 2], "content": content} for i, content in enumerate(contents)]


def rows_of(split: str, size: int | None = None) -> list[Row]:
    return [row_of(split, i) for i in range(SIZES[split] if size is None else size)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in SIZES:
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows_of(split))
    return tmp_path / "data"


def prepared(path: Path, stage: str = "fit", *, model: Any = None, **keys: Any) -> Any:
    return set_up(LanguageModelingData(str(path), **{"batch_size": 4, **keys}), model or text_model(TOKENIZER), stage)


def dataset_of(path: Path, rows: list[Row], **keys: Any) -> Any:
    """Return the data set of a test split with these rows."""
    return prepared(write_rows(path / "rows" / "test.jsonl", rows).parent, "test", **keys).splits["test"][0]


def texts(dataset: Any, column: str = "input_ids") -> list[str]:
    return [TOKENIZER.decode([t for t in ids if t != -100]) for ids in dataset.data[column]]


# -------------------------------------------------------------------------------------------------------------- tokens


def alpaca(row: Row) -> str:
    """Return Alpaca's prompt of a row."""
    input_section = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    input_hint = ", paired with an input that provides further context" if row["input"] else ""
    return (
        f"Below is an instruction that describes a task{input_hint}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{row['instruction']}\n\n{input_section}### Response:"
    )


def test_alpacas_columns_fill_alpacas_template(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, rows_of("test"))
    assert texts(dataset) == [f"{alpaca(row)}{row['output']}<|im_end|>" for row in rows_of("test")]
    assert texts(dataset, "labels") == [f"{row['output']}<|im_end|>" for row in rows_of("test")]
    for ids, labels in zip(dataset.data["input_ids"], dataset.data["labels"], strict=True):
        masked = labels.count(-100)
        assert labels == [-100] * masked + ids[masked:]


@pytest.mark.parametrize("stored", ["columns", "messages", "ShareGPT"])
def test_the_tokenizers_own_chat_template(tmp_path: Path, stored: str) -> None:
    rows = rows_of("test")
    made = {
        "columns": lambda row: row,
        "messages": lambda row: {"messages": chat_of(row), "instruction": "x", "id": 3},
        "ShareGPT": lambda row: {
            "conversations": [
                {"from": {"user": "human", "assistant": "chatgpt"}[m["role"]], "value": m["content"]}
                for m in chat_of(row)
            ]
        },
    }[stored]
    dataset = dataset_of(tmp_path, [made(row) for row in rows], template="chat")
    expected = [TOKENIZER.apply_chat_template(chat_of(row), return_dict=False) for row in rows]
    assert dataset.data["input_ids"][:] == expected
    assert texts(dataset, "labels") == [f"{row['output']}<|im_end|>" for row in rows]


def test_the_loss_covers_every_response_of_a_chat_and_no_prompt(tmp_path: Path) -> None:
    named = [{"talk": [{"role": "system", "content": "S"}, *turns("Hi", "Yo", "Why?", "So", "And?")]}]
    dataset = dataset_of(tmp_path, named, template="chat", messages_column="talk", system_prompt="not this")
    assert texts(dataset, "labels") == ["Yo<|im_end|>So<|im_end|>"]
    assert texts(dataset)[0].startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")
    assert "And?" not in texts(dataset)[0]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_the_system_prompt_precedes_the_question(tmp_path: Path, template: str) -> None:
    (text,) = texts(dataset_of(tmp_path, rows_of("test", 1), template=template, system_prompt="Be brief."))
    begins = {"alpaca": "Be brief.\n\n### Instruction:\nDo", "chat": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_st"}
    assert text.startswith(begins[template])


def test_the_default_template_of_several_is_used() -> None:
    def template(of_tokenizer: Any, name: Any = "chat") -> str:
        data = LanguageModelingData("somewhere", template=name)
        data.trainer = stub_trainer(lightning_module=text_model(byte_tokenizer(of_tokenizer)))
        return data.prompt_template

    assert template({"tool_use": "{{ 1 }}", "default": CHAT}) == CHAT
    for none in (None, {"tool_use": "{{ 1 }}"}):
        assert template(none, "alpaca") == ALPACA
        with refuses("data.template: the backbone's tokenizer has no chat template. Use template: alpaca"):
            template(none)


def test_end_marks_are_removed(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "", "output": text} for text in ("b<|endoftext|>", " b ", "b END")]
    assert texts(dataset_of(tmp_path, rows), "labels") == ["b<|im_end|>", " b <|im_end|>", "b END<|im_end|>"]
    others = texts(dataset_of(tmp_path, rows, end_mark="END"), "labels")
    assert others == ["b<|endoftext|><|im_end|>", " b <|im_end|>", "b<|im_end|>"]


def test_special_tokens_in_texts_are_removed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of("test", 3), {"instruction": "a", "input": "<unk>b", "output": "c<|im_end|>d<|im_start|>"}]
    dataset = dataset_of(tmp_path, rows)
    assert texts(dataset, "labels")[3] == "cd<|im_end|>"
    assert dataset.data["labels"][3].count(TOKENIZER.eos_token_id) == 1
    where = tmp_path / "rows/test.jsonl"
    log = capsys.readouterr().err.splitlines()
    assert f"warning: Special tokens of the tokenizer are removed from 1 row of {where}." in log


def test_long_conversations_keep_their_response(tmp_path: Path) -> None:
    rows = [{"instruction": "a" * n, "input": "", "output": "b" * k} for n, k in ((300, 20), (1, 300), (1, 1))]
    dataset = dataset_of(tmp_path, rows, template="chat", max_length=64)
    assert dataset.lengths.tolist()[:2] == [64, 64]
    assert texts(dataset, "labels") == ["b" * 20 + "<|im_end|>", "b" * 44, "b<|im_end|>"]
    assert texts(dataset)[0].endswith("a<|im_end|>\n<|im_start|>assistant\n" + "b" * 20 + "<|im_end|>\n")
    assert texts(dataset)[0].startswith("<|im_start|>user\naaa")


@pytest.mark.parametrize("nothing", [None, "", "no column"])
def test_inputs_may_be_missing(tmp_path: Path, nothing: Any) -> None:
    rows: list[Row] = [{"instruction": "a", "input": nothing, "output": "b"}] * 2
    rows = [{k: v for k, v in row.items() if v != "no column"} for row in rows]
    expected = [alpaca({"instruction": "a", "input": ""}) + "b<|im_end|>"] * 2
    assert texts(dataset_of(tmp_path, rows)) == expected
    some = [{"instruction": "a", "input": "c", "output": "b"}, *rows]
    assert texts(dataset_of(tmp_path / "some", some))[1:] == expected
    table = put(tmp_path / "csv/test.csv", "instruction,input,output\n" + "a,,b\n" * 2)
    assert texts(prepared(table.parent, "test").splits["test"][0]) == expected


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"q": r["instruction"], "c": r["input"], "a": r["output"], "input": "x"} for r in rows_of("test")]
    keys = {"instruction_column": "q", "response_column": "a"}
    named = texts(dataset_of(tmp_path, rows, **keys, input_column="c"))
    assert named == [f"{alpaca(row)}{row['output']}<|im_end|>" for row in rows_of("test")]
    without = texts(dataset_of(tmp_path, rows, **keys, input_column=None))
    assert without == [f"{alpaca({**row, 'input': ''})}{row['output']}<|im_end|>" for row in rows_of("test")]


def test_guessed_columns_are_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows/test.jsonl", [{"question": "a", "answer": "b"}])
    lines = prepared(file.parent, "test").findings.take_lines()
    for key, column, default in (("instruction", "question", "instruction"), ("response", "answer", "output")):
        line = f"data.{key}_column: the column {column} of {file} is read, since there is no column {default}"
        assert line in lines


@pytest.mark.parametrize("name", ["instruction", "labels", "input_ids", "length"])
def test_a_response_column_may_have_any_name(tmp_path: Path, name: str) -> None:
    rows = [{"instruction": "a", name: f"b{i}"} for i in range(3)]
    dataset = dataset_of(tmp_path, rows, response_column=name)
    assert texts(dataset, "labels") == [f"b{i}<|im_end|>" for i in range(3)]
    instruction = "b1" if name == "instruction" else "a"  # one column may be instruction and response
    assert texts(dataset)[1] == alpaca({"instruction": instruction, "input": ""}) + "b1<|im_end|>"


# ------------------------------------------------------------------------------------------------------------- packing


def sequences(batch: dict[str, Any]) -> list[tuple[str, str]]:
    """Return each sequence in a batch of packs: its text and its part in the loss."""
    learnt_sequences = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in pairwise(starts):
            assert positions[a:b].tolist() == list(range(b - a))
            learnt = labels[a:b] != -100
            if learnt.any():
                learnt_sequences.append((TOKENIZER.decode(ids[a:b]), TOKENIZER.decode(labels[a:b][learnt])))
            else:
                assert set(ids[a:b].tolist()) == {TOKENIZER.pad_token_id}  # padding at the end of a pack
    return learnt_sequences


PACKED: Row = {"packing": True, "template": "chat"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_packs_have_complete_conversations(folder: Path, num_workers: int) -> None:
    data = prepared(folder, **PACKED, max_length=200, batch_size=2, num_workers=num_workers)
    batches = list(data.train_dataloader())
    assert all(set(batch) == {"input_ids", "labels", "position_ids"} for batch in batches)
    assert all(batch["input_ids"].shape[1] <= 200 for batch in batches)
    packed = [sequence for batch in batches for sequence in sequences(batch)]
    known = {
        TOKENIZER.apply_chat_template(chat_of(row), tokenize=False): f"{row['output']}<|im_end|>"
        for row in rows_of("train")
    }
    assert all(known[text] == learnt for text, learnt in packed)
    assert len(set(packed)) == len(packed) > 3 * sum(len(batch["input_ids"]) for batch in batches) / 2
    assert "attention_mask" in next(iter(data.val_dataloader()[0]))  # evaluation does not pack
    with refuses("data.packing: 24 conversations in", "packs of 400 tokens cannot fill one batch of 16 for 1 process"):
        prepared(folder, **PACKED, max_length=400, batch_size=16).train_dataloader()


def test_training_with_packs_resumes_in_the_middle_of_an_epoch(folder: Path) -> None:
    keys = {**PACKED, "max_length": 150, "batch_size": 1}
    data, model = prepared(folder, **keys), text_model(TOKENIZER)
    all_batches = list(data.train_dataloader())
    data.trainer = stub_trainer(lightning_module=model, batches_done=3, epoch_batches=len(all_batches))
    resumed = LanguageModelingData(str(folder), **keys)
    resumed.load_state_dict(data.state_dict())
    remaining = list(set_up(resumed, model).train_dataloader())
    assert len(remaining) == len(all_batches) - 3 > 2
    for one, other in zip(remaining, all_batches[3:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in all_batches[0])


# ---------------------------------------------------------------------------------------------------------- prediction


def completed(data: Any) -> list[Row]:
    indices = [i for batch in data.predict_dataloader()[0] for i in batch["index"].tolist()]
    return [data.complete_prediction({"index": i, "response": f"r{i}"}, 0) for i in sorted(indices)]


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_prompts_to_predict_are_padded_on_the_left(folder: Path, bucket_by_length: bool) -> None:
    data = prepared(folder, "predict", bucket_by_length=bucket_by_length)
    prompts = {}
    for batch in data.predict_dataloader()[0]:
        assert batch["attention_mask"][:, -1].all()
        for ids, mask, index in zip(batch["input_ids"], batch["attention_mask"], batch["index"].tolist(), strict=True):
            assert mask.tolist() == sorted(mask.tolist())
            prompts[index] = TOKENIZER.decode(ids[mask.bool()])
    assert prompts == {i: alpaca(row) for i, row in enumerate(rows_of("test"))}
    assert data.prediction_files == ("predictions.csv",)
    expected = [{**row, "response": f"r{i}", "reference": row["output"]} for i, row in enumerate(rows_of("test"))]
    assert completed(data) == [
        {"index": i} | {k: v for k, v in row.items() if k != "output"} for i, row in enumerate(expected)
    ]


def test_predict_replaces_the_last_response_of_a_chat(tmp_path: Path) -> None:
    question = turns("Hi", "Yo", "?")
    rows = [{"messages": [*question, {"role": "assistant", "content": "So<|endoftext|>"}]}, {"messages": question}]
    path = write_rows(tmp_path / "new.jsonl", rows)
    data = prepared(tmp_path, "predict", predict_path=str(path), template="chat")
    prompt = TOKENIZER.apply_chat_template(question, return_dict=False, add_generation_prompt=True)
    assert data.splits["predict"][0].data["input_ids"][:] == [prompt, prompt]
    assert completed(data) == [
        {"index": 0, "messages": question, "response": "r0", "reference": "So"},
        {"index": 1, "messages": question, "response": "r1"},
    ]


def test_other_columns_of_a_file_to_predict_are_kept_unless_predict_writes_them(tmp_path: Path) -> None:
    rows = {"instruction": ["a"], "index": [7], "response": ["x"], "reference": ["y"], "day": ["2026-01-02"]}
    table = datasets.Dataset.from_dict(rows)
    table.cast_column("day", datasets.Value("date32")).to_parquet(tmp_path / "new.parquet")
    (row,) = completed(prepared(tmp_path, "predict", predict_path=str(tmp_path / "new.parquet")))
    assert row == {"index": 0, "instruction": "a", "reference": "y", "day": "2026-01-02", "response": "r0"}
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("output", [None, "", "no column", 3])
def test_references_are_not_needed_for_prediction(tmp_path: Path, output: Any) -> None:
    row = {"instruction": "a" * 900, "input": None, "output": output}
    path = write_rows(tmp_path / "new.jsonl", [{k: v for k, v in row.items() if v != "no column"}])
    data = prepared(tmp_path, "predict", predict_path=str(path), max_length=100)
    (row,) = completed(data)
    assert (row["response"], row.get("reference")) == ("r0", 3 if output == 3 else None)
    (text,) = texts(data.splits["predict"][0])  # the middle of the prompt is cut
    assert data.splits["predict"][0].lengths.tolist() == [100]
    assert text.startswith("Below is") and text.endswith("aaa\n\n### Response:")


# ----------------------------------------------------------------------------------------------------------- bad input

GOOD = {"messages": turns("Hi", "Yo")}
ROLE = "must have `role`"
BAD_CHATS: dict[str, tuple[Any, str]] = {
    "nothing": ([], "has no response to learn"),
    "a system message": ([{"role": "system", "content": "S"}], "has no response to learn"),
    "no response": (turns("Hi"), "has no response to learn"),
    "a response of None": (turns("Hi", None), "has no response to learn"),
    "an empty response before another": (turns("Hi", "", "Why?", "So"), "has no response to learn"),
    "an empty question": (turns(" ", "c"), "has an empty message of a user"),
    "an assistant first": ([{"role": "assistant", "content": "a"}, *turns("b", "c")], "begins with the assistant"),
    "two users": ([*turns("a"), *turns("b", "c")], "roles must alternate"),
    "a system in the middle": ([*turns("a"), {"role": "system", "content": "b"}, *turns("c", "d")], "must alternate"),
    "no role": ([{"content": "Hi"}], "must have `role` (system, user, assistant) and text as `content`, or ShareGPT's"),
    "a tool": ([*turns("a"), {"role": "tool", "content": "b"}], ROLE),
    "an observation": ([{"from": "observation", "value": "Hi"}], ROLE),
    "a user of None": (turns(None, "Yo"), ROLE),
    "a number": (turns("Hi", 3), "the message is {'role': 'assistant', 'content': 3}"),
    "parts": (turns([{"type": "text", "text": "Hi"}]), "text as `content`"),
    "texts": (["Hi", "Yo"], "the message is Hi"),
    "a text": ("Hi", "must be a list of messages, not Hi"),
    "JSON": ('[{"role": "user", "content": "Hi"}]', "must be a list of messages"),
    "no cell": (None, "must be a list of messages, not None"),
    "one message": (turns("Hi")[0], "must be a list of messages"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_is_refused_or_skipped(tmp_path: Path, case: str) -> None:
    chat, message = BAD_CHATS[case]
    keys = {"model": text_model(byte_tokenizer(STRICT)), "template": "chat", "max_length": 64}
    mixed = isinstance(chat, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str | None) for m in chat
    )
    # a Parquet or JSON column has one type, so some cells cannot stand beside valid rows
    rows = [GOOD, {"messages": chat}, GOOD] if mixed else [{"messages": chat}]
    bad = int(mixed)
    with refuses("data.", f"row {bad} of", "test.jsonl", message):
        dataset_of(tmp_path, rows, **keys)
    if not mixed:
        with refuses("data.messages_column:", "row 0", "holds no conversation in column messages: ", message):
            prepared(tmp_path / "rows", "predict", **keys)
        return
    for _ in range(2):  # the second time from the cache of tokens
        data = prepared(tmp_path / "rows", "test", skip_bad_rows=1, **keys)
        assert [(row.split, row.row) for row in data.findings.skipped] == [("test", "row 1")]
        assert message in data.findings.skipped[0].reason
        assert len(data.splits["test"][0]) == 2
    if "no response" in message:
        assert len(dataset_of(tmp_path, rows, empty_responses="skip", **keys)) == 2


@pytest.mark.parametrize("chat", [[], [{"role": "system", "content": "S"}], [{"role": "assistant", "content": "Hi"}]])
def test_a_chat_without_a_question_is_an_error_in_its_row(tmp_path: Path, chat: list[Row]) -> None:
    message = "has no message of a user to respond to"
    path = write_rows(tmp_path / "new.jsonl", [{"messages": chat}])
    with refuses("data.messages_column: row 0 of", f"{message}, and no other"):
        prepared(tmp_path, "predict", predict_path=str(path))
    write_rows(path, [{"messages": chat}, GOOD])
    data = prepared(tmp_path, "predict", predict_path=str(path))
    assert [batch["index"].tolist() for batch in data.predict_dataloader()[0]] == [[1]]
    assert data.failed_rows(0) == [{"index": 0, "error": message}]


def test_rows_without_a_response_are_refused_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, where = rows_of("test"), tmp_path / "rows/test.jsonl"
    empty = [{**rows[1], "output": output} for output in (None, "", " \n", "<|endoftext|>", "<unk> <|im_end|>")]
    for row in empty:
        with refuses(f"data.response_column: row 2 of {where} has no response to learn", "empty_responses skip"):
            dataset_of(tmp_path, [*rows[:2], row])
    dataset = dataset_of(tmp_path, [rows[0], empty[0], rows[2], empty[3], rows[4]], empty_responses="skip")
    assert texts(dataset, "labels") == [f"{rows[i]['output']}<|im_end|>" for i in (0, 2, 4)]
    log = capsys.readouterr().err.splitlines()
    assert f"warning: left out of {where}: 2 of 5 rows, without a response." in log
    with refuses(f"data.path: {where} has no row with a response."):
        dataset_of(tmp_path, empty, empty_responses="skip")


@pytest.mark.parametrize("shuffled", ["sampled", "held out", "both"])
def test_an_error_message_has_the_row_number_of_the_file(tmp_path: Path, shuffled: str) -> None:
    draw = random.Random(0)
    for _ in range(3):
        bad = draw.randrange(24)
        rows = [{**row, "output": " \n" if i == bad else row["output"]} for i, row in enumerate(rows_of("train"))]
        path = write_rows(tmp_path / f"{bad}/train.jsonl", rows)
        if shuffled == "sampled":
            write_rows(tmp_path / f"{bad}/validation.jsonl", rows_of("validation"))
        limits = {} if shuffled == "held out" else {"max_train_samples": 23}
        where = path.parent if shuffled == "sampled" else path
        for val_seed in range(2):  # one of the two samples has the bad row
            try:
                prepared(where, val_fraction=0.1, val_seed=val_seed, **limits)
            except DataError as error:
                assert f"row {bad} of " in str(error)
                break
        else:
            pytest.fail("the row was never seen")


BAD: list[tuple[Row, Row, tuple[str, ...]]] = [  # columns besides the response, keys, parts of the message
    ({"k": "a"}, {}, ("has no column instruction with prompts, and no column messages with chats", ": output, k.")),
    ({"instruction": "a"}, {"input_column": "context"}, ("data.input_column:", "has no column context")),
    ({"instruction": "a"}, {"response_column": "answer"}, ("data.response_column:", "has no column answer; it has")),
    ({"instruction": None}, {}, ("data.instruction_column:", "is empty in every row")),
    ({"instruction": ["a"]}, {}, ("data.instruction_column: instruction in", "must hold text, and it holds List")),
    ({"instruction": "a"}, {"max_length": 15}, ("data.max_length: 15 must be 16 or more.",)),
    (
        {"instruction": "a"},
        {"template": "chat", "system_prompt": "S"},
        ("data.template: row 0 of", "refuses the conversation that begins 'a'", "roles must alternate"),
    ),
]


@pytest.mark.parametrize(("columns", "keys", "parts"), BAD)
def test_bad_input_is_refused(tmp_path: Path, columns: Row, keys: Row, parts: tuple[str, ...]) -> None:
    with refuses(*parts):
        dataset_of(tmp_path, [{"output": "b", **columns}] * 3, model=text_model(byte_tokenizer(STRICT)), **keys)
