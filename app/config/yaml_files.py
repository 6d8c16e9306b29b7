"""Configuration files: the part of YAML that is supported, checked before any value is used."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from app.config.program_files import list_recipes
from datamodules.errors import UsageError

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times faster where PyYAML was built with libyaml
MOST_NODES = 100_000  # after aliases are expanded: a hundred lines of aliases can describe billions
MOST_LEVELS = 50
TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value", "timestamp")
}
GROUPS = ("trainer", "checkpoint", "spectrum", "generalization", "forgetting")  # sections without a class_path


@contextmanager
def checked_yaml() -> Iterator[None]:
    """Check each YAML text (file, nested file or option) before jsonargparse loads the text, until exit."""
    before = get_loader("yaml")

    def load(text: str) -> Any:
        check_yaml(text)
        try:
            return before(text)
        except (ValueError, RecursionError) as error:  # PyYAML's constructors raise built-in errors
            raise yaml.YAMLError(str(error)) from error

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", before, exceptions=(yaml.YAMLError,))


def check_yaml(text: str) -> None:
    """Check that a text has only plain values: no cycles, no duplicate keys, no types that a configuration lacks.

    Raises:
        yaml.YAMLError: If the text is not such YAML, or has more than `MOST_LEVELS` levels or `MOST_NODES` values.
    """
    if not any(mark in text for mark in ":[{&*!"):  # a word or a number, as most options are
        return
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=LOADER)
    except (ValueError, RecursionError) as error:  # half a surrogate pair, a number that is too long
        raise yaml.YAMLError(str(error)) from error
    if root is not None:
        _check_node(root, 1, count(1))


def _check_depth(text: str) -> None:
    """Check the depth without recursion: the fast loader's recursion in C would crash the process."""
    level = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
            if level > MOST_LEVELS:
                raise _refused(event, f"more than {MOST_LEVELS} levels are nested")
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1


def _check_node(node: Any, level: int, nodes: Iterator[int]) -> None:
    """Check a node and the nodes below. An alias is the same object as its anchor, so a cycle has endless levels."""
    if level > MOST_LEVELS + 1:  # a value in the innermost collection
        raise _refused(node, f"an alias nests more than {MOST_LEVELS} levels or forms a cycle")
    if next(nodes) > MOST_NODES:
        raise _refused(node, f"aliases expand to more than {MOST_NODES:,} values")
    if node.tag not in TAGS:
        raise _refused(node, f"the tag {node.tag} is not supported")
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check_node(part, level + 1, nodes)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key, "a key must be a word")
            if key.value in seen:
                raise _refused(key, f"duplicate key {key.value} in one mapping")
            seen.add(key.value)
            _check_node(value, level + 1, nodes)


def _refused(node: Any, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {node.start_mark.line + 1}: {problem}")


def read_yaml(name: str) -> dict[str, Any]:
    """Return the content of a configuration file as it is written.

    Raises:
        UsageError: With the file's name, if the file is missing, broken or without keys.
    """
    try:
        text = Path(name).read_text(encoding="utf-8")
        check_yaml(text)
        content = yaml.load(text, Loader=LOADER)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing_file(name) from None
    except OSError as error:
        raise UsageError(f"--config: {name} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are not UTF-8; 2024-13-45 or 0b_
        raise UsageError(f"--config: {name} is not YAML that can be used: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config: {name} has no keys. Give a recipe such as conf/quickstart.yaml.")
    return content


def _missing_file(name: str) -> UsageError:
    """Return the error for a file that does not exist, with the file that was probably meant, or all recipes."""
    recipes = [line.split()[0] for line in list_recipes()]
    files = {Path(file).stem: file for file in (*recipes, *map(str, Path(name).parent.glob("*.yaml")))}
    close = difflib.get_close_matches(Path(name).stem, files, n=1)
    advice = f"; did you mean {files[close[0]]}?" if close else f". Give one of {', '.join(recipes)}, or your own file."
    return UsageError(f"--config: there is no file {name!r}{advice}")


def check_file(name: str) -> None:
    """Check a configuration file before it is parsed.

    Raises:
        UsageError: With the file's name, if the file is missing or broken, has a value where keys belong, or
            describes a class wrongly.
    """
    for key, value in read_yaml(name).items():
        if not isinstance(key, str):
            raise UsageError(f"--config: {name} has the key {key!r}; a key must be a word.")
        if key in GROUPS and not isinstance(value, dict | str):
            raise UsageError(f"--config: {name} has {key}: {_shown(value)}. Write keys below {key}.")
        if problem := _class_problem(value, key):
            raise UsageError(f"--config: {name} has {problem}")


def _class_problem(value: Any, key: str) -> str | None:
    """Return what is wrong with the description of a class, at any depth; None for a valid description."""
    if isinstance(value, list):
        return next((problem for part in value if (problem := _class_problem(part, key))), None)
    if not isinstance(value, dict):
        return None
    if "class_path" in value:
        if not isinstance(value["class_path"], str) or not value["class_path"]:
            return f"{key}.class_path: {_shown(value['class_path'])}. Give the name of a class."
        if others := [str(name) for name in value if name not in ("class_path", "init_args", "dict_kwargs")]:
            return f"{', '.join(others)} beside {key}.class_path. Move these keys below {key}.init_args."
    for name in ("init_args", "dict_kwargs"):
        if name in value and not isinstance(value[name], dict):
            return f"{key}.{name}: {_shown(value[name])}. Write keys below {name}."
    parts = ((part, key if name == "init_args" else f"{key}.{name}") for name, part in value.items())
    return next((problem for part, inner in parts if (problem := _class_problem(part, inner))), None)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
