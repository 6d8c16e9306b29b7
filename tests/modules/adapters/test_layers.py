"""`adapter.layers`: selection of the last blocks, no gradients below these blocks, and export files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from modules.adapters import AdapterConfig, AdapterError, adapter_state, attach, load_adapter_state
from modules.adapters.roles import block_of, find_projections, select
from modules.backbones.transformers_backbone import checkpoint_activations
from modules.formats.compact import load_compact, save_compact
from modules.formats.peft import write_peft_files
from tests.support.adapters import randomize
from tests.support.bare_backbones import TEXT, Backbone
from tests.support.peft_files import exported, imported, pefts_output

THREE = {**TEXT, "num_hidden_layers": 3}


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 30, (2, 7))}


def vit() -> Backbone:
    sizes = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    return Backbone(model, {"x": torch.randn(2, 3, 32, 32)}, {}, head=("head",))


def roberta() -> Backbone:
    model = RobertaForSequenceClassification(RobertaConfig(**THREE, num_labels=3))
    return Backbone(model, _ids(), {}, head=("classifier",))


def bart() -> Backbone:
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 3), ("ffn_dim", 24))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = BartConfig(vocab_size=30, d_model=16, max_position_embeddings=32, init_std=0.2, **sizes, **heads)
    return Backbone(BartForConditionalGeneration(config), _ids(), {})


def llama() -> Backbone:
    return Backbone(LlamaForCausalLM(LlamaConfig(**THREE, num_key_value_heads=2)), _ids(), {}, head=("lm_head",))


MADE = {made.__name__: made for made in (vit, roberta, bart, llama)}
STACKS = {
    "vit": ["blocks"],
    "roberta": ["roberta.encoder.layer"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
    "llama": ["model.layers"],
}
every_family = pytest.mark.parametrize("backbone", MADE, indirect=True)
only_roberta = pytest.mark.parametrize("backbone", ["roberta"], indirect=True)


@pytest.fixture
def backbone(request: pytest.FixtureRequest, deterministic: None) -> Backbone:
    return MADE[request.param]()


# ------------------------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("blocks.7.attn.qkv", ("blocks", 7)),
        ("encoder.layer.11.output.dense", ("encoder.layer", 11)),
        ("encoder.block.3.layer.0.SelfAttention.q", ("encoder.block", 3)),  # the outermost stack
        ("0.weight", ("", 0)),
        ("mlp.2", ("mlp", 2)),
        ("pooler.dense", None),
        ("layer1.conv", None),
    ],
)
def test_block_of_a_layer(layer: str, block: tuple[str, int] | None) -> None:
    assert block_of(layer) == block


@every_family
@pytest.mark.parametrize("targets", ["all", ["query", "value"]])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_blocks_of_each_stack_are_selected(
    backbone: Backbone, request: pytest.FixtureRequest, targets: Any, layers: int
) -> None:
    projections = find_projections(backbone.model, backbone.head)
    every = select(projections, AdapterConfig(targets=targets).targets)
    chosen = select(projections, AdapterConfig(targets=targets).targets, layers)
    numbers = range(3 - layers, 3)
    expected = [p for p in every if any(f".{i}." in f".{p.layer}" for i in numbers)]
    assert chosen == expected
    assert {block_of(p.layer) for p in chosen} == {
        (stack, i) for stack in STACKS[request.node.callspec.params["backbone"]] for i in numbers
    }


@every_family
def test_factors_equal_those_of_adapters_in_all_layers(backbone: Backbone) -> None:
    all_layers = Backbone(copy.deepcopy(backbone.reference), backbone.inputs, {}, backbone.head).attach(targets="all")
    last = backbone.attach(targets="all", layers=1)
    factors_of_all_layers = adapter_state(all_layers)
    assert 0 < len(adapter_state(last)) < len(factors_of_all_layers)
    assert all(torch.equal(tensor, factors_of_all_layers[name]) for name, tensor in adapter_state(last).items())


def test_blocks_are_counted_in_each_stack_separately() -> None:
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, num_decoder_layers=2))
    chosen = select(find_projections(model), ["query"], 2)
    assert {block_of(p.layer) for p in chosen} == {(f"{s}.block", i) for s, i in (("encoder", 1), ("encoder", 2))} | {
        ("decoder.block", 0),
        ("decoder.block", 1),
    }
    with pytest.raises(AdapterError, match=r"adapter\.layers: 3 is more .* \(3 in encoder\.block, 2 in decoder"):
        select(find_projections(model), ["query"], 3)


@every_family
def test_more_layers_than_blocks_are_refused(backbone: Backbone) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.layers: 4 is more than the number of blocks .* \(3 in "):
        backbone.attach(layers=4)
    assert all(p.requires_grad for p in backbone.model.parameters())  # the model is unchanged


@pytest.mark.parametrize("layers", [0, -1, 1.5, True, "4", [1]])
def test_values_that_are_no_number_of_blocks_are_refused(layers: Any) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.layers: .* whole number, 1 or more, or null"):
        AdapterConfig(layers=layers)


@pytest.mark.parametrize("backbone", ["vit"], indirect=True)
def test_targets_below_the_last_blocks_are_refused(backbone: Backbone) -> None:
    with pytest.raises(AdapterError, match=r"none of the targeted projections is in the last 2 .*blocks\.0\.attn"):
        backbone.attach(targets=[r"regex:blocks\.0\.attn\.proj"], layers=2)
    assert len(adapter_state(backbone.attach(targets=["output", r"regex:blocks\.0\.mlp\.fc1"], layers=2))) == 2 * 2


@only_roberta
def test_layers_outside_of_blocks_are_left_out(backbone: Backbone) -> None:
    backbone.head = ()
    chosen = select(find_projections(backbone.model), ["regex:.*"], 3)
    assert all("encoder.layer" in p.layer for p in chosen)
    with pytest.raises(AdapterError, match=r"none of the targeted .*classifier\.dense"):
        select(find_projections(backbone.model), [r"regex:classifier\..*"], 1)


# ----------------------------------------------------------------------------------------- gradients below the blocks


@every_family
@pytest.mark.parametrize("train", ["B", "A", "both"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_flows_below_the_adapted_blocks(
    backbone: Backbone, request: pytest.FixtureRequest, train: str, checkpointing: bool
) -> None:
    starts = {"init_a": "zero", "init_b": "orthogonal"} if train == "A" else {}
    model = backbone.attach(targets="all", layers=1, train=train, **starts).train()
    if checkpointing and isinstance(model, PreTrainedModel):
        checkpoint_activations(model)
    elif checkpointing:
        model.set_grad_checkpointing()
    inputs: dict[str, bool] = {}
    outputs: dict[str, bool] = {}
    stack = STACKS[request.node.callspec.params["backbone"]][0]
    for i, block in enumerate(model.get_submodule(stack)):  # type: ignore[arg-type]
        key = f"{stack}.{i}"
        block.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0].grad_fn is not None}))
        block.register_forward_hook(lambda _, args, out, key=key: outputs.update({key: out.requires_grad}))
    backbone.loss().backward()
    assert inputs == {f"{stack}.{i}": False for i in range(3)}
    assert outputs == {f"{stack}.0": False, f"{stack}.1": False, f"{stack}.2": True}
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------- files


@every_family
@pytest.mark.parametrize("targets", [["query", "value"], "all"])
@torch.no_grad()
def test_peft_adapts_the_same_layers(backbone: Backbone, tmp_path: Path, targets: Any) -> None:
    config = AdapterConfig(rank=2, targets=targets, layers=2)
    attach(backbone.model, config, exclude=backbone.head)
    randomize(backbone.model)
    content, tensors = exported(backbone, config, {})
    write_peft_files(tmp_path, content, tensors, torch.float32)
    expected = backbone.run()
    before = {name: tensor.clone() for name, tensor in adapter_state(backbone.model).items()}
    torch.testing.assert_close(pefts_output(backbone, tmp_path), expected, atol=1e-5, rtol=1e-5)
    assert (expected - backbone.pretrained_output()).abs().max() > 1e-3

    # loading ignores `layers` of the new configuration, as all its keys except `train`
    loaded = imported(backbone, content, load_file(tmp_path / "adapter_model.safetensors"), layers=1)
    after = adapter_state(backbone.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config.layers is None
    torch.testing.assert_close(backbone.run(), expected, atol=0, rtol=0)


@every_family
@pytest.mark.parametrize("targets", [["query", "value"], [r"regex:.*(attn|attention).*"]])
def test_compact_files_keep_the_layers(backbone: Backbone, tmp_path: Path, targets: Any) -> None:
    config = AdapterConfig(rank=2, targets=targets, layers=2, init_a="signs")
    attach(backbone.model, config, exclude=backbone.head)
    state = adapter_state(backbone.model)
    save_compact(tmp_path, backbone.model, config, {}, torch.float32)
    other = copy.deepcopy(backbone.reference)
    compact = load_compact(tmp_path, other, exclude=backbone.head)
    roles = targets == ["query", "value"]
    assert compact.adapter.layers == (2 if roles else None)  # regular expressions in a file are not run
    attach(other, compact.adapter, exclude=backbone.head)
    load_adapter_state(other, compact.factors)
    assert adapter_state(other).keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state(other).items())
