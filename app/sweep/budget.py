"""Time limit of a sweep: confirming seeds start one at a time, and only if all variants have time for the seed."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterable, Mapping
from statistics import fmean

from optuna.trial import FrozenTrial

from app.console import seconds_text
from app.sweep.plan import Plan
from app.sweep.schedule import Job, Outline
from app.sweep.storage import STATES

Trials = Mapping[Job, FrozenTrial]

_log = logging.getLogger(__name__)


class Budget:
    """Wall-clock time of one command.

    Args:
        plan: The sweep.
        minutes: Time limit, counted from `began`.
        workers: Number of trials at once.
        began: Value of `time.monotonic` when the command began.
    """

    def __init__(self, plan: Plan, minutes: float, workers: int, began: float) -> None:
        self.plan, self.minutes, self.workers = plan, minutes, workers
        self.deadline = began + 60 * minutes
        self._begun: set[int] = set()  # confirming seeds
        self._refused: set[int] = set()

    @property
    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def allowed(self, left: Outline, trials: Trials, busy: Mapping[Job, float]) -> list[Job]:
        """Return the needed jobs that may run now.

        After the deadline, no job may run. Before, all jobs of the phase `select` may run. The next confirming seed
        starts when no job of the previous seeds is waiting, and if all jobs of the seed are estimated to fit into the
        time. Without any complete trial, there is no estimate, and the seed starts.

        Args:
            left: The jobs that are left.
            trials: The trials so far.
            busy: Jobs that this process runs, with the seconds since their start.
        """
        if self.left <= 0:
            return []
        jobs = [job for job in left.needed if job.phase == "select"]
        for seed in self.plan.confirm_seeds:
            of_seed = [job for job in left.needed if job.phase == "confirm" and job.seed == seed]
            idle = [job for job in of_seed if job not in trials or STATES[trials[job].state] != "running"]
            if idle and seed not in self._begun:
                seconds = self.seconds_for(idle, trials, busy)
                if seconds is not None and seconds > self.left:
                    self._log_refusal(seed, seconds)
                    break
                self._begun.add(seed)
            jobs += of_seed
            if idle:
                break
        return jobs

    def seconds_for(self, jobs: Iterable[Job], trials: Trials, busy: Mapping[Job, float]) -> float | None:
        """Estimate the seconds until jobs finish, after the jobs that run now; None if no trial is complete yet."""
        durations = {
            job: float(trial.user_attrs["seconds"])
            for job, trial in trials.items()
            if STATES[trial.state] == "complete" and "seconds" in trial.user_attrs
        }
        free_in = [max(0.0, (_estimate(job, durations) or 0.0) - age) for job, age in busy.items()]
        free_in += [0.0] * (self.workers - len(free_in))
        heapq.heapify(free_in)
        end = 0.0
        for job in jobs:
            needed = _estimate(job, durations)
            if needed is None:
                return None
            finished = heapq.heappop(free_in) + needed
            heapq.heappush(free_in, finished)
            end = max(end, finished)
        return end

    def _log_refusal(self, seed: int, seconds: float) -> None:
        if seed not in self._refused:
            self._refused.add(seed)
            _log.info(
                f"Seed {seed} is not started: all variants would take about {seconds_text(seconds)}, and "
                f"{seconds_text(self.left)} are left."
            )


def _estimate(job: Job, durations: Mapping[Job, float]) -> float | None:
    """Return the mean seconds of the most similar trials: of the same variant and phase, of the variant, or all."""
    of_variant = [timed for timed in durations if timed.variant == job.variant]
    similar = [timed for timed in of_variant if timed.phase == job.phase] or of_variant or list(durations)
    return fmean(durations[timed] for timed in similar) if similar else None
