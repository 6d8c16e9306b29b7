"""Stop on a signal, SIGTERM (preemption) or SIGINT (Ctrl-C): finish the step, save, and set the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.console import escape_controls
from app.lightning_compat import launched_processes, stop_after_step
from app.run.processes import is_first_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = tuple(128 + number for number in SIGNALS)


class Termination(L.Callback):
    """Handle SIGTERM and SIGINT within a context.

    - During training, a signal takes effect at the end of the optimizer step, where `AdapterCheckpoint` checks
      for signals. All ranks agree there, whichever rank got the signal. This handler replaces Lightning's handler,
      which enters a collective at once, wherever the signal arrives.
    - In an evaluation, a signal takes effect at the end of the batch. In a distributed fit, the signal takes effect at
      the end of the validation: the other ranks could otherwise wait for this rank forever.
    - At any other time, such as during loading, the process stops at once. If a destructor swallows the exception, the
      signal is sent again a little later. `main` checks at the end whether a signal was received.
    - A second signal ends the process at once, as by default.
    """

    def __init__(self) -> None:
        self.requested = False
        self.checkpoint: Path | None = None  # checkpoint to resume from
        self._deferred = self._stopping = self._swallowed = False
        self._process = os.getpid()
        self._signal = signal.SIGTERM
        self._before: dict[signal.Signals, Any] = {}
        self._hook_before: Callable[[sys.UnraisableHookArgs], Any] = sys.unraisablehook
        self._trainer: L.Trainer | None = None
        self._timer: threading.Timer | None = None

    # --------------------------------------------------------------------------------------------------------- signal

    def __enter__(self) -> Termination:
        """Install the handler."""
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            # an ignored signal stays ignored, such as Ctrl-C in a background job of a script
            handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in handled}
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._resend
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)  # None if the handler was not set from Python
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if sys.unraisablehook == self._resend:
            sys.unraisablehook = self._hook_before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and os.getpid() != self._process:
            return  # Ctrl-C also reaches the loader's workers, which the current step still needs
        if self._swallowed:
            self._swallowed = False
            if not self._deferred:
                raise SIGTERMException
            return
        if self.requested or os.getpid() != self._process:  # a second signal, or a signal in a forked worker process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested, self._signal = True, signal.Signals(number)
        if not self._deferred:
            self._stop_if_requested()

    def _resend(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send the signal again, after the end of the destructor that swallowed its exception."""
        if not isinstance(unraisable.exc_value, SIGTERMException):
            self._hook_before(unraisable)
            return
        self._swallowed = True
        self._timer = threading.Timer(0.01, os.kill, (os.getpid(), self._signal))
        self._timer.start()

    def has_lost_process(self) -> bool:
        """Return True if a process that this process started was killed or ended by a defect."""
        if launched := launched_processes(self._trainer):
            time.sleep(0.5)  # a process closes its connections shortly before it ends
        return any(process.poll() not in (None, 0, 2, *EXIT_CODES) for process in launched)

    def report(self, resume_hint: str = "") -> int:
        """Print the signal, and the checkpoint to resume from or the text `resume_hint`. Return the exit code."""
        if not resume_hint:
            resume_hint = (
                f"resume with --ckpt_path {self.checkpoint}" if self.checkpoint else "no checkpoint was written"
            )
        if is_first_rank():
            print(escape_controls(f"{self._signal.name}: stopped; {resume_hint}."), file=sys.stderr, flush=True)
        return 128 + self._signal

    def is_requested_on_any_rank(self, trainer: L.Trainer) -> bool:
        """Return True if any rank was asked to stop. All ranks must call this method, which is a collective."""
        return trainer.strategy.reduce_boolean_decision(self.requested, all=False)

    def stop(self, trainer: L.Trainer) -> None:
        """Make Lightning leave its training loop once the step is logged, on all ranks with the same exit code."""
        self.requested = self._stopping = True
        # all ranks return the same exit code, even if only one rank got the signal
        if trainer.strategy.reduce_boolean_decision(self._signal == signal.SIGINT, all=False):
            self._signal = signal.SIGINT
        # Lightning's observer would kill this process when another process ends with an error code
        launched_processes(trainer).clear()
        trainer.strategy.barrier("sigterm")
        stop_after_step(trainer)

    # ---------------------------------------------------------------------------------------------------------- hooks

    def _install(self, trainer: L.Trainer, deferred: bool) -> None:
        """Replace Lightning's handler, and stop if a signal was received before."""
        self._trainer, self._deferred = trainer, deferred
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                signal.signal(number, self._handle)
        if self._stopping or (self.requested and not deferred):
            raise SIGTERMException

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish optimizer steps from here on."""
        self._install(trainer, deferred=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish a batch at most; in a distributed fit, finish the validation."""
        self._install(trainer, deferred=trainer.state.fn == "fit" and trainer.world_size > 1)
        self._deferred = True

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop between two batches."""
        if not (trainer.state.fn == "fit" and trainer.world_size > 1):
            self._stop_if_requested()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop in an evaluation. In a fit, wait: the best checkpoint may be saved next."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            self._deferred = False
            self._stop_if_requested()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish a batch at most."""
        self._install(trainer, deferred=False)
        self._deferred = True

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop between two batches."""
        self._stop_if_requested()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once from here on, since nothing is left to finish."""
        self._install(trainer, deferred=False)

    on_predict_start, on_predict_batch_end, on_predict_end = on_test_start, on_test_batch_end, on_test_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once from here on, since training is over and saved."""
        self._install(trainer, deferred=False)

    def _stop_if_requested(self) -> None:
        """If a signal was received, end the processes that this process started, and raise."""
        if self.requested:
            for process in launched_processes(self._trainer):
                process.terminate()
            raise SIGTERMException
