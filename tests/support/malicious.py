"""A pickle that runs code when somebody opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Malicious:
    """Unpickling this creates the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))
