"""Tables and pictures of the closed forms at a recipe's projections."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from app.commands.moments import Measurement
from app.config.program_files import program_command
from app.reports.report import Report, new_figure
from datamodules.atomic import atomic_write
from datamodules.errors import counted
from modules.adapters import ROLES, adapted_projections
from modules.adapters.roles import block_of
from modules.analysis.theory import DRAWS, Trained, generalisation_bound, theory_of

_log = logging.getLogger(__name__)
SHARES, PROJECTIONS = "theory.parquet", "projections.parquet"
LARGEST_RANK = 64
# Okabe and Ito's colours, each with a marker, so that no meaning depends on colour alone
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"), ("#999999", "*"),
)  # fmt: skip
BITS, SIGMA = 32, 0.5  # bits of a float32 factor; sigma of a loss in [0, 1]


@dataclass(frozen=True)
class Analysis:
    """Closed forms of all projections of a recipe.

    Args:
        measured: The measurement that the closed forms use.
        projections: A row for each projection.
        shares: A row for each projection, trained factor, target, weighting of outputs and rank.
    """

    measured: Measurement
    projections: pd.DataFrame
    shares: pd.DataFrame

    def at_own_rank(self) -> pd.DataFrame:
        """Return the rows of `shares` at the rank that the recipe gives each projection."""
        ranks = self.projections.set_index("projection")["adapter_rank"]
        return self.shares[self.shares["rank"] == self.shares["projection"].map(ranks)]


def analyse(measured: Measurement) -> Analysis:
    """Compute the closed forms at every projection."""
    rows: list[dict[str, object]] = []
    shares: list[pd.DataFrame] = []
    for name, (layer, factors) in adapted_projections(measured.module.backbone).items():
        moments, projection = measured.moments[name], factors.projection
        d_in, d_out = layer.in_features, projection.stop - projection.start
        largest = min(LARGEST_RANK, d_in, d_out)
        theory = theory_of(moments, largest)
        block = block_of(projection.layer)
        identity = {
            "projection": name,
            "role": projection.role,
            "stack": block[0] if block else "",
            "block": block[1] if block else -1,
            "d_in": d_in,
            "d_out": d_out,
        }
        rows.append(
            identity
            | {
                "adapter_rank": factors.A.shape[0],
                "tokens": moments.tokens,
                "idle_tokens": moments.idle,
                "input_energy": float(theory.eigenvalues.sum()),
                "input_rank": theory.input_rank,
                "gradient_rank": theory.gradient_rank,
                "explained": theory.explained,
                "explained_by_chance": theory.explained_by_chance,
                "eigenvalues": theory.eigenvalues.numpy(),
            }
        )
        for f in theory.forecasts:
            columns = {"trained": f.trained, "target": f.target, "outputs": f.outputs, "removable": f.removable}
            values = {"share": f.share.mean, "low": f.share.low, "high": f.share.high}
            table = {"rank": np.arange(1, largest + 1), **{key: value.numpy() for key, value in values.items()}}
            shares.append(pd.DataFrame(table).assign(**identity, **columns))
    table = pd.DataFrame(rows)
    singular = table[table["tokens"] < table["d_in"]]
    if len(singular):
        first = singular.iloc[0]
        _log.warning(
            f"{len(singular)} of {counted(len(table), 'projection')} {'has' if len(singular) == 1 else 'have'} fewer "
            f"tokens that reach the loss than inputs, such as {first['projection']} with {first['tokens']} tokens and "
            f"{first['d_in']} inputs. Their second moment is singular, and their least-squares target fits these "
            "batches only. Raise --batches."
        )
    return Analysis(measured, table, pd.concat(shares, ignore_index=True))


# --------------------------------------------------------------------------------------------------------------- tables


def network_shares(analysis: Analysis) -> pd.DataFrame:
    """Return the share of the whole network's removable loss, by trained factor, target and weighting of outputs.

    Every projection counts by its own removable loss, at its own rank.
    """
    rows = analysis.at_own_rank()
    removed = rows.assign(removed=rows["share"] * rows["removable"])
    sums = removed.groupby(["outputs", "target", "trained"], sort=False)[["removed", "removable"]].sum()
    return (sums["removed"] / sums["removable"]).unstack("trained")[["B", "A"]].reset_index()


def role_shares(analysis: Analysis) -> pd.DataFrame:
    """Return the mean share over the projections of a role at the recipe's rank."""
    rows = analysis.at_own_rank()
    means = rows.groupby(["role", "target", "outputs", "trained"], sort=False)["share"].mean()
    columns = {("equal", "B"): "B", ("equal", "A"): "A", ("gradients", "B"): "B by F", ("gradients", "A"): "A by F"}
    wide = means.unstack(["outputs", "trained"])[list(columns)]
    return wide.set_axis(list(columns.values()), axis=1).reset_index()


def bounds(analysis: Analysis) -> pd.DataFrame:
    """Return the generalisation bound for each trained factor, at the recipe's rank and at twice that rank."""
    table = analysis.projections
    rows = []
    for factor in (1, 2):
        shapes = list(zip(factor * table["adapter_rank"], table["d_in"], table["d_out"], strict=True))
        trained: Trained
        for trained in get_args(Trained):
            numbers = sum(r * (i * (trained != "B") + o * (trained != "A")) for r, i, o in shapes)
            bound = generalisation_bound(shapes, trained, analysis.measured.samples, BITS, SIGMA)
            rank = "the recipe's" if factor == 1 else "twice the recipe's"
            rows.append({"trained": trained, "rank": rank, "trained numbers": numbers, "bound": bound})
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------------------- figures


def _roles(table: pd.DataFrame) -> list[str]:
    return [role for role in (*ROLES, "other") if role in set(table["role"])]


def _style(role: str) -> dict[str, Any]:
    color, marker = STYLES[(*ROLES, "other").index(role) % len(STYLES)]  # later roles take the first styles again
    return {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.4, "label": role}


def _panels(titles: list[str], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure, axes = new_figure(9.0, 4.2, columns=len(titles), sharey=sharey)
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize="medium", loc="left")
    return figure, axes


def _plain_ticks(axis: Axis) -> None:
    """Write the powers of ten of a logarithmic axis as numbers: reports draw no mathematical text."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def spectrum_figure(analysis: Analysis) -> Figure:
    """Draw the eigenvalues of Σ, divided by the largest: for each role the median over its projections."""
    figure, (axes,) = _panels(["Eigenvalues of the inputs' second moment, largest = 1"])
    for role, rows in analysis.projections.groupby("role", sort=False):
        for width, same in rows.groupby("d_in"):
            spectra = np.stack([values / values[0] for values in same["eigenvalues"]])
            index = np.unique(np.geomspace(1, width, 24).astype(int))
            axes.plot(index, np.median(spectra, 0)[index - 1], **_style(str(role)))
    index = np.array([1, analysis.projections["d_in"].max()])
    axes.plot(index, 1 / index, color="#666666", linestyle=":", label="1/i")
    axes.set(xscale="log", yscale="log", xlabel="index i of the eigenvalue", ylabel="λ_i / λ_1", ylim=(1e-7, 1.5))
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.legend()
    return figure


PANELS = {
    "B over a random A\nleast-squares target": ("B", "least squares"),
    "B over a random A\ngradient-step target": ("B", "gradient step"),
    "A over a random B\neither target": ("A", "least squares"),
}


def shares_figure(analysis: Analysis) -> Figure:
    """Draw the mean share over the projections of a role against the rank."""
    figure, panels = _panels(list(PANELS), sharey=True)
    rows = analysis.shares[analysis.shares["outputs"] == "equal"]
    for axes, (trained, target) in zip(panels, PANELS.values(), strict=True):
        chosen = rows[(rows["trained"] == trained) & (rows["target"] == target)]
        for role in _roles(chosen):
            means = chosen[chosen["role"] == role].groupby("rank")["share"].mean()
            ranks = [r for r in (1, 2, 4, 8, 16, 32, 64) if r in means.index]
            axes.plot(ranks, means[ranks], **_style(role))
        axes.set(xscale="log", yscale="log", xlabel="adapter rank r")
        axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axes.minorticks_off()
    _plain_ticks(panels[0].yaxis)
    panels[0].set_ylabel("share of the removable loss")
    panels[0].legend(fontsize="small")
    return figure


def rank_figure(analysis: Analysis) -> Figure:
    """Draw the effective ranks of Σ and F by block."""
    figure, panels = _panels(["Inputs, second moment Σ", "Gradients to outputs, second moment F"])
    for axes, column in zip(panels, ("input_rank", "gradient_rank"), strict=True):
        for role in _roles(analysis.projections):
            rows = analysis.projections[analysis.projections["role"] == role]
            for _, stack in rows.groupby("stack"):
                axes.plot(stack["block"], stack[column], **_style(role))
        axes.set(xlabel="block", ylabel="effective rank", ylim=(0, None))
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    panels[0].legend(unique.values(), unique.keys(), fontsize="small")
    return figure


# --------------------------------------------------------------------------------------------------------------- report


def write_report(analysis: Analysis, folder: Path) -> Path:
    """Write report.html, its pictures, theory.parquet and projections.parquet; return the page's path."""
    measured, table = analysis.measured, analysis.projections
    report = Report("Closed forms of one-sided adapters before training")
    report.add_code(shlex.join([*program_command(), "theory", *measured.fit_arguments]))
    report.add_paragraph(
        f"{counted(len(table), 'projection')} of {type(measured.module.backbone).__name__}, measured over "
        f"{counted(measured.steps, 'batch')}: {table['tokens'].min():,} to {table['tokens'].max():,} tokens a "
        f"projection reach the loss, and {table['idle_tokens'].min():,} to {table['idle_tokens'].max():,} do not. The "
        f"recipe has {counted(measured.samples, 'training sample')}."
    )
    report.add_paragraph(
        "All shares describe a linear regression with the measured second moment Σ of a projection's inputs. The "
        "target Δ is either the least-squares target −GΣ⁻¹ or the gradient step −G. A share is the part of that "
        "regression's removable loss that training one factor removes. The shares do not predict a network's "
        "accuracy, nor which frozen factor to choose."
    )
    shares = network_shares(analysis)
    report.add_heading("Both sides at the recipe's rank")
    report.add_table(
        "Share of the network's removable loss, by the factor that is trained. Outputs weigh the same, as in the "
        "paper, or by the second moment F of their gradients.",
        _rounded(shares.assign(difference=shares["B"] - shares["A"])),
    )
    report.add_table(
        "Mean share over the projections of a role; in the last two columns outputs weigh by F.",
        _rounded(role_shares(analysis)),
    )
    report.add_figure(
        "shares",
        shares_figure(analysis),
        "Share of the removable loss by rank",
        f"Each line is a mean over the projections of a role and {DRAWS} random frozen factors; both axes are "
        "logarithmic. Look for lines in the left panels above the same role's line on the right, where the share is "
        "r/d_out for any data: for these roles the closed form favours B.",
    )
    report.add_heading("Where the asymmetry comes from")
    report.add_figure(
        "spectrum",
        spectrum_figure(analysis),
        "Spectrum of inputs by role",
        "Each line is the median over the projections of a role, and a flat line means inputs without a preferred "
        "direction. Look for a steep fall: then a few directions carry the inputs, and a random A reaches them.",
    )
    report.add_figure(
        "effective_rank",
        rank_figure(analysis),
        "Effective rank by block",
        "Effective rank is the exponential of the spectrum's entropy: the number of directions in use. Look for "
        "blocks whose inputs use few directions, and compare with the gradients, whose low rank would favour A "
        "instead.",
    )
    signal = (
        table.groupby("role", sort=False)[["explained", "explained_by_chance"]]
        .mean()
        .set_axis(["linear in inputs", "by chance"], axis=1)
        .reset_index()
    )
    report.add_table(
        "Share of the tokens' gradients that is linear in their inputs, and what chance alone would give. Where the "
        "two are close, the least-squares target is mostly noise.",
        _rounded(signal),
    )
    report.add_heading("Generalisation bound")
    report.add_paragraph(
        f"The bound on |expected loss − training loss| at n = {measured.samples:,} samples, for a loss in [0, 1] "
        f"(σ = {SIGMA}) and factors of {BITS} bits. A value above 1 excludes nothing."
    )
    report.add_table("Bound by the factor that is trained", _rounded(bounds(analysis)))
    page = report.write(folder)
    for name, frame in ((SHARES, analysis.shares), (PROJECTIONS, table)):
        with atomic_write(folder / name) as file:
            frame.to_parquet(file, index=False)
    return page


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose floats have three significant digits."""
    return frame.map(lambda value: f"{value:,.3g}" if isinstance(value, float) else value)
