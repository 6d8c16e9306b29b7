"""Conformance of all tasks on all families of backbones: loss, training, dtype, checkpoint, resume and export.

`tests.support.tasks` defines the families. A new task or family needs an entry in that file and no test here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from modules.adapters import adapter_state, merge, unmerge
from modules.formats.compact import save_compact
from modules.formats.peft import write_peft_files
from modules.formats.peft_writing import to_peft
from modules.training.checks import IdleAdapterCheck
from modules.training.peft_baselines import METHODS
from tests.support.adapters import changed, copied, randomize
from tests.support.tasks import FAMILIES, TUNINGS, TaskFactory
from tests.support.trainers import ReadyData, quiet_trainer, stub_trainer

every_family = pytest.mark.parametrize("family", FAMILIES)
TUNED = [(name, tuning) for name, family in FAMILIES.items() for tuning in family.tunings]
every_tuning = pytest.mark.parametrize(("family", "tuning"), TUNED)
ONE_A_TASK = ["vit", "roberta", "bart", "llama"]
AVERAGED: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg"}
REGRESSIONS = [(name, {"class_names": []}) for name, family in FAMILIES.items() if "TextClassifier" in str(family.task)]


def outputs(family: str, model: Any) -> Tensor:
    return FAMILIES[family].outputs(model, FAMILIES[family].batch(model))


def parts_of(model: nn.Module, layers: Iterable[str]) -> set[str]:
    """Return the names of the weights and biases of these layers."""
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} & model.state_dict().keys()


def trained_names(family: str, model: Any, tuning: str) -> set[str]:
    """Return the names of the parameters that a tuning trains."""
    if tuning == "full":
        return {name for name, _ in model.named_parameters()}
    factors = {f"backbone.{name}" for name in adapter_state(model.backbone)}
    trained = {name for name in factors if name.endswith(f".{tuning}")}
    assert bool(trained) is (tuning in ("A", "B"))
    return trained | parts_of(model, FAMILIES[family].heads)


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Return the sets of names that share one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("family", "keys"),
    [*((family, {}) for family in FAMILIES), *REGRESSIONS, ("vit", {"backbone_args": AVERAGED, "weights": "none"})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@torch.no_grad()
def test_loss_equals_that_of_the_backbones_library(tasks: TaskFactory, family: str, keys: dict[str, Any]) -> None:
    """Compare with the library's model with merged weights, for new adapters and for random adapters."""
    model = tasks(family, **keys).eval()
    data = FAMILIES[family].batch(model)
    at_start = outputs(family, model)
    for _ in range(2):
        loss, expected = FAMILIES[family].reference(tasks.folder(family), model, data)
        assert float(model.training_step(data, 0)) == pytest.approx(float(loss), abs=1e-5)
        torch.testing.assert_close(outputs(family, model), expected, rtol=1e-5, atol=FAMILIES[family].tolerance)
        randomize(model, std=0.15)
    assert not torch.allclose(outputs(family, model), at_start, atol=1e-3)


@every_family
@torch.no_grad()
def test_merged_adapters_compute_the_same(tasks: TaskFactory, family: str) -> None:
    model = randomize(tasks(family), std=0.15).eval()
    expected, before = outputs(family, model), copied(model)
    merge(model.backbone)
    torch.testing.assert_close(outputs(family, model), expected, rtol=1e-4, atol=1e-4)
    assert {name.rpartition(".")[2] for name in changed(before, model)} == {"weight"}
    unmerge(model.backbone)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- training


@every_tuning
def test_steps_change_trained_parameters_alone(tasks: TaskFactory, family: str, tuning: str) -> None:
    keys = {"schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.1, "lr_ratio_b": 1.5, "lr_ratio_head": 0.8}
    model = tasks(family, **TUNINGS[tuning], **keys)
    assert all(module.training for module in model.modules())
    expected = trained_names(family, model, tuning)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected

    model._trainer = stub_trainer(estimated_stepping_batches=10)
    optimizer = model.configure_optimizers()["optimizer"]
    learning_rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(learning_rates) == len(trained)
    heads = parts_of(model, FAMILIES[family].heads)
    for name, parameter in trained.items():
        ratio = 0.8 if name in heads else 1.5 if tuning == "B" else 1.0
        assert learning_rates[id(parameter)] == pytest.approx(0.01 * ratio), name
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    if tuning != "full" or family not in ("vit", "convnext"):  # timm has its own list of parameters without decay
        assert decayed == {id(p) for p in trained.values() if p.ndim > 1}

    model._trainer = None
    model.eval()  # without dropout, so that the loss falls
    data, before = FAMILIES[family].batch(model), copied(dict(model.named_parameters()))
    trainer, losses = quiet_trainer(), []
    for _ in range(12):
        loss = model.training_step(data, 0)
        optimizer.zero_grad()
        loss.backward()
        IdleAdapterCheck().on_after_backward(trainer, model)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses) < 0.96 * losses[0]
    reached = {name for name in expected if not name.endswith(FAMILIES[family].without_gradient or ("\0",))}
    assert changed(before, dict(model.named_parameters())) == reached


@every_tuning
@torch.no_grad()
def test_dropout_is_on_in_training_alone(tasks: TaskFactory, family: str, tuning: str) -> None:
    model = tasks(family, **TUNINGS[tuning])
    assert not torch.equal(outputs(family, model), outputs(family, model))
    model.eval()
    assert torch.equal(outputs(family, model), outputs(family, model))


@pytest.mark.parametrize(
    ("family", "tuning"), [(n, t) for n, family in FAMILIES.items() for t in family.tunings if t in ("B", "head")]
)
def test_bfloat16_applies_to_the_frozen_weights_alone(tasks: TaskFactory, family: str, tuning: str) -> None:
    full = randomize(tasks(family, **TUNINGS[tuning]), std=0.15).eval()
    half = tasks(family, **TUNINGS[tuning], backbone_dtype="bfloat16").eval()
    half.load_state_dict(full.saved_state())
    inputs: dict[str, set[torch.dtype]] = {}
    for name in FAMILIES[family].heads:
        half.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: {x.dtype for x in args}})
        )
    ours, theirs = outputs(family, half), outputs(family, full)
    assert ours.dtype == torch.float32
    assert 0 < float((ours - theirs).detach().norm() / theirs.detach().norm()) < 0.1
    assert inputs == {name: {torch.float32} for name in FAMILIES[family].heads}
    saved_names = half.saved_state().keys()
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name in saved_names} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in saved_names} == {torch.bfloat16}
    for name, buffer in full.named_buffers():
        if name.endswith("inv_freq"):  # rotary frequencies in bfloat16 would change the positions
            assert half.get_buffer(name).dtype == torch.float32
            assert torch.equal(half.get_buffer(name), buffer)
    half.loss(FAMILIES[family].batch(half)).backward()
    assert {p.grad.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("family", "tuning"), [*TUNED, *itertools.product(ONE_A_TASK, METHODS)])
@torch.no_grad()
def test_a_checkpoint_builds_the_same_model(tasks: TaskFactory, family: str, tuning: str, tmp_path: Path) -> None:
    """Only the file is needed. It is read without pickle, under another seed."""
    model = tasks(family, **TUNINGS[tuning]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    state = model.saved_state()
    factors = {f"backbone.{name}" for name in adapter_state(model.backbone)}
    if tuning == "full":  # all tensors, tied tensors once
        everything = {tensor.data_ptr() for tensor in model.state_dict().values()}
        assert {tensor.data_ptr() for tensor in state.values()} == everything
    else:
        factors |= {f"backbone.{name}" for name in (model.baseline.parameters() if model.baseline else ())}
        assert set(state) == factors | parts_of(model, FAMILIES[family].heads)
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "some.ckpt")

    loaded = torch.load(tmp_path / "some.ckpt", weights_only=True)
    torch.manual_seed(7)
    other = FAMILIES[family].task(**loaded["hyper_parameters"]).eval()
    assert not torch.allclose(outputs(family, other), outputs(family, model), atol=1e-3)
    other.on_load_checkpoint(loaded)
    other.load_state_dict(loaded["state_dict"])
    assert torch.equal(outputs(family, other), outputs(family, model))
    for key in ("adapter", "tuning", "learning_rate", "class_names"):
        assert getattr(other, key) == getattr(model, key)
    assert getattr(other, "generation", None) == getattr(model, "generation", None)
    assert ties(other) == ties(model)
    assert [len(names) for names in ties(model)] == [FAMILIES[family].tied] * bool(FAMILIES[family].tied)


@pytest.mark.parametrize("tuning", ["B", "full"])
@pytest.mark.parametrize("family", ONE_A_TASK)
def test_a_resumed_run_equals_an_uninterrupted_run(
    tasks: TaskFactory, family: str, tuning: str, tmp_path: Path
) -> None:
    """Weights, optimizer and schedule continue from the checkpoint. Each step seeds dropout with its number."""

    class SeedStep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    def fitted(epochs: int, checkpoint: Path | None = None) -> tuple[Any, dict[str, Any]]:
        model = tasks(family, **TUNINGS[tuning], schedule="constant", warmup_ratio=0.0)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[SeedStep()], limit_val_batches=0)
        data = ReadyData([FAMILIES[family].batch(model)] * 2, metrics=["accuracy"])
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model, trainer.optimizers[0].state_dict()["state"]

    (uninterrupted, expected), (interrupted, _) = fitted(2), fitted(1)
    resumed, state = fitted(2, tmp_path / "1.ckpt")
    assert changed(copied(interrupted), resumed)
    assert changed(copied(uninterrupted), resumed) == set()
    assert all(
        torch.equal(state[number][key], tensor)
        for number, moments in expected.items()
        for key, tensor in moments.items()
    )


# -------------------------------------------------------------------------------------------------------------- export


def write_adapter(model: Any, folder: Path, form: str) -> None:
    """Write adapters and heads in the files of `export`."""
    state = model.saved_state()
    if form == "compact":
        heads = {name: tensor for name, tensor in state.items() if ".adapters." not in name}
        save_compact(folder, model.backbone, model.adapter, heads, torch.float32)
        return
    inside = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    heads_of = {
        home: {name.removeprefix(f"{head}."): t for name, t in state.items() if name.startswith(f"{head}.")}
        for head, homes in model.peft_head_names().items()
        for home in homes
    }
    content, tensors = to_peft(model.backbone, model.adapter, inside, heads_of, model.peft_task)
    write_peft_files(folder, content, tensors, torch.float32)


@pytest.mark.parametrize("form", ["peft", "compact"])
@every_family
@torch.no_grad()
def test_an_exported_adapter_starts_the_same_model(tasks: TaskFactory, family: str, form: str, tmp_path: Path) -> None:
    model = randomize(tasks(family), std=0.15).eval()
    write_adapter(model, tmp_path, form)
    other = tasks(family, seed=7, adapter_path=str(tmp_path)).eval()
    assert torch.equal(outputs(family, other), outputs(family, model))
    assert changed(copied(model.saved_state()), other.saved_state()) == set()
