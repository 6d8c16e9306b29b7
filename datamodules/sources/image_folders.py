"""Find images in folders, and read splits and classes from the names of the folders."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from datamodules.errors import DataError, counted
from datamodules.sources.findings import listed
from datamodules.sources.splits import is_helper, split_of

# Raster formats that Pillow decodes by itself. Pillow passes formats such as PostScript to external programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".bmp"),
    *(".tif", ".tiff", ".webp", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
UNDECODABLE = (".heic", ".heif")  # Photos that Pillow cannot decode.
MOST_NAMES = 10

Parts = tuple[str, ...]  # A file's path below the folder: names of folders, then the file's name.


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder.

    Args:
        root: The folder.
        images: Image files.
        left_out: Number of other files, by suffix or description.
        empty: Outermost folders without an image.
    """

    root: Path
    images: list[Parts]
    left_out: Counter[str]
    empty: list[Parts]

    def summary(self) -> str:
        """Return one line about the files and folders that are left out; empty if nothing is left out."""
        kinds = [f"{kind} ({count:,})" for kind, count in sorted(self.left_out.items())]
        rest = [f"{len(kinds) - MOST_NAMES} more kinds"] if len(kinds) > MOST_NAMES else []
        empty = listed([os.sep.join(parts) for parts in self.empty])
        folders = [f"{counted(len(self.empty), 'folder')} without an image ({empty})"] if self.empty else []
        if not kinds and not folders:
            return ""
        heic = any(kind.startswith(UNDECODABLE) for kind in self.left_out)
        hint = " Convert .heic files to JPEG or PNG to use them." if heic else ""
        return f"left out of {self.root}: {', '.join([*kinds[:MOST_NAMES], *rest, *folders])}.{hint}"

    def contents(self) -> str:
        """Return the names of the files and folders at the top, for a message."""
        names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(self.root))
        return listed(names) if names else "nothing"


def find_images(root: Path, key: str) -> ImageFiles:
    """Find all image files below a folder, by suffix, or by their first bytes if they have no suffix.

    Links are followed, except links to a folder above. Helper files and folders (`is_helper`) are left out.

    Args:
        root: The folder.
        key: Key of the data module, for error messages.

    Raises:
        DataError: If a folder cannot be read.
    """
    images: list[Parts] = []
    left_out: Counter[str] = Counter()
    folders: list[Parts] = []
    waiting: list[tuple[Parts, frozenset[tuple[int, int]]]] = [((), frozenset())]
    while waiting:
        folder, ancestors = waiting.pop()
        path = root.joinpath(*folder)
        try:
            status = path.stat()
            entries = list(os.scandir(path))
        except OSError as error:
            raise DataError(
                f"data.{key}: the folder {path} cannot be read ({error.strerror}). Make the folder readable."
            ) from error
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            left_out["links to a folder above"] += 1
            continue
        folders.append(folder)
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_helper(entry.name):
                left_out["hidden or helper files and folders"] += 1
            elif os.path.isdir(entry):
                waiting.append(((*folder, entry.name), ancestors | {identity}))
            elif not os.path.isfile(entry):
                left_out["broken links" if entry.is_symlink() else "special files"] += 1
            elif suffix in SUFFIXES or (not suffix and _is_image(entry.path)):
                images.append((*folder, entry.name))
            else:
                left_out[f"{suffix} files" if suffix else "files without a suffix that are no images"] += 1
    filled = {parts[:depth] for parts in images for depth in range(len(parts))}
    empty = sorted(folder for folder in folders if folder not in filled and folder[:-1] in filled)
    return ImageFiles(root, sorted(images), left_out, empty)


def _is_image(path: str) -> bool:
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Decoders raise many kinds of exceptions for a damaged header.
        return False


@dataclass(frozen=True)
class Layout:
    """Meaning of the folders of a data set.

    Args:
        files: All files.
        splits: For each split, the depth of the class folders, and the images.
        names: For each split, the folder's path relative to the root.
        notes: Lines about the assumptions that were made.
    """

    files: ImageFiles
    splits: dict[str, tuple[int, list[Parts]]]
    names: dict[str, str]
    notes: list[str]

    def classes(self, split: str) -> dict[str, list[Path]]:
        """Return the image files of a split by class, in torchvision's order.

        Raises:
            DataError: If the images are not in one folder for each class.
        """
        depth, images = self.splits[split]
        classes = _folders(images, depth)
        if not classes:
            where = self.files.root / self.names[split]
            raise DataError(
                f"data.path: {where} holds {counted(len(images), 'image')} and no folder with images. Put each class "
                "into a folder. Use predict for images without labels."
            )
        return {
            name: [self.files.root.joinpath(*parts) for parts in sorted(files, key=_torchvision_order)]
            for name, files in sorted(classes.items())
        }


def read_layout(files: ImageFiles) -> Layout:
    """Return which folders are splits and which are classes.

    A split is a folder that contains class folders and whose name means a split (`split_of`). A single folder
    around all images is skipped. Without splits, all images are training images.

    Raises:
        DataError: If no folder holds an image, or if the names are ambiguous.
    """
    root, images, depth = files.root, files.images, 0
    folders = _folders(images, depth)
    if not folders:
        raise DataError(
            f"data.path: {root} holds no images in one folder for each class, no Parquet, no cifar-10-batches-py. The "
            f"directory holds {files.contents()}. {files.summary()}".rstrip()
        )
    while len(folders) == 1 and not (splits := _nested_splits(folders, depth)):
        ((name, nested),) = folders.items()
        if not (nested_folders := _folders(nested, depth + 1)) or split_of(name):
            break
        images, folders, depth = nested, nested_folders, depth + 1
    base = images[0][:depth]
    folder = root.joinpath(*base)
    splits = _nested_splits(folders, depth)
    if not splits:
        _check_classes(folder, folders, depth)
        named = [name for name in folders if split_of(name)]
        notes = [f"the folder {name} of {folder} is read as a class, as are its neighbours" for name in named]
        return _layout(files, {"train": (depth, images)}, {"train": str(Path(*base))}, [], notes)
    by_split: dict[str, list[str]] = defaultdict(list)
    for name in sorted(folders):
        by_split[split_of(name) or ""].append(name)
    others = by_split.pop("", [])
    for split, names in by_split.items():
        if len(names) > 1:
            raise DataError(
                f"data.path: {folder} has several {split} splits: {listed(names)}. Keep one of these folders."
            )
    if others and len(by_split) == 1:
        raise DataError(
            f"data.path: in {folder}, {splits[0]} may be a split or a class beside {listed(others)}. Rename "
            f"{splits[0]}, or move the other folders elsewhere."
        )
    splits_found = {split: _unwrapped(names[0], folders[names[0]], depth) for split, names in by_split.items()}
    ignored = [parts for name in others for parts in folders[name]]
    ignored_note = f"left out of {folder}: {counted(len(ignored), 'image')} in {listed(others)}, beside the splits"
    notes = [ignored_note] if others else []
    paths = {split: str(Path(*base, names[0])) for split, names in by_split.items()}
    return _layout(files, splits_found, paths, ignored, notes)


def _layout(
    files: ImageFiles,
    splits: dict[str, tuple[int, list[Parts]]],
    names: dict[str, str],
    ignored: list[Parts],
    notes: list[str],
) -> Layout:
    """Return a layout. Add notes on images in subfolders of a class folder and on images in no class folder.

    Images in `ignored` have a note already.
    """
    inner = sorted({os.sep.join(p[depth:-1]) for depth, kept in splits.values() for p in kept if len(p) > depth + 2})
    if inner:
        notes = [*notes, f"images of {listed(inner, 3)} belong to the class that the outer folder names"]
    placed = {parts for depth, images in splits.values() for parts in images if len(parts) > depth + 1}.union(ignored)
    if stray := [os.sep.join(parts) for parts in files.images if parts not in placed]:
        notes = [
            *notes,
            f"left out of {files.root}: {counted(len(stray), 'image')} in no class folder ({listed(stray)})",
        ]
    return Layout(files, splits, names, notes)


def _folders(images: list[Parts], depth: int) -> dict[str, list[Parts]]:
    """Group images by the folder at a depth. Images above this depth are left out."""
    folders: dict[str, list[Parts]] = defaultdict(list)
    for parts in images:
        if len(parts) > depth + 1:
            folders[parts[depth]].append(parts)
    return dict(folders)


def _nested_splits(folders: dict[str, list[Parts]], depth: int) -> list[str]:
    """Return the folders that hold folders of images, and whose name means a split."""
    return sorted(name for name, images in folders.items() if split_of(name) and _folders(images, depth + 1))


def _unwrapped(name: str, images: list[Parts], depth: int) -> tuple[int, list[Parts]]:
    """Return the depth of a split's class folders, and the images. The split may be doubled: train/train/<class>."""
    classes = _folders(images, depth + 1)
    if len(classes) == 1 and split_of(next(iter(classes))) == split_of(name):
        return depth + 2, next(iter(classes.values()))
    return depth + 1, images


def _check_classes(here: Path, folders: dict[str, list[Parts]], depth: int) -> None:
    """Check that class folders are not splits with unexpected names or at a wrong depth.

    Raises:
        DataError: If the names look like splits, or if the folders contain splits.
    """
    resembling = {name: split for name in sorted(folders) if (split := _resembled_split(name))}
    several = len(set(resembling.values())) > 1 and 2 * len(resembling) >= len(folders)
    if several or len(resembling) == len(folders):
        flat = [name for name in resembling if split_of(name)]
        reason = f" {listed(flat)} hold images and no class folders." if flat else ""
        raise DataError(
            f"data.path: the folders of {here} look like splits: {listed(sorted(folders))}.{reason} Name them train, "
            "val and test, with one folder for each class in each split."
        )
    for name, images in sorted(folders.items()):
        nested = _folders(images, depth + 1)
        means = [split_of(folder) for folder in nested]
        if nested and (None not in means or len({*means} - {None}) > 1):
            raise DataError(
                f"data.path: {here} has splits in {name}: {listed(sorted(nested))}. Splits must be the outer folders, "
                f"<split>/<class>; or give one data set, as {here / name}."
            )


def _resembled_split(name: str) -> str | None:
    """Return the split that one word of a name means, as in `seg_train`, `test1` or `trainA`."""
    words = [name, *re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return next((split for word in words if (split := split_of(word))), None)


def _torchvision_order(parts: Parts) -> tuple[str, str]:
    return os.sep.join(parts[:-1]), parts[-1]
