"""Checks of refused input: an error class in Python, or one message and exit code 2 on the command line."""

from __future__ import annotations

import re

import pytest

from datamodules.errors import DataError


def refuses(*parts: str, error: type[Exception] = DataError) -> pytest.RaisesExc[Exception]:
    """Return a context that expects an error whose message has all the parts, in this order.

    Args:
        parts: Literal texts, not regular expressions.
        error: Class of the error.
    """
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> str:
    """Check that a command ended with exit code 2 and one message with all parts. Return the message.

    Args:
        capsys: Fixture with the output of the command.
        code: Exit code of the command.
        parts: Texts in the message, in any order.
    """
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert "Union" not in lines[0]
    assert "<class" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]
