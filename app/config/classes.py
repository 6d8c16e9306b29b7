"""Short class names of tasks and data, as in `--model ImageClassifier` and `--data.help TextClassificationData`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pkgutil import resolve_name
from types import MappingProxyType

from jsonargparse import ArgumentParser

from app.config.imports import resolve
from app.config.precedence import SECTIONS
from app.config.yaml_files import read_yaml
from datamodules.errors import UsageError

# The parser knows the short names of imported classes only. A run imports only the classes of its task.
CLASS_PATHS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "model": {
            "ImageClassifier": "modules.image_classification.ImageClassifier",
            "TextClassifier": "modules.text_classification.TextClassifier",
            "Summarizer": "modules.summarization.Summarizer",
            "LanguageModel": "modules.language_modeling.LanguageModel",
        },
        "data": {
            "ImageClassificationData": "datamodules.image_classification.ImageClassificationData",
            "DomainData": "datamodules.domains.DomainData",
            "TextClassificationData": "datamodules.text_classification.TextClassificationData",
            "SummarizationData": "datamodules.summarization.SummarizationData",
            "LanguageModelingData": "datamodules.language_modeling.LanguageModelingData",
            "MultipleChoiceData": "datamodules.multiple_choice.MultipleChoiceData",
        },
    }
)
BASES = {"model": "modules.base.AdaptedModule", "data": "datamodules.base.ResumableDataModule"}
_NAMING = {f"--{section}{end}": section for section in SECTIONS for end in ("", ".help", ".class_path")}


def expand_class_names(options: Sequence[str]) -> list[str]:
    """Return the options with the short names of classes replaced by class paths.

    Raises:
        UsageError: For an unknown short name that resembles a known short name.
    """
    expanded: list[str] = []
    section: str | None = None  # the section that the previous word names, if the class is the next word
    for word in options:
        option, equals, value = word.partition("=")
        if section is not None and not word.startswith("-"):
            expanded.append(_class_path(section, word))
            section = None
        elif equals and option in _NAMING:
            expanded.append(f"{option}={_class_path(_NAMING[option], value)}")
            section = None
        else:
            expanded.append(word)
            section = _NAMING.get(word)
    return expanded


def _class_path(section: str, name: str) -> str:
    paths = CLASS_PATHS[section]
    if name not in paths and name.isidentifier() and (close := difflib.get_close_matches(name, paths, n=1)):
        raise UsageError(
            f"{section}: there is no class {name}; did you mean {close[0]}? Choose one of {', '.join(paths)}."
        )
    return paths.get(name, name)


def find_classes(files: Sequence[str], options: Sequence[str]) -> dict[str, type]:
    """Return the class that files and options name for each section, or the base class of the section.

    Options override files. A class that cannot be imported is ignored, since the caller only describes keys.

    Raises:
        UsageError: If a file is missing or broken, or for a misspelt short name of a class.
    """
    paths = dict(BASES)
    for name in files:
        content = read_yaml(name)
        for section in SECTIONS:
            part = content.get(section)
            if isinstance(part, dict) and isinstance(part.get("class_path"), str):
                paths[section] = part["class_path"]
    words = expand_class_names(options)
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option in _NAMING and not option.endswith(".help"):
            paths[_NAMING[option]] = value if equals else following
    return {section: _class(path) or resolve_name(BASES[section]) for section, path in paths.items()}


def _class(path: str) -> type | None:
    try:
        resolved = resolve(path)
    except ImportError:
        return None
    return resolved if isinstance(resolved, type) else None


def class_keys(kind: type, section: str = "") -> list[str]:
    """Return the keys of a class, prefixed with the name of its section if one is given."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, section or None, fail_untyped=False)
    return list(parser.get_defaults().keys())
