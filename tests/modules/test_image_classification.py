"""The classifier by itself: what it computes, what it measures, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapted_layers, adapter_state
from modules.image_classification import ImageClassifier

VIT = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
Batch = dict[str, Any]


def classifier(classes: int = 3, backbone: str = VIT, args: dict[str, Any] | None = None, **keys: Any) -> Any:
    names = [f"class {i}" for i in range(classes)] if classes else None
    keys = {"adapter": AdapterConfig(rank=4), "learning_rate": 0.01, **keys}
    return ImageClassifier(
        backbone, weights="none", backbone_args={**TINY, **(args or {})}, image_size=16, class_names=names, **keys
    )


def batch(size: int = 6, classes: int = 3) -> Batch:
    return {"image": torch.randn(size, 3, 16, 16), "label": torch.arange(size) % classes}


def randomize(model: ImageClassifier) -> ImageClassifier:
    """Away from the start, where B and the head's bias are zero."""
    with torch.no_grad():
        for tensor in [*adapter_state(model.backbone).values(), *(p for p in model.head.parameters())]:  # type: ignore[union-attr]
            tensor.normal_(std=0.3)
    return model


def loader(data: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def trainer(**keys: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **{**quiet, "enable_model_summary": False, "max_epochs": 1, **keys})


# ------------------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_forward_is_timms_features_and_a_linear_head(pool: str) -> None:
    model = randomize(classifier(tuning="head", args={"global_pool": pool})).eval()
    theirs = timm.create_model(VIT, img_size=16, num_classes=3, global_pool=pool, **TINY).eval()
    head = {"head.weight": model.head.weight, "head.bias": model.head.bias}  # type: ignore[union-attr]
    theirs.load_state_dict(model.backbone.state_dict() | head)
    image = batch()["image"]
    torch.testing.assert_close(model(image), theirs(image), rtol=0, atol=1e-6)


@torch.no_grad()
def test_forward_with_adapters_is_that_of_the_updated_weights() -> None:
    model = randomize(classifier(adapter=AdapterConfig(rank=4, alpha=12, targets="all"))).eval()
    theirs = timm.create_model(VIT, img_size=16, num_classes=0, **TINY).eval()
    state = {name: t for name, t in model.backbone.state_dict().items() if "adapters" not in name}
    factors = adapter_state(model.backbone)
    rows = {"query": slice(0, 32), "key": slice(32, 64), "value": slice(64, 96)}
    for name in (n for n in factors if n.endswith(".A")):
        layer, role = name.removesuffix(".A").split(".adapters.")
        update = 12 / 4 * factors[name.removesuffix("A") + "B"] @ factors[name]
        weight = state[f"{layer}.weight"] = state[f"{layer}.weight"].clone()
        weight[rows.get(role, slice(None))] += update
    theirs.load_state_dict(state)
    image = batch()["image"]
    expected = theirs(image) @ model.head.weight.T + model.head.bias  # type: ignore[union-attr]
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(image), randomize(classifier()).eval()(image))


@torch.no_grad()
@pytest.mark.parametrize("tuning", ["adapter", "head"])
def test_a_bfloat16_backbone_gives_float32_logits(tuning: str) -> None:
    full = randomize(classifier(tuning=tuning)).eval()
    half = classifier(tuning=tuning, backbone_dtype="bfloat16").eval()
    half.backbone.load_state_dict(full.backbone.state_dict())
    half.head.load_state_dict(full.head.state_dict())  # type: ignore[union-attr]
    image = batch()["image"]
    assert half(image).dtype == torch.float32
    assert not torch.equal(half(image), full(image))
    torch.testing.assert_close(half(image), full(image), rtol=0.05, atol=0.05)
    factors = {id(t) for t in half.backbone.parameters()} & {id(p) for p in _factors(half)}
    dtypes = {p.dtype for p in half.backbone.parameters() if id(p) not in factors}
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in [*_factors(half), *half.head.parameters()]} == {torch.float32}  # type: ignore[union-attr]


def _factors(model: ImageClassifier) -> list[Tensor]:
    return [p for layer in adapted_layers(model.backbone).values() for f in layer.factors() for p in f.parameters()]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}),
        ("mobilenetv3_small_050", {}),  # its head is wider than its last block
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}),
    ],
)
def test_the_head_fits_other_families(name: str, args: dict[str, Any]) -> None:
    model = ImageClassifier(
        name, weights="none", backbone_args=args, image_size=32, tuning="head", class_names=["a", "b", "c", "d"]
    )
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 4)


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_training_loss_is_torchs_smoothed_cross_entropy(smoothing: float) -> None:
    model = randomize(classifier(label_smoothing=smoothing)).eval()
    data = batch()
    loss = model.training_step(data, 0)
    logits = model(data["image"])
    torch.testing.assert_close(loss, F.cross_entropy(logits, data["label"], label_smoothing=smoothing))
    surprise = -logits.log_softmax(-1)  # (1 - ε) of the label's, and ε of the mean over all classes
    label = surprise.gather(1, data["label"][:, None]).mean()
    torch.testing.assert_close(loss, (1 - smoothing) * label + smoothing * surprise.mean())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ModelError, match=r"model\.label_smoothing"):
        classifier(label_smoothing=smoothing)


@torch.no_grad()
@pytest.mark.parametrize("tuning", ["adapter", "head", "full"])
def test_dropout_is_on_in_training(tuning: str) -> None:
    model = randomize(classifier(tuning=tuning, args={"pos_drop_rate": 0.3}))
    image = batch()["image"]
    assert model.backbone.training
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@torch.no_grad()
def test_adapter_dropout_is_on_in_training() -> None:
    model = randomize(classifier(adapter=AdapterConfig(rank=4, dropout=0.3)))
    image = batch()["image"]
    assert not torch.equal(model(image), model(image))


class Watch(L.Callback):
    """Keeps the state in front of each training batch, and the modes it found."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.modes: set[bool] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        self.modes |= {m.training for m in pl_module.backbone.modules()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(poison: float, tuning: str) -> None:
    model, watch = classifier(tuning=tuning, schedule="constant", warmup_ratio=0.0), Watch()
    data = [batch() for _ in range(4)]
    data[2]["image"][1, 0, 3, 3] = poison
    with pytest.raises(ModelError, match=r"loss became nan at step 2\..*--ckpt_path last.*learning_rate"):
        trainer(callbacks=[watch]).fit(model, loader(data))
    assert len(watch.states) == 3
    assert watch.modes == {True}
    assert differing(watch.states[1], watch.states[2])  # it did learn before
    assert differing(watch.states[2], model.state_dict()) == set()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# ------------------------------------------------------------------------------------------------------------- metrics


def evaluated(model: ImageClassifier, data: list[Batch]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches."""
    with torch.no_grad():
        logits = torch.cat([model.eval()(b["image"]) for b in data])
    return logits, torch.cat([b["label"] for b in data])


class Matrix(L.Callback):
    """Keeps the confusion matrix of a test."""

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.matrix = pl_module.confusion.compute()


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_sklearns(tmp_path: Path, stage: str) -> None:
    model = randomize(classifier(classes=7, label_smoothing=0.3))
    data = [{**batch(size, 7), "label": torch.randint(0, 6, (size,))} for size in (9, 9, 4)]  # the last class is absent
    logits, label = evaluated(model, data)
    matrix = Matrix()
    runner = trainer(callbacks=[matrix], default_root_dir=tmp_path)
    run = runner.validate if stage == "val" else runner.test
    for _ in range(2):  # nothing is carried over
        (metrics,) = run(model, loader(data), verbose=False)
        assert metrics == pytest.approx(
            {
                f"{stage}/acc1": accuracy_score(label, logits.argmax(-1)),
                f"{stage}/acc5": top_k_accuracy_score(label, logits, k=5, labels=range(7)),
                f"{stage}/loss": log_loss(label, logits.softmax(-1).double(), labels=range(7)),  # without smoothing
            },
            abs=1e-5,
        )
        assert 0 < metrics[f"{stage}/acc1"] < metrics[f"{stage}/acc5"] < 1
        if stage == "test":
            expected = confusion_matrix(label, logits.argmax(-1), labels=range(7))
            assert torch.equal(matrix.matrix, torch.from_numpy(expected))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("classes", "names"), [(2, {"acc1"}), (5, {"acc1"}), (6, {"acc1", "acc5"})])
def test_top_five_is_of_more_than_five_classes(classes: int, names: set[str]) -> None:
    (metrics,) = trainer().validate(classifier(classes), loader([batch(classes=classes)]), verbose=False)
    assert set(metrics) == {f"val/{name}" for name in names | {"loss"}}


@torch.no_grad()
def test_predictions_are_rows_of_a_table() -> None:
    model = randomize(classifier()).eval()
    index = torch.tensor([4, 0, 2, 11, 3, 7])
    data = {"image": batch()["image"], "index": index, "name": [f"{i}.png" for i in range(6)]}
    rows = model.predict_step(data, 0)
    probability = model(data["image"]).softmax(-1)
    assert list(rows) == ["index", "name", "class", "probability"]
    assert rows["index"] == [4, 0, 2, 11, 3, 7]
    assert rows["name"] == data["name"]
    assert rows["class"] == [f"class {i}" for i in probability.argmax(-1)]
    assert rows["probability"] == pytest.approx(probability.max(-1).values.tolist(), abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- state


def test_saved_state_comes_back() -> None:
    model, other = randomize(classifier()), classifier()
    other.backbone.load_state_dict(model.backbone.state_dict())
    randomize(other)
    image = batch()["image"]
    assert not torch.equal(other.eval()(image), model.eval()(image))
    other.load_state_dict(model.saved_state())
    assert torch.equal(other(image), model(image))


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_running_statistics_are_saved_where_they_run(tuning: Any) -> None:
    args = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}
    model = ImageClassifier(
        "resnet18", weights="none", backbone_args=args, image_size=32, tuning=tuning, class_names=["a", "b"]
    )
    statistics = {f"backbone.{name}" for name, _ in model.backbone.named_buffers()}
    before = {name: value.clone() for name, value in model.state_dict().items() if name in statistics}
    model(torch.randn(6, 3, 32, 32))
    moved = {name for name, value in model.state_dict().items() if name in statistics and not value.equal(before[name])}
    assert statistics & model.saved_state().keys() == moved == (statistics if tuning == "full" else set())
    assert ("backbone.bn1.weight" in model.saved_state()) is (tuning == "full")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ({"head.bias": None}, ["1 missing: head.bias"]),
        ({"backbone.blocks.0.attn.qkv.adapters.value.A": None}, ["1 missing: .*value.A"]),
        ({"head.extra": (3,), "baseline": (1,)}, ["2 unexpected: head.extra, baseline"]),
        ({"head.weight": (4, 32)}, [r"head.weight is \(4, 32\), not \(3, 32\)"]),
        ({"head.bias": None, "x": (1,), "head.weight": (3, 31)}, ["1 missing", "1 unexpected: x", "another shape"]),
    ],
)
def test_a_state_that_does_not_fit_is_listed_and_nothing_loaded(
    damage: dict[str, Any], parts: list[str], strict: bool
) -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    state = {name: torch.full_like(tensor, 7.0) for name, tensor in model.saved_state().items()}
    state |= {name: torch.zeros(shape) for name, shape in damage.items() if shape is not None}
    state = {name: tensor for name, tensor in state.items() if damage.get(name, ()) is not None}
    with pytest.raises(ModelError, match="(?s)" + ".*".join(parts)):
        model.load_state_dict(state, strict=strict)
    assert differing(before, model.state_dict()) == set()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("train", ["B", "both"])
def test_adapters_that_the_backbone_bypasses_are_reported(train: str) -> None:
    # BEiT adds its query bias by F.linear(x, self.qkv.weight): the adapted layer is never called
    config = AdapterConfig(train=train, rank=4, targets="all")  # type: ignore[arg-type]
    model = classifier(backbone="beit_base_patch16_224", adapter=config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"adapters of 6 projections .*blocks\.0\.attn\.qkv\.query"):
        trainer().fit(model, loader([batch()] * 2))
    assert differing(before, model.state_dict()) == set()


def test_adapters_that_are_called_are_not() -> None:
    # of the same backbone, those that it does call
    config = AdapterConfig(rank=4, targets=["output", "mlp_in", "mlp_out"])
    model = classifier(backbone="beit_base_patch16_224", adapter=config, schedule="constant", warmup_ratio=0.0)
    before = copy.deepcopy(model.state_dict())
    trainer().fit(model, loader([batch()] * 2))
    factors = {f"backbone.{name}" for name in adapter_state(model.backbone) if name.endswith(".B")}
    assert differing(before, model.state_dict()) == factors | {"head.weight", "head.bias"}


def test_no_classes_anywhere() -> None:
    with pytest.raises(ModelError, match=r"model\.class_names"):
        trainer().fit(classifier(classes=0), loader([batch()]))


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ModelError, match="class"):
        classifier(classes=1)


class Data(L.LightningDataModule):
    """One batch, with the names of its classes."""

    class_names = ("red", "green", "blue")

    def train_dataloader(self) -> DataLoader[Batch]:
        return loader([batch()])


def test_classes_are_the_datas_unless_the_model_has_some() -> None:
    new, old = classifier(classes=0), classifier()
    for model in (new, old):
        trainer().fit(model, datamodule=Data())
    assert new.class_names == new.hparams["class_names"] == ["red", "green", "blue"]
    assert old.class_names == old.hparams["class_names"] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"lr_ratio_b": 0.0}, "lr_ratio_b"),
        ({"lr_ratio_head": -1.0}, "lr_ratio_head"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1"),
        ({"weight_decay": math.nan}, "weight_decay: nan"),
        ({"weight_decay": math.inf}, "weight_decay: inf"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: 1.0"),
        ({"tuning": "full", "backbone_dtype": "bfloat16"}, "backbone_dtype"),
    ],
)
def test_wrong_values(keys: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        classifier(**keys)
