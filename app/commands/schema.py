"""Print the JSON schema of a recipe, with which editors complete, explain and check its keys."""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from app.config.schema import recipe_schema
from datamodules.errors import UsageError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("recipe", metavar="RECIPE", type=str, nargs="?", help="A recipe, as in conf/.")
    parser.add_argument("--config", metavar="RECIPE", type=str | None, help="The recipe as an option, as for fit.")


def run(arguments: Namespace) -> None:
    """Print the schema.

    Raises:
        UsageError: Without a recipe or with two, or if the recipe cannot be read.
    """
    recipes = [name for name in (arguments.recipe, arguments.config) if name is not None]
    if len(recipes) != 1:
        raise UsageError(f"RECIPE: {len(recipes)} recipes are given. Give one, such as conf/vit_cifar.yaml.")
    print(json.dumps(recipe_schema(recipes[0], arguments.fit), indent=2), flush=True)
