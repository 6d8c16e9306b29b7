"""Read and validate the file of a sweep: variants, search, selection and confirmation."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError

from app.config.fit_keys import ParseFit
from app.config.program_files import find_program_file
from app.config.variants import VARIANTS, VariantError, variant_keys
from app.config.yaml_files import check_file, check_yaml, read_yaml
from app.sweep.recipe import Recipe
from datamodules.errors import UsageError, counted

T = TypeVar("T")
Point = dict[str, Any]  # the searched keys with their values
PRUNERS = ("none", "median", "halving", "hyperband")
MODES = ("max", "min")
KEYS = ("base", "set", "variants", "search", "select", "confirm", "trials_per_variant", "prune")
MONITOR = "checkpoint.monitor"  # value of select.metric that means the recipe's monitored metric
RANK = ("model.adapter.rank", "model.adapter.alpha")  # keys that times_rank multiplies
# keys that the sweep itself sets in each trial
RESERVED = ("seed_everything", "model.adapter.seed", "test_after_fit", "ckpt_path", "trainer.default_root_dir")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # name of a variant, which is also the name of a folder
NUMBER = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"
)  # YAML 1.1 reads such numbers as text if they lack a dot or a sign


class SweepError(UsageError):
    """A sweep that cannot run as its file describes it; the message names the key."""


@dataclass(frozen=True)
class Range:
    """Numbers to sample from.

    Args:
        low: Smallest value.
        high: Largest value; the values are whole numbers if both ends are.
        log: If true, sample on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


Space = Mapping[str, "tuple[Any, ...] | Range"]


@dataclass(frozen=True)
class Variant:
    """One arm of the comparison.

    Args:
        name: Name in the table.
        keys: Keys of the variant, with the keys of the built-in variant.
        search: Values of the searched keys, from the variant or else from the sweep.
    """

    name: str
    keys: Mapping[str, Any]
    search: Space


@dataclass(frozen=True)
class Plan:
    """The validated content of a sweep's file.

    Args:
        name: Name of the file without its suffix.
        base: Recipes and overlays of every trial.
        set: Keys that every trial sets.
        variants: The arms, in the order of the table.
        search: Values or ranges of the searched keys, for variants without their own.
        metric: Validation metric that chooses a variant's point.
        mode: Direction in which the metric is better: `max` or `min`.
        select_seeds: Seeds of the trials that choose.
        confirm_seeds: Seeds of the trials at the chosen point.
        report: Metrics of the table; the first metric decides the comparison.
        trials_per_variant: Number of points that each variant tries; None takes the size of the grid.
        prune: Rule that stops poor trials early: one of `PRUNERS`.
        notes: Whole sentences about facts from the recipe, for the report.
    """

    name: str
    base: tuple[str, ...]
    set: Mapping[str, Any]
    variants: tuple[Variant, ...]
    search: Space
    metric: str
    mode: str
    select_seeds: tuple[int, ...]
    confirm_seeds: tuple[int, ...]
    report: tuple[str, ...]
    trials_per_variant: int | None
    prune: str
    notes: tuple[str, ...] = ()

    @property
    def is_tested(self) -> bool:
        """Return True if the confirming trials are tested, since the table has a metric of the test split."""
        return bool(self.confirm_seeds) and any(name.startswith("test/") for name in self.report)

    @property
    def is_sampled(self) -> bool:
        """Return True if a searched key has a range, so that points are sampled instead of listed."""
        return any(isinstance(values, Range) for variant in self.variants for values in variant.search.values())

    def variant(self, name: str) -> Variant:
        """Return the variant of a name."""
        return next(variant for variant in self.variants if variant.name == name)

    def best(self, values: Mapping[T, float]) -> T | None:
        """Return the first key with the best value of the metric; None without a key."""
        return (max if self.mode == "max" else min)(values, key=values.__getitem__, default=None)


def point_id(point: Point) -> str:
    """Return the canonical JSON of a point, which identifies the point everywhere."""
    return json.dumps(point, sort_keys=True)


def grid_points(variant: Variant) -> list[Point]:
    """Return all combinations of a variant's listed values, the first key's values changing slowest."""
    lists = [values for values in variant.search.values() if not isinstance(values, Range)]
    return [dict(zip(variant.search, values, strict=True)) for values in product(*lists)]


# ---------------------------------------------------------------------------------------------------------------- read


def read_plan(path: str, parse_fit: ParseFit, base: Sequence[str] = (), assignments: Sequence[str] = ()) -> Plan:
    """Read the file of a sweep.

    Args:
        path: The file.
        parse_fit: Parser of `fit`.
        base: Recipes and overlays that replace the file's `base`.
        assignments: Keys with their values, such as `data.task=rte`, that are added to the file's `set`.

    Raises:
        UsageError: If the file is missing or damaged, a key is wrong, or `fit` would refuse the recipes.
        DataError: If the data of the recipes cannot be opened to look for a test split.
    """
    return parse_plan(read_yaml(find_program_file(path)), Path(path).stem, parse_fit, base, assignments)


def parse_plan(
    content: Mapping[str, Any],
    name: str,
    parse_fit: ParseFit,
    base: Sequence[str] = (),
    assignments: Sequence[str] = (),
) -> Plan:
    """Validate the content of a sweep's file, with the recipes and keys of the command line.

    Raises:
        SweepError: If a key is wrong, with the key.
        UsageError: If `fit` would refuse the recipes.
        DataError: If the data of the recipes cannot be opened to look for a test split.
    """
    _check_keys("", content, KEYS, required=("variants", "select"))
    if not base and "base" not in content:
        raise SweepError(
            "base: the key is missing in the sweep's file. Give a recipe on the command line, such as --base "
            "conf/quickstart.yaml."
        )
    if not NAME.fullmatch(name):
        raise SweepError(
            f"--config: {name!r} cannot name a sweep. Use letters, digits, _, +, - and . in the file's name."
        )
    recipes = _recipes("--base", list(base)) if base else _recipes("base", content["base"])
    keys = _flat_keys("set.", content.get("set", {})) | _flat_keys("--set ", _assigned(assignments))
    recipe = Recipe(recipes, keys, parse_fit)
    search = _space("search", content.get("search", {}))
    select = _mapping("select", content["select"])
    _check_keys("select", select, ("metric", "mode", "seeds"), required=("metric",))
    metric, mode = _metric_and_mode(select, recipe)
    confirm = _mapping("confirm", content.get("confirm", {}))
    _check_keys("confirm", confirm, ("seeds", "report"))
    select_seeds = _seeds("select.seeds", select.get("seeds", [0]), least=1)
    confirm_seeds = _seeds("confirm.seeds", confirm.get("seeds", []), least=0)
    if shared := sorted({*select_seeds} & {*confirm_seeds}):
        raise SweepError(
            f"confirm.seeds: {shared[0]} is in select.seeds too. Confirm with seeds that did not choose the point, "
            "or the table favours lucky points."
        )
    report = tuple(_names("confirm.report", confirm.get("report", []), least=0))
    variants, notes = _variants(content["variants"], keys, search, recipe)
    if confirm_seeds and not report:
        report, report_notes = _default_report(metric, recipe)
        notes += report_notes
    trials = content.get("trials_per_variant")
    if trials is not None and (type(trials) is not int or trials < 1):
        raise SweepError(f"trials_per_variant: {trials!r:.80} is no number of trials. Give a whole number from 1 on.")
    plan = Plan(
        name=name,
        base=recipes,
        set=keys,
        variants=variants,
        search=search,
        metric=metric,
        mode=mode,
        select_seeds=select_seeds,
        confirm_seeds=confirm_seeds,
        report=report,
        trials_per_variant=trials,
        prune=_choice("prune", content.get("prune", "none"), PRUNERS),
        notes=notes,
    )
    _check_numbers_of_points(plan)
    return plan


def _check_keys(section: str, content: Mapping[str, Any], allowed: Sequence[str], required: Sequence[str] = ()) -> None:
    prefix = f"{section}." if section else ""
    for key in content:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else "."
            raise SweepError(f"There is no key {prefix}{key} in a sweep{hint} The keys are {', '.join(allowed)}.")
    for key in required:
        if key not in content:
            raise SweepError(f"{prefix}{key}: the key is missing in the sweep's file. Add it.")


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SweepError(f"{key}: {value!r:.80} is no mapping. Write keys with values below {key}.")
    return value


def _names(key: str, value: Any, least: int) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) < least or not all(isinstance(name, str) and name for name in names):
        raise SweepError(f"{key}: {value!r:.80} is no list of names. Write a list, such as [first, second].")
    return names


def _recipes(key: str, value: Any) -> tuple[str, ...]:
    files = [find_program_file(file) for file in _names(key, value, least=1)]
    for file in files:
        try:
            check_file(file)
        except ArgumentError as error:
            raise SweepError(f"{key}: {str(error).removeprefix('--config: ')}") from error
    return tuple(files)


def _choice(key: str, value: Any, choices: Sequence[str]) -> str:
    if value is None and "none" in choices:
        return "none"
    if not isinstance(value, str) or value not in choices:
        raise SweepError(f"{key}: {value!r:.80} is not known. Choose one of {', '.join(choices)}.")
    return value


def _seeds(key: str, value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) < least or not all(type(s) is int and 0 <= s < 2**32 for s in value):
        raise SweepError(f"{key}: {value!r:.80} is no list of seeds. Give whole numbers from 0 on, such as [0, 1].")
    if len({*value}) < len(value):
        raise SweepError(f"{key}: {value!r:.80} has a seed twice. Remove one of the two.")
    return tuple(value)


def _select_metric(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise SweepError(f"select.metric: {value!r:.80} is no metric. Name a metric of validation, such as val/loss.")
    if not value.startswith("val/"):
        name = "a metric of the test split" if value.startswith("test/") else "this metric"
        reason = f"{name} cannot choose a point"
        raise SweepError(f"select.metric: {value}: {reason}. Name a metric of validation, such as val/loss.")
    return value


def _assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the keys of `key=value` words, with their values read as YAML."""
    keys: dict[str, Any] = {}
    for word in assignments:
        key, equals, text = word.partition("=")
        if not equals:
            raise SweepError(f"--set: {word!r:.80} has no value. Write KEY=VALUE, such as --set trainer.max_epochs=3.")
        try:
            check_yaml(text)
            keys[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SweepError(f"--set {key}: {text!r:.80} cannot be read as YAML: {error}") from error
    return keys


def _flat_keys(prefix: str, content: Any) -> dict[str, Any]:
    """Return keys by dotted name, without `init_args`.

    Args:
        prefix: Prefix of a key in messages.
        content: The keys.
    """
    keys: dict[str, Any] = {}
    for written, value in _mapping(prefix.rstrip(". "), content).items():
        key = written.replace(".init_args", "")
        if "." not in key and key not in RESERVED:
            raise SweepError(f"{prefix}{written}: write the key with dots, as on the command line: data.task.")
        if key in RESERVED:
            raise SweepError(f"{prefix}{written}: the sweep sets this key in each trial. Remove it here.")
        keys[key] = _number_or_value(value)
    return keys


def _space(section: str, content: Any) -> dict[str, tuple[Any, ...] | Range]:
    space: dict[str, tuple[Any, ...] | Range] = {}
    for key, values in _mapping(section, content).items():
        where = f"{section}.{key}"
        if key in RESERVED:
            raise SweepError(f"{where}: the sweep sets this key in each trial. Search another key.")
        if isinstance(values, Mapping):
            space[key] = _range(where, values)
        elif isinstance(values, list) and values:
            listed = tuple(_number_or_value(value) for value in values)
            if len({json.dumps(value) for value in listed}) < len(listed):
                raise SweepError(f"{where}: {values!r:.80} has a value twice. Remove one of the two.")
            numeric = all(_is_number(value) for value in listed)
            space[key] = tuple(sorted(listed)) if numeric else listed
        else:
            raise SweepError(f"{where}: {values!r:.80} is neither a list of values nor {{low: …, high: …, log: true}}.")
    return space


def _range(where: str, content: Mapping[str, Any]) -> Range:
    _check_keys(where, content, ("low", "high", "log"), required=("low", "high"))
    low, high, log = (_number_or_value(content.get(name, False)) for name in ("low", "high", "log"))
    if not (_is_number(low) and _is_number(high) and math.isfinite(low) and math.isfinite(high) and low < high):
        raise SweepError(f"{where}: low {low!r} and high {high!r} are no range of numbers. Give low below high.")
    if not isinstance(log, bool):
        raise SweepError(f"{where}.log: {log!r:.80} is neither true nor false. Give one of these values.")
    if log and low <= 0:
        raise SweepError(f"{where}.low: {low} has no logarithm. Give a number above 0, or log: false.")
    return Range(low, high, log)


def _number_or_value(value: Any) -> Any:
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------- read from the recipe


def _metric_and_mode(select: Mapping[str, Any], recipe: Recipe) -> tuple[str, str]:
    """Return the selecting metric and its direction. `checkpoint.monitor` means the recipe's metric."""
    if select["metric"] != MONITOR:
        return _select_metric(select["metric"]), _choice("select.mode", select.get("mode", "max"), MODES)
    metric, mode = recipe.config.checkpoint.monitor, recipe.config.checkpoint.mode
    if metric is None:
        raise SweepError(
            f"select.metric: {MONITOR} is not set in {recipe.files}. Name a metric of validation, such as val/loss."
        )
    if "mode" in select and _choice("select.mode", select["mode"], MODES) != mode:
        raise SweepError(
            f"select.mode: {select['mode']} contradicts checkpoint.mode {mode} of {recipe.files}. Remove select.mode."
        )
    return _select_metric(metric), mode


def _default_report(metric: str, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the default metrics of the table, and notes."""
    if recipe.has_test_split():
        return (f"test/{metric.removeprefix('val/')}",), ()
    return (metric,), (
        f"The data of {recipe.files} have no test split with labels, so the table reports {metric}: the validation "
        "data, which also made the choice, with other seeds.",
    )


def _scaled_rank(where: str, factor: Any, keys: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's rank and alpha times a factor."""
    if type(factor) is not int or factor < 1:
        raise SweepError(f"{where}.times_rank: {factor!r:.80} is no factor. Give a whole number, such as 2.")
    if twice := [key for key in RANK if key in keys]:
        raise SweepError(f"{where}.{twice[0]}: times_rank sets this key. Remove one of the two.")
    adapter = recipe.config.model.init_args.get("adapter")
    if adapter is None:
        raise SweepError(
            f"{where}.times_rank: the model of {recipe.files} has no model.adapter.rank and model.adapter.alpha to "
            "multiply. Remove the key."
        )
    return {key: factor * adapter[key.rpartition(".")[2]] for key in RANK}


def _variants(
    content: Any, common: Mapping[str, Any], search: Space, recipe: Recipe
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """Return the variants, and notes on variants that the recipe's model does not support."""
    if isinstance(content, list):  # names alone
        content = {name: {} for name in content if isinstance(name, str)}
    variants: list[Variant] = []
    notes: list[str] = []
    for name, value in _mapping("variants", content).items():
        where = f"variants.{name}"
        if not NAME.fullmatch(name):
            raise SweepError(f"{where}: {name!r} cannot name a variant. Use letters, digits, _, +, - and .")
        entries = dict(_mapping(where, value or {}))
        built_in = entries.pop("variant", name if name in VARIANTS or not entries else None)
        variant_search = _space(f"{where}.search", entries.pop("search", {}))
        factor = entries.pop("times_rank", None)
        try:
            keys = variant_keys(str(built_in)) if built_in is not None else {}
        except VariantError as error:
            raise SweepError(f"variants.{name}: {str(error).removeprefix('variant: ')}") from error
        keys |= _flat_keys(f"{where}.", entries)
        if factor is not None:
            keys |= _scaled_rank(where, factor, keys, recipe)
        if unsearched := [key for key in variant_search if key not in search]:
            raise SweepError(f"{where}.search.{unsearched[0]}: search does not have this key. Add the key there too.")
        for key in search:
            if key in keys or key in common:
                section = where if key in keys else "set"
                raise SweepError(f"{section}.{key}: search has this key too. Remove one of the two.")
        if keys.get("model.tuning") == "head" and not recipe.has_new_head():
            notes.append(f"{name}: left out, since the model of {recipe.files} has no new head to train alone.")
            continue
        variants.append(Variant(name, keys, {key: variant_search.get(key, values) for key, values in search.items()}))
    if not variants:
        left_out = "".join(f" {note}" for note in notes)
        raise SweepError(f"variants: there is no variant.{left_out} Name at least one, such as B: {{}}.")
    return tuple(variants), tuple(notes)


def _check_numbers_of_points(plan: Plan) -> None:
    if plan.is_sampled:
        if plan.trials_per_variant is None:
            raise SweepError("trials_per_variant: search has a range. Give the number of points for each variant.")
        return
    sizes = {variant.name: len(grid_points(variant)) for variant in plan.variants}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise SweepError(f"search: the variants try different numbers of points ({listed}). Give all the same number.")
    size = next(iter(sizes.values()))
    if plan.trials_per_variant is not None and size > plan.trials_per_variant:
        raise SweepError(
            f"trials_per_variant: {plan.trials_per_variant} is less than the {counted(size, 'point')} of search. Use "
            f"at least {size}, or remove values from search."
        )
