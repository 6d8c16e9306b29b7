"""Parameter groups with learning rates and weight decay, schedules and optimizers."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import DataLoader

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapter_state, attach
from modules.image_classification import ImageClassifier
from modules.training.optimization import OPTIMIZERS, OptimizerSpec, parameter_groups, reset_states, schedule_factor
from tests.support.tasks import TINY, VIT
from tests.support.trainers import quiet_trainer, stub_trainer

SIZED = TINY | {"img_size": 16}
STARTS = {"A": {"init_a": "zero", "init_b": "orthogonal"}}


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZED, **options)


def adapted(train: str) -> nn.Module:
    backbone = vit()
    attach(backbone, AdapterConfig(train=train, rank=2, targets="all", **STARTS.get(train, {})))  # type: ignore[arg-type]
    return backbone


def groups_of(
    backbone: nn.Module, head: nn.Module | None = None, tuning: str = "adapter", **rates: float
) -> dict[str, dict[str, Any]]:
    keys = {"learning_rate": 0.5, "weight_decay": 0.1, "lr_ratio_b": 16.0, "lr_ratio_head": 4.0, **rates}
    named_head = {f"head.{name}": p for name, p in (head or nn.Linear(32, 3)).named_parameters()}
    groups = parameter_groups(backbone, named_head, tuning=tuning, **keys)
    named = {group["name"]: group for group in groups}
    assert len(named) == len(groups)
    return named


def ids(*groups: dict[str, Any]) -> list[int]:
    return [id(p) for group in groups for p in group["params"]]


# -------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("train", "rates"),
    [
        ("B", {"B": 8.0, "head": 2.0, "head/no_decay": 2.0}),
        ("A", {"A": 0.5, "head": 2.0, "head/no_decay": 2.0}),
        ("both", {"A": 0.5, "B": 8.0, "head": 2.0, "head/no_decay": 2.0}),
    ],
)
def test_names_and_learning_rates_of_groups_with_adapters(train: str, rates: dict[str, float]) -> None:
    groups = groups_of(adapted(train))
    assert {name: group["lr"] for name, group in groups.items()} == rates
    assert {name: group["initial_lr"] for name, group in groups.items()} == rates
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        name: 0.0 if name.endswith("no_decay") else 0.1 for name in rates
    }


@pytest.mark.parametrize(
    ("tuning", "rates"),
    [
        ("head", {"head": 2.0, "head/no_decay": 2.0}),
        ("full", {"head": 2.0, "head/no_decay": 2.0, "backbone": 0.5, "backbone/no_decay": 0.5}),
    ],
)
def test_names_and_learning_rates_of_groups_without_adapters(tuning: str, rates: dict[str, float]) -> None:
    assert {name: group["lr"] for name, group in groups_of(vit(), tuning=tuning).items()} == rates


def test_a_role_with_a_ratio_has_its_own_groups() -> None:
    backbone = adapted("both")
    groups = groups_of(backbone, lr_ratio_role={"value": 2.0, "mlp_out": 0.5})
    rates = {"A": 0.5, "A/value": 1.0, "A/mlp_out": 0.25, "B": 8.0, "B/value": 16.0, "B/mlp_out": 4.0}
    assert {name: group["lr"] for name, group in groups.items()} == rates | {"head": 2.0, "head/no_decay": 2.0}
    names = {id(p): name for name, p in backbone.named_parameters()}
    for group in ("A/value", "B/value", "A/mlp_out", "B/mlp_out"):
        factor, role = group.split("/")
        expected = {name for name in adapter_state(backbone) if name.endswith(f".{role}.{factor}")}
        assert {names[i] for i in ids(groups[group])} == expected
        assert len(expected) == 2
    assert len(ids(groups["A"], groups["B"])) == 2 * 2 * 4  # four other roles in each of two blocks


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_group_has_its_factor_of_every_projection(factor: str) -> None:
    backbone = adapted("both")
    expected = {name for name in adapter_state(backbone) if name.endswith(f".{factor}")}
    names = {id(p): name for name, p in backbone.named_parameters()}
    assert len(expected) == 2 * 6  # 2 blocks with 6 projections each
    assert {names[i] for i in ids(groups_of(backbone)[factor])} == expected


@pytest.mark.parametrize("tuning", ["A", "B", "both", "head", "full"])
def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one(tuning: str) -> None:
    adapter = None if tuning in ("head", "full") else AdapterConfig(train=tuning, rank=2, **STARTS.get(tuning, {}))  # type: ignore[arg-type]
    model = classifier(tuning="adapter" if adapter else tuning, **({"adapter": adapter} if adapter else {}))
    assert model.head is not None

    def grouped() -> list[int]:
        return ids(*groups_of(model.backbone, model.head, model.tuning).values())

    before = grouped()
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(before) == sorted(trainable)
    assert len(set(before)) == len(before)
    # PEFT's functions may call requires_grad_ on a frozen factor
    model.requires_grad_(True)
    assert grouped() == before
    assert (len(before) < len(list(model.parameters()))) is (tuning != "full")


@pytest.mark.parametrize(
    ("name", "options", "undecayed"),
    [
        (VIT, SIZED, {"cls_token", "pos_embed"}),
        ("vit_small_patch14_reg4_dinov2", SIZED, {"cls_token", "pos_embed", "reg_token", "blocks.0.ls1.gamma"}),
        ("beit_base_patch16_224", SIZED, {"cls_token", "blocks.1.attn.relative_position_bias_table"}),
        ("resnet10t", {}, {"layer1.0.bn1.weight", "layer1.0.bn1.bias"}),
    ],
)
def test_full_tuning_decays_the_parameters_that_timm_decays(
    name: str, options: dict[str, Any], undecayed: set[str]
) -> None:
    backbone = timm.create_model(name, pretrained=False, num_classes=0, **options)
    groups = groups_of(backbone, tuning="full")
    names = {id(p): n for n, p in backbone.named_parameters()}
    ours = {names[i] for i in ids(groups["backbone"])}
    never = getattr(backbone, "no_weight_decay", set)()
    timms_groups = param_groups_weight_decay(backbone, 0.1, no_weight_decay_list=never)
    assert ours == {names[i] for i in ids(*(g for g in timms_groups if g["weight_decay"]))}
    without_decay = {names[i] for i in ids(groups["backbone/no_decay"])}
    assert undecayed <= without_decay
    assert ours | without_decay == set(names.values())
    assert groups["backbone/no_decay"]["weight_decay"] == 0.0
    assert not any(n.endswith("bias") or ".norm" in n for n in ours)


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_a_head_inside_the_backbone_is_only_in_the_groups_of_the_head(tuning: str) -> None:
    backbone = vit()
    backbone.head = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
    groups = groups_of(backbone, backbone.head, tuning)
    names = {id(p): name for name, p in backbone.named_parameters()}
    grouped = {name: {names[i] for i in ids(group)} for name, group in groups.items()}
    assert grouped["head"] == {"head.0.weight", "head.2.weight"}
    assert grouped["head/no_decay"] == {"head.0.bias", "head.1.weight", "head.1.bias"}
    everything = ids(*groups.values())
    assert len(set(everything)) == len(everything)  # AdamW would refuse a parameter in two groups
    in_head = {name for name in names.values() if name.startswith("head.")}
    assert {names[i] for i in everything} == (set(names.values()) if tuning == "full" else in_head)
    assert {groups[name]["lr"] for name in ("head", "head/no_decay")} == {2.0}


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # 50 steps with 10 of warm-up: factors at the peak, after 1/4, 1/2 and 3/4 of the descent, and at the end
        ("cosine", [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_equal_their_closed_forms(schedule: Any, factors: list[float]) -> None:
    factor = schedule_factor(schedule, 0.2, 50)
    assert [factor(step) for step in (10, 20, 30, 40, 50)] == pytest.approx(factors, abs=1e-12)
    without_warm_up = schedule_factor(schedule, 0.0, 40)
    assert [without_warm_up(step) for step in (0, 10, 20, 30, 40)] == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("ratio", "total"), [(0.1, 100), (0.5, 7), (0.05, 30), (0.9, 100)])
def test_warm_up_rises_linearly_from_above_zero_to_the_peak(schedule: Any, ratio: float, total: int) -> None:
    factor = schedule_factor(schedule, ratio, total)
    warmup = round(ratio * total)
    climb = [factor(step) for step in range(warmup + 1)]
    assert climb[0] > 0
    assert climb[-1] == 1.0
    steps = [b - a for a, b in pairwise([0.0, *climb])]
    assert steps == pytest.approx([1 / (warmup + 1)] * (warmup + 1))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("ratio", "total"), [(0.0, 1), (0.0, 9), (0.3, 10), (0.05, 1000)])
def test_the_descent_never_rises_and_its_end_value_is_kept(schedule: Any, ratio: float, total: int) -> None:
    factor = schedule_factor(schedule, ratio, total)
    descent = [factor(step) for step in range(round(ratio * total), total + 1)]
    assert descent[0] == 1.0
    assert all(a >= b for a, b in pairwise(descent))
    end = 1.0 if schedule == "constant" else 0.0
    assert descent[-1] == pytest.approx(end, abs=1e-12)
    assert factor(total + 5) == pytest.approx(end, abs=1e-12)


def test_a_long_warm_up_leaves_steps_for_the_descent() -> None:
    assert schedule_factor("linear", 0.96, 10)(10) == 0.0


# -------------------------------------------------------------------------------------------- optimizer and schedule


def classifier(**keys: Any) -> ImageClassifier:
    return ImageClassifier(VIT, weights="none", backbone_args=TINY, image_size=16, class_names=["a", "b"], **keys)


def test_optimizer_follows_the_schedule_in_every_group() -> None:
    model = classifier(
        adapter=AdapterConfig(train="both", rank=2, init_a="kaiming"),
        learning_rate=0.1,
        weight_decay=0.3,
        schedule="linear",
        warmup_ratio=0.2,
        lr_ratio_b=2.0,
        lr_ratio_head=3.0,
    )
    model._trainer = stub_trainer(estimated_stepping_batches=10)
    configured: Any = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    assert schedule["interval"] == "step"
    peaks = {"A": 0.1, "B": 0.2, "head": 0.3, "head/no_decay": 0.3}
    for expected in [1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]:
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({name: peak * expected for name, peak in peaks.items()})
        optimizer.step()
        schedule["scheduler"].step()
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "A": 0.3, "B": 0.3, "head": 0.3, "head/no_decay": 0.0
    }  # fmt: skip


def test_ratios_of_roles_without_projections_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.lr_ratio_role: .* role mlp_in, mlp_out\. Choose from query, value"):
        classifier(lr_ratio_role={"value": 2.0, "mlp_out": 2.0, "mlp_in": 1.0})
    with pytest.raises(ModelError, match=r"model\.lr_ratio_role\.value: 0\.0 must be finite and above 0"):
        classifier(lr_ratio_role={"value": 0.0})
    # without adapters, the key has no effect
    assert classifier(tuning="head", lr_ratio_role={"value": 2.0}).trained_groups()[0]["name"] == "head"


# ----------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"class_path": "torch.optim.Lion"}, r"model\.optimizer\.class_path: torch\.optim\.Lion .*AdamW.*SGD"),
        ({"class_path": "os.system"}, r"model\.optimizer\.class_path: os\.system"),
        ({"class_path": "SGD"}, r"model\.optimizer\.class_path: SGD .*Choose one of torch\.optim: "),
        ({"class_path": "torch.optim.Optimizer"}, r"model\.optimizer\.class_path"),
        ({"class_path": "torch.optim.LBFGS"}, r"model\.optimizer\.class_path"),  # LBFGS accepts one group only
        ({"class_path": "torch.optim.SGD", "lr": 1.0}, r"model\.optimizer: lr is unknown"),
        (
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}},
            r"init_args: lr cannot be set here.*model\.learning_rate",
        ),
        (
            {"class_path": "torch.optim.SGD", "init_args": {"momentum": -1}},
            r"model\.optimizer: SGD cannot be created .*momentum",
        ),
        ({"class_path": "torch.optim.SGD", "init_args": {"betas": [0.9, 0.99]}}, r"model\.optimizer: SGD .*betas"),
        ({"class_path": "torch.optim.Rprop"}, r"model\.weight_decay: 0\.01 is set, but Rprop"),
    ],
)
def test_unsupported_optimizers_are_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        classifier(optimizer=optimizer)


def test_an_error_of_the_optimizer_names_the_key() -> None:
    model = classifier(optimizer={"class_path": "torch.optim.Muon"})
    with pytest.raises(ModelError, match=r"model\.optimizer: Muon .*2D"):  # the bias of the head has one dimension
        model.optimizer_spec.build(model.trained_groups())


def fitted(folder: Path, epochs: int, checkpoint: Path | None = None, **keys: Any) -> ImageClassifier:
    """Return a model after epochs of two steps each, started anew or from a checkpoint."""
    torch.manual_seed(3)
    model = classifier(adapter=AdapterConfig(rank=2), **keys)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rows = [{"image": images[i], "label": i % 2} for i in range(8)]
    trainer = quiet_trainer(max_epochs=epochs)
    trainer.fit(model, DataLoader(rows, batch_size=4), ckpt_path=checkpoint, weights_only=True)  # type: ignore[arg-type]
    trainer.save_checkpoint(folder / "fitted.ckpt")
    return model


# optimizers without state, with averages, and with factored moments
@pytest.mark.parametrize("name", ["SGD", "ASGD", "Adafactor"])
def test_other_optimizers_train_and_resume(tmp_path: Path, name: str) -> None:
    keys = {"optimizer": {"class_path": f"torch.optim.{name}"}, "schedule": "constant", "weight_decay": 0.0}
    full = fitted(tmp_path, 2, **keys)
    half = fitted(tmp_path, 1, **keys)
    resumed = fitted(tmp_path, 2, tmp_path / "fitted.ckpt", **keys)
    assert type(resumed.optimizers(use_pl_optimizer=False)).__name__ == name
    before, after, expected = (m.backbone.blocks[0].attn.qkv.adapters["value"].B for m in (half, resumed, full))  # type: ignore[index, union-attr]
    assert not torch.equal(before, after)
    assert torch.equal(after, expected)


def test_the_default_optimizer_is_adamw_with_torchs_defaults(tmp_path: Path) -> None:
    plain, named = (fitted(tmp_path, 1, optimizer=o) for o in (None, {"class_path": "torch.optim.AdamW"}))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [None, {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, optimizer: dict[str, Any] | None) -> None:
    fitted(tmp_path, 1, optimizer=optimizer)
    other = {"class_path": "torch.optim.Adam", "init_args": {"amsgrad": True}}
    with pytest.raises(ModelError, match=r"ckpt_path: the optimizer .*model\.optimizer"):
        fitted(tmp_path, 2, tmp_path / "fitted.ckpt", optimizer=other)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"Muon"}))
def test_is_state_checks_the_keys_shapes_and_dtypes_of_a_state(name: str) -> None:
    spec = OptimizerSpec({"class_path": f"torch.optim.{name}"}, 0.0)
    matrix, vector = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))
    optimizer = spec.build([{"params": [matrix, vector], "lr": 0.1}])
    for parameter in (matrix, vector):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = dict(optimizer.state[matrix])
    assert spec.is_state(state, matrix)
    assert spec.is_state(dict(optimizer.state[vector]), vector)
    for key, value in state.items():
        assert not spec.is_state({k: v for k, v in state.items() if k != key}, matrix)
        if isinstance(value, torch.Tensor):
            assert not spec.is_state(state | {key: value.bool()}, matrix)
            assert not spec.is_state(state | {key: value[None]}, matrix)
    assert not spec.is_state(state | {"more": 1}, matrix)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_parameter_steps_as_at_the_start_of_a_run(name: str) -> None:
    """The other parameter steps as without the reset."""
    spec = OptimizerSpec({"class_path": f"torch.optim.{name}"}, 0.0)
    start = torch.randn(2, 3, 4)
    gradients = torch.randn(3, 2, 3, 4)

    def build() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = [nn.Parameter(values.clone()) for values in start]
        return parameters, spec.build([{"params": [p], "lr": 0.1} for p in parameters])

    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        for parameter, gradient in zip(parameters, gradients[number], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    (reset, optimizer), (kept, undisturbed), (new, of_new) = build(), build(), build()
    for number in (0, 1):
        step(reset, optimizer, number)
        step(kept, undisturbed, number)
    with torch.no_grad():
        reset[0].copy_(start[0])
    reset_states(optimizer, spec.build([{"params": [p], "lr": 0.1} for p in reset]), [reset[0]])
    for parameters, of_parameters in ((reset, optimizer), (kept, undisturbed), (new, of_new)):
        step(parameters, of_parameters, 2)
    assert torch.equal(reset[0], new[0])
    assert torch.equal(reset[1], kept[1])
