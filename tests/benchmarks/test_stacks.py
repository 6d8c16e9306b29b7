"""The arms of the step benchmarks: equal outputs, trained parameters and saved bytes, for each family of blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import layer, model, scaling, stacks

TINY = {name: replace(family, width=256, shape=(2, 9), bucket=128) for name, family in stacks.FAMILIES.items()}


@pytest.mark.parametrize("name", TINY)
def test_arms_start_with_equal_outputs_and_train_the_expected_parameters(name: str) -> None:
    family = TINY[name]
    stack = stacks.random_stack(family, torch.float32)
    batches = stacks.random_batches(family.batches(bucketed=False), family.width, torch.float32)
    arms = stacks.arms_for(list(stacks.ARMS), stack, ["all"], rank=4)
    expected = stack(batches[0][0])
    for arm in arms.values():
        torch.testing.assert_close(arm.forward(batches[0][0]), expected, rtol=1e-4, atol=1e-4)
        arm.step(batches)
    assert not any(parameter.requires_grad for parameter in stack.parameters())  # the arms share the frozen weights
    torch.testing.assert_close(stack(batches[0][0]), expected)  # full tuning has trained a copy
    trained = {arm: model.trained(arms[arm]) for arm in arms}
    assert trained["PEFT A frozen"] == trained["PEFT LoRA-FA"] == trained["ours B"] > 0
    assert trained["PEFT"] == trained["ours both"] == trained["ours A"] + trained["ours B"]
    assert trained["floor"] == trained["forward only"] == 0
    for arm in ("PEFT", "PEFT LoRA-FA", "ours B", "ours A", "ours both"):
        assert not torch.equal(arms[arm].forward(batches[0][0]), expected)  # the step has changed the adapters


def test_b_saves_only_the_small_products_beyond_the_floor() -> None:
    family = TINY["vit"]
    stack = stacks.random_stack(family, torch.bfloat16)
    batches = stacks.random_batches(family.batches(bucketed=False), family.width, torch.bfloat16)
    arms = stacks.arms_for(["floor", "PEFT", "PEFT autocast", "ours B", "ours B, slices"], stack, ["all"], rank=4)
    saved = {name: arm.saved(batches) for name, arm in arms.items()}
    layers, tokens = 4 * family.depth, 2 * 9
    assert saved["ours B"] - saved["floor"] == layers * tokens * 4 * 2  # x·Aᵀ of each layer in bfloat16
    stacked = family.depth * 3 * 4 * family.width * 4  # stacked A of q, k and v in float32
    assert saved["ours B, slices"] - saved["floor"] <= (layers + 2 * family.depth) * tokens * 4 * 2 + stacked
    assert saved["PEFT autocast"] > 1.5 * saved["floor"] and saved["PEFT"] > saved["PEFT autocast"]


def test_a_complete_vit_takes_images() -> None:
    family = replace(stacks.WHOLE["vit-b"], width=128, depth=2, shape=(1, 197))
    stack = stacks.random_stack(family, torch.bfloat16)
    ((x, gradient),) = stacks.random_batches([family.shape], family.width, torch.bfloat16, image=family.image)
    assert x.shape == (1, 3, 224, 224)
    arms = stacks.arms_for(["floor", "ours B"], stack, ["all"], rank=4)
    assert arms["ours B"].forward(x).shape == gradient.shape
    for arm in arms.values():
        arm.step([(x, gradient)])


def test_the_closed_share_of_the_gap() -> None:
    seconds = {"floor": [1.0, 2.0, 1.0], "PEFT": [2.0, 4.0, 2.0], "ours B": [1.25, 2.5, 1.25]}
    figures = model.derive("ours B", seconds, {"floor": 100, "ours B": 101})
    assert figures["times faster than PEFT"]["median"] == 1.6
    assert figures["closed of PEFT's gap to the floor"]["median"] == 0.75
    assert figures["saved over the floor's"] == 1.01


def test_a_run_writes_its_measurements_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "FAMILIES", TINY)
    words = ["--quick", "--family", "roberta", "--targets", "query,value", "--batches", "buckets", "--rounds", "2"]
    words += ["--arms", "PEFT", "ours B", "--output", str(tmp_path / "model.json")]
    model.main(words)
    (name,) = stored = json.loads((tmp_path / "model.json").read_text())
    assert name == "roberta, bfloat16, query,value, rank 8, buckets batches, sdpa"
    assert stored[name]["shapes"] == [[8, 16], [4, 32], [2, 64], [1, 128]]
    assert {arm: len(rounds) for arm, rounds in stored[name]["seconds"].items()} == {"floor": 2, "PEFT": 2, "ours B": 2}
    first = capsys.readouterr().out
    monkeypatch.setattr(model, "measure", None)  # --resume measures nothing again
    model.main([*words, "--resume"])
    assert capsys.readouterr().out == first


def test_a_layer_saves_the_bytes_that_its_trained_factors_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "SHAPES", {"small": (64, 96)})
    words = [
        "--quick",
        "--layers",
        "small",
        "--dtype",
        "float32",
        "--rank",
        "4",
        "--output",
        str(tmp_path / "layer.json"),
    ]
    layer.main(words)
    (figures,) = json.loads((tmp_path / "layer.json").read_text()).values()
    x, h = 197 * 64 * 4, 197 * 4 * 4
    assert {arm: figures["saved_bytes"][arm] for arm in ("floor", "full", "ours B", "ours A", "ours both")} == {
        "floor": 0,
        "full": x,
        "ours B": h,
        "ours A": x,
        "ours both": x + h,
    }
    assert figures["saved_bytes"]["ours B, plain"] == figures["saved_bytes"]["PEFT A frozen"] == h
    assert figures["saved_bytes"]["PEFT"] == x + h


def test_slopes_of_known_powers(tmp_path: Path) -> None:
    sizes = [3, 6, 12]
    values = [{name: 0.5 * size**2 for name in scaling.ARMS} for size in sizes]
    points = [
        {"depth": size, "width": 8, "seconds": v, "median_seconds": v, "saved_bytes": v}
        for size, v in zip(sizes, values, strict=True)
    ]
    slopes = {quantity: scaling.slopes(sizes, points, quantity) for quantity in scaling.LABELS}
    assert all(slope["power"] == 2 for slope in slopes["median_seconds"].values())
    linear = scaling.slopes(
        sizes, [{"saved_bytes": {name: 7.0 * size for name in scaling.ARMS}} for size in sizes], "saved_bytes"
    )
    assert linear["ours B"] == {"power": 1.0, "each": pytest.approx(7.0)}
    figures = {"varied": "depth", "sizes": sizes, "points": points, "slopes": slopes, "cpu": "", "threads": 1}
    scaling.plot([figures], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
