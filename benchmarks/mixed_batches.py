"""Mixed batches and banks: throughput with many adapters in a batch, and sizes and reading times of a bank.

A batch of 64 rows has 1, 4, 16 or 64 different adapters. The arms are

- `ours`: one forward pass within `bank.batch`, with the gathering of each batch's adapters;
- `PEFT`: one forward pass of PEFT with `adapter_names`, which loops over the adapters;
- `in turn`: a forward pass for each adapter over its rows, by a model without adapters: the time of merged models that
  are all kept in memory;
- `merging`: as `in turn`, with one model in memory, into which each adapter is merged before its rows.

The backbones have random weights: RoBERTa with the sizes of MiniLM, and ViT-S/16. B is trained and A has the
initialiser `signs`, in query and value.

    python -m benchmarks.mixed_batches --output docs/results/mixed_batches.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import timm
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from benchmarks.harness import (
    measured,
    paired_ratio,
    parse,
    parser,
    ratio_text,
    section,
    table,
    take_turns,
)
from modules.adapters import AdapterConfig, adapted_projections, adapter_state, attach, merge, unmerge
from modules.formats.bank import Bank, BankAdapter, Member, member_of, save_bank
from modules.formats.peft import write_peft_files
from modules.formats.peft_writing import to_peft

ROWS = 64
COUNTS = (1, 4, 16, 64)
SIZES = (1, 100, 1000)
CONFIG = AdapterConfig(rank=8, targets=["query", "value"], init_a="signs")


class Setting(NamedTuple):
    """A backbone without a head of its own, and a function from a number of rows to the backbone's inputs."""

    model: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]


def roberta() -> Setting:
    """Return a RoBERTa with the sizes of MiniLM, and texts of 32 tokens."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=2000, **sizes)).roberta
    return Setting(model.eval(), lambda rows: {"input_ids": torch.randint(4, 2000, (rows, 32))})


def vit() -> Setting:
    """Return a ViT-S/16, and images of 224 × 224."""
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    return Setting(model.eval(), lambda rows: {"x": torch.randn(rows, 3, 224, 224)})


SETTINGS = {"roberta": roberta, "vit": vit}


def random_members(model: nn.Module, count: int) -> Iterator[tuple[str, Member]]:
    """Yield adapters with random B. The adapters are not trained, since the time does not depend on the numbers."""
    member = member_of(model, CONFIG, {}, None, {"r": CONFIG.rank}, {})
    for i in range(count):
        bs = {name: 0.02 * torch.randn(b.shape) for name, b in member.adapter.bs.items()}
        yield f"a{i}", member._replace(adapter=member.adapter._replace(bs=bs))


def write(path: Path, model: nn.Module, count: int) -> None:
    """Write a bank of random adapters for a model with adapters."""
    first = next(random_members(model, 1))[1]
    adapters: Iterator[tuple[str, BankAdapter]] = ((n, m.adapter) for n, m in random_members(model, count))
    with path.open("wb") as file:
        save_bank(file, first.shared, first.frozen, adapters)


def write_peft(folder: Path, model: nn.Module) -> None:
    """Write one adapter as a PEFT directory."""
    content, tensors = to_peft(model, CONFIG, adapter_state(model), {})
    write_peft_files(folder, content, tensors, torch.float32)


def throughput(name: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds by arm and round for a batch with `count` adapters."""
    plain, inputs_of = SETTINGS[name]()
    inputs = inputs_of(arguments.rows)
    names = [f"a{row % count}" for row in range(arguments.rows)]
    attached = copy.deepcopy(plain)
    attach(attached, CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "bank"), attached, count)
        write_peft(Path(folder), attached)
        bank = Bank.open(Path(folder, "bank"))
        ours = copy.deepcopy(plain)
        bank.attach(ours)
        theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder, adapter_name="a0")
        for i in range(1, count):
            theirs.load_adapter(folder, adapter_name=f"a{i}")
    theirs.eval()
    groups = {n: [row for row, other in enumerate(names) if other == n] for n in dict.fromkeys(names)}

    def mixed() -> None:
        with bank.batch(names):
            ours(**inputs)

    def of_peft() -> None:
        theirs(**inputs, adapter_names=names)

    def in_turn() -> None:
        for rows in groups.values():
            plain(**{key: tensor[rows] for key, tensor in inputs.items()})

    def merging() -> None:
        projections = adapted_projections(attached)
        for adapter, rows in groups.items():
            for key, b in bank.read(adapter).bs.items():
                projections[key][1].B.data.copy_(b)
            merge(attached)
            attached(**{key: tensor[rows] for key, tensor in inputs.items()})
            unmerge(attached)

    arms: dict[str, Callable[[], None]] = {"ours": mixed, "PEFT": of_peft, "in turn": in_turn, "merging": merging}
    with torch.no_grad():
        seconds = take_turns(arms, arguments.rounds, warm_up=1)
    others = [arm for arm in arms if arm != "ours"]
    return {
        "seconds": seconds,
        "rows_per_second": {arm: arguments.rows / statistics.median(values) for arm, values in seconds.items()},
        "times_of_ours": {arm: paired_ratio(seconds[arm], seconds["ours"]) for arm in others},
    }


def files(name: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes of a bank and of PEFT directories, and the seconds to open the bank and to read an adapter."""
    model = SETTINGS[name]().model
    attach(model, CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bank")
        write(path, model, count)
        directory = Path(folder, "peft")
        directory.mkdir()
        write_peft(directory, model)
        opening = [_seconds(partial(Bank.open, path)) for _ in range(arguments.rounds)]
        bank = Bank.open(path)
        chosen = [bank.names[i * len(bank.names) // arguments.rounds] for i in range(arguments.rounds)]
        return {
            "bank_bytes": path.stat().st_size,
            "peft_bytes": count * sum(file.stat().st_size for file in directory.iterdir()),
            "open_seconds": opening,
            "read_seconds": [_seconds(partial(bank.read, adapter)) for adapter in chosen],
        }


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print both tables."""
    common = parser(__doc__, rounds=15, quick_rounds=2)
    common.add_argument("--families", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    arguments = parse(common)
    arguments.rows = 8 if arguments.quick else ROWS
    counts, sizes = ((1, 4), (1, 20)) if arguments.quick else (COUNTS, SIZES)
    for family in arguments.families:
        rows = []
        for count in counts:
            name = f"{family}, {count} adapters in {arguments.rows} rows"
            if (record := measured(arguments, name)) is None:
                with section(arguments, name) as record:
                    record |= throughput(family, count, arguments)
            ratios = [ratio_text(record["times_of_ours"][arm]) for arm in ("PEFT", "in turn", "merging")]
            rows.append([str(count), f"{record['rows_per_second']['ours']:.1f}", *ratios])
        table(f"{family}: {arguments.rows} rows", ["adapters", "ours, rows/s", "PEFT", "in turn", "merging"], rows)
    rows = []
    for count in sizes:
        if (record := measured(arguments, f"a bank of {count}")) is None:
            with section(arguments, f"a bank of {count}") as record:
                record |= files("roberta", count, arguments)
        sizes_in_mb = [f"{record[key] / 1e6:.2f}" for key in ("bank_bytes", "peft_bytes")]
        times = [f"{1000 * statistics.median(record[key]):.2f}" for key in ("open_seconds", "read_seconds")]
        rows.append([str(count), *sizes_in_mb, *times])
    table("Files, roberta", ["adapters", "bank, MB", "PEFT, MB", "open, ms", "read one, ms"], rows)


if __name__ == "__main__":
    main()
