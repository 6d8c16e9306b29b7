"""Summarization and other text-to-text tasks with Hugging Face encoder-decoders."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from datamodules.contract import IGNORE_INDEX, DataKind, SummaryBatch
from datamodules.errors import ModelError
from modules.backbones.transformers_backbone import build_transformers_model, load_tokenizer, position_limit
from modules.base import AdaptedModule, HeadlessTuning, Stage
from modules.generation.beam_search import Generation
from modules.metrics.rouge import Rouge
from modules.training.optimization import Schedule


class Summarizer(AdaptedModule):
    """A pretrained encoder-decoder, trained with teacher forcing and evaluated by beam search and ROUGE.

    Batches are `datamodules.contract.SummaryBatch`.

    Args:
        backbone: A name on the hub, such as `facebook/bart-large`, or a directory in the hub's layout.
        label_smoothing: Share of the target spread over the vocabulary in training, in [0, 1).
        generation: Beam search in validation, test and prediction.
        tuning: `adapter`, `full`, `adalora` or `ia3`; see `AdaptedModule`. The task has no new head.
        learning_rate: Peak learning rate; see `AdaptedModule`.
        schedule: Shape of the learning rate; see `AdaptedModule`.
    """

    kinds = (DataKind.SUMMARIES,)
    peft_task = "SEQ_2_SEQ_LM"

    def __init__(
        self,
        backbone: str = "facebook/bart-large",
        *,
        label_smoothing: float = 0.1,
        generation: Generation = Generation(),  # noqa: B008 - frozen, and the CLI reads its defaults from here
        tuning: HeadlessTuning = "adapter",
        learning_rate: float = 5e-4,
        schedule: Schedule = "linear",
        **kwargs: Any,
    ) -> None:
        super().__init__(tuning=tuning, learning_rate=learning_rate, schedule=schedule, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ModelError(f"model.label_smoothing: {label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing
        built = build_transformers_model(
            AutoModelForSeq2SeqLM, backbone, self.weights, self.backbone_args, self.backbone_dtype, trains_heads=False
        )
        self.backbone: PreTrainedModel = built.model
        if not hasattr(self.backbone, "prepare_decoder_input_ids_from_labels"):
            raise ModelError(
                f"model.backbone: {type(self.backbone).__name__} cannot build decoder inputs from labels. Choose "
                "another backbone."
            )
        self.tokenizer = load_tokenizer(backbone, built.model)
        self.position_limit = position_limit(built.model)
        self.generation = generation if isinstance(generation, Generation) else Generation(**generation)
        if self.position_limit is not None and self.generation.max_length > self.position_limit:
            raise ModelError(
                f"model.generation.max_length: {self.generation.max_length} tokens are more than the "
                f"backbone's {self.position_limit} positions. Use {self.position_limit} or less."
            )
        # Only the special tokens come from the backbone. `generation` sets the search.
        pretrained = self.backbone.generation_config.to_dict()
        tokens = {key: value for key, value in pretrained.items() if key.endswith("_token_id")}
        self.backbone.generation_config = GenerationConfig.from_dict({**tokens, **asdict(self.generation)})
        # An untied output layer is a head only if it has no pretrained weights.
        self.configure_tuning([h for h in built.heads if any(name.startswith(f"{h}.") for name in built.new)])
        self.load_adapter_heads()
        self.configure_metrics(Rouge())

    # -------------------------------------------------------------------------------------------------------- training

    def forward(self, batch: SummaryBatch) -> Tensor:
        """Return logits (batch, target tokens, vocabulary), float32, with teacher forcing."""
        start: Any = self.backbone.prepare_decoder_input_ids_from_labels
        outputs = self.backbone(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=start(labels=batch["labels"]),
            use_cache=False,
        )
        logits: Tensor = outputs.logits
        return logits.float()

    def loss(self, batch: SummaryBatch) -> Tensor:
        """Return the mean cross-entropy over all target tokens, with label smoothing."""
        return self._loss(batch, self.label_smoothing)

    def _loss(self, batch: SummaryBatch, label_smoothing: float) -> Tensor:
        logits = self(batch).flatten(0, 1)  # (batch · target tokens, vocabulary)
        labels = batch["labels"].flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)

    def items(self, batch: SummaryBatch) -> Tensor:
        """Return the number of target tokens."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    # ------------------------------------------------------------------------------------------------------ evaluation

    def generate(self, batch: SummaryBatch) -> list[str]:
        """Return summaries of a batch of sources by beam search."""
        search: Any = self.backbone.generate
        tokens = search(  # (batch, at most max_length)
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def evaluate(self, stage: Stage, batch: SummaryBatch, dataloader_idx: int) -> list[str]:
        """Update the loss without label smoothing, and ROUGE; return the summaries."""
        self.update_loss(stage, self._loss(batch, 0.0), self.items(batch))
        summaries = self.generate(batch)
        self.update_metrics(stage, summaries, batch["reference"])
        return summaries

    def predict_step(self, batch: SummaryBatch, batch_idx: int) -> dict[str, list[Any]]:
        """Return table rows: index of the source, and summary."""
        return {"index": batch["index"].tolist(), "summary": self.generate(batch)}
