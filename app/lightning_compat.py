"""Every private access to Lightning and jsonargparse; tests/app/test_lightning_compat.py fails when a name moves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import yaml
from jsonargparse import set_parsing_settings
from jsonargparse._common import ImportDenied, parsing_settings
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI, _InstantiatorFn
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.optim.swa_utils import AveragedModel

from app.config.yaml_files import LOADER

VERDICTS = "import_path_verdicts"


class HookedCLI(LightningCLI):
    """LightningCLI with a hook around each construction. A checkpoint's values never override the options."""

    def construct(self, kind: type, build: Callable[[], Any]) -> Any:
        """Return `build()`, a new instance of a class that the configuration names."""
        return build()

    def _add_instantiators(self) -> None:
        for section, base in (("model", L.LightningModule), ("data", L.LightningDataModule)):
            self.parser.add_instantiator(_SectionInstantiator(self, section), base)
        self.parser.add_instantiator(
            lambda kind, *args, **keys: self.construct(kind, partial(kind, *args, **keys)), object
        )

    def _dump_config(self) -> None:
        """Keep the configuration as plain values, for hyper-parameters. Unlike Lightning, do not validate it again."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = yaml.load(text, LOADER)[self.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's values override the options."""


class _SectionInstantiator(_InstantiatorFn):
    """Lightning's constructor of a section's class. It keeps the hyper-parameters for checkpoints."""

    cli: HookedCLI

    def __call__(self, class_type: type, *args: Any, applied_instantiation_links: dict[str, Any], **keys: Any) -> Any:
        links = {"applied_instantiation_links": applied_instantiation_links}
        return self.cli.construct(class_type, partial(super().__call__, class_type, *args, **links, **keys))


class _Verdicts(Mapping[str, bool]):
    """Mapping that asks a function whether a dotted path may be imported, in place of a list of prefixes."""

    def __init__(self, denial: Callable[[str], str | None]) -> None:
        self.denial = denial

    def __contains__(self, path: object) -> bool:
        return True  # so that jsonargparse asks for the whole path first, and never for its prefixes

    def __getitem__(self, path: str) -> bool:
        if (reason := self.denial(path)) is not None:
            raise ImportDenied(reason)
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@contextmanager
def import_policy(denial: Callable[[str], str | None], prefixes: list[str]) -> Iterator[None]:
    """Ask a function before any jsonargparse parser of this process imports a dotted path; undone on exit.

    jsonargparse's lists hold prefixes only. Its `import_object` imports every object that a value names, and asks
    twice: for the path as written, and for the path where the object is defined.

    Args:
        denial: Function from a dotted path to the reason why it may not be imported, or None.
        prefixes: Further prefixes that may be imported. jsonargparse validates them.

    Raises:
        ValueError: For a prefix that is not a dotted path, or that is jsonargparse itself.
    """
    settings_before = dict(parsing_settings)
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=prefixes,
            # for an argument of any type, a dict that looks like a class with arguments stays a dict
            instantiate_subclass_spec_in_any=False,
        )
        parsing_settings[VERDICTS] = _Verdicts(denial)
        yield
    finally:
        parsing_settings.update(settings_before)


def move_run_directory(trainer: L.Trainer, path: str) -> None:
    """Set `trainer.default_root_dir`, which has no setter, once all processes know the run directory."""
    trainer._default_root_dir = path  # type: ignore[attr-defined]


def stop_after_step(trainer: L.Trainer) -> None:
    """Make Lightning leave its training loop once the step is logged, as if its own handler had caught SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def launched_processes(trainer: L.Trainer | None) -> list[subprocess.Popen[bytes]]:
    """Return the list of processes that this process started for a distributed run. Lightning watches the list."""
    launcher = trainer.strategy.launcher if trainer else None
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def averaged_model(averaging: WeightAveraging) -> AveragedModel:
    """Return the average of Lightning's callback, with the number of its updates."""
    model = averaging._average_model
    assert model is not None  # from the callback's setup on
    return model
