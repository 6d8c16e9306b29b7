"""Figures of a sweep's report. A variant has the same colour and marker in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from app.reports.report import new_figure, side_legend
from app.sweep.outcome import Outcome, is_value, value_text
from app.sweep.plan import Range
from app.sweep.statistics import PairedDifference

# Okabe and Ito's colours without the yellow, which white paper hides
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*"
PANEL = 7  # largest number of variants in a panel; further variants go to another panel with the same scales
COLUMNS = 3  # panels side by side, if each variant has a panel
FOREST = 15  # rows of a forest plot; with more pairs, only the pairs with the best variant are shown


def color(outcome: Outcome, variant: str) -> str:
    """Return the colour of a variant."""
    return COLORS[outcome.variants.index(variant) % len(COLORS)]


def marker(outcome: Outcome, variant: str) -> str:
    """Return the marker of a variant."""
    index = outcome.variants.index(variant)
    return MARKERS[(index + index // len(COLORS)) % len(MARKERS)]  # another marker where colours repeat


def response(outcome: Outcome, key: str) -> Figure | None:
    """Draw the selecting metric by one searched key, or return None without a number to draw."""
    metric, column = outcome.facts.metric, f"search/{key}"
    scale = outcome.scale(metric)
    trials = outcome.trials[(outcome.trials["phase"] == "select") & outcome.trials[column].map(is_value)]
    shown = trials[(trials["state"] == "complete") & trials[metric].notna()]
    if shown.empty:
        return None
    values = shown[metric] * scale.factor
    limits = _limits(values, scale.higher_is_better)
    positions = _Positions(list(trials[column]), key)
    drawn = [variant for variant in outcome.variants if (trials["variant"] == variant).any()]
    figure, panels = _panels(drawn)
    lines = not isinstance(outcome.facts.search[key], Range) or len(outcome.keys) == 1
    better = max if scale.higher_is_better else min
    for axes, variants in panels:
        for index, variant in enumerate(variants):
            style: dict[str, Any] = {"color": color(outcome, variant), "marker": marker(outcome, variant)}
            rows = trials[trials["variant"] == variant]
            x = positions.of(rows[column], index - (len(variants) - 1) / 2)
            kept = rows.index.isin(shown.index)
            y = (rows[metric] * scale.factor).clip(*limits)
            beyond = kept & ((rows[metric] * scale.factor) != y).to_numpy()
            failed = (rows["state"] == "failed").to_numpy()
            crossed = failed | ((rows["state"] == "complete").to_numpy() & ~kept) | beyond
            inside = kept & ~beyond
            axes.scatter(
                x[inside], y[inside], s=30, facecolors="none", edgecolors=style["color"], marker=style["marker"]
            )
            edge = 0.03 if scale.higher_is_better else 0.97
            axes.scatter(
                x[crossed],
                np.full(int(crossed.sum()), edge),
                s=45,
                marker="x",
                color=style["color"],
                linewidths=1.8,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=4,
            )
            means = pd.DataFrame({"x": x[inside], "y": y[inside], "point": rows["point"][inside]})
            means = means.groupby("point").agg({"x": "first", "y": "mean"})
            best = means.groupby("x")["y"].agg(better).sort_index()
            axes.plot(best.index, best, label=variant, lw=1.6 if lines else 0, ms=5, **style)
            chosen = outcome.chosen(variant)
            if chosen is not None and chosen["point"] in means.index:
                ring = means.loc[chosen["point"]]
                axes.plot(ring["x"], ring["y"], "o", ms=14, mfc="none", mec=style["color"], mew=1.8)
        positions.label(axes)
        axes.set_ylim(*limits)
        axes.set_ylabel(f"{scale.name}\n({scale.direction})")
        side_legend(axes)
    return figure


def curves(outcome: Outcome) -> Figure | None:
    """Draw the selecting metric by step at the chosen points, or return None without a curve.

    Each variant has a panel. Thin lines are the seeds, the thick line is their mean. Grey lines are the means of the
    other variants.
    """
    scale = outcome.scale(outcome.facts.metric)
    seeds = {variant: drawn for variant in outcome.variants if not (drawn := _seed_curves(outcome, variant)).empty}
    if not seeds:
        return None
    means = {variant: drawn.mean(axis=1) for variant, drawn in seeds.items()}
    rows = -(-len(seeds) // COLUMNS)
    figure, panels = new_figure(9, 0.7 + 2.3 * rows, rows, COLUMNS, sharex=True, sharey=True)
    for axes, variant in zip(panels, seeds, strict=False):
        tint = color(outcome, variant)
        for other in means:
            if other != variant:
                axes.plot(means[other], color="#c4c4c4", lw=1.2, zorder=1)
        for _, curve in seeds[variant].items():
            axes.plot(curve.dropna(), color=tint, alpha=0.55, lw=0.8)
        axes.plot(means[variant], color=tint, marker=marker(outcome, variant), ms=5, lw=2.2)
        axes.set_title(variant, color=tint, fontsize=10, fontweight="bold", loc="left")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in panels[len(seeds) :]:
        axes.set_axis_off()
    panels[0].set_ylim(*_limits(pd.concat(seeds).stack().dropna(), scale.higher_is_better))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel(f"{scale.name} ({scale.direction})", fontsize=10)
    return figure


def quality_by_parameters(outcome: Outcome) -> Figure | None:
    """Draw the confirmed means by trained parameters, or return None if fewer than two variants have both."""
    scale = outcome.scale(outcome.metric)
    parameters = {variant: outcome.cost(variant, "params/trainable") or 0.0 for variant in outcome.variants}
    drawn = [variant for variant in outcome.variants if parameters[variant] and variant in outcome.ranked]
    if len(drawn) < 2:
        return None
    figure, (axes,) = new_figure(9, 3.8)
    for variant in drawn:
        mean = outcome.mean(variant, outcome.metric)
        axes.errorbar(
            [parameters[variant]],
            [mean.value * scale.factor],
            yerr=None if mean.error is None else [mean.error * scale.factor],
            fmt=marker(outcome, variant),
            color=color(outcome, variant),
            ms=9,
            capsize=4,
            label=variant,
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.margins(x=0.1)
    _plain_ticks(axes, [parameters[variant] for variant in drawn], count_label)
    axes.set_xlabel("trained parameters, head included")
    axes.set_ylabel(f"{scale.name}\n({scale.direction})")
    side_legend(axes)
    return figure


def forest_pairs(outcome: Outcome) -> list[PairedDifference]:
    """Return the pairs with an interval for the forest plot; only the best variant's pairs if there are many."""
    pairs = [pair for pair in outcome.differences if pair.student]
    return pairs if len(pairs) <= FOREST else [pair for pair in pairs if pair.first == outcome.ranked[0]]


def forest(outcome: Outcome) -> Figure | None:
    """Draw paired differences with their intervals, or return None where no pair has an interval."""
    pairs, scale = forest_pairs(outcome), outcome.scale(outcome.metric)
    if not pairs:
        return None
    figure, (axes,) = new_figure(9, 1.2 + 0.3 * len(pairs))
    axes.axvline(0, color="#666666", lw=1)
    for row, pair in enumerate(pairs):
        tint = COLORS[0] if pair.sign else "#888888"
        assert pair.student is not None
        axes.plot([bound * scale.factor for bound in pair.student], [row, row], color=tint, lw=1.4)
        if pair.bootstrap:
            bounds = [bound * scale.factor for bound in pair.bootstrap]
            axes.plot(bounds, [row, row], color=tint, lw=5, alpha=0.5, solid_capstyle="butt")
        axes.plot(pair.mean * scale.factor, row, "o", color=tint, ms=6)
    axes.set_yticks(range(len(pairs)), [f"{pair.first} − {pair.second}" for pair in pairs])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.grid(False, axis="y")
    side = "right" if scale.higher_is_better else "left"
    axes.set_xlabel(
        f"difference in {scale.metric}{',' if scale.unit else ''}{scale.unit} ({side} of 0: the first is better)"
    )
    return figure


class _Positions:
    """Positions of a searched key's values on an axis: logarithmic, linear, or in equal steps if not numeric."""

    def __init__(self, values: Sequence[Any], key: str) -> None:
        self.key = key
        self.numeric = all(isinstance(value, Real) and not isinstance(value, bool) for value in values)
        if not self.numeric:
            self.names = sorted({value_text(value) for value in values})
            self.log, self.span = False, float(len(self.names))
            return
        self.values = sorted({float(value) for value in values})
        low, high = self.values[0], self.values[-1]
        self.log = low > 0 and ("learning_rate" in key or high / low >= 8)
        self.span = (np.log(high / low) if self.log else high - low) or 1.0

    def of(self, values: pd.Series[Any], aside: float) -> npt.NDArray[np.float64]:
        """Return positions, shifted by `aside` steps so that the points of variants do not cover each other."""
        shift = aside * 0.008 * self.span
        if not self.numeric:
            return np.array([self.names.index(value_text(value)) + shift for value in values], np.float64)
        x = values.to_numpy(np.float64)
        return x * np.exp(shift) if self.log else x + shift

    def label(self, axes: Axes) -> None:
        """Scale and label the axis."""
        if self.log:
            axes.set_xscale("log")
        axes.set_xlabel(f"{self.key}{' (logarithmic axis)' if self.log else ''}")
        margin = 0.06 * self.span
        if not self.numeric:
            axes.set_xticks(range(len(self.names)), self.names)
            axes.set_xlim(-0.5, len(self.names) - 0.5)
            return
        low, high = self.values[0], self.values[-1]
        axes.set_xlim((low * np.exp(-margin), high * np.exp(margin)) if self.log else (low - margin, high + margin))
        if len(self.values) <= 8:
            _plain_ticks(axes, self.values, value_text)
        elif self.log:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: value_text(float(value))))
            axes.xaxis.set_minor_locator(NullLocator())


def _plain_ticks(axes: Axes, values: Sequence[float], text: Any) -> None:
    """Put ticks at the given values, except where a tick label would touch its left neighbour."""
    position = np.log if axes.get_xscale() == "log" else np.float64
    first, *others = sorted(set(values))
    ticks = [first]
    reach = position(max(values)) - position(first)
    for value in others:
        if position(value) - position(ticks[-1]) > 0.09 * reach:
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def count_label(count: float) -> str:
    """Return a number of parameters as text, such as `1.2 M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _limits(values: pd.Series[float], higher_is_better: bool) -> tuple[float, float]:
    """Return the ends of an axis, without outliers such as diverged runs."""
    ordered = values.sort_values(ascending=not higher_is_better).to_numpy()  # best first
    best = ordered[0]
    reach = 5 * abs(best - np.median(ordered)) or np.inf
    end = ordered[np.abs(ordered - best) <= reach][-1]
    margin = 0.08 * (abs(best - end) or abs(best) or 1.0)
    return min(best, end) - margin, max(best, end) + margin


def _seed_curves(outcome: Outcome, variant: str) -> pd.DataFrame:
    """Return the metric by step at the chosen point, a column for each confirmed seed, or else each selecting seed."""
    scale = outcome.scale(outcome.facts.metric)
    for phase in ("confirm", "select"):
        trials = outcome.at_choice(variant, phase)
        series = [
            pd.Series(np.asarray(values, np.float64), index=np.asarray(steps, np.int64), name=seed)
            for seed, steps, values, state in trials[["seed", "curve_steps", "curve_values", "state"]].itertuples(
                index=False
            )
            if state == "complete" and _has_items(steps) and _has_items(values)
        ]
        if series:
            joined = pd.concat([curve[~curve.index.duplicated(keep="last")] for curve in series], axis=1).sort_index()
            return joined.replace([np.inf, -np.inf], np.nan).dropna(how="all") * scale.factor
    return pd.DataFrame()


def _has_items(value: Any) -> bool:
    """Return True for a sequence with items; a table has None or NaN for a missing sequence."""
    return isinstance(value, list | tuple | np.ndarray) and len(value) > 0


def _panels(variants: list[str]) -> tuple[Figure, list[tuple[Axes, list[str]]]]:
    """Return a figure with one panel for every seven variants, all with the same scales."""
    groups = [variants[start : start + PANEL] for start in range(0, len(variants), PANEL)]
    figure, axes = new_figure(9, 0.6 + 3.6 * len(groups), len(groups), sharex=True, sharey=True)
    return figure, list(zip(axes, groups, strict=True))
