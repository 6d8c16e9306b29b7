"""An epoch of CoLA with MiniLM, ours and Hugging Face Trainer with PEFT, each fit in a separate process.

Our arms use the recipe, with length buckets, and train B or both factors over frozen weights in float32 or bfloat16.
The arms of Trainer use PEFT's LoRA. Texts are padded to 128 tokens as in PEFT's examples, or grouped by length and
padded to the longest text of a batch. All arms have rank 8 on query and value, batches of 32, and bf16 autocast. B is
also trained at rank 16, with as many parameters as both factors at rank 8.

    python -m benchmarks.glue --backbone ../shared/backbones/minilm_roberta --path ../shared/data/glue --threads 1 \
        --output docs/results/benchmark_glue.json --resume --rates B=… B16=… both=… peft=…

The learning rates are from a sweep (`main.py sweep`). A round is one fit of each arm with the same seed, in shuffled
order. The padded arms run fewer epochs and rounds, and have no score. Seconds are reported for an epoch, from the start
of its first step to the end of its last step, and for the process. Ratios are paired by round, over the epochs that
both arms have. Each fit is a section of the file, and --resume skips existing sections. `score` is the Matthews
correlation on CoLA's validation split after the last epoch. The validation split was not used to choose anything.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from benchmarks.fits import Arm, Fit, run
from benchmarks.harness import (
    MIB,
    load,
    measured,
    paired_ratio,
    parse,
    parser,
    ratio_text,
    section,
    table,
)

ARMS = {
    "ours, B": Arm("ours", "B"),
    "ours, B, bfloat16": Arm("ours", "B", "bfloat16"),
    "ours, B, rank 16": Arm("ours", "B", rank=16),
    "ours, both": Arm("ours", "both"),
    "peft, padded to 128": Arm("trainer", padded=True),
    "peft, grouped": Arm("trainer"),
    "peft, grouped, bfloat16": Arm("trainer", backbone_dtype="bfloat16"),
}
REFERENCES = ("peft, padded to 128", "peft, grouped", "peft, grouped, bfloat16")
RATE = 0.001
Record = dict[str, Any]


def kind(arm: Arm) -> str:
    """Return the key of an arm's learning rate: B, both or peft, plus the rank if the rank is not 8."""
    return ("peft" if arm.family == "trainer" else arm.train) + ("" if arm.rank == 8 else str(arm.rank))


def rate(text: str) -> tuple[str, float]:
    """Parse a value of `--rates`, such as B=0.003."""
    name, _, value = text.partition("=")
    if name not in {kind(arm) for arm in ARMS.values()}:
        raise argparse.ArgumentTypeError(f"{text}: {name} is not one of B, B16, both, peft. Write B=0.003.")
    return name, float(value)


def make_fit(arguments: argparse.Namespace, arm: Arm, **values: Any) -> Fit:
    """Return the fit of an arm on CoLA."""
    return Fit(arm=arm, task="cola", data=arguments.path, backbone=arguments.backbone, rows=arguments.rows, **values)


def once(arguments: argparse.Namespace, name: str, fit: Fit) -> Record:
    """Return the section of a fit, and measure the fit unless the file has the section."""
    settings = {"learning_rate": fit.rate, "seed": fit.seed, "epochs": fit.epochs, "data_rows": fit.rows}
    record = measured(arguments, name, settings)
    if record is None:
        with section(arguments, name) as record:
            record |= settings | run(fit, arguments.threads)
        print(
            f"{name}: {record['process_seconds']:.0f} s, scores {[round(s, 4) for s in record['scores']]}", flush=True
        )
    return record


def rounds(arguments: argparse.Namespace) -> list[dict[str, Record]]:
    """Run all fits and return their records by round."""
    order = random.Random(0)
    results: list[dict[str, Record]] = []
    for seed in range(arguments.rounds):
        results.append({})
        for name in order.sample(arguments.arms, len(arguments.arms)):
            arm = ARMS[name]
            if arm.padded and seed >= arguments.padded_rounds:
                continue
            epochs = min(arguments.epochs, arguments.padded_epochs) if arm.padded else arguments.epochs
            fit = make_fit(arguments, arm, epochs=epochs, rate=arguments.rates.get(kind(arm), RATE), seed=seed)
            results[-1][name] = once(arguments, f"{name}, round {seed}", fit)
    return results


def epoch(record: Record, key: str = "train_seconds", epochs: int | None = None) -> float:
    """Return the median seconds of a fit's first epochs."""
    return statistics.median(record[key][:epochs])


def mean(values: list[float]) -> dict[str, float]:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "standard_error": error, "values": len(values)}


def mean_text(figure: dict[str, float]) -> str:
    """Format a mean and its standard error in percent."""
    return f"{100 * figure['mean']:.2f} ± {100 * figure['standard_error']:.2f}"


def summarize(results: list[dict[str, Record]], arguments: argparse.Namespace) -> Record:
    """Return the figures of each arm, and ratios of the references over the arm, paired by round."""
    summary: Record = {}
    for name in arguments.arms:
        records = [result[name] for result in results if name in result]
        last = records[-1]
        summary[name] = row = {
            "epoch_seconds": mean([epoch(r) for r in records]),
            "epoch_cpu_seconds": mean([epoch(r, "train_cpu_seconds") for r in records]),
            "process_seconds": mean([r["process_seconds"] for r in records]),
            "process_epochs": last["epochs"],
            "peak_bytes": statistics.median(r["memory"]["peak"] for r in records),
            "training_growth_bytes": statistics.median(
                r["memory"]["training_peak"] - r["memory"]["libraries"] for r in records
            ),
            "trained_parameters": last["trained_parameters"],
            "adapter_file_bytes": last["adapter_file_bytes"],
        }
        if last["epochs"] == arguments.epochs and not ARMS[name].padded:
            row["score"] = mean([r["scores"][-1] for r in records])
        if "spectrum_seconds" in last:
            row["spectrum_share"] = mean([r["spectrum_seconds"] / r["fit_seconds"] for r in records])
        for reference in REFERENCES:
            pairs = [(result[reference], result[name]) for result in results if name in result and reference in result]
            if pairs and name != reference:
                common = min(record["epochs"] for record in pairs[0])
                reference_seconds, seconds = ([epoch(pair[i], epochs=common) for pair in pairs] for i in (0, 1))
                row[f"{reference} over this"] = paired_ratio(reference_seconds, seconds)
    return summary


def show(summary: Record) -> None:
    """Print the tables."""
    times, sizes = [], []
    for name, row in summary.items():
        ratios = [ratio_text(row[key]) if (key := f"{r} over this") in row else "" for r in REFERENCES]
        times.append([name, f"{row['epoch_seconds']['mean']:.1f}", f"{row['process_seconds']['mean']:.1f}", *ratios])
        score, share = row.get("score"), row.get("spectrum_share")
        sizes.append(
            [
                name,
                mean_text(score) if score else "",
                f"{row['peak_bytes'] / MIB:.0f}",
                f"{row['training_growth_bytes'] / MIB:.0f}",
                f"{row['trained_parameters']:,}",
                f"{row['adapter_file_bytes'] / 1024:.0f}",
                f"{share['mean']:.2%}" if share else "",
            ]
        )
    heads = ["arm", "epoch, s", "process, s", *(f"times faster than {r}" for r in REFERENCES)]
    table("Time", heads, times)
    heads = ["arm", "Matthews, %", "peak, MiB", "training over libraries, MiB", "trained", "file, KiB", "spectra"]
    table("Score and size", heads, sizes)


def main() -> None:
    """Run all fits, print and write the summary."""
    common = parser(__doc__, rounds=3, quick_rounds=1)
    common.add_argument("--backbone", required=True, help="directory of MiniLM in the hub's layout")
    common.add_argument("--path", required=True, help="directory with cola/train.parquet and cola/validation.parquet")
    common.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    common.add_argument("--epochs", type=int, help="epochs of the arms without fixed padding (3; with --quick 1)")
    common.add_argument("--padded_epochs", type=int, default=1, help="epochs of the padded arm")
    common.add_argument("--padded_rounds", type=int, default=1, help="rounds of the padded arm")
    common.add_argument("--rows", type=int, help="maximum training rows (default: all; with --quick 320)")
    common.add_argument("--rates", nargs="+", type=rate, default=[], help="learning rates, such as B=0.003 peft=0.001")
    common.set_defaults(inputs=["backbone", "path"])
    arguments = parse(common)
    arguments.rates = dict(arguments.rates)
    if arguments.epochs is None:
        arguments.epochs = 1 if arguments.quick else 3
    if arguments.rows is None and arguments.quick:
        arguments.rows = 320
    summary = summarize(rounds(arguments), arguments)
    with section(arguments, "summary") as record:
        record["arms"] = summary
    show(summary)
    if arguments.output:
        print(f"{len(load(arguments.output))} sections in {arguments.output}")


if __name__ == "__main__":
    main()
