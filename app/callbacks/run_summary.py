"""What a run adapts, said at its start; what came out, said at its end and kept in metrics.json."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from app.callbacks.adapter_checkpoint import AdapterCheckpoint
from app.files import written_whole
from modules.adapters import Projection, adapted_projections
from modules.base import AdaptedModule


class RunSummary(L.Callback):
    """The hit list of adapted projections at the start, the table of results at the end."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._started = 0.0
        self._has_trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have all processes agree on the run directory, which rank zero has made."""
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what is adapted."""
        self._started = time.monotonic()
        assert isinstance(pl_module, AdaptedModule)
        counts = pl_module.parameter_counts()
        console = Console()
        if pl_module.projections:
            console.print(_hit_list(pl_module))
        share = counts["params/trainable"] / counts["params/total"]
        console.print(
            f"Tuning {pl_module.tuning}: {counts['params/trainable']:,} of {counts['params/total']:,} parameters "
            f"are trained ({share:.2%})."
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there is something to train: not so in a run that is resumed at its end."""
        self._has_trained = True

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the figures of training; without any, those of metrics.json stay."""
        if not self._has_trained:
            return
        assert isinstance(pl_module, AdaptedModule)
        self.values |= pl_module.parameter_counts()
        self.values["time/fit_seconds"] = round(time.monotonic() - self._started, 2)
        self.values["memory/peak_bytes"] = _peak_memory(trainer.strategy.root_device)
        callback = next((c for c in trainer.callbacks if isinstance(c, AdapterCheckpoint)), None)  # type: ignore[attr-defined]
        if callback is not None and callback.monitor and callback.best_model_score is not None:
            self.values[f"best/{callback.monitor}"] = callback.best_model_score.item()
        self._keep_metrics(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of a validation on its own."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._keep_metrics(trainer)

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the test."""
        self._keep_metrics(trainer)

    def _keep_metrics(self, trainer: L.Trainer) -> None:
        metrics = trainer.callback_metrics.items()
        self.values |= {k: v.item() for k, v in metrics if "/" in k and not k.startswith("lr-")}

    @rank_zero_only
    def report(self, run_directory: Path) -> None:
        """Print the closing table and write metrics.json, whose figures of earlier commands stay."""
        path = run_directory / "metrics.json"
        merged = {k: v if _finite(v) else None for k, v in sorted((_read_metrics(path) | self.values).items())}
        with written_whole(path) as file:
            file.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
        if not self.values:  # a prediction has said what it wrote
            return
        table = Table("Result", "", show_edge=False, title="Run", title_justify="left")
        for key, value in self.values.items():
            table.add_row(key, _readable(key, value))
        console = Console()
        console.print(table)
        console.print(f"Look inside: tensorboard --logdir {run_directory}", soft_wrap=True, markup=False)


def _read_metrics(path: Path) -> dict[str, Any]:
    """The figures of earlier commands; none if the file is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _hit_list(module: AdaptedModule) -> Table:
    """One line for each kind of projection, the numbers of its blocks folded."""
    kinds: dict[str, list[Projection]] = {}
    for projection in module.projections:
        kinds.setdefault(re.sub(r"\b\d+\b", "*", projection.name), []).append(projection)
    factors = adapted_projections(module.backbone)
    config = module.adapter
    title = f"Adapters: train {config.train}, A {config.init_a}, B {config.init_b}"
    columns = ("Projection", "Role", "Layers", "d_in → d_out", "Rank", "s")
    table = Table(*columns, title=title, title_justify="left", show_edge=False)
    for kind, projections in kinds.items():
        _, first = factors[projections[0].name]
        shape = f"{first.A.shape[1]} → {first.B.shape[0]}"
        of_kind = [factors[p.name][1] for p in projections]
        ranks, scales = _range([f.A.shape[0] for f in of_kind]), _range([f.scale for f in of_kind])
        table.add_row(kind, projections[0].role, str(len(projections)), shape, ranks, scales)
    return table


def _range(values: list[float]) -> str:
    """The smallest and the largest of some numbers, or the one that they all are."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _readable(key: str, value: float) -> str:
    if key.endswith("bytes"):
        return f"{value / 2**20:,.2f} MiB"
    if key.endswith("seconds"):
        return f"{value:,.1f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _peak_memory(device: torch.device) -> int:
    """Most bytes in use at any time: on the accelerator when training ran there, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
