"""Generation of an encoder-decoder's texts by beam search."""

from __future__ import annotations

import math
from dataclasses import dataclass

from datamodules.errors import ModelError


@dataclass(frozen=True)
class Generation:
    """Keys of beam search; of the backbone's own generation_config.json only the special tokens count.

    Args:
        num_beams: Number of hypotheses that are kept, at least 1; 1 is greedy.
        length_penalty: Exponent of the length that a hypothesis' log-probability is divided by; above 0 favours longer.
        min_length: Least tokens of a generated text, the start included.
        max_length: Most tokens of a generated text, start and end included.
        no_repeat_ngram_size: Size of n-grams that occur once at most; 0 allows all.
        early_stopping: Whether a search ends as soon as there are `num_beams` finished texts, as BART's authors do.

    Raises:
        ModelError: For a value out of range.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    min_length: int = 0
    max_length: int = 128
    no_repeat_ngram_size: int = 3
    early_stopping: bool = True

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ModelError(f"model.generation.num_beams: {self.num_beams} must be 1 or more.")
        if not 0 <= self.min_length <= self.max_length or self.max_length < 2:
            raise ModelError(
                f"model.generation: min_length {self.min_length} and max_length {self.max_length} must be 0 <= min <= "
                "max, and max 2 or more."
            )
        if not math.isfinite(self.length_penalty):
            raise ModelError(f"model.generation.length_penalty: {self.length_penalty} must be finite.")
        if self.no_repeat_ngram_size < 0:
            raise ModelError(
                f"model.generation.no_repeat_ngram_size: {self.no_repeat_ngram_size} must not be negative."
            )
