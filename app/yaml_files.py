"""Configuration files: what of YAML is supported, checked before any value is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from app.lightning_compat import yaml_loading

MOST_NODES = 100_000  # after aliases are expanded: a hundred lines of aliases can describe billions
MOST_LEVELS = 50
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
GROUPS = ("trainer", "checkpoint", "spectrum")  # sections that are no classes

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def checked_yaml() -> Iterator[None]:
    """Check all YAML that a parser of this process reads by `check_yaml`; undone on exit."""
    with yaml_loading(check_yaml):
        yield


def check_yaml(text: str) -> None:
    """Check that a text holds plain values only: no cycles, no doubled keys, no types that a configuration lacks.

    Raises:
        yaml.YAMLError: With the line.
    """
    if not any(mark in text for mark in ":[{&*!"):  # a word or a number, as most options are
        return
    try:
        _check(yaml.parse(text, Loader=_Loader))
    except (ValueError, RecursionError) as error:  # half a surrogate pair, a number that is too long
        raise yaml.YAMLError(str(error)) from error


def _check(events: Iterator[Any]) -> None:
    sizes: dict[str, int] = {}  # nodes of each anchor, once it is complete
    open_nodes: list[_Open] = []
    total = 0
    for event in events:
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            done = open_nodes.pop()
            if done.anchor:
                sizes[done.anchor] = done.size
            if open_nodes:
                open_nodes[-1].size += done.size
            continue
        if not isinstance(event, yaml.AliasEvent | yaml.ScalarEvent | yaml.MappingStartEvent | yaml.SequenceStartEvent):
            continue  # of the stream or of a document
        is_key = bool(open_nodes) and open_nodes[-1].expects_key()
        if is_key and not isinstance(event, yaml.ScalarEvent):
            raise _refused(event, "a key must be a word")
        if isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in open_nodes):
                raise _refused(event, f"*{event.anchor} refers to what it is part of")
            size = sizes.get(str(event.anchor), 1)
        else:
            if event.tag is not None and event.tag not in TAGS and event.tag != "!":
                raise _refused(event, f"the tag {event.tag} is not supported")
            size = 1
        total += size
        if total > MOST_NODES:
            raise _refused(event, f"aliases expand to more than {MOST_NODES:,} values")
        if open_nodes:
            open_nodes[-1].add(event, is_key)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            open_nodes.append(_Open(event))
            if len(open_nodes) > MOST_LEVELS:
                raise _refused(event, f"more than {MOST_LEVELS} levels are nested")
        else:
            if isinstance(event, yaml.ScalarEvent) and event.anchor:
                sizes[event.anchor] = 1
            if open_nodes:
                open_nodes[-1].size += size


class _Open:
    """A mapping or a sequence whose end has not been reached."""

    def __init__(self, event: Any) -> None:
        self.anchor: str | None = event.anchor
        self.size = 1
        self.keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
        self.children = 0

    def expects_key(self) -> bool:
        return self.keys is not None and self.children % 2 == 0

    def add(self, event: Any, is_key: bool) -> None:
        self.children += 1
        if is_key and self.keys is not None:
            if event.value in self.keys:
                raise _refused(event, f"the key {event.value} stands twice in one mapping")
            self.keys.add(event.value)


def _refused(event: Any, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {event.start_mark.line + 1}: {problem}")


def read_yaml(name: str) -> dict[str, Any]:
    """Return the content of a configuration file as it is written.

    Raises:
        ArgumentError: With the file's name, if the file is missing or broken.
    """
    try:
        text = Path(name).read_text(encoding="utf-8")
        check_yaml(text)
        content = yaml.load(text, Loader=_Loader)
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(None, f"--config: there is no file {name!r}.") from None
    except OSError as error:
        raise ArgumentError(None, f"--config: {name} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ArgumentError(None, f"--config: {name} is not YAML that can be used: {error}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8; 2024-13-45, 0b_
        raise ArgumentError(None, f"--config: {name} is not YAML that can be used: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentError(None, f"--config: {name} has no keys.")
    return content


def check_file(name: str) -> None:
    """Check a configuration file before it is parsed.

    Raises:
        ArgumentError: With the file's name, if it is missing or broken, or has a value where keys belong.
    """
    for key, value in read_yaml(name).items():
        if not isinstance(key, str):
            raise ArgumentError(None, f"--config: {name} has the key {key!r}; a key must be a word.")
        if key in GROUPS and not isinstance(value, dict | str):
            raise ArgumentError(None, f"--config: {name} has {key}: {_shown(value)}. Give it keys of its own.")
        if problem := _class_problem(value, key):
            raise ArgumentError(None, f"--config: {name} has {problem}")


def _class_problem(value: Any, key: str) -> str | None:
    """Return what is wrong with the description of a class, at any depth; None if nothing is."""
    if isinstance(value, list):
        return next((problem for part in value if (problem := _class_problem(part, key))), None)
    if not isinstance(value, dict):
        return None
    if "class_path" in value:
        if not isinstance(value["class_path"], str) or not value["class_path"]:
            return f"{key}.class_path: {_shown(value['class_path'])}. Give the name of a class."
        if others := [str(name) for name in value if name not in ("class_path", "init_args", "dict_kwargs")]:
            return f"{', '.join(others)} beside {key}.class_path. Put it below {key}.init_args."
    for name in ("init_args", "dict_kwargs"):
        if name in value and not isinstance(value[name], dict):
            return f"{key}.{name}: {_shown(value[name])}. Give it keys of its own."
    parts = ((part, key if name == "init_args" else f"{key}.{name}") for name, part in value.items())
    return next((problem for part, inner in parts if (problem := _class_problem(part, inner))), None)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
