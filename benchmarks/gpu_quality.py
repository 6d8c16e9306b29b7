"""Scores of real fits over variants, learning rates and seeds, in parallel on one device (a part of `benchmarks.gpu`).

Every fit is `main(["fit", ...])` with its test, in a pool of processes. First, all learning rates of all arms run with
two seeds, on rows held out from the training split. Then the best learning rate of each arm runs with five other seeds.
The table shows the test scores of these fits and the number of seeds, which is smaller with a small budget.

- `images`: DINOv2 ViT-S/14 at 98 pixels on the CIFAR-10 rows of --images.
- `texts`: the encoder of --text_backbone on CoLA, tested on the validation split.

    python -m benchmarks.gpu_quality --device cuda --output docs/results/gpu_quality.json \
        --images DIR --vision_weights FILE --texts DIR --text_backbone DIR
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Deadline, load, parse, parser, section, table

ARMS = {
    "B, rank 8": ["--model.adapter.train=B", "--model.adapter.rank=8", "--model.adapter.alpha=16"],
    "B, rank 16": ["--model.adapter.train=B", "--model.adapter.rank=16", "--model.adapter.alpha=32"],
    "A, rank 8": ["--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"],
    "LoRA, rank 8": ["--model.adapter.train=both", "--model.adapter.init_a=kaiming"],
    "head": ["--model.tuning=head"],
    "full": ["--model.tuning=full"],
}
RATES = {
    "images": {"full": (1e-5, 3e-5, 1e-4), "head": (1e-3, 3e-3, 1e-2), "": (1e-3, 2e-3, 4e-3, 8e-3)},
    "texts": {"full": (1e-5, 3e-5, 1e-4), "head": (1e-3, 3e-3, 1e-2), "": (1e-3, 2e-3, 4e-3, 8e-3)},
}
SCORES = {"images": "acc1", "texts": "score"}
CHOOSING, CONFIRMING = (0, 1), (2, 3, 4, 5, 6)


class Trial(NamedTuple):
    """One fit."""

    task: str
    arm: str
    rate: float
    seed: int
    confirms: bool

    @property
    def name(self) -> str:
        """Return the name of the fit's section."""
        part = "confirm" if self.confirms else "choose"
        return f"{self.task}, {part}, {self.arm}, {self.rate:g}, seed {self.seed}"


def task_words(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the options of `fit` for each task whose data are given; with --quick, for the embedded digits."""
    device = [
        f"--trainer.accelerator={arguments.device}",
        "--trainer.enable_progress_bar=false",
        "--test_after_fit=true",
    ]
    if arguments.quick:
        limits = ["--data.max_train_samples=64", "--data.max_val_samples=32", "--data.max_test_samples=32"]
        return {"images": ["--config=conf/quickstart.yaml", "--trainer.max_epochs=1", *limits, *device]}
    tasks = {}
    if arguments.images and arguments.vision_weights:
        tasks["images"] = [
            "--config=conf/vit_cifar.yaml",
            f"--data.path={arguments.images}",
            "--model.backbone=vit_small_patch14_dinov2",
            f"--model.weights={arguments.vision_weights}",
            "--model.image_size=98",
            "--trainer.max_epochs=3",
            *device,
        ]
    if arguments.texts and arguments.text_backbone:
        tasks["texts"] = [
            "--config=conf/roberta_glue.yaml",
            f"--data.path={arguments.texts}",
            "--data.task=cola",
            "--data.test_on_validation=true",
            f"--model.backbone={arguments.text_backbone}",
            "--trainer.max_epochs=5",
            *device,
        ]
    return tasks


def fit(words: Sequence[str], trial: Trial) -> dict[str, Any]:
    """Fit and test, and return exit code, metrics and seconds. A failed fit, such as a diverged fit, has no metrics."""
    from app.cli import main as onesided

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        options = [*ARMS[trial.arm], f"--model.learning_rate={trial.rate}", f"--seed_everything={trial.seed}"]
        options += [f"--model.adapter.seed={trial.seed}", f"--trainer.default_root_dir={folder}/runs"]
        code = onesided(["fit", *words, *options])
        path = Path(folder) / "runs" / "version_0" / "metrics.json"
        metrics = json.loads(path.read_text()) if code == 0 else {}
    return {"exit_code": code, "metrics": metrics, "trial_seconds": time.monotonic() - started}


def choosing(tasks: Sequence[str], quick: bool) -> Iterator[Trial]:
    """Yield the fits that choose a learning rate for each arm, seed by seed, so that finished seeds are complete."""
    for seed in CHOOSING[:1] if quick else CHOOSING:
        for task in tasks:
            for arm in list(ARMS)[:2] if quick else ARMS:
                rates = RATES[task].get(arm, RATES[task][""])
                yield from (Trial(task, arm, rate, seed, False) for rate in (rates[:2] if quick else rates))


def confirming(tasks: Sequence[str], results: dict[str, dict[str, Any]], quick: bool) -> Iterator[Trial]:
    """Yield the reported fits: each arm at the learning rate with the best mean on held-out rows."""
    grid = list(choosing(tasks, quick))
    for seed in CONFIRMING[:1] if quick else CONFIRMING:
        for task in tasks:
            for arm in dict.fromkeys(trial.arm for trial in grid):
                means: dict[float, list[float]] = {}
                for trial in grid:
                    metrics = results.get(trial.name, {}).get("metrics", {})
                    value = metrics.get(f"val/{SCORES[task]}")
                    if (trial.task, trial.arm) == (task, arm) and value is not None:
                        means.setdefault(trial.rate, []).append(value)
                if means:
                    best = max(means, key=lambda rate: statistics.mean(means[rate]))
                    yield Trial(task, arm, best, seed, True)


def run_all(
    trials: Sequence[Trial], tasks: dict[str, list[str]], arguments: argparse.Namespace, deadline: Deadline
) -> None:
    """Run trials that are not in the file yet in parallel processes, and write the result of each trial."""
    finished = load(arguments.output)
    waiting = [trial for trial in trials if trial.name not in finished]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        running: dict[Future[dict[str, Any]], Trial] = {}
        while waiting or running:
            while waiting and len(running) < arguments.processes:
                trial = waiting.pop(0)
                if not deadline.passed(trial.name):
                    running[pool.submit(fit, tasks[trial.task], trial)] = trial
            ended, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
            for future in ended:
                trial = running.pop(future)
                with section(arguments, trial.name) as record:
                    record |= {**trial._asdict(), **future.result()}
                print(trial.name, record["metrics"].get(f"val/{SCORES[trial.task]}"), flush=True)


def show(results: dict[str, dict[str, Any]], tasks: Sequence[str]) -> None:
    """Print the test scores of the reported fits: mean ± standard error over seeds."""
    for task in tasks:
        rows = []
        for arm in ARMS:
            runs = [
                r for r in results.values() if r["task"] == task and r["arm"] == arm and r["confirms"] and r["metrics"]
            ]
            scores = [100 * r["metrics"][f"test/{SCORES[task]}"] for r in runs]
            if scores:
                error = f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.2f}" if len(scores) > 1 else ""
                trained = f"{runs[0]['metrics']['params/trainable']:,.0f}"
                rows.append(
                    [arm, f"{runs[0]['rate']:g}", f"{statistics.mean(scores):.2f}{error}", str(len(scores)), trained]
                )
        table(f"{task}: test/{SCORES[task]}, %", ["arm", "learning rate", "score", "seeds", "trained parameters"], rows)


def main(words: Sequence[str] | None = None) -> None:
    """Choose learning rates, run the reported fits, and print."""
    common = parser(__doc__, rounds=1, quick_rounds=1, device=True)
    common.add_argument("--images", type=Path)
    common.add_argument("--vision_weights", type=Path)
    common.add_argument("--texts", type=Path)
    common.add_argument("--text_backbone", type=Path)
    common.add_argument("--processes", type=int, help="parallel fits (default: 6 on a GPU, 1 on the CPU)")
    arguments = parse(common, words)
    arguments.processes = arguments.processes or (6 if arguments.device == "cuda" else 1)
    if arguments.output is None:
        sys.exit("error: --output is missing. Give a JSON file for the results.")
    if not arguments.resume:
        arguments.output.unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (torch.get_num_threads()) // arguments.processes))
    deadline, tasks = Deadline(arguments.budget), task_words(arguments)
    if not tasks:
        print("quality: nothing to fit. Give --images with --vision_weights, or --texts with --text_backbone.")
        return
    run_all(list(choosing(list(tasks), arguments.quick)), tasks, arguments, deadline)
    chosen = list(confirming(list(tasks), load(arguments.output), arguments.quick))
    run_all(chosen, tasks, arguments, deadline)
    show(load(arguments.output), list(tasks))
    deadline.exit()


if __name__ == "__main__":
    main()
