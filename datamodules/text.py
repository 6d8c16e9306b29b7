"""Parts that data modules of texts share: splits of tables, limits of length, loaders over length buckets."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Collate, ResumableDataModule
from datamodules.contract import TextModel
from datamodules.errors import DataError, SplitError
from datamodules.loading.batching import Draw
from datamodules.loading.prefix_cache import WithHidden
from datamodules.sources.findings import SkippedRow
from datamodules.sources.splits import SPLITS, check_fraction, check_limits, choose_rows
from datamodules.sources.tables import Reading, Table, open_file, open_table, unread_files
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


class NumberedRows(TokenDataset):
    """Rows of tokens whose `index` is their row in the table: that of rows to predict, some of which are left out.

    Args:
        rows: The rows of tokens.
        numbers: Row of each in the table, (rows,) int64.
    """

    def __init__(self, rows: TokenDataset, numbers: Tensor) -> None:
        super().__init__(rows.data, rows.targets, rows.texts)
        self.numbers = numbers

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[dict[str, Any]]:
        """Return the rows of a batch."""
        return [row | {"index": int(self.numbers[row["index"]])} for row in super().__getitems__(keys)]


class TextData(ResumableDataModule):
    """Parts that data modules of texts share: splits of tables, limits of length, loaders over length buckets.

    A task implements `build`, which makes a data set of a table's rows, and `collate`. It names the columns whose cells
    are text as it is written by `read_as_written`.

    Rows are chosen first, by `val_seed` and the limits, and bad rows among them are skipped then: `skip_bad_rows`
    changes neither which rows are held out nor the order of the good rows.

    Args:
        path: A data set's name on the hub; a directory of train.*, validation.* and test.* as Parquet, CSV or JSONL;
            or one such file of training rows.
        config: The data set's configuration: on the hub, or a folder in the directory.
        revision: Branch, tag or commit on the hub, such as `refs/convert/parquet`.
        max_val_samples: Seeded sample of the validation rows, of each of their sets, for trying out; None takes all.
        max_test_samples: The same for testing.
        predict_path: File of rows for `predict`; None takes the test split.
        encoding: Encoding of CSV, TSV and JSONL files, such as `utf-8`, `cp1252` or `utf-16`.
    """

    suffixes: tuple[str, ...] = ("",)  # of the validation and test splits that a data set has several of
    # what a data module without training rows does with them
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
        self.predicted: list[Table] = []
        self.failed: dict[str, dict[int, str]] = {}  # rows of each table that cannot be predicted, with the reason
        self._tests_after_fit = False
        self._tables: dict[tuple[str, ...], Table | None] = {}

    def read_as_written(self, *columns: str | None) -> None:
        """Read the cells of some columns of CSV and TSV as text, whatever they look like."""
        self.reading = replace(self.reading, as_written=tuple(column for column in columns if column is not None))

    def keep_columns(self, **columns: str | list[str] | None) -> None:
        """Keep guessed columns in the checkpoint, and read their cells as text from now on.

        Args:
            columns: Column or columns by key.
        """
        self.hparams.update(columns)
        names = [[value] if isinstance(value, str) else value or [] for value in columns.values()]
        self.read_as_written(*itertools.chain(*names))
        self._tables.clear()  # cells that look like numbers were read as numbers

    # ------------------------------------------------------------------------------------------------------ splits

    def setup(self, stage: str) -> None:
        """Tokenise what the stage needs, with the tokenizer of the trainer's model."""
        if self.caches:  # before the rows are read
            self.frozen_prefix()
        with self.first_process_first():
            self.before_splits()
            if stage == "predict":
                tables = self._tables_to_predict()
                self.predicted, self.set_names["predict"] = list(tables.values()), list(tables)
                self.splits["predict"] = [self._to_predict(table) for table in self.predicted]
                return
            names = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]
            if stage == "fit" and self._tests_after_fit:  # what is wrong with its rows shows before training
                names.append("test")
            for split in names:
                if split not in self.splits:
                    sets = self.sets(split)
                    self.set_names[split] = list(sets)
                    self.splits[split] = [self._chosen(split, name, *which) for name, which in sets.items()]
            self.findings.add_unread(unread_files(self.path, self._names_read(), self.config))

    def before_splits(self) -> None:
        """Check keys and learn classes before the first split is read; a task overrides this."""

    def build(self, split: str, table: Table, rows: Tensor) -> TokenDataset:
        """Return a data set of some rows of a table, with their targets unless they are to be predicted.

        Args:
            split: `train`, `val`, `test` or `predict`.
            table: The table.
            rows: Rows of it, (rows,) int64, of which `without_bad` takes out those that cannot be used.
        """
        raise NotImplementedError

    def without_bad(self, split: str, table: Table, rows: Tensor, bad: Mapping[int, BadRow]) -> Tensor:
        """Return the rows that can be used; others are skipped, or in prediction kept with the reason.

        Args:
            split: As for `build`.
            table: The table, for messages.
            rows: Rows of the split, (rows,) int64.
            bad: Rows that cannot be used, among others.

        Raises:
            DataError: If more are bad than may be skipped, or all.
        """
        chosen = rows.tolist()
        found = {row: bad[row] for row in sorted(chosen) if row in bad}
        if split == "predict":
            self.failed.setdefault(table.where, {}).update({row: reason for row, (_, reason) in found.items()})
        else:
            for row, (key, reason) in found.items():
                advice = "Fix or drop such rows, or skip them with data.skip_bad_rows."
                error = DataError(f"data.{key}: row {row} of {table.where} {reason}. {advice}")
                self.findings.skip(SkippedRow(split, table.where, f"row {row}", reason), error)
        if len(found) == len(chosen):
            row, (key, reason) = next(iter(found.items()))
            raise DataError(f"data.{key}: row {row} of {table.where} {reason}, and no other can be used.")
        return rows[[row not in found for row in chosen]] if found else rows

    def check_columns(self, **keys: str | None) -> None:
        """Check that no column is named by two keys.

        Raises:
            DataError: With both.
        """
        known: dict[str, str] = {}
        for key, column in keys.items():
            if column is not None and known.setdefault(column, key) != key:
                raise DataError(f"data.{key}: {column} is data.{known[column]} already; name another column.")

    def add_notes(self, table: Table) -> None:
        """Add what was assumed in reading a table to the findings."""
        for note in table.notes:
            self.findings.add(note)

    def check_test_split(self) -> None:
        """Check before a long training that there is a test split, and have the next fit read it before training.

        Raises:
            DataError: If there is none.
        """
        self.sets("test")
        self._tests_after_fit = True

    def split_names(self, split: str, suffix: str = "") -> tuple[str, ...]:
        """Return the spellings of a split, with the suffix of one of its sets."""
        return tuple(f"{name}_{suffix}" if suffix else name for name in SPLITS[split])

    def _names_read(self) -> tuple[str, ...]:
        sets = [("train", ""), *((split, suffix) for split in ("val", "test") for suffix in self.suffixes)]
        return tuple(name for split, suffix in sets for name in self.split_names(split, suffix))

    def stored(self, split: str) -> dict[str, Table]:
        """Return the sets that a split is stored in, by suffix: MNLI's two, otherwise one without suffix."""
        suffixes = ("",) if split == "train" else self.suffixes
        found = {s: self._table(self.split_names(split, s)) for s in suffixes}
        return {s: table for s, table in found.items() if table is not None}

    @property
    def predicts(self) -> bool:
        """Return True in a prediction, for which no targets are read."""
        return self.trainer is not None and self.trainer.state.fn == "predict"

    def tables_of_any_split(self) -> dict[str, Table]:
        """Return the sets to predict, or else the training rows, or else those of another split that is there.

        Raises:
            DataError: If there are none.
        """
        if self.predicts:
            return self._tables_to_predict()
        return self.stored("train") or self.stored("val") or self.stored("test") or {"": self.training_table()}

    def training_table(self) -> Table:
        """Return the training rows.

        Raises:
            DataError: If there are none.
        """
        tables = self.stored("train")
        if not tables:
            raise DataError(f"data.path: {self.path} has no train split.")
        return tables[""]

    def sets(self, split: str) -> dict[str, tuple[Table, bool]]:
        """Return the sets of a split by suffix, each with whether its table is that of the training rows.

        Raises:
            DataError: If there is none.
        """
        if split == "train" or split in self.shares():
            return {"": (self.training_table(), True)}
        validates = split == "val" or self.test_on_validation
        tables = self.stored("val") if validates else self.stored("test")
        if not tables:
            missing = "validation" if self.test_on_validation else split
            raise SplitError(
                f"data.path: {self.path} has no {missing} split. Leave it out (test_after_fit: false), or where there "
                "is a key for it, hold rows out (--data.test_fraction 0.1) or test on the validation split "
                "(--data.test_on_validation true)."
            )
        return {suffix: (table, False) for suffix, table in tables.items()}

    def shares(self) -> dict[str, float]:
        """Return the shares of the training rows that are held out, by the split that they make up."""
        shares = {"val": self.val_fraction} if self.test_on_validation or not self.stored("val") else {}
        if self.test_fraction and not self.test_on_validation and not self.stored("test"):
            shares["test"] = self.test_fraction
        return shares

    def _table(self, names: tuple[str, ...]) -> Table | None:
        """Return the first split that is there among some names, opened once.

        Raises:
            DataError: If it has no rows.
        """
        if names not in self._tables:
            table = open_table(self.path, names, self.config, self.revision, self.reading)
            if table is not None and len(table) == 0:
                raise DataError(f"data.path: {table.where} has no rows.")
            self._tables[names] = table
        return self._tables[names]

    def _chosen(self, split: str, name: str, table: Table, from_training: bool) -> TokenDataset:
        limit = self.limits[split]
        rows = self.eligible_rows(table)
        shares = self.shares() if from_training else {}
        chosen = choose_rows(len(rows), split, shares, self.val_seed, limit)
        made = self.build(split, table, rows[chosen])
        source = self.source(table)
        if split in shares:
            source += f", the share of {shares[split]:g} held out with val_seed {self.val_seed}"
        elif shares:
            held = " and ".join(f"{share:g} for {name}" for name, share in shares.items())
            source += f", without what is held out ({held}, val_seed {self.val_seed})"
        if limit is not None:
            source += f", at most {limit:,} of them"
        self.findings.add_split(f"{split} {name}".strip(), len(made), source)
        self.add_notes(table)
        return made

    def source(self, table: Table) -> str:
        """Return where the rows of a table are from, for the report of a fit."""
        return table.source or table.where

    def eligible_rows(self, table: Table) -> Tensor:
        """Return the rows of a table that a split is chosen from, (rows,) int64."""
        return torch.arange(len(table))

    def _to_predict(self, table: Table) -> TokenDataset:
        rows = torch.arange(len(table))
        made = self.build("predict", table, rows)
        failed = self.failed.get(table.where)
        if failed:
            made = NumberedRows(made, rows[[row not in failed for row in rows.tolist()]])
            self.findings.add(f"{len(failed):,} rows of {table.where} cannot be predicted; their column error says why")
        self.findings.add_split("predict", len(made), table.source or table.where)
        self.add_notes(table)
        return made

    def failed_rows(self, file: int) -> list[dict[str, Any]]:
        """Return the rows of a table that cannot be predicted: `index`, and `error` with the reason."""
        failed = self.failed.get(self.predicted[file].where, {})
        return [{"index": row, "error": reason} for row, reason in failed.items()]

    def _tables_to_predict(self) -> dict[str, Table]:
        if self.predict_path is not None:
            return {"": open_file(self.predict_path, "predict_path", self.reading)}
        tables = self.stored("test")
        if not tables:
            raise DataError(f"data.predict_path: {self.path} has no test split; name a file of rows to predict.")
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

    def warn_of_cut_rows(self, tokens: datasets.Dataset, table: Table, limit: int) -> None:
        """Warn if rows reach their limit of tokens."""
        if cut := int((lengths_of(tokens) >= limit).sum()):
            _log.warning(f"{cut:,} of {len(tokens):,} rows of {table.where} reach {limit} tokens and may be cut.")

    def check_length(self, key: str, length: int) -> None:
        """Check that a length is not above the positions of the model.

        Raises:
            DataError: Under the given key, with the limit.
        """
        limit = self.text_model.position_limit
        if limit is not None and length > limit:
            raise DataError(
                f"data.{key}: {length} tokens are more than the {limit} that the backbone has positions for."
            )

    def collate(self) -> Collate:
        """Return the function that makes a padded batch; it works without the trainer, for workers that do not fork."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------------- loaders

    def _loaders(self, split: str) -> list[DataLoader[Any]]:
        return [
            self.evaluation_loader(d, d.lengths if self.bucket_by_length else None, self.collated(f"{split} {s}", d))
            for d, s in zip(self.splits[split], self.set_names[split], strict=True)
        ]

    def collated(self, name: str, rows: TokenDataset, collate: Collate | None = None) -> Collate:
        """Return the function that makes a batch, with the kept output of the frozen prefix if there is to be one.

        Args:
            name: Of the split, for messages.
            rows: The rows.
            collate: Makes a batch of them; None takes the task's own.
        """
        collate = collate or self.collate()
        if not self.caches:
            return collate
        return self.cached(name.strip(), rows, rows.digest(), rows.lengths, self.collate(), collate)

    def evaluated_training_rows(self) -> tuple[TokenDataset, Tensor | None, Collate]:
        """Return the training rows with what their evaluation takes."""
        data = self.splits["train"][0]
        collate = self.collate()
        if "train" in self.kept_states:
            collate = WithHidden(collate, self.kept_states["train"])
        return data, data.lengths if self.bucket_by_length else None, collate

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training rows, shuffled, in batches of like length."""
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
        bucket_by_length: Whether samples of like length share a batch, which saves most of the padding.
        cache_prefix: Whether a fit computes the output of the model's frozen prefix (embeddings, and the blocks below
            `model.adapter.layers`) once a row, in eval mode, and reads it from disk in each epoch and in later runs.
        test_on_validation: Whether the validation split is tested on, and a share of the training rows is held out to
            validate on: for sets without a test split, and for GLUE, whose test labels are hidden.
        val_fraction: Share of the training rows held out when there is no validation split, in (0, 1).
        test_fraction: The same for testing, in [0, 1); 0 holds out none.
        val_seed: Seed of both shares, apart from the run's seed so that runs compare on the same rows.
        max_train_samples: Seeded sample of the training rows, for trying out; None takes all.
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
