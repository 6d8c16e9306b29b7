"""The one error of this package."""


class DataError(ValueError):
    """Data that cannot be found, read or used as asked; the message says what, where, and how to mend it."""
