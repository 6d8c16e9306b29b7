"""Configuration of adapters: the keys, their ranges, and the combinations that can learn."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .patterns import pattern_problem, value_of

Train = Literal["B", "A", "both"]
Scaling = Literal["standard", "rslora"]
Init = Literal["orthogonal", "signs", "gaussian", "uniform", "kaiming", "svd", "svd_minor", "zero"]
Start = Literal[Init, "given"]
LinkSchedule = Literal["restart", "continue"]


class AdapterError(ValueError):
    """Raised if an adapter cannot be built, attached or loaded."""


@dataclass(frozen=True)
class Projection:
    """A linear layer, or the rows of a fused linear layer that have one role. A projection takes one adapter.

    Args:
        layer: Name of the linear layer in the model, such as `blocks.0.attn.qkv`.
        role: One of `ROLES`, or `other` for a layer that is not in the table of the module `roles`.
        start: First row of the projection in the layer's weight.
        stop: Last row of the projection, plus 1.
        fused: True if the layer holds several projections.
    """

    layer: str
    role: str
    start: int
    stop: int
    fused: bool = False

    @property
    def name(self) -> str:
        """Return a name that is unique in the model: the layer's name, plus the role if the layer is fused."""
        return f"{self.layer}.{self.role}" if self.fused else self.layer

    @property
    def rows(self) -> slice:
        """Return the projection's rows of the layer's weight."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ChainConfig:
    """Chain of adapters: after some epochs, s·B·A is merged into W, and training continues with new factors.

    `modules.adapters.chain` describes the method.

    Args:
        every_n_epochs: Epochs of a link, at least 1. The last link may be shorter. None is a single adapter, no chain.
        schedule: `restart` starts the learning rate schedule again with each link, warm-up included. `continue` keeps
            one schedule for the whole run.

    Raises:
        AdapterError: If a value is out of range.
    """

    every_n_epochs: int | None = None
    schedule: LinkSchedule = "restart"

    def __post_init__(self) -> None:
        every = self.every_n_epochs
        if every is not None and (type(every) is not int or every < 1):
            raise AdapterError(
                f"adapter.chain.every_n_epochs: {every!r} must be a whole number, 1 or more, or null for no chain."
            )
        if self.schedule not in get_args(LinkSchedule):
            raise AdapterError(
                f"adapter.chain.schedule: {self.schedule!r} is unknown. Choose one of "
                f"{', '.join(get_args(LinkSchedule))}."
            )


@dataclass(frozen=True)
class AdapterConfig:
    """Adapter of every targeted projection: W + s·B·A, with A (rank, d_in) and B (d_out, rank).

    The defaults are the variant that the paper recommends: B trained from zero, A frozen, random and orthogonal,
    alpha = 2·rank (Zhu et al., ICML 2024, arXiv 2402.16842, section 5).

    Args:
        train: The factor that is trained; the other factor keeps its initial value. `both` is ordinary LoRA.
        rank: Inner dimension r, at least 1 and at most min(d_in, d_out) of every adapted projection.
        alpha: Numerator of the scale s, above 0.
        scaling: `standard` is s = alpha / rank, `rslora` is s = alpha / sqrt(rank) (Kalajdzievski 2023).
        dropout: Probability in [0, 1) of zeroing an entry of the adapter's input.
        init_a: Initialiser of A, from the table in the module `init`.
        init_b: Initialiser of B, with the same choices. Exactly one factor starts at zero, so that training starts at
            W. Alternatively, both factors are `given`: zero until a file or a checkpoint is loaded.
        targets: Roles (`query`, `key`, `value`, `output`, `mlp_in`, `mlp_gate`, `mlp_out`), `attention` for the first
            four, `all` for all seven, or `regex:PATTERN` that must match the whole name of a projection.
        layers: Adapt only the targeted projections in this number of last blocks, at least 1; None adapts all. A block
            is a numbered module, such as `blocks.7` or `encoder.layer.7`. Where stages group the blocks, a stage counts
            as one block. In an encoder-decoder, the number applies to the encoder and to the decoder. Blocks below the
            lowest adapted block need no backward pass. The gradient to an adapted encoder passes through the whole
            decoder.
        seed: Seed of the random factors. A factor depends only on the seed, the projection's name and the shape.
        rank_pattern: Ranks other than `rank`, for some projections: `{query: 16, "blocks.0.mlp.fc1": 4}`. A key is a
            role, the end of a projection's name, or a regular expression for that end, as in PEFT's `rank_pattern`.
            The first matching key applies. Every key must match a targeted projection. vLLM ignores this key.
        alpha_pattern: Alphas other than `alpha`, with the same keys. A projection's scale s follows from its alpha and
            its rank.
        chain: Merge s·B·A into W after some epochs, and train new factors of the same rank.

    Raises:
        AdapterError: If a value is out of range, or a combination cannot learn or would not start at W.
    """

    train: Train = "B"
    rank: int = 8
    alpha: float = 16.0
    scaling: Scaling = "standard"
    dropout: float = 0.0
    init_a: Start = "orthogonal"
    init_b: Start = "zero"
    targets: list[str] | str = field(default_factory=lambda: ["query", "value"])
    layers: int | None = None
    seed: int = 0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    chain: ChainConfig = field(default_factory=ChainConfig)

    def __post_init__(self) -> None:
        if isinstance(self.chain, Mapping):  # from a checkpoint
            object.__setattr__(self, "chain", ChainConfig(**self.chain))
        for key, choices in (("train", Train), ("scaling", Scaling), ("init_a", Start), ("init_b", Start)):
            if getattr(self, key) not in get_args(choices):
                raise AdapterError(
                    f"adapter.{key}: {getattr(self, key)!r} is unknown. Choose one of {', '.join(get_args(choices))}."
                )
        if type(self.rank) is not int:
            raise AdapterError(f"adapter.rank: {self.rank!r} must be a whole number, 1 or more.")
        if self.rank < 1:
            raise AdapterError(f"adapter.rank: {self.rank} is too small. Use 1 or more.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise AdapterError(f"adapter.alpha: {self.alpha} must be a finite number above 0.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"adapter.dropout: {self.dropout} must lie in [0, 1).")
        if self.layers is not None and (type(self.layers) is not int or self.layers < 1):
            raise AdapterError(f"adapter.layers: {self.layers!r} must be a whole number, 1 or more, or null for all.")
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", [self.targets])
        if not self.targets:
            raise AdapterError("adapter.targets: the list is empty. Name at least one role, `all` or `regex:…`.")
        _check_pattern("rank_pattern", self.rank_pattern, (int,), 1, "a whole number, 1 or more")
        _check_pattern("alpha_pattern", self.alpha_pattern, (int, float), sys.float_info.min, "a finite number above 0")
        self._check_starts()

    def _check_starts(self) -> None:
        """Check that training starts at the pretrained weight, and that the trained factor gets a gradient."""
        if "given" in (self.init_a, self.init_b):
            if self.init_a != self.init_b:
                raise AdapterError(
                    f"adapter.init_a ({self.init_a}) and adapter.init_b ({self.init_b}): only one of them is `given`. "
                    "Set both to `given`, or neither."
                )
            return
        zeros = (self.init_a == "zero") + (self.init_b == "zero")
        if zeros == 2:
            raise AdapterError(
                "adapter.init_a and adapter.init_b: both are zero, so neither factor gets a gradient. "
                "Set one of them to orthogonal, signs, gaussian, uniform, kaiming, svd or svd_minor."
            )
        if zeros == 0:
            raise AdapterError(
                f"adapter.init_a ({self.init_a}) and adapter.init_b ({self.init_b}): neither is zero, so training "
                "would not start at the pretrained weight. Set the initialiser of the trained factor to zero."
            )
        frozen_key = {"A": "init_b", "B": "init_a"}.get(self.train)
        if frozen_key and getattr(self, frozen_key) == "zero":
            trained_key = f"init_{self.train.lower()}"
            raise AdapterError(
                f"adapter.train: {self.train} cannot learn, since the frozen factor is zero ({frozen_key}: zero). "
                f"Set {frozen_key}: orthogonal and {trained_key}: zero."
            )

    @property
    def scale(self) -> float:
        """Return the scale s of every projection that no pattern matches."""
        return scale_of(self.alpha, self.rank, self.scaling)

    def rank_of(self, projection: Projection) -> int:
        """Return the rank of a projection."""
        return value_of(self.rank_pattern, projection.name, self.rank, projection.role)

    def alpha_of(self, projection: Projection) -> float:
        """Return the alpha of a projection."""
        return value_of(self.alpha_pattern, projection.name, self.alpha, projection.role)

    def scale_of(self, projection: Projection) -> float:
        """Return the scale s of the update s·B·A of a projection."""
        return scale_of(self.alpha_of(projection), self.rank_of(projection), self.scaling)

    @property
    def trains_a(self) -> bool:
        """Return True if A is trained."""
        return self.train in ("A", "both")

    @property
    def trains_b(self) -> bool:
        """Return True if B is trained."""
        return self.train in ("B", "both")


def scale_of(alpha: float, rank: int, scaling: Scaling) -> float:
    """Return the scale s: alpha / rank (Hu et al. 2022), or alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def _check_pattern(key: str, patterns: Any, types: tuple[type, ...], minimum: float, requirement: str) -> None:
    """Validate the keys and values of a pattern.

    Raises:
        AdapterError: If a key or a value is invalid. The message has both.
    """
    if not isinstance(patterns, Mapping) or not all(isinstance(name, str) for name in patterns):
        raise AdapterError(f"adapter.{key}: {patterns!r:.200} must map names to values, such as {{query: 4}}.")
    for name, value in patterns.items():
        if problem := pattern_problem(name):
            raise AdapterError(f"adapter.{key}: {name!r:.120} is {problem}.")
        if type(value) not in types or not minimum <= value <= sys.float_info.max:
            raise AdapterError(f"adapter.{key}: {value!r:.80} of {name!r:.120} must be {requirement}.")
