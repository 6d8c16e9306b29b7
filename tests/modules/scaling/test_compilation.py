"""Compiled training: same losses, gradients and names as uncompiled training, without graph breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapter_state, attach
from modules.scaling import compilation
from modules.scaling.blocks import block_stacks
from modules.scaling.compilation import UncompiledEvaluation, check_compiler, compile_blocks

CPU = torch.device("cpu")
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART = {"vocab_size": 64, "d_model": 16, "dropout": 0.0} | {
    f"{side}_{key}": n
    for side in ("encoder", "decoder")
    for key, n in (("layers", 3), ("attention_heads", 2), ("ffn_dim", 32))
}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace without generating C++ code. Tracing finds graph breaks."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.compiler.set_stance("default")


def tokens(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_features(model: nn.Module, _: int) -> Tensor:
    return model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def text_logits(model: nn.Module, length: int) -> Tensor:
    return model(**tokens(length)).logits


def summary_logits(model: nn.Module, length: int) -> Tensor:
    return model(**tokens(length), decoder_input_ids=tokens(length)["input_ids"][:, :3], use_cache=False).logits


def next_logits(model: nn.Module, length: int) -> Tensor:
    return model(**tokens(length), use_cache=False).logits


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], Tensor]]] = {
    "vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0
        ),
        image_features,
    ),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, **NO_DROPOUT)), text_logits),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**BART)), summary_logits),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)), next_logits),
}


def build(name: str, train: str = "B", checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name][0]()
    attach(model, AdapterConfig(rank=2, train=train, init_a="given", init_b="given", targets=["all"]))  # type: ignore[arg-type]
    for factor in adapter_state(model).values():
        nn.init.normal_(factor, std=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model.train()


def losses_and_gradients(name: str, model: nn.Module, lengths: tuple[int, ...]) -> list[Tensor]:
    tensors = []
    for length in lengths:
        model.zero_grad()
        loss = FAMILIES[name][1](model, length).float().square().mean()
        loss.backward()
        tensors += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return tensors


@pytest.mark.parametrize(
    ("name", "train", "checkpointing", "autocast", "backend", "lengths"),
    [
        pytest.param("vit", "both", False, True, "eager", (5,), marks=pytest.mark.slow),
        ("roberta", "B", False, False, "eager", (5, 7, 9)),
        pytest.param("llama", "A", True, False, "eager", (5,), marks=pytest.mark.slow),
        pytest.param("vit", "both", False, False, "aot_eager", (5,), marks=pytest.mark.slow),
        pytest.param("bart", "B", False, False, "eager", (5,), marks=pytest.mark.slow),
    ],
)
def test_losses_gradients_and_names_equal_those_of_uncompiled_blocks(
    name: str,
    train: str,
    checkpointing: bool,
    autocast: bool,
    backend: str,
    lengths: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", backend)
    plain, compiled = build(name, train, checkpointing), build(name, train, checkpointing)
    names = list(compiled.state_dict())
    compile_blocks(compiled, CPU)
    assert list(compiled.state_dict()) == names
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = (losses_and_gradients(name, model, lengths) for model in (plain, compiled))
    assert len(actual) == len(expected) > len(lengths)
    tolerance = {"rtol": 0.1, "atol": 1e-2} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert actual_tensor.dtype == expected_tensor.dtype
        torch.testing.assert_close(actual_tensor, expected_tensor, **tolerance)
    assert not counters["graph_break"]
    # Each stack has two graphs: one for the first block, whose input needs no gradient, and one for the other blocks.
    # The second length is compiled for all later lengths.
    stacks = len(block_stacks(compiled))
    assert stacks <= counters["stats"]["unique_graphs"] <= stacks * 2 * min(len(lengths), 2)


def test_evaluation_is_not_compiled() -> None:
    model, callback = build("vit"), UncompiledEvaluation()
    compile_blocks(model, CPU)
    runner: Any = L.Trainer.__new__(L.Trainer)
    callback.on_validation_start(runner, L.LightningModule())
    with torch.no_grad():
        image_features(model, 5)
    assert not counters["stats"]
    callback.on_validation_end(runner, L.LightningModule())
    image_features(model, 5)
    assert counters["stats"]["unique_graphs"]


def test_a_backbone_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.compile: Linear has no stack of blocks"):
        compile_blocks(nn.Linear(2, 2), CPU)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_compile_without_a_compiler_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ModelError, match=r"model\.compile: torch\.compile needs a compiler.*Install g\+\+"):
        check_compiler(torch.device(kind))
    if kind == "cuda":  # Triton takes the compiler that CC names.
        monkeypatch.setenv("CC", "/opt/bin/mycc")
        check_compiler(torch.device(kind))
