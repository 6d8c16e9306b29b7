"""Multiple choice in MMLU's format: prompts, tokens, shares of ranks, answers and bad rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from tokenizers import processors

from datamodules.multiple_choice import MultipleChoiceData
from datamodules.tokens.questions import shared_prompts
from tests.causal_backbones import VOCABULARY, byte_tokenizer
from tests.support.data import set_up
from tests.support.refusals import refuses
from tests.support.trainers import quiet_trainer, text_model

Row = dict[str, Any]
SUBJECTS = ["world_religions", "anatomy", "us_foreign_policy"]
SIZES = {"dev": 9, "validation": 7, "test": 23}


def row_of(split: str, i: int) -> Row:
    """Return a row that names its split and number. Lengths differ, and the subjects take turns."""
    return {
        "question": f"{split} {i}: which" + " one" * (i * 7 % 11) + "?",
        "choices": [f"{split} {i}", "Always A", "", "none\nof these"],
        "answer": i * 5 % 4,
        "subject": SUBJECTS[i % 3],
    }


def rows_of(split: str) -> list[Row]:
    return [row_of(split, i) for i in range(SIZES[split])]


def write(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(file))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmlu")
    for split in SIZES:
        write(path / f"{split}.parquet", rows_of(split))
    return path


def changed(folder: Path, **columns: Callable[[Row], Any] | None) -> Path:
    """Write dev and test. A function in `columns` computes a column of test from each row; None drops the column."""
    write(folder / "dev.parquet", rows_of("dev"))
    rows = [{**row, **{k: v(row) for k, v in columns.items() if v}} for row in rows_of("test")]
    write(folder / "test.parquet", [{k: v for k, v in row.items() if columns.get(k, 1)} for row in rows])
    return folder


def prepared(path: Path, stage: str = "test", *, tokenizer: Any = None, limit: int | None = None, **keys: Any) -> Any:
    place = {name: keys.pop(name) for name in ("world", "rank") if name in keys}
    model = text_model(tokenizer or byte_tokenizer(), position_limit=limit)
    return set_up(MultipleChoiceData(str(path), **{"shots": 2, "batch_size": 3, **keys}), model, stage, **place)


def batches_of(path: Path, stage: str = "test", **keys: Any) -> list[dict[str, Any]]:
    data = prepared(path, stage, **keys)
    loaders = {"validate": data.val_dataloader, "test": data.test_dataloader, "predict": data.predict_dataloader}
    (loader,) = loaders[stage]()
    batches = list(loader)
    assert len(loader) == len(batches)
    return batches


def tokens_of(batch: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of each complete prompt of a batch."""
    rests = zip(batch["input_ids"], batch["lengths"], strict=True)
    return [batch["prefix"].tolist() + ids[:length].tolist() for ids, length in rests]


def prompts_of(batches: list[dict[str, Any]]) -> dict[int, str]:
    """Return the text of each prompt, by row."""
    return {
        int(row): str(byte_tokenizer().decode(ids, clean_up_tokenization_spaces=False))
        for batch in batches
        for row, ids in zip(batch["index"], tokens_of(batch), strict=True)
    }


def indices(batches: list[dict[str, Any]]) -> list[int]:
    return [row for batch in batches for row in batch["index"].tolist()]


# ------------------------------------------------------------------------------------------------------------- prompts

BY_HAND = """The following are multiple choice questions (with answers) about us foreign policy.

dev 2: which one one one?
A. dev 2
B. Always A
C. 
D. none
of these
Answer: C

dev 5: which one one?
A. dev 5
B. Always A
C. 
D. none
of these
Answer: B

test 8: which one?
A. test 8
B. Always A
C. 
D. none
of these
Answer:"""  # noqa: W291 - an empty choice


def test_a_prompt_equals_one_written_by_hand(folder: Path) -> None:
    assert prompts_of(batches_of(folder))[8] == BY_HAND


def test_shots_are_the_first_of_the_subject_in_their_order(folder: Path) -> None:
    prompts = prompts_of(batches_of(folder, shots=3))
    for row, prompt in prompts.items():
        questions = re.findall(r"^(\w+ \d+): which", prompt, re.MULTILINE)
        assert questions == [*(f"dev {row % 3 + 3 * shot}" for shot in range(3)), f"test {row}"]
    assert len(prompts) == 23


def test_prompts_without_shots_and_subject(tmp_path: Path) -> None:
    path = changed(tmp_path, subject=None)
    (tmp_path / "dev.parquet").unlink()
    text = "The following are multiple choice questions (with answers).\n\ntest 8: which one?\nA. test 8\nB."
    for keys in ({}, {"subject_column": None}):
        batches = batches_of(path, shots=0, **keys)
        assert prompts_of(batches)[8].startswith(text)
        assert {batch["subject"] for batch in batches} == {"unknown"}


def test_there_is_one_letter_for_each_choice(tmp_path: Path) -> None:
    def two(row: Row) -> list[str]:
        return row["choices"][:2]

    path = changed(tmp_path, choices=two, answer=lambda row: row["answer"] % 2)
    (first, *_) = batches_of(path, shots=0)
    assert first["choices"].tolist() == [VOCABULARY["ĠA"], VOCABULARY["ĠB"]]
    assert "\nB. Always A\nAnswer:" in prompts_of([first])[int(first["index"][0])]


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("starts", [False, True])
def test_tokens_equal_those_of_complete_prompts(folder: Path, starts: bool) -> None:
    tokenizer = byte_tokenizer()
    if starts:  # as LLaMA's tokenizer
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    batches = batches_of(folder, tokenizer=tokenizer)
    prompts = prompts_of(batches)
    for batch in batches:
        for row, ids in zip(batch["index"].tolist(), tokens_of(batch), strict=True):
            assert ids == tokenizer(prompts[row].removeprefix("<|im_start|>"))["input_ids"]
            assert (ids[0] == 1) == starts
    assert all(batch["input_ids"].shape[1] == batch["lengths"].max() for batch in batches)
    names = ("prefix", "input_ids", "lengths", "choices", "answers", "index")
    assert all(batches[0][name].dtype == torch.int64 for name in names)


def test_the_prefix_is_the_longest_common_prefix_of_a_subject(folder: Path) -> None:
    batches = batches_of(folder)
    for subject in SUBJECTS:
        batches_of_subject = [batch for batch in batches if batch["subject"] == subject]
        prompts = [ids for batch in batches_of_subject for ids in tokens_of(batch)]
        size = len(batches_of_subject[0]["prefix"])
        assert all(torch.equal(batch["prefix"], batches_of_subject[0]["prefix"]) for batch in batches_of_subject)
        assert len({tuple(ids[:size]) for ids in prompts}) == 1 < len({tuple(ids[: size + 1]) for ids in prompts})


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (["abcd", "abxy", "abcz"], 2),
        (["abx", "abcd", "abcde", "ab"], 1),  # `ab` begins the other prompts, and keeps its last token
        (["abcd", "abcd"], 3),
        (["abcd"], 3),
        (["abc", "xbc"], 0),
        (["x"], 0),
        (["ab" * 20 + str(i) for i in range(600)], 40),  # more prompts than one call of the tokenizer takes
        (["ab" * 20 + str(i) for i in range(600)] + ["ac"], 1),
    ],
)
def test_prefix_and_rest_form_the_complete_prompt(texts: list[str], shared: int) -> None:
    prompts = shared_prompts(texts, byte_tokenizer())
    assert len(prompts.prefix) == shared
    joined = [[*prompts.prefix.tolist(), *rest.tolist()] for rest in prompts.rests]
    assert joined == byte_tokenizer()(texts)["input_ids"]
    assert all(len(rest) > 0 for rest in prompts.rests)
    assert prompts.longest == max(map(len, texts))


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_have_one_subject_and_similar_lengths(folder: Path) -> None:
    batches = batches_of(folder)
    subjects = [batch["subject"] for batch in batches]
    assert subjects == sorted(subjects, key=subjects.index)  # batches of one subject are adjacent
    assert sorted(indices(batches)) == list(range(23))
    assert all(batch["answers"].tolist() == [row * 5 % 4 for row in batch["index"].tolist()] for batch in batches)
    for subject in SUBJECTS:
        batches_of_subject = [batch for batch in batches if batch["subject"] == subject]
        assert {row % 3 for row in indices(batches_of_subject)} == {SUBJECTS.index(subject)}
        assert [len(batch["index"]) for batch in batches_of_subject] == {8: [3, 3, 2], 7: [3, 3, 1]}[
            len(indices(batches_of_subject))
        ]
        lengths = [length for batch in batches_of_subject for length in batch["lengths"].tolist()]
        assert lengths == sorted(lengths, reverse=True)
    longest = [
        max(len(ids) for batch in batches if batch["subject"] == s for ids in tokens_of(batch)) for s in SUBJECTS
    ]
    assert max(len(ids) for ids in tokens_of(batches[0])) == max(longest)
    assert indices(batches_of(folder)) == indices(batches)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_subject(folder: Path, world: int) -> None:
    of_one_process = prompts_of(batches_of(folder))
    shares = [batches_of(folder, world=world, rank=rank) for rank in range(world)]
    assert sorted(row for share in shares for row in indices(share)) == list(range(23))
    for share in shares:
        assert all(text == of_one_process[row] for row, text in prompts_of(share).items())
        counts = [sum(row % 3 == i for row in indices(share)) for i in range(3)]
        assert all(abs(count - size / world) < 1 for count, size in zip(counts, (8, 8, 7), strict=True))


class Echo(L.LightningModule):
    """A model whose prediction is the subject and the rows of the batch."""

    position_limit = None

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = byte_tokenizer()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> tuple[str, list[int]]:
        return batch["subject"], batch["index"].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_predicts_on_unchanged_batches(folder: Path, workers: int) -> None:
    """Lightning rebuilds the loaders for prediction. The rebuilt loaders must yield the same batches."""
    data = MultipleChoiceData(str(folder), shots=2, batch_size=3, num_workers=workers)
    expected = [(batch["subject"], batch["index"].tolist()) for batch in batches_of(folder)]
    assert quiet_trainer(use_distributed_sampler=False).predict(Echo(), data) == expected


# -------------------------------------------------------------------------------------------------------------- limits


def longest_of(folder: Path, shots: int) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for batch in batches_of(folder, shots=shots):
        lengths[batch["subject"]] = max(lengths.get(batch["subject"], 0), *map(len, tokens_of(batch)))
    return lengths


def test_a_subject_has_as_many_shots_as_fit_with_all_its_questions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, one = longest_of(folder, 2), longest_of(folder, 1)
    capsys.readouterr()
    limit = sorted(two.values())[1]  # one subject exceeds this limit
    (longer,) = [subject for subject, length in two.items() if length > limit]
    for keys in ({"max_length": limit}, {"limit": limit}):
        batches = batches_of(folder, **keys)
        assert max(len(ids) for batch in batches for ids in tokens_of(batch)) <= limit
        for batch in batches:
            shots = {text.count("dev") // 2 for text in prompts_of([batch]).values()}
            assert shots == {1 if batch["subject"] == longer else 2}
        lines = [line for line in capsys.readouterr().err.splitlines() if "shots" in line]
        where = folder / "test.parquet"
        expected = f"warning: fewer than 2 shots for 1 of 3 subjects of {where} to fit {limit} tokens: "
        assert lines == [f"{expected}{longer} 1."]
    assert one[longer] <= limit
    batches_of(folder, max_length=max(two.values()))
    batches_of(folder)
    assert "fewer" not in capsys.readouterr().err


def test_a_question_that_is_too_long_without_shots_is_refused(folder: Path) -> None:
    zero = longest_of(folder, 0)
    longest = max(zero.values())
    prompts = prompts_of(batches_of(folder, max_length=longest))
    assert any("dev" not in prompt for prompt in prompts.values())
    with refuses("data.max_length", f"takes {longest} tokens without a shot, more than the {longest - 1}", "subjects"):
        batches_of(folder, max_length=longest - 1)
    skipping = prepared(folder, "test", max_length=longest - 1, skip_bad_rows=1)
    assert [row.reason.split(",")[0] for row in skipping.findings.skipped] == [f"takes {longest} tokens without a shot"]
    predicting = prepared(folder, "predict", max_length=longest - 1)
    assert [row["index"] for row in predicting.failed_rows(0)] == [int(skipping.findings.skipped[0].row.split()[1])]


def test_subjects_and_limits_select_rows(folder: Path) -> None:
    batches = batches_of(folder, subjects=["anatomy"])
    assert sorted(indices(batches)) == list(range(1, 23, 3))
    some = indices(batches_of(folder, subjects=["anatomy"], max_test_samples=3))
    assert len(some) == 3
    assert set(some) <= set(indices(batches))
    assert sorted(indices(batches_of(folder, "validate", max_val_samples=50))) == list(range(7))


# ------------------------------------------------------------------------------------------------- answers, prediction


@pytest.mark.parametrize("kind", ["letters", "class labels"])
def test_answers_may_be_letters(tmp_path: Path, folder: Path, kind: str) -> None:
    if kind == "letters":
        changed(tmp_path, answer=lambda row: f" {'ABCD'[row['answer']]}")
    else:  # as in cais/mmlu
        labels = datasets.ClassLabel(names=list("ABCD"))
        for split in ("dev", "test"):
            rows = datasets.Dataset.from_list(rows_of(split)).cast_column("answer", labels)
            rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    for ours, expected in zip(batches_of(tmp_path), batches_of(folder), strict=True):
        assert torch.equal(ours["answers"], expected["answers"])


def test_predictions_have_letters_and_log_probabilities(tmp_path: Path) -> None:
    rows = [{**row, "answer": row["answer"] if i else -1} for i, row in enumerate(rows_of("test"))]
    path = write(changed(tmp_path / "data").parent / "asked.parquet", rows)
    data = prepared(tmp_path / "data", "predict", predict_path=str(path), subjects=["anatomy", "world_religions"])
    (loader,) = data.predict_dataloader()
    assert sorted(indices(list(loader))) == [row for row in range(23) if row % 3 < 2]
    assert data.prediction_files == ("predictions.csv",)
    scores = [-3.0, -2.0, -0.5, -4.0]
    letters = {f"log_probability_{letter}": score for letter, score in zip("ABCD", scores, strict=True)}
    row = data.complete_prediction({"index": 4, "log_probabilities": scores}, 0)
    assert row == {"index": 4, "subject": "anatomy", "prediction": "C", "answer": "A", **letters}
    row = data.complete_prediction({"index": 0, "log_probabilities": scores}, 0)
    assert row == {"index": 0, "subject": "world_religions", "prediction": "C", "answer": "", **letters}


def test_questions_without_answers_can_be_predicted_and_not_tested(tmp_path: Path) -> None:
    path = changed(tmp_path, answer=None)
    assert all((batch["answers"] == -1).all() for batch in batches_of(path, "predict"))
    with refuses("data.answer_column", "has no column answer"):
        batches_of(path)


# ----------------------------------------------------------------------------------------------------------- bad input


def only(change: Any, row: Row, column: str) -> Any:
    """Return `change` for row 5, and the cell of `column` for the other rows."""
    return change if "test 5:" in row["question"] else row[column]


ANSWERS: list[Any] = [4, -1, "E", "", "AB", "a", None, 1.5]
CHOICES: list[Callable[[Row], Any]] = [
    lambda row: row["choices"] + ["more"] * ("test 5:" in row["question"]),
    lambda row: row["choices"][:1],
    lambda row: ["x"] * 27,
    lambda row: [*row["choices"][:3], only(None, row, "question")],
    lambda row: only(None, row, "choices"),
    lambda row: "a text",
    lambda row: [1, 2, 3, 4],
]
SAID = {
    "answer": ("data.answer_column: row ", "indices from 0 to 3 or letters from A to D"),
    "choices": ("data.choices_column: row ", "must hold lists of 2 to 26 texts, as many in each row"),
    "question": ("data.question_column: row 5", "has no text in column question"),
}


def answers(wrong: Any) -> Callable[[Row], Any]:
    """Return a function for a column of answers. Row 5 has the answer `wrong`, and all answers have its type."""
    if isinstance(wrong, str):
        return lambda row: only(wrong, {**row, "answer": "ABCD"[row["answer"]]}, "answer")
    return lambda row: only(wrong, {**row, "answer": type(wrong or 0)(row["answer"])}, "answer")


@pytest.mark.parametrize(
    ("column", "column_of"),
    [
        *(("answer", answers(wrong)) for wrong in ANSWERS),
        *(("choices", column_of) for column_of in CHOICES),
        ("question", lambda row: only(" ", row, "question")),
    ],
)
def test_a_malformed_question_is_refused(tmp_path: Path, column: str, column_of: Callable[[Row], Any]) -> None:
    path = changed(tmp_path, **{column: column_of})
    with refuses(*SAID[column]):
        batches_of(path)
    if column == "question":
        assert sorted(indices(batches_of(path, skip_bad_rows=1))) == [row for row in range(23) if row != 5]
        assert [row["index"] for row in prepared(path, "predict").failed_rows(0)] == [5]


BAD: list[tuple[str, Row, tuple[str, ...]]] = [  # stage, keys, parts of the message
    ("fit", {}, ("MultipleChoiceData has no training rows", "validate, test and predict")),
    ("validate", {}, ("data.path", "no validation split")),
    ("test", {"shots_split": "few"}, ("data.shots_split", "no few split for the shots", "data.shots")),
    ("test", {"shots_split": "test"}, ("data.shots_split", "among the questions to ask")),
    ("test", {"shots": 4}, ("data.shots", "3 questions of", "for 4 shots")),
    ("test", {"question_column": "text"}, ("data.question_column", "no column text")),
    ("test", {"answer_column": "text"}, ("data.answer_column", "no column text")),
    ("test", {"subject_column": "subjct"}, ("data.subject_column", "subjct", "subject")),
    (
        "test",
        {"max_length": 600, "limit": 500},
        ("data.max_length", "600 tokens are more than the backbone's 500 positions"),
    ),
    ("test", {"max_test_samples": 4, "world": 5}, ("4 questions are fewer than the 5 processes",)),
    (
        "test",
        {"subjects": ["virology", "anatomy", "astronomy"]},
        ("data.subjects", "no questions of astronomy, virology", "anatomy, us_foreign_policy"),
    ),
    ("test", {"shots": -1}, ("data.shots",)),
    ("test", {"subjects": []}, ("data.subjects", "the list is empty")),
    ("test", {"max_length": 0}, ("data.max_length",)),
    ("test", {"max_test_samples": 0}, ("data.max_test_samples",)),
    ("test", {"batch_size": 0}, ("data.batch_size",)),
    ("test", {"question_column": "a", "choices_column": "a"}, ("data.choices_column: a is data.question_column",)),
]


@pytest.mark.parametrize(("stage", "keys", "parts"), BAD)
def test_bad_input_is_refused(tmp_path: Path, stage: str, keys: Row, parts: tuple[str, ...]) -> None:
    data = changed(tmp_path)
    with refuses(*parts):
        prepared(data, stage, **keys).test_dataloader()


def test_letters_must_be_one_token_each(folder: Path) -> None:
    ends, bare = byte_tokenizer(), byte_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    bare.backend_tokenizer.model = type(bare.backend_tokenizer.model)(VOCABULARY, [("Ġ", letter) for letter in "ABC"])
    for tokenizer in (ends, bare):
        with refuses("a separate token of each of the answers A to D"):
            batches_of(folder, tokenizer=tokenizer)
