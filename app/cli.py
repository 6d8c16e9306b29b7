"""Command line: LightningCLI with this project's defaults, precedence of values, run directories and messages."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser

from app.callbacks import (
    AdapterCheckpoint,
    AdapterSpectrum,
    AdapterWriter,
    BankBatches,
    ClassScores,
    ConfusionPicture,
    DataReport,
    Forgetting,
    GeneralizationGap,
    GeneratedSamples,
    LearningRateSearch,
    PredictionWriter,
    RunSummary,
    SaveRunConfig,
    Termination,
    class_names_of,
    nothing_left,
    usable_callbacks,
)
from app.commands import COMMANDS, command_help, command_parser, run_command
from app.commands.program_help import TRAINER_COMMANDS, check_command, program_help
from app.config.classes import CLASS_PATHS, class_keys, expand_class_names, find_classes
from app.config.constructors import constructor_parameters
from app.config.differences import can_change_evaluation
from app.config.fit_keys import FitKeys
from app.config.imports import HELP, denial, resolve, split_imports
from app.config.imports import OPTION as ALLOW_IMPORTS
from app.config.messages import parser_message
from app.config.precedence import (
    SECTIONS,
    changed_keys,
    dotted,
    expanded_path,
    ignore_adapter_path,
    report_changes,
    report_differences,
    report_precision,
    report_untrained,
    run_precision,
    runs_root,
    split_arguments,
    temporary_yaml,
    without_sections,
)
from app.config.program_files import find_program_files, program_command, program_version
from app.config.schema import add_recipe_keys, add_section_keys
from app.config.validation import (
    check_classes,
    check_plain_values,
    check_sections,
    check_strategy,
    check_values,
    check_variant,
)
from app.config.variants import HELP as VARIANT_HELP
from app.config.variants import OPTION as VARIANT
from app.config.variants import command_line_options, split_variant, variant_keys, variant_name
from app.config.yaml_files import LOADER, check_file, checked_yaml, read_yaml
from app.console import (
    console_logging,
    escape_controls,
    output_problem,
    print_error,
    quiet_libraries,
    silence_output,
    traceback_hook,
    watched_output,
)
from app.lightning_compat import HookedCLI, import_policy
from app.run.checkpoint_io import (
    AtomicCheckpointIO,
    check_contents,
    first_new_step,
    has_reached_limit,
    run_of_checkpoint,
    saved_configuration,
)
from app.run.evaluations import is_complete, read_metrics
from app.run.failures import (
    FIXABLE_ERRORS,
    bad_input,
    construction_error,
    is_caused_by,
    is_caused_by_signal,
    is_peer_lost,
    is_worker_lost,
)
from app.run.full_disk import reraise_disk_full
from app.run.logger import RunLogger, check_loggers
from app.run.processes import is_first_rank, leave_process_group, should_report
from app.run.run_directory import (
    load_checkpoint,
    locate_checkpoint,
    locked,
    new_run_directory,
    remove_if_empty,
    remove_links,
)
from app.run.trainers import find_callback
from datamodules.contract import HasKind, HasKinds, HasPaths, HasTestSplit
from datamodules.errors import UsageError
from modules.base import AdaptedModule
from modules.formats.bank import Bank

_log = logging.getLogger(__name__)
T = TypeVar("T", bound=L.Callback)
PAGES: Mapping[str, Callable[[], str]] = {  # Options in place of a command. Each option prints a text.
    "-h": program_help,
    "--help": program_help,
    "--version": lambda: f"onesided {program_version()}",
}
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of the output closed the pipe, as `| head -1` does


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Words of the command line after the program's name; None takes `sys.argv[1:]`.

    Returns:
        Exit code:

        - 0 for success;
        - 1 if a child process was killed or printed a traceback;
        - 2 for wrong use or bad input, with one message on stderr;
        - 130 after Ctrl-C and 143 after SIGTERM, with a line on stderr that names the checkpoint;
        - 141 if the reader of the output closed the pipe.

    Raises:
        Exception: An error that no user can fix. The traceback shows the defect, and Python exits with code 1.
    """
    if args is None:
        sys.excepthook = traceback_hook
    quiet_libraries()
    with Termination() as termination, watched_output(), console_logging():
        try:
            _run(sys.argv[1:] if args is None else args, termination)
            sys.stdout.flush()
        except SystemExit as stop:  # --help
            if termination.requested:
                return termination.report(stop.code if isinstance(stop.code, str) else "")
            if (problem := output_problem()) is not None:  # Rich exits after a failed write.
                return _report_lost_output(problem)
            return stop.code if isinstance(stop.code, int) else 2
        except Exception as error:
            if termination.requested and (is_peer_lost(error) or is_caused_by_signal(error)):
                return termination.report()
            problem = output_problem()
            if problem is not None and is_caused_by(error, problem):
                return _report_lost_output(problem)
            cause = bad_input(error)
            if cause is None:
                raise
            if should_report():
                print_error(parser_message(cause))
            if termination.requested:
                termination.report()
            return 1 if is_worker_lost(error) or (is_peer_lost(error) and termination.has_lost_process()) else 2
        finally:
            leave_process_group()
        return termination.report() if termination.requested else 0  # Other code may catch the signal's exception.


def _run(args: Sequence[str], termination: Termination) -> None:
    """Run one command with restricted imports and checked YAML. Close all contexts at the end."""
    with ExitStack() as contexts:
        allowed, words = split_imports(args)
        contexts.enter_context(restricted_imports(allowed))
        contexts.enter_context(checked_yaml())
        if words[:1] == ["--print_shtab"]:
            print(completion_script(words[1:], contexts))
        elif words and words[0] in PAGES:
            print(PAGES[words[0]]())
        elif words and words[0] in COMMANDS:
            run_command(words[0], words[1:], FIT_KEYS, allowed)
        else:
            check_command(words)
            AsymmetryCLI(words, termination, contexts)


@contextmanager
def restricted_imports(prefixes: Sequence[str] = ()) -> Iterator[None]:
    """Restrict all parsers of this process to the imports that `app.config.imports` allows, inside the context.

    Args:
        prefixes: Additional modules and packages that are allowed, with their functions.

    Raises:
        UsageError: For a prefix that is not a dotted path, or that is jsonargparse itself.
    """
    with ExitStack() as policy:
        try:
            policy.enter_context(import_policy(partial(denial, prefixes=prefixes), list(prefixes)))
        except ValueError as error:
            raise UsageError(f"{ALLOW_IMPORTS}: {error}") from error
        yield


def _report_lost_output(problem: OSError) -> int:
    """Return the exit code for lost output. Report the reason, except for a broken pipe."""
    silence_output()
    if isinstance(problem, BrokenPipeError):
        return BROKEN_PIPE
    print_error(
        f"Standard output cannot be written ({problem.strerror or problem}). The run directory is not affected. "
        "Redirect the output to another place."
    )
    return 2


class _CommandParser(LightningArgumentParser):
    """Parser that rejects abbreviated keys, also in the parsers that jsonargparse creates for nested classes.

    The attribute `commands` is the action that subcommands are added to.
    """

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | keys)

    def add_subcommands(self, *args: Any, **keys: Any) -> Any:
        """Store and return the action that subcommands are added to."""
        self.commands = super().add_subcommands(*args, **keys)
        return self.commands


class AsymmetryCLI(HookedCLI):
    """`fit`, `validate`, `test` and `predict` for every task.

    - The command line beats the checkpoint of `--ckpt_path`. The checkpoint beats the files of `--config`. Options beat
      files even if `--config` comes last. Differences from the checkpoint are logged. An evaluation logs only
      differences that can change its result.
    - An evaluation computes in the precision of the checkpoint's run, unless the command line names another.
    - In a new fit, `--variant` beats the files, and the other options beat `--variant`. On resume, the variant must
      match the checkpoint.
    - A command on a checkpoint of a run directory writes to this run directory. Any other command writes to a new
      directory runs/<recipe>/version_K, or version_K below `trainer.default_root_dir`.
    - `spectrum`, `checkpoint`, `generalization`, `forgetting`, `test_after_fit`, `find_lr` and `name` are top-level
      keys, like `model`, `data` and `trainer`.

    Args:
        args: Words of the command line.
        termination: Handler of SIGTERM and Ctrl-C.
        contexts: Stack of the contexts that are closed when the command ends.
    """

    def __init__(self, args: list[str], termination: Termination, contexts: ExitStack) -> None:
        self.termination, self.contexts = termination, contexts
        self.checkpoint: Path | None = None
        self.loaded: dict[str, Any] = {}  # the checkpoint's content, until AtomicCheckpointIO holds the content
        self.failure: Exception | None = None  # error of a failed constructor
        self.run_directory = Path()
        self.variant: str | None = None
        self.bank: Bank | None = None
        self.files: list[str] = []
        self.options: list[str] = []
        commands = self.subcommands()
        self.helps = bool(args) and args[0] in commands and not {"-h", "--help"}.isdisjoint(args)
        # Building the parsers of the other commands would take most of the time of --help.
        if args and args[0] in commands:
            commands = {args[0]: commands[args[0]]}
            self.subcommands = lambda: commands  # type: ignore[method-assign]
        parser_keys = {"exit_on_error": False, "epilog": HELP}
        command_keys = {name: dict(parser_keys) for name in commands}
        if "fit" in commands:
            command_keys["fit"]["epilog"] = f"{VARIANT_HELP} {HELP}"
        if self.helps:
            _, self.files, self.options = split_arguments(args)
            for name, keys in command_keys.items():
                program = " ".join(program_command())
                keys["description"] = TRAINER_COMMANDS[name]
                keys["usage"] = f"{program} {name} --config RECIPE [--config OVERLAY ...] [--KEY VALUE ...]"
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
            parser_class=_CommandParser,
            parser_kwargs=command_keys | parser_keys,
            args=args,
        )

    # ----------------------------------------------------------------------------------------------------- arguments

    def setup_parser(self, *args: Any, **keys: Any) -> None:
        """Create the parsers. Without a command, add the parsers of `COMMANDS`, so that --help lists each command."""
        super().setup_parser(*args, **keys)
        if len(self.subcommands()) > 1:
            assert isinstance(self.parser, _CommandParser)
            for name in COMMANDS:
                self.parser.commands.add_subcommand(name, command_parser(name), help=command_help(name))

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed. Lightning's help of the key has typing errors."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="Seed of all random numbers. With true, the seed is random.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the top-level keys that Lightning does not have."""
        self.command_parser = parser  # the parser of the command that the command line names, if any
        parser.add_lightning_class_args(AdapterSpectrum, "spectrum")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GeneralizationGap, "generalization")
        parser.add_lightning_class_args(Forgetting, "forgetting")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the best checkpoint when fit has ended."
        )
        parser.add_argument(
            "--find_lr", type=bool, default=False, help="Search for model.learning_rate before a new fit trains."
        )
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of a new run, part of its directory's name."
        )
        if list(self.subcommands()) == ["predict"]:
            parser.add_argument(
                "--bank",
                metavar="FILE",
                type=str | None,
                default=None,
                help="Bank of adapters. Each row is predicted with the adapter that data.adapter_column names.",
            )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data. Model and data are optional, since a checkpoint may contain them.

        For --help, each key of model and data is added, before the keys of the trainer.
        """
        if self.helps:
            add_section_keys(parser, find_classes(self.files, self.options))
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        if not self.helps:
            _add_sections(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files and command line. With a checkpoint, parse again: files, checkpoint, then options."""
        if self.helps:
            self.command_parser.print_help()
            raise SystemExit(0)
        command, names, options = split_arguments(args)
        for name in names:
            check_file(name)
        files = [word for name in names for word in ("--config", name)]
        variant, options = split_variant(command, options)
        options = expand_class_names(options)
        self.variant, self.files, self.options = variant, names, options
        of_variant = [] if variant is None else command_line_options(variant_keys(variant))
        self.config = self._parse_without_checkpoint([*command, *files], [*of_variant, *options])
        self.subcommand = self.config["subcommand"]
        final = self.config[self.subcommand]
        if self.subcommand in COMMANDS or (final.ckpt_path is not None and not command):
            raise UsageError(f"{self.subcommand} must come first on the command line, before all options.")
        self.root = runs_root(final.trainer.default_root_dir, names)
        if final.ckpt_path is None:
            _check(final)
            if variant is not None:
                _log.info(f"{VARIANT} {variant} sets {', '.join(of_variant).replace('--', '')}.")
            return
        trains = self.subcommand == "fit"
        given = str(expanded_path("ckpt_path", str(final.ckpt_path)))
        wanted = locate_checkpoint(given, self.root, prefer_best=not trains)
        run = run_of_checkpoint(wanted)
        if given == "last":
            _log.info(f"ckpt_path: last is {run}, the newest run with a checkpoint below {self.root}.")
        if trains and wanted.parent.is_dir():  # a folder of another kind is refused below, and gets no file
            self._lock(run)
        self.checkpoint, self.loaded = load_checkpoint(given, wanted)
        check_contents(self.checkpoint, self.loaded, trains)
        if trains:
            self.termination.checkpoint = self.checkpoint
        saved = check_classes(self.checkpoint, saved_configuration(self.loaded), final, trains)
        if variant is not None:
            check_variant(variant, final, saved)
        from_files = self._parse([*command, *files], defaults=False)[self.subcommand]
        settings = {} if trains else run_precision(run)
        with temporary_yaml(saved | settings) as path:
            self.config = self._parse([*command, *files, "--config", path, *options])
        from_words, final = final, self.config[self.subcommand]
        _check(final)
        final["ckpt_path"] = str(self.checkpoint)
        ignore_adapter_path(from_files, final)
        report_precision(settings, from_files, final)
        reads_splits = self.subcommand != "predict" or final.data.init_args.get("predict_path") is None
        reported = (lambda _: True) if trains else partial(can_change_evaluation, reads_splits=reads_splits)
        keys_of_variant = {} if variant is None else variant_keys(variant)
        report_differences(saved, from_files, keys_of_variant, from_words, final, reported)
        if trains and run is not None and (run / "config.yaml").is_file():
            report_changes(read_yaml(str(run / "config.yaml")), final)

    def _parse_without_checkpoint(self, words: list[str], options: list[str]) -> Namespace:
        """Parse files and command line. Omit options of model and data if only a checkpoint names their classes."""
        try:
            return self._parse([*words, *options])
        except ArgumentError:
            others = without_sections(options)
            if others == options:
                raise
            config = self._parse([*words, *others])
            if config["subcommand"] in COMMANDS:
                raise
            if config[config["subcommand"]].get("ckpt_path") is None:
                check_sections(config[config["subcommand"]])  # A key without a class needs a recipe.
                raise
            return config

    def _parse(self, words: list[str], **keys: Any) -> Namespace:
        """Parse words. Convert an unexpected exception to UsageError too, since a value caused the exception."""
        command, *others = words or [""]
        try:
            if command not in self.subcommands():
                return self.parser.parse_args(words, **keys)
            # The parser of all commands would complete and validate each value twice.
            config = self.command_parser.parse_args(others, **keys)
            return Namespace(subcommand=command, **{command: config})  # type: ignore[no-untyped-call]
        except Exception as error:
            cause = bad_input(error)
            if cause is not None and not isinstance(cause, ArgumentError):
                raise
            raise UsageError(parser_message(cause or error, self._known_keys)) from error

    def _known_keys(self) -> list[str]:
        """Return the keys of the command, with those of the classes that files and options name."""
        known = list(self.command_parser.get_defaults().keys())
        for section, kind in find_classes(self.files, self.options).items():
            known += class_keys(kind, section)
        return known

    def _lock(self, run: Path | None) -> None:
        """On the first rank, lock a run directory against training by other processes."""
        if run is not None and run.is_dir() and is_first_rank():
            self.contexts.enter_context(locked(run))

    # ------------------------------------------------------------------------------------------------------- classes

    def before_instantiate_classes(self) -> None:
        """Check the strategy, the values of model and data, and that the model accepts the kind of data.

        With `model.adapter_path`, both factors come from a file, so `init_a` and `init_b` become `given`.
        """
        config = self.config[self.subcommand]
        check_strategy(config.trainer.strategy)
        values = config.model.init_args
        if self.subcommand == "predict":
            self._open_bank(config)
        if values.get("adapter_path") is not None and values.adapter is not None:
            values.adapter.init_a = values.adapter.init_b = "given"
        paths = [config[section].class_path for section in SECTIONS]
        model, data = classes = [resolve_name(path) for path in paths]
        for section, owner in zip(SECTIONS, classes, strict=True):
            # Save the current class path, even if the recipe has an earlier name of the class.
            config[section].class_path = f"{owner.__module__}.{owner.__qualname__}"
            hints = {name: parameter.annotation for name, parameter in constructor_parameters(owner).items()}
            for name, value in config[section].init_args.items(branches=True, nested=False):
                check_values(f"{section}.{name}", hints.get(name, Any), value)
        if isinstance(data, HasKind) and isinstance(model, HasKinds) and data.kind not in model.kinds:
            takes = " or ".join(model.kinds)
            raise UsageError(
                f"data: {paths[1]} gives {data.kind}, but {paths[0]} takes {takes}. Change --data or --model."
            )

    def _open_bank(self, config: Namespace) -> None:
        """Open the bank of `--bank`, and give the model the bank's classes.

        Raises:
            UsageError: If `--ckpt_path` is given too, or `data.adapter_column` is set without a bank.
            AdapterError: If the file is no bank, or its adapters have different tasks.
        """
        values, column = config.model.init_args, config.data.init_args.get("adapter_column")
        if config.bank is None:
            if column is not None:
                raise UsageError(f"data.adapter_column: {column} names adapters of a bank. Give --bank FILE.")
            return
        if config.ckpt_path is not None:
            raise UsageError("ckpt_path: the adapters of --bank replace a checkpoint's. Give one of the two.")
        self.bank = Bank.open(expanded_path("bank", config.bank))
        classes = class_names_of(self.bank)
        if "class_names" in values and classes is not None:
            values.class_names = classes
            if "metrics" in values and values.metrics is None:
                values.metrics = ["accuracy"] if classes else ["pearson"]

    def construct(self, kind: type, build: Callable[[], Any]) -> Any:
        """Construct a class. Store an error, since the parser of a union would hide the error."""
        try:
            return super().construct(kind, build)
        except Exception as error:
            self.failure = construction_error(self.config[self.subcommand], kind, error)
            raise

    def instantiate_classes(self) -> None:
        """Construct the classes that the configuration names, and the trainer.

        Raises:
            UsageError: If a constructor fails. The message names the key or the class. An error of `FIXABLE_ERRORS`
                is raised unchanged.
            DataError: If a path of the data is wrong.
        """
        if self.subcommand == "fit" and self.checkpoint is not None:
            self._end_if_finished(self.checkpoint)
        data = self.config[self.subcommand].data
        kind = resolve_name(data.class_path)
        if isinstance(kind, HasPaths) and "path" in data.init_args:  # checked before a backbone is loaded
            kind.check_paths(str(self.subcommand), data.init_args)
        try:
            super().instantiate_classes()
        except Exception as error:
            if self.failure is not None:
                raise self.failure from None  # The failure may itself be a cause of `error`.
            if bad_input(error) is None:
                raise UsageError(parser_message(error)) from error
            raise

    def _end_if_finished(self, checkpoint: Path) -> None:
        """End the command if a resumed run has all its results and no key has changed since its fit.

        Raises:
            SystemExit: With code 0, before any file of the run directory is written.
        """
        config, run = self.config.fit, run_of_checkpoint(checkpoint)
        if run is None or not (run / "config.yaml").is_file():
            return
        limits = {key: config.trainer[key] for key in ("max_epochs", "max_steps", "max_time")}
        reached = has_reached_limit(self.loaded, limits["max_epochs"], limits["max_steps"])
        if not reached or not is_complete(read_metrics(run), config.test_after_fit):
            return
        now = self.command_parser.dump(config, skip_none=False, skip_validation=True)
        written, saved = read_yaml(str(run / "config.yaml")), saved_configuration(self.loaded)
        if changed_keys(written, saved, yaml.load(now, LOADER)):
            return
        epochs = self.loaded["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        _log.info(nothing_left(epochs, self.loaded["global_step"], limits))
        if is_first_rank():
            _print_run_directory(run)
        raise SystemExit(0)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Construct the trainer with the run directory, its logger, and the callbacks that every run has.

        Raises:
            UsageError: If a key of the trainer has a value that cannot be used.
        """
        self.failure = None  # A failed alternative of a union is harmless if another alternative was constructed.
        config = self.config_init[self.subcommand].trainer
        for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if config[key] is not None and config[key] < 1:
                raise UsageError(f"trainer.{key}: {config[key]} must be 1 or more.")
        if config.use_distributed_sampler:
            raise UsageError(
                "trainer.use_distributed_sampler: true would split the rows twice, since the data modules split "
                "them among the processes. Set the key to false."
            )
        resumed = self.checkpoint is not None and self.subcommand == "fit"
        searches = self.subcommand == "fit" and self.config_init.fit.find_lr
        finder = [LearningRateSearch()] if searches else []
        own_callbacks = usable_callbacks([*finder, *_as_list(config.callbacks)], resumed)
        self.run_directory = run = self._enter_run_directory()
        logs = self.subcommand != "predict" and not config.fast_dev_run
        if self.subcommand == "predict":
            kwargs["logger"] = False
        elif logs and config.logger in (None, True):
            # on resume, TensorBoard drops the events that the interrupted run wrote after the checkpoint
            purge: dict[str, Any] = {"purge_step": first_new_step(self.loaded)} if resumed else {}
            kwargs["logger"] = RunLogger(run, name="", version="", default_hp_metric=False, **purge)
        self.summary = RunSummary()
        callbacks = [
            self.summary,  # First, since the setup of RunSummary broadcasts the run directory.
            DataReport(),
            *own_callbacks,
            ConfusionPicture(),
            ClassScores(),
            GeneratedSamples(),
            *([] if self.bank is None else [BankBatches(self.bank)]),
            PredictionWriter(),
            AdapterWriter(),
            self.termination,
            *([LearningRateMonitor("step")] if logs and config.logger is not False else []),
        ]
        plugins = [*_as_list(config.plugins), AtomicCheckpointIO(self.checkpoint, self.loaded)]
        self.loaded = {}
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=str(run), callbacks=callbacks, plugins=plugins, **kwargs
            )
        except Exception as error:
            if isinstance(bad_input(error), FIXABLE_ERRORS):
                raise
            needs_accelerator = config.accelerator not in ("auto", "cpu")
            hint = " On a machine without this accelerator add --config conf/cpu.yaml." if needs_accelerator else ""
            raise UsageError(f"trainer: {error}{hint}") from error
        check_loggers(trainer.loggers)
        return trainer

    def _enter_run_directory(self) -> Path:
        """Return the checkpoint's run directory, or a new run directory.

        A new run directory is removed if the command fails before a configuration or metrics are written. Only the
        first rank makes a new directory. The other ranks return the root, and `RunSummary` broadcasts the directory.
        """
        run = run_of_checkpoint(self.checkpoint) if self.checkpoint else None
        if run is not None and is_first_rank():
            remove_links(run)
        elif run is None and is_first_rank():
            run = new_run_directory(self.root, self._label())
            if self.subcommand == "fit":
                self._lock(run)
            self.contexts.enter_context(remove_if_empty(run))
        self.contexts.enter_context(reraise_disk_full(run or self.root))
        return run or self.root

    def _label(self) -> str:
        """Return the suffix of a new run directory: `--name` and the variant, once if they are equal.

        With `--name` alone, the variant is the built-in variant whose keys the configuration has, if any. Without
        `--name` and `--variant`, the suffix is empty.

        Raises:
            UsageError: If the name is empty or has a character that is not allowed.
        """
        config = self.config[self.subcommand]
        name = config.name
        if name is not None and not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(
                f"name: {name!r} is not allowed. Use letters, digits and . _ + - only. Do not begin with . + or -."
            )
        variant = self.variant
        if variant is None and name is not None:
            matching = variant_name(dotted({"model": config.model.init_args.as_dict()}))
            variant = None if matching == "custom" else matching
        return "".join(f"-{part}" for part in dict.fromkeys((name, variant)) if part is not None)

    # ------------------------------------------------------------------------------------------------------- commands

    def fit(self, **arguments: Any) -> None:
        """Train, test the best checkpoint if `test_after_fit` is true, and report the results."""
        trainer, tests = self.trainer, bool(self.config[self.subcommand].test_after_fit)
        forgetting = self._callback(Forgetting)
        forgetting.waits_for_test = tests
        # A missing test split must fail before a long training.
        if tests and isinstance(self.datamodule, HasTestSplit):
            self.datamodule.check_test_split()
        trainer.fit(**arguments | {"weights_only": True})
        if tests and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            best = self._callback(AdapterCheckpoint).best_model_path or None
            if best is None:
                _log.warning("Nothing was validated, so there is no best checkpoint. The last weights are tested.")
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False, weights_only=True)
        self.summary.values |= forgetting.values | self._callback(GeneralizationGap).measure(trainer, self.model)
        self._report_results()

    def validate(self, **arguments: Any) -> None:
        """Validate, and report the results."""
        self._evaluate(self.trainer.validate, arguments, verbose=False)

    def test(self, **arguments: Any) -> None:
        """Test, and report the results."""
        self._evaluate(self.trainer.test, arguments, verbose=False)

    def predict(self, **arguments: Any) -> None:
        """Write predictions, and report the results."""
        self._evaluate(self.trainer.predict, arguments, return_predictions=False)

    def _evaluate(self, command: Callable[..., Any], arguments: dict[str, Any], **options: bool) -> None:
        if self.checkpoint is None and self.bank is None:
            report_untrained(str(self.subcommand), self.model.head_names, self.model.adapter_path)
        command(**arguments | options | {"weights_only": True})
        self._report_results()

    def _callback(self, kind: type[T]) -> T:
        callback = find_callback(self.trainer, kind)
        assert callback is not None
        return callback

    def _report_results(self) -> None:
        if self.trainer.is_global_zero:
            self.summary.report(self.trainer, self.run_directory)
            _print_run_directory(self.run_directory)


def _add_sections(parser: LightningArgumentParser) -> None:
    """Add model and data, whose classes the configuration names."""
    for section, kind in zip(SECTIONS, (AdaptedModule, L.LightningDataModule), strict=True):
        parser.add_lightning_class_args(kind, section, subclass_mode=True, required=False)


def _check(final: Namespace) -> None:
    """Check the values of a command, before any class is constructed."""
    find_program_files(final)
    check_sections(final)
    check_plain_values("", final.as_dict())


def _print_run_directory(run: Path) -> None:
    print(f"Run directory: {escape_controls(str(run))}", flush=True)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# ------------------------------------------------------------------------------------------------------- keys of a fit


class _Result(Exception):
    """Exception that carries a result out of the constructor of a command line."""


class _ParsedFit(AsymmetryCLI):
    """Command line of a fit that is only parsed and validated."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raise a `_Result` with the configuration."""
        super().parse_arguments(parser, args)
        self.before_instantiate_classes()
        raise _Result(self.config["fit"])


class _RecipeParser(AsymmetryCLI):
    """Command line that only builds the parser of a fit, with the keys of given classes."""

    def __init__(self, classes: Mapping[str, type], contexts: ExitStack) -> None:
        self.classes = classes
        super().__init__(["fit"], Termination(), contexts)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data."""
        add_recipe_keys(parser, self.classes)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raise a `_Result` with the parser."""
        raise _Result(parser)


class _FitDefaults(AsymmetryCLI):
    """Command line of a fit that only returns the defaults of its keys."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raise a `_Result` with the defaults."""
        raise _Result(self.command_parser.get_defaults())


class _AllCommandsParser(AsymmetryCLI):
    """Command line that only builds the parser of all commands, under the name of the installed program."""

    def __init__(self, contexts: ExitStack) -> None:
        super().__init__([], Termination(), contexts)

    def init_parser(self, **keys: Any) -> LightningArgumentParser:
        """Create the parser with the program name `onesided`."""
        return super().init_parser(prog="onesided", **keys)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data.

        `trainer.strategy` takes any text: with the keys of all strategies, the script of bash has 100 MB.
        """
        parser.add_class_arguments(self.trainer_class, "trainer", skip={"strategy"}, fail_untyped=False)
        parser.add_argument("--trainer.strategy", type=str)
        _add_sections(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raise a `_Result` with the parser."""
        raise _Result(parser)


def completion_script(words: Sequence[str], contexts: ExitStack) -> str:
    """Return the script by which a shell completes commands and keys of `onesided`.

    Raises:
        UsageError: Without exactly one name of a shell, or for a shell that shtab does not know.
    """
    if len(words) != 1:
        raise UsageError("--print_shtab: give one shell, such as bash or zsh.")
    for path in (path for paths in CLASS_PATHS.values() for path in paths.values()):
        resolve(path)  # The parser completes only the keys of imported classes.
    parser: ArgumentParser = _result(partial(_AllCommandsParser, contexts))
    try:
        return parser.get_completion_script(f"shtab-{words[0]}")
    except ValueError as error:
        raise UsageError(f"--print_shtab: {error} Give a shell that the package shtab supports.") from error


def parse_fit(words: Sequence[str]) -> Namespace:
    """Return the configuration of `fit WORDS`, parsed and validated, without constructing anything.

    Raises:
        UsageError: If `fit` would reject the words.
    """
    with ExitStack() as contexts:
        config: Namespace = _result(partial(_ParsedFit, ["fit", *words], Termination(), contexts))
    return config


def fit_parser(classes: Mapping[str, type]) -> ArgumentParser:
    """Return a parser of `fit` with the keys of the given classes, by section."""
    with ExitStack() as contexts:
        parser: ArgumentParser = _result(partial(_RecipeParser, classes, contexts))
    return parser


def fit_defaults() -> Namespace:
    """Return the defaults of the keys of `fit`."""
    with ExitStack() as contexts:
        defaults: Namespace = _result(partial(_FitDefaults, ["fit"], Termination(), contexts))
    return defaults


FIT_KEYS = FitKeys(parse_fit, fit_parser, fit_defaults)


def _result(construct: Callable[[], AsymmetryCLI]) -> Any:
    try:
        construct()
    except _Result as result:
        return result.args[0]
    raise AssertionError("The constructor of the command line has raised no result.")
