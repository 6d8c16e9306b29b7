"""Models from Python, without the command line."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from datamodules.image_classification import ImageClassificationData
from modules.adapters import AdapterConfig
from modules.image_classification import ImageClassifier


def test_a_checkpoint_written_from_python_loads_without_a_trainer(parquet_path: Path, tmp_path: Path) -> None:
    model = ImageClassifier(
        backbone="vit_tiny_patch16_224",
        backbone_args={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        weights="none",
        image_size=16,
        adapter=AdapterConfig(rank=2),
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=ImageClassificationData(str(parquet_path), batch_size=8))
    path = tmp_path / "python.ckpt"
    trainer.save_checkpoint(path)
    backbone = {k: v for k, v in model.backbone.state_dict().items() if "adapters" not in k}
    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    assert loaded.class_names == ["red", "green", "blue"]
    assert loaded.adapter == model.adapter
    # weights: none gives another backbone each time; with the same one the model is the same
    loaded.backbone.load_state_dict(backbone, strict=False)
    image = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded.eval()(image), model.eval()(image))
