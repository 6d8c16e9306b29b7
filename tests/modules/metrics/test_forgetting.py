"""Scores of a backbone, compared with scikit-learn and with losses of single tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from modules.language_modeling import LanguageModel
from modules.metrics import forgetting
from modules.metrics.forgetting import knn_accuracy, text_scores


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_knn_accuracy_equals_scikit_learns(neighbours: int) -> None:
    labels = torch.arange(90) % 4
    features = torch.randn(90, 8, dtype=torch.float64) + torch.nn.functional.one_hot(labels, 8)
    model = KNeighborsClassifier(neighbours, metric="cosine")
    predicted = cross_val_predict(model, features.numpy(), labels.numpy(), cv=LeaveOneOut())
    assert knn_accuracy(features, labels, neighbours) == (predicted == labels.numpy()).mean()


def test_knn_accuracy_of_many_rows_equals_that_of_one_block() -> None:
    labels = torch.arange(1500) % 3
    features = torch.randn(1500, 4, dtype=torch.float64) + torch.nn.functional.one_hot(labels, 4)
    unit = torch.nn.functional.normalize(features)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    votes = torch.nn.functional.one_hot(labels[similarity.topk(20).indices], 3).sum(1)
    assert knn_accuracy(features, labels) == (votes.argmax(1) == labels).double().mean()


@pytest.fixture
def decoder(llama_path: Path) -> LanguageModel:
    return LanguageModel(str(llama_path), backbone_dtype="float32", tuning="full").eval()


def loss_by_token(model: LanguageModel, sequence: Tensor) -> list[float]:
    """Return the loss of each token after the first, from a forward pass of its preceding tokens."""
    losses = []
    for place in range(1, len(sequence)):
        with torch.no_grad():
            logits = model.backbone(input_ids=sequence[None, :place]).logits[0, -1]
        losses.append(-float(logits.double().log_softmax(-1)[sequence[place]]))
    return losses


def test_text_scores_weight_every_token_equally(decoder: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "TOKENS_A_BATCH", 16)  # the most common length needs several batches
    size = decoder.backbone.config.vocab_size
    sequences = [torch.randint(size, (length,)) for length in (9, 2, 7, 7, 7, 7, 5)]
    each = [loss for sequence in sequences for loss in loss_by_token(decoder, sequence)]
    scores = text_scores(decoder, sequences, torch.device("cpu"))
    assert len(each) == 8 + 1 + 4 * 6 + 4
    assert scores["loss"] == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)
