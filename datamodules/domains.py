"""DomainBed's data sets: train on one environment; test on its held-out share and on every other environment."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.errors import DataError, counted
from datamodules.image_classification import ImageData, ImageDataset, Transform
from datamodules.sources.findings import listed
from datamodules.sources.image_folders import ImageFiles, find_images, read_layout
from datamodules.sources.images import ImageTable, from_image_folder
from datamodules.sources.splits import check_fraction, choose_rows, split_of

LAYOUT = "DomainBed's layout is ROOT/environment/class/image.jpg."


class DomainData(ImageData):
    """One environment of VLCS, PACS, OfficeHome, TerraIncognita or any other data set in DomainBed's layout.

    A share of the training environment is held out for the in-domain test. `val_fraction` of the rest is held out to
    choose the checkpoint, so that no test image influences the choice. Every image of the other environments is tested
    (Gulrajani and Lopez-Paz 2021).

    The class folders of the training environment define the classes. Classes that another environment lacks are logged.
    A class that the training environment lacks is an error.

    Args:
        path: Directory with one folder for each environment, each with one folder for each class.
        environment: Environment to train on, the name of its folder.
        test_fraction: Share of the training environment's images that is held out for the in-domain test, in (0, 1).
    """

    def __init__(self, path: str, environment: str, test_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        check_fraction("test_fraction", test_fraction)
        self.environment, self.test_fraction = environment, test_fraction

    # ----------------------------------------------------------------------------------------------- environments

    @staticmethod
    def check_source(path: str) -> None:
        """Check that `path` is a directory.

        Raises:
            DataError: If there is no such directory.
        """
        if not Path(path).is_dir():
            raise DataError(f"data.path: {path} is not a directory. {LAYOUT}")

    @cached_property
    def environments(self) -> list[str]:
        """Return the names of all environments, sorted.

        Raises:
            DataError: If `path` is no directory, if there are fewer than two environments, if the folders are splits,
                if no folder has the name `environment`, or if two environments would be logged under one name.
        """
        self.check_source(self.path)
        root = Path(self.path)
        files = find_images(root, "path")
        environments = sorted({parts[0] for parts in files.images if len(parts) > 2})
        if splits := [name for name in environments if split_of(name)]:
            raise DataError(
                f"data.path: {root} has splits ({listed(splits)}) where environments are expected. {LAYOUT} For one "
                "data set with splits use datamodules.image_classification.ImageClassificationData."
            )
        if len(environments) < 2:
            raise DataError(
                f"data.path: {root} holds {counted(len(environments), 'environment')}, and two or more are needed. "
                f"{LAYOUT} The directory holds {files.contents()}."
            )
        if self.environment not in environments:
            raise DataError(
                f"data.environment: {root} has no environment {self.environment!r}. Choose one of "
                f"{listed(environments)}."
            )
        logged = [logged_name(name) for name in environments]
        if clashing := [
            name
            for name, metric in zip(environments, logged, strict=True)
            if metric == "ood" or logged.count(metric) > 1
        ]:
            raise DataError(
                f"data.path: the metrics of {listed(clashing)} would be logged under one name, or as `ood`. Rename "
                f"these folders of {root}."
            )
        if stray := sum(len(parts) < 3 for parts in files.images):
            self.findings.add(f"left out of {root}: {counted(stray, 'image')} in no class folder of an environment")
        return environments

    @property
    def others(self) -> list[str]:
        """Return the names of the environments that are only tested."""
        return [name for name in self.environments if name != self.environment]

    @property
    def test_sets(self) -> list[str]:  # type: ignore[override]  # unknown before the folder is read
        """Return the names of the splits that are tested: the in-domain test, then each other environment."""
        return ["test", *self.others]

    @property
    def domain_names(self) -> list[str]:
        """Return the names of the other environments, as the metrics contain them."""
        return [logged_name(name) for name in self.others]

    # ----------------------------------------------------------------------------------------------------- splits

    def _table(self, name: str) -> ImageTable | None:
        """Return the images for a split. All splits of the training environment share one table."""
        environment = self.environment if name in ("train", "val", "test") else name
        if environment not in self._tables:
            folders = {known: Path(self.path, known) for known in self.environments}
            files = find_images(folders[environment], "path")
            self._check_layout(files)
            self._tables[environment] = from_image_folder(files, "train", self.findings)
        return self._tables[environment]

    def _check_layout(self, files: ImageFiles) -> None:
        """Check that an environment holds folders of classes directly.

        Raises:
            DataError: If other folders, such as splits, contain the folders of classes. The message names the folders.
        """
        layout = read_layout(files)
        if list(layout.splits) != ["train"] or layout.names["train"] != ".":
            names = listed(sorted(name for name in layout.names.values() if name != "."))
            raise DataError(f"data.path: {files.root} has {names} above the folders of its classes. {LAYOUT}")

    def _rows(self, name: str) -> tuple[ImageTable, Tensor, str]:
        """Return the table and the rows of a split, and a description of where the rows are from."""
        table = self._require(name)
        size, limit, source = len(table), self.limits.get(name, self.limits["test"]), table.where
        if name not in ("train", "val", "test"):
            rows = choose_rows(size, name, {}, self.val_seed, limit)
            source += ", not the training environment"
        elif name == "test":
            rows = choose_rows(size, "test", {"test": self.test_fraction}, self.val_seed, limit)
            source += f", held out (test_fraction {self.test_fraction}, val_seed {self.val_seed})"
        else:
            kept = choose_rows(size, "train", {"test": self.test_fraction}, self.val_seed, None)
            rows = kept[choose_rows(len(kept), name, {"val": self.val_fraction}, self.val_seed, limit)]
            share = "held out" if name == "val" else "not held out"
            source += f", {share} (test_fraction {self.test_fraction}, then val_fraction {self.val_fraction})"
        if limit is not None and len(rows) == limit:
            source += f", at most {limit}"
        return table, rows, source

    def _open(self, name: str, transform: Transform) -> ImageDataset:
        """Read a split or an environment, and log the classes that an environment lacks."""
        dataset = super()._open(name, transform)
        if name in self.others:
            known = self.class_names or []
            present = set(dataset.table.labels.unique().tolist())
            missing = [class_name for label, class_name in enumerate(known) if label not in present]
            if missing:
                self.findings.add(f"{name} has no images of {counted(len(missing), 'class')}: {listed(missing)}")
        return dataset

    def test_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Return a loader for the in-domain test, then a loader for each other environment. No loader shuffles."""
        return [self.evaluation_loader(self.splits[name]) for name in self.test_sets]


def logged_name(environment: str) -> str:
    """Return an environment's name as a part of a metric's name: `Real World` is `Real_World`."""
    return re.sub(r"[^\w.-]+", "_", environment)
