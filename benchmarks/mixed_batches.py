"""Mixed batches: throughput with 1, 4, 16 or 64 adapters in a batch of 64 rows, beside PEFT and merged models.

The arms are

- `ours`: one forward pass within `bank.batch`, including the stacking of the batch's adapters;
- `one adapter`: an ordinary batch of the same model, in which all rows have one adapter. This time is a lower bound;
- `PEFT`: one forward pass of PEFT with `adapter_names`, which loops over the adapters;
- `in turn`: a forward pass for each adapter over its rows, by a model without adapters. This is the time of merged
  models that are all in memory;
- `merging`: as `in turn`, with one model in memory, into which each adapter is merged before its rows.

The backbones have random weights: RoBERTa with the sizes of MiniLM (32 tokens), ViT-S/16 (224 pixels), and ten layers
with the sizes of SmolLM2-135M for one token a row, as in generation. B of rank 8 is trained, and A has the initialiser
`signs`. PEFT has its default, factors in float32. PEFT adapts the fused qkv of the ViT as a whole.

    python -m benchmarks.mixed_batches --threads 2 --output docs/results/mixed_batches.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import timm
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, RobertaConfig, RobertaForSequenceClassification

from benchmarks.harness import measured, paired_ratio, parse, parser, ratio_text, section, table, take_turns
from modules.adapters import AdapterConfig, adapted_projections, adapter_state, attach, merge, unmerge
from modules.formats.bank import Bank, BankAdapter, Member, member_of, save_bank
from modules.formats.peft import write_peft_files
from modules.formats.peft_writing import to_peft

ROWS = 64
COUNTS = (1, 4, 16, 64)
OTHERS = ("PEFT", "in turn", "merging")


class Setting(NamedTuple):
    """A backbone without a head, a function from a number of rows to its inputs, and the adapted roles."""

    model: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    targets: list[str]

    @property
    def config(self) -> AdapterConfig:
        """Configuration of the adapters."""
        return AdapterConfig(rank=8, targets=self.targets, init_a="signs")


def roberta(targets: list[str]) -> Setting:
    """Return a RoBERTa with the sizes of MiniLM, and texts of 32 tokens."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=2000, **sizes)).roberta
    return Setting(model, lambda rows: {"input_ids": torch.randint(4, 2000, (rows, 32))}, targets)


def vit() -> Setting:
    """Return a ViT-S/16, and images of 224 × 224."""
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    return Setting(model, lambda rows: {"x": torch.randn(rows, 3, 224, 224)}, ["query", "value"])


def llama() -> Setting:
    """Return ten layers with the sizes of SmolLM2-135M, and one token for each row."""
    heads = {"num_hidden_layers": 10, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaModel(LlamaConfig(vocab_size=2000, hidden_size=576, intermediate_size=1536, **heads))
    return Setting(model, lambda rows: {"input_ids": torch.randint(4, 2000, (rows, 1))}, ["all"])


SETTINGS: dict[str, Callable[[], Setting]] = {
    "roberta, query and value": lambda: roberta(["query", "value"]),
    "roberta, all": lambda: roberta(["all"]),
    "vit, query and value": vit,
    "llama, all, one token": llama,
}


def random_members(model: nn.Module, config: AdapterConfig, count: int) -> Iterator[tuple[str, Member]]:
    """Yield adapters with random B. The adapters are not trained, since the time does not depend on the numbers."""
    member = member_of(model, config, {}, None, {"r": config.rank}, {})
    for i in range(count):
        bs = {name: 0.02 * torch.randn(b.shape) for name, b in member.adapter.bs.items()}
        yield f"a{i}", member._replace(adapter=member.adapter._replace(bs=bs))


def write(path: Path, model: nn.Module, config: AdapterConfig, count: int) -> None:
    """Write a bank of random adapters for a model with adapters."""
    first = next(random_members(model, config, 1))[1]
    adapters: Iterator[tuple[str, BankAdapter]] = ((n, m.adapter) for n, m in random_members(model, config, count))
    with path.open("wb") as file:
        save_bank(file, first.shared, first.frozen, adapters)


def write_peft(folder: Path, model: nn.Module, config: AdapterConfig) -> None:
    """Write one adapter as a PEFT directory."""
    content, tensors = to_peft(model, config, adapter_state(model), {})
    write_peft_files(folder, content, tensors, torch.float32)


def throughput(setting: Setting, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds by arm and round for a batch with `count` adapters."""
    dtype = getattr(torch, arguments.dtype)
    plain = setting.model.eval().to(dtype)
    inputs = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in setting.inputs(arguments.rows).items()
    }
    names = [f"a{row % count}" for row in range(arguments.rows)]
    attached = copy.deepcopy(plain)
    attach(attached, setting.config)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "bank"), attached, setting.config, count)
        write_peft(Path(folder), attached, setting.config)
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

    def one_adapter() -> None:
        attached(**inputs)

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

    others = {"PEFT": of_peft, "in turn": in_turn, "merging": merging}
    arms = {"ours": mixed, "one adapter": one_adapter, **{name: others[name] for name in arguments.arms}}
    with torch.no_grad():
        seconds = take_turns(arms, arguments.rounds, warm_up=1)
    return {
        "seconds": seconds,
        "rows_per_second": {arm: arguments.rows / statistics.median(values) for arm, values in seconds.items()},
        "times_of_one_adapter": {arm: paired_ratio(seconds[arm], seconds["one adapter"]) for arm in arms},
        "times_of_ours": {arm: paired_ratio(seconds[arm], seconds["ours"]) for arm in arms},
    }


def main() -> None:
    """Measure and print a table for each backbone."""
    common = parser(__doc__, rounds=7, quick_rounds=2)
    common.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    common.add_argument("--arms", nargs="+", choices=OTHERS, default=list(OTHERS), help="arms beside ours")
    common.add_argument("--counts", type=int, nargs="+", help="numbers of adapters (default: 1 4 16 64)")
    common.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of the backbone")
    arguments = parse(common)
    arguments.rows = 8 if arguments.quick else ROWS
    columns = ["adapters", "ours, rows/s", "ours / one adapter", *(f"{arm} / ours" for arm in arguments.arms)]
    for setting in arguments.settings:
        rows = []
        for count in arguments.counts or ((1, 4) if arguments.quick else COUNTS):
            name = f"{setting}, {arguments.dtype}, {count} adapters in {arguments.rows} rows"
            if (record := measured(arguments, name, {"arms": arguments.arms})) is None:
                with section(arguments, name) as record:
                    record["arms"] = arguments.arms
                    record |= throughput(SETTINGS[setting](), count, arguments)
            ratios = [ratio_text(record["times_of_ours"][arm]) for arm in arguments.arms]
            over_floor = ratio_text(record["times_of_one_adapter"]["ours"])
            rows.append([str(count), f"{record['rows_per_second']['ours']:.1f}", over_floor, *ratios])
        table(f"{setting}, {arguments.dtype}: {arguments.rows} rows", columns, rows)


if __name__ == "__main__":
    main()
