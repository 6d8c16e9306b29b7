from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, ViTConfig

from app.commands.memory_estimate import LiveBytes, MemoryEstimate, training_memory
from datamodules.contract import IGNORE_INDEX
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig
from modules.language_modeling import LanguageModel
from tests.causal_backbones import CONFIGS
from tests.support.allocations import peak_of

WIDTH, INNER, DEPTH, RANK, VOCABULARY = 32, 64, 3, 4, 100
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ADAPTER = AdapterConfig(rank=RANK)
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER + 2 * WIDTH  # q, o, k, v, the MLP, two norms
OUTSIDE = 2 * VOCABULARY * WIDTH + WIDTH  # embeddings, output layer, the last norm
ROTARY = 2 * 4 * WIDTH // 4 // 2  # frequencies and their copy, float32


def estimate(**keys: Any) -> MemoryEstimate:
    return training_memory(CONFIG, **{"adapter": ADAPTER, "batch_size": 4, "tokens": 16, **keys})


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_weights_factors_gradients_and_moments_are_plain_sums(dtype: str, size: int) -> None:
    found = estimate(backbone_dtype=dtype)
    trained = DEPTH * RANK * (WIDTH + WIDTH // 2)  # B of queries and of grouped values
    frozen = DEPTH * RANK * 2 * WIDTH  # A of both
    assert found.weights == size * (DEPTH * LAYER + OUTSIDE) + ROTARY
    assert found.factors == 4 * (trained + frozen)
    assert found.gradients == 4 * trained
    assert found.optimizer == 2 * 4 * trained + 4 * 2 * DEPTH  # two moments, and one step counter for each parameter
    assert found.gathered == 0


def test_a_tied_output_layer_counts_once() -> None:
    tied = replace_config(tie_word_embeddings=True)
    found = training_memory(tied, ADAPTER, batch_size=4, tokens=16)
    assert estimate().weights - found.weights == 2 * VOCABULARY * WIDTH


def replace_config(**keys: Any) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG.to_dict(), **keys})


def test_training_one_side_takes_less_than_both() -> None:
    one_side, both = estimate(), estimate(adapter=replace(ADAPTER, train="both"))
    assert one_side.factors == both.factors
    assert one_side.gradients < both.gradients
    assert one_side.optimizer < both.optimizer
    # Training A also keeps the layer's input (bfloat16, shared by query and value). A·x is kept in both cases.
    assert both.activations - one_side.activations >= DEPTH * 4 * 16 * WIDTH * 2


@pytest.mark.slow
def test_logits_take_twelve_bytes_for_each_token_in_the_loss_and_vocabulary_entry() -> None:
    wide = replace_config(vocab_size=5000)
    for learnt in (None, 7):  # log-probabilities, their gradient and the gradient of the logits, all float32
        found = training_memory(wide, ADAPTER, batch_size=4, tokens=16, response_tokens=learnt)
        assert found.logits == 12 * 4 * (learnt or 16) * 5000


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    two, four, six = (estimate(batch_size=size).activations for size in (2, 4, 6))
    assert six - four == four - two > 0.9 * two
    plain, checkpointed = estimate(), estimate(gradient_checkpointing=True)
    assert checkpointed.activations < 0.6 * plain.activations
    assert checkpointed.weights == plain.weights


def test_shards_divide_the_frozen_weights_and_nothing_else() -> None:
    unsharded, sharded = estimate(), estimate(shard_frozen=4)
    # the 4 processes divide the rows of each layer without remainder
    assert sharded.weights == 2 * (DEPTH * LAYER // 4 + OUTSIDE) + ROTARY
    assert sharded.gathered == 2 * 2 * LAYER  # two bytes each, for the current and the next layer
    for part in ("factors", "gradients", "optimizer", "activations", "logits"):
        assert getattr(sharded, part) == getattr(unsharded, part)
    assert sharded.total == sum(getattr(sharded, part) for part in MemoryEstimate.__dataclass_fields__)


@pytest.mark.parametrize(
    ("dtype", "precision", "checkpointing"),
    [("bfloat16", "32-true", False), ("bfloat16", "32-true", True), ("float32", "bf16-mixed", False)],
)
def test_the_allocator_measures_what_was_estimated(
    llama_path: Path, dtype: Any, precision: Any, checkpointing: bool
) -> None:
    batch_size, tokens, learnt = 4, 64, 60
    model = LanguageModel(str(llama_path), backbone_dtype=dtype, adapter=ADAPTER, gradient_checkpointing=checkpointing)
    ids = torch.randint(3, 200, (batch_size, tokens))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 0] = 0
    labels[:, :-learnt] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    peak = peak_of(step)
    found = training_memory(
        CONFIGS["llama"],
        ADAPTER,
        batch_size=batch_size,
        tokens=tokens,
        response_tokens=learnt,
        backbone_dtype=dtype,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )
    assert found.activations + found.logits == pytest.approx(peak, rel=0.03)


def test_live_bytes_count_each_storage_once() -> None:
    kept = torch.zeros(1000)
    live = LiveBytes(lambda made: "made")
    live.hold([kept, kept.view(10, 100)], "held")  # both share one storage
    with live:
        product = kept * 2  # 4000 bytes
        half = product[:500]  # a view
        del product
        assert live.now == {"held": 4000, "made": 4000}
        del half
        torch.zeros(10)
    assert live.now["made"] == 0
    assert live.peak == {"held": 4000, "made": 4000}


@pytest.mark.parametrize("keys", [{"batch_size": 0}, {"response_tokens": 17}, {"shard_frozen": 0}])
def test_impossible_numbers_are_refused(keys: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="must be 1 or more"):
        estimate(**keys)


def test_a_model_that_is_no_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="vit"):
        training_memory(ViTConfig(), ADAPTER, batch_size=1, tokens=1)
