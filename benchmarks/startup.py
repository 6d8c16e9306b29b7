"""Start-up time of commands and time to the first step of fits, relative to `import lightning.pytorch`.

Each arm is a separate process, which runs once in each round, in shuffled order. One warm-up of each arm fills the
caches of the system, of Python and of the data. Ratios are paired by round. A fit is measured from the start of the
process to the end of the first optimizer step, with logger and first spectra. The first fit is conf/quickstart.yaml.
With --backbone and --path there are two more fits on CoLA: conf/roberta_glue.yaml, and Hugging Face Trainer with PEFT.

    python -m benchmarks.startup --backbone ../shared/backbones/minilm_roberta --path ../shared/data/glue \
        --threads 1 --output docs/results/benchmark_startup.json

`imports_ms` has the packages that take longest to import, without their dependencies, for the base and `fit --help`.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial

from benchmarks.harness import measured, paired_ratio, parse, parser, ratio_text, section, table, take_turns

BASE = "import lightning.pytorch"
VISION, TEXT = "conf/vit_cifar.yaml", "conf/roberta_glue.yaml"
OURS, THEIRS = "first step, texts", "first step, texts, Trainer and peft"
END = ("--allow_imports", "benchmarks.first_step", "--trainer.callbacks+=benchmarks.first_step.EndAtFirstStep")


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the arguments of Python by arm."""
    arms = {
        "pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        BASE: ["-c", BASE],
        "import Trainer and peft": ["-c", "from transformers import Trainer; import peft"],
        "--help": ["main.py", "--help"],
        "fit --help": ["main.py", "fit", "--help"],
        "fit, images, --help": ["main.py", "fit", "--config", VISION, "--help"],
        "fit, images, --print_config": ["main.py", "fit", "--config", VISION, "--print_config"],
        "fit, texts, --print_config": ["main.py", "fit", "--config", TEXT, "--print_config"],
        "first step, images": ["main.py", "fit", "--config", "conf/quickstart.yaml", *END],
    }
    if arguments.backbone and arguments.path:
        paths = ["--model.backbone", arguments.backbone, "--data.path", arguments.path]
        text = ["main.py", "fit", "--config", TEXT, "--config", "conf/cpu.yaml", *paths, *END]
        arms[OURS] = text
        trainer = ["-m", "benchmarks.first_step_trainer", arguments.backbone, f"{arguments.path}/cola"]
        arms[THEIRS] = trainer
    return arms


def run(words: list[str], arguments: argparse.Namespace) -> float:
    """Run Python with arguments, and return the wall time or, with --processor, the CPU time in seconds.

    Raises:
        SystemExit: With stderr, if the process fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        root = ["--trainer.default_root_dir", folder] if END[0] in words else []
        before, start = _processor(), time.perf_counter()
        command = [sys.executable, *words, *root]
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        elapsed = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.stderr)
    return _processor() - before if arguments.processor else elapsed


def _processor() -> float:
    """Return the CPU seconds of all child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def slowest_imports(words: list[str], count: int = 15) -> dict[str, float]:
    """Return the packages that take longest to import, without their dependencies, in ms."""
    process = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True)
    spent: Counter[str] = Counter()
    for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", process.stderr):
        spent[name] += int(microseconds)
    return {name: total / 1000 for name, total in spent.most_common(count)}


def main(words: list[str] | None = None) -> None:
    """Measure, print and write."""
    common = parser(__doc__, rounds=9, quick_rounds=1, processor=True)
    common.add_argument("--backbone", help="a directory in the hub's layout, for the first step on texts")
    common.add_argument("--path", help="a directory with GLUE's tasks, for the first step on texts")
    common.add_argument("--arms", nargs="+", help="only these arms and the base")
    common.set_defaults(inputs=["backbone", "path", "arms"])
    arguments = parse(common, words)
    arms = commands(arguments)
    if arguments.arms:
        arms = {name: arms[name] for name in dict.fromkeys([BASE, *arguments.arms])}
    record = measured(arguments, "start-up")
    if record is None:
        with section(arguments, "start-up") as record:
            turns = {name: partial(run, command, arguments) for name, command in arms.items()}
            record["seconds"] = seconds = take_turns(turns, arguments.rounds, warm_up=1)
            record["over the base"] = {name: paired_ratio(values, seconds[BASE]) for name, values in seconds.items()}
            if OURS in seconds and THEIRS in seconds:
                record[f"{THEIRS}, over ours"] = paired_ratio(seconds[THEIRS], seconds[OURS])
            record["imports_ms"] = {name: slowest_imports(arms[name]) for name in (BASE, "fit --help") if name in arms}
    rows = [
        [name, f"{statistics.median(values):.2f}", ratio_text(record["over the base"][name])]
        for name, values in record["seconds"].items()
    ]
    table("Start-up", ["process", "seconds", f"over {BASE}"], rows)
    for name, packages in record["imports_ms"].items():
        print(f"{name}, ms: {', '.join(f'{package} {ms:.0f}' for package, ms in packages.items())}")


if __name__ == "__main__":
    main()
