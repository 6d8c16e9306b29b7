"""Attach adapters to a model, switch them off and on, merge them into the weights, and detach them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import cast

from torch import nn

from .config import AdapterConfig, AdapterError, Projection, Train
from .linear import AdaptedLinear, check_rank
from .roles import check_patterns, find_projections, select
from .state import adapted_layers, adapted_projections


def attach(model: nn.Module, config: AdapterConfig, exclude: Collection[str] = ()) -> list[Projection]:
    """Wrap the targeted linear layers of a model in place, and freeze everything but the factors.

    Hooks of a wrapped layer do not run until `detach`. An adapter works only if the parent module calls the layer. Some
    parents read `layer.weight` instead: timm's BEiT and Swin V2 with query biases. The factors of such a layer get no
    gradient.

    Args:
        model: A pretrained model.
        config: The adapter configuration.
        exclude: Names of modules that are neither adapted nor frozen, such as the head.

    Returns:
        The adapted projections, in the order of the model's modules.

    Raises:
        AdapterError: If a target, an excluded name or a key of a pattern matches nothing, a rank or `layers` is too
            large, or the model has adapters already. Or if `svd` or `svd_minor` is applied to a weight that is not
            finite. The model is then unchanged, except that wrapped layers may be frozen in the last case.
    """
    if adapted_layers(model):
        raise AdapterError("The model has adapters already. Detach these adapters first.")
    modules = dict(model.named_modules())
    if unknown := [name for name in exclude if name not in modules]:
        raise AdapterError(f"exclude: the model has no module {', '.join(unknown)}. Correct the name or remove it.")
    projections = select(find_projections(model, exclude), config.targets, config.layers)
    for key in ("rank_pattern", "alpha_pattern"):
        check_patterns(key, getattr(config, key), projections)
    for p in projections:
        check_rank(config, p, cast(nn.Linear, modules[p.layer]).in_features)
    adapted = {
        layer: AdaptedLinear(cast(nn.Linear, modules[layer]), config, list(slices))
        for layer, slices in groupby(projections, key=lambda p: p.layer)
    }
    excluded = {id(parameter) for name in exclude for parameter in modules[name].parameters()}
    for parameter in model.parameters():
        if id(parameter) not in excluded:
            parameter.requires_grad_(False)
    for name, layer in adapted.items():
        model.set_submodule(name, layer)
    return projections


def detach(model: nn.Module, merge_first: bool = False) -> None:
    """Put the wrapped linear layers back, in place. Parameters that `attach` froze stay frozen.

    Args:
        model: A model with adapters.
        merge_first: Merge the adapters into the weights. Otherwise the pretrained weights are restored.

    Raises:
        AdapterError: If adapters are to be merged and are switched off.
    """
    for name, layer in adapted_layers(model).items():
        if merge_first:
            layer.merge()
        else:
            layer.unmerge()
        model.set_submodule(name, layer.unwrap())


def merge(model: nn.Module) -> None:
    """Merge every adapter of a model into the weight of its layer. `train()` and `eval()` do not merge.

    Raises:
        AdapterError: If adapters are switched off.
    """
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge` for every adapter of a model."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch every adapter on or off. With all adapters off, the model computes the same as the pretrained model.

    Raises:
        AdapterError: If adapters are merged.
    """
    layers = adapted_layers(model).values()
    if any(layer.merged for layer in layers):
        raise AdapterError("The adapters are merged into the weights. Unmerge the adapters before switching them.")
    for layer in layers:
        layer.enabled = enabled


def set_trained(model: nn.Module, train: Train) -> None:
    """Train A, B or both factors of every adapter from now on. The values of the factors do not change.

    An existing optimizer keeps its parameters: build a new optimizer.
    """
    for _, factors in adapted_projections(model).values():
        factors.trains_a, factors.trains_b = train in ("A", "both"), train in ("B", "both")
        factors.A.requires_grad_(factors.trains_a)
        factors.B.requires_grad_(factors.trains_b)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Switch every adapter off within the context; restore the previous state on exit.

    Raises:
        AdapterError: If adapters are merged.
    """
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    set_enabled(model, False)
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
