"""Asymmetric low-rank adapters, W + s·B·A with one factor frozen, in pure torch.

Read in this order: `config` (the keys), `patterns` (ranks by name), `init` (initialisers), `weight` (the frozen W),
`functional` (the equation and its gradients), `linear` (the layer), `roles` (which layers), `attach` (into a model and
out of it), `state` (factors as tensors), `spectrum` (singular values). The package imports nothing from the rest of the
program, so it works under any name.
"""

from .attach import adapters_disabled, attach, detach, merge, set_enabled, unmerge
from .config import AdapterConfig, AdapterError, Projection
from .linear import AdaptedLinear, LowRankFactors
from .roles import ROLES
from .state import adapted_layers, adapted_projections, adapter_state, load_adapter_state

__all__ = [
    "ROLES",
    "AdaptedLinear",
    "AdapterConfig",
    "AdapterError",
    "LowRankFactors",
    "Projection",
    "adapted_layers",
    "adapted_projections",
    "adapter_state",
    "adapters_disabled",
    "attach",
    "detach",
    "load_adapter_state",
    "merge",
    "set_enabled",
    "unmerge",
]
