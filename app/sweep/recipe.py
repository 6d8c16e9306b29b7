"""Read facts from a sweep's recipe, parsed as `fit` would parse it: monitor, adapter rank, head, test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pkgutil import resolve_name
from typing import Any, get_args

import lightning as L
from jsonargparse import ArgumentError, Namespace

from app.config.constructors import construct, constructor_parameters
from app.config.fit_keys import ParseFit
from app.config.variants import command_line_options
from datamodules.contract import HasTestSplit
from datamodules.errors import SplitError, UsageError


class Recipe:
    """The configuration that all trials share, parsed when a fact is first needed.

    Args:
        base: Recipes and overlays.
        keys: Keys that all trials set.
        parse_fit: Parser of `fit`.
    """

    def __init__(self, base: Sequence[str], keys: Mapping[str, Any], parse_fit: ParseFit) -> None:
        self.base, self.keys, self.parse_fit = base, keys, parse_fit

    @property
    def files(self) -> str:
        """Return the names of the files, for messages."""
        return ", ".join(self.base)

    @cached_property
    def config(self) -> Namespace:
        """Return the parsed configuration.

        Raises:
            UsageError: If `fit` would refuse the files, with their names.
        """
        files = [word for file in self.base for word in ("--config", file)]
        try:
            return self.parse_fit([*files, *command_line_options(self.keys)])
        except ArgumentError as error:
            raise UsageError(f"base: {self.files}: {error}") from error

    def has_new_head(self) -> bool:
        """Return False if the type of the model's key `tuning` does not allow `head`."""
        tuning = constructor_parameters(resolve_name(self.config.model.class_path)).get("tuning")
        return tuning is None or "head" in get_args(tuning.annotation)

    def has_test_split(self) -> bool:
        """Return True if the data have a test split with labels. The data are opened to find out.

        Raises:
            DataError: If the data cannot be opened.
        """
        data = construct(L.LightningDataModule, self.config.data)
        if not isinstance(data, HasTestSplit):
            return False
        try:
            data.check_test_split()
        except SplitError:
            return False
        return True
