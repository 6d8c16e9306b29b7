"""Log records of data modules are printed, as by the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.console import console_logging


@pytest.fixture(autouse=True)
def printed_logs() -> Iterator[None]:
    with console_logging():
        yield
