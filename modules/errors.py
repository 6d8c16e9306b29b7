"""The error of this package."""


class ModelError(ValueError):
    """A model that cannot be built, loaded or trained as asked; the message says how to fix it."""
