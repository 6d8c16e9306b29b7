"""Private access to Lightning and jsonargparse; tests/app/test_lightning_compat.py fails when they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch.cli import LightningCLI, _InstantiatorFn

VERDICTS = "import_path_verdicts"


class _Verdicts(Mapping[str, bool]):
    """Answer jsonargparse's question about each dotted path with a function, instead of with a list of prefixes."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self.is_allowed = is_allowed

    def __contains__(self, path: object) -> bool:
        return True  # so that the whole path is asked for first, and its prefixes never

    def __getitem__(self, path: str) -> bool:
        return self.is_allowed(path)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@contextmanager
def import_policy(is_allowed: Callable[[str], bool], prefixes: list[str]) -> Iterator[None]:
    """Ask a function before any jsonargparse parser of this process imports a dotted path; undone on exit.

    jsonargparse's own lists know prefixes only. Its `import_object` is the one place that imports what a value names.
    That function asks the verdicts twice: for the path as written, and for the place where the object is defined.

    Args:
        is_allowed: Takes a dotted path. It may raise ImportError with a reason of its own.
        prefixes: Additional prefixes, which jsonargparse validates.

    Raises:
        ValueError: For a prefix that is no dotted path, or that of jsonargparse itself.
    """
    before = dict(parsing_settings)
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=prefixes,
            # where a class takes anything, what looks like the description of an object stays a dict
            instantiate_subclass_spec_in_any=False,
        )
        parsing_settings[VERDICTS] = _Verdicts(is_allowed)
        yield
    finally:
        parsing_settings.update(before)


@contextmanager
def yaml_loading(check: Callable[[str], None]) -> Iterator[None]:
    """Check each YAML text (file, nested file or option) before jsonargparse loads the text; undone on exit.

    Args:
        check: Raises yaml.YAMLError for what is not supported.
    """
    before = get_loader("yaml")

    def load(text: str) -> Any:
        check(text)
        try:
            return before(text)
        except (ValueError, RecursionError) as error:  # PyYAML's constructors raise bare ones
            raise yaml.YAMLError(str(error)) from error

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", before, exceptions=(yaml.YAMLError,))


def hyperparameter_instantiator(cli: LightningCLI, key: str) -> Callable[..., Any]:
    """Return Lightning's own way to construct a section's class, which keeps its hyper-parameters for checkpoints."""
    return _InstantiatorFn(cli=cli, key=key)


def subcommand_keys(cli: LightningCLI, name: str) -> list[str]:
    """Return the keys that a command takes, by dotted name; an empty list if there is no such command."""
    parser = cli._subcommand_parsers.get(name)
    return [] if parser is None else list(parser.get_defaults().keys())
