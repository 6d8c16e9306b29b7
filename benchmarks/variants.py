"""B, A, both, head and full on one task: a rate chosen for each on validation, then three seeds.

A variant with a number behind it has that rank, and alpha = 2 · rank; without one, the rank and alpha of the recipe.
A single rate is taken as it is.

Every run goes through the command line (`main([...])`) in a process of its own, so that memory and seconds are its own.
Results go to a JSON file as they come, and a stopped sweep continues where it was; the table is printed at the end.

    python -m benchmarks.variants --output docs/results/vit_cifar10.json -- --config conf/vit_cifar.yaml \
        --config conf/cpu.yaml --data.path DIR --model.backbone NAME --model.weights FILE --model.image_size 98
    python -m benchmarks.variants --output docs/results/minilm_cola.json --metric score --variants B A both head full \
        -- --config conf/roberta_glue.yaml --config conf/cpu.yaml --data.task cola --data.test_on_validation true
    python -m benchmarks.variants --output docs/results/smollm2.json --metric loss --lowest --report loss perplexity \
        --variants B32 B64 A32 both32 -- --config conf/smollm2_instructions.yaml --data.path DIR
    python -m benchmarks.variants --output docs/results/signs.json --variants B B_signs A A_signs --rates 0.005 \
        -- --config conf/quickstart.yaml
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

VARIANTS = {
    "B": ["--model.adapter.train=B", "--model.adapter.init_a=orthogonal", "--model.adapter.init_b=zero"],
    "A": ["--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"],
    "B_signs": ["--model.adapter.train=B", "--model.adapter.init_a=signs", "--model.adapter.init_b=zero"],
    "A_signs": ["--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=signs"],
    "both": ["--model.adapter.train=both", "--model.adapter.init_a=kaiming", "--model.adapter.init_b=zero"],
    "head": ["--model.tuning=head"],
    "full": ["--model.tuning=full"],
}


def options_of(variant: str) -> list[str]:
    """What sets a variant apart."""
    name = variant.rstrip("0123456789")
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{variant} is none of {', '.join(VARIANTS)}, with or without a rank behind")
    rank = variant.removeprefix(name)
    return VARIANTS[name] + ([f"--model.adapter.rank={rank}", f"--model.adapter.alpha={2 * int(rank)}"] if rank else [])


def run(options: list[str], variant: str, rate: float, seed: int, runs: Path | None) -> dict[str, Any]:
    """One fit with its test; its metrics.json. The run itself is kept where `runs` says, if it does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = temporary if runs is None else runs / f"{variant}_{rate:g}_{seed}"
        words = ["fit", *options, *options_of(variant), f"--model.learning_rate={rate}", f"--seed_everything={seed}"]
        words += [f"--model.adapter.seed={seed}", f"--trainer.default_root_dir={folder}"]
        words += ["--trainer.enable_progress_bar=false", "--test_after_fit=true"]
        done = subprocess.run([sys.executable, "main.py", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        newest = max(Path(folder).glob("version_*"), key=lambda path: path.stat().st_mtime)
        metrics: dict[str, Any] = json.loads((newest / "metrics.json").read_text())
    return {"variant": variant, "learning_rate": rate, "seed": seed, "metrics": metrics}


def main() -> None:
    """Sweep, repeat, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--metric", default="acc1", help="of val/ to choose the rate by")
    parser.add_argument("--report", nargs="+", help="of test/ to report; without it the metric")
    parser.add_argument("--lowest", action="store_true", help="the metric is the better the lower it is")
    parser.add_argument("--variants", nargs="+", default=["B", "A", "both", "head"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--rates_full", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="the same for full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="where the runs are kept; without it they are not")
    parser.add_argument("options", nargs="*", help="behind --: the options of `main.py fit`")
    arguments = parser.parse_args()
    for variant in arguments.variants:
        options_of(variant)
    record = _load(arguments.output, arguments.options)
    done = {(r["variant"], r["learning_rate"], r["seed"]): r for r in record["runs"]}

    def once(variant: str, rate: float, seed: int) -> dict[str, Any]:
        key = (variant, rate, seed)
        if key not in done:
            done[key] = run(arguments.options, variant, rate, seed, arguments.runs)
            record["runs"] = list(done.values())
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
            shown = {k: v for k, v in done[key]["metrics"].items() if arguments.metric in k or "seconds" in k}
            print(*key, shown, flush=True)
        return done[key]

    first, *others = arguments.seeds
    grids = {v: sorted(arguments.rates_full if v == "full" else arguments.rates) for v in arguments.variants}
    # rate by rate rather than variant by variant, so that a slow spell of the machine hits all alike
    for position in range(max(len(grid) for grid in grids.values())):
        for variant, grid in grids.items():
            if position < len(grid):
                once(variant, grid[position], first)
    chosen_by, sign = f"val/{arguments.metric}", -1 if arguments.lowest else 1
    best = {}
    for variant, rates in grids.items():
        while True:
            best[variant] = max(rates, key=lambda rate, v=variant: sign * once(v, rate, first)["metrics"][chosen_by])  # type: ignore[misc]
            if len(rates) == 1:
                break
            if best[variant] == rates[-1]:  # the grid ends too low for this variant
                rates.append(float(f"{rates[-1] ** 2 / rates[-2]:.1g}"))
            elif best[variant] == rates[0]:
                rates.insert(0, float(f"{rates[0] ** 2 / rates[1]:.1g}"))
            else:
                break
    for seed in others:
        for variant in grids:
            once(variant, best[variant], seed)
    groups = [[once(v, best[v], s) for s in arguments.seeds] for v in grids]
    print(table(groups, arguments.report or [arguments.metric], percent=not arguments.lowest))


def _load(path: Path, options: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "options": options,
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "lightning", "timm", "transformers")},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "runs": [],
    }
    if path.is_file():
        earlier: dict[str, Any] = json.loads(path.read_text())
        if any(earlier[key] != record[key] for key in ("options", "machine", "versions")):
            raise SystemExit(f"{path} holds runs with other options, versions or machine; give another file.")
        record = earlier
    path.parent.mkdir(parents=True, exist_ok=True)
    return record


def table(groups: list[list[dict[str, Any]]], metrics: list[str], percent: bool) -> str:
    """A Markdown table: mean ± standard error over seeds; scores in percent, losses as they are."""
    digits = 2 if percent else 3

    def score(group: list[dict[str, Any]], key: str) -> str:
        values = [r["metrics"][key] * (100 if percent else 1) for r in group]
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{error}"

    scores = [f"{split}/{metric}" for split in ("test", "val") for metric in metrics]
    names = [f"{name}, %" if percent else name for name in scores]
    heads = ["trained", "rate", *names, "trained parameters", "factors A and B, KiB", "fit, s"]
    rows = [
        [
            group[0]["variant"],
            f"{group[0]['learning_rate']:g}",
            *(score(group, name) for name in scores),
            f"{group[0]['metrics']['params/trainable']:,}",
            f"{group[0]['metrics']['adapter/bytes'] / 1024:.0f}",
            f"{statistics.mean(r['metrics']['time/fit_seconds'] for r in group):.0f}",
        ]
        for group in groups
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    main()
