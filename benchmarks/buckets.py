"""Accuracy and padding of several strategies that group texts of similar length into batches.

Each strategy trains with the same five seeds. Intervals are Student's 95 % intervals of the mean over the seeds. The
difference from "no buckets" is paired by seed. Four sections:

- `four sources`: 560 rows of four public sources. Each source is a class, and the lengths differ by class.
- `cola`: rows of CoLA, whose length hardly depends on the label.
- `mnli-sized`: 393,000 synthetic rows with lengths and labels like MNLI's. The model is a bag of embeddings, since a
  real backbone would need days. The padding share is exact for these lengths.
- `mnli-sized, lengths by class`: the same rows with a different length distribution for each class.

The text sections adapt MiniLM with LoRA on query and value of the last blocks. Every strategy uses the learning rate
and the schedule of conf/roberta_glue.yaml, without tuning.

    python -m benchmarks.buckets --backbone ../shared/backbones/minilm_roberta --data ../shared/data \
        --output docs/results/buckets.json

Without --data, the two text sections are skipped.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.harness import load, measured, parse, parser, section, table
from datamodules.loading.batching import EpochSampler, rank_in_class
from datamodules.text_classification import TextClassificationData
from modules.adapters import AdapterConfig
from modules.text_classification import TextClassifier

BATCH = 32
RATE = 1e-3  # Learning rate of conf/roberta_glue.yaml.
NONE, BEFORE = "no buckets", "pool of 50"


@dataclass(frozen=True)
class Strategy:
    """Strategy to order the rows of an epoch.

    Args:
        pool: Maximum batches that are sorted together; 0 sorts nothing.
        pools: Minimum pools in an epoch. A pool has at least one batch.
        noise: Relative noise on the sort key, the length (AllenNLP's `padding_noise`).
        balanced: If true, sort by the rank of the length among rows of the same class.
        least: Minimum batches in an epoch. With fewer batches, nothing is sorted.
    """

    pool: int = 50
    pools: int = 1
    noise: float = 0.0
    balanced: bool = False
    least: int = 0

    def arrange(self, order: Tensor, lengths: Tensor, labels: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Rearrange a shuffled order of whole batches, as `datamodules.loading.batching.bucketed` does."""
        count = len(order) // step
        pool = min(self.pool, max(count // self.pools, 1))
        if pool == 0 or count < self.least:
            return order
        key = lengths.double()
        if self.balanced:
            key = rank_in_class(lengths, labels, generator)
        if self.noise:
            key = key * (1 + self.noise * (2 * torch.rand(len(key), generator=generator) - 1))
        parts = order.split(pool * step)
        batches = torch.cat([part[key[part].argsort(stable=True)] for part in parts]).view(-1, step)
        return batches[torch.randperm(count, generator=generator)].flatten()


STRATEGIES = {
    NONE: Strategy(pool=0),
    BEFORE: Strategy(),
    "pool of 8": Strategy(pool=8),
    "pool of 2": Strategy(pool=2),
    "pool of 50, 8 pools or more": Strategy(pools=8),
    "noise 50 %": Strategy(noise=0.5),
    "balanced": Strategy(balanced=True),
    "balanced, 8 pools or more": Strategy(balanced=True, pools=8),
    "none below 100 batches": Strategy(least=100),
}


def without(*names: str) -> dict[str, Strategy]:
    """Return all strategies except the named ones."""
    return {key: strategy for key, strategy in STRATEGIES.items() if key not in names}


@contextmanager
def applied(strategy: Strategy, labels: Tensor, lengths: Tensor) -> Iterator[None]:
    """Make every `EpochSampler` with lengths use the strategy, within the context."""

    def bucketed(order: Tensor, _: Tensor, step: int, generator: torch.Generator) -> Tensor:
        return strategy.arrange(order, lengths, labels, step, generator)

    with patch("datamodules.loading.batching.bucketed", bucketed):
        yield


def epoch_order(strategy: Strategy, lengths: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return the row indices of the first epoch, (batches, rows of a batch)."""
    with applied(strategy, labels, lengths):
        draws = EpochSampler(len(lengths), 1, 0, BATCH, seed, lengths, labels)
        return torch.tensor([index for index, _ in draws]).view(-1, BATCH)


def epoch_figures(strategy: Strategy, lengths: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Return the padding share of an epoch, and the mean share of the most frequent class in a batch."""
    batches = epoch_order(strategy, lengths, labels, seed)
    tokens = lengths[batches].long()
    largest_share = F.one_hot(labels[batches]).sum(1).amax(1).double().mean() / BATCH
    return {
        "padding_share": 1 - float(tokens.sum() / (tokens.amax(1).sum() * BATCH)),
        "largest_class_share": float(largest_share),
    }


def mean_interval(values: list[float]) -> dict[str, float]:
    """Return the mean with Student's 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "low": mean, "high": mean}
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def quartiles(lengths: Tensor) -> list[float]:
    """Return the quartiles of the lengths."""
    return lengths.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


Score = Callable[[list[Strategy], int], dict[Strategy, float]]


def compare(
    arguments: argparse.Namespace,
    name: str,
    strategies: Mapping[str, Strategy],
    lengths: Tensor,
    labels: Tensor,
    score: Score,
    about: Mapping[str, Any],
) -> None:
    """Train with each strategy and seed, write one section and print its table.

    Args:
        arguments: From `parse`; a round is a seed.
        name: Name of the section.
        strategies: The strategies to compare, `NONE` among them.
        lengths: Length of each training row, (rows,).
        labels: Class of each training row, (rows,).
        score: Function that trains with each strategy from one seed and returns the scores on held-out rows.
        about: Description of data and model for the section.
    """
    about = {**about, "strategies": {key: asdict(strategy) for key, strategy in strategies.items()}}
    if measured(arguments, name, about):
        return
    with section(arguments, name) as record:
        record |= about
        scores: dict[str, list[float]] = {key: [] for key in strategies}
        for seed in range(arguments.rounds):
            chosen: dict[str, Strategy] = {}
            first_with_order: dict[tuple[int, ...], str] = {}
            for key, strategy in strategies.items():  # On small data, some strategies give the same order.
                first_key = first_with_order.setdefault(
                    tuple(epoch_order(strategy, lengths, labels, seed).flatten().tolist()), key
                )
                chosen[key] = strategies[first_key]
            start = time.perf_counter()
            new_scores = score(list(dict.fromkeys(chosen.values())), seed)
            for key, strategy in chosen.items():
                scores[key].append(new_scores[strategy])
            latest = {key: round(values[-1], 4) for key, values in scores.items()}
            print(f"{name}, seed {seed}, {time.perf_counter() - start:.0f} s: {latest}", flush=True)
        arms = {}
        for key, strategy in strategies.items():
            figures = [epoch_figures(strategy, lengths, labels, seed) for seed in range(arguments.rounds)]
            differences = [a - b for a, b in zip(scores[key], scores[NONE], strict=True)]
            arms[key] = {
                "scores": scores[key],
                "score": mean_interval(scores[key]),
                "difference": mean_interval(differences),
                **{k: statistics.mean(f[k] for f in figures) for k in figures[0]},
            }
        record["arms"] = arms
    show(name, load(arguments.output)[name] if arguments.output else record)


def show(name: str, record: Mapping[str, Any]) -> None:
    """Print the table of a section."""

    def percent(figures: Mapping[str, float], sign: str = "") -> str:
        return (
            f"{100 * figures['mean']:{sign}.1f} ({100 * figures['low']:{sign}.1f} to {100 * figures['high']:{sign}.1f})"
        )

    rows = [
        [
            key,
            percent(arm["score"]),
            percent(arm["difference"], "+"),
            f"{100 * arm['padding_share']:.1f}",
            f"{100 * arm['largest_class_share']:.0f}",
        ]
        for key, arm in record["arms"].items()
    ]
    columns = [
        "strategy",
        f"{record['metric']}, %",
        "against no buckets",
        "padding, %",
        "most frequent class in a batch, %",
    ]
    table(f"{name}: {record['rows']:,} rows", columns, rows)


# --------------------------------------------------------------------------------------------------------------- texts


def fit_text(
    backbone: str, path: Path, adapter: AdapterConfig, epochs: int, seed: int, keys: Mapping[str, Any]
) -> tuple[TextClassificationData, dict[str, float]]:
    """Adapt an encoder to a folder of train and validation rows.

    Args:
        backbone: An encoder with its tokenizer.
        path: The folder.
        adapter: The adapter. The blocks below its layers run once for each row.
        epochs: Number of epochs, with validation after the last epoch. 0 trains nothing.
        seed: Seed of the run.
        keys: Additional arguments of `TextClassificationData`.

    Returns:
        The data module and the validation metrics.
    """
    L.seed_everything(seed, verbose=False)
    data = TextClassificationData(str(path), batch_size=BATCH, cache_prefix=True, bucket_by_length=True, **keys)
    model = TextClassifier(backbone, adapter=adapter, learning_rate=RATE, weight_decay=0.01, warmup_ratio=0.06)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=max(epochs, 1),
        limit_train_batches=None if epochs else 0,
        check_val_every_n_epoch=max(epochs, 1),
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    with redirect_stderr(io.StringIO()):  # Otherwise each fit prints the same messages.
        trainer.fit(model, datamodule=data)
    return data, {key: float(value) for key, value in trainer.callback_metrics.items()}


def text_section(
    arguments: argparse.Namespace,
    name: str,
    strategies: Mapping[str, Strategy],
    path: Path,
    metric: str,
    epochs: int,
    targets: list[str],
    keys: Mapping[str, Any],
) -> None:
    """Compare strategies on a folder of train and validation rows."""
    layers = 2
    start = {"init_a": "kaiming", "init_b": "zero"}
    adapter = AdapterConfig(train="both", rank=8, alpha=16, targets=targets, layers=layers, **start)  # type: ignore[arg-type]
    rows = fit_text(arguments.backbone, path, adapter, 0, 0, keys)[0].splits["train"][0]
    lengths, labels = rows.lengths, rows.targets["label"].long()
    about = {
        "metric": metric,
        "rows": len(rows),
        "epochs": epochs,
        "learning_rate": RATE,
        "adapter": f"LoRA, rank 8, {' and '.join(targets)} of the last {layers} blocks",
        "length_quartiles": quartiles(lengths),
    }

    def score(chosen: list[Strategy], seed: int) -> dict[Strategy, float]:
        scores = {}
        for strategy in chosen:
            with applied(strategy, labels, lengths):
                _, metrics = fit_text(arguments.backbone, path, adapter, epochs, seed, keys)
                scores[strategy] = metrics[f"val/{metric}"]
                print(name, seed, {key: round(value, 4) for key, value in metrics.items()}, flush=True)
        return scores

    compare(arguments, name, strategies, lengths, labels, score, about)


def four_sources(data: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """Write 560 training and 600 validation rows, with equal shares of four sources as classes.

    The sources have different lengths: CoLA's sentences, XSum's summaries, RTE's premises, and instructions.

    Returns:
        Arguments of `TextClassificationData` to read the rows.
    """
    columns = {
        "cola": ("glue/cola/train.parquet", "sentence"),
        "summary": ("xsum/train.parquet", "summary"),
        "premise": ("glue/rte/train.parquet", "sentence1"),
        "instruction": ("instructions/train.parquet", "instruction"),
    }
    train, validation = (40, 25) if quick else (140, 150)  # Rows of each source.
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for label, (file, column) in columns.items():
        texts = sorted(set(pq.read_table(data / file)[column].to_pylist()))
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        for split, rows in {"train": order[:train], "validation": order[train : train + validation]}.items():
            parts[split] += [json.dumps({"text": texts[i], "label": label}) for i in rows]
    for split, lines in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return {"text_columns": ["text"], "max_length": 64}


def cola(quick: bool) -> dict[str, Any]:
    """Return arguments of `TextClassificationData` for 4,096 rows of CoLA and its whole validation split."""
    limits = {"max_train_samples": 320 if quick else 4096, "max_val_samples": 100 if quick else None}
    return {"task": "cola", "max_length": 64, **limits}


# -------------------------------------------------------------------------------------------------------- MNLI's size


@dataclass(frozen=True)
class Rows:
    """Synthetic rows: tokens (rows, width) int16 with 0 as padding, lengths and labels (rows,)."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


BAG_RATE = 0.01
WIDTH, VOCABULARY, SIGNALS = 96, 2000, 100  # Maximum tokens of a row; words; words that indicate each class.


def mnli_like(size: int, seed: int, scales: tuple[float, float, float] = (1.0, 1.1, 1.0)) -> Rows:
    """Draw rows of three classes with lengths like MNLI's pairs of premise and hypothesis.

    Lengths are log-normal, with a median of 20 tokens for premises and 10 for hypotheses, plus four special tokens.
    Neutral hypotheses are 10 % longer, as in MNLI (Gururangan et al. 2018). Three percent of the tokens indicate the
    class.

    Args:
        size: Number of rows.
        seed: Seed of the rows.
        scales: Factor of the hypothesis's length by class.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(size, generator=generator)

    labels = torch.randint(3, (size,), generator=generator)
    hypothesis = 10 * torch.tensor(scales)[labels] * (0.4 * normal()).exp()
    lengths = (20 * (0.7 * normal()).exp() + hypothesis + 4).round().clamp(7, WIDTH).int()
    tokens = torch.randint(1, VOCABULARY, (size, WIDTH), generator=generator, dtype=torch.int16)
    for first in range(0, size, 50_000):
        part = slice(first, first + 50_000)
        shape = tokens[part].shape
        is_signal = torch.rand(shape, generator=generator) < 0.03
        signals = torch.randint(SIGNALS, shape, generator=generator) + 1 + SIGNALS * labels[part, None]
        tokens[part] = torch.where(is_signal, signals.short(), tokens[part])
        tokens[part][torch.arange(WIDTH) >= lengths[part, None]] = 0
    return Rows(tokens, lengths, labels)


def bags_of_embeddings(train: Rows, held_out: Rows, orders: list[Tensor], seed: int) -> list[float]:
    """Train one bag of embeddings for each order, all in parallel, and return the accuracies on held-out rows.

    All models have the same initial weights. The losses are summed, so the gradients of a model depend only on the
    rows of the model.
    """
    torch.manual_seed(seed)
    count, width = len(orders), 16
    embeddings = nn.Parameter(torch.randn(VOCABULARY, width).repeat(count, 1))  # (models · words, width)
    weights = nn.Parameter(torch.randn(width, 3).div(width**0.5).repeat(count, 1, 1))  # (models, width, classes)
    offsets = VOCABULARY * torch.arange(count)

    def logits(tokens: Tensor) -> Tensor:
        """Return logits (models, rows, classes) for tokens (models, rows, tokens)."""
        bags, is_token = tokens.flatten(0, 1), tokens.flatten(0, 1) > 0
        bags = bags + offsets.repeat_interleave(tokens.shape[1])[:, None]
        share = is_token / is_token.sum(1, keepdim=True)
        means = F.embedding_bag(bags, embeddings, mode="sum", per_sample_weights=share)
        return means.view(count, -1, width) @ weights

    optimizer = torch.optim.AdamW([embeddings, weights], lr=BAG_RATE, weight_decay=0.0, fused=True)
    steps = len(orders[0])
    for step, rows in enumerate(torch.stack(orders, 1)):  # (models, rows)
        for group in optimizer.param_groups:
            group["lr"] = BAG_RATE * (1 - step / steps)
        tokens = train.tokens[rows][..., : int(train.lengths[rows].max())].long()
        loss = F.cross_entropy(logits(tokens).flatten(0, 1), train.labels[rows].flatten()) * count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = torch.zeros(count, dtype=torch.float64)
    with torch.no_grad():
        for tokens, labels in zip(held_out.tokens.split(1000), held_out.labels.split(1000), strict=True):
            predicted = logits(tokens.long().expand(count, -1, -1)).argmax(2)
            hits += (predicted == labels).double().sum(1)
    return (hits / len(held_out.labels)).tolist()


def synthetic_section(
    arguments: argparse.Namespace,
    name: str,
    strategies: Mapping[str, Strategy],
    scales: tuple[float, float, float],
    size: int,
) -> None:
    """Train a bag of embeddings on rows of MNLI's size."""
    train, held_out = mnli_like(size, 1, scales), mnli_like(20_000, 2, scales)
    about = {
        "metric": "accuracy",
        "rows": size,
        "epochs": 1,
        "learning_rate": BAG_RATE,
        "model": "mean of embeddings, 16 wide, drawn at random; synthetic tokens",
        "hypothesis_length_by_class": [10 * scale for scale in scales],
        "length_quartiles": quartiles(train.lengths),
    }

    def score(chosen: list[Strategy], seed: int) -> dict[Strategy, float]:
        orders = [epoch_order(strategy, train.lengths, train.labels, seed) for strategy in chosen]
        return dict(zip(chosen, bags_of_embeddings(train, held_out, orders, seed), strict=True))

    compare(arguments, name, strategies, train.lengths, train.labels, score, about)


def main() -> None:
    """Measure and write all sections."""
    common = parser(__doc__, rounds=5, quick_rounds=2)
    common.add_argument("--backbone", default="../shared/backbones/minilm_roberta", help="an encoder and its tokenizer")
    common.add_argument("--data", type=Path, help="folder with glue/cola, glue/rte, xsum and instructions as Parquet")
    common.add_argument("--sections", nargs="+", help="sections to run (default: all)")
    arguments = parse(common)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quick = arguments.quick

    def wanted(name: str) -> bool:
        return not arguments.sections or name in arguments.sections

    if arguments.data and wanted("four sources"):
        with tempfile.TemporaryDirectory() as folder:
            keys = four_sources(arguments.data, Path(folder), quick)
            roles, epochs = ["query", "value"], 1 if quick else 3
            text_section(arguments, "four sources", STRATEGIES, Path(folder), "accuracy", epochs, roles, keys)
    if arguments.data and wanted("cola"):
        keys, strategies = cola(quick), {key: STRATEGIES[key] for key in (NONE, BEFORE, "balanced")}
        path, epochs = arguments.data / "glue", 1 if quick else 2
        text_section(arguments, "cola", strategies, path, "matthews", epochs, ["all"], keys)
    size = 20_000 if quick else 393_000
    if wanted("mnli-sized"):
        synthetic_section(arguments, "mnli-sized", without("pool of 2"), (1.0, 1.1, 1.0), size)
    if wanted("mnli-sized, lengths by class"):
        strategies = without("pool of 8", "pool of 2", "noise 50 %")
        synthetic_section(arguments, "mnli-sized, lengths by class", strategies, (0.5, 2.0, 5.0), size)


if __name__ == "__main__":
    main()
