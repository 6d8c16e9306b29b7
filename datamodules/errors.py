"""The one error of this package."""


class DataError(ValueError):
    """Data that cannot be found, read or used as asked; the message says what, where, and how to mend it."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # torch raises a worker process's error anew, with its traceback as message
            message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip()
        super().__init__(message)
