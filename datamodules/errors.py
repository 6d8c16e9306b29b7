"""Errors of this package, and the reason that errors of libraries give."""


class DataError(ValueError):
    """Data that cannot be found, read or used as asked; the message says what, where, and how to fix it."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # torch raises a worker process's error anew, with its traceback as message
            message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip()
        super().__init__(message)


class SplitError(DataError):
    """A split that the data lack, or whose labels are hidden."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
