"""Speed-up of multiple choice by the shared prefix, over a plain loop and over batches of whole prompts.

The arms score the same questions with the same weights, in shuffled rounds. Ratios are paired by round, and the JSON
file has their medians and all figures. Our arm computes the prefix again in each round. Fewer questions than a subject
has in MMLU (246 on average) understate the speed-up. The benchmark reports wall time and CPU time, which other programs
disturb less.

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
    """The parts of a language model that the data module needs."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = build_transformers_model(
            AutoModelForCausalLM, name, "pretrained", {}, dtype, False
        ).model.eval()
        self.tokenizer = load_tokenizer(name, self.backbone, pads=False)
        self.position_limit = position_limit(self.backbone)


def prompts_of(batch: Batch) -> list[Tensor]:
    """Return the tokens of each whole prompt of a batch."""
    questions = zip(batch["input_ids"], batch["lengths"], strict=True)
    return [torch.cat([batch["prefix"], ids[:length]]) for ids, length in questions]


def plain(model: Any, batch: Batch, cache: PrefixCache) -> Tensor:
    """Score one prompt at a time, as with plain transformers."""
    rows = [model(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in prompts_of(batch)]
    return torch.stack(rows).float().log_softmax(-1)[:, batch["choices"]]


def batched(model: Any, batch: Batch, cache: PrefixCache) -> Tensor:
    """Score whole prompts, padded to the longest prompt of the batch."""
    prompts = prompts_of(batch)
    whole = {
        "prefix": batch["prefix"][:0],
        "input_ids": pad_sequence(prompts, batch_first=True),
        "lengths": torch.tensor([len(ids) for ids in prompts]),
    }
    return choice_log_probabilities(model, batch | whole, cache)


ARMS = {"plain": plain, "batched": batched, "prefix": choice_log_probabilities}


def tokens_of(arm: str, batches: list[Batch]) -> int:
    """Return the number of tokens that the decoder processes in a round, with padding."""
    prefixes = {batch["subject"]: len(batch["prefix"]) for batch in batches}
    whole = sum(len(ids) for batch in batches for ids in prompts_of(batch))
    padded = sum(batch["input_ids"].numel() for batch in batches)
    repeated = sum(len(batch["prefix"]) * len(batch["lengths"]) for batch in batches)
    return {"batched": padded + repeated, "prefix": padded + sum(prefixes.values())}.get(arm, whole)


Rounds = dict[str, list[float]]


def measure(model: Any, batches: list[Batch], rounds: int) -> tuple[Rounds, Rounds, dict[str, Tensor]]:
    """Return wall seconds and CPU seconds of each round, and log-probabilities (questions, n_choices), by arm."""
    order = random.Random(0)
    wall: Rounds = {name: [] for name in ARMS}
    cpu: Rounds = {name: [] for name in ARMS}
    scores: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name in order.sample(list(ARMS), len(ARMS)):
            cache = PrefixCache()
            start, cpu_start = time.perf_counter(), time.process_time()
            scores[name] = torch.cat([ARMS[name](model, batch, cache) for batch in batches])
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return wall, cpu, scores


def paired(of: list[float], over: list[float]) -> float:
    """Return the median of the ratios over / of, paired by round."""
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
        one_question = {key: batches[-1][key][:1] for key in ("input_ids", "lengths")}
        for arm in ARMS.values():  # Warm-up.
            arm(decoder.backbone, batches[-1] | one_question, PrefixCache())
        wall, cpu, scores = measure(decoder.backbone, batches, arguments.rounds)
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
                "seconds_per_question": round(statistics.median(wall[name]) / len(answers), 4),
                "processor_seconds_per_question": round(statistics.median(cpu[name]) / len(answers), 4),
                "round_seconds": [round(s, 3) for s in wall[name]],
                "round_processor_seconds": [round(s, 3) for s in cpu[name]],
                "times_faster_than": {other: paired(wall[name], wall[other]) for other in ARMS if other != name},
                "times_less_processor_than": {other: paired(cpu[name], cpu[other]) for other in ARMS if other != name},
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
