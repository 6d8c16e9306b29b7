"""Shared tools of the benchmarks: arms in shuffled rounds, paired ratios, tables, and a JSON file of results.

    arguments = parse(parser(__doc__, rounds=20))
    with section(arguments, "vit, bfloat16") as record:
        record["seconds"] = seconds = take_turns({"ours": step, "peft": other_step}, arguments.rounds)
        record["peft over ours"] = paired_ratio(seconds["peft"], seconds["ours"])
    table("A step", ["arm", "ms"], rows)

The JSON file is one object with a key for each section. A section has its figures and raw times, and also the versions,
machine, load, commit and command of the measurement. So sections from different runs can share a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

MIB = 2**20
FEW = 5  # With fewer rounds, a bootstrap interval is meaningless.
LIBRARIES = ("torch", "lightning", "transformers", "timm", "peft")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")

Arm = Callable[[], float | None]  # Runs an arm once. Returns seconds if only a part of the run counts.
Seconds = dict[str, list[float]]


def parser(
    doc: str | None, rounds: int, quick_rounds: int = 3, processor: bool = False, device: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share.

    Args:
        doc: Description of the program.
        rounds: Default of --rounds.
        quick_rounds: Default of --rounds with --quick.
        processor: If true, add --processor.
        device: If true, add --device and --budget.
    """
    common = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--quick", action="store_true", help="small sizes and few rounds, for a quick check")
    common.add_argument("--rounds", type=int, help=f"runs of each arm ({rounds}; with --quick {quick_rounds})")
    common.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    if processor:
        common.add_argument(
            "--processor", action="store_true", help="measure CPU time, which other programs disturb less"
        )
    if device:
        common.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
        common.add_argument("--budget", type=float, default=float("inf"), help="start no section after these seconds")
    common.add_argument("--output", type=Path, help="JSON file; other sections of the file are kept")
    common.add_argument("--resume", action="store_true", help="skip sections that are in the file already")
    common.set_defaults(default_rounds=(rounds, quick_rounds), processor=False)
    return common


def parse(common: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, set the number of rounds and torch's threads."""
    arguments = common.parse_args(words)
    if arguments.rounds is None:
        arguments.rounds = arguments.default_rounds[arguments.quick]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.threads = torch.get_num_threads()
    arguments.clock = time.process_time if arguments.processor else time.perf_counter
    return arguments


class Deadline:
    """Deadline of a benchmark, with a list of the skipped sections.

    Args:
        seconds: Seconds until the deadline.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._left: list[str] = []

    def passed(self, name: str) -> bool:
        """Return True after the deadline, and record the section as skipped."""
        if time.monotonic() < self._end:
            return False
        self._left.append(name)
        return True

    def exit(self) -> None:
        """Exit with code 3 if sections were skipped, and print their names on stderr."""
        if self._left:
            print(f"The budget is spent. Skipped: {'; '.join(self._left)}.", file=sys.stderr, flush=True)
            sys.exit(3)


def take_turns(
    arms: Mapping[str, Arm],
    rounds: int,
    warm_up: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Run every arm once in each round, in random order, and return the seconds of each arm by round.

    A slow period of the machine then affects all arms of a round, and no arm always runs after the same arm.
    """
    order = random.Random(seed)
    seconds: Seconds = {name: [] for name in arms}
    for number in range(-warm_up, rounds):
        for name in order.sample(list(arms), len(arms)):
            start = clock()
            reported = arms[name]()
            elapsed = clock() - start if reported is None else reported
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def paired_ratio(of: Sequence[float], over: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the median of the ratios `of` / `over`, paired by round, with an interval (see `interval`)."""
    return interval([a / b for a, b in zip(of, over, strict=True)], seed)


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the median of one value for each round, with an interval.

    Returns:
        `median`, `low` and `high`. With five rounds or more, the interval is the 95 % bootstrap interval (2,000 draws).
        With fewer rounds, the interval is the range.
    """
    rounds = np.asarray(values)
    return _bootstrap(lambda drawn: np.median(rounds[drawn], axis=-1), len(rounds), seed)


def paired_share(of: Sequence[float], whole: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the ratio of two medians, with an interval. The ratio is stable even if single values are near zero."""
    numerator, denominator = np.asarray(of), np.asarray(whole)
    return _bootstrap(
        lambda drawn: np.median(numerator[drawn], axis=-1) / np.median(denominator[drawn], axis=-1),
        len(numerator),
        seed,
    )


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], rounds: int, seed: int) -> dict[str, float]:
    if rounds < FEW:
        each = statistic(np.arange(rounds)[:, None])
        low, high = each.min(), each.max()
    else:
        drawn = np.random.default_rng(seed).integers(rounds, size=(2000, rounds))
        low, high = np.quantile(statistic(drawn), [0.025, 0.975])
    return {"median": float(statistic(np.arange(rounds))), "low": float(low), "high": float(high)}


def saved_bytes(forward: Callable[[], Any], modules: nn.Module) -> int:
    """Return the bytes that a forward pass saves for backward.

    Each storage counts once. The modules' parameters and buffers do not count. Copies of weights from autocast count,
    since they exist until backward.
    """
    of_modules = {t.untyped_storage().data_ptr() for t in (*modules.parameters(), *modules.buffers())}
    sizes: dict[int, int] = {}
    references = []  # Keep the tensors alive, so that no address is reused.

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_modules:
            sizes[storage.data_ptr()] = storage.nbytes()
            references.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        references.append(forward())
    return sum(sizes.values())


def resident(field: str = "VmHWM") -> int:
    """Return the resident bytes of this process: current (`VmRSS`) or peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_process(module: str, words: Sequence[str], variables: Mapping[str, str] | None = None) -> Any:
    """Run `python -m module words` with additional environment variables, and return its last line as JSON.

    Raises:
        SystemExit: With stderr, if the process fails.
    """
    command = [sys.executable, "-m", module, *words]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (variables or {}))
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def environment() -> dict[str, Any]:
    """Return library versions, commit and machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "commit": _git("rev-parse", "HEAD"),
        "commit_is_clean": _git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/results"
        )
        == "",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": entries.get("model name", platform.machine()),
        "cpu_flags": [flag for flag in FLAGS if flag in entries.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _git(*words: str) -> str | None:
    process = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return process.stdout.strip() if process.returncode == 0 else None


def measured(
    arguments: argparse.Namespace, name: str, expected: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return a section of the file if --resume is set and the section was measured in the same way.

    Args:
        arguments: From `parse`.
        name: Name of the section.
        expected: Further entries that must be equal.
    """
    section = load(arguments.output).get(name) if arguments.resume else None
    settings = {**_settings(arguments), **(expected or {})}
    return section if section and all(section.get(key) == value for key, value in settings.items()) else None


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the measurement. A benchmark lists arguments that affect every section as `inputs`."""
    clock = "processor" if arguments.processor else "wall"
    inputs = {key: getattr(arguments, key) for key in getattr(arguments, "inputs", [])}
    settings = {"quick": arguments.quick, "rounds": arguments.rounds, "threads": arguments.threads, "clock": clock}
    return settings | ({"inputs": inputs} if inputs else {})


@contextmanager
def section(arguments: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """Yield a section to fill with figures, and add the section to the file on exit."""
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **_settings(arguments),
        "load_before": os.getloadavg(),
        **environment(),
    }
    yield record
    record["load_after"] = os.getloadavg()
    record |= _rounded(record)  # Tables then show the same values as the file.
    if arguments.output:
        write(arguments.output, load(arguments.output) | {name: record})


def load(path: Path | None) -> dict[str, Any]:
    """Return the sections of a file; empty if there is no file."""
    return json.loads(path.read_text()) if path and path.is_file() else {}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON atomically, with numbers rounded to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    unfinished.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 6) if isinstance(value, float) else value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the arm in the first column and figures in the others."""
    printed = Table(title=title, title_justify="left")
    for column in columns:
        printed.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        printed.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(printed)


def ratio_text(ratio: Mapping[str, float]) -> str:
    """Format a ratio for a table, such as 1.52 (1.49–1.55), or 1.52 for a single round."""
    spread = f" ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio["low"] < ratio["high"] else ""
    return f"{ratio['median']:.2f}{spread}"
