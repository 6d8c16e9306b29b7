"""Values by patterns of names. The reference is PEFT's matching."""

from __future__ import annotations

import itertools
import random

import pytest
from peft.utils.other import get_pattern_key

from modules.adapters.patterns import exact_key, exact_patterns, pattern_problem, short_patterns, value_of
from modules.adapters.roles import ROLES

LAYERS = [
    f"{side}.layers.{i}.{part}" for side in ("encoder", "layers") for i in (0, 1, 11) for part in ("q", "k.q", "q.k")
]
KEYS = ["q", "k.q", r"layers\.1\.q", r"layers\.\d+\.q", "^layers.1.q", "layers.1.q", ".*", "encoder", r"1*\.q", "(q|k)"]


@pytest.mark.parametrize("keys", [*itertools.permutations(KEYS, 2)])
def test_the_first_match_equals_pefts(keys: tuple[str, ...]) -> None:
    patterns = {key: i for i, key in enumerate(keys)}
    for name in LAYERS:
        assert value_of(patterns, name, -1) == patterns.get(get_pattern_key(list(keys), name), -1)


@pytest.mark.parametrize("seed", range(40))
def test_written_patterns_restore_every_value_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    values = {name: draw.choice((2, 4, 8)) for name in LAYERS}
    if seed % 2:  # values that depend on the last part of the name, as users set them
        values = {name: 2 if name.endswith("k.q") else 8 if name.endswith("q") else 4 for name in LAYERS}
    for patterns in (short_patterns(values, 4), short_patterns(values, 4, ROLES), exact_patterns(values, 4)):
        keys = list(patterns)
        draw.shuffle(keys)
        shuffled = {key: patterns[key] for key in keys}
        assert {name: value_of(shuffled, name, 4) for name in LAYERS} == values
        # PEFT reads the same values
        assert {name: shuffled.get(get_pattern_key(keys, name), 4) for name in LAYERS} == values
        assert not any(map(pattern_problem, patterns))


def test_short_patterns_are_short() -> None:
    names = [f"encoder.layer.{i}.attention.self.{part}" for i in range(12) for part in ("query", "value")]
    values = {name: 16 if name.endswith("query") else 4 for name in names}
    assert short_patterns(values, 4) == {"query": 16}
    assert short_patterns(values, 4, reserved=ROLES) == {"self.query": 16}
    assert short_patterns(dict.fromkeys(names, 4), 4) == {}


def test_written_patterns_escape_dots() -> None:
    values = {"a.b.c": 2, "a.bxc": 4}
    assert [value_of(short_patterns(values, 4), name, 4) for name in values] == [2, 4]
    assert value_of({exact_key("a+b"): 2}, "a+b", 4) == 2
    assert value_of({exact_key("b.c"): 2}, "a.b.c", 4) == 4
