"""Objects whose unpickling would run code."""

from __future__ import annotations

from pathlib import Path


class Malicious:
    """Unpickling this would create a file.

    Args:
        trace: The file.
    """

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))
