"""What the shared prefix saves on multiple choice, against a plain loop over whole prompts and against batches of them.

The arms score the same questions with the same weights, in rounds in which they take their turn in a shuffled order.
Ratios are paired by round; the median is reported, and all figures are written as JSON. Ours computes its prefix anew
in each round. Fewer questions than a subject has in MMLU (246 on average) understate what a prefix saves. Besides the
time that passes there is the processor's, which other programs on the machine disturb less.

    python -m benchmarks.mmlu_prefix --backbone DIRECTORY_OR_GGUF --path ../shared/data/mmlu --questions 50 --shots 5 \
        --output docs/results/mmlu_prefix.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from datamodules.multiple_choice import MultipleChoiceData
from modules.backbones.transformers_backbone import build_transformers_model, load_tokenizer, position_limit
from modules.generation.choices import PrefixCache, choice_log_probabilities

Batch = dict[str, Any]


class Decoder(L.LightningModule):
    """All of a language model that the data looks at."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = build_transformers_model(
            AutoModelForCausalLM, name, "pretrained", {}, dtype, False
        ).model.eval()
        self.tokenizer = load_tokenizer(name, self.backbone, pads=False)
        self.position_limit = position_limit(self.backbone)


def prompts_of(batch: Batch) -> list[Tensor]:
    """Tokens of the whole prompts of a batch."""
    rests = zip(batch["input_ids"], batch["lengths"], strict=True)
    return [torch.cat([batch["prefix"], ids[:length]]) for ids, length in rests]


def plain(model: Any, batch: Batch, cache: PrefixCache) -> Tensor:
    """One prompt after another, as one would with the library alone."""
    rows = [model(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in prompts_of(batch)]
    return torch.stack(rows).float().log_softmax(-1)[:, batch["choices"]]


def batched(model: Any, batch: Batch, cache: PrefixCache) -> Tensor:
    """Whole prompts, padded to the batch's longest."""
    prompts = prompts_of(batch)
    whole = {
        "prefix": batch["prefix"][:0],
        "input_ids": pad_sequence(prompts, batch_first=True),
        "lengths": torch.tensor([len(ids) for ids in prompts]),
    }
    return choice_log_probabilities(model, batch | whole, cache)


ARMS = {"plain": plain, "batched": batched, "prefix": choice_log_probabilities}


def tokens_of(arm: str, batches: list[Batch]) -> int:
    """Tokens that go through the decoder in a round, padding included."""
    prefixes = {batch["subject"]: len(batch["prefix"]) for batch in batches}
    whole = sum(len(ids) for batch in batches for ids in prompts_of(batch))
    padded = sum(batch["input_ids"].numel() for batch in batches)
    repeated = sum(len(batch["prefix"]) * len(batch["lengths"]) for batch in batches)
    return {"batched": padded + repeated, "prefix": padded + sum(prefixes.values())}.get(arm, whole)


Rounds = dict[str, list[float]]


def measure(model: Any, batches: list[Batch], rounds: int) -> tuple[Rounds, Rounds, dict[str, Tensor]]:
    """Seconds that passed and seconds of the processor in each round, and log-probabilities (questions, n_choices)."""
    order = random.Random(0)
    passed: Rounds = {name: [] for name in ARMS}
    busy: Rounds = {name: [] for name in ARMS}
    scores: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name in order.sample(list(ARMS), len(ARMS)):
            cache = PrefixCache()
            start, busy_start = time.perf_counter(), time.process_time()
            scores[name] = torch.cat([ARMS[name](model, batch, cache) for batch in batches])
            passed[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - busy_start)
    return passed, busy, scores


def paired(of: list[float], over: list[float]) -> float:
    """Median of the rounds' ratios."""
    return round(statistics.median(b / a for a, b in zip(of, over, strict=True)), 2)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    decoder = Decoder(arguments.backbone, getattr(torch, arguments.dtype))
    data = MultipleChoiceData(
        arguments.path, shots=arguments.shots, batch_size=arguments.batch_size, max_test_samples=arguments.questions
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, enable_model_summary=False)
    trainer.strategy.connect(decoder)
    data.trainer = trainer
    data.setup("test")
    batches = list(data.test_dataloader()[0])
    answers = torch.cat([batch["answers"] for batch in batches])
    with torch.inference_mode():
        few = {key: batches[-1][key][:1] for key in ("input_ids", "lengths")}
        for arm in ARMS.values():  # warm up
            arm(decoder.backbone, batches[-1] | few, PrefixCache())
        passed, busy, scores = measure(decoder.backbone, batches, arguments.rounds)
    record = {
        "backbone": Path(arguments.backbone).name,
        "questions": len(answers),
        "subjects": len({batch["subject"] for batch in batches}),
        **{key: getattr(arguments, key) for key in ("shots", "batch_size", "dtype", "rounds")},
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "arms": {
            name: {
                "tokens": tokens_of(name, batches),
                "seconds_per_question": round(statistics.median(passed[name]) / len(answers), 4),
                "processor_seconds_per_question": round(statistics.median(busy[name]) / len(answers), 4),
                "round_seconds": [round(s, 3) for s in passed[name]],
                "round_processor_seconds": [round(s, 3) for s in busy[name]],
                "times_faster_than": {other: paired(passed[name], passed[other]) for other in ARMS if other != name},
                "times_less_processor_than": {
                    other: paired(busy[name], busy[other]) for other in ARMS if other != name
                },
                "largest_difference_to_plain": float((scores[name] - scores["plain"]).abs().max()),
                "accuracy": float((scores[name].argmax(-1) == answers).float().mean()),
            }
            for name in ARMS
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, figures in record["arms"].items():  # type: ignore[attr-defined]
        print(name, {key: value for key, value in figures.items() if not key.startswith("round")})


if __name__ == "__main__":
    main()
