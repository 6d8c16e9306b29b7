"""`model.optimizer` and `model.lr_ratio_role` through the command line, for every task."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused

SGD = '--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}'
FAMILIES = ("cli", "text_cli", "summary_cli", "instruction_cli")


@pytest.mark.parametrize("family", FAMILIES)
def test_sgd_with_a_ratio_for_a_role_trains_and_resumes(family: str, request: pytest.FixtureRequest) -> None:
    cli: CommandLine = request.getfixturevalue(family)
    one = "--trainer.max_epochs=1"
    assert cli("fit", one, SGD, "--model.lr_ratio_role.value=2.0", "--model.schedule=constant") == 0
    rates = {tag: cli.scalars(tag) for tag in cli.events().Tags()["scalars"] if tag.startswith("lr-SGD/B")}
    assert rates.keys() == {"lr-SGD/B", "lr-SGD/B/value"}
    assert rates["lr-SGD/B/value"] == {step: 2 * rate for step, rate in rates["lr-SGD/B"].items()}
    saved = cli.checkpoint()
    assert saved["hyper_parameters"]["lr_ratio_role"] == {"value": 2.0}
    assert all(state.keys() == {"momentum_buffer"} for state in saved["optimizer_states"][0]["state"].values())
    assert cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2") == 0  # the keys are the checkpoint's
    assert cli.checkpoint()["global_step"] == 2 * saved["global_step"]
    assert cli("validate", "--ckpt_path=last") == 0


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.optimizer.class_path=torch.optim.LBFGS", ["model.optimizer.class_path", "LBFGS", "AdamW", "SGD"]),
        ("--model.optimizer.class_path=os.system", ["os.system is not a supported optimizer", "AdamW"]),
        (
            '--model.optimizer={"class_path": "torch.optim.Adam", "init_args": {"beta": 1}}',
            ["model.optimizer", "Adam", "beta"],
        ),
        ("--model.lr_ratio_role.output=2.0", ["model.lr_ratio_role", "output", "query, value"]),
        ("--model.lr_ratio_role.value=-1", ["model.lr_ratio_role.value", "-1.0", "above 0"]),
        ("--model.lr_ratio_role=2", ["model.lr_ratio_role", "2"]),
    ],
)
def test_what_is_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, words: list[str]
) -> None:
    refused(capsys, cli("fit", option), *words)
    assert not cli.root.exists()


def test_a_checkpoint_of_another_optimizer(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    code = fitted_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2", SGD)
    refused(capsys, code, "ckpt_path", "model.optimizer", "model.adapter_path")
