"""Import guard: a configuration may name classes of this program and of Lightning, and a few functions."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentError

from app.lightning_compat import import_policy

# A class may be named if its definition lies below one of these packages. Of Lightning, these are the packages whose
# classes a trainer takes, and not its core, whose load_from_checkpoint unpickles. Of torch, what strategies and the key
# model.optimizer take.
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
# The only functions: what DDPStrategy takes as ddp_comm_hook and ddp_comm_wrapper.
FUNCTIONS = (
    f"{_HOOKS}.default_hooks.bf16_compress_hook",
    f"{_HOOKS}.default_hooks.bf16_compress_wrapper",
    f"{_HOOKS}.default_hooks.fp16_compress_hook",
    f"{_HOOKS}.default_hooks.fp16_compress_wrapper",
    f"{_HOOKS}.powerSGD_hook.powerSGD_hook",
)
OPTION = "--allow_imports"
HELP = f"{OPTION} PREFIX, on the command line only: what else configurations may import, such as my_package.callbacks."


def split_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the prefixes that it allows and the other words, in their order.

    Raises:
        ArgumentError: For the option without a prefix.
    """
    prefixes, others = [], []
    rest = iter(words)
    for word in rest:
        if word == OPTION:
            prefixes.append(next(rest, ""))
        elif word.startswith(f"{OPTION}="):
            prefixes.append(word.partition("=")[2])
        else:
            others.append(word)
    if "" in prefixes:
        raise ArgumentError(None, f"{OPTION}: name a module or a package, such as my_package.callbacks.")
    return prefixes, others


@contextmanager
def restricted_imports(prefixes: Sequence[str] = ()) -> Iterator[None]:
    """Let every parser of the process import only what `resolve` returns; undone on exit.

    Args:
        prefixes: Modules and packages that are allowed besides `PACKAGES`, with their functions.

    Raises:
        ArgumentError: For a prefix that is no dotted path, or that of the parser itself.
    """
    with ExitStack() as held:
        try:
            held.enter_context(import_policy(lambda path: resolve(path, prefixes) is not None, list(prefixes)))
        except ValueError as error:
            raise ArgumentError(None, f"{OPTION}: {error}") from error
        yield


def resolve(path: str, prefixes: Sequence[str] = ()) -> type | Callable[..., Any] | None:
    """Return the class or function that a configuration may name by a dotted path; None if it may not.

    The path is a module and a name in the module. Attributes of classes, functions and instances are never reached.
    Only modules below an allowed package are imported.

    Args:
        path: The dotted path.
        prefixes: See `restricted_imports`.

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
    found = vars(module).get(name) or getattr(module, name)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        return None
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if inspect.isclass(found):
        return found if _below(home, (*PACKAGES, *prefixes)) or home in CLASSES else None
    return found if home in FUNCTIONS or _below(home, prefixes) else None


def _below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _module(name: str, may_import: bool) -> ModuleType | None:
    """Return a module that is imported already, or that may be imported now; None for anything else."""
    if name in sys.modules or not may_import:
        return sys.modules.get(name)
    parent_name, _, leaf = name.rpartition(".")
    parent = sys.modules.get(parent_name)
    if parent is not None and not isinstance(vars(parent).get(leaf, parent), ModuleType):
        return None  # a class or a function of the module before it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            package, _, missing = error.name.rpartition(".")
            holder = sys.modules.get(package)
            if hasattr(holder, "__path__") and missing not in vars(holder):  # a misspelt module, and no attribute
                raise ImportError(f"There is no module {error.name}.") from error
            return None
        raise ImportError(f"{name} cannot be imported: {error}. Install it: pip install {error.name}.") from error
    except Exception as error:
        raise ImportError(f"{name} cannot be imported ({type(error).__name__}: {error}).") from error


def _missing(module: ModuleType, name: str) -> str:
    names = [key for key, value in vars(module).items() if inspect.isclass(value)]
    close = difflib.get_close_matches(name, names, n=1)
    return f"There is no class {name} in {module.__name__}{f'; did you mean {close[0]}?' if close else '.'}"


def similar_class(name: str) -> str | None:
    """Return the name of the allowed class that is spelt most like a name; None if none is."""
    names = {
        key
        for module_name, module in list(sys.modules.items())
        if _below(module_name, PACKAGES)
        for key, value in vars(module).items()
        if inspect.isclass(value) and not key.startswith("_")
    }
    return next(iter(difflib.get_close_matches(name, sorted(names), n=1)), None)


def same_class(first: str, second: str) -> bool:
    """Return whether two dotted paths name one class; what may not be imported is compared as text."""
    if first == second:
        return True
    try:
        found = resolve(first)
        return found is not None and found is resolve(second)
    except ImportError:
        return False


def denied_message(path: str) -> str:
    """Return the message for a path that was refused."""
    module_name = path.rpartition(".")[0]
    refused = f"{path} is not imported: configurations name classes of this program and of Lightning, no functions."
    if _below(module_name, PACKAGES):
        return f"{refused} Attributes of a class or of an imported module are never reached."
    return f"{refused} If you know what it runs and want that, put {OPTION} {module_name or path} on the command line."
