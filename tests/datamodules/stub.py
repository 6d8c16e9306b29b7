"""Stubs of the data tests; they live in `tests.support.trainers`."""

from tests.support.trainers import stub_trainer, text_model

__all__ = ["stub_trainer", "text_model"]
