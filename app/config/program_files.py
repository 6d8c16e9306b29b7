"""Recipes, assets, version and name of the program, for any working directory."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from jsonargparse import Namespace

ROOT = Path(__file__).parents[2]
FOLDERS = ("conf/", "app/assets/")


def find_program_file(name: str) -> str:
    """Return the path of the program's recipe or asset of a name.

    The name is returned unchanged if the working directory has a file of this name, or the program has none.
    """
    file = os.path.join(ROOT, name)
    return file if name.startswith(FOLDERS) and os.path.exists(file) and not os.path.exists(name) else name


def find_program_files(config: Namespace) -> None:
    """Replace, in place, each value that names a recipe or an asset of the program (`find_program_file`)."""
    for key, value in list(config.items()):
        if isinstance(value, str):
            config[key] = find_program_file(value)


def list_recipes() -> list[str]:
    """Return the program's recipes, each with the first sentence of its first comment. Leave out overlays."""
    described = {
        f"conf/{file.name}": file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for file in sorted((ROOT / "conf").glob("*.yaml"))
    }
    recipes = {name: line for name, line in described.items() if not line.startswith("Overlay")}
    width = max(map(len, recipes))
    return [f"{name:{width}}  {line.partition('. ')[0].rstrip('.')}" for name, line in recipes.items()]


def program_version() -> str:
    """Return the version from pyproject.toml beside main.py, or else the version of the installed package."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return version("onesided")


def program_command() -> list[str]:
    """Return the words that call this program: `python main.py`, or `onesided` once it is installed."""
    return ["onesided"] if Path(sys.argv[0]).name == "onesided" else ["python", "main.py"]
