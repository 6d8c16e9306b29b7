"""GLUE's average of a set of tasks for each variant, from the files that `benchmarks.variants` wrote.

A task's score is the mean of its metrics, and the average weighs tasks equally, as GLUE's does (Wang et al. 2018).

    python -m benchmarks.glue_average docs/results/minilm_cola.json docs/results/minilm_rte.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path


def scores(path: Path) -> tuple[str, dict[str, list[float]]]:
    """Task, and test scores in per cent by variant and seed, each variant at the rate that all seeds ran."""
    record = json.loads(path.read_text())
    options = record["options"]
    runs: dict[tuple[str, float], list[float]] = defaultdict(list)
    for run in sorted(record["runs"], key=lambda run: run["seed"]):
        runs[run["variant"], run["learning_rate"]].append(100 * run["metrics"]["test/score"])
    chosen: dict[str, list[float]] = {}
    for (variant, _), values in runs.items():
        if len(values) > len(chosen.get(variant, [])):
            chosen[variant] = values
    return options[options.index("--data.task") + 1], chosen


def cell(values: list[float]) -> str:
    """Mean ± standard error."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    tasks = dict(scores(path) for path in parser.parse_args().files)
    print("| " + " | ".join(["trained", *tasks, "average"]) + " |")
    print("| " + " | ".join(["---"] * (len(tasks) + 2)) + " |")
    for variant in next(iter(tasks.values())):
        columns = [task[variant] for task in tasks.values()]
        average = [statistics.mean(seed) for seed in zip(*columns, strict=True)]
        print("| " + " | ".join([variant, *(cell(values) for values in [*columns, average])]) + " |")


if __name__ == "__main__":
    main()
