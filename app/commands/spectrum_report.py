"""Page and tables of the command `spectrum`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from app.commands.finished_runs import FinishedRun, block_names, frozen_weights, runs_table, shown_runs
from app.reports.report import COLOURS, FILE, Report, figure_style, new_figure
from datamodules.errors import counted
from modules.adapters import ROLES
from modules.adapters.spectrum import product_singular_values, singular_values, summarize
from modules.analysis.combination import SIDES
from modules.analysis.spectra import intruder_cosines, intruder_counts, kept_shares, left_singular_vectors

_log = logging.getLogger(__name__)
DASHES = ("-", "--", "-.", ":")
UPDATE = "s·BA"
PICTURES = ("singular_values", "ranks", "relative_norms", "intruders", "kept_shares")
TABLES = ("runs", "spectra", "ranks", "kept_shares", "intruders")
REPORT_FILES = (FILE, *(f"{name}.png" for name in PICTURES), *(f"{name}.parquet" for name in TABLES))
THRESHOLDS = torch.linspace(0, 1, 101, dtype=torch.float64)
TABLE_THRESHOLD = 0.6
MOST_BANDS = 3  # largest number of runs with bands, which hide one another if there are more


# -------------------------------------------------------------------------------------------------------------- weights


class WeightMeasures(NamedTuple):
    """Measures that need the frozen weights.

    Args:
        norms: ‖W‖_F by projection, for each run; empty if the backbone cannot be loaded.
        cosines: Result of `intruder_cosines` by projection, for each run; empty if the backbone cannot be loaded.
        missing: Labels of the runs whose backbone cannot be loaded.
    """

    norms: list[dict[str, float]]
    cosines: list[dict[str, Tensor]]
    missing: list[str]


def measure_weights(runs: Sequence[FinishedRun], top: int) -> WeightMeasures:
    """Measure the frozen weights of runs, and intruder dimensions over them.

    Each backbone is built once for all runs over it. A backbone that cannot be built is left out with a warning.

    Args:
        runs: The runs.
        top: Number of leading singular vectors; 0 for no intruder dimensions, which needs no backbone.
    """
    measures = WeightMeasures([{} for _ in runs], [{} for _ in runs], [])
    if top == 0:
        return measures
    by_backbone: dict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        by_backbone[run.digest or str(run.source)].append(index)
    for indices in by_backbone.values():
        names = dict.fromkeys(name for index in indices for name in runs[index].updates)
        weights = frozen_weights(runs[indices[0]], list(names), [runs[index].label for index in indices])
        if weights is None:
            measures.missing.extend(runs[index].label for index in indices)
            continue
        _log.info(
            f"Decomposing {counted(len(names), 'frozen weight')}, for the intruder dimensions of "
            f"{counted(len(indices), 'run')}."
        )
        for name in names:
            left = left_singular_vectors(weights[name])
            for index in indices:
                if (update := runs[index].updates.get(name)) is not None:
                    change = update.scale * (update.b.double() @ update.a.double())
                    measures.norms[index][name] = float(weights[name].double().norm())
                    measures.cosines[index][name] = intruder_cosines(left, weights[name], change, top)
    return measures


# --------------------------------------------------------------------------------------------------------------- tables


def build_tables(
    runs: Sequence[FinishedRun], spectra: Sequence[Sequence[dict[str, Any]]], weights: WeightMeasures
) -> dict[str, pd.DataFrame]:
    """Return all numbers as tidy tables.

    Args:
        runs: The runs.
        spectra: Rows of each run's spectrum.parquet.
        weights: From `measure_weights`.

    Returns:
        `runs`; `spectra`, one row a singular value; `ranks`, one row a spectrum; `kept_shares`; `intruders`. Rows with
        `at_checkpoint` describe the factors in the checkpoint, other rows come from spectrum.parquet. The factor `s·BA`
        is the update with its scale.
    """
    values: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    intruders: list[dict[str, Any]] = []
    for run, rows, of_weights, of_vectors in zip(runs, spectra, weights.norms, weights.cosines, strict=True):
        blocks = block_names(list(run.updates))
        weight_norms = of_weights or _norms_from_spectra(run, rows)
        at_checkpoint = _checkpoint_spectra(run)
        measured = [*_scaled(run, rows), *at_checkpoint]
        for row in measured:
            name, sigma = row["projection"], torch.tensor(row["singular_values"])
            key = {"run": run.label, "step": row["step"], "at_checkpoint": row["at_checkpoint"], "projection": name}
            key |= {"block": blocks[name], "role": row["role"], "factor": row["factor"]}
            values += [{**key, "index": i, "singular_value": v} for i, v in enumerate(sigma.tolist(), 1)]
            summary = summarize(sigma)
            norm = weight_norms.get(name) if row["factor"] == UPDATE else None
            relative = None if norm is None else summary.frobenius / norm if norm else math.inf
            sizes = {"adapter_rank": len(sigma), "root_mean_square": summary.frobenius / math.sqrt(len(sigma))}
            ranks.append({**key, **sizes, **dataclasses.asdict(summary), "relative_norm": relative})
        for row in at_checkpoint:
            key = {"run": run.label, "projection": row["projection"], "block": blocks[row["projection"]]}
            key |= {"role": row["role"]}
            if row["factor"] == UPDATE:
                shares = kept_shares(torch.tensor(row["singular_values"])).tolist()
                kept += [{**key, "rank": i, "kept_share": share} for i, share in enumerate(shares, 1)]
                cosines = of_vectors.get(row["projection"], torch.empty(0)).tolist()
                intruders += [{**key, "index": i, "largest_cosine": c} for i, c in enumerate(cosines, 1)]
    keys = ["run", "projection", "block", "role"]
    return {
        "runs": runs_table(runs),
        "spectra": pd.DataFrame(values),
        "ranks": pd.DataFrame(ranks).astype({"relative_norm": float}),
        "kept_shares": pd.DataFrame(kept),
        "intruders": pd.DataFrame(intruders, columns=[*keys, "index", "largest_cosine"]),
    }


def _checkpoint_spectra(run: FinishedRun) -> list[dict[str, Any]]:
    """Return the spectra of the factors in the checkpoint, in the columns of spectrum.parquet."""
    rows = []
    for name, update in run.updates.items():
        spectra: dict[str, Tensor] = {factor: singular_values(update.factor(factor)) for factor in SIDES}
        spectra[UPDATE] = product_singular_values(update.b, update.a, update.scale)
        for factor, sigma in spectra.items():
            key = {"step": run.step, "at_checkpoint": True, "projection": name, "role": run.projections[name].role}
            rows.append({**key, "factor": factor, "singular_values": sigma.tolist()})
    return rows


def _scaled(run: FinishedRun, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of spectrum.parquet, with the rows of B·A multiplied by the scale s."""
    scaled_rows = []
    for row in rows:
        update = run.updates.get(row["projection"])
        if update is not None:
            is_update = row["factor"] == "BA"
            scaled = [update.scale * value if is_update else value for value in row["singular_values"]]
            name = UPDATE if is_update else row["factor"]
            scaled_rows.append({**row, "at_checkpoint": False, "factor": name, "singular_values": scaled})
    return scaled_rows


def _norms_from_spectra(run: FinishedRun, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return ‖W‖_F by projection, from ‖s·BA‖_F and its ratio to ‖W‖_F in spectrum.parquet."""
    norms = {}
    for row in rows:
        ratio, update = row["relative_norm"], run.updates.get(row["projection"])
        if row["factor"] == "BA" and update is not None and ratio and math.isfinite(ratio):
            norms[row["projection"]] = update.scale * math.hypot(*row["singular_values"]) / ratio
    return norms


# ----------------------------------------------------------------------------------------------------------------- page


def build_report(
    runs: Sequence[FinishedRun], tables: dict[str, pd.DataFrame], top: int, missing: Sequence[str]
) -> Report:
    """Return the page.

    Args:
        runs: The runs.
        tables: From `build_tables`.
        top: Number of leading singular vectors that may be intruders; 0 for no intruder dimensions.
        missing: Labels of the runs whose backbone cannot be loaded.
    """
    report = Report("Spectra of " + ("a run" if len(runs) == 1 else f"{len(runs)} runs"))
    labels = [run.label for run in runs]
    bands = len(runs) <= MOST_BANDS
    middle = ", and its band the middle half of the projections" if bands else ""
    report.add_paragraph(
        "An adapted weight is W + s·BA, with W frozen. This page shows how the singular values of A, B and the update "
        "s·BA grow in training, how many directions the update uses, and what the update does to W."
    )
    report.add_table("Runs", shown_runs(runs, tables["runs"]))
    report.add_table("At the checkpoint: means over projections", _summary(labels, tables))
    report.add_heading("Over training")
    report.add_figure(
        "singular_values",
        _singular_values_figure(labels, tables["ranks"]),
        "Singular values of A, B and the update s·BA over training",
        "A line is the mean over projections of the root mean square singular value"
        f"{', and its band reaches from the smallest to the largest' if bands else ''}. Look for a factor that stays "
        "flat, since it is frozen or hardly learns, and for the training step after which a line no longer rises.",
    )
    report.add_figure(
        "ranks",
        _ranks_figure(labels, tables["ranks"]),
        "Effective and stable rank of the update s·BA over training",
        f"A line is the mean over projections{middle}, and a dotted line is an adapter rank, which neither measure can "
        "exceed. Look for ranks far below their dotted line: there a smaller adapter rank may do.",
    )
    report.add_heading("At the checkpoint")
    report.add_figure(
        "kept_shares",
        _kept_figure(labels, tables["kept_shares"]),
        "Share of ‖BA‖² that a smaller rank would keep",
        "A line is the mean over projections of the share that the best approximation of each rank keeps"
        f"{middle}. Look for the rank at which a line reaches 0.9, which is dotted: ranks to its right add little.",
    )
    norms = tables["ranks"].query("at_checkpoint and factor == @UPDATE", local_dict={"UPDATE": UPDATE})
    norms = norms[np.isfinite(norms["relative_norm"])]
    if len(norms):
        report.add_figure(
            "relative_norms",
            _norms_figure([label for label in labels if label in set(norms["run"])], norms),
            "Size of the update beside the frozen weight, ‖s·BA‖ / ‖W‖, by block and role",
            "A cell is the ratio of Frobenius norms of one projection, and all panels share one scale of colours. Look "
            "for roles or depths that change most, and for ratios near 1, where the update overrules the weight.",
        )
    if len(tables["intruders"]):
        report.add_figure(
            "intruders",
            _intruders_figure(labels, tables["intruders"], top),
            f"Intruder dimensions among the {top} leading singular vectors of W + s·BA",
            "A line is the mean over projections of the number of leading left singular vectors whose largest |cos| to "
            f"all left singular vectors of W is below ε (Shuttleworth et al. 2024){middle}. Look at the left half: "
            "vectors that count there are new directions that outgrew those of W, while W has no intruders at any ε.",
        )
    for text in _left_out(runs, tables, top, missing):
        report.add_paragraph(text)
    report.add_paragraph(
        "All numbers are in the Parquet files beside this page. spectra.parquet has every singular value, "
        "ranks.parquet the measures of every spectrum, kept_shares.parquet and intruders.parquet the curves of each "
        "projection."
    )
    return report


def _left_out(
    runs: Sequence[FinishedRun], tables: dict[str, pd.DataFrame], top: int, missing: Sequence[str]
) -> list[str]:
    """Return a sentence for each part that this page lacks."""
    sentences = []
    traced = set(tables["ranks"].query("not at_checkpoint")["run"])
    if untraced := [run.label for run in runs if run.label not in traced]:
        sentences.append(f"No usable spectrum.parquet: run {', '.join(untraced)}. Only checkpoints are shown there.")
    if top == 0:
        sentences.append("Intruder dimensions were left out by --top 0.")
    if missing:
        sentences.append(f"Frozen weights not loaded: run {', '.join(missing)}. Its intruder dimensions are left out.")
    return sentences


def _summary(labels: Sequence[str], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row a run, each cell a mean over projections."""
    final = tables["ranks"].query("at_checkpoint")
    rows = []
    for label in labels:
        update = final[(final["run"] == label) & (final["factor"] == UPDATE)]
        kept = tables["kept_shares"].query("run == @label", local_dict={"label": label})
        cosines = tables["intruders"].query("run == @label", local_dict={"label": label})
        half = kept[kept["rank"] == (kept["rank"].max() + 1) // 2]["kept_share"].mean()
        intruders = (cosines["largest_cosine"] < TABLE_THRESHOLD).groupby(cosines["projection"]).sum().mean()
        relative = update["relative_norm"].replace(math.inf, math.nan).mean()
        rows.append(
            {
                "run": label,
                "σ₁ of s·BA": _number(update["largest"].mean()),
                "effective rank": _number(update["effective_rank"].mean()),
                "stable rank": _number(update["stable_rank"].mean()),
                "‖s·BA‖ / ‖W‖": _number(relative),
                "share kept at half the rank": _number(half),
                f"intruders at ε = {TABLE_THRESHOLD}": _number(intruders),
            }
        )
    return pd.DataFrame(rows)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------------- figures


def _line(axes: Any, labels: Sequence[str], index: int, mean: pd.Series[float], band: Any, **style: Any) -> None:
    """Draw a run's line. Draw its band (low, high) too, unless there are so many runs that bands hide one another."""
    style = {"marker": "o" if len(mean) == 1 else None, **style}
    dash = DASHES[index % len(DASHES)]
    axes.plot(mean.index, mean, label=labels[index], color=COLOURS[index], linestyle=dash, linewidth=1.8, **style)
    if len(labels) <= MOST_BANDS:
        axes.fill_between(mean.index, *band, color=COLOURS[index], alpha=0.15, linewidth=0)


def _quartiles(grouped: Any) -> tuple[pd.Series[float], pd.Series[float]]:
    return grouped.quantile(0.25), grouped.quantile(0.75)


def _legend(figure: Figure, axes: Any, count: int) -> None:
    """Put the names of the runs below the panels, where the names hide no line."""
    with figure_style():
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2 if count > 1 else 1, frameon=False, fontsize=9)


def _singular_values_figure(labels: Sequence[str], ranks: pd.DataFrame) -> Figure:
    figure, panels = new_figure(height=3.4 + 0.12 * len(labels), columns=3)
    for axes, factor in zip(panels, (*SIDES, UPDATE), strict=True):
        for index, label in enumerate(labels):
            chosen = _trace(ranks, label, factor)
            mean = chosen.groupby("step")[["smallest", "root_mean_square", "largest"]].mean()
            _line(axes, labels, index, mean["root_mean_square"], (mean["smallest"], mean["largest"]))
        axes.set_title(factor, loc="left")
        axes.set(xlabel="optimizer step", ylim=(0, None))
    panels[0].set_ylabel("singular value")
    _legend(figure, panels[0], len(labels))
    return figure


def _trace(ranks: pd.DataFrame, label: str, factor: str) -> pd.DataFrame:
    """Return the spectra of a run over training. Without any, return the checkpoint's spectra."""
    of_run = ranks[(ranks["run"] == label) & (ranks["factor"] == factor)]
    over_training = of_run[~of_run["at_checkpoint"]]
    return (over_training if len(over_training) else of_run).fillna({"step": 0})


def _ranks_figure(labels: Sequence[str], ranks: pd.DataFrame) -> Figure:
    figure, panels = new_figure(height=3.4 + 0.12 * len(labels), columns=2)
    for axes, quantity in zip(panels, ("effective_rank", "stable_rank"), strict=True):
        for index, label in enumerate(labels):
            chosen = _trace(ranks, label, UPDATE)
            grouped = chosen[chosen["largest"] > 0].groupby("step")[quantity]
            _line(axes, labels, index, grouped.mean(), _quartiles(grouped))
        for rank in sorted(set(ranks["adapter_rank"])):
            axes.axhline(rank, color="#444444", linestyle=":", linewidth=1)
        axes.set_title(quantity.replace("_", " "), loc="left")
        axes.set(xlabel="optimizer step", ylim=(0, None))
    panels[0].set_ylabel("rank")
    _legend(figure, panels[0], len(labels))
    return figure


def _kept_figure(labels: Sequence[str], kept: pd.DataFrame) -> Figure:
    figure, (axes,) = new_figure(height=3.6 + 0.12 * len(labels))
    for index, label in enumerate(labels):
        grouped = kept[kept["run"] == label].dropna().groupby("rank")["kept_share"]
        _line(axes, labels, index, grouped.mean(), _quartiles(grouped), marker="o", markersize=4)
    axes.axhline(0.9, color="#444444", linestyle=":", linewidth=1)
    axes.set(xlabel="rank kept", ylabel="share of ‖BA‖²", ylim=(0, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes, len(labels))
    return figure


def _intruders_figure(labels: Sequence[str], intruders: pd.DataFrame, top: int) -> Figure:
    figure, (axes,) = new_figure(height=3.6 + 0.12 * len(labels))
    for index, label in enumerate(labels):
        of_run = intruders[intruders["run"] == label]
        if of_run.empty:
            continue
        counts = np.array(
            [
                intruder_counts(torch.tensor(cosines.to_numpy()), THRESHOLDS).numpy()
                for _, cosines in of_run.groupby("projection")["largest_cosine"]
            ]
        )
        mean = pd.Series(counts.mean(0), THRESHOLDS.numpy())
        _line(axes, labels, index, mean, np.quantile(counts, (0.25, 0.75), axis=0))
    axes.set(xlabel="threshold ε of |cos|", ylabel=f"intruders among {top} vectors", xlim=(0, 1), ylim=(0, top * 1.02))
    _legend(figure, axes, len(labels))
    return figure


def _norms_figure(labels: Sequence[str], norms: pd.DataFrame) -> Figure:
    """Draw a heat map a run, roles by blocks."""
    blocks = list(dict.fromkeys(norms["block"]))
    roles = [role for role in (*ROLES, "other") if role in set(norms["role"])]
    columns = min(len(labels), 2)
    lines = -(-len(labels) // columns)
    height = 0.9 + lines * (0.75 + 0.3 * len(roles))
    figure, panels = new_figure(height=height, rows=lines, columns=columns, sharex=True, sharey=True)
    largest = float(norms["relative_norm"].max())
    for axes, label in zip(panels, labels, strict=False):
        of_run = norms[norms["run"] == label]
        grid = of_run.pivot_table(index="role", columns="block", values="relative_norm").reindex(roles, columns=blocks)
        axes.imshow(grid.to_numpy(), cmap="viridis", vmin=0, vmax=largest, aspect="auto")
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_yticks(range(len(roles)), roles)
        axes.set_xticks(range(len(blocks)), blocks, rotation=90 if max(map(len, blocks)) > 2 else 0)
        axes.grid(False)
    for axes in panels[len(labels) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(labels) - columns) : len(labels)]:
        axes.set_xlabel("block")
        axes.xaxis.set_tick_params(labelbottom=True)
    with figure_style():
        figure.colorbar(panels[0].images[0], ax=panels, label="‖s·BA‖ / ‖W‖", shrink=0.9)
    return figure
