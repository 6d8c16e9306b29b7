"""Interrupted runs of the text families continue bit for bit, with the loader's place in its length buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.app.test_resume import interrupt_and_resume, kill_and_resume

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# 50 rows are 8 batches of 6 an epoch, two left over; dropout of backbone and adapters is on
every_family = pytest.mark.parametrize("language_cli", ["text", "summary", "instruction"], indirect=True)


@every_family
@pytest.mark.parametrize(
    ("cut", "options", "resumed_from"),
    [
        (5, ["--checkpoint.last_every_n_steps=3"], 3),  # two steps behind the checkpoint
        # right behind a checkpoint
        pytest.param(7, ["--checkpoint.last_every_n_steps=1"], 7, marks=pytest.mark.slow),
        # steps of two batches; the last but one of an epoch is saved in any case
        (3, ["--checkpoint.last_every_n_steps=2", "--trainer.accumulate_grad_batches=2"], 3),
        # a worker has loaded ahead
        pytest.param(6, ["--checkpoint.last_every_n_steps=4", "--data.num_workers=1"], 4, marks=pytest.mark.slow),
    ],
)
def test_resume_equals_uninterrupted(
    language_cli: CommandLine, cut: int, options: list[str], resumed_from: int
) -> None:
    assert interrupt_and_resume(language_cli, ["--trainer.max_epochs=1", *options], cut) == resumed_from


@every_family
def test_resume_in_the_second_epoch(language_cli: CommandLine) -> None:
    options = ["--trainer.max_epochs=2", "--checkpoint.last_every_n_steps=4", "--trainer.accumulate_grad_batches=3"]
    # 2 steps of three batches and one of the two that remain are 3 steps an epoch; the last but one is saved
    assert interrupt_and_resume(language_cli, options, 5) == 5


def test_packed_sequences_resume(instruction_cli: CommandLine) -> None:
    options = ["--data.packing=true", "--data.batch_size=2", "--data.num_workers=1", "--trainer.max_epochs=1"]
    options += ["--model.gradient_checkpointing=true", "--trainer.accumulate_grad_batches=2"]
    options += ["--checkpoint.last_every_n_steps=2", "--data.max_length=128"]
    # the packs of 50 conversations are 4 steps of two batches, of which the third is saved in any case
    assert interrupt_and_resume(instruction_cli, options, 3) == 3


@every_family
@pytest.mark.slow
def test_killed_process_resumes_to_the_same_bits(language_cli: CommandLine) -> None:
    epochs = {"text": 60, "summary": 30, "instructions": 30}[language_cli.config]
    options = [f"--trainer.max_epochs={epochs}", "--checkpoint.last_every_n_steps=3", "--model.adapter.targets=all"]
    assert 0 < kill_and_resume(language_cli, options) < 8 * epochs
