"""Multiple choice by likelihood: a decoder's log-probability of each answer letter after a question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from datamodules.contract import QuestionBatch
from modules.backbones.transformers_backbone import selected_logits


class _SharedKeys(Cache):
    """Attention keys and values of a prefix (1, heads, P, width), shared read-only by batches of any size."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Concatenate the prefix's and the batch's keys and values to (batch, heads, P + tokens, width)."""
        layer = self.layers[layer_idx]
        pairs = ((layer.keys, key_states), (layer.values, value_states))  # type: ignore[union-attr]
        return tuple(torch.cat([shared.expand(len(new), -1, -1, -1), new], dim=-2) for shared, new in pairs)  # type: ignore[union-attr]


class PrefixCache:
    """Cache of the attention keys and values of a prompt prefix that consecutive batches share.

    The keys and values are computed again for a different prefix, and after an optimizer step or a loaded checkpoint
    changed weights in place. After any other change, such as switching adapters off, create a new cache.
    """

    def __init__(self) -> None:
        self._prefix: Tensor | None = None
        self._weights = -1
        self._keys: _SharedKeys | None = None

    def keys_of(self, model: PreTrainedModel, prefix: Tensor) -> Cache | None:
        """Return keys and values of a prefix, (P,) int64.

        Returns:
            A cache for batches of any size; None if the model's state cannot be shared.
        """
        weights = sum(p._version for p in model.parameters())
        valid = self._prefix is not None and self._prefix.device == prefix.device and self._weights == weights
        if not (valid and torch.equal(self._prefix, prefix)):  # type: ignore[arg-type]
            self._keys = None  # Free the memory before computing the next keys.
            self._keys, self._prefix, self._weights = _prefix_keys(model, prefix), prefix.clone(), weights
        return self._keys


def _prefix_keys(model: PreTrainedModel, prefix: Tensor) -> _SharedKeys | None:
    cache = DynamicCache(config=model.config)
    # Caches of other layers, such as recurrent layers, do not store plain keys and values.
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    model.base_model(input_ids=prefix[None], past_key_values=cache, use_cache=True)
    filled = all(layer.is_initialized for layer in cache.layers) and cache.get_seq_length() == len(prefix)  # type: ignore[union-attr]
    return _SharedKeys(layers=cache.layers) if filled else None


@torch.no_grad()
def choice_log_probabilities(model: PreTrainedModel, batch: QuestionBatch, cache: PrefixCache) -> Tensor:
    """Return the log-probability of each letter after each question, normalised over the vocabulary.

    Args:
        model: A decoder, in eval mode.
        batch: Questions of one subject.
        cache: Cache of the subject's prefix.

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
