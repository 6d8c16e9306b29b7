"""Changes to the recipe or the tensors of a compact file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.formats.compact import FILE_NAME

Recipe = dict[str, Any]


def rewrite(
    folder: Path,
    recipe: Callable[[Recipe], Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
) -> None:
    """Rewrite a compact file after `recipe` has changed or replaced its recipe, or `tensors` its tensors."""
    path = folder / FILE_NAME
    with safe_open(path, framework="pt") as opened:
        text = opened.metadata()["recipe"]
    content, state = json.loads(text), load_file(path)
    if recipe is not None:
        returned = recipe(content)
        text = returned if isinstance(returned, str) else json.dumps(content)
    if tensors is not None:
        tensors(state)
    save_file(state, path, metadata={"recipe": text})
