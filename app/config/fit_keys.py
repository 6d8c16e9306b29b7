"""Keys of `fit` for other commands. `app.cli` passes the keys, so that no command imports `app.cli`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

# Returns the configuration of `fit WORDS`, parsed and validated, without constructing anything. Raises UsageError if
# `fit` would reject the words.
ParseFit = Callable[[Sequence[str]], Namespace]


@dataclass(frozen=True)
class FitKeys:
    """Access to the keys of `fit`.

    Args:
        parse: Parses the words after `fit`.
        parser: Returns a parser of `fit` with the keys of the given classes, by section.
        defaults: Returns the defaults of all keys.
    """

    parse: ParseFit
    parser: Callable[[Mapping[str, type]], ArgumentParser]
    defaults: Callable[[], Namespace]


def add_fit_arguments(parser: ArgumentParser) -> None:
    """Add the argument that takes the keys of `fit`."""
    parser.add_argument(
        "fit_arguments",
        metavar="KEYS",
        nargs="*",
        type=str,
        help="--config RECIPE and every other key of fit, anywhere on the command line.",
    )
