"""Length buckets must not make batches of one class, which would cost accuracy."""

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
    """Return lengths and labels. Texts of a larger label are always longer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(mix), size, replacement=True, generator=generator)
    return (10 * labels + torch.randint(5, 15, (size,), generator=generator)).int(), labels


def independent(size: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return log-normal lengths, and labels that do not depend on the lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (30 * (0.6 * torch.randn(size, generator=generator)).exp()).round().clamp(4, 256).int()
    return lengths, torch.randint(classes, (size,), generator=generator)


def epoch(lengths: Tensor | None, labels: Tensor | None, batch: int = 32, seed: int = 0, number: int = 0) -> Tensor:
    """Return the rows of an epoch, (batches, batch)."""
    size = next(len(values) for values in (lengths, labels) if values is not None)
    sampler = EpochSampler(size, 1, 0, batch, seed, lengths, labels)
    sampler.set_epoch(number)
    return torch.tensor([index for index, _ in sampler]).view(-1, batch)


def padding_share(batches: Tensor, lengths: Tensor) -> float:
    tokens = lengths[batches].long()
    return 1 - float(tokens.sum() / (tokens.amax(1).sum() * batches.shape[1]))


def chi_squared(batches: Tensor, classes: Tensor) -> tuple[float, int]:
    """Return Pearson's chi-squared statistic of class by batch, and its degrees of freedom."""
    table = torch.nn.functional.one_hot(classes)[batches].sum(1)  # (batches, classes)
    result = stats.chi2_contingency(table[:, table.sum(0) > 0].numpy())
    return float(result.statistic), int(result.dof)


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("size", [560, 2000, 20_000])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_batches_mix_classes_as_a_random_draw_does_for_any_lengths(mix: list[float], size: int, batch: int) -> None:
    lengths, labels = separable(size, mix)
    for number in range(2):
        statistic, freedom = chi_squared(epoch(lengths, labels, batch, number=number), labels)
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 standard deviations of the statistic by chance
    if size >= 2000:  # ordered by length alone, most batches would have one class
        statistic, freedom = chi_squared(epoch(lengths, None, batch), labels)
        assert statistic > freedom + 40 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_batches_mix_scores_nearly_as_a_random_draw_does(seed: int) -> None:
    lengths, _ = independent(2000, seed=seed)
    scores = lengths.float().log() + 0.1 * torch.randn(2000)  # longer texts have higher scores
    means = scores[epoch(lengths, scores, seed=seed)].mean(1)
    chance = scores[epoch(None, scores, seed=seed)].mean(1)
    by_length = scores[epoch(lengths, None, seed=seed)].mean(1)
    assert means.std() < 1.5 * chance.std() < 0.4 * by_length.std()


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_padding_of_large_data_is_near_that_of_ordering_by_length_alone(classes: int) -> None:
    lengths, labels = independent(40_000, classes)
    by_length = padding_share(epoch(lengths, None), lengths)
    at_random = padding_share(epoch(None, labels), lengths)
    assert at_random > 0.5
    assert padding_share(epoch(lengths, labels), lengths) < by_length + 0.03 < 0.12


def test_a_checkpoint_without_a_label_order_resumes_in_mid_epoch() -> None:
    lengths, labels = separable(560, MIXES["equal"])
    data = ResumableDataModule(8, 0)
    data.trainer = stub_trainer()
    # a state of an older version, whose order did not depend on labels
    data.load_state_dict({"epoch": 1, "samples": 400, "seed": 8})
    rows = [index for indices, _ in data.train_loader(Keys(560), lengths, labels=labels) for index in indices.tolist()]
    assert rows == epoch(lengths, labels, 8, seed=8, number=1)[50:].flatten().tolist()


def warned(caplog: pytest.LogCaptureFixture, lengths: Tensor | None, labels: Tensor, **keys: Any) -> list[str]:
    data = ResumableDataModule(8, 0)
    data.trainer = stub_trainer(**keys)
    with caplog.at_level(logging.WARNING, logger="datamodules.base"):
        data.train_loader(Keys(len(labels)), lengths, labels=labels)
    return [record.getMessage() for record in caplog.records]


def test_a_strong_correlation_of_length_and_label_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warned(caplog, *separable(560, MIXES["equal"]))
    assert "\n" not in line
    assert "--data.bucket_by_length false" in line
    match = re.search(r"the label explains (\d\d)% of the variation in length", line)
    assert match is not None
    lengths, labels = separable(560, MIXES["equal"])
    h = stats.kruskal(*(lengths[labels == label].numpy() for label in range(4))).statistic
    assert float(match[1]) == pytest.approx(100 * (h - 3) / 556, abs=0.5)


def test_no_warning_for_independent_lengths_without_buckets_or_on_rank_1(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, *independent(560)) == []
    lengths, labels = separable(560, MIXES["equal"])
    assert warned(caplog, None, labels) == []
    assert warned(caplog, lengths, labels, world=2, rank=1) == []


@pytest.mark.parametrize("bucket", [True, False])
def test_fit_warns_if_lengths_predict_the_class(
    tmp_path: Path, roberta_path: Path, caplog: pytest.LogCaptureFixture, bucket: bool
) -> None:
    # texts of class `short` have 1 to 3 words, texts of class `long` have 8 to 10
    for split, size in {"train": 48, "validation": 16}.items():
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
    assert all("of the variation in length" in line for line in lines)
