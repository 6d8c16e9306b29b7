"""Terminal output: log and warn in one format, escape control characters, detect output that cannot be written.

Bytes, seconds and whole numbers as text for tables: `5.3 MB`, `3 min 40 s`, `223,108`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO, cast

from lightning.pytorch.utilities import rank_zero_only
from rich.filesize import decimal

LOGGERS = ("app", "modules", "datamodules")  # packages of this program; each module logs under its own name


def escape_controls(text: str) -> str:
    """Return the text with control characters, escape sequences and direction marks made visible and harmless.

    Line breaks and tabs stay. Bytes of a file name that are not UTF-8 become visible too.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def print_error(text: str) -> None:
    """Print an error message on stderr. Ignore a stderr that cannot be written."""
    try:
        print(f"error: {escape_controls(text)}", file=sys.stderr, flush=True)
    except OSError:  # only the exit code can report the error then
        silence_output()


def traceback_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a defect, with control characters escaped: the error's message may quote a file."""
    sys.stderr.write(escape_controls("".join(traceback.format_exception(kind, error, trace))))


class ConsoleHandler(logging.Handler):
    """Print log records of the first rank on stderr, warnings with the prefix `warning: `."""

    @rank_zero_only
    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(prefix + record.getMessage(), file=sys.stderr, flush=True)


class EscapedRecord(logging.LogRecord):
    """Log record of this program or a library, with control characters escaped in its message."""

    def getMessage(self) -> str:
        """Return the message."""
        return escape_controls(super().getMessage())


@contextmanager
def console_logging() -> Iterator[None]:
    """Print this program's log records of level INFO and above, and warnings in the same format. Undone on exit."""
    handler, format_before, factory_before = ConsoleHandler(), warnings.formatwarning, logging.getLogRecordFactory()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    warnings.formatwarning = _format_warning
    logging.setLogRecordFactory(EscapedRecord)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory_before)
        warnings.formatwarning = format_before
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _format_warning(message: Any, *_: Any, **__: Any) -> str:
    return f"warning: {escape_controls(str(message))}\n"


def quiet_libraries() -> None:
    """Silence advice of libraries that does not apply here."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
        "lightning.pytorch.tuner.lr_finder",  # find_lr logs its own result
        "lightning.pytorch.trainer.connectors.checkpoint_connector",  # AtomicCheckpointIO sets `weights_only`
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # `datasets` reads the variable when it is imported
    if loaded := sys.modules.get("datasets"):
        loaded.disable_progress_bars()
    for message in (
        r".*does not have many workers.*",  # the number of workers is the recipe's choice
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",  # expected in a resumed run
        r".*sync_dist=True.*",  # torchmetrics gathers the values of all ranks itself
        r".*your dataloader is not resumable.*",  # the data module's state has the position
        r".*callbacks used to create the checkpoint need to be provided.*",  # expected in an evaluation on other data
        r"Metric `SpearmanCorrcoef` will save all targets.*",  # a number for each row, far less than the texts take
        r".*isinstance\(treespec, LeafSpec\).*",  # Lightning itself uses the deprecated function
        r".*Detected pickle protocol .* in the checkpoint.*",  # such a file is refused with an error
    ):
        warnings.filterwarnings("ignore", message)


# --------------------------------------------------------------------------------------------------------------- output


class WatchedStream:
    """Standard stream that keeps the error of a failed write, since a library may catch the error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.problem: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write to the stream."""
        with self._watched():
            return self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._watched():
            self.stream.flush()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = error
            raise


@contextmanager
def watched_output() -> Iterator[None]:
    """Record failed writes to stdout and stderr. Print `?` for characters that stdout cannot encode. Undone on exit."""
    streams = sys.stdout, sys.stderr
    # a replaced stdout may lack `reconfigure`
    stdout = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None
    errors_before = stdout.errors if stdout else None
    if stdout is not None:
        stdout.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, WatchedStream(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        if stdout is not None:
            with suppress(OSError, ValueError):  # the stream's error has been reported already
                stdout.reconfigure(errors=errors_before)


def output_problem() -> OSError | None:
    """Return the error of a failed write to stdout or stderr; None if no write failed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
        if isinstance(stream, WatchedStream) and stream.problem is not None:
            return stream.problem
    return None


def silence_output() -> None:
    """Redirect a broken stream to the null device, so that the interpreter can flush the stream at exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, WatchedStream) and stream.problem is not None:
            with suppress(OSError, ValueError):  # a replaced stdout may have no file
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def bytes_text(count: float) -> str:
    """Return bytes in the largest unit of at least 1, by powers of 1,000."""
    return decimal(round(count))


def seconds_text(seconds: float) -> str:
    """Return a duration in its two largest units, without a unit that is zero."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    units = (3600, "h", 60, "min") if rounded >= 3600 else (60, "min", 1, "s")
    large, large_unit, small, small_unit = units
    count, rest = divmod(round(seconds / small), large // small)
    return f"{count} {large_unit}" + (f" {rest} {small_unit}" if rest else "")


def quantity_text(name: str, value: float) -> str | None:
    """Return bytes and seconds, by the ending of a metric's name, and whole numbers as text; None for other metrics."""
    if name.endswith("bytes"):
        return bytes_text(value)
    if name.endswith("seconds"):
        return seconds_text(value)
    return f"{value:,}" if isinstance(value, int) else None
