"""Every place that images come from gives the same pixels and labels, or one message that says what is wrong where."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from datamodules.errors import DataError
from datamodules.sources.findings import Findings
from datamodules.sources.images import ImageTable, open_folder, open_split
from tests.conftest import CLASSES, colour_image, png

Pixels = np.ndarray
NAMED = datasets.ClassLabel(names=CLASSES)


def pictures(count: int, seed: int = 0) -> list[Pixels]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (6 + i, 9, 3)).astype(np.uint8) for i in range(count)]


def cell(pixels: Pixels) -> dict[str, Any]:
    return {"bytes": png(pixels), "path": None}


def write(file: Path, columns: dict[str, tuple[Any, list[Any]]]) -> Path:
    """A Parquet file with the hub's notes on its columns; values are not checked against them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features({name: feature for name, (feature, _) in columns.items()}).arrow_schema
    pq.write_table(pa.table({name: values for name, (_, values) in columns.items()}, schema=schema), file)
    return file


def write_split(
    file: Path, images: list[Pixels], labels: list[int], image: str = "img", label: str = "label", named: Any = NAMED
) -> Path:
    return write(file, {image: (datasets.Image(), [cell(i) for i in images]), label: (named, labels)})


def opened(path: Path, split: str = "train", image: str | None = None, label: str | None = None) -> ImageTable:
    table = open_split(str(path), split, image, label)
    assert table is not None
    return table


def shows(table: ImageTable, images: list[Pixels]) -> bool:
    """Whether the table has these pixels, (height, width, 3), in this order, bit for bit."""
    decoded = [table.decode(row) for row in range(len(table))]
    assert {d.dtype for d in decoded} == {torch.uint8}
    same = [np.array_equal(d.permute(1, 2, 0).numpy(), i) for d, i in zip(decoded, images, strict=True)]
    return all(same)


def refuses(*parts: str) -> Any:
    """A DataError whose message has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# ------------------------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("name", ["{}.parquet", "data/{}-00000-of-00001.parquet", "plain_text/data/{}-0.parquet"])
def test_parquet_layouts(tmp_path: Path, name: str, column: str) -> None:
    images = pictures(5)
    write_split(tmp_path / name.format("train"), images[:3], [2, 0, 1], image=column)
    write_split(tmp_path / name.format("test"), images[3:], [1, 1], image=column)
    train, test = opened(tmp_path), opened(tmp_path, "test")
    assert shows(train, images[:3])
    assert shows(test, images[3:])
    assert train.labels.tolist() == [2, 0, 1]
    assert test.labels.tolist() == [1, 1]
    assert train.labels.dtype == torch.int64
    assert train.class_names == CLASSES
    assert open_split(str(tmp_path), "val", None, None) is None
    assert str(tmp_path / name.format("train")) in train.names[1]
    assert "row 1" in train.names[1]


@pytest.mark.parametrize("name", ["validation", "val", "valid", "data/validation-00000-of-00001", "data/val-0"])
def test_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    images = pictures(3)
    write_split(tmp_path / "train.parquet", images[:1], [0])
    write_split(tmp_path / f"{name}.parquet", images[1:], [1, 2])
    assert shows(opened(tmp_path, "val"), images[1:])
    assert shows(opened(tmp_path), images[:1])


def test_shards_follow_each_other(tmp_path: Path) -> None:
    images = pictures(6)
    for i in (2, 0, 1):
        write_split(tmp_path / f"data/train-0000{i}-of-00003.parquet", images[2 * i : 2 * i + 2], [i, i])
    table = opened(tmp_path)
    assert shows(table, images)
    assert table.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_usual_label_columns(tmp_path: Path, column: str) -> None:
    write_split(tmp_path / "train.parquet", pictures(2), [1, 2], label=column)
    assert opened(tmp_path).labels.tolist() == [1, 2]


def test_columns_by_key(tmp_path: Path) -> None:
    images = pictures(4)
    columns = {
        "img": (datasets.Image(), [cell(i) for i in images[:2]]),
        "thumb": (datasets.Image(), [cell(i) for i in images[2:]]),
        "label": (NAMED, [0, 1]),
        "coarse": (datasets.ClassLabel(names=["warm", "cold"]), [1, 0]),
    }
    write(tmp_path / "train.parquet", columns)
    assert shows(opened(tmp_path), images[:2])
    table = opened(tmp_path, image="thumb", label="coarse")
    assert shows(table, images[2:])
    assert table.labels.tolist() == [1, 0]
    assert table.class_names == ["warm", "cold"]


@pytest.mark.parametrize("kind", ["int64", "int8", "uint16"])
def test_labels_without_names_are_their_numbers(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path / "train.parquet", pictures(3), [4, 0, 2], named=datasets.Value(kind))
    table = opened(tmp_path)
    assert table.labels.tolist() == [2, 0, 1]
    assert table.class_names == ["0", "2", "4"]


def test_images_as_plain_bytes(tmp_path: Path) -> None:
    images = pictures(2)
    columns = {"image": (datasets.Value("binary"), [png(i) for i in images]), "label": (NAMED, [0, 1])}
    write(tmp_path / "train.parquet", columns)
    assert shows(opened(tmp_path), images)


# ------------------------------------------------------------------------------------------------------- image folders


def save_image(file: Path, pixels: Pixels) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def test_folder_without_splits_is_all_for_training(tmp_path: Path) -> None:
    images = pictures(3)
    for file, pixels in zip(("ant/1.png", "ant/2.bmp", "bee/deeper/0.PNG"), images, strict=True):
        save_image(tmp_path / file, pixels)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    table = opened(tmp_path)
    assert shows(table, images)
    assert table.class_names == ["ant", "bee"]
    assert table.labels.tolist() == [0, 0, 1]
    assert table.names[2] == str(tmp_path / "bee/deeper/0.PNG")
    for split in ("val", "test"):
        assert open_split(str(tmp_path), split, None, None) is None


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    images = dict(zip(("train", val, "test"), pictures(3), strict=True))
    for split, pixels in images.items():
        save_image(tmp_path / split / "ant" / "1.png", pixels)
        save_image(tmp_path / split / "bee" / "1.png", pixels)
    for split, name in (("train", "train"), ("val", val), ("test", "test")):
        table = opened(tmp_path, split)
        assert shows(table, [images[name]] * 2)
        assert table.class_names == ["ant", "bee"]


def test_folder_with_splits_but_none_for_training(tmp_path: Path) -> None:
    for split in ("val", "test"):
        save_image(tmp_path / split / "ant" / "1.png", pictures(1)[0])
    with refuses(str(tmp_path), "train"):
        opened(tmp_path)


def test_open_folder_is_in_the_order_of_names(tmp_path: Path) -> None:
    images = pictures(4)
    for file, pixels in zip(("a.png", "b/c/2.png", "b/c/a.PNG", "z.bmp"), images, strict=True):
        save_image(tmp_path / file, pixels)
    (tmp_path / "b" / "readme.md").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    table = open_folder(str(tmp_path))
    assert list(table.names) == ["a.png", "b/c/2.png", "b/c/a.PNG", "z.bmp"]
    assert shows(table, images)
    assert len(table.labels) == 0
    assert table.class_names == []


# ------------------------------------------------------------------------------------------------------------- colours


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def only(content: bytes) -> Tensor:
    return ImageTable(lambda _: content, ["it"], torch.zeros(1, dtype=torch.int64), ["a"]).decode(0)


def rgb(*rows: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8).permute(2, 0, 1)


def test_greyscale_has_three_equal_channels() -> None:
    grey = np.array([[0, 7], [200, 255]], np.uint8)
    assert torch.equal(only(encoded(Image.fromarray(grey), "PNG")), torch.from_numpy(grey).expand(3, 2, 2))


def test_alpha_is_dropped() -> None:
    pixels = np.array([[[1, 2, 3, 0], [250, 128, 5, 77]]], np.uint8)
    assert torch.equal(only(encoded(Image.fromarray(pixels), "PNG")), rgb([(1, 2, 3), (250, 128, 5)]))


@pytest.mark.parametrize("options", [{}, {"transparency": b"\x00\xff"}])
def test_palette_is_looked_up(options: dict[str, Any]) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 100, 150, 200])
    image.putpixel((1, 0), 1)
    assert torch.equal(only(encoded(image, "PNG", **options)), rgb([(9, 8, 7), (100, 150, 200)]))


def test_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert torch.equal(only(encoded(image, "PNG")), rgb([(0, 0, 0), (255, 255, 255)]))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    # no ink is white, full cyan leaves green and blue, full black is black
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        decoded = only(encoded(Image.new("CMYK", (8, 8), ink), kind))
        assert decoded.shape == (3, 8, 8)
        assert (decoded.int() - rgb([colour]).int()).abs().max() <= 2  # JPEG rounds


def test_jpeg_as_pillow_decodes_it() -> None:
    content = encoded(Image.fromarray(colour_image(1, np.random.default_rng(0), 24)), "JPEG", quality=70)
    expected = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(only(content).permute(1, 2, 0).numpy(), expected)


# ------------------------------------------------------------------------------------------------------------- classes


def labelled(names: list[str], labels: list[int]) -> ImageTable:
    rows = [str(i) for i in range(len(labels))]
    return ImageTable(lambda row: Path(rows[row]), rows, torch.tensor(labels), names)


def test_labels_follow_the_names_of_their_classes() -> None:
    table = labelled(["b", "c"], [0, 1, 1])
    among = table.with_classes(["c", "a", "b"], "here")
    assert among.labels.tolist() == [2, 0, 0]
    assert among.labels.dtype == torch.int64
    assert among.class_names == ["c", "a", "b"]
    assert (among.read, among.names) == (table.read, table.names)
    assert table.labels.tolist() == [0, 1, 1]
    assert table.with_classes(["b", "c"], "here").labels.tolist() == [0, 1, 1]


def test_classes_that_are_not_in_the_list() -> None:
    with refuses("data.path", "the val split of x", "(b)", "it knows 2: a, c."):  # d never occurs
        labelled(["a", "b", "c", "d"], [0, 1]).with_classes(["a", "c"], "the val split of x")


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Pixels]]:
    """A folder in the format of cifar-10-batches-py with nine images, and those; torchvision is told its sums."""
    images = [colour_image(i % 3, np.random.default_rng(i), 32) for i in range(9)]
    rows = np.stack(images).transpose(0, 3, 1, 2).reshape(9, 3072)  # all of red, then green, then blue
    labels = [i % 3 for i in range(9)]
    contents: dict[str, dict[str, Any]] = {
        "data_batch_1": {"data": rows[:4], "labels": labels[:4]},
        "data_batch_2": {"data": rows[4:7], "labels": labels[4:7]},
        "test_batch": {"data": rows[7:], "labels": labels[7:]},
        "batches.meta": {"label_names": CLASSES},
    }
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder, images


@pytest.mark.parametrize("parent", [True, False])
def test_cifar10_folder(cifar: tuple[Path, list[Pixels]], parent: bool) -> None:
    folder, images = cifar
    path = folder.parent if parent else folder
    train, test = opened(path), opened(path, "test")
    assert shows(train, images[:7])
    assert shows(test, images[7:])
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert test.labels.tolist() == [1, 2]
    assert train.class_names == test.class_names == CLASSES
    assert open_split(str(path), "val", None, None) is None


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_no_pickle_of_a_tampered_cifar10_is_opened(
    cifar: tuple[Path, list[Pixels]], tmp_path: Path, name: str, split: str
) -> None:
    folder, _ = cifar
    (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "code-ran")))
    with refuses("data.path", str(folder.parent), "CIFAR-10"):
        opened(folder.parent, split)
    assert not (tmp_path / "code-ran").exists()


def test_cifar10_with_a_file_missing(cifar: tuple[Path, list[Pixels]]) -> None:
    folder, _ = cifar
    (folder / "data_batch_2").unlink()
    with refuses("data.path", str(folder)):
        opened(folder)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere", "some/other/folder"])
def test_a_directory_that_is_not_there(path: str) -> None:
    with refuses("data.path", path, "is not here"):
        open_split(path, "train", None, None)
    with refuses("data.predict_path", path, "is not a directory"):
        open_folder(path)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    file = write_split(tmp_path / "train.parquet", pictures(1), [0])
    with refuses(str(file), "is not a directory"):
        opened(file)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with refuses("data.path", str(tmp_path), "no images"):
        opened(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with refuses("data.predict_path", str(tmp_path), "no image", ".png"):
        open_folder(str(tmp_path))


def test_a_class_without_images(tmp_path: Path) -> None:
    save_image(tmp_path / "train/ant/1.png", pictures(1)[0])
    (tmp_path / "train/bee").mkdir()
    findings = Findings()
    table = open_split(str(tmp_path), "train", None, None, findings)
    assert table is not None
    assert table.class_names == ["ant"]
    assert findings.take_lines() == [f"left out of {tmp_path}: 1 folders without an image (train/bee)."]


def test_parquet_without_a_training_split(tmp_path: Path) -> None:
    write_split(tmp_path / "test.parquet", pictures(1), [0])
    with refuses("data.path", str(tmp_path), "train.parquet"):
        opened(tmp_path)
    assert len(opened(tmp_path, "test")) == 1


def test_a_split_without_rows(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", [], [])
    with refuses("data.path", "train.parquet"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("image", "label", "parts"),
    [
        ("picture", "label", ("data.image_column", "train.parquet", "img or image", "picture, label")),
        ("img", "target", ("data.label_column", "train.parquet", "label or labels or fine_label", "img, target")),
    ],
)
def test_no_usual_column(tmp_path: Path, image: str, label: str, parts: tuple[str, ...]) -> None:
    write_split(tmp_path / "train.parquet", pictures(1), [0], image=image, label=label)
    with refuses(*parts):
        opened(tmp_path)


@pytest.mark.parametrize(("key", "chosen"), [("image_column", ("image", None)), ("label_column", (None, "lable"))])
def test_no_such_column(tmp_path: Path, key: str, chosen: tuple[str | None, str | None]) -> None:
    write_split(tmp_path / "train.parquet", pictures(1), [0])
    with refuses(f"data.{key}", "train.parquet", next(filter(None, chosen)), "img, label"):
        opened(tmp_path, "train", *chosen)


def test_a_column_that_holds_no_images(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"img": (datasets.Value("int64"), [1]), "label": (NAMED, [0])})
    with refuses("data.image_column", "img", "train.parquet"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("named", "labels", "parts"),
    [
        (NAMED, [0, 1, 3], ("is 3 in row 2, outside 0 to 2", "1 of 3")),
        (NAMED, [0, -1, -1], ("is -1 in row 1, outside 0 to 2", "2 of 3")),
        (datasets.Value("int64"), [-1, -1, -1], ("is -1 in row 0", "3 of 3", "hidden")),
    ],
)
def test_labels_out_of_range(tmp_path: Path, named: Any, labels: list[int], parts: tuple[str, ...]) -> None:
    write_split(tmp_path / "train.parquet", pictures(3), labels, named=named)
    with refuses("data.label_column", "train.parquet", *parts):
        opened(tmp_path)


def test_labels_by_name(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", pictures(3), ["red", "blue", "red"], named=datasets.Value("string"))
    table = opened(tmp_path)
    assert (table.class_names, table.labels.tolist()) == (["blue", "red"], [1, 0, 1])


@pytest.mark.parametrize(
    ("feature", "labels", "part"),
    [
        (datasets.Value("float32"), [0.0, 0.7], "not decimal numbers"),
        (datasets.Value("int64"), [0, None], "empty in row 1"),
        (datasets.List(datasets.Value("int64")), [[0, 1], [1, 0]], "must hold numbers or names"),
    ],
)
def test_labels_that_are_neither_numbers_nor_names(tmp_path: Path, feature: Any, labels: list[Any], part: str) -> None:
    write_split(tmp_path / "train.parquet", pictures(2), labels, named=feature)
    with refuses("data.label_column", "label", "train.parquet", part):
        opened(tmp_path)


WHOLE = png(colour_image(0, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"bytes": b"this is no image", "path": None}, "cannot identify"),
        ({"bytes": WHOLE[: len(WHOLE) // 2], "path": None}, "cannot be decoded"),
        ({"bytes": WHOLE[:9] + b"\0" * 9 + WHOLE[18:], "path": None}, "cannot be decoded"),
        ({"bytes": b"", "path": None}, "it is empty"),
        (None, "it is empty"),
        ({"bytes": None, "path": "/nowhere/1.png"}, "/nowhere/1.png"),
        ({"bytes": None, "path": None}, "it is empty"),
    ],
)
def test_damaged_images_in_parquet(tmp_path: Path, content: dict[str, Any] | None, part: str) -> None:
    good = pictures(1)[0]
    columns = {"img": (datasets.Image(), [cell(good), content]), "label": (NAMED, [0, 1])}
    write(tmp_path / "train.parquet", columns)
    table = opened(tmp_path)
    assert np.array_equal(table.decode(0).permute(1, 2, 0).numpy(), good)
    with refuses("data.path", "train.parquet row 1", part):
        table.decode(1)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(WHOLE[: len(WHOLE) // 2])


def bad_header(file: Path) -> None:
    file.write_bytes(b"P6\n2 x 255\n" + b"\0" * 12)


@pytest.mark.parametrize("damage", [empty, cut, bad_header])
def test_damaged_image_files(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = tmp_path / "train/ant" / ("1.ppm" if damage is bad_header else "1.png")
    file.parent.mkdir(parents=True)
    damage(file)
    with refuses("data.path", str(file), "cannot be decoded"):
        opened(tmp_path).decode(0)
    with refuses(file.name, "cannot be decoded"):
        open_folder(str(tmp_path)).decode(0)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    file = save_image(tmp_path / "ant/1.png", pictures(1)[0])
    table = opened(tmp_path)
    file.unlink()
    with refuses(str(file), "No such file"):
        table.decode(0)


@pytest.mark.parametrize(("keep", "part"), [(0, "is an empty file"), (3, "parquet"), (100, "parquet")])
def test_truncated_parquet(tmp_path: Path, keep: int, part: str) -> None:
    file = write_split(tmp_path / "data/train-00000-of-00001.parquet", pictures(2), [0, 1])
    file.write_bytes(file.read_bytes()[:keep])
    with refuses("data.path", str(file), part):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["beans", "some/hub-name"])
def test_hub_name_without_a_connection(name: str) -> None:
    with refuses("data.path", name, "--data.path DIRECTORY"):
        open_split(name, "train", None, None)
