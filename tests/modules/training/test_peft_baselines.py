"""AdaLoRA and IA³ in our modules, compared with PEFT's models in a plain training loop."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, IA3Config, get_peft_model
from torch import Tensor, nn

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, AdapterError
from modules.image_classification import ImageClassifier
from modules.text_classification import TextClassifier
from tests.backbones import save_backbone
from tests.support.tasks import TINY, VIT
from tests.support.trainers import quiet_trainer, ready_loader

Batch = dict[str, Tensor]
RATE, STEPS = 0.01, 6
CONFIG = AdapterConfig(rank=4, alpha=10.0, targets=["key", "value", "mlp_out"])
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("roberta"), "roberta", initializer_range=0.2)


def text_model(folder: Path, tuning: str, **keys: Any) -> TextClassifier:
    torch.manual_seed(0)
    keys = {"adapter": CONFIG, "backbone_args": WITHOUT_DROPOUT, **keys}
    return TextClassifier(
        str(folder),
        tuning=tuning,  # type: ignore[arg-type]
        class_names=["bad", "good"],
        metrics=["accuracy"],
        learning_rate=RATE,
        weight_decay=0.0,
        schedule="constant",
        warmup_ratio=0.0,
        **keys,
    )


def image_model(tuning: str, **keys: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        VIT,
        weights="none",
        backbone_args=TINY,
        image_size=16,
        class_names=["a", "b", "c"],
        tuning=tuning,  # type: ignore[arg-type]
        adapter=CONFIG,
        learning_rate=RATE,
        weight_decay=0.0,
        schedule="constant",
        warmup_ratio=0.0,
        **keys,
    )


def texts(steps: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50, (steps, 5, 7), generator=generator)
    labels = torch.randint(0, 2, (steps, 5), generator=generator)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "label": label, "index": torch.arange(5)}
        for i, label in zip(ids, labels, strict=True)
    ]


def images(steps: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(steps, 6, 3, 16, 16, generator=generator)
    return [{"image": image, "label": torch.arange(6) % 3, "index": torch.arange(6)} for image in pixels]


def train(model: L.LightningModule, batches: list[Batch], **keys: Any) -> None:
    quiet_trainer(**keys).fit(model, ready_loader(batches))


def peft_config(method: str, names: str, feedforward: str) -> Any:
    if method == "ia3":
        return IA3Config(target_modules=names, feedforward_modules=feedforward)
    phases = {"total_step": STEPS, "tinit": 0, "tfinal": STEPS // 2, "deltaT": 1}
    return AdaLoraConfig(target_modules=names, target_r=4, init_r=6, lora_alpha=10, **phases)  # type: ignore[arg-type]


def assert_same_parameters(ours: nn.Module, reference: nn.Module) -> None:
    expected = {n.replace("base_model.model.", ""): p for n, p in reference.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["adalora", "ia3"])
def test_training_on_texts_equals_a_plain_loop_with_peft(roberta: Path, method: str) -> None:
    plain: Any = copy.deepcopy(text_model(roberta, "head").backbone)
    torch.manual_seed(CONFIG.seed)
    feedforward = r".*layer\.\d+\.output\.dense"
    config = peft_config(method, rf".*self\.(key|value)|{feedforward}", feedforward)
    reference: Any = get_peft_model(plain, config)
    plain.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(texts(), start=1):
        # with AdaLoRA, the loss includes PEFT's orthogonal regularisation
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        reference.base_model(**inputs, labels=batch["label"]).loss.backward()
        optimizer.step()
        if method == "adalora":
            reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()

    model = text_model(roberta, method)
    train(model, texts())
    assert_same_parameters(model.backbone, reference)
    if method == "adalora":
        ranks = [int((p != 0).sum()) for n, p in model.backbone.named_parameters() if "lora_E" in n]
        # pruned from rank 6 to an average of 4, with unequal ranks
        assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1


def test_training_on_images_equals_a_plain_loop_with_peft() -> None:
    start = image_model("head")
    plain, head = copy.deepcopy(start.backbone), copy.deepcopy(start.head)
    reference = get_peft_model(plain, peft_config("ia3", r".*attn\.qkv|.*mlp\.fc2", r".*mlp\.fc2"))  # type: ignore[arg-type]
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *head.parameters()], lr=RATE, weight_decay=0.0)  # type: ignore[operator]
    for batch in images():
        features = plain.forward_head(plain.forward_features(batch["image"]), pre_logits=True)  # type: ignore[operator]
        F.cross_entropy(head(features), batch["label"]).backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()

    model = image_model("ia3")
    train(model, images())
    assert_same_parameters(model.backbone, reference)
    torch.testing.assert_close(model.head.weight, head.weight)  # type: ignore[union-attr]


def test_accumulated_batches_add_the_regularisation_once(roberta: Path) -> None:
    batches, half_batches = texts(3), []
    for batch in batches:
        half_batches += [
            {key: value[:2] for key, value in batch.items()},
            {key: value[2:4] for key, value in batch.items()},
        ]
    models = [text_model(roberta, "adalora") for _ in range(2)]
    train(models[0], [{key: value[:4] for key, value in batch.items()} for batch in batches])
    train(models[1], half_batches, accumulate_grad_batches=2)
    for (name, expected), accumulated in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(expected, accumulated, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_of_one_step_prunes_nothing(roberta: Path) -> None:
    model = text_model(roberta, "adalora")
    train(model, texts(1))
    assert all((p != 0).all() for n, p in model.named_parameters() if "lora_E" in n)


def test_factors_stay_float32_on_a_bfloat16_backbone(roberta: Path) -> None:
    for method in ("adalora", "ia3"):
        model = text_model(roberta, method, backbone_dtype="bfloat16")
        train(model, texts(2))
        dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
        assert dtypes == {torch.float32}
        assert model.backbone.get_parameter("roberta.embeddings.word_embeddings.weight").dtype == torch.bfloat16


def test_initial_factors_depend_on_adapter_seed_and_leave_the_global_generator_unchanged(roberta: Path) -> None:
    model, other = text_model(roberta, "adalora"), text_model(roberta, "head")
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(model.backbone.classifier.dense.weight, other.backbone.classifier.dense.weight)  # type: ignore[union-attr]
    text_model(roberta, "head")
    assert torch.equal(torch.rand(3), after)
    seeded = text_model(roberta, "adalora", adapter=AdapterConfig(rank=4, targets=CONFIG.targets, seed=1))
    factors = [dict(m.named_parameters()) for m in (model, seeded)]
    names = [n for n in factors[0] if "lora_A" in n]
    assert names and not any(torch.equal(factors[0][n], factors[1][n]) for n in names)


def test_weight_decay_and_parameter_counts(roberta: Path) -> None:
    for method, decay in (("adalora", 0.5), ("ia3", 0.0)):  # IA³'s vectors start at one and have no decay
        model = text_model(roberta, method)
        model.weight_decay = 0.5
        groups = {group["name"]: group for group in model.trained_groups()}
        assert groups[method]["weight_decay"] == decay
        number_of_factors = sum(p.numel() for p in groups[method]["params"])
        counts = model.parameter_counts()
        assert counts["adapter/bytes"] == 4 * number_of_factors
        assert counts["params/trainable"] == number_of_factors + sum(
            p.numel() for n, p in model.named_parameters() if "classifier" in n
        )


def test_adapter_layers_selects_the_last_blocks(roberta: Path) -> None:
    config = AdapterConfig(rank=4, targets=["key"], layers=1)
    model = text_model(roberta, "ia3", adapter=config)
    trained = [n for n, p in model.backbone.named_parameters() if p.requires_grad and "ia3" in n]
    assert len(trained) == 1 and re.search(r"layer\.1\..*key\.ia3_l", trained[0])


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"adapter": AdapterConfig(rank_pattern={"key": 2}, targets=["key"])}, AdapterError, "adapter.rank_pattern"),
        ({"adapter": AdapterConfig(rank=100, targets=["key"])}, AdapterError, "100"),
        ({"shard_frozen": True}, ModelError, r"model\.shard_frozen: layers of tuning adalora are PEFT's"),
        ({"adapter_path": "somewhere"}, ModelError, "model.adapter_path: with tuning adalora"),
    ],
)
def test_unsupported_keys_are_refused(
    roberta: Path, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        text_model(roberta, "adalora", **keys)


def test_without_peft_there_is_one_message(roberta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"model\.tuning: ia3 needs PEFT, which is not installed.*pip install"):
        text_model(roberta, "ia3")


@pytest.mark.parametrize(
    "damage",
    [
        None,
        {},
        {"total_steps": "6"},
        {"total_steps": 6, "exp_avg_ipt": {}, "exp_avg_unc": {}, "rank_pattern": {"other": [True]}},
        {"total_steps": 6, "exp_avg_ipt": {"other": 1}, "exp_avg_unc": {}, "rank_pattern": {}},
    ],
)
def test_a_damaged_state_is_refused(roberta: Path, damage: Any) -> None:
    model = text_model(roberta, "adalora")
    assert model.baseline is not None
    with pytest.raises(ModelError, match="ckpt_path: the checkpoint has no state of AdaLoRA"):
        model.baseline.load_state(damage)
