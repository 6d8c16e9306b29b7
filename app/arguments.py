"""The words of the command line, the files and the checkpoint: their order, and what of one replaces another's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console


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


def check_yaml(name: str) -> None:
    """Refuse a broken file by its name, which the parser's own message lacks."""
    try:
        yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(None, f"--config: there is no file {name!r}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ArgumentError(None, f"--config: {name} is not YAML: {error}") from error


def saved_configuration(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The `model` and `data` sections that a checkpoint was trained with."""
    sections = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    saved: dict[str, Any] = {}
    for section, key in sections.items():
        values = {k: v for k, v in checkpoint.get(key, {}).items() if k != "_instantiator"}
        if "_class_path" in values:
            saved[section] = {"class_path": values.pop("_class_path"), "init_args": values}
    return saved


@contextmanager
def temporary_yaml(content: dict[str, Any]) -> Iterator[str]:
    """A file with the content, gone at the end of the context."""
    handle, name = tempfile.mkstemp(suffix=".yaml")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yaml.safe_dump(content, file)
        yield name
    finally:
        os.unlink(name)


@rank_zero_only
def report_differences(saved: dict[str, Any], files: Namespace, final: Namespace) -> None:
    """Say which values of the command line replace the checkpoint's, and which of the checkpoint's replace a file's."""
    console = Console(stderr=True, soft_wrap=True)
    for section, content in saved.items():
        flat = _flatten(content["init_args"])
        ours = _flatten(final[section].init_args.as_dict())
        from_file = files.get(section)
        theirs = _flatten(from_file.init_args.as_dict()) if from_file and "init_args" in from_file else {}
        for key, value in flat.items():
            if key in ours and _plain(ours[key]) != _plain(value):
                console.print(f"{section}.{key}: {ours[key]} from the command line; the checkpoint had {value}.")
            elif key in theirs and _plain(theirs[key]) != _plain(value) and key != "class_names":
                console.print(
                    f"{section}.{key}: {value} from the checkpoint; the configuration file has {theirs[key]}."
                )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
