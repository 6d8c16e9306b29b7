"""Bytes of gradients that two processes exchange in a step under DDP, and step times.

A ViT with a head is tuned in several ways under `DistributedDataParallel`, by one and by two processes (gloo, one
thread each). Each process has the same batch size. A communication hook counts the bytes of each gradient bucket. Both
processes share one machine, so no network is involved. The times show the cost of the all-reduce on one machine. The
bytes show the traffic in a network.

    python -m benchmarks.gradient_bytes --output docs/results/benchmark_gradient_bytes.json
"""

import json
import multiprocessing
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Arm, Seconds, parse, parser, section, table, take_turns
from modules.adapters import AdapterConfig, attach
from modules.scaling.sharding import FrozenShards

BATCH, CLASSES = 2, 10  # BATCH: images for each process.
ARMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "both": {"train": "both", "init_a": "kaiming"},
    "A": {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
    "B": {"train": "B"},
    "B, frozen weights shared": {"train": "B"},
}


class Counter:
    """Count the bytes of gradients in DDP's all-reduce."""

    def __init__(self) -> None:
        self.bytes = 0

    def hook(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Count a bucket and all-reduce it. DDP inspects the annotations, so they must not be strings."""
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)


def build(arm: str, quick: bool) -> nn.Module:
    """Build a ViT-B/16, or a small ViT with `quick`, with random float32 weights, a head and adapters of rank 8."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES, **(small if quick else {}))
    keys = ARMS[arm]
    if keys is not None:
        attach(model, AdapterConfig(rank=8, targets=["all"], **keys), exclude=["head"])
    return model.train()


def prepare(arm: str, world: int, quick: bool, results: dict[str, Any]) -> Arm:
    """Return a function that runs a training step of an arm and writes the exchanged bytes to `results`."""
    model = build(arm, quick)
    trained = [p for p in model.parameters() if p.requires_grad]
    counter = Counter()
    step: nn.Module = model
    if arm.endswith("shared") and world > 1:
        FrozenShards(model, torch.device("cpu"))
        names = [n for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if world > 1:
        step = DistributedDataParallel(model)
        step.register_comm_hook(None, counter.hook)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    side = 32 if quick else 224
    images = torch.randn(BATCH, 3, side, side)

    def run() -> None:
        counter.bytes = 0
        optimizer.zero_grad()
        step(images).square().mean().backward()
        optimizer.step()
        results[arm] = {"trained": sum(p.numel() for p in trained), "bytes": counter.bytes}

    return run


def work(rank: int, world: int, port: int, quick: bool, rounds: int, file: Path) -> None:
    """Measure all arms in one process. Rank 0 writes the results to `file`."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    # `take_turns` has a fixed seed, so all processes run the arms in the same order.
    seconds: Seconds = take_turns({arm: prepare(arm, world, quick, results) for arm in ARMS}, rounds, warm_up=1)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        file.write_text(json.dumps({arm: results[arm] | {"seconds": seconds[arm]} for arm in ARMS}))


def in_processes(world: int, quick: bool, rounds: int) -> dict[str, Any]:
    """Measure all arms in several processes, and return the results of rank 0 by arm.

    Raises:
        RuntimeError: If a process fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # Forked processes need no imports.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        processes = [
            context.Process(target=work, args=(rank, world, port, quick, rounds, file)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"One of {world} processes failed. See the messages above.")
        return dict(json.loads(file.read_text()))


def measure(quick: bool, rounds: int = 3) -> list[dict[str, Any]]:
    """Return for each arm the trained parameters, reduced bytes by step and process, and seconds of each step."""
    single, double = (in_processes(world, quick, rounds) for world in (1, 2))
    return [
        {
            "arm": arm,
            "trained_parameters": double[arm]["trained"],
            "gradient_bytes": double[arm]["bytes"],
            "expected_bytes": 4 * double[arm]["trained"],
            "seconds_1": single[arm]["seconds"],
            "seconds_2": double[arm]["seconds"],
        }
        for arm in ARMS
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, with images per second over all processes."""
    full = rows[0]["gradient_bytes"]
    lines = []
    for row in rows:
        rates = [world * BATCH / statistics.median(row[f"seconds_{world}"]) for world in (1, 2)]
        lines.append(
            [
                row["arm"],
                f"{row['trained_parameters']:,}",
                f"{row['gradient_bytes']:,}",
                f"{full / row['gradient_bytes']:.0f}",
                *(f"{rate:.1f}" for rate in rates),
            ]
        )
    title = "Gradients of a step (float32)"
    table(title, ["arm", "trained", "bytes", "full over this", "images/s, 1 process", "2 processes"], lines)


def main() -> None:
    """Measure, print and write."""
    arguments = parse(parser(__doc__, rounds=8))
    with section(arguments, "processes") as record:
        record["threads"] = 1  # Threads of each process.
        record["rows"] = rows = measure(arguments.quick, arguments.rounds)
    show(rows)


if __name__ == "__main__":
    main()
