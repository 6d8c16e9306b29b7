"""A compiled run is the same run: its weights, its checkpoint's names, and it resumes uncompiled."""

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
    """The compiler's front end alone: no C++."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_same_weights(cli: CommandLine) -> None:
    one, other = (cli.checkpoint(version) for version in (0, 1))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert one["global_step"] == other["global_step"]
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_compiled_run_is_the_same_and_resumes_uncompiled(cli: CommandLine) -> None:
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


@pytest.mark.parametrize("shard", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_two_processes(cli: CommandLine, tmp_path: Path, shard: str) -> None:
    assert cli("fit", *SAME, "--data.batch_size=12") == 0
    words = [*SAME, "--data.batch_size=6", "--model.compile=true", f"--model.shard_frozen={shard}"]
    run_on_two(cli.words("fit", *words), tmp_path)
    assert_same_weights(cli)


def test_what_the_compiler_says_is_one_message(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "no such backend")
    assert cli("fit", *SAME, "--model.compile=true") == 2
    assert "error: model.compile: torch.compile fails on this backbone" in capsys.readouterr().err
