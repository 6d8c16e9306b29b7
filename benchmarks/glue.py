"""An epoch of CoLA with MiniLM, ours and Hugging Face Trainer with PEFT, each fit in a process of its own.

Arms: ours through the recipe (length buckets, padded to the longest of a batch) with B or both factors trained, over
float32 or bfloat16 frozen weights; Trainer with PEFT's LoRA, padded to 128 as its examples have it, and padded to the
longest of a batch with length grouping, over either. All: rank 8 on query and value, and with B alone rank 16 too,
which has as many parameters as both factors of rank 8; batches of 32, bf16 autocast.

    python -m benchmarks.glue --backbone ../shared/backbones/minilm_roberta --path ../shared/data/glue --threads 1 \
        --output docs/results/benchmark_glue.json --resume --rates B=… B16=… both=… peft=…

The learning rates come from a sweep (`main.py sweep`). A round is one fit of each arm with a seed of its own, in
shuffled order; the padded arms are timed over fewer epochs and rounds, and not scored. Seconds are of an epoch, from
its first step to the end of its last, and of the process; ratios are paired by round, over as many epochs as both had.
Each fit is a section of the file as soon as it has ended, and with --resume it is left out when the file has it.
`score` is Matthews' correlation on CoLA's own validation split after the last epoch, which chose nothing.
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
    """What has a learning rate of its own: B, both, or peft, with the rank if it is not 8."""
    return ("peft" if arm.family == "trainer" else arm.train) + ("" if arm.rank == 8 else str(arm.rank))


def rate(text: str) -> tuple[str, float]:
    """A kind and its rate, of `--rates`."""
    name, _, value = text.partition("=")
    if name not in {kind(arm) for arm in ARMS.values()}:
        raise argparse.ArgumentTypeError(f"{text} has no rate of B, B16, both or peft")
    return name, float(value)


def make_fit(arguments: argparse.Namespace, arm: Arm, **values: Any) -> Fit:
    """A fit of this data."""
    return Fit(arm=arm, task="cola", data=arguments.path, backbone=arguments.backbone, rows=arguments.rows, **values)


def once(arguments: argparse.Namespace, name: str, fit: Fit) -> Record:
    """The fit's section, measured now unless the file has it."""
    given = {"learning_rate": fit.rate, "seed": fit.seed, "epochs": fit.epochs, "data_rows": fit.rows}
    record = measured(arguments, name, given)
    if record is None:
        with section(arguments, name) as record:
            record |= given | run(fit, arguments.threads)
        print(
            f"{name}: {record['process_seconds']:.0f} s, scores {[round(s, 4) for s in record['scores']]}", flush=True
        )
    return record


def rounds(arguments: argparse.Namespace) -> list[dict[str, Record]]:
    """All fits, round by round."""
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
    """Seconds of a fit's epoch, the median over its first epochs."""
    return statistics.median(record[key][:epochs])


def mean(values: list[float]) -> dict[str, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "standard_error": error, "values": len(values)}


def mean_text(of: dict[str, float]) -> str:
    """A mean and its standard error as a table shows them, in hundredths."""
    return f"{100 * of['mean']:.2f} ± {100 * of['standard_error']:.2f}"


def summarize(results: list[dict[str, Record]], arguments: argparse.Namespace) -> Record:
    """Each arm's figures, and ratios of the references over it, paired by round."""
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
                of, over = ([epoch(pair[i], epochs=common) for pair in pairs] for i in (0, 1))
                row[f"{reference} over this"] = paired_ratio(of, over)
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
    heads = ["arm", "Matthews, %", "peak, MiB", "of it over libraries, MiB", "trained", "file, KiB", "spectra"]
    table("Score and size", heads, sizes)


def main() -> None:
    """Fit, sum up, write."""
    common = parser(__doc__, rounds=3, quick_rounds=1)
    common.add_argument("--backbone", required=True, help="directory in the hub's layout, of MiniLM")
    common.add_argument("--path", required=True, help="directory with cola/train.parquet and cola/validation.parquet")
    common.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    common.add_argument("--epochs", type=int, help="of every arm that is not padded (3; with --quick 1)")
    common.add_argument("--padded_epochs", type=int, default=1, help="of the padded arm")
    common.add_argument("--padded_rounds", type=int, default=1, help="rounds in which the padded arm is timed")
    common.add_argument("--rows", type=int, help="most training rows (all; with --quick 320)")
    common.add_argument("--rates", nargs="+", type=rate, default=[], help="of B, B16, both, peft: B=0.003 (0.001)")
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
