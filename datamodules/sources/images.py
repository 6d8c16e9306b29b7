"""Sources of images (the hub, Parquet, CIFAR-10's own folder, folders of image files), as one kind of table."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules.errors import DataError
from datamodules.sources.findings import Findings, SkippedRow
from datamodules.sources.image_folders import FORMATS, SUFFIXES, ImageFiles, find_images, read_layout
from datamodules.sources.labels import Labels, missing_label, parse_labels
from datamodules.sources.splits import SPLITS
from datamodules.sources.tables import Table, open_table, unread_files

if TYPE_CHECKING:  # a run on a folder of images imports no datasets
    import datasets

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
WHITE_IS_ZERO, PHOTOMETRIC = 0, 262  # a value of TIFF, and the tag that has it


class ImageError(DataError):
    """An image that cannot be used.

    Args:
        message: The whole message.
        reason: Why the image cannot be used, without its name.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageTable:
    """Images that are decoded when asked for, with their labels.

    Args:
        read: Gives the encoded bytes, the path or the pixels (height, width, 3) of the image in a row.
        names: Names of the images for messages and tables of predictions; one a row.
        labels: (rows,) int64, -1 in rows without a label; empty when no row has one.
        class_names: Names by label; empty when there are no labels.
        where: Folder, file or data set that the images are from.
        unlabelled: Reasons by row why a row has no label.
        left_out: Rows that have the label to skip.
    """

    read: Callable[[int], bytes | Path | np.ndarray]
    names: Sequence[str]
    labels: Tensor
    class_names: list[str]
    where: str = ""
    unlabelled: Mapping[int, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, row: int) -> Tensor:
        """Return the image in a row as (3, height, width) uint8.

        Raises:
            ImageError: If it cannot be decoded.
        """
        source = self.read(row)
        if isinstance(source, np.ndarray):
            return torch.from_numpy(source).permute(2, 0, 1).contiguous()
        try:
            return decode_image(source)
        except Exception as error:  # decoders raise many kinds on damaged files
            reason = _reason(source, error)
            raise ImageError(
                f"data.path: the image {self.names[row]} cannot be decoded ({reason}); remove or replace it.", reason
            ) from error

    def skipped(self, split: str, row: int, reason: str) -> SkippedRow:
        """Return the entry of a row that is left out of a split."""
        name = self.names[row].removeprefix(self.where).lstrip("/ ")
        return SkippedRow(split, self.where, name, reason)

    def with_classes(self, class_names: list[str], where: str) -> ImageTable:
        """Return the same images with labels that count in another list of classes, matched by name.

        Raises:
            DataError: If a class of this table is not in the list.
        """
        labels = Labels(self.labels, self.class_names, where).matched(class_names)
        return replace(self, labels=labels, class_names=class_names)


def decode_image(source: bytes | Path) -> Tensor:
    """Decode an image file upright, as (3, height, width) uint8.

    Transparency is dropped: transparent pixels have the colour that is stored for them. Of an animation, the first
    frame is taken. Channels of 16 bits are scaled to 8.

    Raises:
        Exception: Any kind, if the file is damaged, of another format, or of a mode without a known range.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        image.load()
        orientation = _orientation(image)
        upright = _to_rgb(image)
        if orientation != 1:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            upright.info = {"exif": exif.tobytes()}  # without the file's other tags, which may be malformed
            upright = ImageOps.exif_transpose(upright)
        return pil_to_tensor(upright)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an image whose pixels are loaded; 1 if it is missing or malformed."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow parses whatever bytes a camera wrote
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB.

    Raises:
        ValueError: If the mode does not say which value is white.
    """
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        pixels = (np.asarray(image).astype(np.uint32) + 128) // 257  # 0…65535 to 0…255, rounded
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # type: ignore[attr-defined]
            pixels = 255 - pixels  # Pillow inverts 8 bits by itself, and 16 bits not
        image = Image.fromarray(pixels.astype(np.uint8))
    elif mode in ("I", "F"):
        kind = "32-bit whole numbers" if mode == "I" else "floating-point numbers"
        raise ValueError(f"mode {mode}: {kind} do not say which value is white; save it with 8 or 16 bits a channel")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def _reason(source: bytes | Path, error: Exception) -> str:
    empty = source == b"" or (isinstance(source, Path) and source.is_file() and source.stat().st_size == 0)
    if empty:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"cannot identify it as one of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__


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


def open_split(
    path: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    findings: Findings | None = None,
    skip_label: str | int | None = None,
) -> ImageTable | None:
    """Open one split of a labelled data set.

    Args:
        path: A directory, or a name on the hub.
        split: `train`, `val` or `test`.
        image_column: Column of the images; None takes the first of img, image.
        label_column: Column of the labels; None takes the first of label, labels, fine_label.
        findings: Takes lines about what was assumed and left out. Rows without a label are kept if it lets rows be
            skipped.
        skip_label: Label of rows of a table to leave out.

    Returns:
        The split; None when the data set has no such split.

    Raises:
        DataError: If nothing is there, a column is missing, or a label is out of range.
    """
    findings = Findings() if findings is None else findings
    folder = Path(path)
    if folder.is_file():
        raise DataError(f"data.path: {path} is not a directory; give a directory or a data set's name on the hub.")
    if (folder / "cifar-10-batches-py").is_dir() or folder.name == "cifar-10-batches-py":
        return _from_cifar10(folder, split)
    files = find_images(folder, "path") if folder.exists() else None
    if files is not None and ".parquet files" not in files.left_out:
        return from_image_folder(files, split, findings)
    found = open_table(path, SPLITS[split])
    if found is None:
        return None
    findings.add_unread(unread_files(path, [name for names in SPLITS.values() for name in names]))
    return _from_table(found, image_column, label_column, findings, skip_label)


def open_folder(path: str, findings: Findings | None = None) -> ImageTable:
    """Open one image file, or all image files below a folder in the order of their names, without labels.

    Args:
        path: The file or folder.
        findings: Takes a line about the files that are left out.

    Raises:
        DataError: If nothing is there, or no image.
    """
    folder = Path(path)
    unlabelled = torch.empty(0, dtype=torch.int64)
    if folder.is_file():
        return ImageTable(_FileReader([folder]), [folder.name], unlabelled, [], path)
    if not folder.is_dir():
        raise DataError(f"data.predict_path: {path} is not there. Give an image or a folder of images.")
    files = find_images(folder, "predict_path")
    if not files.images:
        raise DataError(
            f"data.predict_path: {path} holds no image. It holds {files.contents()}. {files.summary()} Images have "
            f"one of the suffixes {', '.join(SUFFIXES)}."
        )
    if findings is not None and files.left_out:
        findings.add(files.summary())
    names = [str(Path(*parts)) for parts in files.images]
    paths = [folder.joinpath(*parts) for parts in files.images]
    return ImageTable(_FileReader(paths), names, unlabelled, [], path)


def _from_table(
    table: Table, image_column: str | None, label_column: str | None, findings: Findings, skip_label: str | int | None
) -> ImageTable:
    from datasets import Image as ImageFeature

    data, where = table.data, table.where
    image = _column(data, "image_column", image_column, IMAGE_COLUMNS, where)
    label = _column(data, "label_column", label_column, LABEL_COLUMNS, where)
    try:
        encoded = data.select_columns(image).cast_column(image, ImageFeature(decode=False))
    except Exception as error:  # a column of another type; the library raises many kinds
        raise DataError(f"data.image_column: {image} in {where} does not hold images ({error}).") from error
    if len(data) == 0:
        raise DataError(f"data.path: {where} has no rows.")
    labels = parse_labels(table, label, skip_label=skip_label)
    if not labels.class_names:
        raise DataError(f"data.label_column: {label} in {where} must hold whole numbers or names, not decimal numbers.")
    if labels.bad and not findings.skip_bad_rows:
        raise missing_label(labels, label)
    for note in (*table.notes, *labels.notes):
        findings.add(note)
    names, reader = _RowNames(where, len(data)), _ColumnReader(encoded, image)
    bad = {row: f"{label} {reason.rstrip(',')}" for row, reason in labels.bad.items()}
    return ImageTable(reader, names, labels.values, labels.class_names, where, bad, labels.left_out)


def _column(data: datasets.Dataset, key: str, given: str | None, usual: tuple[str, ...], where: str) -> str:
    column = given or next((c for c in usual if c in data.column_names), None)
    if column is None or column not in data.column_names:
        raise DataError(
            f"data.{key}: {where} has no column {given or ' or '.join(usual)}; it has {', '.join(data.column_names)}."
        )
    return column


def _from_cifar10(folder: Path, split: str) -> ImageTable | None:
    """Open CIFAR-10 as its authors publish it: pickles, which torchvision opens only if their MD5 is right."""
    if split == "val":
        return None
    root = folder.parent if folder.name == "cifar-10-batches-py" else folder
    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(
            f"data.path: {folder} is not the original CIFAR-10, or a file of it is damaged; fetch it again."
        ) from error
    where = f"{folder} {split}"
    labels = torch.tensor(data.targets)
    return ImageTable(_ArrayReader(data.data), _RowNames(where, len(data.data)), labels, list(data.classes), where)


def from_image_folder(files: ImageFiles, split: str, findings: Findings) -> ImageTable | None:
    """Open image files in one folder a class, below one folder a split; without splits all of them are for training.

    Raises:
        DataError: If the folders' names can be read in two ways, or if there is no split for training.
    """
    layout = read_layout(files)
    for line in filter(None, (*layout.notes, files.summary())):
        findings.add(line)
    if split not in layout.splits:
        if split == "train":
            found = ", ".join(layout.names.values())
            raise DataError(
                f"data.path: {files.root} has folders for other splits ({found}), but none called train. It holds "
                f"{files.contents()}."
            )
        return None
    classes = layout.classes(split)
    paths = [path for paths in classes.values() for path in paths]
    labels = torch.tensor([label for label, paths in enumerate(classes.values()) for _ in paths])
    where = str(files.root / layout.names[split])
    return ImageTable(_FileReader(paths), [str(path) for path in paths], labels, list(classes), where)
