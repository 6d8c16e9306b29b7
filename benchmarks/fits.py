"""One fit in a process of its own, ours or Hugging Face Trainer's over PEFT, and what it took.

`run(fit)` starts the process (`python -m benchmarks.fits JSON`), which imports nothing that its arm does not use, since
memory and seconds of the whole process are among the figures. Both families train with adapter dropout 0, the
backbone's own dropout, AdamW with decay 0.01, a linear schedule with 6 % warm-up, gradients clipped at 1, whole batches
only, no loader processes, and validate and write a checkpoint at every epoch's end.

Two tasks: `cola` is CoLA on a backbone in the hub's layout, `images` is a timm backbone without weights on a directory
of Parquet as `write_images` makes it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import in_process, resident

BATCH, WARM_UP, DECAY, CLIP = 32, 0.06, 0.01, 1.0


@dataclass(frozen=True)
class Arm:
    """What is trained, and how.

    Args:
        family: `ours`, or Hugging Face `trainer` with PEFT's LoRA.
        train: Of ours: `B`, `A` or `both`.
        backbone_dtype: Dtype of the frozen weights.
        precision: `bf16-mixed` (autocast) or `32-true`.
        rank: Of the adapters; alpha is twice as much, as in the paper.
        padded: Of Trainer on texts: pad everything to 128 tokens in random order; otherwise to the longest of a batch,
            grouped by length. Ours does the latter.
    """

    family: Literal["ours", "trainer"]
    train: Literal["B", "A", "both"] = "both"
    backbone_dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    rank: int = 8
    padded: bool = False


@dataclass(frozen=True)
class Fit:
    """One process.

    Args:
        arm: What it trains.
        task: `cola` or `images`.
        data: Directory of the data.
        backbone: Directory in the hub's layout, or timm's name.
        epochs: Epochs.
        rate: Peak learning rate, of everything.
        seed: Of order, dropout, head and factors.
        rows: Most training rows; None takes all.
        batch_size: Rows a step.
    """

    arm: Arm
    task: Literal["cola", "images"]
    data: str
    backbone: str
    epochs: int
    rate: float
    seed: int = 0
    rows: int | None = None
    batch_size: int = BATCH


class Clock:
    """Times of an epoch's steps, from the first one's begin to the last one's end, and memory when training begins."""

    def __init__(self) -> None:
        self.libraries = 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.steps: list[int] = []
        self.memory: dict[str, int] = {}
        self._epoch: float | None = None

    def loading(self) -> None:
        """Libraries are imported, and the model is to be built."""
        self.libraries = resident("VmRSS")

    def begin(self, epoch: float) -> None:
        """A step begins."""
        if not self.memory:
            self.memory = {
                "libraries": self.libraries,
                "loading_peak": resident("VmHWM"),
                "loaded": resident("VmRSS"),
            }
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        if epoch != self._epoch:
            self._epoch = epoch
            self._start, self._cpu_start = time.perf_counter(), time.process_time()
            self.seconds.append(0.0)
            self.cpu_seconds.append(0.0)
            self.steps.append(0)

    def end(self) -> None:
        """A step ends."""
        self.seconds[-1] = time.perf_counter() - self._start
        self.cpu_seconds[-1] = time.process_time() - self._cpu_start
        self.steps[-1] += 1

    def record(self) -> dict[str, Any]:
        """What was measured, bytes and seconds."""
        peak = resident("VmHWM")
        return {
            "train_seconds": self.seconds,
            "train_cpu_seconds": self.cpu_seconds,
            "steps": self.steps,
            "memory": {**self.memory, "training_peak": peak, "peak": max(peak, self.memory["loading_peak"])},
        }


def run(fit: Fit, threads: int) -> dict[str, Any]:
    """Fit in a fresh process; what it printed, with the seconds of the whole process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result: dict[str, Any] = in_process("benchmarks.fits", [json.dumps(asdict(fit))], {"OMP_NUM_THREADS": str(threads)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"process_seconds": time.perf_counter() - start, "process_cpu_seconds": cpu, **result}


def main() -> None:
    """Fit in this process."""
    values = json.loads(sys.argv[1])
    fit = Fit(**values | {"arm": Arm(**values["arm"])})
    module = import_module(f"benchmarks.fits_{fit.arm.family}")
    print(json.dumps(module.fit(fit)))


if __name__ == "__main__":
    main()
