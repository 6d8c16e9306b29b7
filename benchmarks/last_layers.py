"""Compare adapters in the last blocks, with and without a cache of the frozen prefix, with adapters in all blocks.

Each fit is a process of `main.py fit` with a recipe: B trained at rank 8 on query and value, on images of CIFAR-10
without augmentation, or on CoLA. The arms adapt all blocks, the last n blocks, or the last n blocks with
`data.cache_prefix`. The cached arm runs with an empty cache and then with the full cache. Both runs must have the same
score.

    python -m benchmarks.last_layers --task images --path ../shared/data/cifar10 --layers 4 --threads 1 \
        --weights ../shared/backbones/dinov2_vits14/model.safetensors --output docs/results/last_layers.json --resume
    python -m benchmarks.last_layers --task cola --path ../shared/data/glue --layers 4 2 --threads 1 \
        --backbone ../shared/backbones/minilm_roberta --output docs/results/last_layers.json --resume

A round is one fit of each arm with the same seed, in shuffled order. The first epoch includes reading and decoding the
data and, in the cached arm, computing and writing the cache. A later epoch starts at the end of the previous epoch.
Every epoch includes its validation. The score is the test metric: top-1 accuracy on CIFAR-10's test images, or Matthews
correlation on CoLA's validation split. These data were not used to choose anything. In the cached arms the prefix is in
eval mode; in the other arms the prefix has dropout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.harness import MIB, measured, paired_ratio, parse, parser, ratio_text, section, table

TASKS: dict[str, dict[str, Any]] = {
    "images": {
        "recipe": "conf/vit_cifar.yaml",
        "score": "acc1",
        "rate": 0.001,
        "options": {
            "model.backbone": "vit_small_patch14_dinov2",
            "model.image_size": 98,
            "data.batch_size": 32,
            "data.max_train_samples": 1500,
            "data.max_val_samples": 500,
            "data.max_test_samples": 2000,
            "data.horizontal_flip": "false",
            "data.crop_scale": "[1, 1]",
        },
    },
    "cola": {
        "recipe": "conf/roberta_glue.yaml",
        "score": "matthews",
        "rate": 0.003,
        "options": {"data.task": "cola", "data.test_on_validation": "true"},
    },
}
QUICK = {"data.max_train_samples": 96, "data.max_val_samples": 32, "data.max_test_samples": 32}
Record = dict[str, Any]


class EpochSeconds(L.Callback):
    """Write the seconds of each epoch with validation, and of the epoch's steps only, to a file.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.steps: list[float] = []
        self.last, self.last_processor = time.perf_counter(), time.process_time()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock of the epoch's steps at the first step."""
        if len(self.steps) == len(self.seconds):
            self.steps.append(0.0)
            self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Update the time of the epoch's steps."""
        self.steps[-1] = time.perf_counter() - self.began

    def on_train_epoch_end(self, *_: Any) -> None:
        """Write the times. Lightning calls this hook after the epoch's validation."""
        now, processor = time.perf_counter(), time.process_time()
        self.seconds.append(now - self.last)
        self.processor.append(processor - self.last_processor)
        self.last, self.last_processor = now, processor
        record = {"epoch_seconds": self.seconds, "epoch_cpu_seconds": self.processor, "step_seconds": self.steps}
        Path(self.path).write_text(json.dumps(record))


def fit(arguments: argparse.Namespace, layers: int | None, cached: bool, rate: float, seed: int, cache: Path) -> Record:
    """Run one fit with its test, and return times, sizes and scores."""
    task = TASKS[arguments.task]
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **task["options"],
            **(QUICK if arguments.quick else {}),
            "data.path": arguments.path,
            "data.num_workers": 0,
            "data.cache_prefix": str(cached).lower(),
            "model.learning_rate": rate,
            "model.adapter.seed": seed,
            "seed_everything": seed,
            "trainer.max_epochs": arguments.epochs,
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": folder,
            "test_after_fit": "true",
        }
        if layers is not None:
            options["model.adapter.layers"] = layers
        for key in ("backbone", "weights"):
            if getattr(arguments, key) is not None:
                options[f"model.{key}"] = getattr(arguments, key)
        words = [sys.executable, "main.py", "fit", "--config", task["recipe"], "--config", "conf/cpu.yaml"]
        words += [f"--{key}={value}" for key, value in options.items()]
        words += ["--allow_imports", "benchmarks", "--trainer.callbacks+=benchmarks.last_layers.EpochSeconds"]
        words += [f"--trainer.callbacks.path={folder}/seconds.json", *arguments.options]
        variables = {"OMP_NUM_THREADS": str(arguments.threads), "HF_DATASETS_CACHE": str(cache)}
        start = time.perf_counter()
        process = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | variables)
        if process.returncode:
            raise SystemExit(process.stderr)
        seconds = time.perf_counter() - start
        metrics = json.loads((Path(folder) / "version_0" / "metrics.json").read_text())
        epochs = json.loads((Path(folder) / "seconds.json").read_text())
    return {
        "process_seconds": seconds,
        **epochs,
        "cache_bytes": sum(file.stat().st_size for file in cache.glob("onesided/prefix-*")),
        "trained_parameters": metrics["params/trainable"],
        "peak_bytes": metrics["memory/peak_bytes"],
        "spectrum_share": metrics["time/spectrum_seconds"] / metrics["time/fit_seconds"],
        "val_score": metrics[f"val/{task['score']}"],
        "test_score": metrics[f"test/{task['score']}"],
    }


def once(arguments: argparse.Namespace, name: str, layers: int | None, cached: bool, rate: float, seed: int) -> Record:
    """Return the section of a fit, and run the fit unless the file has the section. A cached fit runs twice."""
    name = f"{arguments.task}, {name}"
    settings = {"layers": layers, "rate": rate, "seed": seed, "epochs": arguments.epochs}
    record = measured(arguments, name, settings)
    if record is None:
        with section(arguments, name) as record:
            record |= settings
            cache = Path(arguments.cache)  # All fits share the cached images and tokens.
            record |= fit(arguments, layers, cached, rate, seed, cache)
            if cached:
                record["again"] = fit(arguments, layers, cached, rate, seed, cache)
                for file in cache.glob("onesided/prefix-*"):
                    file.unlink()
        epochs = " ".join(f"{s:.1f}" for s in record["epoch_seconds"])
        print(f"{name}: epochs {epochs} s, test {record['test_score']:.4f}", flush=True)
    return record


def named(layers: int | None) -> str:
    """Return the name of an arm without cache."""
    return "all" if layers is None else f"last {layers}"


def rounds(arguments: argparse.Namespace) -> dict[str, list[Record]]:
    """Run all fits and return their records by arm, in the order of the rounds."""
    rates = {name: float(rate) for name, _, rate in (pair.rpartition("=") for pair in arguments.rates)}
    arms = {named(n): (n, False) for n in (None, *arguments.layers)}
    arms |= {f"{named(n)}, cached": (n, True) for n in arguments.layers}
    order = random.Random(0)
    results: dict[str, list[Record]] = {name: [] for name in arms}
    for seed in range(arguments.rounds):
        for name in order.sample(list(arms), len(arms)):
            layers, cached = arms[name]
            rate = rates.get(named(layers), TASKS[arguments.task]["rate"])
            results[name].append(once(arguments, f"{name}, seed {seed}", layers, cached, rate, seed))
    for name in [name for name in arms if name.endswith("cached")]:
        results[f"{name}, next run"] = [record["again"] for record in results[name]]
    return results


def show(arguments: argparse.Namespace, results: dict[str, list[Record]]) -> None:
    """Print the table and write the paired ratios as a section."""

    def later(record: Record) -> float:
        return statistics.mean(record["epoch_seconds"][1:])

    def spread(values: list[float]) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return f"{100 * statistics.mean(values):.2f} ± {100 * error:.2f}"

    rows = []
    ratios: Record = {}
    for name, records in results.items():
        firsts = [record["epoch_seconds"][0] for record in records]
        ratios[name] = {
            "first epoch": paired_ratio([r["epoch_seconds"][0] for r in results["all"]], firsts),
            "later epoch": paired_ratio([later(r) for r in results["all"]], [later(r) for r in records]),
            "process": paired_ratio(
                [r["process_seconds"] for r in results["all"]], [r["process_seconds"] for r in records]
            ),
        }
        rows.append(
            [
                name,
                f"{statistics.median(firsts):.1f}",
                f"{statistics.median(map(later, records)):.2f}",
                ratio_text(ratios[name]["later epoch"]),
                ratio_text(ratios[name]["process"]),
                spread([record["test_score"] for record in records]),
                f"{records[0]['trained_parameters']:,}",
                f"{statistics.median(r['peak_bytes'] for r in records) / MIB:.0f}",
                f"{records[0]['cache_bytes'] / MIB:.0f}",
                f"{statistics.median(r['spectrum_share'] for r in records):.2%}",
            ]
        )
    columns = ["blocks", "first, s", "later, s", "all / later", "all / process"]
    columns += ["test, %", "trained", "MiB", "cache", "spectra"]
    table(f"{arguments.task}: seconds of an epoch, peak and cache in MiB", columns, rows)
    with section(arguments, f"{arguments.task}, all over each") as record:
        record |= ratios


def main() -> None:
    """Run all fits, print and write."""
    common = parser(__doc__, rounds=5, quick_rounds=1)
    common.add_argument("--task", choices=TASKS, required=True)
    common.add_argument("--path", required=True, help="directory of the data")
    common.add_argument("--backbone", help="timm's name or a directory in the hub's layout (default: the recipe's)")
    common.add_argument("--weights", help="local file of the backbone's weights")
    common.add_argument("--layers", type=int, nargs="+", default=[4], help="numbers of last blocks")
    common.add_argument("--epochs", type=int, default=3, help="number of epochs, 2 or more")
    common.add_argument("--rates", nargs="*", default=[], metavar="ARM=RATE", help="learning rates, such as all=0.001")
    common.add_argument("--cache", help="folder for caches (default: the system's temporary folder)")
    common.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="additional options of every fit")
    common.set_defaults(inputs=["path", "backbone", "weights", "options"])
    arguments = parse(common)
    if arguments.epochs < 2:
        common.error(f"--epochs: {arguments.epochs} leaves no later epoch to compare with the first. Use 2 or more.")
    with tempfile.TemporaryDirectory(dir=arguments.cache) as arguments.cache:
        show(arguments, rounds(arguments))


if __name__ == "__main__":
    main()
