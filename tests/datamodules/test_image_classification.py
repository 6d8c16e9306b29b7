"""Images are prepared as by timm. Splits and augmentation depend on seeds alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor

from datamodules.image_classification import ImageClassificationData, ImageDataset
from datamodules.sources.findings import Findings
from datamodules.sources.images import open_split
from tests.support.data import put, set_up
from tests.support.refusals import refuses
from tests.support.small_data import CLASSES, colour_image, png, write_parquet

CONFIG: dict[str, Any] = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def prepared(
    path: Path,
    stage: str = "fit",
    *,
    world: int = 1,
    rank: int = 0,
    config: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
    **keys: Any,
) -> Any:
    data = ImageClassificationData(str(path), **{"batch_size": 4, **keys})
    model = SimpleNamespace(preprocessing={**CONFIG, **(config or {})}, class_names=class_names)
    return set_up(data, model, stage, world, rank)


def saved(path: Path, images: list[np.ndarray]) -> Path:
    """Write a folder of images to predict, named in this order."""
    path.mkdir(exist_ok=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(path / f"{i:02}.png")
    return path


def grey(folder: Path, sizes: dict[str, int]) -> Path:
    """Write Parquet files of images of uniform grey. Over all splits, row i has grey level i."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    first_level = 0
    for split, size in sizes.items():
        levels = range(first_level, first_level + size)
        first_level += size
        cells = [{"bytes": png(np.full((16, 16, 3), i, np.uint8)), "path": None} for i in levels]
        table = pa.table({"img": cells, "label": [i % 3 for i in levels]}, schema=features.arrow_schema)
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def levels(batches: Any) -> list[int]:
    """Return the rows of `grey` that a loader yields."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]


# ------------------------------------------------------------------------------------------------------ preprocessing


def noise(height: int, width: int) -> np.ndarray:
    """Return noise of medium brightness. Pillow and torch would clip bicubic overshoot at different steps."""
    return np.random.default_rng(height).integers(64, 192, (height, width, 3)).astype(np.uint8)


def difference(folder: Path, pixels: np.ndarray, config: dict[str, Any]) -> Tensor:
    """Return |image of `predict` - image of timm's evaluation transform|, in levels of 255."""
    data = prepared(saved(folder, [pixels]), "predict", config=config, predict_path=str(folder))
    ours = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)["image"][0]
    config = {**CONFIG, **config}
    timms = timm.data.create_transform(**config, is_training=False)(Image.fromarray(pixels))
    assert ours.shape == timms.shape == config["input_size"]
    assert ours.dtype == timms.dtype == torch.float32
    return (ours - timms).abs() * torch.tensor(config["std"])[:, None, None] * 255


SIZES = [(48, 40), (97, 33), (32, 32), (36, 35), (20, 28)]
# resizing a tensor and resizing in Pillow differ by at most one level of 255 in some pixels
CASES: list[tuple[tuple[int, int], dict[str, Any], float, float]] = [
    *((size, {"crop_pct": 0.9, "interpolation": "bicubic"}, 1.01, 0.4) for size in SIZES),
    *((size, {"crop_pct": 1.0, "interpolation": "bilinear"}, 1.01, 0.4) for size in SIZES),
    *((size, {"crop_pct": 0.875, "interpolation": "bilinear"}, 1.01, 0.4) for size in SIZES),
    *((size, {"crop_pct": 1.0, "interpolation": "bicubic"}, 1.01, 0.4) for size in SIZES),
    *(((48, 40), {"crop_pct": 1.0, "crop_mode": mode}, 1.01, 0.4) for mode in ("squash", "border")),
    ((48, 40), {"crop_pct": 1.0, "input_size": (3, 32, 16)}, 2.01, 0.4),
    ((32, 32), {"crop_pct": 1.0}, 1e-4, 1e-4),  # an image of the input size is unchanged
]


@pytest.mark.parametrize(("size", "config", "most", "mean"), CASES)
def test_evaluation_images_equal_timms(
    tmp_path: Path, size: tuple[int, int], config: dict[str, Any], most: float, mean: float
) -> None:
    off = difference(tmp_path / "images", noise(*size), {"input_size": (3, 32, 32), **config})
    assert off.max() < most
    assert off.mean() < mean


def test_normalisation_is_exact_and_keeps_the_labels(parquet_path: Path) -> None:
    data = prepared(parquet_path)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].dtype == torch.uint8  # normalised after the transfer to the device
    before = batch["image"].clone()
    transferred = data.on_after_batch_transfer(batch, 0)
    mean, std = (torch.tensor(CONFIG[key])[:, None, None] for key in ("mean", "std"))
    assert torch.equal(transferred["image"], (before / 255 - mean) / std)
    assert torch.equal(batch["image"], before)
    assert torch.equal(transferred["label"], batch["label"])
    assert transferred["label"].dtype == torch.int64


def test_another_model_gets_its_own_preprocessing(parquet_path: Path) -> None:
    data = prepared(parquet_path)
    data.trainer.lightning_module.preprocessing = {**CONFIG, "input_size": (3, 12, 12), "mean": (0.0, 0.0, 0.0)}
    images = data.splits["train"].images
    data.setup("fit")
    assert data.mean.tolist() == [0.0, 0.0, 0.0]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape == (4, 3, 12, 12)
    assert data.splits["train"].images is images  # no image is decoded again


# -------------------------------------------------------------------------------------------------------------- splits


def rows(data: Any, split: str) -> list[int]:
    return data.splits[split].rows.tolist()


def test_held_out_images_are_a_partition_that_depends_on_val_seed_alone(parquet_path: Path) -> None:
    torch.manual_seed(1)
    first = prepared(parquet_path, val_fraction=0.2)
    torch.manual_seed(2)
    second = prepared(parquet_path, val_fraction=0.2)
    assert sorted(rows(first, "train") + rows(first, "val")) == list(range(60))
    assert [rows(first, name) for name in ("train", "val")] == [rows(second, name) for name in ("train", "val")]
    assert set(rows(prepared(parquet_path, val_fraction=0.2, val_seed=1), "val")) != set(rows(first, "val"))
    assert rows(prepared(parquet_path, "validate", val_fraction=0.2), "val") == rows(first, "val")


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_validation_split_takes_precedence_over_val_fraction(tmp_path: Path, name: str) -> None:
    data = prepared(grey(tmp_path / "data", {"train": 9, name: 5, "test": 4}), horizontal_flip=False)
    assert rows(data, "train") == list(range(9))
    assert levels(data.val_dataloader()) == [9, 10, 11, 12, 13]
    data.setup("test")
    assert levels(data.test_dataloader()) == [14, 15, 16, 17]
    assert data.class_names == CLASSES


def test_limits_take_a_seeded_sample(parquet_path: Path) -> None:
    whole = prepared(parquet_path, val_fraction=0.2)
    limits = {"max_train_samples": 10, "max_val_samples": 5, "max_test_samples": 7}
    torch.manual_seed(5)
    data = prepared(parquet_path, val_fraction=0.2, **limits)
    data.setup("test")
    torch.manual_seed(6)
    again = prepared(parquet_path, val_fraction=0.2, **limits)
    again.setup("test")
    for split, size in (("train", 10), ("val", 5), ("test", 7)):
        assert len(set(rows(data, split))) == len(data.splits[split]) == size
        assert rows(data, split) == rows(again, split)
    assert set(rows(data, "train")) < set(rows(whole, "train"))
    assert set(rows(data, "val")) < set(rows(whole, "val"))
    assert set(rows(data, "test")) != set(range(7))  # not the first seven
    assert len(prepared(parquet_path, val_fraction=0.2, max_train_samples=1000).splits["train"]) == 48


# -------------------------------------------------------------------------------------------------------- augmentation


def epoch_of(data: Any, epoch: int) -> list[dict[str, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a[k], b[k]) for a, b in pairs for k in ("image", "label"))


def test_augmentation_is_the_same_with_workers(parquet_path: Path) -> None:
    torch.manual_seed(3)
    in_process = prepared(parquet_path, max_train_samples=24)
    one, two = epoch_of(in_process, 0), epoch_of(in_process, 1)
    torch.manual_seed(3)
    in_workers = prepared(parquet_path, max_train_samples=24, num_workers=2)
    assert same(epoch_of(in_workers, 0), one)
    assert same(epoch_of(in_workers, 1), two)
    assert not same(one, two)


@pytest.mark.parametrize(("wanted", "cpus", "started"), [(4, 2, 2), (1, 2, 1), (0, 2, 0)])
def test_at_most_one_worker_for_each_cpu(
    parquet_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int, cpus: int, started: int
) -> None:
    monkeypatch.setattr("datamodules.base.usable_cpus", lambda: cpus)
    assert prepared(parquet_path, num_workers=wanted).train_dataloader().num_workers == started


def test_augmentation_depends_on_the_draws_seed_and_index_alone(parquet_path: Path) -> None:
    torch.manual_seed(3)
    train = prepared(parquet_path).splits["train"]
    image = train[5, 2]["image"]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert torch.equal(train[5, 2]["image"], image)
    # the global generator, which the model's dropout uses, is unchanged
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(train[5, 3]["image"], image)
    assert torch.equal(prepared(parquet_path).splits["train"][5, 2]["image"], image)
    train.images[6] = train.images[5]
    assert not torch.equal(train[6, 2]["image"], image)


def test_three_ranks_train_on_the_images_of_one(parquet_path: Path) -> None:
    def samples(data: Any) -> set[tuple[bytes, int]]:
        batches = epoch_of(data, 2)
        return {(i.numpy().tobytes(), int(y)) for b in batches for i, y in zip(b["image"], b["label"], strict=True)}

    one = samples(prepared(parquet_path, batch_size=6))
    ranks = [samples(prepared(parquet_path, batch_size=2, world=3, rank=rank)) for rank in range(3)]
    assert set.union(*ranks) == one
    assert sum(len(share) for share in ranks) == len(one) == 54


def twins(folder: Path) -> Path:
    """Write a data set whose test images are its training images."""
    write_parquet(folder, {"train": 20})
    (folder / "test.parquet").write_bytes((folder / "train.parquet").read_bytes())
    return folder


@pytest.mark.parametrize("config", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "input_size": (3, 12, 12)}])
def test_without_crop_and_flip_training_images_equal_evaluation_images(tmp_path: Path, config: dict[str, Any]) -> None:
    keys = {"crop_scale": (1.0, 1.0), "horizontal_flip": False}
    data = prepared(twins(tmp_path / "data"), config=config, **keys)
    data.setup("test")
    for i, row in enumerate(rows(data, "train")):
        assert torch.equal(data.splits["train"][i, 7]["image"], data.splits["test"][row]["image"])


def test_flip_mirrors_about_half_of_the_images(tmp_path: Path) -> None:
    data = prepared(twins(tmp_path / "data"), crop_scale=(1.0, 1.0))
    data.setup("test")
    mirrored = 0
    for epoch in range(4):
        for i, row in enumerate(rows(data, "train")):
            training_image, evaluation_image = (
                data.splits["train"][i, epoch]["image"],
                data.splits["test"][row]["image"],
            )
            assert torch.equal(training_image, evaluation_image) or torch.equal(
                training_image, evaluation_image.flip(-1)
            )
            mirrored += not torch.equal(training_image, evaluation_image)
    assert 20 < mirrored < 52  # of 72 images


def test_crops_are_resized_to_the_input_size(parquet_path: Path) -> None:
    data = prepared(parquet_path, crop_scale=(0.1, 0.3), config={"input_size": (3, 20, 20)})
    assert {batch["image"].shape for batch in data.train_dataloader()} == {(4, 3, 20, 20)}
    assert {batch["image"].shape[1:] for batch in data.val_dataloader()} == {(3, 20, 20)}


def test_images_decoded_again_equal_images_in_memory(parquet_path: Path) -> None:
    in_memory, decoded = prepared(parquet_path), prepared(parquet_path, memory_limit_gb=0)
    assert len(in_memory.splits["train"].images) == 54
    assert decoded.splits["train"].images is None
    assert same(epoch_of(in_memory, 1), epoch_of(decoded, 1))
    assert same(list(in_memory.val_dataloader()), list(decoded.val_dataloader()))


@pytest.mark.parametrize(("limit", "kept"), [(100 * 768, True), (100 * 768 - 1, False)])
def test_memory_limit_applies_to_the_sum_of_all_images(tmp_path: Path, limit: int, kept: bool) -> None:
    table = open_split(str(grey(tmp_path / "data", {"train": 100})), "train", None, None)
    assert table is not None
    dataset = ImageDataset(table, None, lambda image: image)
    dataset.keep_in_memory(limit / 2**30, "train", Findings())
    assert (dataset.images is not None) is kept
    assert int(dataset[99]["image"][0, 0, 0]) == 99


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 1])
def test_shares_of_three_ranks_cover_every_image_once(tmp_path: Path, workers: int) -> None:
    folder = saved(tmp_path / "images", [np.full((16, 16, 3), i, np.uint8) for i in range(11)])
    for rank in range(3):
        keys = {"predict_path": str(folder), "num_workers": workers, "batch_size": 2}
        batches = list(prepared(folder, "predict", world=3, rank=rank, **keys).predict_dataloader())
        names = [name for batch in batches for name in batch["name"]]
        assert levels(batches) == [int(name.removesuffix(".png")) for name in names] == list(range(rank, 11, 3))
        assert [i for batch in batches for i in batch["index"].tolist()] == list(range(rank, 11, 3))


def test_evaluation_takes_every_image_in_order(tmp_path: Path) -> None:
    data = prepared(grey(tmp_path / "data", {"train": 4, "test": 10}), "test")
    for _ in range(2):
        batches = list(data.test_dataloader())
        assert levels(batches) == list(range(4, 14))
        assert [batch["label"].tolist() for batch in batches] == [[1, 2, 0, 1], [2, 0, 1, 2], [0, 1]]


# ------------------------------------------------------------------------------------------------------------- classes


def folders(root: Path, classes: dict[str, str]) -> Path:
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.fromarray(colour_image(0, np.random.default_rng(0))).save(root / split / name / "1.png")
    return root


ALL = {"train": "abc", "val": "abc", "test": "abc"}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_split_that_lacks_a_class_keeps_the_labels_of_training(tmp_path: Path, stage: str) -> None:
    # a folder without class a would number b as 0
    data = prepared(folders(tmp_path / "data", ALL | {stage: "bc"}))
    data.setup("test")
    assert [data.class_names[i] for i in data.splits[stage].table.labels] == ["b", "c"]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_classes_of_the_model_override_those_of_the_data(tmp_path: Path, stage: str) -> None:
    data = prepared(folders(tmp_path / "data", ALL), stage, class_names=["x", "c", "b", "a"])
    assert data.class_names == ["x", "c", "b", "a"]
    for dataset in data.splits.values():
        assert [data.class_names[item["label"]] for item in dataset] == ["a", "b", "c"]
    # the same without training images
    test_only = prepared(folders(tmp_path / "alone", {"test": "bc"}), "test", class_names=["a", "b", "c"])
    assert test_only.splits["test"].table.labels.tolist() == [1, 2]


def test_unnamed_classes_are_named_by_their_training_labels(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    content = {"bytes": png(colour_image(0, np.random.default_rng(0))), "path": None}
    for split, labels in (("train", [0, 1, 2]), ("test", [0, 1])):
        table = pa.table({"img": [content] * len(labels), "label": labels}, schema=features.arrow_schema)
        pq.write_table(table, tmp_path / f"{split}.parquet")
    # otherwise `test --ckpt_path` would refuse a checkpoint of these data
    assert prepared(tmp_path, "test").class_names == ["0", "1", "2"]


def test_skipped_rows_do_not_change_the_splits_of_other_rows(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for i in range(30):
        put(root / "train" / CLASSES[i % 3] / f"{i:02}.png", png(colour_image(i % 3, np.random.default_rng(i))))

    def split_rows(**keys: Any) -> dict[str, list[str]]:
        data = prepared(root, horizontal_flip=False, val_fraction=0.3, **keys)
        return {name: [split.table.names[row] for row in split.rows] for name, split in data.splits.items()}

    all_rows = split_rows()
    assert split_rows(skip_bad_rows=4) == all_rows
    bad = [all_rows["train"][3], all_rows["train"][7], all_rows["val"][2]]
    for file in bad:
        Path(file).write_bytes(b"")
    for keys in ({"skip_bad_rows": 2}, {"skip_bad_rows": 9}, {"skip_bad_rows": 2, "memory_limit_gb": 0.0}):
        assert split_rows(**keys) == {s: [n for n in names if n not in bad] for s, names in all_rows.items()}
    with refuses("data.skip_bad_rows", "at most 1 row of train may be skipped"):
        prepared(root, val_fraction=0.3, skip_bad_rows=1)


# ----------------------------------------------------------------------------------------------------------- bad input

AB = {"class_names": ["a", "b"]}
# classes of each split, stage, keys, parts of the message
BAD: list[tuple[dict[str, str], str, dict[str, Any], tuple[str, ...]]] = [
    ({}, "fit", {"batch_size": 0}, ("data.batch_size",)),
    ({}, "fit", {"num_workers": -1}, ("data.num_workers",)),
    *(({}, "fit", {"val_fraction": x}, (f"data.val_fraction: {x}",)) for x in (0.0, 1.0, float("nan"))),
    *(
        ({}, "fit", {"crop_scale": scale}, (f"data.crop_scale: {list(scale)}",))
        for scale in ((0.0, 1.0), (0.8, 0.5), (0.5, 1.5))
    ),
    *(
        ({}, "fit", {f"max_{split}_samples": n}, (f"data.max_{split}_samples: {n}",))
        for split, n in (("train", 0), ("val", -3), ("test", 0))
    ),
    ({}, "fit", {"cache_prefix": True}, ("data.cache_prefix: training images are augmented",)),
    (ALL, "predict", {}, ("data.predict_path",)),
    ({"train": "abc"}, "test", {}, ("data has no test split",)),
    ({"train": "a"}, "fit", {"val_fraction": 0.1}, ("val_fraction",)),
    ({"train": "abcdefghij"}, "fit", {"val_fraction": 0.99}, ("val_fraction",)),
    (
        {"train": "abc", "val": "abcd"},
        "fit",
        {},
        ("the val split of", "not trained on (d). The model knows 3: a, b, c."),
    ),
    *(
        (ALL, stage, AB, (f"the {split} split of", "(c). The model knows 2: a, b."))
        for stage, split in (("fit", "train"), ("validate", "val"), ("test", "test"))
    ),
]


@pytest.mark.parametrize(("classes", "stage", "keys", "parts"), BAD)
def test_bad_input_is_refused(
    tmp_path: Path, classes: dict[str, str], stage: str, keys: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with refuses(*parts):
        prepared(folders(tmp_path / "data", classes), stage, **keys)


def test_a_model_without_preprocessing_is_refused(parquet_path: Path) -> None:
    with refuses("needs a model of images"):
        set_up(ImageClassificationData(str(parquet_path)), SimpleNamespace(class_names=None))


@pytest.mark.parametrize("keep", [0.5, 0])
def test_a_damaged_image_is_named_before_training(tmp_path: Path, keep: float) -> None:
    root = folders(tmp_path / "data", {"train": "ab", "val": "ab"})
    file = root / "train" / "b" / "1.png"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with refuses(str(file)):
        prepared(root)
