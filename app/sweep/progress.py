"""Progress of a sweep: a line for each worker on a terminal, a line for each finished trial elsewhere."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from app.console import escape_controls
from app.sweep.schedule import Job
from app.sweep.storage import describe
from app.sweep.trial import Curve

_log = logging.getLogger(__name__)


class SweepProgress:
    """Show the trial of each worker, the number of finished trials, and the estimated time left.

    `bars` draws within its context, on a terminal only.

    Args:
        workers: Number of trials that run at once.
        metric: Metric to show for each trial.
        deadline: Value of `time.monotonic` at which the sweep ends; infinite for none.
    """

    def __init__(self, workers: int, metric: str, deadline: float) -> None:
        self.metric, self.workers, self.deadline = metric, workers, deadline
        self.done = self.expected = 0
        self._seconds: list[float] = []
        console = Console()
        text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        self.bars = Progress(
            text, BarColumn(20), MofNCompleteColumn(), note, console=console, disable=not console.is_terminal
        )
        self._all = self.bars.add_task("Trials", total=None, note="")
        self._lines: list[TaskID] = [self.bars.add_task("", note="", visible=False) for _ in range(workers)]

    def count(self, done: int, expected: int) -> None:
        """Show the number of finished trials, and of all trials."""
        self.done, self.expected = done, expected
        self.bars.update(self._all, completed=done, total=expected, note=self._time_left())

    def begin(self, worker: int, job: Job) -> None:
        """Show that a worker runs a trial."""
        text = escape_controls(describe(job))
        self.bars.reset(self._lines[worker], description=text, total=None, note=job.phase, visible=True)

    def advance(self, worker: int, curve: Curve) -> None:
        """Show the newest validation of a worker's trial, which has one."""
        step = max(curve.points)
        value = curve.points[step][0]
        note = f"{self.metric} {'not finite' if value is None else format(value, '.4g')}"
        self.bars.update(self._lines[worker], completed=step, total=curve.steps, note=note)

    def finish(self, worker: int, job: Job, result: str, seconds: float) -> None:
        """Show the result of a trial."""
        self._seconds.append(seconds)
        self.done += 1
        self.bars.update(self._lines[worker], visible=False)
        left = self._time_left()
        count = f"{self.done} of {max(self.expected, self.done)}"
        _log.info(f"{count}: {describe(job)} ({job.phase}): {result}, {seconds:.0f} s{f'; {left}' if left else ''}.")

    def _time_left(self) -> str:
        left = self.expected - self.done
        if not self._seconds or left <= 0:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * left / self.workers
        seconds = min(seconds, max(0.0, self.deadline - time.monotonic()))
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"about {hours} h {minutes} min left" if hours else f"about {minutes} min left"
