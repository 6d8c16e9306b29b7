"""Errors of the parser in one line: an unknown key gets a suggestion, a value of a wrong type the right type."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentParser

LONGEST = 2000  # characters of a message
# the parser's nested text: lines that enclose others, or that no reader needs
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
NAMED, TYPE, OTHER_CLASS = range(3)  # kinds of reasons; the lowest is reported


@dataclass
class _Reason:
    """Why one alternative of a union does not take a value."""

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
        """Return how little the reason has to do with the alternative that was meant."""
        if self.text.startswith(("Import path", "Not a valid subclass", "Expected an instantiatable")):
            return OTHER_CLASS
        return TYPE if self.text.startswith("Expected") else NAMED


def parser_message(error: Exception, known: Sequence[str] = ()) -> str:
    """Return an error in one line; `known` has the keys of the command, for a key that is unknown.

    Of the reasons that the parser gives, the line has the one for the alternative that was meant.
    """
    lines = str(error).split("\n")
    reasons = list(_reasons(lines))
    if not reasons:
        return one_line(str(error))
    bases = " ".join(line for line in lines if "Subtypes:" in line)  # a value without a class_path implies one of them
    best = min(reasons, key=lambda reason: (not reason.names_class(bases), reason.kind, -reason.depth))
    text = _unknown_key(best, known) or best.text
    if best.kind == TYPE:
        types = dict.fromkeys(_type_name(r.text) for r in reasons if (r.kind, r.key) == (TYPE, best.key))
        found = next((match for line in lines[best.line :] if (match := _VALUE.search(line))), None)
        value = (found[1] or found[2]) if found else ""
        text = f"expected {' or '.join(types)}{f', got {value}' if 0 < len(value) <= 60 else ''}"
    return one_line(f"{best.key}: {text}" if best.key else text)


def one_line(text: str) -> str:
    """Return a text without line breaks and tabs, cut at `LONGEST`."""
    text = re.sub(r"\s*\n\s*", " ", text).strip().replace("\t", "\\t")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _reasons(lines: Sequence[str]) -> Iterator[_Reason]:
    """Yield the innermost reasons of a text in which each line encloses the lines below that are indented more."""
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
                [found[1] for _, parent in parents if (found := pattern.match(parent))] for pattern in (_KEY, _CLASS)
            )
            yield _Reason(text, ".".join(keys), classes[-1] if classes else None, depth, number)


def _type_name(text: str) -> str:
    """Return the type that a reason of kind `TYPE` names."""
    text = re.sub(r"^Expected (an? )?", "", text.partition(". Got value:")[0]).partition(": ")[0]
    text = text.replace("dot import path string", "the path of a class")
    text = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", text)
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)


def _unknown_key(reason: _Reason, known: Sequence[str]) -> str | None:
    """Return the message for a key that is unknown, with a suggestion; None for another complaint."""
    match = _UNKNOWN.search(reason.text)
    if match is None:
        return None
    name = match["option"] or ".".join(filter(None, (match["group"], match["key"])))
    names = known if reason.class_path is None else _keys_of_class(reason.class_path)
    owner = "There is" if reason.class_path is None else f"{reason.class_path.rpartition('.')[2]} has"
    group, _, last = name.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in names if other.rpartition(".")[0] == group}
    pool, word = (siblings, last) if siblings else (dict(zip(names, names, strict=True)), name)
    close = [key for key in pool if key.startswith(word)] or difflib.get_close_matches(word, pool, n=1)
    listed = f". There are {', '.join(siblings.values())}." if siblings else "."
    return f"{owner} no key {name}{f'; did you mean {pool[close[0]]}?' if close else listed}"


def _keys_of_class(class_path: str) -> list[str]:
    """Return the dotted keys of a class that the parser has imported; none for a class that a value only quotes."""
    module_name, _, name = class_path.rpartition(".")
    kind = vars(sys.modules[module_name]).get(name) if module_name in sys.modules else None
    parser = ArgumentParser()
    if isinstance(kind, type):
        parser.add_class_arguments(kind, fail_untyped=False)
    return list(parser.get_defaults().keys())
