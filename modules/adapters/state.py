"""The factors of a model as tensors by name, and a fingerprint of the frozen weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import AdapterError
from .linear import AdaptedLinear, LowRankFactors


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def adapted_projections(model: nn.Module) -> dict[str, tuple[AdaptedLinear, LowRankFactors]]:
    """Return the adapted projections of a model by name, each with its layer and its factors."""
    return {f.projection.name: (layer, f) for layer in adapted_layers(model).values() for f in layer.factors()}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return both factors of every adapter, trained and frozen, by state-dict name.

    The tensors are not copies. The scale s is not included, since the scale follows from the configuration.
    """
    return {
        f"{name}.adapters.{factors.projection.role}.{factor}": getattr(factors, factor).detach()
        for name, layer in adapted_layers(model).items()
        for factors in layer.factors()
        for factor in ("A", "B")
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy factors into a model whose adapters have the same names and shapes.

    Raises:
        AdapterError: If names are missing or unexpected, shapes differ, or adapters are merged. The model is then
            unchanged.
    """
    refuse_merged(model)
    factors = adapter_state(model)
    if problems := state_problems(factors, state):
        raise AdapterError(
            "The adapter state does not fit this model: " + "; ".join(problems) + ". Attach the same adapters."
        )
    for name, tensor in factors.items():
        tensor.copy_(state[name])


def refuse_merged(model: nn.Module) -> None:
    """Check that no adapter is merged, since an adapter cannot be unmerged after its factors were replaced.

    Raises:
        AdapterError: If an adapter is merged.
    """
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise AdapterError("The adapters are merged into the weights. Unmerge the adapters before loading factors.")


def state_problems(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], most: int = 5) -> list[str]:
    """Return the reasons why a state cannot be loaded: missing or unexpected names, and different shapes.

    Each reason lists at most `most` names.
    """
    misshapen = [
        f"{name} is {tuple(actual[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in actual and actual[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "of another shape": misshapen,
    }
    return [
        f"{len(names)} {kind}: {', '.join(names[:most])}{', …' if len(names) > most else ''}"
        for kind, names in kinds.items()
        if names
    ]


def frozen_fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's frozen parameters and buffers: names, dtypes, shapes, first and last values.

    Factors are excluded. The hash distinguishes two files of weights, and is fast even for a large model.
    """
    digest = hashlib.sha256()
    factors = adapter_state(model)
    # The state dict below has tied parameters under all their names.
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    if all(flags.values()):
        return digest.hexdigest()  # In full tuning nothing is frozen, and buffers change.
    for name, parameter in model.state_dict().items():
        if not flags.get(name) and name not in factors:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            if not parameter.is_meta:
                flat = parameter.detach().flatten()
                digest.update(torch.cat([flat[:64], flat[-64:]]).double().cpu().numpy().tobytes())
    return digest.hexdigest()
