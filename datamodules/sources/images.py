"""Open images from the hub, Parquet, CIFAR-10's original files or folders of image files, as one kind of table."""

from __future__ import annotations

import io
import os
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
from datamodules.sources.image_folders import FORMATS, SUFFIXES, UNDECODABLE, ImageFiles, find_images, read_layout
from datamodules.sources.labels import Labels, missing_label, parse_labels
from datamodules.sources.splits import SPLITS, is_helper
from datamodules.sources.tables import (
    Reading,
    Table,
    check_path,
    kind_of,
    match_columns,
    open_file,
    open_table,
    similar_column,
    spelt_column,
    unread_files,
)

if TYPE_CHECKING:  # A run on a folder of images does not import `datasets`.
    import datasets

IMAGE_COLUMNS = ("img", "image")
PREDICTED_COLUMNS = (*IMAGE_COLUMNS, "file_name")  # The metadata.csv of the hub's image folders has `file_name`.
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEXT_RECIPES = "For texts use --config conf/texts.yaml (or conf/summaries.yaml, conf/chats.yaml)."
WHITE_IS_ZERO, PHOTOMETRIC = 0, 262  # A value of a TIFF tag, and the tag's number.


class ImageError(DataError):
    """An image that cannot be used.

    Args:
        message: The error message.
        reason: Why the image cannot be used, without the image's name.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageTable:
    """Images with their labels; each image is decoded when it is needed.

    Args:
        read: Function that returns the encoded bytes, the path or the pixels (height, width, 3) of a row's image.
        names: Name of each row's image, for messages and tables of predictions.
        labels: (rows,) int64, -1 in rows without a label; empty if no row has a label.
        class_names: Names by label; empty if there are no labels.
        where: Folder, file or data set that the images are from.
        unlabelled: Rows without a label, with the reason.
        left_out: Rows with the label of `skip_label`.
        source: The table of images to predict; None for files.
    """

    read: Callable[[int], bytes | Path | np.ndarray]
    names: Sequence[str]
    labels: Tensor
    class_names: list[str]
    where: str = ""
    unlabelled: Mapping[int, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    source: Table | None = None

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, row: int) -> Tensor:
        """Return the image in a row as (3, height, width) uint8.

        Raises:
            ImageError: If the image cannot be decoded.
        """
        source = self.read(row)
        if isinstance(source, np.ndarray):
            return torch.from_numpy(source).permute(2, 0, 1).contiguous()
        try:
            return decode_image(source)
        except Exception as error:  # Decoders raise many kinds of exceptions for damaged files.
            reason = _reason(source, error)
            raise ImageError(
                f"data.path: the image {self.names[row]} cannot be decoded ({reason}). Remove or replace the image.",
                reason,
            ) from error

    def skipped(self, split: str, row: int, reason: str) -> SkippedRow:
        """Return the entry of a row that is left out of a split."""
        name = self.names[row].removeprefix(self.where).lstrip("/ ")
        return SkippedRow(split, self.where, name, reason)

    def with_classes(self, class_names: list[str], where: str) -> ImageTable:
        """Return the same images with labels as indices into another list of classes, matched by name.

        Raises:
            DataError: If a row has a class that is not in the list.
        """
        labels = Labels(self.labels, self.class_names, where).matched(class_names)
        return replace(self, labels=labels, class_names=class_names)


def decode_image(source: bytes | Path) -> Tensor:
    """Decode an image file as (3, height, width) uint8, turned upright by its EXIF orientation.

    Transparency is dropped: transparent pixels get their stored colour. An animation gives its first frame. Channels
    of 16 bits are scaled to 8 bits.

    Raises:
        Exception: Any kind, if the file is damaged, or if its format or the range of its values is unknown.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        image.load()
        orientation = _orientation(image)
        upright = _to_rgb(image)
        if orientation != 1:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            upright.info = {"exif": exif.tobytes()}  # The file's other tags may be malformed.
            upright = ImageOps.exif_transpose(upright)
        return pil_to_tensor(upright)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an image whose pixels are loaded; 1 if it is missing or malformed."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow parses whatever bytes a camera wrote.
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB.

    Raises:
        ValueError: If the mode does not define which value is white.
    """
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        pixels = (np.asarray(image).astype(np.uint32) + 128) // 257  # 0…65535 to 0…255, rounded.
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # type: ignore[attr-defined]
            pixels = 255 - pixels  # Pillow inverts 8-bit channels, but not 16-bit channels.
        image = Image.fromarray(pixels.astype(np.uint8))
    elif mode in ("I", "F"):
        kind = "32-bit whole numbers" if mode == "I" else "floating-point numbers"
        raise ValueError(
            f"mode {mode}: {kind} do not define which value is white; save the image with 8 or 16 bits a channel"
        )
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a direct conversion.
    return image.convert("RGB")


def _reason(source: bytes | Path, error: Exception) -> str:
    empty = source == b"" or (isinstance(source, Path) and source.is_file() and source.stat().st_size == 0)
    if empty:
        return "the image is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"cannot be identified as one of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__


# Readers are no closures, since worker processes that do not fork receive pickled readers.


@dataclass(frozen=True)
class _ColumnReader:
    data: datasets.Dataset
    column: str
    folder: Path = Path()  # Relative paths in cells begin here.

    def __call__(self, row: int) -> bytes | Path:
        cell: dict[str, Any] = self.data[row][self.column] or {"bytes": None, "path": None}
        if cell["bytes"] is None and cell["path"]:
            return self.folder / cell["path"]
        return bytes(cell["bytes"] or b"")


@dataclass(frozen=True)
class _RowNames(Sequence[str]):
    """Names `<where> row <k>` of all rows, without a list of them in memory."""

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
        findings: Collects lines about assumptions and files that are left out. If bad rows may be skipped, rows without
            a label are no error here.
        skip_label: Label of a table whose rows are left out.

    Returns:
        The split; None if the data set has no such split.

    Raises:
        DataError: If the data, the training split or a column is missing. Also if a label is missing or out of range,
            unless bad rows may be skipped. Also for `skip_label`, if the data are no table.
    """
    findings = Findings() if findings is None else findings
    check_image_path(path)
    folder = Path(path)
    is_cifar10 = (folder / "cifar-10-batches-py").is_dir() or folder.name == "cifar-10-batches-py"
    files = find_images(folder, "path") if folder.exists() and not is_cifar10 else None
    is_table = not is_cifar10 and (files is None or ".parquet files" in files.left_out)
    if skip_label is not None and not is_table:
        raise DataError(f"data.skip_label: {path} is not a table, so no label can be skipped. Remove the key.")
    if is_cifar10:
        return _from_cifar10(folder, split)
    if files is not None and not is_table:
        return from_image_folder(files, split, findings)
    table = open_table(path, SPLITS[split])
    if table is None:
        return None
    findings.add_unread(unread_files(path, [name for names in SPLITS.values() for name in names]))
    return _from_table(table, image_column, label_column, findings, skip_label)


def check_image_path(path: str) -> None:
    """Check, without reading images, that a path that looks local exists and is a directory.

    Raises:
        DataError: If the path does not exist, is a file, or holds tables of texts and no image.
    """
    kind = kind_of(Path(path))
    advice = "" if kind in (None, ".parquet") else f" {TEXT_RECIPES}"  # Parquet may hold images.
    if os.path.isfile(path):
        raise DataError(
            f"data.path: {path} is not a directory. Give a directory or a data set's name on the hub.{advice}"
        )
    check_path(path)
    if os.path.isdir(path) and _holds_only_texts(path):
        raise DataError(f"data.path: {path} holds tables and no images. {TEXT_RECIPES}")


def _holds_only_texts(folder: str) -> bool:
    """Return True for a folder with tables and without images. The search ends at the first file that may be images."""
    has_table = False
    for path, folders, names in os.walk(folder):
        files = [Path(path, name) for name in names if not is_helper(name)]
        if any(file.suffix.lower() in ("", ".parquet", *SUFFIXES, *UNDECODABLE) for file in files):
            return False
        if any(os.path.islink(os.path.join(path, name)) for name in folders):  # Not followed here.
            return False
        has_table = has_table or any(kind_of(file) for file in files)
    return has_table


def check_image_to_predict(path: str | None, adapter_column: str | None = None) -> None:
    """Check that the image, the folder or the table of images to predict exists.

    Raises:
        DataError: If no path is given, or the path does not exist. Also if the path is no table, but a column names the
            adapter of each row.
    """
    if path is None:
        raise DataError("data.predict_path: name the image, or the folder or table of images, to predict.")
    if not os.path.exists(path):
        raise DataError(
            f"data.predict_path: {path} does not exist. Give an image or a folder of images, or a table of images."
        )
    if adapter_column is not None and not _is_table(path):
        raise DataError(
            f"data.predict_path: {path} is not a table, so no image can name its adapter in the column "
            f"{adapter_column}. Give a table, such as a CSV file, with the columns image (paths of the images) and "
            f"{adapter_column}."
        )


def _is_table(path: str) -> bool:
    return os.path.isfile(path) and kind_of(Path(path)) is not None


def open_images(path: str, image_column: str | None, adapter_column: str | None, findings: Findings) -> ImageTable:
    """Open the images to predict, without labels: an image file, all image files below a folder, or a table.

    Args:
        path: The file or folder. In a table, relative paths of images begin at the folder of the table.
        image_column: Column of the images or of their paths; None takes the first of img, image, file_name.
        adapter_column: Column of the names of adapters; None if no row names an adapter.
        findings: Collects lines about assumptions and files that are left out.

    Raises:
        DataError: If the path or a column does not exist, or there is no image.
    """
    if not _is_table(path):
        return open_folder(path, findings)
    import pyarrow.compute as pc

    usual = PREDICTED_COLUMNS if image_column is None else (image_column,)
    adapters = {} if adapter_column is None else {"adapter_column": adapter_column}
    table = match_columns(open_file(path, "predict_path", Reading(as_text=(*usual, *adapters.values()))), adapters)
    where = table.where
    column = _column(table.data, "image_column", image_column, PREDICTED_COLUMNS, where, findings)
    reader = _image_reader(table, column, "predict_path", Path(path).parent)
    for note in table.notes:
        findings.add(note)
    cells = reader.data.with_format("arrow")[:][column]  # Not copied, so the images are not read here.
    names = [path or f"{where} row {row}" for row, path in enumerate(pc.struct_field(cells, "path").to_pylist())]
    return ImageTable(reader, names, torch.empty(0, dtype=torch.int64), [], where, source=table)


def open_folder(path: str, findings: Findings | None = None) -> ImageTable:
    """Open one image file, or all image files below a folder in the order of their names, without labels.

    Args:
        path: The file or folder.
        findings: Collects a line about the files that are left out.

    Raises:
        DataError: If the path does not exist, or holds no image.
    """
    check_image_to_predict(path)
    folder = Path(path)
    unlabelled = torch.empty(0, dtype=torch.int64)
    if folder.is_file():
        return ImageTable([folder].__getitem__, [folder.name], unlabelled, [], path)
    files = find_images(folder, "predict_path")
    if not files.images:
        raise DataError(
            f"data.predict_path: {path} holds no image. The folder holds {files.contents()}. {files.summary()} Images "
            f"have one of the suffixes {', '.join(SUFFIXES)}."
        )
    if findings is not None and files.left_out:
        findings.add(files.summary())
    names = [str(Path(*parts)) for parts in files.images]
    paths = [folder.joinpath(*parts) for parts in files.images]
    return ImageTable(paths.__getitem__, names, unlabelled, [], path)


def _from_table(
    table: Table, image_column: str | None, label_column: str | None, findings: Findings, skip_label: str | int | None
) -> ImageTable:
    data, where = table.data, table.where
    image = _column(data, "image_column", image_column, IMAGE_COLUMNS, where, findings)
    label = _column(data, "label_column", label_column, LABEL_COLUMNS, where, findings)
    reader = _image_reader(table, image, "path")
    labels = parse_labels(table, label, skip_label=skip_label)
    if not labels.class_names:
        raise DataError(f"data.label_column: {label} in {where} must hold whole numbers or names, not decimal numbers.")
    if labels.bad and not findings.skip_bad_rows:
        raise missing_label(labels, label)
    for note in (*table.notes, *labels.notes):
        findings.add(note)
    names = _RowNames(where, len(data))
    bad = {row: f"{label} {reason.rstrip(',')}" for row, reason in labels.bad.items()}
    return ImageTable(reader, names, labels.values, labels.class_names, where, bad, labels.left_out)


def _image_reader(table: Table, column: str, key: str, folder: Path = Path()) -> _ColumnReader:
    from datasets import Image as ImageFeature

    try:
        encoded = table.data.select_columns(column).cast_column(column, ImageFeature(decode=False))
    except Exception as error:  # A column of another type. `datasets` raises many kinds of exceptions.
        raise DataError(
            f"data.image_column: {column} in {table.where} does not hold images ({error}). Name another column."
        ) from error
    if len(encoded) == 0:
        raise DataError(f"data.{key}: {table.where} has no rows. Give a table with rows.")
    return _ColumnReader(encoded, column, folder)


def _column(
    data: datasets.Dataset, key: str, configured: str | None, usual: tuple[str, ...], where: str, findings: Findings
) -> str:
    names = data.column_names
    wanted = usual if configured is None else (configured,)
    column = next((found for name in wanted if (found := spelt_column(name, names))), None)
    if column is None:
        advice = "" if configured is None else similar_column(configured, names)
        raise DataError(f"data.{key}: {where} has no column {' or '.join(wanted)}; it has {', '.join(names)}.{advice}")
    if column not in wanted:
        findings.add(f"data.{key}: the column {column} of {where} is read")
    return column


def _from_cifar10(folder: Path, split: str) -> ImageTable | None:
    """Open CIFAR-10's original files. torchvision unpickles a file only if the MD5 equals the published MD5."""
    if split == "val":
        return None
    root = folder.parent if folder.name == "cifar-10-batches-py" else folder
    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(
            f"data.path: {folder} is not the original CIFAR-10, or a file is damaged. Download CIFAR-10 again."
        ) from error
    where = f"{folder} {split}"
    labels = torch.tensor(data.targets)
    return ImageTable(data.data.__getitem__, _RowNames(where, len(data.data)), labels, list(data.classes), where)


def from_image_folder(files: ImageFiles, split: str, findings: Findings) -> ImageTable | None:
    """Open image files in one folder for each class, below one folder for each split, if there are splits.

    Without splits, all images are training images.

    Raises:
        DataError: If no folder holds images, if the folders' names are ambiguous, or if a split has no folders of
            classes. Also if `split` is `train` and there is no training split.
    """
    layout = read_layout(files)
    for line in filter(None, (*layout.notes, files.summary())):
        findings.add(line)
    if split not in layout.splits:
        if split == "train":
            others = ", ".join(layout.names.values())
            raise DataError(
                f"data.path: {files.root} has folders for other splits ({others}), but no folder called train. The "
                f"directory holds {files.contents()}."
            )
        return None
    classes = layout.classes(split)
    paths = [path for paths in classes.values() for path in paths]
    labels = torch.tensor([label for label, paths in enumerate(classes.values()) for _ in paths])
    where = str(files.root / layout.names[split])
    return ImageTable(paths.__getitem__, [str(path) for path in paths], labels, list(classes), where)
