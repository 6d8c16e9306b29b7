"""Image classification with any timm backbone."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from datamodules.contract import HIDDEN, DataKind, HasClassCounts, HasClasses, HasDomains, ImageBatch
from datamodules.errors import ModelError
from modules.backbones.timm_backbone import build_timm_backbone, features_from_block, preprocessing
from modules.base import AdaptedModule, Stage
from modules.metrics.classification import (
    ClassWeights,
    check_class_weights,
    loss_weights,
    named_probabilities,
    shared_metrics,
)
from modules.scaling.frozen_prefix import FrozenPrefix


class ImageClassifier(AdaptedModule):
    """A timm backbone and a linear head over its pooled features.

    Batches are `datamodules.contract.ImageBatch`.

    Args:
        backbone: A timm name, such as `vit_base_patch16_224.augreg_in21k`, or a model in timm's layout:
            `hf_hub:ORG/NAME` on the hub, `local-dir:PATH` in a directory.
        image_size: Height and width of the input in pixels; None is the backbone's size. Position embeddings are
            resized.
        label_smoothing: Share of the target spread over all classes in training, in [0, 1).
        class_names: Class names by label; None takes the names from the data. A checkpoint contains the names.
        class_weights: Weights of the classes in the training loss: `balanced` (inverse to their counts), a list in the
            order of the labels, or None for equal weights. Evaluation is never weighted.
    """

    kinds = (DataKind.IMAGES,)

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224.augreg_in21k",
        *,
        image_size: int | None = None,
        label_smoothing: float = 0.0,
        class_names: list[str] | None = None,
        class_weights: ClassWeights = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise ModelError(f"model.label_smoothing: {label_smoothing} must lie in [0, 1).")
        check_class_weights(class_weights)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.loss_weights: Tensor | None = None
        self.class_names: list[str] | None = class_names
        self.backbone = build_timm_backbone(backbone, self.weights, image_size, self.backbone_args)
        self.preprocessing = preprocessing(self.backbone, image_size)
        self.configure_tuning()
        self.head: nn.Module | None = None
        self.head_names = ["head"]
        if class_names:
            self.head = self.build_head()
            self.load_adapter_heads()

    def setup(self, stage: str) -> None:
        """Set the classes from the data, if the model has no classes yet, and build the head."""
        super().setup(stage)
        data = self.data
        known = data.class_names if isinstance(data, HasClasses) else None
        self.class_names = self.take_from_data("class_names", known)
        if self.head is None:
            self.head = self.build_head()
        self.load_adapter_heads()
        if stage == "fit":
            counts = data.class_counts if isinstance(data, HasClassCounts) else None
            self.loss_weights = loss_weights(self.class_weights, self.class_names or (), counts)
        tested = stage == "test" and isinstance(data, HasDomains)
        self.domain_names = list(data.domain_names) if tested else []
        metrics = [MulticlassAccuracy(len(self.class_names or ()), average="micro") for _ in self.domain_names]
        self.domains = nn.ModuleList(metrics)

    def peft_head_names(self) -> dict[str, tuple[str, ...]]:
        """Return the name of timm's classifier; a distilled model has two classifiers."""
        names = self.backbone.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        return {"head": (names,) if isinstance(names, str) else tuple(names)}

    def build_head(self) -> nn.Module:
        """Return a linear layer from the pooled features to the classes, and configure the metrics.

        Raises:
            ModelError: If there are fewer than two classes.
        """
        assert self.class_names is not None
        classes = len(self.class_names)
        if classes < 2:
            raise ModelError(f"model.class_names: {self.class_names} has fewer than two classes. Give two or more.")
        top: dict[str, Metric | MetricCollection] = {
            f"acc{k}": MulticlassAccuracy(classes, average="micro", top_k=k) for k in (1, 5) if k == 1 or classes >= 20
        }
        self.configure_metrics(MetricCollection({**top, **shared_metrics(classes)}, compute_groups=False))
        self.confusion = MulticlassConfusionMatrix(classes)
        features = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        head = nn.Linear(int(features), classes)  # type: ignore[arg-type]  # timm's own attributes
        # The head must depend only on the run's seed, and DDP's start draws from the global generator.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (batch, classes), float32, for normalised images (batch, 3, height, width)."""
        return self._classify(self.backbone(image.to(self.backbone_dtype)))  # (batch, classes)

    def logits(self, batch: ImageBatch) -> Tensor:
        """Return logits for the images of a batch, or for the cached outputs of the frozen prefix."""
        if HIDDEN not in batch:
            logits: Tensor = self(batch["image"])
            return logits
        assert self.prefix is not None
        return self._classify(
            features_from_block(cast(VisionTransformer, self.backbone), batch[HIDDEN], self.prefix.depth)
        )

    def _classify(self, features: Tensor) -> Tensor:
        assert self.head is not None
        logits: Tensor = self.head(features.to(torch.float32))  # (batch, classes)
        return logits.float()

    def build_prefix(self) -> FrozenPrefix:
        """Return the patch embedding and the blocks below the lowest adapter of a timm ViT."""
        if not isinstance(self.backbone, VisionTransformer):
            raise ModelError(
                f"data.cache_prefix: true supports only timm's plain ViTs, and {self.hparams['backbone']} is a "
                f"{type(self.backbone).__name__}. Set the key to false."
            )
        keys = ("backbone", "backbone_args", "image_size")
        return FrozenPrefix(
            self.backbone,
            self.projections,
            heads=(),
            embeddings=(),
            inputs=("image",),
            padding={},
            identity={key: self.hparams[key] for key in keys} | {"precision": self.trainer.precision},
            outputs=self.logits,
            context=self.trainer.precision_plugin.forward_context,
        )

    def loss(self, batch: ImageBatch) -> Tensor:
        """Return the cross-entropy of a batch, with class weights and label smoothing."""
        logits = self.logits(batch)
        weights = None if self.loss_weights is None else self.loss_weights.to(logits.device)
        return F.cross_entropy(logits, batch["label"], weights, label_smoothing=self.label_smoothing)

    def evaluate(self, stage: Stage, batch: ImageBatch, dataloader_idx: int) -> None:
        """Update loss, metrics and, in a test, the confusion matrix. Other domains have only an accuracy."""
        logits, label = self.logits(batch), batch["label"]
        if dataloader_idx > 0:
            cast(Metric, self.domains[dataloader_idx - 1]).update(logits, label)
            return
        self.update_loss(stage, F.cross_entropy(logits, label, reduction="none"))
        self.update_metrics(stage, logits, label)
        if stage == "test":
            self.confusion.update(logits, label)

    def scores(self, stage: Stage) -> dict[str, Tensor]:
        """Return `<stage>/loss`, `<stage>/acc1`, `macro_f1`, `ece` and, for 20 classes or more, `acc5`.

        `test/<domain>/acc1` is the accuracy of a domain. `test/ood/acc1` is the unweighted mean over domains. `gap/ood`
        is the in-domain accuracy minus the mean.
        """
        values = super().scores(stage)
        if stage == "test":
            self.confusion.reset()  # Callbacks run before this method and have read the confusion matrix.
            accuracies = [cast(Metric, metric).compute() for metric in self.domains]
            values |= {f"test/{name}/acc1": a for name, a in zip(self.domain_names, accuracies, strict=True)}
            if accuracies:
                mean = torch.stack(accuracies).mean()
                values |= {"test/ood/acc1": mean, "gap/ood": values["test/acc1"] - mean}
        return values

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, list[Any]]:
        """Return table rows: index and name of the image, predicted class, and probabilities in [0, 1].

        `probability` belongs to the predicted class. `probabilities` has every class by name. If an image could not be
        decoded, a column `error` has the reason, and class and probabilities are empty.
        """
        assert self.class_names is not None
        probabilities = self.logits(batch).softmax(-1)
        probability, label = probabilities.max(-1)
        errors: list[str] = batch.get("error", [""] * len(label))
        rows: dict[str, list[Any]] = {
            "index": batch["index"].tolist(),
            "name": batch["name"],
            "prediction": ["" if e else self.class_names[i] for i, e in zip(label.tolist(), errors, strict=True)],
            "probability": ["" if e else round(p, 6) for p, e in zip(probability.tolist(), errors, strict=True)],
            "probabilities": [
                {} if e else named
                for named, e in zip(named_probabilities(probabilities, self.class_names), errors, strict=True)
            ],
        }
        return rows | {"error": errors} if any(errors) else rows
