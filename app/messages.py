"""Parser errors as one line for a reader, and advice of libraries that does not apply."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.console import escape_controls
from app.constructors import constructor_parameters
from app.imports import denied_message, similar_class
from datamodules.errors import first_line

LONGEST = 2000  # characters of a message

# How well an alternative of a union explains the error; the lowest is shown.
NAMED_CLASS, IMPLIED_CLASS, NO_CLASS, TYPE, HOPELESS, NULL = range(6)


@dataclass
class _Reason:
    """Why one alternative of a parser's union does not take a value."""

    text: str
    rank: int = NAMED_CLASS
    keys: list[str] = field(default_factory=list)
    owner: str | None = None  # dotted path of the class whose keys are meant
    value: str | None = None


def parser_message(error: Exception, known: Sequence[str] = ()) -> str:
    """Return a parser's complaint in one line: what is wrong with the alternative that was meant.

    Args:
        error: An error of the parser, or any other error with a message.
        known: Keys of the command, for a key that is unknown.
    """
    reason = _read(str(error).split("\n"))
    text = reason.text
    if denied := re.search(r"Importing '([^']+)' is not allowed", text):
        text = denied_message(denied[1])
    elif nameless := re.search(r"Expected a dot import path string:\s*(.*)", text):
        name = nameless[1].strip()
        close = similar_class(name)
        hint = f"; did you mean {close}?" if close and close != name else "."
        text = f"There is no class {name!r} that fits{hint}"
    else:
        text = _unknown_key(text, reason, known) or _in_words(text)
    prefix = ".".join(reason.keys)
    if prefix and not text.startswith(prefix):
        text = f"{prefix}: {text}"
    if reason.value is not None and "expected" in text and ", got" not in text:
        text = f"{text}, got {reason.value}"
    if "backend found" in text:
        text = f"trainer.accelerator: {text} On a machine without one add --config conf/cpu.yaml."
    text = re.sub(r"\s*\n\s*", " ", text).strip()
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} …"
    return escape_controls(text).replace("\t", "\\t")


def _read(lines: Sequence[str], base_classes: str = "") -> _Reason:
    """Read the parser's nested text.

    Args:
        lines: A reason, with the reasons that it encloses below it, indented.
        base_classes: The enclosing union's line of types.
    """
    lines = [line for line in lines if line.strip() and not line.strip().startswith("- Expected a path but ")]
    if not lines:
        return _Reason("")
    first, rest = lines[0].strip().removeprefix("- "), lines[1:]
    if keyed := re.match(r'(?:Problem with argument )?Parser key "([^"]+)":\s*(.*)', first):
        inner = _read([keyed[2], *rest], base_classes)
        inner.keys.insert(0, keyed[1])
        return inner
    if first.startswith("Does not validate against any of the Union"):
        return _best(rest)
    if named := re.match(r"Problem with given class_path '([^']*)':\s*(.*)", first):
        inner = _read([named[2], *rest], base_classes)
        implied = f".{named[1].rpartition('.')[2]}'" in base_classes
        inner.rank = IMPLIED_CLASS if implied else min(inner.rank, NAMED_CLASS)
        inner.owner = inner.owner or named[1]
        return inner
    value = re.search(r"\. Got value: (.*)$", first)
    if base := re.match(r"Not a valid subclass of (\w+)", first):
        return _Reason(f"expected a class_path of {base[1]}", TYPE, value=value and value[1])
    if first.startswith(("Expected a dot import path", "Import path ")):
        return _Reason(first, NO_CLASS)
    if first.startswith("Expected an instantiatable class"):
        implied = any(f".{name}'" in base_classes for name in re.findall(r"\.(\w+) is ", first))
        return _Reason(first, HOPELESS if implied else NO_CLASS)
    if first.startswith("Expected a <class 'NoneType'>"):
        return _Reason(first, NULL)
    text = "\n".join(line.strip() for line in (first, *rest))
    return _Reason(text, TYPE if first.startswith(("Expected a", "Not of type ")) else NAMED_CLASS)


def _best(lines: Sequence[str]) -> _Reason:
    """Choose among the alternatives of a union, those of types joined into one."""
    base_classes = next((line for line in lines if line.strip().startswith("Subtypes:")), "")
    start = next((i + 1 for i, line in enumerate(lines) if line.strip() == "Errors:"), len(lines))
    end = next((i for i, line in enumerate(lines) if i >= start and _is_end(line, lines[start - 1])), len(lines))
    alternatives = [_read(block, base_classes) for block in _bullets(lines[start:end])]
    if not alternatives:
        return _Reason("expected another value")
    best = min(alternatives, key=lambda reason: reason.rank)
    if best.rank == TYPE:
        texts = [_in_words(reason.text) for reason in alternatives if reason.rank == TYPE and not reason.keys]
        wanted = [part for text in texts for part in text.removeprefix("expected ").partition(", got")[0].split(" or ")]
        if all(text.startswith("expected ") for text in texts) and texts:
            best = _Reason(f"expected {' or '.join(dict.fromkeys(wanted))}", TYPE)
    given = next((line.partition("Given value:")[2].strip() for line in lines[end:] if "Given value:" in line), "")
    nested = re.match(r"NestedArg\(key='([^']*)', val=(.*)\)$", given)
    if nested and best.rank == TYPE:
        best.keys.append(nested[1])
    given = nested[2] if nested else given
    if best.value is None and 0 < len(given) <= 60 and not given.startswith("Namespace"):
        best.value = given
    return best


def _is_end(line: str, errors: str) -> bool:
    return line.strip().startswith("Given value type:") and _indent(line) <= _indent(errors)


def _bullets(lines: Sequence[str]) -> list[list[str]]:
    """Split lines at the bullets that are indented least."""
    margin = min((_indent(line) for line in lines if line.lstrip().startswith("- ")), default=0)
    blocks: list[list[str]] = []
    for line in lines:
        if line.lstrip().startswith("- ") and _indent(line) == margin:
            blocks.append([])
        if blocks:
            blocks[-1].append(line)
    return blocks


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _in_words(text: str) -> str:
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\](?=\.|$)", r"expected one of \1", text, flags=re.M)
    text = re.sub(r"Expected an? <class '(?:[\w.]*\.)?(\w+)'>", r"expected \1", text)
    text = re.sub(r"Not of type Path: .*", "expected a path", text)
    text = re.sub(r"Unable to load config '([^']*)' - .*", r"there is no file \1, and keys are expected", text)
    text = re.sub(r"Expected an? (tuple|path)", r"expected a \1", text)
    text = re.sub(r"the following arguments are required: (.*)", r"\1 must be given.", text)
    text = re.sub(r"\. Got value:", ", got", text)
    return re.sub(r"'(\w+)' object has no attribute 'keys'", r"expected keys of its own, got a value of type \1", text)


def _unknown_key(text: str, reason: _Reason, known: Sequence[str]) -> str | None:
    """Name the keys that there are, for a key that is unknown; None for another complaint."""
    patterns = (
        r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[^']+)'",
        r"Subcommand '\w+' does not accept option '(?P<key>[^']+)'",
        r"Option '(?P<key>[^']+)' is not accepted",
        r"[Uu]nrecognized arguments: --(?P<key>[^\s=+]+)",
        r"ambiguous option: --(?P<key>[^\s=+]+)(?:=\S*)? could match (?P<close>.*)",
        r"No action for key \"(?P<key>[^\"]+)\"",
    )
    match = next((found for pattern in patterns if (found := re.search(pattern, text))), None)
    if match is None:
        return None
    key = match["key"]
    group = match.groupdict().get("group")
    key = f"{group}.{key}" if group else key
    if reason.owner:
        keys, name = _class_keys(reason.owner, key)
        beginning = f"{name} has no key {key}"
        listed = f" Its keys: {', '.join(keys)}." if keys else ""
    else:
        keys = list(known)
        beginning = f"There is no key {key}"
        keys += [word.removeprefix("--") for word in (match.groupdict().get("close") or "").split(", ") if word]
        section = key.rpartition(".")[0]
        siblings = [k for k in keys if k.startswith(f"{section}.")] if section else [k.partition(".")[0] for k in keys]
        listed = f" There are {', '.join(dict.fromkeys(siblings))}." if siblings else ""
    close = [name for name in keys if name.startswith(key)] or difflib.get_close_matches(key, keys, n=1)
    return f"{beginning}{f'; did you mean {close[0]}?' if close else '.'}{listed}"


def _class_keys(path: str, key: str) -> tuple[list[str], str]:
    """Return the keys of a class, or of the group in it that a key belongs to, with the class's name."""
    module_name, _, name = path.rpartition(".")
    named = getattr(sys.modules.get(module_name), name, None)  # the parser has it imported; a quoted value need not be
    if not inspect.isclass(named):
        return [], name
    parameters = constructor_parameters(named)
    section = key.rpartition(".")[0]
    if section in parameters:
        group = type(parameters[section].default)
        if dataclasses.is_dataclass(group):
            return [f"{section}.{f.name}" for f in dataclasses.fields(group)], name
    others = [] if named.__module__.startswith(("modules.", "datamodules.")) else ["dict_kwargs"]
    takes_others = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(named).parameters.values())
    return [*parameters, *(others if takes_others else [])], name


def compiler_message(error: Exception) -> str | None:
    """Return the message for a failure of torch.compile; None for any other error."""
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is None or not isinstance(error, compiler.TorchDynamoException):
        return None
    return f"model.compile: torch.compile fails on this backbone ({first_line(error)}). Set it to false."


def quiet_libraries() -> None:
    """Silence advice that does not apply here."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # which `datasets` reads when a run imports it
    if loaded := sys.modules.get("datasets"):
        loaded.disable_progress_bars()
    for message in (
        r".*does not have many workers.*",  # images in memory need none
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
        r".*sync_dist=True.*",  # torchmetrics gather on their own
        r".*your dataloader is not resumable.*",  # the data module's state has the position
        r".*callbacks used to create the checkpoint need to be provided.*",  # of an evaluation on other data
        r".*isinstance\(treespec, LeafSpec\).*",  # lightning on a newer torch
        r".*Detected pickle protocol .* in the checkpoint.*",  # of a file that is refused
    ):
        warnings.filterwarnings("ignore", message)
