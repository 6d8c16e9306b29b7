"""Run Hugging Face Trainer with PEFT's LoRA as in PEFT's documentation: query and value for texts, all ViT layers."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.fits import CLIP, DECAY, WARM_UP, Clock, Fit
from datamodules.sources.splits import choose_rows

MAX_LENGTH = 128
MODULES = {
    "cola": ("transformers.models.roberta.modeling_roberta", "sklearn.metrics"),
    "images": ("timm", "sklearn.metrics"),
}


class StepClock(TrainerCallback):
    """Start and stop the clock at each step."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        self.clock.begin(state.global_step // (state.max_steps // state.num_train_epochs))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock of a step."""
        self.clock.end()


class ImageModel(nn.Module):
    """A timm backbone with its classifier and a loss, since Trainer needs a model that returns a loss."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        import timm

        self.model: Any = timm.create_model(name, pretrained=False, num_classes=classes)

    def forward(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits (batch, classes) for images (batch, 3, height, width)."""
        logits = self.model(image.to(self.model.patch_embed.proj.weight.dtype))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def text_classifier(backbone: str, classes: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a text classifier with PEFT's LoRA on query and value, and its tokenizer."""
    # Without a dtype, transformers would load the weights in the 16 bits of the file.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=classes, dtype=dtype)
    model.classifier.float()
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, lora), transformers.AutoTokenizer.from_pretrained(backbone)


def texts(fit: Fit) -> tuple[Any, dict[str, Any]]:
    """Return the model and the data arguments of Trainer for CoLA."""
    dtype = getattr(torch, fit.arm.backbone_dtype)
    model, tokenizer = text_classifier(fit.backbone, classes=2, rank=fit.arm.rank, dtype=dtype)
    padding = {"padding": "max_length"} if fit.arm.padded else {}

    def tokenize(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["sentence"], truncation=True, max_length=MAX_LENGTH, **padding)

    train, val = (rows.map(tokenize, batched=True, remove_columns=["sentence", "idx"]) for rows in splits(fit))
    if fit.arm.padded:
        return model, {"train_dataset": train, "eval_dataset": val}
    collator = transformers.DataCollatorWithPadding(tokenizer)
    data = {"train_dataset": train, "eval_dataset": val, "processing_class": tokenizer, "data_collator": collator}
    return model, data


def images(fit: Fit) -> tuple[Any, dict[str, Any]]:
    """Return the model and the data arguments of Trainer for a directory of images in ten classes."""
    model = ImageModel(fit.backbone, classes=10).to(getattr(torch, fit.arm.backbone_dtype))
    model.model.head.float()
    # The pattern excludes the patch embedding, which has a `proj` too.
    targets = r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    lora = LoraConfig(
        r=fit.arm.rank,
        lora_alpha=2 * fit.arm.rank,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=["model.head"],
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = [torch.from_numpy(np.array(row["img"].convert("RGB"))).permute(2, 0, 1) for row in rows]
        batch = nn.functional.interpolate(torch.stack(pixels).float() / 255, size=224)
        return {"image": (batch - 0.5) / 0.5, "labels": torch.tensor([row["label"] for row in rows])}

    train, val = splits(fit)
    return get_peft_model(model, lora), {"train_dataset": train, "eval_dataset": val, "data_collator": collate}


def splits(fit: Fit) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the same training and validation rows as in our fit."""
    folder = Path(fit.data) / fit.task if (Path(fit.data) / fit.task).is_dir() else Path(fit.data)
    files = {name: str(folder / f"{name}*.parquet") for name in ("train", "validation")}
    data = datasets.load_dataset("parquet", data_files=files)
    train = data["train"].select(choose_rows(len(data["train"]), "train", {}, 0, fit.rows))
    return train, data["validation"]


def score(prediction: Any) -> dict[str, float]:
    """Return Matthews correlation and accuracy."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, label = logits.argmax(-1), prediction.label_ids
    return {"cola": float(matthews_corrcoef(label, predicted)), "images": float(accuracy_score(label, predicted))}


def fit(fit: Fit) -> dict[str, Any]:
    """Fit, and return seconds, memory and scores."""
    transformers.set_seed(fit.seed)  # For factors and head. Trainer sets the seed again for the data order.
    clock = StepClock()
    for name in MODULES[fit.task]:  # Import now, since imports must not count as building the model.
        import_module(name)
    clock.clock.loading()
    model, data = {"cola": texts, "images": images}[fit.task](fit)
    order = "random" if fit.arm.padded or fit.task == "images" else "group_by_length"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=fit.epochs,
            per_device_train_batch_size=fit.batch_size,
            per_device_eval_batch_size=fit.batch_size,
            learning_rate=fit.rate,
            weight_decay=DECAY,
            warmup_steps=WARM_UP,  # A value below 1 is a share of all steps.
            lr_scheduler_type="linear",
            max_grad_norm=CLIP,
            bf16=fit.arm.precision == "bf16-mixed",
            use_cpu=True,
            seed=fit.seed,
            dataloader_drop_last=True,  # Our fit drops the last batch too.
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            label_names=["labels"],
            remove_unused_columns=fit.task == "cola",
            disable_tqdm=True,
            report_to="none",
            train_sampling_strategy=order,
        )
        trainer = Trainer(model=model, args=arguments, compute_metrics=score, callbacks=[clock], **data)
        trainer.train()
        model.save_pretrained(f"{folder}/adapter")
        adapter = sum(path.stat().st_size for path in Path(folder, "adapter").glob("*.safetensors"))
    history = trainer.state.log_history
    return {
        **clock.clock.record(),
        "scores": [entry[f"eval_{fit.task}"] for entry in history if f"eval_{fit.task}" in entry],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_file_bytes": adapter,
        "fit_seconds": next(entry["train_runtime"] for entry in history if "train_runtime" in entry),
    }
