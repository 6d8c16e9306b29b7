"""Packed sequences: their loss, and its gradient, are those of the same sequences apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.contract import IGNORE_INDEX
from datamodules.tokens.conversations import ConversationEncoder
from datamodules.tokens.packing import PadPacks, PadSequences, best_fit
from modules.adapters import AdapterConfig
from modules.language_modeling import LanguageModel
from tests.causal_backbones import CHAT, CONFIGS, byte_tokenizer, save_decoder

LENGTH = 160


def conversations(size: int) -> list[dict[str, Any]]:
    """Rows of several lengths, as the data module makes them."""
    draw, rows = random.Random(0), []
    encoder = ConversationEncoder(byte_tokenizer(), CHAT, LENGTH, end=2)
    for index in range(size):
        words = ["".join(draw.choices("abcde ", k=draw.randrange(1, 50))) for _ in range(2)]
        ids, learnt = encoder.conversation(
            [{"role": r, "content": w} for r, w in zip(("user", "assistant"), words, strict=True)]
        )
        labels = [token if own else IGNORE_INDEX for token, own in zip(ids, learnt, strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "index": index})
    return rows


def model_of(folder: Path, kind: str) -> LanguageModel:
    """A model whose adapter is not zero."""
    adapter = AdapterConfig(train="both", rank=4, alpha=8.0, targets=["attention"])
    backbone = str(save_decoder(folder, kind))
    model = LanguageModel(backbone=backbone, backbone_dtype="float32", adapter=adapter, schedule="constant")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def loss_and_gradients(model: LanguageModel, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model.loss(batch)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_and_unpacked_losses_agree(tmp_path: Path, kind: str) -> None:
    model, rows = model_of(tmp_path, kind), conversations(9)
    packs = best_fit([len(row["input_ids"]) for row in rows], LENGTH)
    assert len(packs) < len(rows) - 2
    packed = PadPacks(2)([[rows[index] for index in pack] for pack in packs])
    assert (packed["position_ids"] == 0).sum() > len(rows)  # some packs are filled up
    apart = PadSequences(2)(rows)
    assert (packed["labels"] != IGNORE_INDEX).sum() == (apart["labels"] != IGNORE_INDEX).sum()
    (loss, gradients), (expected, wanted) = loss_and_gradients(model, packed), loss_and_gradients(model, apart)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert len(gradients) == len(wanted) > 0
    for found, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pack_without_positions_would_be_something_else(tmp_path: Path, kind: str) -> None:
    model, rows = model_of(tmp_path, kind), conversations(3)
    packed = PadPacks(2)([rows])
    positions = packed.pop("position_ids")
    with torch.no_grad():
        together, apart = model.loss(packed), model.loss(packed | {"position_ids": positions})
    assert (together - apart).abs() > 1e-3  # what the test above would see


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_fills_a_pack_up_is_of_no_effect(tmp_path: Path, kind: str) -> None:
    model, rows = model_of(tmp_path, kind), conversations(4)
    with torch.no_grad():
        losses = [model.loss(PadPacks(token)([rows[:3], rows[3:]])) for token in (2, 77)]
        weights = [
            sum(label != IGNORE_INDEX for row in part for label in row["labels"]) for part in (rows[:3], rows[3:])
        ]
        alone = [model.loss(PadPacks(2)([part])) for part in (rows[:3], rows[3:])]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
    mean = sum(weight * loss for weight, loss in zip(weights, alone, strict=True)) / sum(weights)
    torch.testing.assert_close(losses[0], mean, rtol=0, atol=1e-5)
