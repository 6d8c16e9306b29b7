"""Fuzzing: random configurations and damaged files end with code 0, or with one message and code 2.

Inputs are never changed. The files of a run are complete or absent.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from app.config.constructors import constructor_parameters
from tests.app.conftest import CommandLine
from tests.support.small_data import CLASSES, png

ODD = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e-30, float("nan"), float("inf"), 10**30, -(2**63)),
    *("", "x", "null", "auto", "ünï\u202ecode", "[/red]", "a\nb", "\x00", "\x1b[2J", "{", "*a", "%s", "../../x"),
    *("!!python/object/apply:os.getcwd []", "os.getcwd", "a.b", "regex:(", "regex:.*", "all", "pretrained", "none"),
    *([], [1], ["x"], ["all"], [None], {}, {"a": 1}, {"class_path": "os.getcwd"}, {"class_path": 3, "init_args": []}),
]
# Keys of the trainer. The other keys could make a run wait for other machines, start processes or never end.
TRAINER = (
    *("max_epochs", "max_steps", "min_epochs", "limit_train_batches", "limit_val_batches", "val_check_interval"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision", "deterministic"),
    *("log_every_n_steps", "check_val_every_n_epoch", "num_sanity_val_steps", "overfit_batches", "fast_dev_run"),
    *("callbacks", "logger", "plugins", "profiler", "max_time", "detect_anomaly", "default_root_dir", "benchmark"),
    *("enable_progress_bar", "barebones", "inference_mode", "reload_dataloaders_every_n_epochs", "strategy", "unknown"),
)
OTHERS = (
    *("seed_everything", "test_after_fit", "ckpt_path", "unknown", "spectrum.every_n_epochs", "spectrum.unknown"),
    *("checkpoint.monitor", "checkpoint.mode", "checkpoint.last_every_n_steps", "model", "data", "trainer"),
)
FAMILIES = {
    "image": (
        "modules.image_classification.ImageClassifier",
        "datamodules.image_classification.ImageClassificationData",
    ),
    "text": ("modules.text_classification.TextClassifier", "datamodules.text_classification.TextClassificationData"),
    "summary": ("modules.summarization.Summarizer", "datamodules.summarization.SummarizationData"),
    "instructions": ("modules.language_modeling.LanguageModel", "datamodules.language_modeling.LanguageModelingData"),
    "questions": ("modules.language_modeling.LanguageModel", "datamodules.multiple_choice.MultipleChoiceData"),
}
FOLDERS = ("data", "data", "da[/red]ta", "d*t?[a]", "d %s {0} `$(x)`", "train")
NOT_MANY = {"num_workers", "image_size", "max_steps", "max_epochs", "max_length", "max_new_tokens", "length", "shots"}
ENDS = ("--trainer.max_epochs=1", "--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.logger=false")


def keys(family: str) -> list[str]:
    """Return the keys of a family's configuration, and some unknown keys."""
    names_of_classes = []
    for section, path in zip(("model", "data"), FAMILIES[family], strict=True):
        names = list(constructor_parameters(resolve_name(path)))
        names_of_classes += [f"{section}.{name}" for name in [*names, "unknown"]]
    adapter = ("rank", "alpha", "dropout", "train", "init_a", "init_b", "targets", "scaling", "seed", "unknown")
    return [
        *names_of_classes,
        *(f"model.adapter.{name}" for name in adapter),
        *(f"trainer.{name}" for name in TRAINER),
        *OTHERS,
    ]


KEYS = {family: keys(family) for family in FAMILIES}


@dataclass
class Case:
    """One random run: changed keys (in a file and on the command line), and a damaged input."""

    family: str
    command: str
    in_file: dict[str, Any] = field(default_factory=dict)
    in_words: dict[str, Any] = field(default_factory=dict)
    damage: str | None = None
    suffix: str = ""
    seed: int = 0
    damaged: str = "data"  # "data", "checkpoint" or "backbone" (weights, tokenizer and configuration of transformers)


def usable(key: str, value: Any) -> bool:
    """Return True if a run with this value ends soon."""
    big = isinstance(value, int | float) and not isinstance(value, bool) and (math.isinf(value) or value > 100)
    return not (big and key.rpartition(".")[2] in NOT_MANY)


def choices(family: str) -> dict[str, list[Any]]:
    """Return the allowed strings of each key that has a Literal type."""
    by_key = {}
    for section, path in zip(("model", "data"), FAMILIES[family], strict=True):
        for name, parameter in constructor_parameters(resolve_name(path)).items():
            hint = parameter.annotation
            words = [word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
            by_key |= {f"{section}.{name}": words} if words else {}
    return by_key


CHOICES = {family: choices(family) for family in FAMILIES}


def case_of(seed: int) -> Case:
    """Return the random case of a seed."""
    rng = random.Random(seed)
    family = rng.choice(sorted(FAMILIES))
    case = Case(family, rng.choice([*["fit"] * 5, "validate", "test", "predict"]), seed=seed)
    changes = rng.choice([0, 0, 1, 1, 2])
    while len(case.in_file) + len(case.in_words) < changes:
        key = rng.choice(KEYS[family])
        value = rng.choice(CHOICES[family].get(key, ODD) if rng.random() < 0.5 else ODD)
        if usable(key, value):
            rng.choice([case.in_file, case.in_words])[key] = value
    if changes == 0 or rng.random() < 0.3:
        case.damaged = rng.choice(["data"] * 3 + ["checkpoint", "backbone"])
        if case.damaged == "data":
            case.damage = rng.choice(sorted(BYTES) + sorted(ROWS) * 2)
            case.suffix = rng.choice(["", "", "", ".parquet", ".csv", ".jsonl", "pictures"])
        else:
            case.damage = rng.choice([*sorted(BYTES), *["a value"] * len(BYTES)])
    return case


# --------------------------------------------------------------------------------------------------------- damaged data

BYTES: dict[str, Any] = {
    "empty": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "noise": lambda data, rng: rng.randbytes(200),
    "holes": lambda data, rng: bytes(rng.randrange(256) if rng.random() < 0.01 else b for b in data),
    "zeros": lambda data, rng: data[: len(data) // 2] + bytes(100) + data[len(data) // 2 :],
    "doubled": lambda data, rng: data + data,
}
CELLS = [
    *(None, "", " ", "x", "-1", "\ud7ff\U0010ffff", "\x00", 'a\nb,"c', "word " * 3000, -1, 0, 3, 10**12, 1.5),
    *(float("nan"), True, [], ["x"], [{"role": "x"}], {}, {"bytes": b"", "path": None}, {"bytes": None, "path": "/x"}),
    {"bytes": png(np.zeros((1, 1, 3), np.uint8)), "path": None},
]


def _one_cell(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    rng.choice(rows)[rng.choice(list(rows[0]))] = rng.choice(CELLS)
    return rows


def _one_column(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    name, cell = rng.choice(list(rows[0])), rng.choice(CELLS)
    return [{**row, name: cell} for row in rows]


def _without_column(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    name = rng.choice(list(rows[0]))
    return [{k: v for k, v in row.items() if k != name} for row in rows]


def _renamed(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    name, other = rng.choice(list(rows[0])), rng.choice(["", "index", "length", "input_ids", "x y", "../x", "[/red]"])
    return [{(other if k == name else k): v for k, v in row.items()} for row in rows]


ROWS: dict[str, Any] = {
    "one cell": _one_cell,
    "one column": _one_column,
    "no such column": _without_column,
    "another name": _renamed,
    "few rows": lambda rows, rng: rows[: rng.randrange(1, 4)],
    "no rows": lambda rows, rng: [],
    "one class": lambda rows, rng: [rows[0]] * len(rows),
    "as it is": lambda rows, rng: rows,
}


def _another_value(tree: Any, rng: random.Random) -> None:
    """Replace or remove one value somewhere in a tree of dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        if rng.random() < 0.3:
            del tree[key]
        else:
            tree[key] = rng.choice(ODD)
        return


def damage_backbone(folder: Path, case: Case) -> None:
    """Change one file of a backbone of transformers: its tokenizer, its configuration or its weights."""
    rng = random.Random(case.seed)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    if case.damage != "a value":
        file = rng.choice(files)
        file.write_bytes(BYTES[str(case.damage)](file.read_bytes(), rng))
        return
    file = rng.choice([p for p in files if p.suffix == ".json"])
    content = json.loads(file.read_text())
    _another_value(content, rng)
    file.write_text(json.dumps(content))


def damage_checkpoint(run: Path, case: Case) -> Path:
    """Damage a run's last checkpoint, or write a changed copy outside of the run. Return the value of --ckpt_path."""
    rng = random.Random(case.seed)
    last = run / "checkpoints" / "last.ckpt"
    if case.damage != "a value":
        last.write_bytes(BYTES[str(case.damage)](last.read_bytes(), rng))
        return rng.choice([run, last])
    content = torch.load(last, weights_only=True)
    _another_value(content, rng)
    torch.save(content, odd := run.parent / "odd.ckpt")
    return odd


def damage_pictures(folder: Path, case: Case) -> None:
    """Replace the tables of images by image folders, and damage or rename one image or folder."""
    rng = random.Random(case.seed)
    for table in sorted(folder.glob("*.parquet")):
        for i, row in enumerate(pq.read_table(table).to_pylist()):
            target = folder / table.stem / CLASSES[row["label"]] / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(row["img"]["bytes"])
        table.unlink()
    file = rng.choice(sorted(folder.rglob("*.png")))
    if case.damage in BYTES:
        file.write_bytes(BYTES[str(case.damage)](file.read_bytes(), rng))
    else:
        rng.choice([file, file.parent]).rename(
            file.parent.parent / rng.choice(["x.gif", ".x", "Test", "x\udce9", "a b"])
        )


def damage(folder: Path, case: Case) -> None:
    """Change one file of a data directory."""
    if case.suffix == "pictures":
        if case.family == "image":
            damage_pictures(folder, case)
        return
    rng = random.Random(case.seed)
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    if case.damage in BYTES:
        file.write_bytes(BYTES[case.damage](file.read_bytes(), rng))
        if case.suffix:
            file.rename(file.with_suffix(case.suffix))
        return
    if file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = ROWS[case.damage](rows, rng)
    suffix = case.suffix or file.suffix
    file.unlink()
    target = file.with_suffix(suffix)
    if suffix == ".parquet":
        try:
            table = pa.Table.from_pylist(rows)
        except (pa.ArrowException, OverflowError):  # Parquet has no columns of mixed types
            table = pa.table({k: pa.array([str(row.get(k)) for row in rows]) for k in rows[0]})
        pq.write_table(table, target)
    elif suffix == ".csv":
        with target.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]) if rows else ["a"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        target.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))


# -------------------------------------------------------------------------------------------------------------- checks


def digest(*folders: Path) -> dict[str, str]:
    return {str(p): hashlib.md5(p.read_bytes()).hexdigest() for f in folders for p in f.rglob("*") if p.is_file()}


_watching: list[set[Path]] = []
LIBRARIES = {"__pycache__", "matplotlib"}  # cache folders of libraries
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    place = {"open": 0, "os.mkdir": 0, "os.truncate": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1}.get(event)
    if place is None or (event == "open" and not (arguments[2] or 0) & WRITES):
        return
    if isinstance(arguments[place], str | bytes):
        _watching[-1].add(Path(os.path.abspath(os.fsdecode(arguments[place]))))


@functools.cache
def _start_watching() -> None:
    """Add the hook once. Python cannot remove an audit hook, which slows down every later test of this process."""
    sys.addaudithook(_watch)


@contextlib.contextmanager
def watched() -> Iterator[set[Path]]:
    """Collect the paths that Python code opens for writing, creates or renames, except devices and library caches."""
    _start_watching()
    _watching.append(set())
    try:
        yield (paths := _watching[-1])
    finally:
        _watching.remove(paths)
        paths -= {path for path in paths if path.parts[1] in ("dev", "proc") or LIBRARIES & set(path.parts)}


def check_run(run: Path, before: dict[str, str], finished: bool) -> None:
    """Check that every changed file of a run is complete and can be read."""
    files = [Path(name) for name, content in digest(run).items() if before.get(name) != content]
    assert not [p for p in files if p.suffix == ".tmp"]
    for path in files:
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    assert not finished or {"config.yaml", "metrics.json"} <= {p.name for p in run.iterdir()}


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Return dotted keys as a tree. Keys of the model and the data stand below init_args."""
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        section, *names = key.split(".")
        path = [section, *(["init_args"] if section in ("model", "data") and names else []), *names]
        node = tree
        for name in path[:-1]:
            node = node[name] if isinstance(node.get(name), dict) else node.setdefault(name, {})
            if not isinstance(node, dict):
                return {}
        node[path[-1]] = value
    return tree


def word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def run_case(cli: CommandLine, case: Case, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a case in a new folder. Commands other than fit use a copy of the run of `cli`, if there is one."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        root = Path(name)
        data = root / random.Random(case.seed).choice(FOLDERS)
        shutil.copytree(cli.data, data)
        if case.damage and case.damaged == "data":
            damage(data, case)
        backbone = Path(shutil.copytree(cli.backbone[1], root / "backbone")) if cli.backbone else None
        if case.damage and case.damaged == "backbone" and backbone is not None:
            damage_backbone(backbone, case)
        runs = root / "runs"
        checkpoint_options: list[str] = []
        if (case.command != "fit" or case.damaged == "checkpoint") and cli.root.exists():
            shutil.copytree(cli.root, runs)
            run = runs / "version_0"
            checkpoint_options = [
                "--ckpt_path",
                str(damage_checkpoint(run, case) if case.damaged == "checkpoint" else run),
            ]
        cli = CommandLine(runs, data, case.family, backbone)
        work = _project_copy(root)
        stack.enter_context(pytest.MonkeyPatch.context()).chdir(work)
        options = [*ENDS, *checkpoint_options]
        try:
            content = yaml.safe_dump(nested(case.in_file))
        except yaml.YAMLError:
            content = "{}"
        (root / "overlay.yaml").write_text(content)
        options += [f"--config={root / 'overlay.yaml'}"] if case.in_file else []
        options += [f"--{key}={word(value)}" for key, value in case.in_words.items()]
        runs_before = digest(runs)
        inputs = [data, *(Path(p) for p in cli.backbone[1:])]
        before = digest(*inputs)
        capsys.readouterr()
        started = time.monotonic()
        with watched() as written:
            code = cli(case.command, *options)
        assert time.monotonic() - started < 60
        err = capsys.readouterr().err
        places = (runs, work, root / "x", Path(datasets.config.HF_DATASETS_CACHE))
        stray = [path for path in written if path.exists() and not any(path.is_relative_to(p) for p in places)]
        assert not stray, f"written outside of the run, the output and the cache: {stray}"
        lines = err.splitlines()
        assert code in (0, 2), err
        assert "Traceback" not in err, err
        assert sum(line.startswith("error: ") for line in lines) == (code == 2), err
        assert code == 0 or lines[-1].startswith("error: "), err
        assert digest(*inputs) == before, "an input was changed"
        for run in runs.glob("version_*"):
            check_run(run, runs_before, code == 0 and case.command == "fit" and "fast_dev_run" not in str(case))
        return code


def _project_copy(root: Path) -> Path:
    """Return a working directory with a copy of tests/conf. Relative paths of a case stay below `root`."""
    work = root / "a" / "b"
    shutil.copytree("tests/conf", work / "tests" / "conf")
    return work


MARKUP = next(seed for seed in range(100) if "[/red]" in random.Random(seed).choice(FOLDERS))


@pytest.fixture
def families(request: pytest.FixtureRequest) -> dict[str, CommandLine]:
    names = {"image": "cli", "instructions": "instruction_cli", "questions": "question_cli"}
    return {family: request.getfixturevalue(names.get(family, f"{family}_cli")) for family in FAMILIES}


@pytest.fixture
def fitted(families: dict[str, CommandLine], finished_fit: Callable[..., None]) -> dict[str, CommandLine]:
    for family, cli in families.items():
        cli.root = cli.root / family
        if family != "questions":  # questions are for evaluation alone
            finished_fit(cli, "--trainer.max_epochs=1")
    return families


REGRESSIONS = [  # regressions; the last seed puts the data in a folder whose name is markup for rich
    Case("image", "fit", in_words={"data.batch_size": None}),
    Case("image", "fit", in_file={"model.adapter": ["all"]}),
    Case("text", "fit", damage="as it is", seed=MARKUP),
]


@pytest.mark.parametrize("case", [*REGRESSIONS, *map(case_of, range(1000, 1012))], ids=repr)
def test_earlier_failures_and_some_random_cases(
    case: Case, families: dict[str, CommandLine], capsys: pytest.CaptureFixture[str]
) -> None:
    run_case(families[case.family], case, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_many_random_cases(seed: int, fitted: dict[str, CommandLine], capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of(seed)
    run_case(fitted[case.family], case, capsys)
