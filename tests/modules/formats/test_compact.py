"""Compact directories: round trips, and validation of every value in a hostile file."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.adapters import AdapterConfig, AdapterError, adapted_projections, adapter_state, attach, load_adapter_state
from modules.adapters.state import frozen_fingerprint
from modules.formats.compact import FILE_NAME, is_compact, load_compact, save_compact
from tests.support.bare_backbones import Backbone, vit
from tests.support.compact_files import Recipe, rewrite

only_vit = pytest.mark.parametrize("backbone", ["vit"], indirect=True)
SIGNS: dict[str, dict[str, Any]] = {
    "B": {"train": "B", "init_a": "signs"},
    "A": {"train": "A", "init_a": "zero", "init_b": "signs"},
    "both": {"train": "both", "init_a": "signs"},
}


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Fill the trained factors with noise."""
    for _, factors in adapted_projections(model).values():
        for parameter in factors.named_factors(trained=True).values():
            parameter.normal_(std=0.2)


def adapted(backbone: Backbone, **keys: Any) -> tuple[nn.Module, AdapterConfig]:
    config = AdapterConfig(**{"rank": 4, "seed": 5, **keys})
    attach(backbone.model, config, exclude=backbone.head)
    train(backbone.model)
    return backbone.model, config


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / FILE_NAME)


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("side", ["B", "A"])
def test_round_trip_is_exact_in_every_family(backbone: Backbone, tmp_path: Path, side: str) -> None:
    model, config = adapted(backbone, **SIGNS[side], targets="all", alpha=12, scaling="rslora", dropout=0.1)
    names = list(adapted_projections(model))
    assert save_compact(tmp_path, model, config, {}, torch.float32) == names
    assert set(stored(tmp_path)) == {f"adapter.{name}.{side}" for name in names}
    assert is_compact(tmp_path)
    assert not is_compact(tmp_path.parent)

    other = copy.deepcopy(backbone.reference)
    compact = load_compact(tmp_path, other, exclude=backbone.head)
    assert compact.adapter == config
    assert compact.heads == {}
    state = adapter_state(model)
    assert compact.factors.keys() == state.keys()
    assert all(torch.equal(compact.factors[name], state[name]) for name in state)
    attach(other, compact.adapter, exclude=backbone.head)
    load_adapter_state(other, compact.factors)
    expected = backbone.run()
    assert (expected - backbone.pretrained_output()).abs().max() > 1e-3
    assert torch.equal(backbone.run(other.eval()), expected)


@only_vit
def test_bfloat16_rounds_the_stored_tensors_alone(backbone: Backbone, tmp_path: Path) -> None:
    model, config = adapted(backbone, **SIGNS["B"])
    heads = {"head.weight": torch.randn(5, 24), "head.batches": torch.tensor(7)}
    save_compact(tmp_path, model, config, heads, torch.bfloat16)
    assert {t.dtype for name, t in stored(tmp_path).items() if "batches" not in name} == {torch.bfloat16}
    compact = load_compact(tmp_path, backbone.reference)
    for name, factor in adapter_state(model).items():
        expected = factor.bfloat16().float() if name.endswith("B") else factor
        assert torch.equal(compact.factors[name], expected)
        assert compact.factors[name].dtype == torch.float32
    assert compact.heads.keys() == heads.keys()
    assert torch.equal(compact.heads["head.weight"], heads["head.weight"].bfloat16().float())
    assert torch.equal(compact.heads["head.batches"], heads["head.batches"])


@only_vit
@pytest.mark.parametrize(
    "keys",
    [
        {},  # the default, orthogonal
        SIGNS["both"],
        *({"init_a": init} for init in ("gaussian", "uniform", "kaiming", "svd", "svd_minor")),
        {"train": "A", "init_a": "zero", "init_b": "orthogonal"},
    ],
)
def test_factors_that_cannot_be_drawn_again_are_stored(
    backbone: Backbone, tmp_path: Path, keys: dict[str, Any]
) -> None:
    model, config = adapted(backbone, **keys)
    assert save_compact(tmp_path, model, config, {}, torch.float32) == []
    assert len(stored(tmp_path)) == len(adapter_state(model))
    factors = load_compact(tmp_path, backbone.reference).factors
    assert all(torch.equal(factors[name], factor) for name, factor in adapter_state(model).items())


@only_vit
def test_changed_signs_are_stored(backbone: Backbone, tmp_path: Path) -> None:
    """The configuration has init_a signs, but one frozen factor differs in one sign."""
    model, config = adapted(backbone, **SIGNS["B"])
    changed, *rest = adapted_projections(model)
    with torch.no_grad():
        adapted_projections(model)[changed][1].A[0, 0] *= -1
    assert save_compact(tmp_path, model, config, {}, torch.float32) == rest
    assert f"adapter.{changed}.A" in stored(tmp_path)
    factors = load_compact(tmp_path, backbone.reference).factors
    assert all(torch.equal(factors[name], factor) for name, factor in adapter_state(model).items())


@only_vit
@pytest.mark.parametrize("targets", [["regex:(.+)+(.+)+x"], ["query"], ["query", "mlp_gate"], ["nose"]])
def test_other_targets_are_replaced_by_the_names_of_the_factors(
    backbone: Backbone, tmp_path: Path, targets: list[str]
) -> None:
    """A hostile regular expression could run forever. The names of the stored factors are used instead."""
    model, config = adapted(backbone, **SIGNS["B"])
    save_compact(tmp_path, model, config, {}, torch.float32)
    rewrite(tmp_path, lambda r: r["adapter"].update(targets=targets))
    compact = load_compact(tmp_path, backbone.reference)
    names = [f"blocks\\.{i}\\.attn\\.qkv\\.{role}" for i in (0, 1) for role in ("query", "value")]
    assert compact.adapter.targets == [f"regex:{name}" for name in names]
    attach(backbone.reference, compact.adapter)
    load_adapter_state(backbone.reference, compact.factors)


@only_vit
def test_loading_changes_neither_model_nor_generator(backbone: Backbone, tmp_path: Path) -> None:
    model, config = adapted(backbone, **SIGNS["B"])
    save_compact(tmp_path, model, config, {}, torch.float32)
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in backbone.reference.state_dict().items()}
    load_compact(tmp_path, backbone.reference)
    assert torch.equal(torch.get_rng_state(), before)
    after = backbone.reference.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert load_compact(tmp_path, model).adapter == config  # a model with adapters has the same projections


@only_vit
def test_the_fingerprint_covers_the_frozen_weights(backbone: Backbone, tmp_path: Path) -> None:
    model, config = adapted(backbone, **SIGNS["B"])
    save_compact(tmp_path, model, config, {}, torch.float32)
    backbone.reference.requires_grad_(False).get_submodule(*backbone.head).requires_grad_(True)
    assert load_compact(tmp_path, backbone.reference).fingerprint == frozen_fingerprint(backbone.reference)
    rewrite(tmp_path, lambda r: r.pop("frozen_fingerprint") and None)
    assert load_compact(tmp_path, backbone.reference).fingerprint is None


@only_vit
def test_models_and_dtypes_that_cannot_be_written_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapters"):
        save_compact(tmp_path, backbone.model, AdapterConfig(), {}, torch.float32)
    model, config = adapted(backbone)
    with pytest.raises(AdapterError, match="float16"):
        save_compact(tmp_path, model, config, {}, torch.float16)
    assert not is_compact(tmp_path)


# ------------------------------------------------------------------------------------------------------- hostile files


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, nn.Module]:
    """Return a compact directory with rank-4 adapters of a ViT's query and value, and this ViT without adapters."""
    backbone = vit()
    model, config = adapted(backbone, **SIGNS["B"])
    save_compact(tmp_path, model, config, {"head.weight": torch.randn(5, 24)}, torch.float32)
    return tmp_path, backbone.reference


NAME = "blocks.0.attn.qkv.query"


def test_another_digest_is_refused(written: tuple[Path, nn.Module]) -> None:
    folder, model = written
    rewrite(folder, lambda r: r["redrawn"][NAME].update(sha256="0" * 64))
    with pytest.raises(AdapterError, match=rf"{NAME}.*signs and seed 5.*digest.*--format peft"):
        load_compact(folder, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["redrawn"][NAME].update(shape=[4, 2**60]), "1 of another shape"),
        (lambda r: r["redrawn"][NAME].update(shape=[-4, 24]), "1 of another shape"),
        (lambda r: r["redrawn"][NAME].update(shape=[4, 24, 1]), "TypeError"),
        (lambda r: r["redrawn"][NAME].update(shape=["4", 24]), "TypeError"),
        (lambda r: r["redrawn"][NAME].update(sha256=7), "TypeError"),
        (lambda r: r["redrawn"].update({NAME: [1]}), "TypeError|AttributeError"),
        (lambda r: r.update(redrawn=[]), "AttributeError"),
        (lambda r: r["redrawn"].pop(NAME), "1 missing.*query.A"),
        (lambda r: r["redrawn"].update({"../\x1b[2J" + "x" * 10**6: r["redrawn"][NAME]}), r"1 unexpected.*\\x1b"),
        (lambda r: r["adapter"].update(init_a="orthogonal"), "orthogonal.*cannot be redrawn"),
        (lambda r: r["adapter"].update(train="both"), "cannot be redrawn"),
        (lambda r: r["adapter"].update(rank=10**9), "rank.*larger"),
        (lambda r: r["adapter"].update(rank=3), "8 of another shape"),
        (lambda r: r["adapter"].update(rank="8"), "adapter.rank"),
        (lambda r: r["adapter"].update(alpha="1"), "TypeError"),
        (lambda r: r["adapter"].update(alpha=10**400), "OverflowError"),
        (lambda r: r["adapter"].update(alpha=float("nan")), "adapter.alpha"),
        (lambda r: r["adapter"].update(dropout=True), "TypeError"),
        (lambda r: r["adapter"].update(train=["B"]), "adapter.train"),
        (lambda r: r["adapter"].update(seed=0.5), "TypeError"),
        (lambda r: r["adapter"].update(targets="all"), "TypeError"),
        (lambda r: r["adapter"].update(targets=[["query"]]), "TypeError"),
        (lambda r: r["adapter"].update(targets=[]), "adapter.targets"),
        (lambda r: r["adapter"].update(init_a="x" * 10**6), "adapter.init_a"),
        (lambda r: r["adapter"].update(class_path="os.system"), "unknown keys"),
        (lambda r: r["adapter"].popitem(), "unknown keys|KeyError"),
        (lambda r: r.pop("adapter"), "KeyError"),
        (lambda r: r.update(adapter=None), "TypeError"),
        (lambda r: r.update(frozen_fingerprint=[1]), "unknown keys"),
        (lambda r: r.update(version=2), "version 2"),
        (lambda r: r.update(version="x" * 10**6), "version 'xxx"),
        (lambda r: "", "JSONDecodeError"),
        (lambda r: "[" * 10**6, "RecursionError"),
        (lambda r: "[]", "TypeError"),
        (lambda r: "1" * 10**5, "ValueError"),
    ],
)
def test_a_recipe_with_wrong_values_is_refused(
    written: tuple[Path, nn.Module], change: Callable[[Recipe], Any], message: str
) -> None:
    folder, model = written
    rewrite(folder, change)
    with pytest.raises(AdapterError, match=message) as caught:
        load_compact(folder, model)
    assert f"model.adapter_path: {folder / FILE_NAME}" in str(caught.value) or "larger" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


B = f"adapter.{NAME}.B"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({B: torch.zeros(24, 5)}), "1 of another shape.*24, 5.*not.*24, 4"),
        (lambda t: t.update({B: torch.zeros(24 * 4)}), "1 of another shape"),
        (lambda t: t.pop(B), "1 missing"),
        (lambda t: t.update({f"adapter.{NAME}.A": torch.zeros(4, 24)}), "both stored and to be drawn"),
        (lambda t: t.update({f"adapter.{NAME}.C": torch.zeros(1)}), r"1 unexpected.*query\.C"),
        (lambda t: t.update({"../../etc/passwd": torch.zeros(1)}), r"1 unexpected.*etc/passwd"),
        (
            lambda t: t.update(
                {f"adapter.blocks.0.attn.qkv.{f}": torch.zeros(s) for f, s in (("A", (4, 24)), ("B", (72, 4)))}
            ),
            "a layer and of its parts",
        ),
        (lambda t: t.update({B: torch.zeros(24, 4, dtype=torch.float64)}), "float64"),
        (lambda t: t.update({B: torch.zeros(24, 4, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({B: torch.full((24, 4), torch.nan)}), "query.B.*not finite"),
        (lambda t: t.update({"head.weight": torch.full((2,), torch.inf)}), "head.weight.*not finite"),
        (lambda t: t.update({"head.weight": torch.zeros(2, dtype=torch.complex64)}), "complex64"),
    ],
)
def test_wrong_tensors_are_refused(
    written: tuple[Path, nn.Module], change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    folder, model = written
    rewrite(folder, tensors=change)
    with pytest.raises(AdapterError, match=message):
        load_compact(folder, model)


def test_a_file_of_another_model_is_refused(written: tuple[Path, nn.Module]) -> None:
    folder, _ = written
    with pytest.raises(AdapterError, match=r"8 unexpected.*backbone of the training"):
        load_compact(folder, nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04cposix\nsystem\n",  # a pickle
        struct.pack("<Q", 2**62) + b"{}",  # a header longer than the file
        struct.pack("<Q", 2) + b"{}",  # without a recipe
    ],
)
def test_a_file_of_another_format_is_refused(written: tuple[Path, nn.Module], data: bytes) -> None:
    folder, model = written
    (folder / FILE_NAME).write_bytes(data)
    with pytest.raises(AdapterError, match=rf"model.adapter_path: .*{FILE_NAME}"):
        load_compact(folder, model)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(written: tuple[Path, nn.Module], share: float) -> None:
    folder, model = written
    data = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(data[: int(share * len(data))])
    with pytest.raises(AdapterError, match=r"cannot be read.*again"):
        load_compact(folder, model)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        load_compact(tmp_path, nn.Linear(2, 2))
