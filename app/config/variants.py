"""Built-in variants: named sets of keys that decide which weights a recipe trains."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from datamodules.errors import UsageError

OPTION = "--variant"


class VariantError(ValueError):
    """Error for a variant that does not exist. The message lists all variants."""


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


# A variant sets every key that belongs to its definition, so that no value of a recipe can contradict the name.
# Rank, alpha, dropout, targets (except for ia3), layers, seed, chain and learning rate stay the recipe's.
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
        # Trained weights must be float32 and whole on each device.
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
    f"{OPTION} NAME (fit only): train as {', '.join(VARIANTS)}. Other options of the command line override the variant."
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
    """Return the name of the first variant whose keys a configuration has; `custom` if no variant matches.

    The name of a chain of adapters ends with `-chain`.

    Args:
        keys: All values of the configuration by dotted name. A missing key counts as a match, since an earlier version
            may have saved the configuration without the key.
    """
    matching = (
        name for name, sets in VARIANTS.items() if all(keys.get(k, value) == value for k, value in sets.items())
    )
    name = next(matching, "custom") if "model.tuning" in keys else "custom"
    is_chain = keys.get("model.adapter.chain.every_n_epochs") is not None and keys.get("model.tuning") == "adapter"
    return f"{name}-chain" if is_chain and name != "custom" else name


def command_line_options(keys: Mapping[str, Any]) -> list[str]:
    """Return keys and their values as words of the command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def split_variant(command: Sequence[str], options: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the options of a command into the variant and the other options, in their order.

    Args:
        command: The command, or an empty list if something else stands first on the command line.
        options: The words after the command.

    Returns:
        The last `--variant`, or None; the other options.

    Raises:
        UsageError: If the command is not fit, or if the variant's name is missing or unknown.
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
        raise UsageError(
            f"{OPTION}: only fit takes a variant. Put {OPTION} after fit, or leave {OPTION} out for another command."
        )
    if "" in names:
        raise UsageError(f"{OPTION}: a name is missing. Choose one of {', '.join(VARIANTS)}.")
    try:
        variant_keys(names[-1])
    except VariantError as error:
        raise UsageError(f"--{error}") from error
    return names[-1], others
