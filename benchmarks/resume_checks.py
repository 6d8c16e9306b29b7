"""Measure how much the digests for resuming slow the start of a run.

The benchmark writes weights with a decoder's shapes as safetensors, reads the file as `from_pretrained` does, and
computes the digest of the weights. Then the benchmark computes the digest of 20,000 rows of tokens. The throughput is
extrapolated to a 7B model (13.5 GB in bfloat16).

    OMP_NUM_THREADS=1 python -m benchmarks.resume_checks --gigabytes 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from datamodules.tokens.tokenizing import TokenDataset
from modules.training.frozen_digest import digest_of

SEVEN_B = 13.5e9  # Bytes of a 7B model in bfloat16.
WIDTH, HIDDEN = 4096, 11008


def seconds(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gigabytes * 1e9 / (2 * WIDTH * (4 * WIDTH + 3 * HIDDEN))))
    shapes = {"attention": (4 * WIDTH, WIDTH), "mlp": (3 * HIDDEN, WIDTH)}
    state = {f"{i}.{n}": torch.full(s, i + 0.5, dtype=torch.bfloat16) for i in range(layers) for n, s in shapes.items()}
    size = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(state, path)
        del state
        loaded: dict[str, torch.Tensor] = {}
        reading = seconds(lambda: loaded.update({n: t.clone() for n, t in load_file(path).items()}))
        digest = seconds(lambda: digest_of(loaded))
        loaded.clear()
        rows = {"input_ids": list(np.ones((20_000, 100), np.int32)), "length": [100] * 20_000}
        table = datasets.Dataset.from_dict(
            rows,
            features=datasets.Features(
                {"input_ids": datasets.List(datasets.Value("int32")), "length": datasets.Value("int32")}
            ),
        )
        tokens = TokenDataset(table, {"label": torch.zeros(20_000, dtype=torch.int64)})
        row_digest = seconds(tokens.rows_digest)
    figures = {
        "bytes of weights": size,
        "reading from the page cache, GB/s": round(size / reading / 1e9, 2),
        "digest of weights, GB/s": round(size / digest / 1e9, 2),
        "7B: reading alone, s": round(SEVEN_B * reading / size, 2),
        "7B: digest, s (in a thread beside the reading of the data)": round(SEVEN_B * digest / size, 2),
        "digest of 20,000 rows of 100 tokens, s": round(row_digest, 4),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
