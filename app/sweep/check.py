"""Validate a sweep before its first trial: each variant is parsed as `fit` would parse it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentError, Namespace

from app.config.fit_keys import ParseFit
from app.config.variants import command_line_options
from app.sweep.plan import Plan, Point, Range, SweepError, Variant, grid_points
from app.sweep.schedule import readable_point

SHARED = ["macro_f1", "ece"]  # metrics of every classification


def fit_arguments(plan: Plan, variant: Variant, point: Point, seed: int) -> list[str]:
    """Return the arguments of `main.py` for a trial of a sweep, without the output directory."""
    keys = {**plan.set, **variant.keys, **point, "seed_everything": seed, "model.adapter.seed": seed}
    files = [word for file in plan.base for word in ("--config", file)]
    return ["fit", *files, *command_line_options(keys)]


def check_plan(plan: Plan, parse_fit: ParseFit) -> None:
    """Check the configuration of each variant, the searched values, and the metrics of the sweep.

    If the search has a range, only the lowest value of each range and the first value of each list are checked.

    Raises:
        SweepError: If a check fails, with the variant and the problem.
    """
    for i, variant in enumerate(plan.variants):
        points = [_corner(variant)] if plan.is_sampled else grid_points(variant)
        for point in points if i == 0 or variant.search != plan.search else points[:1]:
            try:
                config = parse_fit(fit_arguments(plan, variant, point, plan.select_seeds[0])[1:])
            except ArgumentError as error:
                where = f"variants.{variant.name}" + (f" at {readable_point(point)}" if point else "")
                raise SweepError(f"{where}: {error}") from error
        _check_metrics(plan, config)


def _corner(variant: Variant) -> Point:
    return {k: values.low if isinstance(values, Range) else values[0] for k, values in variant.search.items()}


def _check_metrics(plan: Plan, config: Namespace) -> None:
    logged = logged_metrics(config)
    if logged is None:  # a model of another package: the first trial checks the metric before its first step
        return
    for key, split, names in (("select.metric", "val", [plan.metric]), ("confirm.report", "test", plan.report)):
        for name in names:
            section, _, metric = name.partition("/")
            if section == split and metric not in logged:
                close = difflib.get_close_matches(metric, logged, n=1)
                hint = f"; did you mean {split}/{close[0]}?" if close else "."
                listed = ", ".join(f"{split}/{metric}" for metric in logged)
                raise SweepError(f"{key}: no trial would log {name}{hint} This model and data can log {listed}.")


def logged_metrics(config: Namespace) -> list[str] | None:
    """Return the metrics that a model can log, without the name of the split; None for a model of another package."""
    model, data = config["model"], config["data"]
    name: str = model.class_path.rpartition(".")[2] if model.class_path.startswith("modules.") else ""
    if name == "ImageClassifier":
        return ["loss", "acc1", "acc5", *SHARED, *(["ood/acc1"] if data.class_path.endswith(".DomainData") else [])]
    if name == "Summarizer":
        from modules.metrics.rouge import KINDS

        return ["loss", *KINDS]
    if name == "LanguageModel":
        return ["loss", "perplexity", "token_acc"]
    return _text_metrics(model.init_args, data.init_args) if name == "TextClassifier" else None


def _text_metrics(model: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    from datamodules.text_classification import TASKS
    from modules.metrics.text_metrics import CLASSIFICATION, REGRESSION

    task = TASKS.get(data.get("task") or "")
    names = model.get("metrics") or (task.metrics if task else [*CLASSIFICATION, *REGRESSION])
    sets = task.sets if task else ("",)
    shared = [] if set(names) <= REGRESSION.keys() else [name for name in SHARED if name not in names]
    return ["score", "loss", *(f"{name}_{part}" if part else name for name in [*names, *shared] for part in sets)]
