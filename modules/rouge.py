"""ROUGE as the field reports it: Google's `rouge_score`, gathered as a metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nltk.tokenize.punkt import PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from torchmetrics import Metric

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def in_lines(text: str) -> str:
    """A text with a sentence a line, which is what ROUGE-Lsum goes by; lines that are there stay as they are."""
    text = text.strip()
    return text if "\n" in text else "\n".join(PunktSentenceTokenizer().tokenize(text))


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
        self.add_state("scores", torch.zeros(len(KINDS), dtype=torch.float64), dist_reduce_fx="sum")
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
