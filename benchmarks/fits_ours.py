"""Run our fit through the command line, `main(["fit", ...])`, with the recipes."""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L

from app.cli import main
from app.config.variants import command_line_options, variant_keys
from benchmarks.fits import CLIP, DECAY, WARM_UP, Clock, Fit

VARIANTS = {"A": "A", "B": "B", "both": "lora"}  # Built-in variants by trained factor.
SCORES = {"cola": "val/matthews", "images": "val/acc1"}
MODULES = {
    "cola": (
        "modules.text_classification",
        "datamodules.text_classification",
        "transformers.models.roberta.modeling_roberta",
        "torch.utils.tensorboard",
        "pyarrow.parquet",
    ),
    "images": (
        "modules.image_classification",
        "datamodules.image_classification",
        "datasets",
        "torch.utils.tensorboard",
        "pyarrow.parquet",
    ),
}
CLOCK = Clock()
SCORES_SEEN: list[float] = []


class StepClock(L.Callback):
    """Start and stop the clock at each step, and record the score of each validation."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the clock of a step."""
        CLOCK.begin(trainer.current_epoch)

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock of a step."""
        CLOCK.end()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the score. Lightning calls this hook after the epoch's validation."""
        metrics = trainer.callback_metrics
        SCORES_SEEN.extend(float(metrics[name]) for name in SCORES.values() if name in metrics)


def words(fit: Fit, folder: str) -> list[str]:
    """Return the command line of a fit."""
    arm, rows = fit.arm, "null" if fit.rows is None else str(fit.rows)
    recipe = {"cola": "conf/roberta_glue.yaml", "images": "conf/vit_cifar.yaml"}[fit.task]
    options: dict[str, Any] = {
        "data.path": fit.data,
        "data.batch_size": fit.batch_size,
        "data.num_workers": 0,
        "data.max_train_samples": rows,
        "model.backbone": fit.backbone,
        "model.backbone_dtype": arm.backbone_dtype,
        "model.adapter.rank": arm.rank,
        "model.adapter.alpha": 2 * arm.rank,
        "model.adapter.dropout": 0.0,
        "model.adapter.seed": fit.seed,
        "model.learning_rate": fit.rate,
        "model.lr_ratio_head": 1.0,
        "model.weight_decay": DECAY,
        "model.schedule": "linear",
        "model.warmup_ratio": WARM_UP,
        "trainer.max_epochs": fit.epochs,
        "trainer.precision": arm.precision,
        "trainer.gradient_clip_val": CLIP,
        "trainer.enable_progress_bar": "false",
        "trainer.num_sanity_val_steps": 0,  # Hugging Face Trainer has none.
        "trainer.default_root_dir": folder,
        "seed_everything": fit.seed,
        "test_after_fit": "false",
    }
    if fit.task == "cola":
        options |= {"data.task": "cola", "data.test_on_validation": "false"}
    else:
        options |= {"model.weights": "none", "model.adapter.targets": "[all]"}
    option_list = [f"--{key}={value}" for key, value in options.items()]
    clock = ["--allow_imports", "benchmarks.fits_ours", "--trainer.callbacks+=benchmarks.fits_ours.StepClock"]
    variant = command_line_options(variant_keys(VARIANTS[arm.train]))
    return ["fit", "--config", recipe, "--config", "conf/cpu.yaml", *variant, *option_list, *clock]


def fit(fit: Fit) -> dict[str, Any]:
    """Fit, and return seconds, memory and scores."""
    for name in MODULES[fit.task]:  # Import now, since imports must not count as building the model.
        import_module(name)
    CLOCK.loading()
    with tempfile.TemporaryDirectory() as folder:
        if main(words(fit, folder)):
            raise SystemExit("The fit failed.")
        run = Path(folder) / "version_0"
        metrics = json.loads((run / "metrics.json").read_text())
        adapter = sum(path.stat().st_size for path in (run / "adapter").glob("*.safetensors"))
    return {
        **CLOCK.record(),
        "scores": SCORES_SEEN,
        "trained_parameters": metrics["params/trainable"],
        "adapter_file_bytes": adapter,
        "fit_seconds": metrics["time/fit_seconds"],
        "spectrum_seconds": metrics["time/spectrum_seconds"],
    }
