"""ROUGE by Google's `rouge_score` as a torchmetrics metric, with tokens for all scripts."""

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


# nltk's trained sentence splitter has more abbreviations, but needs a download.
ABBREVIATIONS = """
mr mrs ms messrs dr prof rev hon st sr jr gen sen rep gov lt col capt sgt maj cmdr
jan feb mar apr jun jul aug sept sep oct nov dec mon tue wed thu fri sat sun
a.m p.m e.g i.e u.s u.k u.n d.c vs etc al nos vol pp fig approx est inc ltd co corp bros dept univ ave rd blvd mt ft
"""


# Scripts without spaces between words: Han, kana, and Unicode's class SA (Thai, Lao, Khmer, Burmese). Word boundaries
# would need a dictionary; characters need none (Hu et al. 2015, LCSTS, for Chinese).
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc\p{lb=SA}]"
# Letters and digits outside the Latin script. In `_RUN`, marks, joiners and the Arabic tatweel may follow.
_NOT_LATIN = r"[[\p{L}--\p{Latin}--\p{Common}--\p{Inherited}][\p{Nd}--[0-9]]\u30fc\uff70]"
_RUN = regex.compile(rf"(?:{_NOT_LATIN}[\p{{M}}\u0640\u200c\u200d\uff9e\uff9f]*)+", regex.V1)
_TOKEN = regex.compile(rf"{_UNSPACED}[\p{{M}}\u200d]*|(?:(?!{_UNSPACED}).)+", regex.V1)
# Ends of sentences outside ASCII: ideographic full stop, danda, Arabic question mark.
_SENTENCE_END = regex.compile(r"([\p{STerm}--[.!?]]+[\p{Pe}\p{Pf}]*)(?=.)\s*", regex.V1)


class ScriptTokenizer:
    """Tokenizer for ROUGE in any script.

    Latin letters and ASCII digits become the tokens of `rouge_score`: in lower case, split at all other characters
    (also at "ü"), with Porter stemming. The score of a text in Latin script equals the score of `rouge_score`.

    `rouge_score` drops all other scripts. This tokenizer splits these scripts into words by Unicode's categories, as in
    XL-Sum's multilingual ROUGE (Hasan et al. 2021). The words keep combining marks, are NFKC-normalized and
    case-folded, and are not stemmed. In scripts without spaces between words, each character with its marks is a token.
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


def one_sentence_per_line(text: str) -> str:
    """Write each sentence of a text on a separate line, as ROUGE-Lsum needs. A text with several lines is unchanged.

    Punkt's rules with a list of English abbreviations find the sentences. The sentence marks of other scripts (`。`,
    `।`, `؟`) end a sentence too. nltk's `sent_tokenize` is a trained splitter and can split at other places.
    """
    text = text.strip()
    if "\n" in text:
        return text
    parts = _SENTENCE_END.sub(r"\1\n", text).split("\n")
    return "\n".join(sentence for part in parts for sentence in _splitter().tokenize(part))


class Rouge(Metric):
    """Mean F-measures of ROUGE-1, -2, -L and -Lsum over pairs of texts (Lin 2004), each in [0, 1].

    The tokens come from `ScriptTokenizer`. In contrast to the ROUGE of torchmetrics, this class needs no download.
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
        """Add predictions, each with its reference."""
        for prediction, reference in zip(predictions, references, strict=True):
            scores = self.scorer.score(one_sentence_per_line(reference), one_sentence_per_line(prediction))
            self.scores += self.scores.new_tensor([scores[kind].fmeasure for kind in KINDS])
        self.pairs += len(predictions)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean F-measures by name."""
        return dict(zip(KINDS, (self.scores / self.pairs).float(), strict=True))
