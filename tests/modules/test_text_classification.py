"""The classifier of texts by itself: what it computes, which head it keeps, what it trains and what it saves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertModel

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapted_layers, adapter_state, detach
from modules.text_classification import TextClassifier
from modules.training.checks import IdleAdapterCheck
from tests.backbones import CONFIGS, save_backbone, save_classifier

Batch = dict[str, Tensor]
CLASSES = ["bad", "middling", "good"]
OUTPUT = {"roberta": "classifier.out_proj", "bert": "classifier", "deberta": "classifier", "distilbert": "classifier"}
HEADS = {
    "roberta": {"backbone.classifier.dense", "backbone.classifier.out_proj"},
    "bert": {"backbone.classifier"},
    "bert_without_pooler": {"backbone.bert.pooler.dense", "backbone.classifier"},
    "deberta": {"backbone.pooler.dense", "backbone.classifier"},
    "distilbert": {"backbone.pre_classifier", "backbone.classifier"},
}
every_kind = pytest.mark.parametrize("kind", list(HEADS))
every_output = pytest.mark.parametrize("kind", list(OUTPUT))
every_tuning = pytest.mark.parametrize("tuning", ["adapter", "head", "full"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A backbone of each kind; at so small a width the usual spread of 0.02 leaves next to nothing of the input."""
    root = tmp_path_factory.mktemp("backbones")
    paths = {kind: save_backbone(root / kind, kind, initializer_range=0.2) for kind in OUTPUT}
    paths["bert_without_pooler"] = save_backbone(root / "bert_without_pooler", "bert", initializer_range=0.2)
    BertModel(CONFIGS["bert"], add_pooling_layer=False).save_pretrained(paths["bert_without_pooler"])
    return paths


@pytest.fixture
def roberta(folders: dict[str, Path]) -> Path:
    return folders["roberta"]


def classifier(folder: Path, seed: int = 0, class_names: list[str] | None = CLASSES, **keys: Any) -> Any:
    torch.manual_seed(seed)
    keys = {"adapter": AdapterConfig(rank=4, targets="all"), "learning_rate": 0.01, **keys}
    return TextClassifier(str(folder), class_names=class_names, **keys)


def batch(model: TextClassifier) -> Batch:
    """Pairs of unequal length, with a label of each class or a score."""
    first = ["the film was good .", "bad", "it is not a good film", "w1 w2 w3 w4 w5 w6 w7"]
    encoded = model.tokenizer(first, ["good", "it was bad .", "w9", "."], padding=True, return_tensors="pt")
    label = torch.tensor([2, 0, 1, 1]) % len(model.class_names) if model.class_names else torch.randn(4)
    return {**encoded, "label": label, "index": torch.arange(4)}


@torch.no_grad()
def randomize(model: TextClassifier) -> TextClassifier:
    """Away from the start, where B and the output layer's bias are zero."""
    for tensor in [*adapter_state(model.backbone).values(), *head_parameters(model).values()]:
        tensor.normal_(std=0.15)
    return model


def head_parameters(model: TextClassifier) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.startswith(tuple(f"{h}." for h in model.head_names))}


def linear_layers(model: nn.Module, names: set[str]) -> set[str]:
    return {f"{layer}.{part}" for layer in names for part in ("weight", "bias")} & set(model.state_dict())


def output_layer(model: Any, kind: str) -> nn.Linear:
    return model.backbone.get_submodule(OUTPUT[kind])


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def trainer(**keys: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **{**quiet, "enable_model_summary": False, "max_epochs": 1, **keys})


# ---------------------------------------------------------------------------------------------- loss of transformers


@torch.no_grad()
def theirs(folder: Path, model: TextClassifier, data: Batch) -> tuple[float, Tensor]:
    """Loss and outputs of transformers' own model with the module's weights, adapters merged into them."""
    plain = copy.deepcopy(model.backbone)
    detach(plain, merge_first=True)
    outputs = max(len(model.class_names or []), 1)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    reference.load_state_dict(plain.state_dict())
    inputs = {name: tensor for name, tensor in data.items() if name not in ("label", "index")}
    result = reference.eval()(**inputs, labels=data["label"])
    return float(result.loss), result.logits


@every_kind
@pytest.mark.parametrize("class_names", [CLASSES, []], ids=["classes", "regression"])
@pytest.mark.parametrize("b", ["zero", "random"])
@torch.no_grad()
def test_loss_is_that_of_transformers(folders: dict[str, Path], kind: str, class_names: list[str], b: str) -> None:
    model = classifier(folders[kind], class_names=class_names).eval()
    at_start = model(batch(model))
    if b == "random":
        randomize(model)
    data = batch(model)
    loss, logits = theirs(folders[kind], model, data)
    assert float(model.training_step(data, 0)) == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(model(data), logits if class_names else logits.squeeze(-1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(model(data), at_start, atol=1e-3) == (b == "zero")


@torch.no_grad()
def test_without_factors_the_backbone_is_the_pretrained_one(roberta: Path) -> None:
    model = classifier(roberta).eval()
    data = batch(model)
    own = AutoModelForSequenceClassification.from_pretrained(roberta).base_model.eval()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model.backbone.roberta(**inputs)[0], own(**inputs)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_does_not_matter(roberta: Path) -> None:
    model = randomize(classifier(roberta)).eval()
    data = batch(model)
    alone = {name: data[name][1:2, : int(data["attention_mask"][1].sum())] for name in ("input_ids", "attention_mask")}
    assert alone["input_ids"].shape[1] < data["input_ids"].shape[1]
    torch.testing.assert_close(model(alone)[0], model(data)[1], rtol=0, atol=1e-5)


@every_kind
@pytest.mark.parametrize("tuning", ["adapter", "head"])
@torch.no_grad()
def test_the_head_of_a_bfloat16_backbone_is_in_float32(folders: dict[str, Path], kind: str, tuning: str) -> None:
    full = randomize(classifier(folders[kind], tuning=tuning)).eval()
    half = classifier(folders[kind], tuning=tuning, backbone_dtype="bfloat16").eval()
    half.load_state_dict(full.saved_state())
    seen: dict[str, set[torch.dtype]] = {}
    for name in HEADS[kind]:
        half.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: {x.dtype for x in args}})
        )
    logits = half(batch(half))
    assert logits.dtype == torch.float32
    assert seen == {name: {torch.float32} for name in HEADS[kind]}
    trained = {id(p) for p in half.parameters() if p.requires_grad} | {id(t) for t in factors(half)}
    assert {p.dtype for p in half.parameters() if id(p) in trained} == {torch.float32}
    assert {p.dtype for p in half.parameters() if id(p) not in trained} == {torch.bfloat16}
    assert not torch.equal(logits, full(batch(full)))
    assert float((logits - full(batch(full))).norm() / logits.norm()) < 0.1


def factors(model: TextClassifier) -> list[Tensor]:
    return [p for layer in adapted_layers(model.backbone).values() for f in layer.factors() for p in f.parameters()]


def test_a_bfloat16_backbone_trains(roberta: Path) -> None:
    model = classifier(roberta, backbone_dtype="bfloat16")
    model.loss(batch(model)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------- what is trained


@every_kind
@every_tuning
def test_heads_are_trained_and_the_rest_as_tuning_says(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = classifier(folders[kind], tuning=tuning)
    heads = linear_layers(model, HEADS[kind])
    assert set(head_parameters(model)) == heads
    adapters = {f"backbone.{name}" for name in adapter_state(model.backbone) if name.endswith(".B")}
    assert bool(adapters) is (tuning == "adapter")
    everything = {name for name, _ in model.named_parameters()}
    expected = everything if tuning == "full" else heads | adapters
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    model.loss(batch(model)).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == expected if tuning != "full" else heads < reached
    IdleAdapterCheck().on_after_backward(trainer(), model)  # no idle factor


@every_kind
@every_tuning
def test_the_optimizer_has_every_trained_parameter_once(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = classifier(folders[kind], tuning=tuning, lr_ratio_head=3.0)
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)
    groups = model.configure_optimizers()["optimizer"].param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    in_head = {id(p) for group in groups if group["name"].startswith("head") for p in group["params"]}
    assert in_head == {id(p) for p in head_parameters(model).values()}
    assert {group["initial_lr"] for group in groups if group["name"].startswith("head")} == {0.03}
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.requires_grad and p.ndim > 1}


def test_adapters_stay_out_of_the_heads(folders: dict[str, Path]) -> None:
    model = classifier(folders["deberta"], adapter=AdapterConfig(rank=3, targets="regex:.*"))
    heads = tuple(name.removeprefix("backbone.") for name in model.head_names)
    assert len(model.projections) > 12
    assert not any(p.layer.startswith(heads) for p in model.projections)


@every_kind
@every_tuning
@torch.no_grad()
def test_dropout_is_on_in_training_alone(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = classifier(folders[kind], tuning=tuning)
    data = batch(model)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(data), model(data))
    model.eval()
    assert torch.equal(model(data), model(data))


def test_backbone_args_switch_dropout_off(roberta: Path) -> None:
    model = classifier(roberta, backbone_args={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    assert torch.equal(model(batch(model)), model(batch(model)))


def test_a_few_steps_learn_the_batch(roberta: Path) -> None:
    model = classifier(roberta).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    before = copied(model.state_dict())
    losses = []
    for _ in range(15):
        loss = model.loss(batch(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------ what is saved


@every_kind
@pytest.mark.parametrize("tuning", ["adapter", "head"])
def test_a_checkpoint_holds_factors_and_heads_and_nothing_else(
    folders: dict[str, Path], kind: str, tuning: str
) -> None:
    model = classifier(folders[kind], tuning=tuning)
    both = {f"backbone.{name}" for name in adapter_state(model.backbone)}
    assert len(both) == (2 * 12 * (tuning == "adapter"))  # A and B of six projections in two blocks
    heads = linear_layers(model, HEADS[kind])
    assert set(model.saved_state()) == both | heads
    names = {name for name, _ in model.named_parameters()} - heads
    assert {name for name in names if "adapters" not in name}.isdisjoint(model.saved_state())


@every_kind
@pytest.mark.parametrize(
    ("class_names", "tuning"), [(CLASSES, "adapter"), ([], "adapter"), (CLASSES, "head"), ([], "full")]
)
@torch.no_grad()
def test_round_trip_into_a_module_of_another_seed(
    folders: dict[str, Path], kind: str, class_names: list[str], tuning: str
) -> None:
    keys: dict[str, Any] = {"class_names": class_names, "tuning": tuning}
    model = classifier(folders[kind], seed=0, **keys).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    state = copied(model.saved_state())
    other = classifier(folders[kind], seed=7, **keys).eval()
    assert not torch.allclose(other(batch(model)), model(batch(model)), atol=1e-3)
    assert other.fingerprint == model.fingerprint
    other.load_state_dict(state)
    assert torch.equal(other(batch(model)), model(batch(model)))


def test_a_state_without_the_head_is_refused(roberta: Path) -> None:
    model = classifier(roberta)
    state = {name: t for name, t in model.saved_state().items() if "out_proj" not in name}
    with pytest.raises(ModelError, match=r"2 missing: backbone\.classifier\.out_proj\.weight"):
        model.load_state_dict(state)


def test_a_state_of_other_classes_is_refused(roberta: Path) -> None:
    state = classifier(roberta, class_names=["a", "b"]).saved_state()
    with pytest.raises(ModelError, match=r"out_proj\.weight is \(2, 32\), not \(3, 32\)"):
        classifier(roberta).load_state_dict(state)


# --------------------------------------------------------------------------------------------------- the output layer


def without_output(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.startswith(f"{OUTPUT[kind]}.")}


def assert_loaded(model: TextClassifier, saved: dict[str, Tensor]) -> None:
    state = model.backbone.state_dict()
    assert [name for name, tensor in saved.items() if not torch.equal(state[name], tensor)] == []


@every_output
@pytest.mark.parametrize("class_names", [["bad", "middling", "good"], ["Bad", "MIDDLING", "good"]])
def test_a_loaded_head_for_the_datas_classes_is_kept(kind: str, class_names: list[str], tmp_path: Path) -> None:
    saved = load_file(save_classifier(tmp_path, kind, CLASSES) / "model.safetensors")
    model = classifier(tmp_path, seed=5, class_names=class_names, tuning="head")
    assert_loaded(model, saved)
    assert set(model.backbone.state_dict()) == set(saved)
    assert all(p.requires_grad for p in output_layer(model, kind).parameters())


@every_output
@pytest.mark.parametrize(
    "class_names",
    [["good", "middling", "bad"], ["bad", "middling", "fine"], ["bad", "good"], [*CLASSES, "great"], []],
    ids=["order", "names", "fewer", "more", "regression"],
)
def test_for_other_classes_only_the_output_layer_is_new(kind: str, class_names: list[str], tmp_path: Path) -> None:
    saved = load_file(save_classifier(tmp_path, kind, CLASSES) / "model.safetensors")
    model = classifier(tmp_path, seed=5, class_names=class_names, tuning="head")
    assert_loaded(model, without_output(saved, kind))
    output = output_layer(model, kind)
    assert output.out_features == max(len(class_names), 1)
    assert all(p.requires_grad for p in output.parameters())
    assert not any(torch.equal(row, old) for row in output.weight for old in saved[f"{OUTPUT[kind]}.weight"])
    assert output.bias is not None and not output.bias.any()
    assert 0.01 < float(output.weight.std()) < 0.03  # the configuration's initializer_range


@pytest.mark.parametrize("class_names", [["no", "yes"], ["yes", "no"]])
def test_a_loaded_heads_classes_are_those_of_its_labels_whatever_their_order(
    class_names: list[str], tmp_path: Path
) -> None:
    saved = load_file(save_classifier(tmp_path, "roberta", ["no", "yes"]) / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"1": "yes", "0": "no"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = output_layer(classifier(tmp_path, class_names=class_names), "roberta")
    assert torch.equal(output.weight, saved["classifier.out_proj.weight"]) is (class_names == ["no", "yes"])


def test_a_configuration_names_no_classes_of_a_head_without_weights(tmp_path: Path) -> None:
    labels = dict(enumerate(CLASSES))
    save_backbone(tmp_path, "roberta", id2label=labels, label2id={name: i for i, name in labels.items()})
    first, second = (output_layer(classifier(tmp_path, seed=3), "roberta").weight.clone() for _ in range(2))
    expected = torch.empty(3, 32).normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, second)
    assert torch.equal(first, expected)


@every_output
def test_the_output_layer_starts_from_the_runs_seed_alone(folders: dict[str, Path], kind: str) -> None:
    folder = str(folders[kind])

    def output(seed: int, draws: int) -> Tensor:
        torch.manual_seed(seed)
        torch.randn(draws)
        model = TextClassifier(folder, adapter=AdapterConfig(rank=2))
        torch.randn(draws)
        model.configure_labels(CLASSES)
        return output_layer(model, kind).weight.detach().clone()

    assert torch.equal(output(3, 0), output(3, 17))
    assert not torch.equal(output(3, 0), output(4, 0))
    assert torch.equal(output(3, 0), output_layer(classifier(folders[kind], seed=3), kind).weight)


@every_kind
@every_tuning
def test_the_same_seed_builds_the_same_module(folders: dict[str, Path], kind: str, tuning: str) -> None:
    first, second = (classifier(folders[kind], seed=3, tuning=tuning).state_dict() for _ in range(2))
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_configuration_remembers_the_classes(roberta: Path) -> None:
    config = classifier(roberta).backbone.config
    assert config.id2label == {0: "bad", 1: "middling", 2: "good"}
    assert config.label2id == {"bad": 0, "middling": 1, "good": 2}
    assert config.num_labels == 3
    assert classifier(roberta, class_names=[]).backbone.config.num_labels == 1


def test_one_class_is_refused(roberta: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.class_names: \['good'\] has fewer than two classes\. Give two"):
        classifier(roberta, class_names=["good"])


def test_a_rank_that_does_not_fit_is_refused_before_any_data(roberta: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\.rank: 33 is larger"):
        classifier(roberta, class_names=None, adapter=AdapterConfig(rank=33))


# ------------------------------------------------------------------------------------------------- steps and metrics


class Sets(L.LightningDataModule):
    """Batches that are there already, in one or two sets."""

    def __init__(self, data: list[list[Batch]], **said: Any) -> None:
        super().__init__()
        self.data = data
        for key, value in said.items():
            setattr(self, key, value)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(batches, batch_size=None) for batches in self.data]  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def batches(model: TextClassifier, classes: int, sizes: tuple[int, ...] = (4, 4, 3)) -> list[Batch]:
    def one(size: int) -> Batch:
        tokens = torch.randint(4, 50, (size, 9))
        label = torch.randint(0, classes, (size,)) if classes else torch.rand(size)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": label}

    return [one(size) for size in sizes]


@torch.no_grad()
def outputs_and_labels(model: TextClassifier, data: list[Batch]) -> tuple[Tensor, Tensor]:
    model.eval()
    return torch.cat([model(b) for b in data]), torch.cat([b["label"] for b in data])


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_of_a_split_are_scikit_learns_and_score_is_their_mean(roberta: Path, stage: str) -> None:
    model = randomize(classifier(roberta, class_names=["no", "yes"]))
    data = batches(model, 2)
    run = trainer()
    evaluate: Callable[..., Any] = run.validate if stage == "val" else run.test
    evaluate(model, datamodule=Sets([data], metrics=["accuracy", "f1"]), verbose=False)
    logits, label = outputs_and_labels(model, data)
    accuracy, f1 = accuracy_score(label, logits.argmax(-1)), f1_score(label, logits.argmax(-1))
    loss = float(F.cross_entropy(logits, label))
    expected = {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2, "loss": loss}
    actual = {name: float(value) for name, value in run.callback_metrics.items()}
    assert actual == pytest.approx({f"{stage}/{name}": value for name, value in expected.items()}, abs=1e-5)


def test_metrics_of_a_regression_are_scipys(roberta: Path) -> None:
    model = randomize(classifier(roberta, class_names=None))
    data = batches(model, 0)
    run = trainer()
    run.validate(model, datamodule=Sets([data], class_names=[], metrics=["pearson", "spearman"]), verbose=False)
    scores, label = outputs_and_labels(model, data)
    assert scores.shape == label.shape
    pearson, spearman = pearsonr(scores, label).statistic, spearmanr(scores, label).statistic
    expected = {"val/pearson": pearson, "val/spearman": spearman, "val/score": (pearson + spearman) / 2}
    expected["val/loss"] = float(F.mse_loss(scores, label))
    assert {k: float(v) for k, v in run.callback_metrics.items()} == pytest.approx(expected, abs=1e-4)


def test_each_set_of_a_split_has_its_own_metrics(roberta: Path) -> None:
    model = randomize(classifier(roberta, class_names=None))
    sets = [batches(model, 3), batches(model, 3, (4, 4))]
    names = {"val": ["matched", "mismatched"]}
    run = trainer()
    run.validate(
        model, datamodule=Sets(sets, class_names=CLASSES, metrics=["accuracy"], set_names=names), verbose=False
    )
    each = []
    for data in sets:
        logits, label = outputs_and_labels(model, data)
        each.append(accuracy_score(label, logits.argmax(-1)))
    logits, label = outputs_and_labels(model, sets[0] + sets[1])
    expected = {"val/accuracy_matched": each[0], "val/accuracy_mismatched": each[1], "val/score": sum(each) / 2}
    expected["val/loss"] = float(F.cross_entropy(logits, label))
    assert {k: float(v) for k, v in run.callback_metrics.items()} == pytest.approx(expected, abs=1e-5)


def test_the_datas_classes_and_metrics_are_remembered(roberta: Path) -> None:
    model = classifier(roberta, class_names=None)
    data = Sets([batches(model, 3)], class_names=CLASSES, metrics=["accuracy"])
    trainer().validate(model, datamodule=data, verbose=False)
    assert model.hparams["class_names"] == model.class_names == CLASSES
    assert model.hparams["metrics"] == ["accuracy"]
    assert output_layer(model, "roberta").out_features == 3
    weight = output_layer(model, "roberta").weight.detach().clone()
    trainer().validate(model, datamodule=data, verbose=False)  # a second setup changes nothing
    assert torch.equal(output_layer(model, "roberta").weight, weight)


@pytest.mark.parametrize(("key", "said"), [("class_names", {"metrics": ["f1"]}), ("metrics", {"class_names": CLASSES})])
def test_what_neither_model_nor_data_say_is_asked_for(roberta: Path, key: str, said: dict[str, Any]) -> None:
    model = classifier(roberta, class_names=None)
    with pytest.raises(ModelError, match=rf"^model\.{key}: neither the data nor a checkpoint \(--ckpt_path\)"):
        trainer().validate(model, datamodule=Sets([batches(model, 3)], **said), verbose=False)


@torch.no_grad()
def test_predictions_name_the_likeliest_class(roberta: Path) -> None:
    model = randomize(classifier(roberta)).eval()
    data = batch(model)
    del data["label"]  # what is predicted need not have one
    rows = model.predict_step(data, 0)
    probability = model(data).softmax(-1)
    label = probability.argmax(-1).tolist()
    assert rows["index"] == [0, 1, 2, 3]
    assert rows["label"] == label
    assert rows["prediction"] == [CLASSES[i] for i in label]
    assert rows["probability"] == pytest.approx(probability.max(-1).values.tolist(), abs=1e-6)


@torch.no_grad()
def test_predictions_of_a_regression_are_scores(roberta: Path) -> None:
    model = randomize(classifier(roberta, class_names=[])).eval()
    rows = model.predict_step(batch(model), 0)
    assert list(rows) == ["index", "prediction"]
    assert rows["prediction"] == pytest.approx(model(batch(model)).tolist(), abs=1e-6)
