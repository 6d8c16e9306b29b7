"""Federated averaging: FFA-LoRA, LoRA, RoLoRA and one client with all rows, on CoLA and CIFAR-10.

Every fit is one arm of `main.py federate`. Only the last two blocks are adapted, and the output of the other blocks is
cached. A fit then takes one or two minutes of CPU time once the cache is written. All fits of a data set have the same
rows and the same total number of optimizer steps: each of 16 clients makes a quarter of the steps of each of 4 clients.

    python -m benchmarks.federated --threads 1 --output docs/results/federated.json --resume \
        --texts ../shared/data/glue --text_backbone ../shared/backbones/minilm_roberta \
        --images ../shared/data/cifar10 --weights ../shared/backbones/dinov2_vits14/model.safetensors

The learning rate of each arm is chosen for each data set and partition, with 4 clients, on rows held out from the
training split. The seed of this choice is not among the seeds of the comparison. The scores are measured on CoLA's
validation split and on CIFAR-10's test split after the last round. No choice uses these rows. A fit is a section of the
file, and --resume skips existing sections. `centralised` has the same rows and steps in all settings, so one section
serves all settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from app.cli import main as command_line
from app.sweep.statistics import mean_over_seeds, paired_difference
from benchmarks.harness import measured, parse, parser, section, table

ARMS = ("ffa", "lora", "rolora", "centralised")
PARTITIONS = ("iid", "dirichlet:0.3")
ROUNDS = 8
CHOICE_CLIENTS = 4
COLUMNS = ["arm", "learning rate", "score × 100", "minus centralised, 95 % interval", "mean average error"]
COLUMNS += ["KB sent by a client in a round", "CPU seconds"]
Record = dict[str, Any]


class Task(NamedTuple):
    """Settings of a data set.

    Args:
        recipe: The recipe.
        score: Metric of validation.
        learning_rates: Learning rates to choose from.
        steps: Optimizer steps of all clients in all rounds.
        batch_size: Rows in a batch.
        rows: Training rows of all clients together, at most.
        evaluated: Rows of validation, at most.
    """

    recipe: str
    score: str
    learning_rates: tuple[float, ...]
    steps: int
    batch_size: int
    rows: int
    evaluated: int


TASKS = {
    "cola": Task("conf/roberta_glue.yaml", "matthews", (0.001, 0.002, 0.004), 1536, 16, 8551, 1043),
    "cifar10": Task("conf/vit_cifar.yaml", "acc1", (0.0003, 0.001, 0.003), 384, 12, 2048, 1000),
}
QUICK = {"steps": 16, "batch_size": 4, "rows": 128, "evaluated": 32}


class Fit(NamedTuple):
    """One arm of `federate`.

    Args:
        data: Key of `TASKS`.
        clients: Number of clients.
        partition: Split of the rows.
        arm: The arm.
        learning_rate: Learning rate.
        seed: Seed of the partition, the head and the batches.
        chooses: If true, the score is of held-out training rows.
    """

    data: str
    clients: int
    partition: str
    arm: str
    learning_rate: float
    seed: int
    chooses: bool = False

    @property
    def name(self) -> str:
        """Return the name of the fit's section."""
        start = f"choice, {self.data}" if self.chooses else self.data
        setting = "one client" if self.arm == "centralised" else f"{self.clients} clients, {self.partition}"
        return f"{start}, {setting}, {self.arm}, {self.learning_rate:g}, seed {self.seed}"


def task_of(arguments: argparse.Namespace, data: str) -> Task:
    """Return the settings of a data set."""
    return TASKS[data]._replace(**QUICK) if arguments.quick else TASKS[data]


def link_images(source: Path, folder: Path) -> None:
    """Link Parquet files of images into a folder, with the test split as validation split."""
    for file in source.glob("*.parquet"):
        (folder / file.name.replace("test", "validation")).symlink_to(file.resolve())


def federate_command(arguments: argparse.Namespace, fit: Fit, images: str) -> list[str]:
    """Return the arguments of `main.py` for a fit, without `--output`.

    Args:
        arguments: From `parse`.
        fit: The fit.
        images: Folder of `link_images`.
    """
    a, task = arguments, task_of(arguments, fit.data)
    recipe = [f"--config={task.recipe}", "--config=conf/cpu.yaml"]
    if fit.data == "cola":
        recipe += ["--data.task=cola", "--data.max_length=64"]
        recipe += [f"--data.path={a.texts}", f"--model.backbone={a.text_backbone}"]
        recipe += [f"--data.test_on_validation={'true' if fit.chooses else 'false'}"]
    else:
        recipe += [f"--data.path={a.images if fit.chooses else images}", f"--model.backbone={a.backbone}"]
        recipe += [f"--model.weights={a.weights}", f"--model.image_size={a.image_size}"]
        recipe += [f"--model.backbone_args={json.dumps(a.backbone_args)}", "--data.num_workers=0"]
        recipe += ["--data.crop_scale=[1, 1]", "--data.horizontal_flip=false"]
    recipe += ["--model.adapter.targets=[all]", f"--model.adapter.layers={a.layers}", "--data.cache_prefix=true"]
    recipe += [f"--data.batch_size={task.batch_size}", f"--data.max_train_samples={task.rows}"]
    recipe += [f"--data.max_val_samples={task.evaluated}", "--trainer.limit_test_batches=1"]  # The test is not used.
    recipe += [f"--model.learning_rate={fit.learning_rate}", f"--seed_everything={fit.seed}"]
    options = ["--clients", str(fit.clients), f"--partition={fit.partition}", "--arms", fit.arm]
    steps = max(task.steps // (a.federated_rounds * fit.clients), 1)
    return ["federate", *recipe, *options, f"--rounds={a.federated_rounds}", f"--local_steps={steps}"]


def run_fit(arguments: argparse.Namespace, fit: Fit) -> Record:
    """Return the section of a fit. Fit unless the file has the section.

    Raises:
        SystemExit: If the command fails.
    """
    task = task_of(arguments, fit.data)
    settings = {"task": list(task), "federated_rounds": arguments.federated_rounds}
    entry: Record | None = measured(arguments, fit.name, json.loads(json.dumps(settings)))
    if entry is None:
        with section(arguments, fit.name) as entry, tempfile.TemporaryDirectory() as root:
            images = Path(root, "images")
            images.mkdir()
            link_images(Path(arguments.images), images)
            start, processor = time.perf_counter(), time.process_time()
            if command_line([*federate_command(arguments, fit, str(images)), f"--output={root}/out"]) != 0:
                raise SystemExit(f"{fit.name} failed.")
            rounds = pd.read_csv(Path(root, "out/rounds.csv"))
            entry |= {
                **settings,
                "score": float(rounds[f"val/{task.score}"].iloc[-1]),
                "curve": rounds[f"val/{task.score}"].tolist(),
                # As text, since the file rounds numbers to six digits.
                "average_errors": [f"{error:.2e}" for error in rounds["average_error"].dropna()],
                "bytes": float(rounds["bytes"].mean()),
                "last": rounds.iloc[-1].to_dict(),
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - processor,
            }
        print(f"{fit.name}: {entry['score']:.4f} in {entry['cpu_seconds']:.0f} CPU seconds", flush=True)
    return entry


def choose(arguments: argparse.Namespace, data: str, partition: str, arm: str) -> float:
    """Return the learning rate with the best mean score on the held-out rows."""
    learning_rates = TASKS[data].learning_rates[1:2] if arguments.quick else TASKS[data].learning_rates
    fits = {
        lr: [Fit(data, CHOICE_CLIENTS, partition, arm, lr, seed, True) for seed in arguments.choice_seeds]
        for lr in learning_rates
    }
    means = {lr: statistics.mean(run_fit(arguments, fit)["score"] for fit in of_lr) for lr, of_lr in fits.items()}
    return max(means, key=lambda lr: means[lr])


def rows(fits: dict[str, list[tuple[Fit, Record]]]) -> list[list[str]]:
    """Return a row for each arm of a setting. All arms have the same seeds in the same order."""
    scores = {arm: pd.Series([100 * entry["score"] for _, entry in runs]) for arm, runs in fits.items()}
    lines = []
    for arm, runs in fits.items():
        mean = mean_over_seeds(scores[arm])
        compared = arm != "centralised" and "centralised" in scores
        pair = paired_difference(arm, scores[arm], "centralised", scores["centralised"]) if compared else None
        spread = "" if not pair or not pair.student else f" ({pair.student[0]:+.1f} to {pair.student[1]:+.1f})"
        entries = [entry for _, entry in runs]
        lines.append(
            [
                arm,
                f"{runs[0][0].learning_rate:g}",
                f"{mean.value:.1f}" + ("" if mean.error is None else f" ± {mean.error:.1f}"),
                f"{pair.mean:+.1f}{spread}" if pair else "",
                f"{statistics.mean(float(error) for entry in entries for error in entry['average_errors']):.1e}",
                f"{entries[0]['bytes'] / 1e3:.1f}",
                f"{statistics.median(entry['cpu_seconds'] for entry in entries):.0f}",
            ]
        )
    return lines


def run(argv: Sequence[str] | None = None) -> None:
    """Run all fits, print a table for each setting, and write the file."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--texts", default="../shared/data/glue", help="GLUE's tasks, one directory each")
    common.add_argument("--text_backbone", default="../shared/backbones/minilm_roberta", help="encoder of the texts")
    common.add_argument("--images", default="../shared/data/cifar10", help="CIFAR-10, or other labelled images")
    common.add_argument("--weights", default="none", help="local file of the image backbone's weights")
    common.add_argument("--backbone", default="vit_small_patch14_dinov2", help="timm's name of a ViT")
    common.add_argument("--backbone_args", type=json.loads, default={}, help="arguments of timm.create_model, as JSON")
    common.add_argument("--image_size", type=int, default=56)
    common.add_argument("--layers", type=int, default=2, help="adapted blocks; the output of the others is cached")
    common.add_argument("--federated_rounds", type=int, default=ROUNDS, help="rounds of each fit")
    common.add_argument("--data", nargs="+", choices=list(TASKS), default=list(TASKS), help="data sets of this call")
    common.add_argument("--clients", type=int, nargs="+", default=[4, 16], help="numbers of clients of this call")
    common.add_argument("--partitions", nargs="+", default=list(PARTITIONS), help="partitions of this call")
    common.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms of this call")
    common.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    common.add_argument("--choice_seeds", type=int, nargs="+", default=[100])
    common.add_argument("--learning_rate", type=float, help="of every arm of this call, instead of the choice")
    arguments = parse(common, argv)
    arguments.inputs = ["backbone", "image_size", "layers"]
    if arguments.quick:
        arguments.federated_rounds = 2
    tables: dict[tuple[str, int, str], dict[str, list[tuple[Fit, Record]]]] = {}
    for data in arguments.data:
        for partition in arguments.partitions:
            learning_rates = {}
            for arm in arguments.arms:  # The training of `centralised` is the same for every partition.
                chosen_for = arguments.partitions[0] if arm == "centralised" else partition
                learning_rates[arm] = arguments.learning_rate or choose(arguments, data, chosen_for, arm)
            for seed in arguments.seeds:  # Seed by seed, so that a slow period of the machine affects all arms.
                for clients in arguments.clients:
                    for arm, learning_rate in learning_rates.items():
                        fit = Fit(data, clients, partition, arm, learning_rate, seed)
                        if arm == "centralised":  # All settings have the same rows and steps.
                            fit = fit._replace(clients=CHOICE_CLIENTS, partition=arguments.partitions[0])
                        runs = tables.setdefault((data, clients, partition), {}).setdefault(arm, [])
                        runs.append((fit, run_fit(arguments, fit)))
    for (data, clients, partition), fits in tables.items():
        table(f"{data}, {clients} clients, {partition}", COLUMNS, rows(fits))


if __name__ == "__main__":
    run()
