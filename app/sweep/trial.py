"""Run one trial of a sweep: a `main.py fit` with its own process, session and run directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.run.checkpoint_io import CHECKPOINTS
from app.run.evaluations import is_complete, read_metrics
from app.run.processes import SWEEP_PROCESS
from app.run.run_directory import versions
from datamodules.atomic import FULL

MAIN = Path(__file__).parents[2] / "main.py"
LOG, CURVE = "log.txt", "curve.jsonl"
PATIENCE = 120  # seconds that a trial has to save and stop before it is killed

End = Literal["complete", "failed", "refused", "stopped", "killed", "disk full"]


@dataclass
class Curve:
    """Validations of a trial.

    Args:
        started: Step at which the newest attempt started; None before training.
        steps: Number of steps of the whole fit, if known.
        monitor: Metric by which the best checkpoint is kept; None keeps the newest.
        mode: Direction in which the monitored metric is better.
        points: Values of the selecting metric and of `monitor`, by step.
    """

    started: int | None = None
    steps: int | None = None
    monitor: str | None = None
    mode: str = "max"
    points: dict[int, tuple[float | None, float | None]] = field(default_factory=dict)

    def kept(self) -> float | None:
        """Return the selecting metric at the best checkpoint's validation; None if there is no finite value."""
        newest_first = list(reversed(self.points.values()))
        if self.monitor is None:
            return newest_first[0][0] if newest_first else None
        finite = [(value, monitored) for value, monitored in newest_first if monitored is not None]
        best = (max if self.mode == "max" else min)(finite, key=lambda pair: pair[1], default=(None, None))
        return best[0]  # of equal values, the newest


def read_curve(path: Path, skip: int = 0) -> Curve:
    """Return the validations in a file of `MetricRecorder`.

    Args:
        path: The file, which may not exist yet.
        skip: Bytes that earlier attempts have written. `started` is set only by a later attempt.
    """
    curve = Curve()
    with suppress(FileNotFoundError), path.open("rb") as file:
        for text in file:
            with suppress(ValueError):  # a line that is being written
                line = json.loads(text)
                if "started" in line:
                    curve.points = {step: pair for step, pair in curve.points.items() if step <= line["started"]}
                    curve.started = line["started"] if file.tell() > skip else None
                    curve.steps, curve.monitor, curve.mode = line["steps"], line["monitor"], line["mode"]
                else:
                    curve.points[line["step"]] = line["value"], line["monitor"]
    return curve


class TrialProcess:
    """A running fit.

    Args:
        words: Arguments of `main.py` for the fit, without the output directory.
        folder: Folder of the trial.
        recorder: Arguments of `MetricRecorder` besides the path.
        tests: If true, test the best checkpoint at the end.
        environment: Environment variables that differ from this process's.
        lock: Handle of the lock, which the fit inherits and keeps open.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        recorder: Mapping[str, Any],
        tests: bool,
        environment: Mapping[str, str],
        lock: int,
    ) -> None:
        self.folder, self.curve_file = folder, folder / CURVE
        self.asked_to_stop = self.resumes = False
        self.signal = ""  # name of the signal that killed the fit
        self._lock, self._tests, self._environment = lock, tests, dict(environment)
        arguments = {"path": str(self.curve_file), **recorder}
        callback = {"class_path": "app.callbacks.MetricRecorder", "init_args": arguments}
        self._words = [
            *words,
            f"--test_after_fit={json.dumps(tests)}",
            f"--trainer.default_root_dir={folder}",
            f"--trainer.callbacks+={json.dumps(callback)}",
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._stop_by = float("inf")
        self.start()

    # --------------------------------------------------------------------------------------------------------- process

    def start(self) -> None:
        """Start the fit, or resume it from its last checkpoint; do neither if it has finished."""
        self.resumes = False
        run = self.run
        if run is not None and self.has_finished(run):
            return
        if run is not None and any((run / CHECKPOINTS).glob("*.ckpt")):
            self.resumes = True
        else:
            self.clear()
        words = [*self._words, *(["--ckpt_path=last"] if self.resumes else [])]
        self._skip = self.curve_file.stat().st_size if self.curve_file.exists() else 0
        with (self.folder / LOG).open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, str(MAIN), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment, SWEEP_PROCESS: str(os.getpid())},
                start_new_session=True,  # Ctrl-C in the terminal is for the sweep, which stops its trials itself
                pass_fds=(self._lock,),
            )

    def has_finished(self, run: Path) -> bool:
        """Return True if a run has the metrics of its training, and of its test if the trial is tested."""
        return is_complete(read_metrics(run), self._tests)

    def clear(self) -> None:
        """Remove the files of an attempt that cannot be resumed."""
        for version in versions(self.folder):
            shutil.rmtree(version)
        self.curve_file.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ask the fit to save and stop."""
        self.asked_to_stop = True
        self._stop_by = time.monotonic() + PATIENCE
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def end(self) -> End | None:
        """Return the kind of the fit's end; None while the fit runs."""
        if self._process is None:
            return "complete"
        code = self._process.poll()
        if code is None:
            if time.monotonic() > self._stop_by:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            return None
        if code == 0:
            return "complete"
        if code in (130, 143) or self.asked_to_stop:
            return "stopped"
        if code < 0:
            self.signal = signal.Signals(-code).name
            return "killed"
        if any(os.strerror(number) in self.error() for number in FULL):
            return "disk full"
        return "failed" if self.curve().started is not None else "refused"

    # --------------------------------------------------------------------------------------------------------- results

    @property
    def run(self) -> Path | None:
        """Return the run directory, if there is one yet."""
        runs = versions(self.folder)
        return runs[-1] if runs else None

    def curve(self) -> Curve:
        """Return the validations so far."""
        return read_curve(self.curve_file, self._skip if self._process is not None else 0)

    def error(self) -> str:
        """Return the error message of the newest attempt: a line of the log."""
        with (self.folder / LOG).open("rb") as file:
            file.seek(self._log_start)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        marked = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (marked or lines or ["The fit ended without a message."])[-1]

    def seconds(self) -> float:
        """Return the seconds since this process took the trial."""
        return round(time.monotonic() - self._began, 1)
