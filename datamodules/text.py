"""Parts that data modules of texts share: splits of tables, limits of length, loaders over length buckets."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Collate, ResumableDataModule
from datamodules.contract import TextModel
from datamodules.errors import DataError, SplitError, counted
from datamodules.loading.prefix_cache import WithHidden
from datamodules.sources.findings import SkippedRow
from datamodules.sources.splits import SPLITS, check_fraction, check_limits, choose_rows
from datamodules.sources.tables import (
    Reading,
    Table,
    check_file,
    check_tables,
    match_columns,
    open_file,
    open_table,
    unread_files,
)
from datamodules.tokens.tokenizing import TokenDataset, lengths_of

_log = logging.getLogger(__name__)
Padding = Literal["longest", "max_length"]


class BadRow(NamedTuple):
    """A row that cannot be used.

    Args:
        key: Key of the data module that an error names.
        reason: What is wrong, as the predicate of a sentence about the row.
    """

    key: str
    reason: str


class TextData(ResumableDataModule):
    """Parts that data modules of texts share: splits of tables, limits of length, loaders over length buckets.

    A task implements `build`, which makes a data set of a table's rows, and `collate`. The task calls `read_as_text`
    with the columns whose cells must stay text.

    Rows are chosen first, by `val_seed` and the limits. Bad rows among the chosen rows are skipped afterwards. So
    `skip_bad_rows` changes neither the choice of held-out rows nor the order of the good rows.

    Args:
        path: A data set's name on the hub; a directory of train.*, validation.* and test.* as Parquet, CSV or JSONL;
            or one such file of training rows.
        config: The data set's configuration: on the hub, or a folder in the directory.
        revision: Branch, tag or commit on the hub, such as `refs/convert/parquet`.
        max_val_samples: Size of a seeded sample of each validation set, for quick trials; None takes all rows.
        max_test_samples: Size of a seeded sample of each test set; None takes all rows.
        predict_path: File of rows for `predict`; None takes the test split.
        encoding: Encoding of CSV, TSV and JSONL files, such as `utf-8`, `cp1252` or `utf-16`.
    """

    suffixes: tuple[str, ...] = ("",)  # Suffixes of the sets of a validation or test split, such as MNLI's.
    # Values for data modules without training rows, which do not have these keys.
    bucket_by_length = True
    test_on_validation = False
    val_fraction, test_fraction, val_seed = 0.1, 0.0, 0

    def __init__(
        self,
        path: str,
        config: str | None = None,
        revision: str | None = None,
        max_val_samples: int | None = None,
        max_test_samples: int | None = None,
        predict_path: str | None = None,
        encoding: str = "utf-8",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.config, self.revision, self.predict_path = path, config, revision, predict_path
        self.limits = {"val": max_val_samples, "test": max_test_samples}
        check_limits(self.limits)
        self.reading = Reading(encoding, ())
        self.splits: dict[str, list[TokenDataset]] = {}
        self.set_names: dict[str, list[str]] = {}
        self.failed: dict[str, dict[int, str]] = {}  # Rows of each table that cannot be predicted, with the reason.
        self._tests_after_fit = False
        self._tables: dict[tuple[str, ...], Table | None] = {}

    @classmethod
    def check_paths(cls, command: str, keys: Mapping[str, Any]) -> None:
        """Check that `predict_path` in `predict`, or else `path`, exists and is of the right kind.

        Raises:
            DataError: If the path is wrong.
        """
        if command == "predict" and keys["predict_path"] is not None:
            check_file(keys["predict_path"], "predict_path")
        else:
            check_tables(keys["path"])

    def read_as_text(self, *columns: str | None) -> None:
        """Read the cells of some columns of CSV and TSV as text, even if the cells look like numbers."""
        kept = (*columns, self.adapter_column)
        self.reading = replace(self.reading, as_text=tuple(column for column in kept if column is not None))

    def keep_columns(self, **columns: str | list[str] | None) -> None:
        """Keep guessed columns in the checkpoint, and read their cells as text from now on.

        Args:
            columns: Column or columns by key.
        """
        self.hparams.update(columns)
        names = [[value] if isinstance(value, str) else value or [] for value in columns.values()]
        self.read_as_text(*itertools.chain(*names))
        self._tables.clear()  # Cells that look like numbers were read as numbers.

    # ------------------------------------------------------------------------------------------------------ splits

    def setup(self, stage: str) -> None:
        """Tokenise what the stage needs, with the tokenizer of the trainer's model."""
        if self.caches:  # Raise before the rows are read.
            self.frozen_prefix()
        with self.first_process_first():
            self.before_splits()
            if stage == "predict":
                tables = self._tables_to_predict()
                self.predicted, self.set_names["predict"] = list(tables.values()), list(tables)
                self.splits["predict"] = [self._to_predict(table) for table in self.predicted]
                return
            names = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]
            if stage == "fit" and self._tests_after_fit:  # Errors in the test rows then show before training.
                names.append("test")
            for split in names:
                if split not in self.splits:
                    sets = self.sets(split)
                    self.set_names[split] = list(sets)
                    self.splits[split] = [self._chosen(split, name, *source) for name, source in sets.items()]
            self.findings.add_unread(unread_files(self.path, self._names_read(), self.config))

    def before_splits(self) -> None:
        """Check keys and find the classes before the first split is read. A task overrides this method."""

    def build(self, split: str, table: Table, rows: Tensor) -> TokenDataset:
        """Return a data set of some rows of a table, with targets unless the split is `predict`.

        Args:
            split: `train`, `val`, `test` or `predict`.
            table: The table.
            rows: Row numbers, (rows,) int64; `drop_bad_rows` removes the unusable rows.
        """
        raise NotImplementedError

    def drop_bad_rows(self, split: str, table: Table, rows: Tensor, bad: Mapping[int, BadRow]) -> Tensor:
        """Return the usable rows. Other rows are skipped, or in prediction recorded with the reason.

        Args:
            split: As for `build`.
            table: The table, for messages.
            rows: Rows of the split, (rows,) int64.
            bad: Unusable rows of the table, also of other splits.

        Raises:
            DataError: If more rows are bad than may be skipped, or all rows.
        """
        chosen = rows.tolist()
        unusable = {row: bad[row] for row in sorted(chosen) if row in bad}
        if split == "predict":
            self.failed.setdefault(table.where, {}).update({row: reason for row, (_, reason) in unusable.items()})
        else:
            for row, (key, reason) in unusable.items():
                advice = "Fix or drop such rows, or skip them with data.skip_bad_rows."
                error = DataError(f"data.{key}: row {row} of {table.where} {reason}. {advice}")
                self.findings.skip(SkippedRow(split, table.where, f"row {row}", reason), error)
        if len(unusable) == len(chosen):
            row, (key, reason) = next(iter(unusable.items()))
            raise DataError(
                f"data.{key}: row {row} of {table.where} {reason}, and no other row can be used. Fix the rows."
            )
        return rows[[row not in unusable for row in chosen]] if unusable else rows

    def check_columns(self, **keys: str | None) -> None:
        """Check that no column is named by two keys.

        Raises:
            DataError: If two keys name one column. The message has both keys.
        """
        key_of: dict[str, str] = {}
        for key, column in keys.items():
            if column is not None and key_of.setdefault(column, key) != key:
                raise DataError(f"data.{key}: {column} is data.{key_of[column]} already. Name another column.")

    def add_notes(self, table: Table) -> None:
        """Add a table's notes about assumptions in reading the rows to the findings."""
        for note in table.notes:
            self.findings.add(note)

    def check_test_split(self) -> None:
        """Check that there is a test split. The next fit then reads the test split before training.

        Raises:
            DataError: If there is no test split.
        """
        self.sets("test")
        self._tests_after_fit = True

    def split_names(self, split: str, suffix: str = "") -> tuple[str, ...]:
        """Return the spellings of a split's name, each with the suffix of one of the split's sets."""
        return tuple(f"{name}_{suffix}" if suffix else name for name in SPLITS[split])

    def _names_read(self) -> tuple[str, ...]:
        sets = [("train", ""), *((split, suffix) for split in ("val", "test") for suffix in self.suffixes)]
        return tuple(name for split, suffix in sets for name in self.split_names(split, suffix))

    def stored_tables(self, split: str) -> dict[str, Table]:
        """Return the tables of a split by suffix: MNLI has two tables, other data have one table without a suffix."""
        suffixes = ("",) if split == "train" else self.suffixes
        tables = {suffix: self._table(self.split_names(split, suffix)) for suffix in suffixes}
        return {suffix: table for suffix, table in tables.items() if table is not None}

    @property
    def predicts(self) -> bool:
        """Return True in the command `predict`, which reads no targets."""
        return self.trainer is not None and self.trainer.state.fn == "predict"

    def tables_of_any_split(self) -> dict[str, Table]:
        """Return the sets to predict, the training rows of a fit, or the rows of any other split.

        Raises:
            DataError: If there are no rows.
        """
        if self.predicts:
            return self._tables_to_predict()
        if self.trainer is None or self.trainer.state.fn == "fit":
            return {"": self.training_table()}
        return self.stored_tables("test") or self.stored_tables("val") or {"": self.training_table()}

    def training_table(self) -> Table:
        """Return the training rows.

        Raises:
            DataError: If there is no training split.
        """
        tables = self.stored_tables("train")
        if not tables:
            raise DataError(f"data.path: {self.path} has no train split. Give data with training rows.")
        return tables[""]

    def sets(self, split: str) -> dict[str, tuple[Table, bool]]:
        """Return the sets of a split by suffix. Each set is a table, and True if the table holds the training rows.

        Raises:
            DataError: If there is no set.
        """
        if split == "train" or split in self.shares():
            return {"": (self.training_table(), True)}
        validates = split == "val" or self.test_on_validation
        tables = self.stored_tables("val") if validates else self.stored_tables("test")
        if not tables:
            missing = "validation" if self.test_on_validation else split
            raise SplitError(
                f"data.path: {self.path} has no {missing} split. Skip the test (test_after_fit: false). If the data "
                "module has the keys, hold rows out (--data.test_fraction 0.1) or test on the validation split "
                "(--data.test_on_validation true)."
            )
        return {suffix: (table, False) for suffix, table in tables.items()}

    def shares(self) -> dict[str, float]:
        """Return the held-out shares of the training rows, by split."""
        shares = {"val": self.val_fraction} if self.test_on_validation or not self.stored_tables("val") else {}
        if self.test_fraction and not self.test_on_validation and not self.stored_tables("test"):
            shares["test"] = self.test_fraction
        return shares

    def _table(self, names: tuple[str, ...]) -> Table | None:
        """Return the table of the first existing name among spellings of a split, opened once.

        Raises:
            DataError: If the table has no rows.
        """
        if names not in self._tables:
            table = open_table(self.path, names, self.config, self.revision, self.reading)
            if table is not None and len(table) == 0:
                raise DataError(f"data.path: {table.where} has no rows. Give a table with rows.")
            self._tables[names] = None if table is None else match_columns(table, self._configured_columns())
        return self._tables[names]

    def _configured_columns(self) -> dict[str, str]:
        """Return the columns that keys name, by key."""
        texts = self.hparams.get("text_columns") or []
        columns = {f"text_columns[{number}]": column for number, column in enumerate(texts)}
        return columns | {
            key: value for key, value in self.hparams.items() if key.endswith("_column") and isinstance(value, str)
        }

    def _chosen(self, split: str, name: str, table: Table, from_training: bool) -> TokenDataset:
        limit = self.limits[split]
        rows = self.eligible_rows(table)
        shares = self.shares() if from_training else {}
        chosen = choose_rows(len(rows), split, shares, self.val_seed, limit)
        dataset = self.build(split, table, rows[chosen])
        source = self.source(table)
        if split in shares:
            source += f", the share of {shares[split]:g} held out with val_seed {self.val_seed}"
        elif shares:
            held = " and ".join(f"{share:g} for {name}" for name, share in shares.items())
            source += f", left after holding out {held} (val_seed {self.val_seed})"
        if limit is not None:
            source += f", at most {limit:,} of these rows"
        self.findings.add_split(f"{split} {name}".strip(), len(dataset), source)
        self.add_notes(table)
        return dataset

    def source(self, table: Table) -> str:
        """Return where the rows of a table are from, for the report of a fit."""
        return table.source or table.where

    def eligible_rows(self, table: Table) -> Tensor:
        """Return the rows of a table from which a split is chosen, (rows,) int64."""
        return torch.arange(len(table))

    def _to_predict(self, table: Table) -> TokenDataset:
        rows = torch.arange(len(table))
        dataset = self.build("predict", table, rows)
        failed = self.failed.get(table.where)
        if failed:
            dataset.numbers = rows[[row not in failed for row in rows.tolist()]]
        self.findings.add_split("predict", len(dataset), table.source or table.where)
        self.add_notes(table)
        return dataset

    def failed_rows(self, file: int) -> list[dict[str, Any]]:
        """Return the rows of a table that cannot be predicted: `index`, and `error` with the reason."""
        failed = self.failed.get(self.predicted[file].where, {})
        return [{"index": row, "error": reason} for row, reason in failed.items()]

    def _tables_to_predict(self) -> dict[str, Table]:
        if self.predict_path is not None:
            table = open_file(self.predict_path, "predict_path", self.reading)
            return {"": match_columns(table, self._configured_columns())}
        tables = self.stored_tables("test")
        if not tables:
            raise DataError(
                f"data.predict_path: {self.path} has no test split, and predict does not read held-out rows. "
                "Name a file of rows to predict."
            )
        return tables

    # ------------------------------------------------------------------------------------------------------ tokens

    @property
    def text_model(self) -> TextModel:
        """Return the trainer's model.

        Raises:
            DataError: If the model has no tokenizer.
        """
        assert self.trainer is not None
        model = self.trainer.lightning_module
        if not isinstance(model, TextModel):
            raise DataError(f"{type(self).__name__} needs a model that has a tokenizer, such as TextClassifier.")
        return model

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the trainer's model."""
        return self.text_model.tokenizer

    def warn_of_truncated_rows(self, tokens: datasets.Dataset, table: Table, limit: int) -> None:
        """Warn if rows reach the limit of tokens, since these rows may be truncated."""
        if cut := int((lengths_of(tokens) >= limit).sum()):
            _log.warning(f"{cut:,} of {counted(len(tokens), 'row')} of {table.where} may be cut to {limit} tokens.")

    def check_length(self, key: str, length: int) -> None:
        """Check that the model has positions for a length.

        Raises:
            DataError: If the model has fewer positions. The message has `key` and the limit.
        """
        limit = self.text_model.position_limit
        if limit is not None and length > limit:
            raise DataError(
                f"data.{key}: {length} tokens are more than the backbone's {limit} positions. Use {limit} or less."
            )

    def collate(self) -> Collate:
        """Return the function that makes a padded batch.

        The function holds no trainer, since workers that do not fork pickle the function.
        """
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------------- loaders

    def _loaders(self, split: str) -> list[DataLoader[Any]]:
        return [
            self.evaluation_loader(d, d.lengths if self.bucket_by_length else None, self.collated(f"{split} {s}", d))
            for d, s in zip(self.splits[split], self.set_names[split], strict=True)
        ]

    def collated(self, name: str, rows: TokenDataset, collate: Collate | None = None) -> Collate:
        """Return the function that makes a batch, with the cached output of the frozen prefix if there is a cache.

        Args:
            name: Name of the split, for messages.
            rows: Rows of the split.
            collate: Makes a batch of rows; None takes `self.collate()`.
        """
        collate = collate or self.collate()
        if not self.caches:
            return collate
        return self.cached(name.strip(), rows, rows.digest(), rows.lengths, self.collate(), collate)

    def evaluated_training_rows(self) -> tuple[TokenDataset, Tensor | None, Collate]:
        """Return the training rows, with the lengths and the collation for their evaluation."""
        data = self.splits["train"][0]
        collate = self.collate()
        if "train" in self.cached_states:
            collate = WithHidden(collate, self.cached_states["train"])
        return data, data.lengths if self.bucket_by_length else None, collate

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training rows, shuffled, in batches of similar length if `bucket_by_length` is set."""
        data = self.splits["train"][0]
        lengths = data.lengths if self.bucket_by_length else None
        return self.train_loader(data, lengths, self.collated("train", data), data.targets.get("label"))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each validation set."""
        return self._loaders("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each test set."""
        return self._loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each set to predict."""
        return self._loaders("predict")


class TrainingTextData(TextData):
    """Texts to train on, with a share of the rows held out for validation.

    Args:
        bucket_by_length: If true, samples of similar length share a batch, which saves most of the padding.
        cache_prefix: If true, a fit computes the output of the model's frozen prefix (embeddings, and the blocks below
            `model.adapter.layers`) once for each row, in eval mode. Each epoch and later runs read the output from
            disk.
        test_on_validation: If true, the validation split serves as the test split, and a held-out share of the training
            rows as the validation split. Use this key for data without a test split, and for GLUE, whose test labels
            are hidden.
        val_fraction: Share of the training rows held out when there is no validation split, in (0, 1).
        test_fraction: Share of the training rows held out when there is no test split, in [0, 1); 0 holds out none.
        val_seed: Seed of both shares, separate from the run's seed, so that all runs hold out the same rows.
        max_train_samples: Size of a seeded sample of the training rows, for quick trials; None takes all rows.
    """

    def __init__(
        self,
        path: str,
        bucket_by_length: bool = True,
        cache_prefix: bool = False,
        test_on_validation: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_seed: int = 0,
        max_train_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        self.bucket_by_length, self.cache_prefix = bucket_by_length, cache_prefix
        self.test_on_validation = test_on_validation
        self.val_fraction, self.test_fraction, self.val_seed = val_fraction, test_fraction, val_seed
        self.limits["train"] = max_train_samples
        check_limits(self.limits)
        check_fraction("val_fraction", val_fraction)
        if test_fraction:
            check_fraction("test_fraction", test_fraction)
