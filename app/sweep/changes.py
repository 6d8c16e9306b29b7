"""Compare the plan that a sweep started with and the current plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from app.config.yaml_files import read_yaml
from app.sweep.plan import Plan
from app.sweep.schedule import Job


def plan_content(plan: Plan) -> dict[str, Any]:
    """Return a plan and the content of its recipes as JSON values. These values determine the trials."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(plan), default=str))
    content["variants"] = {variant["name"]: variant for variant in content["variants"]}
    content["recipes"] = {file: json.loads(json.dumps(read_yaml(file), default=str)) for file in plan.base}
    return content


def plan_differences(before: Mapping[str, Any], plan: Plan, tried: Iterable[Job]) -> list[str]:
    """Return the changes that a sweep with trials does not allow, each in a few words. Additions are allowed.

    Args:
        before: `plan_content` of the plan that the sweep began with.
        plan: The plan now.
        tried: Jobs that have been started.
    """
    tried, now = list(tried), plan_content(plan)
    if not tried:
        return []
    differences: list[str] = []
    for key in ("base", "set", "metric", "mode", "prune"):
        differences += _differences(key if key not in ("metric", "mode") else f"select.{key}", before[key], now[key])
    for file in (file for file in plan.base if file in before["recipes"]):
        differences += _differences(file, before["recipes"][file], now["recipes"][file])
    for name in dict.fromkeys(job.variant for job in tried):
        old, new = before["variants"][name], now["variants"].get(name)
        if new is None:
            differences.append(f"variants.{name}: removed")
            continue
        differences += _differences(f"variants.{name}", old["keys"], new["keys"])
        points = [json.loads(job.point) for job in tried if job.variant == name]
        for key in [*old["search"], *(key for key in new["search"] if key not in old["search"])]:
            differences += _search_differences(key, old["search"].get(key), new["search"].get(key), points)
    for phase in ("select", "confirm"):
        seeds = {job.seed for job in tried if job.phase == phase}
        lost = [seed for seed in before[f"{phase}_seeds"] if seed in seeds and seed not in now[f"{phase}_seeds"]]
        differences += [f"{phase}.seeds: {seed} removed" for seed in lost]
    confirmed = any(job.phase == "confirm" for job in tried)
    if confirmed and plan.is_tested and not any(name.startswith("test/") for name in before["report"]):
        differences.append(
            f"confirm.report: {_shown(before['report'])} → {_shown(now['report'])}, but no confirming trial was tested"
        )
    if plan.is_sampled and (before["trials_per_variant"] or 0) > (plan.trials_per_variant or 0):
        differences.append(f"trials_per_variant: {before['trials_per_variant']} → {plan.trials_per_variant}")
    return list(dict.fromkeys(differences))


def _search_differences(key: str, old: Any, new: Any, points: list[dict[str, Any]]) -> list[str]:
    if isinstance(old, list) and isinstance(new, list):
        tried = [point.get(key) for point in points]
        return [f"search.{key}: {value} removed" for value in old if value not in new and value in tried]
    return _differences(f"search.{key}", old, new)


def _differences(prefix: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [text for key in keys for text in _differences(f"{prefix}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [f"{prefix}: {_shown(old)} → {_shown(new)}"]


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)[:80]
