"""Run Hugging Face Trainer with PEFT on CoLA, as in PEFT's documentation, up to the first step (`benchmarks.startup`).

python -m benchmarks.first_step_trainer BACKBONE DIRECTORY
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class EndAtFirstStep(TrainerCallback):
    """End the process after the first step."""

    def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
        """Exit at once, and skip the end of training."""
        shutil.rmtree(args.output_dir, ignore_errors=True)
        os._exit(0)


def main(backbone: str, folder: str) -> None:
    """Load and tokenise the data, and train for one step."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2, dtype="float32")
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query", "value"]))
    files = {split: sorted(map(str, Path(folder).rglob(f"{split}*.parquet"))) for split in ("train", "validation")}
    data = datasets.load_dataset("parquet", data_files=files)
    data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=32,
        bf16=True,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
    )
    Trainer(
        model,
        arguments,
        DataCollatorWithPadding(tokenizer),
        data["train"],
        data["validation"],
        processing_class=tokenizer,
        callbacks=[EndAtFirstStep()],
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
