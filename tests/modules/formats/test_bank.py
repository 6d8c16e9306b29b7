"""Banks: adapters are read as they were written, and mixed batches compute each row as its adapter does alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.adapters import AdapterConfig, AdapterError, adapted_projections, adapter_state, detach, load_adapter_state
from modules.formats.bank import Bank, Member, check_member, member_of, save_bank
from tests.support.adapters import randomize
from tests.support.bare_backbones import BACKBONES, Backbone
from tests.support.tasks import FAMILIES, TaskFactory


def write(path: Path, members: Mapping[str, Member], dtype: torch.dtype = torch.float32) -> Bank:
    first = next(iter(members.values()))
    with path.open("wb") as file:
        save_bank(file, first.shared, first.frozen, ((n, m.adapter) for n, m in members.items()), dtype)
    return Bank.open(path)


def member(backbone: Backbone, config: AdapterConfig, head: nn.Module | None = None) -> Member:
    heads = {} if head is None else {f"head.{key}": tensor for key, tensor in head.state_dict().items()}
    names = {} if head is None else {"head": ("head",)}
    return member_of(backbone.model, config, heads, None if head is None else ["a", "b"], {"r": 4}, names)


def vit_members(count: int = 3, **keys: Any) -> tuple[Backbone, dict[str, Member], dict[str, Tensor]]:
    """Return a ViT, members of a bank with different heads and alphas, and the logits of each member."""
    backbone = BACKBONES["vit"]()
    members, outputs = {}, {}
    for i in range(count):
        backbone.model = copy.deepcopy(backbone.reference)
        config = AdapterConfig(rank=4, alpha=8.0 * (i + 1), targets="all", **keys)
        backbone.attach(alpha=config.alpha, targets="all", **keys)
        for _, factors in adapted_projections(backbone.model).values():
            nn.init.normal_(factors.B, std=0.3)
        head: nn.Module = nn.Linear(24, 5 - i)
        backbone.model.set_submodule("head", head)
        members[f"m{i}"] = member(backbone, config, head)
        with torch.no_grad():
            outputs[f"m{i}"] = backbone.run()
    return backbone, members, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init_a", ["orthogonal", "signs"])
def test_an_adapter_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype, init_a: str) -> None:
    _, members, _ = vit_members(init_a=init_a)
    bank = write(tmp_path / "bank", members, dtype)
    assert (bank.names, bank.dtype) == (["m0", "m1", "m2"], dtype)
    assert any(name.startswith("frozen.") for name in load_file(tmp_path / "bank")) == (init_a != "signs")
    for name, written in members.items():
        adapter = bank.read(name)
        assert adapter.config.alpha == written.adapter.config.alpha
        assert (adapter.labels, adapter.peft, bank.labels(name)) == (["a", "b"], {"r": 4}, ["a", "b"])
        for key, tensor in (written.adapter.bs | written.adapter.heads).items():
            torch.testing.assert_close((adapter.bs | adapter.heads)[key], tensor.to(dtype).float(), rtol=0, atol=0)
    for key, a in members["m0"].frozen.items():
        assert torch.equal(bank.frozen[key], a)
    again = {n: Member(bank.shared, bank.frozen, bank.read(n)) for n in bank.names}
    assert write(tmp_path / "again", again, dtype).names == bank.names
    assert (tmp_path / "again").read_bytes() == (tmp_path / "bank").read_bytes()


@torch.no_grad()
def test_rows_have_their_own_adapter_scale_and_head(tmp_path: Path) -> None:
    backbone, members, outputs = vit_members()
    bank = write(tmp_path / "bank", members)
    backbone.model = copy.deepcopy(backbone.reference)
    bank.attach(backbone.model, cached=1)
    torch.testing.assert_close(backbone.run(), backbone.pretrained_output())
    for names in (["m0", "m1"], ["m2", "m0"], ["m1", "m1"]):
        with torch.inference_mode(names[0] == "m0"), bank.batch(names):
            actual = backbone.run()
        for row, name in enumerate(names):
            classes = outputs[name].shape[1]
            torch.testing.assert_close(actual[row, :classes], outputs[name][row], atol=1e-5, rtol=1e-5)
            assert (actual[row, classes:] == -torch.inf).all()
    first, second = bank.batch(["m0", "m1"]), bank.batch(["m2", "m0"])
    with first:
        with pytest.raises(AdapterError, match="within a mixed batch"), second:
            pass
        torch.testing.assert_close(backbone.run()[0, :5], outputs["m0"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.run(), backbone.pretrained_output())


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "roberta", "bert", "bart", "t5", "llama"])
def test_tasks_compute_each_row_as_with_its_adapter_alone(tasks: TaskFactory, tmp_path: Path, family: str) -> None:
    config = AdapterConfig(rank=4, targets="all")
    keys = {"class_names": ["bad", "middling", "good"]} if FAMILIES[family].heads else {}
    task = tasks(family, adapter=config, **keys).eval()
    batch = FAMILIES[family].batch(task)
    size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    members, outputs = {}, {}
    for i in range(2):
        randomize(task, seed=i)
        for _, factors in adapted_projections(task.backbone).values():
            factors.A.copy_(torch.randn(factors.A.shape, generator=torch.Generator().manual_seed(9)) / 4)
        heads = {n: t for n, t in task.saved_state().items() if task._in_head(n)}
        members[f"m{i}"] = member_of(task.backbone, config, heads, None, {}, task.peft_head_names())
        outputs[f"m{i}"] = logits(task, batch)
    bank = write(tmp_path / "bank", members)
    detach(task.backbone)
    bank.attach(task.backbone, task)
    names = [f"m{row % 2}" for row in range(size)]
    with bank.batch(names):
        actual = logits(task, batch)
    expected = torch.stack([outputs[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=5e-5)
    assert (outputs["m0"] - outputs["m1"]).abs().max() > 1e-2


def logits(task: Any, batch: dict[str, Any]) -> Tensor:
    """Return the logits of every row."""
    if "image" in batch:
        return task(batch["image"])
    if "labels" not in batch:
        return task(batch)
    if task.peft_task == "SEQ_2_SEQ_LM":
        return task(batch)
    return task.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def changed_pair(change: Callable[[Backbone], Any]) -> tuple[Member, Member]:
    """Return a member of a bank, and a second member after a change of its backbone or configuration."""
    backbone, members, _ = vit_members(1)
    backbone.model = copy.deepcopy(backbone.reference)
    config = change(backbone)
    return members["m0"], member(backbone, config, backbone.model.get_submodule("head"))


def attached(**keys: Any) -> Callable[[Backbone], AdapterConfig]:
    def attach(backbone: Backbone) -> AdapterConfig:
        config = {"rank": 4, "targets": "all", **keys}
        backbone.attach(**config)
        return AdapterConfig(**config)

    return attach


@torch.no_grad()
def other_weights(backbone: Backbone) -> AdapterConfig:
    config = attached()(backbone)
    backbone.model.get_submodule("patch_embed.proj").weight.add_(1)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            attached(seed=1),
            r"was trained over another frozen A: in blocks.0.attn.qkv.query the digest of A is [0-9a-f]{12},",
        ),
        (attached(rank=2), r"has adapter rank 2 in blocks.0.attn.qkv.query, but the bank has rank 4"),
        (attached(targets=["query"]), r"lacks blocks.0.attn.qkv.key, unlike the bank \(10 projections differ\)"),
        (other_weights, r"has another backbone than the bank: .* fingerprint [0-9a-f]{12}, not [0-9a-f]{12}"),
    ],
)
def test_an_adapter_that_does_not_fit_is_an_error(change: Callable[[Backbone], Any], message: str) -> None:
    first, second = changed_pair(change)
    check_member(first.shared, first.shared, "same")
    with pytest.raises(AdapterError, match=f"ada {message}"):
        check_member(first.shared, second.shared, "ada")


@pytest.mark.parametrize("train", ["A", "both"])
def test_a_trained_a_cannot_be_shared(train: Any) -> None:
    backbone = BACKBONES["vit"]()
    zero = {"init_a": "zero", "init_b": "orthogonal"} if train == "A" else {}
    with pytest.raises(AdapterError, match=f"model.adapter.train: {train} trains A, but all adapters of a bank share"):
        member(backbone, attached(train=train, **zero)(backbone))


def test_names_are_checked(tmp_path: Path) -> None:
    backbone, members, _ = vit_members(2)
    bank = write(tmp_path / "bank", members)
    with pytest.raises(AdapterError, match=r"has no adapter 'm11'\. Did you mean m1\?"):
        bank.read("m11")
    with pytest.raises(AdapterError, match=r"bank\.attach"):
        bank.batch(["m0"])
    backbone.model = copy.deepcopy(backbone.reference)
    bank.attach(backbone.model)
    for names, message in ((["x"], "begin with m0, m1"), ([], "no names")):
        with pytest.raises(AdapterError, match=message):
            bank.batch(names)
    with pytest.raises(AdapterError, match=r"'\.\./m' cannot be the name"):
        write(tmp_path / "bad", {"../m": members["m0"]})


def damage(path: Path, header: Callable[[Any], Any] | None = None, tensors: Callable[[Any], Any] | None = None) -> None:
    with safe_open(path, framework="pt") as opened:
        content = json.loads(opened.metadata()["bank"])
    state = load_file(path)
    for change, target in ((header, content), (tensors, state)):
        if change is not None:
            change(target)
    save_file(state, path, metadata={"bank": json.dumps(content)})


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (lambda h: h.update(version=2), None, "version 2 is not supported"),
        (lambda h: h["adapters"].clear(), None, "the bank is empty"),
        (lambda h: h["adapters"].update({"../x": h["adapters"]["m0"]}), None, "'../x' has unknown keys or values"),
        (lambda h: h["adapter"].update(rank=0), None, "adapter.rank: 0 is too small"),
        (lambda h: h["adapter"].update(rank_pattern={"(a+)+": 2}), None, "'m0' has unknown keys or values"),
        (lambda h: h["adapter"].update(train="both"), None, "'m0' has unknown keys or values"),
        (lambda h: h["projections"][0].update(rank=-1), None, "impossible sizes"),
        (lambda h: h["adapters"]["m0"]["head"].update(x=[1 << 23, 1 << 23]), None, "tensor 'adapter.m0' is missing"),
        (lambda h: h.pop("heads"), None, "is no bank of this version"),
        (None, lambda t: t.pop("adapter.m1"), "tensor 'adapter.m1' is missing"),
        (None, lambda t: t.update(more=torch.zeros(1)), "tensor 'more' is missing, unexpected"),
    ],
)
def test_a_damaged_header_is_an_error(tmp_path: Path, header: Any, tensors: Any, message: str) -> None:
    _, members, _ = vit_members(2)
    write(tmp_path / "bank", members)
    damage(tmp_path / "bank", header, tensors)
    with pytest.raises(AdapterError, match=message):
        Bank.open(tmp_path / "bank")


def test_damaged_numbers_are_an_error(tmp_path: Path) -> None:
    _, members, _ = vit_members(2)
    write(tmp_path / "bank", members)
    damage(tmp_path / "bank", tensors=lambda t: [tensor.flatten()[0].add_(1) for tensor in t.values()])
    bank = Bank.open(tmp_path / "bank")
    with pytest.raises(AdapterError, match="m0 has another digest"):
        bank.read("m0")
    with pytest.raises(AdapterError, match=r"frozen A of blocks.0.attn.qkv.query has another digest"):
        assert bank.frozen
    members["m0"].adapter.bs["blocks.0.attn.qkv.query"][0, 0] = torch.nan
    with pytest.raises(AdapterError, match="not finite"):
        write(tmp_path / "nan", members).read("m0")


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_other_files_are_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bank"
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(AdapterError, match="bank"):
        Bank.open(path)
    with pytest.raises(AdapterError, match="cannot be read as a bank"):
        Bank.open(tmp_path / "missing")


def test_another_model_is_an_error(tmp_path: Path) -> None:
    _, members, _ = vit_members(2)
    bank = write(tmp_path / "bank", members)
    with pytest.raises(AdapterError, match="no linear layer of this model"):
        bank.attach(BACKBONES["bert"]().model)
    attached_model = BACKBONES["vit"]()
    attached_model.attach()
    with pytest.raises(AdapterError, match="has adapters already"):
        bank.attach(attached_model.model)
    assert adapter_state(attached_model.model).keys()
    load_adapter_state(attached_model.model, adapter_state(attached_model.model))


def test_other_frozen_weights_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, members, _ = vit_members(1)
    bank = write(tmp_path / "bank", members)
    bank.attach(BACKBONES["vit"]().model)  # This ViT has different random weights.
    assert "trained over other frozen weights" in caplog.text
