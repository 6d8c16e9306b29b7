"""ROUGE as the field reports it: Google's `rouge_score`, gathered as a metric, with tokens for every script."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import regex
import torch
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor
from torchmetrics import Metric

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


# nltk's trained splitter knows more of them, and downloads what it knows
ABBREVIATIONS = """
mr mrs ms messrs dr prof rev hon st sr jr gen sen rep gov lt col capt sgt maj cmdr
jan feb mar apr jun jul aug sept sep oct nov dec mon tue wed thu fri sat sun
a.m p.m e.g i.e u.s u.k u.n d.c vs etc al nos vol pp fig approx est inc ltd co corp bros dept univ ave rd blvd mt ft
"""


# Scripts without spaces between words: Han, kana, and the scripts whose line breaks need a dictionary (Unicode's class
# SA: Thai, Lao, Khmer, Burmese). ROUGE over characters needs no dictionary (Hu et al. 2015, LCSTS, for Chinese).
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc\p{lb=SA}]"
# A run of letters and digits outside the Latin script; marks, joiners and the Arabic tatweel continue it.
_NOT_LATIN = r"[[\p{L}--\p{Latin}--\p{Common}--\p{Inherited}][\p{Nd}--[0-9]]\u30fc\uff70]"
_RUN = regex.compile(rf"(?:{_NOT_LATIN}[\p{{M}}\u0640\u200c\u200d\uff9e\uff9f]*)+", regex.V1)
_TOKEN = regex.compile(rf"{_UNSPACED}[\p{{M}}\u200d]*|(?:(?!{_UNSPACED}).)+", regex.V1)
# Ends of sentences outside ASCII: the ideographic full stop, the danda, the Arabic question mark
_SENTENCE_END = regex.compile(r"([\p{STerm}--[.!?]]+[\p{Pe}\p{Pf}]*)(?=.)\s*", regex.V1)


class ScriptTokenizer:
    """Tokens of a text in any script.

    Latin letters and ASCII digits become the tokens of `rouge_score`: lower case, split at every other character ("ü"
    included), and stemmed by Porter's rules. A text in Latin script scores exactly as it does there.

    `rouge_score` drops all other scripts. Here they become words by Unicode's categories, as in XL-Sum's multilingual
    ROUGE (Hasan et al. 2021), with combining marks, NFKC-normalized and case-folded, without stemming. Scripts without
    spaces between words become characters with their marks.
    """

    def __init__(self) -> None:
        self.latin = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Split a text into tokens, in order."""
        tokens: list[str] = []
        end = 0
        for run in _RUN.finditer(text):
            tokens += self.latin.tokenize(text[end : run.start()])
            tokens += _TOKEN.findall(unicodedata.normalize("NFKC", run[0]).casefold())
            end = run.end()
        tokens += self.latin.tokenize(text[end:])
        return tokens


@cache
def _splitter() -> PunktSentenceTokenizer:
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)


def in_lines(text: str) -> str:
    """Write each sentence of a text on a line of its own, which ROUGE-Lsum needs; a text with lines keeps them.

    Sentences are found by Punkt's rules with a list of English abbreviations, and end at the sentence marks of other
    scripts (`。`, `।`, `؟`). nltk's `sent_tokenize`, which others use, is trained and can split at other places.
    """
    text = text.strip()
    if "\n" in text:
        return text
    parts = _SENTENCE_END.sub(r"\1\n", text).split("\n")
    return "\n".join(sentence for part in parts for sentence in _splitter().tokenize(part))


class Rouge(Metric):
    """Mean F-measures of ROUGE-1, -2, -L and -Lsum over pairs (Lin 2004), each in [0, 1].

    `ScriptTokenizer` makes the tokens. torchmetrics' own ROUGE needs data that nltk downloads; this one needs none.
    """

    full_state_update = False
    scores: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scorer = RougeScorer(list(KINDS), tokenizer=ScriptTokenizer())
        self.add_state("scores", torch.zeros(len(KINDS)), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Take in texts and the texts they should be like, one each."""
        for prediction, reference in zip(predictions, references, strict=True):
            scores = self.scorer.score(in_lines(reference), in_lines(prediction))
            self.scores += self.scores.new_tensor([scores[kind].fmeasure for kind in KINDS])
        self.pairs += len(predictions)

    def compute(self) -> dict[str, Tensor]:
        """The means by name."""
        return dict(zip(KINDS, (self.scores / self.pairs).float(), strict=True))
