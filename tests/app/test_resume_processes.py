"""Resume with another number of processes or another batch size: no sample is repeated and no step is added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from app.callbacks import AdapterCheckpoint
from modules.base import AdaptedModule
from tests.app.processes import run_on_two
from tests.app.test_resume import PowerCut, cut_power

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# an epoch of 48 images has 8 batches of 6, or 4 batches of 12
SIX, TWELVE = "--data.batch_size=6", "--data.batch_size=12"
QUIET = ["--trainer.limit_val_batches=0", "--checkpoint.monitor=null", "--trainer.max_epochs=2"]


def record(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make each rank write one row per batch: epoch, number of the batch, learning rate, one sum for each sample."""
    original = AdapterCheckpoint.on_train_batch_start

    def hook(self: AdapterCheckpoint, trainer: Any, module: AdaptedModule, batch: Any, batch_idx: int) -> None:
        original(self, trainer, module, batch, batch_idx)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = [trainer.current_epoch, batch_idx, rate, batch["image"].double().sum((1, 2, 3)).tolist()]
        with (folder / f"steps{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    patch.setattr(AdapterCheckpoint, "on_train_batch_start", hook)


def steps(folder: Path) -> list[list[Any]]:
    """Return the rows of all batches since the last call, each with the samples of all ranks."""
    files = sorted(folder.glob("steps*.jsonl"))
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for file in files:
        file.unlink()
    joined = []
    for same in zip(*ranks, strict=True):
        assert len({tuple(row[:3]) for row in same}) == 1
        joined.append([*same[0][:3], sorted(x for row in same for x in row[3])])
    return joined


def assert_goes_on(before: list[list[Any]], after: list[list[Any]], batches: int) -> None:
    """Check each epoch: every image once, batches numbered for the new batch size, and a learning rate that decays."""
    for epoch in (0, 1):
        rows = [row for row in (*before, *after) if row[0] == epoch]
        samples = [x for row in rows for x in row[3]]
        assert len(samples) == len(set(samples)) == 48
        batch_numbers = [row[1] for row in after if row[0] == epoch]
        assert batch_numbers == list(range(batches - len(batch_numbers), batches))
    rates = [row[2] for row in after]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1 * max(row[2] for row in before)


@pytest.mark.parametrize(
    ("first", "then", "cut", "batches"),
    [
        (TWELVE, SIX, 3, 8),  # in the middle of the first epoch
        pytest.param(TWELVE, SIX, 4, 8, marks=pytest.mark.slow),  # at the end of the first epoch
        (SIX, TWELVE, 10, 4),  # in the middle of the second epoch
        pytest.param(SIX, TWELVE, 8, 4, marks=pytest.mark.slow),
    ],
)
def test_resume_with_another_batch_size_keeps_the_position(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, then: str, cut: int, batches: int
) -> None:
    options = [*QUIET, "--checkpoint.last_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        record(patch, tmp_path)
        cut_power(patch, cut)
        with pytest.raises(PowerCut):
            cli("fit", *options, first)
    before = steps(tmp_path)
    assert len(before) == cut
    with pytest.MonkeyPatch.context() as patch:
        record(patch, tmp_path)
        assert cli("fit", *options, then, "--ckpt_path=last") == 0
    assert_goes_on(before, steps(tmp_path), batches)
    assert "trains as before" in capsys.readouterr().err


TWENTY, LIMIT, FOUR = "--data.batch_size=20", "--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=4"


@pytest.mark.parametrize(
    ("first", "then", "cut", "places", "expected"),
    [
        # an epoch with too few remaining samples runs its last batch, and does not start again
        ([SIX], [TWENTY], 7, [(0, 1), (1, 0), (1, 1)], "20 samples now and was 6: with the learning rates"),
        pytest.param(
            [SIX], [TWENTY], 8, [(1, 0), (1, 1)], "--data.batch_size 6 trains as before.", marks=pytest.mark.slow
        ),
        ([SIX], [SIX, LIMIT], 5, [(0, 2), (1, 0), (1, 1), (1, 2)], None),
        pytest.param([SIX], [SIX, LIMIT], 8, [(1, 0), (1, 1), (1, 2)], None, marks=pytest.mark.slow),
        ([TWELVE, LIMIT], [SIX, LIMIT], 2, [(0, 2), (1, 0), (1, 1), (1, 2)], "6 samples now and was 12: with"),
        # three of eight batches are done, and optimizer steps follow the fourth and the eighth; 6 is no multiple of 4
        ([SIX], [SIX, FOUR], 3, [(i // 8, i % 8) for i in range(3, 16)], "step is 24 samples now and was 6."),
        pytest.param(
            *([TWELVE, FOUR], [TWELVE], 1, [(1, 0), (1, 1), (1, 2), (1, 3)], "--data.batch_size 48 trains as before."),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_epoch_is_finished_once(
    cli: CommandLine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: list[str],
    then: list[str],
    cut: int,
    places: list[tuple[int, int]],
    expected: str | None,
) -> None:
    options = [*QUIET, "--checkpoint.last_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, cut)
        with pytest.raises(PowerCut):
            cli("fit", *options, *first)
    with pytest.MonkeyPatch.context() as patch:
        record(patch, tmp_path)
        assert cli("fit", *options, *then, "--ckpt_path=last") == 0
    after = steps(tmp_path)
    assert [(row[0], row[1]) for row in after] == places
    assert all(row[2] > 0 for row in after)  # the schedule reaches zero only after the last step
    state = cli.checkpoint()["lr_schedulers"][0]
    assert state["_last_lr"] == pytest.approx([0] * len(state["_last_lr"]))
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "batch of a step" in text] or [None]
    assert line == expected or (line is not None and expected is not None and expected in line)


@pytest.mark.slow
def test_a_second_resume_keeps_the_position(cli: CommandLine, tmp_path: Path) -> None:
    options, rows = [*QUIET, "--checkpoint.last_every_n_steps=1"], []
    for batch, cut in ((TWELVE, 2), (SIX, 4), (SIX, 9)):
        with pytest.MonkeyPatch.context() as patch:
            record(patch, tmp_path)
            cut_power(patch, cut)
            with pytest.raises(PowerCut):
                cli("fit", *options, batch, *(["--ckpt_path=last"] if rows else []))
        rows += steps(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        record(patch, tmp_path)
        assert cli("fit", *options, SIX, "--ckpt_path=last") == 0
    assert_goes_on(rows, steps(tmp_path), 8)


@pytest.mark.parametrize("two_first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_resume_with_another_number_of_processes_keeps_the_position(
    cli: CommandLine, tmp_path: Path, two_first: bool
) -> None:
    """Resume from 2 processes to 1, or from 1 to 2, in mid-epoch. The result equals an uninterrupted run."""
    options = [*QUIET, "--model.adapter.dropout=0", "--checkpoint.last_every_n_steps=1"]
    options += ["--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"]
    assert cli("fit", *options, TWELVE) == 0
    resume = ["--ckpt_path=last"]
    with pytest.MonkeyPatch.context() as patch:
        record(patch, tmp_path)
        cut_power(patch, 3)
        if two_first:
            run_on_two(cli.words("fit", *options, SIX), tmp_path, code=1)
        else:
            with pytest.raises(PowerCut):
                cli("fit", *options, TWELVE)
    before = steps(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        record(patch, tmp_path)
        if two_first:
            assert cli("fit", *options, TWELVE, *resume) == 0
        else:
            run_on_two(cli.words("fit", *options, SIX, *resume), tmp_path)
    after = steps(tmp_path)
    assert [len(before), len(after)] == [3, 5]
    assert_goes_on(before, after, 4)
    uninterrupted, resumed = cli.checkpoint(0), cli.checkpoint(1)
    assert uninterrupted["global_step"] == resumed["global_step"] == 8
    for name, tensor in uninterrupted["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    states = [c["optimizer_states"][0]["state"] for c in (uninterrupted, resumed)]
    for key, moments in states[0].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(states[1][key][name], tensor, rtol=1e-2, atol=1e-6, msg=f"{key} {name}")
