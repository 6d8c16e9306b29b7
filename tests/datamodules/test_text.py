"""Behaviour that all text tasks share: splits, limits, batches, caches and bad rows."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from datamodules.errors import DataError
from datamodules.language_modeling import LanguageModelingData
from datamodules.summarization import SummarizationData
from datamodules.text import TrainingTextData
from datamodules.text_classification import TextClassificationData
from tests.backbones import word_tokenizer
from tests.causal_backbones import CHAT, byte_tokenizer
from tests.support.data import fake_hub, set_up
from tests.support.refusals import refuses
from tests.support.rows import write_rows
from tests.support.trainers import stub_trainer, text_model

Row = dict[str, Any]
Tokens = dict[str, Any]  # input_ids, and label or labels
SIZES = {"train": 24, "validation": 9, "test": 7}
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # name of the split, and name of its file
MARKS = {"train": "good", "validation": "bad", "test": "film"}  # words of the vocabulary
WORDS, BYTES = word_tokenizer(), byte_tokenizer()


@dataclass(frozen=True)
class Family:
    """A text task. The tokens of a row identify its split and number.

    Args:
        kind: Class of the data module.
        keys: Keyword arguments besides the path.
        tokenizer: Tokenizer of the backbone.
        row: Return row `i` of a split.
        tokens: Return the expected tokens and label of a row.
        lengths: Keys that limit the lengths of texts.
        cut: A limit for the first of these keys that some rows reach.
        bad: For each column, its key and the message on an empty cell.
        changes: Keyword arguments that change the tokens.
    """

    kind: type[TrainingTextData]
    keys: Row
    tokenizer: Any
    row: Callable[[str, int], Row]
    tokens: Callable[[Row], Tokens]
    lengths: tuple[str, ...]
    cut: int
    bad: dict[str, tuple[str, str]]
    changes: list[Row] = field(default_factory=list)


def labelled(split: str, i: int) -> Row:
    return {"text": f"{MARKS[split]} w{i}" + " a" * (i * 7 % 11), "label": ["no", "yes"][i % 2]}


def pair(split: str, i: int) -> Row:
    summary = f"  the film w{i} Unheard\n" + "is not . " * (i % 4)
    return {"document": f"{MARKS[split]} w{i}" + " a" * (i * 7 % 11), "summary": summary}


def instruction(split: str, i: int) -> Row:
    return {"instruction": f"{split} {i}" + "!" * (i * 7 % 11), "input": "", "output": f"yes {i}" + " so" * (i % 5)}


def chat_tokens(row: Row) -> Tokens:
    chat = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    ids = BYTES.apply_chat_template(chat, return_dict=False)
    prompt = len(BYTES.apply_chat_template(chat[:1], return_dict=False, add_generation_prompt=True))
    # the loss covers the end token and not the line break after it
    return {
        "input_ids": ids,
        "labels": [-100] * prompt + ids[prompt:-1] + [-100],
    }


FAMILIES = {
    "classification": Family(
        TextClassificationData,
        {"text_columns": ["text"]},
        WORDS,
        labelled,
        lambda row: {"input_ids": WORDS(row["text"])["input_ids"], "label": int(row["label"] == "yes")},
        ("max_length",),
        6,
        {"text": ("text_columns", "has no text in column text"), "label": ("label_column", "is empty")},
        [{"max_length": 6}, {"model": text_model(word_tokenizer(pad_token="</s>"))}],
    ),
    "summarization": Family(
        SummarizationData,
        {},
        WORDS,
        pair,
        lambda row: {"input_ids": WORDS(row["document"])["input_ids"], "labels": WORDS(row["summary"])["input_ids"]},
        ("max_source_length", "max_target_length"),
        6,
        {
            "document": ("source_column", "has no text in column document"),
            "summary": ("target_column", "has no text in column summary"),
        },
        [
            {"source_prefix": "bad "},
            {"max_source_length": 6},
            {"max_target_length": 6},
            {"source_column": "summary", "target_column": "document"},
        ],
    ),
    "language modeling": Family(
        LanguageModelingData,
        {"template": "chat"},
        BYTES,
        instruction,
        chat_tokens,
        ("max_length",),
        50,
        {
            "instruction": ("instruction_column", "has no text in column instruction"),
            "output": ("response_column", "has no response to learn"),
        },
        [
            {"template": "alpaca"},
            {"max_length": 50},
            {"system_prompt": "S"},
            {"end_mark": "so"},
            {"instruction_column": "output"},
            {"model": text_model(byte_tokenizer(CHAT.replace("\n", " ")))},
        ],
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def rows_of(family: Family, split: str) -> list[Row]:
    return [family.row(split, i) for i in range(SIZES[split])]


def write(family: Family, folder: Path, *splits: str) -> Path:
    for split in splits or SIZES:
        write_rows(folder / f"{split}.jsonl", rows_of(family, split))
    return folder


def made(family: Family, path: Path, **keys: Any) -> Any:
    data = family.kind(str(path), **{"batch_size": 4, **family.keys, **keys})
    data.trainer = stub_trainer(lightning_module=text_model(family.tokenizer))
    return data


def prepared(family: Family, path: Path, stage: str = "fit", *, model: Any = None, **keys: Any) -> Any:
    return set_up(made(family, path, **keys), model or text_model(family.tokenizer), stage)


def check(family: Family, dataset: Any, split: str) -> list[int]:
    """Check the tokens and targets of each row. Return the numbers of the rows."""
    known = {tuple(family.tokens(row)["input_ids"]): i for i, row in enumerate(rows_of(family, split))}
    numbers = [known[tuple(ids)] for ids in dataset.data["input_ids"]]
    expected = [family.tokens(family.row(split, i)) for i in numbers]
    for name in expected[0]:
        values = dataset.targets[name].tolist() if name in dataset.targets else dataset.data[name][:]
        assert values == [tokens[name] for tokens in expected]
    assert dataset.lengths.tolist() == [len(tokens["input_ids"]) for tokens in expected]
    return numbers


# -------------------------------------------------------------------------------------------------------------- splits


@each_family
def test_each_split_is_read_once_from_its_file(family: Family, tmp_path: Path) -> None:
    data = made(family, write(family, tmp_path))
    data.check_test_split()
    set_up(data, text_model(family.tokenizer))
    assert list(data.splits) == ["train", "val", "test"]  # check_test_split has requested the test split
    before = {name: list(parts) for name, parts in data.splits.items()}
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert data.splits == before
    for name, split in SPLITS.items():
        assert check(family, data.splits[name][0], split) == list(range(SIZES[split]))


@each_family
def test_without_a_validation_split_training_rows_are_held_out(family: Family, tmp_path: Path) -> None:
    path = write(family, tmp_path, "train") / "train.jsonl"

    def held_out(**keys: Any) -> tuple[list[int], list[int]]:
        data = prepared(family, path, val_fraction=0.25, **keys)
        return check(family, data.splits["train"][0], "train"), check(family, data.splits["val"][0], "train")

    train, val = held_out()
    assert sorted(train + val) == list(range(24))
    assert len(val) == 6
    assert held_out() == (train, val)
    assert set(held_out(val_seed=1)[1]) != set(val)
    for ask in (lambda: made(family, path).check_test_split(), lambda: prepared(family, path, "test")):
        with refuses("data.path", "has no test split"):
            ask()


@each_family
def test_test_on_validation_tests_the_validation_split(family: Family, tmp_path: Path) -> None:
    data = prepared(family, write(family, tmp_path), val_fraction=0.25, test_on_validation=True)
    data.setup("test")
    assert check(family, data.splits["test"][0], "validation") == list(range(9))
    train, val = (check(family, data.splits[name][0], "train") for name in ("train", "val"))
    assert sorted(train + val) == list(range(24))
    assert len(val) == 6


@each_family
def test_limits_take_a_seeded_sample(family: Family, tmp_path: Path) -> None:
    path = write(family, tmp_path)
    sizes = {"train": 5, "val": 4, "test": 3}
    samples = []
    for seed in (0, 0, 1):
        data = prepared(family, path, val_seed=seed, **{f"max_{name}_samples": size for name, size in sizes.items()})
        data.setup("test")
        samples.append({name: check(family, data.splits[name][0], split) for name, split in SPLITS.items()})
    first, again, other = samples
    assert {name: len(set(rows)) for name, rows in first.items()} == sizes
    assert first == again
    assert first["train"] not in (other["train"], list(range(5)))


@each_family
def test_configuration_and_revision_are_passed_to_the_hub(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = fake_hub(monkeypatch, lambda split: rows_of(family, split), "train", "validation")
    prepared(family, Path("some/data"), config="3.0.0", revision="refs/convert/parquet")
    assert set(requests) == {("some/data", "3.0.0", "refs/convert/parquet")}


# ------------------------------------------------------------------------------------------------------------- batches


def check_batch(family: Family, batch: dict[str, Any], split: str) -> list[int]:
    """Check that a batch has the tokens of its rows, padded on the right. Return the numbers of the rows."""
    numbers: list[int] = batch["index"].tolist()
    expected = [family.tokens(family.row(split, i)) for i in numbers]
    padding = {"input_ids": family.tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
    for tokens in expected:
        tokens["attention_mask"] = [1] * len(tokens["input_ids"])
    for name in expected[0]:
        values = [tokens[name] for tokens in expected]
        if name in padding:
            longest = max(map(len, values))
            values = [ids + [padding[name]] * (longest - len(ids)) for ids in values]
        assert batch[name].tolist() == values
        assert batch[name].dtype == torch.int64
    if "reference" in batch:
        assert batch["reference"] == [family.row(split, i)["summary"] for i in numbers]
    assert set(batch) - {"reference", "index"} == set(expected[0])
    return numbers


@each_family
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_padded_and_cover_every_row(family: Family, tmp_path: Path, workers: int) -> None:
    data = prepared(family, write(family, tmp_path), num_workers=workers)
    train = [check_batch(family, batch, "train") for batch in data.train_dataloader()]
    assert sorted(i for rows in train for i in rows) == list(range(24))
    assert {len(rows) for rows in train} == {4}
    val = [i for batch in data.val_dataloader()[0] for i in check_batch(family, batch, "validation")]
    assert sorted(val) == list(range(9))


@each_family
def test_buckets_pad_less_and_without_them_evaluation_is_in_order(family: Family, tmp_path: Path) -> None:
    path = write(family, tmp_path)

    def padding(bucket_by_length: bool) -> int:
        data = prepared(family, path, bucket_by_length=bucket_by_length)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in data.train_dataloader())

    assert padding(True) < 0.7 * padding(False)
    plain, by_length = (prepared(family, path, "test", bucket_by_length=b).test_dataloader()[0] for b in (False, True))
    assert [i for batch in plain for i in batch["index"].tolist()] == list(range(7))
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in by_length]
    assert lengths[0] == sorted((n for batch in lengths for n in batch), reverse=True)[:4]


@each_family
def test_collators_and_data_sets_can_be_pickled_for_spawned_workers(family: Family, tmp_path: Path) -> None:
    data = prepared(family, write(family, tmp_path), "validate")
    data.trainer.schedule = lambda step: 1.0  # a real trainer has closures like this, which cannot be pickled
    loader = data.val_dataloader()[0]
    collate, dataset = pickle.loads(pickle.dumps((loader.collate_fn, loader.dataset)))
    assert check_batch(family, collate(dataset.__getitems__([3, (0, 99)])), "validation") == [3, 0]


# ------------------------------------------------------------------------------------------------------------- lengths


@each_family
def test_rows_that_reach_the_limit_are_counted(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a long name with [a], which must not be wrapped or read as markup of rich
    path = write(family, tmp_path / f"{'of-a-long-name/' * 9}[a]")
    lengths = [len(family.tokens(row)["input_ids"]) for row in rows_of(family, "validation")]
    cut = sum(length >= family.cut for length in lengths)
    assert 0 < cut < 9
    data = prepared(family, path, "validate", **{family.lengths[0]: family.cut})
    assert data.splits["val"][0].lengths.max() == family.cut
    message = f"warning: {cut} of 9 rows of {path / 'validation.jsonl'} may be cut to {family.cut} tokens."
    assert message in capsys.readouterr().err.splitlines()
    prepared(family, path, "validate", **{family.lengths[0]: max(lengths) + 1})
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    prepared(family, path, "validate", **{family.lengths[0]: family.cut})
    assert "may be cut" not in capsys.readouterr().err


@each_family
@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_lengths_beyond_the_models_positions_are_refused(family: Family, tmp_path: Path, stage: str) -> None:
    path, model = write(family, tmp_path), text_model(family.tokenizer, position_limit=64)
    fitting = dict.fromkeys(family.lengths, 64)
    assert prepared(family, path, stage, model=model, **fitting).splits
    for key in family.lengths:
        with refuses(f"data.{key}: 65 tokens are more than the backbone's 64 positions. Use 64 or less."):
            prepared(family, path, stage, model=model, **{**fitting, key: 65})


@each_family
def test_a_model_without_a_tokenizer_is_refused(family: Family, tmp_path: Path) -> None:
    with refuses(f"{family.kind.__name__} needs a model that has a tokenizer"):
        prepared(family, write(family, tmp_path), model=SimpleNamespace(class_names=None))


# --------------------------------------------------------------------------------------------------------------- cache


def files(cache: Path) -> dict[str, int]:
    """Return the cache files of tokens, with their modification times."""
    return {path.name: path.stat().st_mtime_ns for path in (cache / "onesided").iterdir()}


@each_family
def test_texts_are_tokenised_once(family: Family, tmp_path: Path, cache: Path) -> None:
    path = write(family, tmp_path / "data")
    prepared(family, path)
    before = files(cache)
    assert len(before) == 2
    data = prepared(family, path)
    assert files(cache) == before
    assert check(family, data.splits["train"][0], "train") == list(range(24))
    rows = rows_of(family, "train")
    write_rows(path / "train.jsonl", [*rows[:-1], family.row("train", 30)])
    changed = prepared(family, path).splits["train"][0]
    assert len(files(cache)) == 3
    assert changed.data[23]["input_ids"] == family.tokens(family.row("train", 30))["input_ids"]


@pytest.mark.parametrize(
    ("family", "keys"),
    [pytest.param(f, keys, id=f"{n} {[*keys]}") for n, f in FAMILIES.items() for keys in f.changes],
)
def test_keys_that_change_the_tokens_get_a_new_cache_file(
    family: Family, tmp_path: Path, cache: Path, keys: Row
) -> None:
    path = write(family, tmp_path / "data")
    prepared(family, path, "validate")
    prepared(family, path, "validate", **keys)
    assert len(files(cache)) == 2


# ------------------------------------------------------------------------------------------------------- bad rows


EMPTY = [(family, column) for family in FAMILIES.values() for column in family.bad]


@pytest.mark.parametrize(("family", "column"), EMPTY, ids=[column for _, column in EMPTY])
@pytest.mark.parametrize("cell", [None, " \n"])
def test_a_row_with_an_empty_cell_is_refused_or_skipped(
    family: Family, column: str, cell: str | None, tmp_path: Path
) -> None:
    path, (key, message) = write(family, tmp_path), family.bad[column]
    rows = rows_of(family, "train")
    rows[4][column] = cell
    write_rows(path / "train.jsonl", rows)
    if key == "instruction_column" and cell is not None:
        message = "has an empty message of a user"
    with refuses(f"data.{key}: row 4 of", "train.jsonl", message, "data.skip_bad_rows"):
        prepared(family, path)
    data = prepared(family, path, skip_bad_rows=1)
    (skipped,) = data.findings.skipped
    assert (skipped.split, skipped.source, skipped.row) == ("train", str(path / "train.jsonl"), "row 4")
    assert message in skipped.reason
    assert check(family, data.splits["train"][0], "train") == [i for i in range(24) if i != 4]
    write_rows(path / "train.jsonl", [rows[4]] * 3)
    with pytest.raises(DataError):
        prepared(family, path, skip_bad_rows=9)


@pytest.mark.parametrize(("key", "column"), [(k, c) for f in FAMILIES.values() for c, (k, _) in f.bad.items()])
def test_a_missing_column_is_refused(tmp_path: Path, key: str, column: str) -> None:
    family = next(family for family in FAMILIES.values() if column in family.bad)
    path = write(family, tmp_path)
    write_rows(
        path / "train.jsonl", [{k: v for k, v in row.items() if k != column} for row in rows_of(family, "train")]
    )
    with refuses(f"data.{key}", str(path / "train.jsonl"), "column"):
        prepared(family, path)


@each_family
def test_rows_to_predict_keep_their_numbers_when_some_are_bad(family: Family, tmp_path: Path) -> None:
    path, column = write(family, tmp_path), next(iter(family.bad))
    rows = [{column: cell} for cell in (None, family.row("test", 1)[column], " ", family.row("test", 3)[column])]
    data = prepared(family, path, "predict", predict_path=str(write_rows(tmp_path / "new.jsonl", rows)))
    batches = list(data.predict_dataloader()[0])
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == [1, 3]
    assert all(set(batch) == {"input_ids", "attention_mask", "index"} for batch in batches)
    failed = data.failed_rows(0)
    assert [row["index"] for row in failed] == [0, 2]
    assert all(data.complete_prediction(row, 0)["error"] == row["error"] != "" for row in failed)


@each_family
def test_the_order_of_good_rows_does_not_depend_on_skip_bad_rows(family: Family, tmp_path: Path) -> None:
    rows = rows_of(family, "train")
    rows[4][next(iter(family.bad))] = None
    path = write_rows(tmp_path / "train.jsonl", rows)
    first, second = (prepared(family, path, skip_bad_rows=n, max_train_samples=20, val_fraction=0.2) for n in (1, 7))
    for split in ("train", "val"):
        assert check(family, first.splits[split][0], "train") == check(family, second.splits[split][0], "train")
