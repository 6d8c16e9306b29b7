"""Validation of YAML before any value is used."""

from __future__ import annotations

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from app.cli import main
from app.config.yaml_files import check_yaml, checked_yaml
from tests.support.refusals import refused


def test_yaml_is_checked_wherever_jsonargparse_loads_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=dict)
    with checked_yaml():
        assert parser.parse_args(["--value={a: 1}"]).value == {"a": 1}
        with pytest.raises(ArgumentError):
            parser.parse_args(["--value={a: 1, a: 2}"])
    assert parser.parse_args(["--value={a: 1, a: 2}"]).value == {"a": 2}


def test_aliases_and_dates_are_accepted() -> None:
    check_yaml("[" * 50 + "1" + "]" * 50)
    check_yaml("base: &base {a: [1, 2.5, true, null, x]}\nother: {<<: *base, b: *base}\nday: 2024-01-01")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "line 2: duplicate key c"),
        ("a: &a [*a]", "forms a cycle"),
        ("a: !!python/name:os.system x", "line 1: the tag .* is not supported"),
        ("{[1]: 2}", "a key must be a word"),
        ("[" * 1_000_000, "line 1: more than 50 levels are nested"),
        ("{a: " * 51 + "1" + "}" * 51, "more than 50 levels are nested"),
        (
            "a: &a " + "[" * 30 + "1" + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30,
            "an alias nests more than 50 levels",
        ),
    ],
)
def test_yaml_with_duplicate_keys_tags_or_deep_nesting_is_refused(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        check_yaml(text)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("conf/quickstart.yml", "; did you mean conf/quickstart.yaml?"),
        ("quikstart.yaml", "; did you mean conf/quickstart.yaml?"),
        ("photos.yaml", ". Give one of conf/bart_cnndm.yaml, "),
    ],
)
def test_a_missing_file_is_refused_with_the_closest_name_or_all_recipes(
    capsys: pytest.CaptureFixture[str], name: str, advice: str
) -> None:
    refused(capsys, main(["fit", "--config", name]), f"--config: there is no file '{name}'{advice}")
