"""Measure the peak resident memory of fits, one process for each arm, for `benchmarks.memory`.

The task `cola` trains MiniLM by the recipe, with adapters on query and value and batches of 32. The task `images`
trains a ViT-B/16 without pretrained weights on random pixels. Adapters of the ViT are on all linear layers, which
determine the saved activations. Each arm has three figures: the peak of the process, and the growth over the imported
libraries in training and in loading. A large growth in loading shows that the weights were in memory twice.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.fits import Arm, Fit, run
from benchmarks.harness import MIB, measured, section, table

MIXED = {
    "ours, B": Arm("ours", "B"),
    "ours, A": Arm("ours", "A"),
    "ours, both": Arm("ours", "both"),
    "ours, B, bfloat16": Arm("ours", "B", "bfloat16"),
    "ours, A, bfloat16": Arm("ours", "A", "bfloat16"),
    "ours, both, bfloat16": Arm("ours", "both", "bfloat16"),
    "peft": Arm("trainer"),
    "peft, bfloat16": Arm("trainer", backbone_dtype="bfloat16"),
}
FULL_PRECISION = {
    "ours, B, no autocast": Arm("ours", "B", precision="32-true"),
    "peft, no autocast": Arm("trainer", precision="32-true"),
}
ARMS = {
    "cola": {**MIXED, **FULL_PRECISION, "peft, padded to 128": Arm("trainer", padded=True)},
    "images": {**MIXED, **FULL_PRECISION},
}
QUICK = ("ours, B", "ours, B, bfloat16", "peft")


def arms(arguments: argparse.Namespace, task: str) -> dict[str, Arm]:
    """Return the arms of a task; three arms with --quick."""
    return {name: arm for name, arm in ARMS[task].items() if name in QUICK or not arguments.quick}


def write_images(folder: Path, sizes: dict[str, int], side: int = 224) -> None:
    """Write random images of ten classes as Parquet, in the columns of CIFAR-10 on the hub."""
    import datasets
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    names = [f"class {i}" for i in range(10)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def picture() -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).save(file, "jpeg")
        return {"bytes": file.getvalue(), "path": None}

    for split, size in sizes.items():
        rows = {"img": [picture() for _ in range(size)], "label": [i % 10 for i in range(size)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))


def measure(arguments: argparse.Namespace) -> None:
    """Fit every arm of the requested tasks, one section for each arm."""
    if arguments.text_backbone:
        rows = 320 if arguments.quick else 2560
        for name, arm in arms(arguments, "cola").items():
            fit = Fit(arm, "cola", arguments.text_path, arguments.text_backbone, epochs=1, rate=1e-3, rows=rows)
            once(arguments, f"cola, {name}", fit)
        show(arguments, "cola")
    if arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            size = 4 if arguments.quick else 16
            write_images(Path(folder), {"train": 2 * size, "validation": size, "test": size})
            for name, arm in arms(arguments, "images").items():
                fit = Fit(arm, "images", folder, arguments.images, epochs=1, rate=1e-3, rows=2 * size, batch_size=size)
                once(arguments, f"images, {name}", fit)
        show(arguments, "images")


def once(arguments: argparse.Namespace, name: str, fit: Fit) -> None:
    """Measure one arm, unless the file has its section."""
    record = measured(arguments, name)
    if record is None:
        with section(arguments, name) as record:
            record |= {"batch_size": fit.batch_size, "data_rows": fit.rows} | run(fit, arguments.threads)
    arguments.results[name] = record


def show(arguments: argparse.Namespace, task: str) -> None:
    """Print the table of a task."""
    rows = []
    for name in arms(arguments, task):
        record = arguments.results[f"{task}, {name}"]
        memory = record["memory"]
        growth = [memory[key] - memory["libraries"] for key in ("loading_peak", "training_peak")]
        sizes = [f"{size / MIB:.0f}" for size in (memory["peak"], *growth)]
        rows.append([name, *sizes, f"{record['trained_parameters']:,}"])
    heads = ["arm", "peak, MiB", "loading over libraries, MiB", "training over libraries, MiB", "trained parameters"]
    table(f"Resident memory of a fit, {task}", heads, rows)
