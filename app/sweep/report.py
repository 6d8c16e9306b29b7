"""Report of a sweep: findings in words, the table of variants, paired differences and figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from app.console import bytes_text, escape_controls, seconds_text
from app.reports.report import Report
from app.sweep import figures
from app.sweep.facts import PlanFacts
from app.sweep.findings import findings, introduction
from app.sweep.outcome import Outcome, is_value, value_text
from app.sweep.plan import Range
from app.sweep.statistics import BOOTSTRAP_SEEDS, STUDENT_SEEDS, PairedDifference
from datamodules.atomic import atomic_write
from datamodules.errors import counted

FAILURE_TEXT = ("point", "seeds", "error", "run")
TABLE_FILE = "table.md"
INTERVALS = (
    f"Student intervals need {STUDENT_SEEDS} shared seeds, and decide which differences are called clear. Bootstrap "
    f"intervals (percentile method, seeds resampled in pairs) need {BOOTSTRAP_SEEDS}. From so few seeds, bootstrap "
    "intervals are too narrow: of 95 % intervals from five normal differences, 84 % hold the true difference."
)
COSTS_NOTE = (
    "Fit time and peak memory are medians over the confirmed seeds. They were measured while other trials of the sweep "
    "could be running on the same machine. Trained parameters include the head. The adapter file "
    "counts the factors alone."
)


def write_report(facts: PlanFacts, results: pd.DataFrame, folder: Path) -> None:
    """Write `table.md` and `report.html`.

    Args:
        facts: The plan.
        results: One row for each trial; metrics, searched keys and curves may be missing.
        folder: Directory of the sweep. A previous report in it is overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TABLE_FILE) as file:
        file.write(_markdown(facts, results).encode())
    _page(facts, results).write(folder, pictures=False)


def rich_table(facts: PlanFacts, results: pd.DataFrame) -> Table:
    """Return the table of variants for the terminal."""
    frame = main_table(Outcome(facts, results))
    table = Table(title=Text(f"Sweep {escape_controls(facts.name)}"), box=box.SIMPLE_HEAD)
    for name in frame.columns:
        table.add_column(Text(escape_controls(name)), justify="left" if name == "variant" else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(escape_controls(cell)) for cell in row))
    return table


def main_table(outcome: Outcome) -> pd.DataFrame:
    """Return the table of variants: chosen point, confirmed means and costs, as text."""
    rows = []
    for variant in outcome.variants:
        chosen = outcome.chosen(variant)
        row = {"variant": variant}
        for key in outcome.keys:
            value = None if chosen is None else chosen[f"search/{key}"]
            row[outcome.short(key)] = value_text(value) if is_value(value) else "–"
        row["seeds"] = str(outcome.mean(variant, outcome.metric).seeds)
        for metric in outcome.report:
            scale, mean = outcome.scale(metric), outcome.mean(variant, metric)
            seeds = f" (n = {mean.seeds})" if mean.seeds and str(mean.seeds) != row["seeds"] else ""
            row[f"{scale.name} {'↑' if scale.higher_is_better else '↓'}"] = scale.mean(mean) + seeds
        parameters, size = outcome.cost(variant, "params/trainable"), outcome.cost(variant, "adapter/bytes")
        seconds, memory = outcome.cost(variant, "time/fit_seconds"), outcome.cost(variant, "memory/peak_bytes")
        row["trained parameters"] = "–" if parameters is None else f"{parameters:,.0f}"
        row["adapter file"] = "–" if size is None else bytes_text(size) if size else "none"
        row["fit time"] = "–" if seconds is None else seconds_text(seconds)
        row["peak memory"] = "–" if memory is None else bytes_text(memory)
        rows.append(row)
    return pd.DataFrame(rows)


def difference_table(outcome: Outcome) -> pd.DataFrame:
    """Return the paired differences of all pairs that share a confirmed seed, as text."""
    scale = outcome.scale(outcome.metric)

    def interval(bounds: tuple[float, float] | None) -> str:
        return "–" if bounds is None else f"{scale.signed(bounds[0])} to {scale.signed(bounds[1])}"

    def reading(pair: PairedDifference) -> str:
        if pair.student is None:
            return "too few seeds"
        verdict = outcome.verdict(pair)
        return f"{pair.first if verdict > 0 else pair.second} clearly better" if verdict else "cannot tell"

    return pd.DataFrame(
        [
            {
                "first − second": f"{pair.first} − {pair.second}",
                "seeds": str(pair.seeds),
                f"difference in {scale.name}": scale.signed(pair.mean),
                "95 % Student": interval(pair.student),
                "95 % bootstrap": interval(pair.bootstrap),
                "reading": reading(pair),
            }
            for pair in outcome.differences
            if pair.seeds
        ]
    )


def _caption(outcome: Outcome) -> str:
    """Return the caption of the table of variants."""
    return (
        "Chosen points and their confirmed results: mean ± standard error over the confirmed seeds "
        f"(↑ higher is better, ↓ lower is better). {outcome.metric} decides the comparison."
    )


def _markdown(facts: PlanFacts, results: pd.DataFrame) -> str:
    """Return the report in Markdown: findings and tables."""
    outcome = Outcome(facts, results)
    parts = [f"# Sweep {facts.name}", introduction(facts, results)]
    parts.append("\n".join(f"- {sentence}" for sentence in findings(facts, results)))
    parts += ["## Variants", _caption(outcome), _rows(main_table(outcome)), COSTS_NOTE]
    differences = difference_table(outcome)
    if not differences.empty:
        parts += ["## Paired differences over the same seeds", _rows(differences), INTERVALS]
    if facts.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in facts.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(frame: pd.DataFrame) -> str:
    """Return a table of text in Markdown."""

    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(frame.columns) - 1)]) + "|"
    return "\n".join([line(frame.columns), rule, *(line(row) for row in frame.itertuples(index=False))])


def _page(facts: PlanFacts, results: pd.DataFrame) -> Report:
    """Return the HTML page."""
    outcome = Outcome(facts, results)
    report = Report(f"Sweep {facts.name}")
    report.add_paragraph(introduction(facts, results))
    for sentence in findings(facts, results):
        report.add_paragraph(sentence)
    report.add_heading("Variants")
    report.add_table(_caption(outcome), main_table(outcome).map(lambda cell: cell.replace(" ", "\N{NO-BREAK SPACE}")))
    report.add_paragraph(COSTS_NOTE)
    _add_differences(report, outcome)
    _add_responses(report, outcome)
    _add_quality(report, outcome)
    _add_curves(report, outcome)
    _add_lost(report, outcome)
    report.add_heading("Notes")
    for note in facts.notes or ["None."]:
        report.add_paragraph(note)
    _add_repetition(report, outcome)
    return report


def _add_differences(report: Report, outcome: Outcome) -> None:
    report.add_heading("Differences between variants over the same seeds")
    table = difference_table(outcome)
    if table.empty:
        report.add_paragraph("No two variants share a confirmed seed yet, so there is no difference to show.")
        return
    picture = figures.forest(outcome)
    if picture is None:
        report.add_paragraph(f"No pair of variants shares {STUDENT_SEEDS} confirmed seeds, so no interval is drawn.")
    else:
        scale, shown = outcome.scale(outcome.metric), figures.forest_pairs(outcome)
        every = sum(pair.student is not None for pair in outcome.differences)
        only = f" Only the pairs with {outcome.ranked[0]} are drawn." if len(shown) < every else ""
        report.add_figure(
            "differences",
            picture,
            f"Paired differences in {scale.metric} with 95 % intervals",
            "Points are mean differences, thin lines Student intervals, thick bars bootstrap intervals. Look for "
            f"coloured lines, which do not reach 0: only these pairs differ beyond the spread of the seeds.{only}",
        )
    caption = f"Paired differences ({counted(len(table), 'pair')}, no interval corrected for their number)"
    report.add_table(caption, table, text_columns=["reading"])
    report.add_paragraph(INTERVALS)


def _add_responses(report: Report, outcome: Outcome) -> None:
    metric, facts = outcome.facts.metric, outcome.facts
    report.add_heading("Response to the searched keys")
    if not outcome.keys:
        report.add_paragraph("No key was searched.")
    extreme, edge = ("highest", "bottom") if facts.mode == "max" else ("lowest", "top")
    for key in outcome.keys:
        picture = figures.response(outcome, key)
        if picture is None:
            report.add_paragraph(f"No complete trial has a value of {metric} and {key} yet.")
            continue
        grid = not isinstance(facts.search[key], Range) or len(outcome.keys) == 1
        line = "lines join the means over these seeds" if grid else "filled points are the means over these seeds"
        if len(outcome.keys) > 1:
            line += ", at the best values of the other searched keys"
        report.add_figure(
            f"response_{key}",
            picture,
            f"{metric} by {outcome.short(key)} on the selecting seeds",
            f"Hollow points are complete trials; {line}. Variants are shifted sideways a little. Rings mark the chosen "
            f"points ({extreme} mean). Crosses at the {edge} edge mark trials that failed, diverged or lie beyond the "
            "axis. Look for rings inside the range: a ring at an end means that better values may lie beyond.",
        )


def _add_quality(report: Report, outcome: Outcome) -> None:
    report.add_heading("Quality against trained parameters")
    picture = figures.quality_by_parameters(outcome)
    if picture is None:
        report.add_paragraph("Fewer than two variants have confirmed results with a number of parameters.")
        return
    scale = outcome.scale(outcome.metric)
    corner = "upper" if scale.higher_is_better else "lower"
    report.add_figure(
        "quality",
        picture,
        f"{scale.metric} by trained parameters",
        "Markers are confirmed means, bars ± one standard error; the horizontal axis is logarithmic. Look for variants "
        f"in the {corner} left: good with few parameters.",
    )


def _add_curves(report: Report, outcome: Outcome) -> None:
    report.add_heading("Training curves of the chosen points")
    picture = figures.curves(outcome)
    if picture is None:
        report.add_paragraph(f"No trial at a chosen point has validations of {outcome.facts.metric} yet.")
        return
    report.add_figure(
        "curves",
        picture,
        f"{outcome.facts.metric} by optimizer step at the chosen points",
        "Each panel shows one variant. Thin lines are its seeds (the confirming seeds, if there are any), and the "
        "thick line is their mean. Grey lines are the means of the other variants. Look for thick lines that still "
        "improve at the end: more training would change the comparison.",
    )


def _add_lost(report: Report, outcome: Outcome) -> None:
    report.add_heading("Trials that failed or were pruned")
    failed, pruned = outcome.state("failed"), outcome.state("pruned")
    if failed.empty and pruned.empty:
        report.add_paragraph("None.")
    if not failed.empty:
        rows = [
            {
                "variant": variant,
                "point": outcome.point(group.iloc[0]),
                "seeds": _seeds(group["seed"]),
                "error": error,
                "run": next((run for run in group["run"] if is_value(run)), "–"),
            }
            for (variant, _, error), group in _grouped(failed.assign(error=failed["error"].fillna("–")), "error")
        ]
        caption = f"{len(failed)} failed. A point whose selecting trial failed is never chosen."
        report.add_table(f"{caption} Run is the first seed's run directory.", pd.DataFrame(rows), FAILURE_TEXT)
    if not pruned.empty:
        scale = outcome.scale(outcome.facts.metric)
        rows = []
        for (variant, _), group in _grouped(pruned):
            values = [list(curve)[-1] for curve in group["curve_values"] if is_value(curve) and len(curve)]
            steps = [int(list(curve)[-1]) for curve in group["curve_steps"] if is_value(curve) and len(curve)]
            rows.append(
                {
                    "variant": variant,
                    "point": outcome.point(group.iloc[0]),
                    "seeds": _seeds(group["seed"]),
                    "steps": ", ".join(map(str, steps)) or "–",
                    f"last {scale.name}": ", ".join(map(scale.text, values)) or "–",
                }
            )
        caption = f"{len(pruned)} pruned: stopped early, since other trials were ahead."
        report.add_table(caption, pd.DataFrame(rows), text_columns=["point", "seeds"])


def _add_repetition(report: Report, outcome: Outcome) -> None:
    facts = outcome.facts
    report.add_heading("How to repeat the sweep")
    report.add_paragraph(
        "Run the command with the sweep's file and its recipes. Each trial is one main.py fit. results.parquet beside "
        "this page names the run directory of every trial. The config.yaml there repeats the trial alone."
    )
    report.add_code(shlex.join(facts.command))
    shared = [("base", path) for path in facts.base] + [("set", f"{k} = {_json(v)}") for k, v in facts.set.items()]
    shared += [("search", f"{key} in {_json(values)}") for key, values in facts.search.items()]
    shared += [("select", f"{facts.mode} of {facts.metric} on seeds {_seeds(facts.select_seeds)}")]
    confirming = f"seeds {_seeds(facts.confirm_seeds)}" if facts.confirm_seeds else "no seeds"
    shared += [("confirm", f"{', '.join(outcome.report)} on {confirming}")]
    shared += [("trials_per_variant", str(facts.trials_per_variant)), ("prune", facts.prune)]
    if facts.time is not None:
        shared.append(("minutes", f"{facts.time.minutes:g}"))
    report.add_table("What all trials share", pd.DataFrame(shared, columns=["section", "value"]), ["value"])
    cells = {name: {k: _json(v) for k, v in keys.items()} for name, keys in outcome.variant_keys.items()}
    if any(cells.values()):
        table = pd.DataFrame(cells, dtype=object).fillna("–").rename_axis("key").reset_index()
        report.add_table("Keys of each variant", table, outcome.variants)


def _grouped(trials: pd.DataFrame, *columns: str) -> Any:
    """Group trials by variant, point and further columns, in the order of the trials."""
    return trials.assign(point=trials["point"].fillna("")).groupby(["variant", "point", *columns], sort=False)


def _seeds(seeds: Iterable[int]) -> str:
    """Return seeds as text."""
    return ", ".join(str(seed) for seed in sorted(seeds))


def _json(value: Any) -> str:
    """Return a configured value, or the range of a searched key, as text."""
    return value if isinstance(value, str) else json.dumps(value, default=asdict)
