"""Help of the program: purpose, commands, examples and options."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from app.commands import COMMANDS, command_help
from app.config.program_files import program_command
from datamodules.errors import UsageError

# Commands of LightningCLI, whose own help is about Lightning's trainer.
TRAINER_COMMANDS = {
    "fit": "Train a recipe's model, or resume a run.",
    "validate": "Score a run, or the untrained backbone, on the validation split.",
    "test": "Score a run, or the untrained backbone, on the test split.",
    "predict": "Write the predictions of a run to a file.",
}
DESCRIPTION = (
    "Fine-tune pretrained vision and language models with asymmetric low-rank adapters (W + s B A, one factor frozen)."
)
EXAMPLES = {
    "fit --config conf/quickstart.yaml": "learn handwritten digits on the CPU, in a minute",
    "fit --config conf/texts.yaml --data.path reviews.csv --variant lora": "your own texts, both factors trained",
    "export RUN --format peft --output DIR": "hand the adapter of a run to PEFT",
}
OPTIONS = {
    "--help": "Show this page. COMMAND --help lists the keys of a command.",
    "--version": "Show the version.",
    "--print_shtab SHELL": "Print the completion script for bash, zsh and others.",
}


def program_help() -> str:
    """Return the help of the program without a command."""
    program = " ".join(program_command())
    commands = TRAINER_COMMANDS | {name: command_help(name) for name in COMMANDS}
    parts = [
        f"usage: {program} COMMAND [--KEY VALUE ...]",
        DESCRIPTION,
        "Commands:",
        _columns(commands),
        "Examples:",
        "\n".join(f"  {program} {words}\n      {purpose}" for words, purpose in EXAMPLES.items()),
        "Options:",
        _columns(OPTIONS),
    ]
    text = "\n\n".join(parts)
    return text.replace(":\n\n", ":\n")


def check_command(words: Sequence[str]) -> None:
    """Check the first word of the command line.

    Raises:
        UsageError: If there is no word, or the first word is neither an option nor a command.
    """
    names = [*TRAINER_COMMANDS, *COMMANDS]
    choices = f"Choose one of {', '.join(names)}."
    if not words:
        raise UsageError(f"No command is given. {choices} --help describes the commands.")
    if not words[0].startswith("-") and words[0] not in names:
        close = difflib.get_close_matches(words[0], names, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"There is no command {words[0]!r:.80}{hint} {choices}")


def _columns(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows.items())
