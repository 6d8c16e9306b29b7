"""Write the data sets for the experiments with a small BART: 1,000 rows of XSum, and 200 dialogues with summaries.

`overfit` has the same 32 training rows of XSum in all splits. `first` and `second` each have one half of the training
rows, and the whole validation and test splits. `dialogues` has the rows of an instruction data set that ask for the
summary of a dialogue. The command also prints the ROUGE of lead-1: the first line of each test document of XSum, or the
first sentence of a document with one line.

    python -m benchmarks.summary_rows --xsum ../shared/data/xsum --instructions ../shared/data/instructions --output DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets

from modules.metrics.rouge import Rouge, one_sentence_per_line

REQUEST = "Summarize this dialogue:"
END = "<|endoftext|>"


def write_xsum(source: Path, output: Path) -> None:
    """Write the data sets of XSum and print the ROUGE of lead-1."""
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


def write_dialogues(source: Path, output: Path) -> None:
    """Write the dialogues of an instruction data set with their summaries."""
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_parquet(str(source / f"{split}.parquet"))
        pairs = [
            {
                "document": row["instruction"].strip().removeprefix(REQUEST).strip(),
                "summary": row["output"].removesuffix(END).strip(),
            }
            for row in rows
            if row["instruction"].strip().startswith(REQUEST)
        ]
        datasets.Dataset.from_list(pairs).to_parquet(str(output / "dialogues" / f"{split}.parquet"))


def main() -> None:
    """Write the data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("xsum", "instructions", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    write_xsum(arguments.xsum, arguments.output)
    write_dialogues(arguments.instructions, arguments.output)


if __name__ == "__main__":
    main()
