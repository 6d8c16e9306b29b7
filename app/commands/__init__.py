"""Commands on finished runs, one a file.

A command is a module with `add_arguments(parser)` and `run(arguments)`; the first line of its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from jsonargparse import ArgumentParser

from app.commands import export, sweep

COMMANDS: dict[str, ModuleType] = {"export": export, "sweep": sweep}


def command_help(name: str) -> str:
    """What a command does, in a line."""
    return (COMMANDS[name].__doc__ or "").partition("\n")[0]


def command_parser(name: str) -> ArgumentParser:
    """The parser of a command's words."""
    parser = ArgumentParser(
        prog=f"main.py {name}", description=command_help(name), exit_on_error=False, allow_abbrev=False
    )
    COMMANDS[name].add_arguments(parser)
    return parser


def run_command(name: str, words: Sequence[str], allowed_imports: Sequence[str] = ()) -> None:
    """Run a command.

    Args:
        name: One of `COMMANDS`.
        words: What stands behind it on the command line.
        allowed_imports: Prefixes of --allow_imports, for a command that starts others.
    """
    arguments = command_parser(name).parse_args(list(words))
    arguments["allowed_imports"] = list(allowed_imports)
    COMMANDS[name].run(arguments)
