"""Summaries, or any text from a text, with Hugging Face encoder-decoders."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from datamodules.contract import IGNORE_INDEX, DataKind, SummaryBatch
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig
from modules.base import AdaptedModule, BackboneDtype
from modules.optimization import Schedule
from modules.rouge import Rouge
from modules.transformers_backbone import build_transformers_model, load_tokenizer, position_limit

SAMPLES = 4  # of the first validation rows, the summaries go to TensorBoard


@dataclass(frozen=True)
class Generation:
    """Beam search; of the backbone's own generation_config.json only the special tokens count.

    Args:
        num_beams: Hypotheses that are kept, at least 1; 1 is greedy.
        length_penalty: Exponent of the length that a hypothesis' log-probability is divided by; above 0 favours longer.
        min_length: Least tokens of a generated text, the start included.
        max_length: Most tokens of a generated text, start and end included.
        no_repeat_ngram_size: Size of n-grams that occur once at most; 0 allows all.
        early_stopping: Whether a search ends as soon as there are `num_beams` finished texts, as BART's authors do.

    Raises:
        ModelError: For a value out of range.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    min_length: int = 0
    max_length: int = 128
    no_repeat_ngram_size: int = 3
    early_stopping: bool = True

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ModelError(f"model.generation.num_beams: {self.num_beams} must be 1 or more.")
        if not 0 <= self.min_length <= self.max_length or self.max_length < 2:
            raise ModelError(
                f"model.generation: min_length {self.min_length} and max_length {self.max_length} must be 0 <= min <= "
                "max, and max 2 or more."
            )
        if not math.isfinite(self.length_penalty):
            raise ModelError(f"model.generation.length_penalty: {self.length_penalty} must be finite.")
        if self.no_repeat_ngram_size < 0:
            raise ModelError(
                f"model.generation.no_repeat_ngram_size: {self.no_repeat_ngram_size} must not be negative."
            )


class Summarizer(AdaptedModule):
    """A pretrained encoder-decoder, trained with teacher forcing and evaluated by beam search and ROUGE.

    Batches are dicts of `input_ids` and `attention_mask` (batch, source tokens) int64 and `labels` (batch, target
    tokens) int64 with -100 behind the end, in evaluation also of `reference`, the texts.

    Args:
        backbone: A name on the hub, `facebook/bart-large`, or a directory in the hub's layout.
        weights: `pretrained` (the backbone's own), `none`, or a local .safetensors file in their place.
        backbone_args: Values of the backbone's config.json to change, such as `dropout`.
        label_smoothing: Share of the target spread over the vocabulary in training, in [0, 1).
        generation: Beam search in validation, test and prediction.
        tuning: `adapter`, `full`, `adalora` or `ia3`; there is no new head. See `AdaptedModule`, as for all that
            follow.
    """

    kinds = (DataKind.SUMMARIES,)
    peft_task = "SEQ_2_SEQ_LM"

    def __init__(
        self,
        backbone: str = "facebook/bart-large",
        weights: str = "pretrained",
        backbone_dtype: BackboneDtype = "float32",
        backbone_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.1,
        generation: Generation = Generation(),
        tuning: Literal["adapter", "full", "adalora", "ia3"] = "adapter",
        adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 - frozen, and the CLI reads its defaults from here
        adapter_path: str | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        schedule: Schedule = "linear",
        warmup_ratio: float = 0.05,
        lr_ratio_b: float = 1.0,
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
            lr_ratio_head=1.0,
            shard_frozen=shard_frozen,
            compile=compile,
        )
        self.save_hyperparameters()
        if not 0 <= label_smoothing < 1:
            raise ModelError(f"model.label_smoothing: {label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing
        built = build_transformers_model(
            AutoModelForSeq2SeqLM, backbone, weights, backbone_args or {}, self.backbone_dtype, trains_heads=False
        )
        self.backbone: PreTrainedModel = built.model
        if not hasattr(self.backbone, "prepare_decoder_input_ids_from_labels"):
            raise ModelError(f"model.backbone: {type(self.backbone).__name__} does not say how its decoder begins.")
        self.tokenizer = load_tokenizer(backbone, built.model)
        self.position_limit = position_limit(built.model)
        self.generation = generation if isinstance(generation, Generation) else Generation(**generation)
        if self.position_limit is not None and self.generation.max_length > self.position_limit:
            raise ModelError(
                f"model.generation.max_length: {self.generation.max_length} tokens are more than the "
                f"{self.position_limit} that the backbone has positions for."
            )
        own = self.backbone.generation_config.to_dict()  # only its start, end and forced tokens count
        tokens = {key: value for key, value in own.items() if key.endswith("_token_id")}
        self.backbone.generation_config = GenerationConfig.from_dict({**tokens, **asdict(self.generation)})
        # an output layer of its own is a head only if it came without weights
        self.configure_tuning([h for h in built.heads if any(name.startswith(f"{h}.") for name in built.new)])
        self.load_given_heads()
        self.rouge = nn.ModuleDict({s: Rouge() for s in ("val", "test")})
        # a loss that is no number is not left out
        self.losses = nn.ModuleDict({s: MeanMetric(nan_strategy=math.nan) for s in ("val", "test")})
        self._samples: list[tuple[str, str, str]] = []

    # -------------------------------------------------------------------------------------------------------- training

    def forward(self, batch: SummaryBatch) -> Tensor:
        """Logits (batch, target tokens, vocabulary), float32, each behind the labels before it."""
        start: Any = self.backbone.prepare_decoder_input_ids_from_labels
        outputs = self.backbone(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=start(labels=batch["labels"]),
            use_cache=False,
        )
        logits: Tensor = outputs.logits
        return logits.float()

    def loss(self, batch: SummaryBatch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over the tokens of all targets."""
        logits = self(batch).flatten(0, 1)  # (batch · target tokens, vocabulary)
        labels = batch["labels"].flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)

    def training_step(self, batch: SummaryBatch, batch_idx: int) -> Tensor:
        """Loss of one batch, with label smoothing."""
        loss = self.loss(batch, self.label_smoothing)
        self.check_loss(loss.detach())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        self.items_in_batch = (batch["labels"] != IGNORE_INDEX).sum()
        return loss

    # ------------------------------------------------------------------------------------------------------ evaluation

    def generate(self, batch: SummaryBatch) -> list[str]:
        """Texts that beam search finds for a batch of sources."""
        search: Any = self.backbone.generate
        tokens = search(  # (batch, at most max_length)
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _evaluate(self, stage: str, batch: SummaryBatch) -> None:
        tokens = (batch["labels"] != IGNORE_INDEX).sum()
        self.losses[stage].update(self.loss(batch), weight=tokens)  # type: ignore[operator]
        summaries = self.generate(batch)
        self.rouge[stage].update(summaries, batch["reference"])  # type: ignore[operator]
        for row in (batch["index"] < SAMPLES).nonzero().flatten().tolist() if stage == "val" else ():
            source = self.tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True)
            self._samples.append((str(source), summaries[row], batch["reference"][row]))

    def _report(self, stage: str) -> None:
        rouge, loss = self.rouge[stage], self.losses[stage]
        assert isinstance(rouge, Rouge)
        assert isinstance(loss, MeanMetric)
        self.log_dict({f"{stage}/{name}": value for name, value in rouge.compute().items()}, prog_bar=True)
        self.log(f"{stage}/loss", loss.compute(), prog_bar=True)
        rouge.reset()
        loss.reset()

    def validation_step(self, batch: SummaryBatch, batch_idx: int) -> None:
        """Update `val/loss` (without label smoothing) and `val/rouge1`, `rouge2`, `rougeL` and `rougeLsum`."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and a few generated texts."""
        self._report("val")
        samples, self._samples = self._samples, []
        if self.trainer.sanity_checking or not self.trainer.is_global_zero or not samples:
            return
        lines = [f"**Generated** {s}\n\n**Reference** {r}\n\n**Source** {t[:500]}" for t, s, r in samples]
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/samples", "\n\n---\n\n".join(lines), self.global_step)

    def test_step(self, batch: SummaryBatch, batch_idx: int) -> None:
        """As in validation, under `test/`."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._report("test")

    def predict_step(self, batch: SummaryBatch, batch_idx: int) -> dict[str, list[Any]]:
        """Rows of a table: index of the source and its summary."""
        return {"index": batch["index"].tolist(), "summary": self.generate(batch)}
