"""Truncated adapters: test metric, loss of the update and file size of `export --keep` and `export --rank`.

B is trained at rank 16 with a recipe, on CoLA (MiniLM) or on CIFAR-10 (DINOv2 ViT-S at 56 pixels). The functions of
`export` truncate the adapters of the best checkpoint. Each result is scored on the same test rows under bf16 autocast,
as in the recipes. The reference is a fit at rank 4 with the same learning rate. All fits have alpha = 2 · rank.

    python -m benchmarks.truncation --task cola --threads 1 --path ../shared/data/glue \
        --backbone ../shared/backbones/minilm_roberta --output docs/results/truncation.json --resume
    python -m benchmarks.truncation --task images --threads 1 --path ../shared/data/cifar10 \
        --weights ../shared/backbones/dinov2_vits14/model.safetensors --output docs/results/truncation.json --resume

The test metric is Matthews correlation on CoLA's validation split, or top-1 accuracy on 1,000 of CIFAR-10's test
images. On CoLA, one fit on these rows (seed 100) chose the adapted projections and the number of rows. A fit with its
truncations is a section of the file, and --resume skips existing sections.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch

from app.cli import main as command_line
from app.export.load_run import find_checkpoint, load_module
from app.export.low_rank import truncate_adapters
from app.export.peft import write_peft
from app.export.validation import load_data
from app.sweep.statistics import mean_over_seeds, paired_difference
from benchmarks.harness import measured, parse, parser, section, table
from modules.adapters import adapted_projections
from modules.base import AdaptedModule

TASKS: dict[str, dict[str, Any]] = {
    "cola": {
        "recipe": "conf/roberta_glue.yaml",
        "metric": "test/matthews",
        "options": {
            "data.task": "cola",
            "data.test_on_validation": "true",
            "data.max_train_samples": 6000,
            "model.learning_rate": 0.002,
            "trainer.max_epochs": 3,
        },
    },
    "images": {
        "recipe": "conf/images.yaml",
        "metric": "test/acc1",
        "options": {
            "model.backbone": "vit_small_patch14_dinov2",
            "model.image_size": 56,
            "model.learning_rate": 0.0005,
            "model.lr_ratio_head": 30,
            "data.max_train_samples": 1200,
            "data.max_val_samples": 200,
            "data.max_test_samples": 1000,
            "trainer.max_epochs": 3,
        },
    },
}
QUICK = {
    "data.max_train_samples": 64,
    "data.max_val_samples": 32,
    "data.max_test_samples": 32,
    "trainer.max_epochs": 1,
}
RANK, REFERENCE = 16, 4
AS_TRAINED = "as trained"
TRUNCATIONS: dict[str, tuple[int | None, float]] = {
    **{f"--keep {share}": (None, share) for share in (0.999, 0.99, 0.95, 0.9)},
    **{f"--rank {rank}": (rank, 1.0) for rank in (8, 4, 2)},
}
COLUMNS = ["export", "mean rank", "loss of the update, %", "file, kB", "test metric × 100", "minus as trained"]
Record = dict[str, Any]


def fit(arguments: argparse.Namespace, rank: int, seed: int, runs: str) -> Path:
    """Fit B at a rank, and return the run directory.

    Raises:
        SystemExit: If the fit fails.
    """
    task = TASKS[arguments.task]
    options = {
        **task["options"],
        **(QUICK if arguments.quick else {}),
        "data.path": arguments.path,
        "data.num_workers": 0,
        "model.adapter.rank": rank,
        "model.adapter.alpha": 2 * rank,
        "model.adapter.seed": seed,
        "seed_everything": seed,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": runs,
        "test_after_fit": "false",
        "generalization.rows": 0,
    }
    options |= {f"model.{key}": value for key in ("backbone", "weights") if (value := getattr(arguments, key))}
    command = ["fit", "--config", task["recipe"], "--config", "conf/cpu.yaml"]
    if command_line([*command, *(f"--{key}={value}" for key, value in options.items()), *arguments.options]) != 0:
        raise SystemExit(f"The fit at rank {rank} with seed {seed} failed.")
    return Path(runs, "version_0")


def score(module: AdaptedModule, data: L.LightningDataModule, metric: str) -> float:
    """Return a metric of the test split."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", enable_model_summary=False, **quiet)
    (results,) = trainer.test(module, datamodule=data, verbose=False)
    return float(results[metric])


def file_bytes(module: AdaptedModule) -> int:
    """Return the size of PEFT's float32 file of adapters and heads."""
    with tempfile.TemporaryDirectory() as folder:
        write_peft(module, torch.float32, Path(folder), module.saved_state())
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def arms(run: Path, metric: str, truncations: Sequence[str]) -> dict[str, Record]:
    """Return the record of a run as trained and after each truncation."""
    checkpoint = find_checkpoint(str(run))
    trained, data = load_module(checkpoint, {}), load_data(checkpoint)
    records: dict[str, Record] = {}
    for name in (AS_TRAINED, *truncations):
        module = copy.deepcopy(trained)
        result = truncate_adapters(module, *TRUNCATIONS[name]) if name in TRUNCATIONS else None
        ranks = [factors.A.shape[0] for _, factors in adapted_projections(module.backbone).values()]
        records[name] = {
            "mean_rank": statistics.mean(ranks),
            "ranks": ranks,
            "loss": result.loss.total if result else 0.0,
            "worst_loss": result.loss.worst if result else 0.0,
            "file_bytes": file_bytes(module),
            "score": score(module, data, metric),
        }
    return records


def measure(arguments: argparse.Namespace, rank: int, seed: int) -> dict[str, Record]:
    """Return the records of a fit by export. Fit unless the file has the section."""
    task = TASKS[arguments.task]
    name = f"{arguments.task}, rank {rank}, seed {seed}"
    settings = {"recipe": task["recipe"], "options": task["options"]}
    entry: Record | None = measured(arguments, name, settings)
    if entry is None:
        with section(arguments, name) as entry, tempfile.TemporaryDirectory() as runs:
            start = time.process_time()
            run = fit(arguments, rank, seed, runs)
            entry |= {**settings, "fit_cpu_seconds": time.process_time() - start}
            entry["metrics"] = json.loads((run / "metrics.json").read_text())
            entry["arms"] = arms(run, task["metric"], list(TRUNCATIONS) if rank == RANK else [])
            entry["cpu_seconds"] = time.process_time() - start
        scores = ", ".join(f"{arm} {record['score']:.3f}" for arm, record in entry["arms"].items())
        print(f"{name}: {entry['cpu_seconds']:.0f} CPU s; {scores}", flush=True)
    records: dict[str, Record] = entry["arms"]
    return records


def rows(records: dict[str, list[Record]]) -> list[list[str]]:
    """Return a row for each arm. The records of all arms have the same seeds in the same order."""
    scores = {arm: pd.Series([100 * record["score"] for record in seeds]) for arm, seeds in records.items()}
    lines = []
    for arm, seeds in records.items():
        mean = mean_over_seeds(scores[arm])
        pair = paired_difference(arm, scores[arm], AS_TRAINED, scores[AS_TRAINED]) if arm != AS_TRAINED else None
        spread = "" if not pair or not pair.student else f" ({pair.student[0]:+.1f} to {pair.student[1]:+.1f})"
        lines.append(
            [
                arm,
                f"{statistics.mean(record['mean_rank'] for record in seeds):.1f}",
                f"{100 * statistics.mean(record['loss'] for record in seeds):.1f}",
                f"{statistics.mean(record['file_bytes'] for record in seeds) / 1000:.0f}",
                f"{mean.value:.1f}" + ("" if mean.error is None else f" ± {mean.error:.1f}"),
                f"{pair.mean:+.1f}{spread}" if pair else "",
            ]
        )
    return lines


def run(argv: Sequence[str] | None = None) -> None:
    """Run all fits, print the table and write the file."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--task", choices=TASKS, required=True)
    common.add_argument("--path", required=True, help="directory of the data")
    common.add_argument("--backbone", help="timm's name, or a directory in the hub's layout (default: the recipe's)")
    common.add_argument("--weights", help="local file of the backbone's weights")
    common.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    common.add_argument("options", nargs="*", help="after --: more options of every fit")
    arguments = parse(common, argv)
    arguments.inputs = ["path", "backbone", "weights", "options"]
    records: dict[str, list[Record]] = {}
    for seed in arguments.seeds:
        of_seed = measure(arguments, RANK, seed)
        of_seed |= {f"fit at rank {REFERENCE}": measure(arguments, REFERENCE, seed)[AS_TRAINED]}
        for arm, record in of_seed.items():
            records.setdefault(arm, []).append(record)
    table(f"Truncation, {arguments.task}", COLUMNS, rows(records))


if __name__ == "__main__":
    run()
