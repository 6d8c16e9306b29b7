"""Open the new or existing study of a sweep, and refuse a plan that does not fit the trials of the study."""

from __future__ import annotations

import logging
from pathlib import Path

import optuna
from optuna.trial import TrialState

from app.sweep.changes import plan_content, plan_differences
from app.sweep.plan import Plan, SweepError
from app.sweep.storage import JOURNAL, Ledger, open_storage
from datamodules.errors import counted

PLAN = "plan"  # attribute of the study that holds the plan

_log = logging.getLogger(__name__)


def open_ledger(plan: Plan, url: str | None, output: Path, must_exist: bool = False) -> Ledger:
    """Return the trials of a sweep.

    Args:
        plan: The sweep, from its current file.
        url: URL of a database; None for the journal in the output directory.
        output: Directory of the results, created if missing.
        must_exist: If true, a sweep that was never started is an error.

    Raises:
        SweepError: If the sweep was started with a plan that differs by more than additions, or cannot be opened.
    """
    if must_exist and not (output.is_dir() if url else (output / JOURNAL).is_file()):
        raise SweepError(
            f"--report: there is no sweep in {output}. Give the directory with --output, or run the sweep first."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"--output: {output} cannot be created ({error.strerror}). Give another directory.") from error
    storage = open_storage(url, output)
    if must_exist and plan.name not in optuna.get_all_study_names(storage):
        raise SweepError(f"--storage: the database has no sweep named {plan.name} yet. Run the sweep first.")
    ledger = Ledger(plan, storage, output)
    saved = ledger.head.user_attrs.get(PLAN)
    trials = ledger.trials()
    tried = [job for job, trial in trials.items() if trial.state != TrialState.WAITING]
    if saved is not None and (differences := plan_differences(saved, plan, tried)):
        location = "storage under this name" if url else str(output)
        other = "under another file name" if url else "with another --output"
        raise SweepError(
            f"--config: the sweep in {location} has trials that do not fit the current file and options: "
            f"{'; '.join(differences)}. Undo the change, or start a new sweep {other}. Variants, values and seeds may "
            "be added."
        )
    if not must_exist:
        ledger.head.set_user_attr(PLAN, plan_content(plan))
    done = sum(trial.state.is_finished() for trial in trials.values())
    if done:
        _log.info(f"{counted(done, 'trial is', 'trials are')} finished already. The sweep in {output} continues.")
    return ledger
