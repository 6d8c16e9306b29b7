"""Print a run's adapted projections and its results, and write metrics.json and the provenance of the metrics."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from app.callbacks.adapter_checkpoint import AdapterCheckpoint
from app.config.differences import compare_configurations
from app.config.precedence import dotted
from app.config.variants import variant_name
from app.console import escape_controls, quantity_text
from app.lightning_compat import move_run_directory
from app.run.checkpoint_io import saved_configuration
from app.run.evaluations import (
    SECONDS,
    Evaluation,
    add_evaluation,
    drop_evaluations_after,
    metrics_of_split,
    read_metrics,
    write_metrics,
)
from app.run.logger import log_results, viewer_hint
from app.run.trainers import find_callback
from modules.adapters import Projection, adapted_projections
from modules.base import AdaptedModule

_log = logging.getLogger(__name__)
# results that compare runs; the results of each category and environment are left out
RESULTS = re.compile(r"best/.+|test/[^/]+|params/trainable|time/fit_seconds")
COSTS = ("params/", "adapter/", "time/", "memory/")
NOT_IN_TABLE = r"params/total|train/.+|train_eval/.+|gap/.+|time/(?!fit_).+"  # Left out, or beside a metric.


class RunSummary(L.Callback):
    """Print the adapted projections at the start and the results at the end.

    metrics.json keeps the newest figures. Figures of a split replace all earlier figures of the split, even figures on
    other data. Further training removes all earlier metrics. `app.run.evaluations` records the provenance.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._started = 0.0
        self._has_trained = False
        self._first_step = 0
        self._outdated: set[str] = set()  # first parts of the names in metrics.json that this command replaces
        self._loaded: tuple[int, dict[str, Any]] | None = None  # step and configuration of the evaluated checkpoint
        self._validation: dict[str, Any] = {}  # newest validation of a fit, which checkpoints keep
        self._earlier_seconds = 0.0  # seconds of training before the resumed checkpoint
        self._earlier_peak = 0
        self._device = torch.device("cpu")
        self._settings: dict[str, str | float] = {}  # settings of a fit that has ended

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Broadcast the run directory, which rank zero has made."""
        move_run_directory(trainer, trainer.strategy.broadcast(trainer.default_root_dir))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the configuration that the checkpoint was trained with."""
        self._loaded = int(checkpoint["global_step"]), saved_configuration(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return the newest validation and the cost. A checkpoint of the validated step then holds its own metrics."""
        cost = {"fit_seconds": self._seconds(), "peak_bytes": self._peak()} if self._has_trained else {}
        return {**self._validation, **cost}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the newest validation and the cost of training before the checkpoint."""
        self._validation = dict(state_dict)
        self._earlier_seconds = float(self._validation.pop("fit_seconds", 0.0))
        self._earlier_peak = int(self._validation.pop("peak_bytes", 0))

    def _seconds(self) -> float:
        """Return the seconds of the fit, including training before a resumed checkpoint."""
        return self._earlier_seconds + time.monotonic() - self._started

    def _peak(self) -> int:
        """Return the peak memory in bytes, including training before a resumed checkpoint."""
        return max(self._earlier_peak, _peak_memory(self._device))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the adapted projections and the number of trained parameters."""
        self._started = time.monotonic()
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, AdaptedModule)
        counts = pl_module.parameter_counts()
        console = Console()
        if pl_module.tuning == "adapter":
            console.print(_projection_table(pl_module))
        share = counts["params/trainable"] / counts["params/total"]
        console.print(
            f"Tuning {pl_module.tuning}: {counts['params/trainable']:,} of {counts['params/total']:,} parameters "
            f"are trained ({share:.2%})."
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember that training ran. Drop later evaluations, and mark a finished run that is resumed as unfinished.

        A finished run with nothing left to train does not call this hook. In `on_fit_start`, Lightning has not restored
        the step of the checkpoint yet.
        """
        self._has_trained = True
        self._first_step = trainer.global_step
        self._device = trainer.strategy.root_device
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            drop_evaluations_after(run, trainer.global_step)
            metrics = read_metrics(run)
            if metrics.pop(SECONDS, None) is not None:
                write_metrics(run, metrics)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the figures of training. If nothing was left to train, metrics.json keeps its figures of training."""
        if not self._has_trained and SECONDS in read_metrics(Path(trainer.default_root_dir)):
            return
        assert isinstance(pl_module, AdaptedModule)
        self.values |= pl_module.parameter_counts()
        self.values[SECONDS] = round(self._seconds(), 2)
        self.values["memory/peak_bytes"] = self._peak()
        callback = find_callback(trainer, AdapterCheckpoint)
        if callback is not None and callback.monitor and callback.best_model_score is not None:
            self.values[f"best/{callback.monitor}"] = callback.best_model_score.item()
        if trainer.global_step > self._first_step:
            self._outdated |= {"train", "val", "test", "best", "train_eval", "gap", "forgetting"}
        self._loaded = None
        self._settings = _settings(trainer)
        self._keep_metrics(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(Path(trainer.default_root_dir))  # a kill during the test loses no figures

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the metrics of `validate`, or keep the metrics of a fit's validation for checkpoints."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._keep_evaluation(trainer, pl_module, "val")
        elif not trainer.sanity_checking:
            self._validation = dataclasses.asdict(self._evaluation(trainer, pl_module, "val"))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the metrics of the test."""
        self._keep_evaluation(trainer, pl_module, "test")

    def _evaluation(self, trainer: L.Trainer, module: L.LightningModule, split: str) -> Evaluation:
        """Return the metrics of the split that was just evaluated, with their provenance."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        hparams = {"hyper_parameters": dict(module.hparams), "datamodule_hyper_parameters": dict(data.hparams)}
        used = saved_configuration(hparams)
        step, saved = self._loaded or (trainer.global_step, used)
        if trainer.state.fn == TrainerFn.FITTING:  # the current weights are evaluated, not the resumed checkpoint
            step, saved = trainer.global_step, used
        limit = {"val": "limit_val_batches", "test": "limit_test_batches"}[split]
        limited = [f"trainer.{key}" for key in (limit, "overfit_batches", "fast_dev_run") if _is_limited(trainer, key)]
        values = {key: value.item() for key, value in trainer.callback_metrics.items()}
        differences = (*compare_configurations(saved, used), *limited)
        return Evaluation(split, step, differences, metrics_of_split(values, split))

    @rank_zero_only
    def _keep_evaluation(self, trainer: L.Trainer, module: L.LightningModule, split: str) -> None:
        """Record an evaluation. Warn if its data or settings differ from the checkpoint's."""
        self._outdated.add(split)
        self._keep_metrics(trainer)
        evaluation = self._evaluation(trainer, module, split)
        add_evaluation(Path(trainer.default_root_dir), evaluation)
        if evaluation.differences:
            _log.warning(
                f"The {split} metrics were computed with other values of {', '.join(evaluation.differences)} than the "
                "checkpoint's. metrics.json has these metrics; the model card of an export leaves them out."
            )

    def _keep_metrics(self, trainer: L.Trainer) -> None:
        metrics = trainer.callback_metrics.items()
        self.values |= {k: v.item() for k, v in metrics if "/" in k and not k.startswith("lr-")}

    @rank_zero_only
    def report(self, trainer: L.Trainer, run_directory: Path) -> None:
        """Print the closing table, write metrics.json, and log the results of a fit beside its settings.

        Figures of earlier commands stay unless they are outdated.
        """
        self._write(run_directory)
        if not self.values:  # predict has no figures
            return
        loggers = [] if trainer.fast_dev_run else trainer.loggers  # type: ignore[attr-defined]
        if self._settings and loggers:
            results = {key: value for key, value in self.values.items() if RESULTS.fullmatch(key) and _finite(value)}
            # HParams shows the first five: the best validation metric, the trained parameters, the first test metrics.
            results = dict(sorted(results.items(), key=lambda item: item[0].partition("/")[0]))
            log_results(trainer, self._settings, results)
        console = Console()
        console.print(_closing_table(self.values))
        rest = f"All figures: {run_directory / 'metrics.json'}"
        console.print(escape_controls(rest), soft_wrap=True, markup=False)
        for logger in loggers:
            console.print(f"Look inside: {escape_controls(viewer_hint(logger))}", soft_wrap=True, markup=False)

    def _write(self, run_directory: Path) -> None:
        saved = read_metrics(run_directory)
        compared = "test" if any(key.startswith("test/") for key in saved) else "val"
        if compared in self._outdated and metrics_of_split(saved, compared) != metrics_of_split(self.values, compared):
            self._outdated.add("gap")  # the gap was computed from the earlier figures
        earlier = {k: v for k, v in saved.items() if k.partition("/")[0] not in self._outdated}
        merged = {k: v if _finite(v) else None for k, v in sorted((earlier | self.values).items())}
        write_metrics(run_directory, merged)


def _settings(trainer: L.Trainer) -> dict[str, str | float]:
    """Return the settings that distinguish runs, by short names.

    All runs have all names, since TensorBoard takes the columns from the first run. TensorBoard shows the first five
    names in alphabetical order: data, lr, rank, seed and train.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, AdaptedModule)
    keys = dotted({**module.hparams, "adapter": dataclasses.asdict(module.adapter)}, "model")
    adapter = module.adapter if module.tuning == "adapter" else None
    targets = [] if adapter is None else adapter.targets
    return {
        "data": " ".join(filter(None, (Path(data.hparams.get("path") or "").name, data.hparams.get("task")))),
        "lr": module.learning_rate,
        "rank": 0 if adapter is None else adapter.rank,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        "train": module.tuning if adapter is None else adapter.train,
        "train_batch_size": data.hparams.get("batch_size", 0),
        "train_epochs": trainer.max_epochs or 0,
        "train_targets": targets if isinstance(targets, str) else " ".join(targets),
        "variant": variant_name(keys),
    }


def _is_limited(trainer: L.Trainer, key: str) -> bool:
    """Return True if a key of the trainer cuts splits short."""
    value = getattr(trainer, key)
    is_complete = isinstance(value, float) and value == 1.0  # the int 1 means one batch
    return bool(value) and not (is_complete and key.startswith("limit_"))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _closing_table(values: Mapping[str, float]) -> Table:
    """Return the table of results and costs. A gap stands beside the held-out metric of the same name.

    The table leaves out training metrics and lesser costs and, after a test, the validation metrics.
    """
    compared = "test" if any(key.startswith("test/") for key in values) else "val"
    left_out = NOT_IN_TABLE + (r"|val/.+" if compared == "test" else "")
    shown = [key for key in values if not re.fullmatch(left_out, key)]
    gaps = {f"{compared}/{key.removeprefix('gap/')}": key for key in values if key.startswith("gap/")}
    shown += [gap for key, gap in gaps.items() if key not in values]  # Such as gap/ood, which has no metric.
    gaps = {key: gap for key, gap in gaps.items() if key in shown}
    headers = ("Result", "", *(["Gap"] if gaps else []))
    table = Table(*headers, show_edge=False, title="Run", title_justify="left")
    for key in sorted(shown, key=lambda key: key.startswith(COSTS)):
        gap = [_metric_text(values[gaps[key]], "+")] if key in gaps else []
        table.add_row(escape_controls(key), quantity_text(key, values[key]) or _metric_text(values[key]), *gap)
    return table


def _metric_text(value: float, sign: str = "") -> str:
    """Return a metric with four decimals, or with three significant digits if it is below 0.001."""
    return f"{value:{sign}.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:{sign}.3g}"


def _projection_table(module: AdaptedModule) -> Table:
    """Return a table with one line for all projections whose names differ only in block numbers."""
    kinds: dict[str, list[Projection]] = {}
    for projection in module.projections:
        kinds.setdefault(re.sub(r"\b\d+\b", "*", projection.name), []).append(projection)
    factors = adapted_projections(module.backbone)
    config = module.adapter
    title = f"Adapters: train {config.train}, A {config.init_a}, B {config.init_b}"
    if (epochs := config.chain.every_n_epochs) is not None:
        title += f", a new link every {'epoch' if epochs == 1 else f'{epochs} epochs'}"
    columns = ("Projection", "Role", "Layers", "d_in → d_out", "Rank", "s")
    table = Table(*columns, title=title, title_justify="left", show_edge=False)
    for kind, projections in kinds.items():
        _, first = factors[projections[0].name]
        shape = f"{first.A.shape[1]} → {first.B.shape[0]}"
        of_kind = [factors[p.name][1] for p in projections]
        ranks, scales = _range([f.A.shape[0] for f in of_kind]), _range([f.scale for f in of_kind])
        table.add_row(escape_controls(kind), projections[0].role, str(len(projections)), shape, ranks, scales)
    return table


def _range(values: list[float]) -> str:
    """Return the smallest and the largest of some numbers, or the number if all are equal."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the accelerator if training ran there, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
