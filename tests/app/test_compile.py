"""model.compile: a compiled run has the same weights and names in its checkpoint, and resumes uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch._dynamo.utils import counters

from modules.scaling import compilation
from tests.app.processes import run_on_two

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

SAME = [
    "--model.adapter.dropout=0",
    "--model.backbone_args={patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace without generating C++ code."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_same_weights(cli: CommandLine) -> None:
    first, second = (cli.checkpoint(version) for version in (0, 1))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert first["global_step"] == second["global_step"]
    for name, tensor in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_compiled_run_equals_an_uncompiled_run_and_resumes_uncompiled(cli: CommandLine) -> None:
    assert cli("fit", *SAME) == 0
    assert cli("fit", *SAME, "--model.compile=true", "--test_after_fit=true") == 0
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    assert_same_weights(cli)
    counters.clear()
    for version in (0, 1):
        run = str(cli.run(version) / "checkpoints" / "last.ckpt")
        assert cli("fit", *SAME, "--trainer.max_epochs=2", "--model.compile=false", f"--ckpt_path={run}") == 0
    assert not counters["stats"]
    assert_same_weights(cli)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["true", "false"])
def test_two_compiled_processes_match_one_uncompiled(cli: CommandLine, tmp_path: Path, shard: str) -> None:
    assert cli("fit", *SAME, "--data.batch_size=12") == 0
    words = [*SAME, "--data.batch_size=6", "--model.compile=true", f"--model.shard_frozen={shard}"]
    run_on_two(cli.words("fit", *words), tmp_path)
    assert_same_weights(cli)


def test_an_error_of_the_compiler_is_one_message(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "no such backend")
    assert cli("fit", *SAME, "--model.compile=true") == 2
    assert "error: model.compile: torch.compile fails on this backbone" in capsys.readouterr().err
