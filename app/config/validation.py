"""Validation of a configuration: classes, values and strategy, before anything is constructed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch.strategies import StrategyRegistry

from app.config.imports import same_class
from app.config.messages import ListError
from app.config.precedence import SECTIONS, comparable, dotted, section_keys
from app.config.program_files import list_recipes
from app.config.variants import OPTION, variant_keys
from datamodules.errors import UsageError

LARGEST_SEED = 2**32 - 1  # that NumPy takes
LARGEST_NUMBER = 2**63 - 1  # that torch takes


def class_of(config: Namespace, section: str) -> str | None:
    """Return the class path of a section; None if the section names no class."""
    content = config.get(section)
    return content.get("class_path") if isinstance(content, Namespace) else None


def check_sections(config: Namespace) -> None:
    """Check that a command has a model and data. Raise UsageError with the section that is missing."""
    for section in SECTIONS:
        if class_of(config, section) is None:
            raise ListError(
                f"{section}: no class is given. Add --{section} CLASS, or --config FILE with a recipe:", list_recipes()
            )


def check_classes(checkpoint: Path, saved: dict[str, Any], config: Namespace, trains: bool) -> dict[str, Any]:
    """Check that a checkpoint was trained with the classes that the configuration names.

    Args:
        checkpoint: The checkpoint.
        saved: The sections that the checkpoint was trained with.
        config: Files and command line, parsed without the checkpoint.
        trains: True to resume training. An evaluation may use another class of data.

    Returns:
        The saved sections that the configuration does not replace.

    Raises:
        UsageError: With both classes.
    """
    kept = dict(saved)
    for section, content in saved.items():
        wanted = class_of(config, section)
        if wanted is None or same_class(wanted, content["class_path"]):
            continue
        if section == "model" or trains:
            raise UsageError(
                f"ckpt_path: {checkpoint} was trained with {content['class_path']}, but the configuration names "
                f"{wanted}. Use the config.yaml of the checkpoint's run, or another checkpoint."
            )
        del kept[section]
    return kept


def check_values(key: str, hint: Any, value: Any) -> None:
    """Reject values that the parser accepts: null where a class takes no null, and a single value for a group of keys.

    Args:
        key: The value's key.
        hint: The type of the key.
        value: The given value.

    Raises:
        UsageError: With the key.
    """
    if value is None and hint is not Any and type(None) not in get_args(hint):
        raise UsageError(f"{key}: the value cannot be null. Leave the key out to use its default.")
    if dataclasses.is_dataclass(hint) and value is not None:
        if not isinstance(value, Namespace):
            names = ", ".join(field.name for field in dataclasses.fields(hint))
            raise UsageError(f"{key}: {value!r} is a single value. Give keys: {names}.")
        hints = get_type_hints(hint)
        for name, part in value.items(branches=True, nested=False):
            check_values(f"{key}.{name}", hints[name], part)


def check_plain_values(key: str, value: Any) -> None:
    """Check all numbers and strings below a key.

    NaN, integers that torch cannot hold, and seeds that NumPy refuses are rejected. Strings that are not UTF-8 are
    rejected too, since neither YAML nor TensorBoard can write such strings.

    Raises:
        UsageError: With the key.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            inner = name in ("init_args", "dict_kwargs")
            check_plain_values(key if inner else f"{key}.{name}".removeprefix("."), part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            check_plain_values(key, part)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{key}: {value} is not UTF-8. Rename the file or folder.") from error
    elif isinstance(value, float) and math.isnan(value):
        raise UsageError(f"{key}: nan is not allowed. Give a finite number.")
    elif isinstance(value, int) and not isinstance(value, bool):
        is_seed = key.rpartition(".")[2] in ("seed_everything", "seed") or key.endswith("_seed")
        least, most = (0, LARGEST_SEED) if is_seed else (-LARGEST_NUMBER, LARGEST_NUMBER)
        if not least <= value <= most:
            raise UsageError(f"{key}: {value} is outside of the range {least} to {most}.")


def check_strategy(strategy: Any) -> None:
    """Reject strategies of Lightning that shard or move the trained parameters, or that fork or spawn this process.

    Args:
        strategy: A name, or a class with its arguments. Strategies of other packages are accepted.

    Raises:
        UsageError: With the strategy to use instead.
    """
    path = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    name = path.rpartition(".")[2]
    values = strategy.get("init_args") if isinstance(strategy, Namespace) else None
    started = name if values is None else f"{name} with start_method {values.get('start_method') or 'popen'}"
    if name.startswith(("ddp_", "DDPStrategy")) and any(method in started for method in ("spawn", "fork", "notebook")):
        raise UsageError(f"trainer.strategy: {started} forks or spawns this process, which is not supported. Use ddp.")
    replicates = name == "auto" or name.lower().startswith(("ddp", "singledevice", "single_device"))
    is_lightning = path.startswith("lightning.") if "." in path else path in StrategyRegistry.available_strategies()
    if is_lightning and not replicates:  # Lightning reports a strategy that does not exist.
        raise UsageError(
            f"trainer.strategy: {name} would shard or move the trained parameters, which every device needs whole. Use "
            "ddp. If the frozen weights are too large for one device, add --model.shard_frozen true (conf/fsdp.yaml)."
        )


def check_variant(variant: str, from_words: Namespace, saved: dict[str, Any]) -> None:
    """Check that a checkpoint is of the variant that a resumed fit names.

    Two kinds of keys are not compared: keys that the command line sets to another value than the variant, and
    initialisers of factors that `model.adapter_path` gave.

    Args:
        variant: The variant's name.
        from_words: Files, variant and command line, parsed without the checkpoint.
        saved: The sections that the checkpoint was trained with.

    Raises:
        UsageError: With the keys that differ.
    """
    trained = dotted({"model": saved["model"]["init_args"]}) if "model" in saved else {}
    now = {f"model.{key}": value for key, value in section_keys(from_words, "model").items()}
    differing = [
        f"{key}: {trained[key]} (the variant has {value})"
        for key, value in variant_keys(variant).items()
        if key in trained
        and comparable(now.get(key, value)) == value
        and comparable(trained[key]) != value
        and not (trained[key] == "given" and key.startswith("model.adapter.init_"))
    ]
    if differing:
        raise UsageError(
            f"{OPTION}: the checkpoint is not of the variant {variant}. It was trained with {', '.join(differing)}. "
            f"Leave {OPTION} out to resume the checkpoint, or leave --ckpt_path out to start a new run."
        )
