"""The one error of this package."""


class CallbackError(ValueError):
    """A callback asked for what it cannot do; the message says how to fix it."""
