"""Chains of adapters: a finished link is merged into W, and the next link starts with new factors.

A chain trains several adapters of rank r one after the other. Each adapter is a link (RAC-LoRA, Malinovsky et al. 2024,
arXiv 2410.08305). With both factors trained, the method is COLA (Xia et al. 2024, arXiv 2401.04151). After k links, the
update Σ sᵢ·Bᵢ·Aᵢ can have rank k·r. Gradients and optimizer states have the size of one link.

A checkpoint has the factors of the merged links, and never W. Loading merges these links into the pretrained W again. A
merge gives the same bits on every device and with every number of threads (`ordered_update`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdapterConfig, AdapterError
from .init import Factor, init_factor
from .linear import AdaptedLinear
from .state import adapted_layers, adapted_projections, adapter_state, refuse_merged, state_problems

Link = Mapping[str, Tensor]  # Both factors of every adapter by the names of `adapter_state`.


def ordered_update(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return s·B·A in float64, with the same bits on every device.

    A product of two float32 numbers is exact in float64. Each entry adds its r products in a fixed order. A matrix
    product would add the products in an order that depends on the device and on the number of threads.

    Args:
        b: B (d_out, r), float32.
        a: A (r, d_in), float32.
        scale: The scale s.
    """
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64, device=a.device)
    for column, row in zip(b.double().T, a.double(), strict=True):
        total.addr_(column, row)
    return total.mul_(scale)


class Chain:
    """The merged links of a model's adapters.

    From the first merge on, the chain keeps a copy of the pretrained weights of the adapted layers on the CPU.
    """

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.start = 0  # Optimizer step at which the current link began.
        self.rounding = 0.0  # Norm of the last merge's rounding error, relative to the norm of the update.
        self._pretrained: dict[str, Tensor] = {}

    def begin_link(self, model: nn.Module, config: AdapterConfig, step: int) -> list[nn.Parameter]:
        """Merge the current factors into W, and initialise the factors of the next link.

        Random initial values depend on the seed and on the number of the link. The initialisers `svd` and `svd_minor`
        use the merged W.

        Args:
            model: A model with adapters.
            config: Configuration of the attached adapters.
            step: Optimizer step at which the next link begins.

        Returns:
            The trained factors. Their optimizer states belong to the merged link, and must be reset.

        Raises:
            AdapterError: If adapters are merged already.
        """
        refuse_merged(model)
        self._merge(model, {name: factor.to("cpu", copy=True) for name, factor in adapter_state(model).items()})
        self.start = step
        return _redraw(model, config, len(self.links) + 1)

    @torch.no_grad()
    def _merge(self, model: nn.Module, link: Link) -> None:
        squared_error = squared_update = 0.0
        for name, layer in adapted_layers(model).items():
            if name not in self._pretrained:
                self._pretrained[name] = layer.frozen.dense().to("cpu", copy=True)
            # MPS has no float64.
            device = torch.device("cpu") if layer.weight.device.type == "mps" else layer.weight.device
            for factors in layer.factors():
                a, b = (link[f"{name}.adapters.{factors.projection.role}.{side}"].to(device) for side in "AB")
                rows, update = layer.weight[factors.projection.rows], ordered_update(b, a, factors.scale)
                exact = rows.to(device).double() + update
                rows.copy_(exact.to(rows.dtype))
                squared_error += float((rows.to(device).double() - exact).square().sum())
                squared_update += float(update.square().sum())
        self.rounding = math.sqrt(squared_error / squared_update) if squared_update else 0.0
        self.links.append(link)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Restore the pretrained W, and remove all merged links. The factors of the current link do not change."""
        for name, layer in adapted_layers(model).items():
            if name in self._pretrained:
                layer.weight.copy_(self._pretrained[name])
        self.links, self.start = [], 0

    @contextmanager
    def without_links(self, model: nn.Module) -> Iterator[None]:
        """Restore the pretrained W within the context. On exit, restore the merged W, bit for bit."""
        layers = {name: layer for name, layer in adapted_layers(model).items() if self.links}
        merged = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                layer.weight.copy_(self._pretrained[name])
            yield
        finally:
            for name, layer in layers.items():
                layer.weight.copy_(merged[name])

    def pretrained(self, name: str, layer: AdaptedLinear) -> Tensor:
        """Return the pretrained W of an adapted layer. The caller must not write to the tensor."""
        return self._pretrained[name] if name in self._pretrained else layer.frozen.dense()

    # ----------------------------------------------------------------------------------------------------- checkpoint

    def state(self) -> dict[str, Any]:
        """Return the merged links and the start of the current link, for a checkpoint."""
        return {"links": [dict(link) for link in self.links], "start": self.start}

    def load_state(self, model: nn.Module, state: Any) -> None:
        """Merge the links of a checkpoint into the pretrained W, in the order of training.

        Args:
            model: A model with adapters.
            state: Result of `Chain.state`; None for a checkpoint without merged links.

        Raises:
            AdapterError: If the state is damaged or does not fit the adapters. The model is then unchanged.
        """
        refuse_merged(model)
        links = [] if state is None else check_links(state, adapter_state(model))
        self.restore(model)
        for link in links:
            self._merge(model, link)
        self.start = 0 if state is None else state["start"]


def check_links(state: Any, factors: Link) -> list[Link]:
    """Check and return the links of a chain's state.

    Args:
        state: Result of `Chain.state`.
        factors: The factors of the current link, whose names and shapes every link must have.

    Raises:
        AdapterError: If the state is damaged or does not fit the factors.
    """
    links = state.get("links") if isinstance(state, dict) else None
    if not isinstance(links, list) or type(state.get("start")) is not int or state["start"] < 0:
        raise AdapterError("The chain of the checkpoint is damaged. Use another checkpoint.")
    for number, link in enumerate(links, 1):
        tensors = isinstance(link, dict) and all(
            isinstance(t, Tensor) and t.is_floating_point() and t.isfinite().all() for t in link.values()
        )
        problems = state_problems(factors, link) if tensors else ["a factor is not a finite tensor"]
        if problems:
            raise AdapterError(
                f"Link {number} of the checkpoint's chain does not fit the adapters: {'; '.join(problems)}. Use "
                "another checkpoint."
            )
    return links


@torch.no_grad()
def _redraw(model: nn.Module, config: AdapterConfig, link: int) -> list[nn.Parameter]:
    """Initialise all factors for link number `link`, from 1, and return the trained factors."""
    trained: list[nn.Parameter] = []
    sides: tuple[tuple[Factor, Any], ...] = (("A", config.init_a), ("B", config.init_b))
    for name, (layer, factors) in adapted_projections(model).items():
        weight, rank = layer.frozen.dense()[factors.projection.rows], factors.A.shape[0]
        for side, init in sides:
            parameter: nn.Parameter = getattr(factors, side)
            parameter.copy_(init_factor(init, side, weight, rank, config.seed, link_name(name, link)))
        trained += factors.named_factors(trained=True).values()
    return trained


def link_name(projection: str, link: int) -> str:
    """Return the name that seeds the factors of a link. The first link has the name of the projection."""
    return projection if link == 1 else f"{projection}/link {link}"
