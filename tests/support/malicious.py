"""An object whose pickle runs code."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Malicious:
    """An object that creates the file `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))
