"""Everything that only a GPU can show, in one command: correctness, steps, a profile, quality on real data.

    bash benchmarks/gpu_wheels.sh .whl        # on a machine with a registry: the wheels that a bare one lacks
    python -m benchmarks.gpu --output docs/results --budget 540 \
        --images DIR --vision_weights FILE --texts DIR --text_backbone DIR
    python -m benchmarks.gpu --output /tmp/gpu --quick --device cpu      # under five minutes on 2 cores: does it work?

The parts run in this order, each in a process of its own, so that a crash of one loses nothing of the others:

- `correctness`: fit, resume, predict and export in each precision, compiled too, against the same fits on the CPU.
- `steps`: seconds, memory and TFLOP/s of a training step of whole backbones, ours beside PEFT and the floor.
- `profile`: the kernels in which PEFT, ours and the floor spend a step of ViT-B.
- `quality`: scores of real fits over variants, learning rates and seeds, many fits at once on one GPU.

Each part writes DIR/gpu_<part>.json section by section and begins no section after its share of the budget. What is
left is printed. --resume leaves out the sections that the files hold: a second call goes on where the first stopped.

A lent GPU, 15 minutes in all: copy the wheels, the weights and the data into folders of the repository that
.git/info/exclude names, carry them, and run this once with --budget 540.
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

PARTS = {"correctness": 0.35, "steps": 0.6, "profile": 0.3, "quality": 1.0}  # of what is left of the budget, at most
GRACE = 15.0  # seconds in which a part that was told to stop may write what it has


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the JSON files")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--resume", action="store_true", help="leave out the sections that the files hold already")
    parser.add_argument("--images", type=Path, help="CIFAR-10 as Parquet in the hub's columns, for quality")
    parser.add_argument("--vision_weights", type=Path, help="weights of vit_small_patch14_dinov2, for quality")
    parser.add_argument("--texts", type=Path, help="directory with CoLA, for quality")
    parser.add_argument("--text_backbone", type=Path, help="an encoder in the hub's layout, for quality")
    return parser.parse_args(words)


def run_part(name: str, arguments: argparse.Namespace, seconds: float) -> bool:
    """Run one part; return True if it ended by itself, with what it had to do done.

    Args:
        name: The part.
        arguments: From `arguments_of`.
        seconds: Its share of the budget; the part itself stops at it, and is stopped a little later.
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
    """Run the parts, print what is left."""
    arguments = arguments_of(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch finds no GPU here. Use --device cpu.", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.budget
    left = []
    for name in arguments.parts:
        share = 1.0 if name == arguments.parts[-1] else PARTS[name]
        seconds = share * (end - time.monotonic()) - GRACE
        started = time.monotonic()
        if seconds < GRACE or not run_part(name, arguments, seconds):
            left.append(name)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    for name in arguments.parts:
        path = arguments.output / f"gpu_{name}.json"
        sections = json.loads(path.read_text()) if path.is_file() else {}
        print(f"{path}: {len(sections)} sections" + (", not all of the part" if name in left else ""))
    print(f"Left: {', '.join(left)}. Run again with --resume." if left else "All parts are done.", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
