"""The error of this package."""


class ModelError(ValueError):
    """A model that cannot be built, loaded or trained as asked; the message says how to fix it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
