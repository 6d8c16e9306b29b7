"""Classification of one or two sentences, or regression on them, with any Hugging Face encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForSequenceClassification

from datamodules.contract import DataKind, HasClasses, HasMetrics, HasSets, TextBatch
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig
from modules.base import AdaptedModule, BackboneDtype, Tuning
from modules.freezing import inputs_to_float32
from modules.frozen_prefix import FrozenPrefix, backbone_inputs, transformers_prefix
from modules.optimization import Schedule
from modules.text_metrics import build_metrics
from modules.transformers_backbone import build_transformers_model, config_value, load_tokenizer, position_limit


class TextClassifier(AdaptedModule):
    """A pretrained encoder with its family's own classification head.

    The head is what the pretrained model does not bring along (RoBERTa's `classifier.dense` and `out_proj`,
    DistilBERT's `pre_classifier` too, a pooler without weights); it is trained whole and saved. Its output layer is
    kept only if it was loaded and stands for the data's classes, by their names in order.

    Batches are dicts of `input_ids` and `attention_mask` (batch, tokens) int64, whatever else the tokenizer gives, and
    `label` (batch,), int64 or, in regression, float32.

    Args:
        backbone: A name on the hub, `roberta-base`, or a directory in the hub's layout.
        weights: `pretrained` (the backbone's own), `none`, or a local .safetensors file in their place.
        backbone_args: Values of the backbone's config.json to change, such as `hidden_dropout_prob`.
        class_names: Names of the classes by label, [] for regression; None takes the data's. A checkpoint remembers.
        metrics: Of `accuracy`, `f1`, `matthews`, `pearson`, `spearman`; None takes the data's. `val/score` is
            their mean.
        tuning: See `AdaptedModule`, as all that follow up to `compile`.
        pad_token: Token of the vocabulary to pad with, for tokenizers that have none; None takes the tokenizer's own.
    """

    kinds = (DataKind.LABELLED_TEXTS,)
    peft_task = "SEQ_CLS"

    def __init__(
        self,
        backbone: str = "roberta-base",
        weights: str = "pretrained",
        backbone_dtype: BackboneDtype = "float32",
        backbone_args: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        metrics: list[str] | None = None,
        tuning: Tuning = "adapter",
        adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 - frozen, and the CLI reads its defaults from here
        adapter_path: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "linear",
        warmup_ratio: float = 0.06,
        lr_ratio_b: float = 1.0,
        lr_ratio_head: float = 1.0,
        shard_frozen: bool = False,
        compile: bool = False,
        pad_token: str | None = None,
    ) -> None:
        super().__init__(
            tuning=tuning,
            adapter=adapter,
            adapter_path=adapter_path,
            backbone_dtype=backbone_dtype,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_ratio=warmup_ratio,
            lr_ratio_b=lr_ratio_b,
            lr_ratio_head=lr_ratio_head,
            shard_frozen=shard_frozen,
            compile=compile,
        )
        self.save_hyperparameters()
        built = build_transformers_model(
            AutoModelForSequenceClassification, backbone, weights, backbone_args or {}, self.backbone_dtype
        )
        self.model_config = built.model.config
        self.backbone = built.model
        self.tokenizer = load_tokenizer(backbone, built.model, pad_token=pad_token)
        if (
            pad_token is not None or self.model_config.pad_token_id is None
        ):  # decoders look for the last token before the padding
            self.model_config.pad_token_id = self.tokenizer.pad_token_id
        self.position_limit = position_limit(built.model)
        self._new = built.new
        self.configure_tuning(built.heads)
        self.class_names: list[str] | None = None
        if class_names is not None:
            self.configure_labels(class_names)

    def setup(self, stage: str) -> None:
        """Take the data's classes and metrics, if the model has none yet."""
        super().setup(stage)
        data = self.data
        classes = self.take_from_data("class_names", data.class_names if isinstance(data, HasClasses) else None)
        names = self.take_from_data("metrics", data.metrics if isinstance(data, HasMetrics) else None)
        if self.class_names is None:
            self.configure_labels(classes)
        sets = data.set_names if isinstance(data, HasSets) else {}
        self.set_names: dict[str, list[str]] = {s: sets.get(s, [""]) for s in ("val", "test")}
        collection = build_metrics(names, len(classes))
        self.metrics = nn.ModuleDict(
            {
                f"{s}{name}": collection.clone(prefix=f"{s}/", postfix=f"_{name}" if name else None)
                for s, set_names in self.set_names.items()
                for name in set_names
            }
        )
        # a loss that is no number is not left out
        self.losses = nn.ModuleDict({s: MeanMetric(nan_strategy=math.nan) for s in ("val", "test")})

    def configure_labels(self, class_names: list[str]) -> None:
        """Give the head one output a class, or one for regression.

        Raises:
            ModelError: For a single class, or a head without an output layer.
        """
        if len(class_names) == 1:
            raise ModelError(f"model.class_names: {class_names} leaves nothing to tell apart; give two or more.")
        self.class_names = class_names
        config = self.model_config
        name, old = self._output_layer(int(config.num_labels or 0))
        loaded = [str(label).lower() for _, label in sorted(dict(config.id2label or {}).items())]
        same = loaded == [c.lower() for c in class_names] if class_names else len(loaded) == 1
        if f"{name}.weight" in self._new or not same:
            output = nn.Linear(old.in_features, max(len(class_names), 1), bias=old.bias is not None)
            # of the run's seed alone: starting the processes of DDP draws from the global generator
            generator = torch.Generator().manual_seed(torch.initial_seed())
            nn.init.normal_(output.weight, std=config_value(config, "initializer_range", 0.02), generator=generator)
            if output.bias is not None:
                nn.init.zeros_(output.bias)
            if f"backbone.{name}" in self.head_names and self.tuning != "full":
                output.register_forward_pre_hook(inputs_to_float32)
            self.backbone.set_submodule(name, output)
        config.id2label = dict(enumerate(class_names or ["score"]))
        self.backbone.num_labels = len(config.id2label)  # type: ignore[assignment]
        config.label2id = {label: i for i, label in config.id2label.items()}
        self.load_given_heads()

    def _output_layer(self, outputs: int) -> tuple[str, nn.Linear]:
        """The last linear layer of the heads with so many outputs."""
        heads = [name.removeprefix("backbone.") for name in self.head_names]
        layers = [
            (name, module)
            for head in heads
            for name, module in self.backbone.get_submodule(head).named_modules(prefix=head)
            if isinstance(module, nn.Linear) and module.out_features == outputs
        ]
        if not layers:
            raise ModelError(
                f"model.backbone: {type(self.backbone).__name__} has no linear output layer to fit to the task."
            )
        return layers[-1]

    def forward(self, batch: TextBatch) -> Tensor:
        """Logits (batch, classes), or scores (batch,) in regression, float32."""
        given = {k: v for k, v in batch.items() if k not in ("label", "index")}
        with backbone_inputs(self.prefix, given) as inputs:
            logits: Tensor = self.backbone(**inputs).logits
        return logits.float() if self.class_names else logits.float().squeeze(-1)

    def build_prefix(self) -> FrozenPrefix:
        """The embeddings and the blocks below the lowest adapter of an encoder such as BERT and RoBERTa."""
        heads = [name.removeprefix("backbone.") for name in self.head_names]
        return transformers_prefix(self.backbone, self.projections, heads, self.trainer, self)

    def loss(self, outputs: Tensor, label: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of logits (batch, classes); mean squared error of scores (batch,) in regression."""
        if self.class_names:
            return F.cross_entropy(outputs, label, reduction=reduction)
        return F.mse_loss(outputs, label, reduction=reduction)

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.loss(self(batch), batch["label"])
        self.check_loss(loss.detach())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def _evaluate(self, stage: str, batch: TextBatch, dataloader_idx: int) -> None:
        outputs, label = self(batch), batch["label"]
        self.losses[stage].update(self.loss(outputs, label, "none"))  # type: ignore[operator]
        self.metrics[f"{stage}{self.set_names[stage][dataloader_idx]}"].update(outputs, label)  # type: ignore[operator]

    def _report(self, stage: str) -> None:
        """Log the metrics of each set, and as `<stage>/score` the mean of them all, as GLUE does."""
        values: dict[str, Tensor] = {}
        for name in self.set_names[stage]:
            collection = self.metrics[f"{stage}{name}"]
            assert isinstance(collection, MetricCollection)
            values |= collection.compute()
            collection.reset()
        self.log_dict({k: v.float() for k, v in values.items()}, prog_bar=True)
        self.log(f"{stage}/score", torch.stack([v.float() for v in values.values()]).mean())
        loss = self.losses[stage]
        assert isinstance(loss, MeanMetric)
        self.log(f"{stage}/loss", loss.compute(), prog_bar=True)
        loss.reset()

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update `val/loss`, the task's metrics, and their mean `val/score`."""
        self._evaluate("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._report("val")

    def test_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation, under `test/`."""
        self._evaluate("test", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._report("test")

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Any]]:
        """Rows of a table: index of the text, label, class and its probability in [0, 1]; in regression the score."""
        outputs, index = self(batch), batch["index"].tolist()
        if not self.class_names:
            return {"index": index, "prediction": [round(x, 6) for x in outputs.tolist()]}
        probability, label = outputs.softmax(-1).max(-1)
        return {
            "index": index,
            "label": label.tolist(),
            "prediction": [self.class_names[i] for i in label.tolist()],
            "probability": [round(p, 6) for p in probability.tolist()],
        }
