"""Command line: LightningCLI with this project's defaults, precedence of values, run directories and messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from app.arguments import (
    SECTIONS,
    check_classes,
    check_keys,
    check_plain_values,
    check_sections,
    check_strategy,
    check_values,
    check_variant,
    expanded_path,
    ignore_adapter_path,
    report_changes,
    report_differences,
    report_untrained,
    runs_root,
    saved_configuration,
    split_arguments,
    temporary_yaml,
    without_sections,
)
from app.callbacks import (
    AdapterCheckpoint,
    AdapterSpectrum,
    AdapterWriter,
    ConfusionPicture,
    DataReport,
    Forgetting,
    GeneralizationGap,
    GeneratedSamples,
    PredictionWriter,
    RunSummary,
    SaveRunConfig,
    Termination,
    usable_callbacks,
)
from app.checkpoint_io import AtomicCheckpointIO, check_contents, first_new_step, restore_identity, run_of_checkpoint
from app.commands import COMMANDS, command_help, command_parser, run_command
from app.console import (
    console_logging,
    escape_controls,
    output_problem,
    print_error,
    silence_output,
    traceback_hook,
    watched_output,
)
from app.constructors import constructor_parameters
from app.failures import bad_input, construction_error, is_caused_by
from app.files import reraise_disk_full
from app.imports import HELP, restricted_imports, split_imports
from app.lightning_compat import hyperparameter_instantiator, subcommand_keys
from app.messages import parser_message, quiet_libraries
from app.processes import is_first_rank, is_peer_lost, is_worker_lost, leave_process_group, should_report
from app.program_files import find_program_files
from app.run_directory import (
    load_checkpoint,
    locate_checkpoint,
    locked,
    new_run_directory,
    remove_if_empty,
    remove_links,
)
from app.run_logger import RunLogger
from app.variants import HELP as VARIANT_HELP
from app.variants import OPTION as VARIANT
from app.variants import option_words, split_variant, variant_keys
from app.yaml_files import check_file, checked_yaml, read_yaml
from datamodules.contract import HasKind, HasKinds, HasTestSplit
from modules.base import AdaptedModule

_log = logging.getLogger(__name__)
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of the output has gone, as with `| head -1`


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Words of the command line behind the program's name; None takes the process's own.

    Returns:
        Exit code: 0 for success; 2 for wrong use or bad input, reported in one message on stderr; 1 when a process that
        this one started was killed or shows a traceback; 143 when SIGTERM stopped it and 130 when Ctrl-C
        did, with a line on stderr that names the checkpoint.
    """
    if args is None:
        sys.excepthook = traceback_hook
    quiet_libraries()
    with Termination() as termination, ExitStack() as held:
        held.enter_context(watched_output())
        held.enter_context(console_logging())
        try:
            allowed, words = split_imports(sys.argv[1:] if args is None else args)
            held.enter_context(restricted_imports(allowed))
            held.enter_context(checked_yaml())
            if words and words[0] in COMMANDS:
                run_command(words[0], words[1:], allowed)
            else:
                AsymmetryCLI(words, termination, held)
            sys.stdout.flush()
        except SystemExit as stop:  # --help
            if termination.requested:
                return termination.report(stop.code if isinstance(stop.code, str) else "")
            if (problem := output_problem()) is not None:  # after which rich exits
                return _lost_output(problem)
            return stop.code if isinstance(stop.code, int) else 2
        except Exception as error:
            if termination.requested and (is_peer_lost(error) or termination.has_caused(error)):
                return termination.report()
            problem = output_problem()
            if problem is not None and is_caused_by(error, problem):
                return _lost_output(problem)
            cause = bad_input(error)
            if cause is None:
                raise
            if should_report():
                print_error(parser_message(cause))
            if termination.requested:
                termination.report()
            return 1 if is_worker_lost(error) or (is_peer_lost(error) and termination.lost_one()) else 2
        finally:
            leave_process_group()
        return termination.report() if termination.requested else 0  # something has swallowed what the signal raised


def _lost_output(problem: OSError) -> int:
    """Return the exit code for output that cannot be written, and report the reason if a reader is left."""
    silence_output()
    if isinstance(problem, BrokenPipeError):
        return BROKEN_PIPE
    print_error(
        f"Standard output cannot be written ({problem.strerror or problem}). The run directory is not affected: send "
        "the output elsewhere."
    )
    return 2


class AsymmetryCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` for every task.

    - The command line beats the checkpoint of `--ckpt_path`, which beats the files of `--config`, whatever their order.
      What differs from the checkpoint is logged.
    - `--variant` of a new fit stands between the files and the other options; on resume it must fit the checkpoint.
    - A run writes to runs/<recipe>/version_K, a new one each time; a command on a checkpoint writes to its run.
    - `spectrum`, `checkpoint`, `generalization`, `forgetting` and `test_after_fit` are keys beside `model`, `data` and
      `trainer`.

    Args:
        args: Words of the command line.
        termination: Handler of SIGTERM and Ctrl-C.
        held: Contexts to leave when the command has ended.
    """

    def __init__(self, args: list[str], termination: Termination, held: ExitStack) -> None:
        self.termination, self.held = termination, held
        self.checkpoint: Path | None = None
        self.loaded: dict[str, Any] = {}  # the checkpoint's content, until Lightning takes it
        self.failed: tuple[Exception, Exception] | None = None  # a constructor's error, and the one to report
        self.made: Path | None = None  # a new run directory
        self.run_directory = Path()
        commands = self.subcommands()
        if args and args[0] in commands:  # the parsers of the others would take most of the time of --help
            commands = {args[0]: commands[args[0]]}
            self.subcommands = lambda: commands  # type: ignore[method-assign]
        strict = {"exit_on_error": False, "allow_abbrev": False, "epilog": HELP}  # no guessing of --trainer.max_epoch
        of_commands = {name: dict(strict) for name in commands}
        if "fit" in commands:
            of_commands["fit"]["epilog"] = f"{VARIANT_HELP} {HELP}"
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
            parser_kwargs=of_commands | strict,
            args=args,
        )

    # ----------------------------------------------------------------------------------------------------- arguments

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name in COMMANDS:  # for --help; `main` runs them
            parser._subcommands_action.add_subcommand(name, command_parser(name), help=command_help(name))  # type: ignore[union-attr]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys beside Lightning's own."""
        parser.add_lightning_class_args(AdapterSpectrum, "spectrum")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GeneralizationGap, "generalization")
        parser.add_lightning_class_args(Forgetting, "forgetting")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the best checkpoint when fit has ended."
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; the latter two may come from a checkpoint."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        for section, kind in zip(SECTIONS, (AdaptedModule, L.LightningDataModule), strict=True):
            parser.add_lightning_class_args(kind, section, subclass_mode=True, required=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files and command line; if they name a checkpoint, parse again with its values in between."""
        command, names, options = split_arguments(args)
        for name in names:
            check_file(name)
        files = [word for name in names for word in ("--config", name)]
        variant, options = split_variant(command, options)
        of_variant = [] if variant is None else option_words(variant_keys(variant))
        self.config = self._parse_without_checkpoint([*command, *files], [*of_variant, *options])
        self.subcommand = self.config["subcommand"]
        if self.subcommand in COMMANDS:
            raise ArgumentError(None, f"Nothing may stand before {self.subcommand} on the command line.")
        final = self.config[self.subcommand]
        self.root = runs_root(final.trainer.default_root_dir, names)
        if final.ckpt_path is None:
            self._check(final, options)
            if variant is not None:
                _log.info(f"{VARIANT} {variant} sets {', '.join(of_variant).replace('--', '')}.")
            return
        if not command:
            raise ArgumentError(None, f"Nothing may stand before {self.subcommand} on the command line.")
        trains = self.subcommand == "fit"
        given = str(expanded_path("ckpt_path", str(final.ckpt_path)))
        wanted = locate_checkpoint(given, self.root, prefer_best=not trains)
        run = run_of_checkpoint(wanted)
        if trains:
            self._take(run)
        self.checkpoint, self.loaded = load_checkpoint(given, wanted)
        check_contents(self.checkpoint, self.loaded, trains)
        if trains:
            self.termination.checkpoint = self.checkpoint
        saved = check_classes(saved_configuration(self.loaded), final, trains)
        if variant is not None:
            check_variant(variant, final, saved)
        from_files = self._parse([*command, *files], defaults=False)[self.subcommand]
        with temporary_yaml(saved) as path:
            self.config = self._parse([*command, *files, "--config", path, *options])
        final = self.config[self.subcommand]
        self._check(final, options)
        final["ckpt_path"] = str(self.checkpoint)
        ignore_adapter_path(from_files, final)
        report_differences(saved, from_files, final)
        if trains and run is not None and (run / "config.yaml").is_file():
            report_changes(read_yaml(str(run / "config.yaml")), final)

    def _parse_without_checkpoint(self, words: list[str], options: list[str]) -> Namespace:
        """Parse files and command line.

        Options of a class that only the checkpoint names are left out, if the parser does not take them yet.
        """
        try:
            return self._parse([*words, *options])
        except ArgumentError:
            others = without_sections(options)
            if others == options:
                raise
            config = self._parse([*words, *others])
            if config["subcommand"] in COMMANDS or config[config["subcommand"]].get("ckpt_path") is None:
                raise
            return config

    def _parse(self, words: list[str], **keys: Any) -> Namespace:
        """Parse words; whatever goes wrong is the fault of a value.

        Raises:
            ArgumentError: With the reason.
        """
        try:
            return self.parser.parse_args(words, **keys)
        except Exception as error:
            cause = bad_input(error)
            if cause is not None and not isinstance(cause, ArgumentError):
                raise
            known = subcommand_keys(self, words[0]) if words else []
            raise ArgumentError(None, parser_message(cause or error, known)) from error

    def _check(self, final: Namespace, options: list[str]) -> None:
        """Check the values of a command, before any class is constructed."""
        find_program_files(final)
        check_sections(final)
        check_keys(options, final)
        check_plain_values("", final.as_dict())

    def _take(self, run: Path | None) -> None:
        """Lock a run directory against other processes that would train there; of this run's, the first one does so."""
        if run is not None and run.is_dir() and is_first_rank():
            self.held.enter_context(locked(run))
            restore_identity(run)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: `parse_arguments` did, while Lightning would let the checkpoint beat the command line."""

    def _add_instantiators(self) -> None:
        """Watch each construction of a class that the configuration names."""
        for section, kind in zip(SECTIONS, (AdaptedModule, L.LightningDataModule), strict=True):
            build = hyperparameter_instantiator(self, section)
            self.parser.add_instantiator(partial(self._construct_section, build), kind)
        self.parser.add_instantiator(self._construct, object)

    def _construct_section(
        self, build: Callable[..., Any], kind: type, applied_instantiation_links: dict[str, Any], **keys: Any
    ) -> Any:
        links = {"applied_instantiation_links": applied_instantiation_links}
        return self._construct(kind, build=partial(build, kind, **links), **keys)

    def _construct(self, kind: type, *args: Any, build: Callable[..., Any] | None = None, **keys: Any) -> Any:
        """Construct a class, and remember the error if that fails: a parser of unions would hide the error."""
        try:
            return (build or kind)(*args, **keys)
        except Exception as error:
            self.failed = error, construction_error(self.config[self.subcommand], kind, error)
            raise

    def before_instantiate_classes(self) -> None:
        """Check that the data are of a kind that the model takes; an adapter file brings both factors."""
        check_strategy(self._get(self.config, "trainer").strategy)
        values = self._get(self.config, "model").init_args
        if values.get("adapter_path") is not None and values.adapter is not None:
            values.adapter.init_a = values.adapter.init_b = "given"
        paths = [self._get(self.config, section).class_path for section in SECTIONS]
        model, data = classes = [resolve_name(path) for path in paths]
        for section, owner in zip(SECTIONS, classes, strict=True):
            # an earlier name of the class is not written to the run
            self._get(self.config, section).class_path = f"{owner.__module__}.{owner.__qualname__}"
            hints = {name: parameter.annotation for name, parameter in constructor_parameters(owner).items()}
            for name, value in self._get(self.config, section).init_args.items(branches=True, nested=False):
                check_values(f"{section}.{name}", hints.get(name, Any), value)
        if isinstance(data, HasKind) and isinstance(model, HasKinds) and data.kind not in model.kinds:
            takes = " or ".join(model.kinds)
            raise ArgumentError(
                None, f"data: {paths[1]} gives {data.kind}, and {paths[0]} takes {takes}; change one of them."
            )

    def instantiate_classes(self) -> None:
        """Construct what the configuration names; errors of the constructors are faults of its values.

        Raises:
            ArgumentError: With the class, for an error of a constructor.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            if self.failed is not None and (self.failed[0] in (error, bad_input(error)) or bad_input(error) is None):
                raise self.failed[1] from error
            if bad_input(error) is None:
                raise ArgumentError(None, parser_message(error)) from error
            raise

    # -------------------------------------------------------------------------------------------------------- trainer

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Choose the run directory, its logger, and the callbacks that every run has."""
        config = self._get(self.config_init, "trainer")
        for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if config[key] is not None and config[key] < 1:
                raise ArgumentError(None, f"trainer.{key}: {config[key]} must be 1 or more.")
        resumed = self.checkpoint is not None and self.subcommand == "fit"
        own_callbacks = usable_callbacks(_as_list(config["callbacks"]), resumed)
        run = run_of_checkpoint(self.checkpoint) if self.checkpoint else None
        if run is not None and is_first_rank():
            remove_links(run)
        if run is None and is_first_rank():
            run = self.made = new_run_directory(self.root)
            if self.subcommand == "fit":
                self._take(run)
        run = run or self.root  # until the first process tells the others
        self.run_directory = run
        if self.subcommand == "predict":  # which logs nothing
            kwargs["logger"] = False
        elif config["logger"] in (None, True) and not config["fast_dev_run"]:
            # on resume, TensorBoard is told to forget what the interrupted run wrote behind the checkpoint
            purge: dict[str, Any] = {"purge_step": first_new_step(self.loaded)} if resumed else {}
            kwargs["logger"] = RunLogger(run, name="", version="", default_hp_metric=False, **purge)
        self.summary = RunSummary()
        # RunSummary first: its setup tells the other processes the run directory
        callbacks = [
            self.summary,
            DataReport(),
            *own_callbacks,
            ConfusionPicture(),
            GeneratedSamples(),
            PredictionWriter(),
            AdapterWriter(),
            self.termination,
        ]
        if config["logger"] is not False and not config["fast_dev_run"] and self.subcommand != "predict":
            callbacks.append(LearningRateMonitor("step"))
        plugins = [*_as_list(config["plugins"]), AtomicCheckpointIO(self.checkpoint, self.loaded)]
        self.loaded = {}
        with remove_if_empty(self.made):
            try:
                return super().instantiate_trainer(
                    default_root_dir=str(run), callbacks=callbacks, plugins=plugins, **kwargs
                )
            except Exception as error:
                lightnings = isinstance(error, ValueError | TypeError | MisconfigurationException)
                if bad_input(error) is not None and not lightnings:
                    raise
                raise ArgumentError(None, f"trainer: {error}") from error

    # ------------------------------------------------------------------------------------------------------- commands

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit" and self.checkpoint is None:
            report_untrained(subcommand, self.model.head_names, self.model.adapter_path)
        with remove_if_empty(self.made), reraise_disk_full(self.run_directory):
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Check before a long training that there is a split to test on."""
        tests = bool(self._get(self.config, "test_after_fit"))
        next(c for c in self.trainer.callbacks if isinstance(c, Forgetting)).waits_for_test = tests  # type: ignore[attr-defined]
        if tests and isinstance(self.datamodule, HasTestSplit):
            self.datamodule.check_test_split()

    def after_fit(self) -> None:
        """Test the best checkpoint if the recipe says so, compare with training rows, and sum up."""
        if self._get(self.config, "test_after_fit") and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            best = next(c.best_model_path for c in self.trainer.callbacks if isinstance(c, AdapterCheckpoint))  # type: ignore[attr-defined]
            if not best:
                _log.warning("There is no best checkpoint, since nothing was validated: the last weights are tested.")
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False, weights_only=True
            )
        forgetting = next(c for c in self.trainer.callbacks if isinstance(c, Forgetting))  # type: ignore[attr-defined]
        gap = next(c for c in self.trainer.callbacks if isinstance(c, GeneralizationGap))  # type: ignore[attr-defined]
        self.summary.values |= forgetting.values | gap.measure(self.trainer, self.model)
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
            print(f"Run directory: {escape_controls(str(self.run_directory))}", flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
        return arguments | quiet | ({"return_predictions": False} if subcommand == "predict" else {})


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
