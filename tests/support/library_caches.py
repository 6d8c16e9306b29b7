"""Caches of what libraries look up again in each command, although the answer never changes within a process.

The caches call the libraries' own functions. A test session runs a thousand commands; a user's process runs one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from jsonargparse import _optionals, _signatures, _subcommands, _util
from lightning.fabric.utilities import registry

_parameters: dict[Any, list[Any]] = {}
_inspect = _signatures.get_signature_parameters
_import_path = _util.get_import_path
_find_action = _subcommands.find_action_and_subcommand
_path_of_class = cache(_import_path)


def get_signature_parameters(kind: Any, method: Any = None, **keys: Any) -> list[Any]:
    """Return the parameters of a class. jsonargparse would parse the source of `Trainer` again in each command."""
    if (kind, method) not in _parameters:
        _parameters[kind, method] = _inspect(kind, method, **keys)
    return [copy.copy(parameter) for parameter in _parameters[kind, method]]


def get_import_path(value: Any) -> str | None:
    """Return the path of a class or function. jsonargparse asks for the path of `UnionType` thousands of times."""
    return _path_of_class(value) if isinstance(value, type) else _import_path(value)


def find_action_and_subcommand(parser: Any, key: str, exclude: Any = None) -> Any:
    """Return the action of a key. jsonargparse would compare the key with each of a hundred actions."""
    found: dict[Any, Any] = parser.__dict__.setdefault("_found_actions", {})
    place = key, exclude, len(parser._actions)
    if place not in found:
        found[place] = _find_action(parser, key, exclude=exclude)
    return found[place]


def install() -> None:
    """Replace the functions in each module of jsonargparse that imports them, and Lightning's look at all packages."""
    fast: dict[Callable[..., Any], Callable[..., Any]] = {
        _import_path: get_import_path,
        _find_action: find_action_and_subcommand,
        _optionals.get_doc_short_description: cache(_optionals.get_doc_short_description),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("jsonargparse.")]:
        for slow, replacement in fast.items():
            if getattr(module, slow.__name__, None) is slow:
                setattr(module, slow.__name__, replacement)
    _signatures.get_signature_parameters = get_signature_parameters  # other modules pass other arguments
    registry.entry_points = cache(registry.entry_points)
