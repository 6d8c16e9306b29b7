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


class AdapterError(ValueError):
    """An adapter that cannot be built, attached or loaded as asked; the message says how to fix it."""


@dataclass(frozen=True)
class Projection:
    """A place for one adapter: a linear layer, or the rows of a fused layer that belong to one role.

    Args:
        layer: Name of the linear layer in the model, `blocks.0.attn.qkv`.
        role: One of `ROLES`, or `other` for a layer that the table does not know.
        start: First row of the weight.
        stop: Row behind the last.
        fused: True if the layer holds other projections too.
    """

    layer: str
    role: str
    start: int
    stop: int
    fused: bool = False

    @property
    def name(self) -> str:
        """Return a name that is unique in the model: the layer's, followed by the role if the layer is fused."""
        return f"{self.layer}.{self.role}" if self.fused else self.layer

    @property
    def rows(self) -> slice:
        """Return the rows of the layer's weight."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class AdapterConfig:
    """Adapter of every targeted projection: W + s·B·A, with A (rank, d_in) and B (d_out, rank).

    The defaults are the variant that the paper recommends, B trained from zero over a frozen random orthogonal A
    (Zhu et al., ICML 2024, arXiv 2402.16842, section 5), at the paper's alpha = 2·rank.

    Args:
        train: The factor that is trained; the other stays as it was drawn. `both` is ordinary LoRA.
        rank: Inner dimension r, at least 1 and at most min(d_in, d_out) of every adapted projection.
        alpha: Numerator of the scale s, above 0.
        scaling: `standard` has s = alpha / rank, `rslora` s = alpha / sqrt(rank) (Kalajdzievski 2023).
        dropout: Probability in [0, 1) of zeroing an entry of the adapter's input.
        init_a: Initialiser of A; the module `init` has a table.
        init_b: Initialiser of B; the same choices. Exactly one factor starts at zero, so that training starts at W. Or
            both are `given`, by a file or a checkpoint; until then they are zero.
        targets: Roles (`query`, `key`, `value`, `output`, `mlp_in`, `mlp_gate`, `mlp_out`), `attention` for the first
            four, `all`, or `regex:PATTERN` that must match the whole name of a projection.
        layers: Of the targeted projections take those in the last so many blocks, at least 1; None takes all. Blocks
            are what the backbone numbers (`blocks.7`, `encoder.layer.7`; stages where blocks are grouped in stages), of
            an encoder-decoder those of either side. What lies below the lowest is not differentiated, except that the
            gradient to an adapted encoder passes through all of its decoder.
        seed: Seed of the random factors. A factor depends on it, on the name of its projection and on its shape alone.
        rank_pattern: Ranks other than `rank`, for some projections: `{query: 16, "blocks.0.mlp.fc1": 4}`. A key is a
            role, or the end of a projection's name, or a regular expression for that end, as in PEFT's `rank_pattern`.
            The first key that matches decides. Every key must match a targeted projection. vLLM ignores ranks by name.
        alpha_pattern: Alphas other than `alpha`, with the same keys. The scale s of a projection comes from its own
            alpha and its own rank.

    Raises:
        AdapterError: For a value out of range or a combination that could not learn or would not start at W.
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

    def __post_init__(self) -> None:
        for key, choices in (("train", Train), ("scaling", Scaling), ("init_a", Start), ("init_b", Start)):
            if getattr(self, key) not in get_args(choices):
                raise AdapterError(
                    f"adapter.{key}: {getattr(self, key)!r} is not known; choose one of {', '.join(get_args(choices))}."
                )
        if type(self.rank) is not int:
            raise AdapterError(f"adapter.rank: {self.rank!r} must be a whole number.")
        if self.rank < 1:
            raise AdapterError(f"adapter.rank: {self.rank} is too small; it must be 1 or more.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise AdapterError(f"adapter.alpha: {self.alpha} must be a finite number above 0.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"adapter.dropout: {self.dropout} must lie in [0, 1).")
        if self.layers is not None and (type(self.layers) is not int or self.layers < 1):
            raise AdapterError(f"adapter.layers: {self.layers!r} must be a whole number, 1 or more, or null for all.")
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", [self.targets])
        if not self.targets:
            raise AdapterError("adapter.targets: the list is empty; name at least one role, `all` or `regex:…`.")
        _check_pattern("rank_pattern", self.rank_pattern, (int,), 1, "a whole number, 1 or more")
        _check_pattern("alpha_pattern", self.alpha_pattern, (int, float), sys.float_info.min, "a finite number above 0")
        self._check_starts()

    def _check_starts(self) -> None:
        """Refuse the pairs that cannot learn and those that do not start at the pretrained weight."""
        if "given" in (self.init_a, self.init_b):
            if self.init_a != self.init_b:
                raise AdapterError(
                    f"adapter.init_a ({self.init_a}) and adapter.init_b ({self.init_b}): factors are given both or not "
                    "at all; with model.adapter_path both are, and otherwise neither."
                )
            return
        zeros = (self.init_a == "zero") + (self.init_b == "zero")
        if zeros == 2:
            raise AdapterError(
                "adapter.init_a and adapter.init_b: both are zero, a saddle where neither factor has a gradient; "
                "start one of them from orthogonal, signs, gaussian, uniform, kaiming, svd or svd_minor."
            )
        if zeros == 0:
            raise AdapterError(
                f"adapter.init_a ({self.init_a}) and adapter.init_b ({self.init_b}): neither is zero, so training "
                "would not start at the pretrained weight; set the one that is trained to zero."
            )
        frozen_key = {"A": "init_b", "B": "init_a"}.get(self.train)
        if frozen_key and getattr(self, frozen_key) == "zero":
            trained_key = f"init_{self.train.lower()}"
            raise AdapterError(
                f"adapter.train: {self.train} learns nothing over a frozen factor of zeros ({frozen_key}: zero); "
                f"set {frozen_key}: orthogonal and {trained_key}: zero."
            )

    @property
    def scale(self) -> float:
        """Return the scale s of the update s·B·A of every projection that no pattern names."""
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


def _check_pattern(key: str, patterns: Any, types: tuple[type, ...], least: float, wanted: str) -> None:
    """Refuse a pattern whose keys or values cannot be used.

    Raises:
        AdapterError: With the key and the value.
    """
    if not isinstance(patterns, Mapping) or not all(isinstance(name, str) for name in patterns):
        raise AdapterError(f"adapter.{key}: {patterns!r:.200} must give names a value each, as in {{query: 4}}.")
    for name, value in patterns.items():
        if problem := pattern_problem(name):
            raise AdapterError(f"adapter.{key}: {name!r:.120} is {problem}.")
        if type(value) not in types or not least <= value <= sys.float_info.max:
            raise AdapterError(f"adapter.{key}: {value!r:.80} of {name!r:.120} must be {wanted}.")
