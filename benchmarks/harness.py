"""What all benchmarks share: arms that take turns in shuffled rounds, paired ratios, a table, and a JSON file.

    arguments = parse(parser(__doc__, rounds=20))
    with section(arguments, "vit, bfloat16") as record:
        record["seconds"] = seconds = take_turns({"ours": step, "peft": other_step}, arguments.rounds)
        record["peft over ours"] = paired_ratio(seconds["peft"], seconds["ours"])
    table("A step", ["arm", "ms"], rows)

The file is one object, section by section: each has its own figures and raw times beside the versions, the machine,
the load and the command it was measured with, so that sections measured one by one share a file.
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
FEW = 5  # rounds, below which a bootstrap says nothing
LIBRARIES = ("torch", "lightning", "transformers", "timm", "peft")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")

Arm = Callable[[], float | None]  # does its work; may return its own seconds, to leave out what does not count
Seconds = dict[str, list[float]]


def parser(
    doc: str | None, rounds: int, quick_rounds: int = 3, processor: bool = False, device: bool = False
) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; without --rounds there are `rounds`, or `quick_rounds` with --quick.

    Args:
        doc: Of the program.
        rounds: Turns of each arm.
        quick_rounds: The same with --quick.
        processor: Whether it can measure the processor's time.
        device: Whether it can run on a GPU, and within a budget of seconds.
    """
    common = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it works")
    common.add_argument("--rounds", type=int, help=f"turns of each arm ({rounds}; with --quick {quick_rounds})")
    common.add_argument("--threads", type=int, help="of torch; without it what torch chooses")
    if processor:
        common.add_argument(
            "--processor", action="store_true", help="time of the processor: less disturbed by other programs"
        )
    if device:
        common.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
        common.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no section begins")
    common.add_argument("--output", type=Path, help="JSON file; sections that it holds and this run does not, stay")
    common.add_argument("--resume", action="store_true", help="leave out the sections that the file holds already")
    common.set_defaults(default_rounds=(rounds, quick_rounds), processor=False)
    return common


def parse(common: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments, fill in the rounds and set torch's threads."""
    arguments = common.parse_args(words)
    if arguments.rounds is None:
        arguments.rounds = arguments.default_rounds[arguments.quick]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.threads = torch.get_num_threads()
    arguments.clock = time.process_time if arguments.processor else time.perf_counter
    return arguments


class Deadline:
    """The end of a benchmark's budget, and the sections that were not begun before it.

    Args:
        seconds: The budget, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._left: list[str] = []

    def passed(self, name: str) -> bool:
        """Return True if the section must not begin any more, and note that it is left."""
        if time.monotonic() < self._end:
            return False
        self._left.append(name)
        return True

    def exit(self) -> None:
        """Exit with 3 and the sections on stderr if any are left."""
        if self._left:
            print(f"The budget is spent; left: {'; '.join(self._left)}.", file=sys.stderr, flush=True)
            sys.exit(3)


def take_turns(
    arms: Mapping[str, Arm],
    rounds: int,
    warm_up: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Run every arm once a round, in an order that is drawn anew each round; seconds of each, round by round.

    A slow spell of the machine so hits all arms of a round alike, and no arm always follows the same other one.
    """
    order = random.Random(seed)
    seconds: Seconds = {name: [] for name in arms}
    for number in range(-warm_up, rounds):
        for name in order.sample(list(arms), len(arms)):
            start = clock()
            own = arms[name]()
            passed = clock() - start if own is None else own
            if number >= 0:
                seconds[name].append(passed)
    return seconds


def paired_ratio(of: Sequence[float], over: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of the rounds' ratios of / over, with its interval (see `interval`)."""
    return interval([a / b for a, b in zip(of, over, strict=True)], seed)


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of figures that were taken round by round.

    Returns:
        `median`, and `low` and `high`: of five rounds or more the bootstrap interval of 95 % (2,000 draws), of fewer
        the least and the most.
    """
    rounds = np.asarray(values)
    return _bootstrap(lambda drawn: np.median(rounds[drawn], axis=-1), len(rounds), seed)


def paired_share(of: Sequence[float], whole: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of differences over the median of others, as `interval`: steady where single differences are near zero."""
    part, all_of_it = np.asarray(of), np.asarray(whole)
    return _bootstrap(
        lambda drawn: np.median(part[drawn], axis=-1) / np.median(all_of_it[drawn], axis=-1), len(part), seed
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
    """Bytes that a forward pass keeps for backward: each storage once, the modules' parameters and buffers not at all.

    Copies of weights that autocast makes are counted, since they are held until backward.
    """
    own = {t.untyped_storage().data_ptr() for t in (*modules.parameters(), *modules.buffers())}
    kept: dict[int, int] = {}
    held = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(forward())
    return sum(kept.values())


def resident(field: str = "VmHWM") -> int:
    """Bytes that this process has in memory (`VmRSS`) or had at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_process(module: str, words: Sequence[str], variables: Mapping[str, str] | None = None) -> Any:
    """Run `python -m module words` with more environment variables; what it prints last, which is JSON.

    Raises:
        SystemExit: If it fails, with what it wrote to stderr.
    """
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (variables or {}))
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, Any]:
    """Versions and the machine."""
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
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else None


def measured(arguments: argparse.Namespace, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The section, if the file holds it, measured in the same way, and the run is to resume.

    Args:
        arguments: From `parse`.
        name: Of the section.
        given: What else of it must be as it would be now.
    """
    section = load(arguments.output).get(name) if arguments.resume else None
    same = {**_way(arguments), **(given or {})}
    return section if section and all(section.get(key) == value for key, value in same.items()) else None


def _way(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a section is measured; a benchmark names the arguments that every section depends on as `inputs`."""
    clock = "processor" if arguments.processor else "wall"
    inputs = {key: getattr(arguments, key) for key in getattr(arguments, "inputs", [])}
    way = {"quick": arguments.quick, "rounds": arguments.rounds, "threads": arguments.threads, "clock": clock}
    return way | ({"inputs": inputs} if inputs else {})


@contextmanager
def section(arguments: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """A section to fill with figures; on leaving, it is added to the file, which is replaced as a whole."""
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **_way(arguments),
        "load_before": os.getloadavg(),
        **environment(),
    }
    yield record
    record["load_after"] = os.getloadavg()
    record |= _rounded(record)  # what is shown is what is written
    if arguments.output:
        write(arguments.output, load(arguments.output) | {name: record})


def load(path: Path | None) -> dict[str, Any]:
    """The sections that a file holds; none if there is no file."""
    return json.loads(path.read_text()) if path and path.is_file() else {}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON with its times rounded to a microsecond, so that a file is whole or not there."""
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
    """Print a table; its first column is the arm, the others are figures."""
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def ratio_text(ratio: Mapping[str, float]) -> str:
    """A ratio as a table shows it: 1.52 (1.49–1.55), or of a single round 1.52."""
    spread = f" ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio["low"] < ratio["high"] else ""
    return f"{ratio['median']:.2f}{spread}"
