"""timm backbones without a head: by name, hub repository or directory; weights from there, a local file, or none."""

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

# How weights are converted where it is not the default (positions resized bicubic, with antialiasing); the first family
# that the name contains counts. All but the first are what timm's own factories bind.
CONVERSION: dict[str, dict[str, Any]] = {
    "dinov2": {"antialias": False},  # as DINOv2's authors resize
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
        name: timm's name, `vit_base_patch16_224.augreg_in21k`, or with timm's prefixes a repository on the hub,
            `hf_hub:ORGANISATION/NAME`, or a directory, `local-dir:PATH`, as `timm.models.save_for_hf` writes them.
        weights: `pretrained` (those that timm, the repository or the directory has), `none`, or a local .safetensors,
            .pth, .pt or .bin file.
        image_size: Side of the input in pixels; None takes the backbone's own. Position embeddings are resized.
        args: More arguments of the architecture for `timm.create_model`.

    Returns:
        The backbone in float32 on the CPU, (batch, 3, image_size, image_size) → (batch, head_hidden_size).

    Raises:
        ModelError: For an unknown name, a size that does not fit, or weights that are missing or do not fit.
    """
    local = weights not in ("pretrained", "none")
    if local and not Path(weights).is_file():
        raise ModelError(f"model.weights: there is no file {weights}; give a local file, `pretrained` or `none`.")
    if local and Path(weights).suffix not in SUFFIXES:
        raise ModelError(f"model.weights: {weights} must be one of {', '.join(SUFFIXES)}.")
    architecture, source = _resolve(name)
    if reserved := {"img_size", "in_chans", "num_classes"} & args.keys():
        raise ModelError(f"model.backbone_args: {', '.join(reserved)} is not for here; the size is model.image_size.")
    if image_size is not None and image_size < 1:
        raise ModelError(f"model.image_size: {image_size} must be 1 or more.")
    try:
        fixed = image_size is not None and source.get("fixed_input_size", False)
        args = {**args, "img_size": image_size} if fixed else args
        model = timm.create_model(name, pretrained=False, num_classes=0, **args)
    except Exception as error:  # an architecture's constructor can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model.backbone: timm cannot build {name} with {args} ({reason}).") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1) if fixed else 1
    sides = (patch,) if isinstance(patch, int) else tuple(patch)
    if image_size is not None and any(image_size % side for side in sides):
        raise ModelError(f"model.image_size: {image_size} is not a multiple of {name}'s patches of {sides[0]} pixels.")
    if torch.empty(0).is_meta:  # shapes alone take no weights
        return model
    if local:
        _load(model, architecture, _read(weights), weights)
    elif weights == "pretrained":
        state = _download(name, {k: v for k, v in args.items() if k != "img_size"})
        _load(model, architecture, state, f"the weights of {name}")
    return model


def features_from_block(model: VisionTransformer, hidden: Tensor, depth: int) -> Tensor:
    """Return pooled features (batch, features) of the input of block `depth`, (batch, tokens, width), of a ViT."""
    for block in model.blocks[depth:]:
        hidden = block(hidden)
    features: Tensor = model.forward_head(model.norm(hidden))
    return features


def preprocessing(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return how a backbone's input was prepared: timm's input_size, interpolation, mean, std and crop_pct."""
    config: dict[str, Any] = resolve_model_data_config(model)
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    return config


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture that a backbone's name means, and timm's configuration of its weights.

    Raises:
        ModelError: If there is none.
    """
    try:
        source, _ = parse_model_name(name)
    except ValueError as error:  # a path or a repository without a prefix, or another prefix
        raise ModelError(f"model.backbone: {error}") from error
    if source is None and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f" Near it: {', '.join(close)}." if close else ""
        raise ModelError(f"model.backbone: timm has no architecture {name!r}.{hint} timm.list_models() lists all.")
    try:
        resolved = resolve_model_input_args(name)
    except Exception as error:  # no connection, no such directory, no config.json, or one that is damaged
        wanted = "Give config.json and model.safetensors, as timm.models.save_for_hf writes them."
        advice = "timm.list_models(pretrained=True) lists all." if source is None else wanted
        raise ModelError(f"model.backbone: {name} cannot be read ({first_line(error)}). {advice}") from error
    config: dict[str, Any] = resolved["pretrained_cfg"]
    channels = (config.get("input_size") or (3,))[0]
    if channels != 3:
        raise ModelError(f"model.backbone: {name} is for images with {channels} channels. Choose one with 3.")
    return resolved["model_name"], config


def _download(name: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights that belong to a name, at the size that they were trained at; code in them is never run."""
    try:
        source = timm.create_model(name, pretrained=True, num_classes=0, **args)
    except Exception as error:  # whatever a network, a file or its tensors can raise
        reason, place = first_line(error), parse_model_name(name)[0]
        if place == "local-dir":
            message = (
                f"model.weights: the weights in {name} are damaged, missing or hold code ({reason.split('. ')[0]})."
            )
        elif place is None and isinstance(error, RuntimeError):
            message = f"model.weights: {name} has no pretrained weights in timm ({reason})."
        else:
            message = (
                f"model.weights: the weights of {name} could not be fetched from the hub ({reason}). Without a "
                "connection two keys take local paths: --model.weights FILE.safetensors and --data.path DIRECTORY."
            )
        raise ModelError(message) from error
    state: dict[str, Tensor] = source.state_dict()
    return state


def _read(path: str) -> dict[str, Tensor]:
    """Return the tensors of a local file; pickled code is never run."""
    try:
        state: dict[str, Tensor] = load_state_dict(path, device="cpu", weights_only=True)
    except Exception as error:  # truncated, another format, or a pickle with code in it
        reason = first_line(error)
        if "weights_only" in reason:  # timm advises to load the file with its code
            reason = "it holds Python objects that are not tensors or plain values, and loading them could run code"
        kind = "safetensors" if isinstance(error, SafetensorError) else "weights-only PyTorch"
        raise ModelError(f"model.weights: {path} cannot be read as a {kind} file ({reason}).") from error
    return state


def _load(model: nn.Module, name: str, state: dict[str, Tensor], source: str) -> None:
    """Load weights into a model, converted and resized as timm does for its family; every tensor must fit."""
    convert = vars(sys.modules[type(model).__module__]).get("checkpoint_filter_fn")
    if convert is not None:
        options = next((options for family, options in CONVERSION.items() if family in name), {})
        accepted = inspect.signature(convert).parameters
        try:
            state = convert(state, model, **{k: v for k, v in options.items() if k in accepted})
        except Exception as error:  # a converter reads shapes as they come
            raise ModelError(f"model.weights: {source} does not fit {name}: {error}") from error
    head = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]  # timm's own attribute
    heads = (head,) if isinstance(head, str) else tuple(head)
    own = model.state_dict()
    state = {
        key: tensor
        for key, tensor in state.items()
        if key in own or not any(key.startswith(f"{h}.") for h in heads)  # the source's own classifier
    }
    if problems := state_problems(own, state):
        raise ModelError(f"model.weights: {source} does not fit {name}: {'; '.join(problems)}.")
    with torch.no_grad():
        model.load_state_dict(state)
