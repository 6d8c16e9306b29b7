"""TextClassifier, beyond the conformance tests: output layer, metrics, predictions and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from datamodules.errors import InputError
from modules.adapters import AdapterConfig, AdapterError
from modules.text_classification import TextClassifier
from tests.backbones import save_backbone, save_classifier
from tests.support.adapters import changed, copied, randomize
from tests.support.refusals import refuses
from tests.support.rows import edit_json
from tests.support.tasks import CLASSES, Batch, TaskFactory, text_batch
from tests.support.trainers import ReadyData, quiet_trainer

OUTPUT = {"roberta": "classifier.out_proj", "bert": "classifier", "deberta": "classifier", "distilbert": "classifier"}
every_output = pytest.mark.parametrize("kind", list(OUTPUT))


def classifier(folder: Path, seed: int = 0, class_names: list[str] | None = CLASSES, **keys: Any) -> Any:
    torch.manual_seed(seed)
    return TextClassifier(str(folder), class_names=class_names, adapter=AdapterConfig(rank=2), **keys)


def output_layer(model: Any, kind: str = "roberta") -> nn.Linear:
    layer = model.backbone.get_submodule(OUTPUT[kind])
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def test_logits_do_not_depend_on_padding(tasks: TaskFactory) -> None:
    model = randomize(tasks("roberta")).eval()
    data = text_batch(model)
    separate = {
        name: data[name][1:2, : int(data["attention_mask"][1].sum())] for name in ("input_ids", "attention_mask")
    }
    assert separate["input_ids"].shape[1] < data["input_ids"].shape[1]
    torch.testing.assert_close(model(separate)[0], model(data)[1], rtol=0, atol=1e-5)


def test_heads_are_not_adapted(tasks: TaskFactory) -> None:
    model = tasks("deberta", adapter=AdapterConfig(rank=3, targets="regex:.*"))
    heads = tuple(name.removeprefix("backbone.") for name in model.head_names)
    assert len(model.projections) > 12
    assert not any(p.layer.startswith(heads) for p in model.projections)


# --------------------------------------------------------------------------------------------------- the output layer


@every_output
@pytest.mark.parametrize(
    ("class_names", "kept"),
    [
        (["bad", "middling", "good"], True),
        (["Bad", "MIDDLING", "good"], True),
        (["good", "middling", "bad"], False),
        (["bad", "middling", "fine"], False),
        (["bad", "good"], False),
        ([*CLASSES, "great"], False),
        ([], False),
    ],
    ids=str,
)
def test_a_loaded_head_is_kept_except_an_output_layer_of_other_classes(
    kind: str, class_names: list[str], kept: bool, tmp_path: Path
) -> None:
    saved = load_file(save_classifier(tmp_path, kind, CLASSES) / "model.safetensors")
    model = classifier(tmp_path, seed=5, class_names=class_names, tuning="head")
    state, output = model.backbone.state_dict(), output_layer(model, kind)
    new = {f"{OUTPUT[kind]}.{part}" for part in ("weight", "bias")}
    assert state.keys() == saved.keys()
    assert {name for name in saved if name not in new and not torch.equal(state[name], saved[name])} == set()
    assert output.out_features == max(len(class_names), 1)
    assert all(p.requires_grad for p in output.parameters())
    old = saved[f"{OUTPUT[kind]}.weight"]
    if kept:
        assert torch.equal(output.weight, old)
    else:
        assert not any(torch.equal(row, known) for row in output.weight for known in old)
        assert not output.bias.any()
        assert 0.01 < float(output.weight.std()) < 0.03  # initializer_range of the configuration is 0.02


@pytest.mark.parametrize("class_names", [["no", "yes"], ["yes", "no"]])
def test_labels_of_a_loaded_head_are_read_in_any_order(class_names: list[str], tmp_path: Path) -> None:
    saved = load_file(save_classifier(tmp_path, "roberta", ["no", "yes"]) / "model.safetensors")
    edit_json(tmp_path / "config.json", id2label={"1": "yes", "0": "no"})
    output = output_layer(classifier(tmp_path, class_names=class_names))
    assert torch.equal(output.weight, saved["classifier.out_proj.weight"]) is (class_names == ["no", "yes"])


def test_labels_in_a_configuration_do_not_mean_a_loaded_head(tmp_path: Path) -> None:
    labels = dict(enumerate(CLASSES))
    save_backbone(tmp_path, "roberta", id2label=labels, label2id={name: i for i, name in labels.items()})
    expected = torch.empty(3, 32).normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    assert torch.equal(output_layer(classifier(tmp_path, seed=3)).weight, expected)


@every_output
def test_new_heads_depend_on_the_seed_of_the_run_alone(tasks: TaskFactory, kind: str) -> None:
    def built(seed: int, draws: int = 0) -> dict[str, Tensor]:
        model = classifier(tasks.folder(kind), seed=seed, class_names=None)
        torch.randn(draws)
        model.configure_labels(CLASSES)
        return copied(model)

    first = built(3)
    assert changed(first, built(3, draws=17)) == set()
    assert changed(first, copied(classifier(tasks.folder(kind), seed=3))) == set()
    assert f"backbone.{OUTPUT[kind]}.weight" in changed(first, built(4))


def test_the_configuration_has_the_class_names(tasks: TaskFactory) -> None:
    config = tasks("roberta").backbone.config
    assert config.id2label == {0: "bad", 1: "middling", 2: "good"}
    assert config.label2id == {"bad": 0, "middling": 1, "good": 2}
    assert config.num_labels == 3
    assert tasks("roberta", class_names=[]).backbone.config.num_labels == 1


# ------------------------------------------------------------------------------------------------- steps and metrics


def batches(classes: int, sizes: tuple[int, ...] = (4, 4, 3)) -> list[Batch]:
    def one(size: int) -> Batch:
        tokens = torch.randint(4, 50, (size, 9))
        label = torch.randint(0, classes, (size,)) if classes else torch.rand(size)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": label}

    return [one(size) for size in sizes]


def scored(model: Any, stage: str, data: ReadyData) -> dict[str, float]:
    """Return the logged values of an evaluation."""
    run = quiet_trainer()
    (run.validate if stage == "val" else run.test)(model, datamodule=data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


@torch.no_grad()
def outputs_and_labels(model: TextClassifier, data: list[Batch]) -> tuple[Tensor, Tensor]:
    model.eval()
    return torch.cat([model(b) for b in data]), torch.cat([b["label"] for b in data])


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_equal_scikit_learns_and_score_is_their_mean(tasks: TaskFactory, stage: str) -> None:
    model, data = randomize(tasks("roberta", class_names=["no", "yes"])), batches(2)
    metrics = scored(model, stage, ReadyData(data, metrics=["accuracy", "f1"]))
    logits, label = outputs_and_labels(model, data)
    accuracy, f1 = accuracy_score(label, logits.argmax(-1)), f1_score(label, logits.argmax(-1))
    loss = float(F.cross_entropy(logits, label))
    macro_f1 = f1_score(label, logits.argmax(-1), average="macro")
    expected = {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2, "loss": loss, "macro_f1": macro_f1}
    assert 0 < metrics.pop(f"{stage}/ece") < 1
    assert metrics == pytest.approx({f"{stage}/{name}": value for name, value in expected.items()}, abs=1e-5)


def test_metrics_of_a_regression_equal_scipys(tasks: TaskFactory) -> None:
    model, data = randomize(tasks("roberta", class_names=None)), batches(0)
    metrics = scored(model, "val", ReadyData(data, class_names=[], metrics=["pearson", "spearman"]))
    scores, label = outputs_and_labels(model, data)
    assert scores.shape == label.shape
    pearson, spearman = pearsonr(scores, label).statistic, spearmanr(scores, label).statistic
    expected = {"val/pearson": pearson, "val/spearman": spearman, "val/score": (pearson + spearman) / 2}
    expected |= {"val/loss": float(F.mse_loss(scores, label)), "val/mae": float(F.l1_loss(scores, label))}
    assert metrics == pytest.approx(expected, abs=1e-4)


def test_each_set_of_a_split_has_its_own_metrics(tasks: TaskFactory) -> None:
    model, sets = randomize(tasks("roberta", class_names=None)), [batches(3), batches(3, (4, 4))]
    names = {"val": ["matched", "mismatched"]}
    metrics = scored(model, "val", ReadyData(*sets, class_names=CLASSES, metrics=["accuracy"], set_names=names))
    each = [outputs_and_labels(model, data) for data in (*sets, sets[0] + sets[1])]
    matched, mismatched, _ = (accuracy_score(label, logits.argmax(-1)) for logits, label in each)
    expected = {"val/accuracy_matched": matched, "val/accuracy_mismatched": mismatched}
    expected |= {"val/score": (matched + mismatched) / 2, "val/loss": float(F.cross_entropy(*each[2]))}
    shared = {f"val/{name}_{part}" for name in ("macro_f1", "ece") for part in names["val"]}
    assert metrics.keys() == expected.keys() | shared
    metrics = {name: value for name, value in metrics.items() if name in expected}
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_classes_and_metrics_of_the_data_are_saved_as_hyperparameters(tasks: TaskFactory) -> None:
    model = tasks("roberta", class_names=None)
    data = ReadyData(batches(3), class_names=CLASSES, metrics=["accuracy"])
    scored(model, "val", data)
    assert model.hparams["class_names"] == model.class_names == CLASSES
    assert model.hparams["metrics"] == ["accuracy"]
    before = copied(model)
    assert output_layer(model).out_features == 3
    scored(model, "val", data)  # a second setup changes nothing
    assert changed(before, copied(model)) == set()


@torch.no_grad()
def test_predictions_name_the_likeliest_class(tasks: TaskFactory) -> None:
    model = randomize(tasks("roberta")).eval()
    data = text_batch(model)
    del data["label"]  # prediction needs no label
    rows = model.predict_step(data, 0)
    probability = model(data).softmax(-1)
    label = probability.argmax(-1).tolist()
    assert (rows["index"], rows["label"]) == ([0, 1, 2, 3], label)
    assert rows["prediction"] == [CLASSES[i] for i in label]
    assert rows["probability"] == pytest.approx(probability.max(-1).values.tolist(), abs=1e-6)


@torch.no_grad()
def test_predictions_of_a_regression_are_scores(tasks: TaskFactory) -> None:
    model = randomize(tasks("roberta", class_names=[])).eval()
    rows = model.predict_step(text_batch(model), 0)
    assert list(rows) == ["index", "prediction"]
    assert rows["prediction"] == pytest.approx(model(text_batch(model)).tolist(), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "properties", "parts"),
    [
        ({"class_names": ["good"]}, {}, ["model.class_names: ['good'] has fewer than two classes. Give two"]),
        ({"class_names": None, "adapter": AdapterConfig(rank=33)}, {}, ["adapter.rank: 33 is larger"]),
        ({"class_names": None}, {"metrics": ["f1"]}, ["model.class_names: neither the data nor a checkpoint has"]),
        ({"class_names": None}, {"class_names": CLASSES}, ["model.metrics: neither the data nor a checkpoint has"]),
    ],
)
def test_bad_input_is_refused(
    tasks: TaskFactory, keys: dict[str, Any], properties: dict[str, Any], parts: list[str]
) -> None:
    error = AdapterError if "adapter" in keys else InputError
    with refuses(*parts, error=error):
        scored(tasks("roberta", **keys), "val", ReadyData(batches(3), **properties))
