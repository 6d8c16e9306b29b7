"""Run one fit, ours or Hugging Face Trainer with PEFT, in a separate process, and return time, memory and scores.

`run(fit)` starts the process (`python -m benchmarks.fits JSON`). Memory and seconds of the whole process are measured,
so the process imports only the modules of its arm. Both families use AdamW with weight decay 0.01, a linear schedule
with 6 % warm-up, and gradient clipping at 1. Backbones have dropout, adapters have no dropout. Both families use only
full batches and no loader processes. Both validate and write a checkpoint at the end of every epoch.

The task `cola` is CoLA on a backbone in the hub's layout. The task `images` is a timm backbone without pretrained
weights on the Parquet files of `write_images`.
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
    """Configuration of a fit's training.

    Args:
        family: `ours`, or Hugging Face `trainer` with PEFT's LoRA.
        train: Trained factor of ours: `B`, `A` or `both`.
        backbone_dtype: Dtype of the frozen weights.
        precision: `bf16-mixed` (autocast) or `32-true`.
        rank: Adapter rank; alpha is twice the rank, as in the paper.
        padded: For Trainer on texts: if true, pad to 128 tokens, in random order. If false, group by length and pad to
            the longest text of a batch, as our fits always do.
    """

    family: Literal["ours", "trainer"]
    train: Literal["B", "A", "both"] = "both"
    backbone_dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    rank: int = 8
    padded: bool = False


@dataclass(frozen=True)
class Fit:
    """Configuration of one fit.

    Args:
        arm: The training configuration.
        task: `cola` or `images`.
        data: Directory of the data.
        backbone: Directory in the hub's layout, or timm's name.
        epochs: Number of epochs.
        rate: Peak learning rate of all parameters.
        seed: Seed of data order, dropout, head and factors.
        rows: Maximum training rows; None for all.
        batch_size: Rows of a batch.
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
    """Record the seconds of each epoch, from the start of its first step to the end of its last step, and memory."""

    def __init__(self) -> None:
        self.libraries = 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.steps: list[int] = []
        self.memory: dict[str, int] = {}
        self._epoch: float | None = None

    def loading(self) -> None:
        """Record the memory after the imports, before the model is built."""
        self.libraries = resident("VmRSS")

    def begin(self, epoch: float) -> None:
        """Record the start of a step."""
        if not self.memory:
            self.memory = {
                "libraries": self.libraries,
                "loading_peak": resident("VmHWM"),
                "loaded": resident("VmRSS"),
            }
            Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.
        if epoch != self._epoch:
            self._epoch = epoch
            self._start, self._cpu_start = time.perf_counter(), time.process_time()
            self.seconds.append(0.0)
            self.cpu_seconds.append(0.0)
            self.steps.append(0)

    def end(self) -> None:
        """Record the end of a step."""
        self.seconds[-1] = time.perf_counter() - self._start
        self.cpu_seconds[-1] = time.process_time() - self._cpu_start
        self.steps[-1] += 1

    def record(self) -> dict[str, Any]:
        """Return the measured bytes and seconds."""
        peak = resident("VmHWM")
        return {
            "train_seconds": self.seconds,
            "train_cpu_seconds": self.cpu_seconds,
            "steps": self.steps,
            "memory": {**self.memory, "training_peak": peak, "peak": max(peak, self.memory["loading_peak"])},
        }


def run(fit: Fit, threads: int) -> dict[str, Any]:
    """Fit in a fresh process, and return its figures with the seconds of the whole process."""
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
