"""Adapter spectra during a fit: measured steps, logged quantities, TensorBoard layout and pictures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor

from app.callbacks import adapter_spectrum
from app.reports.heat_map import HeatMap
from modules.adapters import ROLES
from tests.app.conftest import CommandLine as CommandLine
from tests.app.conftest import cli as cli  # the fixture

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param((), {0, 8, 16}, marks=pytest.mark.slow),
        (("--spectrum.every_n_epochs=2",), {0, 16}),
        pytest.param(("--spectrum.every_n_epochs=null",), {0, 16}, marks=pytest.mark.slow),
        (("--spectrum.every_n_epochs=null", "--spectrum.every_n_steps=5"), {0, 5, 10, 15, 16}),
        pytest.param(("--spectrum.every_n_steps=6",), {0, 6, 8, 12, 16}, marks=pytest.mark.slow),
        (("--trainer.accumulate_grad_batches=2", "--spectrum.every_n_steps=3"), {0, 3, 4, 6, 8}),
    ],
)
def test_spectra_are_measured_at_the_configured_steps(
    cli: CommandLine, options: tuple[str, ...], steps: set[int]
) -> None:
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
    assert seen.count((128, 4)) == 2 * 3  # layers, measured steps


@pytest.mark.drawn
def test_measuring_does_not_change_the_fit(cli: CommandLine) -> None:
    assert cli("fit", "--trainer.max_epochs=1", "--spectrum.every_n_steps=4") == 0
    assert cli("fit", "--trainer.max_epochs=1", "--spectrum.every_n_epochs=null") == 0
    one, other = (cli.checkpoint(i)["state_dict"] for i in (0, 1))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_without_adapters_there_is_nothing_to_measure(cli: CommandLine) -> None:
    assert cli("fit", "--model.tuning=head") == 0
    assert not (cli.run() / "spectrum.parquet").exists()
    assert not any(tag.startswith("spectrum") for tag in cli.events().Tags()["scalars"])


def layout_of(cli: CommandLine, version: int = 0) -> dict[str, dict[str, list[str]]]:
    layout = layout_pb2.Layout()
    layout.ParseFromString(cli.events(version).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    return {group.title: {chart.title: list(chart.multiline.tag) for chart in group.chart} for group in layout.category}


def test_custom_scalars_are_the_same_for_every_variant(cli: CommandLine) -> None:
    tags: set[str] = set()
    for trained, start in (("B", "zero"), ("A", "orthogonal")):
        options = [f"--model.adapter.train={trained}", f"--model.adapter.init_b={start}"]
        options += [f"--model.adapter.init_a={'zero' if start == 'orthogonal' else 'orthogonal'}"]
        assert cli("fit", "--trainer.max_epochs=1", *options) == 0
    layout = layout_of(cli)
    assert layout == layout_of(cli, 1)
    assert list(layout) == ["Loss", "BA", "B", "A", "BA by role", "B by role", "A by role"]
    assert next(iter(layout["BA"])) == "relative norm"
    for version in (0, 1):
        tags |= set(cli.events(version).Tags()["scalars"])
    for group, charts in layout.items():
        for patterns in charts.values():
            for pattern in patterns:
                matching = [tag for tag in tags if re.match(pattern, tag)]
                assert len(matching) == (2 if "role" in group else 1)  # one for each role, or one mean


ALL = ("--model.adapter.targets=all",)
BOTH = ("--model.adapter.train=both", "--model.adapter.init_a=kaiming")


@pytest.mark.parametrize(
    ("options", "factors", "roles"),
    [
        ((), {"B": 5, "BA": 6}, {"B": 5, "BA": 6}),
        (ALL, {"B": 5, "BA": 6}, {"B": 1, "BA": 3}),
        ((*ALL, *BOTH), {"A": 5, "B": 5, "BA": 6}, {"A": 1, "B": 1, "BA": 2}),
    ],
)
def test_numbers_of_scalars_and_histograms_are_limited(
    cli: CommandLine,
    finished_fit: Callable[..., None],
    options: tuple[str, ...],
    factors: dict[str, int],
    roles: dict[str, int],
) -> None:
    finished_fit(cli, "--trainer.max_epochs=1", *options)
    events = cli.events()
    tags = events.Tags()
    # TensorBoard would draw the zeros of step 0 as a block from -0.5 to 0.5
    assert {event.step for tag in tags["histograms"] for event in events.Histograms(tag)} == {8}
    scalars = [tag.split("/")[1:] for tag in tags["scalars"] if tag.startswith("spectrum")]
    assert len(scalars) <= 40
    assert len(tags["histograms"]) <= 12
    assert Counter(parts[0] for parts in scalars if len(parts) == 2) == factors
    assert Counter(parts[1] for parts in scalars if len(parts) == 3 and parts[0] == "query") == roles


def test_all_roles_and_factors_together_stay_within_the_limit() -> None:
    rows = [
        {"projection": f"{role}.{i}", "role": role, "factor": factor, "singular_values": [2.0, 1.0], "relative_norm": r}
        for role in (*ROLES, "other")
        for i in range(3)
        for factor, r in (("A", None), ("B", None), ("BA", 0.5))
    ]
    scalars = adapter_spectrum._scalars(rows, of_layers=False)
    assert len(scalars) == 40
    assert scalars["spectrum/other/BA/relative_norm"] == scalars["spectrum/BA/relative_norm"] == 0.5
    assert scalars["spectrum/B/largest"] == 2.0
    assert len(adapter_spectrum._samples(rows, of_layers=False)) <= 12
    assert "spectrum_layers/other.2/B/smallest" in adapter_spectrum._scalars(rows, of_layers=True)


@pytest.mark.parametrize(
    ("detail", "file"),
    [("layers", False), ("off", False), ("off", True), pytest.param("layers", True, marks=pytest.mark.slow)],
)
def test_detail_selects_what_is_logged(cli: CommandLine, detail: str, file: bool, tmp_path: Path) -> None:
    (tmp_path / "detail.yaml").write_text(f"spectrum: {{detail: {detail}}}")  # YAML parses a bare off as false
    option = ["--config", str(tmp_path / "detail.yaml")] if file else [f"--spectrum.detail={detail}"]
    assert cli("fit", "--trainer.max_epochs=1", *option) == 0
    tags = cli.events().Tags()
    logged = {tag for kind in ("scalars", "histograms", "images", "tensors") for tag in tags[kind]}
    if detail == "off":
        assert not any(tag.startswith(("spectrum", "custom_scalars")) for tag in logged)
    else:
        names = {"spectrum_layers/blocks.0.attn.qkv.value/B", "spectrum_layers/blocks.0.attn.qkv.value/B/largest"}
        assert names | {"spectrum/value/BA/smallest"} <= logged
    assert {row["step"] for row in pq.read_table(cli.run() / "spectrum.parquet").to_pylist()} == {0, 8}


def test_a_frozen_factor_is_logged_once_as_text(cli: CommandLine) -> None:
    assert cli("fit", "--trainer.max_epochs=1", "--model.adapter.targets=all") == 0
    events = cli.events()
    (text,) = events.Tensors("spectrum/A/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    rows = {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:])}
    assert rows["role"] == ["largest", "effective rank", "smallest", "stable rank", "frobenius"]
    assert rows["mlp_out"] == ["1", "4", "1", "4", "2"]  # four orthonormal rows
    assert not any("/A/" in tag for tag in events.Tags()["scalars"])


def test_pictures_include_the_scale_and_share_one_color_scale(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, np.ndarray] = {}
    blank = np.zeros((1, 1, 3), np.uint8)
    monkeypatch.setattr(HeatMap, "render", lambda _, values, title: drawn.update({title: values}) or blank)
    assert cli("fit", "--model.adapter.alpha=8") == 0  # s = 2
    rows = pq.read_table(cli.run() / "spectrum.parquet").to_pylist()
    sigma = [
        row["singular_values"]
        for role in ("query", "value")
        for row in rows
        if (row["step"], row["factor"], row["role"]) == (16, "BA", role)
    ]
    largest = 2 * np.max(sigma)
    assert drawn[f"s·BA, largest {largest:.3g}, step 16"] == pytest.approx(2 * np.array(sigma), rel=1e-5)
    ratios = drawn["s·BA over each layer's largest, step 16"]
    assert ratios == pytest.approx(np.array(sigma) / np.max(sigma, axis=1, keepdims=True), rel=1e-5)
    assert not drawn["s·BA over each layer's largest, step 0"].any()  # B starts at zero


def test_relative_norm_is_that_of_the_update(cli: CommandLine) -> None:
    assert cli("fit", "--model.tuning=adapter", "--model.adapter.targets=regex:blocks.1.attn.qkv.value") == 0
    row = pq.read_table(cli.run() / "spectrum.parquet").to_pylist()[-1]
    assert (row["step"], row["factor"], row["role"]) == (16, "BA", "value")
    state = cli.checkpoint()["state_dict"]
    prefix = "backbone.blocks.1.attn.qkv.adapters.value"
    update = 16 / 4 * state[f"{prefix}.B"].double() @ state[f"{prefix}.A"].double()
    ratio = update.norm().item() / row["relative_norm"]
    # ‖W‖_F of a 32 × 32 slice: timm draws its entries with standard deviation 0.02
    assert ratio == pytest.approx(0.02 * 32, rel=0.05)
