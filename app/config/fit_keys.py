"""Keys of `fit` for commands: `app.cli` hands them over, so that no command imports the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

# Returns the configuration of `fit WORDS`, parsed and validated, without constructing anything. Raises ArgumentError if
# `fit` would refuse the words.
ParseFit = Callable[[Sequence[str]], Namespace]


@dataclass(frozen=True)
class FitKeys:
    """Access to the keys of `fit`.

    Args:
        parse: Parses the words after `fit`.
        parser: Returns a parser of fit's keys with the keys of given classes, by section.
    """

    parse: ParseFit
    parser: Callable[[Mapping[str, type]], ArgumentParser]
