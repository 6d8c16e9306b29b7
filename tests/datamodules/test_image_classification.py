"""Images as timm prepares them for a backbone, split and augmented as functions of seeds alone."""

from __future__ import annotations

from collections.abc import Callable
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

from datamodules.errors import DataError
from datamodules.image_classification import ImageClassificationData, ImageDataset
from datamodules.sources.findings import Findings
from datamodules.sources.images import open_split
from tests.conftest import CLASSES, colour_image, png, write_parquet
from tests.datamodules.stub import stub_trainer

CONFIG: dict[str, Any] = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def module(
    path: Path,
    world: int = 1,
    rank: int = 0,
    config: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
    **keys: Any,
) -> Any:
    """A data module with all of a trainer that it looks at."""
    made = ImageClassificationData(str(path), **{"batch_size": 4, **keys})
    model = SimpleNamespace(preprocessing={**CONFIG, **(config or {})}, class_names=class_names)
    made.trainer = stub_trainer(world, rank, lightning_module=model)
    return made


def fitted(path: Path, **keys: Any) -> Any:
    made = module(path, **keys)
    made.setup("fit")
    return made


def saved(path: Path, images: list[np.ndarray]) -> Path:
    """A folder of images to predict, in this order."""
    path.mkdir(exist_ok=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(path / f"{i:02}.png")
    return path


def grey(folder: Path, sizes: dict[str, int]) -> Path:
    """Parquet of images of one grey each: row i of all splits is i, so that an image says which row it is."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    start = 0
    for split, size in sizes.items():
        levels = range(start, start + size)
        start += size
        cells = [{"bytes": png(np.full((16, 16, 3), i, np.uint8)), "path": None} for i in levels]
        table = pa.table({"img": cells, "label": [i % 3 for i in levels]}, schema=features.arrow_schema)
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def levels(batches: Any) -> list[int]:
    """Which rows of `grey` a loader gives."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]


# ------------------------------------------------------------------------------------------------- as timm prepares it


def noise(height: int, width: int) -> np.ndarray:
    """Of middling brightness: bicubic overshoot is cut off between two passes, whose order Pillow and torch choose."""
    return np.random.default_rng(height).integers(64, 192, (height, width, 3)).astype(np.uint8)


def difference(folder: Path, pixels: np.ndarray, config: dict[str, Any]) -> Tensor:
    """What `predict` makes of an image less what timm's own evaluation transform does, in levels of 255."""
    data = module(saved(folder, [pixels]), config=config, predict_path=str(folder))
    data.setup("predict")
    ours = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)["image"][0]
    config = {**CONFIG, **config}
    theirs = timm.data.create_transform(**config, is_training=False)(Image.fromarray(pixels))
    assert ours.shape == theirs.shape == config["input_size"]
    assert ours.dtype == theirs.dtype == torch.float32
    return (ours - theirs).abs() * torch.tensor(config["std"])[:, None, None] * 255


@pytest.mark.parametrize("size", [(48, 40), (97, 33), (32, 32), (36, 35), (20, 28)])
@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_pct": 0.875, "interpolation": "bilinear"},
        {"crop_pct": 1.0, "interpolation": "bicubic"},
    ],
)
def test_evaluation_is_timms(tmp_path: Path, size: tuple[int, int], config: dict[str, Any]) -> None:
    # resizing a tensor rounds otherwise than resizing in Pillow: by one level of 255 at most, here and there
    off = difference(tmp_path / "images", noise(*size), {**config, "input_size": (3, 32, 32)})
    assert off.max() < 1.01
    assert off.mean() < 0.4


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_evaluation_is_timms_in_the_other_crop_modes(tmp_path: Path, mode: str) -> None:
    config = {"crop_pct": 1.0, "crop_mode": mode, "input_size": (3, 32, 32)}
    assert difference(tmp_path / "images", noise(48, 40), config).max() < 1.01


def test_evaluation_is_timms_when_the_input_is_no_square(tmp_path: Path) -> None:
    config = {"crop_pct": 1.0, "input_size": (3, 32, 16)}
    assert difference(tmp_path / "images", noise(48, 40), config).max() < 2.01


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    off = difference(tmp_path / "images", noise(32, 32), {"crop_pct": 1.0, "input_size": (3, 32, 32)})
    assert off.max() < 1e-4


def test_normalisation_is_exact_and_leaves_the_rest(parquet_path: Path) -> None:
    data = fitted(parquet_path)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].dtype == torch.uint8  # until the batch is on its device
    before = batch["image"].clone()
    done = data.on_after_batch_transfer(batch, 0)
    mean, std = (torch.tensor(CONFIG[key])[:, None, None] for key in ("mean", "std"))
    assert torch.equal(done["image"], (before / 255 - mean) / std)
    assert torch.equal(batch["image"], before)
    assert torch.equal(done["label"], batch["label"])
    assert done["label"].dtype == torch.int64


def test_another_model_gets_its_own_preprocessing(parquet_path: Path) -> None:
    data = fitted(parquet_path)
    data.trainer.lightning_module.preprocessing = {**CONFIG, "input_size": (3, 12, 12), "mean": (0.0, 0.0, 0.0)}
    kept = data.splits["train"].images
    data.setup("fit")
    assert data.mean.tolist() == [0.0, 0.0, 0.0]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape == (4, 3, 12, 12)
    assert data.splits["train"].images is kept  # and nothing is decoded again


# -------------------------------------------------------------------------------------------------------------- splits


def rows(data: Any, split: str) -> list[int]:
    return data.splits[split].rows.tolist()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.01])
def test_held_out_images_are_disjoint_and_complete(parquet_path: Path, fraction: float) -> None:
    data = fitted(parquet_path, val_fraction=fraction)
    train, val = rows(data, "train"), rows(data, "val")
    assert sorted(train + val) == list(range(60))
    assert len(val) == max(1, round(fraction * 60))


def test_held_out_images_depend_on_their_seed_alone(parquet_path: Path) -> None:
    torch.manual_seed(1)
    first = fitted(parquet_path, val_fraction=0.2)
    torch.manual_seed(2)
    second = fitted(parquet_path, val_fraction=0.2)
    assert rows(first, "val") == rows(second, "val")
    assert rows(first, "train") == rows(second, "train")
    assert set(rows(fitted(parquet_path, val_fraction=0.2, val_seed=1), "val")) != set(rows(first, "val"))
    alone = module(parquet_path, val_fraction=0.2)
    alone.setup("validate")
    assert rows(alone, "val") == rows(first, "val")


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_validation_split_of_its_own_comes_first(tmp_path: Path, name: str) -> None:
    data = fitted(grey(tmp_path / "data", {"train": 9, name: 5, "test": 4}), horizontal_flip=False)
    assert rows(data, "train") == list(range(9))
    assert levels(data.val_dataloader()) == [9, 10, 11, 12, 13]
    data.setup("test")
    assert levels(data.test_dataloader()) == [14, 15, 16, 17]
    assert data.class_names == CLASSES


def test_limits_take_a_seeded_sample(parquet_path: Path) -> None:
    whole = fitted(parquet_path, val_fraction=0.2)
    limits = {"max_train_samples": 10, "max_val_samples": 5, "max_test_samples": 7}
    torch.manual_seed(5)
    data = fitted(parquet_path, val_fraction=0.2, **limits)
    data.setup("test")
    torch.manual_seed(6)
    again = fitted(parquet_path, val_fraction=0.2, **limits)
    again.setup("test")
    for split, size in (("train", 10), ("val", 5), ("test", 7)):
        assert len(set(rows(data, split))) == len(data.splits[split]) == size
        assert rows(data, split) == rows(again, split)
    assert set(rows(data, "train")) < set(rows(whole, "train"))
    assert set(rows(data, "val")) < set(rows(whole, "val"))
    assert set(rows(data, "test")) != set(range(7))  # not the first ones


def test_a_limit_above_what_there_is_takes_all(parquet_path: Path) -> None:
    data = fitted(parquet_path, val_fraction=0.2, max_train_samples=1000)
    assert len(data.splits["train"]) == 48


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
    here = fitted(parquet_path, max_train_samples=24)
    one, two = epoch_of(here, 0), epoch_of(here, 1)
    torch.manual_seed(3)
    there = fitted(parquet_path, max_train_samples=24, num_workers=2)
    assert same(epoch_of(there, 0), one)
    assert same(epoch_of(there, 1), two)
    assert not same(one, two)


def test_augmentation_is_a_function_of_the_draws_seed_and_index(parquet_path: Path) -> None:
    torch.manual_seed(3)
    train = fitted(parquet_path).splits["train"]
    image = train[5, 2]["image"]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert torch.equal(train[5, 2]["image"], image)
    assert torch.equal(torch.get_rng_state(), state)  # the model's dropout draws from there
    assert not torch.equal(train[5, 3]["image"], image)
    assert torch.equal(fitted(parquet_path).splits["train"][5, 2]["image"], image)
    train.images[6] = train.images[5]
    assert not torch.equal(train[6, 2]["image"], image)


def test_augmentation_differs_between_runs_and_epochs(parquet_path: Path) -> None:
    seen = set()
    for seed in range(2):
        torch.manual_seed(seed)
        data = fitted(parquet_path, max_train_samples=4, crop_scale=(0.2, 0.5))
        for epoch in range(3):
            (batch,) = epoch_of(data, epoch)
            seen |= {image.numpy().tobytes() for image in batch["image"]}
    assert len(seen) == 2 * 3 * 4


def test_three_processes_see_what_one_does(parquet_path: Path) -> None:
    def samples(data: Any) -> set[tuple[bytes, int]]:
        batches = epoch_of(data, 2)
        return {(i.numpy().tobytes(), int(y)) for b in batches for i, y in zip(b["image"], b["label"], strict=True)}

    one = samples(fitted(parquet_path, batch_size=6))
    ranks = [samples(fitted(parquet_path, batch_size=2, world=3, rank=rank)) for rank in range(3)]
    assert set.union(*ranks) == one
    assert sum(len(share) for share in ranks) == len(one) == 54


def twins(folder: Path) -> Path:
    """The same images for training as for testing."""
    write_parquet(folder, {"train": 20})
    (folder / "test.parquet").write_bytes((folder / "train.parquet").read_bytes())
    return folder


@pytest.mark.parametrize("config", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "input_size": (3, 12, 12)}])
def test_without_crop_and_flip_training_sees_the_evaluation_image(tmp_path: Path, config: dict[str, Any]) -> None:
    keys = {"crop_scale": (1.0, 1.0), "horizontal_flip": False}
    data = fitted(twins(tmp_path / "data"), config=config, **keys)
    data.setup("test")
    for i, row in enumerate(rows(data, "train")):
        assert torch.equal(data.splits["train"][i, 7]["image"], data.splits["test"][row]["image"])


def test_flip_mirrors_about_half_of_the_images(tmp_path: Path) -> None:
    data = fitted(twins(tmp_path / "data"), crop_scale=(1.0, 1.0))
    data.setup("test")
    mirrored = 0
    for epoch in range(4):
        for i, row in enumerate(rows(data, "train")):
            seen, whole = data.splits["train"][i, epoch]["image"], data.splits["test"][row]["image"]
            assert torch.equal(seen, whole) or torch.equal(seen, whole.flip(-1))
            mirrored += not torch.equal(seen, whole)
    assert 20 < mirrored < 52  # of 72


def test_crops_are_of_the_size_of_the_input(parquet_path: Path) -> None:
    data = fitted(parquet_path, crop_scale=(0.1, 0.3), config={"input_size": (3, 20, 20)})
    assert {batch["image"].shape for batch in data.train_dataloader()} == {(4, 3, 20, 20)}
    assert {batch["image"].shape[1:] for batch in data.val_dataloader()} == {(3, 20, 20)}


def test_decoding_anew_gives_what_memory_does(parquet_path: Path) -> None:
    kept, anew = fitted(parquet_path), fitted(parquet_path, memory_limit_gb=0)
    assert len(kept.splits["train"].images) == 54
    assert anew.splits["train"].images is None
    assert same(epoch_of(kept, 1), epoch_of(anew, 1))
    assert same(list(kept.val_dataloader()), list(anew.val_dataloader()))


@pytest.mark.parametrize(("limit", "kept"), [(100 * 768, True), (100 * 768 - 1, False)])
def test_memory_limit_is_of_all_images(tmp_path: Path, limit: int, kept: bool) -> None:
    table = open_split(str(grey(tmp_path / "data", {"train": 100})), "train", None, None)
    assert table is not None
    dataset = ImageDataset(table, None, lambda image: image)
    dataset.keep_in_memory(limit / 2**30, "train", Findings())
    assert (dataset.images is not None) is kept
    assert int(dataset[99]["image"][0, 0, 0]) == 99


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [11, 12, 3])
def test_shares_of_three_processes_cover_every_sample_once(tmp_path: Path, count: int, workers: int) -> None:
    folder = saved(tmp_path / "images", [np.full((16, 16, 3), i, np.uint8) for i in range(count)])
    seen: list[str] = []
    for rank in range(3):
        data = module(folder, world=3, rank=rank, predict_path=str(folder), num_workers=workers, batch_size=2)
        data.setup("predict")
        batches = list(data.predict_dataloader())
        names = [name for batch in batches for name in batch["name"]]
        assert levels(batches) == [int(name.removesuffix(".png")) for name in names] == list(range(rank, count, 3))
        assert [i for batch in batches for i in batch["index"].tolist()] == list(range(rank, count, 3))
        seen += names
    assert sorted(seen) == [f"{i:02}.png" for i in range(count)]


@pytest.mark.parametrize("rank", [0, 2])
def test_fewer_images_to_evaluate_than_processes(tmp_path: Path, rank: int) -> None:
    folder = saved(tmp_path / "images", [noise(16, 16)] * 2)
    data = module(folder, world=3, rank=rank, predict_path=str(folder))
    data.setup("predict")
    with pytest.raises(DataError, match="2 samples to evaluate are fewer than the 3 processes"):
        data.predict_dataloader()


def test_evaluation_is_in_order_and_whole(tmp_path: Path) -> None:
    data = module(grey(tmp_path / "data", {"train": 4, "test": 10}))
    data.setup("test")
    for _ in range(2):
        batches = list(data.test_dataloader())
        assert levels(batches) == list(range(4, 14))
        assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
        assert torch.cat([batch["label"] for batch in batches]).tolist() == [i % 3 for i in range(4, 14)]


# ------------------------------------------------------------------------------------------------------------- classes


def folders(root: Path, classes: dict[str, str]) -> Path:
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.fromarray(colour_image(0, np.random.default_rng(0))).save(root / split / name / "1.png")
    return root


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_split_that_lacks_a_class_keeps_the_labels_of_training(tmp_path: Path, stage: str) -> None:
    # each folder numbers its own classes: without a, label 0 of the second is b
    root = folders(tmp_path / "data", {"train": "abc", "val": "abc", "test": "abc"} | {stage: "bc"})
    data = fitted(root)
    data.setup("test")
    labels = data.splits[stage].table.labels
    assert [data.class_names[i] for i in labels] == ["b", "c"]


def test_a_split_with_a_class_that_training_has_not_got_is_refused(tmp_path: Path) -> None:
    data = module(folders(tmp_path / "data", {"train": "abc", "val": "abcd"}))
    with pytest.raises(DataError, match=r"the val split of .* not trained on \(d\); it knows 3: a, b, c\."):
        data.setup("fit")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_classes_of_the_model_come_before_those_of_the_data(tmp_path: Path, stage: str) -> None:
    root = folders(tmp_path / "data", {"train": "abc", "val": "abc", "test": "abc"})
    data = module(root, class_names=["x", "c", "b", "a"])
    data.setup(stage)
    assert data.class_names == ["x", "c", "b", "a"]
    for dataset in data.splits.values():
        assert [data.class_names[item["label"]] for item in dataset] == ["a", "b", "c"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("validate", "val"), ("test", "test")])
def test_a_class_that_the_model_does_not_know_is_refused(tmp_path: Path, stage: str, split: str) -> None:
    root = folders(tmp_path / "data", {"train": "abc", "val": "abc", "test": "abc"})
    data = module(root, class_names=["a", "b"])
    with pytest.raises(DataError, match=rf"the {split} split of .*\(c\); it knows 2: a, b\."):
        data.setup(stage)


def test_a_model_that_knows_its_classes_is_tested_without_training_images(tmp_path: Path) -> None:
    data = module(folders(tmp_path / "data", {"test": "bc"}), class_names=["a", "b", "c"])
    data.setup("test")
    assert data.splits["test"].table.labels.tolist() == [1, 2]


def test_numbers_for_names_are_those_of_training(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    content = {"bytes": png(colour_image(0, np.random.default_rng(0))), "path": None}
    for split, labels in (("train", [0, 1, 2]), ("test", [0, 1])):
        table = pa.table({"img": [content] * len(labels), "label": labels}, schema=features.arrow_schema)
        pq.write_table(table, tmp_path / f"{split}.parquet")
    data = module(tmp_path)
    data.setup("test")
    assert data.class_names == ["0", "1", "2"]  # or `test --ckpt_path` refuses the checkpoint of this very data


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"val_fraction": 0.0}, "data.val_fraction: 0.0"),
        ({"val_fraction": 1.0}, "data.val_fraction: 1.0"),
        ({"val_fraction": float("nan")}, "data.val_fraction: nan"),
        ({"crop_scale": (0.0, 1.0)}, r"data.crop_scale: \[0.0, 1.0\]"),
        ({"crop_scale": (0.8, 0.5)}, r"data.crop_scale: \[0.8, 0.5\]"),
        ({"crop_scale": (0.5, 1.5)}, r"data.crop_scale: \[0.5, 1.5\]"),
        ({"max_train_samples": 0}, "data.max_train_samples: 0"),
        ({"max_val_samples": -3}, "data.max_val_samples: -3"),
        ({"max_test_samples": 0}, "data.max_test_samples: 0"),
    ],
)
def test_wrong_values(keys: dict[str, Any], parts: str) -> None:
    with pytest.raises(DataError, match=parts):
        ImageClassificationData("/nowhere", **keys)


def test_fewer_images_than_a_batch(parquet_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.batch_size: 54 training samples .* 20 × 3 processes"):
        fitted(parquet_path, batch_size=20, world=3).train_dataloader()


def test_prediction_without_a_folder(parquet_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.predict_path"):
        module(parquet_path).setup("predict")


def test_no_split_to_test(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data has no test split"):
        module(grey(tmp_path / "data", {"train": 4})).setup("test")


def test_a_model_without_preprocessing(parquet_path: Path) -> None:
    data = module(parquet_path)
    del data.trainer.lightning_module.preprocessing
    with pytest.raises(DataError, match="preprocessing"):
        data.setup("fit")


@pytest.mark.parametrize(("size", "fraction"), [(1, 0.1), (20, 0.99)])
def test_nothing_left_to_train_on(tmp_path: Path, size: int, fraction: float) -> None:
    with pytest.raises(DataError, match="val_fraction"):
        fitted(grey(tmp_path / "data", {"train": size}), val_fraction=fraction)


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [_truncated, lambda _: b""])
def test_a_damaged_image_is_named_before_training(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    root = folders(tmp_path / "data", {"train": "ab", "val": "ab"})
    file = root / "train" / "b" / "1.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=str(file)):
        fitted(root)
