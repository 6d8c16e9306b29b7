"""Averages of the trained weights against closed forms, in every file that a run leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from app.callbacks import AdapterCheckpoint
from app.callbacks.adapter_averaging import TRAINED, UPDATES
from app.cli import main
from tests.support.refusals import refused

if TYPE_CHECKING:
    from pathlib import Path

    from tests.app.conftest import CommandLine

State = dict[str, Tensor]
EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.7"]
ONE_EPOCH = ["--trainer.max_epochs=1", "--checkpoint.monitor=null"]


def mix(decay: float, average: State, weights: State) -> State:
    return {name: decay * tensor + (1 - decay) * weights[name] for name, tensor in average.items()}


def fading(states: list[State]) -> State:
    """Average from the initial weights on, with a decay that grows to 0.7."""
    average = states[0]
    for n, weights in enumerate(states[1:], start=1):
        average = mix(min(0.7, (1 + n) / (10 + n)), average, weights)
    return average


def constant(states: list[State]) -> State:
    """Average the weights after steps 3, 5, 7 and so on. The average starts as the weights after step 3."""
    average = states[3]
    for weights in states[5::2]:
        average = mix(0.7, average, weights)
    return average


def mean(states: list[State]) -> State:
    """Average the weights after all steps equally."""
    return {name: torch.stack([state[name] for state in states[1:]]).mean(0) for name in states[0]}


def last(states: list[State]) -> State:
    """Return the weights after the last step."""
    return states[-1]


AVERAGES: dict[str, tuple[list[str], Callable[[list[State]], State]]] = {
    "AdapterAveraging": (["--trainer.callbacks+=AdapterAveraging", "--trainer.callbacks.decay=0.7"], fading),
    "EMAWeightAveraging": (
        [*EMA, "--trainer.callbacks.update_every_n_steps=2", "--trainer.callbacks.update_starting_at_step=2"],
        constant,
    ),
    "WeightAveraging": (["--trainer.callbacks+=WeightAveraging"], mean),
    "an average that never starts": ([*EMA, "--trainer.callbacks.update_starting_at_step=100"], last),
}


@contextmanager
def recorded_steps() -> Iterator[list[State]]:
    """Yield a list that gets the trained weights before each step and at the end of a fit."""
    states: list[State] = []

    def record(self: AdapterCheckpoint, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        statistics = {n: b for n, b in module.named_buffers() if "running_" in n}
        states.append({n: t.detach().clone() for n, t in (trained | statistics).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterCheckpoint, "on_train_batch_start", record)
        patch.setattr(AdapterCheckpoint, "on_train_end", record)
        yield states


def peft_name(name: str) -> str:
    layer, _, rest = name.removeprefix("backbone.").partition(".adapters.")
    factor = f".lora_{rest[-1]}.weight" if rest else ""
    return f"base_model.model.{layer}{factor}"


RARER = ("WeightAveraging", "an average that never starts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in RARER else n for n in AVERAGES])
def test_the_average_is_validated_saved_tested_and_exported(text_cli: CommandLine, tmp_path: Path, name: str) -> None:
    options, closed_form = AVERAGES[name]
    with recorded_steps() as states:
        assert text_cli("fit", *ONE_EPOCH) == 0
    assert text_cli("fit", *ONE_EPOCH, *options) == 0
    expected = closed_form(states)
    for file in ("best", "last"):
        plain, averaged = text_cli.checkpoint(0, file), text_cli.checkpoint(1, file)
        assert averaged["state_dict"].keys() == plain["state_dict"].keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(averaged["state_dict"][key], tensor, rtol=1e-5, atol=1e-7)
            assert torch.equal(averaged[TRAINED][key], states[-1][key])
            assert torch.equal(plain["state_dict"][key], states[-1][key])
    output = tmp_path / "peft"
    assert main(["export", str(text_cli.run(1)), "--format", "peft", "--output", str(output)]) == 0
    for folder in (text_cli.run(1) / "adapter", output):
        written = load_file(folder / "adapter_model.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(written[peft_name(key)], tensor, rtol=1e-5, atol=1e-7)
    validated = text_cli.metrics(1)["val/loss"]
    assert text_cli("validate", *options, f"--ckpt_path={text_cli.run(1)}") == 0
    assert text_cli.metrics(1)["val/loss"] == pytest.approx(validated, rel=1e-5)
    assert (validated == text_cli.metrics(0)["val/loss"]) == (closed_form is last)


@pytest.mark.slow
def test_running_statistics_of_trained_batch_norms_are_averaged_too(cli: CommandLine) -> None:
    """In adapter tuning, batch norms are frozen. Their statistics do not change, and are in no checkpoint."""
    args = "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 24], stem_width: 8}"
    resnet = ["--model.backbone=resnet18", f"--model.backbone_args={args}", "--model.image_size=32"]
    options = [*ONE_EPOCH, *resnet, "--model.tuning=full"]
    with recorded_steps() as states:
        assert cli("fit", *options) == 0
    assert cli("fit", *options, "--trainer.callbacks+=WeightAveraging") == 0
    saved, expected = cli.checkpoint(1)["state_dict"], mean(states)
    assert any(key.endswith("running_var") for key in expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=1e-5)
    assert saved["backbone.bn1.num_batches_tracked"] == len(states) - 1


def test_the_average_holds_the_trained_weights_alone(cli: CommandLine) -> None:
    """A copy of the frozen backbone would take memory, and disk space in each checkpoint."""
    copies: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AveragedModel, "update_parameters", lambda self, model: copies.append(self.module))
        assert cli("fit", *ONE_EPOCH, *EMA) == 0
    checkpoint = cli.checkpoint()
    assert sum(p.numel() for p in copies[0].parameters()) == sum(t.numel() for t in checkpoint[TRAINED].values())
    assert checkpoint[TRAINED].keys() < checkpoint["state_dict"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({TRAINED: {"head.weight": torch.zeros(1)}}, f"{TRAINED} of the checkpoint does not match"),
        ({TRAINED: {"unknown": torch.zeros(1)}}, f"{TRAINED} of the checkpoint does not match"),
        ({TRAINED: 3}, f"{TRAINED} of the checkpoint does not match"),
        ({UPDATES: -1}, f"{UPDATES} of the checkpoint is -1"),
        ({UPDATES: "x"}, f"{UPDATES} of the checkpoint is 'x'"),
    ],
)
def test_damaged_averages_are_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = fitted_cli.run() / "checkpoints" / "last.ckpt"
    torch.save(fitted_cli.checkpoint() | {TRAINED: {}} | change, path)
    refused(capsys, fitted_cli("fit", *EMA, "--ckpt_path=last"), "ckpt_path: ", message)
