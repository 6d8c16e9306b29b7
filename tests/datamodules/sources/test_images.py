"""Sources of images: every layout gives the same pixels and labels, or one message names the fault and the file."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from datamodules.sources.findings import Findings
from datamodules.sources.images import ImageError, ImageTable, decode_image, open_folder, open_images, open_split
from tests.support.data import put
from tests.support.malicious import Malicious
from tests.support.refusals import refuses
from tests.support.small_data import CLASSES, colour_image, encoded, png

Pixels = np.ndarray
NAMED = datasets.ClassLabel(names=CLASSES)
WHOLE, DECIMAL, TEXT = (datasets.Value(kind) for kind in ("int64", "float32", "string"))


def pictures(count: int, seed: int = 0) -> list[Pixels]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (6 + i, 9, 3)).astype(np.uint8) for i in range(count)]


IMAGES = pictures(6)


def cell(pixels: Pixels) -> dict[str, Any]:
    return {"bytes": png(pixels), "path": None}


def write(file: Path, **columns: tuple[Any, list[Any]]) -> Path:
    """Write a Parquet file with the hub's column types as metadata. Values are not checked against these types."""
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features({name: feature for name, (feature, _) in columns.items()}).arrow_schema
    pq.write_table(pa.table({name: values for name, (_, values) in columns.items()}, schema=schema), file)
    return file


def write_split(
    file: Path, images: list[Pixels], labels: list[Any], image: str = "img", label: str = "label", named: Any = NAMED
) -> Path:
    return write(file, **{image: (datasets.Image(), [cell(i) for i in images]), label: (named, labels)})


def opened(path: Path, split: str = "train", image: str | None = None, label: str | None = None) -> ImageTable:
    table = open_split(str(path), split, image, label)
    assert table is not None
    return table


def shows(table: ImageTable, images: list[Pixels], labels: list[int] | None = None) -> bool:
    """Return True if the table has exactly these pixels, (height, width, 3), and labels, in this order."""
    decoded = [table.decode(row) for row in range(len(table))]
    assert {d.dtype for d in decoded} == {torch.uint8}
    same = [np.array_equal(d.permute(1, 2, 0).numpy(), i) for d, i in zip(decoded, images, strict=True)]
    return all(same) and table.labels.dtype == torch.int64 and labels in (None, table.labels.tolist())


# ------------------------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("name", ["{}.parquet", "data/{}-00000-of-00001.parquet", "plain_text/data/{}-0.parquet"])
def test_every_parquet_layout_is_read(tmp_path: Path, name: str, column: str) -> None:
    write_split(tmp_path / name.format("train"), IMAGES[:3], [2, 0, 1], image=column)
    write_split(tmp_path / name.format("test"), IMAGES[3:5], [1, 1], image=column)
    train = opened(tmp_path)
    assert shows(train, IMAGES[:3], [2, 0, 1])
    assert shows(opened(tmp_path, "test"), IMAGES[3:5], [1, 1])
    assert train.class_names == CLASSES
    assert open_split(str(tmp_path), "val", None, None) is None
    assert str(tmp_path / name.format("train")) in train.names[1]
    assert "row 1" in train.names[1]


def test_a_column_that_differs_in_case_is_named(tmp_path: Path) -> None:
    file, findings = write_split(tmp_path / "train.parquet", IMAGES[:1], [0], image="Image"), Findings()
    assert open_split(str(tmp_path), "train", None, None, findings) is not None
    assert f"data.image_column: the column Image of {file} is read" in findings.take_lines()


@pytest.mark.parametrize("name", ["validation", "val", "valid", "data/validation-00000-of-00001", "data/val-0"])
def test_shards_and_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    for i in (2, 0, 1):
        write_split(tmp_path / f"data/train-0000{i}-of-00003.parquet", IMAGES[2 * i : 2 * i + 2], [i, i])
    write_split(tmp_path / f"{name}.parquet", IMAGES[1:3], [1, 2])
    assert shows(opened(tmp_path), IMAGES, [0, 0, 1, 1, 2, 2])
    assert shows(opened(tmp_path, "val"), IMAGES[1:3], [1, 2])


def test_keys_name_the_columns(tmp_path: Path) -> None:
    images, thumbs = ((datasets.Image(), [cell(i) for i in part]) for part in (IMAGES[:2], IMAGES[2:4]))
    coarse = (datasets.ClassLabel(names=["warm", "cold"]), [1, 0])
    write(tmp_path / "train.parquet", img=images, thumb=thumbs, label=(NAMED, [0, 1]), coarse=coarse)
    assert shows(opened(tmp_path), IMAGES[:2], [0, 1])
    table = opened(tmp_path, image="thumb", label="coarse")
    assert shows(table, IMAGES[2:4], [1, 0])
    assert table.class_names == ["warm", "cold"]


@pytest.mark.parametrize(
    ("column", "kind", "labels", "values", "names"),
    [
        *((column, NAMED, [1, 2, 1], [1, 2, 1], CLASSES) for column in ("label", "labels", "fine_label")),
        *(("label", datasets.Value(k), [4, 0, 2], [2, 0, 1], ["0", "2", "4"]) for k in ("int64", "int8", "uint16")),
        ("label", TEXT, ["red", "blue", "red"], [1, 0, 1], ["blue", "red"]),
    ],
)
def test_labels_of_every_type_are_read(
    tmp_path: Path, column: str, kind: Any, labels: Any, values: list[int], names: list[str]
) -> None:
    write_split(tmp_path / "train.parquet", IMAGES[:3], labels, label=column, named=kind)
    table = opened(tmp_path)
    assert (table.labels.tolist(), table.class_names) == (values, names)


def test_images_may_be_plain_bytes(tmp_path: Path) -> None:
    image = (datasets.Value("binary"), [png(i) for i in IMAGES[:2]])
    write(tmp_path / "train.parquet", image=image, label=(NAMED, [0, 1]))
    assert shows(opened(tmp_path), IMAGES[:2])


# ------------------------------------------------------------------------------------------------------- image folders


def save_image(file: Path, pixels: Pixels) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def test_a_folder_without_splits_is_training_data(tmp_path: Path) -> None:
    for file, pixels in zip(("ant/1.png", "ant/2.bmp", "bee/deeper/0.PNG"), IMAGES, strict=False):
        save_image(tmp_path / file, pixels)
    put(tmp_path / "ant/notes.txt", "no image")
    (tmp_path / "cow").mkdir()
    findings = Findings()
    table = open_split(str(tmp_path), "train", None, None, findings)
    assert table is not None
    assert shows(table, IMAGES[:3], [0, 0, 1])
    assert table.class_names == ["ant", "bee"]
    assert table.names[2] == str(tmp_path / "bee/deeper/0.PNG")
    left_out = f"left out of {tmp_path}: .txt files (1), 1 folder without an image (cow)."
    assert left_out in findings.take_lines()
    assert [open_split(str(tmp_path), split, None, None) for split in ("val", "test")] == [None, None]


def test_images_to_predict_are_sorted_by_name(tmp_path: Path) -> None:
    for file, pixels in zip(("a.png", "b/c/2.png", "b/c/a.PNG", "z.bmp"), IMAGES, strict=False):
        save_image(tmp_path / file, pixels)
    put(tmp_path / "b/readme.md", "no image")
    (tmp_path / "folder.png").mkdir()
    table = open_folder(str(tmp_path))
    assert list(table.names) == ["a.png", "b/c/2.png", "b/c/a.PNG", "z.bmp"]
    assert shows(table, IMAGES[:4], [])
    assert table.class_names == []


@pytest.mark.parametrize("column", ["image", "img", "file_name", "photo"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_to_predict_has_images_or_paths(
    tmp_path: Path, suffix: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths begin at the table's folder, not here
    for name, pixels in zip(("1", "b/2.png"), IMAGES, strict=False):
        put(tmp_path / "photos" / name, png(pixels))
    paths = ["b/2.png", "1", str(tmp_path / "photos/1"), None, "gone.png"]
    rows = datasets.Dataset.from_dict({column: paths, "who": ["007", "1", "2", "3", "4"]})
    file = tmp_path / f"photos/new{suffix}"
    {".csv": rows.to_csv, ".jsonl": rows.to_json, ".parquet": rows.to_parquet}[suffix](str(file))
    key = "photo" if column == "photo" else None
    table = open_images("photos/" + file.name, key, "WHO", Findings())
    assert shows(replace(table, names=table.names[:3]), [IMAGES[1], IMAGES[0], IMAGES[0]], [])
    assert table.names == [*paths[:3], f"photos/{file.name} row 3", "gone.png"]
    assert table.source is not None
    assert table.source.data["WHO"][:] == rows["who"][:]
    for row, reason in ((3, "the image is empty"), (4, "No such file")):
        with pytest.raises(ImageError, match=reason):
            table.decode(row)
    embedded = write_split(tmp_path / "embedded.parquet", IMAGES[:2], [0, 1])
    assert shows(open_images(str(embedded), None, None, Findings()), IMAGES[:2], [])


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    numbers = put(tmp_path / "new.jsonl", '{"image": 1, "who": "a"}\n')
    with refuses("data.image_column: image in", "does not hold images", "Name another column."):
        open_images(str(numbers), None, "who", Findings())
    with refuses("data.image_column", "no column photo; it has image, who"):
        open_images(str(numbers), "photo", "who", Findings())
    with refuses("data.predict_path", "new.csv has no rows"):
        open_images(str(put(tmp_path / "new.csv", "image,who\n")), None, "who", Findings())


# ------------------------------------------------------------------------------------------------------------- colours


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 100, 150, 200])
    image.putpixel((1, 0), 1)
    return image


def black_and_white() -> Image.Image:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    return image


GREY = np.array([[0, 7], [200, 255]], np.uint8)
CLEAR = np.array([[[1, 2, 3, 0], [250, 128, 5, 77]]], np.uint8)
# CMYK: no ink is white, full cyan leaves green and blue, full black is black
INKS = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}


@pytest.mark.parametrize(
    ("content", "pixels", "off"),
    [
        (encoded(Image.fromarray(GREY), "PNG"), np.repeat(GREY[..., None], 3, -1), 0),
        (encoded(Image.fromarray(CLEAR), "PNG"), CLEAR[..., :3], 0),
        *(
            (encoded(palette(), "PNG", **options), [[(9, 8, 7), (100, 150, 200)]], 0)
            for options in ({}, {"transparency": b"\x00\xff"})
        ),
        (encoded(black_and_white(), "PNG"), [[(0, 0, 0), (255, 255, 255)]], 0),
        *(
            (encoded(Image.new("CMYK", (8, 8), ink), kind), [[colour] * 8] * 8, 2)  # tolerance for JPEG
            for kind in ("TIFF", "JPEG")
            for ink, colour in INKS.items()
        ),
    ],
)
def test_every_colour_mode_becomes_rgb(content: bytes, pixels: Any, off: int) -> None:
    decoded = decode_image(content).permute(1, 2, 0).numpy()
    assert decoded.shape == np.shape(pixels)
    assert np.abs(decoded.astype(int) - pixels).max() <= off


def test_a_jpeg_is_decoded_as_by_pillow() -> None:
    content = encoded(Image.fromarray(colour_image(1, np.random.default_rng(0), 24)), "JPEG", quality=70)
    expected = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode_image(content).permute(1, 2, 0).numpy(), expected)


def test_labels_are_mapped_by_class_names() -> None:
    table = ImageTable(lambda row: Path(str(row)), ["0", "1", "2"], torch.tensor([0, 1, 1]), ["b", "c", "d"])
    among = table.with_classes(["c", "a", "b"], "here")
    assert (among.labels.tolist(), among.class_names) == ([2, 0, 0], ["c", "a", "b"])
    assert (among.read, among.names) == (table.read, table.names)
    assert table.labels.tolist() == [0, 1, 1]
    with refuses("data.path", "the val split of x", "(c)", "The model knows 2: a, b."):  # class d has no images
        table.with_classes(["a", "b"], "the val split of x")


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Pixels]]:
    """Return a folder in the format of cifar-10-batches-py, and its nine images. torchvision expects its checksums."""
    images = [colour_image(i % 3, np.random.default_rng(i), 32) for i in range(9)]
    # channels first: all red values, then green, then blue
    rows = np.stack(images).transpose(0, 3, 1, 2).reshape(9, 3072)
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
def test_a_cifar10_folder_is_read(cifar: tuple[Path, list[Pixels]], parent: bool) -> None:
    folder, images = cifar
    path = folder.parent if parent else folder
    train, test = opened(path), opened(path, "test")
    assert shows(train, images[:7], [0, 1, 2, 0, 1, 2, 0])
    assert shows(test, images[7:], [1, 2])
    assert train.class_names == test.class_names == CLASSES
    assert open_split(str(path), "val", None, None) is None
    with refuses("data.skip_label", "is not a table", "Remove the key"):
        open_split(str(path), "train", None, None, skip_label=-1)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_tampered_cifar10_is_refused_before_unpickling(
    cifar: tuple[Path, list[Pixels]], tmp_path: Path, name: str, split: str
) -> None:
    folder, _ = cifar
    (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "code-ran")))
    with refuses("data.path", str(folder.parent), "CIFAR-10"):
        opened(folder.parent, split)
    assert not (tmp_path / "code-ran").exists()
    (folder / name).unlink()
    with refuses("data.path", str(folder.parent), "CIFAR-10"):
        opened(folder.parent, split)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./nowhere", "~/nowhere", "some/other/folder", "beans", "hub/name"]
)
def test_a_missing_directory_is_refused(path: str) -> None:
    with refuses("data.path", path, *(["--data.path DIRECTORY"] if path in ("beans", "hub/name") else ["is not here"])):
        open_split(path, "train", None, None)
    with refuses("data.predict_path", path, "does not exist. Give an image or a folder"):
        open_images(path, None, None, Findings())


def test_folders_without_images_or_training_images_are_refused(tmp_path: Path) -> None:
    with refuses("data.path", str(tmp_path), "no images"):
        opened(tmp_path)
    put(tmp_path / "notes.txt", "no image")
    with refuses("data.predict_path", str(tmp_path), "no image", ".png"):
        open_folder(str(tmp_path))
    for split in ("val", "test"):
        save_image(tmp_path / "set" / split / "ant/1.png", IMAGES[0])
    with refuses(str(tmp_path / "set"), "train"):
        opened(tmp_path / "set")
    file = write_split(tmp_path / "test.parquet", IMAGES[:1], [0])
    with refuses("data.path", str(tmp_path), "train.parquet"):
        opened(tmp_path)
    assert len(opened(tmp_path, "test")) == 1
    with refuses(str(file), "is not a directory"):
        opened(file)


LISTS = datasets.List(WHOLE)
# split, columns named by keys, parts of the message
BAD: list[tuple[dict[str, Any], tuple[str | None, str | None], tuple[str, ...]]] = [
    ({"labels": []}, (None, None), ("data.path", "train.parquet")),
    ({"image": "picture"}, (None, None), ("data.image_column", "img or image", "picture, label")),
    ({"label": "target"}, (None, None), ("data.label_column", "label or labels or fine_label", "img, target")),
    ({}, ("image", None), ("data.image_column", "train.parquet", "image", "img, label")),
    ({}, (None, "lable"), ("data.label_column", "train.parquet", "lable", "img, label")),
    ({"labels": [0, 1, 3]}, (None, None), ("is 3 in row 2, outside 0 to 2", "1 of 3")),
    ({"labels": [0, -1, -1]}, (None, None), ("is -1 in row 1, outside 0 to 2", "2 of 3")),
    ({"labels": [-1] * 3, "named": WHOLE}, (None, None), ("is -1 in every row", "hidden")),
    ({"labels": [0.0, 0.7], "named": DECIMAL}, (None, None), ("data.label_column", "not decimal numbers")),
    ({"labels": [0, None], "named": WHOLE}, (None, None), ("data.label_column", "empty in row 1")),
    ({"labels": [[0, 1], [1, 0]], "named": LISTS}, (None, None), ("data.label_column", "must hold numbers or names")),
]


@pytest.mark.parametrize(("keys", "columns", "parts"), BAD)
def test_bad_tables_are_refused(
    tmp_path: Path, keys: dict[str, Any], columns: tuple[str | None, str | None], parts: tuple[str, ...]
) -> None:
    labels = keys.get("labels", [0])
    write_split(tmp_path / "train.parquet", IMAGES[: len(labels)], **{**keys, "labels": labels})
    with refuses(*parts):
        opened(tmp_path, "train", *columns)


def test_a_column_without_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", img=(WHOLE, [1]), label=(NAMED, [0]))
    with refuses("data.image_column", "img", "train.parquet"):
        opened(tmp_path)


RED = png(colour_image(0, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"bytes": b"this is no image", "path": None}, "cannot be identified"),
        ({"bytes": RED[: len(RED) // 2], "path": None}, "cannot be decoded"),
        ({"bytes": RED[:9] + b"\0" * 9 + RED[18:], "path": None}, "cannot be decoded"),
        ({"bytes": b"", "path": None}, "the image is empty"),
        (None, "the image is empty"),
        ({"bytes": None, "path": "/nowhere/1.png"}, "/nowhere/1.png"),
        ({"bytes": None, "path": None}, "the image is empty"),
    ],
)
def test_damaged_images_in_parquet_are_refused(tmp_path: Path, content: dict[str, Any] | None, part: str) -> None:
    images = (datasets.Image(), [cell(IMAGES[0]), content])
    write(tmp_path / "train.parquet", img=images, label=(NAMED, [0, 1]))
    table = opened(tmp_path)
    assert np.array_equal(table.decode(0).permute(1, 2, 0).numpy(), IMAGES[0])
    with refuses("data.path", "train.parquet row 1", part):
        table.decode(1)


@pytest.mark.parametrize(
    ("name", "content"),
    [("1.png", b""), ("1.png", RED[: len(RED) // 2]), ("1.ppm", b"P6\n2 x 255\n" + b"\0" * 12), ("1.png", None)],
)
def test_damaged_image_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = put(tmp_path / "train/ant" / name, content or RED)
    table, folder = opened(tmp_path), open_folder(str(tmp_path))
    file.unlink()
    if content is not None:
        put(file, content)
    for opened_table, said in ((table, f"data.path: the image {file}"), (folder, f"ant/{name}")):
        with refuses(said, "cannot be decoded", "No such file" if content is None else ""):
            opened_table.decode(0)


@pytest.mark.parametrize(("keep", "part"), [(0, "is an empty file"), (3, "parquet"), (100, "parquet")])
def test_truncated_parquet_is_refused(tmp_path: Path, keep: int, part: str) -> None:
    file = write_split(tmp_path / "data/train-00000-of-00001.parquet", IMAGES[:2], [0, 1])
    file.write_bytes(file.read_bytes()[:keep])
    with refuses("data.path", str(file), part):
        opened(tmp_path)
