"""Own texts at the default settings of conf/texts.yaml, beside Hugging Face Trainer with PEFT's LoRA.

Two made data sets (`benchmarks.made_texts`): `tickets`, and the unbalanced `spam`. Our arm says nothing but recipe,
backbone and data. Trainer has LoRA of rank 8 on query and value, dynamic padding in random order, bf16, and the
recipe's epochs and batch size. Its learning rate is the best of a grid on held-out rows, a quarter of the training
rows, which differ by seed. Both arms hold out the same tenth of the training rows, keep the checkpoint with the best
mean of accuracy and macro F1 on the held-out rows, and are tested once.

    python -m benchmarks.own_texts --backbone ../shared/backbones/minilm_roberta --threads 1 \
        --output docs/results/own_texts.json --resume

Each fit is a section of the file, and --resume skips existing sections. A round is one seed. All fits run in one
process, so that imports count for no arm.
Differences are ours minus Trainer's, paired by seed, with Student's 95 % interval. `within_one_standard_error` is true
if our mean is at most one standard error of Trainer's mean behind.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from app.sweep.statistics import student_interval
from benchmarks import made_texts
from benchmarks.fits import DECAY, WARM_UP
from benchmarks.harness import load, measured, parse, parser, section, table

RECIPE = Path("conf/texts.yaml")
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # Learning rates of Trainer.
SELECTING_SEEDS = (100, 101)
METRICS = ("accuracy", "macro_f1")
COSTS = ("fit_seconds", "cpu_seconds", "adapter_file_bytes", "trained_parameters")
Record = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """Configuration of one fit.

    Args:
        arm: `ours`, or Hugging Face `trainer` with PEFT's LoRA.
        data: Folder of train.csv and test.csv.
        backbone: Directory in the hub's layout.
        seed: Seed of data order, dropout, head and factors.
        rate: Learning rate of Trainer; ours has the recipe's.
        val_fraction: Share of the training rows that Trainer holds out; ours has the recipe's.
        val_seed: Seed of the held-out rows.
        test: If true, test the best checkpoint.
    """

    arm: Literal["ours", "trainer"]
    data: str
    backbone: str
    seed: int
    rate: float = 0.0
    val_fraction: float = 0.1
    val_seed: int = 0
    test: bool = True


def words(fit: Fit, folder: str) -> list[str]:
    """Return the command line of our fit, which leaves everything but backbone, data and seed at its default."""
    options: dict[str, Any] = {
        "model.backbone": fit.backbone,
        "data.path": fit.data,
        "seed_everything": fit.seed,
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
    }
    return ["fit", "--config", str(RECIPE), "--config", "conf/cpu.yaml", *(f"--{k}={v}" for k, v in options.items())]


def ours(fit: Fit) -> Record:
    """Fit through the command line, and return the scores of the best checkpoint."""
    from app.cli import main

    with tempfile.TemporaryDirectory() as folder:
        if main(words(fit, folder)):
            raise SystemExit("The fit failed.")
        run_directory = Path(folder) / "version_0"
        metrics = json.loads((run_directory / "metrics.json").read_text())
        size = sum(path.stat().st_size for path in (run_directory / "adapter").glob("*.safetensors"))
    return {
        "val_score": metrics["best/val/score"],
        **{name: metrics[f"test/{name}"] for name in METRICS},
        "fit_seconds": metrics["time/fit_seconds"],
        "adapter_file_bytes": size,
        "trained_parameters": metrics["params/trainable"],
    }


def scores(prediction: Any) -> dict[str, float]:
    """Return accuracy, macro F1 and their mean, as `val/score` of the recipe."""
    from sklearn.metrics import accuracy_score, f1_score

    guess, label = prediction.predictions.argmax(-1), prediction.label_ids
    accuracy, macro_f1 = accuracy_score(label, guess), f1_score(label, guess, average="macro", zero_division=0)
    return {"accuracy": float(accuracy), "macro_f1": float(macro_f1), "score": float(accuracy + macro_f1) / 2}


def trainer(fit: Fit) -> Record:
    """Fit with Trainer and PEFT, and return the scores of the best checkpoint."""
    import datasets
    import transformers

    from benchmarks.fits_trainer import text_classifier
    from datamodules.sources.splits import choose_rows

    recipe = yaml.safe_load(RECIPE.read_text())
    data, limits = recipe["data"]["init_args"], recipe["trainer"]
    transformers.set_seed(fit.seed)  # For factors and head. Trainer sets the seed again for the data order.
    rows = {split: read(Path(fit.data) / f"{split}.csv") for split in ("train", "test")}
    classes = sorted({label for _, label in rows["train"]})
    model, tokenizer = text_classifier(fit.backbone, len(classes), rank=8)

    def tokens(split: str, chosen: list[int]) -> datasets.Dataset:
        texts, labels = zip(*(rows[split][row] for row in chosen), strict=True)
        encoded = tokenizer(list(texts), truncation=True, max_length=data["max_length"])
        return datasets.Dataset.from_dict({**encoded, "labels": [classes.index(label) for label in labels]})

    shares = {"val": fit.val_fraction}
    parts = {
        split: tokens("train", choose_rows(len(rows["train"]), split, shares, fit.val_seed, None).tolist())
        for split in ("train", "val")
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=limits["max_epochs"],
            per_device_train_batch_size=data["batch_size"],
            per_device_eval_batch_size=64,
            learning_rate=fit.rate,
            weight_decay=DECAY,
            warmup_steps=WARM_UP,  # A value below 1 is a share of all steps.
            lr_scheduler_type="linear",
            max_grad_norm=limits["gradient_clip_val"],
            bf16=True,
            use_cpu=True,
            seed=fit.seed,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            label_names=["labels"],
            disable_tqdm=True,
            report_to="none",
        )
        fitting = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=parts["train"],
            eval_dataset=parts["val"],
            processing_class=tokenizer,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=scores,
        )
        seconds = fitting.train().metrics["train_runtime"]
        tested = fitting.evaluate(tokens("test", list(range(len(rows["test"]))))) if fit.test else {}
        model.save_pretrained(f"{folder}/adapter")
        size = sum(path.stat().st_size for path in Path(folder, "adapter").glob("*.safetensors"))
    return {
        "val_score": fitting.state.best_metric,
        **({name: tested[f"eval_{name}"] for name in METRICS} if fit.test else {}),
        "fit_seconds": seconds,
        "adapter_file_bytes": size,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def read(path: Path) -> list[made_texts.Row]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def run(fit: Fit) -> Record:
    """Fit, and return the figures with the CPU seconds of fit and test."""
    start = time.process_time()
    figures = {"ours": ours, "trainer": trainer}[fit.arm](fit)
    return figures | {"cpu_seconds": time.process_time() - start}


def once(arguments: argparse.Namespace, name: str, fit: Fit) -> Record:
    """Return the section of a fit, and measure the fit unless the file has the section."""
    settings = {key: value for key, value in asdict(fit).items() if key not in ("data", "backbone")}
    recipe = yaml.safe_load(RECIPE.read_text())
    if fit.arm == "trainer":  # Trainer takes epochs, batch size, clipping and length from the recipe, and no model.
        del recipe["model"]
    settings |= {"recipe": recipe}
    record = measured(arguments, name, settings)
    if record is None:
        with section(arguments, name) as record:
            record |= settings | run(fit)
        shown = {key: round(record[key], 4) for key in ("val_score", *METRICS) if key in record}
        print(f"{name}: {record['cpu_seconds']:.0f} s, {shown}", flush=True)
    return record


def best_rate(arguments: argparse.Namespace, name: str, fit: Fit) -> float:
    """Return the learning rate of Trainer with the best mean score on held-out rows, the smallest of equal ones.

    The first seed tries the grid, and the second seed the two best.
    """
    found: dict[float, list[float]] = {rate: [] for rate in GRID}
    rates: Sequence[float] = GRID
    for seed in SELECTING_SEEDS:
        for rate in rates:
            one = replace(fit, rate=rate, seed=seed, val_seed=seed, val_fraction=0.25, test=False)
            record = once(arguments, f"{name}, trainer, rate {rate:g}, seed {seed}", one)
            found[rate].append(record["val_score"])
        rates = sorted(sorted(GRID, key=lambda rate: -sum(found[rate]))[:2])
    return max(rates, key=lambda rate: sum(found[rate]))


def mean(values: list[float]) -> dict[str, float]:
    """Return the mean and its standard error."""
    return {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}


def summarize(arms: dict[str, list[Record]]) -> Record:
    """Return means of the arms by metric and cost, and the difference of each metric, paired by seed."""
    summary: Record = {arm: {key: mean([r[key] for r in rs]) for key in METRICS + COSTS} for arm, rs in arms.items()}
    for key in METRICS:
        pairs = zip(arms["ours"], arms["trainer"], strict=True)
        differences = np.array([one[key] - other[key] for one, other in pairs])
        low, high = student_interval(differences)
        allowed = summary["trainer"][key]["standard_error"]
        summary[f"{key}, ours minus trainer"] = {
            **mean(differences.tolist()),
            "low": low,
            "high": high,
            "within_one_standard_error": bool(differences.mean() >= -allowed),
        }
    return summary


def main() -> None:
    """Run all fits, print and write the summary."""
    common = parser(__doc__, rounds=5, quick_rounds=2)
    common.add_argument("--backbone", required=True, help="directory of MiniLM in the hub's layout")
    common.add_argument("--data", nargs="+", choices=made_texts.MAKERS, default=list(made_texts.MAKERS))
    common.set_defaults(inputs=["backbone"])
    arguments = parse(common)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.data:
            fit = Fit("ours", str(made_texts.write(name, Path(folder))), arguments.backbone, seed=0)
            rate = best_rate(arguments, name, replace(fit, arm="trainer"))
            arms: dict[str, list[Record]] = {"ours": [], "trainer": []}
            for seed in range(arguments.rounds):
                for arm, records in arms.items():
                    one = replace(fit, arm=arm, seed=seed, rate=rate if arm == "trainer" else 0.0)
                    records.append(once(arguments, f"{name}, {arm}, seed {seed}", one))
            with section(arguments, f"{name}, summary") as record:
                record |= {"rate_of_trainer": rate, **summarize(arms)}
            shown = [(arm, *(f"{100 * record[arm][m]['mean']:.2f} ± {100 * record[arm][m]['standard_error']:.2f}"
                             for m in METRICS)) for arm in arms]  # fmt: skip
            table(name, ["arm", *METRICS], shown)
    if arguments.output:
        print(f"{len(load(arguments.output))} sections in {arguments.output}")


if __name__ == "__main__":
    main()
