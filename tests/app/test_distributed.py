"""Two processes on the CPU compute what one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from app.run.run_directory import load_checkpoint
from modules.base import AdaptedModule
from tests.app.processes import DDP, run_on_two
from tests.conftest import ROOT

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# with dropout off, two processes with half the batch compute what one does with the whole batch
SAME = [
    "--model.adapter.dropout=0",
    "--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "--test_after_fit=true",
]


def run_as_users_do(words: list[str]) -> str:
    """Start one process, which starts the other."""
    done = subprocess.run(
        [sys.executable, "main.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_match_one(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("fit", *SAME, "--data.batch_size=12") == 0
    out = run_as_users_do(cli.words("fit", *SAME, *DDP, "--data.batch_size=6"))
    assert out.strip().splitlines()[-1] == f"Run directory: {cli.run(1)}"
    assert not cli.run(2).exists()
    one, two = cli.checkpoint(0), cli.checkpoint(1)
    assert one["global_step"] == two["global_step"] == 8
    assert len(two["random_states"]) == 2
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)
    for name in ("val/loss", "val/acc1", "test/loss", "test/acc1"):
        assert cli.metrics(1)[name] == pytest.approx(cli.metrics(0)[name], abs=1e-4), name
    # and it resumes
    options = [*SAME, "--data.batch_size=6", "--ckpt_path=last", "--trainer.max_epochs=3"]
    run_on_two(cli.words("fit", *options), tmp_path)
    assert cli.checkpoint(1)["global_step"] == 12


def test_factors_agree_on_both_ranks(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_sums(self: AdaptedModule) -> None:
        sums = {n: p.double().sum().item() for n, p in self.named_parameters() if "adapters" in n or "head" in n}
        (tmp_path / f"rank{self.global_rank}.json").write_text(json.dumps(sums))

    monkeypatch.setattr(AdaptedModule, "on_fit_end", keep_sums)
    run_on_two(cli.words("fit"), tmp_path)
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert any(name.endswith("query.B") and value != 0 for name, value in first.items())


def test_the_first_process_judges_checkpoints(
    fitted_cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes of which the second sees damage everywhere."""
    options = ["--trainer.max_epochs=2", "--trainer.logger=false", "--model.learning_rate=1e-9", "--ckpt_path=last"]
    best = fitted_cli.run() / "checkpoints" / "best.ckpt"
    before = best.read_bytes()

    def damaged(path: Path) -> str | None:
        return "is damaged" if rank_zero_only.rank else None

    monkeypatch.setattr("app.callbacks.adapter_checkpoint.checkpoint_problem", damaged)
    run_on_two(fitted_cli.words("fit", *options), tmp_path)
    assert best.read_bytes() == before  # at such a rate nothing improves on it

    def read(ckpt_path: str, wanted: Path) -> tuple[Path, dict[str, Any]]:
        return load_checkpoint(ckpt_path, wanted.with_name("previous.ckpt") if rank_zero_only.rank else wanted)

    monkeypatch.setattr("app.cli.load_checkpoint", read)
    run_on_two(fitted_cli.words("fit", *options), tmp_path, code=2)
    said = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1))  # by one of them
    assert said.count("process 0 took last.ckpt of step") == 1
    assert "process 1 took previous.ckpt of step" in said or "another process took another" in said
