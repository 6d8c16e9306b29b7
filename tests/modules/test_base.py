"""The base class of every task: checkpoints, fingerprints, frozen normalisation, dtypes and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, AdapterError, adapter_state, attach, merge
from modules.adapters.state import frozen_fingerprint
from modules.image_classification import ImageClassifier
from tests.support.adapters import changed, copied
from tests.support.refusals import refuses
from tests.support.tasks import CLASSES, TINY, VIT, image_batch
from tests.support.trainers import ReadyData, quiet_trainer, ready_loader, stub_trainer

RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}


def classifier(seed: int = 0, **keys: Any) -> ImageClassifier:
    """Return a classifier whose random backbone is drawn from this seed."""
    torch.manual_seed(seed)
    keys = {"adapter": AdapterConfig(rank=2), "class_names": CLASSES, **keys}
    return ImageClassifier(VIT, weights="none", backbone_args=TINY, image_size=16, **keys)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[ImageClassifier, Path]:
    """Return a model after two steps on the backbone of seed 5, and its checkpoint."""
    model, runner = classifier(5, tuning=getattr(request, "param", "adapter"), class_names=None), quiet_trainer()
    runner.fit(model, datamodule=ReadyData([image_batch()] * 2, class_names=CLASSES))
    runner.save_checkpoint(tmp_path / "python.ckpt")
    return model, tmp_path / "python.ckpt"


@pytest.mark.parametrize("trained", ["adapter", "full"], indirect=True)
def test_a_checkpoint_written_from_python_loads_without_a_trainer(trained: tuple[ImageClassifier, Path]) -> None:
    model, path = trained
    torch.manual_seed(5 if model.tuning == "adapter" else 6)  # full tuning saves all weights, so the seed may differ
    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    assert (loaded.class_names, loaded.adapter) == (CLASSES, model.adapter)
    image = image_batch()["image"]
    assert torch.equal(loaded.eval()(image), model.eval()(image))


def test_a_checkpoint_is_not_loaded_into_merged_adapters(trained: tuple[ImageClassifier, Path]) -> None:
    model, path = trained
    state = torch.load(path, weights_only=True)["state_dict"]
    merge(model.backbone)
    with refuses("Unmerge the adapters before loading", error=AdapterError):
        model.load_state_dict(state)


@pytest.mark.parametrize(("seed", "keys"), [(6, {}), (5, {"backbone_dtype": "bfloat16"})])
def test_a_checkpoint_of_other_frozen_weights_is_refused(
    trained: tuple[ImageClassifier, Path], seed: int, keys: dict[str, Any]
) -> None:
    torch.manual_seed(seed)
    with refuses("other frozen weights ", "model.weights", "seed_everything", error=ModelError):
        ImageClassifier.load_from_checkpoint(trained[1], weights_only=True, **keys)


@pytest.mark.parametrize("given", ["adapter", "head", "full"])
def test_a_checkpoint_of_another_tuning_is_refused(given: Any) -> None:
    model, other = classifier(tuning=given), classifier(tuning="head" if given == "full" else "full")
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    with refuses(f"model.tuning: the checkpoint was trained with tuning {given}", error=ModelError):
        other.on_load_checkpoint(checkpoint)


def test_a_checkpoint_has_a_digest_of_the_frozen_weights(trained: tuple[ImageClassifier, Path]) -> None:
    model, path = trained
    assert torch.load(path, weights_only=True)["frozen_digest"] == model.frozen_digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- fingerprint


def frozen(seed: int = 0, train: Any = "B") -> nn.Module:
    torch.manual_seed(seed)
    backbone = timm.create_model(VIT, img_size=16, num_classes=0, **TINY).requires_grad_(False)
    backbone.patch_embed.proj.bias.zero_()  # zeros have the same value in any dtype
    attach(backbone, AdapterConfig(train=train, rank=2))
    return backbone


def _first_value(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight.flatten()[0] += 1e-6


def _last_value(model: Any) -> None:
    model.norm.weight[-1] += 1e-6


def _dtype(model: Any) -> None:
    model.patch_embed.proj.bias.data = model.patch_embed.proj.bias.data.to(torch.bfloat16)


def _shape(model: Any) -> None:
    model.pos_embed.data = model.pos_embed.data.reshape(-1)


def _name(model: Any) -> None:
    model.other_norm = model.norm
    del model.norm


@torch.no_grad()
@pytest.mark.parametrize("change", [_first_value, _last_value, _dtype, _shape, _name])
def test_the_fingerprint_depends_on_values_dtypes_shapes_and_names(change: Callable[[nn.Module], None]) -> None:
    expected, model = frozen_fingerprint(frozen()), frozen()
    assert frozen_fingerprint(model) == expected
    change(model)
    assert frozen_fingerprint(model) != expected


@torch.no_grad()
@pytest.mark.parametrize("train", ["B", "both"])
def test_the_fingerprint_does_not_depend_on_factors(train: str) -> None:
    model = frozen(train=train)
    expected = frozen_fingerprint(model)
    for factor in adapter_state(model).values():
        factor.add_(1.0)
    assert frozen_fingerprint(model) == expected


@pytest.mark.parametrize("tuning", ["adapter", "head", "full"])
def test_training_does_not_change_the_fingerprint(tuning: Any) -> None:
    model = classifier(tuning=tuning, learning_rate=0.1)
    before = copied(model.backbone)
    quiet_trainer().fit(model, ready_loader([image_batch()] * 2))
    assert bool(changed(before, model.backbone)) is (tuning != "head")
    assert frozen_fingerprint(model.backbone) == model.fingerprint


# ------------------------------------------------------------------------------------------------- batch normalisation


@pytest.mark.parametrize("moves", [False, True])
def test_running_statistics_of_a_frozen_backbone_do_not_change(moves: bool) -> None:
    tuning: Any = "full" if moves else "head"
    keys: dict[str, Any] = {"backbone_args": RESNET, "image_size": 32, "tuning": tuning, "class_names": CLASSES}
    model = ImageClassifier("resnet18", weights="none", **keys)
    before = dict(copied(dict(model.backbone.named_buffers())))
    assert any(name.endswith("running_mean") for name in before)
    data = ReadyData([image_batch(side=32)] * 4)
    quiet_trainer(val_check_interval=2).fit(model, datamodule=data)  # a validation inside the epoch switches modes
    assert changed(before, dict(model.backbone.named_buffers())) == (before.keys() if moves else set())


# -------------------------------------------------------------------------------------------------------- frozen dtype

WINDOWS = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("swin_tiny_patch4_window7_224", WINDOWS, 64),  # buffer: attention mask
        ("swinv2_tiny_window8_256", WINDOWS, 64),  # buffer: coordinates, the input of a layer
        ("eva02_tiny_patch14_224", {"depth": 1}, 28),  # buffer: rotary positions
    ],
)
@torch.no_grad()
def test_computed_buffers_work_with_a_bfloat16_backbone(name: str, args: dict[str, Any], size: int) -> None:
    def logits(dtype: Any) -> Tensor:
        torch.manual_seed(0)
        adapter = AdapterConfig(rank=2, targets=["mlp_in"])
        keys: dict[str, Any] = {"backbone_args": args, "image_size": size, "class_names": ["a", "b"]}
        model = ImageClassifier(name, weights="none", backbone_dtype=dtype, adapter=adapter, **keys).eval()
        return model(torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size))

    torch.testing.assert_close(logits("bfloat16"), logits("float32"), rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_with_factors_outside_of_float32_are_refused(precision: Any) -> None:
    with refuses(f"trainer.precision: {precision} ", "backbone_dtype: bfloat16", error=ModelError):
        quiet_trainer(precision=precision).fit(classifier(), ready_loader([image_batch()]))


def test_mixed_precision_keeps_the_factors_in_float32() -> None:
    model = classifier()
    quiet_trainer(precision="bf16-mixed").fit(model, ready_loader([image_batch()]))
    assert {tensor.dtype for tensor in adapter_state(model.backbone).values()} == {torch.float32}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["head.bias", "backbone.blocks.0.attn.qkv.adapters.query.A"])
@torch.no_grad()
def test_weights_that_are_not_finite_are_not_saved(name: str, value: float) -> None:
    model = classifier()
    model._trainer = stub_trainer(global_step=7)
    model.check_weights()
    checkpoint: dict[str, Any] = {"state_dict": {}, "hyper_parameters": {}}
    model.get_parameter(name).flatten()[1] = value
    for check in (model.check_weights, lambda: model.on_save_checkpoint(checkpoint)):
        with refuses(f"At step 7 {name} is no longer finite", "--ckpt_path last", error=ModelError):
            check()
    assert checkpoint == {"state_dict": {}, "hyper_parameters": {}}
