"""Length buckets must not cost accuracy: issue 13, point 4."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from app.cli import main
from datamodules.base import ResumableDataModule
from datamodules.loading.batching import EpochSampler
from tests.backbones import WORDS
from tests.datamodules.loading.test_batching import Keys
from tests.support.rows import write_rows
from tests.support.trainers import stub_trainer

MIXES = {
    "equal": [0.25, 0.25, 0.25, 0.25],
    "rare": [0.9, 0.05, 0.03, 0.02],
    "two": [0.5, 0.5],
    "many": [1 / 70] * 70,
}


def separable(size: int, mix: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lengths and classes: every text of a class is longer than every text of the class before."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(mix), size, replacement=True, generator=generator)
    return (10 * labels + torch.randint(5, 15, (size,), generator=generator)).int(), labels


def independent(size: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lengths as texts have them, and classes that have nothing to do with the lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (30 * (0.6 * torch.randn(size, generator=generator)).exp()).round().clamp(4, 256).int()
    return lengths, torch.randint(classes, (size,), generator=generator)


def epoch(lengths: Tensor | None, labels: Tensor | None, batch: int = 32, seed: int = 0, number: int = 0) -> Tensor:
    """Rows of an epoch, (batches, batch)."""
    size = next(len(values) for values in (lengths, labels) if values is not None)
    sampler = EpochSampler(size, 1, 0, batch, seed, lengths, labels)
    sampler.set_epoch(number)
    return torch.tensor([index for index, _ in sampler]).view(-1, batch)


def padding_share(batches: Tensor, lengths: Tensor) -> float:
    tokens = lengths[batches].long()
    return 1 - float(tokens.sum() / (tokens.amax(1).sum() * batches.shape[1]))


def chi_squared(batches: Tensor, classes: Tensor) -> tuple[float, int]:
    """Pearson's statistic for class by batch, and its degrees of freedom; large if batches prefer classes."""
    table = torch.nn.functional.one_hot(classes)[batches].sum(1)  # (batches, classes)
    result = stats.chi2_contingency(table[:, table.sum(0) > 0].numpy())
    return float(result.statistic), int(result.dof)


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("size", [560, 2000, 20_000])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_batches_hold_the_classes_of_a_random_draw_however_lengths_differ(
    mix: list[float], size: int, batch: int
) -> None:
    lengths, labels = separable(size, mix)
    for number in range(2):
        statistic, freedom = chi_squared(epoch(lengths, labels, batch, number=number), labels)
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 deviations of chance
    if size >= 2000:  # by length alone, a batch holds nearly one class
        statistic, freedom = chi_squared(epoch(lengths, None, batch), labels)
        assert statistic > freedom + 40 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_batches_hold_the_scores_of_a_random_draw(seed: int) -> None:
    lengths, _ = independent(2000, seed=seed)
    scores = lengths.float().log() + 0.1 * torch.randn(2000)  # the longer, the higher
    means = scores[epoch(lengths, scores, seed=seed)].mean(1)
    chance = scores[epoch(None, scores, seed=seed)].mean(1)
    alone = scores[epoch(lengths, None, seed=seed)].mean(1)
    assert means.std() < 1.5 * chance.std() < 0.4 * alone.std()


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_padding_of_large_data_stays_near_that_of_length_alone(classes: int) -> None:
    lengths, labels = independent(40_000, classes)
    by_length = padding_share(epoch(lengths, None), lengths)
    at_random = padding_share(epoch(None, labels), lengths)
    assert at_random > 0.5
    assert padding_share(epoch(lengths, labels), lengths) < by_length + 0.03 < 0.12


def test_a_checkpoint_of_the_order_before_resumes_in_mid_epoch() -> None:
    lengths, labels = separable(560, MIXES["equal"])
    made = ResumableDataModule(8, 0)
    made.trainer = stub_trainer()
    made.load_state_dict({"epoch": 1, "samples": 400, "seed": 8})  # written before orders depended on labels
    rows = [index for indices, _ in made.train_loader(Keys(560), lengths, labels=labels) for index in indices.tolist()]
    assert rows == epoch(lengths, labels, 8, seed=8, number=1)[50:].flatten().tolist()


def warned(caplog: pytest.LogCaptureFixture, lengths: Tensor | None, labels: Tensor, **keys: Any) -> list[str]:
    made = ResumableDataModule(8, 0)
    made.trainer = stub_trainer(**keys)
    with caplog.at_level(logging.WARNING, logger="datamodules.base"):
        made.train_loader(Keys(len(labels)), lengths, labels=labels)
    return [record.getMessage() for record in caplog.records]


def test_a_strong_correlation_of_length_and_label_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warned(caplog, *separable(560, MIXES["equal"]))
    assert "\n" not in line
    assert "--data.bucket_by_length false" in line
    found = re.search(r"rank eta squared (\d\.\d\d)", line)
    assert found is not None
    lengths, labels = separable(560, MIXES["equal"])
    h = stats.kruskal(*(lengths[labels == label].numpy() for label in range(4))).statistic
    assert float(found[1]) == pytest.approx((h - 3) / 556, abs=0.005)


def test_independent_lengths_no_buckets_and_other_processes_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, *independent(560)) == []
    lengths, labels = separable(560, MIXES["equal"])
    assert warned(caplog, None, labels) == []
    assert warned(caplog, lengths, labels, world=2, rank=1) == []


@pytest.mark.parametrize("bucket", [True, False])
def test_fit_warns_of_lengths_that_tell_the_class(
    tmp_path: Path, roberta_path: Path, caplog: pytest.LogCaptureFixture, bucket: bool
) -> None:
    for split, size in {"train": 48, "validation": 16}.items():  # one to three words, or eight to ten
        texts = [" ".join(WORDS[(i + j) % 40] for j in range(1 + i % 3 + 7 * (i % 2))) for i in range(size)]
        rows = [{"text": text, "label": ["short", "long"][i % 2]} for i, text in enumerate(texts)]
        write_rows(tmp_path / f"data/{split}.jsonl", rows)
    words = ["fit", "--config", "tests/conf/text.yaml", "--trainer.default_root_dir", str(tmp_path / "runs")]
    words += ["--data.path", str(tmp_path / "data"), "--model.backbone", str(roberta_path)]
    words += ["--data.task=null", "--data.text_columns=[text]", "--trainer.max_epochs=1"]
    with caplog.at_level(logging.WARNING, logger="datamodules.base"):
        assert main([*words, f"--data.bucket_by_length={str(bucket).lower()}"]) == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "datamodules.base"]
    assert len(lines) == (1 if bucket else 0)
    assert all("rank eta squared" in line for line in lines)
