"""When spectra are taken, what of them is spared, and how they are laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor

from app.callbacks import adapter_spectrum
from tests.app.conftest import CommandLine as CommandLine
from tests.app.conftest import cli as cli  # the fixture

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), {0, 8, 16}),
        (("--spectrum.every_n_epochs=2",), {0, 16}),
        (("--spectrum.every_n_epochs=null",), {0, 16}),
        (("--spectrum.every_n_epochs=null", "--spectrum.every_n_steps=5"), {0, 5, 10, 15, 16}),
        (("--spectrum.every_n_steps=6",), {0, 6, 8, 12, 16}),
        (("--trainer.accumulate_grad_batches=2", "--spectrum.every_n_steps=3"), {0, 3, 4, 6, 8}),
    ],
)
def test_spectra_are_taken_when_asked(cli: CommandLine, options: tuple[str, ...], steps: set[int]) -> None:
    assert cli("fit", *options) == 0
    assert set(cli.scalars("spectrum/query/BA/largest")) == steps
    assert {row["step"] for row in pq.read_table(cli.run() / "spectrum.parquet").to_pylist()} == steps


def test_a_frozen_factor_is_measured_once(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[[Tensor], Tensor] = adapter_spectrum.triangular_factor
    seen: list[tuple[int, ...]] = []

    def count(tall: Tensor) -> Tensor:
        seen.append(tuple(tall.shape))
        return original(tall)

    monkeypatch.setattr(adapter_spectrum, "triangular_factor", count)
    assert cli("fit", "--model.adapter.targets=mlp_in") == 0  # A is 4 × 32, B is 128 × 4
    assert seen.count((32, 4)) == 2  # layers
    assert seen.count((128, 4)) == 2 * 3  # layers, times


@pytest.mark.drawn
def test_measuring_changes_nothing(cli: CommandLine) -> None:
    assert cli("fit", "--spectrum.every_n_steps=1") == 0
    assert cli("fit", "--spectrum.every_n_epochs=null") == 0
    one, other = (cli.checkpoint(i)["state_dict"] for i in (0, 1))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_without_adapters_there_is_nothing_to_measure(cli: CommandLine) -> None:
    assert cli("fit", "--model.tuning=head") == 0
    assert not (cli.run() / "spectrum.parquet").exists()
    assert not any(tag.startswith("spectrum") for tag in cli.events().Tags()["scalars"])


def test_custom_scalars_open_grouped(fitted_cli: CommandLine) -> None:
    events = fitted_cli.events()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    groups = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert list(groups) == ["Loss", "BA, the update", "B, trained", "A, frozen"]
    assert groups["BA, the update"][0] == "relative norm"
    scalars = set(events.Tags()["scalars"])
    for category in layout.category:
        for chart in category.chart:
            assert set(chart.multiline.tag) <= scalars


def test_relative_norm_is_that_of_the_update(cli: CommandLine) -> None:
    assert cli("fit", "--model.tuning=adapter", "--model.adapter.targets=regex:blocks.1.attn.qkv.value") == 0
    row = pq.read_table(cli.run() / "spectrum.parquet").to_pylist()[-1]
    assert (row["step"], row["factor"], row["role"]) == (16, "BA", "value")
    state = cli.checkpoint()["state_dict"]
    prefix = "backbone.blocks.1.attn.qkv.adapters.value"
    update = 16 / 4 * state[f"{prefix}.B"].double() @ state[f"{prefix}.A"].double()
    ratio = update.norm().item() / row["relative_norm"]
    # ‖W‖_F of a slice that timm draws with standard deviation 0.02
    assert ratio == pytest.approx(0.02 * 32, rel=0.05)
