"""Small backbones of every family that the table of roles knows, built from configurations with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import timm
import torch
from timm.layers import SwiGLU
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from modules.adapters import AdapterConfig, adapter_state, attach

TEXT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # at so small a width the usual 0.02 leaves next to nothing of the input
}


@dataclass
class Backbone:
    """A pretrained model to adapt, with inputs for it and what a correct table of roles finds in it."""

    model: nn.Module
    inputs: dict[str, Tensor]
    counts: dict[str, int]  # projections of each role, the head's aside
    head: tuple[str, ...] = ()
    reference: nn.Module = field(init=False)  # as it was before any adapter

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
        """Squared distance to fixed noise; that to a constant has no gradient behind a layer norm."""
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
    return Backbone(BertModel(BertConfig(**TEXT)), _tokens(), counts | {"other": 1})  # its pooler


def roberta() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_out"), 2)
    model = RobertaForSequenceClassification(RobertaConfig(**TEXT, num_labels=3))
    return Backbone(model, _tokens(), counts, head=("classifier",))


def bart() -> Backbone:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=30, d_model=16, max_position_embeddings=32, init_std=0.2, **sides, **heads)
    counts = dict.fromkeys(("query", "key", "value", "output"), 3) | {"mlp_in": 2, "mlp_out": 2}
    return Backbone(BartForConditionalGeneration(config), _tokens(), counts)  # lm_head is tied: not to be found


def llama() -> Backbone:
    counts = dict.fromkeys(("query", "key", "value", "output", "mlp_in", "mlp_gate", "mlp_out"), 2)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))  # k and v: 8 rows, q: 16
    return Backbone(model, _tokens(), counts, head=("lm_head",))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 30, (2, 7))}


BACKBONES: dict[str, Callable[[], Backbone]] = {f.__name__: f for f in (vit, vit_swiglu, bert, roberta, bart, llama)}


@pytest.fixture(params=list(BACKBONES))
def backbone(request: pytest.FixtureRequest, deterministic: None) -> Backbone:
    """Each family in turn; `parametrize("backbone", ["vit"], indirect=True)` for one of them."""
    return BACKBONES[request.param]()


@pytest.fixture
def randomize() -> Callable[[nn.Module], None]:
    """Fill all factors with noise: at the start one is zero, which hides errors."""

    @torch.no_grad()
    def fill(model: nn.Module) -> None:
        for factor in adapter_state(model).values():
            factor.normal_(std=0.2)

    return fill
