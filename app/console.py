"""Lines for the terminal: one logging handler, one format of warnings, control characters escaped."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

LOGGERS = ("app", "modules", "datamodules")  # the packages of this program, whose modules log under their own names


def escape_controls(text: str) -> str:
    """Return a text in which escape sequences, control and direction characters are visible and have no effect.

    Line breaks and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class ConsoleHandler(logging.Handler):
    """Print log records of the first rank on stderr, warnings behind `warning: `."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(prefix + escape_controls(record.getMessage()), file=sys.stderr, flush=True)


@contextmanager
def console_logging() -> Iterator[None]:
    """Show what this program logs, from INFO on, and format warnings alike; undone on exit."""
    handler, format_before = ConsoleHandler(), warnings.formatwarning
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    warnings.formatwarning = _format_warning
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _format_warning(message: Any, *_: Any, **__: Any) -> str:
    return f"warning: {escape_controls(str(message))}\n"
