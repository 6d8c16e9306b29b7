"""Writing of JSON lines, and changes to keys of JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    """Write rows as JSON lines, and missing folders. Return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def edit_json(file: Path, **changes: Any) -> None:
    """Replace or add keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
