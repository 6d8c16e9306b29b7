"""Kill, stop and damage runs, and compare each resumed run with an uninterrupted reference run.

- 25 runs of a tiny ViT are killed with SIGKILL and resumed: some at a random moment, some while writing a checkpoint.
  Each resumed run must be bit-identical to the reference in weights, optimizer, schedule, random numbers, best
  checkpoint, and the loss of every step and validation.
- The last checkpoint of a killed run is damaged in 15 ways, sometimes with the best or the previous checkpoint.
  The program must name each damaged file, ignore all damaged files, and resume from the newest intact checkpoint.
- Ten runs are stopped by max_steps, max_time and callbacks, in the middle of an epoch or of an accumulated step.
- Five runs each are killed while they tokenise, cache a frozen prefix, and export.

The benchmark needs no hub and no data, and takes five minutes on one core.

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
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch

import modules.image_classification
import modules.text_classification  # noqa: F401  # Imported before the fork, to save time in every process.
from app.callbacks import AdapterCheckpoint
from app.cli import main as run_command
from app.run.checkpoint_io import read_checkpoint
from tests.backbones import save_backbone
from tests.conftest import ROOT
from tests.support.small_data import write_parquet, write_sentences

EPOCHS, STEPS_AN_EPOCH = 4, 8
LOSSES = "losses.txt"
KINDS = ("truncated", "bit flipped", "emptied")


# ------------------------------------------------------------------------------------------------------------ processes


def record_losses(path: Path) -> None:
    """Append the exact loss of each step and each validation of this process to a file."""
    train_end, validation_end = AdapterCheckpoint.on_train_batch_end, AdapterCheckpoint.on_validation_end

    def record(kind: str, trainer: L.Trainer, value: torch.Tensor) -> None:
        with path.open("a") as file:
            file.write(f"{kind} {trainer.global_step} {float(value).hex()}\n")

    def on_train_batch_end(self: AdapterCheckpoint, trainer: L.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
        record("train", trainer, outputs["loss"])
        train_end(self, trainer, module, outputs, *rest)

    def on_validation_end(self: AdapterCheckpoint, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            record("val", trainer, trainer.callback_metrics["val/loss"])
        validation_end(self, trainer, module)

    AdapterCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign, assignment]
    AdapterCheckpoint.on_validation_end = on_validation_end  # type: ignore[method-assign]


def start(root: Path, data: Path, *options: str, config: str = "image") -> int:
    """Fork a process that fits, with runs and log.txt in `root`; return its id."""
    words = ["fit", "--config", str(ROOT / f"tests/conf/{config}.yaml"), f"--trainer.default_root_dir={root}"]
    words += [
        f"--data.path={data}",
        f"--trainer.max_epochs={EPOCHS}",
        "--checkpoint.last_every_n_steps=1",
        "--trainer.logger=false",
        *options,
    ]
    return start_command(root, words)


def start_command(root: Path, words: list[str]) -> int:
    """Fork a process that runs a command, with output to root/log.txt and caches in root/cache; return its id."""
    root.mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        datasets.config.HF_DATASETS_CACHE = root / "cache"
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
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(process: int, moment: Callable[[], bool]) -> bool:
    """Kill a process as soon as `moment` returns True; return True if the process was still running."""
    while not moment():
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    os.kill(process, signal.SIGKILL)
    return finish(process) == -signal.SIGKILL


# -------------------------------------------------------------------------------------------------------------- results


def same(first: Any, second: Any) -> bool:
    """Return True if two nested values are bit-identical."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def losses(root: Path) -> dict[str, set[str]]:
    """Return all losses of a run by kind and step. A repeated step with another loss has two entries."""
    values: dict[str, set[str]] = {}
    for line in (root / LOSSES).read_text().splitlines():
        kind, step, value = line.split()
        values.setdefault(f"{kind} {step}", set()).add(value)
    return values


def differences(root: Path, reference: Path, lost: Sequence[str] = ()) -> list[str]:
    """Return the differences between a run's end and the reference. A lost best checkpoint is not compared."""
    differing = [] if losses(root) == losses(reference) else ["losses"]
    for name, keys in {
        "last": ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "global_step", "epoch"),
        "best": ("state_dict", "optimizer_states", "global_step"),
    }.items():
        if name == "best" and "best.ckpt" in lost:
            continue
        actual, expected = (read_checkpoint(r / f"version_0/checkpoints/{name}.ckpt") for r in (root, reference))
        differing += [f"{name}: {key}" for key in keys if not same(actual[key], expected[key])]
    return differing


# ---------------------------------------------------------------------------------------------------------------- kills


def killed_run(root: Path, data: Path, reference: Path, order: random.Random, write: bool) -> Any:
    """Kill a run, resume the run, and return a row of results.

    Args:
        root: Directory of the run.
        data: Training data.
        reference: Directory of the uninterrupted run.
        order: Random numbers for the moment of the kill: a step, and seconds after the step.
        write: If true, wait until a checkpoint is being written, and kill then.
    """
    step, delay = order.randrange(EPOCHS * STEPS_AN_EPOCH), order.uniform(0, 0.004 if write else 0.1)
    folder, recorded = root / "version_0/checkpoints", root / LOSSES

    def half_written() -> list[str]:
        return sorted(path.name for path in folder.glob(".*.ckpt.*.tmp"))

    def moment() -> bool:
        begun = step == 0 or (recorded.is_file() and f"train {step} " in recorded.read_text())
        if not begun or (write and not half_written()):
            return False
        time.sleep(delay)
        return True

    process = start(root, data)
    was_running = kill_at(process, moment)
    partial_files = half_written()
    saved = read_checkpoint(folder / "last.ckpt")["global_step"] if (folder / "last.ckpt").is_file() else None
    if was_running and saved is None:  # There is no checkpoint to resume from.
        shutil.rmtree(root)
    code = finish(start(root, data, *([] if saved is None else ["--ckpt_path=last"]))) if was_running else 0
    return {
        "aimed at": "a write" if write else "any moment",
        "killed": was_running,
        "behind step": step,
        "seconds behind it": round(delay, 4),
        "half-written file left": partial_files,
        "step of last.ckpt": saved,
        "exit code of the resumed run": code,
        "differs in": differences(root, reference),
    }


# ---------------------------------------------------------------------------------------------------------------- stops

CONSTANT = ["--model.schedule=constant", "--model.warmup_ratio=0"]  # max_steps would change other schedules.
ACCUMULATE = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4"]


def stops(order: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Yield ten stops: cause, name of the reference, options of both runs, options of the stopped run."""
    for i in range(3):
        accumulated = ACCUMULATE if i == 2 else []
        reference = "accumulated constant" if accumulated else "constant"
        limit = order.randrange(1, EPOCHS * STEPS_AN_EPOCH // (3 if accumulated else 1) - 3)
        yield "max_steps", reference, [*CONSTANT, *accumulated], [f"--trainer.max_steps={limit}"]
    for i in range(3):
        limit = f"--trainer.max_time={{milliseconds: {order.randrange(100, 500)}}}"
        yield "max_time", "accumulated" if i == 2 else "whole", ACCUMULATE if i == 2 else [], [limit]
    for hook in ("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step", "on_validation_end"):
        batch = order.randrange(1, EPOCHS * STEPS_AN_EPOCH) if hook != "on_validation_end" else 12
        callback = ["--allow_imports", "tests.support", "--trainer.callbacks+=tests.support.stopping.StopAt"]
        stop = [*callback, f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.batch={batch}"]
        accumulated = ACCUMULATE if hook in ("on_train_batch_end", "on_validation_end") else []
        yield f"callback, {hook}", "accumulated" if accumulated else "whole", accumulated, stop


def stopped_run(root: Path, data: Path, reference: Path, kind: str, options: list[str], stop: list[str]) -> Any:
    """Stop a run, resume the run, and return a row of results."""
    code = finish(start(root, data, *options, *stop))
    steps = read_checkpoint(root / "version_0/checkpoints/last.ckpt")["global_step"]
    resumed = finish(start(root, data, *options, "--ckpt_path=last"))
    return {
        "stopped by": kind,
        "options": stop,
        "exit codes": [code, resumed],
        "step of last.ckpt": steps,
        "differs in": differences(root, reference),
    }


# ------------------------------------------------------------------------------------------------ kills outside of fits


def interrupted_cache(root: Path, data: Path, reference: Path, config: str, options: list[str], delay: float) -> Any:
    """Kill a run shortly after its first cache file appears, run again, and return a row of results."""
    cache = root / "cache" / "onesided"

    def moment() -> bool:
        if not cache.is_dir() or not any(cache.iterdir()):
            return False
        time.sleep(delay)
        return True

    ran = kill_at(start(root, data, *options, config=config), moment)
    written = sorted(path.name for path in cache.iterdir())
    shutil.rmtree(root / "version_0")
    (root / LOSSES).unlink(missing_ok=True)
    code = finish(start(root, data, *options, config=config))
    return {
        "killed": ran,
        "seconds behind the first file": round(delay, 4),
        "in the cache": written,
        "stale in the end": sorted(p.name for p in cache.iterdir() if p.name.startswith((".", "tmp"))),
        "exit code": code,
        "differs in": differences(root, reference),
    }


def interrupted_export(root: Path, run: Path, kind: str, reference: Path, order: random.Random) -> Any:
    """Kill an export shortly after its first file appears, export again, and return a row of results."""
    words = ["export", str(run), "--format", kind, "--output", str(root / "exported")]
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    delay = order.uniform(0.0, 0.02)
    known = {"log.txt", "cache"}

    def moment() -> bool:
        if not root.is_dir() or all(path.name in known for path in root.iterdir()):
            return False
        time.sleep(delay)
        return True

    ran = kill_at(start_command(root, words), moment)
    remaining_files = sorted(path.name for path in root.iterdir() if path.name not in known)
    is_complete = (root / "exported").exists()
    code = 0 if is_complete else finish(start_command(root, words))
    exported = {path.name: path.read_bytes() for path in (root / "exported").iterdir()}
    expected = {path.name: path.read_bytes() for path in (reference / "exported").iterdir()}
    weights = {name for name in expected if name.endswith((".safetensors", ".json"))}
    changed = [str(path) for path, content in before.items() if path.read_bytes() != content]
    return {
        "format": kind,
        "killed": ran,
        "seconds behind the first file": round(delay, 4),
        "left by the kill": remaining_files,
        "exit code": code,
        "differs in": [name for name in sorted(weights) if exported.get(name) != expected[name]] + changed,
    }


# --------------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, kind: str, order: random.Random) -> None:
    """Truncate or empty a file, or flip one bit."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: order.randrange(1, len(content))]
    elif kind == "bit flipped":
        content[order.randrange(len(content))] ^= 1 << order.randrange(8)
    else:
        content = bytearray()
    path.write_bytes(content)


def damaged_run(
    root: Path, data: Path, cut: Path, reference: Path, kind: str, names: list[str], order: random.Random
) -> Any:
    """Damage checkpoints in a copy of a killed run, resume the copy, and return a row of results."""
    shutil.copytree(cut, root)
    (root / "log.txt").unlink()
    folder = root / "version_0/checkpoints"
    steps = {p.name: read_checkpoint(p)["global_step"] for p in folder.glob("*.ckpt")}
    for name in names:
        damage(folder / name, kind, order)
    before = len((root / LOSSES).read_text().splitlines())
    code = finish(start(root, data, "--ckpt_path=last"))
    log = (root / "log.txt").read_text()
    first = (root / LOSSES).read_text().splitlines()[before].split()
    newest = max(step for name, step in steps.items() if name not in names)
    begun = int(first[1]) - (first[0] == "train")  # A loss is recorded after its step, so the step is one less.
    return {
        "damage": kind,
        "of": names,
        "named": all(f"{folder / name} is " in log for name in names),
        "newest intact step": newest,
        "went on from step": begun,
        "exit code": code,
        "differs in": differences(root, reference, names),
    }


def kills_outside_of_a_fit(base: Path, data: Path, order: random.Random) -> list[Any]:
    """Kill five runs during tokenisation, five during caching of a prefix, and five exports."""
    texts = write_sentences(base / "texts", {"train": 20_000, "validation": 20})
    text = [f"--model.backbone={save_backbone(base / 'roberta', 'roberta')}", "--checkpoint.monitor=val/loss"]
    text += ["--checkpoint.mode=min", "--trainer.limit_train_batches=8"]
    cached = ["--data.crop_scale=[1,1]", "--data.horizontal_flip=false", "--data.cache_prefix=true"]
    vit = "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"
    prefix = [f"--model.backbone_args={vit}", "--model.adapter.layers=1", *cached]
    images = write_parquet(base / "images", {"train": 3000})
    prefix += ["--data.max_val_samples=12", "--trainer.limit_train_batches=8"]
    rows = []
    for kind, where, config, options in (
        ("tokenising", texts, "text", text),
        ("caching a prefix", images, "image", prefix),
    ):
        reference = base / f"{kind} alone"
        assert finish(start(reference, where, *options, config=config)) == 0, (reference / "log.txt").read_text()
        for i in range(5):
            delay = order.uniform(0, 0.3)
            row = interrupted_cache(base / f"{kind} {i}", where, reference, config, options, delay)
            rows.append({"killed while": kind} | row)
            print(f"{kind} {i}: {rows[-1]}", flush=True)
    run = base / "whole/version_0"
    for i, kind in enumerate(("merged", "peft", "compact", "merged", "peft")):
        reference = base / f"export {kind}"
        if not reference.exists():
            words = ["export", str(run), "--format", kind, "--output", str(reference / "exported")]
            assert finish(start_command(reference, words)) == 0, (reference / "log.txt").read_text()
        row = interrupted_export(base / f"export{i}", run, kind, reference, order)
        rows.append({"killed while": "exporting"} | row)
        print(f"exporting {i}: {rows[-1]}", flush=True)
    return rows


def table(rows: list[Any], key: str, good: dict[str, Callable[[Any], bool]]) -> None:
    """Print for each kind the number of rows that pass each test."""
    print(f"{key:<35} {'runs':>5} " + " ".join(f"{name:>24}" for name in good))
    for kind in dict.fromkeys(row[key] for row in rows):
        chosen = [row for row in rows if row[key] == kind]
        counts = [sum(test(row) for row in chosen) for test in good.values()]
        print(f"{kind:<35} {len(chosen):>5} " + " ".join(f"{count:>24}" for count in counts))


def main() -> None:
    """Run all experiments, write the results and print the tables."""
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
        # `cut` is killed in the middle of its third epoch.
        middle = 2 * STEPS_AN_EPOCH + 4
        recorded = base / "cut" / LOSSES
        moment = lambda: recorded.is_file() and f"train {middle} " in recorded.read_text()  # noqa: E731
        assert kill_at(start(base / "cut", data), moment)
        kills, damages = [], []
        for i in range(arguments.kills):
            kills.append(killed_run(base / f"kill{i}", data, base / "whole", order, write=i % 5 > 1))
            print(f"kill {i}: {kills[-1]}", flush=True)
        stopped, references = [], {"whole"}
        for i, (kind, reference, options, stop) in enumerate(stops(order)):
            if reference not in references:
                references.add(reference)
                assert finish(start(base / reference, data, *options)) == 0
            stopped.append(stopped_run(base / f"stop{i}", data, base / reference, kind, options, stop))
            print(f"stop {i}: {stopped[-1]}", flush=True)
        others = kills_outside_of_a_fit(base, data, order)
        choices = [["last.ckpt"]] * 3 + [["last.ckpt", "best.ckpt"], ["last.ckpt", "previous.ckpt"]]
        for kind in KINDS:
            for i, names in enumerate(choices):
                root = base / f"{kind.replace(' ', '-')}{i}"
                damages.append(damaged_run(root, data, base / "cut", base / "whole", kind, names, order))
                print(f"damage {root.name}: {damages[-1]}", flush=True)
    record = {
        "seconds of the whole run": round(seconds, 2),
        "steps": EPOCHS * STEPS_AN_EPOCH,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning")},
        "kills": kills,
        "stops": stopped,
        "kills outside of a fit": others,
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
    table(stopped, "stopped by", {"identical end": identical})
    table(others, "killed while", {"killed": lambda row: row["killed"], "identical end": identical})
    table(
        damages,
        "damage",
        {
            "named": lambda row: row["named"],
            "newest intact file used": lambda row: row["newest intact step"] == row["went on from step"],
            "identical end": identical,
        },
    )


if __name__ == "__main__":
    main()
