"""Cases of the command line: configurations, imports and output. Section titles begin with the number of the case."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import json
import logging
import os
import pkgutil
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.callbacks import RunSummary
from app.cli import AsymmetryCLI, main
from app.config.imports import CLASSES, FUNCTIONS, PACKAGES, resolve
from app.console import console_logging, traceback_hook
from datamodules.atomic import WriteError
from tests.app.conftest import CommandLine
from tests.app.test_bad_input import Malicious, refused
from tests.support.small_data import CLASSES as COLOURS
from tests.support.small_data import colour_image, png

Capture = pytest.CaptureFixture[str]


def overlay(folder: Path, text: str) -> str:
    path = folder / "overlay.yaml"
    path.write_text(text)
    return f"--config={path}"


# ------------------------------------------------------------------------------------ 16: wrong keys of a class


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["callbacks+=EarlyStopping", "callbacks.patiense", "3"], ["no key patiense", "did you mean patience"]),
        (["callbacks+=EarlyStopping", "callbacks.monitor=a", "callbacks.patience", "abc"], ["patience", "int", "abc"]),
        (["callbacks=[{class_path: EarlyStopping, init_args: {patiense: 3}}]"], ["did you mean patience"]),
        (["callbacks+=Timer", "callbacks+=EarlyStopping", "callbacks.mod=min"], ["no key mod;", "did you mean mode"]),
        (["callbacks+=RichProgressBar", "callbacks.theme.tme=red"], ["theme.tme", "did you mean theme.time"]),
        (["callbacks+=EarlyStoping"], ["trainer.callbacks", "the path of a class, got EarlyStoping"]),
        (["callbacks+=lightning.pytorch.callbacks.EarlyStoping"], ["no class EarlyStoping in", "EarlyStopping?"]),
        (["callbacks+=TensorBoardLogger"], ["trainer.callbacks: expected", "the path of a class"]),
        (["logger=TensorBoardLogger", "logger.save_dir=a", "logger.nam=b"], ["no key nam;", "did you mean name"]),
        (["logger=CSVLogger"], ["trainer.logger", "arguments are required: save_dir"]),
        (["logger+=CSVLogger", "logger.save_dir=a", "logger.flush_logs_every_n_steps=x"], ["flush_logs", "int", "x"]),
        (["plugins+=AsyncCheckpointIO", "plugins.checkpointio=3"], ["no key checkpointio", "mean checkpoint_io"]),
        (["strategy=DDPStrategy", "strategy.timeot=3"], ["no key timeot", "did you mean timeout"]),
        (["strategy=DDPStrategi"], ["invalid strategy", "ddpstrategi"]),
        (["profiler=SimpleProfiler", "profiler.extendet=true"], ["no key extendet", "did you mean extended"]),
        (["strategy=DDPStrategy", "strategy.find_unused=true"], ["no key find_unused"]),
        (["callbacks+=ModelCheckpoint", "callbacks.every=3"], ["no key every;", "did you mean every_n_train_steps?"]),
        (["callbacks+=EarlyStopping", "callbacks.monitor=a", "callbacks.mode=b"], ["trainer.callbacks: EarlyStopping"]),
        (["callbacks+=app.callbacks.nothing.X"], ["trainer.callbacks", "There is no module app.callbacks.nothing."]),
    ],
)
def test_case_16_wrong_key_in_a_class(cli: CommandLine, capsys: Capture, options: list[str], parts: list[str]) -> None:
    words = [word if word in ("3", "abc") else f"--trainer.{word}" for word in options]
    assert cli("fit", *words) == 2
    err = capsys.readouterr().err
    assert "not imported" not in err
    assert "--allow_imports" not in err
    assert err.count("\n") == 1
    for part in ["trainer", *parts]:
        assert part in err


# -------------------------------------------------------------------------------- 17: constructors that raise

BROKEN = """
import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
class Missing(L.Callback):
    def __init__(self): import package_that_nobody_has.part
class Raises(L.Callback):
    def __init__(self, value: int = 0): raise {error}
class Broken(TensorBoardLogger):
    def __init__(self): raise RuntimeError("no server")
"""


@pytest.mark.parametrize("error", ["KeyError('x')", "OverflowError('x')", "AssertionError", "AttributeError('x')"])
def test_case_17_a_constructor_that_raises_is_one_message(
    cli: CommandLine, capsys: Capture, tmp_path: Path, error: str
) -> None:
    (tmp_path / "broken_classes.py").write_text(BROKEN.replace("{error}", error))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.delitem(sys.modules, "broken_classes", raising=False)
        allow = ["--allow_imports", "broken_classes"]
        refused(
            capsys,
            cli("fit", "--trainer.callbacks+=broken_classes.Raises", *allow),
            "trainer.callbacks: Raises cannot be created",
            error.partition("(")[0],
        )
        if error == "AssertionError":
            code = cli("fit", "--trainer.callbacks+=broken_classes.Missing", *allow)
            refused(capsys, code, "Missing cannot be created", "pip install package_that_nobody_has")
            code = cli("fit", "--trainer.logger=broken_classes.Broken", *allow)
            refused(capsys, code, "trainer.logger: Broken cannot be created", "no server")
    assert not cli.root.exists()


@pytest.mark.parametrize("logger", ["WandbLogger", "MLFlowLogger", "CometLogger"])
def test_case_17_a_logger_whose_package_is_not_installed(cli: CommandLine, capsys: Capture, logger: str) -> None:
    package = logger.lower().removesuffix("logger")
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    refused(capsys, cli("fit", f"--trainer.logger={logger}"), f"trainer.logger: {logger}", "pip install", package)


# ---------------------------------------------------------------- 18: default_root_dir, --config and --ckpt_path


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Record the root of each new run directory. The command stops before the directory is created."""
    paths: list[Path] = []

    def new_run_directory(root: Path, label: str) -> Path:
        paths.append(root)
        raise WriteError("stopped by the test")

    monkeypatch.setattr("app.cli.new_run_directory", new_run_directory)
    yield paths


HOME = Path("/nonexistent/home")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("trainer: {default_root_dir: ~/runs}", [], HOME / "runs"),
        ("trainer: {default_root_dir: /a/b}", [], Path("/a/b")),
        ("trainer: {default_root_dir: null}", [], Path("runs/image")),
        ("trainer: {default_root_dir: }", [], Path("runs/image")),
        ("trainer.default_root_dir: /a/b", [], Path("/a/b")),
        ("trainer: TRAINER", [], HOME / "of_the_file"),
        ("{}", ["--trainer=TRAINER"], HOME / "of_the_file"),
        ("{}", ["--trainer", "TRAINER"], HOME / "of_the_file"),
        ("{}", ["--trainer={default_root_dir: /a/b}"], Path("/a/b")),
        ("{}", ["--trainer.default_root_dir=~/runs"], HOME / "runs"),
        ("{}", ["--trainer.default_root_dir", "null"], Path("runs/image")),
        ("trainer: {default_root_dir: /a}", ["--trainer.default_root_dir=null"], Path("runs/image")),
        ("trainer: {default_root_dir: /a}", ["--trainer.default_root_dir=/b"], Path("/b")),
        ("config: OTHER", [], Path("/of/the/other")),
    ],
)
def test_case_18_all_spellings_of_default_root_dir(
    roots: list[Path],
    cli: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    options: list[str],
    expected: Path,
) -> None:
    monkeypatch.setenv("HOME", str(HOME))
    trainer, other = tmp_path / "trainer.yaml", tmp_path / "other.yaml"
    trainer.write_text("default_root_dir: ~/of_the_file\naccelerator: cpu\n")
    other.write_text("trainer: {default_root_dir: /of/the/other}\n")
    filled = [w.replace("TRAINER", str(trainer)).replace("OTHER", str(other)) for w in (text, *options)]
    words = ["--config", "tests/conf/image.yaml", overlay(tmp_path, filled[0]), f"--data.path={cli.data}", *filled[1:]]
    assert main(["fit", *words]) == 2
    assert roots == [expected]


@pytest.mark.parametrize("config", [["-c", "FILE"], ["-cFILE"], ["--config=FILE"], ["--config", "FILE"]])
def test_case_18_all_spellings_of_config(roots: list[Path], cli: CommandLine, config: list[str]) -> None:
    words = [word.replace("FILE", "tests/conf/image.yaml") for word in config]
    assert main(["fit", f"--data.path={cli.data}", *words]) == 2
    assert roots == [Path("runs/image")]


def test_case_18_ckpt_path_in_a_file_null_or_empty(fitted_cli: CommandLine, capsys: Capture, tmp_path: Path) -> None:
    quick = ("--trainer.limit_test_batches=1", "--trainer.logger=false")
    assert fitted_cli("test", overlay(tmp_path, f"ckpt_path: {fitted_cli.run()}"), *quick) == 0
    assert "without --ckpt_path" not in capsys.readouterr().err
    for null in ("--ckpt_path=null", overlay(tmp_path, "ckpt_path: null")):
        assert fitted_cli("test", null, "--model.class_names=[red, green, blue]", *quick) == 0
        assert "without --ckpt_path" in capsys.readouterr().err
    refused(capsys, fitted_cli("test", "--ckpt_path="), "ckpt_path", "empty")
    # without a configuration file: the checkpoint has all keys
    data = ("--data.path", str(fitted_cli.data), "--trainer.accelerator=cpu", "--data.batch_size=4")
    assert main(["test", "--ckpt_path", str(fitted_cli.run()), *data, *quick]) == 0
    assert "data.batch_size: 4 from the command line; the checkpoint had 6" in capsys.readouterr().err
    for options in ([*data, *quick], []):
        refused(capsys, main(["test", *options]), "model: no class is given")


def test_a_fit_without_a_checkpoint_is_parsed_once(roots: list[Path], cli: CommandLine) -> None:
    counted = []
    original = AsymmetryCLI._parse

    @functools.wraps(original)
    def parse(self: AsymmetryCLI, *args: Any, **keys: Any) -> Any:
        counted.append(args)
        return original(self, *args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsymmetryCLI, "_parse", parse)
        cli("fit")
    assert len(counted) == 1
    assert len(roots) == 1


# --------------------------------------------------------------------------------------- 19: short class names


def test_case_19_short_class_names(fitted_cli: CommandLine, capsys: Capture, tmp_path: Path) -> None:
    short = overlay(tmp_path, "model: {class_path: ImageClassifier}\ndata: {class_path: ImageClassificationData}\n")
    quick = ("--trainer.limit_test_batches=1", "--trainer.logger=false")
    assert fitted_cli("test", short, "--ckpt_path=last", *quick) == 0
    full_path = overlay(tmp_path, "model: {class_path: modules.image_classification.ImageClassifier}\n")
    assert fitted_cli("test", full_path, "--ckpt_path=last", *quick) == 0
    assert fitted_cli("fit", short, "--ckpt_path=last", "--trainer.max_epochs=2", "--trainer.logger=false") == 0
    assert fitted_cli.checkpoint()["epoch"] == 1
    capsys.readouterr()
    other = overlay(tmp_path, "model: {class_path: modules.text_classification.TextClassifier, init_args: {}}")
    code = main(["test", other, f"--ckpt_path={fitted_cli.run()}", f"--data.path={fitted_cli.data}"])
    refused(capsys, code, "modules.image_classification.ImageClassifier", "modules.text_classification.TextClassifier")


# ---------------------------------------------------------------------------- 24: evaluation with adapter_path


def test_case_24_evaluation_names_the_adapters_and_untrained_heads(
    fitted_cli: CommandLine, capsys: Capture, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(fitted_cli.run() / "adapter", tmp_path / "adapter"))
    quick = ("--trainer.limit_test_batches=1", "--trainer.logger=false")
    assert fitted_cli("test", f"--model.adapter_path={adapter}", *quick) == 0
    err = capsys.readouterr().err
    assert f"test without --ckpt_path uses the backbone with the adapters of {adapter}" in err
    assert "random" not in err
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "head" not in k}, adapter / "adapter_model.safetensors")
    fitted_cli("test", f"--model.adapter_path={adapter}", *quick)
    err = capsys.readouterr().err
    assert "has no head, which starts untrained" in err
    assert "random" not in err
    assert fitted_cli("test", *quick) == 0
    assert "Its head (head) has random weights" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- 31: import policy


def allowed_modules() -> list[ModuleType]:
    """Return every module below the allowed packages that can be imported on this machine."""
    for package in PACKAGES:
        root = importlib.import_module(package)
        for module_info in pkgutil.walk_packages(getattr(root, "__path__", []), f"{package}.", onerror=lambda _: None):
            try:
                importlib.import_module(module_info.name)
            except Exception:  # needs a missing package or another operating system
                continue
    return [m for name, m in sorted(sys.modules.items()) if name.startswith(tuple(f"{p}." for p in (*PACKAGES,)))]


def resolved(path: str) -> Any:
    try:
        return resolve(path)
    except ImportError:
        return None


def is_allowed(value: Any) -> bool:
    home = f"{value.__module__}.{value.__qualname__}"
    if inspect.isclass(value):
        return home in CLASSES or any(home.startswith(f"{package}.") for package in PACKAGES)
    return inspect.isfunction(value) and home in FUNCTIONS


def test_case_31_every_attribute_of_every_allowed_module() -> None:
    """Only classes below the allowed packages and the listed functions resolve. Their attributes do not resolve."""
    allowed, walked = set(), 0
    modules = allowed_modules()
    before = set(sys.modules)
    seen: set[int] = set()  # attributes of one object are checked under its first name
    for module in modules:
        for name, value in list(vars(module).items()):
            path = f"{module.__name__}.{name}"
            result = resolved(path)
            assert result is None or is_allowed(result), path
            if result is not None:
                allowed.add(result)
            if isinstance(value, ModuleType) and value.__name__ == path:
                continue  # the outer loop checks this module
            attributes = ["__call__", "__init__", "__class__"] if id(value) in seen else dir(value)
            seen.add(id(value))
            for attribute in attributes:
                walked += 1
                assert resolved(f"{path}.{attribute}") is None, f"{path}.{attribute}"
    assert set(sys.modules) == before
    assert walked > 50_000
    names = {f"{f.__module__}.{f.__qualname__}" for f in allowed if not inspect.isclass(f)}
    assert names == set(FUNCTIONS)
    assert len(allowed) > 300


@pytest.mark.parametrize(
    "path",
    [
        "lightning.fabric.utilities.cloud_io._load.__call__",
        "lightning.pytorch.strategies.strategy.pl_load.__call__",
        "lightning.pytorch.strategies.ddp.log.warning.__func__",
        "lightning.pytorch.callbacks.EarlyStopping.__init__",
        "lightning.pytorch.callbacks.EarlyStopping.__init__.__globals__",
        "lightning.pytorch.callbacks.EarlyStopping.__class__",
        "lightning.pytorch.callbacks.EarlyStopping.__subclasses__",
        "modules.image_classification.ImageClassifier.load_from_checkpoint",
        "modules.base.torch.load",
        "modules.base.torch.load.__call__",
        "modules.base.torch",
        "modules.base.Tensor",
        "modules.base.math.floor",
        "torch.nn.modules.module.torch",
        "torch.distributed.algorithms.ddp_comm_hooks.dist",
        "os.system",
        "os",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
    ],
)
def test_case_31_other_functions_as_hooks_are_refused(
    cli: CommandLine, capsys: Capture, tmp_path: Path, path: str
) -> None:
    torch.save({"state_dict": Malicious(tmp_path / "canary")}, tmp_path / "evil.ckpt")
    hooks = {"ddp_comm_hook": path, "ddp_comm_wrapper": path, "ddp_comm_state": str(tmp_path / "evil.ckpt")}
    strategy = json.dumps({"trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": hooks}}})
    expected = f"{path!r} is not imported" if "." in path else f"expected the path of a class, got {path}"
    refused(capsys, cli("fit", overlay(tmp_path, strategy)), expected)
    assert not (tmp_path / "canary").exists()


def test_case_31_listed_functions_are_allowed(cli: CommandLine, roots: list[Path], tmp_path: Path) -> None:
    hooks = {"ddp_comm_hook": FUNCTIONS[0], "ddp_comm_wrapper": FUNCTIONS[1]}
    strategy = {"trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": hooks}}}
    assert cli("fit", overlay(tmp_path, json.dumps(strategy))) == 2
    assert len(roots) == 1
    assert all(resolve(path) is not None for path in FUNCTIONS)


# ------------------------------------------------------------------------------------------ 36: malformed values

HUGE = "99999999999999999999"
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: &a {init_args: *a}", "forms a cycle"),
        ("model: {init_args: {backbone_args: &b {x: *b}}}", "forms a cycle"),
        ("trainer: {callbacks: &c [*c]}", "forms a cycle"),
        (BOMB, "expand"),
        ("model: " + 60 * "[" + 60 * "]", "levels"),
        ("model: {init_args: {tuning: head, tuning: full}}", "duplicate key tuning"),
        ("model: {dict_kwargs: {a: 1}}", "model"),
        ("data: {dict_kwargs: {a: {b: 1}}}", "data"),
        ("model: {dict_kwargs: 3}", "model.dict_kwargs"),
        ("model: {init_args: [1]}", "model.init_args"),
        ("model: {init_args: null}", "model.init_args"),
        ("model: {class_path: null}", "model.class_path"),
        ("model: {class_path: [1]}", "model.class_path"),
        ("model: {class_path: modules.image_classification.ImageClassifier, rank: 3}", "rank beside"),
        ("trainer: {callbacks: [{class_path: 3}]}", "trainer.callbacks.class_path"),
        ("model: [1]", "model"),
        ("model: ''", "model"),
        ("data: 3", "data"),
        ("checkpoint: [1]", "checkpoint"),
        ("checkpoint: 3", "checkpoint"),
        ("checkpoint: null", "checkpoint: null"),
        ("spectrum: [1]", "spectrum"),
        ("spectrum: no_such_file", "spectrum"),
        ("trainer: [1]", "trainer"),
        ("checkpoint: {monitor: [1]}", "checkpoint.monitor"),
        (f"checkpoint: {{last_every_n_steps: {HUGE}}}", "checkpoint.last_every_n_steps"),
        (f"data: {{init_args: {{val_seed: {HUGE}}}}}", "data.val_seed"),
        ("data: {init_args: {val_seed: -1}}", "data.val_seed"),
        (f"data: {{init_args: {{batch_size: {HUGE}}}}}", "data.batch_size"),
        (f"seed_everything: {HUGE}", "seed_everything"),
        ("seed_everything: -1", "seed_everything"),
        ("seed_everything: [1]", "seed_everything"),
        (f"model: {{init_args: {{adapter: {{seed: {HUGE}}}}}}}", "model.adapter.seed"),
        ("model: {init_args: {learning_rate: .nan}}", "model.learning_rate"),
        ("trainer: {gradient_clip_val: .nan}", "trainer.gradient_clip_val"),
        ("trainer: {limit_train_batches: .nan}", "trainer.limit_train_batches"),
        ("trainer: {accelerator: tpu}", "trainer"),
        ("trainer: {accelerator: warp}", "warp"),
        ("trainer: {accelerator: [cpu]}", "trainer.accelerator"),
        (f"trainer: {{devices: {HUGE}}}", "trainer.devices"),
        ("trainer: {devices: [[1]]}", "trainer"),
        (f"trainer: {{max_epochs: {HUGE}}}", "trainer.max_epochs"),
        ("trainer: {max_time: {foo: 1}}", "trainer"),
        ("trainer: {default_root_dir: [1]}", "trainer.default_root_dir"),
        ("trainer: {callbacks: [null]}", "trainer.callbacks"),
        ("trainer: {logger: {}}", "trainer.logger"),
        ("trainer: {logger: {a: 1}}", "trainer.logger"),
        ("trainer: {strategy: {a: 1}}", "trainer.strategy"),
        ("ckpt_path: [1]", "ckpt_path"),
        ("ckpt_path: ''", "ckpt_path"),
        ("test_after_fit: [1]", "test_after_fit"),
        ("model: {init_args: {learning_rate: 2024-01-01}}", "model.learning_rate"),
        ("model: {init_args: {learning_rate: !!binary aGVsbG8=}}", "binary"),
        ("model: !!set {a, b}", "set"),
        ("model: !!timestamp 2024-01-01", "model"),
        ("1: 2", "the key 1"),
        ("null: 2", "the key None"),
        ("? [a, b]\n: 3", "a key must be a word"),
        ("optimizer: {lr: 3}", "optimizer"),
        ("[1, 2]", "no keys"),
        ("", "no keys"),
        ("model: \x00", "not YAML"),
    ],
)
def test_case_36_malformed_values_in_a_file_are_refused(
    cli: CommandLine, capsys: Capture, tmp_path: Path, text: str, part: str
) -> None:
    refused(capsys, cli("fit", overlay(tmp_path, text)), part)
    assert not cli.run().exists()


@pytest.mark.parametrize(
    "option",
    [
        "--model.backbone_args={a: &a [*a]}",
        "--model.backbone_args=&a {a: *a}",
        "--checkpoint=[1]",
        "--trainer=3",
        f"--data.val_seed={HUGE}",
        f"--seed_everything={HUGE}",
        "--trainer.accelerator=tpu",
        "--model={class_path: 3}",
        "--model.init_args=[1]",
        "--data={init_args: 3}",
        "--trainer.callbacks=[{class_path: [1]}]",
        "--model.adapter=[1]",
    ],
)
def test_case_36_malformed_options_are_refused(cli: CommandLine, capsys: Capture, option: str) -> None:
    refused(capsys, cli("fit", option))
    assert not cli.run().exists()


# -------------------------------------------------------------------------------------------- 38: standard output

QUICK = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.logger=false")


def test_case_38_ascii_output_replaces_other_characters(cli: CommandLine, tmp_path: Path) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    cli.root = tmp_path / "ü"
    with redirect_stdout(output):
        assert cli("fit", *QUICK) == 0
    output.flush()
    text = output.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert text.rstrip().endswith("?/version_0")
    assert output.errors == "strict"


def test_case_38_a_full_device_is_one_message(cli: CommandLine, capsys: Capture) -> None:
    with open("/dev/full", "w") as full, redirect_stdout(full):
        code = cli("fit", *QUICK)
    refused(capsys, code, "Standard output cannot be written", "No space left")
    assert (cli.run() / "config.yaml").is_file()


def test_case_38_a_closed_pipe_ends_the_program_quietly(cli: CommandLine, capsys: Capture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, redirect_stdout(pipe):
        code = cli("fit", *QUICK)
    assert code == 141
    assert "error" not in capsys.readouterr().err
    assert (cli.run() / "config.yaml").is_file()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, redirect_stdout(pipe):
        assert main(["fit", "--help"]) == 141


@pytest.mark.parametrize(
    "option", ["--data.path=/x\udcff", "--ckpt_path=\udcff", "--trainer.default_root_dir=\udcff", "--config=\udcff"]
)
def test_case_38_names_that_are_not_utf8_are_escaped(cli: CommandLine, capsys: Capture, option: str) -> None:
    refused(capsys, cli("fit", option), "\\udcff")


# ------------------------------------------------------------------------------- 39: control characters in output

EVIL = "\x1b[31mred\x1b]0;title\x07\u202e"


@pytest.mark.slow
def test_case_39_control_characters_are_escaped_in_every_line_of_a_run(
    cli: CommandLine, capsys: Capture, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(COLOURS):
            folder = tmp_path / "da\x1b[2Jta" / split / (EVIL if label == 0 else name)
            folder.mkdir(parents=True)
            for i in range(8):
                (folder / f"{i}\x1b[31m.png").write_bytes(png(colour_image(label, rng)))
    cli.root = tmp_path / "runs\x1b[2J"
    data = f"--data.path={tmp_path}/da\x1b[2Jta"
    assert cli("fit", data, "--test_after_fit=true", *QUICK) == 0
    run = f"--ckpt_path={cli.run()}"
    assert cli("fit", data, run, "--data.batch_size=4", "--trainer.max_epochs=2", "--trainer.logger=false") == 0
    assert cli("predict", data, run, f"--data.predict_path={tmp_path}/da\x1b[2Jta/test/{EVIL}") == 0
    assert main(["export", str(cli.run()), "--format=merged", f"--output={tmp_path}/out\x1b[2J"]) == 0
    assert main(["export", str(cli.run()), "--format=compact", f"--output={tmp_path}/compact\x1b[2J"]) == 0
    assert cli("fit", data, run, f"--model.class_names=[a, b, '{EVIL}']") == 2
    assert cli("fit", f"--model.tuning={EVIL}") == 2
    assert cli("fit", f"--{EVIL}=3") == 2
    checkpoint = torch.load(cli.run() / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["state_dict"][EVIL] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "evil\x1b[31m.ckpt")
    assert cli("test", data, f"--ckpt_path={tmp_path}/evil\x1b[31m.ckpt") == 2
    checkpoint["hyper_parameters"]["_class_path"] = f"modules.{EVIL}"
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    assert main(["test", f"--ckpt_path={tmp_path}/evil.ckpt", data]) == 2
    printed = "".join(capsys.readouterr())
    assert not set("\x1b\x07\u202e") & set(printed)
    assert "\\x1b[2J" in printed


def test_case_39_control_characters_are_escaped_in_lines_of_libraries(capsys: Capture) -> None:
    with console_logging():
        handler = logging.StreamHandler(sys.stderr)
        library = logging.getLogger("a_library")
        library.addHandler(handler)
        library.warning("weights %s", EVIL)
        library.removeHandler(handler)
        logging.getLogger("app").warning("weights %s", EVIL)
        print(warnings.formatwarning(f"weights {EVIL}", UserWarning, "file", 1), file=sys.stderr)  # type: ignore[arg-type]
    try:
        raise ZeroDivisionError(EVIL)
    except ZeroDivisionError as error:
        traceback_hook(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert err.count("\\x1b[31mred") == 4
    assert "\x1b" not in err


def test_case_39_control_characters_are_escaped_in_the_summary(
    cli: CommandLine, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunSummary.on_fit_start

    def on_fit_start(self: RunSummary, trainer: Any, module: Any) -> None:
        self.values[f"test/{EVIL}"] = 1.0
        original(self, trainer, module)

    monkeypatch.setattr(RunSummary, "on_fit_start", on_fit_start)
    assert cli("fit", *QUICK) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
