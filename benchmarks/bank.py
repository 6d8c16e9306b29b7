"""Banks against PEFT directories: bytes and files of 1, 100 and 1,000 adapters, and seconds to open and to read.

The adapters have the shapes of MiniLM in RoBERTa's class with two classes, and of ViT-S/16 with ten classes, each with
its head, rank 8 on query and value, and random B. The bank's A is stored (`orthogonal`). A PEFT directory is an adapter
that `bank unpack` writes: PEFT's two files and labels.json. PEFT cannot adapt slices of ViT's fused qkv, so a directory
has a stacked A and a block-diagonal B with zeros.

The arms of the times take turns, and the files are in the page cache. Each round reads another adapter of the bank.
With --processor, the seconds are CPU time. CPU time equals the time on an idle machine here: nothing waits for a disk.

- `open the bank`: `Bank.open`, which reads and checks the header;
- `open a directory`: `safe_open` of one adapter_model.safetensors, and the names of its tensors;
- `read from the bank`: `Bank.read` of one adapter, with its digest checked;
- `read a directory`: adapter_config.json, and all tensors of one adapter_model.safetensors;
- `ready in the bank`: `bank.batch` of one adapter that is not in memory;
- `ready in PEFT`: `load_adapter` of one directory.

    python -m benchmarks.bank --threads 1 --processor --output docs/results/bank.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import peft
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from app.export.bank import unpack
from benchmarks.harness import measured, parse, parser, section, table, take_turns
from modules.adapters import AdapterConfig, adapter_state, attach
from modules.formats.bank import Bank, BankAdapter, Member, member_of, save_bank
from modules.formats.peft import CONFIG as PEFT_CONFIG
from modules.formats.peft import WEIGHTS
from modules.formats.peft_writing import to_peft

SIZES = (1, 100, 1000)
CONFIG = AdapterConfig(rank=8, targets=["query", "value"])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Setting(NamedTuple):
    """A model with random weights, the name of its head, and the number of classes."""

    build: Callable[[], nn.Module]
    head: str
    classes: int


def minilm() -> nn.Module:
    """Return a RoBERTa with the sizes of MiniLM, and two classes."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=2000, num_labels=2, **sizes))


SETTINGS = {
    "minilm": Setting(minilm, "classifier", 2),
    "vit-s": Setting(lambda: timm.create_model("vit_small_patch16_224", num_classes=10), "head", 10),
}


def built(setting: Setting) -> nn.Module:
    """Return the model of a setting, always with the same weights."""
    torch.manual_seed(0)
    return setting.build().eval()


def first_member(setting: Setting) -> Member:
    """Return one adapter of a new model, with its head and class names."""
    model = built(setting)
    tensors = model.get_submodule(setting.head).state_dict()
    attach(model, CONFIG, exclude=[setting.head])
    content, _ = to_peft(model, CONFIG, adapter_state(model), {setting.head: tensors})
    heads = {f"{setting.head}.{key}": tensor for key, tensor in tensors.items()}
    labels = [f"class {i}" for i in range(setting.classes)]
    return member_of(model, CONFIG, heads, labels, content, {setting.head: (setting.head,)})


def random_adapters(member: Member, count: int) -> Iterator[tuple[str, BankAdapter]]:
    """Yield adapters with random B and heads. Times and sizes do not depend on the numbers."""
    for i in range(count):
        parts = [
            {key: 0.02 * torch.randn(tensor.shape) for key, tensor in tensors.items()}
            for tensors in (member.adapter.bs, member.adapter.heads)
        ]
        yield f"a{i:04}", member.adapter._replace(bs=parts[0], heads=parts[1])


def write(path: Path, member: Member, count: int, dtype: torch.dtype = torch.float32) -> None:
    """Write a bank of random adapters."""
    with path.open("wb") as file:
        save_bank(file, member.shared, member.frozen, random_adapters(member, count), dtype)


def sizes(member: Member, count: int, folder: Path) -> dict[str, Any]:
    """Return bytes and files of a bank, and of as many PEFT directories. All directories have the same size."""
    record: dict[str, Any] = {"bank_files": 1}
    for name, dtype in DTYPES.items():
        write(folder / name, member, count, dtype)
        record[f"bank_bytes_{name}"] = (folder / name).stat().st_size
    for name in DTYPES:
        directory = folder / f"peft {name}"
        unpack(Bank.open(folder / name), "a0000", directory)
        files = [file.stat().st_size for file in directory.iterdir()]
        record |= {f"peft_bytes_{name}": count * sum(files), "peft_files": count * len(files)}
    return record


def seconds(
    member: Member, setting: Setting, count: int, rounds: int, folder: Path, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return seconds by arm and round."""
    path, directory = folder / "bank", folder / "peft"
    write(path, member, count)
    bank = Bank.open(path)
    unpack(bank, bank.names[0], directory)
    # Consecutive reads are of adapters far apart in the file.
    names = cycle(bank.names[i * 37 % count] for i in range(count))
    bank.attach(built(setting), cached=0)
    theirs = peft.PeftModel.from_pretrained(built(setting), directory, adapter_name="first")

    def open_directory() -> None:
        with safe_open(directory / WEIGHTS, framework="pt") as opened:
            list(opened.keys())

    def read_directory() -> None:
        json.loads((directory / PEFT_CONFIG).read_text())
        load_file(directory / WEIGHTS)

    def ready_in_bank() -> None:
        with bank.batch([next(names)]):
            pass

    def ready_in_peft() -> float:
        start = clock()
        theirs.load_adapter(directory, adapter_name="second")
        elapsed = clock() - start
        theirs.delete_adapter("second")
        return elapsed

    arms: dict[str, Callable[[], Any]] = {
        "open the bank": partial(Bank.open, path),
        "open a directory": open_directory,
        "read from the bank": lambda: bank.read(next(names)),
        "read a directory": read_directory,
        "ready in the bank": ready_in_bank,
        "ready in PEFT": ready_in_peft,
    }
    return take_turns({name: partial(_run, arm) for name, arm in arms.items()}, rounds, clock=clock)


def _run(arm: Callable[[], Any]) -> float | None:
    """Run an arm, and return its own time in seconds if the arm measures one."""
    result = arm()
    return result if isinstance(result, float) else None


def main() -> None:
    """Measure and print both tables."""
    common = parser(__doc__, rounds=31, quick_rounds=3, processor=True)
    common.add_argument("--families", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    arguments = parse(common)
    counts = (1, 20) if arguments.quick else SIZES
    size_rows, time_rows = [], []
    for family in arguments.families:
        setting = SETTINGS[family]
        member = first_member(setting)
        for count in counts:
            name = f"{family}, {count} adapters"
            if (record := measured(arguments, name)) is None:
                with section(arguments, name) as record, tempfile.TemporaryDirectory() as folder:
                    record |= sizes(member, count, Path(folder))
                    record["seconds"] = seconds(member, setting, count, arguments.rounds, Path(folder), arguments.clock)
            megabytes = [
                f"{record[f'{kind}_bytes_{dtype}'] / 1e6:.2f}" for kind in ("bank", "peft") for dtype in DTYPES
            ]
            size_rows.append([family, f"{count:,}", *megabytes, f"{record['peft_files']:,}"])
            medians = [f"{1000 * statistics.median(values):.2f}" for values in record["seconds"].values()]
            time_rows.append([family, f"{count:,}", *medians])
    columns = [f"{kind}, {dtype}, MB" for kind in ("bank", "PEFT") for dtype in DTYPES]
    table("Sizes", ["adapters of", "number", *columns, "PEFT, files"], size_rows)
    table("Milliseconds, median", ["adapters of", "number", *record["seconds"]], time_rows)


if __name__ == "__main__":
    main()
