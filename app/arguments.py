"""Precedence of command line, configuration files and checkpoint; checks of their values."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.strategies import StrategyRegistry

from app.imports import same_class
from app.program_files import find_program_file
from app.variants import OPTION, variant_keys

SECTIONS = ("model", "data")  # which name a class
LARGEST_SEED = 2**32 - 1  # NumPy's
LARGEST_NUMBER = 2**63 - 1  # torch's

_log = logging.getLogger(__name__)


# callbacks have members of enumerations among their defaults, which a saved configuration has to hold
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def split_arguments(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Split the command line into the command, the names of the configuration files, and the options.

    Raises:
        ArgumentError: For `--config` without a name.
    """
    command = [words[0]] if words and not words[0].startswith("-") else []
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, options = parser.parse_known_args(words[len(command) :])
    return command, [find_program_file(name) for name in known.config], options


def without_sections(options: list[str]) -> list[str]:
    """Return the options that are not about the model or the data."""
    kept = []
    rest = iter(options)
    for word in rest:
        key = word.removeprefix("--").partition("=")[0]
        if not (word.startswith("--") and key.removesuffix("+").partition(".")[0] in SECTIONS):
            kept.append(word)
        elif "=" not in word:
            next(rest, None)
    return kept


def runs_root(given: str | None, files: list[str]) -> Path:
    """Return the directory below which a recipe's runs lie.

    Args:
        given: `trainer.default_root_dir`.
        files: Names of the configuration files. Without a given directory the first file decides: runs/<recipe>, or
            the parent of the run directory if the file is the config.yaml of a run.

    Raises:
        ArgumentError: For an empty name, or the home of a user who does not exist.
    """
    if given is not None:
        return expanded_path("trainer.default_root_dir", given)
    first = Path(files[0]) if files else Path("default.yaml")
    return first.parent.parent if first.parent.name.startswith("version_") else Path("runs") / first.stem


def expanded_path(key: str, given: str) -> Path:
    """Return a path with `~` expanded.

    Raises:
        ArgumentError: With the key, for an empty name or the home of a user who does not exist.
    """
    if not given:
        raise ArgumentError(None, f"{key}: the name is empty. Give a path, or leave the key out.")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ArgumentError(None, f"{key}: {given} cannot be expanded ({error}).") from error


def saved_configuration(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the `model` and `data` sections that a checkpoint was trained with."""
    saved: dict[str, Any] = {}
    for section, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        values = checkpoint.get(key)
        if isinstance(values, dict) and isinstance(values.get("_class_path"), str):
            arguments = {k: v for k, v in values.items() if k not in ("_class_path", "_instantiator")}
            saved[section] = {"class_path": values["_class_path"], "init_args": arguments}
    return saved


def class_of(config: Namespace, section: str) -> str | None:
    """Return the class path of a section; None if the section names no class."""
    content = config.get(section)
    return content.get("class_path") if isinstance(content, Namespace) else None


def check_sections(config: Namespace) -> None:
    """Check that a command has a model and data; raise ArgumentError with the section that is missing."""
    for section in SECTIONS:
        if class_of(config, section) is None:
            raise ArgumentError(
                None, f"{section}: no class is given. Add --config FILE with a recipe of conf/, or --{section} CLASS."
            )


def check_classes(saved: dict[str, Any], config: Namespace, trains: bool) -> dict[str, Any]:
    """Check that a checkpoint is of the task that the configuration is for.

    Args:
        saved: The sections that the checkpoint was trained with.
        config: Files and command line, parsed without the checkpoint.
        trains: Whether training goes on. To evaluate, data of another kind is as good, such as MMLU.

    Returns:
        The saved sections that the configuration does not replace.

    Raises:
        ArgumentError: With both classes.
    """
    kept = dict(saved)
    for section, content in saved.items():
        wanted = class_of(config, section)
        if wanted is None or same_class(wanted, content["class_path"]):
            continue
        if section == "model" or trains:
            raise ArgumentError(
                None,
                f"ckpt_path: the checkpoint was trained with {content['class_path']}, and the configuration is for "
                f"{wanted}. Use the config.yaml of the checkpoint's run, or another checkpoint.",
            )
        del kept[section]
    return kept


def check_values(key: str, hint: Any, value: Any) -> None:
    """Check what the parser lets through: null where a class takes none, and a single value for a group of keys.

    Args:
        key: The value's key.
        hint: The type of the key.
        value: The given value.

    Raises:
        ArgumentError: With the key.
    """
    if value is None and hint is not Any and type(None) not in get_args(hint):
        raise ArgumentError(None, f"{key}: the value cannot be null. Leave the key out to have its default.")
    if dataclasses.is_dataclass(hint) and value is not None:
        if not isinstance(value, Namespace):
            names = ", ".join(field.name for field in dataclasses.fields(hint))
            raise ArgumentError(None, f"{key}: {value!r} is a single value. Give keys: {names}.")
        hints = get_type_hints(hint)
        for name, part in value.items(branches=True, nested=False):
            check_values(f"{key}.{name}", hints[name], part)


def check_plain_values(key: str, value: Any) -> None:
    """Check all numbers and words below a key.

    NaN is refused, and so are integers that no library holds, seeds that NumPy refuses, and names that are no UTF-8:
    neither YAML nor TensorBoard can write them.

    Raises:
        ArgumentError: With the key.
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
            raise ArgumentError(None, f"{key}: {value} is no UTF-8. Rename the file or folder.") from error
    elif isinstance(value, float) and math.isnan(value):
        raise ArgumentError(None, f"{key}: nan is no number. Give a finite one.")
    elif isinstance(value, int) and not isinstance(value, bool):
        is_seed = key.rpartition(".")[2] in ("seed_everything", "seed") or key.endswith("_seed")
        least, most = (0, LARGEST_SEED) if is_seed else (-LARGEST_NUMBER, LARGEST_NUMBER)
        if not least <= value <= most:
            raise ArgumentError(None, f"{key}: {value} lies outside {least} to {most}.")


def check_strategy(strategy: Any) -> None:
    """Refuse strategies of Lightning that shard or move the trained parameters, or that fork this process.

    Args:
        strategy: A name, or a class with its arguments. Strategies from elsewhere pass.

    Raises:
        ArgumentError: With the strategy to use instead.
    """
    path = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    name = path.rpartition(".")[2]
    values = strategy.get("init_args") if isinstance(strategy, Namespace) else None
    started = name if values is None else f"{name} with start_method {values.get('start_method') or 'popen'}"
    if name.startswith(("ddp_", "DDPStrategy")) and any(way in started for way in ("spawn", "fork", "notebook")):
        raise ArgumentError(
            None,
            f"trainer.strategy: {started} starts its processes from within this one; use ddp, which starts them anew.",
        )
    replicates = name == "auto" or name.lower().startswith(("ddp", "singledevice", "single_device"))
    is_lightnings = path.startswith("lightning.") if "." in path else path in StrategyRegistry.available_strategies()
    if is_lightnings and not replicates:  # Lightning reports a strategy that does not exist
        raise ArgumentError(
            None,
            f"trainer.strategy: {name} would shard or move what is trained, which is little and stays whole on each "
            "device; use ddp, and where the frozen weights are too large for one device --model.shard_frozen true with "
            "it (conf/fsdp.yaml).",
        )


@contextmanager
def temporary_yaml(content: dict[str, Any]) -> Iterator[str]:
    """Write `content` to a temporary YAML file; delete it on exit.

    Raises:
        ArgumentError: If the content, a checkpoint's, is no plain values.
    """
    handle, name = tempfile.mkstemp(suffix=".yaml")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            try:
                yaml.safe_dump(content, file, sort_keys=False)  # the first key of a rank_pattern that matches decides
            except (yaml.YAMLError, RecursionError, ValueError) as error:
                raise ArgumentError(
                    None, "ckpt_path: the hyper-parameters in the checkpoint are no plain values. Use another one."
                ) from error
        yield name
    finally:
        os.unlink(name)


def check_variant(variant: str, from_words: Namespace, saved: dict[str, Any]) -> None:
    """Check that a checkpoint is of the variant that a resumed fit names.

    Keys that the command line sets beside the variant do not count, nor do factors that `model.adapter_path` gave.

    Args:
        variant: The variant's name.
        from_words: Files, variant and command line, parsed without the checkpoint.
        saved: The sections that the checkpoint was trained with.

    Raises:
        ArgumentError: With the keys that differ.
    """
    trained = _flatten({"model": saved["model"]["init_args"]}) if "model" in saved else {}
    now = {f"model.{key}": value for key, value in _flat_section(from_words, "model").items()}
    differing = [
        f"{key}: {trained[key]} (the variant has {value})"
        for key, value in variant_keys(variant).items()
        if key in trained
        and _plain(now.get(key, value)) == value
        and _plain(trained[key]) != value
        and not (trained[key] == "given" and key.startswith("model.adapter.init_"))
    ]
    if differing:
        raise ArgumentError(
            None,
            f"{OPTION}: the checkpoint is not of the variant {variant}. It was trained with {', '.join(differing)}. "
            f"Leave {OPTION} out to resume the checkpoint, or leave --ckpt_path out to start a new run.",
        )


def ignore_adapter_path(from_files: Namespace, final: Namespace) -> None:
    """Ignore `model.adapter_path` when a checkpoint is used: set the command's value to null, and log that."""
    values = final["model"].init_args
    if values.get("adapter_path") is not None or _flat_section(from_files, "model").get("adapter_path") is not None:
        values["adapter_path"] = None
        _log.info("model.adapter_path is not read: the checkpoint has the adapters.")


def report_untrained(command: str, heads: list[str], adapter_path: str | None) -> None:
    """Log which weights a command without a checkpoint uses; `heads` are the names of the model's heads."""
    used = "the backbone without training"
    if adapter_path is not None:
        used = f"the backbone with the adapters of {adapter_path}, and with the heads that lie there"
    elif heads:
        used += (
            f". Its head ({', '.join(heads)}) has random weights, unless the backbone's own files bring a head for the "
            "same classes"
        )
    _log.info(f"{command} without --ckpt_path uses {used}.")


def report_differences(
    saved: dict[str, Any], from_files: Namespace, of_variant: dict[str, Any], final: Namespace
) -> None:
    """Log which values of the command line replace the checkpoint's, and which of the checkpoint's replace a file's.

    Args:
        saved: The sections that the checkpoint was trained with.
        from_files: Values of the configuration files.
        of_variant: Keys that the variant sets, which replace a file's: the checkpoint was checked against them.
        final: Values of the command.
    """
    for section, content in saved.items():
        ours = _flatten(final[section].init_args.as_dict())
        theirs = {f"{section}.{key}": value for key, value in _flat_section(from_files, section).items()} | of_variant
        for key, value in _flatten(content["init_args"]).items():
            name = f"{section}.{key}"
            if name in ("data.predict_path", "model.adapter_path"):  # new each time; never read
                continue
            if key in ours and _plain(ours[key]) != _plain(value):
                _log.info(f"{name}: {ours[key]} from the command line; the checkpoint had {value}.")
            elif theirs.get(name) is not None and _plain(theirs[name]) != _plain(value):
                _log.info(f"{name}: {value} from the checkpoint; the configuration file has {theirs[name]}.")


def report_changes(before: dict[str, Any], final: Namespace) -> None:
    """Log which keys of the trainer a resumed run has otherwise than it began; these are not in a checkpoint."""
    unlike = {"default_root_dir", "logger", "callbacks"}  # they differ whenever a run is resumed
    ours = {k: v for k, v in final["trainer"].as_dict().items() if k not in unlike}
    now, began = (_flatten({"trainer": t}) for t in (ours, before.get("trainer", {})))
    now["seed_everything"], began["seed_everything"] = final.get("seed_everything"), before.get("seed_everything")
    for key, value in now.items():
        if key in began and _plain(began[key]) != _plain(value):
            _log.info(f"{key}: {value} now; the run began with {began[key]}.")


def _flat_section(config: Namespace, section: str) -> dict[str, Any]:
    """Return the arguments of a section's class by dotted key; none if the section is not there."""
    content = config.get(section)
    values = content.get("init_args") if isinstance(content, Namespace) else None
    return _flatten(values.as_dict()) if isinstance(values, Namespace) else {}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
