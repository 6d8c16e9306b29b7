"""Configuration of greedy decoding or sampling for decoders."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from transformers import GenerationConfig

from datamodules.errors import ModelError


@dataclass(frozen=True)
class Decoding:
    """Keys of generation. Of the backbone's generation_config.json, only the special tokens are used.

    Args:
        max_new_tokens: Maximum tokens of a response, at least 1.
        do_sample: If true, sample tokens. If false, decode greedily and ignore the keys below.
        temperature: Divisor of the logits, above 0.
        top_k: Number of likeliest tokens to sample from; 0 for all tokens.
        top_p: Total probability of the likeliest tokens to sample from, in (0, 1].

    Raises:
        ModelError: If a value is out of range.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ModelError(f"model.generation.max_new_tokens: {self.max_new_tokens} must be 1 or more.")
        if not 0 < self.temperature < math.inf:
            raise ModelError(
                f"model.generation.temperature: {self.temperature} must be finite and above 0. For greedy decoding set "
                "do_sample: false."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ModelError(
                f"model.generation: top_k {self.top_k} must not be negative, and top_p {self.top_p} must lie in (0, 1]."
            )

    def config(self, pretrained: GenerationConfig, extra_eos_ids: set[int], pad_token_id: int) -> GenerationConfig:
        """Return the configuration for transformers.

        Args:
            pretrained: The backbone's configuration, for its special tokens.
            extra_eos_ids: Additional token ids that end a response.
            pad_token_id: Padding token id.
        """
        tokens = {key: value for key, value in pretrained.to_dict().items() if key.endswith("_token_id")}
        ends = tokens.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        tokens |= {"eos_token_id": sorted({*ends, *extra_eos_ids}), "pad_token_id": pad_token_id}
        keys = asdict(self) if self.do_sample else {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return GenerationConfig.from_dict({**tokens, **keys})
