"""Two ranks on the CPU compute the same as one process, in every family, with and without sharded frozen weights."""

from __future__ import annotations

import json
import multiprocessing
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.tensor import DTensor

from app.cli import main
from app.run.run_directory import load_checkpoint
from modules.base import AdaptedModule
from tests.app.processes import DDP, run_on_two
from tests.conftest import ROOT
from tests.support.scores import scored

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# without dropout, two ranks with half the batch each compute the same as one process
SAME = ("--model.adapter.dropout=0", "--model.adapter.targets=all", "--trainer.max_epochs=1", "--test_after_fit=true")
IMAGE = ["--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"]
TEXT = ["--model.backbone_args={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"]
TEXT += ["--data.test_on_validation=true"]
SUMMARY = ["--model.backbone_args={dropout: 0.0}", "--data.max_val_samples=7", "--data.max_test_samples=9"]
SHARDED = "--model.shard_frozen=true"
SUMMARY_STACKS = {"model.encoder.layers", "model.decoder.layers"}


def assert_same_weights(cli: CommandLine, steps: int) -> None:
    """Check that runs 0 and 1 have the same weights, and that run 1 had two ranks."""
    one, two = cli.checkpoint(0), cli.checkpoint(1)
    assert one["global_step"] == two["global_step"] == steps
    assert len(two["random_states"]) == 2
    assert one["frozen_digest"] == two["frozen_digest"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


ROUGE = ["loss", "rouge1", "rouge2", "rougeL", "rougeLsum"]


# the ranks evaluate unequal numbers of samples; `stacks` are the layers of the backbone that are sharded
@pytest.mark.parametrize(
    ("any_cli", "options", "stacks", "steps", "metrics"),
    [
        ("cli", [*IMAGE, SHARDED], {"blocks"}, 4, ["loss", "acc1"]),
        pytest.param("text_cli", TEXT, set(), 3, ["loss", "matthews", "score"], marks=pytest.mark.slow),
        pytest.param("summary_cli", SUMMARY, set(), 4, ROUGE, marks=pytest.mark.slow),
        pytest.param(
            "text_cli", [*TEXT, SHARDED], {"roberta.encoder.layer"}, 3, ["loss", "matthews"], marks=pytest.mark.slow
        ),
        pytest.param("summary_cli", [*SUMMARY, SHARDED], SUMMARY_STACKS, 4, ["loss", "rouge1"], marks=pytest.mark.slow),
    ],
    indirect=["any_cli"],
)
def test_two_processes_match_one(
    any_cli: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    stacks: set[str],
    steps: int,
    metrics: list[str],
) -> None:
    def write_sums(self: AdaptedModule) -> None:
        parameters = dict(self.named_parameters())
        sharded = [n.removeprefix("backbone.") for n, p in parameters.items() if isinstance(p, DTensor)]
        trained = {n: p.double().sum().item() for n, p in parameters.items() if p.requires_grad}
        (tmp_path / f"rank{self.global_rank}.json").write_text(json.dumps([sharded, trained]))

    monkeypatch.setattr(AdaptedModule, "on_fit_end", write_sums)
    unsharded_options = [option for option in options if option != SHARDED]
    assert any_cli("fit", *SAME, *unsharded_options, "--data.batch_size=12") == 0
    run_on_two(any_cli.words("fit", *SAME, *options, "--data.batch_size=6"), tmp_path)
    assert not any_cli.run(2).exists()
    assert_same_weights(any_cli, steps)
    names = [f"{split}/{metric}" for split in ("val", "test") for metric in metrics]
    for name in names:
        assert any_cli.metrics(1)[name] == pytest.approx(any_cli.metrics(0)[name], abs=1e-4), name
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    sharded, trained = first
    assert any(name.endswith("B") and value != 0 for name, value in trained.items())
    assert {stack for stack in stacks if any(n.startswith(f"{stack}.") for n in sharded)} == stacks
    assert all(n.startswith(tuple(stacks)) and ".adapters." not in n for n in sharded)
    if stacks:  # a checkpoint of a sharded run loads in one process
        assert any_cli("test", f"--ckpt_path={any_cli.run(1)}") == 0
        for name in names:
            assert any_cli.metrics(1)[name] == pytest.approx(any_cli.metrics(0)[name], abs=1e-4), name


def test_two_processes_predict_in_the_order_of_one(fitted_text_cli: CommandLine, tmp_path: Path) -> None:
    """Of 9 rows, rank 0 has 5 and rank 1 has 4. Each rank predicts its longest row first."""
    ask = ["--data.prediction_format=jsonl", f"--ckpt_path={fitted_text_cli.run()}"]
    tables = []
    for several in (False, True):
        if several:
            run_on_two(fitted_text_cli.words("predict", *ask), tmp_path)
        else:
            assert fitted_text_cli("predict", *ask) == 0
        file = fitted_text_cli.run() / "predictions.jsonl"
        tables.append([json.loads(line) for line in file.read_text().splitlines()])
        file.unlink()
    one, two = tables
    assert [row["id"] for row in one] == list(range(100, 109))
    for row, other in zip(one, two, strict=True):
        assert other.pop("probability") == pytest.approx(row.pop("probability"), abs=2e-6)
        assert other.pop("probabilities") == pytest.approx(row.pop("probabilities"), abs=2e-6)
    assert two == one


@pytest.mark.slow
def test_the_launcher_starts_the_second_process(cli: CommandLine, tmp_path: Path) -> None:
    words = cli.words("fit", *DDP, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")

    def start() -> None:  # forked, so that only the second process imports everything
        sys.modules["__main__"].__spec__ = None
        sys.argv = [str(ROOT / "main.py"), *words]
        with (tmp_path / "log").open("w") as file, redirect_stdout(file):
            sys.exit(main())

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert (tmp_path / "log").read_text().strip().splitlines()[-1] == f"Run directory: {cli.run()}"
    assert len(cli.checkpoint()["random_states"]) == 2
    assert not cli.run(1).exists()


def test_rank_0_decides_which_checkpoint_is_used(
    fitted_cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fit 1, rank 1 finds every checkpoint damaged. In fit 2, rank 1 also loads another checkpoint than rank 0."""
    options = ["--trainer.max_epochs=2", "--trainer.logger=false", "--ckpt_path=last"]
    scored(monkeypatch, {})
    best = fitted_cli.run() / "checkpoints" / "best.ckpt"
    before = best.read_bytes()

    def damaged(path: Path) -> str | None:
        return "is damaged" if rank_zero_only.rank else None

    monkeypatch.setattr("app.callbacks.adapter_checkpoint.checkpoint_problem", damaged)
    run_on_two(fitted_cli.words("fit", *options), tmp_path)
    assert best.read_bytes() == before

    def load(ckpt_path: str, wanted: Path) -> tuple[Path, dict[str, Any]]:
        return load_checkpoint(ckpt_path, wanted.with_name("previous.ckpt") if rank_zero_only.rank else wanted)

    monkeypatch.setattr("app.cli.load_checkpoint", load)
    run_on_two(fitted_cli.words("fit", "--trainer.max_epochs=3", *options[1:]), tmp_path, code=2)
    # one of the ranks reports the difference
    output = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1))
    assert output.count("process 0 took last.ckpt of step") == 1
    assert "process 1 took previous.ckpt of step" in output or "another process took another" in output
