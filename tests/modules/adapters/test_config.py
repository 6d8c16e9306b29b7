"""Configuration of adapters: ranges, scales, and valid pairs of initialisations."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest

from modules.adapters.config import AdapterConfig, AdapterError, Init, Projection


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train", "b"),
        ("train", "AB"),
        ("train", None),
        ("scaling", "lora"),
        ("init_a", "normal"),
        ("init_b", "Zero"),
        ("rank", 0),
        ("rank", -3),
        ("alpha", 0),
        ("alpha", -1.0),
        ("alpha", math.inf),
        ("alpha", math.nan),
        ("dropout", -0.1),
        ("dropout", 1),
        ("dropout", math.nan),
        ("targets", []),
    ],
)
def test_value_out_of_range_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=rf"adapter\.{key}"):
        AdapterConfig(**{key: value})


PAIRS = list(itertools.product(("B", "A", "both"), get_args(Init), get_args(Init)))


def can_learn(train: str, init_a: str, init_b: str) -> bool:
    """Return True if exactly one factor starts at zero, and if a factor that is trained alone is this factor."""
    return (init_a == "zero") != (init_b == "zero") and {"B": init_b, "A": init_a}.get(train, "zero") == "zero"


@pytest.mark.parametrize(("train", "init_a", "init_b"), [p for p in PAIRS if can_learn(*p)])
def test_initialisations_that_can_learn_are_accepted(train: Any, init_a: Any, init_b: Any) -> None:
    config = AdapterConfig(train=train, init_a=init_a, init_b=init_b)
    assert (config.trains_a, config.trains_b) == (train != "B", train != "A")


@pytest.mark.parametrize(("train", "init_a", "init_b"), [p for p in PAIRS if not can_learn(*p)])
def test_initialisations_that_cannot_learn_are_refused_by_their_keys(train: Any, init_a: Any, init_b: Any) -> None:
    with pytest.raises(AdapterError) as error:
        AdapterConfig(train=train, init_a=init_a, init_b=init_b)
    message = str(error.value)
    assert "init_a" in message
    assert "init_b" in message
    # a trained factor beside a frozen zero: the advice in the message must be valid
    if (init_a == "zero") != (init_b == "zero"):
        assert "adapter.train" in message
        frozen, trained = ("init_a", "init_b") if train == "B" else ("init_b", "init_a")
        assert f"Set {frozen}: orthogonal and {trained}: zero" in message
        AdapterConfig(**{"train": train, frozen: "orthogonal", trained: "zero"})


@pytest.mark.parametrize(
    ("scaling", "rank", "alpha", "scale"),
    [("standard", 8, 16.0, 2.0), ("standard", 16, 8.0, 0.5), ("rslora", 16, 8.0, 2.0), ("rslora", 2, 2.0, 2**0.5)],
)
def test_scale_of_standard_and_rslora(scaling: Any, rank: int, alpha: float, scale: float) -> None:
    assert AdapterConfig(scaling=scaling, rank=rank, alpha=alpha).scale == pytest.approx(scale, rel=1e-12)


def test_defaults_are_those_of_the_paper() -> None:
    config = AdapterConfig()
    assert (config.train, config.init_a, config.init_b) == ("B", "orthogonal", "zero")
    assert config.alpha == 2 * config.rank
    assert config.targets == ["query", "value"]


def test_targets_as_a_string_become_a_list() -> None:
    assert AdapterConfig(targets="attention").targets == ["attention"]
    assert AdapterConfig(targets="attention") == AdapterConfig(targets=["attention"])


@pytest.mark.parametrize("train", ["A", "B", "both"])
def test_given_is_for_both_factors(train: Any) -> None:
    assert AdapterConfig(train=train, init_a="given", init_b="given").train == train
    for other in get_args(Init):
        with pytest.raises(AdapterError, match="only one of them is `given`"):
            AdapterConfig(train=train, init_a="given", init_b=other)
        with pytest.raises(AdapterError, match="only one of them is `given`"):
            AdapterConfig(train=train, init_a=other, init_b="given")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["query"], "must map names to values"),
        (None, "must map names to values"),
        ({1: 4}, "must map names to values"),
        ({"query": 0}, "0 of 'query' must be"),
        ({"query": "4"}, "'4' of 'query' must be"),
        ({"query": True}, "True of 'query' must be"),
        ({"query": math.inf}, "inf of 'query' must be"),
        ({"query": math.nan}, "nan of 'query' must be"),
        ({"query": 10**400}, "of 'query' must be"),
        ({"(": 4}, "not a valid regular expression"),
        ({"(a+)+b": 4}, "too complex"),
        ({"regex:.*qkv": 4}, "'regex:.*qkv' is a pattern with `regex:`, which only targets need: remove"),
    ],
)
def test_an_invalid_pattern_is_refused_by_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=rf"adapter\.{key}: .*{message}"):
        AdapterConfig(**{key: value})


def test_patterns_set_rank_alpha_and_scale() -> None:
    """The first key that matches decides, as in PEFT. A key may be a role."""
    config = AdapterConfig(
        rank=8, alpha=16.0, rank_pattern={r"layers\.1\..*": 2, "mlp_in": 4, "q_proj": 16}, alpha_pattern={"q_proj": 4.0}
    )
    names = {
        "layers.0.q_proj": ("query", 16, 4.0),
        "layers.1.q_proj": ("query", 2, 4.0),
        "layers.0.up_proj": ("mlp_in", 4, 16.0),
        "layers.1.up_proj": ("mlp_in", 2, 16.0),
        "layers.0.not_q_proj": ("other", 8, 16.0),
    }
    for name, (role, rank, alpha) in names.items():
        projection = Projection(name, role, 0, 9)
        assert (config.rank_of(projection), config.alpha_of(projection)) == (rank, alpha)
        assert config.scale_of(projection) == alpha / rank
