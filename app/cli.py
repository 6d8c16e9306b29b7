"""The command line: LightningCLI with this project's defaults, order of precedence, directories and messages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from app.arguments import check_yaml, report_differences, saved_configuration, split_arguments, temporary_yaml
from app.callbacks import AdapterCheckpoint, AdapterSpectrum, CallbackError, PredictionWriter, RunSummary
from app.checkpoint_io import AtomicCheckpointIO, CheckpointError, read_checkpoint
from app.messages import parser_message, quiet_libraries
from app.run_directory import new_run_directory, resolve_checkpoint, run_of_checkpoint
from datamodules.errors import DataError
from modules.adapters import AdapterError
from modules.base import AdaptedModule, ModelError

# What a user can mend. Anything else is a defect of this program and shows its traceback.
BAD_INPUT = (
    ArgumentError,
    AdapterError,
    ModelError,
    DataError,
    CheckpointError,
    CallbackError,
    MisconfigurationException,
    OSError,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Words of the command line behind the program's name; None takes the process's own.

    Returns:
        Exit code: 0 for success, 2 for wrong use or bad input, reported in one message on stderr.
    """
    quiet_libraries()
    words = list(sys.argv[1:] if args is None else args)
    try:
        AsymmetryCLI(words)
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        cause = _bad_input(error)
        if cause is None:
            raise
        print(f"error: {parser_message(cause)}", file=sys.stderr)
        return 2
    return 0


def _bad_input(error: Exception) -> Exception | None:
    """What the user can mend behind an error, looking through the parser's wrapping; None for a defect."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, BAD_INPUT):
            return link
        link = link.__cause__ or link.__context__
    return None


class AsymmetryCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` for every task.

    - The command line beats the checkpoint of `--ckpt_path`, which beats the files of `--config`, whatever their order;
      what differs from the checkpoint is reported.
    - A run writes to runs/<recipe>/version_K, a new one each time; a command on a checkpoint writes to its run.
    - `spectrum`, `checkpoint` and `test_after_fit` are keys beside `model`, `data` and `trainer`.

    Args:
        args: Words of the command line.
    """

    def __init__(self, args: list[str]) -> None:
        self.checkpoint: Path | None = None
        self.run_directory = Path()
        strict = {"exit_on_error": False, "allow_abbrev": False}  # no guessing what --trainer.max_epoch means
        super().__init__(
            AdaptedModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"enable_model_summary": False, "use_distributed_sampler": False},
            parser_kwargs={name: strict for name in self.subcommands()} | strict,
            args=args,
        )

    # ----------------------------------------------------------------------------------------------------- arguments

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys beside Lightning's own."""
        parser.add_lightning_class_args(AdapterSpectrum, "spectrum")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the best checkpoint when fit has ended."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files first, then the checkpoint's values, then the command line's."""
        command, files, options = split_arguments(args)
        for name in files[1::2]:
            check_yaml(name)
        self.config = parser.parse_args([*command, *files, *options])
        subcommand = self.config.get("subcommand")
        self.root = self._root(files)
        given = self._get_key("ckpt_path")
        if given is None:
            return
        self.checkpoint = resolve_checkpoint(str(given), self.root)
        self.loaded = read_checkpoint(self.checkpoint)
        saved = saved_configuration(self.loaded)
        from_files = parser.parse_args([*command, *files])[subcommand]
        with temporary_yaml(saved) as path:
            self.config = parser.parse_args([*command, *files, "--config", path, *options])
        self.config[subcommand]["ckpt_path"] = str(self.checkpoint)
        report_differences(saved, from_files, self.config[subcommand])

    def _parse_ckpt_path(self) -> None:
        """Done in `parse_arguments`: Lightning would let the checkpoint beat the command line."""

    def _get_key(self, key: str) -> Any:
        subcommand = self.config.get("subcommand")
        return self.config[subcommand].get(key) if subcommand else None

    def _root(self, files: list[str]) -> Path:
        """Directory of this recipe's runs."""
        given = self._get_key("trainer.default_root_dir")
        recipe = Path(files[1]).stem if files else "default"
        return Path(given) if given else Path("runs") / recipe

    # -------------------------------------------------------------------------------------------------------- trainer

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Settle the run directory, the logger in it, and the callbacks that every run has."""
        config = self._get(self.config_init, "trainer")
        run = run_of_checkpoint(self.checkpoint) if self.checkpoint else None
        if run is None:
            run = new_run_directory(self.root) if getattr(rank_zero_only, "rank", 0) == 0 else self.root
        self.run_directory = run
        if config["logger"] in (None, True) and not config["fast_dev_run"]:
            # on resume, TensorBoard is told to forget what the interrupted run wrote behind the checkpoint
            resumed = self.checkpoint is not None and self.subcommand == "fit"
            purge = {"purge_step": self.loaded["global_step"] + 1} if resumed else {}
            kwargs["logger"] = TensorBoardLogger(run, name="", version="", default_hp_metric=False, **purge)
        self.summary = RunSummary()
        # RunSummary first: its setup tells the other processes the run directory
        callbacks = [self.summary, *(config["callbacks"] or []), PredictionWriter()]
        if config["logger"] is not False and not config["fast_dev_run"]:
            callbacks.append(LearningRateMonitor("step"))
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        return super().instantiate_trainer(
            default_root_dir=str(run), callbacks=callbacks, plugins=[*plugins, AtomicCheckpointIO()], **kwargs
        )

    # ------------------------------------------------------------------------------------------------------- commands

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; one that is refused before it wrote anything leaves no empty run directory."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            with suppress(OSError):
                self.run_directory.rmdir()
            raise

    def after_fit(self) -> None:
        """Test the best checkpoint if the recipe says so, and sum up."""
        callback = self.trainer.checkpoint_callback
        best = callback.best_model_path if isinstance(callback, AdapterCheckpoint) else ""
        if self._get(self.config, "test_after_fit") and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False, weights_only=True
            )
        self._close()

    def after_validate(self) -> None:
        """Sum up."""
        self._close()

    def after_test(self) -> None:
        """Sum up."""
        self._close()

    def after_predict(self) -> None:
        """Sum up."""
        self._close()

    def _close(self) -> None:
        if self.trainer.is_global_zero:
            self.summary.report(self.run_directory)
            print(f"Run directory: {self.run_directory}", flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
        return arguments | quiet | ({"return_predictions": False} if subcommand == "predict" else {})


class SaveRunConfig(SaveConfigCallback):
    """Keep the complete configuration in the run directory: config.yaml, and of a resumed run config-<step>.yaml."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it when a fit begins."""
        if stage != "fit":
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        if path.exists():
            path = path.with_name(f"config-{len(list(path.parent.glob('config*.yaml')))}.yaml")
        self.parser.save(self.config, path, skip_none=False, overwrite=False, multifile=False)
