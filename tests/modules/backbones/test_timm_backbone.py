"""timm backbones from local files: features equal timm's, or one message names the problem."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from datamodules.errors import ModelError
from modules.backbones.timm_backbone import build_timm_backbone, preprocessing
from tests.support.malicious import Malicious
from tests.support.refusals import refuses
from tests.support.tasks import TINY, VIT

RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}


def source(name: str = VIT, size: int | None = 16, classes: int = 0, **args: Any) -> nn.Module:
    """Return a model as its authors would publish it, with changed weights."""
    args = {**({} if size is None else {"img_size": size}), **args}
    model = timm.create_model(name, pretrained=False, num_classes=classes, **args).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 4)
    return model


def save(model: nn.Module, path: Path) -> str:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@torch.no_grad()
def features(model: nn.Module, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    output: Tensor = model.eval()(torch.randn(2, 3, size, size, generator=generator))
    return output


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin"])
def test_a_local_file_gives_the_features_of_its_model(tmp_path: Path, suffix: str) -> None:
    model = source(**TINY)
    built = build_timm_backbone(VIT, save(model, tmp_path / f"w.{suffix}"), 16, TINY)
    assert torch.equal(features(built), features(model))
    assert features(built).shape == (2, 32)
    assert not torch.equal(features(build_timm_backbone(VIT, "none", 16, TINY)), features(model))


@pytest.mark.parametrize("wrap", [{"state_dict": ""}, {"model": ""}, {"state_dict": "module."}, {"state_dict_ema": ""}])
def test_a_training_checkpoint_of_timm_is_loaded(tmp_path: Path, wrap: dict[str, str]) -> None:
    model = source(**TINY)
    ((key, prefix),) = wrap.items()
    content = {key: {f"{prefix}{name}": t for name, t in model.state_dict().items()}, "epoch": 3, "arch": VIT}
    torch.save(content, tmp_path / "w.pth")
    assert torch.equal(features(build_timm_backbone(VIT, str(tmp_path / "w.pth"), 16, TINY)), features(model))


@pytest.mark.parametrize(("name", "args", "head"), [(VIT, TINY, "head"), ("resnet18", RESNET, "fc")])
def test_the_classifier_of_the_source_is_left_out(tmp_path: Path, name: str, args: dict[str, Any], head: str) -> None:
    model = source(name, 16 if name == VIT else None, classes=7, **args)
    assert f"{head}.weight" in model.state_dict()
    built = build_timm_backbone(name, save(model, tmp_path / "w.safetensors"), 16, args)
    model.reset_classifier(0)
    assert torch.equal(features(built, 32 if name != VIT else 16), features(model, 32 if name != VIT else 16))


@pytest.mark.parametrize("size", [None, 32, 48])
def test_resnet_takes_any_size_and_loads_running_statistics(tmp_path: Path, size: int | None) -> None:
    model = source("resnet18", None, **RESNET)
    built = build_timm_backbone("resnet18", save(model, tmp_path / "w.pth"), size, RESNET)
    assert torch.equal(features(built, size or 64), features(model, size or 64))
    assert preprocessing(built, size)["input_size"] == (3, size or 224, size or 224)
    for name, tensor in model.named_buffers():
        assert torch.equal(built.get_buffer(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_a_float32_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = source(**TINY).to(dtype)
    built = build_timm_backbone(VIT, save(model, tmp_path / "w.safetensors"), 16, TINY)
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float32}
    assert torch.equal(features(built), features(model.float()))


def test_backbone_args_reach_the_architecture(tmp_path: Path) -> None:
    args = {**TINY, "depth": 3, "init_values": 1e-5, "class_token": False, "global_pool": "avg"}
    model = source(**args)
    built: Any = build_timm_backbone(VIT, save(model, tmp_path / "w.safetensors"), 16, args)
    assert len(built.blocks) == 3
    assert built.cls_token is None
    assert torch.equal(features(built), features(model))


# ------------------------------------------------------------------------------------------------- position embeddings


DINO = "vit_small_patch14_dinov2"


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize(
    ("name", "resizing"),
    [
        (VIT, {"antialias": True}),
        (DINO, {"antialias": False}),
        (f"{DINO}.lvd142m", {"antialias": False}),
        ("flexivit_small", {"antialias": False, "interpolation": "bilinear"}),
    ],
)
def test_position_embeddings_are_resized_as_timm_does(
    tmp_path: Path, name: str, resizing: dict[str, Any], size: int
) -> None:
    model: Any = source(name, **TINY)
    built: Any = build_timm_backbone(name, save(model, tmp_path / "w.safetensors"), size, TINY)
    prefix = 0 if model.no_embed_class else 1
    grid = [size // 4, size // 4]

    def resized(**options: Any) -> Tensor:
        return resample_abs_pos_embed(model.pos_embed.detach(), grid, num_prefix_tokens=prefix, **options)

    assert built.pos_embed.shape == (1, prefix + grid[0] ** 2, 32)
    torch.testing.assert_close(built.pos_embed.detach(), resized(**resizing), rtol=0, atol=1e-6)
    # bicubic, since bilinear enlarging does not depend on antialias
    other_resizing = {"antialias": not resizing["antialias"]}
    assert (resized(**other_resizing) - resized(**resizing)).abs().max() > 1e-3  # the options make a difference
    unchanged = {name: t for name, t in built.state_dict().items() if name != "pos_embed"}
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in unchanged.items())
    assert features(built, size).isfinite().all()


# ------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224.augreg_in21k",
        "vit_base_patch16_clip_224.openai",
        f"{DINO}.lvd142m",
        "resnet10t.c3_in1k",
        "mobilenetv3_small_050.lamb_in1k",
    ],
)
def test_preprocessing_equals_timms(name: str) -> None:
    size, args = (16, TINY) if name.startswith("vit") else (None, {})
    model = timm.create_model(name, pretrained=False, **args)
    timms = resolve_model_data_config(model)
    ours = preprocessing(build_timm_backbone(name, "none", size, args), size)
    assert ours == timms | ({"input_size": (3, 16, 16)} if size else {})
    published = timm.get_pretrained_cfg(name)
    assert (ours["mean"], ours["std"]) == (published.mean, published.std)
    assert (ours["interpolation"], ours["crop_pct"]) == (published.interpolation, published.crop_pct)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "size", "args", "parts"),
    [
        ("", None, {}, ["model.backbone", "''"]),
        ("no-such-thing-at-all", None, {}, ["model.backbone", "'no-such-thing-at-all'"]),
        ("vit_tiny_patch16_24", None, {}, ["model.backbone", "'vit_tiny_patch16_24'", "Similar names: ", VIT]),
        ("vit_bass_patch16_224", None, {}, ["vit_base_patch16_224"]),
        (f"{VIT}.nonsense", None, {}, ["model.backbone", "nonsense"]),
        (VIT, 16, {**TINY, "bogus": 1}, ["model.backbone", "bogus"]),
        (VIT, 16, {**TINY, "global_pool": "nonsense"}, ["model.backbone", "global_pool"]),
        (VIT, 16, {**TINY, "num_heads": 0}, ["model.backbone", "num_heads"]),
        (VIT, 16, {**TINY, "patch_size": 0}, ["model.backbone", "patch_size"]),
        (VIT, 16, {**TINY, "norm_layer": "nonsense"}, ["model.backbone", "norm_layer"]),
        *(
            (name, size, {key: value}, ["model.backbone_args", key, "model.image_size"])
            for name in (VIT, "resnet18")
            for size in (None, 16)
            for key, value in (("img_size", 16), ("in_chans", 1), ("num_classes", 5))
        ),
        *((VIT, size, TINY, ["im", "size", str(size)]) for size in (0, -1, -4, 3, 17)),
        *(("resnet18", size, RESNET, ["image_size", str(size)]) for size in (0, -4)),
    ],
    ids=str,
)
def test_an_architecture_that_timm_cannot_build_is_refused(
    name: str, size: int | None, args: dict[str, Any], parts: list[str]
) -> None:
    with refuses(*parts, error=ModelError):
        build_timm_backbone(name, "none", size, args)


def test_suggested_names_exist() -> None:
    with refuses("Similar names: ", error=ModelError) as caught:
        build_timm_backbone("resnet10x", "none", None, {})
    near = re.findall(r"Similar names: ([^.]*)\.", str(caught.value))[0].split(", ")
    assert all(timm.is_model(name) for name in near)


WRONG_SHAPES: dict[str, Tensor] = {"pos_embed": torch.zeros(4), "patch_embed.proj.weight": torch.zeros(4, 3, 8, 8)}


def _state(**args: Any) -> dict[str, Tensor]:
    return source(**{**TINY, **args}).state_dict()


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("w.ckpt", _state, [".safetensors, .pth"]),
        ("w.npz", _state, [".safetensors, .pth"]),
        ("w", _state, [".safetensors, .pth"]),
        ("w.pth", lambda: [1, 2], []),
        ("w.pth", lambda: torch.zeros(3), []),
        ("w.pth", lambda: {"pos_embed": "a string"}, []),
        ("w.safetensors", lambda: {"conv1.weight": torch.zeros(3)}, ["missing", "unexpected: conv1.weight"]),
        ("w.safetensors", lambda: {"patch_embed.proj.weight": torch.zeros(4)}, [f"does not fit {VIT}"]),
        ("w.safetensors", lambda: WRONG_SHAPES, [f"does not fit {VIT}"]),
        ("w.safetensors", dict, ["missing", "cls_token"]),
        ("w.pth", lambda: _state(embed_dim=64), ["of another shape", "is (1, 1, 64), not (1, 1, 32)"]),
        ("w.pth", lambda: _state(depth=3), [f"does not fit {VIT}", "unexpected: blocks.2.norm1.weight"]),
        ("w.pth", lambda: _state(depth=1), [f"does not fit {VIT}", "missing: blocks.1.norm1.weight"]),
        ("w.pth", lambda: _state(init_values=1.0), ["unexpected: blocks.0.ls1.gamma"]),
        ("w.pth", lambda: source("resnet18", None, **RESNET).state_dict(), ["unexpected: conv1.weight"]),
    ],
)
def test_a_file_of_other_weights_is_refused(
    tmp_path: Path, file: str, content: Callable[[], Any], parts: list[str]
) -> None:
    path = str(tmp_path / file)
    save_file(content(), path) if file.endswith(".safetensors") else torch.save(content(), path)
    with refuses("model.weights", path, *parts, error=ModelError):
        build_timm_backbone(VIT, path, 16, TINY)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    with refuses("model.weights", path, "pretrained", error=ModelError):
        build_timm_backbone(VIT, path, 16, TINY)
    with refuses("model.weights", str(tmp_path), error=ModelError):  # a directory is refused too
        build_timm_backbone(VIT, str(tmp_path), 16, TINY)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.9])
def test_truncated_weights_are_refused(tmp_path: Path, name: str, keep: float) -> None:
    file = Path(save(source(**TINY), tmp_path / name))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with refuses("model.weights", str(file), "cannot be read", error=ModelError):
        build_timm_backbone(VIT, str(file), 16, TINY)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, name: str, archive: bool) -> None:
    file, trace = tmp_path / name, tmp_path / "code-ran"
    if archive:
        torch.save(_state() | {"pos_embed": Malicious(trace)}, file)
    else:
        file.write_bytes(pickle.dumps(Malicious(trace)))
    with refuses("model.weights", str(file), "cannot be read", error=ModelError):
        build_timm_backbone(VIT, str(file), 16, TINY)
    assert not trace.exists()


def test_weights_from_the_hub_without_a_connection_are_refused() -> None:
    with refuses("model.weights", VIT, "--model.weights FILE.safetensors", error=ModelError):
        build_timm_backbone(f"{VIT}.augreg_in21k", "pretrained", None, TINY)
