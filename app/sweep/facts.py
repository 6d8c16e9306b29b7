"""Facts of a sweep's plan that its report states."""

from __future__ import annotations

from dataclasses import dataclass

from app.sweep.plan import Plan


@dataclass(frozen=True, kw_only=True)
class PlanFacts(Plan):
    """A plan with the facts of its sweep that the report repeats to a reader who did not run the sweep.

    Args:
        finished: True when no trial is left to run.
        command: Program and arguments that repeat the sweep.
        time: Facts about the time limit; None without a limit.
    """

    finished: bool
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
