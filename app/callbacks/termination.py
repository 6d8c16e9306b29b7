"""SIGTERM, as a preempted node gets it, and Ctrl-C: the step is finished, the run saved, the exit code says so."""

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
from app.processes import is_first_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = tuple(128 + number for number in SIGNALS)


class Termination(L.Callback):
    """Take SIGTERM and SIGINT for as long as the context lasts.

    - While steps of training run, it waits for the end of the optimizer step, where `AdapterCheckpoint` asks for it.
      All processes of a distributed run agree there, whichever of them got the signal. (Lightning's own handler enters
      a collective wherever the signal finds it, so this one takes its place.)
    - In an evaluation it waits for the end of the batch; in a distributed fit, for the end of the validation, since the
      other processes could wait for this one for ever.
    - At any other time, while something is loaded, it stops at once. A destructor swallows what is raised in it: the
      signal is then taken again a little later, and `main` asks in the end whether there was one.
    - A second one ends the process as the system does by default.
    """

    def __init__(self) -> None:
        self.requested = False
        self.checkpoint: Path | None = None  # from which training goes on
        self._deferred = self._stopping = self._swallowed = False
        self._process = os.getpid()
        self._signal = signal.SIGTERM
        self._before: dict[signal.Signals, Any] = {}
        self._hook_before: Callable[[sys.UnraisableHookArgs], Any] = sys.unraisablehook
        self._trainer: L.Trainer | None = None
        self._timer: threading.Timer | None = None

    # --------------------------------------------------------------------------------------------------------- signal

    def __enter__(self) -> Termination:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():  # no other may
            # what is ignored stays so: Ctrl-C in a job that a script has started with `&`
            taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in taken}
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._take_again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave them as they were."""
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)  # None if it was not set from Python
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if sys.unraisablehook == self._take_again:
            sys.unraisablehook = self._hook_before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and os.getpid() != self._process:
            return  # a terminal's Ctrl-C reaches the loader's workers too, which are needed to the end of the step
        if self._swallowed:
            self._swallowed = False
            if not self._deferred:
                raise SIGTERMException
            return
        if self.requested or os.getpid() != self._process:  # a second one, or in a worker process that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested, self._signal = True, signal.Signals(number)
        if not self._deferred:
            self._stop_if_requested()

    def _take_again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send the signal again, once the destructor that has swallowed it has ended."""
        if not isinstance(unraisable.exc_value, SIGTERMException):
            self._hook_before(unraisable)
            return
        self._swallowed = True
        self._timer = threading.Timer(0.01, os.kill, (os.getpid(), self._signal))
        self._timer.start()

    def _launched(self) -> list[Any]:
        """The other processes, if this one started them."""
        launcher = self._trainer.strategy.launcher if self._trainer else None
        return getattr(launcher, "procs", [])

    def lost_one(self) -> bool:
        """Return True if a process that this one started was killed or ended by a defect."""
        if launched := self._launched():
            time.sleep(0.5)  # its connections are closed a little before it has ended
        return any(process.poll() not in (None, 0, 2, *EXIT_CODES) for process in launched)

    def has_caused(self, error: BaseException) -> bool:
        """Return True if an error was raised while the signal was handled, or in the place of what it raises."""
        link: BaseException | None = error
        while link is not None and not isinstance(link, SIGTERMException):
            link = link.__cause__ or link.__context__
        return link is not None

    def report(self, going_on: str = "") -> int:
        """Print that the signal came and where training goes on, or a command's own words; return the exit code."""
        if not going_on:
            going_on = f"training goes on from {self.checkpoint}" if self.checkpoint else "no checkpoint was written"
        if is_first_rank():
            print(escape_controls(f"{self._signal.name}: stopped; {going_on}."), file=sys.stderr, flush=True)
        return 128 + self._signal

    def agreed(self, trainer: L.Trainer) -> bool:
        """Return True if any process was asked to stop; all of them must call it together."""
        return trainer.strategy.reduce_boolean_decision(self.requested, all=False)

    def stop(self, trainer: L.Trainer) -> None:
        """Make Lightning leave its loop when the step is logged, as after a signal to its own handler."""
        self.requested = self._stopping = True
        # only one process may have got it, and all are to say the same
        if trainer.strategy.reduce_boolean_decision(self._signal == signal.SIGINT, all=False):
            self._signal = signal.SIGINT
        self._launched().clear()  # Lightning's observer would kill this one when another has ended with a code
        trainer.strategy.barrier("sigterm")
        trainer._signal_connector.received_sigterm = True

    # ---------------------------------------------------------------------------------------------------------- hooks

    def _settle(self, trainer: L.Trainer, deferred: bool) -> None:
        """Take the place of Lightning's handler, and stop if the signal came before."""
        self._trainer, self._deferred = trainer, deferred
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                signal.signal(number, self._handle)
        if self._stopping or (self.requested and not deferred):
            raise SIGTERMException

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on there is something to finish."""
        self._settle(trainer, deferred=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish a batch at most; but the other processes of a fit are not to be left alone."""
        self._settle(trainer, deferred=trainer.state.fn == "fit" and trainer.world_size > 1)
        self._deferred = True

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop between two batches."""
        if not (trainer.state.fn == "fit" and trainer.world_size > 1):
            self._stop_if_requested()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish what follows in a fit: the best checkpoint may be written next."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            self._deferred = False
            self._stop_if_requested()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish a batch at most."""
        self._settle(trainer, deferred=False)
        self._deferred = True

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop between two batches."""
        self._stop_if_requested()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is left to finish."""
        self._settle(trainer, deferred=False)

    on_predict_start, on_predict_batch_end, on_predict_end = on_test_start, on_test_batch_end, on_test_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training is over and saved."""
        self._settle(trainer, deferred=False)

    def _stop_if_requested(self) -> None:
        """End the processes that this one started, and leave whatever is running."""
        if self.requested:
            for process in self._launched():
                process.terminate()
            raise SIGTERMException
