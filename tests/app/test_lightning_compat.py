"""Private parts of Lightning and jsonargparse that this program uses: each still exists and behaves as before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse import _common as jsonargparse_common
from lightning.pytorch.cli import LightningCLI

from app.lightning_compat import VERDICTS, hyperparameter_instantiator, import_policy, subcommand_keys, yaml_loading


def test_jsonargparse_asks_the_policy_before_it_imports_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_a_stranger.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    asked: list[str] = []

    def is_allowed(path: str) -> bool:
        asked.append(path)
        return False

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=Callable)
    parser.add_argument("--kind", type=type)
    assert VERDICTS in jsonargparse_common.parsing_settings
    before = dict(jsonargparse_common.parsing_settings)
    paths = ["module_of_a_stranger.call", "module_of_a_stranger.Class.__call__", "os.path.join.__call__"]
    with import_policy(is_allowed, []):
        for path in paths:
            for option in ("--call", "--kind"):
                with pytest.raises(ArgumentError, match=f"Importing '{path}' is not allowed"):
                    parser.parse_args([f"{option}={path}"])
    assert set(asked) == set(paths)
    assert jsonargparse_common.parsing_settings == before


def test_jsonargparse_asks_for_the_place_of_the_definition_too() -> None:
    asked: list[str] = []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=Callable)
    with import_policy(lambda path: not asked.append(path), []):
        parser.parse_args(["--call=os.path.join"])
    assert asked[:2] == ["os.path.join", "posixpath.join"]


def test_yaml_is_checked_wherever_jsonargparse_loads_it() -> None:
    def check(text: str) -> None:
        if "forbidden" in text:
            raise yaml.YAMLError("forbidden")

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=dict)
    with yaml_loading(check):
        assert parser.parse_args(["--value={a: 1}"]).value == {"a": 1}
        with pytest.raises(ArgumentError):
            parser.parse_args(["--value={forbidden: 1}"])
    assert parser.parse_args(["--value={forbidden: 1}"]).value == {"forbidden": 1}


def test_lightning_constructs_sections_by_a_callable_with_links() -> None:
    build = hyperparameter_instantiator(Mock(spec=LightningCLI), "model")
    assert list(inspect.signature(build).parameters) == ["class_type", "args", "applied_instantiation_links", "kwargs"]
    assert all(hasattr(LightningCLI, name) for name in ("_add_instantiators", "_parse_ckpt_path", "_run_subcommand"))


def test_lightning_keeps_the_parser_of_each_command() -> None:
    parser = ArgumentParser()
    parser.add_argument("--trainer.max_epochs", type=int)
    cli = Mock(spec=LightningCLI, _subcommand_parsers={"fit": parser})
    assert subcommand_keys(cli, "fit") == ["trainer.max_epochs"]
    assert subcommand_keys(cli, "fti") == []
    assert "_subcommand_parsers" in inspect.getsource(LightningCLI)
