"""Errors that a user can fix. Each message has what is wrong, where, and what to do."""

from __future__ import annotations

from argparse import ArgumentError


class InputError(ValueError):
    """Base of all errors that a user can fix. A command prints the message alone and exits with code 2."""


class DataError(InputError):
    """Raised if data cannot be found, read or used as configured."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # torch raises a worker's error again, with the traceback as message.
            message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip()
        super().__init__(message)


class SplitError(DataError):
    """Raised if the data lack a split, or if the labels of a split are hidden."""


class ModelError(InputError):
    """Raised if a model cannot be built, loaded or trained as configured."""


class CheckpointError(InputError):
    """Raised if a checkpoint cannot be found, read or written."""


class CallbackError(InputError):
    """Raised if a callback cannot run as configured."""


class UsageError(ArgumentError):
    """Raised if the command line, or a file that the command line names, cannot be used."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: `1 row`, `1,200 rows`, `2 classes`.

    Args:
        count: The number.
        one: The noun in singular, with words that agree with the noun, such as `row is`.
        many: The same in plural. None adds the usual ending.
    """
    if many is None:
        many = f"{one}es" if one.endswith(("s", "x", "tch")) else f"{one}s"
    return f"{count:,} {one if count == 1 else many}"
