"""Environments in DomainBed's layout: training images, test images and bad input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.domains import DomainData
from datamodules.errors import DataError
from tests.datamodules.test_image_classification import CONFIG
from tests.support.trainers import stub_trainer

ENVIRONMENTS = {"art": 40, "location_100": 30, "Real World": 20}
CLASSES = ("bird", "dog")


def write(root: Path, environments: Mapping[str, int], classes: Sequence[str] = CLASSES) -> Path:
    """Write images of uniform grey, with the classes in turn. Image number k of an environment has grey level k."""
    for environment, size in environments.items():
        for i in range(size):
            file = root / environment / classes[i % len(classes)] / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(file)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "set", ENVIRONMENTS)


def module(root: Path, environment: str = "art", **keys: Any) -> DomainData:
    data = DomainData(str(root), environment, **{"batch_size": 4, **keys})
    model = SimpleNamespace(preprocessing=CONFIG, class_names=None)
    data.trainer = stub_trainer(lightning_module=model)
    return data


def fitted(root: Path, **keys: Any) -> DomainData:
    data = module(root, **keys)
    data.check_test_split()
    data.setup("fit")
    return data


def levels(batches: Any) -> list[int]:
    return sorted(int(image[0, 0, 0]) for batch in batches for image in batch["image"])


def test_every_image_of_the_training_environment_is_in_one_split(root: Path) -> None:
    data = fitted(root)
    sizes = {name: len(images) for name, images in data.splits.items()}
    # test: 20 % of 40; validation: 10 % of the other 32
    assert sizes == {"train": 29, "val": 3, "test": 8, "Real World": 20, "location_100": 30}
    parts = [data.splits[name].rows.tolist() for name in ("train", "val", "test")]
    assert sorted(row for rows in parts for row in rows) == list(range(40))
    again = fitted(root)
    assert parts == [again.splits[name].rows.tolist() for name in ("train", "val", "test")]
    other = fitted(root, val_seed=1)
    assert parts[2] != other.splits["test"].rows.tolist()


def test_test_images_do_not_depend_on_val_fraction_or_limits(root: Path) -> None:
    first, second = fitted(root), fitted(root, val_fraction=0.4, max_train_samples=5)
    assert torch.equal(first.splits["test"].rows, second.splits["test"].rows)
    assert len(second.splits["train"]) == 5


def test_test_loaders_are_the_in_domain_test_and_each_other_environment(root: Path) -> None:
    data = fitted(root)
    in_domain, real_world, location = data.test_dataloader()
    assert len(levels(in_domain)) == 8
    assert levels(real_world) == list(range(20))
    assert levels(location) == list(range(30))
    assert data.domain_names == ["Real_World", "location_100"]
    limited = fitted(root, max_test_samples=6)
    assert [len(levels(loader)) for loader in limited.test_dataloader()] == [6, 6, 6]


def test_classes_are_matched_by_name(root: Path) -> None:
    extra = write(root, {"sketch": 9}, ["dog"])  # an environment with class `dog` alone, which has number 1
    data = fitted(extra)
    assert data.class_names == ["bird", "dog"]
    assert {int(row["label"]) for row in data.splits["sketch"]} == {1}
    assert "sketch has no images of 1 class: bird" in data.findings.take_lines()


def test_the_training_sample_has_unaugmented_training_images(root: Path) -> None:
    data = fitted(root)
    sample = levels(data.training_sample(20))
    trained = [int(data.splits["train"].table.names[row][-7:-4]) for row in data.splits["train"].rows.tolist()]
    assert len(sample) == 20 == len(set(sample))
    assert set(sample) <= set(trained)
    assert sample == levels(data.training_sample(20))
    assert levels(data.training_sample(1000)) == sorted(trained)


def test_bad_images_are_counted_for_each_environment(root: Path) -> None:
    (root / "Real World" / "dog" / "001.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"Real World.*cannot be decoded"):
        fitted(root)
    data = fitted(root, skip_bad_rows=1)
    assert len(data.splits["Real World"]) == 19
    assert [(row.split, row.row) for row in data.findings.skipped] == [("Real World", "dog/001.png")]


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        ({}, {"environment": "photo"}, "data.environment.*'photo'. Choose one of Real World, art, location_100"),
        ({"photo": ("bird", "cat")}, {}, "photo.* has classes that the model was not trained on .cat"),
        ({"test": CLASSES}, {}, "data.path.* has splits .test. where environments are expected"),
        ({"Real_World": CLASSES}, {}, "the metrics of Real World, Real_World would be logged under one name"),
        ({"ood": CLASSES}, {}, "the metrics of ood would be logged"),
        ({}, {"test_fraction": 1.0}, "data.test_fraction: 1.0 must lie in .0, 1."),
    ],
)
def test_bad_environments_and_options_are_refused(
    root: Path, change: dict[str, Sequence[str]], keys: dict[str, Any], message: str
) -> None:
    for environment, classes in change.items():
        write(root, {environment: 4}, classes)
    with pytest.raises(DataError, match=message):
        fitted(root, **keys)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["art/dog", "art/bird"], "holds 1 environment, and two or more are needed.*directory holds art/"),
        (["dog", "bird"], "holds 0 environments"),
        (["art/train/dog", "art/test/dog", "photo/dog"], "art has test, train above the folders of its classes"),
        (["art/kfold/dog", "art/kfold/bird", "photo/dog"], "art has kfold above the folders of its classes"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match=message):
        fitted(tmp_path)


def test_images_outside_of_class_folders_are_reported(root: Path) -> None:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / "overview.png")
    data = fitted(root)
    assert f"left out of {root}: 1 image in no class folder of an environment" in data.findings.take_lines()
