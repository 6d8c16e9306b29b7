"""Results of a sweep: a table with one row for each trial, and the facts that the report states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from app.sweep.facts import PlanFacts, TimeFacts
from app.sweep.plan import Plan, Range, grid_points
from app.sweep.schedule import Job, Outline
from app.sweep.storage import STATES
from datamodules.atomic import atomic_write

RESULTS = "results.parquet"
COLUMNS = ("variant", "phase", "point", "seed", "state", "error", "run", "chosen", "seconds")


def results_frame(plan: Plan, trials: Mapping[Job, FrozenTrial], left: Outline) -> pd.DataFrame:
    """Return one row for each trial, in the order of the variants, phases, points and seeds.

    The columns are `COLUMNS`, `search/<key>` for each searched key, `curve_steps`, `curve_values`, and one column for
    each metric, with the metric's name. The value of the selecting metric is from the best checkpoint.
    """
    order = {variant.name: i for i, variant in enumerate(plan.variants)}
    points = {job.point: json.loads(job.point) for job in trials}

    def sort_key(job: Job) -> tuple[Any, ...]:
        values = [_cell(points[job.point].get(key)) for key in plan.search]
        return order[job.variant], job.phase == "confirm", [(isinstance(v, str), v) for v in values], job.seed

    rows = [_row(plan, job, trials[job], points[job.point], left) for job in sorted(trials, key=sort_key)]
    searched = [f"search/{key}" for key in plan.search]
    fixed = [*COLUMNS, *searched, "curve_steps", "curve_values"]
    metrics = sorted({name for row in rows for name in row} - {*fixed})
    return pd.DataFrame(rows, columns=[*fixed, *metrics])


def _row(plan: Plan, job: Job, trial: FrozenTrial, point: Mapping[str, Any], left: Outline) -> dict[str, Any]:
    facts = trial.user_attrs
    return {
        "variant": job.variant,
        "phase": job.phase,
        "point": job.point,
        "seed": job.seed,
        "state": STATES[trial.state],
        "error": facts.get("error"),
        "run": facts.get("run"),
        "chosen": left.chosen.get(job.variant) == job.point,
        "seconds": facts.get("seconds"),
        **{f"search/{key}": _cell(point.get(key)) for key in plan.search},
        "curve_steps": facts.get("curve_steps", []),
        "curve_values": facts.get("curve_values", []),
        **facts.get("metrics", {}),
    }


def _cell(value: Any) -> float | str:
    """Return a searched value as a number or as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return value if isinstance(value, str) else json.dumps(value)


def write_results(frame: pd.DataFrame, output: Path) -> None:
    """Write the table of all trials."""
    with atomic_write(output / RESULTS) as file:
        frame.to_parquet(file, index=False)


def plan_facts(plan: Plan, left: Outline, command: Sequence[str], time: TimeFacts | None) -> PlanFacts:
    """Return the facts that the report states. Their notes and number of trials are complete.

    Args:
        plan: The sweep.
        left: The jobs that are left.
        command: Program and arguments that repeat the sweep.
        time: Facts about the time limit; None without a limit.
    """
    own_searches = [
        f"{variant.name}: {key} was searched over the variant's own values: {_listed(values)}."
        for variant in plan.variants
        for key, values in variant.search.items()
        if values != plan.search[key]
    ]
    changes = {
        "notes": (*plan.notes, *own_searches, *left.notes),
        "trials_per_variant": plan.trials_per_variant or len(grid_points(plan.variants[0])),
    }
    return PlanFacts(**vars(plan) | changes, finished=left.is_finished, command=list(command), time=time)


def _listed(values: tuple[Any, ...] | Range) -> str:
    return f"{values.low} to {values.high}" if isinstance(values, Range) else ", ".join(str(value) for value in values)
