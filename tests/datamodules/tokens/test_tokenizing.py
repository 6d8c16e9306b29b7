"""Tokenizing: tokens equal the tokenizer's output, are computed once and read back unchanged from the cache."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from datamodules.sources.tables import Table
from datamodules.tokens.tokenizing import FORMAT, TokenDataset, tokenized, tokenizer_state
from tests.backbones import word_tokenizer
from tests.support.data import opened, put

pytestmark = pytest.mark.usefixtures("cache")
TEXTS = ["the film was good .", "bad", "it is not bad .", "", "w1 w2 w3 w4 w5 w6 w7", "unheard of"]
WORDS = [text for text in TEXTS if text]
OURS = "datamodules.tokens.tokenizing"


def table(texts: list[Any], **columns: list[Any]) -> Table:
    return Table(datasets.Dataset.from_dict({"text": texts, **columns}), "here")


class Encoder:
    """Encode texts, cut to `limit` tokens, and count the calls."""

    def __init__(self, tokenizer: Any = None, limit: int = 6) -> None:
        self.tokenizer, self.limit, self.calls = tokenizer or word_tokenizer(), limit, 0

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        self.calls += 1
        tokens = self.tokenizer(*rows.values(), truncation=True, max_length=self.limit)
        return {"input_ids": tokens["input_ids"], "length": [len(ids) for ids in tokens["input_ids"]]}


def encoded(of: Table, encode: Encoder, *columns: str) -> tuple[datasets.Dataset, int]:
    """Return the tokens, and the number of calls of the tokenizer."""
    before = encode.calls
    key = {"tokenizer": tokenizer_state(encode.tokenizer), "max_length": encode.limit}
    return tokenized(of, columns or ["text"], encode, key), encode.calls - before


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("limit", [3, 6, 64])
def test_tokens_equal_the_tokenizers_and_are_computed_once(limit: int, cache: Path) -> None:
    encode = Encoder(limit=limit)
    data, calls = encoded(table(TEXTS), encode)
    expected = word_tokenizer()(TEXTS, truncation=True, max_length=limit)["input_ids"]
    assert data[:] == {"input_ids": expected, "length": [len(ids) for ids in expected]}
    cached, more_calls = encoded(table(TEXTS), encode)
    assert (calls, more_calls) == (1, 0)
    assert cached[:] == data[:]
    assert len(list((cache / "onesided").glob("*.arrow"))) == 1


def test_more_rows_than_one_batch_are_cached() -> None:
    texts = [f"w{i % 40} w{i // 40 % 40} w{i // 1600 % 40}" for i in range(10_050)]
    encode = Encoder()
    data, calls = encoded(table(texts), encode)
    assert calls > 1
    picked = [0, 9_999, 10_000, 10_049]
    assert data[picked]["input_ids"] == word_tokenizer()([texts[i] for i in picked])["input_ids"]
    assert encoded(table(texts), encode)[1] == 0
    changed = [*texts[:-1], "bad"]  # only the last row differs
    assert encoded(table(changed), encode)[0][10_049]["input_ids"] == word_tokenizer()("bad")["input_ids"]


def csv(file: Path, texts: list[str], more: str = "") -> Path:
    return put(file, f"text{',more' if more else ''}\n" + "".join(f'"{t}"{more and f",{more}"}\n' for t in texts))


def test_the_cache_depends_on_the_texts_alone(tmp_path: Path) -> None:
    encode = Encoder()
    data, _ = encoded(opened(csv(tmp_path / "one/train.csv", WORDS)), encode)
    shutil.copy(tmp_path / "one/train.csv", tmp_path / "copy.csv")
    shutil.move(tmp_path / "one", tmp_path / "another")
    csv(tmp_path / "shards/train-0.csv", WORDS[:2])
    csv(tmp_path / "shards/train-1.csv", WORDS[2:])
    longer = opened(csv(tmp_path / "longer.csv", ["w0", *WORDS[::-1], "w9"]))
    tables_of_same_texts = [
        *(opened(tmp_path / name) for name in ("copy.csv", "another", "shards")),
        opened(csv(tmp_path / "more.csv", WORDS, more="7")),
        longer.select(torch.arange(len(WORDS), 0, -1)),
    ]
    for other in tables_of_same_texts:
        cached, calls = encoded(other, encode)
        assert (calls, cached[:]) == (0, data[:])
    with_nulls = pa.table({"text": [None, *TEXTS]})  # a sliced table keeps Arrow's bitmap of nulls
    rows = (pa.table({"text": TEXTS}), with_nulls.slice(1))
    assert [encoded(Table(datasets.Dataset(each), "here"), encode)[1] for each in rows] == [1, 0]


@pytest.mark.parametrize(
    "texts",
    [
        ["the film was bad .", *TEXTS[1:]],
        TEXTS[:-1],
        [*TEXTS, ""],
        TEXTS[::-1],
        ["the film was good .bad", "", *TEXTS[2:]],  # the same characters, split differently
    ],
)
def test_other_texts_are_tokenised_again(texts: list[str]) -> None:
    encode = Encoder()
    encoded(table(TEXTS), encode)
    data, calls = encoded(table(texts), encode)
    assert calls == 1
    assert data["input_ids"][:] == word_tokenizer()(texts, truncation=True, max_length=6)["input_ids"]


def test_swapped_sentences_of_a_pair_have_other_tokens() -> None:
    encode = Encoder(limit=64)
    one, two = table(WORDS, other=WORDS[::-1]), table(WORDS[::-1], other=WORDS)
    for of, columns, pairs in (
        (one, ["text", "other"], (WORDS, WORDS[::-1])),
        (one, ["other", "text"], (WORDS[::-1], WORDS)),
        (two, ["text", "other"], (WORDS[::-1], WORDS)),
    ):
        assert encoded(of, encode, *columns)[0]["input_ids"][:] == word_tokenizer()(*pairs)["input_ids"]


def with_words(*words: str) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(list(words))
    return tokenizer


TYPES = ["input_ids", "token_type_ids", "attention_mask"]
OTHERS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "length": lambda _: Encoder(limit=7),
    "words": lambda _: Encoder(with_words("unheard")),
    "side": lambda _: Encoder(word_tokenizer(truncation_side="left")),
    "columns": lambda _: Encoder(word_tokenizer(model_input_names=TYPES)),
    "format": lambda patch: patch.setattr(f"{OURS}.FORMAT", FORMAT + 1),
    "datasets": lambda patch: patch.setattr(datasets, "__version__", "0.0"),
    **{
        library: lambda patch, library=library: patch.setattr(  # type: ignore[misc]
            f"{OURS}.version", lambda name: "0.0" if name == library else version(name)
        )
        for library in ("tokenizers", "transformers")
    },
}


@pytest.mark.parametrize("other", OTHERS)
def test_everything_that_affects_the_tokens_gets_a_new_cache_file(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    encode = Encoder()
    encoded(table(TEXTS), encode)
    with monkeypatch.context() as patch:
        encode = OTHERS[other](patch) or encode
        data, calls = encoded(table(TEXTS), encode)
        assert calls == 1
        assert encoded(table(TEXTS), encode)[1] == 0
    expected = encode.tokenizer(TEXTS, truncation=True, max_length=encode.limit)["input_ids"]
    assert data["input_ids"][:] == expected
    assert encoded(table(TEXTS), Encoder())[1] == 0


def test_the_state_of_a_tokenizer_does_not_depend_on_calls_or_its_path(tmp_path: Path) -> None:
    states = set()
    for name in ("one", "another"):
        word_tokenizer().save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        states.add(tokenizer_state(tokenizer))
        tokenizer(TEXTS, truncation=True, max_length=4, padding="max_length")
        states.add(tokenizer_state(tokenizer))
    assert len(states) == 1


# ------------------------------------------------------------------------------------------------------------ data set


def dataset(texts: Any = None, **targets: list[Any]) -> TokenDataset:
    """Return a data set of 7 rows. Row `i` has `i % 3 + 1` tokens, which are all `i`."""
    ids = [[i] * (i % 3 + 1) for i in range(7)]
    types = [[0] * len(row) for row in ids]
    data = datasets.Dataset.from_dict({"input_ids": ids, "token_type_ids": types, "length": [len(row) for row in ids]})
    return TokenDataset(data, {name: torch.tensor(values) for name, values in targets.items()}, texts)


def test_lengths_follow_a_selection() -> None:
    assert dataset().lengths.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert not dataset().lengths.is_floating_point()
    chosen = TokenDataset(dataset().data.select([5, 0, 1]))
    assert chosen.lengths.tolist() == [3, 1, 2]
    assert [row["input_ids"] for row in chosen.__getitems__([0, 2])] == [[5, 5, 5], [1, 1]]


def test_rows_are_read_by_number_or_by_draw_after_pickling() -> None:
    texts = datasets.Dataset.from_dict({"target": [f"text {i}" for i in range(7)]})
    data = dataset(texts, label=[10 * i for i in range(7)], score=[0.5 * i for i in range(7)])
    data = pickle.loads(pickle.dumps(data))
    expected = [
        {
            **{"input_ids": [i] * n, "token_type_ids": [0] * n, "target": f"text {i}"},
            **{"label": 10 * i, "score": 0.5 * i, "index": i},
        }
        for i, n in ((4, 2), (0, 1), (5, 3), (4, 2))
    ]
    assert data.__getitems__([4, 0, 5, 4]) == expected
    assert data.__getitems__([(4, 99), (0, 99), (5, 98), (4, 1)]) == expected
    assert data[5] == data[5, 123] == expected[2]
    assert (type(data[5]["label"]), type(data[5]["score"]), len(data)) == (int, float, 7)
    assert set(dataset()[0]) == {"input_ids", "token_type_ids", "index"}


def test_a_digest_of_rows_covers_tokens_targets_texts_and_order() -> None:
    texts = [datasets.Dataset.from_dict({"target": [f"{name} {i}" for i in range(7)]}) for name in "ab"]
    rows = [dataset(), dataset(label=[0] * 7), dataset(label=[0] * 6 + [1]), *map(dataset, texts)]
    rows += [TokenDataset(dataset().data.select(order)) for order in (range(6), range(6, -1, -1))]
    assert len({data.rows_digest() for data in rows}) == len(rows)
    assert dataset(label=[0] * 7).rows_digest() == rows[1].rows_digest()
