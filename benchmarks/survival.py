"""What becomes of runs that are killed, and of checkpoints that are damaged.

25 runs of a tiny ViT are killed with SIGKILL, some at a random moment and some while a checkpoint is written, and
resumed; each must end with the bits of a run that was left alone: weights, optimizer, schedule, random numbers, the
best checkpoint, the loss of every step and every validation. Then the last checkpoint of a run that was killed in its
middle is damaged in 20 ways, in some together with the best or the previous one; each must be named, none used, and
training go on from the newest intact one to the same bits. Needs no hub and no data; two minutes on a core.

    OMP_NUM_THREADS=1 python -m benchmarks.survival --output docs/results/survival.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

import modules.image_classification  # noqa: F401  # both are imported before the fork
from app.callbacks import AdapterCheckpoint
from app.checkpoint_io import read_checkpoint
from app.cli import main as run_command
from tests.conftest import ROOT, write_parquet

EPOCHS, STEPS_AN_EPOCH = 4, 8
LOSSES = "losses.txt"
KINDS = ("truncated", "bit flipped", "emptied", "swapped")


# ------------------------------------------------------------------------------------------------------------ processes


def record_losses(path: Path) -> None:
    """Have this process write the loss of each step, and each validation's, as exact numbers, at once."""
    train_end, validation_end = AdapterCheckpoint.on_train_batch_end, AdapterCheckpoint.on_validation_end

    def say(kind: str, trainer: L.Trainer, value: torch.Tensor) -> None:
        with path.open("a") as file:
            file.write(f"{kind} {trainer.global_step} {float(value).hex()}\n")

    def on_train_batch_end(self: AdapterCheckpoint, trainer: L.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
        say("train", trainer, outputs["loss"])
        train_end(self, trainer, module, outputs, *rest)

    def on_validation_end(self: AdapterCheckpoint, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            say("val", trainer, trainer.callback_metrics["val/loss"])
        validation_end(self, trainer, module)

    AdapterCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign, assignment]
    AdapterCheckpoint.on_validation_end = on_validation_end  # type: ignore[method-assign]


def start(root: Path, data: Path, *options: str) -> int:
    """Fork a process that fits below a root, and says what it says in root/log.txt; its id."""
    root.mkdir(exist_ok=True)
    words = ["fit", "--config", str(ROOT / "tests/conf/image.yaml"), f"--trainer.default_root_dir={root}"]
    words += [
        f"--data.path={data}",
        f"--trainer.max_epochs={EPOCHS}",
        "--checkpoint.last_every_n_steps=1",
        "--trainer.logger=false",
        *options,
    ]
    process = os.fork()
    if process == 0:
        handle = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        record_losses(root / LOSSES)
        code = 1
        try:
            code = run_command(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def finish(process: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(process: int, moment: Callable[[], bool]) -> bool:
    """Kill a process as soon as the moment has come; whether it still ran."""
    while not moment():
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    os.kill(process, signal.SIGKILL)
    return finish(process) == -signal.SIGKILL


# -------------------------------------------------------------------------------------------------------------- results


def same(one: Any, other: Any) -> bool:
    """Whether two trees of values are the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def losses(root: Path) -> dict[str, set[str]]:
    """Every loss that a run's processes computed, by kind and step: two if a step was done again with another."""
    found: dict[str, set[str]] = {}
    for line in (root / LOSSES).read_text().splitlines():
        kind, step, value = line.split()
        found.setdefault(f"{kind} {step}", set()).add(value)
    return found


def differences(root: Path, reference: Path, lost: Sequence[str] = ()) -> list[str]:
    """In what a run ended otherwise than the reference; a best checkpoint that was lost cannot come again."""
    found = [] if losses(root) == losses(reference) else ["losses"]
    for name, keys in {
        "last": ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "global_step", "epoch"),
        "best": ("state_dict", "optimizer_states", "global_step"),
    }.items():
        if name == "best" and "best.ckpt" in lost:
            continue
        one, other = (read_checkpoint(r / f"version_0/checkpoints/{name}.ckpt") for r in (root, reference))
        found += [f"{name}: {key}" for key in keys if not same(one[key], other[key])]
    return found


# ---------------------------------------------------------------------------------------------------------------- kills


def killed_run(root: Path, data: Path, reference: Path, order: random.Random, write: bool) -> Any:
    """Kill a run and resume it; what happened, as a row.

    Args:
        root: Of the run.
        data: What it trains on.
        reference: The run that was left alone.
        order: Source of the moment: a step, and seconds behind it.
        write: Whether to wait for a checkpoint that is being written, and kill within it.
    """
    step, late = order.randrange(EPOCHS * STEPS_AN_EPOCH), order.uniform(0, 0.004 if write else 0.1)
    folder, recorded = root / "version_0/checkpoints", root / LOSSES
    temporary = [folder / f".{name}.ckpt.tmp" for name in ("last", "best")]

    def moment() -> bool:
        begun = step == 0 or (recorded.is_file() and f"train {step} " in recorded.read_text())
        if not begun or (write and not any(path.exists() for path in temporary)):
            return False
        time.sleep(late)
        return True

    process = start(root, data)
    ran = kill_at(process, moment)
    torn = [path.name for path in temporary if path.exists()]
    saved = read_checkpoint(folder / "last.ckpt")["global_step"] if (folder / "last.ckpt").is_file() else None
    if ran and saved is None:  # nothing to go on from
        shutil.rmtree(root)
    code = finish(start(root, data, *([] if saved is None else ["--ckpt_path=last"]))) if ran else 0
    return {
        "aimed at": "a write" if write else "any moment",
        "killed": ran,
        "behind step": step,
        "seconds behind it": round(late, 4),
        "half-written file left": torn,
        "step of last.ckpt": saved,
        "exit code of the resumed run": code,
        "differs in": differences(root, reference),
    }


# --------------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, kind: str, foreign: Path, order: random.Random) -> None:
    """Damage a file in one way."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: order.randrange(1, len(content))]
    elif kind == "bit flipped":
        content[order.randrange(len(content))] ^= 1 << order.randrange(8)
    elif kind == "emptied":
        content = bytearray()
    else:
        content = bytearray((foreign / path.name).read_bytes())
    path.write_bytes(content)


def damaged_run(
    root: Path, data: Path, cut: Path, reference: Path, foreign: Path, kind: str, names: list[str], order: random.Random
) -> Any:
    """Damage checkpoints of a copy of a run that was cut off, and resume it; what happened, as a row."""
    shutil.copytree(cut, root)
    (root / "log.txt").unlink()
    folder = root / "version_0/checkpoints"
    steps = {p.name: read_checkpoint(p)["global_step"] for p in folder.glob("*.ckpt")}
    for name in names:
        damage(folder / name, kind, foreign, order)
    before = len((root / LOSSES).read_text().splitlines())
    code = finish(start(root, data, "--ckpt_path=last"))
    said = (root / "log.txt").read_text()
    first = (root / LOSSES).read_text().splitlines()[before].split()
    newest = max(step for name, step in steps.items() if name not in names)
    begun = int(first[1]) - (first[0] == "train")  # the loss of a step is said when it is done
    return {
        "damage": kind,
        "of": names,
        "named": all(f"{folder / name} is " in said for name in names),
        "newest intact step": newest,
        "went on from step": begun,
        "exit code": code,
        "differs in": differences(root, reference, names),
    }


def table(rows: list[Any], key: str, good: dict[str, Callable[[Any], bool]]) -> None:
    """Print how many rows of each kind are good in each way."""
    print(f"{key:<12} {'runs':>5} " + " ".join(f"{name:>24}" for name in good))
    for kind in dict.fromkeys(row[key] for row in rows):
        chosen = [row for row in rows if row[key] == kind]
        counts = [sum(test(row) for row in chosen) for test in good.values()]
        print(f"{kind:<12} {len(chosen):>5} " + " ".join(f"{count:>24}" for count in counts))


def main() -> None:
    """Kill, damage, resume, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    order = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="onesided-survival-") as name:
        base = Path(name)
        data = write_parquet(base / "data", {"train": 60})
        begin = time.monotonic()
        assert finish(start(base / "whole", data)) == 0, (base / "whole/log.txt").read_text()
        seconds = time.monotonic() - begin
        # a run of another seed, and one that is cut off in the middle of its third epoch
        assert finish(start(base / "foreign", data, "--seed_everything=1", "--trainer.max_epochs=3")) == 0
        middle = 2 * STEPS_AN_EPOCH + 4
        recorded = base / "cut" / LOSSES
        moment = lambda: recorded.is_file() and f"train {middle} " in recorded.read_text()  # noqa: E731
        assert kill_at(start(base / "cut", data), moment)
        kills, damages = [], []
        for i in range(arguments.kills):
            kills.append(killed_run(base / f"kill{i}", data, base / "whole", order, write=i % 5 > 1))
            print(f"kill {i}: {kills[-1]}", flush=True)
        foreign = base / "foreign/version_0/checkpoints"
        choices = [["last.ckpt"]] * 3 + [["last.ckpt", "best.ckpt"], ["last.ckpt", "previous.ckpt"]]
        for kind in KINDS:
            for i, names in enumerate(choices):
                root = base / f"{kind.replace(' ', '-')}{i}"
                damages.append(damaged_run(root, data, base / "cut", base / "whole", foreign, kind, names, order))
                print(f"damage {root.name}: {damages[-1]}", flush=True)
    record = {
        "seconds of the whole run": round(seconds, 2),
        "steps": EPOCHS * STEPS_AN_EPOCH,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning")},
        "kills": kills,
        "damage": damages,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    identical = lambda row: not row["differs in"]  # noqa: E731
    table(
        kills,
        "aimed at",
        {
            "killed": lambda row: row["killed"],
            "half-written file left": lambda row: bool(row["half-written file left"]),
            "resumed": lambda row: row["step of last.ckpt"] is not None,
            "identical end": identical,
        },
    )
    table(
        damages,
        "damage",
        {
            "named": lambda row: row["named"],
            "newest intact one used": lambda row: row["newest intact step"] == row["went on from step"],
            "identical end": identical,
        },
    )


if __name__ == "__main__":
    main()
