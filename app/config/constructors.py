"""Constructors: parameters of a class and its bases, and an instance from a `class_path`."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.accelerators import Accelerator

T = TypeVar("T")

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def constructor_parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor by name, with the parameters that `**kwargs` passes to base classes.

    A default of the class overrides the default of a base class.
    """
    by_name: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__:
        if "__init__" not in vars(owner):
            continue
        _, *parameters = inspect.signature(vars(owner)["__init__"], eval_str=True).parameters.values()
        for parameter in parameters:
            if parameter.kind not in VARIABLE:
                by_name.setdefault(parameter.name, parameter)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return by_name


def construct(base: type[T], described: Namespace | dict[str, Any]) -> T:
    """Return an instance of a class that the configuration describes.

    Args:
        base: The class or one of its base classes.
        described: `class_path` and `init_args`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "instance", required=True)
    values = described.as_dict() if isinstance(described, Namespace) else described
    instance: T = parser.instantiate_classes(parser.parse_object({"instance": values})).instance
    return instance


def construct_accelerator(described: str | Namespace) -> str | Accelerator:
    """Return the accelerator of `trainer.accelerator`: a name, or an instance of the class that the key describes."""
    return described if isinstance(described, str) else construct(Accelerator, described)  # type: ignore[type-abstract]
