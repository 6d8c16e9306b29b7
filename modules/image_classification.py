"""Image classification with any timm backbone."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from datamodules.contract import HIDDEN, DataKind, HasClasses, HasDomains, ImageBatch
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig
from modules.base import AdaptedModule, BackboneDtype, Tuning
from modules.frozen_prefix import FrozenPrefix
from modules.optimization import Schedule
from modules.timm_backbone import build_timm_backbone, features_from_block, preprocessing


class ImageClassifier(AdaptedModule):
    """A timm backbone and a linear head over its pooled features.

    Batches are dicts of `image` (batch, 3, height, width), normalised, and `label` (batch,) int64.

    Args:
        backbone: timm's name, `vit_base_patch16_224.augreg_in21k`, or a model in timm's layout: `hf_hub:ORG/NAME` on
            the hub, `local-dir:PATH` in a directory.
        weights: `pretrained` (those of that name, repository or directory), `none`, or a local .safetensors, .pth,
            .pt or .bin file.
        backbone_args: More arguments of the architecture for `timm.create_model`, such as `depth` or `drop_path_rate`.
        image_size: Side of the input in pixels; None takes the backbone's own. Position embeddings are resized.
        label_smoothing: Share of the target spread over all classes in training, in [0, 1).
        class_names: Names of the classes by label; None takes the data's. A checkpoint remembers them.
        tuning: See `AdaptedModule`, as all that follow.
    """

    kinds = (DataKind.IMAGES,)

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224.augreg_in21k",
        weights: str = "pretrained",
        backbone_dtype: BackboneDtype = "float32",
        backbone_args: dict[str, Any] | None = None,
        image_size: int | None = None,
        label_smoothing: float = 0.0,
        class_names: list[str] | None = None,
        tuning: Tuning = "adapter",
        adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 - frozen, and the CLI reads its defaults from here
        adapter_path: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "cosine",
        warmup_ratio: float = 0.05,
        lr_ratio_b: float = 1.0,
        lr_ratio_head: float = 1.0,
        shard_frozen: bool = False,
        compile: bool = False,
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
        if not 0 <= label_smoothing < 1:
            raise ModelError(f"model.label_smoothing: {label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing
        self.class_names: list[str] | None = class_names
        self.backbone = build_timm_backbone(backbone, weights, image_size, backbone_args or {})
        self.preprocessing = preprocessing(self.backbone, image_size)
        self.configure_tuning()
        self.head: nn.Module | None = None
        self.head_names = ["head"]
        if class_names:
            self.head = self.build_head()
            self.load_given_heads()

    def setup(self, stage: str) -> None:
        """Take the data's classes, if the model has none yet, and build the head."""
        super().setup(stage)
        data = self.data
        known = data.class_names if isinstance(data, HasClasses) else None
        self.class_names = self.take_from_data("class_names", known)
        if self.head is None:
            self.head = self.build_head()
        self.load_given_heads()
        tested = stage == "test" and isinstance(data, HasDomains)
        self.domain_names = list(data.domain_names) if tested else []
        metrics = [MulticlassAccuracy(len(self.class_names or ()), average="micro") for _ in self.domain_names]
        self.domains = nn.ModuleList(metrics)

    def peft_head_names(self) -> dict[str, tuple[str, ...]]:
        """Where timm has its classifier, or the two of a distilled model."""
        names = self.backbone.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        return {"head": (names,) if isinstance(names, str) else tuple(names)}

    def build_head(self) -> nn.Module:
        """A linear layer from the pooled features to the classes, and the metrics of as many."""
        assert self.class_names is not None
        classes = len(self.class_names)
        if classes < 2:
            raise ModelError(f"model.class_names: {self.class_names} leaves nothing to tell apart; give two or more.")
        self.configure_metrics(classes)
        features = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        head = nn.Linear(int(features), classes)  # type: ignore[arg-type]  # timm's own attributes
        # of the run's seed alone: starting the processes of DDP draws from the global generator
        generator = torch.Generator().manual_seed(torch.initial_seed())
        nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
        return head

    def configure_metrics(self, classes: int) -> None:
        """Top-1 and, of more than five classes, top-5 accuracy; the mean loss; the confusion matrix."""
        scores: dict[str, Metric | MetricCollection] = {"acc1": MulticlassAccuracy(classes, average="micro")}
        if classes > 5:
            scores["acc5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
        metrics = MetricCollection(scores)
        self.metrics = nn.ModuleDict({s: metrics.clone(prefix=f"{s}/") for s in ("val", "test")})
        # a loss that is no number is not left out
        self.losses = nn.ModuleDict({s: MeanMetric(nan_strategy=math.nan) for s in ("val", "test")})
        self.confusion = MulticlassConfusionMatrix(classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (batch, classes), float32, of normalised images (batch, 3, height, width)."""
        return self._classify(self.backbone(image.to(self.backbone_dtype)))  # of (batch, features)

    def logits(self, batch: ImageBatch) -> Tensor:
        """The same of a batch, of its images or of what the frozen prefix made of them."""
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
        """The patch embedding and the blocks below the lowest adapter of a timm ViT."""
        if not isinstance(self.backbone, VisionTransformer):
            raise ModelError(
                f"data.cache_prefix: is for timm's plain ViTs, and {self.hparams['backbone']} is a "
                f"{type(self.backbone).__name__}; set it to false."
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

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        loss = F.cross_entropy(self.logits(batch), batch["label"], label_smoothing=self.label_smoothing)
        self.check_loss(loss.detach())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, stage: str, batch: ImageBatch) -> None:
        logits, label = self.logits(batch), batch["label"]
        self.losses[stage].update(F.cross_entropy(logits, label, reduction="none"))  # type: ignore[operator]
        self.metrics[stage].update(logits, label)  # type: ignore[operator]
        if stage == "test":
            self.confusion.update(logits, label)

    def _report(self, stage: str) -> dict[str, Tensor]:
        """Log the metrics of a stage, and return them."""
        loss, metrics = self.losses[stage], self.metrics[stage]
        assert isinstance(loss, MeanMetric)
        assert isinstance(metrics, MetricCollection)
        values = {f"{stage}/loss": loss.compute(), **metrics.compute()}
        self.log_dict(values, prog_bar=True)
        loss.reset()
        metrics.reset()
        return values

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Update `val/loss`, `val/acc1` and, of more than five classes, `val/acc5`."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._report("val")

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation, under `test/`, and the confusion matrix; of other domains, top-1 accuracy alone."""
        if dataloader_idx == 0:
            self._evaluate("test", batch)
        else:
            self.domains[dataloader_idx - 1].update(self.logits(batch), batch["label"])  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and forget the confusion matrix, which callbacks have read.

        `test/<domain>/acc1` is the accuracy of a domain, `test/ood/acc1` their unweighted mean, and `gap/ood` the
        in-domain accuracy less that mean.
        """
        values = self._report("test")
        self.confusion.reset()
        if self.domain_names:
            accuracies = [metric.compute() for metric in self.domains]  # type: ignore[operator]
            mean = torch.stack(accuracies).mean()
            self.log_dict({f"test/{name}/acc1": a for name, a in zip(self.domain_names, accuracies, strict=True)})
            self.log_dict({"test/ood/acc1": mean, "gap/ood": values["test/acc1"] - mean})

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, list[Any]]:
        """Return rows of a table: index and name of the image, class, and its probability in [0, 1].

        If images of the batch could not be decoded, a column `error` says why; their class and probability are empty.
        """
        assert self.class_names is not None
        probability, label = self.logits(batch).softmax(-1).max(-1)
        errors: list[str] = batch.get("error", [""] * len(label))
        rows: dict[str, list[Any]] = {
            "index": batch["index"].tolist(),
            "name": batch["name"],
            "class": ["" if e else self.class_names[i] for i, e in zip(label.tolist(), errors, strict=True)],
            "probability": ["" if e else round(p, 6) for p, e in zip(probability.tolist(), errors, strict=True)],
        }
        return rows | {"error": errors} if any(errors) else rows
