"""Values by name, as PEFT's `rank_pattern` and `alpha_pattern` give them.

A key is the end of a name (`q_proj`, `layers.0.self_attn.q_proj`), or a regular expression for the end of a name. The
first matching key applies. A name that no key matches has the default value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

Value = TypeVar("Value", int, float)


def pattern_problem(key: str) -> str | None:
    """Return why a key is invalid, or None. Many or nested repeats are invalid, since matching can take forever."""
    if key.startswith("regex:"):
        return "a pattern with `regex:`, which only targets need: remove `regex:`"
    try:
        re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a valid regular expression ({error})"
    repeats = re.findall(r"[*+?{]", re.sub(r"\\.", "", key))
    if len(repeats) > 4 or re.search(r"\)[*+{]", key):
        return "too complex for a pattern: write out the names"
    return None


@lru_cache(maxsize=4096)  # The cache of `re` holds 512 patterns, and an EVA adapter has one key for each layer.
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def matches(key: str, name: str, role: str | None = None) -> bool:
    """Return True if a key equals the role, or matches the name by PEFT's rule."""
    return key == role or _compiled(key).match(name) is not None


def value_of(patterns: Mapping[str, Value], name: str, default: Value, role: str | None = None) -> Value:
    """Return the value of the first key that matches a name or equals the role, or the default."""
    return next((value for key, value in patterns.items() if matches(key, name, role)), default)


def exact_key(name: str) -> str:
    """Return the key that matches one name and no other."""
    return f"^{re.escape(name)}"


def exact_patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return patterns with one exact key for each name whose value is not the default."""
    return {exact_key(name): value for name, value in values.items() if value != default}


def short_patterns(values: Mapping[str, Value], default: Value, reserved: Collection[str] = ()) -> dict[str, Value]:
    """Return patterns with few and short keys.

    Args:
        values: The value of every name.
        default: The value of names without a key.
        reserved: Keys that must not be used.

    Returns:
        Patterns that give every name its value, whatever the order of the keys.
    """
    patterns: dict[str, Value] = {}
    for value in sorted(set(values.values()) - {default}):
        chosen = [name for name in values if values[name] == value]
        keys = name_endings(chosen, values, reserved) or [exact_key(name) for name in chosen]
        patterns |= dict.fromkeys(keys, value)
    hits = {name: {value for key, value in patterns.items() if matches(key, name)} for name in values}
    # A dot in a key matches any character, so a short key can match too many names.
    correct = all(hits[name] == ({value} - {default}) for name, value in values.items())
    return patterns if correct else exact_patterns(values, default)


def name_endings(chosen: Collection[str], names: Iterable[str], reserved: Collection[str] = ()) -> list[str]:
    """Return endings of at most three parts that match the chosen names and no other names; empty if there are none."""
    names = list(names)
    for length in (1, 2, 3):
        endings = sorted({".".join(name.split(".")[-length:]) for name in chosen})
        hits = {n for n in names if any(n == ending or n.endswith(f".{ending}") for ending in endings)}
        if hits == set(chosen) and not set(endings) & set(reserved):
            return endings
    return []
