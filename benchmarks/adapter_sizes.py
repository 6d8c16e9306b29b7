"""Sizes of adapter files: compact files (float32 and bfloat16) against PEFT's (A and B in float32).

B is trained and A is frozen with the initialiser `signs`. The files are written from models on the meta device with
real factors. Heads, which are equal in both formats, and PEFT's adapter_config.json (a kilobyte) do not count. PEFT
cannot adapt slices of a fused layer. For query and value of a fused layer, PEFT's exact form is a stacked A and a
block-diagonal B with zeros. The table also lists PEFT's size for separate layers.

    python -m benchmarks.adapter_sizes --output docs/results/adapter_sizes.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, RobertaConfig

from modules.adapters import AdapterConfig, adapted_layers, adapted_projections, attach
from modules.adapters.init import sign_factor
from modules.formats.compact import FILE_NAME, load_compact, save_compact

ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=514,
)


def from_config(config: PreTrainedConfig) -> nn.Module:
    """Build a model of transformers."""
    return AutoModel.from_config(config)  # type: ignore[no-untyped-call]


SETTINGS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT-B/16, query and value": (lambda: timm.create_model("vit_base_patch16_224", num_classes=0), 8),
    "RoBERTa-large, query and value": (lambda: from_config(ROBERTA_LARGE), 8),
    "LLaMA-7B, query and value": (lambda: from_config(LlamaConfig()), 32),  # The default configuration is the 7B model.
}


def adapted_model(build: Callable[[], nn.Module], config: AdapterConfig) -> nn.Module:
    """Build a model on the meta device with real factors: A of `signs`, B of noise."""
    with torch.device("meta"):
        model = build()
    attach(model, config)
    for name, (layer, factors) in adapted_projections(model).items():
        factors.to_empty(device="cpu")
        with torch.no_grad():
            factors.A.copy_(sign_factor("A", layer.in_features, config.rank, config.seed, name))
            factors.B.normal_()
    return model


def peft_tensors(model: nn.Module, fused: bool) -> dict[str, Tensor]:
    """Return factors by PEFT's names: one pair for each layer if `fused`, as PEFT loads them, else each projection."""
    tensors = {}
    for name, layer in adapted_layers(model).items():
        factors = layer.factors()
        rank = sum(f.A.shape[0] for f in factors)
        stacked = (name, torch.empty(rank, layer.in_features), torch.empty(layer.out_features, rank))
        for module, a, b in [stacked] if fused else [(f.projection.name, f.A, f.B) for f in factors]:
            prefix = f"base_model.model.{module}"
            tensors |= {f"{prefix}.lora_A.weight": a.detach(), f"{prefix}.lora_B.weight": b.detach()}
    return tensors


def measure(build: Callable[[], nn.Module], rank: int, folder: Path) -> dict[str, Any]:
    """Return the bytes of each file, and the seconds to load the compact file, redraw factors and check digests."""
    config = AdapterConfig(rank=rank, init_a="signs")
    model = adapted_model(build, config)
    row: dict[str, Any] = {"rank": rank, "projections": len(adapted_projections(model))}
    for key, fused in (("peft", True), ("peft_separate", False)):
        save_file(peft_tensors(model, fused), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        row[key] = (folder / "adapter_model.safetensors").stat().st_size
    for dtype in (torch.bfloat16, torch.float32):
        redrawn = save_compact(folder, model, config, {}, dtype)
        assert len(redrawn) == row["projections"]
        row[f"compact_{str(dtype).removeprefix('torch.')}"] = (folder / FILE_NAME).stat().st_size
    start = time.perf_counter()
    factors = load_compact(folder, model).factors
    row["load_seconds"] = round(time.perf_counter() - start, 3)
    assert len(factors) == 2 * row["projections"]
    return row


def main() -> None:
    """Write the files, print and record their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    columns = ["peft", "peft_separate", "compact_float32", "compact_bfloat16"]
    table = Table("adapter", "rank", *(f"{c.replace('_', ', ')}, kB" for c in columns), "loading, s")
    for name, (build, rank) in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            record[name] = row = measure(build, rank, Path(folder))
        sizes = [f"{row[c] / 1000:,.1f} ({row[c] / row['peft']:.1%})" for c in columns]
        table.add_row(name, str(rank), *sizes, f"{row['load_seconds']:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"bytes": record}, indent=1) + "\n")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
