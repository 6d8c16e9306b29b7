"""Cases of images: folders, modes, orientation, formats, bad files and timm's prefixes of names."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.models import save_for_hf

from app.cli import main
from datamodules.errors import DataError
from datamodules.sources.findings import Findings
from datamodules.sources.image_folders import FORMATS, SUFFIXES
from datamodules.sources.images import ImageTable, decode_image, open_folder, open_split
from modules.image_classification import ImageClassifier
from tests.app.conftest import undrawn  # noqa: F401 - a fixture that every test of this file uses
from tests.app.processes import run_on_two
from tests.support.malicious import Malicious
from tests.support.refusals import refuses
from tests.support.small_data import CLASSES, colour_image, encoded, png

Pixels = np.ndarray


def save(file: Path, label: int = 0, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(colour_image(label, np.random.default_rng(seed))))
    return file


def tree(root: Path, files: str) -> Path:
    """Write an image for each path in `files`, separated by spaces. Each image has another brightness."""
    for i, file in enumerate(files.split()):
        save(root / file, i % 3, i)
    return root


def found(root: Path) -> dict[str, dict[str, list[str]]]:
    """Return the files of each class of each split, relative to the root."""
    splits: dict[str, dict[str, list[str]]] = {}
    for split in ("train", "val", "test"):
        table = open_split(str(root), split, None, None)
        if table is not None:
            by_class: dict[str, list[str]] = {name: [] for name in table.class_names}
            for name, label in zip(table.names, table.labels.tolist(), strict=True):
                by_class[table.class_names[label]].append(str(Path(name).relative_to(root)))
            splits[split] = by_class
    return splits


def opened(root: Path) -> tuple[ImageTable, list[str]]:
    """Return the training images, and the log lines about assumptions and skipped files."""
    findings = Findings()
    table = open_split(str(root), "train", None, None, findings)
    assert table is not None
    return table, findings.take_lines()


def coloured(root: Path, train: int = 18, test: int = 6, train_name: str = "train", test_name: str = "test") -> Path:
    """Write folders of images of learnable classes: training images, and test images if `test` is above 0."""
    for name, size in ((train_name, train), (test_name, test)):
        for i in range(size):
            save(root / name / CLASSES[i % 3] / f"{i:02}.png", i % 3, i)
    return root


FAST = ["--config", "tests/conf/image.yaml", "--trainer.max_epochs", "1", "--data.batch_size", "3"]


def run(root: Path, data: Path, command: str, *options: str) -> int:
    return main([command, *FAST, "--trainer.default_root_dir", str(root), "--data.path", str(data), *options])


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def predictions(run_directory: Path) -> list[dict[str, str]]:
    return rows_of(run_directory / "predictions.csv")


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run in runs/ and its data."""
    root = tmp_path_factory.mktemp("fitted")
    assert run(root / "runs", coloured(root / "data"), "fit", "--model.learning_rate", "0.05") == 0
    return root


@pytest.fixture
def fitted(fitted_once: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(fitted_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


# --------------------------------------------------------------------------- 2: names of folders, splits and classes


@pytest.mark.parametrize("wrapper", ["", "dataset/", "archive/archive/"])
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", None, "Testing"),
        ("Train", "Val", "Test"),
        ("train", "dev", None),
        ("TRAIN", "eval", "TEST"),
        ("training_set", "validation-set", "test_set"),
        ("train images", "Development", "TestImages"),
    ],
)
def test_case_02_names_of_split_folders_are_recognised(
    tmp_path: Path, train: str, val: str | None, test: str | None, wrapper: str
) -> None:
    names = {"train": train, "val": val, "test": test}
    for name in filter(None, names.values()):
        for label in ("ant", "bee"):
            save(tmp_path / f"{wrapper}{name}" / label / "1.png")
    expected = {
        split: {label: [f"{wrapper}{name}/{label}/1.png"] for label in ("ant", "bee")}
        for split, name in names.items()
        if name
    }
    assert found(tmp_path) == expected


def test_case_02_split_folders_may_be_nested(tmp_path: Path) -> None:
    tree(
        tmp_path, "training_set/training_set/cat/1.png training_set/training_set/dog/1.png test_set/test_set/dog/1.png"
    )
    splits = found(tmp_path)
    assert [list(splits[split]) for split in ("train", "test")] == [["cat", "dog"], ["dog"]]


@pytest.mark.parametrize(
    "files",
    [
        "test/1.png control/1.png",
        "train/1.png bus/1.png car/1.png",
        "validation/1.png a/1.png b/1.png c/1.png test/1.png",  # two of five names are names of splits
    ],
)
def test_case_02_classes_may_have_the_name_of_a_split(tmp_path: Path, files: str) -> None:
    tree(tmp_path, files)
    table, lines = opened(tmp_path)
    assert table.class_names == sorted(file.split("/")[0] for file in files.split())
    assert any("read as a class" in line for line in lines)
    assert list(found(tmp_path)) == ["train"]


@pytest.mark.parametrize(
    ("files", "images", "expected"),
    [
        (
            "train/a/1.png train/b/1.png test/a/1.png extra/1.png extra/2.png",
            2,
            ["left out of {}: 2 images in extra, beside the splits"],
        ),
        (
            "cover.png train/a/1.png train/b/deep/1.png train/x.png test/y.png",
            2,
            [
                "images of b/deep belong to the class that the outer folder names",
                "left out of {}: 3 images in no class folder (cover.png, test/y.png, train/x.png)",
            ],
        ),
    ],
)
def test_case_02_images_outside_of_class_folders_are_reported(
    tmp_path: Path, files: str, images: int, expected: list[str]
) -> None:
    table, lines = opened(tree(tmp_path, files))
    assert (len(table), table.class_names) == (images, ["a", "b"])
    assert lines == [line.format(tmp_path) for line in expected]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ("train/a/1.png val/a/1.png dev/a/1.png", ["val", "dev", "several"]),
        ("train/a/1.png test/a/1.png Testing/a/1.png", ["Testing, test", "several"]),
        ("train/a/1.png train/b/1.png bus/1.png", ["train may be a split or a class", "bus"]),
        ("train/1.png test/1.png", ["look like splits", "no class folders"]),
        ("seg_train/a/1.png seg_test/a/1.png seg_pred/1.png", ["look like splits", "seg_pred, seg_test, seg_train"]),
        ("train2017/a/1.png val2017/a/1.png", ["look like splits"]),
        ("train/1.jpg test1/1.jpg", ["look like splits"]),
        ("trainA/1.png trainB/1.png testA/1.png testB/1.png", ["look like splits"]),
        ("ant/train/1.png ant/test/1.png bee/train/1.png bee/test/1.png", ["splits in ant", "<split>/<class>"]),
        ("test/a/1.png test/b/1.png val/a/1.png", ["no folder called train", "test/, val/"]),
        ("1.png 2.png", ["no images in one folder for each class", "1.png, 2.png"]),
    ],
)
def test_case_02_ambiguous_folders_are_refused(tmp_path: Path, files: str, parts: list[str]) -> None:
    tree(tmp_path, files)
    with pytest.raises(DataError, match=r"^data\.path: ") as caught:
        opened(tmp_path)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_case_02_a_test_folder_without_classes_does_not_affect_training(tmp_path: Path) -> None:
    assert len(opened(tree(tmp_path, "train/a/1.png train/b/1.png test/1.png"))[0]) == 2
    with refuses("test holds 1 image and no folder with images"):
        open_split(str(tmp_path), "test", None, None)


def test_case_02_a_fit_reports_its_splits_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coloured(tmp_path / "data", train_name="Training", test_name="Testing")
    assert run(tmp_path / "runs", data, "fit", "--test_after_fit", "true") == 0
    lines = capsys.readouterr().err.splitlines()
    train = f"train: 14 rows of {data}/Training, left after holding out val_fraction 0.2 (val_seed 0)"
    assert train in "\n".join(lines)
    assert f"val: 4 rows of {data}/Training, held out (no split of its own; val_fraction 0.2, val_seed 0)" in lines
    assert f"test: 6 rows of {data}/Testing" in lines
    classes = next(line for line in lines if line.startswith("labels: 3 classes: blue "))
    assert sum(int(word.rstrip(",")) for word in classes.split() if word.rstrip(",").isdigit()) == 14 + 3
    assert "test/acc1" in json.loads((tmp_path / "runs/version_0/metrics.json").read_text())


# ---------------------------------------------------------------------------------- 3: 16 bits and other colour modes


def png16(pixels: Pixels, colour_type: int) -> bytes:
    """Encode uint16 as PNG: colour type 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: Pixels, photometric: int = 1, sample_format: int = 1, big_endian: bool = False) -> bytes:
    """Encode pixels of any type as an uncompressed TIFF."""
    order = ">" if big_endian else "<"
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    bits, at = 8 * pixels.dtype.itemsize, 8 + 2 + 11 * 12 + 4

    def entry(tag: int, value: int, count: int = 1, kind: int = 4) -> bytes:
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        return struct.pack(order + "HHI", tag, kind, count) + packed

    arrays = [bits] * channels, [sample_format] * channels
    extra = b"".join(struct.pack(f"{order}{channels}H", *values) for values in arrays) if channels > 2 else b""
    places = [at, at + 2 * channels] if extra else [bits, sample_format]
    kinds = 4 if extra else 3
    entries = [
        entry(256, width),
        entry(257, height),
        struct.pack(order + "HHI", 258, 3, channels) + entry(0, places[0], 1, kinds)[8:],
        entry(259, 1, 1, 3),
        entry(262, photometric, 1, 3),
        entry(273, at + len(extra)),
        entry(277, channels, 1, 3),
        entry(278, height),
        entry(279, len(data)),
        entry(284, 1, 1, 3),
        struct.pack(order + "HHI", 339, 3, channels) + entry(0, places[1], 1, kinds)[8:],
    ]
    start = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(order + "IH", 8, len(entries))
    return start + b"".join(entries) + struct.pack(order + "I", 0) + extra + data


def pixels_of(content: bytes) -> Pixels:
    return decode_image(content).permute(1, 2, 0).numpy()


DEEP = np.array([[0, 257, 1000, 32768], [40000, 65534, 65535, 128]], np.uint16)
GREY = np.repeat(np.round(DEEP / 257).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.fromarray(DEEP), "PNG"), GREY),
        (encoded(Image.fromarray(DEEP), "TIFF"), GREY),
        (encoded(Image.fromarray(DEEP), "PPM"), GREY),
        (tiff(DEEP, big_endian=True), GREY),
        (tiff(DEEP, photometric=0), 255 - GREY),  # photometric 0: zero is white
        (b"P5\n2 1\n4095\n" + np.array([0, 4095], ">u2").tobytes(), np.array([[[0] * 3, [255] * 3]], np.uint8)),
    ],
)
def test_case_03_grey_of_16_bits_is_scaled(content: bytes, expected: Pixels) -> None:
    assert np.array_equal(pixels_of(content), expected)


COLOURS = np.random.default_rng(0).integers(0, 65536, (3, 5, 4)).astype(np.uint16)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png16(COLOURS[..., :3], 2), COLOURS[..., :3]),
        (png16(COLOURS, 6), COLOURS[..., :3]),
        (png16(COLOURS[..., :2], 4), COLOURS[..., [0, 0, 0]]),
        (tiff(COLOURS[..., :3], photometric=2), COLOURS[..., :3]),
        (tiff(COLOURS[..., :3], photometric=2, big_endian=True), COLOURS[..., :3]),
    ],
)
def test_case_03_colour_of_16_bits_is_scaled(content: bytes, expected: Pixels) -> None:
    assert np.abs(pixels_of(content) - expected / 257).max() < 1  # Pillow uses the upper byte


def test_case_03_a_jpeg_2000_of_16_bits_is_scaled(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(DEEP.repeat(8, 0).repeat(8, 1)), "JPEG2000", irreversible=False)
    assert np.abs(pixels_of(content)[::8, ::8].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF"), "F"),
        (encoded(Image.fromarray(np.array([[0, 70000, -5]], np.int32)), "TIFF"), "I"),
        (tiff(np.array([[-5, 700]], np.int16), sample_format=2), "I"),
        (b"Pf\n2 1\n-1.0\n" + np.array([0, 1], "<f4").tobytes(), "F"),
    ],
)
def test_case_03_modes_without_a_defined_white_are_refused(tmp_path: Path, content: bytes, mode: str) -> None:
    suffix = ".pfm" if content[:2] == b"Pf" else ".tif"
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / f"1{suffix}").write_bytes(content)
    table, _ = opened(tmp_path)
    with pytest.raises(DataError, match=rf"a/1\{suffix} cannot be decoded \(mode {mode}: .* 8 or 16 bits a channel"):
        table.decode(0)


def test_case_03_other_modes_become_rgb() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 60))
    for image, kind in [
        (red.quantize(4), "PNG"),
        (red.convert("CMYK"), "TIFF"),
        (red.convert("YCbCr"), "TIFF"),
        (red.convert("RGBA"), "PNG"),
    ]:
        # `convert` may round to the web palette
        assert np.abs(pixels_of(encoded(image, kind)).astype(int) - [200, 30, 60]).max() <= 27, image.mode
    for mode in ("LA", "PA"):
        grey = Image.new("LA", (8, 8), (77, 0)).convert(mode)  # transparent pixels keep their stored colour
        assert (pixels_of(encoded(grey, "TIFF")) == 77).all()
    white = Image.new("LAB", (8, 8), (255, 128, 128))
    assert (pixels_of(encoded(white, "TIFF")) >= 250).all()
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (pixels_of(encoded(clear, "PNG")) == [10, 20, 30]).all()


# ------------------------------------------------------------------------------------------------ 5: EXIF orientation

SCENE = np.kron(np.arange(1, 7, dtype=np.uint8).reshape(2, 3), np.ones((8, 8), np.uint8))[..., None] * np.array(
    [40, 20, 10], np.uint8
)


def with_orientation(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "A camera"
    return encoded(Image.fromarray(SCENE), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_case_05_photos_are_turned_upright(kind: str, orientation: int) -> None:
    content = with_orientation(kind, orientation)
    upright = {
        1: SCENE,
        2: SCENE[:, ::-1],
        3: SCENE[::-1, ::-1],
        4: SCENE[::-1],
        5: SCENE.transpose(1, 0, 2),
        6: np.rot90(SCENE, -1),
        7: SCENE.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(SCENE),
    }[orientation]
    decoded = pixels_of(content)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= (30 if kind == "JPEG" else 0)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(decoded, np.asarray(reference))


def test_case_05_every_source_turns_photos_upright(tmp_path: Path) -> None:
    content = with_orientation("JPEG", 6)
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / "files" / name).parent.mkdir(parents=True)
        (tmp_path / "files" / name).write_bytes(content)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [{"bytes": content, "path": None}] * 2, "label": [0, 1]}
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "table/train.parquet"))
    tables = [open_split(str(tmp_path / name), "train", None, None) for name in ("files", "table")]
    for table in (*tables, open_folder(str(tmp_path / "files"))):
        assert table is not None
        assert table.decode(0).shape == (3, 24, 16)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x03up\0\0\0\0\0\0",  # orientation "up"
        b"",
    ],
)
def test_case_05_malformed_exif_is_ignored(exif: bytes) -> None:
    plain = encoded(Image.fromarray(SCENE), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert np.array_equal(pixels_of(plain[:2] + segment + plain[2:]), pixels_of(plain))


def test_case_05_the_orientation_is_read_beside_a_malformed_tag() -> None:
    # the offset of the tag `Make` is outside of the segment
    entries = b"\x01\x0f\0\x02\0\0\xff\xff\0\0\xff\xff" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0\0\0\0"
    plain = encoded(Image.fromarray(SCENE), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert np.array_equal(pixels_of(plain[:2] + segment + plain[2:]), np.rot90(pixels_of(plain), -1))


# -------------------------------------------------------------------------------------------- 6: formats and links


def test_case_06_suffixes_match_the_supported_formats() -> None:
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert set(SUFFIXES) == known


def test_case_06_every_format_is_decoded_and_other_files_are_counted(tmp_path: Path) -> None:
    picture = Image.fromarray(colour_image(0, np.random.default_rng(0)))
    kinds = {
        "a.jpg": "JPEG", "b.JFIF": "JPEG", "c.Png": "PNG", "d.gif": "GIF", "e.webp": "WEBP", "f.AVIF": "AVIF",
        "g.tiff": "TIFF", "h.bmp": "BMP", "i.jp2": "JPEG2000", "no_suffix": "JPEG", "z.ppm": "PPM",
    }  # fmt: skip
    helpers = [".ipynb_checkpoints/x.png", "__MACOSX/ant/._a.jpg", "ant/._a.jpg", "ant/Thumbs.db", ".DS_Store"]
    helpers += ["ant/.hidden/x.png", "desktop.ini"]
    for file, kind in kinds.items():
        for label in ("ant", "bee"):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / file).write_bytes(encoded(picture, kind))
    for file in helpers:
        save(tmp_path / file)
    for file in ("ant/p.heic", "ant/q.HEIC", "bee/notes.txt", "README"):
        (tmp_path / file).write_bytes(b"ftypheic, say")
    (tmp_path / "cat").mkdir()
    table, lines = opened(tmp_path)
    assert table.class_names == ["ant", "bee"]
    assert sorted(Path(name).name for name in table.names[: len(kinds)]) == sorted(kinds)
    for row in range(len(table)):
        assert table.decode(row).shape == (3, 16, 16)
    assert lines == [
        f"left out of {tmp_path}: .heic files (2), .txt files (1), files without a suffix that are no images (1), "
        "hidden or helper files and folders (7), 1 folder without an image (cat). Convert .heic files to JPEG or PNG "
        "to use them."
    ]
    names = open_folder(str(tmp_path)).names
    assert sorted(names) == sorted(f"{label}/{file}" for label in ("ant", "bee") for file in kinds)


def test_case_06_links_are_followed_except_loops(tmp_path: Path) -> None:
    elsewhere = tree(tmp_path / "elsewhere", "1.png 2.png")
    data = tree(tmp_path / "data", "ant/1.png")
    os.symlink(elsewhere, data / "bee")
    os.symlink(data, data / "ant" / "loop")
    os.symlink(data / "ant", data / "ant" / "again")
    os.symlink(elsewhere / "1.png", data / "ant" / "linked.png")
    os.symlink("/nowhere/x.png", data / "ant" / "broken.png")
    os.symlink("itself.png", data / "ant" / "itself.png")
    table, lines = opened(data)
    assert [Path(name).relative_to(data).parts for name in table.names] == [
        ("ant", "1.png"), ("ant", "linked.png"), ("bee", "1.png"), ("bee", "2.png"),
    ]  # fmt: skip
    assert lines == [f"left out of {data}: broken links (2), links to a folder above (2)."]


# ------------------------------------------------------------------------------------------------ 21: bad test splits


def test_case_21_a_bad_test_split_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coloured(tmp_path / "data")
    save(data / "test" / "violet" / "1.png")
    assert run(tmp_path / "runs", data, "fit", "--test_after_fit", "true") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.path: the test split of ")
    assert "(violet)" in error
    assert not list((tmp_path / "runs").rglob("*.ckpt"))
    (data / "test/violet/1.png").rename(data / "test/red/00.png")
    (data / "test/red/00.png").write_bytes(b"")
    assert run(tmp_path / "runs", data, "fit", "--test_after_fit", "true") == 2
    assert "test/red/00.png cannot be decoded (the image is empty)" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.ckpt"))
    assert run(tmp_path / "runs", data, "fit") == 0  # a fit without a test does not read the test split


# ---------------------------------------------------------------------------------- 22 and 28: bad and skipped rows


def bad_folder(root: Path) -> Path:
    """Write nine training images, three of them damaged, and six validation images."""
    data = coloured(root, train=9, test=6, test_name="val")
    good = (data / "train/red/00.png").read_bytes()
    (data / "train/red/00.png").write_bytes(good[: len(good) // 2])
    (data / "train/green/01.png").write_bytes(b"")
    (data / "train/blue/02.png").write_bytes(b"no image")
    return data


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--data.memory_limit_gb", "0", "--data.num_workers", "1"], marks=pytest.mark.slow)],
)
def test_case_22_bad_images_are_skipped_and_listed(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = bad_folder(tmp_path / "data")
    assert run(tmp_path / "runs", data, "fit", "--data.skip_bad_rows", "3", *options) == 0
    err = capsys.readouterr().err
    assert f"train: 6 rows of {data}/train\n" in err
    assert "warning: 3 bad rows are skipped" in err
    rows = rows_of(tmp_path / "runs/version_0/skipped.csv")
    assert [(row["split"], row["source"], row["row"]) for row in rows] == [
        ("train", f"{data}/train", name) for name in ("blue/02.png", "green/01.png", "red/00.png")
    ]
    assert [row["reason"].split(" (")[0][:15] for row in rows] == [
        "cannot be ident",
        "the image is em",
        "image file is t",
    ]


def test_case_22_bad_images_of_validation_and_test_are_skipped(fitted: Path) -> None:
    data = fitted / "data"
    (data / "test/red/00.png").write_bytes(b"")
    (data / "train/red/00.png").write_bytes(b"")
    options = ("--ckpt_path", "last", "--data.skip_bad_rows", "1")
    assert run(fitted / "runs", data, "validate", *options, "--data.val_fraction", "0.99") == 0
    assert run(fitted / "runs", data, "test", *options) == 0
    assert [row["split"] for row in rows_of(fitted / "runs/version_0/skipped.csv")] == ["val", "test"]


def parquet(file: Path, labels: list[Any], kind: Any) -> Path:
    """Write a table of images with labels of this type, and return its folder."""
    rng = np.random.default_rng(0)
    cells = [{"bytes": png(colour_image(i % 3, rng)), "path": None} for i in range(len(labels))]
    features = datasets.Features({"img": datasets.Image(), "label": kind})
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"img": cells, "label": labels}, features=features).to_parquet(str(file))
    return file.parent


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_case_22_rows_without_a_label_are_skipped(
    tmp_path: Path, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    labels: list[Any] = [i % 3 for i in range(20)]
    labels[4], labels[9] = None, -1 if named else None
    kind = datasets.ClassLabel(names=CLASSES) if named else datasets.Value("int64")
    for split in ("train", "val"):
        data = parquet(tmp_path / f"data/{split}.parquet", labels, kind)
    assert run(tmp_path / "runs", data, "fit") == 2
    assert "in row 4; 2 of 20 labels cannot be used" in capsys.readouterr().err
    assert run(tmp_path / "runs", data, "fit", "--data.skip_bad_rows", "2") == 0
    rows = rows_of(next((tmp_path / "runs").rglob("skipped.csv")))
    assert [(row["split"], row["row"]) for row in rows] == [
        (s, r) for s in ("train", "val") for r in ("row 4", "row 9")
    ]
    assert rows[0]["reason"] == "label is empty"


def test_case_28_skip_label_leaves_rows_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [i % 3 - 1 for i in range(18)]  # -1, 0 and 1 in turn
    data = parquet(tmp_path / "data/train.parquet", labels, datasets.Value("int64"))
    assert run(tmp_path / "runs", data, "fit", "--data.skip_label", "-1") == 0
    lines = capsys.readouterr().err.splitlines()
    skipped = [int(line.split()[3]) for line in lines if "with the label of data.skip_label" in line]
    assert sum(skipped) == 6
    assert any(line.startswith("labels: 2 classes: 0 ") for line in lines)


# ------------------------------------------------------------------------------------------- 23: bad images to predict


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text("no image")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_case_23_good_images_are_predicted_beside_bad_ones(
    fitted: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tree(fitted / "photos", " ".join(f"{i}.png" for i in range(7)))
    (photos / "x.jpg").write_bytes((photos / "0.png").read_bytes())
    options = ("predict", "--ckpt_path", "last", "--data.predict_path", str(photos), "--data.num_workers", workers)
    assert run(fitted / "runs", fitted / "data", *options) == 0
    good = {row["name"]: row for row in predictions(fitted / "runs/version_0")}
    assert {"name", "prediction", "probability"} < set(good["0.png"])
    (fitted / "runs/version_0/predictions.csv").unlink()
    capsys.readouterr()
    damages: dict[str, Callable[[Path], None]] = {"1.png": truncated, "3.png": empty, "x.jpg": text}
    for name, damage in damages.items():
        damage(photos / name)
    assert run(fitted / "runs", fitted / "data", *options) == 0
    assert (
        "warning: 3 of 8 inputs could not be predicted; the column `error` gives the reason." in capsys.readouterr().err
    )
    rows = predictions(fitted / "runs/version_0")
    assert [row["name"] for row in rows] == list(good)
    for row in rows:
        if row["name"] in damages:
            assert (row["prediction"], row["probability"]) == ("", "")
            assert row["error"]
        else:
            assert row == good[row["name"]] | {"probability": row["probability"], "error": ""}
            assert float(row["probability"]) == pytest.approx(float(good[row["name"]]["probability"]), abs=2e-6)


@pytest.mark.slow
def test_case_23_two_processes_predict_beside_bad_images(fitted: Path) -> None:
    photos = tree(fitted / "photos", " ".join(f"{i}.png" for i in range(5)))
    paths = ["--trainer.default_root_dir", str(fitted / "runs"), "--data.path", str(fitted / "data")]
    words = ["predict", *FAST, *paths, "--ckpt_path", "last", "--data.predict_path", str(photos)]
    empty(photos / "1.png")  # rank 1 reads this image
    run_on_two(words, fitted)
    rows = predictions(fitted / "runs/version_0")
    assert [(row["name"], bool(row["prediction"]), row["error"]) for row in rows] == [
        (f"{i}.png", i != 1, "the image is empty" if i == 1 else "") for i in range(5)
    ]
    for file in photos.iterdir():
        empty(file)
    run_on_two(words, fitted, code=2)


def test_case_23_only_bad_images_are_refused(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tree(fitted / "photos", "1.png 2.png")
    for file in photos.iterdir():
        empty(file)
    assert (
        run(fitted / "runs", fitted / "data", "predict", "--ckpt_path", "last", "--data.predict_path", str(photos)) == 2
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: data.predict_path: none of 2 inputs can be used; the first: the image is empty."


# ------------------------------------------------------------------------------ 28: backbones with timm's prefixes

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def saved_backbone(folder: Path, safe: bool = True) -> Any:
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=5, **SMALL)
    save_for_hf(model, str(folder), safe_serialization=safe, data_config={"mean": (0.1, 0.2, 0.3)})
    return model.eval()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("prefix", ["local-dir:", "hf_hub:", "hf-hub:"])
def test_case_28_a_backbone_with_a_prefix_of_timm_is_loaded(
    tmp_path: Path, prefix: str, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_backbone(tmp_path / "model", safe)
    name = str(tmp_path / "model") if prefix == "local-dir:" else "someone/small-vit"

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == name
        if not (tmp_path / "model" / filename).is_file():
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError("no such file")
        return str(tmp_path / "model" / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    built = ImageClassifier(backbone=f"{prefix}{name}").eval()
    image = torch.randn(2, 3, 16, 16)
    expected = model.forward_head(model.forward_features(image), pre_logits=True)
    torch.testing.assert_close(built.backbone(image), expected)
    assert built.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert built.preprocessing["input_size"] == (3, 16, 16)


def test_case_28_fit_resume_and_export_with_a_local_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_backbone(tmp_path / "model")
    data = coloured(tmp_path / "data")
    model = ["--model.backbone", f"local-dir:{tmp_path}/model", "--model.weights", "pretrained"]
    options = [*model, "--model.backbone_args", "{}", "--model.image_size", "16"]
    assert run(tmp_path / "runs", data, "fit", *options) == 0
    assert run(tmp_path / "runs", data, "fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert run(tmp_path / "runs", data, "test", "--ckpt_path", "last") == 0
    out = tmp_path / "merged"
    assert main(["export", str(tmp_path / "runs/version_0"), "--format", "merged", "--output", str(out)]) == 0
    assert main(["export", str(tmp_path / "runs/version_0"), "--format", "peft", "--output", str(tmp_path / "p")]) == 0
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 3


@pytest.mark.parametrize(
    ("backbone", "part"),
    [
        ("local-dir:{}/nothing", "config.json"),
        ("local-dir:{}/empty", "config.json"),
        ("local-dir:{}/damaged", "cannot be read"),
        ("local-dir:{}/pickle", "hold code"),
        ("{}/pickle", "local-dir:"),
        ("organisation/name", "hf-hub:organisation/name"),
        ("hf_hub:organisation/name", "cannot be read"),
        ("huggingface:organisation/name", "valid sources"),
    ],
)
def test_case_28_unloadable_backbones_are_refused(
    tmp_path: Path, backbone: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text('{"architecture": ')
    saved_backbone(tmp_path / "pickle", safe=False)
    torch.save({"model": Malicious(tmp_path / "code-ran")}, tmp_path / "pickle/pytorch_model.bin")
    data = coloured(tmp_path / "data")
    name = backbone.format(tmp_path)
    options = ["--model.backbone", name, "--model.weights", "pretrained", "--model.backbone_args", "{}"]
    assert run(tmp_path / "runs", data, "fit", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.")
    assert part in error
    assert not (tmp_path / "code-ran").exists()
