"""The words of the command line, the files and the checkpoint: their order, and what of one replaces another's."""

from __future__ import annotations

import dataclasses
import difflib
import logging
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

_log = logging.getLogger(__name__)


# callbacks have members of enumerations among their defaults, which a saved configuration has to hold
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def split_arguments(args: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Command, the `--config` pairs, and everything else, each in the order given."""
    command = [args[0]] if args and not args[0].startswith("-") else []
    rest, files, options = args[len(command) :], [], []
    words = iter(rest)
    for word in words:
        if word in ("--config", "-c"):
            files += ["--config", next(words, "")]
        elif word.startswith("--config="):
            files += ["--config", word.removeprefix("--config=")]
        else:
            options.append(word)
    return command, files, options


def read_yaml(name: str) -> dict[str, Any]:
    """A configuration file as it is written.

    Raises:
        ArgumentError: By its name, which the parser's own message lacks, if it is missing or broken.
    """
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(None, f"--config: there is no file {name!r}.") from None
    except (yaml.YAMLError, ValueError, RecursionError, IsADirectoryError) as error:
        raise ArgumentError(None, f"--config: {name} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentError(None, f"--config: {name} has no keys.")
    return content


def last_value(key: str, options: list[str], contents: list[dict[str, Any]]) -> Any:
    """The value of a key that the command line gives, or else the last file that has it; None if none does."""
    for position, word in reversed(list(enumerate(options))):
        if word.startswith(f"--{key}="):
            return word.partition("=")[2]
        if word == f"--{key}" and position + 1 < len(options):
            return options[position + 1]
    for content in reversed(contents):
        flat = _flatten(content)
        if key in flat:
            return flat[key]
    return None


def default_root(files: list[str]) -> Path:
    """Directory of a recipe's runs: runs/<recipe>; for the config.yaml of a run, where that run lies."""
    first = Path(files[1]) if files else Path("default.yaml")
    return first.parent.parent if first.parent.name.startswith("version_") else Path("runs") / first.stem


def saved_configuration(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The `model` and `data` sections that a checkpoint was trained with."""
    sections = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    saved: dict[str, Any] = {}
    for section, key in sections.items():
        found = checkpoint.get(key)
        values = {k: v for k, v in found.items() if k != "_instantiator"} if isinstance(found, dict) else {}
        if isinstance(values.get("_class_path"), str):
            saved[section] = {"class_path": values.pop("_class_path"), "init_args": values}
    return saved


def check_classes(saved: dict[str, Any], contents: list[dict[str, Any]], trains: bool) -> dict[str, Any]:
    """Refuse a checkpoint of another task than the files are for.

    Args:
        saved: What the checkpoint was trained with.
        contents: The files.
        trains: Whether training goes on; to evaluate, data of another kind is as good, such as MMLU.

    Returns:
        The saved sections that count: those that the files do not replace.

    Raises:
        ArgumentError: With both classes.
    """
    kept = dict(saved)
    for section, content in saved.items():
        wanted = last_value(f"{section}.class_path", [], contents)
        if wanted is not None and wanted != content["class_path"]:
            if section == "data" and not trains:
                del kept["data"]
                continue
            raise ArgumentError(
                None,
                f"ckpt_path: the checkpoint was trained with {content['class_path']}, and the configuration file is "
                f"for {wanted}; use the config.yaml of the checkpoint's run, or another checkpoint.",
            )
    return kept


def check_keys(options: list[str], config: Namespace) -> None:
    """Refuse a key inside a nested group that the parser took for an abbreviation: it guesses there, unasked.

    Raises:
        ArgumentError: With the key and the ones there are.
    """
    final = config[config["subcommand"]] if config.get("subcommand") else config
    for word in options:
        section, *keys = word.removeprefix("--").partition("=")[0].removesuffix("+").split(".")
        node = final.get(section) if section in ("model", "data") and len(keys) > 1 else None
        node = node.get("init_args", node) if isinstance(node, Namespace) else None
        for depth, key in enumerate(k for k in keys if k != "init_args"):
            if not isinstance(node, Namespace):
                break
            if key not in node and key not in ("class_path", "help"):
                close = difflib.get_close_matches(key, list(node.keys()), n=1)
                name = ".".join([section, *keys[: depth + 1]])
                hint = f"; did you mean {close[0]}?" if close else "."
                raise ArgumentError(None, f"There is no key {name}{hint} Its group has {', '.join(node.keys())}.")
            node = node.get(key)


def check_values(key: str, hint: Any, value: Any) -> None:
    """Refuse what the parser lets through: null where a class takes none, and anything else than keys for a group.

    Args:
        key: The value's key.
        hint: Its type.
        value: What it was given.

    Raises:
        ArgumentError: With the key.
    """
    if value is None and hint is not Any and type(None) not in get_args(hint):
        raise ArgumentError(None, f"{key}: it cannot be null; leave it out to have its default.")
    if dataclasses.is_dataclass(hint) and value is not None:
        if not isinstance(value, Namespace):
            raise ArgumentError(None, f"{key}: it must have keys of its own, and is {value!r}.")
        hints = get_type_hints(hint)
        for name, part in value.items(branches=True, nested=False):
            check_values(f"{key}.{name}", hints[name], part)


def check_strategy(strategy: Any) -> None:
    """Refuse Lightning's strategies that shard or move what is trained, or that fork this process.

    Args:
        strategy: A name, or a class with its arguments; what is not Lightning's own is let through.

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
    known = name == "auto" or name.lower().startswith(("ddp", "singledevice", "single_device"))
    own = path.startswith("lightning.") if "." in path else path in StrategyRegistry.available_strategies()
    if known or not own:  # Lightning says what there is no strategy of
        return
    raise ArgumentError(
        None,
        f"trainer.strategy: {name} would shard or move what is trained, which is little and stays whole on each "
        "device; use ddp, and where the frozen weights are too large for one device --model.shard_frozen true with it "
        "(conf/fsdp.yaml).",
    )


@contextmanager
def temporary_yaml(content: dict[str, Any]) -> Iterator[str]:
    """A file with the content, gone at the end of the context."""
    handle, name = tempfile.mkstemp(suffix=".yaml")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yaml.safe_dump(content, file, sort_keys=False)  # the first key of a rank_pattern that matches decides
        yield name
    finally:
        os.unlink(name)


def leave_adapter_path(contents: list[dict[str, Any]], final: Namespace) -> None:
    """Have no adapters read to start from where there is a checkpoint, which has its own, and say so.

    Args:
        contents: The files.
        final: The values of the command, which are changed.
    """
    values = final["model"].init_args
    given = last_value("model.init_args.adapter_path", [], contents) or values.get("adapter_path")
    if given is not None:
        values["adapter_path"] = None
        _log.info("model.adapter_path is not read: the checkpoint has the adapters.")


def report_untrained(command: str) -> None:
    """Say that a command has no checkpoint to go by."""
    _log.info(f"{command} without --ckpt_path: this is the backbone as it is, and a head, if it needs one, at random.")


def report_differences(saved: dict[str, Any], contents: list[dict[str, Any]], final: Namespace) -> None:
    """Say which values of the command line replace the checkpoint's, and which of the checkpoint's replace a file's."""
    for section, content in saved.items():
        ours = _flatten(final[section].init_args.as_dict())
        for key, value in _flatten(content["init_args"]).items():
            if (section, key) in (("data", "predict_path"), ("model", "adapter_path")):  # new each time; never read
                continue
            from_file = last_value(f"{section}.init_args.{key}", [], contents)
            if key in ours and _plain(ours[key]) != _plain(value):
                _log.info(f"{section}.{key}: {ours[key]} from the command line; the checkpoint had {value}.")
            elif from_file is not None and _plain(from_file) != _plain(value):
                _log.info(f"{section}.{key}: {value} from the checkpoint; the configuration file has {from_file}.")


def report_changes(before: dict[str, Any], final: Namespace) -> None:
    """Say which keys of the trainer a resumed run has otherwise than it began; these are not in a checkpoint."""
    own = {"default_root_dir", "logger", "callbacks"}
    ours = {k: v for k, v in final["trainer"].as_dict().items() if k not in own}
    now, began = (_flatten({"trainer": t}) for t in (ours, before.get("trainer", {})))
    now["seed_everything"], began["seed_everything"] = final.get("seed_everything"), before.get("seed_everything")
    for key, value in now.items():
        if key in began and _plain(began[key]) != _plain(value):
            _log.info(f"{key}: {value} now; the run began with {began[key]}.")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
