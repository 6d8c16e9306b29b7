"""The installed package: metadata, layout, the command `onesided`, and README's training loop."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools

import modules.adapters
from tests.conftest import ROOT

SOURCES = ("app", "conf", "datamodules", "main.py", "modules", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def training_loop() -> str:
    """Return the code of README's training loop, without the download of weights."""
    section = (ROOT / "README.md").read_text().split("## In your own training loop\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "pretrained=True" in block
    return block.replace("pretrained=True", "pretrained=False")


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments that setup.py passes to setuptools."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    exec((ROOT / "setup.py").read_text(), {})
    return arguments


def test_the_metadata_name_the_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "onesided"
    module, _, function = project["scripts"]["onesided"].partition(":")
    assert (module, function) == ("onesided.program.main", "main")
    assert re.search(rf"^from app.cli import {function}\b", (ROOT / "main.py").read_text(), re.MULTILINE)


def test_every_file_of_the_program_is_in_the_package(layout: dict[str, Any]) -> None:
    prefixes = {"onesided.adapters": "modules/adapters", "onesided.program": "."}
    assert layout["package_dir"] == prefixes
    folders = set()
    for package in layout["packages"]:
        assert package.split(".")[0] == "onesided"
        prefix = next(p for p in prefixes if package == p or package.startswith(f"{p}."))
        inner = package.removeprefix(prefix).removeprefix(".").replace(".", "/")
        folders.add((ROOT / prefixes[prefix] / inner).resolve())
    patterns = ["*.py", *layout["package_data"][""]]
    left_out = {
        str(file.relative_to(ROOT))
        for source in ("app", "conf", "datamodules", "modules")
        for file in (ROOT / source).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
        and not (file.parent in folders and any(fnmatch(file.name, pattern) for pattern in patterns))
    }  # fmt: skip
    assert left_out == {"app/assets/README.md"}


def test_modules_adapters_imports_no_other_package_of_the_program() -> None:
    absolute = re.compile(r"^\s*(?:from|import) (?:app|datamodules|modules)\b.*", re.MULTILINE)
    sources = {file.name: file.read_text() for file in (ROOT / "modules" / "adapters").glob("*.py")}
    assert {name: imports for name, text in sources.items() if (imports := absolute.findall(text))} == {}


def test_readmes_training_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onesided", ModuleType("onesided"))
    monkeypatch.setitem(sys.modules, "onesided.adapters", modules.adapters)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(training_loop(), names)
    assert (tmp_path / "adapter.safetensors").is_file()
    assert not modules.adapters.adapted_layers(names["model"])
    assert len(names["trained"]) == 4 * 12 + 2  # B of each projection, and weight and bias of the head


@pytest.mark.slow
def test_wheel_runs_a_recipe_from_any_directory(tmp_path: Path) -> None:
    """Build and install the wheel offline. The packages of this environment stay importable."""
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    for directory in (source, work):
        directory.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)

    def run(*words: str, **variables: str) -> str:
        environment = {**os.environ, "PYTHONSAFEPATH": "1", **variables}
        process = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", str(source), "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("onesided-*.whl")
    run(*pip, "install", "--no-index", "--no-deps", "--target", str(site), str(wheel))
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"onesided", "bin"}

    assert [path.name for path in (site / "onesided" / "program").glob("*.py")] == ["main.py"]

    path = {"PYTHONPATH": str(site)}
    assert "48 projections" in run(sys.executable, "-c", training_loop(), **path)
    onesided = (sys.executable, str(site / "bin" / "onesided"))
    printed = run(*onesided, "fit", "--config", "conf/quickstart.yaml", "--trainer.max_steps=1", **path)
    assert printed.splitlines()[-1] == "Run directory: runs/quickstart/version_0"
    printed = run(*onesided, "test", "--ckpt_path", "runs/quickstart/version_0", **path)
    assert "test/acc1" in printed
