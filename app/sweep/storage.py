"""Trials of a sweep in Optuna's storage, which several processes and machines share.

Each variant has its own Optuna study, so that its sampler and pruner learn from its trials alone. The user attributes
of a trial hold its job. A failed trial without an `error` is void: its owner was stopped or killed, or the trial was a
duplicate or not needed. Among the other trials of a job, the trial with the lowest number counts. So all processes
agree on the trial of a job without a lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from app.sweep.folders import OWNER, is_locked, job_folder, place_of, try_lock
from app.sweep.plan import Plan, Range, SweepError, Variant, point_id
from app.sweep.schedule import Job, Outline, Record, State, outline, readable_point
from datamodules.errors import first_line

JOURNAL, CLAIMS = "study.journal", ".claims"
TIME = "time"  # attribute of the study: the time limit of the newest command
SAMPLED = "sampled"  # attribute of a trial at a new point
SURPLUS = "surplus"  # attribute of a sampled trial beyond the number of the plan
HEARTBEAT = 20  # seconds between two heartbeats of a trial in a database
GRACE = 120  # seconds without a heartbeat after which the trial of another machine is stale
STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}

Allowed = Callable[[Outline, Mapping[Job, FrozenTrial]], list[Job]]

_log = logging.getLogger(__name__)


class JournalLock:
    """Lock of a journal. The kernel releases the lock when its holder dies; Optuna's locks would block for 30 seconds.

    A line that a full disk has truncated is removed before the next line is written.

    Args:
        journal: Path of the journal.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._handle = -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.release()  # a signal may have interrupted an earlier append
        self._handle = os.open(self.journal.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError), self.journal.open("rb+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def open_storage(url: str | None, output: Path) -> BaseStorage:
    """Return the storage of a sweep: the database of a URL, or a journal in the output directory.

    Raises:
        SweepError: If the database cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        journal = output / JOURNAL
        return JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))  # type: ignore[arg-type]
    from sqlalchemy.exc import DBAPIError

    problem: Exception | None = None
    for _ in range(3):
        try:
            with warnings.catch_warnings(action="ignore"):  # Optuna's heartbeats are experimental
                return RDBStorage(
                    url, engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=HEARTBEAT, grace_period=GRACE
                )
        except Exception as error:
            problem = error
            if not isinstance(error, DBAPIError):  # a missing driver or no URL
                break
            time.sleep(1)  # machines that create the tables at the same time may conflict
    assert problem is not None
    raise SweepError(
        f"--storage: the database cannot be used ({first_line(problem)}). Give a URL such as "
        "postgresql+psycopg://USER@HOST/DATABASE, and install its driver."
    ) from problem


def storage_problem(error: Exception) -> str | None:
    """Return why the storage or the output directory cannot be written; None for any other error."""
    if isinstance(error, OSError):
        return f"{error.filename or 'The output directory'} cannot be written ({error.strerror or error})"
    wrapped = isinstance(error, StorageInternalError)
    if wrapped or type(error).__module__.startswith("sqlalchemy"):
        return f"--storage: the database does not answer ({first_line(error)})"
    return None


@dataclass
class Claim:
    """A trial that this process runs.

    Args:
        job: Job of the trial.
        trial: Optuna's trial.
        lock: Handle that locks the trial's folder.
    """

    job: Job
    trial: Trial
    lock: int

    def unlock(self) -> None:
        """Release the lock of the trial's folder."""
        handle, self.lock = self.lock, -1
        if handle >= 0:
            os.close(handle)


class Ledger:
    """The trials of a sweep, shared by all its processes.

    Args:
        plan: The sweep.
        storage: Storage of the trials.
        output: Directory of the trials' folders.
    """

    def __init__(self, plan: Plan, storage: BaseStorage, output: Path) -> None:
        self.plan, self.storage, self.output = plan, storage, output
        self.place = place_of(output)
        self.head = optuna.create_study(study_name=plan.name, storage=storage, load_if_exists=True)
        direction = StudyDirection.MAXIMIZE if plan.mode == "max" else StudyDirection.MINIMIZE
        self.studies = {
            variant.name: optuna.create_study(
                study_name=f"{plan.name}/{variant.name}",
                storage=storage,
                direction=direction,
                pruner=_pruner(plan),
                load_if_exists=True,
            )
            for variant in plan.variants
        }
        self._seen_without_place: dict[tuple[str, int], float] = {}

    # ------------------------------------------------------------------------------------------------------------ time

    def save_time(self, facts: dict[str, Any] | None) -> None:
        """Save the fields of `TimeFacts` for the newest command; None for a command without `--minutes`."""
        self.head.set_user_attr(TIME, facts)

    def saved_time(self) -> dict[str, Any] | None:
        """Return the facts that `save_time` saved."""
        facts: dict[str, Any] | None = self.head.user_attrs.get(TIME)
        return facts

    # ------------------------------------------------------------------------------------------------------------ read

    def trials(self) -> dict[Job, FrozenTrial]:
        """Return the trial of each job."""
        by_job: dict[Job, FrozenTrial] = {}
        for study in self.studies.values():
            for trial in study.get_trials(deepcopy=False):
                job = job_of(trial)
                is_void = trial.state == TrialState.FAIL and "error" not in trial.user_attrs
                if job is not None and not is_void:
                    by_job.setdefault(job, trial)
        return by_job

    def outline(self, trials: Mapping[Job, FrozenTrial]) -> Outline:
        """Return the jobs that are left."""
        sampled = {name: self._sampled(name) for name in self.studies} if self.plan.is_sampled else {}
        records = [
            Record(job, STATES[trial.state], trial.value if trial.state == TrialState.COMPLETE else None)
            for job, trial in trials.items()
        ]
        return outline(self.plan, records, sampled)

    def _sampled(self, name: str) -> list[str]:
        """Return the points that were sampled for a variant, with interrupted and repeated points."""
        trials = self.studies[name].get_trials(deepcopy=False)
        return [t.user_attrs["job"]["point"] for t in trials if SAMPLED in t.user_attrs and SURPLUS not in t.user_attrs]

    # ----------------------------------------------------------------------------------------------------------- claim

    def claim(self, allowed: Allowed = lambda left, _: left.needed) -> Claim | None:
        """Claim a trial for this process and return the claim; None if there is no trial to run now.

        Trials of processes that have died are queued again first.

        Args:
            allowed: Function that returns the needed jobs that may run.
        """
        with self._claiming():
            self._release_stale()
            while True:
                trials = self.trials()
                left = self.outline(trials)
                needed = allowed(left, trials)
                new = [job for job in needed if job not in trials]
                for job in new:
                    self._enqueue(job)
                trials = self.trials() if new else trials
                waiting = [job for job in needed if trials[job].state == TrialState.WAITING]
                name = next((job.variant for job in waiting if self._is_free(job.variant, trials)), None)
                if name is not None:
                    trial = self._ask(name)
                elif left.sampling:
                    name = left.sampling[0]
                    trial = self._sample(name)
                else:
                    return None
                if (claim := self._accept(name, trial, set(needed))) is not None:
                    return claim

    def _accept(self, name: str, trial: Trial, needed: set[Job]) -> Claim | None:
        """Return the claim on a trial; void the trial if another process was faster or the trial is not needed."""
        study = self.studies[name]
        job = job_of(study.get_trials(deepcopy=False)[trial.number])
        is_counted = job is not None and self.trials()[job].number == trial.number
        is_needed = job in needed
        if SAMPLED in trial.user_attrs:
            assert self.plan.trials_per_variant is not None
            is_needed = len(self._sampled(name)) <= self.plan.trials_per_variant
            if not is_needed:  # other machines sampled at the same time
                trial.set_user_attr(SURPLUS, True)
        if job is None or not is_counted or not is_needed or (lock := try_lock(self._lock_file(job))) is None:
            _void(study, trial.number)
            return None
        trial.set_user_attr("place", self.place)
        claim = Claim(job, trial, lock)
        self.beat(claim)
        return claim

    def _is_free(self, name: str, trials: Mapping[Job, FrozenTrial]) -> bool:
        """Return True unless a fit that outlived its sweep still has the lock of the variant's next trial."""
        waiting = {job: t for job, t in trials.items() if job.variant == name and t.state == TrialState.WAITING}
        following = min(waiting, key=lambda job: waiting[job].number)
        return not is_locked(self._lock_file(following))

    def _enqueue(self, job: Job) -> None:
        params, distributions = {}, {}
        if self.plan.is_sampled and job.phase == "select":
            params, distributions = json.loads(job.point), _distributions(self.plan.variant(job.variant))
        self.studies[job.variant].add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions=distributions,
                user_attrs={"job": asdict(job)},
            )
        )

    def _ask(self, name: str) -> Trial:
        with warnings.catch_warnings(action="ignore"):  # about heartbeats, which `beat` records
            return self.studies[name].ask()

    def _sample(self, name: str) -> Trial:
        """Return a trial at a new point, or a trial that another process has queued in the meantime."""
        study = self.studies[name]
        assert self.plan.trials_per_variant is not None
        first = len(self.plan.select_seeds) * max(3, self.plan.trials_per_variant // 3)
        # machines that sample at the same time must draw different points
        machine = self.place if isinstance(self.storage, RDBStorage) else ""
        seed = zlib.crc32(f"{name} {len(study.get_trials(deepcopy=False))} {machine}".encode())
        with warnings.catch_warnings(action="ignore"):
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=first, constant_liar=True, seed=seed)
            trial = study.ask(_distributions(self.plan.variant(name)))
        if "job" not in trial.user_attrs:
            job = Job(name, "select", point_id(trial.params), self.plan.select_seeds[0])
            trial.set_user_attr("job", asdict(job))
            trial.set_user_attr(SAMPLED, True)
        return trial

    # ---------------------------------------------------------------------------------------------------------- finish

    def finish(self, claim: Claim, state: State, value: float | None, facts: Mapping[str, Any]) -> None:
        """Record the end of a trial, with facts for the table. A failed trial needs the fact `error`."""
        study = self.studies[claim.job.variant]
        with suppress(UpdateFinishedTrialError):  # a signal may have interrupted the caller after an earlier call
            for key, fact in facts.items():
                claim.trial.set_user_attr(key, fact)
            if state == "complete":
                study.tell(claim.trial, value, skip_if_finished=True)
            else:
                ended = TrialState.PRUNED if state == "pruned" else TrialState.FAIL
                study.tell(claim.trial, state=ended, skip_if_finished=True)
        claim.unlock()

    def release(self, claim: Claim) -> None:
        """Queue a trial again if this process does not finish it."""
        _void(self.studies[claim.job.variant], claim.trial.number)
        claim.unlock()

    def report(self, claim: Claim, value: float, validation: int) -> bool:
        """Record a validation of a trial, counted from 1. Return False if another process has taken over the trial."""
        try:
            claim.trial.report(value, validation)
        except UpdateFinishedTrialError:
            return False
        return True

    def beat(self, claim: Claim) -> None:
        """Record a heartbeat, so that other machines know that this process is alive."""
        if isinstance(self.storage, RDBStorage):
            study_id = self.storage.get_study_id_from_name(f"{self.plan.name}/{claim.job.variant}")
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, claim.trial.number)
            self.storage.record_heartbeat(trial_id)

    def _release_stale(self) -> None:
        """Void the running trials whose owner has died: the lock is free, or the heartbeats have stopped."""
        for name, study in self.studies.items():
            if isinstance(self.storage, RDBStorage):
                with warnings.catch_warnings(action="ignore"):  # Optuna's heartbeats are experimental
                    optuna.storages.fail_stale_trials(study)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                job, place = job_of(trial), trial.user_attrs.get("place")
                if place is None and isinstance(self.storage, RDBStorage):  # just claimed, or its owner has died
                    seen = self._seen_without_place.setdefault((name, trial.number), time.monotonic())
                    is_stale = time.monotonic() - seen > GRACE
                else:
                    is_same_place = place in (self.place, None)
                    is_stale = is_same_place and (job is None or not is_locked(self._lock_file(job)))
                if is_stale:
                    _void(study, trial.number)
                    _log.info(
                        f"{describe(job) if job else 'A trial'}: its process has died. The trial is queued again."
                    )

    # --------------------------------------------------------------------------------------------------------- helpers

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        """Prevent claims by other processes in this output directory."""
        with (self.output / CLAIMS).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_file(self, job: Job) -> Path:
        return self.output / job_folder(job) / OWNER


def _void(study: optuna.Study, number: int) -> None:
    """End a trial as void, unless another process has ended it."""
    with suppress(UpdateFinishedTrialError):
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def job_of(trial: FrozenTrial) -> Job | None:
    """Return the job of a trial; None for a trial that another process is just creating."""
    job = trial.user_attrs.get("job")
    return None if job is None else Job(**job)


def describe(job: Job) -> str:
    """Return a job as text, such as `B learning_rate 0.001 seed 0`."""
    return " ".join(word for word in (job.variant, readable_point(json.loads(job.point)), f"seed {job.seed}") if word)


def _pruner(plan: Plan) -> optuna.pruners.BasePruner:
    if plan.prune == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
    if plan.prune == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    return optuna.pruners.HyperbandPruner() if plan.prune == "hyperband" else optuna.pruners.NopPruner()


def _distributions(variant: Variant) -> dict[str, BaseDistribution]:
    return {key: _distribution(values) for key, values in variant.search.items()}


def _distribution(values: tuple[Any, ...] | Range) -> BaseDistribution:
    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
