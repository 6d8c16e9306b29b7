"""Asymmetric low-rank adapters, W + s·B·A with one factor frozen, in pure torch.

Read in this order: `config` (what can be chosen), `patterns` (ranks by name), `init` (how a factor starts), `linear`
(the equation), `roles` (which layers), `attach` (putting them there and taking them away), `state` (saving), `spectrum`
(looking inside), `rounding` (what merging may cost), `peft_format` and `peft_reading` (PEFT's files), `compact` (files
without the frozen factor).
"""

from modules.adapters.attach import adapters_disabled, attach, detach, merge, set_enabled, unmerge
from modules.adapters.config import AdapterConfig, AdapterError
from modules.adapters.linear import AdaptedLinear, LowRankFactors
from modules.adapters.roles import ROLES, Projection
from modules.adapters.state import adapted_layers, adapted_projections, adapter_state, load_adapter_state

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
