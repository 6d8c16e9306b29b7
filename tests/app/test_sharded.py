"""Every family with its frozen weights shared by two processes computes what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed.tensor import DTensor

from modules.base import AdaptedModule
from tests.app.processes import run_on_two

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

IMAGE = ["--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"]
TEXT = ["--model.backbone_args={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"]
SUMMARY = ["--model.backbone_args={dropout: 0.0}", "--data.max_val_samples=7", "--data.max_test_samples=9"]
CASES = {
    # options, the stacks that are shared, and metrics; the samples to evaluate are ragged
    "cli": (IMAGE, {"blocks"}, ("val/loss", "test/acc1")),
    "text_cli": ([*TEXT, "--data.test_on_validation=true"], {"roberta.encoder.layer"}, ("val/loss", "test/matthews")),
    "summary_cli": (SUMMARY, {"model.encoder.layers", "model.decoder.layers"}, ("val/loss", "val/rouge1", "test/loss")),
}


@pytest.mark.parametrize(
    "name", ["cli", *(pytest.param(name, marks=pytest.mark.slow) for name in ("summary_cli", "text_cli"))]
)
def test_shares_compute_what_the_whole_does(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    options, stacks, metrics = CASES[name]
    options = [*options, "--model.adapter.dropout=0", "--model.adapter.targets=all", "--trainer.max_epochs=1"]
    options = [*options, "--test_after_fit=true"]
    cli: CommandLine = request.getfixturevalue(name)
    assert cli("fit", *options, "--data.batch_size=12") == 0

    def keep_names(self: AdaptedModule) -> None:
        sharded = [n.removeprefix("backbone.") for n, p in self.named_parameters() if isinstance(p, DTensor)]
        (tmp_path / f"rank{self.global_rank}.json").write_text(json.dumps(sharded))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptedModule, "on_fit_end", keep_names)
        run_on_two(cli.words("fit", *options, "--data.batch_size=6", "--model.shard_frozen=true"), tmp_path)
    for rank in (0, 1):
        names = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert {stack for stack in stacks if any(n.startswith(f"{stack}.") for n in names)} == stacks
        assert all(n.startswith(tuple(stacks)) and ".adapters." not in n for n in names)
    one, two = cli.checkpoint(0), cli.checkpoint(1)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert one["frozen_digest"] == two["frozen_digest"]
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    for metric in metrics:
        assert cli.metrics(1)[metric] == pytest.approx(cli.metrics(0)[metric], abs=1e-4), metric
    # a checkpoint of shares is one of the whole
    assert cli("test", f"--ckpt_path={cli.run(1)}") == 0
    for metric in metrics:
        assert cli.metrics(1)[metric] == pytest.approx(cli.metrics(0)[metric], abs=1e-4), metric
