"""Prepare data and backbone for the experiments with the small BART on 1,000 rows of XSum.

`rows` writes three data sets to a folder. `overfit` has the same 32 training rows in all splits. `first` and `second`
each have one half of the training rows, and the whole validation and test splits. `rows` also prints the ROUGE of
lead-1: the first line of each test document, or the first sentence of a document with one line. `backbone` saves the
model of a fully tuned run in the hub's layout.

    python -m benchmarks.xsum_rows rows --source ../shared/data/xsum --output DIR
    python -m benchmarks.xsum_rows backbone --run RUN --output DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets

from app.run.checkpoint_io import read_checkpoint
from app.run.run_directory import resolve_checkpoint
from modules.metrics.rouge import Rouge, one_sentence_per_line
from modules.summarization import Summarizer


def write_rows(source: Path, output: Path) -> None:
    """Write the data sets and print the ROUGE of lead-1."""
    splits = {s: datasets.Dataset.from_parquet(str(source / f"{s}.parquet")) for s in ("train", "validation", "test")}
    train = splits["train"]
    half, overfit_rows = len(train) // 2, train.select(range(32))
    sets = {
        "overfit": {"train": overfit_rows, "validation": overfit_rows, "test": overfit_rows},
        "first": {**splits, "train": train.select(range(half))},
        "second": {**splits, "train": train.select(range(half, len(train)))},
    }
    for name, parts in sets.items():
        for split, rows in parts.items():
            rows.to_parquet(str(output / name / f"{split}.parquet"))
    rouge = Rouge()
    test = splits["test"]
    rouge.update(
        [one_sentence_per_line(document).partition("\n")[0] for document in test["document"]], list(test["summary"])
    )
    print("lead-1:", json.dumps({k: round(v.item(), 4) for k, v in rouge.compute().items()}))


def save_backbone(run: Path, output: Path) -> None:
    """Save the best model of a run."""
    checkpoint = read_checkpoint(resolve_checkpoint(str(run), run.parent, prefer_best=True))
    keys = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
    module = Summarizer(**keys)
    if module.tuning != "full":
        raise SystemExit(
            f"--run: {run} has tuning {module.tuning}, so its backbone did not change. Use a fully tuned run."
        )
    module.load_state_dict(checkpoint["state_dict"])
    module.backbone.save_pretrained(output)
    module.tokenizer.save_pretrained(output)


def main() -> None:
    """Run the command `rows` or `backbone`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows, backbone = commands.add_parser("rows"), commands.add_parser("backbone")
    rows.add_argument("--source", type=Path, required=True)
    backbone.add_argument("--run", type=Path, required=True)
    for command in (rows, backbone):
        command.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "rows":
        write_rows(arguments.source, arguments.output)
    else:
        save_backbone(arguments.run, arguments.output)


if __name__ == "__main__":
    main()
