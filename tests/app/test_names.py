"""Names of runs and the learning rate finder, through the command line."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image

from app.reports.range_test import draw_range_test
from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused

SHORT = ("--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.logger=false")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--name=first"], "version_0-first-B"),
        (["--variant=lora"], "version_0-lora"),
        (["--name=x.1", "--variant=A"], "version_0-x.1-A"),
        (["--name=A", "--variant=A"], "version_0-A"),
        (["--name=custom", "--model.adapter.scaling=rslora"], "version_0-custom"),
    ],
)
def test_the_run_directory_has_name_and_variant(cli: CommandLine, options: list[str], name: str) -> None:
    assert cli("fit", *SHORT, *options) == 0
    assert [path.name for path in cli.root.iterdir()] == [name]


def test_other_commands_use_a_named_run(cli: CommandLine) -> None:
    name = "version_0-x.1-A"
    assert cli("fit", *SHORT, "--name=x.1", "--variant=A") == 0
    assert cli("fit", *SHORT) == 0
    assert sorted(path.name for path in cli.root.iterdir()) == [name, "version_1"]
    assert cli("validate", f"--ckpt_path={cli.root / name / 'checkpoints' / 'last.ckpt'}") == 0
    assert cli("fit", *SHORT, "--trainer.max_steps=2", f"--ckpt_path={cli.root / name}") == 0
    assert len(list(cli.root.iterdir())) == 2


def test_last_is_the_run_with_the_largest_number(cli: CommandLine) -> None:
    short = ("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1")
    assert cli("fit", *short, "--name=b") == cli("fit", *short, "--name=a") == 0
    assert cli("validate", "--ckpt_path=last") == 0
    assert "val/loss" in (cli.root / "version_1-a-B" / "metrics.json").read_text()
    assert not (cli.root / "version_0-b-B" / "evaluations.json").exists()


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b"])
def test_a_name_that_is_no_single_folder_is_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    refused(capsys, cli("fit", f"--name={name}"), "name", "is not allowed. Use letters")
    assert not cli.root.exists() or not list(cli.root.iterdir())


@pytest.mark.drawn
def test_the_learning_rate_finder_makes_all_its_steps_and_is_drawn(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit has 8 steps."""
    tried: list[float] = []

    def draw(rates: list[float], losses: list[float], suggestion: float | None) -> np.ndarray:
        tried[:] = rates
        return draw_range_test(rates, losses, suggestion)

    monkeypatch.setattr("app.reports.range_test.draw_range_test", draw)
    assert cli("fit", "--trainer.max_epochs=1", "--find_lr=true") == 0
    assert (len(tried), tried[0], tried[-1]) == (100, pytest.approx(1e-5), pytest.approx(0.3))
    assert cli.checkpoint()["global_step"] == 8
    log = "".join(capsys.readouterr())
    assert not any(line in log for line in ("weights_only", "stopped early", "max_epochs=-1"))
    learning_rate = cli.checkpoint()["hyper_parameters"]["learning_rate"]
    assert learning_rate in map(pytest.approx, tried)
    config = yaml.safe_load((cli.run() / "config.yaml").read_text())
    assert (config["find_lr"], config["model"]["init_args"]["learning_rate"]) == (False, learning_rate)
    (before,) = cli.run().glob("config-*.yaml")
    assert yaml.safe_load(before.read_text())["find_lr"] is True
    with Image.open(cli.run() / "learning_rate.png") as image:
        assert min(image.size) >= 400
    assert "train/learning_rate_search" in cli.events().Tags()["images"]
