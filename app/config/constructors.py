"""Constructors: the keys of a class, through its **kwargs too, and an instance from a `class_path`."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def constructor_parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor by name, with types; the class's own defaults beat those of its bases."""
    found: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__:
        if "__init__" not in vars(owner):
            continue
        _, *parameters = inspect.signature(vars(owner)["__init__"], eval_str=True).parameters.values()
        for parameter in parameters:
            if parameter.kind not in VARIABLE:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def construct(base: type[T], described: Namespace | dict[str, Any]) -> T:
    """Return an instance of a class of the configuration.

    Args:
        base: The class, or a class that it inherits from.
        described: `class_path` and `init_args`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "it", required=True)
    values = described.as_dict() if isinstance(described, Namespace) else described
    made: T = parser.instantiate_classes(parser.parse_object({"it": values})).it
    return made
