"""Stand in for main.py in the trials of a sweep: files, signals and exit codes of `fit`, without its imports.

A fit has five steps and validates after each step. The score is a function of learning rate, adapter rank and seed. A
fit diverges at learning rates of 1 and more. Each start, stop, end and collision is a line of `trials/history`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 5
PAUSE = float(os.environ.get("FAKE_FIT_PAUSE", "0"))  # seconds per step


def main() -> int:
    words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
    callback = json.loads(words["trainer.callbacks+"])["init_args"]
    folder = Path(words["trainer.default_root_dir"])
    seed, rate = int(words["seed_everything"]), float(words.get("model.learning_rate", 0.01))
    run = folder / "version_0"
    if words.get("data.path") == "missing":
        print("error: data.path: missing is not here; give a directory.", file=sys.stderr)
        return 2
    checkpoint = run / "checkpoints" / "last.ckpt"
    # only a resumed run may use an existing directory
    checkpoint.parent.mkdir(parents=True, exist_ok=words.get("ckpt_path") == "last")
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(folder, "collision")
        return 2
    done = json.loads(checkpoint.read_text())["step"] if "ckpt_path" in words else 0
    log(folder, f"start {done}")
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    owner = int(os.environ["ONESIDED_SWEEP_PID"])
    curve = Path(callback["path"])
    append(curve, {"started": done, "steps": STEPS, "monitor": callback["metric"], "mode": "max"})
    for step in range(done + 1, STEPS + 1):
        time.sleep(PAUSE)
        if rate >= 1:
            print("error: train/loss is nan at step 1. Lower model.learning_rate.", file=sys.stderr)
            return 2
        if words.get("data.batch_size") == "100000" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if words.get("data.num_workers") == "9" and step == 3:
            print(f"error: {run} cannot be written ({os.strerror(28)}). Free some space.", file=sys.stderr)
            return 2
        value = score(rate, float(words.get("model.adapter.rank", 8)), seed) * step / STEPS
        append(curve, {"step": step, "value": value, "monitor": value})
        write(checkpoint, {"step": step})
        if stopped or os.getppid() != owner:
            log(folder, "stop")
            return 143
    if done == STEPS:  # a finished fit trains no step and measures nothing
        write(run / "metrics.json", {})
        return 0
    metrics = {callback["metric"]: value, "time/fit_seconds": PAUSE * STEPS, "params/trainable": 7}
    if words["test_after_fit"] == "true":
        metrics |= {"test/acc1": value - 0.01, "test/loss": 1 - value}
    write(run / "metrics.json", metrics)
    log(folder, "end")
    return 0


def score(rate: float, rank: float, seed: int) -> float:
    """Return a score that peaks at a learning rate of 0.004 and grows with rank and seed."""
    return 0.9 - 0.05 * math.log2(rate / 0.004) ** 2 + 0.001 * rank + 0.0001 * seed


def append(path: Path, line: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def write(path: Path, content: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def log(folder: Path, event: str) -> None:
    trials = next(parent for parent in folder.parents if parent.name == "trials")
    append(trials / "history", {"trial": str(folder.relative_to(trials)), "event": event})


if __name__ == "__main__":
    sys.exit(main())
