"""Images for classification, in the preprocessing of the backbone that looks at them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.transforms import v2

from datamodules.base import ResumableDataModule
from datamodules.batching import Draw, seeded
from datamodules.errors import DataError
from datamodules.image_sources import ImageTable, open_folder, open_split

Transform = Callable[[Tensor], Tensor]


class ImageClassificationData(ResumableDataModule):
    """Labelled images from the hub, Parquet, CIFAR-10's own folder, or a folder of image files.

    Images are decoded once to uint8 and kept in memory when they fit; augmentation runs on these tensors; the batch is
    normalised with the backbone's own mean and deviation. Batches are dicts of `image` (batch, 3, size, size) and
    `label` (batch,) int64, in prediction of `image` and `name`.

    Args:
        path: A data set's name on the hub, a directory of Parquet in the hub's columns, a directory with
            cifar-10-batches-py, or a folder of images: one folder a class, below train/, val/ and test/ or without.
        batch_size: Images a step and process, at least 1.
        num_workers: Processes that load, each; 0 loads in the training process, which is fast enough for small images.
        val_fraction: Share of the training images held out when the data has no validation split, in (0, 1).
        val_seed: Seed of that split, apart from the run's seed so that runs compare on the same images.
        crop_scale: Share of the area that a training crop covers, [least, most]; [1, 1] crops nothing.
        horizontal_flip: Whether training images are mirrored half of the time. Not for digits or text.
        memory_limit_gb: Decoded images are kept in memory up to this many GiB for each split, and decoded anew beyond.
        max_train_samples: Seeded sample of the training images, for trying out; None takes all.
        max_val_samples: The same for validation.
        max_test_samples: The same for testing.
        image_column: Column of the images; None takes the first of img, image.
        label_column: Column of the labels; None takes the first of label, labels, fine_label.
        predict_path: Folder of images for `predict`.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        val_seed: int = 0,
        crop_scale: tuple[float, float] = (0.6, 1.0),
        horizontal_flip: bool = True,
        memory_limit_gb: float = 4.0,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        max_test_samples: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()
        limits = {"train": max_train_samples, "val": max_val_samples, "test": max_test_samples}
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise DataError(f"data.max_{name}_samples: {limit} must be 1 or more, or null for all.")
        if not 0 < val_fraction < 1:
            raise DataError(f"data.val_fraction: {val_fraction} must lie in (0, 1).")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise DataError(f"data.crop_scale: {list(crop_scale)} must be two numbers, 0 < least <= most <= 1.")
        self.path, self.predict_path = path, predict_path
        self.val_fraction, self.val_seed = val_fraction, val_seed
        self.crop_scale, self.horizontal_flip = crop_scale, horizontal_flip
        self.memory_limit_gb = memory_limit_gb
        self.limits = limits
        self.columns = (image_column, label_column)
        self.class_names: list[str] | None = None
        self.splits: dict[str, ImageDataset] = {}

    # ----------------------------------------------------------------------------------------------------- splits

    def setup(self, stage: str) -> None:
        """Read and decode what the stage needs."""
        assert self.trainer is not None
        config = getattr(self.trainer.lightning_module, "preprocessing", None)
        if config is None:
            raise DataError("ImageClassificationData needs a model that says how it wants its images (preprocessing).")
        self.mean, self.std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        evaluation, training = self._transforms(config)
        if stage == "predict":
            if self.predict_path is None:
                raise DataError("data.predict_path: name the folder of images to predict.")
            self.splits["predict"] = ImageDataset(open_folder(self.predict_path), None, evaluation)
            return
        needed = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]
        for name in needed:
            if name not in self.splits:
                table, rows = self._rows(name)
                transform = training if name == "train" else evaluation
                dataset = ImageDataset(table, rows, transform, seed=torch.initial_seed())
                dataset.keep_in_memory(self.memory_limit_gb, name)
                self.splits[name] = dataset
                self.class_names = self.class_names or table.class_names

    def _rows(self, name: str) -> tuple[ImageTable, Tensor]:
        """The table that a split is in, and the rows that are its own."""
        table = open_split(self.path, name, *self.columns)
        held_out = None
        if name in ("train", "val") and (name == "train" or table is None):
            has_own = table is not None if name == "val" else open_split(self.path, "val", *self.columns) is not None
            if not has_own:
                table = table or open_split(self.path, "train", *self.columns)
                assert table is not None
                order = torch.randperm(len(table), generator=torch.Generator().manual_seed(self.val_seed))
                size = max(1, round(self.val_fraction * len(table)))
                held_out = order[:size] if name == "val" else order[size:]
        if table is None:
            raise DataError(f"data.path: {self.path} has no {name} split; run without it (test_after_fit: false).")
        rows = torch.arange(len(table)) if held_out is None else held_out
        limit = self.limits[name]
        if limit is not None and limit < len(rows):
            keep = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.val_seed))[:limit]
            rows = rows[keep]
        return table, rows

    def _transforms(self, config: dict[str, Any]) -> tuple[Transform, Transform]:
        """Evaluation and training transforms of uint8 images, as timm prepares them for this backbone."""
        size = config["input_size"][1:]
        kind = {"interpolation": v2.InterpolationMode(config["interpolation"]), "antialias": True}
        resized = [math.floor(s / config["crop_pct"]) for s in size]
        evaluation = v2.Compose([v2.Resize(min(resized), **kind), v2.CenterCrop(size)])
        if tuple(self.crop_scale) == (1.0, 1.0):
            steps: list[Any] = [evaluation]
        else:
            steps = [v2.RandomResizedCrop(size, scale=self.crop_scale, **kind)]
        if self.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        return evaluation, v2.Compose(steps)

    # ---------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled and augmented."""
        return self.train_loader(self.splits["train"], self.splits["train"].seed)

    def val_dataloader(self) -> StatefulDataLoader:
        """In order."""
        return self.evaluation_loader(self.splits["val"])

    def test_dataloader(self) -> StatefulDataLoader:
        """In order."""
        return self.evaluation_loader(self.splits["test"])

    def predict_dataloader(self) -> StatefulDataLoader:
        """In the order of the names."""
        return self.evaluation_loader(self.splits["predict"])

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Normalise a batch on its device: uint8 in, float32 out."""
        image = batch["image"].float().div_(255)  # (batch, 3, height, width), in [0, 1]
        mean, std = self.mean.to(image.device), self.std.to(image.device)
        return {**batch, "image": image.sub_(mean[:, None, None]).div_(std[:, None, None])}


class ImageDataset(Dataset[dict[str, Any]]):
    """Rows of a table of images, transformed.

    Args:
        table: The images.
        rows: Rows that belong to this data set, (n,); None takes all.
        transform: Applied to (3, height, width) uint8.
        seed: Augmentation is a function of (seed, epoch, index).
    """

    def __init__(self, table: ImageTable, rows: Tensor | None, transform: Transform, seed: int = 0) -> None:
        self.table = table
        self.rows = torch.arange(len(table)) if rows is None else rows
        self.transform = transform
        self.seed = seed
        self.images: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def keep_in_memory(self, limit_gb: float, name: str) -> None:
        """Decode all images now if, judged by the first 64, they take at most `limit_gb` GiB."""
        sample = [self._decode(i) for i in range(min(64, len(self)))]
        if sum(image.nbytes for image in sample) / len(sample) * len(self) > limit_gb * 2**30:
            return
        rest = range(len(sample), len(self))
        shown = track(rest, f"Decoding {name}", transient=True, disable=len(rest) < 5000)
        self.images = sample + [self._decode(i) for i in shown]

    def _decode(self, index: int) -> Tensor:
        return self.table.decode(int(self.rows[index]))

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """The image of an index; of a pair (index, epoch) with the augmentation of that epoch."""
        index, epoch = key if isinstance(key, tuple) else (key, None)
        image = self._decode(index) if self.images is None else self.images[index]
        row = int(self.rows[index])
        item: dict[str, Any] = (
            {"label": int(self.table.labels[row])} if len(self.table.labels) else {"name": self.table.names[row]}
        )
        if epoch is None:
            return {"image": self.transform(image), **item}
        with seeded(self.seed, epoch, index):
            return {"image": self.transform(image), **item}
