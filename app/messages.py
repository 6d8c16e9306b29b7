"""What libraries say, made fit for a reader."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
import warnings

from app.imports import denied_message


def parser_message(error: Exception) -> str:
    """The parser's complaint in one line: of all the alternatives that it tried, what was wrong with the one meant."""
    text = str(error)
    keys = re.findall(r'Parser key "([^"]+)":\s*Does not validate', text)  # the outer, and the one within its class
    prefix = f"{'.'.join(keys)}: " if keys else ""
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", text):
        return prefix + denied_message(denied[1])
    # every alternative is a bullet behind "Errors:", in one line or one each
    bullets = re.findall(r"(?:^|\s)- (.*?)(?=\s+- |\s*Given value type:|$)", text.partition("Errors:")[2], re.S)
    meant = [b for b in bullets if "<class 'NoneType'>" not in b]
    given = re.search(r"Given value: (\S{1,40})$", text.strip(), re.M)  # the first is the innermost
    if meant:
        said = "Got value" in meant[0] or not given or given[1].startswith(("NestedArg", "Namespace"))
        text = prefix + meant[0] + ("" if said or not given else f", got {given[1]}")
    text = re.sub(r"Group '([\w.]+)' does not accept option '([\w.]+)'", r"Option '\1.\2' is not accepted", text)
    if unknown := re.search(r"(?:Option '|arguments: --)([\w.]+)", text):
        text = _unknown_key(text, unknown[1]) or text
    text = re.sub(r"Problem with given class_path '[^']*':\s*", "", text)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]\. Got value:", r"expected one of \1, got", text)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", text)
    text = re.sub(r"Expected an? <class '(?:builtins\.)?(\w+)'>", r"expected \1", text)
    text = re.sub(r"\. Got value:", ", got", text)
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    if "backend found" in text:
        text = f"trainer.accelerator: {text} On a machine without one add --config conf/cpu.yaml."
    text = re.sub(r"\s*\n\s*", " ", text).strip()
    # what a value or a file holds moves no cursor and turns no text round
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def compiler_message(error: Exception) -> str | None:
    """What to say if torch.compile has failed; None for any other error."""
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is None or not isinstance(error, compiler.TorchDynamoException):
        return None
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"model.compile: torch.compile fails on this backbone ({reason}); set it to false."


def _unknown_key(text: str, key: str) -> str | None:
    """Say what a class accepts instead of a key that it does not know."""
    owner = re.search(r"class_path '([\w.]+)\.(\w+)'", text)
    if owner is None:
        return None
    named = getattr(sys.modules.get(owner[1]), owner[2], None)  # the parser has it imported; a quoted value need not be
    if not inspect.isclass(named):
        return None
    parameters = inspect.signature(named).parameters
    known = list(parameters)
    section, _, _ = key.rpartition(".")
    if section in parameters:
        known = [f"{section}.{name}" for name in inspect.signature(type(parameters[section].default)).parameters]
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"{owner[2]} has no key {key}{hint} Its keys: {', '.join(known)}."


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
    ):
        warnings.filterwarnings("ignore", message)
