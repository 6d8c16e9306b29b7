"""ROUGE as the field reports it: Google's `rouge_score`, gathered as a metric."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from torchmetrics import Metric

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


# nltk's trained splitter knows more of them, and downloads what it knows
ABBREVIATIONS = """
mr mrs ms messrs dr prof rev hon st sr jr gen sen rep gov lt col capt sgt maj cmdr
jan feb mar apr jun jul aug sept sep oct nov dec mon tue wed thu fri sat sun
a.m p.m e.g i.e u.s u.k u.n d.c vs etc al nos vol pp fig approx est inc ltd co corp bros dept univ ave rd blvd mt ft
"""


@cache
def _splitter() -> PunktSentenceTokenizer:
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)


def in_lines(text: str) -> str:
    """A text with a sentence a line, which is what ROUGE-Lsum goes by; lines that are there stay as they are.

    Where a text has no lines its sentences are found by Punkt's rules with a list of English abbreviations; nltk's
    `sent_tokenize`, which others use, is trained and may split here and there otherwise.
    """
    text = text.strip()
    return text if "\n" in text else "\n".join(_splitter().tokenize(text))


class Rouge(Metric):
    """Mean F-measures of ROUGE-1, -2, -L and -Lsum over pairs (Lin 2004), each in [0, 1], with Porter's stemmer.

    torchmetrics' own ROUGE needs data that nltk downloads; this one needs none.
    """

    full_state_update = False
    scores: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scorer = RougeScorer(list(KINDS), use_stemmer=True)
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
