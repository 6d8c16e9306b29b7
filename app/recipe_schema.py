"""JSON schema of a recipe: jsonargparse's own, of fit's parser with the recipe's model and data."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from app.arguments import SECTIONS
from app.callbacks import Termination
from app.cli import AsymmetryCLI
from app.imports import resolve
from app.yaml_files import check_file, read_yaml

Described = dict[str, Any]  # class_path and init_args
# Keys of the trainer that take classes of other packages. Their arguments are not in the schema.
CLASSES: dict[str, Any] = {
    "accelerator": str | Described,
    "strategy": str | Described,
    "logger": bool | Described | list[Described] | None,
    "callbacks": Described | list[Described] | None,
    "plugins": str | Described | list[str | Described] | None,
    "profiler": str | Described | None,
}


class _Parser(Exception):
    """Carries the parser of fit out of the constructor of its command line."""


class _SchemaCLI(AsymmetryCLI):
    """A command line whose parser has the keys of a recipe's model and data, and parses nothing.

    Args:
        classes: Class by section; a section without a class takes any keys.
    """

    def __init__(self, classes: dict[str, type], held: ExitStack) -> None:
        self.classes = classes
        super().__init__(["fit"], Termination(), held)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data."""
        parser.add_class_arguments(L.Trainer, "trainer", skip={*CLASSES})
        for key, kind in CLASSES.items():
            parser.add_argument(f"--trainer.{key}", type=kind)
        for section in SECTIONS:
            if section in self.classes:
                parser.add_argument(f"--{section}.class_path", type=str)
                parser.add_class_arguments(self.classes[section], f"{section}.init_args")
            else:
                parser.add_argument(f"--{section}", type=dict)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raise the parser."""
        raise _Parser(parser)


def recipe_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe and of all overlays for it.

    Every key may be left out: an overlay has a few of them, and the command line may add others.

    Args:
        name: The recipe's file.

    Raises:
        ArgumentError: If the file is missing or broken, or names a class that there is not.
    """
    check_file(name)
    sections = {key: part for key, part in read_yaml(name).items() if key in SECTIONS and isinstance(part, dict)}
    paths = {section: part["class_path"] for section, part in sections.items() if "class_path" in part}
    try:
        with ExitStack() as held:
            _SchemaCLI({section: _class(section, path) for section, path in paths.items()}, held)
    except _Parser as found:
        schema: dict[str, Any] = json.loads(found.args[0].get_completion_script("jsonschema"))
    recipe = {"$schema": schema["$schema"], **schema["properties"]["fit"], "$defs": schema.get("$defs", {})}
    properties = recipe["properties"]
    for section, path in paths.items():
        properties[section]["properties"]["class_path"] = {"enum": [path]}
    for part in (recipe, *properties.values(), *(properties[section]["properties"]["init_args"] for section in paths)):
        part.pop("required", None)
    return recipe


def _class(section: str, path: str) -> type:
    """Return the class of a section.

    Raises:
        ArgumentError: If there is none, or a configuration may not name it.
    """
    try:
        found = resolve(path)
    except ImportError as error:
        raise ArgumentError(None, f"{section}.class_path: {error}") from error
    if not isinstance(found, type):
        raise ArgumentError(None, f"{section}.class_path: {path} is no class that a recipe may name.")
    return found
