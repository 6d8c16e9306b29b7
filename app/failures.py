"""Which errors are the user's to mend, and which are defects."""

from __future__ import annotations

import os
import traceback

import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from app.callbacks import CallbackError
from app.checkpoint_io import CheckpointError
from app.messages import compiler_message
from app.processes import is_distributed, is_peer_lost, is_worker_lost
from datamodules.errors import DataError
from modules.adapters import AdapterError
from modules.base import ModelError

# What a user can mend. Anything else is a defect of this program and shows its traceback.
BAD_INPUT = (
    ArgumentError,
    AdapterError,
    ModelError,
    DataError,
    CheckpointError,
    CallbackError,
    MisconfigurationException,
    OSError,
)


def bad_input(error: Exception) -> Exception | None:
    """What the user can mend behind an error, looking through the parser's wrapping; None for a defect."""
    if isinstance(error, torch.OutOfMemoryError):
        return ArgumentError(None, "The accelerator's memory is full: choose a smaller --data.batch_size.")
    if is_worker_lost(error) or is_worker_lost(error.__cause__ or error):
        return ArgumentError(
            None,
            "A worker process of the data loader was killed, often because memory is full. Checkpoints are untouched: "
            "resume with --ckpt_path last and a smaller --data.num_workers or --data.batch_size.",
        )
    if is_distributed() and is_peer_lost(error):
        return ArgumentError(None, "Another process of the run has ended or cannot be reached.")
    if (failed := compiler_message(error)) is not None:
        return ArgumentError(None, failed)
    link: BaseException | None = error
    while isinstance(link, Exception):
        if isinstance(link, BAD_INPUT):
            return link
        wrapped = isinstance(link, ValueError) and "Does not validate" in str(link)
        link = link.__cause__ or (link.__context__ if wrapped else None)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError | RuntimeError) and f"{os.sep}lightning{os.sep}" in frames[-1].filename:
        return error  # Lightning's own check of what the trainer or a callback was told
    return None
