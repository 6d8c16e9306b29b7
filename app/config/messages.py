"""Errors of the parser in one line: a suggestion for an unknown key, the right type for a value of a wrong type."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.config.classes import class_keys
from datamodules.errors import UsageError

LONGEST = 2000  # characters of a message
# Patterns of the parser's nested text: lines that enclose other lines, and lines that no reader needs.
_KEY = re.compile(r'(?:Problem with argument )?Parser key "([^"]+)":\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']*)':\s*")
_FRAME = re.compile(
    r"(Does not validate|Subtypes:|Errors:|Given value|Expected a path but|Expected a <class 'NoneType'>|"
    r"Subclass types expect|a class path|a dict with)"
)
_UNKNOWN = re.compile(
    r"(?:(?:Group '(?P<group>[\w.]+)'|Subcommand '\w+') does not accept option|Option|No action for key)"
    r""" ['"](?P<key>[^'"]+)|(?:[Uu]nrecognized arguments|ambiguous option): --(?P<option>[^\s=+]+)"""
)
_VALUE = re.compile(r"(?:\. Got value: |Given value: )(?:NestedArg\(key='[^']*', val=(.*)\)|(.*))$")
SECTION_ORDER = ("data", "model", "trainer")  # preference among keys that have the same last part
# Names of other programs for a key, if the key's own name is not similar.
OTHER_NAMES = {
    "lr": "model.learning_rate",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "batch": "data.batch_size",
    "bs": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "workers": "data.num_workers",
    "gpus": "trainer.devices",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "r": "model.adapter.rank",
    "lora_r": "model.adapter.rank",
    "lora_alpha": "model.adapter.alpha",
    "lora_dropout": "model.adapter.dropout",
    "target_modules": "model.adapter.targets",
    "seed": "seed_everything",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "checkpoint": "ckpt_path",
    "output_dir": "trainer.default_root_dir",
}
NAMED, TYPE, OTHER_CLASS = range(3)  # kinds of reasons; a lower kind is preferred


class ListError(UsageError):
    """Error with a list of choices below the message, one choice a line."""

    def __init__(self, message: str, choices: Sequence[str]) -> None:
        super().__init__("\n".join([message, *(f"  {choice}" for choice in choices)]))


@dataclass
class _Reason:
    """Reason why one alternative of a union rejects a value."""

    text: str
    key: str
    class_path: str | None  # of the class that the innermost key belongs to
    depth: int
    line: int

    def names_class(self, bases: str) -> bool:
        """Return True if the reason is about a class that the value names."""
        name = (self.class_path or "").rpartition(".")[2]
        return bool(name) and re.search(rf"\b{re.escape(name)}\b", bases) is None

    @property
    def kind(self) -> int:
        """Return the kind of the reason. A lower kind is likelier to be about the alternative that the user meant."""
        if self.text.startswith(("Import path", "Not a valid subclass", "Expected an instantiatable")):
            return OTHER_CLASS
        return TYPE if self.text.startswith("Expected") else NAMED


def parser_message(error: Exception, known: Callable[[], Sequence[str]] = tuple) -> str:
    """Return an error in one line.

    The parser gives a reason for each alternative of a union. The line has the reason for the alternative that the
    user most likely meant. A `ListError` keeps its lines.

    Args:
        error: The error of the parser.
        known: Function that returns the keys of the command. It is called only to suggest another key.
    """
    if isinstance(error, ListError):
        return str(error)
    lines = str(error).split("\n")
    reasons = list(_reasons(lines))
    if not reasons:
        return one_line(str(error))
    bases = " ".join(line for line in lines if "Subtypes:" in line)  # a value without a class_path implies one of these
    best = min(reasons, key=lambda reason: (not reason.names_class(bases), reason.kind, -reason.depth))
    text = _unknown_key(best, known) or best.text
    if best.kind == TYPE:
        types = dict.fromkeys(_type_name(r.text) for r in reasons if (r.kind, r.key) == (TYPE, best.key))
        value_match = next((match for line in lines[best.line :] if (match := _VALUE.search(line))), None)
        value = (value_match[1] or value_match[2]) if value_match else ""
        text = f"expected {' or '.join(types)}{f', got {value}' if 0 < len(value) <= 60 else ''}"
        if "list" in types and value and not value.startswith("["):
            text += ". Write a list in brackets and quotation marks: '[a, b]'"
        if value.startswith("{") and (pattern := f"{best.key}_pattern") in known():
            text += f". Give one value here. {pattern} takes values by projection, such as {{query: 4}}"
    return one_line(f"{best.key}: {text}" if best.key else text)


def one_line(text: str) -> str:
    """Return a text without line breaks and tabs. Cut the text at `LONGEST` characters."""
    text = re.sub(r"\s*\n\s*", " ", text).strip().replace("\t", "\\t")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _reasons(lines: Sequence[str]) -> Iterator[_Reason]:
    """Yield the innermost reasons of an indented text. A line encloses the lines below that are indented more."""
    parents: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        text = line.lstrip().removeprefix("- ")
        depth = len(line) - len(text)
        while text and parents and parents[-1][0] >= depth:
            parents.pop()
        while match := _KEY.match(text) or _CLASS.match(text):
            parents.append((depth, match[0]))
            text = text[match.end() :]
        if text and not _FRAME.match(text) and (parents or _UNKNOWN.search(text)):
            keys, classes = (
                [inner[1] for _, parent in parents if (inner := pattern.match(parent))] for pattern in (_KEY, _CLASS)
            )
            yield _Reason(text, ".".join(keys), classes[-1] if classes else None, depth, number)


def _type_name(text: str) -> str:
    """Return the type that a reason of kind `TYPE` names."""
    text = re.sub(r"^Expected (an? )?", "", text.partition(". Got value:")[0]).partition(": ")[0]
    text = text.replace("dot import path string", "the path of a class")
    text = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", text)
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)


def _unknown_key(reason: _Reason, known: Callable[[], Sequence[str]]) -> str | None:
    """Return the message for an unknown key, with a suggestion; None for any other reason."""
    match = _UNKNOWN.search(reason.text)
    if match is None:
        return None
    name = match["option"] or ".".join(filter(None, (match["group"], match["key"])))
    names = known() if reason.class_path is None else _keys_of_class(reason.class_path)
    beginning = "There is" if reason.class_path is None else f"{reason.class_path.rpartition('.')[2]} has"
    close = closest_key(name, names)
    siblings = _siblings(name, names)
    choices = f". Choose one of {', '.join(siblings)}." if siblings else "."
    return f"{beginning} no key {name}{f'; did you mean {close}?' if close else choices}"


def closest_key(name: str, names: Sequence[str]) -> str | None:
    """Return the known key that is most similar to an unknown key; None if no key is similar.

    Args:
        name: The unknown key.
        names: All keys by dotted name.
    """
    ordered = sorted(names, key=_depth_and_section)
    leaves = {key.rpartition(".")[2]: key for key in reversed(ordered)}  # the shallowest key for each leaf
    joined = {_joined(key): key for key in reversed(ordered)}
    leaf = _joined(name.rpartition(".")[2])
    group, _, last = name.rpartition(".")
    other = OTHER_NAMES.get(last, "")
    others = [key for key in (other, other.partition(".")[2]) if key in names and other.startswith(group)]
    for key in (*others, joined.get(_joined(name)), leaves.get(leaf)):
        if key is not None:
            return key
    siblings = {key.rpartition(".")[2]: key for key in _siblings(name, names)}
    for pool, word, cutoff in ((siblings, leaf, 0.6), (joined, _joined(name), 0.75), (leaves, leaf, 0.75)):
        close = [key for key in pool if key.startswith(word)] or difflib.get_close_matches(word, pool, 1, cutoff)
        if close:
            return pool[close[0]]
    return None


def _siblings(name: str, names: Sequence[str]) -> list[str]:
    """Return the keys of the group that an unknown key would be in."""
    group = name.rpartition(".")[0]
    return [key for key in names if key.rpartition(".")[0] == group]


def _joined(key: str) -> str:
    return re.sub("[.-]", "_", key).lower()


def _depth_and_section(key: str) -> tuple[int, int]:
    section = key.partition(".")[0]
    return key.count("."), SECTION_ORDER.index(section) if section in SECTION_ORDER else len(SECTION_ORDER)


def _keys_of_class(class_path: str) -> list[str]:
    """Return the dotted keys of a class that is imported already; an empty list for any other class."""
    module_name, _, name = class_path.rpartition(".")
    kind = vars(sys.modules[module_name]).get(name) if module_name in sys.modules else None
    return class_keys(kind) if isinstance(kind, type) else []
