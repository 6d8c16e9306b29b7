"""Compare the closed forms of one-sided adapters, computed before training, with finished runs.

A setting is a group of runs that differ only in trained factor, seed and learning rate. For B and for A, only the
learning rate with the best monitored validation metric is used. The frozen factor must be `orthogonal`. For every
setting with runs of B and of A, the benchmark measures the moments as the command `theory` does, and reports

- over the projections: Spearman's correlation of ‖ΔW·Σ^½‖_F after training (mean over seeds) with the share of the
  removable loss, with the forecast removed loss, and with Tr[Σ];
- the forecast gap, the difference between the network's shares of B and of A;
- the measured gap, the difference in a metric between B and A (mean over seeds).

Over the settings, the benchmark reports Spearman's correlation of the measured gap with the forecast gap. As a baseline
without data, the benchmark also reports the correlation with log(trained parameters of B / trained parameters of A).
Intervals of correlations are bootstrap intervals over projections or settings. Intervals of gaps are Student's
intervals over seeds.

    python -m benchmarks.theory --runs runs/minilm_cola runs/dinov2_cifar10 --output docs/results/theory.json
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from app.cli import parse_fit
from app.commands.moments import Measurement, measure
from app.commands.theory_report import Analysis, analyse, network_shares
from app.config.yaml_files import read_yaml
from app.console import console_logging
from app.run.checkpoint_io import read_checkpoint
from app.run.evaluations import read_metrics
from app.run.run_directory import resolve_checkpoint
from benchmarks.buckets import mean_interval
from benchmarks.harness import measured, parse, parser, section, table
from modules.adapters import adapted_projections

METRICS = ["test/score", "test/acc1", "test/token_acc", "val/score", "val/acc1", "val/token_acc"]
RESAMPLES = 2000
FEWEST = 4  # Minimum pairs for a correlation.


@dataclass(frozen=True)
class Run:
    """A finished run of B or A.

    Args:
        path: The run directory.
        setting: Configuration that all runs of a setting share, as JSON.
        trained: `B` or `A`.
        seed: `seed_everything`.
        rate: Learning rate.
        validated: Best value of the monitored metric, with its sign changed if lower is better.
        metrics: Content of metrics.json.
    """

    path: Path
    setting: str
    trained: str
    seed: int
    rate: float
    validated: float
    metrics: Mapping[str, Any]


# -------------------------------------------------------------------------------------------------------------- reading


def read_run(path: Path) -> Run | str:
    """Return a run, or the reason to skip the run."""
    config = read_yaml(str(path / "config.yaml"))
    model, data = deepcopy(config["model"]), deepcopy(config["data"])
    values = model["init_args"]
    adapter = values["adapter"]
    trained, frozen = adapter["train"], {"B": "init_a", "A": "init_b"}.get(adapter["train"])
    if values["tuning"] != "adapter" or frozen is None:
        return f"the run trains {trained if values['tuning'] == 'adapter' else values['tuning']}, not B or A"
    if adapter[frozen] != "orthogonal":
        return f"the frozen factor is {adapter[frozen]}, not orthogonal"
    metrics = read_metrics(path)
    if not any(key in metrics for key in METRICS):
        return "metrics.json has no result"
    for key in ("train", "init_a", "init_b", "seed"):
        del adapter[key]
    rate = values.pop("learning_rate")
    length = {key: config["trainer"].get(key) for key in ("max_epochs", "max_steps", "limit_train_batches")}
    setting = json.dumps({"model": model, "data": data, "trainer": length}, sort_keys=True)
    monitor = (config.get("checkpoint") or {}).get("monitor")
    sign = -1 if (config.get("checkpoint") or {}).get("mode") == "min" else 1
    validated = sign * metrics.get(f"best/{monitor}", metrics.get(monitor, 0.0))
    return Run(path, setting, trained, config["seed_everything"], rate, validated, metrics)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs of B and A below folders, and print the skipped runs."""
    runs = []
    for config in sorted({path for folder in folders for path in folder.rglob("config.yaml")}):
        if not (config.parent / "checkpoints").is_dir():
            continue
        run = read_run(config.parent)
        if isinstance(run, str):
            print(f"{config.parent} is skipped: {run}.")
        else:
            runs.append(run)
    return runs


def settings(runs: Sequence[Run]) -> list[dict[str, list[Run]]]:
    """Return the runs of each setting by trained factor, at the best learning rate of the factor."""
    grouped: dict[str, dict[str, dict[float, list[Run]]]] = {}
    for run in runs:
        rates = grouped.setdefault(run.setting, {}).setdefault(run.trained, defaultdict(list))
        rates[run.rate].append(run)
    chosen = []
    for sides in grouped.values():
        best = {t: max(r.values(), key=lambda of: statistics.mean(x.validated for x in of)) for t, r in sides.items()}
        if set(best) == {"A", "B"}:
            chosen.append({trained: sorted(best[trained], key=lambda run: run.seed) for trained in ("B", "A")})
        else:
            print(f"{next(iter(best.values()))[0].path} is skipped: its setting only has runs of {'/'.join(best)}.")
    return chosen


def name_of(runs: Mapping[str, list[Run]], title: str | None = None) -> str:
    """Return a short name of a setting."""
    setting = json.loads(runs["B"][0].setting)
    values = setting["model"]["init_args"]
    adapter = values["adapter"]
    targets = "+".join(adapter["targets"]) if isinstance(adapter["targets"], list) else adapter["targets"]
    data = setting["data"]["init_args"]
    task = title or "/".join(str(part) for part in (Path(str(data["path"])).name, data.get("task")) if part)
    layers = f", last {adapter['layers']}" if adapter.get("layers") else ""
    return f"{task}, {Path(values['backbone']).name}, {targets}, rank {adapter['rank']}{layers}"


# ---------------------------------------------------------------------------------------------------------- correlation


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Return Spearman's correlation with its 95 % bootstrap interval; None for too few pairs or constant values."""
    first, second = np.asarray(x), np.asarray(y)
    if len(first) < FEWEST or np.allclose(first, first[0], rtol=1e-6) or np.allclose(second, second[0], rtol=1e-6):
        return None
    drawn = np.random.default_rng(0).integers(len(first), size=(RESAMPLES, len(first)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns if a resample is constant.
        values = [float(spearmanr(first[index], second[index]).statistic) for index in drawn]
    low, high = np.nanquantile(values, [0.025, 0.975])
    rho = float(spearmanr(first, second).statistic)
    return {"rho": rho, "low": float(low), "high": float(high), "pairs": len(first)}


def text(value: Mapping[str, float] | None, key: str = "rho") -> str:
    """Format a figure with its interval, if there is an interval."""
    if value is None:
        return "—"
    interval = f" ({value['low']:.2f} to {value['high']:.2f})" if value["low"] < value["high"] else ""
    return f"{value[key]:.2f}{interval}"


# ---------------------------------------------------------------------------------------------------------- measurement


def whitened_norms(run: Run, measurement: Measurement) -> dict[str, float]:
    """Return ‖ΔW·Σ^½‖_F of every projection of a run."""
    state = read_checkpoint(resolve_checkpoint(str(run.path.resolve()), Path(), prefer_best=True))["state_dict"]
    norms = {}
    for name, (_, factors) in adapted_projections(measurement.module.backbone).items():
        stem = f"backbone.{factors.projection.layer}.adapters.{factors.projection.role}"
        a, b = (state[f"{stem}.{factor}"].double() for factor in ("A", "B"))  # (r, d_in), (d_out, r)
        moments = measurement.moments[name]
        norms[name] = factors.scale * _whitened(b @ a, moments.inputs.cpu() / moments.tokens)
    return norms


def _whitened(update: Tensor, sigma: Tensor) -> float:
    return float(torch.einsum("oi,ij,oj->", update, sigma, update).clamp(min=0).sqrt())


def over_projections(runs: Mapping[str, list[Run]], analysis: Analysis) -> dict[str, Any]:
    """Return the correlations of one setting, by trained factor."""
    at_rank = analysis.at_own_rank()
    energies = analysis.projections.set_index("projection")["input_energy"]
    record: dict[str, Any] = {}
    for trained, side_runs in runs.items():
        norms_by_run = [whitened_norms(run, analysis.measured) for run in side_runs]
        names = list(norms_by_run[0])
        norms = [statistics.mean(norm[name] for norm in norms_by_run) for name in names]
        rows: dict[str, Any] = {}
        of_side = at_rank[at_rank["trained"] == trained]
        for (outputs, target), rows_of_case in of_side.groupby(["outputs", "target"], sort=False):
            forecast = rows_of_case.set_index("projection").loc[names]
            removed = (forecast["share"] * forecast["removable"]).tolist()
            label = f"{target}, {outputs} outputs"
            rows[f"share, {label}"] = correlation(forecast["share"].tolist(), norms)
            rows[f"removed loss, {label}"] = correlation(removed, norms)
        rows["input energy"] = correlation(energies.loc[names].tolist(), norms)
        record[trained] = {"norms": dict(zip(names, norms, strict=True)), "correlations": rows}
    return record


def gap(runs: Mapping[str, list[Run]], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the measured gap of B over A, paired by seed. A gap above 0 means that B is better, also for a loss."""
    all_runs = [run for of in runs.values() for run in of]
    metric = next(key for key in metrics if all(key in run.metrics for run in all_runs))
    values = {trained: {run.seed: run.metrics[metric] for run in of} for trained, of in runs.items()}
    seeds = sorted(set(values["B"]) & set(values["A"]))
    sign = -1 if metric.endswith("loss") else 1
    differences = [sign * (values["B"][seed] - values["A"][seed]) for seed in seeds]
    rates = {trained: of[0].rate for trained, of in runs.items()}
    means = {trained: statistics.mean(of[seed] for seed in seeds) for trained, of in values.items()}
    return {"metric": metric, "seeds": seeds, "learning_rates": rates, **means, "gap": mean_interval(differences)}


def measure_setting(arguments: argparse.Namespace, runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """Return all figures of a setting."""
    config = runs["B"][0].path / "config.yaml"
    words = ["--config", str(config), "--ckpt_path=null", "--trainer.enable_progress_bar=false", *arguments.keys]
    analysis = analyse(measure(parse_fit, words, arguments.batches, arguments.head_steps))
    shares = network_shares(analysis)
    forecast = {
        f"{row.target}, {row.outputs} outputs": {"B": row.B, "A": row.A, "gap": row.B - row.A}
        for row in shares.itertuples()
    }
    frame = analysis.projections
    trained = {side: int((frame["adapter_rank"] * frame[d]).sum()) for side, d in (("B", "d_out"), ("A", "d_in"))}
    forecast["trained numbers"] = {**trained, "gap": math.log(trained["B"] / trained["A"])}
    explained = frame[["explained", "explained_by_chance"]].mean()
    return {
        "projections": over_projections(runs, analysis),
        "measured": gap(runs, arguments.metrics),
        "forecast": forecast,
        "explained": float(explained["explained"]),
        "explained_by_chance": float(explained["explained_by_chance"]),
        "input_rank": float(frame["input_rank"].mean()),
    }


# --------------------------------------------------------------------------------------------------------------- tables


def over_settings(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the correlation over settings of the measured gap with each forecast."""
    actual = [record["measured"]["gap"]["mean"] for record in records.values()]
    labels = next(iter(records.values()))["forecast"]
    return {
        label: correlation([record["forecast"][label]["gap"] for record in records.values()], actual)
        for label in labels
    }


def show(records: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Print the tables."""
    for trained in ("B", "A"):
        labels = next(iter(records.values()))["projections"][trained]["correlations"]
        rows = [
            [label, *(text(r["projections"][trained]["correlations"][label]) for r in records.values())]
            for label in labels
        ]
        table(f"Correlation with the norm that {trained} learns", ["forecast", *records], rows)
    rows = []
    for name, record in records.items():
        real = record["measured"]
        forecasts = [f"{entry['gap']:.3f}" for entry in record["forecast"].values()]
        rows.append([name, f"{real['B']:.4f}", f"{real['A']:.4f}", text(real["gap"], "mean"), *forecasts])
    labels = list(next(iter(records.values()))["forecast"])
    table("Gap of B over A", ["setting", "B", "A", "measured", *labels], rows)
    table("Correlation over settings", ["forecast", "Spearman"], [[k, text(v)] for k, v in summary.items()])


def main() -> None:
    """Measure every setting, compare with the runs, print and write."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--runs", nargs="+", type=Path, required=True, help="folders that contain run directories")
    common.add_argument("--batches", type=int, default=8, help="training batches to measure")
    common.add_argument("--head_steps", type=int, default=32, help="steps of a new head before the measurement")
    common.add_argument(
        "--metrics", nargs="+", default=METRICS, help="the first metric that all runs of a setting have is used"
    )
    common.add_argument("--title", help="name of the data in the settings' names")
    common.add_argument("--keys", nargs="*", default=[], help="keys of fit for the measurement: --data.path=DIR")
    common.set_defaults(inputs=["batches", "head_steps", "metrics", "keys"])
    arguments = parse(common)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    records: dict[str, Any] = {}
    with console_logging():
        for runs in settings(find_runs(arguments.runs)):
            name = name_of(runs, arguments.title)
            if name in records:  # The settings differ in a key that is not in the name.
                name = f"{name}, {runs['B'][0].path.parent.name}"
            run_names = {"runs": [run.path.name for of in runs.values() for run in of]}
            record = measured(arguments, name, run_names)
            if record is None:
                with section(arguments, name) as record:
                    record |= run_names | measure_setting(arguments, runs)
            records[name] = record
    if not records:
        raise SystemExit(
            f"--runs: {', '.join(map(str, arguments.runs))} has no runs of B and A with the same recipe and rank. Give "
            "folders with both."
        )
    with section(arguments, "over settings") as summary_record:
        summary_record["correlations"] = summary = over_settings(records)
    show(records, summary)


if __name__ == "__main__":
    main()
