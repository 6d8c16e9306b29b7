"""Log the singular values of A, B and B·A during training."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, TypeGuard

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from app.reports.heat_map import HeatMap
from app.run.logger import log_picture, log_text
from app.run.spectrum_file import FILE, DamagedSpectra, read_spectra, write_spectra
from datamodules.errors import CallbackError, counted
from modules.adapters import ROLES, AdaptedLinear, Chain, LowRankFactors, adapted_projections
from modules.adapters.spectrum import product_singular_values, singular_values, summarize, triangular_factor
from modules.base import AdaptedModule

_log = logging.getLogger(__name__)
ROLE_ORDER = {role: i for i, role in enumerate(ROLES)}
MOST_SCALARS = 40  # largest number of scalars with detail `roles`
# The most informative quantities come first. Means over all projections have all quantities. Means by role have as many
# of the first quantities as MOST_SCALARS allows.
QUANTITIES = (
    *("BA/relative_norm", "B/largest", "A/largest", "BA/effective_rank", "BA/largest"),
    *("B/effective_rank", "A/effective_rank", "B/smallest", "A/smallest", "B/stable_rank", "A/stable_rank"),
    *("BA/stable_rank", "B/frobenius", "A/frobenius", "BA/frobenius", "BA/smallest"),
    *("sum/relative_norm", "sum/largest", "sum/effective_rank"),
)
BY_ROLE = QUANTITIES[:4]  # quantities with charts by role
Board = Any  # torch's SummaryWriter, whose import would also import TensorBoard
Detail = Literal["roles", "layers", "off", False]  # YAML reads a bare off as false


class AdapterSpectrum(L.Callback):
    """Log the spectra at the start of training, at intervals, and at the end of training.

    - Every logger gets each quantity's mean over all projections, `spectrum/<factor>/<quantity>`, and over the
      projections of a role, `spectrum/<role>/<factor>/<quantity>`. With detail `roles`, these are at most 40 scalars.
    - Loggers with pictures get heat maps of layers × index: the singular values (`spectrum_map/<factor>`), and their
      ratios to the layer's largest singular value (`spectrum_ratio/<factor>`). For other loggers, PNG files in the run
      directory hold the newest heat maps.
    - TensorBoard also gets a histogram of B·A for each role (`spectrum_roles/`), and a layout of custom scalars.
    - `spectrum.parquet` in the run directory gets all singular values.

    Scalars, histograms and the file have B·A without the scale s; the heat maps show s·B·A. A frozen factor is measured
    once and logged as a text. `relative_norm` is ‖sBA‖_F / ‖W‖_F: 0 for B·A = 0, and infinite for any other update of
    W = 0. Means leave infinite values out.

    In a chain of adapters, A, B and BA are of the current link. From the second link on, `sum` is the sum of B·A over
    all links, which has up to r times the links singular values.

    Args:
        every_n_epochs: Interval in epochs, at least 1; None for no measurements by epoch.
        every_n_steps: Further interval in optimizer steps, at least 1; None for no measurements by step.
        detail: `roles` logs means by role. `layers` logs all quantities by role, the scalars of each layer, and
            histograms by layer in place of histograms by role. `off` writes only the file.
    """

    def __init__(
        self, every_n_epochs: int | None = 1, every_n_steps: int | None = None, detail: Detail = "roles"
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise CallbackError(f"spectrum.{name}: {value} must be 1 or more, or null.")
        self.every_n_epochs, self.every_n_steps, self.detail = every_n_epochs, every_n_steps, detail or "off"
        self.seconds = 0.0
        self._rows: list[dict[str, Any]] = []
        self._frozen: dict[tuple[str, str], Tensor] = {}
        self._links = 0  # number of merged links at the last measurement
        self._weight_norms: dict[str, float] = {}
        self._maps: tuple[HeatMap, HeatMap] | None = None
        self._last_step = -1
        self._warned_of_zero_weights = False

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Measure the norms of the frozen weights before sharding: afterwards rank zero has only its share."""
        if stage == "fit" and trainer.is_global_zero and _adapted(pl_module) and pl_module.shard_frozen:
            for name, (layer, factors) in adapted_projections(pl_module.backbone).items():
                self._weight_norm(name, layer, factors, pl_module.chain)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the initial factors. A resumed run continues the file from the checkpoint's step instead."""
        if not _adapted(pl_module) or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / FILE
        if trainer.global_step > 0 and path.is_file():
            epochs = trainer.fit_loop.epoch_progress.current
            # in mid-epoch, the last spectrum may have been measured only because the run stopped
            first_new = trainer.global_step + (epochs.ready == epochs.processed)  # type: ignore[attr-defined]
            try:
                self._rows = [row for row in read_spectra(path) if row["step"] < first_new]
            except DamagedSpectra as error:
                _log.warning(f"{error} The spectra of earlier steps are lost.")
            self._last_step = max((row["step"] for row in self._rows), default=-1)
            if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
                self._measure(trainer, pl_module)
            return
        self._measure(trainer, pl_module)
        if self.detail != "off":
            for board in _boards(trainer):
                board.add_custom_scalars(_layout())
            for factor in _factors(pl_module, trained=False):
                text = _description(factor, self._rows, is_chain=pl_module.link_epochs is not None)
                log_text(trainer, f"spectrum/{factor}", text)
        self._write(trainer)  # a run may be killed in its first epoch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure at intervals of steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure at intervals of epochs. Lightning also calls this hook at a stop in mid-epoch."""
        is_epoch_over = trainer.is_last_batch
        if is_epoch_over and self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final factors."""
        self._measure(trainer, pl_module)
        self._write(trainer)
        if trainer.is_global_zero and self._rows:
            trainer.callback_metrics["time/spectrum_seconds"] = torch.tensor(self.seconds)

    # ------------------------------------------------------------------------------------------- measurement

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compute and log the spectra, on rank zero, at most once for each step."""
        step = trainer.global_step
        if not trainer.is_global_zero or not _adapted(module) or step == self._last_step:
            return
        start = time.perf_counter()
        self._last_step = step
        module.check_weights()
        rows: list[dict[str, Any]] = []
        if len(module.chain.links) != self._links:  # the frozen factor is another
            self._frozen, self._links = {}, len(module.chain.links)
        for name, (layer, factors) in adapted_projections(module.backbone).items():
            r_a, r_b = (self._triangular(name, factor, factors) for factor in ("A", "B"))
            spectra = {"A": singular_values(r_a), "B": singular_values(r_b), "BA": product_singular_values(r_b, r_a.T)}
            if self._links:
                spectra["sum"] = _sum_of_links(factors, module.chain)
            norm = self._weight_norm(name, layer, factors, module.chain)
            for factor, sigma in spectra.items():
                is_update = factor in ("BA", "sum")
                ratio = _ratio(factors.scale * float(sigma.norm()), norm) if is_update else None
                row = {"step": step, "projection": name, "role": factors.projection.role, "factor": factor}
                row |= {"singular_values": sigma.tolist(), "relative_norm": ratio}
                rows.append(row | {"scale": factors.scale if is_update else 1.0})
        self._rows += rows
        zero = [row["projection"] for row in rows if row["relative_norm"] == math.inf]
        self._warn_of_zero_weights(list(dict.fromkeys(zero)))
        if self.detail != "off":
            trained = [*_factors(module, trained=True), "sum"]
            self._log_step(trainer, [row for row in rows if row["factor"] in trained])
        self.seconds += time.perf_counter() - start

    def _triangular(self, name: str, factor: str, factors: LowRankFactors) -> Tensor:
        """Return R_A or R_B, (r, r) on the CPU. For a frozen factor, R is computed once."""
        if (name, factor) in self._frozen:
            return self._frozen[name, factor]
        tensor: Tensor = getattr(factors, factor)
        r = _triangular_factor((tensor.T if factor == "A" else tensor).cpu())
        if factor in factors.named_factors(trained=False):
            self._frozen[name, factor] = r
        return r

    def _warn_of_zero_weights(self, names: list[str]) -> None:
        """Warn once of projections whose relative norm is infinite."""
        if names and not self._warned_of_zero_weights:
            self._warned_of_zero_weights = True
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            _log.warning(
                f"The frozen weight of {counted(len(names), 'adapted projection')} is zero ({listed}). "
                f"relative_norm is infinite there in {FILE}; the logged means leave infinite values out."
            )

    @torch.no_grad()
    def _weight_norm(self, name: str, layer: AdaptedLinear, factors: LowRankFactors, chain: Chain) -> float:
        if name not in self._weight_norms:
            weight = chain.pretrained(factors.projection.layer, layer)
            self._weight_norms[name] = float(weight[factors.projection.rows].float().norm())
        return self._weight_norms[name]

    # ----------------------------------------------------------------------------------------------- logging

    def _log_step(self, trainer: L.Trainer, rows: list[dict[str, Any]]) -> None:
        """Log scalars, heat maps and histograms of one step, from the rows of B·A and of trained factors."""
        scalars = _scalars(rows, self.detail == "layers")
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        for board in _boards(trainer):
            for name, values in _samples(rows, self.detail == "layers").items():
                if not any(values):  # TensorBoard draws zeros as a block from -0.5 to 0.5
                    continue
                # Rounding removes numerical noise, which would fill the histogram of an orthonormal factor. "sturges"
                # sets the number of bins by the adapter rank; "auto" makes millions of bins for a single outlier.
                rounded = torch.tensor(values).round(decimals=4)
                board.add_histogram(name, rounded, trainer.global_step, bins="sturges")
        # the heat maps have a fixed width, and a sum grows with each link
        for factor in dict.fromkeys(row["factor"] for row in rows if row["factor"] != "sum") if trainer.loggers else ():
            self._draw(trainer, factor, [row for row in rows if row["factor"] == factor])

    def _draw(self, trainer: L.Trainer, factor: str, rows: list[dict[str, Any]]) -> None:
        """Draw the heat maps of a factor."""
        # by role and then by depth, so that a role's change with depth shows as a band
        rows = sorted(rows, key=lambda row: ROLE_ORDER.get(row["role"], len(ROLES)))
        if self._maps is None:
            roles = [row["role"] for row in rows]
            self._maps = HeatMap(roles), HeatMap(roles, True)
        # the picture is a rectangle: zeros pad the rows of projections of a lower adapter rank
        values = np.zeros((len(rows), max(len(row["singular_values"]) for row in rows)))
        for padded, row in zip(values, rows, strict=True):
            padded[: len(row["singular_values"])] = row["singular_values"]
            padded *= row["scale"]
        largest = values[:, :1]
        name = "s·BA" if factor == "BA" else factor
        titles = (f"{name}, largest {largest.max():.3g}", f"{name} over each layer's largest")
        for chart, kind, data, title in zip(
            self._maps, ("map", "ratio"), (values, values / np.where(largest > 0, largest, 1)), titles, strict=True
        ):
            picture = chart.render(data, f"{title}, step {trainer.global_step}")
            log_picture(trainer, f"spectrum_{kind}/{factor}", picture, f"spectrum_{kind}_{factor}.png")

    def _write(self, trainer: L.Trainer) -> None:
        """Write all rows to the file."""
        if not trainer.is_global_zero or not self._rows:
            return
        start = time.perf_counter()
        write_spectra(Path(trainer.default_root_dir) / FILE, self._rows)
        self.seconds += time.perf_counter() - start


def _triangular_factor(tall: Tensor) -> Tensor:
    """Return R of a matrix on the CPU. On matrices this small, threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return triangular_factor(tall)
    finally:
        torch.set_num_threads(threads)


def _sum_of_links(factors: LowRankFactors, chain: Chain) -> Tensor:
    """Return the singular values of Σ Bᵢ·Aᵢ over all links, from the stacked factors."""
    stem = f"{factors.projection.layer}.adapters.{factors.projection.role}"
    a = torch.cat([*(link[f"{stem}.A"] for link in chain.links), factors.A.detach().cpu()])
    b = torch.cat([*(link[f"{stem}.B"] for link in chain.links), factors.B.detach().cpu()], dim=1)
    return torch.linalg.svdvals(_triangular_factor(b) @ _triangular_factor(a.T).T)


def _ratio(update: float, weight: float) -> float:
    """Return ‖update‖ / ‖weight‖, also where the weight is zero."""
    if weight == 0:
        return math.inf if update > 0 else 0.0
    return update / weight


def _adapted(module: L.LightningModule) -> TypeGuard[AdaptedModule]:
    return isinstance(module, AdaptedModule) and module.tuning == "adapter"


def _boards(trainer: L.Trainer) -> list[Board]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _factors(module: AdaptedModule, trained: bool) -> list[str]:
    """Return the names of the trained factors and B·A, or the names of the frozen factors."""
    states = {"BA": True, "B": module.adapter.trains_b, "A": module.adapter.trains_a}
    return [factor for factor, state in states.items() if state == trained]


def _summary(row: dict[str, Any]) -> dict[str, float]:
    """Return the quantities of one spectrum, by factor and quantity."""
    values = dataclasses.asdict(summarize(torch.tensor(row["singular_values"])))
    if row["relative_norm"] is not None and math.isfinite(row["relative_norm"]):
        values["relative_norm"] = row["relative_norm"]
    return {f"{row['factor']}/{quantity}": value for quantity, value in values.items()}


def _scalars(rows: list[dict[str, Any]], of_layers: bool) -> dict[str, float]:
    """Return means over all projections and by role; with `of_layers`, also the values of each layer."""
    quantities = [name for name in QUANTITIES if name.partition("/")[0] in {row["factor"] for row in rows}]
    by_role = (MOST_SCALARS - len(quantities)) // len({row["role"] for row in rows})
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        summary = _summary(row)
        for i, name in enumerate(quantities):
            if name in summary:
                values[f"spectrum/{name}"].append(summary[name])
                if of_layers or i < by_role:
                    values[f"spectrum/{row['role']}/{name}"].append(summary[name])
                if of_layers:
                    values[f"spectrum_layers/{row['projection']}/{name}"].append(summary[name])
    return {tag: sum(v) / len(v) for tag, v in values.items()}


def _samples(rows: list[dict[str, Any]], of_layers: bool) -> dict[str, list[float]]:
    """Return the singular values of each histogram: B·A by role, or each factor of each layer."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if of_layers:
            values[f"spectrum_layers/{row['projection']}/{row['factor']}"] += row["singular_values"]
        elif row["factor"] == "BA":
            values[f"spectrum_roles/{row['role']}/BA"] += row["singular_values"]
    return values


def _description(factor: str, rows: list[dict[str, Any]], is_chain: bool) -> str:
    """Return a table of a frozen factor's means by role, in Markdown."""
    rows = [row for row in rows if row["factor"] == factor]
    means = _scalars(rows, of_layers=True)
    quantities = [name.partition("/")[2] for name in QUANTITIES if name.startswith(f"{factor}/")]
    table = [["role", *(name.replace("_", " ") for name in quantities)], ["---"] * (1 + len(quantities))]
    for role in dict.fromkeys(row["role"] for row in rows):
        table.append([role, *(f"{means[f'spectrum/{role}/{factor}/{name}']:.4g}" for name in quantities)])
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    frozen = "is frozen within a link of the chain" if is_chain else "is frozen"
    note = "The first link's means" if is_chain else "Its singular values do not change. Means"
    return f"{factor} {frozen}. {note} over the layers of a role:\n\n{lines}"


def _layout() -> dict[str, dict[str, list[Any]]]:
    """Return the layout of custom scalars: charts with one line a run, and charts with a line for each role below.

    TensorBoard merges the layouts of the runs that it shows, so all runs have the same layout.
    """
    layout: dict[str, dict[str, list[Any]]] = {"Loss": {"loss": ["Multiline", ["train/loss", "val/loss"]]}}
    for title, roles, quantities in (("{}", "", QUANTITIES), ("{} by role", "[^/]+/", BY_ROLE)):
        for factor in ("BA", "B", "A"):
            names = [name for name in quantities if name.startswith(f"{factor}/")]
            layout[title.format(factor)] = {
                name.partition("/")[2].replace("_", " "): ["Multiline", [f"spectrum/{roles}{name}$"]] for name in names
            }
    return layout
