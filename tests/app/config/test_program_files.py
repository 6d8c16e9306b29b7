"""Recipes and assets of the program are found from any directory. Files of the working directory take precedence."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from app.cli import main, parse_fit
from app.config.precedence import split_arguments
from app.config.program_files import find_program_file, find_program_files, program_command
from app.sweep.plan import read_plan
from tests.conftest import ROOT

RECIPE = "conf/quickstart.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [RECIPE, "conf/sweeps/digits.yaml", "app/assets/digits"])
def test_a_file_of_the_program_is_found(name: str) -> None:
    assert find_program_file(name) == str(ROOT / name)


@pytest.mark.parametrize(
    "name",
    [
        "conf/missing.yaml",
        "README.md",
        "quickstart.yaml",
        "",
        "app/cli.py",
        f"./{RECIPE}",
        "conf/\0",
        "conf/" + 300 * "a",
    ],
)
def test_other_names_are_not_changed(name: str) -> None:
    assert find_program_file(name) == name


def test_a_file_of_the_working_directory_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / RECIPE).write_text("model: {}")
    assert find_program_file(RECIPE) == RECIPE


def test_recipes_sweeps_and_paths_inside_recipes_are_found() -> None:
    words = ["fit", "--config", RECIPE, "--model.weights=none"]
    assert split_arguments(words) == (["fit"], [str(ROOT / RECIPE)], ["--model.weights=none"])
    assert read_plan("conf/sweeps/digits.yaml", parse_fit).base == (str(ROOT / RECIPE),)
    data = Namespace(path="app/assets/digits", batch_size=32, scale=[0.8, 1.0])
    config = Namespace(model=Namespace(weights="app/assets/other.safetensors"), data=data)
    find_program_files(config)
    assert config.data.path == str(ROOT / "app/assets/digits")
    assert config.model.weights == "app/assets/other.safetensors"
    assert config.data.batch_size == 32


@pytest.mark.parametrize(
    ("argument", "words"),
    [("/bin/onesided", ["onesided"]), ("main.py", ["python", "main.py"]), ("pytest", ["python", "main.py"])],
)
def test_printed_commands_use_the_name_by_which_the_program_was_called(
    argument: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [argument])
    assert program_command() == words
    assert main(["export", "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {program_command()[-1]} export")
