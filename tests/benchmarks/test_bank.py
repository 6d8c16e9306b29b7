"""The benchmarks of banks and of mixed batches, on tiny models."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from app.export.bank import unpack
from benchmarks import bank, mixed_batches
from modules.formats.bank import Bank


def tiny_vit(classes: int = 3) -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=classes)


SETTING = bank.Setting(tiny_vit, "head", 3)


@torch.no_grad()
def test_directories_of_peft_compute_what_the_bank_computes(tmp_path: Path) -> None:
    bank.write(tmp_path / "bank", bank.first_member(SETTING), 3)
    opened = Bank.open(tmp_path / "bank")
    model: Any = bank.built(SETTING)
    opened.attach(model)
    x = torch.randn(3, 3, 16, 16)
    with opened.batch(opened.names):
        actual = model(x)
    for row, name in enumerate(opened.names):
        unpack(opened, name, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(bank.built(SETTING), tmp_path / name).eval()
        torch.testing.assert_close(theirs(x)[row], actual[row], atol=1e-5, rtol=1e-5)


def test_bytes_are_those_of_the_stored_numbers(tmp_path: Path) -> None:
    record = bank.sizes(bank.first_member(SETTING), 20, tmp_path)
    adapter = 2 * 2 * 32 * 8 + 33 * 3  # B of query and value in two blocks, and the head
    frozen = 4 * 2 * 2 * 8 * 32
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        header = record[f"bank_bytes_{dtype}"] - 20 * adapter * size - frozen
        assert 0 < header < 12_000
    # PEFT stores A twice as high, B of the whole qkv with zeros, and the head.
    assert record["peft_bytes_float32"] > 20 * 4 * (2 * (16 * 32 + 96 * 16) + 33 * 3)
    assert (record["bank_files"], record["peft_files"]) == (1, 60)


def test_times_have_every_arm(tmp_path: Path) -> None:
    seconds = bank.seconds(bank.first_member(SETTING), SETTING, 2, 2, tmp_path, time.perf_counter)
    assert len(seconds) == 6 and all(len(rounds) == 2 and min(rounds) > 0 for rounds in seconds.values())


def test_arms_of_mixed_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def setting() -> mixed_batches.Setting:
        return mixed_batches.Setting(tiny_vit(0), lambda rows: {"x": torch.randn(rows, 3, 16, 16)}, ["query", "value"])

    arguments = argparse.Namespace(rows=4, rounds=2, dtype="float32", arms=["PEFT", "in turn", "merging"])
    record = mixed_batches.throughput(setting(), 2, arguments)
    assert set(record["seconds"]) == {"ours", "one adapter", "PEFT", "in turn", "merging"}
    for arm, seconds in record["seconds"].items():
        ratios = sorted(a / b for a, b in zip(seconds, record["seconds"]["ours"], strict=True))
        assert record["times_of_ours"][arm]["median"] == pytest.approx(sum(ratios) / 2)
    monkeypatch.setattr(mixed_batches, "SETTINGS", {"tiny": setting})
    output = tmp_path / "mixed.json"
    monkeypatch.setattr(sys, "argv", ["mixed", "--quick", "--arms", "PEFT", "--output", str(output)])
    mixed_batches.main()
    assert list(json.loads(output.read_text())) == [f"tiny, bfloat16, {n} adapters in 8 rows" for n in (1, 4)]
