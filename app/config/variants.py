"""Built-in variants: what is trained, by name, as keys that turn any recipe into that variant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from jsonargparse import ArgumentError

OPTION = "--variant"


class VariantError(ValueError):
    """A variant that does not exist; the message lists those that do."""


def _adapter(train: str, init_a: str, init_b: str, **others: Any) -> dict[str, Any]:
    """Return the keys of a low-rank adapter; `others` are keys of the model."""
    return {
        "model.tuning": "adapter",
        "model.adapter.train": train,
        "model.adapter.init_a": init_a,
        "model.adapter.init_b": init_b,
        "model.adapter.scaling": "standard",
        "model.lr_ratio_b": 1.0,
        **{f"model.{key}": value for key, value in others.items()},
    }


# A variant sets every key that belongs to it, so that no value of a recipe is left to change what its name promises.
# Rank, alpha, dropout, targets, layers, seed and learning rate are the recipe's.
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "B": _adapter("B", "orthogonal", "zero"),  # Zhu et al. 2024, arXiv 2402.16842
        "A": _adapter("A", "zero", "orthogonal"),
        "lora": _adapter("both", "kaiming", "zero"),  # Hu et al. 2022, arXiv 2106.09685
        "lora-fa": _adapter("B", "kaiming", "zero"),  # Zhang et al. 2023, arXiv 2308.03303
        # s = alpha / sqrt(rank): Kalajdzievski 2023, arXiv 2312.03732
        "rslora": _adapter("both", "kaiming", "zero", **{"adapter.scaling": "rslora"}),
        "lora+": _adapter("both", "kaiming", "zero", lr_ratio_b=16.0),  # Hayou et al. 2024, arXiv 2402.12354, section 5
        "head": {"model.tuning": "head"},
        # what is trained is neither bfloat16 nor sharded
        "full": {"model.tuning": "full", "model.backbone_dtype": "float32", "model.shard_frozen": False},
        "adalora": {"model.tuning": "adalora", "model.shard_frozen": False},  # Zhang et al. 2023, arXiv 2303.10512
        # keys, values and the input of the feed-forward layer's second half: Liu et al. 2022, arXiv 2205.05638
        "ia3": {
            "model.tuning": "ia3",
            "model.adapter.targets": ["key", "value", "mlp_out"],
            "model.shard_frozen": False,
        },
    }
)
HELP = (
    f"{OPTION} NAME, of fit: turn the recipe into {', '.join(VARIANTS)}; other options of the command line beat the "
    "keys of the variant."
)


def variant_keys(name: str) -> dict[str, Any]:
    """Return the keys of a variant, by dotted name.

    Raises:
        VariantError: For a name that is not in `VARIANTS`.
    """
    if name not in VARIANTS:
        by_lower_case = {known.lower(): known for known in VARIANTS}
        close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
        hint = f"; did you mean {by_lower_case[close[0]]}?" if close else "."
        raise VariantError(f"variant: {name!r:.80} is not known{hint} Choose one of {', '.join(VARIANTS)}.")
    return deepcopy(dict(VARIANTS[name]))


def variant_name(keys: Mapping[str, Any]) -> str:
    """Return the name of the variant that a configuration is of; `custom` if it is of none.

    Args:
        keys: All values of the configuration by dotted name. A key that is missing, since the version that saved the
            configuration did not have it, is taken to be as the variant sets it.
    """
    known = (name for name, own in VARIANTS.items() if all(keys.get(key, value) == value for key, value in own.items()))
    return next(known, "custom") if "model.tuning" in keys else "custom"


def option_words(keys: Mapping[str, Any]) -> list[str]:
    """Return keys and their values as words of the command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def split_variant(command: Sequence[str], options: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the options of a command into the variant that they name and the other options, in their order.

    Args:
        command: The command, or an empty list if something else stands first on the command line.
        options: The words after the command.

    Returns:
        The last `--variant`, or None; the other options.

    Raises:
        ArgumentError: For the option of another command than fit, without a name, or with an unknown one.
    """
    names, others = [], []
    rest = iter(options)
    for word in rest:
        if word == OPTION:
            names.append(next(rest, ""))
        elif word.startswith(f"{OPTION}="):
            names.append(word.partition("=")[2])
        else:
            others.append(word)
    if not names:
        return None, others
    if list(command) != ["fit"]:
        raise ArgumentError(
            None, f"{OPTION}: only fit takes a variant, and fit stands before it; a checkpoint has its own variant."
        )
    if "" in names:
        raise ArgumentError(None, f"{OPTION}: a name is missing. Choose one of {', '.join(VARIANTS)}.")
    try:
        variant_keys(names[-1])
    except VariantError as error:
        raise ArgumentError(None, f"--{error}") from error
    return names[-1], others
