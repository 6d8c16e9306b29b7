"""The frozen prefix of a backbone: its blocks, its hidden states, and outputs computed from cached states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from app.commands.memory_estimate import training_memory
from datamodules.contract import HIDDEN
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapter_state, attach
from modules.scaling.frozen_prefix import FrozenPrefix, backbone_inputs, transformers_prefix

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}


class Task(SimpleNamespace):
    """The attributes of a module that a prefix reads."""

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        with backbone_inputs(self.prefix, batch) as inputs:
            logits = self.backbone(**inputs).logits
        # logits of a decoder, without padding
        return logits if logits.ndim == 2 else logits[batch["attention_mask"].bool()]

    def build(self) -> FrozenPrefix:
        heads = [name.removeprefix("backbone.") for name in self.head_names]
        self.prefix = transformers_prefix(self.backbone, self.projections, heads, self.trainer, self.outputs)
        return self.prefix


def task(backbone: Any, layers: int | None = 1, targets: Any = "all", heads: tuple[str, ...] = ()) -> Any:
    projections = attach(backbone, AdapterConfig(rank=2, targets=targets, layers=layers), exclude=heads)
    for factor in adapter_state(backbone).values():
        factor.normal_(std=0.2)
    plugin = SimpleNamespace(forward_context=nullcontext)
    trainer = SimpleNamespace(precision="32-true", precision_plugin=plugin)
    names = [f"backbone.{head}" for head in heads]
    return Task(backbone=backbone, projections=projections, head_names=names, trainer=trainer, prefix=None)


def encoder(**keys: Any) -> Any:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3, **keys))


def texts() -> dict[str, Tensor]:
    ids = torch.randint(4, 30, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


@pytest.mark.parametrize("family", ["encoder", "decoder"])
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_and_gradients_from_cached_states_are_the_same(family: str, layers: int) -> None:
    backbone: Any = encoder() if family == "encoder" else LlamaForCausalLM(LlamaConfig(**SIZES))
    heads = ("classifier",) if family == "encoder" else ()
    module, batch = task(backbone.train(), layers, heads=heads), texts()
    prefix = module.build()
    assert prefix.depth == 3 - layers
    assert str(prefix) == f"{3 - layers} of 3 blocks"
    modes = {name: part.training for name, part in backbone.named_modules()}
    modes["", "generator"] = torch.random.get_rng_state().tolist()
    hidden = prefix.states(batch)
    assert modes.pop(("", "generator")) == torch.random.get_rng_state().tolist()  # dropout was off and drew nothing
    assert modes == {name: part.training for name, part in backbone.named_modules()}
    assert hidden.shape == (3, 7, 16)
    assert not hidden.requires_grad

    backbone.eval()
    expected = module.outputs(batch)
    mask = batch["attention_mask"]
    cached = {HIDDEN: hidden * mask[..., None], "attention_mask": mask}
    torch.testing.assert_close(module.outputs(cached), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.outputs(batch), expected, rtol=0, atol=0)  # the cached states are not used again

    gradients = []
    for inputs in (batch, cached):
        backbone.zero_grad()
        module.outputs(inputs).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def barely_positioned() -> OPTForCausalLM:
    """Return a decoder that adds positions to its inputs. The positions are so small that outputs hardly change."""
    model = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16))
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.mul_(1e-3)
    return model


@pytest.mark.parametrize(
    "build",
    [
        barely_positioned,
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, embedding_multiplier=1.0001)),
        lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)),  # its head reads the last token, even if padded
    ],
    ids=["positions", "scaled", "pooled"],
)
def test_backbones_that_change_their_input_embeddings_are_refused(build: Callable[[], Any]) -> None:
    prefix = task(build().eval()).build()
    batch = {"input_ids": torch.randint(4, 30, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with pytest.raises(
        ModelError, match=r"data\.cache_prefix: .* cannot continue from the output of one of its blocks"
    ):
        prefix.states(batch)  # the first batch has the longest rows, and thus no padding


def test_the_check_does_not_change_the_batch() -> None:
    module = task(LlamaForCausalLM(LlamaConfig(**SIZES)))
    batch = texts() | {"labels": torch.randint(4, 30, (3, 7))}
    before = copy.deepcopy(batch)
    first, second = module.build().states(batch), module.prefix.states(batch)
    assert torch.equal(first, second)  # only the first call is checked
    assert all(torch.equal(batch[key], before[key]) for key in before)
    # one token per row leaves no room for padding
    module.build().states({key: value[:, :1] for key, value in batch.items()})


def test_the_cache_key_depends_on_the_prefix_alone() -> None:
    first = encoder()

    def key(change: Any = None, layers: int = 1, **config: Any) -> str:
        backbone = copy.deepcopy(first)
        for name, value in config.items():
            setattr(backbone.config, name, value)
        if change is not None:
            with torch.no_grad():
                backbone.get_parameter(change).view(-1)[100] += 1
        return task(backbone, layers, heads=("classifier",)).build().key  # type: ignore[no-any-return]

    expected = key()
    assert key("classifier.dense.weight") == expected
    assert key("roberta.encoder.layer.2.output.dense.weight") == expected
    assert key(id2label={0: "a", 1: "b", 2: "c"}) == expected
    others = [
        key("roberta.encoder.layer.1.output.dense.weight"),
        key("roberta.embeddings.word_embeddings.weight"),
        key(layers=2),
        key(layer_norm_eps=1e-3),
    ]
    assert len({expected, *others}) == 5


def test_all_blocks_are_frozen_without_adapters() -> None:
    backbone = encoder().requires_grad_(False)
    module = task(backbone, heads=("classifier",))
    module.projections = []
    assert module.build().depth == 3


def test_adapters_outside_of_blocks_are_refused() -> None:
    backbone = encoder()
    module = task(backbone, None, [r"regex:.*layer\.2\.output\.dense", "regex:classifier.dense"])
    with pytest.raises(ModelError, match=r"projection .*classifier\.dense is in no block of roberta\.encoder"):
        module.build()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_memory_counts_the_adapted_blocks_alone(checkpointing: bool) -> None:
    config, sizes = LlamaConfig(**SIZES), {"batch_size": 2, "tokens": 8, "gradient_checkpointing": checkpointing}
    last, every = (training_memory(config, AdapterConfig(rank=2, layers=n), **sizes) for n in (1, None))
    assert last.factors * 3 == every.factors
    assert last.activations < every.activations
    assert last.weights == every.weights
