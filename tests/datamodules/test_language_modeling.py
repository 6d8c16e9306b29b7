"""Instructions and chats as tokens: what is learnt of the rows of a file, and which of them are refused."""

from __future__ import annotations

import csv
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from datamodules.errors import DataError
from datamodules.language_modeling import LanguageModelingData
from datamodules.tokens.conversations import ALPACA, ConversationEncoder
from tests.causal_backbones import CHAT, byte_tokenizer
from tests.datamodules.stub import stub_trainer, text_model

Row = dict[str, Any]
SIZES = {"train": 24, "validation": 7, "test": 5}
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test has written to."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def row_of(split: str, i: int) -> Row:
    """Alpaca's columns that say where they come from, of several lengths, every other without an input."""
    output = f"{split} {i}" + " yes" * (i * 5 % 7)
    return {"instruction": f"Do {i}" + "!" * (i * 7 % 11), "input": "" if i % 2 else f"it {i}", "output": output}


def chat_of(row: Row) -> list[Row]:
    """The same as messages."""
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def rows_of(split: str, size: int | None = None) -> list[Row]:
    return [row_of(split, i) for i in range(SIZES[split] if size is None else size)]


def write(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in SIZES:
        write(tmp_path / "data" / f"{split}.jsonl", rows_of(split))
    return tmp_path / "data"


def module(path: Path, *, stage: str = "fit", model: Any = None, **keys: Any) -> Any:
    data = LanguageModelingData(str(path), **{"batch_size": 4, **keys})
    data.trainer = stub_trainer(lightning_module=model or text_model(TOKENIZER), state=SimpleNamespace(fn=stage))
    return data


def prepared(path: Path, stage: str = "fit", **keys: Any) -> Any:
    data = module(path, stage=stage, **keys)
    data.setup(stage)
    return data


def dataset_of(path: Path, rows: list[Row], **keys: Any) -> Any:
    """The data set of a test split of these rows."""
    return prepared(write(path / "rows" / "test.jsonl", rows).parent, "test", **keys).splits["test"][0]


def texts(dataset: Any, column: str = "input_ids") -> list[str]:
    return [TOKENIZER.decode([t for t in ids if t != -100]) for ids in dataset.data[column]]


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# -------------------------------------------------------------------------------------------------------------- tokens


def alpaca(row: Row) -> str:
    """Alpaca's text of a row, without its response."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    more = ", paired with an input that provides further context" if row["input"] else ""
    return (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:"
    )


def test_alpacas_columns_in_alpacas_template(folder: Path) -> None:
    data = prepared(folder)
    data.setup("test")
    assert data.prompt_template == ALPACA
    for name, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        (dataset,) = data.splits[name]
        assert texts(dataset) == [f"{alpaca(row)}{row['output']}<|im_end|>" for row in rows_of(split)]
        assert texts(dataset, "labels") == [f"{row['output']}<|im_end|>" for row in rows_of(split)]
        assert dataset.lengths.tolist() == [len(ids) for ids in dataset.data["input_ids"]]
        for ids, labels in zip(dataset.data["input_ids"], dataset.data["labels"], strict=True):
            learnt = labels.count(-100)
            assert labels == [-100] * learnt + ids[learnt:]


@pytest.mark.parametrize("whole", [False, True])
def test_the_tokenizers_own_chat_template(tmp_path: Path, whole: bool) -> None:
    rows = rows_of("test")
    stored = [{"messages": chat_of(row), "instruction": "x", "id": 3} for row in rows] if whole else rows
    dataset = dataset_of(tmp_path, stored, template="chat")
    assert dataset.data["input_ids"][:] == [
        TOKENIZER.apply_chat_template(chat_of(row), return_dict=False) for row in rows
    ]
    assert texts(dataset, "labels") == [f"{row['output']}<|im_end|>" for row in rows]


def test_every_response_of_a_chat_is_learnt_and_no_prompt(tmp_path: Path) -> None:
    turns = ["Hi", "Yo", "Why?", "So", "And?"]
    chat = [{"role": ["user", "assistant"][i % 2], "content": turn} for i, turn in enumerate(turns)]
    named = [{"talk": [{"role": "system", "content": "S"}, *chat]}]
    dataset = dataset_of(tmp_path, named, template="chat", messages_column="talk", system_prompt="not this")
    assert texts(dataset, "labels") == ["Yo<|im_end|>So<|im_end|>"]
    assert texts(dataset)[0].startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")
    assert "And?" not in texts(dataset)[0]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_the_system_prompt_is_before_the_question(tmp_path: Path, template: str) -> None:
    (text,) = texts(dataset_of(tmp_path, rows_of("test", 1), template=template, system_prompt="Be brief."))
    begins = {"alpaca": "Be brief.\n\n### Instruction:\nDo", "chat": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_st"}
    assert text.startswith(begins[template])


def test_several_templates_of_a_tokenizer_have_a_default_one(tmp_path: Path) -> None:
    model = text_model(byte_tokenizer({"tool_use": "{{ 1 }}", "default": CHAT}))
    assert module(tmp_path, model=model, template="chat").prompt_template == CHAT
    for none in (None, {"tool_use": "{{ 1 }}"}):
        model = text_model(byte_tokenizer(none))
        assert module(tmp_path, model=model).prompt_template == ALPACA
        with refuses("data.template: the backbone's tokenizer has no chat template. Use template: alpaca"):
            assert module(tmp_path, model=model, template="chat").prompt_template


def test_the_end_mark_of_a_set_is_taken_off(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "", "output": text} for text in ("b<|endoftext|>", " b ", "b END")]
    assert texts(dataset_of(tmp_path, rows), "labels") == ["b<|im_end|>", " b <|im_end|>", "b END<|im_end|>"]
    others = texts(dataset_of(tmp_path, rows, end_mark="END"), "labels")
    assert others == ["b<|endoftext|><|im_end|>", " b <|im_end|>", "b<|im_end|>"]


def test_special_tokens_in_texts_are_taken_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of("test", 3), {"instruction": "a", "input": "<unk>b", "output": "c<|im_end|>d<|im_start|>"}]
    dataset = dataset_of(tmp_path, rows)
    assert texts(dataset, "labels")[3] == "cd<|im_end|>"
    assert dataset.data["labels"][3].count(TOKENIZER.eos_token_id) == 1
    where = tmp_path / "rows/test.jsonl"
    said = capsys.readouterr().err.splitlines()
    assert f"warning: 1 rows of {where} hold special tokens of the tokenizer, which are removed." in said


def test_long_conversations_keep_their_response(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "a" * 300, "input": "", "output": "b" * 20}, {"instruction": "a", "output": "b" * 300}]
    rows += [{"instruction": "a", "output": "b"}]
    dataset = dataset_of(tmp_path, rows, template="chat", max_length=64)
    assert dataset.lengths.tolist()[:2] == [64, 64]
    assert texts(dataset, "labels") == ["b" * 20 + "<|im_end|>", "b" * 44, "b<|im_end|>"]
    assert texts(dataset)[0].endswith("a<|im_end|>\n<|im_start|>assistant\n" + "b" * 20 + "<|im_end|>\n")
    assert texts(dataset)[0].startswith("<|im_start|>user\naaa")
    said = f"warning: 2 of 3 rows of {tmp_path / 'rows/test.jsonl'} reach 64 tokens and may be cut."
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("nothing", [None, "", "no column"])
def test_inputs_may_be_missing(tmp_path: Path, nothing: Any) -> None:
    rows: list[Row] = [{"instruction": "a", "input": nothing, "output": "b"}] * 2
    rows = [{k: v for k, v in row.items() if v != "no column"} for row in rows]
    expected = [alpaca({"instruction": "a", "input": ""}) + "b<|im_end|>"] * 2
    assert texts(dataset_of(tmp_path, rows)) == expected
    some = [{"instruction": "a", "input": "c", "output": "b"}, *rows]
    assert texts(dataset_of(tmp_path / "some", some))[1:] == expected


def test_a_csv_without_any_input(tmp_path: Path) -> None:
    with (tmp_path / "train.csv").open("w") as file:
        table = csv.DictWriter(file, ["instruction", "input", "output"])
        table.writeheader()
        table.writerows([{"instruction": "a", "input": "", "output": "b"}] * 4)
    dataset = prepared(tmp_path / "train.csv", val_fraction=0.5).splits["train"][0]
    assert texts(dataset) == [alpaca({"instruction": "a", "input": ""}) + "b<|im_end|>"] * 2


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"q": r["instruction"], "c": r["input"], "a": r["output"], "input": "x"} for r in rows_of("test")]
    keys = {"instruction_column": "q", "response_column": "a"}
    named = texts(dataset_of(tmp_path, rows, **keys, input_column="c"))
    assert named == [f"{alpaca(row)}{row['output']}<|im_end|>" for row in rows_of("test")]
    without = texts(dataset_of(tmp_path, rows, **keys, input_column=None))
    assert without == [f"{alpaca({**row, 'input': ''})}{row['output']}<|im_end|>" for row in rows_of("test")]


@pytest.mark.parametrize("name", ["instruction", "labels", "input_ids", "length"])
def test_a_response_column_of_any_name(tmp_path: Path, name: str) -> None:
    rows = [{"instruction": "a", name: f"b{i}"} for i in range(3)]
    dataset = dataset_of(tmp_path, rows, response_column=name)
    assert texts(dataset, "labels") == [f"b{i}<|im_end|>" for i in range(3)]
    asked = "b1" if name == "instruction" else "a"  # one column may be both
    assert texts(dataset)[1] == alpaca({"instruction": asked, "input": ""}) + "b1<|im_end|>"


# ------------------------------------------------------------------------------------------------------------- batches


def check(batch: dict[str, Any], rows: list[Row]) -> None:
    for i, index in enumerate(batch["index"].tolist()):
        seen = batch["attention_mask"][i].bool()
        assert seen.tolist() == sorted(seen.tolist(), reverse=True)  # padding is at the right
        assert (
            TOKENIZER.decode(batch["input_ids"][i][seen]) == f"{alpaca(rows[index])}{rows[index]['output']}<|im_end|>"
        )
        learnt = batch["labels"][i] != -100
        assert TOKENIZER.decode(batch["labels"][i][learnt]) == f"{rows[index]['output']}<|im_end|>"
        assert (batch["labels"][i][~seen] == -100).all()
    assert batch["attention_mask"].any(0).all()  # no wider than the longest


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_for_evaluation(folder: Path, num_workers: int) -> None:
    batches = list(prepared(folder, num_workers=num_workers).val_dataloader()[0])
    for batch in batches:
        check(batch, rows_of("validation"))
        assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(7))
    assert any((batch["attention_mask"] == 0).any() for batch in batches)


def test_batches_for_training_are_of_like_length(folder: Path) -> None:
    def padding(bucket_by_length: bool) -> int:
        batches = list(prepared(folder, bucket_by_length=bucket_by_length).train_dataloader())
        assert [len(batch["index"]) for batch in batches] == [4] * 6
        for batch in batches:
            check(batch, rows_of("train"))
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding(True) < 0.7 * padding(False)


def sequences(batch: dict[str, Any]) -> list[tuple[str, str]]:
    """What the packs of a batch consist of: whole texts and what is learnt of them."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in pairwise(starts):
            assert positions[a:b].tolist() == list(range(b - a))
            learnt = labels[a:b] != -100
            if learnt.any():
                found.append((TOKENIZER.decode(ids[a:b]), TOKENIZER.decode(labels[a:b][learnt])))
            else:
                assert set(ids[a:b].tolist()) == {TOKENIZER.pad_token_id}  # what fills a pack up
    return found


@pytest.mark.parametrize("num_workers", [0, 1])
def test_packs_are_whole_conversations(folder: Path, num_workers: int) -> None:
    data = prepared(folder, packing=True, template="chat", max_length=200, batch_size=2, num_workers=num_workers)
    batches = list(data.train_dataloader())
    assert all(set(batch) == {"input_ids", "labels", "position_ids"} for batch in batches)
    assert all(batch["input_ids"].shape[1] <= 200 for batch in batches)
    found = [sequence for batch in batches for sequence in sequences(batch)]
    known = {
        TOKENIZER.apply_chat_template(chat_of(row), tokenize=False): f"{row['output']}<|im_end|>"
        for row in rows_of("train")
    }
    assert all(known[text] == learnt for text, learnt in found)
    assert len(set(found)) == len(found) > 3 * sum(len(batch["input_ids"]) for batch in batches) / 2
    assert "attention_mask" in next(iter(data.val_dataloader()[0]))  # evaluation is the same with and without


def test_training_goes_on_in_the_middle_of_an_epoch_of_packs(folder: Path) -> None:
    keys = {"packing": True, "template": "chat", "max_length": 150, "batch_size": 1}
    data = prepared(folder, **keys)
    whole = list(data.train_dataloader())
    resumed = module(folder, **keys)
    data.trainer = stub_trainer(lightning_module=text_model(TOKENIZER), batches_done=3, epoch_batches=len(whole))
    resumed.load_state_dict(data.state_dict())
    resumed.setup("fit")
    rest = list(resumed.train_dataloader())
    assert len(rest) == len(whole) - 3 > 2
    for one, other in zip(rest, whole[3:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in whole[0])


def test_too_few_packs_for_a_batch(folder: Path) -> None:
    with refuses(
        "data.packing: 24 conversations fill", "packs of 400 tokens, fewer than one batch of 16 × 1 processes"
    ):
        prepared(folder, packing=True, max_length=400, template="chat", batch_size=16).train_dataloader()


# ---------------------------------------------------------------------------------------------------------- prediction


def completed(data: Any) -> list[Row]:
    indices = [i for batch in data.predict_dataloader()[0] for i in batch["index"].tolist()]
    return [data.complete_prediction({"index": i, "response": f"r{i}"}, 0) for i in sorted(indices)]


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_prompts_to_predict_are_padded_at_the_left(folder: Path, bucket_by_length: bool) -> None:
    data = prepared(folder, "predict", bucket_by_length=bucket_by_length)
    found = {}
    for batch in data.predict_dataloader()[0]:
        assert set(batch) == {"input_ids", "attention_mask", "index"}
        assert batch["attention_mask"][:, -1].all()
        for ids, seen, index in zip(batch["input_ids"], batch["attention_mask"], batch["index"].tolist(), strict=True):
            assert seen.tolist() == sorted(seen.tolist())
            found[index] = TOKENIZER.decode(ids[seen.bool()])
    assert found == {i: alpaca(row) for i, row in enumerate(rows_of("test"))}
    assert data.prediction_files == ("predictions.jsonl",)


def test_predictions_have_the_prompts_columns_and_the_reference(folder: Path) -> None:
    assert completed(prepared(folder, "predict")) == [
        {
            "index": i,
            "instruction": row["instruction"],
            "input": row["input"],
            "response": f"r{i}",
            "reference": row["output"],
        }
        for i, row in enumerate(rows_of("test"))
    ]


def test_a_chat_is_continued_where_its_last_response_was(folder: Path, tmp_path: Path) -> None:
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    answer = [{"role": "assistant", "content": "So<|endoftext|>"}]
    path = write(tmp_path / "new.jsonl", [{"messages": asked + answer}, {"messages": asked}])
    data = prepared(folder, "predict", predict_path=str(path), template="chat")
    prompt = TOKENIZER.apply_chat_template(asked, return_dict=False, add_generation_prompt=True)
    assert data.splits["predict"][0].data["input_ids"][:] == [prompt, prompt]
    assert completed(data) == [
        {"index": 0, "messages": asked, "response": "r0", "reference": "So"},
        {"index": 1, "messages": asked, "response": "r1"},
    ]


def test_other_columns_of_a_file_to_predict_stay_but_for_our_own(folder: Path, tmp_path: Path) -> None:
    rows = {"instruction": ["a"], "index": [7], "response": ["x"], "reference": ["y"], "day": ["2026-01-02"]}
    table = datasets.Dataset.from_dict(rows)
    table.cast_column("day", datasets.Value("date32")).to_parquet(tmp_path / "new.parquet")
    data = prepared(folder, "predict", predict_path=str(tmp_path / "new.parquet"))
    (row,) = completed(data)
    assert row == {"index": 0, "instruction": "a", "reference": "y", "day": "2026-01-02", "response": "r0"}
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("output", [None, "", "no column", 3])
def test_references_are_not_needed_for_prediction(folder: Path, tmp_path: Path, output: Any) -> None:
    row = {"instruction": "a", "input": None, "output": output}
    path = write(tmp_path / "new.jsonl", [{k: v for k, v in row.items() if v != "no column"}])
    (row,) = completed(prepared(folder, "predict", predict_path=str(path)))
    assert row["response"] == "r0"
    assert row.get("reference") == (3 if output == 3 else None)


def test_a_prompt_that_is_too_long_loses_its_middle(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [{"instruction": "a" * 900}])
    (dataset,) = prepared(folder, "predict", predict_path=str(path), max_length=100).splits["predict"]
    (text,) = texts(dataset)
    assert dataset.lengths.tolist() == [100]
    assert text.startswith("Below is") and text.endswith("aaa\n\n### Response:")


# ----------------------------------------------------------------------------------------------------------- bad input


def without_response(i: int) -> list[Row]:
    return [{**row, "output": " \n" if j == i else row["output"]} for j, row in enumerate(rows_of("train"))]


def test_a_row_without_a_response(tmp_path: Path) -> None:
    where = tmp_path / "rows/test.jsonl"
    for response in (None, "", " \n", "<|endoftext|>", "<unk> <|im_end|>"):
        rows = [*rows_of("test", 2), {"instruction": "a", "input": "", "output": response}]
        with refuses(f"data.response_column: row 2 of {where} has no response to learn", "empty_responses skip"):
            dataset_of(tmp_path, rows)


def test_rows_without_a_response_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("test")
    empty = [{**rows[0], "output": None}, {**rows[1], "output": "<|endoftext|>"}]
    dataset = dataset_of(tmp_path, [rows[0], empty[0], rows[2], empty[1], rows[4]], empty_responses="skip")
    assert texts(dataset, "labels") == [f"{rows[i]['output']}<|im_end|>" for i in (0, 2, 4)]
    said = capsys.readouterr().err.splitlines()
    assert f"warning: 2 of 5 rows of {tmp_path / 'rows/test.jsonl'} have no response and are left out." in said
    with refuses(f"data.path: {tmp_path / 'rows/test.jsonl'} has no row with a response."):
        dataset_of(tmp_path, [*empty, empty[0]], empty_responses="skip")


CHATS_WITHOUT = [
    [],
    [{"role": "system", "content": "S"}],
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}, *chat_of(row_of("train", 1))],
]


@pytest.mark.parametrize("chat", CHATS_WITHOUT)
def test_a_chat_without_a_response(tmp_path: Path, chat: list[Row]) -> None:
    rows = [{"messages": chat_of(row_of("test", 1))}, {"messages": chat}]
    with refuses("data.messages_column: row 1 of", "test.jsonl has no response to learn"):
        dataset_of(tmp_path, rows)
    dataset = dataset_of(tmp_path, rows, empty_responses="skip", system_prompt="S")
    assert len(dataset) == 1


@pytest.mark.parametrize("chat", [*CHATS_WITHOUT[:2], [{"role": "assistant", "content": "Hi"}]])
def test_a_chat_that_asks_nothing(folder: Path, tmp_path: Path, chat: list[Row]) -> None:
    path = write(tmp_path / "new.jsonl", [{"messages": chat}])
    with refuses("data.messages_column: row 0 of", "has no message of a user to respond to, and no other"):
        prepared(folder, "predict", predict_path=str(path))
    path = write(tmp_path / "more.jsonl", [{"messages": chat}, {"messages": chat_of(row_of("test", 1))}])
    data = prepared(folder, "predict", predict_path=str(path))
    assert [batch["index"].tolist() for batch in data.predict_dataloader()[0]] == [[1]]
    assert data.failed_rows(0) == [{"index": 0, "error": "has no message of a user to respond to"}]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (
            [{"content": "Hi"}],
            "must have `role` (system, user, assistant) and text as `content`, or ShareGPT's `from`",
        ),
        ([{"role": "tool", "content": "Hi"}], "must have `role`"),
        ([{"from": "observation", "value": "Hi"}], "must have `role`"),
        ([{"role": "user", "content": None}], "must have `role`"),
        ([{"role": "assistant", "content": 3}], "it is {'role': 'assistant', 'content': 3}"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "text as `content`"),
        (["Hi", "Yo"], "it is Hi"),
        ("Hi", "must be a list of messages; it is Hi"),
        ('[{"role": "user", "content": "Hi"}]', "must be a list of messages"),
        (None, "must be a list of messages; it is None"),
        ({"role": "user", "content": "Hi"}, "must be a list of messages"),
    ],
)
@pytest.mark.parametrize("stage", ["test", "predict"])
def test_messages_of_another_shape(tmp_path: Path, stage: str, cell: Any, reason: str) -> None:
    path = write(tmp_path / "rows/test.jsonl", [{"messages": cell}])
    with refuses("data.messages_column:", "row 0", "holds no conversation in column messages: ", reason):
        prepared(path.parent, stage)


@pytest.mark.parametrize("shuffled", ["sampled", "held out", "both"])
def test_a_message_has_the_row_of_the_file(tmp_path: Path, shuffled: str) -> None:
    draw = random.Random(0)
    for _ in range(3):
        bad = draw.randrange(24)
        path = write(tmp_path / f"{bad}/train.jsonl", without_response(bad))
        if shuffled == "sampled":
            write(tmp_path / f"{bad}/validation.jsonl", rows_of("validation"))
        limits = {} if shuffled == "held out" else {"max_train_samples": 23}
        where = path.parent if shuffled == "sampled" else path
        for val_seed in range(2):  # or the bad row may happen to be left out
            try:
                prepared(where, val_fraction=0.1, val_seed=val_seed, **limits)
            except DataError as error:
                assert f"row {bad} of " in str(error)
                break
        else:
            pytest.fail("the row was never seen")


@pytest.mark.parametrize(
    ("rows", "keys", "parts"),
    [
        (
            {"prompt": "a"},
            {},
            ("neither a column messages of messages nor a column instruction; it has output, prompt",),
        ),
        ({"instruction": "a"}, {"input_column": "context"}, ("data.input_column:", "has no column context")),
        (
            {"instruction": "a"},
            {"response_column": "answer"},
            ("data.response_column:", "has no column answer; it has"),
        ),
        ({"instruction": None}, {}, ("data.instruction_column:", "is empty in every row")),
        ({"instruction": ["a"]}, {}, ("data.instruction_column: instruction in", "must hold text, and it holds List")),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, rows: Row, keys: Row, parts: tuple[str, ...]) -> None:
    with refuses(*parts):
        dataset_of(tmp_path, [{"output": "b", **rows}] * 3, **keys)


def test_an_empty_instruction(tmp_path: Path) -> None:
    rows = [*rows_of("test", 3), {"instruction": None, "input": "a", "output": "b"}]
    with refuses("data.instruction_column: row 3 of", "test.jsonl has no text in column instruction"):
        dataset_of(tmp_path, rows)


def test_a_chat_template_that_refuses_a_row(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    model = text_model(byte_tokenizer(strict))
    assert len(dataset_of(tmp_path, rows_of("test"), model=model, template="chat")) == 5
    with refuses("data.template: row 0 of", "refuses the conversation that begins 'Do 0", "no system"):
        dataset_of(tmp_path, rows_of("test"), model=model, template="chat", system_prompt="S")


def test_lengths_that_cannot_be(folder: Path) -> None:
    with refuses("data.max_length: 15 must be 16 or more."):
        module(folder, max_length=15)
    model = text_model(TOKENIZER, position_limit=100)
    assert prepared(folder, model=model, max_length=100).splits
    for stage in ("fit", "predict"):
        with refuses("data.max_length: 101 tokens are more than the 100 that the backbone has positions for."):
            prepared(folder, stage, model=model, max_length=101)


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each conversation or prompt that is tokenised."""
    found: list[str] = []
    for name in ("conversation", "prompt"):
        method = getattr(ConversationEncoder, name)

        def counted(self: Any, messages: Any, name: str = name, method: Any = method) -> Any:
            found.append(name)
            return method(self, messages)

        monkeypatch.setattr(ConversationEncoder, name, counted)
    return found


def test_tokens_are_made_once(folder: Path, made: list[str]) -> None:
    first = prepared(folder)
    assert made == ["conversation"] * 31
    second = prepared(folder)
    second.setup("validate")
    assert len(made) == 31
    assert second.splits["train"][0].data[:] == first.splits["train"][0].data[:]
    prepared(folder, "test")
    prepared(folder, "predict")
    assert made == ["conversation"] * 36 + ["prompt"] * 5


@pytest.mark.parametrize(
    "keys",
    [
        {"template": "chat"},
        {"max_length": 100},
        {"system_prompt": "S"},
        {"end_mark": "yes"},
        {"input_column": None},
        {"instruction_column": "output"},
        {"model": text_model(byte_tokenizer(eos_token="<unk>"))},
    ],
    ids=str,
)
def test_whatever_changes_the_tokens_makes_new_ones(folder: Path, made: list[str], keys: Row) -> None:
    before = prepared(folder, "test").splits["test"][0]
    after = prepared(folder, "test", **keys).splits["test"][0]
    assert len(made) == 10
    assert after.data["input_ids"][:] != before.data["input_ids"][:]


def test_another_chat_template_makes_new_tokens(folder: Path, made: list[str]) -> None:
    found = []
    for template in (CHAT, CHAT.replace("message['role']", "message['role'][0]")):
        model = text_model(byte_tokenizer(template))
        found.append(texts(prepared(folder, "predict", model=model, template="chat").splits["predict"][0])[0])
    assert len(made) == 10
    assert found[1] == found[0].replace("user\n", "u\n") != found[0]


def test_new_texts_make_new_tokens(folder: Path, made: list[str]) -> None:
    prepared(folder, "test")
    write(folder / "test.jsonl", [*rows_of("test", 4), {**row_of("test", 4), "output": "new"}])
    assert texts(prepared(folder, "test").splits["test"][0], "labels")[4] == "new<|im_end|>"
    assert len(made) == 10
