"""What every task shares: checkpoints over frozen weights, normalisation that stays frozen, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn

from datamodules.errors import ModelError
from datamodules.image_classification import ImageClassificationData
from modules.adapters import AdapterConfig, AdapterError, adapter_state, attach, merge
from modules.adapters.state import frozen_fingerprint
from modules.image_classification import ImageClassifier

TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}


def classifier(seed: int = 0, **keys: Any) -> ImageClassifier:
    """`weights: none` gives the backbone of the global generator."""
    torch.manual_seed(seed)
    keys = {"adapter": AdapterConfig(rank=2), **keys}
    return ImageClassifier("vit_tiny_patch16_224", weights="none", backbone_args=TINY, image_size=16, **keys)


def trainer(**keys: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **{**quiet, "enable_model_summary": False, "max_steps": 2, **keys})


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(parquet_path: Path, tmp_path: Path) -> tuple[ImageClassifier, Path]:
    """A model after two steps over the backbone of seed 5, and its checkpoint."""
    model, runner = classifier(5), trainer()
    runner.fit(model, datamodule=ImageClassificationData(str(parquet_path), batch_size=8))
    runner.save_checkpoint(tmp_path / "python.ckpt")
    return model, tmp_path / "python.ckpt"


def test_a_checkpoint_written_from_python_loads_without_a_trainer(trained: tuple[ImageClassifier, Path]) -> None:
    model, path = trained
    torch.manual_seed(5)
    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    assert loaded.class_names == ["red", "green", "blue"]
    assert loaded.adapter == model.adapter
    image = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded.eval()(image), model.eval()(image))


def test_a_checkpoint_is_not_loaded_into_merged_adapters(trained: tuple[ImageClassifier, Path]) -> None:
    model, path = trained
    state = torch.load(path, weights_only=True)["state_dict"]
    merge(model.backbone)
    with pytest.raises(AdapterError, match="Unmerge the adapters before loading"):
        model.load_state_dict(state)


def test_a_checkpoint_over_other_frozen_weights_is_refused(trained: tuple[ImageClassifier, Path]) -> None:
    _, path = trained
    torch.manual_seed(6)
    with pytest.raises(ModelError, match=r"other frozen weights .*model\.weights.*seed_everything"):
        ImageClassifier.load_from_checkpoint(path, weights_only=True)
    torch.manual_seed(5)
    with pytest.raises(ModelError, match="other frozen weights"):
        ImageClassifier.load_from_checkpoint(path, weights_only=True, backbone_dtype="bfloat16")


def test_a_checkpoint_holds_a_fingerprint_for_the_frozen_weights(trained: tuple[ImageClassifier, Path]) -> None:
    model, path = trained
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["frozen_digest"] == model.frozen_digest.hexdigest()
    assert "backbone.pos_embed" not in checkpoint["state_dict"]
    assert "backbone.blocks.0.attn.qkv.adapters.value.B" in checkpoint["state_dict"]


def test_full_tuning_loads_over_any_weights(parquet_path: Path, tmp_path: Path) -> None:
    # nothing is frozen: the checkpoint has it all
    model, runner = classifier(5, tuning="full"), trainer()
    runner.fit(model, datamodule=ImageClassificationData(str(parquet_path), batch_size=8))
    runner.save_checkpoint(tmp_path / "full.ckpt")
    torch.manual_seed(6)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "full.ckpt", weights_only=True)
    image = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded.eval()(image), model.eval()(image))


# --------------------------------------------------------------------------------------------------------- fingerprint


def frozen(seed: int = 0, train: str = "B") -> nn.Module:
    torch.manual_seed(seed)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **TINY).requires_grad_(False)
    attach(backbone, AdapterConfig(train=train, rank=2))  # type: ignore[arg-type]
    return backbone


def _first_value(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight.flatten()[0] += 1e-6


def _last_value(model: Any) -> None:
    model.norm.weight[-1] += 1e-6


def _dtype(model: Any) -> None:
    model.patch_embed.proj.bias.zero_()
    model.patch_embed.proj.bias.data = model.patch_embed.proj.bias.data.to(torch.bfloat16)


def _shape(model: Any) -> None:
    model.pos_embed.data = model.pos_embed.data.reshape(-1)


def _name(model: Any) -> None:
    model.other_norm = model.norm
    del model.norm


@torch.no_grad()
@pytest.mark.parametrize("change", [_first_value, _last_value, _dtype, _shape, _name])
def test_fingerprint_tells_frozen_weights_apart(change: Callable[[nn.Module], None]) -> None:
    expected = frozen_fingerprint(frozen())
    assert frozen_fingerprint(frozen()) == expected
    model: Any = frozen()
    if change is _dtype:  # so that the values are the same before and behind
        model.patch_embed.proj.bias.zero_()
        expected = frozen_fingerprint(model)
    change(model)
    assert frozen_fingerprint(model) != expected


@torch.no_grad()
@pytest.mark.parametrize("train", ["B", "both"])
def test_fingerprint_does_not_see_factors(train: str) -> None:
    model = frozen(train=train)
    expected = frozen_fingerprint(model)
    for factor in adapter_state(model).values():
        factor.add_(1.0)
    assert frozen_fingerprint(model) == expected


@pytest.mark.parametrize("tuning", ["adapter", "head", "full"])
def test_fingerprint_stays_in_training(parquet_path: Path, tuning: Any) -> None:
    model = classifier(tuning=tuning, learning_rate=0.1)
    before = {name: t.clone() for name, t in model.backbone.named_parameters()}
    trainer().fit(model, datamodule=ImageClassificationData(str(parquet_path), batch_size=8))
    moved = {name for name, t in model.backbone.named_parameters() if not torch.equal(t, before[name])}
    assert bool(moved) is (tuning != "head")
    assert frozen_fingerprint(model.backbone) == model.fingerprint


# ------------------------------------------------------------------------------------------------- batch normalisation


@pytest.mark.parametrize("moves", [False, True])
def test_running_statistics_of_a_frozen_backbone_stay(parquet_path: Path, moves: bool) -> None:
    torch.manual_seed(0)
    tuning: Any = "full" if moves else "head"
    model = ImageClassifier("resnet18", weights="none", backbone_args=RESNET, image_size=32, tuning=tuning)
    before = {name: tensor.clone() for name, tensor in model.backbone.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    data = ImageClassificationData(str(parquet_path), batch_size=8, max_val_samples=4)
    trainer(max_steps=4, val_check_interval=2).fit(model, datamodule=data)  # validation in the middle changes modes
    same = {name: torch.equal(tensor, before[name]) for name, tensor in model.backbone.named_buffers()}
    assert set(same.values()) == {not moves}


# -------------------------------------------------------------------------------------------------------- frozen dtype

WINDOWS = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("swin_tiny_patch4_window7_224", WINDOWS, 64),  # a mask
        ("swinv2_tiny_window8_256", WINDOWS, 64),  # coordinates that go into a layer
        ("eva02_tiny_patch14_224", {"depth": 1}, 28),  # rotary positions
    ],
)
@torch.no_grad()
def test_buffers_that_models_compute_are_of_a_dtype_that_they_compute_with(
    name: str, args: dict[str, Any], size: int
) -> None:
    def logits(dtype: Any) -> Tensor:
        torch.manual_seed(0)
        adapter = AdapterConfig(rank=2, targets=["mlp_in"])
        keys: dict[str, Any] = {"backbone_args": args, "image_size": size, "class_names": ["a", "b"]}
        model = ImageClassifier(name, weights="none", backbone_dtype=dtype, adapter=adapter, **keys).eval()
        return model(torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size))

    torch.testing.assert_close(logits("bfloat16"), logits("float32"), rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_takes_the_factors_out_of_float32(parquet_path: Path, precision: Any) -> None:
    model = classifier()
    with pytest.raises(ModelError, match=rf"trainer\.precision: {precision} .*backbone_dtype: bfloat16"):
        trainer(precision=precision).fit(model, datamodule=ImageClassificationData(str(parquet_path), batch_size=8))


def test_mixed_precision_keeps_the_factors_in_float32(parquet_path: Path) -> None:
    model = classifier()
    data = ImageClassificationData(str(parquet_path), batch_size=8)
    trainer(precision="bf16-mixed", max_steps=1).fit(model, datamodule=data)
    assert {tensor.dtype for tensor in adapter_state(model.backbone).values()} == {torch.float32}


def weights(model: ImageClassifier) -> dict[str, Tensor]:
    return {"the head": model.head.bias, "a factor": next(iter(adapter_state(model.backbone).values()))}  # type: ignore[union-attr, dict-item]


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["the head", "a factor"])
def test_weights_that_are_not_finite_are_not_kept(where: str, poison: float) -> None:
    model = classifier(class_names=["a", "b"])
    model._trainer = SimpleNamespace(global_step=7)  # type: ignore[assignment]
    model.check_weights()
    checkpoint: dict[str, Any] = {"state_dict": {}, "hyper_parameters": {}}
    with torch.no_grad():
        weights(model)[where].flatten()[1] = poison
    named = {"the head": "head.bias", "a factor": r"backbone\.blocks\.0\..*\.[AB]"}[where]
    for check in (model.check_weights, lambda: model.on_save_checkpoint(checkpoint)):
        with pytest.raises(ModelError, match=rf"At step 7 {named} is no longer finite.*--ckpt_path last"):
            check()
    assert checkpoint == {"state_dict": {}, "hyper_parameters": {}}
