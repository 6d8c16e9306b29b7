"""Training on one environment through the command line: metrics of the other environments."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.run.evaluations import read_evaluations
from tests.app.conftest import CommandLine
from tests.support.small_data import CLASSES, colour_image

SIZES = {"plain": 60, "dark": 21, "all blue": 12}


@pytest.fixture(scope="module")
def domains_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("domains")
    rng = np.random.default_rng(0)
    for environment, size in SIZES.items():
        for i in range(size):
            label = 2 if environment == "all blue" else i % 3
            file = root / environment / CLASSES[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = colour_image(i % 3, rng)  # images of `all blue` are labelled blue and have the color of any class
            Image.fromarray(pixels // 4 if environment == "dark" else pixels).save(file)
    return root


@pytest.fixture
def domain_cli(tmp_path: Path, domains_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "runs", domains_path, "domains")


def test_each_environment_is_logged_beside_the_in_domain_test(
    domain_cli: CommandLine, domains_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        domain_cli("fit", "--trainer.max_epochs=6", "--model.adapter.targets=all", "--model.label_smoothing=0.1") == 0
    )
    metrics = domain_cli.metrics()
    assert "gap/ood" in capsys.readouterr().out  # in the closing table, although it has no metric of the same name
    assert {key for key in metrics if key.startswith(("test/", "gap/"))} == {
        *("test/acc1", "test/loss", "test/dark/acc1", "test/all_blue/acc1", "test/ood/acc1"),
        *("gap/ood", "gap/acc1", "gap/loss"),
        *(f"{part}/{name}" for part in ("test", "gap") for name in ("macro_f1", "ece")),
    }
    each = [metrics["test/dark/acc1"], metrics["test/all_blue/acc1"]]
    assert metrics["test/ood/acc1"] == pytest.approx(sum(each) / 2)
    assert metrics["gap/ood"] == pytest.approx(metrics["test/acc1"] - sum(each) / 2)
    assert metrics["gap/ood"] > 0.1  # only a third of `all blue` has its color
    best = str(domain_cli.run() / "checkpoints" / "best.ckpt")
    # compare with the share of predicted images whose folder is their class
    for number, name in enumerate(("dark", "all blue")):
        logged = metrics[f"test/{name.replace(' ', '_')}/acc1"]
        folder = domains_path / name
        assert domain_cli("predict", f"--ckpt_path={best}", f"--data.predict_path={folder}") == 0
        with (domain_cli.run() / f"predictions{f'-{number}' if number else ''}.csv").open() as file:
            hits = [row["prediction"] == Path(row["name"]).parent.name for row in csv.DictReader(file)]
        assert len(hits) == SIZES[name]
        assert np.mean(hits) == pytest.approx(logged)
    (evaluation,) = [e for e in read_evaluations(domain_cli.run()) if e.split == "test"]
    assert evaluation.metrics["test/all_blue/acc1"] == metrics["test/all_blue/acc1"]
    assert "12 rows of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_later_test_logs_the_same_metrics(domain_cli: CommandLine) -> None:
    assert domain_cli("fit", "--trainer.max_epochs=1") == 0
    before = domain_cli.metrics()
    assert domain_cli("test", "--ckpt_path=last") == 0
    assert domain_cli.metrics() == before
    assert domain_cli("test", "--ckpt_path=last", "--data.environment=dark") == 0
    after = domain_cli.metrics()
    assert "test/plain/acc1" in after
    # the gap to training rows belonged to the earlier test and is removed; gap/ood is from this test
    assert {key for key in after if key.startswith("gap/")} == {"gap/ood"}
    assert after["gap/ood"] == pytest.approx(after["test/acc1"] - after["test/ood/acc1"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.environment=photo", "data.environment: {root} has no environment 'photo'. Choose one of all blue, "),
        ("--data.environment=null", "data: the following arguments are required: environment"),
    ],
)
def test_a_wrong_environment_is_refused_before_training(
    domain_cli: CommandLine, domains_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert domain_cli("fit", option) == 2
    error = capsys.readouterr().err
    assert message.format(root=domains_path) in " ".join(error.split())
    assert not domain_cli.root.exists() or not list(domain_cli.root.iterdir())


@pytest.mark.slow
def test_the_frozen_prefix_can_be_cached(domain_cli: CommandLine) -> None:
    options = ["--model.adapter.layers=1", "--data.horizontal_flip=false", "--data.crop_scale=[1,1]"]
    options += [
        "--model.adapter.dropout=0",
        "--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    ]
    assert domain_cli("fit", *options, "--data.cache_prefix=false") == 0
    assert domain_cli("fit", *options, "--data.cache_prefix=true") == 0
    plain, cached = domain_cli.metrics(0), domain_cli.metrics(1)
    for key in ("test/acc1", "test/ood/acc1", "train_eval/loss", "gap/loss"):
        assert plain[key] == pytest.approx(cached[key], abs=1e-4), key
    states = [domain_cli.checkpoint(version)["state_dict"] for version in (0, 1)]
    assert all(torch.allclose(tensor, states[1][name], atol=1e-4) for name, tensor in states[0].items())
