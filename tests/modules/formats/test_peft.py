"""Conversion between PEFT's LoRA files and our adapters, in both directions. The reference is PEFT."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.adapters import AdapterConfig, AdapterError, adapter_state, attach
from modules.formats.peft import PREFIX, Heads, check_supported, write_peft_files
from modules.formats.peft_writing import to_peft
from tests.support.adapters import copied, randomize
from tests.support.bare_backbones import BACKBONES, Backbone
from tests.support.peft_files import exported, imported, pefts_output, read

STARTS: dict[str, dict[str, Any]] = {
    "B": {"train": "B"},
    "A": {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
    "both": {"train": "both"},
}
ALL_FAMILIES = pytest.mark.parametrize("backbone", ["vit", "bert", "roberta", "bart", "llama"], indirect=True)
only_vit = pytest.mark.parametrize("backbone", ["vit"], indirect=True)
only_roberta = pytest.mark.parametrize("backbone", ["roberta"], indirect=True)


def heads_of(backbone: Backbone) -> Heads:
    """Return heads whose values differ from those of the reference."""
    model = backbone.model
    return {n: {k: t + 1 for k, t in model.get_submodule(n).state_dict().items()} for n in backbone.head}


# ------------------------------------------------------------------------------------------------------- export to PEFT


@ALL_FAMILIES
@pytest.mark.parametrize("train", ["B", "A", "both"])
@pytest.mark.parametrize(
    ("targets", "scaling"),
    [(["query", "value"], "standard"), (["attention", "mlp_out"], "rslora"), (["query"], "rslora")],
)
@torch.no_grad()
def test_peft_computes_the_same_output_and_the_round_trip_is_exact(
    backbone: Backbone, tmp_path: Path, train: str, targets: Any, scaling: Any
) -> None:
    config = AdapterConfig(**STARTS[train], rank=2, alpha=3.0, targets=targets, scaling=scaling, dropout=0.25)
    attach(backbone.model, config, exclude=backbone.head)
    randomize(backbone.model)
    heads = heads_of(backbone)
    content, tensors = exported(backbone, config, heads)
    write_peft_files(tmp_path, content, tensors, torch.float32)
    for name, head_state in heads.items():
        backbone.model.get_submodule(name).load_state_dict(head_state)
    expected = backbone.run()
    before = copied(adapter_state(backbone.model))
    torch.testing.assert_close(pefts_output(backbone, tmp_path), expected, atol=1e-5, rtol=1e-5)
    assert (expected - backbone.pretrained_output()).abs().max() > 1e-3

    loaded = imported(backbone, content, load_file(tmp_path / "adapter_model.safetensors"), train=train)
    after = adapter_state(backbone.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config == AdapterConfig(
        **{**vars(config), "targets": loaded.config.targets, "init_a": "given", "init_b": "given"}
    )
    torch.testing.assert_close(backbone.run(), expected, atol=0, rtol=0)


@only_vit
def test_a_fused_layer_is_one_lora_with_a_block_for_each_part(backbone: Backbone) -> None:
    config = AdapterConfig(rank=2, alpha=3.0, targets=["query", "value", "output"])
    attach(backbone.model, config, exclude=backbone.head)
    randomize(backbone.model)
    state = adapter_state(backbone.model)
    content, tensors = exported(backbone, config, {})
    qkv = "blocks.0.attn.qkv"
    b, a = tensors[f"{PREFIX}{qkv}.lora_B.weight"], tensors[f"{PREFIX}{qkv}.lora_A.weight"]
    assert (b.shape, a.shape) == ((72, 4), (4, 24))
    torch.testing.assert_close(a[2:], state[f"{qkv}.adapters.value.A"], atol=0, rtol=0)
    torch.testing.assert_close(b[48:, 2:], state[f"{qkv}.adapters.value.B"], atol=0, rtol=0)
    assert not b[24:48].any()
    assert not b[:24, 2:].any()
    assert (content["r"], content["lora_alpha"], content["target_modules"]) == (2, 3, ["attn.proj", "attn.qkv"])
    assert (content["rank_pattern"], content["alpha_pattern"]) == ({"qkv": 4}, {"qkv": 6})
    assert content["modules_to_save"] is None


def test_names_that_peft_would_mistake_for_a_head_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "other_head": nn.Linear(4, 4)})})
    config = AdapterConfig(rank=2, targets=["regex:a\\.q_proj"])
    attach(model, config)
    head = {"head": nn.Linear(4, 2).state_dict()}
    with pytest.raises(AdapterError, match=r"a\.other_head"):
        to_peft(model, config, adapter_state(model), head)
    # for SEQ_CLS, PEFT adds modules named `score` to modules_to_save
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "score": nn.Linear(4, 4)})
    attach(model, AdapterConfig(rank=2, targets=["regex:q_proj"]))
    content, _ = to_peft(model, AdapterConfig(rank=2), adapter_state(model), head, "SEQ_CLS")
    assert content["task_type"] is None
    content, _ = to_peft(model, AdapterConfig(rank=2), adapter_state(model), head, "CAUSAL_LM")
    assert content["task_type"] == "CAUSAL_LM"


# ----------------------------------------------------------------------------------------------------- import from PEFT

PEFTS: dict[str, dict[str, Any]] = {
    "vit": {"target_modules": ["qkv", "fc2"]},
    "bert": {"target_modules": ["query", "key"]},
    "roberta": {"target_modules": ["query", "value"], "use_rslora": True},
    "bart": {"target_modules": r".*encoder_attn\.[qv]_proj"},
    "llama": {"target_modules": "all-linear", "lora_dropout": 0.1},
}
TARGETS = {
    "vit": [r"regex:blocks\.\d+\.attn\.qkv", r"regex:blocks\.\d+\.mlp\.fc2"],
    "bert": ["query", "key"],
    "roberta": ["query", "value"],
    "bart": [rf"regex:model\.decoder\.layers\.\d+\.encoder_attn\.{c}_proj" for c in "vq"],
    "llama": ["query", "key", "value", "output", "mlp_in", "mlp_gate", "mlp_out"],
}


def pefts_own(backbone: Backbone, folder: Path, **keys: Any) -> nn.Module:
    """Save a LoRA of rank 4 with random factors and heads with PEFT. Return PEFT's model."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "modules_to_save": list(backbone.head) or None, **keys})
    model = peft.get_peft_model(copy.deepcopy(backbone.reference), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@ALL_FAMILIES
@pytest.mark.parametrize("train", ["A", "both"])
@torch.no_grad()
def test_a_lora_of_peft_is_imported_and_exported(
    backbone: Backbone, request: pytest.FixtureRequest, tmp_path: Path, train: str
) -> None:
    name = request.node.callspec.params["backbone"]
    expected = backbone.run(pefts_own(backbone, tmp_path, **PEFTS[name]))
    loaded = imported(backbone, *read(tmp_path), train=train)
    torch.testing.assert_close(backbone.run(), expected, atol=1e-5, rtol=1e-5)
    assert (loaded.config.rank, loaded.config.alpha, loaded.config.train) == (4, 6.0, train)
    assert sorted(loaded.config.targets) == sorted(TARGETS[name])
    assert loaded.config.scaling == ("rslora" if name == "roberta" else "standard")
    assert loaded.config.dropout == (0.1 if name == "llama" else 0)
    # export to PEFT again
    content, tensors = exported(backbone, loaded.config, loaded.heads)
    write_peft_files(tmp_path, content, tensors, torch.float32)
    torch.testing.assert_close(pefts_output(backbone, tmp_path), expected, atol=1e-5, rtol=1e-5)


@only_roberta
@torch.no_grad()
def test_patterns_with_one_rank_and_tensors_in_bfloat16_are_imported(backbone: Backbone, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 3}}
    model = pefts_own(backbone, tmp_path, target_modules=["query"], **patterns)
    expected = backbone.run(model)
    content, tensors = read(tmp_path)
    loaded = imported(backbone, content, tensors)
    assert (loaded.config.rank, loaded.config.alpha) == (2, 3.0)
    torch.testing.assert_close(backbone.run(), expected, atol=1e-5, rtol=1e-5)
    loaded = imported(backbone, content, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    layer = "roberta.encoder.layer.0.attention.self.query"
    factor = loaded.factors[f"{layer}.adapters.query.A"]
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, tensors[f"{PREFIX}{layer}.lora_A.weight"].bfloat16().float(), atol=0, rtol=0)


@only_vit
@torch.no_grad()
def test_parts_of_a_fused_layer_are_recognised_by_zeros(backbone: Backbone, tmp_path: Path) -> None:
    pefts_own(backbone, tmp_path, target_modules=["qkv"])
    content, tensors = read(tmp_path)
    b = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}

    def targets() -> Any:
        loaded = imported(backbone, content, tensors)
        return loaded.config.rank, loaded.config.targets

    assert targets() == (4, [r"regex:blocks\.\d+\.attn\.qkv"])
    for tensor in b.values():
        tensor[24:, :2] = 0  # the first two columns belong to the query
    assert targets() == (4, [r"regex:blocks\.\d+\.attn\.qkv"])
    for tensor in b.values():
        tensor[:48, 2:] = 0  # the last two columns belong to the value
    assert targets() == (2, ["query", "value"])
    first = next(iter(b.values()))
    first[:] = 0  # a layer of zeros does not reveal its parts
    assert targets() == (4, [r"regex:blocks\.\d+\.attn\.qkv"])


# ---------------------------------------------------------------------------------------------------- unsupported files

BASIC = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", -1),
        ("lora_alpha", math.nan),
        ("lora_dropout", "0.1"),
        ("bias", "all"),
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["weight"]),
        ("trainable_token_indices", [0]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "what the future brings"),
        ("init_lora_weights", ["mica"]),
        ("rank_pattern", ["query"]),
        ("rank_pattern", {"query": "4"}),
        ("alpha_pattern", {"query": math.inf}),
        ("what_the_future_brings", {"rank": 3}),
    ],
)
def test_an_unsupported_key_is_named(key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=key):
        check_supported({**BASIC, key: value})


def test_pefts_defaults_are_supported() -> None:
    content = json.loads(json.dumps(peft.LoraConfig(target_modules=["query"]).to_dict(), default=list))
    check_supported(content)


def a_name(end: str) -> str:
    return f"{PREFIX}roberta.encoder.layer.0.attention.self.query.{end}"


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@only_roberta
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop(a_name("lora_B.weight")), r"1 missing: .*query\.lora_B"),
        (lambda c, t: t.update({a_name("lora_C.weight"): torch.ones(1)}), r"1 unexpected: .*query\.lora_C"),
        (
            lambda c, t: t.update({f"{PREFIX}roberta.pooler.weight": torch.ones(1)}),
            r"unexpected: .*pooler.*no embeddings",
        ),
        (
            lambda c, t: t.update({a_name("lora_A.weight"): torch.ones(4, 8)}),
            r"query\.lora_A is \(4, 8\), not \(4, 16\)",
        ),
        (lambda c, t: t.update({a_name("lora_A.weight"): torch.ones(16)}), r"lora_A is \(16,\), not"),
        (lambda c, t: t.update({a_name("lora_A.weight"): torch.full((4, 16), math.nan)}), "not finite"),
        (lambda c, t: t.update({a_name("lora_A.weight"): torch.ones(4, 16).to(torch.float8_e4m3fn)}), "float8"),
        (lambda c, t: t.update({a_name("lora_A.weight"): torch.ones(4, 16, dtype=torch.int8)}), "int8"),
        (lambda c, t: t.update({a_name("lora_embedding_A"): torch.ones(4, 30)}), "unexpected.*no embeddings"),
        (lambda c, t: t.clear(), "no LoRA of any layer"),
        (lambda c, t: c.update(r=3), r"rank 4 in the file, but 3 by r"),
        (lambda c, t: c.update(rank_pattern={r"layer\.1\..*": 5}), r"rank 4 in the file, but 5 by r"),
        (lambda c, t: c.update(alpha_pattern={"(": 5}), "alpha_pattern.*regular expression"),
        (lambda c, t: c.update(rank_pattern={r"([\w.]+)+x": 5}), "rank_pattern.*too complex"),
        (lambda c, t: t.update({"\x1b[2J\n": torch.ones(1)}), r"unexpected: '\\x1b\[2J\\n'"),
        (lambda c, t: c.update(lora_dropout=1.5), "out of range.*dropout"),
    ],
)
def test_files_that_do_not_fit_are_refused(backbone: Backbone, tmp_path: Path, change: Change, message: str) -> None:
    pefts_own(backbone, tmp_path, target_modules=["query"])
    content, tensors = read(tmp_path)
    change(content, tensors)
    with pytest.raises(AdapterError, match=message):
        imported(backbone, content, tensors)


@only_roberta
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["word_embeddings"]}, "unexpected.*lora_embedding"),
        ({"target_modules": ["query"], "bias": "lora_only"}, "bias"),
        ({"target_modules": ["query"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}, "unexpected: .*LayerNorm"),
    ],
)
def test_adapters_that_only_peft_supports_are_refused(
    backbone: Backbone, tmp_path: Path, keys: Any, message: str
) -> None:
    pefts_own(backbone, tmp_path, **keys)
    with pytest.raises(AdapterError, match=message):
        imported(backbone, *read(tmp_path))


@only_vit
def test_convolutions_and_other_backbones_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    pefts_own(backbone, tmp_path, target_modules=["patch_embed.proj"])
    with pytest.raises(AdapterError, match=r"'patch_embed\.proj'.*Conv2d"):
        imported(backbone, *read(tmp_path))
    pefts_own(backbone, tmp_path, target_modules=["qkv"])
    content, tensors = read(tmp_path)
    other = BACKBONES["roberta"]()
    with pytest.raises(AdapterError, match="does not fit this backbone"):
        imported(other, content, tensors)
    backbone.reference = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3)
    with pytest.raises(AdapterError, match=r"of another shape: .*lora_A is \(4, 24\), not \(4, 48\)"):
        imported(backbone, content, tensors)
