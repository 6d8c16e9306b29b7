"""Texts become the tokens that the tokenizer makes of them, once, and come back from disk as they were."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoTokenizer

from datamodules.errors import DataError
from datamodules.sources.tables import Table, blank_rows, check_texts, null_rows, open_table
from datamodules.text import TextData
from datamodules.tokens.tokenizing import FORMAT, TokenDataset, tokenized, tokenizer_state
from tests.backbones import word_tokenizer
from tests.datamodules.stub import stub_trainer, text_model

TEXTS = ["the film was good .", "bad", "it is not bad .", "", "w1 w2 w3 w4 w5 w6 w7", "unheard of"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test has written to."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def table(texts: list[Any], feature: str = "string", where: str = "here") -> Table:
    return Table(
        datasets.Dataset.from_dict({"text": texts}, features=datasets.Features({"text": datasets.Value(feature)})),
        where,
    )


class Encoder:
    """Cuts to `limit` tokens, and counts its calls."""

    def __init__(self, tokenizer: Any = None, limit: int = 6) -> None:
        self.tokenizer, self.limit, self.calls = tokenizer or word_tokenizer(), limit, 0

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        self.calls += 1
        tokens = self.tokenizer(*rows.values(), truncation=True, max_length=self.limit)
        return {"input_ids": tokens["input_ids"], "length": [len(ids) for ids in tokens["input_ids"]]}

    @property
    def key(self) -> dict[str, Any]:
        return {"tokenizer": tokenizer_state(self.tokenizer), "max_length": self.limit}


def encoded(of: Table, encode: Encoder, columns: list[str] | None = None) -> tuple[datasets.Dataset, int]:
    """The tokens, and how often the tokenizer was called for them."""
    before = encode.calls
    data = tokenized(of, columns or ["text"], encode, encode.key)
    return data, encode.calls - before


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# -------------------------------------------------------------------------------------------------------- tokenisation


@pytest.mark.parametrize("limit", [3, 6, 64])
def test_tokens_are_those_of_the_tokenizer(limit: int) -> None:
    data, calls = encoded(table(TEXTS), Encoder(limit=limit))
    expected = word_tokenizer()(TEXTS, truncation=True, max_length=limit)["input_ids"]
    assert data["input_ids"][:] == expected
    assert data["length"][:] == [len(ids) for ids in expected]
    assert set(data.column_names) == {"input_ids", "length"}
    assert calls > 0


def test_pairs_come_in_the_order_that_was_asked_for() -> None:
    data = Table(datasets.Dataset.from_dict({"b": TEXTS[::-1], "more": TEXTS, "a": TEXTS}), "here")
    encode = Encoder(limit=64)
    expected = word_tokenizer()(TEXTS, TEXTS[::-1])["input_ids"]
    assert encoded(data, encode, ["a", "b"])[0]["input_ids"][:] == expected
    assert encoded(data, encode, ["b", "a"])[0]["input_ids"][:] == word_tokenizer()(TEXTS[::-1], TEXTS)["input_ids"]


def test_more_rows_than_a_batch_of_the_cache() -> None:
    texts = [f"w{i % 40} w{i // 40 % 40} w{i // 1600 % 40}" for i in range(10_050)]
    encode = Encoder()
    data, calls = encoded(table(texts), encode)
    assert calls > 1
    picked = [0, 9_999, 10_000, 10_049]
    assert data[picked]["input_ids"] == word_tokenizer()([texts[i] for i in picked])["input_ids"]
    changed = [*texts[:-1], "bad"]  # in the last row alone
    assert encoded(table(texts), encode)[1] == 0
    assert encoded(table(changed), encode)[0][10_049]["input_ids"] == word_tokenizer()("bad")["input_ids"]


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_same_texts_are_not_tokenised_again(cache: Path) -> None:
    encode = Encoder()
    first, calls = encoded(table(TEXTS), encode)
    second, again = encoded(table(TEXTS), encode)
    assert (calls > 0, again) == (True, 0)
    assert second[:] == first[:]
    assert len(list((cache / "onesided").glob("*.arrow"))) == 1


def csv(file: Path, texts: list[str], more: str = "") -> Table:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"text{',more' if more else ''}\n" + "".join(f'"{t}"{more and f",{more}"}\n' for t in texts))
    opened = open_table(str(file), ("train",))
    assert opened is not None
    return opened


def test_a_file_that_was_copied_or_moved_is_not_tokenised_again(tmp_path: Path) -> None:
    encode = Encoder()
    texts = [text for text in TEXTS if text]
    assert encoded(csv(tmp_path / "one/train.csv", texts), encode)[1] > 0
    shutil.copy(tmp_path / "one/train.csv", tmp_path / "copy.csv")
    shutil.move(tmp_path / "one", tmp_path / "another")
    for file in (tmp_path / "copy.csv", tmp_path / "another"):
        opened = open_table(str(file), ("train",))
        assert opened is not None
        assert encoded(opened, encode)[1] == 0


def test_neither_other_columns_nor_shards_nor_rows_in_between_matter(tmp_path: Path) -> None:
    encode = Encoder()
    texts = [text for text in TEXTS if text]
    data, calls = encoded(csv(tmp_path / "train.csv", texts), encode)
    assert calls > 0
    csv(tmp_path / "shards/train-0.csv", texts[:2])
    csv(tmp_path / "shards/train-1.csv", texts[2:])
    shards = open_table(str(tmp_path / "shards"), ("train",))
    longer = csv(tmp_path / "longer.csv", ["w0", *texts[::-1], "w9"])
    chosen = longer.select(torch.arange(len(texts), 0, -1))
    assert shards is not None
    for other in (csv(tmp_path / "more.csv", texts, more="7"), shards, chosen):
        same, again = encoded(other, encode)
        assert again == 0
        assert same[:] == data[:]


@pytest.mark.parametrize(
    "texts",
    [
        ["the film was bad .", *TEXTS[1:]],
        TEXTS[:-1],
        [*TEXTS, ""],
        TEXTS[::-1],
        ["the film was good .bad", "", *TEXTS[2:]],  # the same letters
    ],
)
def test_other_texts_are_tokenised_anew(texts: list[str]) -> None:
    encode = Encoder()
    encoded(table(TEXTS), encode)
    data, calls = encoded(table(texts), encode)
    assert calls > 0
    assert data["input_ids"][:] == word_tokenizer()(texts, truncation=True, max_length=6)["input_ids"]


def test_the_two_sentences_of_a_pair_are_not_taken_for_each_other() -> None:
    encode = Encoder(limit=64)
    pairs = {"a": ["bad", "w1"], "b": ["good", "w2"]}
    encoded(Table(datasets.Dataset.from_dict(pairs), "here"), encode, ["a", "b"])
    turned = Table(datasets.Dataset.from_dict({"a": pairs["b"], "b": pairs["a"]}), "here")
    data, calls = encoded(turned, encode, ["a", "b"])
    assert calls > 0
    assert data["input_ids"][:] == word_tokenizer()(pairs["b"], pairs["a"])["input_ids"]


def test_another_length_is_tokenised_anew() -> None:
    assert encoded(table(TEXTS), Encoder(limit=6))[1] > 0
    data, calls = encoded(table(TEXTS), Encoder(limit=7))
    assert calls > 0
    assert max(data["length"]) == 7


def test_another_format_is_tokenised_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder()
    assert encoded(table(TEXTS), encode)[1] > 0
    monkeypatch.setattr("datamodules.tokens.tokenizing.FORMAT", FORMAT + 1)
    assert encoded(table(TEXTS), encode)[1] > 0
    assert encoded(table(TEXTS), encode)[1] == 0
    monkeypatch.setattr("datamodules.tokens.tokenizing.FORMAT", FORMAT)
    assert encoded(table(TEXTS), encode)[1] == 0


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_another_version_of_a_library_tokenises_anew(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    encode = Encoder()
    assert encoded(table(TEXTS), encode)[1] > 0
    monkeypatch.setattr(
        "datamodules.tokens.tokenizing.version", lambda name: "0.0" if name == library else version(name)
    )
    assert encoded(table(TEXTS), encode)[1] > 0


def test_another_version_of_datasets_tokenises_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder()
    assert encoded(table(TEXTS), encode)[1] > 0
    monkeypatch.setattr(datasets, "__version__", "0.0")
    assert encoded(table(TEXTS), encode)[1] > 0


def with_words(*words: str) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(list(words))
    return tokenizer


OTHERS: dict[str, Callable[[], Any]] = {
    "words": lambda: with_words("unheard"),
    "side": lambda: word_tokenizer(truncation_side="left"),
    "columns": lambda: word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_tokenizer_has_another_state_and_tokenises_anew(other: str) -> None:
    made = OTHERS[other]()
    assert tokenizer_state(made) != tokenizer_state(word_tokenizer())
    assert tokenizer_state(made) == tokenizer_state(OTHERS[other]())
    encoded(table(TEXTS), Encoder())
    data, calls = encoded(table(TEXTS), Encoder(made))
    assert calls > 0
    assert data["input_ids"][:] == made(TEXTS, truncation=True, max_length=6)["input_ids"]


def test_calls_do_not_change_the_state_of_a_tokenizer() -> None:
    tokenizer = word_tokenizer()
    state = tokenizer_state(tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=4, padding="max_length")
    assert tokenizer_state(tokenizer) == state


def test_a_tokenizer_that_was_copied_elsewhere_has_the_same_state(tmp_path: Path) -> None:
    for name in ("one", "another"):
        word_tokenizer().save_pretrained(tmp_path / name)
    one, another = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("one", "another"))
    assert tokenizer_state(one) == tokenizer_state(another)


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("feature", ["string", "large_string"])
def test_texts_that_will_do(feature: str) -> None:
    check_texts(table(TEXTS, feature), "text_columns", "text")


def test_no_such_column() -> None:
    with refuses("data.text_columns", "here has no column body; it has text."):
        check_texts(table(TEXTS), "text_columns", "body")


@pytest.mark.parametrize(
    ("cells", "feature", "texts"),
    [
        ([7, None], datasets.Value("int64"), ["7", None]),
        ([0.5, 2.0], datasets.Value("float64"), ["0.5", "2.0"]),
        ([True, False], datasets.Value("bool"), ["True", "False"]),
    ],
)
def test_numbers_are_text_where_text_is_asked_for(cells: list[Any], feature: Any, texts: list[Any]) -> None:
    data = datasets.Dataset.from_dict({"text": cells, "more": cells}).cast_column("text", feature)
    read = check_texts(Table(data, "here"), "source_column", "text")
    assert read.data["text"][:] == texts
    assert read.data.column_names == ["text", "more"]
    assert read.notes == (f"text of here holds {feature.dtype}, read as text",)


@pytest.mark.parametrize(
    ("cells", "feature", "said"),
    [
        ([None, None], datasets.Value("null"), "text in here is empty in every row"),
        ([0, 1], datasets.ClassLabel(names=["a", "b"]), "must hold text, and it holds"),
        ([["a"], ["b"]], datasets.List(datasets.Value("string")), "must hold text, and it holds List"),
    ],
)
def test_a_column_that_holds_no_text(cells: list[Any], feature: Any, said: str) -> None:
    data = datasets.Dataset.from_dict({"text": cells}, features=datasets.Features({"text": feature}))
    with refuses("data.source_column", said):
        check_texts(Table(data, "here"), "source_column", "text")


def test_texts_and_numbers_in_one_column_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    opened = open_table(str(tmp_path), ("train",))
    assert opened is not None
    assert check_texts(opened, "text_columns", "text").data["text"][:] == ["a", "3"]


@pytest.mark.parametrize(("empty", "size"), [([0], 3), ([2, 4], 6), ([10_000, 10_001], 10_100)])
def test_rows_without_text_are_found(empty: list[int], size: int) -> None:
    texts = [None if i in empty else " " if i == 1 else "a" for i in range(size)]
    assert null_rows(table(texts), "text") == set(empty)
    assert blank_rows(table(texts), "text") == {*empty, 1}


def test_rows_are_counted_in_what_was_selected() -> None:
    data = table([None, "a", "b", None, "c"]).data.select([1, 4, 3])
    assert null_rows(Table(data, "here"), "text") == {2}


# ------------------------------------------------------------------------------------------------------------ data set


def dataset(**targets: list[Any]) -> TokenDataset:
    ids = [[i] * (i % 3 + 1) for i in range(7)]
    data = datasets.Dataset.from_dict(
        {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids], "length": [len(row) for row in ids]}
    )
    return TokenDataset(data, {name: torch.tensor(values) for name, values in targets.items()})


def test_lengths_are_at_hand() -> None:
    lengths = dataset().lengths
    assert lengths.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert not lengths.is_floating_point()


def test_lengths_follow_a_selection() -> None:
    chosen = TokenDataset(dataset().data.select([5, 0, 1]))
    assert chosen.lengths.tolist() == [3, 1, 2]
    assert [row["input_ids"] for row in chosen.__getitems__([0, 2])] == [[5, 5, 5], [1, 1]]


def test_rows_by_number_and_by_draw() -> None:
    data = dataset(label=[10 * i for i in range(7)])
    expected = [
        {"input_ids": [i] * n, "token_type_ids": [0] * n, "label": 10 * i, "index": i}
        for i, n in ((4, 2), (0, 1), (5, 3), (4, 2))
    ]
    assert data.__getitems__([4, 0, 5, 4]) == expected
    assert data.__getitems__([(4, 99), (0, 99), (5, 98), (4, 1)]) == expected
    assert data[5] == data[5, 123] == expected[2]
    assert len(data) == 7


def test_targets_are_plain_numbers_of_their_kind() -> None:
    (row,) = dataset(label=[0.5] * 7, other=[3] * 7).__getitems__([6])
    assert (row["label"], row["other"]) == (0.5, 3)
    assert (type(row["label"]), type(row["other"])) == (float, int)


def test_rows_without_targets_have_none() -> None:
    assert set(dataset()[0]) == {"input_ids", "token_type_ids", "index"}


def test_texts_stand_beside_the_tokens() -> None:
    texts = datasets.Dataset.from_dict({"target": [f"text {i}" for i in range(7)]})
    data = TokenDataset(dataset().data, {"label": torch.arange(7)}, texts)
    assert [row["target"] for row in data.__getitems__([4, (0, 99), 4])] == ["text 4", "text 0", "text 4"]
    assert data[5] == {**dataset(label=list(range(7)))[5], "target": "text 5"}


def test_a_data_set_goes_to_another_process() -> None:
    data = pickle.loads(pickle.dumps(dataset(label=list(range(7)))))
    assert data.__getitems__([6, 1]) == dataset(label=list(range(7))).__getitems__([6, 1])


# --------------------------------------------------------------------------------------------------------- data module


def text_data(**model: Any) -> TextData:
    data = TextData(path="here", config="some", revision="main", batch_size=2)
    data.read_as_written("text")
    data.trainer = stub_trainer(lightning_module=text_model(word_tokenizer(), **model))
    return data


@pytest.mark.parametrize(("limit", "length"), [(64, 64), (None, 10**6)])
def test_lengths_that_the_model_has_positions_for(limit: int | None, length: int) -> None:
    text_data(position_limit=limit).check_length("max_length", length)


def test_a_length_beyond_the_positions_of_the_model() -> None:
    with refuses("data.max_source_length: 65 tokens are more than the 64 that the backbone has positions for"):
        text_data(position_limit=64).check_length("max_source_length", 65)


def test_a_model_without_a_tokenizer() -> None:
    data = text_data()
    data.trainer = stub_trainer(lightning_module=SimpleNamespace())
    with refuses("TextData needs a model that has a tokenizer"):
        _ = data.tokenizer


def test_the_hub_is_asked_for_the_configuration_and_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def names(name: str, config: str | None, revision: str | None) -> list[str]:
        asked.append((name, config, revision))
        return ["train"]

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, revision))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(text_data().training_table()) == len(TEXTS)
    assert asked == [("here", "some", "main")] * 2


def of_lengths(lengths: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths], "length": lengths})


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([3, 6, 5, 7], "2 of 4"), ([6], "1 of 1"), ([1, 6] * 1_500, "1,500 of 3,000")],
)
def test_rows_that_reach_the_limit_are_counted(
    capsys: pytest.CaptureFixture[str], lengths: list[int], said: str
) -> None:
    where = f"/a/folder/{'of-a-long-name/' * 9}[a]/train.csv"  # neither wrapped nor taken for markup
    text_data().warn_of_cut_rows(of_lengths(lengths), table(TEXTS, where=where), 6)
    told = capsys.readouterr()
    assert told.err == f"warning: {said} rows of {where} reach 6 tokens and may be cut.\n"
    assert told.out == ""


def test_nothing_is_said_of_rows_below_the_limit_nor_by_other_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text_data()
    data.warn_of_cut_rows(of_lengths([3, 5]), table(TEXTS), 6)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    data.warn_of_cut_rows(of_lengths([3, 6]), table(TEXTS), 6)
    assert capsys.readouterr() == ("", "")


def test_null_bits_of_a_column_without_nulls_are_no_difference() -> None:
    encode = Encoder()
    plain = pa.table({"text": TEXTS})
    sliced = pa.table({"text": [None, *TEXTS]}).slice(1)
    assert encoded(Table(datasets.Dataset(plain), "here"), encode)[1] > 0
    assert encoded(Table(datasets.Dataset(sliced), "here"), encode)[1] == 0
