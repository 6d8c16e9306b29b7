"""Help, version, completion, and suggestions for unknown commands and keys."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from app.cli import main
from app.commands import COMMANDS
from app.commands.program_help import DESCRIPTION, EXAMPLES, TRAINER_COMMANDS
from app.config import program_files
from app.config.messages import closest_key
from app.help_pages import PAGES, print_help_page
from tests.conftest import ROOT
from tests.support.refusals import refused

RECIPE = ("--config", "conf/quickstart.yaml")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_help_has_the_program_its_commands_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "--help")
    assert page == printed(capsys, "-h")
    assert DESCRIPTION in page
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", page, re.MULTILINE)
    assert listed == [*TRAINER_COMMANDS, *COMMANDS]
    examples = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("  python main.py")]
    assert examples == [shlex.split(example) for example in EXAMPLES]
    assert len(examples) == 3


def test_the_help_of_fit_begins_with_its_purpose_and_has_the_path_of_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = printed(capsys, "fit", "--help")
    assert page.split("\n\n")[1] == TRAINER_COMMANDS["fit"]
    assert "\n  --data.path PATH" in page
    assert "instantiation.Set" not in page


def test_version_is_printed_with_and_without_pyproject(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert printed(capsys, "--version") == f"onesided {number}\n"
    monkeypatch.setattr(program_files, "ROOT", tmp_path)  # an installed program has no pyproject.toml beside it
    monkeypatch.setattr(program_files, "version", lambda name: version("torch") if name == "onesided" else "")
    assert printed(capsys, "--version") == f"onesided {version('torch')}\n"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words help in another way")
def test_the_pages_are_those_of_the_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    """`make help-pages` renews the pages. A new process knows no classes of other tests."""
    script = f"from app.cli import main\nfor words in {list(PAGES)}:\n    assert main(words) == 0"
    environment = {**os.environ, "COLUMNS": "80"}
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert all(print_help_page(["main.py", *words]) for words in PAGES)
    assert process.stdout == capsys.readouterr().out


def test_a_page_is_printed_without_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_help_page(["/bin/onesided", "fit", "-h"])
    assert capsys.readouterr().out.startswith("usage: onesided fit --config RECIPE")
    assert not print_help_page(["main.py", "fit", *RECIPE, "--help"])
    assert not print_help_page(["main.py", "test", "--help"])
    script = "import sys; sys.argv = ['main.py', 'fit', '--help']; import app.help_pages; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


def test_output_that_cannot_be_written_is_left_to_the_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Lost())
    assert not print_help_page(["main.py", "--help"])


@pytest.mark.parametrize("word", ["exprot", "trian", "frobnicate"])
def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str], word: str) -> None:
    refused(capsys, main([word]), f"There is no command '{word}'", "Choose one of fit, validate")


def test_help_of_fit_has_data_model_and_adapter_before_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "fit", "--help")
    keys = ["--data.batch_size", "--model.learning_rate", "--model.adapter.rank", "--trainer.max_epochs"]
    places = [page.index(f"\n  {key} ") for key in keys]
    assert places == sorted(places)
    assert "--model.help NAME lists the keys of ImageClassifier" in page
    assert "--model.image_size" not in page


def test_help_of_fit_with_a_recipe_has_the_keys_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "fit", *RECIPE, "--help")
    assert "\n  --model.image_size " in page
    assert "\n  --data.horizontal_flip " in page
    page = printed(capsys, "test", "--data", "TextClassificationData", "-h")
    assert "\n  --data.max_length " in page


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("traner.max_epochs", "trainer.max_epochs"),
        ("lr", "model.learning_rate"),
        ("learning_rate", "model.learning_rate"),
        ("rank", "model.adapter.rank"),
        ("epochs", "trainer.max_epochs"),
        ("batch_size", "data.batch_size"),
        ("batch-size", "data.batch_size"),
        ("devices", "trainer.devices"),
        ("data_path", "data.path"),
        ("model.rank", "model.adapter.rank"),
        ("model.adaptor.rank", "model.adapter.rank"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("output_dir", "trainer.default_root_dir"),
        ("seed", "seed_everything"),
    ],
)
def test_unknown_keys_get_suggestions(capsys: pytest.CaptureFixture[str], key: str, expected: str) -> None:
    # the message about a class names the keys of the class, without `model.`
    suggested = expected.removeprefix("model.") if key.startswith("model.") else expected
    refused(
        capsys,
        main(["fit", *RECIPE, f"--{key}=3"]),
        f"no key {key.removeprefix('model.')}",
        f"did you mean {suggested}?",
    )


def test_suggestions_need_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["fit", "--lr", "3"]), "There is no key lr; did you mean model.learning_rate?")
    refused(capsys, main(["fit", "--rank=3"]), "There is no key rank; did you mean model.adapter.rank?")
    texts = ["fit", "--config", "conf/texts.yaml"]
    refused(capsys, main([*texts, "--trainer.epochs=3"]), "did you mean trainer.max_epochs?")
    refused(capsys, main([*texts, "--model.lr=3"]), "TextClassifier has no key lr; did you mean learning_rate?")


def test_suggestions_in_files_and_in_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "overlay.yaml"
    file.write_text("traner: {max_epochs: 3}\n")
    refused(capsys, main(["fit", *RECIPE, "--config", str(file)]), "no key traner", "did you mean trainer")
    refused(capsys, main(["export", "RUN", "--fromat=peft", "--output=x"]), "no key fromat; did you mean format?")


@pytest.mark.parametrize(
    ("key", "expected"),
    [("monitor", "checkpoint.monitor"), ("rnk", "model.rank"), ("every", "checkpoint.every"), ("zzz", None)],
)
def test_closest_key(key: str, expected: str | None) -> None:
    assert closest_key(key, ["checkpoint.monitor", "checkpoint.every", "model.rank", "model.a.rank"]) == expected


@pytest.mark.parametrize("options", [[], ["--data.path=texts.csv"]])
def test_a_missing_recipe_lists_the_recipes(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *options]) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "error: model: no class is given. Add --model CLASS, or --config FILE with a recipe:"
    names = [line.split()[0] for line in others]
    overlays = {"checkpointing", "cpu", "ddp", "debug", "fsdp"}
    assert names == [f"conf/{f.name}" for f in sorted((ROOT / "conf").glob("*.yaml")) if f.stem not in overlays]
    (line,) = [line for line in others if "conf/texts.yaml" in line]
    assert line.endswith("RoBERTa-base on your own texts, B alone: classes, pairs of texts, or a number to predict")


def test_completion_needs_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["--print_shtab"]), "--print_shtab: give one shell, such as bash or zsh.")
    refused(capsys, main(["--print_shtab", "nushell"]), "--print_shtab", "nushell", "the package shtab")


def test_completion_of_commands_and_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(printed(capsys, "--print_shtab", "bash"))
    assert script.stat().st_size < 5e6  # each new shell reads the script
    ask = "COMP_WORDS=({}); COMP_CWORD={}; _shtab_onesided; echo ${{COMPREPLY[@]}}"
    lines = [
        ("onesided", "expo"),
        ("onesided", "fit", "--model.adapter.ra"),
        ("onesided", "fit", "--data.p"),
        ("onesided", "fit", "--trainer.max_e"),
    ]
    asked = "\n".join([f"source {script}", *(ask.format(shlex.join(words), len(words) - 1) for words in lines)])
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    commands, rank, path, epochs = (line.split() for line in done.stdout.splitlines())
    assert commands == ["export"]
    assert "--model.adapter.rank" in rank
    assert "--data.path" in path
    assert "--trainer.max_epochs" in epochs
