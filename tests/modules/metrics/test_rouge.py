"""ROUGE equals Google's `rouge_score`, however the texts are batched."""

from __future__ import annotations

import nltk
import pytest
from rouge_score.rouge_scorer import RougeScorer

from modules.metrics.rouge import KINDS, Rouge, one_sentence_per_line

PAIRS = [  # prediction, reference
    ("the films were good", "the film was good"),  # equal stems
    ("a cat sat\non the mat", "the cat sat on a mat\nit was\non it"),
    ("on the mat\na cat sat", "a cat sat\non the mat"),  # other order: rougeL and rougeLsum differ
    ("", "the film was good"),
    ("  \n", "good"),
    ("naïve café – Łódź", "naive cafe – Łódź"),
    ("½ £ – 😀", "½ £ – 😀"),  # no letters
    ("Über 3.5 million £ were paid!", "over 3.5 million $ are paid"),
    ("same text here", "same text here"),
    ("nothing in common", "w1 w2 w3"),
    ("a b c\na d c", "a c d b\nc b a"),  # swapping prediction and reference changes rougeLsum alone
]


def direct(pairs: list[tuple[str, str]]) -> dict[str, float]:
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {kind: sum(s[kind].fmeasure for s in scores) / len(pairs) for kind in KINDS}


def updated(*batches: list[tuple[str, str]]) -> Rouge:
    metric = Rouge()
    for batch in batches:
        metric.update([prediction for prediction, _ in batch], [reference for _, reference in batch])
    return metric


def values(metric: Rouge) -> dict[str, float]:
    return {kind: float(value) for kind, value in metric.compute().items()}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_score_of_a_pair_equals_rouge_score(pair: tuple[str, str]) -> None:
    assert values(updated([pair])) == pytest.approx(direct([pair]), abs=1e-7)


def test_the_four_scores_of_the_pairs_differ() -> None:
    assert len({round(value, 6) for value in direct(PAIRS).values()}) == 4


def test_values_are_means_of_all_pairs() -> None:
    assert values(updated(PAIRS[:4], [], PAIRS[4:])) == pytest.approx(direct(PAIRS), abs=1e-7)
    assert list(updated(PAIRS).compute()) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_an_empty_prediction_counts_with_score_zero() -> None:
    assert values(updated([("", "good")])) == dict.fromkeys(KINDS, 0.0)
    assert values(updated([("", "good"), ("good film", "good film")])) == dict.fromkeys(KINDS, 0.5)


@pytest.mark.parametrize("cut", [1, 4])
def test_merged_halves_equal_the_complete_metric(cut: int) -> None:
    first, second = updated(PAIRS[:cut]), updated(PAIRS[cut:])
    assert {name: reduce.__name__ for name, reduce in first._reductions.items()} == {  # type: ignore[union-attr]
        "scores": "dim_zero_sum",
        "pairs": "dim_zero_sum",
    }
    first.merge_state(second)
    assert values(first) == pytest.approx(values(updated(PAIRS)), abs=1e-7)
    assert first.pairs == len(PAIRS)


def test_unequal_numbers_of_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Rouge().update(["one"], ["one", "two"])


# ------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("The film was good. It was long! Was it not?", ["The film was good.", "It was long!", "Was it not?"]),
        ("Das war schön. Élan vital.", ["Das war schön.", "Élan vital."]),
        ("It cost 3.5 million. They paid.", ["It cost 3.5 million.", "They paid."]),
        ("no sentence at all", ["no sentence at all"]),
        ("  spaces around  ", ["spaces around"]),
        ("First line. Of two sentences\nsecond line", ["First line. Of two sentences", "second line"]),
        ("one line and an end\n", ["one line and an end"]),
        ("", [""]),
        (" \n ", [""]),
    ],
)
def test_in_lines_puts_each_sentence_on_a_line_and_keeps_lines(text: str, lines: list[str]) -> None:
    assert one_sentence_per_line(text) == "\n".join(lines)
    assert one_sentence_per_line(one_sentence_per_line(text)) == one_sentence_per_line(text)


def test_sentences_are_split_without_nltks_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **keys: object) -> None:
        raise LookupError("no data here")

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.data, "find", missing)
    monkeypatch.setattr(nltk.data, "load", missing)
    assert one_sentence_per_line("It was good. It was long.") == "It was good.\nIt was long."


def test_rougelsum_splits_a_single_line_into_sentences() -> None:
    pair = ("It was long. The film was good.", "The film was good. It was long.")
    lines = (pair[0].replace(". ", ".\n"), pair[1].replace(". ", ".\n"))
    assert direct([lines])["rougeLsum"] == 1.0 > direct([pair])["rougeLsum"]
    assert values(updated([pair])) == pytest.approx(direct([lines]), abs=1e-7)
    assert values(updated([pair]))["rougeL"] == pytest.approx(direct([pair])["rougeL"], abs=1e-7)


def test_abbreviations_do_not_end_sentences() -> None:
    text = "Mr. Smith of the U.S. Senate went to Dr. Brown at 5 p.m. on Jan. 5. He left."
    assert one_sentence_per_line(text).splitlines() == [text.removesuffix(" He left."), "He left."]
