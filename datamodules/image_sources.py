"""Where images come from: the hub, Parquet, CIFAR-10's own folder, or a folder of image files, as one kind of table."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules.errors import DataError
from datamodules.labels import Labels, read_labels
from datamodules.splits import SPLITS
from datamodules.tables import Table, open_table

if TYPE_CHECKING:  # a run on a folder of images imports no datasets
    import datasets

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# by what a file holds, not by its name; of all that PIL knows, it hands some to other programs, as PostScript
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


@dataclass(frozen=True)
class ImageTable:
    """Images that are decoded when asked for, with their labels.

    Args:
        read: Gives the encoded bytes, the path or the pixels (height, width, 3) of the image in a row.
        names: What to call each image in a message or a table of predictions; one a row.
        labels: (rows,) int64; empty when there are none.
        class_names: Names by label; empty when there are no labels.
    """

    read: Callable[[int], bytes | Path | np.ndarray]
    names: Sequence[str]
    labels: Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, row: int) -> Tensor:
        """The image in a row as (3, height, width) uint8.

        Raises:
            DataError: If it cannot be decoded.
        """
        source = self.read(row)
        if isinstance(source, np.ndarray):
            return torch.from_numpy(source).permute(2, 0, 1).contiguous()
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                return pil_to_tensor(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "it is empty" if source == b"" else str(error)
            raise DataError(
                f"data.path: the image {self.names[row]} cannot be decoded ({reason}); remove or replace it."
            ) from error

    def with_classes(self, class_names: list[str], where: str) -> ImageTable:
        """The same images with labels that count in another list of classes, matched by name.

        Raises:
            DataError: If a class of this table is not in the list.
        """
        labels = Labels(self.labels, self.class_names, where).matched(class_names)
        return replace(self, labels=labels, class_names=class_names)


# Readers are classes, not closures, so that worker processes that do not fork can have them.


@dataclass(frozen=True)
class _FileReader:
    files: list[Path]

    def __call__(self, row: int) -> Path:
        return self.files[row]


@dataclass(frozen=True)
class _ArrayReader:
    pixels: np.ndarray  # (rows, height, width, 3) uint8

    def __call__(self, row: int) -> np.ndarray:
        return self.pixels[row]


@dataclass(frozen=True)
class _ColumnReader:
    data: datasets.Dataset
    column: str

    def __call__(self, row: int) -> bytes | Path:
        cell: dict[str, Any] = self.data[row][self.column] or {"bytes": None, "path": None}
        if cell["bytes"] is None and cell["path"]:
            return Path(cell["path"])
        return bytes(cell["bytes"] or b"")


@dataclass(frozen=True)
class _RowNames(Sequence[str]):
    """`<where> row <k>`, made when asked for."""

    where: str
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: Any) -> Any:
        return f"{self.where} row {row}"


def open_split(path: str, split: str, image_column: str | None, label_column: str | None) -> ImageTable | None:
    """One split of a labelled data set.

    Args:
        path: A directory, or a name on the hub.
        split: `train`, `val` or `test`.
        image_column: Column of the images; None takes the first of img, image.
        label_column: Column of the labels; None takes the first of label, labels, fine_label.

    Returns:
        The split; None when the data set has no such split.

    Raises:
        DataError: If nothing is there, a column is missing, or a label is out of range.
    """
    folder = Path(path)
    if folder.is_file():
        raise DataError(f"data.path: {path} is not a directory; give a directory or a data set's name on the hub.")
    if (folder / "cifar-10-batches-py").is_dir() or folder.name == "cifar-10-batches-py":
        table = _from_cifar10(folder, split)
    elif not folder.exists() or any(folder.rglob("*.parquet")):
        found = open_table(path, SPLITS[split])
        table = None if found is None else _from_dataset(found.data, found.where, image_column, label_column)
    else:
        table = _from_image_folder(folder, split)
    return table


def open_folder(path: str) -> ImageTable:
    """All image files below a folder, without labels, in the order of their names.

    Raises:
        DataError: If the folder is not there or holds no image.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"data.predict_path: {path} is not a directory; give a folder of images.")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and f.is_file())
    if not files:
        raise DataError(f"data.predict_path: {path} holds no image ({', '.join(IMG_EXTENSIONS)}).")
    names = [str(f.relative_to(folder)) for f in files]
    return ImageTable(_FileReader(files), names, torch.empty(0, dtype=torch.int64), [])


def _from_dataset(data: datasets.Dataset, where: str, image_column: str | None, label_column: str | None) -> ImageTable:
    from datasets import Image as ImageFeature

    image = _column(data, "image_column", image_column, IMAGE_COLUMNS, where)
    label = _column(data, "label_column", label_column, LABEL_COLUMNS, where)
    try:
        encoded = data.select_columns(image).cast_column(image, ImageFeature(decode=False))
    except Exception as error:  # a column of another type; the library raises many kinds
        raise DataError(f"data.image_column: {image} in {where} does not hold images ({error}).") from error
    if len(data) == 0:
        raise DataError(f"data.path: {where} has no rows.")
    labels = read_labels(Table(data, where), label)
    if not labels.class_names:
        raise DataError(f"data.label_column: {label} in {where} must hold whole numbers or names, not decimal numbers.")
    return ImageTable(_ColumnReader(encoded, image), _RowNames(where, len(data)), labels.values, labels.class_names)


def _column(data: datasets.Dataset, key: str, given: str | None, usual: tuple[str, ...], where: str) -> str:
    column = given or next((c for c in usual if c in data.column_names), None)
    if column is None or column not in data.column_names:
        raise DataError(
            f"data.{key}: {where} has no column {given or ' or '.join(usual)}; it has {', '.join(data.column_names)}."
        )
    return column


def _from_cifar10(folder: Path, split: str) -> ImageTable | None:
    """CIFAR-10 as its authors publish it. Its files are pickles: torchvision opens them only if their MD5 is right."""
    if split == "val":
        return None
    root = folder.parent if folder.name == "cifar-10-batches-py" else folder
    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(
            f"data.path: {folder} is not the original CIFAR-10, or a file of it is damaged; fetch it again."
        ) from error
    names = _RowNames(f"{folder} {split}", len(data.data))
    return ImageTable(_ArrayReader(data.data), names, torch.tensor(data.targets), list(data.classes))


def _from_image_folder(folder: Path, split: str) -> ImageTable | None:
    """Image files in one folder a class, below one folder a split, or with no such folders all of them for training."""
    found = next((folder / s for s in SPLITS[split] if (folder / s).is_dir()), None)
    if found is None:
        if split != "train":
            return None
        if any((folder / s).is_dir() for names in SPLITS.values() for s in names):
            raise DataError(f"data.path: {folder} has folders for other splits, but none called train.")
        found = folder
    try:
        data = ImageFolder(str(found))
    except FileNotFoundError as error:
        raise DataError(
            f"data.path: {found} holds no images in one folder a class, no Parquet, no cifar-10-batches-py ({error})."
        ) from error
    files = [Path(f) for f, _ in data.samples]
    labels = torch.tensor([label for _, label in data.samples])
    return ImageTable(_FileReader(files), [str(f) for f in files], labels, list(data.classes))
