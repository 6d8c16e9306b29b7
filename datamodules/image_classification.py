"""Image classification: labelled images, preprocessed for the backbone."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.progress import track
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from datamodules.base import Collate, ResumableDataModule
from datamodules.contract import DataKind, ImageModel
from datamodules.errors import DataError, SplitError, counted
from datamodules.loading.batching import Draw, derive_seed, index_of, seeded
from datamodules.loading.prefix_cache import WithHidden
from datamodules.sources.findings import Findings
from datamodules.sources.images import (
    ImageError,
    ImageTable,
    check_image_path,
    check_image_to_predict,
    open_images,
    open_split,
)
from datamodules.sources.splits import check_fraction, check_limits, choose_rows

Transform = Callable[[Tensor], Tensor]
_log = logging.getLogger(__name__)


class ImageData(ResumableDataModule):
    """Labelled images, decoded, augmented and normalised for the backbone.

    Images are decoded once to uint8 and kept in memory if they fit. Augmentation runs on these tensors. The batch is
    normalised with the backbone's mean and deviation. Batches are `datamodules.contract.ImageBatch`. A task
    implements `_table` and `_rows`.

    Args:
        path: The images.
        batch_size: Images in a batch of one process, at least 1.
        val_fraction: Share of the training images held out when the data have no validation split, in (0, 1).
        val_seed: Seed of the held-out images, separate from the run's seed, so that all runs hold out the same images.
        crop_scale: Smallest and largest share of the area that a training crop covers. With [1, 1], training images are
            cropped as in evaluation.
        horizontal_flip: If true, mirror half of the training images. Set to false for digits or text.
        randaugment: Number of random operations on each training image (RandAugment, Cubuk et al. 2020), at magnitude 9
            of 30; 0 for none.
        random_erasing: Probability with which a rectangle of a training image is erased (Zhong et al. 2020).
        mixup: Parameter of the Beta distribution with which pairs of training images are blended (Zhang et al. 2018),
            such as 0.2; 0 for never.
        cutmix: Parameter of the Beta distribution for rectangles pasted from image to image (Yun et al. 2019), such as
            1.0; 0 for never. If mixup and cutmix are above 0, each batch draws one of the two.
        cache_prefix: If true, a fit computes the output of the model's frozen prefix (embeddings, and the blocks below
            `model.adapter.layers`) once for each row, in eval mode. Each epoch and later runs read the output from
            disk. Training images must not be augmented: set crop_scale to [1, 1], horizontal_flip to false, and
            randaugment, random_erasing, mixup and cutmix to 0.
        memory_limit_gb: GiB of decoded images that each split and process keeps in memory. If a split is larger, its
            images are decoded in each epoch.
        max_train_samples: Size of a seeded sample of the training images, for quick trials; None takes all images.
        max_val_samples: Size of a seeded sample of the validation images; None takes all images.
        max_test_samples: Size of a seeded sample of each test set; None takes all images.
        predict_path: Image, folder of images or table of images for `predict`. A table is CSV, TSV, JSON, JSONL or
            Parquet, with a column of images or of their paths. Images that cannot be decoded get a row with their
            error.
    """

    kind = DataKind.IMAGES
    test_sets: Sequence[str] = ("test",)  # Names of the splits that are tested.
    columns: tuple[str | None, str | None] = (None, None)  # Columns of images and labels; None takes the usual names.

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        val_seed: int = 0,
        crop_scale: tuple[float, float] = (0.6, 1.0),
        horizontal_flip: bool = True,
        randaugment: int = 0,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        cache_prefix: bool = False,
        memory_limit_gb: float = 4.0,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        max_test_samples: int | None = None,
        predict_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.limits = {"train": max_train_samples, "val": max_val_samples, "test": max_test_samples}
        check_limits(self.limits)
        check_fraction("val_fraction", val_fraction)
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise DataError(f"data.crop_scale: {list(crop_scale)} must be two numbers, 0 < smallest <= largest <= 1.")
        if randaugment < 0:
            raise DataError(f"data.randaugment: {randaugment} must be 0 or more.")
        if not 0 <= random_erasing <= 1:
            raise DataError(f"data.random_erasing: {random_erasing} must lie in [0, 1].")
        for key, alpha in {"mixup": mixup, "cutmix": cutmix}.items():
            if not 0 <= alpha < math.inf:
                raise DataError(f"data.{key}: {alpha} must be finite, 0 or more.")
        augments = (
            horizontal_flip or tuple(crop_scale) != (1.0, 1.0) or any((randaugment, random_erasing, mixup, cutmix))
        )
        if cache_prefix and augments:
            raise DataError(
                "data.cache_prefix: training images are augmented, and the cache holds each image once. Set "
                "data.horizontal_flip to false, data.crop_scale to [1, 1] and the other keys of augmentation to 0, or "
                "data.cache_prefix to false."
            )
        self.randaugment, self.random_erasing, self.mixup, self.cutmix = randaugment, random_erasing, mixup, cutmix
        self.cache_prefix = cache_prefix
        self.path, self.predict_path = path, predict_path
        self.val_fraction, self.val_seed = val_fraction, val_seed
        self.crop_scale, self.horizontal_flip = crop_scale, horizontal_flip
        self.memory_limit_gb = memory_limit_gb
        self.class_names: list[str] | None = None
        self.class_counts: list[int] = []
        self.splits: dict[str, ImageDataset] = {}
        self._tables: dict[str, ImageTable | None] = {}
        self._tests_after_fit = False

    @classmethod
    def check_paths(cls, command: str, keys: Mapping[str, Any]) -> None:
        """Check that `predict_path` in `predict`, or else `path`, exists and is of the right kind.

        Raises:
            DataError: If the path is wrong.
        """
        if command == "predict":
            check_image_to_predict(keys["predict_path"], keys["adapter_column"])
        else:
            cls.check_source(keys["path"])

    @staticmethod
    def check_source(path: str) -> None:
        """Check that `path` is a directory or a name on the hub.

        Raises:
            DataError: If the path does not exist, or is a file.
        """
        check_image_path(path)

    # ----------------------------------------------------------------------------------------------------- splits

    def setup(self, stage: str) -> None:
        """Read and decode the images of a stage, with the preprocessing and the classes of the trainer's model."""
        assert self.trainer is not None
        model = self.trainer.lightning_module
        if not isinstance(model, ImageModel):
            raise DataError("ImageData needs a model of images. Use ImageClassifier.")
        if self.caches:  # Raise before the images are read.
            self.frozen_prefix()
        self.config = config = model.preprocessing
        self.mean, self.std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        self.evaluation, training = self._transforms(config)
        if stage == "predict":
            check_image_to_predict(self.predict_path, self.adapter_column)
            assert self.predict_path is not None
            table = open_images(self.predict_path, self.columns[0], self.adapter_column, self.findings)
            self.predicted = [] if table.source is None else [table.source]
            self.findings.add_split("predict", len(table), table.where)
            self.splits["predict"] = ImageDataset(table, None, self.evaluation)
            return
        self.class_names = self.model_classes or self._require("train").class_names
        names = {"fit": ["train", "val"], "validate": ["val"], "test": self.test_sets}[stage]
        if stage == "fit" and self._tests_after_fit:  # Errors in the test images then show before training.
            names = [*names, *self.test_sets]
        for name in names:
            transform = training if name == "train" else self.evaluation
            if name in self.splits:
                self.splits[name].transform = transform
            else:
                self.splits[name] = self._open(name, transform)

    def _open(self, name: str, transform: Transform) -> ImageDataset:
        """Read a split, and decode it if it fits in memory."""
        assert self.class_names is not None
        table, rows, source = self._rows(name)
        table = table.with_classes(self.class_names, f"the {name} split of {self.path}")
        dataset = ImageDataset(table, rows, transform)
        dataset.skip_unlabelled(name, self.findings)
        if name in self.test_sets or not self.caches:  # A fit with a cache reads each image once at most.
            dataset.keep_in_memory(self.memory_limit_gb, name, self.findings)
        if dataset.images is None and self.findings.skip_bad_rows:
            _log.info(
                f"data.skip_bad_rows: each image of {name} ({len(dataset):,}) is decoded once to find bad images, by "
                f"{counted(max(1, self.num_workers), 'process')} (data.num_workers)."
            )
            checks = self._loader(DecodingErrors(dataset), range(len(dataset)), list)
            errors = [(i, error) for i, error in enumerate(error for batch in checks for error in batch) if error]
            dataset.skip_undecodable(errors, name, self.findings)
        if len(dataset) == 0:
            raise DataError(
                f"data.path: no image of the {name} split of {self.path} can be used. Give labelled images."
            )
        self.findings.add_split(name, len(dataset), source)
        if name == "train" or "train" not in self.splits:
            self.class_counts = table.labels[dataset.rows].bincount(minlength=len(self.class_names)).tolist()
            self.findings.add_classes(self.class_names, self.class_counts)
        return dataset

    def _table(self, name: str) -> ImageTable | None:
        """Return the table of a split, opened once; None if the data have no such split."""
        raise NotImplementedError

    def _require(self, name: str) -> ImageTable:
        table = self._table(name)
        if table is None:
            raise SplitError(
                f"data.path: {self.path} has no {name} split. Give data with this split. Without a test split, skip "
                "the test (test_after_fit: false), or hold images out (--data.test_fraction 0.1, if the data module "
                "has this key)."
            )
        return table

    def check_test_split(self) -> None:
        """Check that there is a test split. The next fit then reads the test split before training.

        Raises:
            DataError: If there is no test split.
        """
        self._require("test")
        self._tests_after_fit = True

    def _rows(self, name: str) -> tuple[ImageTable, Tensor, str]:
        """Return the table and the rows of a split, and a description of where the rows are from."""
        raise NotImplementedError

    def _transforms(self, config: dict[str, Any]) -> tuple[Transform, Transform]:
        """Return the evaluation and the training transform of uint8 images (3, height, width), as in timm."""
        size = tuple(config["input_size"][1:])
        steps = evaluation_steps(config)
        evaluation = v2.Compose(steps)
        if tuple(self.crop_scale) != (1.0, 1.0):
            interpolation = v2.InterpolationMode(config["interpolation"])
            steps = [v2.RandomResizedCrop(size, scale=self.crop_scale, interpolation=interpolation)]
        augmentation: list[nn.Module] = [v2.RandomHorizontalFlip()] if self.horizontal_flip else []
        if self.randaugment:
            augmentation.append(v2.RandAugment(self.randaugment, interpolation=v2.InterpolationMode.BILINEAR))
        if self.random_erasing:
            mean = [round(255 * m) for m in config["mean"]]
            augmentation.append(v2.RandomErasing(self.random_erasing, value=mean))
        return evaluation, v2.Compose([*steps, *augmentation])

    # ---------------------------------------------------------------------------------------------------- loaders

    def _batches(self, name: str) -> tuple[Dataset[Any], None, Collate | None]:
        """Return the arguments for the loader of a split: its images, or the cached output of the frozen prefix."""
        data = self.splits[name]
        if not self.caches:
            return data, None, None
        key = f"{data.digest()} {version('timm')} {sorted(self.config.items())}"
        return LabelDataset(data), None, self.cached(name, data, key, None, None, default_collate)

    def evaluated_training_rows(self) -> tuple[Dataset[Any], None, Collate | None]:
        """Return the training images in the transforms of evaluation, or the cached output of the frozen prefix."""
        if "train" in self.cached_states:
            return LabelDataset(self.splits["train"]), None, WithHidden(default_collate, self.cached_states["train"])
        data = copy.copy(self.splits["train"])
        data.transform = self.evaluation
        return data, None, None

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, shuffled and augmented."""
        data = self.splits["train"]
        return self.train_loader(*self._batches("train"), data.table.labels[data.rows])

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation images in order."""
        return self.evaluation_loader(*self._batches("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test images in order."""
        return self.evaluation_loader(self.splits["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images to predict in the order of their names."""
        return self.evaluation_loader(self.splits["predict"])

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Normalise a batch on its device: uint8 in, float32 out. Apply MixUp or CutMix to training images."""
        if "image" not in batch:
            return batch
        batch = {**batch, "image": normalise(batch["image"], self.mean, self.std)}
        return self._mixed(batch, batch.pop("draw")) if "draw" in batch else batch

    def _mixed(self, batch: dict[str, Any], draws: Tensor) -> dict[str, Any]:
        """Blend the images of a training batch with MixUp or CutMix; the labels become (batch, classes).

        If `mixup` and `cutmix` are 0, the batch does not change. The blend is a function of the batch's draws, so that
        a resumed run makes the same blends.
        """
        if not self.mixup and not self.cutmix:
            return batch
        classes = len(self.class_names or ())
        mixes: list[nn.Module] = [v2.MixUp(alpha=self.mixup, num_classes=classes)] if self.mixup else []
        mixes += [v2.CutMix(alpha=self.cutmix, num_classes=classes)] if self.cutmix else []
        with seeded(*draws.tolist()):
            mixed: dict[str, Any] = v2.RandomChoice(mixes)(batch)
        return mixed


class ImageClassificationData(ImageData):
    """Labelled images from the hub, Parquet, CIFAR-10's original files, or a folder of image files.

    Args:
        path: A data set's name on the hub, a directory of Parquet in the hub's columns, a directory with
            cifar-10-batches-py, or a folder of images: one folder for each class, in train/, val/ and test/ if
            there are splits.
        image_column: Column of the images; None takes the first of img, image; in `predict` also file_name.
        label_column: Column of the labels; None takes the first of label, labels, fine_label.
        skip_label: Name or number of a label whose rows are left out, such as -1 for hidden labels. Only for tables:
            in a folder of images, move the folder of the class elsewhere.
        test_fraction: Share of the training images held out for testing when the data have no test split, in [0, 1);
            0 holds out none.
    """

    def __init__(
        self,
        path: str,
        image_column: str | None = None,
        label_column: str | None = None,
        skip_label: str | int | None = None,
        test_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        if test_fraction:
            check_fraction("test_fraction", test_fraction)
        self.test_fraction = test_fraction
        self.columns, self.skip_label = (image_column, label_column), skip_label

    def check_test_split(self) -> None:
        """Check that there are test images. The next fit then reads the test images before training.

        Raises:
            DataError: If there are no test images.
        """
        if "test" not in self._shares():
            self._require("test")
        self._tests_after_fit = True

    def _shares(self) -> dict[str, float]:
        """Return the held-out shares of the training images, by split."""
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        return {name: share for name, share in fractions.items() if share and self._table(name) is None}

    def _table(self, name: str) -> ImageTable | None:
        """Return a split as it is stored, opened once."""
        if name not in self._tables:
            self._tables[name] = open_split(self.path, name, *self.columns, self.findings, self.skip_label)
        return self._tables[name]

    def _rows(self, name: str) -> tuple[ImageTable, Tensor, str]:
        """Return the table and the rows of a split, and a description of where the rows are from."""
        shares = self._shares()
        from_training = name == "train" or name in shares
        table = self._require("train" if from_training else name)
        limit = self.limits[name]
        rows = choose_rows(len(table), name, shares if from_training else {}, self.val_seed, limit)
        source = table.where
        if name in shares:
            source += f", held out (no split of its own; {name}_fraction {shares[name]}, val_seed {self.val_seed})"
        elif from_training and shares:
            held = ", ".join(f"{split}_fraction {share}" for split, share in shares.items())
            source += f", left after holding out {held} (val_seed {self.val_seed})"
        if limit is not None and len(rows) == limit:
            source += f", at most max_{name}_samples {limit}"
        return table, rows, source


def evaluation_steps(config: dict[str, Any]) -> list[Transform]:
    """Return timm's evaluation transforms of uint8 images (3, height, width), without the normalisation.

    Args:
        config: timm's `input_size`, `interpolation`, `crop_pct`, `crop_mode` and `mean` of a backbone.
    """
    size = tuple(config["input_size"][1:])
    steps = transforms_imagenet_eval(
        size,
        config["crop_pct"],
        config.get("crop_mode"),
        None,
        config["interpolation"],
        config["mean"],
        use_prefetcher=True,
    ).transforms[:-1]  # The last step converts a PIL image to an array.
    if config.get("crop_mode") == "border":
        fill = [round(255 * m) for m in config["mean"]]  # timm's step cannot fill a tensor with a colour.
        steps = [steps[0], partial(pad_to, size=size, fill=fill), v2.CenterCrop(size)]
    return list(steps)


def normalise(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 images (batch, 3, height, width) as float32 with a backbone's mean and deviation, both (3,)."""
    scaled = image.float().div_(255)  # In [0, 1].
    return scaled.sub_(mean.to(image.device)[:, None, None]).div_(std.to(image.device)[:, None, None])


def pad_to(image: Tensor, size: tuple[int, int], fill: list[int]) -> Tensor:
    """Pad an image (3, height, width) on all sides to at least a size (height, width)."""
    rows, columns = (max(least - length, 0) for least, length in zip(size, image.shape[-2:], strict=True))
    padding = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
    return v2.functional.pad(image, padding, fill=fill)


class ImageDataset(Dataset[dict[str, Any]]):
    """Rows of a table of images, transformed.

    Args:
        table: The images.
        rows: Rows that belong to this data set, (n,); None takes all.
        transform: Applied to (3, height, width) uint8.
    """

    def __init__(self, table: ImageTable, rows: Tensor | None, transform: Transform) -> None:
        self.table = table
        self.rows = torch.arange(len(table)) if rows is None else rows
        self.transform = transform
        self.images: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def skip_unlabelled(self, split: str, findings: Findings) -> None:
        """Leave out the rows without a label.

        Raises:
            DataError: If more rows lack a label than may be skipped.
        """
        table, rows = self.table, self.rows.tolist()
        if not table.unlabelled and not table.left_out:
            return
        for row in rows:
            if row in table.unlabelled:
                findings.skip(table.skipped(split, row, table.unlabelled[row]))
        self.rows = self.rows[[row not in table.unlabelled and row not in table.left_out for row in rows]]
        if left_out := table.left_out.intersection(rows):
            findings.add(f"{split}: left out {counted(len(left_out), 'row')} with the label of data.skip_label")

    def keep_in_memory(self, limit_gb: float, split: str, findings: Findings) -> None:
        """Decode all images now if they take at most `limit_gb` GiB, as estimated from the first 64.

        Raises:
            DataError: If more images cannot be decoded than may be skipped.
        """
        images: list[Tensor] = []
        errors: list[tuple[int, ImageError]] = []
        sample = min(64, len(self))
        for i in track(range(len(self)), f"Decoding {split}", transient=True, disable=len(self) < 5000):
            image = self.decode(i)
            if isinstance(image, Tensor):
                images.append(image)
            else:
                errors.append((i, image))
                if len(errors) > findings.skip_bad_rows:
                    break
            if i + 1 == sample and sum(image.nbytes for image in images) / sample * len(self) > limit_gb * 2**30:
                return
        self.skip_undecodable(errors, split, findings)
        self.images = images

    def skip_undecodable(self, errors: Sequence[tuple[int, ImageError]], split: str, findings: Findings) -> None:
        """Leave out images that cannot be decoded.

        Args:
            errors: Index of each such image, with the error of decoding the image.
            split: Name of the split.
            findings: Records the images.

        Raises:
            DataError: If there are more such images than may be skipped.
        """
        usable = torch.ones(len(self), dtype=torch.bool)
        for index, error in errors:
            findings.skip(self.table.skipped(split, int(self.rows[index]), error.reason), error)
            usable[index] = False
        self.rows = self.rows[usable]

    def digest(self) -> str:
        """Return a hash of the images as they are stored."""
        digest = hashlib.sha256()
        for row in self.rows.tolist():
            source = self.table.read(row)
            data = source.read_bytes() if isinstance(source, Path) else bytes(source)
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def rows_digest(self) -> str:
        """Return a digest of the images and labels, in their order.

        For images in memory, the digest covers every pixel. For other image files, the digest covers names and sizes.
        For all other images, the digest covers only the labels: reading all images would delay the run.
        """
        digest = xxhash.xxh3_128(self.table.labels[self.rows].numpy().tobytes() if len(self.table.labels) else b"")
        for index, row in enumerate(self.rows.tolist()):
            if self.images is not None:
                image = self.images[index]
                digest.update(f"{tuple(image.shape)}".encode())
                digest.update(image.contiguous().numpy().data)
            elif isinstance(source := self.table.read(row), Path):
                digest.update(f"{source.name} {source.stat().st_size}\n".encode())
            else:
                break
        return digest.hexdigest()

    def decode(self, index: int) -> Tensor | ImageError:
        """Return the image at an index, (3, height, width) uint8, or the error if the image cannot be decoded."""
        try:
            return self.table.decode(int(self.rows[index]))
        except ImageError as error:
            return error

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """Return the image at an index. A draw also has a seed, and seed and index determine the augmentation.

        Raises:
            ImageError: If a labelled image cannot be decoded. In prediction, such an image is black and has an `error`.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        image = self.decode(index) if self.images is None else self.images[index]
        row = int(self.rows[index])
        if len(self.table.labels) == 0:
            error = image.reason if isinstance(image, ImageError) else ""
            pixels = torch.zeros(3, 1, 1, dtype=torch.uint8) if isinstance(image, ImageError) else image
            return {"image": self.transform(pixels), "index": index, "name": self.table.names[row], "error": error}
        if isinstance(image, ImageError):
            raise image
        item = {"label": int(self.table.labels[row])}
        if seed is None:
            return {"image": self.transform(image), **item}
        with seeded(seed, index):
            return {"image": self.transform(image), **item, "draw": derive_seed(seed, index)}


class DecodingErrors(Dataset[ImageError | None]):
    """Errors of decoding the images of a data set; None for each good image.

    Args:
        images: The images.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageError | None:
        """Decode an image and return only the error, if any."""
        image = self.images.decode(index)
        return image if isinstance(image, ImageError) else None


class LabelDataset(Dataset[dict[str, int]]):
    """Labels of images, without the images.

    Args:
        images: The images.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images
        self.labels = images.table.labels[images.rows]

    def __len__(self) -> int:
        return len(self.labels)

    def rows_digest(self) -> str:
        """Return the digest of the images."""
        return self.images.rows_digest()

    def __getitem__(self, key: int | Draw) -> dict[str, int]:
        """Return `label` and `index` for an index or a draw."""
        index = index_of(key)
        return {"label": int(self.labels[index]), "index": index}
