"""The GPU benchmark on the CPU: budgets, what is left, and (slow) all of its parts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_profile, gpu_steps
from benchmarks.harness import Deadline


def test_a_deadline_names_what_was_not_begun(capsys: pytest.CaptureFixture[str]) -> None:
    Deadline(60).exit()
    spent = Deadline(0)
    assert spent.passed("second") and spent.passed("third")
    with pytest.raises(SystemExit) as stop:
        spent.exit()
    assert stop.value.code == 3
    assert "left: second; third." in capsys.readouterr().err


def test_sections_written_before_the_budget_is_spent_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_profile, "ARMS", ("floor", "ours B"))
    output = tmp_path / "gpu_profile.json"
    words = ["--quick", "--device", "cpu", "--output", str(output)]
    with pytest.raises(SystemExit, match="3"):
        gpu_profile.main([*words, "--budget", "0"])
    assert not output.exists()
    gpu_profile.main(words)
    sections = json.loads(output.read_text())
    assert list(sections) == ["floor", "ours B"]
    (products,) = [k for k in sections["ours B"]["top"] if k["kernel"] == "_LowRankLinear"]
    assert products["launches"] == 8  # four linear layers in each of two blocks


def test_operations_are_those_of_the_matrix_products() -> None:
    model = gpu_steps.QUICK["roberta-large"]
    device = torch.device("cpu")
    stack = gpu_steps.build(model, device)
    x = torch.randn(*model.shape, dtype=torch.bfloat16)
    arms = gpu_steps.arms_of(model, stack, device)
    counted = {name: gpu_steps.Step(arms[name], x, device).operations() for name in ("forward only", "floor", "full")}
    tokens, width = 2 * 32, 128
    linear = 2 * 2 * tokens * width * (4 * width + 2 * 4 * width)  # two blocks of four square layers and an MLP
    assert counted == {"forward only": linear, "floor": 2 * linear, "full": 3 * linear}  # torch counts no SDPA on CPUs


def test_a_missing_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path), "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_parts_that_get_no_time_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path), "--device", "cpu", "--quick", "--budget", "1"]) == 1
    assert "Left: correctness, steps, profile, quality." in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert gpu.main(["--output", str(tmp_path), "--device", "cpu", "--quick", "--budget", "900"]) == 0
    assert time.monotonic() - begin < 900
    for part in gpu.PARTS:
        assert json.loads((tmp_path / f"gpu_{part}.json").read_text())
    checks = json.loads((tmp_path / "gpu_correctness.json").read_text())
    assert all(check["passed"] for section in checks.values() for check in section["checks"])
