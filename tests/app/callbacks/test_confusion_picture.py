"""The confusion matrix that a test draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

from app.callbacks import ConfusionPicture


def drawn(folder: Path, classes: int, names: list[str] | None) -> Path:
    confusion = MulticlassConfusionMatrix(classes)
    confusion.update(torch.arange(classes).flip(0), torch.arange(classes))
    module: Any = SimpleNamespace(confusion=confusion, class_names=names)
    given: Any = SimpleNamespace(default_root_dir=str(folder), is_global_zero=True, loggers=[])
    ConfusionPicture().on_test_epoch_end(given, module)
    return folder / "confusion_matrix.png"


@pytest.mark.drawn
@pytest.mark.parametrize(("classes", "names"), [(3, ["a", "b$^", "c"]), (30, [str(i) for i in range(30)]), (3, None)])
def test_a_confusion_matrix_is_drawn(tmp_path: Path, classes: int, names: list[str] | None) -> None:
    with Image.open(drawn(tmp_path, classes, names)) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 400
        assert len(np.unique(np.asarray(image.convert("L")))) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["confusion_matrix.png"]
    assert not plt.get_fignums()


def test_a_module_without_a_confusion_matrix_draws_nothing(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True, loggers=[])
    ConfusionPicture().on_test_epoch_end(trainer, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
