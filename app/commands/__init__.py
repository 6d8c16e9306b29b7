"""Commands that LightningCLI lacks, one a file.

A command is a module with `add_arguments(parser)` and `run(arguments)`; the first line of its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from types import ModuleType

from jsonargparse import ArgumentError, ArgumentParser

from app.commands import (
    bank,
    chat,
    combine,
    compare,
    export,
    federate,
    memory,
    runs,
    schema,
    similarity,
    spectrum,
    sweep,
    theory,
)
from app.config.fit_keys import FitKeys
from app.config.messages import parser_message
from app.config.program_files import program_command
from datamodules.errors import UsageError

COMMANDS: dict[str, ModuleType] = {
    "bank": bank,
    "chat": chat,
    "combine": combine,
    "compare": compare,
    "export": export,
    "federate": federate,
    "memory": memory,
    "runs": runs,
    "schema": schema,
    "similarity": similarity,
    "spectrum": spectrum,
    "sweep": sweep,
    "theory": theory,
}
WITH_FIT_KEYS = ("federate", "memory", "theory")  # commands that pass every other option to fit's parser


def command_help(name: str) -> str:
    """Return the description of a command in one line."""
    return (COMMANDS[name].__doc__ or "").partition("\n")[0]


def command_parser(name: str) -> ArgumentParser:
    """Return the parser of a command."""
    parser = ArgumentParser(
        prog=f"{program_command()[-1]} {name}", description=command_help(name), exit_on_error=False, allow_abbrev=False
    )
    COMMANDS[name].add_arguments(parser)
    return parser


def run_command(name: str, words: Sequence[str], fit: FitKeys, allowed_imports: Sequence[str] = ()) -> None:
    """Run a command.

    Args:
        name: One of `COMMANDS`.
        words: Words after the command's name.
        fit: Access to the keys of `fit`.
        allowed_imports: Prefixes of --allow_imports, for a command that starts other processes.

    Raises:
        UsageError: For an unknown option or a wrong value. For an unknown option, the message suggests a similar
            key. A command raises further errors, which its own `run` documents.
    """
    parser = command_parser(name)
    given = fit_keys_last(parser, words) if name in WITH_FIT_KEYS else list(words)
    try:
        arguments = parser.parse_args(given)
    except ArgumentError as error:
        raise UsageError(parser_message(error, lambda: list(parser.get_defaults().keys()))) from error
    arguments.fit, arguments.allowed_imports, arguments.command_line = fit, list(allowed_imports), [name, *words]
    COMMANDS[name].run(arguments)


def fit_keys_last(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """Move all words that are not options of a parser behind `--`, which makes them positional arguments.

    An option whose default is a list takes all words up to the next option.
    """
    defaults = parser.get_defaults()
    options: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option = word.partition("=")[0]
        key = option.removeprefix("--")
        if option in ("-h", "--help"):
            options.append(word)
        elif option.startswith("--") and key in defaults:
            values = [*takewhile(lambda value: not value.startswith("--"), rest)]
            count = 0 if "=" in word else len(values) if isinstance(defaults[key], list) else 1
            options += [word, *rest[:count]]
            del rest[:count]
        else:
            others.append(word)
    return [*options, "--", *others]
