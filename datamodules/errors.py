"""Errors that a user can fix. Each message has what is wrong, where, and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Base of all errors that a user can fix. A command prints the message alone and exits with code 2."""


class DataError(InputError):
    """Data that cannot be found, read or used as asked."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # torch raises a worker's error again, with the traceback as message.
            message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip()
        super().__init__(message)


class SplitError(DataError):
    """A split that the data lack, or whose labels are hidden."""


class ModelError(InputError):
    """A model that cannot be built, loaded or trained as asked."""


class CheckpointError(InputError):
    """A checkpoint that cannot be found, read or written."""


class CallbackError(InputError):
    """A callback that cannot do what its keys ask for."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
