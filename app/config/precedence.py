"""Precedence of command line, configuration files and checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from app.config.program_files import find_program_file
from app.config.yaml_files import read_yaml
from datamodules.errors import UsageError

SECTIONS = ("model", "data")  # the sections that name a class
# keys without effect on a resumed fit
WITHOUT_EFFECT = ("ckpt_path", "name", "find_lr", "trainer.default_root_dir", "model.adapter_path")

_log = logging.getLogger(__name__)


# Some defaults of callbacks are members of enumerations, and a saved configuration contains all defaults.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def split_arguments(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Split the command line into the command, the names of the configuration files, and the options.

    `predict --prompt TEXT` is short for --data.prompt.

    Raises:
        UsageError: For `--config` without a name.
    """
    command = [words[0]] if words and not words[0].startswith("-") else []
    if command == ["predict"]:
        words = [re.sub(r"^--prompt(?==|$)", "--data.prompt", word) for word in words]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, options = parser.parse_known_args(words[len(command) :])
    return command, [find_program_file(name) for name in known.config], options


def without_sections(options: list[str]) -> list[str]:
    """Return the options without the keys of `SECTIONS` and their values."""
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
    """Return the parent directory of a recipe's runs.

    Args:
        given: `trainer.default_root_dir`.
        files: Names of the configuration files. Without a given directory the first file decides: runs/<recipe>, or
            the parent of the run directory if the file is the config.yaml of a run. Without a file: runs/default.

    Raises:
        UsageError: For an empty name, or the home of a user who does not exist.
    """
    if given is not None:
        return expanded_path("trainer.default_root_dir", given)
    first = Path(files[0]) if files else Path("default.yaml")
    return first.parent.parent if first.parent.name.startswith("version_") else Path("runs") / first.stem


def expanded_path(key: str, given: str) -> Path:
    """Return a path with `~` expanded.

    Raises:
        UsageError: With the key, for an empty name or the home of a user who does not exist.
    """
    if not given:
        raise UsageError(f"{key}: the name is empty. Give a path, or leave the key out.")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{key}: {given} cannot be expanded ({error}). Give a path without ~.") from error


@contextmanager
def temporary_yaml(content: dict[str, Any]) -> Iterator[str]:
    """Write `content` to a temporary YAML file; delete it on exit.

    Raises:
        UsageError: If the content, which comes from a checkpoint, has values that are not plain.
    """
    handle, name = tempfile.mkstemp(suffix=".yaml")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            try:
                yaml.safe_dump(content, file, sort_keys=False)  # the first matching key of rank_pattern decides
            except (yaml.YAMLError, RecursionError, ValueError) as error:
                raise UsageError(
                    "ckpt_path: the hyper-parameters are not plain values. Use another checkpoint."
                ) from error
        yield name
    finally:
        os.unlink(name)


def ignore_adapter_path(from_files: Namespace, final: Namespace) -> None:
    """Set `model.adapter_path` to null when a checkpoint is used, and log that the key is ignored."""
    values = final["model"].init_args
    if values.get("adapter_path") is not None or section_keys(from_files, "model").get("adapter_path") is not None:
        values["adapter_path"] = None
        _log.info("model.adapter_path is ignored, since the checkpoint contains the adapters.")


def report_untrained(command: str, heads: list[str], adapter_path: str | None) -> None:
    """Log which weights a command without a checkpoint uses; `heads` are the names of the model's heads."""
    used = "the backbone without training"
    if adapter_path is not None:
        used = f"the backbone with the adapters of {adapter_path} and any heads that are saved there"
    elif heads:
        used += (
            f". Its head ({', '.join(heads)}) has random weights, unless the backbone's files contain a head for the "
            "same classes"
        )
    _log.info(f"{command} without --ckpt_path uses {used}.")


def report_differences(
    saved: dict[str, Any],
    from_files: Namespace,
    of_variant: dict[str, Any],
    from_words: Namespace,
    final: Namespace,
    reported: Callable[[str], bool],
) -> None:
    """Log values of the command line that replace the checkpoint's, and values of the checkpoint that replace others.

    Args:
        saved: The sections that the checkpoint was trained with.
        from_files: Values of the configuration files.
        of_variant: Keys that the variant sets. The variant replaces keys of the configuration files.
        from_words: Values of the configuration files, the variant and the command line.
        final: Values of the command.
        reported: Predicate on dotted keys. If false, a replaced value of a configuration file is not logged.
    """
    for section, content in saved.items():
        used = dotted(final[section].init_args.as_dict())
        given = section_keys(from_words, section)
        in_files = {f"{section}.{key}": value for key, value in section_keys(from_files, section).items()} | of_variant
        for key, value in dotted(content["init_args"]).items():
            name = f"{section}.{key}"
            if name in ("data.predict_path", "model.adapter_path"):  # different in each command; ignored
                continue
            if key in used and comparable(used[key]) != comparable(value):
                _log.info(f"{name}: {used[key]} from the command line; the checkpoint had {value}.")
            elif in_files.get(name) is None or not reported(name):
                continue
            elif comparable(given.get(key, in_files[name])) != comparable(value):
                source = "variant" if name in of_variant else "configuration file"
                _log.info(f"{name}: {value} from the checkpoint; the {source} has {in_files[name]}.")


def run_precision(run: Path | None) -> dict[str, Any]:
    """Return the `trainer.precision` of a run as a section; empty if the run or its config.yaml is not known."""
    path = None if run is None else run / "config.yaml"
    trainer = read_yaml(str(path)).get("trainer") if path is not None and path.is_file() else None
    if isinstance(trainer, dict) and "precision" in trainer:
        return {"trainer": {"precision": trainer["precision"] or "32-true"}}
    return {}


def report_precision(settings: dict[str, Any], from_files: Namespace, final: Namespace) -> None:
    """Log the precision of an evaluation if the run, the command line or a configuration file have different ones.

    Args:
        settings: Result of `run_precision`.
        from_files: Values of the configuration files.
        final: Values of the command.
    """
    if not settings:
        return
    of_run, in_files, used = settings["trainer"]["precision"], from_files.get("trainer.precision"), final.trainer
    if used.precision != of_run:
        _log.info(f"trainer.precision: {used.precision} from the command line; the run has {of_run}.")
    elif in_files not in (None, of_run):
        _log.info(f"trainer.precision: {of_run} from the run; the configuration file has {in_files}.")


def report_changes(before: dict[str, Any], final: Namespace) -> None:
    """Log changes of the seed and the trainer's keys since a resumed run began. No checkpoint contains these keys."""
    always_differ = {"default_root_dir", "logger", "callbacks"}
    trainer = {k: v for k, v in final["trainer"].as_dict().items() if k not in always_differ}
    now, began = (dotted({"trainer": t}) for t in (trainer, before.get("trainer", {})))
    now["seed_everything"], began["seed_everything"] = final.get("seed_everything"), before.get("seed_everything")
    for key, value in now.items():
        if key in began and comparable(began[key]) != comparable(value):
            _log.info(f"{key}: {value} now; the run began with {began[key]}.")


def add_report_output(parser: ArgumentParser) -> None:
    """Add the option `--output` of a command that writes a report."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=str,
        required=True,
        help="Directory for report.html, its pictures as PNG, and all numbers as Parquet. An earlier report in it is "
        "overwritten.",
    )


def changed_keys(written: dict[str, Any], saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys of a finished fit that have another value now. Keys without effect on resume are left out.

    Args:
        written: Content of config.yaml. A key that the file lacks is of a newer program, and has its default.
        saved: Sections of the checkpoint, which also have values that the data decided, such as the classes.
        now: Configuration of the resumed fit.
    """
    before, values = dotted(written) | dotted(saved), dotted(now)
    changed = [key for key, value in before.items() if comparable(value) != values.get(key)]
    return [key for key in changed if key not in WITHOUT_EFFECT]


def output_directory(given: str) -> Path:
    """Return the directory of `--output`, which need not exist.

    Raises:
        UsageError: If the name is empty, names a file, or begins with the home of a user who does not exist.
    """
    output = expanded_path("--output", given)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file. Give a directory.")
    return output


def dotted(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested values by dotted key, as on the command line: without `init_args`."""
    if not isinstance(value, dict) or not value:
        return {key: value} if key else {}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= dotted(part, key if name == "init_args" else f"{key}.{name}" if key else str(name))
    return flat


def section_keys(config: Namespace, section: str) -> dict[str, Any]:
    """Return the arguments of a section's class by dotted key; an empty dictionary if the section is missing."""
    content = config.get(section)
    values = content.get("init_args") if isinstance(content, Namespace) else None
    return dotted(values.as_dict()) if isinstance(values, Namespace) else {}


def comparable(value: Any) -> Any:
    """Return a tuple as a list, since a checkpoint has tuples where YAML has lists. Return other values unchanged."""
    return list(value) if isinstance(value, tuple) else value
