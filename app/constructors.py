"""Keys of a class: the parameters of its constructor and of those that its **kwargs reach."""

from __future__ import annotations

import inspect

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
