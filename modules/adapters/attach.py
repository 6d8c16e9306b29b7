"""Putting adapters into a model, switching them off and on, folding them into the weights, and taking them out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import groupby

from torch import nn

from modules.adapters.config import AdapterConfig, AdapterError
from modules.adapters.linear import AdaptedLinear
from modules.adapters.roles import Projection, find_projections, select
from modules.adapters.state import adapted_layers


def attach(model: nn.Module, config: AdapterConfig, exclude: Collection[str] = ()) -> list[Projection]:
    """Replace the targeted linear layers of a model by adapted ones, in place, and freeze everything but the factors.

    Args:
        model: A pretrained model; its weights are shared with the adapted layers.
        config: The adapter.
        exclude: Names of modules to leave alone, such as the task's head; they are not frozen either.

    Returns:
        The adapted projections, in the order of the model's modules.

    Raises:
        AdapterError: If a target matches nothing, the rank does not fit, or the model has adapters already.
    """
    if adapted_layers(model):
        raise AdapterError("This model has adapters already; detach them first.")
    projections = select(find_projections(model, exclude), config.targets)
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{root}.") for root in exclude):
            parameter.requires_grad_(False)
    for layer, slices in groupby(projections, key=lambda p: p.layer):
        base = model.get_submodule(layer)
        assert isinstance(base, nn.Linear)
        model.set_submodule(layer, AdaptedLinear(base, config, list(slices)))
    return projections


def detach(model: nn.Module, merge_first: bool = False) -> None:
    """Put the plain linear layers back, in place.

    Args:
        model: A model with adapters.
        merge_first: Whether the adapters are merged into the weights; otherwise the pretrained weights come back.
    """
    for name, layer in adapted_layers(model).items():
        layer.merge() if merge_first else layer.unmerge()
        model.set_submodule(name, layer.to_linear())


def merge(model: nn.Module) -> None:
    """Merge every adapter of a model into its weight. Never within `train()` or `eval()`: say when."""
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take every merged adapter out of its weight again."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch every adapter on or off; off, the model computes what the pretrained one does. Touches no parameter."""
    for layer in adapted_layers(model).values():
        if layer.merged:
            raise AdapterError("The adapters are merged into the weights; unmerge before switching them.")
        layer.enabled = enabled


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what the pretrained one does; the state before comes back at the end."""
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    set_enabled(model, False)
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
