"""`model.optimizer` and `model.lr_ratio_role` through the command line."""

from __future__ import annotations

import pytest

from tests.app.conftest import CommandLine

SGD = '--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}'


@pytest.mark.parametrize("any_cli", ["cli", pytest.param("instruction_cli", marks=pytest.mark.slow)], indirect=True)
def test_sgd_with_a_ratio_for_a_role_trains_and_resumes(any_cli: CommandLine) -> None:
    cli = any_cli
    one = "--trainer.max_epochs=1"
    assert cli("fit", one, SGD, "--model.lr_ratio_role.value=2.0", "--model.schedule=constant") == 0
    rates = {tag: cli.scalars(tag) for tag in cli.events().Tags()["scalars"] if tag.startswith("lr-SGD/B")}
    assert rates.keys() == {"lr-SGD/B", "lr-SGD/B/value"}
    assert rates["lr-SGD/B/value"] == {step: 2 * rate for step, rate in rates["lr-SGD/B"].items()}
    saved = cli.checkpoint()
    assert saved["hyper_parameters"]["lr_ratio_role"] == {"value": 2.0}
    assert all(state.keys() == {"momentum_buffer"} for state in saved["optimizer_states"][0]["state"].values())
    assert cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2") == 0  # optimizer keys come from the checkpoint
    assert cli.checkpoint()["global_step"] == 2 * saved["global_step"]
    assert cli("validate", "--ckpt_path=last") == 0
