"""README and docs: each command runs or parses, and each link, anchor, file, name and key exists.

Commands on finished runs are executed on short runs of the embedded digits. Commands that need data, the hub, a GPU or
minutes are parsed: unknown keys, wrong values and missing recipes fail. YAML blocks are parsed, Python blocks compiled.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatch
from functools import cache
from itertools import cycle, takewhile
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, RepoUrl
from jsonargparse import Namespace
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG

from app.callbacks import Termination
from app.cli import AsymmetryCLI, main, parse_fit, restricted_imports
from app.commands import COMMANDS, WITH_FIT_KEYS, command_parser, fit_keys_last
from app.config.classes import expand_class_names
from app.config.variants import split_variant
from app.config.yaml_files import checked_yaml
from app.run.run_directory import versions
from app.sweep.plan import read_plan
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
DIGITS = "conf/quickstart.yaml"
RECIPES = sorted(path for path in (ROOT / "conf").glob("*.yaml") if "class_path" in path.read_text())
FILES = ("ckpt", "json", "parquet", "yaml")  # suffixes of files whose names look like keys: spectrum.parquet
# folders whose files are named on pages
PLACES = ("app", "benchmarks", "conf", "datamodules", "docs", "modules", "tests")
SECTIONS = ("model", "data", "trainer", "spectrum", "checkpoint", "generalization", "forgetting")
# keys that depend on a class; the test of YAML blocks covers them
OF_CLASSES = ("trainer.callbacks.", "trainer.logger.")
FITS = ("fit", "validate", "test", "predict")
ON_RUNS = ("combine", "export", "similarity", "spectrum")  # commands that run on finished runs, with any options
# commands that are not checked: the installed program, and other programs
FREE = ("export", "flower-superlink", "flower-supernode", "flwr", "onesided", "pip", "source", "tensorboard")
QUICK = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
    *("--test_after_fit=false", "--generalization.rows=0", "--trainer.enable_progress_bar=false"),
)
# options added to documented commands to make them quick
QUICKLY = {"spectrum": ["--top=0"], "test": ["--trainer.limit_test_batches=1"]}


# ---------------------------------------------------------------------------------------------------------------- pages


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@cache
def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as on GitHub."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def commands() -> list[tuple[Path, list[str]]]:
    """Return the page and the arguments of each command, in blocks without a language or in backticks."""
    collected = []
    for page in PAGES:
        shown = "".join(block for language, block in blocks(page) if not language)
        lines = shown.replace("\\\n", " ").splitlines()
        lines += [span for span in spans(page) if span.startswith(("python ", "make ", "torchrun ", "sbatch "))]
        collected += [(page, words) for line in lines if (words := shlex.split(line, comments=True))]
    return collected


def of_program() -> list[tuple[Path, list[str]]]:
    """Return the page and the arguments after `main.py` of each command that runs this program."""
    collected = []
    for page, words in commands():
        if "main.py" in words:
            collected.append((page, words[words.index("main.py") + 1 :]))
        elif words[0] == "sbatch":
            collected.append((page, ["fit", "--config", *words[2:]]))
    return collected


def test_blocks_have_known_languages() -> None:
    known = ("", "python", "text", "yaml")
    assert [(name(page), language) for page in PAGES for language, _ in blocks(page) if language not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile(page: Path) -> None:
    for language, block in blocks(page):
        if language == "python":
            compile(block, name(page), "exec")


# ------------------------------------------------------------------------------------------------------ links and files


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_index_and_from_the_readme() -> None:
    for index in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)\)", index.read_text())}
        others = {page for page in PAGES if page.name != "README.md"}
        assert sorted(map(name, others - linked)) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_names_in_backticks_exist(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join(PLACES)})/[\w./*-]*", span):
            assert list(ROOT.glob(span.rstrip("/"))) or "NAME" in span, span
        elif re.fullmatch(r"(app|benchmarks|datamodules|modules)(\.\w+)+", span):
            resolve_name(span)


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture(scope="module", autouse=True)
def as_in_main() -> Iterator[None]:
    with restricted_imports(), checked_yaml():
        yield


class Parsed(AsymmetryCLI):
    """A command line that stops after parsing."""

    def instantiate_classes(self) -> None:
        """Construct nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


@cache
def command_line(command: str) -> Parsed:
    return Parsed([command, "--config", DIGITS], Termination(), ExitStack())


def parse(command: str, *words: str) -> Namespace:
    """Return the parsed configuration of a command.

    Raises:
        ArgumentError: If `main.py` would refuse the arguments.
    """
    cli = command_line(command)
    cli.parse_arguments(cli.parser, [command, *words])
    config: Namespace = cli.config[command]
    return config


@cache
def keys() -> set[str]:
    """Return every key that the parser has for a recipe, and the groups of these keys."""
    collected: set[str] = set()
    for recipe in RECIPES:
        for key in parse("fit", "--config", str(recipe)).keys(branches=True):
            parts = key.replace(".init_args", "").split(".")
            collected |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return collected


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_in_backticks_are_keys_of_the_parser(page: Path) -> None:
    for span in spans(page):
        for key in re.findall(rf"(?:^|--)((?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?=[\s=:+]|\.\*|$)", span):
            known = key in keys() or key.startswith(OF_CLASSES) or key.rpartition(".")[2] in ("help", *FILES)
            assert known, span


OPTIONS = r"--(\w[\w.]*)"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_backticks_are_options_of_a_command(page: Path) -> None:
    others = {key for command in COMMANDS for key in command_parser(command).get_defaults().as_dict()}
    others |= {"help", "config", "variant", "allow_imports", "ckpt_path", "test_after_fit", "seed_everything"}
    others |= {"name", "find_lr", "prompt", "bank"}
    others |= {"print_config", "print_shtab", "version", "node_rank"}  # node_rank is an option of torchrun
    for span in spans(page):
        if "benchmarks" not in span:
            unknown = [o for o in re.findall(OPTIONS, span) if o.split(".")[0] not in SECTIONS and o not in others]
            assert unknown == [], span


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_blocks_have_known_keys(page: Path, tmp_path: Path) -> None:
    for language, block in blocks(page):
        if language != "yaml":
            continue
        file = tmp_path / "block.yaml"
        file.write_text(block)
        content = yaml.safe_load(block)
        if "variants" in content:
            read_plan(str(file), parse_fit)
        else:
            parse("fit", "--config", DIGITS, "--config", str(file))


# -------------------------------------------------------------------------------------- commands that are parsed


def fit_words(words: list[str]) -> list[str]:
    """Return the arguments of a command of `WITH_FIT_KEYS` that belong to `fit`, as a `fit` command."""
    ordered = fit_keys_last(command_parser(words[0]), words[1:])
    return ["fit", *ordered[ordered.index("--") + 1 :]]


def groups() -> dict[tuple[str, ...], list[str]]:
    """Return the options of all commands that fit or evaluate. Commands with the same recipes are parsed together."""
    collected: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for _, words in of_program():
        if words[0] not in (*FITS, *WITH_FIT_KEYS):
            continue
        command, *rest = fit_words(words) if words[0] in WITH_FIT_KEYS else words
        files: list[str] = []
        options: list[str] = []
        remaining = iter(rest)
        for word in remaining:
            if word == "--config":
                files.append(next(remaining))
            elif word in ("--ckpt_path", "--allow_imports"):
                next(remaining)  # documented runs and packages do not exist here
            elif word.endswith(".help"):
                assert word in ("--model.help", "--data.help"), words
                (path,) = expand_class_names([word, next(remaining)])[1:]
                resolve_name(path)
            elif word not in ("--help", "--print_config"):
                options.append(word.replace("my_package.MyCallback", "RichProgressBar"))
        collected[command, *(files or [DIGITS])] += options
    return collected


GROUPS = groups()


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_commands_with_recipes_parse(group: tuple[str, ...]) -> None:
    command, *files = group
    _, options = split_variant([command], GROUPS[group])
    parse(command, *(word for file in files for word in ("--config", file)), *options)


def test_sweep_commands_are_valid_plans() -> None:
    for words in {" ".join(words): words for _, words in of_program() if words[0] == "sweep"}.values():
        arguments = command_parser("sweep").parse_args(words[1:])
        digits = "data.path=app/assets/digits"  # a plan without reported metrics reads the data to find a test split
        assert read_plan(arguments.config, parse_fit, arguments.base, [*arguments.set, digits]).variants


def test_commands_with_keys_of_fit_have_valid_options() -> None:
    for _, words in of_program():
        if words[0] in WITH_FIT_KEYS:
            parser = command_parser(words[0])
            ordered = fit_keys_last(parser, words[1:])
            parser.parse_args(ordered[: ordered.index("--")])


def test_every_documented_command_exists() -> None:
    known = {*FITS, *COMMANDS, "COMMAND", "--help"}
    assert [(name(page), words) for page, words in of_program() if words[0] not in known] == []


def test_commands_of_other_programs_are_valid() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, words in commands():
        words = [*words[len(list(takewhile(lambda word: re.fullmatch(r"[A-Z_]+=\S+", word), words))) :]]
        if words[0] == "make":
            assert words[1] in targets, (name(page), words)
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file(), (name(page), words)
        elif words[1:3] == ["-m", "pytest"]:
            assert (ROOT / words[3]).exists(), (name(page), words)
        elif words[1:2] == ["-m"]:
            path = ROOT / f"{words[2].replace('.', '/')}.py"
            assert path.is_file(), (name(page), words)
            source = path.read_text() + (ROOT / "benchmarks/harness.py").read_text()
            missing = [word for word in words if word.startswith("--") and word.partition("=")[0][2:] not in source]
            assert missing == [], (name(page), words)
        else:
            assert "main.py" in words or words[0] in FREE, (name(page), words)


# ------------------------------------------------------------------------------------------ commands that are run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Return short runs of the embedded digits, B and LoRA. Reports draw no pictures. Uploads to the hub succeed."""
    root = tmp_path_factory.mktemp("documented")
    for variant, *others in (["B"], ["lora", "--trainer.logger=false"]):
        words = ["fit", "--config", DIGITS, "--variant", variant, f"--trainer.default_root_dir={root}", *QUICK, *others]
        assert main(words) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasSVG, "print_svg", lambda *_, **__: None)
        patch.setattr(FigureCanvasAgg, "print_png", lambda *_, **__: None)
        patch.setattr("huggingface_hub.get_token", lambda: "hf_token")
        patch.setattr(HfApi, "create_repo", lambda _, name, **__: RepoUrl(f"https://huggingface.co/{name}"))
        patch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
        yield [str(run) for run in versions(root)]


def small() -> list[list[str]]:
    """Return the commands on finished runs. Commands that differ only in the number of runs are run once."""
    collected: dict[tuple[str, ...], list[str]] = {}
    for _, words in of_program():
        if words[0] in ON_RUNS or (words[0] == "test" and DIGITS in words):
            collected.setdefault(tuple(sorted({*words})), words)
    return list(collected.values())


@pytest.mark.parametrize("words", small(), ids=" ".join)
def test_commands_on_finished_runs_succeed(words: list[str], runs: list[str], tmp_path: Path) -> None:
    # B and LoRA share no factor, so `bank` and `combine` get one run several times, unless `combine` truncates
    of_one_run = "bank" in words or (words[0] == "combine" and "--via" not in words)
    run_paths, output = cycle(runs[:1] if of_one_run else runs), tmp_path / "output"
    filled = [next(run_paths) if word == "RUN" else word for word in words]
    if "--output" in words:
        filled[words.index("--output") + 1] = str(output)
    assert main([*filled, *QUICKLY.get(words[0], [])]) == 0
    assert "--output" not in words or output.is_file() or any(output.iterdir())


def test_the_listed_files_of_a_run_exist(runs: list[str]) -> None:
    section = (ROOT / "docs/checkpoints.md").read_text().partition("## What a run writes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    listed = [re.sub("/$", "/*", file) for row in rows for file in re.findall("`(.+?)`", row)]
    files = [str(path.relative_to(runs[0])) for path in Path(runs[0]).rglob("[!.]*") if path.is_file()]
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in listed)] == []
    of_others = {"confusion_matrix.png", "per_class.csv", "evaluations.json", "predictions.*", "skipped.csv"}
    of_others |= {"config-*.yaml", "learning_rate.png"}  # files of other commands, keys and data
    assert [
        pattern for pattern in listed if not any(fnmatch(file, pattern) for file in files) and pattern not in of_others
    ] == []


@pytest.mark.slow
def test_quickstart_prints_the_output_in_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command of `make quickstart`. Numbers may differ in their last digits between machines."""
    recipe = re.search(r"main\.py (fit --config \S+)", (ROOT / "Makefile").read_text())
    assert recipe is not None
    assert main([*recipe[1].split(), f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "version_0/metrics.json").read_text())["test/acc1"] > 0.95
    output = capsys.readouterr()
    printed = {_label(line) for line in (output.out + output.err).splitlines()}
    shown = next(block for language, block in blocks(ROOT / "README.md") if language == "text")
    assert [line for line in shown.splitlines() if _label(line) not in printed] == []


def _label(line: str) -> str:
    """Return the start of a line, up to the first `│` or `:`. The rest may differ between machines."""
    cells: list[Any] = re.split(r"[│:]", line)
    return str(cells[0]).strip()
