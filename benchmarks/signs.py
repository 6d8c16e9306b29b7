"""Quality of a frozen factor of random signs against one of orthonormal vectors, paired by seed.

`init_a: signs` and `init_b: signs` can be redrawn from the seed, so that a compact file leaves the frozen factor out.
Both arms of a pair have the same rank and learning rate, which is the recipe's. The difference is signs minus
orthogonal, with Student's 95 % interval of the mean over the seeds. The tasks are those of `benchmarks.buckets`; the
digits of conf/quickstart.yaml are measured through `benchmarks.variants` (docs/results/signs_digits.json).

    python -m benchmarks.signs --backbone ../shared/backbones/minilm_roberta --data ../shared/data \
        --output docs/results/signs_text.json
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.buckets import RATE, cola, fit_text, four_sources, mean_interval
from benchmarks.harness import measured, parse, parser, section, table
from modules.adapters import AdapterConfig

LAYERS = 2
ARMS: dict[str, dict[str, Any]] = {
    "B, orthogonal A": {"train": "B", "init_a": "orthogonal", "init_b": "zero"},
    "B, signs in A": {"train": "B", "init_a": "signs", "init_b": "zero"},
    "A, orthogonal B": {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
    "A, signs in B": {"train": "A", "init_a": "zero", "init_b": "signs"},
}


def compare(
    arguments: argparse.Namespace, name: str, path: Path, metric: str, epochs: int, keys: Mapping[str, Any]
) -> None:
    """Train each arm from each seed; write one section and print its table."""
    about = {"metric": metric, "epochs": epochs, "learning_rate": RATE, "rank": 8, "last_blocks": LAYERS, **keys}
    if measured(arguments, name, about):
        return
    with section(arguments, name) as record:
        record |= about
        scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
        losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for seed in range(arguments.rounds):
            for arm, choice in ARMS.items():
                adapter = AdapterConfig(rank=8, alpha=16, layers=LAYERS, seed=seed, **choice)
                _, metrics = fit_text(arguments.backbone, path, adapter, epochs, seed, keys)
                scores[arm].append(metrics[f"val/{metric}"])
                losses[arm].append(metrics["val/loss"])
            print(name, seed, {arm: round(values[-1], 4) for arm, values in scores.items()}, flush=True)
        record["arms"] = {
            arm: {
                "scores": scores[arm],
                "losses": losses[arm],
                "score": mean_interval(scores[arm]),
                "loss": mean_interval(losses[arm]),
            }
            for arm in ARMS
        }
        names = list(ARMS)
        record["differences"] = {
            signs: {
                key: mean_interval([a - b for a, b in zip(values[signs], values[orthogonal], strict=True)])
                for key, values in {"score": scores, "loss": losses}.items()
            }
            for orthogonal, signs in zip(names[::2], names[1::2], strict=True)
        }
    rows = [
        [
            arm,
            f"{100 * record['arms'][arm]['score']['mean']:.2f}",
            f"{record['arms'][arm]['loss']['mean']:.3f}",
            *(interval_text(record["differences"].get(arm, {}).get(key), factor) for key, factor in FACTORS.items()),
        ]
        for arm in ARMS
    ]
    table(name, ["arm", f"{metric}, %", "loss", "signs - orthogonal, points", "the same of the loss"], rows)


FACTORS = {"score": 100, "loss": 1}


def interval_text(figures: Mapping[str, float] | None, factor: float) -> str:
    """Return a difference with its interval, or nothing for an arm that is itself the reference."""
    if figures is None:
        return ""
    mean, low, high = (factor * figures[key] for key in ("mean", "low", "high"))
    return f"{mean:+.3g} ({low:+.3g} to {high:+.3g})"


def main() -> None:
    """Measure and write."""
    common = parser(__doc__, rounds=5, quick_rounds=2)
    common.add_argument("--backbone", default="../shared/backbones/minilm_roberta", help="an encoder and its tokenizer")
    common.add_argument("--data", type=Path, required=True, help="folder as of benchmarks.buckets")
    arguments = parse(common)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as folder:
        keys = four_sources(arguments.data, Path(folder), quick)
        compare(arguments, "four sources", Path(folder), "accuracy", 1 if quick else 4, keys)
    compare(arguments, "cola", arguments.data / "glue", "matthews", 1 if quick else 3, cola(quick))


if __name__ == "__main__":
    main()
