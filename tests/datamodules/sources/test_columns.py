"""Guessed columns: first from the names of columns, then from their cells."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from datamodules.errors import DataError
from datamodules.sources.columns import (
    columns_line,
    guess_label_column,
    guess_text_columns,
    named_column,
    named_columns,
)
from datamodules.sources.tables import Table

WORDS = ["a long enough text", "another text here", "one more text", "the last of the texts"] * 5
FEW, MANY = ["x", "y"] * 10, [f"id{i}" for i in range(20)]


def table(**columns: list[Any]) -> Table:
    return Table(datasets.Dataset.from_dict(columns), "a.csv")


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        ({"id": MANY, "Review": WORDS, "Sentiment": FEW}, ["Review"], "Sentiment"),
        ({"label": FEW, "text": WORDS}, ["text"], "label"),
        ({"text": WORDS, "label": FEW, "category": FEW}, ["text"], "label"),  # `label` is the likelier name
        ({"premise": WORDS, "hypothesis": WORDS, "label": FEW}, ["premise", "hypothesis"], "label"),
        ({"hypothesis": WORDS, "x": MANY, "premise": WORDS, "class": FEW}, ["premise", "hypothesis"], "class"),
        ({"text_a": WORDS, "text_b": WORDS, "score": [0.5, 1.5] * 10}, ["text_a", "text_b"], "score"),
        ({"k": MANY, "beschreibung": WORDS, "art": FEW}, ["beschreibung"], "art"),  # guessed from the cells
        ({"beschreibung": WORDS, "nummer": list(range(20)), "note": [1, 2] * 10}, ["beschreibung"], "note"),
        ({"Date": ["1.11.", "2.11."] * 10, "comment": WORDS, "Happy?": FEW}, ["comment"], "Happy?"),
        ({" text ": WORDS, "LABEL": FEW}, [" text "], "LABEL"),
        ({"title": WORDS, "body": WORDS, "label": FEW}, ["body"], "label"),
        ({"text": WORDS, "rating": FEW, "category": FEW, "y": FEW}, ["text"], "y"),  # `y` means a label
        ({"id": list(range(20)), "description": WORDS, "price": [i / 4 for i in range(20)]}, ["description"], "price"),
        ({"text": WORDS, "e": [i / 4 for i in range(20)]}, ["text"], "e"),  # a name that is no number
        ({"Type": WORDS, "k": FEW}, ["Type"], "k"),  # the column of the texts is no label
    ],
)
def test_columns_are_guessed(columns: dict[str, list[Any]], texts: list[str], label: str) -> None:
    made = table(**columns)
    assert guess_text_columns(made) == texts
    assert guess_label_column(made, texts) == label


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": [1, 2], "b": [0.5, 1.5]}, ["data.text_columns", "no column of a.csv holds text", "a, b"]),
        (
            {"text": WORDS, "k": MANY},
            ["data.label_column: a.csv has no column label; it has text, k. Name one of these columns."],
        ),
        (
            {"id": list(range(20)), "description": WORDS, "rooms": list(range(20))},
            [
                "data.label_column: no column of a.csv looks like a label. rooms holds numbers. For a regression, set "
                "data.label_column to rooms. For whole numbers, also set model.class_names to []."
            ],
        ),
        (
            {"text": WORDS, "price": [i / 4 for i in range(20)], "views": list(range(20))},
            ["price, views hold numbers", "to one of these columns. For whole numbers, also set model.class_names to"],
        ),
        ({"good film": WORDS, "0.5": [i / 4 for i in range(20)]}, ["The first line of the file must name its columns"]),
        ({"label": WORDS, "k": MANY}, ["data.label_column: a.csv has no column of labels beside the texts (label)"]),
        ({"text": WORDS, "p": FEW, "q": FEW}, ["data.label_column", "2 columns of a.csv may hold the labels (p, q)"]),
        (
            {"review": WORDS, "category": FEW, "Rating": FEW},
            ["data.label_column: 2 columns of a.csv may hold the labels (category, Rating). Name one."],
        ),
        ({"text": WORDS, "class": FEW, "label": FEW}, ["data.label_column", "(class, label)"]),
        ({"text": WORDS, "Label": FEW, "label": FEW}, ["data.label_column", "(Label, label)"]),
    ],
)
def test_ambiguous_columns_are_refused(columns: dict[str, list[Any]], words: list[str]) -> None:
    made = table(**columns)
    with pytest.raises(DataError) as error:
        guess_label_column(made, guess_text_columns(made))
    assert all(word in str(error.value) for word in words), error.value


def test_the_first_known_name_is_chosen() -> None:
    made = table(title=WORDS, Document=WORDS)
    assert named_column(made, ("document", "title")) == "Document"
    assert named_column(made, ("title", "document")) == "title"
    assert named_column(made, ("body",)) is None


def test_the_last_word_of_a_name_matches_if_no_whole_name_does() -> None:
    made = table(**{"Customer Question": WORDS, "best_answer": WORDS, "answer_id": FEW})
    assert named_column(made, ("prompt", "question"), last_word=True) == "Customer Question"
    assert named_column(made, ("answer",), last_word=True) == "best_answer"
    assert named_column(made, ("question",)) is None
    assert named_column(table(question=WORDS, other_prompt=WORDS), ("prompt", "question"), last_word=True) == "question"
    assert named_column(made, ("answer",), ["best_answer"], last_word=True) is None


def test_the_first_group_with_a_match_decides() -> None:
    made = table(short_summary=WORDS, title=WORDS, Headline=WORDS, id=MANY)
    groups = [("summary",), ("abstract", "headline", "title")]
    assert named_columns(made, groups) == ["title", "Headline"]
    assert named_columns(made, groups, ["title", None]) == ["Headline"]
    assert named_columns(made, groups, last_word=True) == ["title", "Headline"]  # a whole name has precedence
    assert named_columns(made, groups[:1], last_word=True) == ["short_summary"]
    assert named_columns(made, [("text",)], last_word=True) == []


def test_a_line_names_the_guesses_and_the_columns_that_are_not_read() -> None:
    made = table(title=WORDS, body=WORDS, label=FEW)
    assert columns_line("text of body", [], made, made.data.column_names) == "columns: text of body"
    assert columns_line("text of body", ["data.a"], made, ["body", "label", None]) == (
        "columns: text of body (guessed; data.a overrides); not used: title"
    )
    assert " (guessed; data.a and data.b override); not used: title, label" in columns_line(
        "text of body", ["data.a", "data.b"], made, ["body"]
    )
