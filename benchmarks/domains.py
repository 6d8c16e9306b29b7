"""Out-of-domain accuracy, generalization gap and forgetting of B, A, LoRA and full tuning.

The environments are artificial: CIFAR-10 unchanged, in grey, inverted, rotated, blurred and with noise. Environments
have different images, and the same number of images of each class. Every fit trains on `plain` and is tested on all
environments. Forgetting is measured on the embedded digits, which are never trained on.

    python -m benchmarks.domains --source ../shared/data/cifar10 --output docs/results/domains.json -- \
        --model.backbone vit_small_patch14_dinov2 --model.weights ../shared/backbones/dinov2_vits14/model.safetensors \
        --model.image_size 98

The learning rates of B, A and LoRA are from docs/results.md on CIFAR-10, where validation images chose them. Full
tuning has two learning rates without a search. The smaller learning rate was added after the result of the larger.

A fit is a section of the file, and --resume skips existing sections.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as render

from app.cli import main as command_line
from benchmarks.harness import load, measured, parse, parser, section, table
from datamodules.loading.batching import seeded
from datamodules.sources.images import ImageTable, open_split

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda image: image,
    "grey": lambda image: render.rgb_to_grayscale(image, num_output_channels=3),
    "inverted": render.invert,
    "rotated": lambda image: render.rotate(image, 90),
    "blurred": lambda image: render.gaussian_blur(image, [5, 5], [1.5, 1.5]),
    "noisy": lambda image: render.gaussian_noise(image, sigma=0.2),
}
TRAINED = "plain"
VARIANTS: dict[str, list[str]] = {
    "B": ["--model.adapter.train=B", "--model.learning_rate=0.002"],
    "A": [
        *("--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"),
        "--model.learning_rate=0.0028",
    ],
    "lora": ["--model.adapter.train=both", "--model.adapter.init_a=kaiming", "--model.learning_rate=0.0028"],
    "full": ["--model.tuning=full", "--model.learning_rate=0.00003", "--model.lr_ratio_head=50"],
    "full at 0.0001": ["--model.tuning=full", "--model.learning_rate=0.0001"],
}
COMMON = [
    *("fit", "--config", "conf/vit_domainbed.yaml", "--config", "conf/cpu.yaml", f"--data.environment={TRAINED}"),
    *("--data.num_workers=0", "--data.batch_size=32", "--data.max_test_samples=300", "--trainer.max_epochs=2"),
    *("--forgetting.path=app/assets/digits", "--forgetting.rows=400", "--trainer.enable_progress_bar=false"),
]
QUICK = [
    *("--model.backbone=vit_tiny_patch16_224", "--model.weights=none", "--model.image_size=16"),
    "--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    *("--data.batch_size=4", "--trainer.max_epochs=1", "--forgetting.rows=30"),
]
IMAGES, QUICK_IMAGES = 1200, 30  # Images of each environment.
COLUMNS = {  # Columns of the table: metric, and factor to the shown unit.
    "in-domain, %": ("test/acc1", 100),
    **{f"{name}, %": (f"test/{name}/acc1", 100) for name in sorted(SHIFTS) if name != TRAINED},
    "other domains, %": ("test/ood/acc1", 100),
    "in-domain − others": ("gap/ood", 100),
    "train − test": ("gap/acc1", 100),
    "digits before, %": ("forgetting/before/knn_acc", 100),
    "digits after, %": ("forgetting/after/knn_acc", 100),
    "forgotten": ("forgetting/knn_acc", 100),
    "trained parameters": ("params/trainable", 1),
}


def write_environments(source: ImageTable, root: Path, images: int) -> None:
    """Render environments in DomainBed's layout, with different images and equal class counts.

    Args:
        source: Labelled images.
        root: Output folder.
        images: Images of each environment, rounded down to a multiple of the number of classes.
    """
    each = images // len(source.class_names)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    for label, class_name in enumerate(source.class_names):
        rows = order[source.labels[order] == label]
        for number, (environment, shift) in enumerate(SHIFTS.items()):
            folder = root / environment / class_name
            folder.mkdir(parents=True)
            for row in rows[number * each : (number + 1) * each].tolist():
                with seeded(0, row):
                    image = shift(source.decode(row))
                render.to_pil_image(image).save(folder / f"{row:05}.png")


def fit(root: Path, options: Sequence[str], variant: str, seed: int) -> dict[str, float]:
    """Fit one variant on the training environment and return its metrics.

    Raises:
        SystemExit: If the fit fails.
    """
    with tempfile.TemporaryDirectory() as runs:
        words = [*COMMON, *options, *VARIANTS[variant], f"--data.path={root}", f"--trainer.default_root_dir={runs}"]
        if command_line([*words, f"--seed_everything={seed}", f"--model.adapter.seed={seed}"]) != 0:
            raise SystemExit(f"The fit of {variant} with seed {seed} failed.")
        metrics: dict[str, float] = json.loads(Path(runs, "version_0", "metrics.json").read_text())
    return metrics


def figures(runs: Sequence[dict[str, float]], metric: str, factor: float) -> str:
    """Return the mean of a metric over seeds and its standard error."""
    values = [run[metric] * factor for run in runs]
    if factor == 1:
        return f"{statistics.mean(values):,.0f}"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{error}"


def run(words: Sequence[str] | None = None) -> None:
    """Fit every variant with every seed, and print the table."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    common.add_argument("--source", default="../shared/data/cifar10", help="labelled images, such as CIFAR-10")
    common.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["B", "A", "lora", "full"])
    common.add_argument("options", nargs="*", help="after --: options of `main.py fit`, for the backbone")
    arguments: argparse.Namespace = parse(common, words)
    arguments.inputs = ["options"]
    options = [*QUICK, *arguments.options] if arguments.quick else arguments.options
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in arguments.variants}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = open_split(arguments.source, "train", None, None)
        assert source is not None
        write_environments(source, root, QUICK_IMAGES if arguments.quick else IMAGES)
        for seed in arguments.seeds:  # Seed by seed, so that a slow period of the machine affects all variants.
            for variant in arguments.variants:
                name = f"{variant}, seed {seed}"
                record: dict[str, Any] | None = measured(arguments, name)
                if record is None:
                    with section(arguments, name) as record:
                        record["fit"] = [*options, *VARIANTS[variant]]
                        record["metrics"] = fit(root, options, variant, seed)
                runs[variant].append(record["metrics"])
    rows = [[variant, *(figures(r, *column) for column in COLUMNS.values())] for variant, r in runs.items()]
    for first in range(0, len(COLUMNS), 7):  # Seven columns fit a terminal.
        names, cells = list(COLUMNS)[first : first + 7], [[row[0], *row[1 + first : 8 + first]] for row in rows]
        table(
            f"Trained on {TRAINED}, mean ± standard error of {len(arguments.seeds)} seeds", ["trained", *names], cells
        )
    if arguments.output:
        print(markdown(load(arguments.output)))


def markdown(record: dict[str, Any]) -> str:
    """Return the table of a file as Markdown."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, entry in record.items():
        runs.setdefault(name.partition(",")[0], []).append(entry["metrics"])
    lines = [["trained", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[variant, *(figures(r, *column) for column in COLUMNS.values())] for variant, r in runs.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    run()
