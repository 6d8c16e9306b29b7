"""Configuration of beam search for encoder-decoders."""

from __future__ import annotations

import math
from dataclasses import dataclass

from datamodules.errors import ModelError


@dataclass(frozen=True)
class Generation:
    """Keys of beam search. Of the backbone's generation_config.json, only the special tokens are used.

    Args:
        num_beams: Number of hypotheses, at least 1; 1 is greedy search.
        length_penalty: Exponent of the length by which a log-probability is divided; above 0 favours long texts.
        min_length: Minimum tokens of a generated text, including the start token.
        max_length: Maximum tokens of a generated text, including start and end tokens.
        no_repeat_ngram_size: Size of n-grams that may occur only once; 0 for no limit.
        early_stopping: If true, stop as soon as `num_beams` texts are complete, as BART's authors do.

    Raises:
        ModelError: If a value is out of range.
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
                f"model.generation: min_length {self.min_length} and max_length {self.max_length} are out of range. "
                "Use 0 <= min_length <= max_length and max_length 2 or more."
            )
        if not math.isfinite(self.length_penalty):
            raise ModelError(f"model.generation.length_penalty: {self.length_penalty} must be finite.")
        if self.no_repeat_ngram_size < 0:
            raise ModelError(
                f"model.generation.no_repeat_ngram_size: {self.no_repeat_ngram_size} must not be negative."
            )
