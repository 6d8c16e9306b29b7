"""Speed-up of length buckets and dynamic padding on a GLUE task, over padding to 128 tokens.

Three arms train one epoch each. The epoch is split into blocks. In each block, the arms run in shuffled order on the
same number of samples. Ratios are paired by block, and the JSON file has their medians and all figures.

    python -m benchmarks.padding --backbone ../shared/backbones/minilm_roberta --path ../shared/data/glue --task cola \
        --output docs/results/padding_cola.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from datamodules.text_classification import TextClassificationData
from modules.text_classification import TextClassifier

ARMS: dict[str, dict[str, Any]] = {
    "buckets": {"bucket_by_length": True, "padding": "longest"},
    "shuffled": {"bucket_by_length": False, "padding": "longest"},
    "fixed 128": {"bucket_by_length": False, "padding": "max_length"},
}


class Arm:
    """One batching strategy, with a separate model and optimizer."""

    def __init__(self, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
        L.seed_everything(0, verbose=False)
        self.model = TextClassifier(backbone=arguments.backbone, adapter={"dropout": 0.05})  # type: ignore[arg-type]
        data = TextClassificationData(
            path=arguments.path, task=arguments.task, batch_size=arguments.batch_size, **options
        )
        trainer = L.Trainer(
            accelerator="cpu", logger=False, use_distributed_sampler=False, enable_model_summary=False, max_epochs=1
        )
        trainer.strategy.connect(self.model)
        data.trainer = self.model.trainer = trainer
        data.setup("fit")
        assert data.class_names is not None
        self.model.configure_labels(data.class_names)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.loader = data.train_dataloader()
        self.batches: Iterator[dict[str, torch.Tensor]] = iter(self.loader)
        self.tokens = self.padded = 0

    def train(self, batches: int) -> float:
        """Train on the next batches, and return the seconds."""
        start = time.perf_counter()
        for _ in range(batches):
            batch = next(self.batches)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model.loss(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.tokens += int(batch["attention_mask"].sum())
            self.padded += batch["attention_mask"].numel()
        return time.perf_counter() - start


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--task", default="cola")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arms = {name: Arm(arguments, options) for name, options in ARMS.items()}
    steps = len(arms["buckets"].loader)
    sizes = [steps // arguments.blocks + (i < steps % arguments.blocks) for i in range(arguments.blocks)]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    for size in sizes:
        for name in order.sample(list(arms), len(arms)):
            seconds[name].append(arms[name].train(size))
    fixed = seconds["fixed 128"]
    record = {
        "task": arguments.task,
        "steps": steps,
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "arms": {
            name: {
                "padding_share": round(1 - arm.tokens / arm.padded, 4),
                "tokens": arm.tokens,
                "epoch_seconds": round(sum(seconds[name]), 2),
                "block_seconds": [round(s, 3) for s in seconds[name]],
                "times_faster_than_fixed": round(
                    statistics.median(b / a for a, b in zip(seconds[name], fixed, strict=True)), 2
                ),
            }
            for name, arm in arms.items()
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, arm in record["arms"].items():  # type: ignore[attr-defined]
        print(name, {k: v for k, v in arm.items() if k != "block_seconds"})


if __name__ == "__main__":
    main()
