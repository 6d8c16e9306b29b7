"""Run a sweep: workers take trials from the study, report their validations, prune them, and record their results."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from optuna.trial import FrozenTrial

from app.run.evaluations import read_metrics
from app.sweep.budget import Budget
from app.sweep.check import fit_arguments
from app.sweep.facts import PlanFacts, TimeFacts
from app.sweep.folders import job_folder
from app.sweep.plan import Plan, SweepError
from app.sweep.progress import SweepProgress
from app.sweep.report import write_report
from app.sweep.results import plan_facts, results_frame, write_results
from app.sweep.schedule import FINISHED, Job, Outline
from app.sweep.storage import HEARTBEAT, STATES, Claim, Ledger, describe, storage_problem
from app.sweep.trial import Curve, End, TrialProcess
from datamodules.base import usable_cpus
from datamodules.errors import counted

POLL = 0.2  # seconds between two checks of this process's trials
LOOK = 2.0  # seconds between two checks of the study while there is no trial to take
REPORT = 30.0  # seconds between two reports while the sweep runs
PRUNED_FROM = 0.25  # share of a trial's steps before which the trial is not pruned

_log = logging.getLogger(__name__)


@dataclass
class Running:
    """A trial that this process runs.

    Args:
        worker: Number of the worker that runs the trial, from 0.
        claim: Claim on the trial.
        trial: Process of the fit.
        reported: Steps whose validations the study has.
        is_pruned: True if the trial was stopped because other trials are ahead.
    """

    worker: int
    claim: Claim
    trial: TrialProcess
    reported: set[int] = field(default_factory=set)
    is_pruned: bool = False


class Sweep:
    """The part of a sweep that this process runs.

    Args:
        plan: The sweep.
        ledger: Trials of the sweep.
        output: Directory of the results.
        workers: Number of trials that run at once.
        imports: Options of the command line that allow imports, for the trials.
        command: Program and arguments that repeat the sweep.
        resume_command: Command that continues the sweep.
        budget: Time limit of this process; None without a limit.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        output: Path,
        workers: int,
        imports: list[str],
        command: list[str],
        resume_command: str,
        budget: Budget | None,
    ) -> None:
        self.plan, self.ledger, self.output, self.imports = plan, ledger, output, imports
        self.command, self.resume_command, self.budget = command, resume_command, budget
        self.environments = environments(workers)
        self._running: dict[int, Running] = {}  # by worker
        self.progress = SweepProgress(workers, plan.metric, budget.deadline if budget else float("inf"))
        self._kills: dict[Any, int] = {}
        self._next_look = self._next_beat = 0.0
        self._next_report = time.monotonic() + REPORT
        self._is_waiting = False

    def run(self) -> tuple[PlanFacts, pd.DataFrame]:
        """Run trials until no trial is left on any machine, or the time is over. Return the result of `report`.

        Raises:
            SweepError: If a trial is refused before its first step, the disk is full, or the study or the results
                cannot be written.
            SIGTERMException: After a signal, with the command that continues the sweep.
        """
        try:
            self._save_time(ended=False)
            with self.progress.bars:
                try:
                    while self._step():
                        time.sleep(POLL)
                finally:
                    self._stop()
                self._save_time(ended=True)
        except SIGTERMException as stop:
            self._report()
            raise SIGTERMException(f"the trials are saved; the same command continues: {self.resume_command}") from stop
        except Exception as error:
            if (problem := storage_problem(error)) is None:
                raise
            raise SweepError(
                f"{problem}. The finished trials are kept, and the others are saved. Fix the problem and continue "
                f"with the same command: {self.resume_command}"
            ) from error
        return self._report()

    def _step(self) -> bool:
        """Check the running trials and start new ones. Return False when no trial is left or the time is over."""
        if self.budget is not None and self.budget.left <= 0:
            return False
        now = time.monotonic()
        for running in list(self._running.values()):
            self._check_trial(running)
        self._beat()
        for worker in range(len(self.environments)):
            if worker not in self._running and now >= self._next_look and not self._take(worker):
                self._next_look = now + LOOK
        if now >= self._next_report:
            self._report()
            self._next_report = time.monotonic() + REPORT
        return bool(self._running) or not self._is_finished()

    def _beat(self) -> None:
        """Record heartbeats, so that other machines know that this process is alive."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + HEARTBEAT
            for running in self._running.values():
                self.ledger.beat(running.claim)

    def _is_finished(self) -> bool:
        trials = self.ledger.trials()
        left = self.ledger.outline(trials)
        if self.budget is not None and not left.sampling and not self._allowed(left, trials):
            return True
        if not left.is_finished and not self._is_waiting:
            running = sum(STATES[trials[job].state] == "running" for job in left.needed if job in trials)
            _log.info(f"This process waits for trials of other processes: {running} are running.")
            self._is_waiting = True
        return left.is_finished

    def _allowed(self, left: Outline, trials: Mapping[Job, FrozenTrial]) -> list[Job]:
        """Return the needed jobs that may run now."""
        if self.budget is None:
            return left.needed
        busy = {running.claim.job: running.trial.seconds() for running in self._running.values()}
        return self.budget.allowed(left, trials, busy)

    def _take(self, worker: int) -> bool:
        claim = self.ledger.claim(self._allowed)
        trials = self.ledger.trials()
        done = sum(STATES[trial.state] in FINISHED for trial in trials.values())
        self.progress.count(done, max(self.ledger.outline(trials).expected, done))
        if claim is None:
            return False
        self._is_waiting = False
        variant = self.plan.variant(claim.job.variant)
        trial = TrialProcess(
            [*self.imports, *fit_arguments(self.plan, variant, json.loads(claim.job.point), claim.job.seed)],
            self.output / job_folder(claim.job),
            {"metric": self.plan.metric, "check_test": self.plan.is_tested and claim.job.phase == "select"},
            tests=self.plan.is_tested and claim.job.phase == "confirm",
            environment=self.environments[worker],
            lock=claim.lock,
        )
        self._running[worker] = Running(worker, claim, trial)
        self.progress.begin(worker, claim.job)
        return True

    # ---------------------------------------------------------------------------------------------------------- trials

    def _check_trial(self, running: Running) -> None:
        end = running.trial.end()
        curve = running.trial.curve()
        new = [(i, step) for i, step in enumerate(sorted(curve.points), start=1) if step not in running.reported]
        for i, step in new:
            running.reported.add(step)
            value = curve.points[step][0]
            if not self.ledger.report(running.claim, float("nan") if value is None else value, i) and end is None:
                _log.warning(f"{describe(running.claim.job)}: another process has taken the trial over.")
                running.trial.stop()
        if new:
            self.progress.advance(running.worker, curve)
        if end is not None:
            self._close(running, end, curve)
        elif new and self._may_prune(running, curve) and running.claim.trial.should_prune():
            running.is_pruned = True
            running.trial.stop()

    def _may_prune(self, running: Running, curve: Curve) -> bool:
        """Return True if a trial may be pruned: after its first quarter, which includes warm-up, and before its end."""
        step, steps = max(curve.points), curve.steps
        in_time = steps is None or PRUNED_FROM * steps <= step < steps
        return in_time and running.claim.job.phase == "select" and not running.is_pruned

    def _close(self, running: Running, end: End, curve: Curve) -> None:
        trial, claim = running.trial, running.claim
        job = claim.job
        if end == "killed":
            self._kills[job] = self._kills.get(job, 0) + 1
            if self._kills[job] < 2:
                _log.warning(f"{describe(job)}: killed ({trial.signal}). It resumes once from its last checkpoint.")
                trial.start()
                return
            self._finish(running, "failed", curve, f"killed twice ({trial.signal}), often because memory is full")
        elif end == "refused" and trial.resumes:
            _log.warning(f"{describe(job)}: cannot be resumed ({trial.error()}). The trial restarts from step 0.")
            trial.clear()
            trial.start()
        elif end == "refused" and self._is_extra(claim):
            self._finish(running, "failed", curve, trial.error())
        elif end in ("refused", "disk full"):
            self._free(running)
            problem = "refused before its first step" if end == "refused" else "stopped, since the disk is full"
            raise SweepError(
                f"{describe(job)}: {problem} ({trial.error().rstrip('.')}). Nothing is lost: fix the problem and run "
                f"the same command again. The trial's log is {trial.folder / 'log.txt'}."
            )
        elif end == "stopped" and running.is_pruned:
            self._finish(running, "pruned", curve)
        elif end == "stopped":
            self._free(running)
        elif end == "failed":
            self._finish(running, "failed", curve, trial.error())
        elif trial.resumes and not (trial.run is not None and trial.has_finished(trial.run)):
            trial.clear()  # killed between its last checkpoint and its summary, so the metrics of training are missing
            trial.start()
        elif curve.kept() is None:
            self._finish(running, "failed", curve, f"{self.plan.metric} is not finite at the best checkpoint")
        else:
            self._finish(running, "complete", curve)

    def _is_extra(self, claim: Claim) -> bool:
        """Return True for a point that is not in the sweep's file: a sampled point, or an extension of the grid."""
        left = self.ledger.outline(self.ledger.trials())
        return self.plan.is_sampled or left.extra.get(claim.job.variant) == claim.job.point

    def _finish(self, running: Running, state: Any, curve: Curve, error: str | None = None) -> None:
        trial, claim = running.trial, running.claim
        run, value = trial.run, curve.kept()
        steps = sorted(curve.points)
        metrics = dict(read_metrics(run)) if run is not None else {}
        if steps:
            metrics[self.plan.metric] = value
        facts = {
            "metrics": metrics,
            "curve_steps": steps,
            "curve_values": [curve.points[step][0] for step in steps],
            "run": str(run.relative_to(self.output)) if run is not None else None,
            "seconds": trial.seconds(),
            **({"error": error} if error is not None else {}),
        }
        self.ledger.finish(claim, state, value, facts)
        shown = f"{self.plan.metric} {value:.4g}" if value is not None else "no value"
        result = {"failed": f"failed ({error})", "pruned": f"stopped early at {shown}"}.get(state, shown)
        del self._running[running.worker]
        self._next_look = 0.0
        self.progress.finish(running.worker, claim.job, result, trial.seconds())

    def _free(self, running: Running) -> None:
        self.ledger.release(running.claim)
        del self._running[running.worker]

    def _stop(self) -> None:
        """Let the running trials save and stop, and queue them again."""
        busy = list(self._running.values())
        for running in busy:
            running.trial.stop()
        if busy:
            _log.info(f"Stopping {counted(len(busy), 'trial after its', 'trials after their')} current step.")
        for running in busy:
            while (end := running.trial.end()) is None:
                time.sleep(POLL)
            try:
                if end == "complete":
                    self._close(running, end, running.trial.curve())
                else:
                    self._free(running)
            except Exception as error:
                if storage_problem(error) is None:
                    raise  # otherwise the trial is queued again, since its owner has ended

    # ---------------------------------------------------------------------------------------------------------- report

    def _save_time(self, ended: bool) -> None:
        """Save the time limit for reports, and at the end also the estimated seconds of the next jobs."""
        if self.budget is None:
            self.ledger.save_time(None)
            return
        trials = self.ledger.trials()
        left = self.ledger.outline(trials)
        seconds = None
        if ended and left.needed and not left.sampling:
            first = left.needed[0]
            following = [job for job in left.needed if first.phase == "select" or job.seed == first.seed]
            seconds = self.budget.seconds_for(following, trials, {})
        is_over = ended and not left.is_finished
        self.ledger.save_time({"minutes": self.budget.minutes, "is_over": is_over, "missing_seconds": seconds})

    def _report(self) -> tuple[PlanFacts, pd.DataFrame]:
        return report(self.plan, self.ledger, self.output, self.command)


def report(plan: Plan, ledger: Ledger, output: Path, command: Sequence[str]) -> tuple[PlanFacts, pd.DataFrame]:
    """Write the results and the report of a finished or running sweep.

    Args:
        plan: The sweep.
        ledger: Trials of the sweep.
        output: Directory of the results.
        command: Program and arguments that repeat the sweep, without `--minutes`.

    Returns:
        The facts that the report states about the plan, and the results.
    """
    trials = ledger.trials()
    left = ledger.outline(trials)
    frame = results_frame(plan, trials, left)
    saved_time, time_facts = ledger.saved_time(), None
    if saved_time is not None:
        jobs = {s: [Job(name, "confirm", p, s) for name, p in left.chosen.items()] for s in plan.confirm_seeds}
        done = [
            s for s in jobs if jobs[s] and all(j in trials and STATES[trials[j].state] in FINISHED for j in jobs[s])
        ]
        time_facts = TimeFacts(left_out_seeds=[s for s in plan.confirm_seeds if s not in done], **saved_time)
        command = [*command, "--minutes", f"{time_facts.minutes:g}"]
    facts = plan_facts(plan, left, command, time_facts)
    write_results(frame, output)
    write_report(facts, frame, output)
    return facts, frame


def environments(workers: int) -> list[dict[str, str]]:
    """Return the environment variables of each worker's trials: a share of the threads, and one of the GPUs.

    OMP_NUM_THREADS is kept if it is set, and CUDA_VISIBLE_DEVICES limits the choice of GPUs. A single worker uses all
    GPUs.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cpus() // workers)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(i) for i in range(torch.cuda.device_count())]
    gpus = [gpu for gpu in gpus if gpu]
    chosen = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus and workers > 1 else {} for i in range(workers)]
    return [{"OMP_NUM_THREADS": threads, **gpu} for gpu in chosen]
