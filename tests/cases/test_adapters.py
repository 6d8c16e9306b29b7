"""Cases 29 and 30: MiCA, minor singular vectors, and a rank for each projection. References are PEFT and NumPy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from app.cli import main
from modules.adapters import (
    AdapterConfig,
    AdapterError,
    adapted_projections,
    adapter_state,
    attach,
    detach,
    load_adapter_state,
)
from modules.formats.compact import load_compact, save_compact
from modules.formats.peft import check_supported, write_peft_files
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine, cli, recording, text_cli, undrawn  # noqa: F401 - fixtures
from tests.support.bare_backbones import BACKBONES, Backbone
from tests.support.compact_files import rewrite
from tests.support.peft_files import exported, imported, pefts_output, read

FAMILIES = ("vit", "roberta", "bart", "llama")
QUERY = "roberta.encoder.layer.{}.attention.self.query"
EXACT = {"atol": 1e-6, "rtol": 1e-5}
# options of PEFT's config for each family, with several ranks and scales; the second names layers in full, as EVA does
RANKS: dict[str, list[dict[str, Any]]] = {
    "vit": [
        {"target_modules": ["qkv", "fc2"], "rank_pattern": {"qkv": 6}},
        {
            "target_modules": ["qkv", "proj"],
            "exclude_modules": ["patch_embed.proj"],
            "rank_pattern": {"blocks.0.attn.qkv": 6, "blocks.1.attn.qkv": 5, "blocks.1.attn.proj": 2},
        },
    ],
    "roberta": [
        {"target_modules": ["query", "value"], "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}},
        {"target_modules": ["query", "value"], "rank_pattern": {QUERY.format(0): 7, QUERY.format(1): 1}},
    ],
    "bart": [
        {"target_modules": ["q_proj"], "rank_pattern": {r"encoder_attn\.q_proj": 2, r"encoder\..*q_proj": 5}},
        {"target_modules": ["fc1", "q_proj"], "rank_pattern": {"^model.encoder.layers.0.fc1": 1}},
    ],
    "llama": [
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"q_proj": 1}},
        {"target_modules": ["k_proj", "v_proj"], "alpha_pattern": {"model.layers.1.self_attn.v_proj": 24}},
    ],
}


def family(name: str) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[name]()


def saved(backbone: Backbone, folder: Path, **keys: Any) -> tuple[nn.Module, Tensor]:
    """Save a random LoRA with PEFT. Return its model and the model's output."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **keys})
    model: Any = peft.get_peft_model(copy.deepcopy(backbone.reference), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and (parameter.requires_grad or "lora_A" in name):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model, backbone.run(model)


@torch.no_grad()
def assert_same_function_everywhere(backbone: Backbone, config: AdapterConfig, expected: Tensor, folder: Path) -> None:
    """Check the output of the backbone with adapters, from PEFT files, from a compact file and with merged weights."""
    torch.testing.assert_close(backbone.run(), expected, **EXACT)
    content, tensors = exported(backbone, config, {})
    folder.mkdir()
    write_peft_files(folder, content, tensors, torch.float32)
    torch.testing.assert_close(pefts_output(backbone, folder), expected, **EXACT)
    state = adapter_state(backbone.model)
    reimported = imported(backbone, content, load_file(folder / "adapter_model.safetensors"))
    assert all(torch.equal(reimported.factors[name], tensor) for name, tensor in state.items())
    torch.testing.assert_close(backbone.run(), expected, **EXACT)
    save_compact(folder, backbone.model, reimported.config, {}, torch.float32)
    compact = load_compact(folder, backbone.reference, backbone.head)
    backbone.model = copy.deepcopy(backbone.reference)
    attach(backbone.model, compact.adapter, exclude=backbone.head)
    load_adapter_state(backbone.model, compact.factors)
    torch.testing.assert_close(backbone.run(), expected, **EXACT)
    detach(backbone.model, merge_first=True)
    torch.testing.assert_close(backbone.run(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- 29: MiCA


@pytest.mark.parametrize("name", FAMILIES)
def test_case_29_mica_computes_the_output_of_peft(name: str, tmp_path: Path) -> None:
    backbone = family(name)
    model, expected = saved(backbone, tmp_path, init_lora_weights="mica", **RANKS[name][1])
    content, tensors = read(tmp_path)
    assert content["init_lora_weights"] == "mica"
    given = imported(backbone, content, tensors, train="A")
    assert given.config.train == "A"
    for _, factors in adapted_projections(backbone.model).values():
        assert (factors.A.requires_grad, factors.B.requires_grad) == (True, False)
        layer = model.get_submodule(f"base_model.model.{factors.projection.layer}")
        torch.testing.assert_close(factors.B, layer.lora_B["default"].weight, atol=0, rtol=0)
    assert (expected - backbone.pretrained_output()).abs().max() > 1e-3
    assert_same_function_everywhere(backbone, given.config, expected, tmp_path / "ours")


@pytest.mark.parametrize("name", FAMILIES)
def test_case_29_svd_minor_equals_mica(name: str) -> None:
    """B of `svd_minor` equals PEFT's B and the vectors of NumPy's SVD, up to the sign of each column."""
    backbone = family(name)
    targets = {"vit": r"regex:.*\.fc[12]", "llama": ["query", "value", "mlp_in"]}.get(name, ["query", "mlp_out"])
    backbone.attach(train="A", init_a="zero", init_b="svd_minor", targets=targets)
    ours = adapted_projections(backbone.model)
    config = peft.LoraConfig(r=4, init_lora_weights="mica", target_modules=sorted(ours))
    model = peft.get_peft_model(copy.deepcopy(backbone.reference), config)
    assert len(ours) >= 4
    for layer, (adapted, factors) in ours.items():
        b = factors.B.detach().numpy()
        u = np.linalg.svd(adapted.weight.detach().double().numpy(), full_matrices=False)[0][:, -4:]
        pefts = model.get_submodule(f"base_model.model.{layer}").lora_B["default"].weight.detach().numpy()
        for reference in (u, pefts):
            np.testing.assert_allclose(np.abs((reference * b).sum(axis=0)), 1, atol=1e-3)
        assert not factors.A.any()


def test_case_29_only_initialisations_that_change_frozen_weights_are_refused(tmp_path: Path) -> None:
    """The reference is whether PEFT changes the frozen weight."""
    backbone = family("roberta")
    before = backbone.reference.get_submodule(QUERY.format(0)).weight
    for start in (True, False, "gaussian", "orthogonal", "mica", "eva", "pissa", "pissa_niter_2", "olora"):
        model, _ = saved(backbone, tmp_path, target_modules=["query"], init_lora_weights=start)
        after = model.get_submodule(f"base_model.model.{QUERY.format(0)}").base_layer.weight
        content, _ = read(tmp_path)
        if torch.equal(before, after):
            check_supported(content)
        else:
            with pytest.raises(AdapterError, match=f"{start}.*changed the weights.*path_initial_model"):
                check_supported(content)
    check_supported(content | {"init_lora_weights": None})
    check_supported(content | {"init_lora_weights": "MiCA"})  # PEFT ignores case
    for start, advice in (("corda", "path_initial"), ("lora_ga", "path_initial"), ("loftq", "quantised.*Merge")):
        with pytest.raises(AdapterError, match=f"{start}.*changed the weights.*{advice}"):
            check_supported(content | {"init_lora_weights": start})
    for start in ("pisa", "micah", "", 3, ["mica"], {"a": 1}):
        with pytest.raises(AdapterError, match=r"unknown here.*set the key to true"):
            check_supported(content | {"init_lora_weights": start})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_case_29_a_lora_converted_as_advised_is_accepted(start: str, tmp_path: Path) -> None:
    """The error message advises this conversion."""
    backbone = family("roberta")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query"], init_lora_weights=start)
    model: Any = peft.get_peft_model(copy.deepcopy(backbone.reference), config)
    model.save_pretrained(tmp_path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = backbone.run(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    imported(backbone, *read(tmp_path / "plain"))
    with torch.no_grad():
        torch.testing.assert_close(backbone.run(), expected, atol=1e-5, rtol=1e-5)


def test_case_29_the_frozen_factor_is_kept_and_another_value_of_train_is_warned_about(
    text_cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(text_cli.backbone[1])
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="mica", task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "mica")
    written = load_file(tmp_path / "mica" / "adapter_model.safetensors")
    options = ("--trainer.max_epochs=1", "--trainer.logger=false", "--checkpoint.monitor=null")
    assert text_cli("fit", f"--model.adapter_path={tmp_path / 'mica'}", "--model.adapter.train=A", *options) == 0
    started = ("--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=svd_minor")
    assert text_cli("fit", *started, "--model.adapter.targets=[query]", *options) == 0
    for version in (0, 1):
        state = text_cli.checkpoint(version)["state_dict"]
        name = QUERY.format(0)
        pefts = written[f"base_model.model.{name}.lora_B.weight"]
        ours = state[f"backbone.{name}.adapters.query.B"]
        if version == 0:
            assert torch.equal(ours, pefts)
        np.testing.assert_allclose((ours * pefts).sum(dim=0).abs(), 1, atol=1e-3)  # equal up to sign
        assert state[f"backbone.{name}.adapters.query.A"].any()
    TextClassifier(text_cli.backbone[1], adapter_path=str(tmp_path / "mica"), class_names=["a", "b"])
    assert re.search(r"MiCA.*freezes B.*Set the key to A", caplog.text)


# ------------------------------------------------------------------------------------- 30: a rank for each projection


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_case_30_several_ranks_compute_the_output_of_peft(name: str, index: int, rslora: bool, tmp_path: Path) -> None:
    backbone = family(name)
    model, expected = saved(backbone, tmp_path, use_rslora=rslora, **RANKS[name][index])
    adapter = imported(backbone, *read(tmp_path))
    assert (expected - backbone.pretrained_output()).abs().max() > 1e-3
    for name, (_, factors) in adapted_projections(backbone.model).items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert factors.A.shape[0] == adapter.config.rank_of(factors.projection) == layer.r["default"]
        assert factors.scale == pytest.approx(layer.scaling["default"], rel=1e-9)
    assert_same_function_everywhere(backbone, adapter.config, expected, tmp_path / "ours")


def test_case_30_ranks_of_eva_are_imported(tmp_path: Path) -> None:
    """EVA gives each layer its own rank, and no adapter to some layers."""
    backbone = family("llama")
    eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **eva)
    model: Any = peft.get_peft_model(copy.deepcopy(backbone.reference), config)
    batches = [{"input_ids": torch.randint(4, 30, (8, 7))} for _ in range(20)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    content, tensors = read(tmp_path)
    assert len(set(content["rank_pattern"].values()) | {content["r"]}) > 2
    with torch.no_grad():
        expected = backbone.run(model.eval())
    adapter = imported(backbone, content, tensors)
    assert len({f.A.shape[0] for _, f in adapted_projections(backbone.model).values()}) > 2
    assert_same_function_everywhere(backbone, adapter.config, expected, tmp_path / "ours")


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@torch.no_grad()
def test_case_30_parts_of_a_fused_layer_may_have_different_ranks(scaling: Any, tmp_path: Path) -> None:
    """Query and value of a ViT have different ranks. PEFT stores both in one LoRA, from which both are restored."""
    backbone = family("vit")
    patterns: dict[str, Any] = {"rank_pattern": {"query": 6, "blocks.1.attn.qkv.value": 2}}
    if scaling == "standard":
        patterns["alpha_pattern"] = {"query": 9.0, "blocks.1.attn.qkv.value": 3.0}  # every scale is 1.5
    config = AdapterConfig(rank=4, alpha=6.0, targets=["query", "value", "output"], scaling=scaling, **patterns)
    attach(backbone.model, config, exclude=backbone.head)
    ranks = {name: f.A.shape[0] for name, (_, f) in adapted_projections(backbone.model).items()}
    assert list(ranks.values()) == [6, 4, 4, 6, 2, 4]
    for factor in adapter_state(backbone.model).values():
        factor.normal_(std=0.3)
    expected = backbone.run()
    content, tensors = exported(backbone, config, {})
    assert tensors["base_model.model.blocks.1.attn.qkv.lora_A.weight"].shape == (8, 24)
    write_peft_files(tmp_path, content, tensors, torch.float32)
    torch.testing.assert_close(pefts_output(backbone, tmp_path), expected, **EXACT)
    before = adapter_state(backbone.model)
    adapter = imported(backbone, content, tensors)
    assert {n: f.A.shape[0] for n, (_, f) in adapted_projections(backbone.model).items()} == ranks
    torch.testing.assert_close(backbone.run(), expected, **EXACT)
    after = adapter_state(backbone.model)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    if scaling == "standard":  # with one scale for all parts, PEFT's files contain the unchanged factors
        assert unchanged == set(before)
    assert_same_function_everywhere(backbone, adapter.config, expected, tmp_path / "ours")


PATTERNS = {"rank_pattern": {"value": 6, "blocks.0.attn.qkv.query": 2, "query": 3}, "alpha_pattern": {"mlp_out": 5.0}}
SETTINGS = ("--model.adapter.targets=[query,value,mlp_out]", "--trainer.limit_val_batches=1")
EXPECTED = {"query": (2, 3), "value": (6, 6), "mlp_out": (4, 4)}  # ranks in the two blocks


CONSTANT = ("--model.schedule=constant", "--model.warmup_ratio=0")  # independent of max_epochs


def keys_file(folder: Path) -> str:
    path = folder / "patterns.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"adapter": PATTERNS}}}, sort_keys=False))
    return str(path)


@pytest.mark.drawn
def test_case_30_a_run_with_patterns(
    cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Patterns work in YAML, training, spectra, resume and every export."""
    config = f"--config={keys_file(tmp_path)}"
    assert cli("fit", config, *SETTINGS, *CONSTANT, "--trainer.max_epochs=2") == 0
    out = capsys.readouterr().out
    for row in ("query .* 2 to 3 ", "value .* 6 ", "mlp_out .* 4 "):
        assert re.search(row, out), out
    state = cli.checkpoint()["state_dict"]
    ranks = {name: t.shape[0] for name, t in state.items() if name.endswith(".A")}
    assert {
        r: tuple(v for n, v in ranks.items() if f".{r}." in n or (r == "mlp_out" and "fc2" in n)) for r in EXPECTED
    } == EXPECTED
    rows = pq.read_table(cli.run() / "spectrum.parquet").to_pylist()
    assert {(r["role"], len(r["singular_values"])) for r in rows} == {
        (role, rank) for role, ranks_of_role in EXPECTED.items() for rank in ranks_of_role
    }
    last = {r["projection"]: r for r in rows if r["step"] == rows[-1]["step"] and r["factor"] == "BA"}
    prefix = "backbone.blocks.0.attn.qkv.adapters"
    norms = [state[f"{prefix}.{role}.B"] @ state[f"{prefix}.{role}.A"] for role in ("query", "value")]
    for role, product, scale in zip(("query", "value"), norms, (16 / 2, 16 / 6), strict=True):
        weight_norm = scale * float(product.norm()) / last[f"blocks.0.attn.qkv.{role}"]["relative_norm"]
        assert weight_norm == pytest.approx(0.02 * 32, rel=0.1)  # timm draws W with standard deviation 0.02

    assert cli("fit", config, *SETTINGS, *CONSTANT, "--trainer.max_epochs=1") == 0
    with recording("on_fit_end") as states:
        assert cli("fit", "--trainer.max_epochs=2", f"--ckpt_path={cli.run(1)}") == 0
    assert all(torch.equal(states["on_fit_end"][name], tensor) for name, tensor in state.items())
    for form in ("peft", "merged", "compact"):
        assert main(["export", str(cli.run()), "--format", form, "--output", str(tmp_path / form)]) == 0
    assert "2 to 6 by name" in (tmp_path / "peft" / "README.md").read_text()
    options = ("--trainer.logger=false", "--trainer.limit_test_batches=1")
    assert cli("test", f"--ckpt_path={cli.run()}", *options) == 0
    expected = cli.metrics()["test/loss"]
    for version, form in ((2, "peft"), (3, "compact")):
        assert cli("test", f"--model.adapter_path={tmp_path / form}", *options) == 0
        assert cli.metrics(version)["test/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--model.adapter.rank_pattern={qeury: 4}", ["adapter.rank_pattern", "'qeury'", "query", "Correct the key"]),
        ("--model.adapter.alpha_pattern={mlp_in: 4}", ["adapter.alpha_pattern", "'mlp_in'", "none of the adapted"]),
        ("--model.adapter.rank_pattern={query: 0}", ["adapter.rank_pattern", "0 of 'query'", "1 or more"]),
        ("--model.adapter.rank_pattern={query: 33}", ["adapter.rank_pattern: 33 is larger", "32 or less"]),
        ("--model.adapter.rank_pattern={query: x}", ["rank_pattern", "int"]),
        ("--model.adapter.rank_pattern={'(': 4}", ["adapter.rank_pattern", "regular expression"]),
        ("--model.adapter.alpha_pattern={query: .inf}", ["adapter.alpha_pattern", "inf"]),
        ("--model.adapter.rank_pattern=3", ["rank_pattern"]),
        (
            "--model.adapter.rank={default: 8}",
            ["model.adapter.rank: expected int", "model.adapter.rank_pattern takes values by projection"],
        ),
        ("--model.adapter.alpha={query: 8}", ["model.adapter.alpha: expected", "model.adapter.alpha_pattern takes"]),
        ("--model.adapter.targets=[fc1]", ["'fc1' is not a role", "regex:PATTERN for names of layers"]),
        ("--model.adapter.targets=['regex:fc1']", ["'regex:fc1' matches nothing", "by regex:PATTERN. The linear"]),
    ],
)
def test_case_30_wrong_patterns_are_refused(
    cli: CommandLine,  # noqa: F811
    option: str,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli("fit", option) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(part in message for part in parts), message


def test_case_30_patterns_in_a_compact_file_are_not_run_as_regular_expressions(tmp_path: Path) -> None:
    backbone = family("vit")
    config = AdapterConfig(rank=4, init_a="signs", rank_pattern={"query": 2})
    attach(backbone.model, config, exclude=backbone.head)
    save_compact(tmp_path, backbone.model, config, {}, torch.float32)
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda r: r["adapter"].update(rank_pattern={r"(\w+\.)*.*.*x": 2}), "names no projection|too complex"),
        (lambda r: r["adapter"].update(rank_pattern={"query": 2}), "names no projection"),
        (lambda r: r["adapter"].update(rank_pattern=[2]), "map names to values"),
        (lambda r: r["adapter"].pop("rank_pattern"), "2 of another shape|4 of another shape"),
    ]
    text = (tmp_path / "adapter_compact.safetensors").read_bytes()
    for change, message in changes:
        (tmp_path / "adapter_compact.safetensors").write_bytes(text)
        rewrite(tmp_path, change)
        with pytest.raises(AdapterError, match=message):
            load_compact(tmp_path, backbone.reference)


# -------------------------------------------------------------------------------------------- weights of small rank


@pytest.mark.parametrize("init", ["svd", "svd_minor", "orthogonal"])
@pytest.mark.parametrize("train", ["A", "B"])
def test_case_30_a_zero_weight_is_adapted_and_a_small_weight_limits_the_rank(init: Any, train: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3))
    nn.init.zeros_(model[0].weight)
    starts: dict[str, Any] = {"init_a": "zero", "init_b": init} if train == "A" else {"init_a": init}
    config = AdapterConfig(train=train, rank=6, targets=["regex:[01]"], rank_pattern={"1": 3}, **starts)
    attach(model, config)
    for _, factors in adapted_projections(model).values():
        frozen = factors.B.T if train == "A" else factors.A
        torch.testing.assert_close(frozen @ frozen.T, torch.eye(len(frozen)), atol=1e-5, rtol=0)
    loss = (model(torch.randn(5, 6)) - torch.randn(5, 3)).square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for keys, message in (
        ({"rank": 6}, "adapter.rank: 6 is larger than.*3 × 9"),
        ({"rank_pattern": {"0": 7}}, "rank_pattern: 7"),
    ):
        plain = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3))
        with pytest.raises(AdapterError, match=message):
            attach(plain, AdapterConfig(**{"train": train, "rank": 2, "targets": ["regex:[01]"], **starts, **keys}))
        assert type(plain[0]) is nn.Linear
