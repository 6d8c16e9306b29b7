"""Asymmetric low-rank adapters, W + s·B·A with one factor frozen, in pure torch.

Reading order:

1. `config`: the configuration keys
2. `patterns`: ranks and alphas by layer name
3. `init`: initialisers
4. `weight`: the frozen W
5. `functional`: the equation and its gradients
6. `linear`: the adapted layer
7. `roles`: layers that can be adapted
8. `attach`: attach, detach, merge
9. `state`: factors as tensors
10. `spectrum`: singular values
11. `chain`: adapters that are merged one after the other
12. `mixed`: batches whose rows have different adapters

The package imports nothing from the rest of the program.
"""

from .attach import adapters_disabled, attach, detach, merge, set_enabled, set_trained, unmerge
from .chain import Chain
from .config import AdapterConfig, AdapterError, ChainConfig, Projection
from .linear import AdaptedLinear, LowRankFactors
from .mixed import mixed_batch
from .roles import ROLES
from .state import adapted_layers, adapted_projections, adapter_state, load_adapter_state

__all__ = [
    "ROLES",
    "AdaptedLinear",
    "AdapterConfig",
    "AdapterError",
    "Chain",
    "ChainConfig",
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
    "mixed_batch",
    "set_enabled",
    "set_trained",
    "unmerge",
]
