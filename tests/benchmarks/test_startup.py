"""The benchmarks of start-up and of data loaders: their commands."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import loader, startup


def test_arms_run_in_timed_processes_that_must_succeed() -> None:
    for processor in (False, True):
        assert 0 < startup.run(["-c", "pass"], argparse.Namespace(threads=1, processor=processor)) < 30
    with pytest.raises(SystemExit, match="no such arm"):
        startup.run(["-c", "raise ValueError('no such arm')"], argparse.Namespace(threads=1, processor=False))


def test_texts_are_timed_only_if_their_files_are_given() -> None:
    images = startup.commands(argparse.Namespace(backbone=None, path=None))
    with_texts = startup.commands(argparse.Namespace(backbone="backbone", path="glue"))
    assert startup.BASE in images
    assert with_texts.keys() - images.keys() == {startup.OURS, startup.THEIRS}
    recipes = {word for words in with_texts.values() for word in words if word.endswith(".yaml")}
    assert recipes and all(Path(recipe).is_file() for recipe in recipes)


def test_loaders_are_timed_only_if_their_files_are_given() -> None:
    assert list(loader.cases({"cifar": "c"})) == ["CIFAR-10, ViT-B/16"]
    every = loader.cases(dict.fromkeys(loader.FILES, "somewhere"))
    assert len(every) == 4
    assert not any("{" in word for words in every.values() for word in words)
