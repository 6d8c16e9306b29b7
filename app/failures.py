"""Errors that are the user's to fix, and defects."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from app.messages import compiler_message
from app.processes import is_distributed, is_peer_lost, is_worker_lost
from datamodules.errors import InputError
from modules.adapters import AdapterError

_log = logging.getLogger(__name__)

# Errors that a user can fix. Anything else is a defect of this program and shows its traceback.
BAD_INPUT = (ArgumentError, AdapterError, InputError, MisconfigurationException, OSError)


def bad_input(error: Exception) -> Exception | None:
    """Return the error that a user can fix behind an error, through the parser's wrapping; None for a defect."""
    if isinstance(error, torch.OutOfMemoryError):
        return ArgumentError(None, "The accelerator's memory is full: choose a smaller --data.batch_size.")
    if is_worker_lost(error) or is_worker_lost(error.__cause__ or error):
        return ArgumentError(
            None,
            "A worker process of the data loader was killed, often because memory is full. Checkpoints are untouched: "
            "resume with --ckpt_path last and a smaller --data.num_workers or --data.batch_size.",
        )
    if is_distributed() and is_peer_lost(error):
        return ArgumentError(None, "Another process of the run has ended or cannot be reached.")
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return ArgumentError(None, f"{error.object[:200]} has bytes that are no UTF-8. Rename the file or folder.")
    if (failed := compiler_message(error)) is not None:
        return ArgumentError(None, failed)
    link: BaseException | None = error
    while isinstance(link, Exception):
        if isinstance(link, BAD_INPUT):
            return link
        wrapped = isinstance(link, ValueError) and "Does not validate" in str(link)
        link = link.__cause__ or (link.__context__ if wrapped else None)
    if isinstance(error, ValueError | RuntimeError) and _raising_module(error).startswith("lightning."):
        return error  # Lightning's own check of what the trainer or a callback was told
    return None


def _raising_module(error: Exception) -> str:
    """Return the name of the module whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name: str = frame.f_globals.get("__name__", "")
    return name


def construction_error(config: Namespace, kind: type, error: Exception) -> Exception:
    """Return the error to report where the constructor of a class of the configuration raised one.

    Errors of this program name a key already. Those of Lightning and of other packages get the key and the class.

    Args:
        config: The command's values.
        kind: The class.
        error: What the constructor raised.
    """
    known = bad_input(error)
    if isinstance(known, BAD_INPUT) and not isinstance(known, MisconfigurationException):
        return known
    _log.debug("%s cannot be created.", kind.__name__, exc_info=error)
    key = _key_of(config.as_dict(), kind.__name__)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if known is not None:  # Lightning's check of an argument
        reason = str(known)
    message = f"{f'{key}: ' if key else ''}{kind.__name__} cannot be created ({reason})."
    if isinstance(error, ModuleNotFoundError) and error.name:
        message += f" Install the package: pip install {error.name.partition('.')[0]}."
    return ArgumentError(None, message)


def _key_of(tree: Any, class_name: str, prefix: str = "") -> str | None:
    """Return the dotted key at which a tree of values names a class."""
    if isinstance(tree, dict):
        if str(tree.get("class_path")).rpartition(".")[2] == class_name:
            return prefix
        parts = {key: f"{prefix}.{key}".lstrip(".") if key != "init_args" else prefix for key in tree}
        found = (_key_of(value, class_name, parts[key]) for key, value in tree.items())
    elif isinstance(tree, list):
        found = (_key_of(value, class_name, prefix) for value in tree)
    else:
        return None
    return next((key for key in found if key), None)


def is_caused_by(error: BaseException, problem: OSError) -> bool:
    """Return whether an error, or one that it was raised from, is the operating system's with the same number."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno == problem.errno:
            return True
        link = link.__cause__ or link.__context__
    return False
