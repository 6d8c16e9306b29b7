"""Small backbones of every family in the table of roles, built from configurations with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import SwiGLU
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from modules.adapters import AdapterConfig, attach

TEXT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # with the usual 0.02, outputs would hardly depend on the input at this small width
}


@dataclass
class Backbone:
    """A model to adapt, its inputs, and the number of projections that a correct table of roles finds."""

    model: nn.Module
    inputs: dict[str, Tensor]
    counts: dict[str, int]  # projections of each role, without the head
    head: tuple[str, ...] = ()
    reference: nn.Module = field(init=False)  # copy of the model without adapters

    def __post_init__(self) -> None:
        self.model.eval()
        self.reference = copy.deepcopy(self.model)

    def attach(self, rank: int = 4, **config: object) -> nn.Module:
        attach(self.model, AdapterConfig(rank=rank, **config), exclude=self.head)  # type: ignore[arg-type]
        return self.model

    def run(self, model: nn.Module | None = None) -> Tensor:
        output = (model or self.model)(**self.inputs)
        return output if isinstance(output, Tensor) else output[0]

    def loss(self) -> Tensor:
        """Return the squared distance to fixed noise. A constant target would have no gradient after a layer norm."""
        output = self.run()
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return (output - target).square().mean()

    @torch.no_grad()
    def pretrained_output(self) -> Tensor:
        return self.run(self.reference)


def _vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes, **options)


def vit() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    return Backbone(_vit(), {"x": torch.randn(2, 3, 32, 32)}, counts, head=("head",))


def vit_swiglu() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_gate", "mlp_out"), 2)
    return Backbone(_vit(mlp_layer=SwiGLU), {"x": torch.randn(2, 3, 32, 32)}, counts, head=("head",))


def bert() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    return Backbone(BertModel(BertConfig(**TEXT)), _tokens(), counts | {"other": 1})  # the pooler is `other`


def roberta() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    model = RobertaForSequenceClassification(RobertaConfig(**TEXT, num_labels=3))
    return Backbone(model, _tokens(), counts, head=("classifier",))


def _deberta(**options: object) -> nn.Module:
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    return DebertaV2Model(DebertaV2Config(**TEXT, **positions, type_vocab_size=0, **options))


def deberta_v2() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    return Backbone(_deberta(), _tokens(), counts | {"other": 4})  # pos_key_proj and pos_query_proj


def deberta_v3() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    # keys and queries are used for positions too
    return Backbone(_deberta(share_att_key=True, position_buckets=4), _tokens(), counts)


def distilbert() -> Backbone:
    config = DistilBertConfig(vocab_size=30, dim=16, n_layers=2, n_heads=4, hidden_dim=24, initializer_range=0.2)
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    return Backbone(DistilBertModel(config), _tokens(), counts)


SIDES: dict[str, Any] = {
    f"{side}_{key}": n
    for side in ("encoder", "decoder")
    for key, n in (("layers", 1), ("ffn_dim", 24), ("attention_heads", 2))
}
TWO_SIDES = dict.fromkeys(("query", "key", "value", "output"), 3) | {"mlp_in": 2, "mlp_out": 2}


def bart() -> Backbone:
    config = BartConfig(vocab_size=30, d_model=16, max_position_embeddings=32, init_std=0.2, **SIDES)
    return Backbone(BartForConditionalGeneration(config), _tokens(), TWO_SIDES)  # lm_head is tied, so it is not found


def pegasus() -> Backbone:
    config = PegasusConfig(vocab_size=30, d_model=16, max_position_embeddings=32, init_std=0.2, **SIDES)
    return Backbone(PegasusForConditionalGeneration(config), _two_texts(), TWO_SIDES)


def _t5(**options: object) -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=24, **options)
    return T5ForConditionalGeneration(config)


def t5() -> Backbone:
    return Backbone(_t5(), _two_texts(), TWO_SIDES)


def t5_gated() -> Backbone:
    """Return a T5 like version 1.1 and Flan-T5, with a gated feed-forward layer and an untied lm_head."""
    model = _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    # transformers unties lm_head when it loads weights, not from the configuration
    model.lm_head.weight = nn.Parameter(torch.randn(30, 16))
    return Backbone(model, _two_texts(), TWO_SIDES | {"mlp_gate": 2}, head=("lm_head",))


def llama() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_gate", "mlp_out"), 2)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))  # k and v: 8 rows, q: 16
    return Backbone(model, _tokens(), counts, head=("lm_head",))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 30, (2, 7))}


def _two_texts() -> dict[str, Tensor]:
    return _tokens() | {"decoder_input_ids": torch.randint(4, 30, (2, 5))}


FAMILIES = (vit, vit_swiglu, bert, roberta, deberta_v2, distilbert, bart, t5_gated, llama)
VARIANTS = (deberta_v3, pegasus, t5)  # variants of the backbones above, tested only where they differ
BACKBONES: dict[str, Callable[[], Backbone]] = {f.__name__: f for f in FAMILIES + VARIANTS}
