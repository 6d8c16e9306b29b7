"""Errors of jsonargparse, shortened to one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from app.config.messages import LONGEST, parser_message
from app.console import print_error


@dataclass
class Group:
    size: int = 1
    depth: int = 1


class Base:
    def __init__(self, width: int = 1) -> None:
        pass


class Part(Base):
    def __init__(self, color: Literal["red", "blue"] = "red", group: Group = Group()) -> None:  # noqa: B008
        pass


class Whole:
    def __init__(self, part: Base | None = None, parts: list[Base] | Base | None = None) -> None:
        pass


@pytest.fixture
def message() -> Callable[..., str]:
    def parse(*words: str) -> str:
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--count", type=int | float | None)
        parser.add_argument("--pair", type=tuple[int, int])
        parser.add_argument("--names", type=list[str])
        parser.add_class_arguments(Whole, "whole")
        with pytest.raises(ArgumentError) as raised:
            parser.parse_args(words)
        return parser_message(raised.value, lambda: list(parser.get_defaults().keys()))

    return parse


PART = f"--whole.part={__name__}.Part"
PARTS = f"--whole.parts={__name__}.Part"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cout=3"], "There is no key cout; did you mean count?"),
        (["--xyz=3"], "There is no key xyz. Choose one of count, pair, names."),
        (["--whole.prat=3"], "There is no key whole.prat; did you mean whole.part?"),
        (["--count=x"], "count: expected int or float, got x"),
        (["--pair=[1, x]"], "pair: expected int, got x"),
        (
            ["--names=my text, title"],
            "names: expected list, got my text, title. Write a list in brackets and quotation marks: '[a, b]'",
        ),
        ([PART, "--whole.part.colr=red"], "whole.part: Part has no key colr; did you mean color?"),
        ([PART, "--whole.part.color=green"], "whole.part.color: expected one of 'red', 'blue', got green"),
        ([PARTS, "--whole.parts.color=green"], "whole.parts.color: expected one of 'red', 'blue', got green"),
        (["--whole.part=Prt"], "whole.part: expected the path of a class, got Prt"),
        (["--count"], "argument --count: expected one argument"),
    ],
)
def test_errors_are_one_line_that_names_the_key(message: Callable[..., str], words: list[str], expected: str) -> None:
    assert message(*words) == expected


def test_other_errors_are_joined_and_shortened_to_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = parser_message(ValueError("first\n  second\x1b[2J\tthird"))
    assert text == "first second\x1b[2J\\tthird"
    print_error(text)
    assert capsys.readouterr().err == "error: first second\\x1b[2J\\tthird\n"
    assert len(parser_message(ValueError("x" * 2 * LONGEST))) == LONGEST + 2


def test_a_class_that_a_message_quotes_is_not_imported() -> None:
    text = "Problem with given class_path 'never_imported.Thing': Option 'size' is not accepted"
    assert parser_message(ValueError(text)) == "Thing has no key size."
