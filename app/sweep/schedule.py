"""Compute the next trials of a sweep from its plan and its trials so far, with the same result in every process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from app.sweep.plan import Plan, Point, Range, Variant, grid_points, point_id

Phase = Literal["select", "confirm"]
State = Literal["waiting", "running", "complete", "pruned", "failed"]
FINISHED = ("complete", "pruned", "failed")
# notes on a point that is added to a grid
EXTENDED = "the best {key} of the grid, {best:g}, lies at its end, so the grid was extended to {value:g}."
BETWEEN = (
    "{key} {value:g}, next to the best value of the grid, was tried too, so that all variants have tried the same "
    "number of points."
)


@dataclass(frozen=True)
class Job:
    """One fit of a sweep; no two trials have the same job.

    Args:
        variant: Name of the variant.
        phase: `select` or `confirm`.
        point: Canonical JSON of the searched keys.
        seed: Seed of everything, the frozen factor included.
    """

    variant: str
    phase: Phase
    point: str
    seed: int


@dataclass(frozen=True)
class Record:
    """A job and its state.

    Args:
        job: The job.
        state: Its state.
        value: The selecting metric, a finite number; None unless the trial is complete.
    """

    job: Job
    state: State
    value: float | None = None


@dataclass
class Outline:
    """The jobs that are left.

    Args:
        needed: Jobs that must be finished before the next jobs are known, in the order to run them.
        sampling: Variants that need another sampled point.
        chosen: Chosen point of each variant, after all its points have been tried.
        extra: Points added to the grid, by variant.
        notes: Whole sentences about the search.
        expected: Number of jobs of the whole sweep, as far as known.
    """

    needed: list[Job] = field(default_factory=list)
    sampling: list[str] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    expected: int = 0

    @property
    def is_finished(self) -> bool:
        """Return True if nothing is left to do."""
        return not self.needed and not self.sampling


def outline(plan: Plan, records: Iterable[Record], sampled: Mapping[str, list[str]]) -> Outline:
    """Return the jobs that a sweep needs next.

    A variant's point is chosen by the mean of the metric over the selecting seeds. A point with a failed or pruned
    selecting trial is never chosen.

    If a variant's best value lies at an end of its grid, this variant tries one more value there. Each other variant
    tries a value between its best value and the better neighbour, so that all variants try the same number of points.
    If rounding leaves no new value, the variant tries no further point.

    Args:
        plan: The sweep.
        records: Trials of the sweep so far.
        sampled: Points of each variant, if the plan samples points. A point that was drawn twice is listed twice.
    """
    known = {record.job: record for record in records}
    result = Outline()
    if plan.is_sampled:
        tried = {name: list(dict.fromkeys(points)) for name, points in sampled.items()}
    else:
        tried = {variant.name: [point_id(point) for point in grid_points(variant)] for variant in plan.variants}
    with_choice = [name for name, points in tried.items() if plan.is_sampled or len(points) > 1]
    _need(result, known, _select_jobs(plan, {name: tried[name] for name in with_choice}))
    if plan.is_sampled:
        missing = {name: plan.trials_per_variant - len(points) for name, points in sampled.items()}  # type: ignore[operator]
        result.sampling = sorted((name for name in missing if missing[name] > 0), key=lambda name: -missing[name])
        result.expected += len(plan.select_seeds) * sum(n for n in missing.values() if n > 0)
    result.expected += len(plan.variants) * len(plan.confirm_seeds)
    if not result.is_finished:
        return result
    if with_choice and not plan.is_sampled:
        result.extra, result.notes = _extra_points(plan, known, tried)
        _need(result, known, _select_jobs(plan, {name: [point] for name, point in result.extra.items()}))
        if not result.is_finished:
            return result
    for variant in plan.variants:
        points = [*tried[variant.name], *([result.extra[variant.name]] if variant.name in result.extra else [])]
        chosen = points[0] if variant.name not in with_choice else _best(plan, variant.name, points, known)
        if chosen is None:
            result.notes.append(f"{variant.name}: no point is chosen, since no point is complete with all seeds.")
            result.expected -= len(plan.confirm_seeds)
        else:
            result.chosen[variant.name] = chosen
    jobs = [Job(name, "confirm", point, seed) for seed in plan.confirm_seeds for name, point in result.chosen.items()]
    result.needed = [job for job in jobs if job not in known or known[job].state not in FINISHED]
    return result


def _need(result: Outline, known: Mapping[Job, Record], jobs: list[Job]) -> None:
    result.expected += len(jobs)
    result.needed += [job for job in jobs if job not in known or known[job].state not in FINISHED]


def _select_jobs(plan: Plan, points: Mapping[str, list[str]]) -> list[Job]:
    """Return jobs point by point, not variant by variant, so that a slow phase of the machine affects all variants."""
    longest = max((len(listed) for listed in points.values()), default=0)
    return [
        Job(name, "select", listed[i], seed)
        for seed in plan.select_seeds
        for i in range(longest)
        for name, listed in points.items()
        if i < len(listed)
    ]


def _best(plan: Plan, variant: str, points: Iterable[str], known: Mapping[Job, Record]) -> str | None:
    """Return the point with the best mean over the selecting seeds. Points that lack a seed do not count."""
    means = {}
    for point in points:
        records = (known.get(Job(variant, "select", point, seed)) for seed in plan.select_seeds)
        values = [record.value for record in records if record is not None and record.value is not None]
        if len(values) == len(plan.select_seeds):
            means[point] = fmean(values)
    return plan.best(means)


# ------------------------------------------------------------------------------------------------------------ extension


def _extra_points(
    plan: Plan, known: Mapping[Job, Record], tried: Mapping[str, list[str]]
) -> tuple[dict[str, str], list[str]]:
    """Return one more point and a note for each variant, if the best value of any variant lies at an end of a grid."""
    chosen = {name: _best(plan, name, points, known) for name, points in tried.items()}
    best = {name: json.loads(point) for name, point in chosen.items() if point is not None}
    extra: dict[str, str] = {}
    notes: dict[str, str] = {}
    for note in (EXTENDED, BETWEEN):
        for variant in plan.variants:
            name = variant.name
            for key, values in _numeric_keys(variant) if name in best and name not in extra else ():
                now = best[name]
                if note == EXTENDED:
                    value = _next_value(values, now[key])
                else:
                    value = _value_between(plan, name, known, now, key, values)
                if value is not None:
                    extra[name] = point_id({**now, key: value})
                    notes[name] = f"{name}: {note.format(key=key, best=now[key], value=value)}"
                    break
        if not extra:
            return {}, []
    new = [name for name in tried if name in extra and extra[name] not in tried[name]]
    return {name: extra[name] for name in new}, [notes[name] for name in new]


def _numeric_keys(variant: Variant) -> list[tuple[str, tuple[float, ...]]]:
    """Return the searched keys that have several values, all numbers and in ascending order."""
    return [
        (key, values)
        for key, values in variant.search.items()
        if not isinstance(values, Range) and len(values) > 1
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ]


def _is_geometric(values: tuple[float, ...]) -> bool:
    """Return True if a list of ascending numbers grows by factors rather than by steps."""
    if values[0] <= 0:
        return False
    steps = [b - a for a, b in pairwise(values)]
    return len(values) == 2 or not math.isclose(min(steps), max(steps), rel_tol=0.01)


def _next_value(values: tuple[float, ...], best: float) -> float | None:
    """Return the value that continues a grid beyond its best value; None if the best value is at no end of the grid.

    A grid without negative numbers is not continued below zero.
    """
    if best not in (values[0], values[-1]):
        return None
    end, before = (best, values[-2]) if best == values[-1] else (best, values[1])
    value = _rounded(end * end / before if _is_geometric(values) else 2 * end - before, values)
    if value in values or (value < 0 <= values[0]):
        return None
    return value


def _value_between(
    plan: Plan, variant: str, known: Mapping[Job, Record], best: Point, key: str, values: tuple[float, ...]
) -> float | None:
    """Return a value between the best value of a key and its better neighbour; None if there is no such number."""
    i = values.index(best[key])
    neighbours = [values[j] for j in (i - 1, i + 1) if 0 <= j < len(values)]
    points = {point_id({**best, key: value}): value for value in neighbours}
    better = _best(plan, variant, points, known)
    a, b = best[key], neighbours[0] if better is None else points[better]
    value = _rounded(math.sqrt(a * b) if _is_geometric(values) else (a + b) / 2, values)
    return None if value in values else value


def _rounded(value: float, values: tuple[float, ...]) -> float:
    """Round a number: to a whole number if the grid has whole numbers, otherwise to two significant digits."""
    return round(value) if all(isinstance(v, int) for v in values) else float(f"{value:.2g}")


def readable_point(point: Mapping[str, Any]) -> str:
    """Return a point as short text, such as `learning_rate 0.001`."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items())
