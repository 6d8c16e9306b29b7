"""What data modules of texts share: splits of tables, limits of length, loaders over length buckets."""

from __future__ import annotations

import logging
from typing import Any, Literal

import datasets
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Collate, ResumableDataModule
from datamodules.errors import DataError
from datamodules.splits import check_splits, choose_rows
from datamodules.tables import SPLITS, Table, open_file, open_table
from datamodules.tokens import TokenDataset

_log = logging.getLogger(__name__)
Padding = Literal["longest", "max_length"]


class TextData(ResumableDataModule):
    """What data modules of texts share: splits of tables, limits of length, loaders over length buckets.

    A task has `build`, which makes a data set of a table's rows, and `collate`.

    Args:
        path: See `open_table`, as `config` and `revision`.
        config: The data set's configuration.
        revision: Branch, tag or commit on the hub.
        batch_size: Samples a step and process, at least 1.
        num_workers: Processes that load, each.
        bucket_by_length: Whether samples of like length share a batch.
        val_fraction: Share of the training rows held out when there is no validation split, in (0, 1).
        val_seed: Seed of that share.
        limits: Most rows of `train`, `val` and `test`.
        predict_path: File of rows for `predict`; None takes the test split.
    """

    suffixes: tuple[str, ...] = ("",)  # of the validation and test splits that a data set has several of
    test_on_validation = False

    def __init__(
        self,
        path: str,
        config: str | None,
        revision: str | None,
        batch_size: int,
        num_workers: int,
        bucket_by_length: bool,
        val_fraction: float,
        val_seed: int,
        limits: dict[str, int | None],
        predict_path: str | None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_splits(val_fraction, limits)
        self.path, self.config, self.revision, self.predict_path = path, config, revision, predict_path
        self.bucket_by_length = bucket_by_length
        self.val_fraction, self.val_seed, self.limits = val_fraction, val_seed, limits
        self.splits: dict[str, list[TokenDataset]] = {}
        self.set_names: dict[str, list[str]] = {}
        self.predicted: list[Table] = []
        self._tables: dict[tuple[str, ...], Table | None] = {}

    # ------------------------------------------------------------------------------------------------------ splits

    def setup(self, stage: str) -> None:
        """Tokenise what the stage needs, with the tokenizer of the trainer's model."""
        if self.caches:  # before the rows are read
            self.trainer.lightning_module.frozen_prefix()  # type: ignore[union-attr, operator]
        with self.first_process_first():
            self.before_splits()
            if stage == "predict":
                tables = self._tables_to_predict()
                self.predicted, self.set_names["predict"] = list(tables.values()), list(tables)
                self.splits["predict"] = [self.build(table, None) for table in self.predicted]
                return
            for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
                if split not in self.splits:
                    sets = self.sets(split)
                    self.set_names[split] = list(sets)
                    self.splits[split] = [self._chosen(split, *which) for which in sets.values()]

    def before_splits(self) -> None:
        """What a task checks and learns before its first split is read."""

    def build(self, table: Table, rows: Tensor | None) -> TokenDataset:
        """A data set of some rows of a table with their targets; of all rows without targets if `rows` is None."""
        raise NotImplementedError

    def check_test_split(self) -> None:
        """See before a long training that there is something to test on.

        Raises:
            DataError: If there is not.
        """
        self.sets("test")

    def stored(self, split: str) -> dict[str, Table]:
        """The sets that a split is stored in, by suffix: MNLI's matched and mismatched, otherwise one without."""
        suffixes = ("",) if split == "train" else self.suffixes
        found = {s: self._table(tuple(f"{base}_{s}" if s else base for base in SPLITS[split])) for s in suffixes}
        return {s: table for s, table in found.items() if table is not None}

    def training_table(self) -> Table:
        """The training rows.

        Raises:
            DataError: If there are none.
        """
        tables = self.stored("train")
        if not tables:
            raise DataError(f"data.path: {self.path} has no train split.")
        return tables[""]

    def sets(self, split: str) -> dict[str, tuple[Table, bool]]:
        """The sets of a split by suffix, each with whether it is held out from (or left by) the training rows.

        Raises:
            DataError: If there is none.
        """
        validation = self.stored("val")
        held_out = self.test_on_validation or not validation
        if split == "train" or (split == "val" and held_out):
            return {"": (self.training_table(), held_out)}
        tables = validation if split == "val" or self.test_on_validation else self.stored("test")
        if not tables:
            missing = "validation" if self.test_on_validation else split
            raise DataError(
                f"data.path: {self.path} has no {missing} split; leave it out (test_after_fit: false), or test on "
                "the validation split where there is a key for that (--data.test_on_validation true)."
            )
        return {suffix: (table, False) for suffix, table in tables.items()}

    def _table(self, names: tuple[str, ...]) -> Table | None:
        """The first of some splits, opened once.

        Raises:
            DataError: If it has no rows.
        """
        if names not in self._tables:
            table = open_table(self.path, names, self.config, self.revision)
            if table is not None and len(table) == 0:
                raise DataError(f"data.path: {table.where} has no rows.")
            self._tables[names] = table
        return self._tables[names]

    def _chosen(self, split: str, table: Table, held_out: bool) -> TokenDataset:
        limit = self.limits[split]
        return self.build(table, choose_rows(len(table), split, held_out, self.val_fraction, self.val_seed, limit))

    def _tables_to_predict(self) -> dict[str, Table]:
        if self.predict_path is not None:
            return {"": open_file(self.predict_path, "predict_path")}
        tables = self.stored("test")
        if not tables:
            raise DataError(f"data.predict_path: {self.path} has no test split; name a file of rows to predict.")
        return tables

    # ------------------------------------------------------------------------------------------------------ tokens

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the trainer's model.

        Raises:
            DataError: If the model has none.
        """
        assert self.trainer is not None
        tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise DataError(f"{type(self).__name__} needs a model that has a tokenizer, such as TextClassifier.")
        return tokenizer

    def say_cut(self, tokens: datasets.Dataset, table: Table, column: str, limit: int) -> None:
        """Say how many rows reach their limit of tokens."""
        assert self.trainer is not None
        lengths = tokens.with_format("numpy", columns=[column])[column][:]
        cut = int((lengths >= limit).sum())
        if cut and self.trainer.is_global_zero:
            text = f"{cut:,} of {len(lengths):,} rows of {table.where} reach {limit} tokens and may be cut."
            _log.warning(text)

    def check_length(self, key: str, length: int) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            DataError: Under the given key, with the limit.
        """
        assert self.trainer is not None
        limit = getattr(self.trainer.lightning_module, "position_limit", None)
        if limit is not None and length > limit:
            raise DataError(
                f"data.{key}: {length} tokens are more than the {limit} that the backbone has positions for."
            )

    def collate(self) -> Collate:
        """What makes a padded batch of rows; it must do without the trainer, for workers that do not fork."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------------- loaders

    def _loaders(self, split: str) -> list[DataLoader[Any]]:
        return [
            self.evaluation_loader(d, d.lengths if self.bucket_by_length else None, self.collated(f"{split} {s}", d))
            for d, s in zip(self.splits[split], self.set_names[split], strict=True)
        ]

    def collated(self, name: str, rows: TokenDataset, collate: Collate | None = None) -> Collate:
        """What makes a batch of rows, with the kept output of the frozen prefix if there is to be one.

        Args:
            name: Of the split, for messages.
            rows: The rows.
            collate: Makes a batch of them; None takes the task's own.
        """
        collate = collate or self.collate()
        if not self.caches:
            return collate
        return self.cached(name.strip(), rows, rows.digest(), rows.lengths, self.collate(), collate)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, in batches of like length."""
        data = self.splits["train"][0]
        lengths = data.lengths if self.bucket_by_length else None
        return self.train_loader(data, lengths, self.collated("train", data))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each validation set."""
        return self._loaders("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each test set."""
        return self._loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each set to predict."""
        return self._loaders("predict")
