"""Backbones and stacks of blocks with random weights, and the arms (ways of tuning) that the benchmarks compare.

Time and memory of a step grow linearly with depth in all arms (`benchmarks.scaling`). The input requires a gradient in
every arm, as below other adapted blocks. The arm "floor" computes only forward and the gradient to the input through
frozen weights, which every other training arm needs too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from benchmarks.harness import saved_bytes
from modules.adapters import AdapterConfig, attach
from modules.adapters.roles import find_projections, select

Batches = Sequence[tuple[Tensor, Tensor]]  # Pairs of inputs and gradients of the outputs.

LEARNING_RATE = 1e-5
VARIANTS = {
    "B": {"train": "B"},
    "A": {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
    "both": {"train": "both", "init_a": "kaiming"},
}
ARMS = {
    "forward only": "no graph",
    "floor": "gradient to the input, no adapter",
    "full": "all weights trained",
    "PEFT": "LoRA with PEFT's defaults: frozen weights in the dtype of the run, float32 factors, no autocast",
    "PEFT autocast": "the same under bfloat16 autocast",
    "PEFT bf16 factors": "autocast_adapter_dtype=False",
    "PEFT A frozen": "as PEFT, with requires_grad of A off",
    "PEFT A frozen, autocast": "the same under bfloat16 autocast",
    "PEFT LoRA-FA": "as PEFT, with create_lorafa_optimizer",
    "ours B": "no autocast; factors in float32, cast within the layer to the dtype of the run",
    "ours A": "the same",
    "ours both": "the same",
    "ours B, slices": "a fused layer adapted slice by slice, with a rank for each",
}
ONLY_BFLOAT16 = ("PEFT autocast", "PEFT bf16 factors", "PEFT A frozen, autocast")


class VisionBlocks(nn.Sequential):
    """Blocks of timm's ViT, (batch, tokens, width) → (batch, tokens, width)."""

    def __init__(self, width: int, depth: int) -> None:
        blocks = [Block(width, width // 64, qkv_bias=True) for _ in range(depth)]
        super().__init__(*blocks)


class Vision(nn.Module):
    """A whole ViT of timm without its classifier, (batch, 3, size, size) → (batch, tokens, width)."""

    def __init__(self, name: str, **keys: Any) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=0, global_pool="", **keys)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last hidden states."""
        return cast(Tensor, self.model(x))


def vision(width: int, depth: int) -> nn.Module:
    """Build ViT/16 for 224 pixels."""
    return Vision("vit_base_patch16_224", embed_dim=width, depth=depth, num_heads=width // 64)


class TextModel(nn.Module):
    """A model of transformers without its token embedding, (batch, tokens, width) → (batch, tokens, width)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.is_encoder_decoder = model.config.is_encoder_decoder

    def forward(self, x: Tensor) -> Tensor:
        """Return the last hidden states. Encoder and decoder get the same inputs."""
        decoder = {"decoder_inputs_embeds": x} if self.is_encoder_decoder else {}
        hidden: Tensor = self.model(inputs_embeds=x, use_cache=False, **decoder).last_hidden_state
        return hidden


def roberta(width: int, depth: int) -> nn.Module:
    """Build RoBERTa's encoder without token embedding."""
    config = RobertaConfig(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return TextModel(RobertaModel(config, add_pooling_layer=False))


def bart(width: int, depth: int) -> nn.Module:
    """Build BART without token embedding; half of the blocks belong to the encoder."""
    config = BartConfig(
        vocab_size=8,
        d_model=width,
        dropout=0.0,
        encoder_layers=depth // 2,
        decoder_layers=depth // 2,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        forced_eos_token_id=0,
    )
    return TextModel(BartModel(config))


def llama(width: int, depth: int, mlp: int | None = None, head: int = 64, kv_group: int = 4) -> nn.Module:
    """Build LLaMA's decoder without token embedding.

    Args:
        width: Width of the hidden states.
        depth: Number of blocks.
        mlp: Width of the MLP; None is four times `width`.
        head: Width of a query head.
        kv_group: Number of query heads for each key-value head.
    """
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head,
        num_key_value_heads=width // head // kv_group,
        intermediate_size=mlp or 4 * width,
        bos_token_id=0,
        eos_token_id=0,
    )
    return TextModel(LlamaModel(config))


@dataclass(frozen=True)
class Family:
    """A kind of stack and the shape of its input.

    Args:
        build: Function from width and depth to a stack.
        width: Width of the hidden states.
        depth: Number of blocks; for BART, half of the blocks belong to the encoder.
        shape: Batch size and tokens.
        bucket: Total tokens of each batch with bucketed lengths; 0 for images, which have one length.
        image: Height and width of input images in pixels; 0 if the inputs are hidden states.
    """

    build: Callable[[int, int], nn.Module]
    width: int
    depth: int
    shape: tuple[int, int]
    bucket: int = 0
    image: int = 0

    def batches(self, bucketed: bool) -> list[tuple[int, int]]:
        """Return (batch, tokens) of each batch. With buckets, sequences have 16, 32, 64 and 128 tokens."""
        return [(self.bucket // tokens, tokens) for tokens in (16, 32, 64, 128)] if bucketed else [self.shape]


FAMILIES = {
    "vit": Family(VisionBlocks, 768, 2, (8, 197)),  # ViT-B/16: 196 patches and the class token
    "roberta": Family(roberta, 768, 2, (8, 64), 128),  # RoBERTa-base
    "bart": Family(bart, 768, 2, (8, 64), 128),  # BART-base
    "llama": Family(
        llama, 2048, 1, (2, 128), 128
    ),  # LLaMA-3.2-1B: 32 heads of 64, 8 of keys and values, 8192 in the MLP
}
WHOLE = {  # All blocks. The ViT includes the patch embedding; text models have no word embedding.
    "vit-b": Family(vision, 768, 12, (4, 197), image=224),
    "roberta-base": Family(roberta, 768, 12, (8, 64), 128),
    "bart-base": Family(bart, 768, 12, (8, 64), 128),
    "llama-1b": Family(llama, 2048, 16, (1, 128), 128),
}


class Arm:
    """One way to tune a stack, with separate factors and optimizer. All arms share the frozen weights.

    Args:
        name: One of `ARMS`.
        stack: The frozen stack.
        targets: Roles, as `AdapterConfig.targets`.
        rank: Adapter rank.
    """

    def __init__(self, name: str, stack: nn.Module, targets: Sequence[str], rank: int) -> None:
        self.name = name
        self.autocast = name.endswith("autocast")
        shared = {} if name == "full" else {id(parameter): parameter for parameter in stack.parameters()}
        self.model = copy.deepcopy(stack, shared)
        if name == "full":
            self.model.requires_grad_(True)
        elif name.startswith("PEFT"):
            self.model = _peft(self.model, layers_of(stack, targets), rank, name)
        elif name.startswith("ours"):
            variant = VARIANTS[name.split()[1].rstrip(",")]
            chosen = list(targets) if name.endswith("slices") else whole_layers(stack, targets)
            attach(self.model, AdapterConfig(rank=rank, alpha=2 * rank, targets=chosen, **variant))  # type: ignore[arg-type]
        self.optimizer = self._optimizer(rank)

    def _optimizer(self, rank: int) -> torch.optim.Optimizer | None:
        if self.name == "PEFT LoRA-FA":
            assert isinstance(self.model, PeftModel)
            return create_lorafa_optimizer(self.model, rank, 2 * rank, LEARNING_RATE)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, LEARNING_RATE, fused=True) if trained else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states after the stack."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return cast(Tensor, self.model(x))

    def step(self, batches: Batches, optimize: bool = True) -> None:
        """Run forward, backward with the gradient of the output, and the optimizer step, for each batch."""
        for x, gradient in batches:
            if self.name == "forward only":
                with torch.no_grad():
                    self.forward(x)
                continue
            x = x.detach().requires_grad_()
            out = self.forward(x)
            out.backward(gradient.to(out.dtype))
            if self.optimizer:
                if optimize:
                    self.optimizer.step()
                self.optimizer.zero_grad()

    def saved(self, batches: Batches) -> int:
        """Return the bytes saved for backward, for the largest batch."""
        if self.name == "forward only":
            return 0
        return max(saved_bytes(lambda x=x: self.forward(x.detach().requires_grad_()), self.model) for x, _ in batches)  # type: ignore[misc]


def _peft(model: nn.Module, layers: list[str], rank: int, name: str) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=name != "PEFT bf16 factors")
    if "A frozen" in name:
        for parameter_name, parameter in adapted.named_parameters():
            parameter.requires_grad_("lora_B" in parameter_name)
    assert isinstance(adapted, PeftModel)
    return adapted


def layers_of(stack: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that contain the targets."""
    return list(dict.fromkeys(p.layer for p in select(find_projections(stack), targets)))


def whole_layers(stack: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return targets that adapt each layer of the given targets as a whole, even a fused layer."""
    return ["regex:" + "|".join(layers_of(stack, targets)).replace(".", r"\.")]


def random_stack(family: Family, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """Build a frozen stack with random weights, in train mode and without dropout.

    Args:
        family: The family to build.
        dtype: Dtype of the weights.
        attention: `sdpa`, the default of timm and transformers, or `eager`.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    stack = family.build(family.width, family.depth).to(dtype).requires_grad_(False).train()
    for module in stack.modules():
        if isinstance(module, Attention):
            module.fused_attn = attention == "sdpa"  # type: ignore[misc]  # Final only for scripting.
        elif isinstance(module, PreTrainedModel):
            module.set_attn_implementation(attention)
    return stack


def random_batches(
    shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype, seed: int = 0, image: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Draw inputs and output gradients, (batch, tokens, width). With `image`, inputs are (batch, 3, image, image)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    return [
        (draw(batch, 3, image, image) if image else draw(batch, tokens, width), draw(batch, tokens, width))
        for batch, tokens in shapes
    ]


def arms_for(names: Sequence[str], stack: nn.Module, targets: Sequence[str], rank: int) -> dict[str, Arm]:
    """Return the named arms, without duplicates for this stack and dtype."""
    dtype = next(stack.parameters()).dtype
    fused = any(p.fused for p in select(find_projections(stack), targets))
    skipped = (*(ONLY_BFLOAT16 if dtype != torch.bfloat16 else ()), *(() if fused else ("ours B, slices",)))
    return {name: Arm(name, stack, targets, rank) for name in names if name not in skipped}
