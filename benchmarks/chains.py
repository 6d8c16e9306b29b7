"""Chains of adapters against one adapter: CoLA with MiniLM, and CIFAR-10 with DINOv2 ViT-S at 56 pixels.

A chain has four links of rank r that train B. Beside the chain are B at rank 4·r (the same total rank), B at rank r
(the same number of trained parameters), and LoRA at rank r. All arms have alpha = 2·rank, and the same rows, batches,
epochs and bf16 autocast. The last weights are scored, so that no arm chooses among epochs.

    python -m benchmarks.chains --threads 1 --output docs/results/chains.json --resume

Each arm has the learning rate with the best score on held-out rows of the training split. The seed of this choice is
not among the seeds of the comparison. The comparison is scored on CoLA's validation split, and on images of CIFAR-10's
test split. A fit is a section of the file, and --resume skips existing sections.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from app.cli import main as command_line
from app.sweep.statistics import mean_over_seeds, paired_difference
from benchmarks.harness import measured, parse, parser, section, table

LINKS = 4
LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01)
CHAIN = "chain"
COLUMNS = ["arm", "learning rate", "score, %", "chain minus this, 95 % interval", "CPU seconds"]
COLUMNS += ["trained parameters", "adapter, MB"]
QUICK_SHARE = 20  # With --quick, a task has a twentieth of the rows.
Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A recipe with its data.

    Args:
        recipe: YAML file of the recipe.
        rows: Training rows.
        test_rows: Rows of the comparison's score.
        metric: Logged name of the score, after the split.
        options: Further options of `fit`.
    """

    recipe: str
    rows: int
    test_rows: int
    metric: str
    options: tuple[str, ...]


TASKS = {
    "cola": Task(
        "conf/roberta_glue.yaml",
        1200,
        1043,
        "score",
        ("--data.task=cola", "--data.test_on_validation=true", "--data.max_length=64"),
    ),
    "cifar10": Task("conf/vit_cifar.yaml", 300, 1000, "acc1", ("--model.image_size=56", "--data.num_workers=0")),
}


def arm_options(arms: Sequence[str], rank: int, epochs: int) -> dict[str, list[str]]:
    """Return the options of `fit` of each arm.

    Args:
        arms: Names from `ARMS` and `OTHER_ARMS`.
        rank: Rank r of a link.
        epochs: Epochs of the whole run.
    """

    def adapter(variant: str, r: int) -> list[str]:
        return [f"--variant={variant}", f"--model.adapter.rank={r}", f"--model.adapter.alpha={2 * r}"]

    def chain(schedule: str) -> list[str]:
        keys = {"every_n_epochs": epochs // LINKS, "schedule": schedule}
        return [*adapter("B", rank), f"--model.adapter.chain={json.dumps(keys)}"]

    options = {
        CHAIN: chain("restart"),
        "B, rank 4r": adapter("B", LINKS * rank),
        "B, rank r": adapter("B", rank),
        "LoRA, rank r": adapter("lora", rank),
        "chain, one schedule": chain("continue"),
    }
    return {arm: options[arm] for arm in arms}


ARMS = list(arm_options([CHAIN, "B, rank 4r", "B, rank r", "LoRA, rank r"], 1, LINKS))
OTHER_ARMS = ["chain, one schedule"]


def fit_command(arguments: argparse.Namespace, name: str, arm: str, lr: float, seed: int, tests: bool) -> list[str]:
    """Return the arguments of `main.py` for a fit, without `trainer.default_root_dir`.

    Args:
        arguments: From `parse`.
        name: Name of the task.
        arm: Name of the arm.
        lr: Learning rate.
        seed: Seed of head, data order and factors.
        tests: If true, score the rows of the comparison too.
    """
    a, task = arguments, TASKS[name]
    share = QUICK_SHARE if a.quick else 1
    sources = {"cola": [f"--model.backbone={a.minilm}"], "cifar10": [f"--model.weights={a.dinov2}"]}
    sources["cifar10"] += [f"--model.backbone={a.vit}", f"--model.backbone_args={json.dumps(a.vit_args)}"]
    command = ["fit", f"--config={task.recipe}", "--config=conf/cpu.yaml", *arm_options([arm], a.rank, a.epochs)[arm]]
    command += [*task.options, *sources[name], f"--data.path={getattr(a, name)}"]
    command += [f"--model.learning_rate={lr}", f"--seed_everything={seed}", f"--model.adapter.seed={seed}"]
    command += [f"--data.max_train_samples={task.rows // share}", f"--data.max_test_samples={task.test_rows // share}"]
    command += [f"--trainer.max_epochs={a.epochs}", f"--trainer.check_val_every_n_epoch={a.epochs}"]
    command += [
        f"--data.max_val_samples={500 // share}",
        "--checkpoint.monitor=null",
        f"--test_after_fit={tests}".lower(),
    ]
    command += ["--generalization.rows=0", "--spectrum.detail=off", "--trainer.logger=false"]
    return [*command, "--trainer.enable_progress_bar=false"]


def fit(arguments: argparse.Namespace, name: str, arm: str, lr: float, seed: int, tests: bool) -> Record:
    """Return the record of a fit. Fit unless the file has the section.

    Raises:
        SystemExit: If the fit fails.
    """
    choice = "" if tests else f"choice, learning rate {lr:g}, "
    title = f"{name}, {arm}, {choice}seed {seed}"
    settings = {"rate": lr, "epochs": arguments.epochs, "rank": arguments.rank}
    record = measured(arguments, title, settings)
    if record is not None:
        return record
    with section(arguments, title) as record, tempfile.TemporaryDirectory() as runs:
        start, processor = time.perf_counter(), time.process_time()
        command = [*fit_command(arguments, name, arm, lr, seed, tests), f"--trainer.default_root_dir={runs}"]
        if command_line(command) != 0:
            raise SystemExit(f"The fit {title} failed.")
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
        (run,) = Path(runs).iterdir()
        metrics = json.loads((run / "metrics.json").read_text())
        size = sum(path.stat().st_size for path in (run / "adapter").glob("*.safetensors"))
        split = "test" if tests else "val"
        figures = {"score": metrics[f"{split}/{TASKS[name].metric}"], "file_bytes": size, "metrics": metrics}
        record |= {**settings, **seconds, **figures, "trained_parameters": metrics["params/trainable"]}
    print(f"{title}: {record['score']:.2%}, {record['cpu_seconds']:.0f} CPU seconds", flush=True)
    return record


def choose(arguments: argparse.Namespace, name: str, arm: str) -> float:
    """Return the learning rate with the best mean score on held-out rows. Warn at an end of the grid."""
    means = {
        lr: statistics.mean(
            fit(arguments, name, arm, lr, seed, tests=False)["score"] for seed in arguments.choice_seeds
        )
        for lr in arguments.rates
    }
    best = max(means, key=lambda lr: means[lr])
    if best in (min(means), max(means)) and len(means) > 1:
        print(f"{name}, {arm}: the learning rate {best:g} is at an end of the grid.", flush=True)
    return best


def rows(fits: dict[str, list[Record]]) -> list[list[str]]:
    """Return a row for each arm. The records of all arms have the same seeds in the same order."""
    scores = {arm: pd.Series([100 * record["score"] for record in records]) for arm, records in fits.items()}
    lines = []
    for arm, (first, *_) in fits.items():
        mean = mean_over_seeds(scores[arm])
        pair = paired_difference(CHAIN, scores[CHAIN], arm, scores[arm]) if CHAIN in scores and arm != CHAIN else None
        spread = "" if not pair or not pair.student else f" ({pair.student[0]:+.1f} to {pair.student[1]:+.1f})"
        lines.append(
            [
                arm,
                f"{first['rate']:g}",
                f"{mean.value:.1f}" + ("" if mean.error is None else f" ± {mean.error:.1f}"),
                f"{pair.mean:+.1f}{spread}" if pair else "",
                f"{statistics.median(record['cpu_seconds'] for record in fits[arm]):.0f}",
                f"{first['trained_parameters']:,}",
                f"{first['file_bytes'] / 1e6:.2f}",
            ]
        )
    return lines


def run(argv: Sequence[str] | None = None) -> None:
    """Run all fits, print a table for each task, and write the file."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    common.add_argument("--arms", nargs="+", choices=[*ARMS, *OTHER_ARMS], default=ARMS, help="arms of this call")
    common.add_argument("--rank", type=int, default=4, help="rank r of a link")
    common.add_argument("--epochs", type=int, help=f"a multiple of {LINKS} (8; with --quick {LINKS})")
    common.add_argument(
        "--rates", type=float, nargs="+", default=list(LEARNING_RATES), help="learning rates to choose from"
    )
    common.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    common.add_argument("--choice_seeds", type=int, nargs="+", default=[100])
    common.add_argument("--cola", default="../shared/data/glue", help="folder of GLUE's tasks")
    common.add_argument("--cifar10", default="../shared/data/cifar10", help="labelled images with a test split")
    common.add_argument("--minilm", default="../shared/backbones/minilm_roberta", help="encoder in the hub's layout")
    common.add_argument("--dinov2", default="../shared/backbones/dinov2_vits14/model.safetensors", help="weights")
    common.add_argument("--vit", default="vit_small_patch14_dinov2", help="timm's name of a ViT")
    common.add_argument("--vit_args", type=json.loads, default={}, help="arguments of timm.create_model, as JSON")
    arguments = parse(common, argv)
    arguments.epochs = arguments.epochs or (LINKS if arguments.quick else 2 * LINKS)
    if arguments.epochs % LINKS:
        common.error(f"--epochs: {arguments.epochs} is no multiple of {LINKS}, the number of links.")
    for name in arguments.tasks:
        chosen = {arm: choose(arguments, name, arm) for arm in arguments.arms}
        fits: dict[str, list[Record]] = {arm: [] for arm in chosen}
        for seed in arguments.seeds:  # Seed by seed, so that a slow period of the machine affects all arms.
            for arm, lr in chosen.items():
                fits[arm].append(fit(arguments, name, arm, lr, seed, tests=True))
        table(f"{name}, r = {arguments.rank}", COLUMNS, rows({arm: of_arm for arm, of_arm in fits.items() if of_arm}))


if __name__ == "__main__":
    run()
