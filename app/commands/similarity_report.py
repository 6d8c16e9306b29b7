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
from matplotlib.figure import Figure
from scipy.special import stdtrit
from torch import Tensor

from app.commands.finished_runs import FinishedRun, block_names, runs_table, shown_runs
from app.reports.report import COLOURS, FILE, Report, figure_style, new_figure, side_legend
from datamodules.errors import UsageError, counted
from modules.analysis.combination import SIDES, Side
from modules.analysis.similarity import (
    chance_level,
    cross_similarities,
    jackknife_error,
    orthonormal_basis,
    permuted_means,
    random_orders,
    subspace_similarity,
)

_log = logging.getLogger(__name__)
PICTURES = ("pairs", "groups", "layers")
TABLES = ("runs", "similarity", "pairs", "groups")
REPORT_FILES = (FILE, *(f"{name}.png" for name in PICTURES), *(f"{name}.parquet" for name in TABLES))
MOST_GROUPS = 8
MOST_ANNOTATED = 12  # runs in a heat map with numbers in its cells
LEVEL = 0.95
PERMUTATIONS = 1000
ALMOST = 0.05  # if less of the similarity above chance is left, the similarity has almost vanished
FACTS = ("state", "start", "data", "variant")  # facts by which pairs of runs are grouped
STATES = ("trained", "frozen", "one trained")  # states of the factors of a pair, the most interesting first


# --------------------------------------------------------------------------------------------------------------- tables


def build_tables(runs: Sequence[FinishedRun]) -> dict[str, pd.DataFrame]:
    """Return all numbers as tidy tables.

    Returns:
        `runs`: with the mean similarity of each trained factor to its own random start. `similarity`: one row for each
        pair of runs, factor and projection. `pairs`: means over projections, and in `permuted` the means after each
        permutation. `groups`: means over pairs that share the same facts.

    Raises:
        UsageError: If the runs adapt no projection in common.
    """
    names = _common_projections(runs)
    blocks = block_names(names)
    roles = [runs[0].projections[name].role for name in names]
    where = {"projection": names, "block": [blocks[name] for name in names], "role": roles}
    rows: list[pd.DataFrame] = []
    pairs: list[dict[str, Any]] = []
    for factor in SIDES:
        bases = {run.label: [orthonormal_basis(run.columns(factor, name)) for name in names] for run in runs}
        ranks = {label: [basis.shape[1] for basis in of_run] for label, of_run in bases.items()}
        dimensions = [basis.shape[0] for basis in bases[runs[0].label]]
        kinds = [f"{role} {dimension}" for role, dimension in zip(roles, dimensions, strict=True)]
        orders = {run.label: random_orders(kinds, PERMUTATIONS, seed) for seed, run in enumerate(runs)}
        for first, second in combinations(runs, 2):
            key = {"first": first.label, "second": second.label, "factor": factor}
            sizes = {"dimension": dimensions, "rank_first": ranks[first.label], "rank_second": ranks[second.label]}
            similarities = _within_kinds(bases[first.label], bases[second.label], kinds)
            of_pair = pd.DataFrame(
                {
                    **key,
                    **where,
                    **sizes,
                    "similarity": similarities.diagonal().numpy(),
                    "chance": [chance_level(*size) for size in zip(*sizes.values(), strict=True)],
                }
            )
            of_pair = of_pair.dropna(subset="similarity")  # a zero factor has no similarity
            if of_pair.empty:
                _log.warning(
                    f"{factor} of run {first.label} or {second.label} is zero everywhere. The pair has no "
                    f"similarity of {factor}."
                )
                continue
            rows.append(of_pair)
            permuted = permuted_means(similarities, orders[first.label], orders[second.label]).numpy()
            pairs.append(
                {
                    **key,
                    **pair_facts(first, second, factor),
                    **_over_projections(of_pair["similarity"].to_numpy()),
                    "chance": of_pair["chance"].mean(),
                    **_permutation_interval(permuted),
                    "permuted": permuted,
                }
            )
    frame = pd.DataFrame(pairs)
    return {
        "runs": _with_start_similarities(runs, names),
        "similarity": pd.concat(rows, ignore_index=True),
        "pairs": frame,
        "groups": _groups(frame),
    }


def _within_kinds(first: Sequence[Tensor], second: Sequence[Tensor], kinds: Sequence[str]) -> Tensor:
    """Return the similarities of projections of one kind between two runs, (n, n); NaN between different kinds."""
    similarities = torch.full((len(kinds), len(kinds)), math.nan, dtype=torch.float64)
    for kind in set(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        values = cross_similarities([first[i] for i in members], [second[i] for i in members])
        similarities[torch.tensor(members)[:, None], members] = values
    return similarities


def _common_projections(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the projections that all runs adapt. Warn with the number of other projections."""
    shared = set.intersection(*(set(run.updates) for run in runs))
    adapted = set.union(*(set(run.updates) for run in runs))
    if not shared:
        raise UsageError(
            "RUN: no projection is adapted by all runs. Give runs with the same model.adapter.targets, or targets that "
            "overlap."
        )
    if len(shared) < len(adapted):
        _log.warning(
            f"{len(adapted - shared)} of {counted(len(adapted), 'projection')} are left out, since not all runs adapt "
            "them."
        )
    return [name for name in runs[0].updates if name in shared]


def pair_facts(first: FinishedRun, second: FinishedRun, factor: Side) -> dict[str, str]:
    """Return the facts about one factor of two runs: state, start, and whether data, variant and seed are equal."""
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


def _permutation_interval(permuted: np.ndarray) -> dict[str, float]:
    """Return the interval of the permuted means; NaN where no permutation changes the mean."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(permuted, [tail, 1 - tail]) if np.ptp(permuted) else (math.nan, math.nan)
    return {"permutation_low": float(low), "permutation_high": float(high)}


def _groups(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over the pairs of each group, with the columns of `_summary`.

    Facts that are equal for all pairs of a factor are not part of the names of the groups.
    """
    rows: list[dict[str, Any]] = []
    for factor, of_factor in pairs.groupby("factor"):
        varying = [fact for fact in FACTS if fact == "state" or of_factor[fact].nunique() > 1]
        for keys, group in of_factor.groupby(varying, sort=False):
            name = ", ".join(keys)
            if {"frozen", "same start"} <= set(keys):
                name += " (equal by construction)"
            rows.append({"factor": factor, "group": name, **_summary(group), **dict.fromkeys(FACTS, "")})
            rows[-1] |= {fact: group[fact].iloc[0] for fact in varying}
    frame = pd.DataFrame(rows)
    return frame.sort_values(["factor", "similarity"], ascending=[True, False], ignore_index=True)


def _summary(pairs: pd.DataFrame) -> dict[str, Any]:
    """Return the mean over pairs of one factor, its interval over runs, chance level and permutation interval."""
    numbers, labels = pd.factorize(pairs[["first", "second"]].to_numpy().ravel(), sort=True)
    first, second = torch.from_numpy(numbers).view(-1, 2).T
    values = torch.tensor(pairs["similarity"].to_numpy())
    mean = float(values.mean())
    return {
        "pairs": len(pairs),
        "runs": len(labels),
        "similarity": mean,
        **_interval(mean, jackknife_error(values, first, second), len(labels) - 1),
        "chance": pairs["chance"].mean(),
        **_permutation_interval(np.mean(pairs["permuted"].tolist(), axis=0)),
    }


def _with_start_similarities(runs: Sequence[FinishedRun], names: Sequence[str]) -> pd.DataFrame:
    """Return the table of runs, with the similarity of each trained factor to its initial values."""
    table = runs_table(runs)
    for factor in SIDES:
        table[f"{factor} to its start"] = [_start_similarity(run, factor, names) for run in runs]
    return table


def _start_similarity(run: FinishedRun, factor: Side, names: Sequence[str]) -> float:
    starts = {name: run.drawn_start(factor, name) for name in names} if run.trains(factor) else {}
    values = [
        subspace_similarity(orthonormal_basis(start), orthonormal_basis(run.columns(factor, name)))
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
        "The similarity of two subspaces is the mean squared cosine of their principal angles. It is 1 if one subspace "
        "lies within the other. Random subspaces of ranks r₁ and r₂ in d dimensions have max(r₁, r₂) / d on average. "
        "An adapter reads the row space of A from its input and writes to the column space of B (Zhu et al. 2024, "
        "figure 1)."
    )
    report.add_heading("Does A's similarity vanish when A starts from different seeds?")
    for text in answers(pairs, tables["runs"]):
        report.add_paragraph(text)
    report.add_table("Runs", shown_runs(runs, _rounded(tables["runs"])))
    report.add_heading("Grouped by what two runs share")
    report.add_figure(
        "groups",
        _groups_figure(pairs, groups),
        "Mean similarity of A and of B, by what two runs share",
        "A small dot is a pair of runs, a large dot the mean of its group with its 95 % interval over runs, a black "
        "tick the chance level, and a grey bar the 95 % permutation interval. Look for large dots to the right of "
        "their grey bar (the layers of two runs agree one by one) and for grey bars to the right of their tick (all "
        "layers share directions).",
    )
    report.add_table("Groups of pairs", _groups_table(groups), ["group"])
    report.add_paragraph(
        "The permutation interval holds 95 % of the means after the blocks of every run are shuffled within each role. "
        "Shuffling destroys what the same layer of two runs has in common. This interval needs two adapted blocks. The "
        "interval over runs leaves out one run at a time (jackknife), since pairs that share a run are not "
        "independent. This interval needs three runs."
    )
    report.add_heading("For each pair and each layer")
    report.add_figure(
        "pairs",
        _pairs_figure(runs, pairs),
        "Similarity of every two runs, mean over projections",
        "A cell compares the runs of its row and its column, and the title of each panel has the chance level. Look "
        "for blocks of bright cells: the names of the runs show what these runs share.",
    )
    report.add_figure(
        "layers",
        _layers_figure(pairs, groups, tables["similarity"]),
        "Mean similarity of A and of B, by block and by what two runs share",
        "A line is the mean over the pairs of a group and the projections of a block, and the grey line the chance "
        "level. Look for depths at which a line leaves the grey line.",
    )
    report.add_paragraph(
        "All numbers are in the Parquet files beside this page: similarity.parquet by projection, pairs.parquet by "
        "pair with an interval over projections and the permuted means, groups.parquet by group."
    )
    return report


def answers(pairs: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Return sentences that answer the paper's questions from the numbers."""
    trained = pairs[(pairs["factor"] == "A") & (pairs["state"] == "trained")]
    other, same = (trained[trained["start"] == start] for start in ("other start", "same start"))
    sentences = [_verdict(other, same)]
    if other["data"].nunique() > 1:
        sentences.append(f"From different starts, A has {_by_data(other)}.")
    to_start = runs["A to its start"].dropna()
    if len(to_start):
        sentences.append(
            f"At the end of training, A has a mean similarity of {to_start.mean():.3f} to its own random start "
            f"({counted(len(to_start), 'run')})."
        )
    learnt = pairs[(pairs["factor"] == "B") & (pairs["state"] == "trained") & (pairs["start"] == "both from zero")]
    if len(learnt):
        sentences.append(f"B, trained from zero in both runs, has {_by_data(learnt)}.")
    return sentences


def _by_data(pairs: pd.DataFrame) -> str:
    groups = {"same data": "the same data", "other data": "different data"}
    words = [
        f"{_mean_text(group)} for {words}"
        for data, words in groups.items()
        if len(group := pairs[pairs["data"] == data])
    ]
    return f"a mean similarity of {' and '.join(words)}"


def _verdict(other: pd.DataFrame, same: pd.DataFrame) -> str:
    """Answer whether the similarity of A vanishes between runs that train A from different starts."""
    beside = f" From the same start, the mean similarity is {_mean_text(same)}." if len(same) else ""
    if other.empty:
        return (
            "These runs cannot tell: no two of them train A from different random starts. Give runs with "
            "model.adapter.train both and several values of model.adapter.seed." + beside
        )
    summary = _summary(other)
    low, high = summary["permutation_low"], summary["permutation_high"]
    text = f"trained from different starts, A has a mean similarity of {_mean_text(other)}. "
    text += f"The chance level is {summary['chance']:.3f}."
    text += "" if math.isnan(low) else f" With blocks permuted, 95 % of means lie between {low:.3f} and {high:.3f}."
    limit = high if low <= summary["chance"] else summary["chance"]  # else all blocks are alike, beyond chance
    if summary["similarity"] <= limit:
        return f"Yes: {text}{beside}"
    if summary["low"] <= limit:
        return f"Yes, as far as these runs can tell: {text} The interval over runs reaches chance.{beside}"
    if math.isnan(summary["low"]):
        text += " These runs are too few for an interval over runs."
    if same.empty:
        return f"Not entirely: {text}"
    share_left = (summary["similarity"] - summary["chance"]) / (same["similarity"].mean() - summary["chance"])
    beside += f" Of the similarity above chance, different starts leave {share_left:.0%}."
    return f"{'Almost' if share_left < ALMOST else 'Not entirely'}: {text}{beside}"


def _mean_text(pairs: pd.DataFrame) -> str:
    summary = _summary(pairs)
    interval = "" if math.isnan(summary["low"]) else f"95 % interval {summary['low']:.3f} to {summary['high']:.3f}; "
    return f"{summary['similarity']:.3f} ({interval}{counted(len(pairs), 'pair')} of {summary['runs']} runs)"


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    columns = [f"{factor} to its start" for factor in SIDES]
    return frame.assign(**{name: frame[name].map(_number) for name in columns})


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _groups_table(groups: pd.DataFrame) -> pd.DataFrame:
    def interval(kind: str) -> list[str]:
        limits = zip(groups[f"{kind}low"], groups[f"{kind}high"], strict=True)
        return ["" if math.isnan(low) else f"{low:.3f}–{high:.3f}" for low, high in limits]

    return pd.DataFrame(
        {
            "factor": groups["factor"],
            "group": groups["group"],
            "pairs": groups["pairs"],
            "similarity": groups["similarity"].map(_number),
            "chance level": groups["chance"].map(_number),
            "95 % permutation interval": interval("permutation_"),
            "95 % interval over runs": interval(""),
        }
    )


# -------------------------------------------------------------------------------------------------------------- figures


def _chance_title(factor: str, pairs: pd.DataFrame) -> str:
    """Name a panel by its factor and the chance levels of its pairs."""
    levels = sorted({f"{chance:.3f}" for chance in pairs.loc[pairs["factor"] == factor, "chance"]})
    return f"{factor}: chance level {' to '.join(dict.fromkeys(levels[:1] + levels[-1:]))}"


def _shown_groups(groups: pd.DataFrame, factor: str) -> pd.DataFrame:
    """Return the groups of a factor that a figure shows: trained factors first, then the groups with most pairs."""
    of_factor = groups[groups["factor"] == factor]
    ranks = pd.DataFrame({"state": of_factor["state"].map(STATES.index), "pairs": -of_factor["pairs"]}).sort_values(
        ["state", "pairs"]
    )
    return of_factor.loc[ranks.index[:MOST_GROUPS]].sort_values("similarity", ascending=False)


def _members(pairs: pd.DataFrame, group: Any) -> pd.DataFrame:
    """Return the pairs of a group."""
    facts = pd.Series({fact: getattr(group, fact) for fact in ("factor", *FACTS) if getattr(group, fact)})
    return pairs[pairs[facts.index].eq(facts).all(axis=1)]


def _groups_figure(pairs: pd.DataFrame, groups: pd.DataFrame) -> Figure:
    shown = {factor: _shown_groups(groups, factor) for factor in SIDES}
    sizes = [max(1, len(of_factor)) for of_factor in shown.values()]
    figure, panels = new_figure(height=1.6 + 0.42 * sum(sizes), rows=2, sharex=True, height_ratios=sizes)
    for axes, (factor, of_factor) in zip(panels, shown.items(), strict=True):
        for row, group in enumerate(of_factor.itertuples()):
            limits = (group.permutation_low, group.permutation_high)
            axes.fill_betweenx([row - 0.4, row + 0.4], *limits, color="#b0b0b0", lw=2)
            axes.plot([group.chance] * 2, [row - 0.4, row + 0.4], color="black", lw=1.5)
            values = _members(pairs, group)["similarity"]
            axes.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.35, markersize=4)
            reach = [[group.similarity - group.low], [group.high - group.similarity]]
            axes.errorbar(group.similarity, row, xerr=reach, fmt="o", color=COLOURS[1], markersize=7, capsize=4)
        axes.set_yticks(range(len(of_factor)), of_factor["group"])
        axes.set_ylim(len(of_factor) - 0.4, -0.6)
        axes.set_title(_chance_title(factor, pairs), fontsize=10, loc="left")
    panels[-1].set_xlim(left=0)  # after all panels are drawn, since set_xlim fixes the right end too
    panels[-1].set_xlabel("similarity")
    return figure


def _pairs_figure(runs: Sequence[FinishedRun], pairs: pd.DataFrame) -> Figure:
    labels = [run.label for run in runs]
    numbers = [label.partition(":")[0] for label in labels]
    figure, panels = new_figure(height=1.6 + 2 * max(1.4, 0.36 * len(labels)), rows=2, sharex=True)
    for axes, factor in zip(panels, SIDES, strict=True):
        grid = np.where(np.eye(len(labels)), 1, np.nan)
        for pair in pairs[pairs["factor"] == factor].itertuples():
            i, j = labels.index(pair.first), labels.index(pair.second)
            grid[i, j] = grid[j, i] = pair.similarity
            if len(labels) <= MOST_ANNOTATED:
                text = f"{pair.similarity:.2f}" + ("\nfrozen" if pair.state == "frozen" else "")
                colour = "black" if pair.similarity > 0.6 else "white"
                for column, row in ((i, j), (j, i)):
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(labels)), numbers)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(_chance_title(factor, pairs), fontsize=10, loc="left")
        axes.grid(False)
    panels[-1].set_xlabel("run")
    with figure_style():
        figure.colorbar(panels[0].images[0], ax=panels, label="similarity", shrink=0.8)
    return figure


def _layers_figure(pairs: pd.DataFrame, groups: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    blocks = list(dict.fromkeys(rows["block"]))
    figure, panels = new_figure(height=6.5, rows=2, sharex=True)
    for axes, factor in zip(panels, SIDES, strict=True):
        of_factor = rows[rows["factor"] == factor]
        axes.plot(
            range(len(blocks)), of_factor.groupby("block")["chance"].mean().reindex(blocks), color="#888888", lw=4
        )
        for index, group in enumerate(_shown_groups(groups, factor).itertuples()):
            members = _members(pairs, group)[["first", "second", "factor"]]
            mean = of_factor.merge(members).groupby("block")["similarity"].mean().reindex(blocks)
            style = {"color": COLOURS[index], "linestyle": ("-", "--", "-.", ":")[index % 4], "label": group.group}
            axes.plot(range(len(blocks)), mean, marker="o", markersize=4, **style)
        axes.set_title(_chance_title(factor, pairs), fontsize=10, loc="left")
        axes.set_ylabel("similarity")
        axes.set_ylim(bottom=0)
        side_legend(axes)
    panels[-1].set_xticks(range(len(blocks)), blocks, rotation=90 if max(map(len, blocks)) > 3 else 0)
    panels[-1].set_xlabel("block")
    return figure
