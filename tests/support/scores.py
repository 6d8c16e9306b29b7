from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from modules.image_classification import ImageClassifier


def scored(monkeypatch: pytest.MonkeyPatch, accuracies: Mapping[int, float]) -> None:
    """Replace the scores of images: the accuracy of each step, 0 for other steps."""

    def scores(self: ImageClassifier, stage: str) -> dict[str, torch.Tensor]:
        accuracy = accuracies.get(self.trainer.global_step, 0.0)
        return {f"{stage}/acc1": torch.tensor(accuracy), f"{stage}/loss": torch.tensor(1.0)}

    monkeypatch.setattr(ImageClassifier, "scores", scores)
