"""Classify errors as bad input (one message), a lost process, or a defect (traceback)."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.run.processes import is_distributed
from datamodules.errors import InputError, UsageError, first_line
from modules.adapters import AdapterError

_log = logging.getLogger(__name__)

# Errors that a user can fix. `bad_input` adds errors that libraries raise for wrong values. Any other error is a defect
# and shows its traceback.
FIXABLE_ERRORS = (ArgumentError, AdapterError, InputError, OSError)
BAD_INPUT = (*FIXABLE_ERRORS, MisconfigurationException)
LOADERS = ("torch.utils.data.dataloader", "torch.utils.data._utils.signal_handling")
GLOO = "/gloo/transport/"  # part of every error message of gloo's transport: torch has no class for these errors


def bad_input(error: Exception) -> Exception | None:
    """Return the error to report for a failure that a user can fix; None for a defect."""
    if (message := _message_of_library_error(error)) is not None:
        return UsageError(message)
    for link in causes(error):
        if isinstance(link, BAD_INPUT):
            return link
    if isinstance(error, ValueError | RuntimeError) and _raising_module(error).startswith("lightning."):
        return error  # Lightning's own check of an argument of the trainer or of a callback
    return None


def _message_of_library_error(error: Exception) -> str | None:
    """Return the message for an error of torch or Python that names no key; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The accelerator's memory is full: choose a smaller --data.batch_size."
    if is_worker_lost(error):
        return (
            "A worker process of the data loader was killed, often because memory is full. Checkpoints are untouched: "
            "resume with --ckpt_path last and a smaller --data.num_workers or --data.batch_size."
        )
    if is_distributed() and is_peer_lost(error):
        return "Another process of the run has ended or cannot be reached."
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:200]} has bytes that are not UTF-8. Rename the file or folder."
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is not None and isinstance(error, compiler.TorchDynamoException):
        return f"model.compile: torch.compile fails on this backbone ({first_line(error)}). Set model.compile to false."
    return None


def is_worker_lost(error: BaseException) -> bool:
    """Return True if a worker process of a data loader has died: torch raises a plain RuntimeError in the loader."""
    return any(type(link) is RuntimeError and _raising_module(link) in LOADERS for link in causes(error))


def is_peer_lost(error: BaseException) -> bool:
    """Return True if an error on this rank comes from the loss of a worker or of another process of the run."""
    return isinstance(error, ConnectionError | dist.DistError) or (
        isinstance(error, RuntimeError) and (is_worker_lost(error) or GLOO in str(error))
    )


def is_caused_by(error: BaseException, problem: OSError) -> bool:
    """Return True if an error, or an error that led to it, has the errno of `problem`."""
    return any(isinstance(link, OSError) and link.errno == problem.errno for link in causes(error, contexts=True))


def is_caused_by_signal(error: BaseException) -> bool:
    """Return True if an error is the exception of a signal, or was raised while that exception was handled."""
    return any(isinstance(link, SIGTERMException) for link in causes(error, contexts=True))


def causes(error: BaseException, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error and its causes, one by one; with `contexts`, also the errors that were being handled."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or (link.__context__ if contexts else None)


def _raising_module(error: BaseException) -> str:
    """Return the name of the Python module whose code raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def construction_error(config: Namespace, kind: type, error: Exception) -> Exception:
    """Return the error to report when the constructor of a class in the configuration fails.

    Errors of this program name their key already. Other errors get the key and the name of the class.

    Args:
        config: The command's values.
        kind: The class.
        error: The constructor's error.
    """
    fixable = bad_input(error)
    if isinstance(fixable, FIXABLE_ERRORS):
        return fixable
    _log.debug("%s cannot be created.", kind.__name__, exc_info=error)
    key = _key_of(config.as_dict(), kind.__name__)
    reason = str(fixable) if fixable else f"{type(error).__name__}: {error}".removesuffix(": ")
    message = f"{f'{key}: ' if key else ''}{kind.__name__} cannot be created ({reason})."
    if isinstance(error, ModuleNotFoundError) and error.name:
        message += f" Install the package: pip install {error.name.partition('.')[0]}."
    return UsageError(message)


@contextmanager
def construction_errors(config: Namespace, section: str) -> Iterator[None]:
    """Name a section in the error of its constructor, which is called in the context.

    Raises:
        UsageError: In place of an error of another package.
    """
    try:
        yield
    except Exception as error:
        raise construction_error(config, resolve_name(config[section].class_path), error) from None


def _key_of(tree: Any, class_name: str, prefix: str = "") -> str | None:
    """Return the dotted key at which a tree of values names a class."""
    if isinstance(tree, list):
        parts = [(prefix, value) for value in tree]
    elif isinstance(tree, dict):
        if str(tree.get("class_path")).rpartition(".")[2] == class_name:
            return prefix
        inner = [(key if key != "init_args" else "", value) for key, value in tree.items()]
        parts = [(f"{prefix}.{key}".strip("."), value) for key, value in inner]
    else:
        return None
    keys = (_key_of(value, class_name, key) for key, value in parts)
    return next((key for key in keys if key), None)
