"""The GPU benchmark on the CPU: time budgets, skipped parts, and (slow) all parts."""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_profile, gpu_steps
from benchmarks.harness import Deadline
from tests.conftest import ROOT


def test_a_deadline_names_the_skipped_sections(capsys: pytest.CaptureFixture[str]) -> None:
    Deadline(60).exit()
    spent = Deadline(0)
    assert spent.passed("second") and spent.passed("third")
    with pytest.raises(SystemExit) as stop:
        spent.exit()
    assert stop.value.code == 3
    assert "Skipped: second; third." in capsys.readouterr().err


def test_a_spent_budget_writes_no_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_operations_equal_those_of_the_matrix_products() -> None:
    model = gpu_steps.QUICK["roberta-large"]
    device = torch.device("cpu")
    stack = gpu_steps.build(model, device)
    x = torch.randn(*model.shape, dtype=torch.bfloat16)
    arms = gpu_steps.arms_of(model, stack, device)
    counted = {name: gpu_steps.Step(arms[name], x, device).operations() for name in ("forward only", "floor", "full")}
    tokens, width = 2 * 32, 128
    linear = 2 * 2 * tokens * width * (4 * width + 2 * 4 * width)  # two blocks of four square layers and an MLP
    # torch does not count SDPA on CPUs
    assert counted == {"forward only": linear, "floor": 2 * linear, "full": 3 * linear}


def test_a_missing_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path), "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_parts_beyond_the_budget_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path), "--device", "cpu", "--quick", "--budget", "1"]) == 1
    assert "Unfinished: correctness, steps, profile, quality." in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert gpu.main(["--output", str(tmp_path), "--device", "cpu", "--quick", "--budget", "900"]) == 0
    assert time.monotonic() - begin < 900
    for part in gpu.PARTS:
        assert json.loads((tmp_path / f"gpu_{part}.json").read_text())
    checks = json.loads((tmp_path / "gpu_correctness.json").read_text())
    assert all(check["passed"] for section in checks.values() for check in section["checks"])


# Public names of torch 2.14.1 that torch 2.11.0 lacks. The machines with a GPU have torch 2.11. The names were found by
# comparing `dir` of the public modules of both releases.
NEWER_THAN_2_11 = set(
    [
        "CacheInfo",
        "DataParallelMeshDims",
        "LinearCrossEntropyLoss",
        "LinearCrossEntropyOptions",
        "PrecompileError",
        "SavedTensor",
        "all_gather_single",
        "bcomplex32",
        "blas_workspace_size",
        "caching_allocator_disabled",
        "const_data_ptr",
        "cudagraph_mark_warmup_incomplete",
        "current_solver_handle",
        "empty_host_cache",
        "enforce_grad_layout_policy",
        "gather_into_tensor",
        "gather_single",
        "get_backend_impl",
        "get_default_backend",
        "graph_annotations",
        "linear_cross_entropy",
        "matrix_sqrth",
        "node_creation_hook",
        "nonstrict_trace",
        "philox_state",
        "polar",
        "precompile",
        "record_comm",
        "redispatch_function",
        "reduce_scatter_single",
        "region_activation_memory_budget",
        "set_default_backend",
        "set_timeout",
        "swap_in_optimizer_params_and_state",
        "thread_safe_generator",
    ]
)


def test_no_name_is_used_that_torch_on_the_gpu_machines_lacks() -> None:
    found = []
    for folder in ("app", "modules", "datamodules", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.attr] if isinstance(node, ast.Attribute) else []
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                    names = [alias.name for alias in node.names]
                found += [f"{path}: {name}" for name in names if name in NEWER_THAN_2_11]
    assert not found
