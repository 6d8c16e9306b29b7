"""JSON schema of a recipe, made by jsonargparse from a parser of `fit` with the recipe's model and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from app.config.classes import CLASS_PATHS
from app.config.fit_keys import FitKeys
from app.config.imports import resolve
from app.config.precedence import SECTIONS
from app.config.yaml_files import check_file, read_yaml
from datamodules.errors import UsageError

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


def add_recipe_keys(parser: LightningArgumentParser, classes: Mapping[str, type]) -> None:
    """Add the keys of trainer, model and data; a section without a class takes any keys."""
    parser.add_class_arguments(L.Trainer, "trainer", skip={*CLASSES})
    for key, kind in CLASSES.items():
        parser.add_argument(f"--trainer.{key}", type=kind)
    for section in SECTIONS:
        if section in classes:
            parser.add_argument(f"--{section}.class_path", type=str)
            parser.add_class_arguments(classes[section], f"{section}.init_args")
        else:
            parser.add_argument(f"--{section}", type=dict)


def add_section_keys(parser: LightningArgumentParser, classes: Mapping[str, type]) -> None:
    """Add the keys of data and model one by one, as --help shows them."""
    for section in reversed(SECTIONS):
        kind = classes[section]
        parser.add_class_arguments(kind, section, fail_untyped=False)
        is_base = kind.__name__ not in CLASS_PATHS[section]
        names = ", ".join(CLASS_PATHS[section])
        listing = f"--{section}.help NAME lists the keys of {names}."
        assert parser.groups is not None
        group = parser.groups[section]
        group.title = f"Keys of {section}{' of every task' if is_base else ''}"
        group.description = listing if is_base else f"Keys of {kind.__name__}."
        if is_base and section == "data":  # each class declares the key itself, with a default or without
            group.add_argument("--data.path", type=str, help="The data: a folder, a file, or a name on the hub.")


def recipe_schema(name: str, fit: FitKeys) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe and of all overlays for it.

    No key is required: an overlay has only a few keys, and the command line may add other keys.

    Args:
        name: The recipe's file.
        fit: Access to the keys of `fit`.

    Raises:
        UsageError: If the file is missing or broken, or names a class that does not exist or is not allowed.
    """
    check_file(name)
    sections = {key: part for key, part in read_yaml(name).items() if key in SECTIONS and isinstance(part, dict)}
    paths = {section: part["class_path"] for section, part in sections.items() if "class_path" in part}
    parser = fit.parser({section: _class(section, path) for section, path in paths.items()})
    schema: dict[str, Any] = json.loads(parser.get_completion_script("jsonschema"))
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
        UsageError: If the class does not exist, or a configuration may not name the class.
    """
    try:
        resolved = resolve(path)
    except ImportError as error:
        raise UsageError(f"{section}.class_path: {error}") from error
    if not isinstance(resolved, type):
        choices = ", ".join(CLASS_PATHS[section].values())
        raise UsageError(f"{section}.class_path: {path} is no class that a recipe may name. Choose one of {choices}.")
    return resolved
