"""timm backbones without a head, by name, hub repository or directory, with or without weights."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from timm.models import load_state_dict, parse_model_name, resolve_model_input_args
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from datamodules.errors import ModelError, first_line
from modules.adapters.state import state_problems

# Options for converting weights. By default, positions are resized bicubically with antialiasing. The first family that
# the name contains applies. timm's factories set the same options, except for DINOv2.
CONVERSION: dict[str, dict[str, Any]] = {
    "dinov2": {"antialias": False},  # DINOv2's authors resize without antialiasing.
    "flexivit": {"interpolation": "bilinear", "antialias": False},
    "base_patch16_radio_v3": {"interpolation": "bilinear", "antialias": False, "align_corners": True},
    "huge_patch16_radio_v3": {"interpolation": "bilinear", "antialias": False, "align_corners": True},
    "radio": {"interpolation": "bilinear", "antialias": False},
    "deit3": {"adapt_layer_scale": True},
}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def build_timm_backbone(name: str, weights: str, image_size: int | None, args: dict[str, Any]) -> nn.Module:
    """Build a backbone that maps images to pooled features.

    Args:
        name: A timm name, such as `vit_base_patch16_224.augreg_in21k`; a repository on the hub,
            `hf_hub:ORGANISATION/NAME`; or a directory, `local-dir:PATH`, as `timm.models.save_for_hf` writes it.
        weights: `pretrained` (from timm, the repository or the directory), `none`, or a local .safetensors, .pth, .pt
            or .bin file.
        image_size: Height and width of the input in pixels; None is the backbone's size. Position embeddings are
            resized.
        args: Additional arguments of `timm.create_model`.

    Returns:
        The backbone in float32 on the CPU, (batch, 3, image_size, image_size) → (batch, head_hidden_size).

    Raises:
        ModelError: If the name is unknown, timm rejects an argument, the size does not fit, or the weights are missing
            or do not fit.
    """
    local = weights not in ("pretrained", "none")
    if local and not Path(weights).is_file():
        raise ModelError(f"model.weights: there is no file {weights}. Give a local file, `pretrained` or `none`.")
    if local and Path(weights).suffix not in SUFFIXES:
        raise ModelError(f"model.weights: {weights} has an unknown suffix. Use one of {', '.join(SUFFIXES)}.")
    architecture, source = _resolve(name)
    if reserved := {"img_size", "in_chans", "num_classes"} & args.keys():
        raise ModelError(
            f"model.backbone_args: {', '.join(reserved)} cannot be set here. Remove the key. The size is "
            "model.image_size."
        )
    if image_size is not None and image_size < 1:
        raise ModelError(f"model.image_size: {image_size} must be 1 or more.")
    try:
        fixed = image_size is not None and source.get("fixed_input_size", False)
        args = {**args, "img_size": image_size} if fixed else args
        model = timm.create_model(name, pretrained=False, num_classes=0, **args)
    except Exception as error:  # The constructor of an architecture can raise any exception.
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(
            f"model.backbone: timm cannot build {name} with {args} ({reason}). Correct model.backbone_args."
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1) if fixed else 1
    sides = (patch,) if isinstance(patch, int) else tuple(patch)
    if image_size is not None and any(image_size % side for side in sides):
        raise ModelError(
            f"model.image_size: {image_size} is not a multiple of the patch size of {name}. Use a multiple of "
            f"{sides[0]}."
        )
    if torch.empty(0).is_meta:  # On the meta device there are no weights to load.
        return model
    if local:
        _load(model, architecture, _read(weights), weights)
    elif weights == "pretrained":
        state = _download(name, {k: v for k, v in args.items() if k != "img_size"})
        _load(model, architecture, state, f"the weights of {name}")
    return model


def features_from_block(model: VisionTransformer, hidden: Tensor, depth: int) -> Tensor:
    """Return a ViT's pooled features (batch, features) from the input (batch, tokens, width) of block `depth`."""
    for block in model.blocks[depth:]:
        hidden = block(hidden)
    features: Tensor = model.forward_head(model.norm(hidden))
    return features


def preprocessing(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return the preprocessing of a backbone: timm's input_size, interpolation, mean, std, crop_pct and crop_mode."""
    config: dict[str, Any] = resolve_model_data_config(model)
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    return config


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture of a backbone's name, and timm's configuration of its weights.

    Raises:
        ModelError: If the name is unknown, or the configuration cannot be read.
    """
    try:
        source, _ = parse_model_name(name)
    except ValueError as error:  # The name has an unknown prefix, or is a path without a prefix.
        raise ModelError(f"model.backbone: {error}") from error
    if source is None and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f" Similar names: {', '.join(close)}." if close else ""
        raise ModelError(f"model.backbone: timm has no architecture {name!r}.{hint} timm.list_models() lists all.")
    try:
        resolved = resolve_model_input_args(name)
    except Exception as error:  # The connection, the directory or config.json is missing, or config.json is damaged.
        files = "Give config.json and model.safetensors, as timm.models.save_for_hf writes them."
        advice = "timm.list_models(pretrained=True) lists all." if source is None else files
        raise ModelError(f"model.backbone: {name} cannot be read ({first_line(error)}). {advice}") from error
    config: dict[str, Any] = resolved["pretrained_cfg"]
    channels = (config.get("input_size") or (3,))[0]
    if channels != 3:
        raise ModelError(f"model.backbone: {name} is for images with {channels} channels. Choose a backbone with 3.")
    return resolved["model_name"], config


def _download(name: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Return the pretrained weights of a name at the input size of their training. Pickled code is never run."""
    try:
        pretrained = timm.create_model(name, pretrained=True, num_classes=0, **args)
    except Exception as error:  # The network and the file can raise many exceptions.
        reason, kind = first_line(error), parse_model_name(name)[0]
        if kind == "local-dir":
            message = (
                f"model.weights: the weights in {name} are damaged, missing or hold code ({reason.split('. ')[0]}). "
                "Give a local .safetensors file."
            )
        elif kind is None and isinstance(error, RuntimeError):
            message = f"model.weights: {name} has no pretrained weights in timm ({reason}). Use another backbone."
        else:
            message = (
                f"model.weights: the weights of {name} could not be fetched from the hub ({reason}). Without a "
                "connection give local paths: --model.weights FILE.safetensors and --data.path DIRECTORY."
            )
        raise ModelError(message) from error
    state: dict[str, Tensor] = pretrained.state_dict()
    return state


def _read(path: str) -> dict[str, Tensor]:
    """Return the tensors of a local file. Pickled code is never run."""
    try:
        state: dict[str, Tensor] = load_state_dict(path, device="cpu", weights_only=True)
    except Exception as error:  # The file is truncated, has another format, or is a pickle with code.
        reason = first_line(error)
        if "weights_only" in reason:  # timm's message recommends loading the file with its code.
            reason = (
                "the file holds other objects than tensors and plain values, and loading such objects could run code"
            )
        kind = "safetensors" if isinstance(error, SafetensorError) else "weights-only PyTorch"
        raise ModelError(
            f"model.weights: {path} cannot be read as a {kind} file ({reason}). Use an intact .safetensors file."
        ) from error
    return state


def _load(model: nn.Module, name: str, state: dict[str, Tensor], source: str) -> None:
    """Load weights into a model after timm's conversion for the model's family. Every tensor must fit."""
    convert = vars(sys.modules[type(model).__module__]).get("checkpoint_filter_fn")
    if convert is not None:
        options = next((options for family, options in CONVERSION.items() if family in name), {})
        accepted = inspect.signature(convert).parameters
        try:
            state = convert(state, model, **{k: v for k, v in options.items() if k in accepted})
        except Exception as error:  # A converter does not validate shapes and can raise any exception.
            raise ModelError(
                f"model.weights: {source} does not fit {name}: {error}. Use weights of this architecture."
            ) from error
    head = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]  # timm's own attribute
    heads = (head,) if isinstance(head, str) else tuple(head)
    expected = model.state_dict()
    state = {  # The pretrained classifier is dropped.
        key: tensor
        for key, tensor in state.items()
        if key in expected or not any(key.startswith(f"{h}.") for h in heads)
    }
    if problems := state_problems(expected, state):
        raise ModelError(
            f"model.weights: {source} does not fit {name}: {'; '.join(problems)}. Use weights of this architecture."
        )
    with torch.no_grad():
        model.load_state_dict(state)
