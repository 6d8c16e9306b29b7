"""Recipes and assets of the program itself, found from any working directory, as after `pip install .`."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

ROOT = Path(__file__).parents[1]
FOLDERS = ("conf/", "app/assets/")


def find_own_file(name: str) -> str:
    """Return the path of the program's own recipe or asset, unless the working directory has a file of that name."""
    own = ROOT / name
    return str(own) if name.startswith(FOLDERS) and own.exists() and not Path(name).exists() else name


def find_own_files(config: Namespace) -> None:
    """Replace, in place, each value that names a recipe or an asset of the program (`find_own_file`)."""
    for key, value in list(config.items()):
        if isinstance(value, str):
            config[key] = find_own_file(value)
