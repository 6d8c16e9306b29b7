"""Own photos: `conf/images.yaml` at its defaults against timm's linear probe and full fine-tuning.

Photos of CIFAR-10 are written as a user has photos: one folder for each class, below train/, val/ and test/. All arms
have the same photos, crops, mirroring, batches, epochs and bf16 autocast, and keep the epoch with the best validation
accuracy. Of epochs with equal accuracy, the arms keep the newest. Logistic regression learns from features of photos
that are not augmented.

    python -m benchmarks.own_photos --threads 1 --weights ../shared/backbones/dinov2_vits14/model.safetensors \
        --output docs/results/own_photos.json --resume

Ours has the recipe's learning rate. For the other arms, 500 further photos choose the learning rate, or C of logistic
regression. The seed of this choice is not among the seeds of the comparison. A fit is a section of the file, and
--resume skips existing sections.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import to_pil_image

from app.cli import main as command_line
from app.sweep.statistics import mean_over_seeds, paired_difference
from benchmarks.harness import measured, parse, parser, section, table
from datamodules.sources.images import open_split
from modules.backbones.timm_backbone import build_timm_backbone, preprocessing

SPLITS = {  # Photos of each class, by folder: split of the source, first photo, and end.
    "photos/train": ("train", 0, 60),
    "photos/val": ("train", 60, 70),
    "photos/test": ("test", 0, 200),
    "choice/train": ("train", 0, 60),  # The same as photos/train, for a sweep over the recipe.
    "choice/val": ("train", 100, 150),
}
QUICK_SHARE = 10  # With --quick, a folder has a tenth of the photos.
FOLDERS = {"train": "photos/train", "val": "photos/val", "test": "photos/test", "choice": "choice/val"}
CROP, CLIP, DECAY, LAYER_DECAY = (0.6, 1.0), 1.0, 0.05, 0.75
GRIDS: dict[str, tuple[float, ...]] = {  # Learning rates; C of logistic regression.
    "linear probe": (0.001, 0.003, 0.01, 0.03, 0.1),
    "logistic regression": (0.001, 0.01, 0.1, 1.0, 10.0),
    "full fine-tuning": (0.00003, 0.0001, 0.0003, 0.001),
}
COLUMNS = ["trained", "learning rate or C", "test accuracy, %", "ours minus this, 95 % interval", "CPU seconds"]
COLUMNS += ["trained parameters", "file, MB"]
Record = dict[str, Any]


def write_photos(source: str, root: Path, share: int = 1) -> None:
    """Write labelled images as PNG files, one folder for each split and class.

    Args:
        source: Labelled images with a train and a test split, such as CIFAR-10.
        root: Output folder.
        share: Divisor of the numbers of photos in `SPLITS`.
    """
    for folder, (split, first, end) in SPLITS.items():
        images = open_split(source, split, None, None)
        assert images is not None
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        for label, class_name in enumerate(images.class_names):
            (root / folder / class_name).mkdir(parents=True)
            rows = order[images.labels[order] == label]
            for row in rows[first // share : end // share].tolist():
                to_pil_image(images.decode(row)).save(root / folder / class_name / f"{row:05}.png")


class Heads(nn.Module):
    """A timm backbone with linear heads that start equal, in plain PyTorch.

    Args:
        backbone: A ViT without a classifier.
        classes: Number of classes.
        heads: Number of heads. Over a frozen backbone, several heads learn apart from each other in one fit.
        frozen: If true, the backbone gets no gradient and stays in eval mode.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, heads: int, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        weight = nn.init.trunc_normal_(torch.empty(classes, backbone.num_features), std=0.02)
        sizes = (backbone.num_features, classes)
        self.heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, *sizes) for _ in range(heads))  # Draws nothing.
        for head in self.heads:
            head.load_state_dict({"weight": weight, "bias": torch.zeros(classes)})

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (heads, batch, classes)."""
        self.backbone.train(self.training and not self.frozen)
        features = self.backbone(images)
        return torch.stack([head(features) for head in self.heads])

    def optimizer(self, rates: Sequence[float]) -> torch.optim.Optimizer:
        """Return AdamW with a learning rate for each head, or with timm's layer decay for the whole model."""
        if self.frozen:
            groups = [
                {"params": [*head.parameters()], "lr": rate} for head, rate in zip(self.heads, rates, strict=True)
            ]
            return torch.optim.AdamW(groups, weight_decay=DECAY)
        self.backbone.head = self.heads[0]  # timm's layer decay looks for the classifier here.
        decay = {"weight_decay": DECAY, "layer_decay": LAYER_DECAY}
        optimizer = create_optimizer_v2(self.backbone, "adamw", lr=rates[0], **decay)  # type: ignore[arg-type]
        self.backbone.head = nn.Identity()
        return optimizer


class Study:
    """Photos and fits. Each fit is a section of the file.

    Args:
        arguments: From `parse`.
        root: Folder of `write_photos`.
    """

    def __init__(self, arguments: argparse.Namespace, root: Path) -> None:
        self.arguments, self.root = arguments, root
        config = preprocessing(self.backbone(), arguments.image_size)
        common = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
        evaluation = create_transform(**common)
        self.splits = {name: ImageFolder(str(root / folder), evaluation) for name, folder in FOLDERS.items()}
        augmentation = create_transform(**common, is_training=True, scale=CROP, color_jitter=0.0)
        self.augmented = ImageFolder(str(root / FOLDERS["train"]), augmentation)

    def backbone(self) -> VisionTransformer:
        """Return the pretrained backbone, with its positions resized as ours."""
        a = self.arguments
        backbone = build_timm_backbone(a.backbone, a.weights, a.image_size, a.backbone_args)
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def outputs(self, model: nn.Module, split: str) -> tuple[Tensor, Tensor]:
        """Return the output of a model for a split (..., photos, outputs), and the labels."""
        model.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            batches = [(model(images).float(), labels) for images, labels in DataLoader(self.splits[split], 64)]
        return torch.cat([output for output, _ in batches], -2), torch.cat([labels for _, labels in batches])

    def accuracies(self, model: nn.Module, split: str) -> list[float]:
        """Return the accuracy of each head."""
        logits, labels = self.outputs(model, split)
        return (logits.argmax(-1) == labels).double().mean(-1).tolist()

    def timm_fit(self, rates: Sequence[float], seed: int, frozen: bool, scored: str) -> list[Record]:
        """Train with timm and PyTorch, and score each head's best epoch on the split `scored`."""
        torch.manual_seed(seed)
        random.seed(seed)  # timm's crops use the module `random`.
        model = Heads(self.backbone(), len(self.augmented.classes), len(rates), frozen)
        optimizer = model.optimizer(rates)
        loader = DataLoader(self.augmented, self.arguments.batch_size, shuffle=True, drop_last=True)
        steps = self.arguments.epochs * len(loader)
        schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, warmup_prefix=True, t_in_epochs=False)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        curve: list[list[float]] = []
        best: list[dict[str, Tensor]] = [{} for _ in rates]
        for epoch in range(self.arguments.epochs):
            model.train()
            for step, (images, labels) in enumerate(loader, epoch * len(loader)):
                schedule.step_update(step)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(images)
                loss = torch.stack([F.cross_entropy(head.float(), labels) for head in logits]).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if not frozen:
                    nn.utils.clip_grad_norm_(trained.values(), CLIP)
                optimizer.step()
            curve.append(self.accuracies(model, "val"))
            for head, accuracy in enumerate(curve[-1]):
                if accuracy >= max(earlier[head] for earlier in curve):
                    best[head] = {name: p.detach().clone() for name, p in trained.items()}
        records = []
        for head, rate in enumerate(rates):
            model.load_state_dict(best[head], strict=False)
            kept = {name: p for name, p in best[head].items() if not frozen or f"heads.{head}." in name}
            values = [accuracies[head] for accuracies in curve]
            records.append(record(rate, self.accuracies(model, scored)[head], kept) | {"val": values})
        return records

    def logistic_regression(self, strengths: Sequence[float], scored: str) -> list[Record]:
        """Fit scikit-learn's logistic regression on the backbone's features, and score each C on `scored`."""
        backbone = self.backbone()
        train, (features, labels) = self.outputs(backbone, "train"), self.outputs(backbone, scored)
        records = []
        for strength in strengths:
            fitted = LogisticRegression(C=strength, max_iter=5000).fit(*train)
            head = {
                "weight": torch.from_numpy(fitted.coef_).float(),
                "bias": torch.from_numpy(fitted.intercept_).float(),
            }
            records.append(record(strength, float(fitted.score(features, labels)), head))
        return records

    def our_fit(self, seed: int) -> Record:
        """Fit and test with `conf/images.yaml`, everything at its default but the backbone.

        Raises:
            SystemExit: If the fit fails.
        """
        a = self.arguments
        with tempfile.TemporaryDirectory() as runs:
            words = ["fit", "--config=conf/images.yaml", "--config=conf/cpu.yaml", f"--data.path={self.root}/photos"]
            words += [f"--model.backbone={a.backbone}", f"--model.weights={a.weights}"]
            words += [f"--model.image_size={a.image_size}", f"--model.backbone_args={json.dumps(a.backbone_args)}"]
            words += [f"--seed_everything={seed}", f"--trainer.default_root_dir={runs}"]
            # The seconds of other processes would not be counted. The images do not depend on the number of processes.
            words += ["--data.num_workers=0", "--trainer.enable_progress_bar=false", *a.options]
            if command_line(words) != 0:
                raise SystemExit(f"The fit with seed {seed} failed.")
            run = Path(runs, "version_0")
            metrics = json.loads((run / "metrics.json").read_text())
            size = sum(path.stat().st_size for path in (run / "adapter").glob("*.safetensors"))
        counts = {"trained_parameters": metrics["params/trainable"], "file_bytes": size}
        return {"accuracy": metrics["test/acc1"], **counts, "metrics": metrics}

    def fits(self, arm: str, rates: Sequence[float], seed: int, scored: str) -> list[Record]:
        """Return a record for each learning rate or C. Fit unless the file has the section."""
        name = f"{'choice, ' if scored == 'choice' else ''}{arm}, seed {seed}"
        settings = {"rates": list(rates), "epochs": self.arguments.epochs}
        entry: Record | None = measured(self.arguments, name, settings)
        if entry is None:
            with section(self.arguments, name) as entry:
                start, processor = time.perf_counter(), time.process_time()
                if arm == "ours":
                    records = [self.our_fit(seed)]
                elif arm == "logistic regression":
                    records = self.logistic_regression(rates, scored)
                elif arm == "linear probe":
                    records = self.timm_fit(rates, seed, True, scored)
                else:
                    records = [self.timm_fit([rate], seed, False, scored)[0] for rate in rates]
                seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
                entry |= {**settings, **seconds, "fits": records}
            print(f"{name}:", *(f"{fit['accuracy']:.2%}" for fit in entry["fits"]), flush=True)
        return [{**fit, "cpu_seconds": entry["cpu_seconds"]} for fit in entry["fits"]]

    def choose(self, arm: str) -> list[float]:
        """Return the learning rate or C with the best mean accuracy; empty for ours, which has the recipe's."""
        if arm == "ours":
            return []
        fits = [self.fits(arm, GRIDS[arm], seed, "choice") for seed in self.arguments.choice_seeds]
        means = [statistics.mean(fit["accuracy"] for fit in same_rate) for same_rate in zip(*fits, strict=True)]
        return [GRIDS[arm][means.index(max(means))]]


def record(rate: float, accuracy: float, kept: dict[str, Tensor]) -> Record:
    """Return the record of a fit with timm; `kept` has the trained parameters."""
    size = len(save({name: tensor.contiguous() for name, tensor in kept.items()}))
    trained = sum(tensor.numel() for tensor in kept.values())
    return {"rate": rate, "accuracy": accuracy, "trained_parameters": trained, "file_bytes": size}


def rows(runs: dict[str, list[Record]]) -> list[list[str]]:
    """Return a row for each arm. The records of all arms have the same seeds in the same order."""
    scores = {arm: pd.Series([100 * fit["accuracy"] for fit in fits]) for arm, fits in runs.items()}
    lines = []
    for arm, (first, *_) in runs.items():
        mean = mean_over_seeds(scores[arm])
        with_ours = arm != "ours" and "ours" in scores
        pair = paired_difference("ours", scores["ours"], arm, scores[arm]) if with_ours else None
        spread = "" if not pair or not pair.student else f" ({pair.student[0]:+.1f} to {pair.student[1]:+.1f})"
        lines.append(
            [
                arm,
                f"{first['rate']:g}" if "rate" in first else "the recipe's",
                f"{mean.value:.1f}" + ("" if mean.error is None else f" ± {mean.error:.1f}"),
                f"{pair.mean:+.1f}{spread}" if pair else "",
                f"{statistics.median(fit['cpu_seconds'] for fit in runs[arm]):.0f}",
                f"{first['trained_parameters']:,}",
                f"{first['file_bytes'] / 1e6:.2f}",
            ]
        )
    return lines


def run(words: Sequence[str] | None = None) -> None:
    """Run all fits, print the table and write the file."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--source", default="../shared/data/cifar10", help="labelled images, such as CIFAR-10")
    common.add_argument("--weights", default="none", help="local file of the backbone's weights")
    common.add_argument("--backbone", default="vit_small_patch14_dinov2", help="timm's name of a ViT")
    common.add_argument("--backbone_args", type=json.loads, default={}, help="arguments of timm.create_model, as JSON")
    common.add_argument("--image_size", type=int, default=56)
    common.add_argument("--epochs", type=int, default=10, help="epochs of the timm arms; ours has the recipe's")
    common.add_argument("--batch_size", type=int, default=32, help="the same for the timm arms")
    arms = ["ours", *GRIDS]
    common.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms of this call")
    common.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    common.add_argument("--choice_seeds", type=int, nargs="+", default=[100])
    common.add_argument("options", nargs="*", help="after --: more options of our fit")
    arguments = parse(common, words)
    arguments.inputs = ["backbone", "image_size", "options"]
    runs: dict[str, list[Record]] = {arm: [] for arm in arguments.arms}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(arguments.source, Path(folder), QUICK_SHARE if arguments.quick else 1)
        study = Study(arguments, Path(folder))
        chosen = {arm: study.choose(arm) for arm in runs}
        for seed in arguments.seeds:  # Seed by seed, so that a slow period of the machine affects all arms.
            for arm, rates in chosen.items():
                runs[arm] += study.fits(arm, rates, seed, "test")
    table("Own photos", COLUMNS, rows({arm: fits for arm, fits in runs.items() if fits}))


if __name__ == "__main__":
    run()
