"""Class weights, augmentation and test reports of classification, through the command line."""

from __future__ import annotations

import csv
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused
from tests.app.test_resume import interrupt_and_resume

AUGMENTATION = ("--data.mixup=0.4", "--data.cutmix=1", "--data.randaugment=2", "--data.random_erasing=0.5")


def test_a_fit_with_all_augmentation_resumes_bit_for_bit(cli: CommandLine, finished_fit: Callable[..., None]) -> None:
    options = [*AUGMENTATION, "--trainer.max_epochs=2", "--checkpoint.last_every_n_steps=4"]
    assert interrupt_and_resume(cli, finished_fit, options, cut=13) == 12


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.mixup=-1", ["data.mixup", "-1"]),
        ("--data.cutmix=nan", ["data.cutmix", "nan"]),
        ("--data.randaugment=-1", ["data.randaugment", "-1"]),
        ("--data.random_erasing=1.5", ["data.random_erasing", "[0, 1]"]),
        ("--model.class_weights=[1,2]", ["model.class_weights", "2 weights for 3 classes"]),
        ("--model.class_weights=even", ["model.class_weights", "even"]),
    ],
)
def test_bad_values_are_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str, words: list[str]
) -> None:
    refused(capsys, cli("fit", option), *words)


@pytest.mark.drawn
@pytest.mark.parametrize(("family", "extra_options"), [("cli", []), ("text_cli", ["--data.test_on_validation=true"])])
def test_balanced_weights_and_the_reports_of_a_test(
    family: str, extra_options: list[str], request: pytest.FixtureRequest
) -> None:
    cli: CommandLine = request.getfixturevalue(family)
    assert (
        cli("fit", "--trainer.max_epochs=1", "--test_after_fit=true", "--model.class_weights=balanced", *extra_options)
        == 0
    )
    metrics = cli.metrics()
    assert {"test/macro_f1", "test/ece", "val/macro_f1", "val/ece"} <= metrics.keys()
    with (cli.run() / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    f1 = [float(row["f1"]) for row in rows if int(row["support"]) or float(row["precision"])]
    assert metrics["test/macro_f1"] == pytest.approx(np.mean(f1), abs=1e-5)
    with Image.open(cli.run() / "confusion_matrix.png") as image:
        assert len(np.unique(np.asarray(image))) > 100
    assert "test/confusion_matrix" in cli.events().Tags()["images"]
