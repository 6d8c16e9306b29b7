"""What libraries say, made fit for a reader."""

from __future__ import annotations

import logging
import re
import warnings

from jsonargparse import ArgumentError


def parser_message(error: ArgumentError) -> str:
    """The parser's complaint in one paragraph, without the alternatives it tried and failed on."""
    text = re.sub(r"\s*\n\s*", " ", str(error))
    return text.strip()


def quiet_libraries() -> None:
    """Silence advice that does not apply here."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # images in memory need none
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
        r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # metrics gather on their own
    ):
        warnings.filterwarnings("ignore", message)
