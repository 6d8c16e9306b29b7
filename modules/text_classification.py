"""Classification or regression on one or two sentences, with any Hugging Face encoder."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers import AutoModelForSequenceClassification

from datamodules.contract import (
    DataKind,
    HasClassCounts,
    HasClasses,
    HasLabelScaling,
    HasMetrics,
    HasSets,
    TextBatch,
)
from datamodules.errors import ModelError
from modules.backbones.transformers_backbone import (
    build_transformers_model,
    config_value,
    load_tokenizer,
    position_limit,
)
from modules.base import AdaptedModule, Stage
from modules.metrics.classification import (
    ClassWeights,
    check_class_weights,
    loss_weights,
    named_probabilities,
    shared_metrics,
)
from modules.metrics.text_metrics import build_metrics
from modules.scaling.frozen_prefix import FrozenPrefix, backbone_inputs, transformers_prefix
from modules.training.freezing import inputs_to_float32
from modules.training.label_units import LabelUnitsLinear, check_label_scaling
from modules.training.optimization import Schedule

UNSCALED = (0.0, 1.0)  # Mean and standard deviation of labels that are not scaled.
_log = logging.getLogger(__name__)


class TextClassifier(AdaptedModule):
    """A pretrained encoder with the classification head of its architecture.

    The head consists of the modules outside the base model, such as RoBERTa's `classifier` or DistilBERT's
    `pre_classifier`, and of a pooler without pretrained weights. The head is fully trained and saved. A pretrained
    output layer is kept only if its class names equal the data's class names, in order. Case does not matter.

    A regression trains as on standardized labels, and predicts in the units of the labels; see
    `modules.training.label_units`. The loss is the mean squared error divided by the variance of the training labels,
    or by their mean square if the output layer has no bias.

    Batches are `datamodules.contract.TextBatch`.

    Args:
        backbone: A name on the hub, such as `roberta-base`, or a directory in the hub's layout.
        class_names: Class names by label, [] for regression; None takes the names from the data. A checkpoint contains
            the names.
        metrics: List of `accuracy`, `f1`, `macro_f1`, `matthews`, `pearson`, `spearman`; None takes the data's
            metrics. `val/score` is the mean of the metrics. Every classification also logs `macro_f1` and `ece`, and
            every regression `mae`, the mean absolute error.
        label_scaling: Mean and standard deviation of the training labels in a regression. None takes both from the
            data; [0, 1] trains on the labels as they are. A checkpoint contains the values.
        class_weights: Weights of the classes in the training loss: `balanced` (inverse to their counts), a list in the
            order of the labels, or None for equal weights. Evaluation is never weighted.
        schedule: Shape of the learning rate; see `AdaptedModule`.
        warmup_ratio: Share of the steps that warm up; see `AdaptedModule`.
        pad_token: Padding token for tokenizers without a padding token, from the vocabulary; None uses the tokenizer's
            padding token.
    """

    kinds = (DataKind.LABELLED_TEXTS,)
    peft_task = "SEQ_CLS"

    def __init__(
        self,
        backbone: str = "roberta-base",
        *,
        class_names: list[str] | None = None,
        metrics: list[str] | None = None,
        label_scaling: list[float] | None = None,
        class_weights: ClassWeights = None,
        schedule: Schedule = "linear",
        warmup_ratio: float = 0.06,
        pad_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(schedule=schedule, warmup_ratio=warmup_ratio, **kwargs)
        check_class_weights(class_weights)
        check_label_scaling(label_scaling)
        self._has_scaling = label_scaling is not None
        self.class_weights = class_weights
        self.loss_weights: Tensor | None = None
        built = build_transformers_model(
            AutoModelForSequenceClassification, backbone, self.weights, self.backbone_args, self.backbone_dtype
        )
        self.model_config = built.model.config
        self.backbone = built.model
        self.tokenizer = load_tokenizer(backbone, built.model, pad_token=pad_token)
        # Decoders classify at the last token before the padding.
        if pad_token is not None or self.model_config.pad_token_id is None:
            self.model_config.pad_token_id = self.tokenizer.pad_token_id
        self.position_limit = position_limit(built.model)
        self._new = built.new
        self.configure_tuning(built.heads)
        self.class_names: list[str] | None = None
        self._score: LabelUnitsLinear | None = None  # Output layer of a regression.
        if class_names is not None:
            self.configure_labels(class_names)

    def setup(self, stage: str) -> None:
        """Set classes and metrics from the data, if the model has none yet."""
        super().setup(stage)
        data = self.data
        classes = self.take_from_data("class_names", data.class_names if isinstance(data, HasClasses) else None)
        names = self.take_from_data("metrics", data.metrics if isinstance(data, HasMetrics) else None)
        if self.class_names is None:
            self.configure_labels(classes)
        metrics = build_metrics(names, len(classes))
        if classes and self.hparams["label_scaling"] is not None:
            raise ModelError("model.label_scaling: a classification has no numbers to scale. Remove the key.")
        if classes:
            metrics.add_metrics({k: v for k, v in shared_metrics(len(classes)).items() if k not in names})
            self.confusion = MulticlassConfusionMatrix(len(classes))  # Counts of all sets together.
        else:
            metrics.add_metrics({"mae": MeanAbsoluteError()})
            self._set_label_units(stage)
        self.configure_metrics(metrics, data.set_names if isinstance(data, HasSets) else None)
        if stage == "fit":
            counts = data.class_counts if isinstance(data, HasClassCounts) else None
            self.loss_weights = loss_weights(self.class_weights, classes, counts)

    def configure_labels(self, class_names: list[str]) -> None:
        """Give the head one output for each class, or one output for regression.

        Raises:
            ModelError: If there is only one class, or the head has no output layer.
        """
        if len(class_names) == 1:
            raise ModelError(f"model.class_names: {class_names} has fewer than two classes. Give two or more.")
        self.class_names = class_names
        config = self.model_config
        name, pretrained_layer = self._output_layer(int(config.num_labels or 0))
        loaded = [str(label).lower() for _, label in sorted(dict(config.id2label or {}).items())]
        same_classes = loaded == [c.lower() for c in class_names] if class_names else len(loaded) == 1
        is_new = f"{name}.weight" in self._new or not same_classes
        if is_new or not class_names:
            d_in, has_bias = pretrained_layer.in_features, pretrained_layer.bias is not None
            if class_names:
                output = nn.Linear(d_in, len(class_names), bias=has_bias)
            else:
                output = self._score = LabelUnitsLinear(d_in, bias=has_bias)
            # The head must depend only on the run's seed, and DDP's start draws from the global generator.
            generator = torch.Generator().manual_seed(torch.initial_seed())
            nn.init.normal_(output.weight, std=config_value(config, "initializer_range", 0.02), generator=generator)
            if output.bias is not None:
                nn.init.zeros_(output.bias)
            if f"backbone.{name}" in self.head_names and self.tuning != "full":
                output.register_forward_pre_hook(inputs_to_float32)
            if not is_new:
                output.load_state_dict(pretrained_layer.state_dict())
            elif self._score is not None and any(n.startswith(f"backbone.{name}.") for n in self._adapter_heads):
                self._score.is_random = False
            self.backbone.set_submodule(name, output)
        config.id2label = dict(enumerate(class_names or ["score"]))
        self.backbone.num_labels = len(config.id2label)  # type: ignore[assignment]
        config.label2id = {label: i for i, label in config.id2label.items()}
        self.load_adapter_heads()

    def _set_label_units(self, stage: str) -> None:
        """Set the units of the output layer: the model's units or, in a fit, the units of the data."""
        if stage != "fit" and self.hparams["label_scaling"] is None:
            return
        known = self.data.label_scaling if isinstance(self.data, HasLabelScaling) else None
        if self.hparams["label_scaling"] is None and known is not None and known[1] == 0:
            raise ModelError(
                f"data.label_column: all training labels are {known[0]:g}, so there is nothing to learn. Name another "
                "column, or use other rows."
            )
        assert self._score is not None
        self._score.set_units(*self.take_from_data("label_scaling", known))

    def on_fit_start(self) -> None:
        """Warn if the output layer of a regression starts far from the training labels."""
        super().on_fit_start()
        if self._score is None or not isinstance(self.data, HasLabelScaling) or self.data.label_scaling is None:
            return
        if (warning := self._score.far_mean_warning(*self.data.label_scaling)) is not None:
            _log.warning(warning)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set [0, 1] for a checkpoint without `label_scaling`, unless the key is set: older runs used plain labels."""
        is_older = "label_scaling" not in checkpoint["hyper_parameters"]
        if self._score is not None and is_older and not self._has_scaling:
            self.hparams["label_scaling"] = list(UNSCALED)
            self._score.set_units(*UNSCALED)
        super().on_load_checkpoint(checkpoint)

    def _output_layer(self, outputs: int) -> tuple[str, nn.Linear]:
        """Return the name and module of the heads' last linear layer with this number of outputs."""
        heads = [name.removeprefix("backbone.") for name in self.head_names]
        layers = [
            (name, module)
            for head in heads
            for name, module in self.backbone.get_submodule(head).named_modules(prefix=head)
            if isinstance(module, nn.Linear) and module.out_features == outputs
        ]
        if not layers:
            raise ModelError(
                f"model.backbone: {type(self.backbone).__name__} has no linear output layer to fit to the task. Choose "
                "another backbone."
            )
        return layers[-1]

    def forward(self, batch: TextBatch) -> Tensor:
        """Return logits (batch, classes), or scores (batch,) in regression, float32."""
        arguments = {k: v for k, v in batch.items() if k not in ("label", "index")}
        with backbone_inputs(self.prefix, arguments) as inputs:
            logits: Tensor = self.backbone(**inputs).logits
        return logits.float() if self.class_names else logits.float().squeeze(-1)

    def build_prefix(self) -> FrozenPrefix:
        """Return the embeddings and the blocks below the lowest adapter."""
        heads = [name.removeprefix("backbone.") for name in self.head_names]
        return transformers_prefix(self.backbone, self.projections, heads, self.trainer, self)

    def loss(self, batch: TextBatch) -> Tensor:
        """Return the weighted cross-entropy of a batch, or in a regression the squared error over the squared unit."""
        outputs, label = self(batch), batch["label"]
        weights = None if self.loss_weights is None else self.loss_weights.to(outputs.device)
        return self._losses(outputs, label, weights, "mean")

    def _losses(self, outputs: Tensor, label: Tensor, weights: Tensor | None = None, reduction: str = "none") -> Tensor:
        """Return cross-entropies, or squared errors over the squared unit of the labels."""
        if self._score is not None:
            return F.mse_loss(outputs / self._score.unit, label / self._score.unit, reduction=reduction)
        return F.cross_entropy(outputs, label, weights, reduction=reduction)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Convert the output layer of a regression to standardized labels, before gradients are clipped."""
        super().on_before_optimizer_step(optimizer)
        if self._score is not None:
            self._score.standardize()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then convert the output layer of a regression back to the units of the labels."""
        try:
            super().optimizer_step(*args, **kwargs)
        finally:
            if self._score is not None:
                self._score.restore()

    def evaluate(self, stage: Stage, batch: TextBatch, dataloader_idx: int) -> None:
        """Update loss and metrics and, in a test, the confusion matrix."""
        outputs, label = self(batch), batch["label"]
        self.update_loss(stage, self._losses(outputs, label))
        self.update_metrics(stage, outputs, label, set_number=dataloader_idx)
        if stage == "test" and self.class_names:
            self.confusion.update(outputs, label)

    def scores(self, stage: Stage) -> dict[str, Tensor]:
        """Return the loss, the metrics of each set, and `<stage>/score`.

        The score is the mean of the metrics of `metrics` over all sets, as in GLUE.
        """
        values = super().scores(stage)
        if stage == "test" and self.class_names:
            self.confusion.reset()  # Callbacks run before this method and have read the confusion matrix.
        suffixes = [f"_{name}" if name else "" for name in self.set_names[stage]]
        configured = [values[f"{stage}/{name}{suffix}"] for name in self.hparams["metrics"] for suffix in suffixes]
        return values | {f"{stage}/score": torch.stack(configured).mean()}

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Any]]:
        """Return rows of a table: index, label, class, and probabilities in [0, 1]; in regression the score.

        `probability` belongs to the predicted class, and `probabilities` holds all classes by name.
        """
        outputs, index = self(batch), batch["index"].tolist()
        if not self.class_names:
            # Labels may have any unit, so predictions keep the seven digits of float32, not six decimal places.
            return {"index": index, "prediction": [float(f"{x:.7g}") for x in outputs.tolist()]}
        probabilities = outputs.softmax(-1)
        probability, label = probabilities.max(-1)
        return {
            "index": index,
            "label": label.tolist(),
            "prediction": [self.class_names[i] for i in label.tolist()],
            "probability": [round(p, 6) for p in probability.tolist()],
            "probabilities": named_probabilities(probabilities, self.class_names),
        }
