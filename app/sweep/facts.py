"""Facts of a sweep's plan that its report states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlanFacts:
    """Facts of a sweep that its report repeats to a reader who did not run the sweep.

    Args:
        name: Name of the sweep.
        metric: Validation metric that chooses each variant's point, such as `val/score`.
        mode: Direction in which the metric is better: `max` or `min`.
        select_seeds: Seeds of the trials that choose a point.
        confirm_seeds: Seeds of the trials that fill the table.
        report: Metrics of the table, such as `test/score`; the first metric decides the comparison.
        base: Recipes and overlays of every trial.
        set: Keys that every trial sets.
        variants: All keys of each variant, in the order of the table.
        search: Searched keys with their values or ranges.
        notes: Whole sentences about the search, such as "B: the grid was extended to 0.008."
        finished: True when no trial is left to run.
        trials_per_variant: Number of points that each variant tries, without an extension of the grid.
        prune: Rule that stops poor trials early.
        command: Program and arguments that repeat the sweep.
        time: Facts about the time limit; None without a limit.
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
    trials_per_variant: int
    prune: str
    command: list[str]
    time: TimeFacts | None = None

    @property
    def counted_seeds(self) -> list[int]:
        """Return the confirming seeds that the table may count."""
        left_out = self.time.left_out_seeds if self.time else []
        return [seed for seed in self.confirm_seeds if seed not in left_out]


@dataclass(frozen=True)
class TimeFacts:
    """Time limit of a sweep, and the work that did not fit into it.

    Args:
        minutes: The time limit.
        is_over: True if the sweep has ended because of the limit.
        left_out_seeds: Confirming seeds that not all variants have finished. The table leaves these seeds out.
        missing_seconds: Estimated seconds for the rest of the choice, or for the next confirming seed; None if unknown.
    """

    minutes: float
    is_over: bool
    left_out_seeds: list[int]
    missing_seconds: float | None
