"""Page and tables of the command `similarity`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import ArgumentError
from matplotlib.figure import Figure
from scipy.special import stdtrit

from app.commands.finished_runs import FACTORS, Factor, FinishedRun, block_names, runs_table, shown_runs
from app.report import FILE, Report, figure_style, new_figure
from modules.analysis.similarity import (
    SubspacePair,
    chance_interval,
    jackknife_error,
    orthonormal_basis,
    subspace_similarity,
)

_log = logging.getLogger(__name__)
PICTURES = ("pairs", "groups", "layers")
TABLES = ("runs", "similarity", "pairs", "groups")
OWN_FILES = (FILE, *(f"{name}.png" for name in PICTURES), *(f"{name}.parquet" for name in TABLES))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
MOST_GROUPS = 8
MOST_ANNOTATED = 12  # runs in a heat map with numbers in its cells
LEVEL = 0.95
ALMOST = 0.05  # share of the similarity above chance
FACTS = ("state", "start", "data", "variant")  # by which pairs of runs are grouped


# --------------------------------------------------------------------------------------------------------------- tables


def build_tables(runs: Sequence[FinishedRun]) -> dict[str, pd.DataFrame]:
    """Return all numbers as tidy tables.

    Returns:
        `runs`, with the mean similarity of each trained factor to its own random start; `similarity`, a row a pair of
        runs, factor and projection; `pairs`, means over projections; `groups`, means over pairs that share the same
        facts.

    Raises:
        ArgumentError: If the runs adapt no projection in common.
    """
    names = _common_projections(runs)
    bases = {
        (run.label, factor, name): orthonormal_basis(run.factors[name].columns(factor))
        for run in runs
        for factor in FACTORS
        for name in names
    }
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    blocks = block_names(names)
    for first, second in combinations(runs, 2):
        for factor in FACTORS:
            facts = pair_facts(first, second, factor)
            key = {"first": first.label, "second": second.label, "factor": factor}
            found = []
            for name in names:
                x, y = bases[first.label, factor, name], bases[second.label, factor, name]
                if x.shape[1] and y.shape[1]:
                    sizes = SubspacePair(x.shape[0], x.shape[1], y.shape[1])
                    found.append((name, sizes, subspace_similarity(x, y)))
            rows += [
                {
                    **key,
                    "projection": name,
                    "block": blocks[name],
                    "role": first.factors[name].projection.role,
                    "dimension": sizes.dimension,
                    "rank_first": sizes.first,
                    "rank_second": sizes.second,
                    "similarity": value,
                    "chance": sizes.chance,
                }
                for name, sizes, value in found
            ]
            if found:
                values = np.array([value for *_, value in found])
                pairs.append({**key, **facts, **_over_projections(values), **_chance([s for _, s, _ in found])})
            else:
                _log.warning(
                    f"{factor} of run {first.label} or {second.label} is zero everywhere. The pair is skipped."
                )
    frame = pd.DataFrame(pairs)
    return {
        "runs": _with_own_starts(runs, names),
        "similarity": pd.DataFrame(rows),
        "pairs": frame,
        "groups": _groups(frame, pd.DataFrame(rows)),
    }


def _common_projections(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the projections that all runs adapt; a warning names the number of the others."""
    shared = set.intersection(*(set(run.factors) for run in runs))
    every = set.union(*(set(run.factors) for run in runs))
    if not shared:
        raise ArgumentError(
            None,
            "RUN: no projection is adapted by all runs. Give runs with the same model.adapter.targets, or targets that "
            "overlap.",
        )
    if len(shared) < len(every):
        _log.warning(f"{len(every - shared)} of {len(every)} projections are not adapted by all runs and are left out.")
    return [name for name in runs[0].factors if name in shared]


def pair_facts(first: FinishedRun, second: FinishedRun, factor: Factor) -> dict[str, str]:
    """Return what two runs share, as far as one factor is concerned."""
    states = [run.trains(factor) for run in (first, second)]
    state = "trained" if all(states) else "one trained" if any(states) else "frozen"
    starts = [run.start(factor) for run in (first, second)]
    if None in starts:
        start = "unknown start"
    elif ("zero",) in starts:
        start = "both from zero" if starts[0] == starts[1] else "one from zero"
    else:
        start = "same start" if starts[0] == starts[1] else "other start"
    same = {
        "data": first.data_key == second.data_key,
        "variant": first.variant == second.variant,
        "seed": first.seed == second.seed,
    }
    return {"state": state, "start": start, **{k: f"{'same' if v else 'other'} {k}" for k, v in same.items()}}


def _over_projections(values: np.ndarray) -> dict[str, float]:
    """Return the mean over projections with its Student interval."""
    mean, count = float(values.mean()), len(values)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return {"similarity": mean, **_interval(mean, error, count - 1)}


def _interval(mean: float, error: float, freedom: int) -> dict[str, float]:
    """Return a Student interval within [0, 1]; NaN without a standard error."""
    reach = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * error if freedom > 0 else math.nan
    low, high = np.clip([mean - reach, mean + reach], 0, 1)
    return {"low": float(low), "high": float(high)}


def _chance(sizes: Sequence[SubspacePair]) -> dict[str, float]:
    """Return the mean similarity of random subspaces of the same sizes, and the interval of chance around it."""
    low, high = chance_interval(sizes, LEVEL)
    return {"chance": sum(size.chance for size in sizes) / len(sizes), "chance_low": low, "chance_high": high}


def _groups(pairs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over the pairs of each group, with an interval over runs and the interval of chance.

    Of the facts, those that are the same for all pairs of a factor do not name a group.
    """
    found = []
    for factor, of_factor in pairs.groupby("factor"):
        varying = [fact for fact in FACTS if fact == "state" or of_factor[fact].nunique() > 1]
        for keys, group in of_factor.groupby(varying, sort=False):
            name = ", ".join(keys)
            if {"frozen", "same start"} <= set(keys):
                name += " (equal by construction)"
            found.append({"factor": factor, "group": name, **_summary(group, rows), **dict.fromkeys(FACTS, "")})
            found[-1] |= {fact: group[fact].iloc[0] for fact in varying}
    frame = pd.DataFrame(found)
    return frame.sort_values(["factor", "similarity"], ascending=[True, False], ignore_index=True)


def _summary(pairs: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    """Return the mean over pairs of one factor, its interval over runs, and the interval of chance."""
    labels = sorted(set(pairs["first"]) | set(pairs["second"]))
    numbers = {label: index for index, label in enumerate(labels)}
    first, second = (torch.tensor([numbers[label] for label in pairs[side]]) for side in ("first", "second"))
    values = torch.tensor(pairs["similarity"].to_numpy())
    mean = float(values.mean())
    error = jackknife_error(values, first, second)
    chosen = rows.merge(pairs[["first", "second", "factor"]], on=["first", "second", "factor"])
    sizes = [SubspacePair(*size) for size in chosen[["dimension", "rank_first", "rank_second"]].itertuples(index=False)]
    counts = {"pairs": len(pairs), "runs": len(labels)}
    return {**counts, "similarity": mean, **_interval(mean, error, len(labels) - 1), **_chance(sizes)}


def _with_own_starts(runs: Sequence[FinishedRun], names: Sequence[str]) -> pd.DataFrame:
    """Return the table of runs, with the similarity of each trained factor to the values that it started from."""
    table = runs_table(runs)
    for factor in FACTORS:
        table[f"{factor} to its start"] = [_own_start(run, factor, names) for run in runs]
    return table


def _own_start(run: FinishedRun, factor: Factor, names: Sequence[str]) -> float:
    starts = {name: run.drawn_start(factor, name) for name in names} if run.trains(factor) else {}
    values = [
        subspace_similarity(orthonormal_basis(start), orthonormal_basis(run.factors[name].columns(factor)))
        for name, start in starts.items()
        if start is not None
    ]
    return float(np.mean(values)) if values else math.nan


# ----------------------------------------------------------------------------------------------------------------- page


def build_report(runs: Sequence[FinishedRun], tables: dict[str, pd.DataFrame]) -> Report:
    """Return the page.

    Args:
        runs: The runs.
        tables: From `build_tables`.
    """
    pairs, groups = tables["pairs"], tables["groups"]
    report = Report(f"Similarity of the factors of {len(runs)} runs")
    report.add_paragraph(
        "The similarity of two subspaces is the mean squared cosine of their principal angles: 1 if one lies within "
        "the other, and max(r₁, r₂) / d on average for random subspaces of ranks r₁ and r₂ in d dimensions. The row "
        "space of A is what an adapter reads from its input, and the column space of B is where it writes to (Zhu et "
        "al. 2024, figure 1)."
    )
    report.add_heading("Does A's similarity vanish when A starts from different seeds?")
    for text in answers(pairs, tables["similarity"], tables["runs"]):
        report.add_paragraph(text)
    report.add_table("Runs", shown_runs(runs, _rounded(tables["runs"])))
    report.add_heading("By what two runs share")
    report.add_figure(
        "groups",
        _groups_figure(pairs, groups),
        "Mean similarity of A and of B, by what two runs share",
        "A small dot is a pair of runs, a large dot the mean of its group with its 95 % interval over runs, and the "
        "grey bar the 95 % interval of random subspaces. Look for groups whose interval reaches the grey bar: what "
        "these runs do not share decides the similarity.",
    )
    report.add_table("Groups of pairs", _groups_table(groups))
    report.add_heading("By pair and by layer")
    report.add_figure(
        "pairs",
        _pairs_figure(runs, pairs),
        "Similarity of every two runs, mean over projections",
        "A cell compares the runs of its row and its column, and the title of each panel has the similarity that "
        "chance gives. Look for blocks of bright cells, and read in the names of "
        "the runs what they share.",
    )
    report.add_figure(
        "layers",
        _layers_figure(pairs, groups, tables["similarity"]),
        "Mean similarity of A and of B, by block and by what two runs share",
        "A line is the mean over the pairs of a group and the projections of a block, and the grey band the 95 % "
        "interval of random subspaces for one pair. Look for depths at which a line leaves the grey band.",
    )
    report.add_paragraph(
        "Intervals over runs leave out one run at a time (jackknife), since pairs that share a run are not "
        "independent. "
        "A group needs three runs for an interval. All numbers are in the Parquet files beside this page: "
        "similarity.parquet by projection, pairs.parquet by pair with an interval over projections, groups.parquet by "
        "group."
    )
    return report


def answers(pairs: pd.DataFrame, rows: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Return sentences that answer the paper's questions from the numbers."""
    trained = pairs[(pairs["factor"] == "A") & (pairs["state"] == "trained")]
    other, same = (trained[trained["start"] == start] for start in ("other start", "same start"))
    found = [_verdict(other, same, rows)]
    if other["data"].nunique() > 1:
        found.append(f"From different starts, A has {_by_data(other, rows)}.")
    own = runs["A to its start"].dropna()
    if len(own):
        counted = f"{len(own)} run{'s' * (len(own) > 1)}"
        found.append(
            f"At the end of training, A has a mean similarity of {own.mean():.3f} to its own random start ({counted})."
        )
    learnt = pairs[(pairs["factor"] == "B") & (pairs["state"] == "trained") & (pairs["start"] == "both from zero")]
    if len(learnt):
        found.append(f"B, trained from zero in both runs, has {_by_data(learnt, rows)}.")
    return found


def _by_data(pairs: pd.DataFrame, rows: pd.DataFrame) -> str:
    groups = {"same data": "the same data", "other data": "different data"}
    words = [
        f"{_in_words(group, rows)} for {words}"
        for data, words in groups.items()
        if len(group := pairs[pairs["data"] == data])
    ]
    return f"a mean similarity of {' and '.join(words)}"


def _verdict(other: pd.DataFrame, same: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Answer whether the similarity of A vanishes, from pairs of runs that train A from other starts and the same."""
    beside = f" From the same start it is {_in_words(same, rows)}." if len(same) else ""
    if other.empty:
        return (
            "These runs cannot tell: no two of them train A from different random starts. Give runs with "
            "model.adapter.train both and several values of model.adapter.seed." + beside
        )
    found = _summary(other, rows)
    chance = f"{found['chance']:.3f} (95 % interval {found['chance_low']:.3f} to {found['chance_high']:.3f})"
    text = f"trained from different starts, A has a mean similarity of {_in_words(other, rows)}. Chance is {chance}."
    if found["similarity"] <= found["chance_high"]:
        return f"Yes: {text}{beside}"
    if found["low"] <= found["chance_high"]:
        return f"Yes, as far as these runs can tell: {text} The two intervals overlap.{beside}"
    if math.isnan(found["low"]):
        text += " These runs are too few for an interval over runs."
    if same.empty:
        return f"Not entirely: {text}"
    left = (found["similarity"] - found["chance"]) / (same["similarity"].mean() - found["chance"])
    beside += f" Of the similarity above chance, different starts leave {left:.0%}."
    return f"{'Almost' if left < ALMOST else 'Not entirely'}: {text}{beside}"


def _in_words(pairs: pd.DataFrame, rows: pd.DataFrame) -> str:
    summary = _summary(pairs, rows)
    several = len(pairs) > 1
    interval = "" if math.isnan(summary["low"]) else f"95 % interval {summary['low']:.3f} to {summary['high']:.3f}; "
    return f"{summary['similarity']:.3f} ({interval}{len(pairs)} pair{'s' * several} of {summary['runs']} runs)"


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    columns = [f"{factor} to its start" for factor in FACTORS]
    return frame.assign(**{name: frame[name].map(_number) for name in columns})


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _groups_table(groups: pd.DataFrame) -> pd.DataFrame:
    interval = [
        "" if math.isnan(low) else f"{low:.3f}–{high:.3f}"
        for low, high in zip(groups["low"], groups["high"], strict=True)
    ]
    chance = [
        f"{mean:.3f} ({low:.3f}–{high:.3f})"
        for mean, low, high in groups[["chance", "chance_low", "chance_high"]].itertuples(index=False)
    ]
    return pd.DataFrame(
        {
            "factor": groups["factor"],
            "group": groups["group"],
            "pairs": groups["pairs"],
            "similarity": groups["similarity"].map(_number),
            "95 % interval over runs": interval,
            "chance (95 %)": chance,
        }
    )


# -------------------------------------------------------------------------------------------------------------- figures


def _chance_title(factor: str, pairs: pd.DataFrame) -> str:
    """Name a panel by its factor, and by the range that the chance intervals of its pairs span."""
    own = pairs[pairs["factor"] == factor]
    means = sorted({f"{chance:.3f}" for chance in own["chance"]})
    mean = means[0] if len(means) == 1 else f"{means[0]} to {means[-1]}"
    return f"{factor}: chance {mean} (95 %: {own['chance_low'].min():.3f} to {own['chance_high'].max():.3f})"


def _shown_groups(groups: pd.DataFrame, factor: str) -> pd.DataFrame:
    """Return the groups of a factor that a figure shows: those with the most pairs, and none of one trained factor."""
    own = groups[(groups["factor"] == factor) & (groups["state"] != "one trained")]
    if own.empty:
        own = groups[groups["factor"] == factor]
    return own.nlargest(MOST_GROUPS, "pairs", keep="first").sort_values("similarity", ascending=False)


def _members(pairs: pd.DataFrame, group: Any) -> pd.DataFrame:
    """Return the pairs of a group."""
    own = pairs[pairs["factor"] == group.factor]
    for fact in FACTS:
        if getattr(group, fact):
            own = own[own[fact] == getattr(group, fact)]
    return own


def _groups_figure(pairs: pd.DataFrame, groups: pd.DataFrame) -> Figure:
    shown = {factor: _shown_groups(groups, factor) for factor in FACTORS}
    sizes = [max(1, len(of_factor)) for of_factor in shown.values()]
    figure = new_figure(height=1.6 + 0.42 * sum(sizes))
    with figure_style():
        panels = figure.subplots(2, 1, sharex=True, height_ratios=sizes)
    for axes, (factor, of_factor) in zip(panels, shown.items(), strict=True):
        for row, group in enumerate(of_factor.itertuples()):
            width = group.chance_high - group.chance_low
            axes.barh(row, width, left=group.chance_low, height=0.8, color="#888888", edgecolor="#888888", linewidth=2)
            values = _members(pairs, group)["similarity"]
            axes.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.35, markersize=4)
            limits = [[group.similarity - group.low], [group.high - group.similarity]]
            reach = None if math.isnan(group.low) else limits
            axes.errorbar(group.similarity, row, xerr=reach, fmt="o", color=COLOURS[1], markersize=7, capsize=4)
        axes.set_yticks(range(len(of_factor)), of_factor["group"])
        axes.set_ylim(len(of_factor) - 0.4, -0.6)
        axes.set_title(_chance_title(factor, pairs), fontsize=10, loc="left")
        axes.set_xlim(-0.02, 1.02)
    panels[-1].set_xlabel("similarity")
    return figure


def _pairs_figure(runs: Sequence[FinishedRun], pairs: pd.DataFrame) -> Figure:
    labels = [run.label for run in runs]
    numbers = [label.partition(":")[0] for label in labels]
    figure = new_figure(height=1.6 + 2 * max(1.4, 0.36 * len(labels)))
    with figure_style():
        panels = figure.subplots(2, 1, sharex=True)
    image = None
    for axes, factor in zip(panels, FACTORS, strict=True):
        grid = np.eye(len(labels))
        frozen = np.zeros_like(grid, dtype=bool)
        missing = np.zeros_like(grid, dtype=bool)
        known = pairs[pairs["factor"] == factor].set_index(["first", "second"])
        for i, j in combinations(range(len(labels)), 2):
            pair = (labels[i], labels[j])
            missing[i, j] = missing[j, i] = pair not in known.index
            if pair in known.index:
                grid[i, j] = grid[j, i] = known.loc[pair, "similarity"]
                frozen[i, j] = frozen[j, i] = known.loc[pair, "state"] == "frozen"
        image = axes.imshow(np.where(missing, np.nan, grid), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        if len(labels) <= MOST_ANNOTATED:
            for i, j in np.ndindex(grid.shape):
                if i != j and not missing[i, j]:
                    text = f"{grid[i, j]:.2f}{chr(10) + 'frozen' if frozen[i, j] else ''}"
                    colour = "black" if grid[i, j] > 0.6 else "white"
                    axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(labels)), numbers)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(_chance_title(factor, pairs), fontsize=10, loc="left")
        axes.grid(False)
    panels[-1].set_xlabel("run")
    assert image is not None
    with figure_style():
        figure.colorbar(image, ax=list(panels), label="similarity", shrink=0.8)
    return figure


def _layers_figure(pairs: pd.DataFrame, groups: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    blocks = list(dict.fromkeys(rows["block"]))
    figure = new_figure(height=6.5)
    with figure_style():
        panels = figure.subplots(2, 1, sharex=True)
    for axes, factor in zip(panels, FACTORS, strict=True):
        own = rows[rows["factor"] == factor]
        limits = [_block_chance(own[own["block"] == block]) for block in blocks]
        axes.fill_between(range(len(blocks)), *zip(*limits, strict=True), color="#888888", alpha=0.4, lw=0, step="mid")
        for index, group in enumerate(_shown_groups(groups, factor).itertuples()):
            members = _members(pairs, group)[["first", "second", "factor"]]
            mean = own.merge(members).groupby("block")["similarity"].mean().reindex(blocks)
            dash = ("-", "--", "-.", ":")[index % 4]
            axes.plot(
                range(len(blocks)),
                mean,
                color=COLOURS[index],
                linestyle=dash,
                marker="o",
                markersize=4,
                label=group.group,
            )
        axes.set_title(_chance_title(factor, pairs), fontsize=10, loc="left")
        axes.set_ylabel("similarity")
        axes.set_ylim(-0.02, 1.02)
        with figure_style():
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    panels[-1].set_xticks(range(len(blocks)), blocks, rotation=90 if max(map(len, blocks)) > 3 else 0)
    panels[-1].set_xlabel("block")
    return figure


def _block_chance(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the interval of chance of the projections of one block, the widest over pairs of other ranks."""
    if rows.empty:
        return math.nan, math.nan
    limits = [
        chance_interval([SubspacePair(*size) for size in sizes])
        for sizes in {
            tuple(map(tuple, pair[["dimension", "rank_first", "rank_second"]].to_numpy().tolist()))
            for _, pair in rows.groupby(["first", "second"])
        }
    ]
    return min(low for low, _ in limits), max(high for _, high in limits)
