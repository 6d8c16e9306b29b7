"""Import guard: a configuration may name classes of this program, Lightning and torch, and a few functions."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

# A configuration may name a class that is defined below one of these packages. The packages of Lightning have the
# classes that a trainer takes. Lightning's core is left out, because load_from_checkpoint unpickles. The packages of
# torch have the classes that strategies and the key model.optimizer take.
PACKAGES = (
    "app.callbacks",
    "datamodules",
    "modules",
    "lightning.fabric.accelerators",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.fsdp",
    "torch.nn.modules",
    "torch.optim",
)
# Base class of the section `data`, which the parser itself names.
CLASSES = ("lightning.pytorch.core.datamodule.LightningDataModule",)
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"
# The only functions that are allowed. DDPStrategy takes these functions as ddp_comm_hook and ddp_comm_wrapper.
FUNCTIONS = (
    f"{_HOOKS}.default_hooks.bf16_compress_hook",
    f"{_HOOKS}.default_hooks.bf16_compress_wrapper",
    f"{_HOOKS}.default_hooks.fp16_compress_hook",
    f"{_HOOKS}.default_hooks.fp16_compress_wrapper",
    f"{_HOOKS}.powerSGD_hook.powerSGD_hook",
)
OPTION = "--allow_imports"
HELP = f"{OPTION} PREFIX, on the command line only: a further module that configurations may name, such as my_package."


def split_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the prefixes of `--allow_imports` and the other words, in their order.

    Raises:
        UsageError: For the option without a prefix.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(OPTION, action="append", default=[])
    known, others = parser.parse_known_args(list(words))
    return known.allow_imports, others


def denial(path: str, prefixes: Sequence[str] = ()) -> str | None:
    """Return the reason why a configuration may not name a dotted path; None if the path is allowed.

    Args:
        path: The dotted path.
        prefixes: Modules and packages that are allowed besides `PACKAGES`, with their functions.
    """
    if resolve(path, prefixes) is not None:
        return None
    module_name = path.rpartition(".")[0]
    allowed = "only allowed classes of this program, Lightning and torch"
    refused = f"'{path}' is not imported: configurations may name {allowed}."
    if _below(module_name, PACKAGES):
        return f"{refused} Give the class path of such a class."
    return f"{refused} If you trust this code, add {OPTION} {module_name or path} to the command line."


def resolve(path: str, prefixes: Sequence[str] = ()) -> type | Callable[..., Any] | None:
    """Return the class or function of a dotted path; None if a configuration may not name the path.

    The path is a module and a name in the module. Attributes of classes, functions and instances are never reached.
    Only modules below an allowed package, or below one of the additional prefixes, are imported.

    Raises:
        ImportError: For a name that an allowed module lacks, or an allowed module that cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    named_by_user = _below(path, prefixes)
    may_import = named_by_user or _below(module_name, PACKAGES)
    module = _module(module_name, may_import)
    if module is None:
        return None
    if name not in vars(module) and not (named_by_user and hasattr(module, name)):
        if may_import:
            raise ImportError(_missing(module, name))
        return None
    named = vars(module).get(name) or getattr(module, name)
    if not isinstance(named, type | FunctionType | BuiltinFunctionType | MethodType):
        return None
    definition = f"{named.__module__}.{named.__qualname__}"
    if isinstance(named, type):
        return named if _below(definition, (*PACKAGES, *prefixes)) or definition in CLASSES else None
    return named if definition in FUNCTIONS or _below(definition, prefixes) else None


def _below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _module(name: str, may_import: bool) -> ModuleType | None:
    """Return a module that is imported already, or that may be imported now; None for anything else."""
    if name in sys.modules or not may_import:
        return sys.modules.get(name)
    parent_name, _, leaf = name.rpartition(".")
    parent = sys.modules.get(parent_name)
    if parent is not None and not isinstance(vars(parent).get(leaf, parent), ModuleType):
        return None  # a class or a function of the parent module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            package, _, missing = error.name.rpartition(".")
            holder = sys.modules.get(package)
            if (
                holder is not None and "__path__" in vars(holder) and missing not in vars(holder)
            ):  # neither a module nor an attribute
                raise ImportError(f"There is no module {error.name}.") from error
            return None
        raise ImportError(f"{name} cannot be imported: {error}. Install it: pip install {error.name}.") from error
    except Exception as error:
        raise ImportError(f"{name} cannot be imported ({type(error).__name__}: {error}).") from error


def _missing(module: ModuleType, name: str) -> str:
    names = [key for key, value in vars(module).items() if inspect.isclass(value)]
    close = difflib.get_close_matches(name, names, n=1)
    return f"There is no class {name} in {module.__name__}{f'; did you mean {close[0]}?' if close else '.'}"


def same_class(first: str, second: str) -> bool:
    """Return True if two dotted paths name one class. Paths that may not be imported are compared as text."""
    if first == second:
        return True
    try:
        resolved = resolve(first)
        return resolved is not None and resolved is resolve(second)
    except ImportError:
        return False
