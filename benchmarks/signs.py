"""Quality of a frozen factor of random signs against one of orthonormal vectors, paired by seed.

`init_a: signs` and `init_b: signs` can be redrawn from the seed, so that a compact file leaves the frozen factor out.
Both arms of a pair have the same rank and learning rate, which is the recipe's. The difference is signs minus
orthogonal, with Student's 95 % interval of the mean over the seeds. The tasks are those of `benchmarks.buckets`; the
digits of conf/quickstart.yaml are measured through `benchmarks.variants` (docs/results/signs.json).

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
TASKS = ["four sources", "cola"]
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "B": {
        "orthogonal": {"train": "B", "init_a": "orthogonal", "init_b": "zero"},
        "signs": {"train": "B", "init_a": "signs", "init_b": "zero"},
    },
    "A": {
        "orthogonal": {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
        "signs": {"train": "A", "init_a": "zero", "init_b": "signs"},
    },
}


def compare(
    arguments: argparse.Namespace,
    task: str,
    trained: str,
    path: Path,
    metric: str,
    epochs: int,
    targets: list[str],
    keys: Mapping[str, Any],
) -> None:
    """Train both arms from each seed; write one section and print its table.

    Args:
        arguments: From `parse`; a round is a seed.
        task: Name of the task.
        trained: Factor that is trained, `A` or `B`.
        path: Folder of its rows.
        metric: Metric of the validation.
        epochs: Number of epochs.
        targets: Roles that are adapted.
        keys: What `GlueData` needs to read the rows.
    """
    name, arms = f"{task}, {trained} trained", ARMS[trained]
    about = {"metric": metric, "epochs": epochs, "learning_rate": RATE, "rank": 8, "last_blocks": LAYERS}
    about |= {"targets": targets, **keys}
    if measured(arguments, name, about):
        return
    with section(arguments, name) as record:
        record |= about
        runs: dict[str, dict[str, list[float]]] = {key: {arm: [] for arm in arms} for key in FACTORS}
        for seed in range(arguments.rounds):
            for arm, choice in arms.items():
                adapter = AdapterConfig(rank=8, alpha=16, targets=targets, layers=LAYERS, seed=seed, **choice)
                _, metrics = fit_text(arguments.backbone, path, adapter, epochs, seed, keys)
                runs["score"][arm].append(metrics[f"val/{metric}"])
                runs["loss"][arm].append(metrics["val/loss"])
            print(name, seed, {arm: round(values[-1], 4) for arm, values in runs["score"].items()}, flush=True)
        for key, values in runs.items():
            record[key] = {arm: {"seeds": values[arm], **mean_interval(values[arm])} for arm in arms}
            differences = [a - b for a, b in zip(values["signs"], values["orthogonal"], strict=True)]
            record[key]["signs - orthogonal"] = mean_interval(differences)
    rows = [
        [key, *(interval_text(record[key][column], factor) for column in (*arms, "signs - orthogonal"))]
        for key, factor in FACTORS.items()
    ]
    table(f"{name}; the score is {metric} in %", ["", *arms, "signs - orthogonal"], rows)


FACTORS = {"score": 100, "loss": 1}


def interval_text(figures: Mapping[str, float], factor: float) -> str:
    """Return a mean with its interval."""
    mean, low, high = (factor * figures[key] for key in ("mean", "low", "high"))
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def main() -> None:
    """Measure and write."""
    common = parser(__doc__, rounds=5, quick_rounds=2)
    common.add_argument("--backbone", default="../shared/backbones/minilm_roberta", help="an encoder and its tokenizer")
    common.add_argument("--data", type=Path, required=True, help="folder as of benchmarks.buckets")
    common.add_argument("--trained", nargs="+", choices=list(ARMS), default=list(ARMS), help="factors to train")
    common.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    arguments = parse(common)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quick = arguments.quick
    for task in arguments.tasks:
        for trained in arguments.trained:
            if task == "cola":
                path, epochs = arguments.data / "glue", 1 if quick else 2
                compare(arguments, task, trained, path, "matthews", epochs, ["all"], cola(quick))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    keys, epochs = four_sources(arguments.data, Path(folder), quick), 1 if quick else 4
                    compare(arguments, task, trained, Path(folder), "accuracy", epochs, ["query", "value"], keys)


if __name__ == "__main__":
    main()
