"""Metrics of forgetting: nearest-neighbour accuracy on images, perplexity on text.

The metrics measure abilities of the pretrained backbone that fine-tuning may destroy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBOURS = 20
TOKENS_A_BATCH = 2048  # Limits the logits of a vocabulary of 32,000 to 250 MiB.


@torch.no_grad()
def image_scores(model: nn.Module, batches: Iterable[Tensor], labels: Tensor) -> dict[str, float]:
    """Return the nearest-neighbour accuracy of a backbone's features.

    Args:
        model: Maps a batch (batch, 3, height, width) to features (batch, features).
        batches: Normalised images, on the model's device and in its dtype.
        labels: Class of each image, (images,) int64.

    Returns:
        `knn_acc`, in [0, 1].
    """
    features = torch.cat([model(batch).float().cpu() for batch in batches])  # (images, features)
    return {"knn_acc": knn_accuracy(features, labels)}


def knn_accuracy(features: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Return the leave-one-out accuracy of a k-nearest-neighbour classifier by cosine similarity.

    Ties between classes go to the smallest label, as in scikit-learn.

    Args:
        features: (rows, features).
        labels: Class of each row, (rows,) int64, 0 or more.
        neighbours: Number k of neighbours, at least 1 and less than the number of rows.
    """
    unit = F.normalize(features, dim=1)
    classes = int(labels.max()) + 1
    predicted: list[Tensor] = []
    for first in range(0, len(unit), 1024):  # Chunks keep the memory linear in the number of rows.
        similarity = unit[first : first + 1024] @ unit.T  # (chunk, rows)
        similarity.diagonal(first).fill_(-torch.inf)
        nearest = similarity.topk(neighbours).indices  # (chunk, neighbours)
        votes = F.one_hot(labels[nearest], classes).sum(1)  # (chunk, classes)
        predicted.append(votes.argmax(1))
    return float((torch.cat(predicted) == labels).double().mean())


@torch.no_grad()
def text_scores(model: nn.Module, sequences: Sequence[Tensor], device: torch.device) -> dict[str, float]:
    """Return the loss and the perplexity of a decoder on texts. All predicted tokens have equal weight.

    A batch has texts of one length, so that no batch has padding.

    Args:
        model: Maps a batch with `input_ids`, `attention_mask` and `labels` to the logits (predicted tokens, vocabulary)
            and the target tokens (predicted tokens,), as `LanguageModel` does.
        sequences: Tokens of each text, (tokens,) int64, two or more.
        device: Device of the model.

    Returns:
        `loss`, in nats per token, and its exponential `perplexity`.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in _equal_lengths(sequences):
        ids = batch.to(device)  # (batch, tokens)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        logits, targets = model(inputs)
        total += F.cross_entropy(logits, targets, reduction="sum").double().cpu()
        count += len(targets)
    loss = total / count
    return {"loss": float(loss), "perplexity": float(loss.exp())}


def _equal_lengths(sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the sequences in batches (batch, tokens) of one length, shortest first."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for sequence in sequences:
        by_length[len(sequence)].append(sequence)
    for length, group in sorted(by_length.items()):
        yield from torch.stack(group).split(max(1, TOKENS_A_BATCH // length))
