"""Roles of linear layers in every family of backbones, and selection of layers by targets."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn
from transformers import BartForConditionalGeneration
from transformers.models.falcon.modeling_falcon import FalconLinear

from modules.adapters.config import AdapterError, Projection
from modules.adapters.linear import AdaptedLinear
from modules.adapters.roles import ATTENTION, ROLES, find_projections, select
from tests.support.adapters import randomize

if TYPE_CHECKING:
    from tests.support.bare_backbones import Backbone

only_vit = pytest.mark.parametrize("backbone", ["vit"], indirect=True)
only_bert = pytest.mark.parametrize("backbone", ["bert"], indirect=True)
only_roberta = pytest.mark.parametrize("backbone", ["roberta"], indirect=True)
only_bart = pytest.mark.parametrize("backbone", ["bart"], indirect=True)
only_deberta = pytest.mark.parametrize("backbone", ["deberta_v2"], indirect=True)
only_gated = pytest.mark.parametrize("backbone", ["t5_gated"], indirect=True)
only_tied = pytest.mark.parametrize("backbone", ["bart", "pegasus", "t5"], indirect=True)
only_variants = pytest.mark.parametrize("backbone", ["deberta_v3", "pegasus", "t5"], indirect=True)
only_llama = pytest.mark.parametrize("backbone", ["llama"], indirect=True)


def chosen(backbone: Backbone, *targets: str) -> list[Projection]:
    return select(find_projections(backbone.model, backbone.head), list(targets))


def model_with(*layers: str, rows: int = 6) -> nn.Module:
    """Return a model with linear layers of these names."""
    root = nn.Module()
    for name in layers:
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(leaf, nn.Linear(4, rows))
    return root


# roles


def test_the_number_of_projections_of_each_role(backbone: Backbone) -> None:
    projections = find_projections(backbone.model, backbone.head)
    assert Counter(p.role for p in projections) == backbone.counts
    assert len({p.name for p in projections}) == len(projections)


@only_variants
@pytest.mark.parametrize("train", ["B", "both"])
def test_adapters_in_variants_of_backbones_affect_the_output(backbone: Backbone, train: str) -> None:
    assert Counter(p.role for p in find_projections(backbone.model, backbone.head)) == backbone.counts
    model = backbone.attach(targets="all", train=train)
    torch.testing.assert_close(backbone.run(), backbone.pretrained_output(), atol=1e-5, rtol=1e-5)
    randomize(model)
    assert not torch.allclose(backbone.run(), backbone.pretrained_output(), atol=1e-3)
    backbone.loss().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == sum(backbone.counts.values()) * (2 if train == "both" else 1)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_slices_tile_their_layers(backbone: Backbone) -> None:
    ends: dict[str, int] = {}
    for p in find_projections(backbone.model, backbone.head):
        assert p.start == ends.get(p.layer, 0)
        assert p.stop > p.start
        ends[p.layer] = p.stop
    assert ends == {name: backbone.model.get_submodule(name).out_features for name in ends}


def test_the_head_is_left_out_by_its_name(backbone: Backbone) -> None:
    inside = {p.layer for p in find_projections(backbone.model, backbone.head)}
    everything = {p.layer for p in find_projections(backbone.model)}
    assert {name.split(".")[0] for name in everything - inside} == set(backbone.head)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input).softmax(-1).max(-1)


class Scaled(nn.Linear):
    """A quantised layer with `scales`, an attribute that `nn.Linear` lacks."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.scales  # type: ignore[operator]


class Named(nn.Linear):
    """A subclass that does not override `forward`."""


class Watched(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


def test_subclasses_that_compute_another_function_are_left_out() -> None:
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    bytes_ = nn.Linear(4, 4).to(torch.float8_e4m3fn)
    kinds = [nn.Linear, Named, Watched, TimmLinear, FalconLinear, Doubled, Router, Scaled]
    model = nn.Sequential(*(kind(4, 4) for kind in kinds), quantised, bytes_)
    assert [p.layer for p in find_projections(model)] == ["0", "1", "2", "3", "4"]


def test_probing_a_subclass_has_no_side_effects() -> None:
    class ProbedLinear(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    state = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(ProbedLinear(4, 4))
        assert len(find_projections(model)) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_an_exclusion_does_not_match_siblings_with_the_same_prefix() -> None:
    model = model_with("block.1.mlp.fc1", "block.10.mlp.fc1", "head", "head2")
    layers = [p.layer for p in find_projections(model, ["block.1", "head"])]
    assert layers == ["block.10.mlp.fc1", "head2"]


@only_roberta
def test_robertas_classifier_has_no_role(backbone: Backbone) -> None:
    projections = {p.name: p.role for p in find_projections(backbone.model)}
    assert projections["classifier.dense"] == projections["classifier.out_proj"] == "other"
    for target in ("output", "mlp_out", "all"):
        layers = {p.layer for p in select(find_projections(backbone.model), [target])}
        assert not any(layer.startswith("classifier") for layer in layers)


@only_tied
def test_a_tied_head_is_never_selected(backbone: Backbone) -> None:
    assert isinstance(backbone.model.lm_head, nn.Linear)
    assert not any("lm_head" in p.layer for p in chosen(backbone, "regex:.*"))
    with pytest.raises(AdapterError, match="matches nothing"):
        chosen(backbone, "regex:lm_head")


@only_bart
def test_barts_untied_head_may_be_selected_by_name(backbone: Backbone) -> None:
    assert isinstance(backbone.model, BartForConditionalGeneration)
    backbone.model.lm_head.weight = nn.Parameter(backbone.model.lm_head.weight.detach().clone())
    assert [p.role for p in chosen(backbone, "regex:lm_head")] == ["other"]


@only_gated
def test_t5s_untied_head_has_no_role(backbone: Backbone) -> None:
    assert [p.role for p in find_projections(backbone.model) if p.layer == "lm_head"] == ["other"]
    assert not any("lm_head" in p.layer for p in select(find_projections(backbone.model), ["all"]))


@only_deberta
@pytest.mark.parametrize("target", ["query", "key", "attention", "all"])
def test_debertas_position_projections_have_no_role(backbone: Backbone, target: str) -> None:
    names = {name.rpartition(".")[2] for name, m in backbone.model.named_modules() if isinstance(m, nn.Linear)}
    assert {"pos_key_proj", "pos_query_proj"} < names
    assert not any(".pos_" in p.layer for p in chosen(backbone, target))
    assert len(chosen(backbone, r"regex:.*\.pos_(key|query)_proj")) == 4


@pytest.mark.parametrize("backbone", ["pegasus", "t5", "t5_gated"], indirect=True)
def test_attention_includes_both_self_attentions_and_cross_attention(backbone: Backbone) -> None:
    kinds = Counter(p.layer.rpartition(".")[0] for p in chosen(backbone, "attention"))
    assert len(kinds) == 3
    assert set(kinds.values()) == {4}


@only_bart
def test_barts_cross_attention_has_the_roles_of_attention(backbone: Backbone) -> None:
    pattern = re.compile(r"model\.(encoder|decoder)\.layers\.0\.(self_attn|encoder_attn)\.\w+")
    kinds = Counter(" ".join(pattern.fullmatch(p.layer).groups()) for p in chosen(backbone, "attention"))  # type: ignore[union-attr]
    assert kinds == {"encoder self_attn": 4, "decoder self_attn": 4, "decoder encoder_attn": 4}


@only_llama
def test_llamas_grouped_queries_have_smaller_keys_and_values(backbone: Backbone) -> None:
    rows = {p.role: p.stop - p.start for p in chosen(backbone, "attention")}
    assert rows == {"query": 16, "key": 8, "value": 8, "output": 16}


@only_vit
def test_vits_fused_layer_is_three_slices(backbone: Backbone) -> None:
    slices = [p for p in find_projections(backbone.model) if p.layer == "blocks.0.attn.qkv"]
    assert slices == [
        Projection("blocks.0.attn.qkv", role, start, start + 24, fused=True)
        for role, start in (("query", 0), ("key", 24), ("value", 48))
    ]
    assert [p.name for p in slices] == [f"blocks.0.attn.qkv.{role}" for role in ("query", "key", "value")]


@only_vit
@pytest.mark.parametrize(("role", "moves"), [("query", {"q"}), ("key", {"k"}), ("value", set())])
def test_each_slice_of_a_vit_changes_the_tensor_of_its_role(backbone: Backbone, role: str, moves: set[str]) -> None:
    """Adapting `key` changes the keys inside the attention, and leaves the queries unchanged."""

    def attention_inputs(model: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        attention = model.get_submodule("blocks.0.attn")
        handles = [
            attention.get_submodule(f"{name}_norm").register_forward_pre_hook(
                lambda _, args, name=name: tensors.update({name: args[0].detach()})
            )
            for name in "qk"
        ]
        tensors["out"] = backbone.run(model).detach()
        for handle in handles:
            handle.remove()
        return tensors

    before = attention_inputs(backbone.reference)
    model = backbone.attach(targets=role)
    randomize(model)
    after = attention_inputs(model)
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-5)}
    assert moved == moves | {"out"}


@pytest.mark.parametrize(
    ("layer", "role"),
    [
        ("attn.proj", "output"),
        ("patch_embed.proj", "other"),
        ("attn_pool.proj", "other"),
        ("classifier.dense", "other"),
        ("output.dense", "other"),
        ("encoder.layer.3.output.dense", "mlp_out"),
        ("encoder.layer.3.attention.output.dense", "output"),
        ("q_proj", "other"),
        ("layers.0.self_attn.q_proj", "query"),
        ("layers.0.cross_self_attn.q_proj", "other"),
        ("layers.0.self_attn.q_proj_2", "other"),
        ("fc1", "other"),
        ("layers.12.fc1", "mlp_in"),
        ("attention.self.query_proj", "query"),
        ("attention.self.pos_query_proj", "other"),
        ("attention.self.pos_key_proj", "other"),
        ("attention.q_lin", "query"),
        ("ffn.lin1", "mlp_in"),
        ("lin1", "other"),
        ("block.0.layer.0.SelfAttention.q", "query"),
        ("block.0.layer.1.EncDecAttention.o", "output"),
        ("attention.q", "other"),
        ("DenseReluDense.wi", "mlp_in"),
        ("DenseReluDense.wi_0", "mlp_gate"),
        ("DenseReluDense.wi_1", "mlp_in"),
        ("DenseReluDense.wo", "mlp_out"),
        ("pre_classifier", "other"),
        ("pooler.dense", "other"),
    ],
)
def test_roles_match_complete_parts_of_a_layers_name(layer: str, role: str) -> None:
    assert [p.role for p in find_projections(model_with(layer))] == [role]
    assert [p.role for p in find_projections(model_with(f"wrapped.{layer}"))] == [role]


# selection


@pytest.mark.parametrize("role", ROLES)
def test_select_one_role(backbone: Backbone, role: str) -> None:
    if role not in backbone.counts:
        with pytest.raises(AdapterError, match=f"'{role}' matches nothing in this backbone"):
            chosen(backbone, role)
        return
    projections = chosen(backbone, role)
    assert {p.role for p in projections} == {role}
    assert len(projections) == backbone.counts[role]


@pytest.mark.parametrize(
    ("target", "roles"), [("attention", ATTENTION), ("all", ROLES), ("regex:.*", (*ROLES, "other"))]
)
def test_select_a_group(backbone: Backbone, target: str, roles: tuple[str, ...]) -> None:
    expected = {role: backbone.counts[role] for role in roles if role in backbone.counts}
    assert Counter(p.role for p in chosen(backbone, target)) == expected


def test_overlapping_targets_count_once_in_the_models_order(backbone: Backbone) -> None:
    once = chosen(backbone, "attention")
    assert chosen(backbone, "value", "attention", r"regex:.*\.(query|q_proj|query_proj|q_lin|q|qkv\.query)") == once


@only_vit
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"blocks\.0\.attn\.qkv\.(query|value)", ["blocks.0.attn.qkv.query", "blocks.0.attn.qkv.value"]),
        (r".*\.1\.mlp\..*", ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        (r"blocks\.1\.attn\.(qkv|proj)", ["blocks.1.attn.qkv", "blocks.1.attn.proj"]),  # the complete fused layer
        (r".*\.1\.attn\.qkv(\.key)?", ["blocks.1.attn.qkv.key"]),  # a part of a fused layer excludes the complete layer
    ],
)
def test_regex_matches_names(backbone: Backbone, pattern: str, names: list[str]) -> None:
    assert [p.name for p in chosen(backbone, f"regex:{pattern}")] == names


@only_vit
@pytest.mark.parametrize("pattern", ["blocks", r"attn\.qkv\.query", r"blocks\.0\.attn", ""])
def test_regex_must_match_the_complete_name(backbone: Backbone, pattern: str) -> None:
    with pytest.raises(AdapterError, match="matches nothing"):
        chosen(backbone, f"regex:{pattern}")


# errors


@only_bert
def test_no_match_lists_the_layers_with_their_roles(backbone: Backbone) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.targets: 'mlp_gate'") as error:
        chosen(backbone, "query", "mlp_gate")
    for kind in ("encoder.layer.*.attention.self.query (query)", "encoder.layer.*.output.dense (mlp_out)"):
        assert str(error.value).count(kind) == 1  # the message folds both blocks into one entry
    assert "pooler.dense (other)" in str(error.value)


def test_no_match_in_a_model_without_linear_layers() -> None:
    with pytest.raises(AdapterError, match="no linear layer to adapt"):
        select(find_projections(nn.Conv2d(3, 3, 1)), ["query"])


@pytest.mark.parametrize("target", ["querry", "", "other", "Query", "regex.*", "q_proj"])
def test_unknown_role_lists_the_roles(target: str) -> None:
    with pytest.raises(AdapterError, match="is not a role") as error:
        select(find_projections(model_with("attn.qkv")), [target])
    assert all(role in str(error.value) for role in (*ROLES, "attention", "all", "regex:"))


def test_bad_regular_expression() -> None:
    with pytest.raises(AdapterError, match=r"'regex:\(' is not a regular expression"):
        select(find_projections(model_with("attn.qkv")), ["regex:("])


@only_vit
def test_an_adapted_model_has_the_same_projections(backbone: Backbone) -> None:
    before = find_projections(backbone.model)
    model: Any = backbone.attach(targets="attention")
    assert isinstance(model.blocks[0].attn.qkv, AdaptedLinear)
    assert find_projections(model) == before


@pytest.mark.parametrize(("mark", "value"), [("head_first", True), ("key_dim", 4)])
def test_a_fused_layer_ordered_by_head_is_not_split_into_thirds(mark: str, value: object) -> None:
    model = model_with("blocks.0.attn.proj")
    attention = model.get_submodule("blocks.0.attn")
    attention.qkv = nn.Linear(8, 20)
    # 20 rows are no three equal parts
    assert [p.role for p in find_projections(model) if p.layer.endswith("qkv")] == ["other"]
    attention.qkv = nn.Linear(8, 24)
    assert [p.role for p in find_projections(model) if p.layer.endswith("qkv")] == ["query", "key", "value"]
    setattr(attention, mark, value)
    assert [p.role for p in find_projections(model) if p.layer.endswith("qkv")] == ["other"]
