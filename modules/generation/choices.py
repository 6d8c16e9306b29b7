"""Multiple choice by likelihood: a decoder's log-probability of each letter behind a question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from datamodules.contract import QuestionBatch
from modules.backbones.transformers_backbone import selected_logits


class _SharedKeys(Cache):
    """Keys and values of a prefix (1, heads, P, width) that batches of any size read, and never add to."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Return keys and values of the prefix with a batch's behind them, (batch, heads, P + tokens, width)."""
        layer = self.layers[layer_idx]
        pairs = ((layer.keys, key_states), (layer.values, value_states))  # type: ignore[union-attr]
        return tuple(torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=-2) for kept, new in pairs)  # type: ignore[union-attr]


class PrefixCache:
    """Keys and values of the prefix that batches share, computed once and kept while prefix and weights are the same.

    Weights that change in place are noticed: an optimizer's step, a loaded checkpoint. After any other change, such as
    adapters that are switched off, use a new cache.
    """

    def __init__(self) -> None:
        self._prefix: Tensor | None = None
        self._weights = -1
        self._keys: _SharedKeys | None = None

    def keys_of(self, model: PreTrainedModel, prefix: Tensor) -> Cache | None:
        """Return keys and values of a prefix, (P,) int64.

        Returns:
            A cache for batches of any size; None if the model keeps a state that cannot be shared in this way.
        """
        weights = sum(p._version for p in model.parameters())
        known = self._prefix is not None and self._prefix.device == prefix.device and self._weights == weights
        if not (known and torch.equal(self._prefix, prefix)):  # type: ignore[arg-type]
            self._keys = None  # before the next one's are there
            self._keys, self._prefix, self._weights = _prefix_keys(model, prefix), prefix.clone(), weights
        return self._keys


def _prefix_keys(model: PreTrainedModel, prefix: Tensor) -> _SharedKeys | None:
    cache = DynamicCache(config=model.config)
    # others, of recurrent layers say, hold more than keys and values, or hold it compressed
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    model.base_model(input_ids=prefix[None], past_key_values=cache, use_cache=True)
    filled = all(layer.is_initialized for layer in cache.layers) and cache.get_seq_length() == len(prefix)  # type: ignore[union-attr]
    return _SharedKeys(layers=cache.layers) if filled else None


@torch.no_grad()
def choice_log_probabilities(model: PreTrainedModel, batch: QuestionBatch, cache: PrefixCache) -> Tensor:
    """Return the log-probability of each letter behind each question, among all tokens of the vocabulary.

    Args:
        model: A decoder, in eval mode.
        batch: Questions of one subject.
        cache: Cache of the prefix.

    Returns:
        (batch, n_choices) float32.
    """
    prefix, tokens, lengths = batch["prefix"], batch["input_ids"], batch["lengths"]
    keys = cache.keys_of(model, prefix) if len(prefix) else None
    start = len(prefix) if keys is not None else 0
    if keys is None:
        tokens = torch.cat([prefix.expand(len(tokens), -1), tokens], dim=1)  # (batch, P + tokens)
        lengths = lengths + len(prefix)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    is_token = positions < lengths[:, None]  # (batch, tokens)
    logits = selected_logits(  # (batch, vocabulary)
        model,
        positions == lengths[:, None] - 1,
        input_ids=tokens,
        attention_mask=torch.cat([is_token.new_ones(len(tokens), start), is_token], dim=1).long(),
        position_ids=(start + positions).expand(len(tokens), -1),
        past_key_values=keys,
        use_cache=keys is not None,
    )
    return logits.log_softmax(-1)[:, batch["choices"]]
