"""ImageClassifier, beyond the conformance tests: metrics, heads of other families, states and bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, top_k_accuracy_score
from torch import Tensor

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapter_state
from modules.image_classification import ImageClassifier
from tests.support.adapters import changed, copied, randomize
from tests.support.refusals import refuses
from tests.support.tasks import CLASSES, TINY, VIT, Batch, TaskFactory, image_batch
from tests.support.trainers import ReadyData, quiet_trainer, ready_loader


def classifier(classes: int = 3, backbone: str = VIT, **keys: Any) -> Any:
    """Return a classifier without dropout."""
    names = [f"class {i}" for i in range(classes)] if classes else None
    keys = {"adapter": AdapterConfig(rank=4), "learning_rate": 0.01, "schedule": "constant", "warmup_ratio": 0.0} | keys
    return ImageClassifier(backbone, weights="none", backbone_args=TINY, image_size=16, class_names=names, **keys)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}),
        ("mobilenetv3_small_050", {}),  # the head's input is wider than the last block's output
    ],
)
def test_the_head_fits_other_families(name: str, args: dict[str, Any]) -> None:
    model = ImageClassifier(
        name, weights="none", backbone_args=args, image_size=32, tuning="head", class_names=["a", "b", "c", "d"]
    )
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 4)


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_equals_its_closed_form(smoothing: float) -> None:
    model, data = randomize(classifier(label_smoothing=smoothing)).eval(), image_batch()
    # loss: (1 - ε) times that of the label, plus ε times the mean over all classes
    negative_log_probability = -model(data["image"]).log_softmax(-1)
    label = negative_log_probability.gather(1, data["label"][:, None]).mean()
    torch.testing.assert_close(
        model.training_step(data, 0), (1 - smoothing) * label + smoothing * negative_log_probability.mean()
    )


class Watch(L.Callback):
    """Record the state before each training batch, and the modes of the backbone."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.modes: set[bool] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.states.append(copied(pl_module))
        self.modes |= {m.training for m in pl_module.backbone.modules()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(value: float, tuning: str) -> None:
    model, watch = classifier(tuning=tuning), Watch()
    data = [image_batch() for _ in range(4)]
    data[2]["image"][1, 0, 3, 3] = value
    with refuses("loss became nan at step 2.", "--ckpt_path last", "learning_rate", error=ModelError):
        quiet_trainer(callbacks=[watch]).fit(model, ready_loader(data))
    assert len(watch.states) == 3
    assert watch.modes == {True}
    assert changed(watch.states[1], watch.states[2])  # earlier steps did train
    assert changed(watch.states[2], model) == set()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# ------------------------------------------------------------------------------------------------------------- metrics


class Matrix(L.Callback):
    """Record the confusion matrix of a test."""

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.matrix = pl_module.confusion.compute()


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_equal_sklearns(tmp_path: Path, stage: str) -> None:
    model = randomize(classifier(classes=21, label_smoothing=0.3), std=0.3)
    # the last class has no samples
    data = [image_batch(size) | {"label": torch.randint(0, 20, (size,))} for size in (49, 49, 4)]
    with torch.no_grad():
        logits = torch.cat([model.eval()(b["image"]) for b in data])
    label = torch.cat([b["label"] for b in data])
    matrix = Matrix()
    runner = quiet_trainer(callbacks=[matrix], default_root_dir=tmp_path)
    run = runner.validate if stage == "val" else runner.test
    expected = {
        "acc1": accuracy_score(label, logits.argmax(-1)),
        "acc5": top_k_accuracy_score(label, logits, k=5, labels=range(21)),
        "macro_f1": f1_score(label, logits.argmax(-1), average="macro"),
        "loss": log_loss(label, logits.softmax(-1).double(), labels=range(21)),  # evaluation does not smooth labels
    }
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    for _ in range(2):  # the second evaluation starts anew
        (metrics,) = run(model, ready_loader(data), verbose=False)
        assert 0 < metrics.pop(f"{stage}/ece") < 1
        assert metrics == pytest.approx({f"{stage}/{name}": value for name, value in expected.items()}, abs=1e-5)
        if stage == "test":
            counts = confusion_matrix(label, logits.argmax(-1), labels=range(21))
            assert torch.equal(matrix.matrix, torch.from_numpy(counts))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("classes", "names"), [(2, {"acc1"}), (19, {"acc1"}), (20, {"acc1", "acc5"})])
def test_acc5_is_logged_for_twenty_classes_or_more(classes: int, names: set[str]) -> None:
    data = [image_batch(classes=classes)]
    (metrics,) = quiet_trainer().validate(classifier(classes), ready_loader(data), verbose=False)
    assert set(metrics) == {f"val/{name}" for name in names | {"loss", "macro_f1", "ece"}}


@torch.no_grad()
def test_predictions_have_names_classes_and_probabilities() -> None:
    model = randomize(classifier()).eval()
    data = image_batch() | {"index": torch.tensor([4, 0, 2, 11, 3, 7])}
    rows = model.predict_step(data, 0)
    probability = model(data["image"]).softmax(-1)
    assert list(rows) == ["index", "name", "prediction", "probability", "probabilities"]
    assert rows["index"] == [4, 0, 2, 11, 3, 7]
    assert rows["name"] == data["name"]
    assert rows["prediction"] == [f"class {i}" for i in probability.argmax(-1)]
    assert rows["probability"] == pytest.approx(probability.max(-1).values.tolist(), abs=1e-6)
    for named, shares in zip(rows["probabilities"], probability.tolist(), strict=True):
        assert named == pytest.approx({f"class {i}": share for i, share in enumerate(shares)}, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_running_statistics_are_saved_if_they_are_updated(tuning: Any) -> None:
    args = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24), "stem_width": 8}
    model = ImageClassifier(
        "resnet18", weights="none", backbone_args=args, image_size=32, tuning=tuning, class_names=["a", "b"]
    )
    statistics = {f"backbone.{name}" for name, _ in model.backbone.named_buffers()}
    before = copied(model)
    model(torch.randn(6, 3, 32, 32))
    assert changed(before, model) == (statistics if tuning == "full" else set())
    assert statistics & model.saved_state().keys() == (statistics if tuning == "full" else set())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ({"head.bias": None}, ["1 missing: head.bias"]),
        ({"backbone.blocks.0.attn.qkv.adapters.value.A": None}, ["1 missing: ", "value.A"]),
        ({"head.extra": (3,), "baseline": (1,)}, ["2 unexpected: head.extra, baseline"]),
        ({"head.weight": (4, 32)}, ["head.weight is (4, 32), not (3, 32)"]),
        ({"head.bias": None, "x": (1,), "head.weight": (3, 31)}, ["1 missing", "1 unexpected: x", "another shape"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_not_loaded(
    damage: dict[str, Any], parts: list[str], strict: bool
) -> None:
    model = classifier()
    before = copied(model)
    state = {name: torch.full_like(tensor, 7.0) for name, tensor in model.saved_state().items()}
    state |= {name: torch.zeros(shape) for name, shape in damage.items() if shape is not None}
    state = {name: tensor for name, tensor in state.items() if damage.get(name, ()) is not None}
    with refuses(*parts, error=ModelError):
        model.load_state_dict(state, strict=strict)
    assert changed(before, model) == set()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("train", ["B", "both"])
def test_adapters_that_the_backbone_bypasses_are_reported(train: Any) -> None:
    # BEiT adds its query bias by F.linear(x, self.qkv.weight): the adapted layer is never called
    adapter = AdapterConfig(train=train, rank=4, targets="all")
    model = classifier(backbone="beit_base_patch16_224", adapter=adapter)
    before = copied(model)
    with refuses("6 adapted projections get no gradient", "blocks.0.attn.qkv.query", error=ModelError):
        quiet_trainer().fit(model, ready_loader([image_batch()] * 2))
    assert changed(before, model) == set()


def test_adapters_that_the_backbone_calls_are_not_reported() -> None:
    # BEiT calls these layers
    adapter = AdapterConfig(rank=4, targets=["output", "mlp_in", "mlp_out"])
    model = classifier(backbone="beit_base_patch16_224", adapter=adapter)
    before = copied(model)
    quiet_trainer().fit(model, ready_loader([image_batch()] * 2))
    factors = {f"backbone.{name}" for name in adapter_state(model.backbone) if name.endswith(".B")}
    assert changed(before, model) == factors | {"head.weight", "head.bias"}


def test_classes_come_from_the_data_unless_the_model_has_names(tasks: TaskFactory) -> None:
    new, old = tasks("vit", class_names=None), tasks("vit")
    for model in (copy.deepcopy(new), old):
        quiet_trainer().fit(model, datamodule=ReadyData([image_batch()], class_names=("red", "green", "blue")))
        expected = ["red", "green", "blue"] if model is not old else CLASSES
        assert model.class_names == model.hparams["class_names"] == expected
    with refuses("model.class_names: neither the data", error=ModelError):
        quiet_trainer().fit(new, ready_loader([image_batch()]))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"classes": 1}, "model.class_names: ['class 0'] has fewer than two classes"),
        ({"label_smoothing": -0.1}, "model.label_smoothing: -0.1"),
        ({"label_smoothing": 1.0}, "model.label_smoothing: 1.0"),
        ({"label_smoothing": math.nan}, "model.label_smoothing: nan"),
        ({"learning_rate": 0.0}, "model.learning_rate: 0.0"),
        ({"lr_ratio_b": 0.0}, "model.lr_ratio_b: 0.0"),
        ({"lr_ratio_head": -1.0}, "model.lr_ratio_head: -1.0"),
        ({"weight_decay": -0.1}, "model.weight_decay: -0.1"),
        ({"weight_decay": math.nan}, "model.weight_decay: nan"),
        ({"weight_decay": math.inf}, "model.weight_decay: inf"),
        ({"warmup_ratio": 1.0}, "model.warmup_ratio: 1.0"),
        ({"tuning": "full", "backbone_dtype": "bfloat16"}, "model.backbone_dtype"),
    ],
    ids=str,
)
def test_bad_input_is_refused(keys: dict[str, Any], part: str) -> None:
    with refuses(part, error=ModelError):
        classifier(**keys)
