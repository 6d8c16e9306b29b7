"""Facts of a sweep's plan that its report states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlanFacts:
    """What a sweep compared and how, as its report repeats to a reader who did not run the sweep.

    Args:
        name: Name of the sweep.
        metric: Validation metric that chooses each variant's point, such as `val/score`.
        mode: Direction in which the metric is better: `max` or `min`.
        select_seeds: Seeds of the trials that choose a point.
        confirm_seeds: Seeds of the trials that fill the table.
        report: Metrics of the table, such as `test/score`; the first one decides the comparison.
        base: Recipes and overlays under every trial.
        set: Keys that every trial sets.
        variants: All keys of each variant, in the order of the table.
        search: Searched keys with their values or ranges.
        notes: Whole sentences about the search, such as "B: the grid was extended to 0.008."
        finished: True when no trial is left to run.
    """

    name: str
    metric: str
    mode: str
    select_seeds: list[int]
    confirm_seeds: list[int]
    report: list[str]
    base: list[str]
    set: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    search: dict[str, Any]
    notes: list[str]
    finished: bool
