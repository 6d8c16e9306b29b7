"""Log the singular values of A, B and B·A during training."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from app.reports.heat_map import HeatMap
from app.run.spectrum_file import FILE, DamagedSpectra, read_spectra, write_spectra
from datamodules.errors import CallbackError
from modules.adapters import ROLES, AdaptedLinear, LowRankFactors, adapted_projections
from modules.adapters.spectrum import product_singular_values, singular_values, summarize, triangular_factor
from modules.base import AdaptedModule

_log = logging.getLogger(__name__)
ROLE_ORDER = {role: i for i, role in enumerate(ROLES)}
Board = Any  # torch's SummaryWriter: to name it would import TensorBoard, and --help needs none, nor pyarrow
QUANTITIES = ("largest", "smallest", "effective_rank", "stable_rank", "frobenius")


class AdapterSpectrum(L.Callback):
    """Log the spectra at the start of training, at intervals, and at its end.

    - Every logger gets the mean over layers of each quantity: `spectrum/<role>/<factor>/<quantity>`.
    - TensorBoard also gets a histogram of each layer (`spectrum_layers/`), a heat map of layers × index for each factor
      (`spectrum_map/`), and a layout of custom scalars that opens grouped.
    - `spectrum.parquet` in the run directory gets all singular values.

    B·A is without the scale s. A frozen factor is measured once. `relative_norm` is ‖sBA‖_F / ‖W‖_F. It is 0 for
    B·A = 0, and infinite for any other update of W = 0. Means over layers leave infinite ratios out.

    Args:
        every_n_epochs: Interval in epochs, at least 1; None measures at the start, by steps, and at the end only.
        every_n_steps: Interval in optimizer steps, at least 1, besides; None for none.
    """

    def __init__(self, every_n_epochs: int | None = 1, every_n_steps: int | None = None) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise CallbackError(f"spectrum.{name}: {value} must be 1 or more, or null.")
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.seconds = 0.0
        self._rows: list[dict[str, Any]] = []
        self._frozen: dict[tuple[str, str], Tensor] = {}
        self._weight_norms: dict[str, float] = {}
        self._maps: dict[str, HeatMap] = {}
        self._last_step = -1
        self._warned_of_zero_weights = False

    # -------------------------------------------------------------------------------------------------- when

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Measure weights before they are sharded: afterwards rank zero has only its share of them."""
        if stage == "fit" and trainer.is_global_zero and _adapted(pl_module):
            assert isinstance(pl_module, AdaptedModule)
            if pl_module.shard_frozen:
                for name, (layer, factors) in adapted_projections(pl_module.backbone).items():
                    self._weight_norm(name, layer, factors)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the start, or on resume continue the file from the step of the checkpoint."""
        if not _adapted(pl_module) or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / FILE
        if trainer.global_step > 0 and path.is_file():
            epochs = trainer.fit_loop.epoch_progress.current
            # in mid-epoch the last spectrum may belong to a stop, which an uninterrupted run does not have
            first_new = trainer.global_step + (epochs.ready == epochs.processed)  # type: ignore[attr-defined]
            try:
                self._rows = [row for row in read_spectra(path) if row["step"] < first_new]
            except DamagedSpectra as error:
                _log.warning(f"{error} Its spectra of earlier steps are lost.")
            self._last_step = max((row["step"] for row in self._rows), default=-1)
            if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
                self._measure(trainer, pl_module)
            return
        for board in _boards(trainer):
            board.add_custom_scalars(_layout(pl_module))
        self._measure(trainer, pl_module)
        self._write(trainer)  # now, for a run that is cut off in its first epoch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure at intervals of steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure at intervals of epochs. Lightning calls this also when it stops in mid-epoch."""
        over = trainer.is_last_batch
        if over and self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the end."""
        self._measure(trainer, pl_module)
        self._write(trainer)
        if trainer.is_global_zero and self._rows:
            trainer.callback_metrics["time/spectrum_seconds"] = torch.tensor(self.seconds)

    # -------------------------------------------------------------------------------------------------- what

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compute and log one set of spectra, on rank zero, once a step."""
        step = trainer.global_step
        if not trainer.is_global_zero or not _adapted(module) or step == self._last_step:
            return
        start = time.perf_counter()
        self._last_step = step
        assert isinstance(module, AdaptedModule)
        module.check_weights()
        fresh: set[str] = set()  # factors that are measured now, since they were not measured before or are trained
        rows: list[dict[str, Any]] = []
        for name, (layer, factors) in adapted_projections(module.backbone).items():
            r_a, r_b = (self._triangular(name, factor, factors, fresh) for factor in ("A", "B"))
            spectra = {"A": singular_values(r_a), "B": singular_values(r_b), "BA": product_singular_values(r_b, r_a.T)}
            ratio = _ratio(factors.scale * float(spectra["BA"].norm()), self._weight_norm(name, layer, factors))
            for factor, sigma in spectra.items():
                row = {"step": step, "projection": name, "role": factors.projection.role, "factor": factor}
                rows.append(
                    row | {"singular_values": sigma.tolist(), "relative_norm": ratio if factor == "BA" else None}
                )
        self._rows += rows
        self._warn_of_zero_weights([row["projection"] for row in rows if row["relative_norm"] == math.inf])
        scalars = _scalars(rows)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
        for board in _boards(trainer):
            self._draw(board, rows, fresh | {"BA"}, step)
        self.seconds += time.perf_counter() - start

    def _triangular(self, name: str, factor: str, factors: LowRankFactors, fresh: set[str]) -> Tensor:
        """Return R_A or R_B, (r, r) on the CPU; for a frozen factor, the one of the first time."""
        if (name, factor) in self._frozen:
            return self._frozen[name, factor]
        tensor: Tensor = getattr(factors, factor)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on matrices this small, threads only wait for one another
        try:
            r = triangular_factor((tensor.T if factor == "A" else tensor).cpu())
        finally:
            torch.set_num_threads(threads)
        fresh.add(factor)
        if factor in factors.named_factors(trained=False):
            self._frozen[name, factor] = r
        return r

    def _warn_of_zero_weights(self, names: list[str]) -> None:
        """Warn once of projections whose ratio is infinite."""
        if names and not self._warned_of_zero_weights:
            self._warned_of_zero_weights = True
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            _log.warning(
                f"The frozen weight of {len(names)} adapted projections is zero ({listed}). Their relative_norm is "
                f"infinite in {FILE}; the logged means leave them out."
            )

    @torch.no_grad()
    def _weight_norm(self, name: str, layer: AdaptedLinear, factors: LowRankFactors) -> float:
        if name not in self._weight_norms:
            self._weight_norms[name] = float(layer.frozen.dense()[factors.projection.rows].float().norm())
        return self._weight_norms[name]

    # ------------------------------------------------------------------------------------------------- where

    def _draw(self, board: Board, rows: list[dict[str, Any]], factors: set[str], step: int) -> None:
        """Draw histograms and heat maps of the given factors."""
        for factor in sorted(factors):
            # by role and then by depth, so that a role's change with depth shows as a band
            chosen = sorted((r for r in rows if r["factor"] == factor), key=lambda r: ROLE_ORDER.get(r["role"], 99))
            for row in chosen:
                # without the last digits' noise, which would fill the histogram of an orthonormal factor; the number of
                # bins depends on the adapter rank alone ("auto" makes millions for one large value among equal ones)
                rounded = torch.tensor(row["singular_values"]).round(decimals=4)
                board.add_histogram(f"spectrum_layers/{row['projection']}/{factor}", rounded, step, bins="sturges")
            if factor not in self._maps:
                self._maps[factor] = HeatMap([row["projection"] for row in chosen])
            title = f"Singular values of {factor}, step {step}"
            longest = max(len(row["singular_values"]) for row in chosen)
            # the picture is a rectangle: zeros pad the rows of projections of a lower adapter rank
            values = [row["singular_values"] + [0.0] * (longest - len(row["singular_values"])) for row in chosen]
            image = self._maps[factor].render(values, title)
            board.add_image(f"spectrum_map/{factor}", image, step, dataformats="HWC")

    def _write(self, trainer: L.Trainer) -> None:
        """Write all rows to the file."""
        if not trainer.is_global_zero or not self._rows:
            return
        start = time.perf_counter()
        write_spectra(Path(trainer.default_root_dir) / FILE, self._rows)
        self.seconds += time.perf_counter() - start


def _ratio(update: float, weight: float) -> float:
    """Return ‖update‖ / ‖weight‖, also where the weight is zero."""
    if weight == 0:
        return math.inf if update > 0 else 0.0
    return update / weight


def _adapted(module: L.LightningModule) -> bool:
    return isinstance(module, AdaptedModule) and module.tuning == "adapter"


def _boards(trainer: L.Trainer) -> list[Board]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _scalars(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return means over layers, by role, factor and quantity."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        tag = f"spectrum/{row['role']}/{row['factor']}"
        for quantity, value in dataclasses.asdict(summarize(torch.tensor(row["singular_values"]))).items():
            values[f"{tag}/{quantity}"].append(value)
        if row["relative_norm"] is not None and math.isfinite(row["relative_norm"]):
            values[f"{tag}/relative_norm"].append(row["relative_norm"])
    return {tag: sum(v) / len(v) for tag, v in values.items()}


def _layout(module: L.LightningModule) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of custom scalars: a group a factor, a chart a quantity, a line a role."""
    assert isinstance(module, AdaptedModule)
    roles = list(dict.fromkeys(p.role for p in module.projections))

    def charts(factor: str, quantities: tuple[str, ...]) -> dict[str, list[Any]]:
        tags = {q: [f"spectrum/{role}/{factor}/{q}" for role in roles] for q in quantities}
        return {q.replace("_", " "): ["Multiline", lines] for q, lines in tags.items()}

    states = {"A": module.adapter.trains_a, "B": module.adapter.trains_b}
    trained = {f"{f}, trained": charts(f, QUANTITIES) for f, state in states.items() if state}
    frozen = {f"{f}, frozen": charts(f, QUANTITIES) for f, state in states.items() if not state}
    return {
        "Loss": {"loss": ["Multiline", ["train/loss", "val/loss"]]},
        "BA, the update": charts("BA", ("relative_norm", *QUANTITIES)),
        **trained,
        **frozen,
    }
