"""Run all GPU benchmarks: correctness, training steps, a profile, and quality on real data.

    bash benchmarks/gpu_wheels.sh .whl        # on a machine with a registry: download wheels for the GPU machine
    python -m benchmarks.gpu --output docs/results --budget 540 \
        --images DIR --vision_weights FILE --texts DIR --text_backbone DIR
    python -m benchmarks.gpu --output /tmp/gpu --quick --device cpu      # quick check: 5 minutes on 2 cores

The parts run in this order, each in a separate process, so that a crash does not affect the other parts:

- `correctness`: fit, resume, predict and export in each precision, with and without compilation, compared with the CPU.
- `steps`: seconds, memory and TFLOP/s of a training step of whole backbones, for ours, PEFT and the floor.
- `profile`: GPU kernels of a step of ViT-B, for ours, PEFT and the floor.
- `quality`: scores of real fits over variants, learning rates and seeds, with many parallel fits on one GPU.

Each part writes DIR/gpu_<part>.json section by section, and starts no section after its share of the budget. Skipped
parts are printed. --resume skips sections that are in the files already, so a second call continues the first call.

For a lent GPU with 15 minutes, copy the wheels, weights and data into folders that .git/info/exclude names. Carry the
folders to the machine, and run this command once with --budget 540.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

PARTS = {"correctness": 0.35, "steps": 0.6, "profile": 0.3, "quality": 1.0}  # Maximum share of the remaining budget.
GRACE = 15.0  # Seconds for a part to write its results after its budget is spent, and again after SIGTERM.


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the JSON files")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a quick check")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--resume", action="store_true", help="skip sections that are in the files already")
    parser.add_argument("--images", type=Path, help="CIFAR-10 as Parquet in the hub's columns, for quality")
    parser.add_argument("--vision_weights", type=Path, help="weights of vit_small_patch14_dinov2, for quality")
    parser.add_argument("--texts", type=Path, help="directory with CoLA, for quality")
    parser.add_argument("--text_backbone", type=Path, help="an encoder in the hub's layout, for quality")
    return parser.parse_args(words)


def run_part(name: str, arguments: argparse.Namespace, seconds: float) -> bool:
    """Run one part; return True if the part finished all its sections.

    Args:
        name: The part.
        arguments: From `arguments_of`.
        seconds: The part's budget, after which the part stops. A part that still runs `GRACE` seconds later is
            terminated.
    """
    command = [sys.executable, "-m", f"benchmarks.gpu_{name}", "--output", str(arguments.output / f"gpu_{name}.json")]
    command += ["--device", arguments.device, "--budget", f"{seconds:.0f}"]
    command += ["--quick"] if arguments.quick else []
    command += ["--resume"] if arguments.resume else []
    if name == "quality":
        for key in ("images", "vision_weights", "texts", "text_backbone"):
            command += [f"--{key}", str(getattr(arguments, key))] if getattr(arguments, key) else []
    process = subprocess.Popen(command)
    try:
        process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode == 0


def main(words: list[str] | None = None) -> int:
    """Run the parts, and print the unfinished parts."""
    arguments = arguments_of(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device: cuda is not available, since torch finds no GPU. Use --device cpu.", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.budget
    unfinished = []
    for name in arguments.parts:
        share = 1.0 if name == arguments.parts[-1] else PARTS[name]
        seconds = share * (end - time.monotonic()) - GRACE
        started = time.monotonic()
        if seconds < GRACE or not run_part(name, arguments, seconds):
            unfinished.append(name)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    for name in arguments.parts:
        path = arguments.output / f"gpu_{name}.json"
        sections = json.loads(path.read_text()) if path.is_file() else {}
        print(f"{path}: {len(sections)} sections" + (", incomplete" if name in unfinished else ""))
    print(
        f"Unfinished: {', '.join(unfinished)}. Run again with --resume." if unfinished else "All parts are finished.",
        flush=True,
    )
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
