"""Instruction tuning and multiple choice with decoders that `AutoModelForCausalLM` loads, such as LLaMA."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from datamodules.contract import HIDDEN, IGNORE_INDEX, DataKind, HasPacking, HasPrompts, InstructionBatch, QuestionBatch
from datamodules.errors import ModelError
from modules.adapters import AdapterConfig
from modules.backbones.transformers_backbone import (
    build_transformers_model,
    checkpoint_activations,
    config_value,
    load_tokenizer,
    position_limit,
    selected_logits,
)
from modules.base import STAGES, AdaptedModule, BackboneDtype, HeadlessTuning, Stage
from modules.generation.choices import PrefixCache, choice_log_probabilities
from modules.generation.decoding import Decoding
from modules.metrics.multiple_choice import MultipleChoiceAccuracy
from modules.scaling.frozen_prefix import FrozenPrefix, backbone_inputs, evaluating, transformers_prefix


class LanguageModel(AdaptedModule):
    """A pretrained decoder, trained on responses to prompts and evaluated by loss or on multiple choice.

    Batches are `datamodules.contract.InstructionBatch` or, for multiple choice, `QuestionBatch`.

    Args:
        backbone: A name on the hub, such as `meta-llama/Llama-2-7b-hf`, a directory in the hub's layout, or a GGUF file
            (`DIRECTORY/model.gguf`, or `owner/name/model.gguf` on the hub).
        gradient_checkpointing: If true, recompute each layer's activations in backward instead of storing them. A step
            then needs one more forward pass, and memory for one layer instead of all layers.
        generation: Decoding of responses in prediction.
        prompt_template: Jinja template of the training prompts. None takes the template from the data. A checkpoint
            contains the template.
        response_end: Token id that ends a response in the template; None takes the id from the data.
        backbone_dtype: Dtype of the frozen weights; see `AdaptedModule`.
        tuning: `adapter`, `full`, `adalora` or `ia3`; see `AdaptedModule`. The task has no new head.
        adapter: Configuration of the adapters.
        weight_decay: Weight decay; see `AdaptedModule`.
        warmup_ratio: Share of the steps that warm up; see `AdaptedModule`.
    """

    kinds = (DataKind.INSTRUCTIONS, DataKind.QUESTIONS)
    peft_task = "CAUSAL_LM"

    def __init__(
        self,
        backbone: str = "meta-llama/Llama-2-7b-hf",
        *,
        gradient_checkpointing: bool = False,
        generation: Decoding = Decoding(),  # noqa: B008 - immutable, as is AdapterConfig; the CLI reads both defaults
        prompt_template: str | None = None,
        response_end: int | None = None,
        backbone_dtype: BackboneDtype = "bfloat16",
        tuning: HeadlessTuning = "adapter",
        adapter: AdapterConfig = AdapterConfig(rank=32, alpha=64.0),  # noqa: B008
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone_dtype=backbone_dtype,
            tuning=tuning,
            adapter=adapter,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            **kwargs,
        )
        built = build_transformers_model(
            AutoModelForCausalLM, backbone, self.weights, self.backbone_args, self.backbone_dtype, trains_heads=False
        )
        config = built.model.config
        if type(config) in AutoModelForMaskedLM._model_mapping and not config_value(config, "is_decoder"):
            raise ModelError(
                f"model.backbone: {backbone} is a {config.model_type}, an encoder whose tokens attend to later tokens. "
                "Choose a decoder."
            )
        if built.new and self.weights != "none":
            raise ModelError(
                f"model.weights: {backbone} has no weights of {', '.join(sorted(built.new)[:3])}. Choose other weights."
            )
        self.backbone: PreTrainedModel = built.model
        self.tokenizer = load_tokenizer(backbone, built.model, pads=False)
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"model.backbone: the tokenizer of {backbone} has no end-of-text token, so a response would never end. "
                "Set eos_token in tokenizer_config.json."
            )
        if self.tokenizer.pad_token_id is None:  # Any token will do, since loss and attention ignore the padding.
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.position_limit = position_limit(built.model)
        self.generation = generation if isinstance(generation, Decoding) else Decoding(**generation)
        if self.position_limit is not None and self.generation.max_new_tokens >= self.position_limit:
            raise ModelError(
                f"model.generation.max_new_tokens: {self.generation.max_new_tokens} leaves no room for a prompt in the "
                f"{self.position_limit} positions of the backbone. Use a smaller value."
            )
        self._pretrained_generation = self.backbone.generation_config
        self.configure_generation()
        if gradient_checkpointing:
            self._enable_gradient_checkpointing()
        self.configure_tuning()
        self.configure_metrics(MetricCollection({"token_acc": MeanMetric()}))
        self.choices = nn.ModuleDict({stage: MultipleChoiceAccuracy() for stage in STAGES})
        self.prefix_cache = PrefixCache()

    def configure_generation(self) -> None:
        """Set the backbone's generation configuration from the keys of `generation`."""
        ends = {self.tokenizer.eos_token_id, self.hparams["response_end"]} - {None}
        padding = self.tokenizer.pad_token_id
        self.backbone.generation_config = self.generation.config(self._pretrained_generation, ends, padding)

    def _enable_gradient_checkpointing(self) -> None:
        try:
            checkpoint_activations(self.backbone)
        except ValueError as error:
            raise ModelError(
                f"model.gradient_checkpointing: {type(self.backbone).__name__} does not support recomputation. Set the "
                "key to false."
            ) from error

    def setup(self, stage: str) -> None:
        """Set the prompt template from the data, and check that packed sequences do not attend to each other.

        Raises:
            ModelError: If the checkpoint was trained with another template, or packed sequences attend to each other.
        """
        super().setup(stage)
        data = self.data
        if isinstance(data, HasPrompts):
            template = data.prompt_template
            if self.take_from_data("prompt_template", template) != template:
                raise ModelError(
                    "data.template: the checkpoint was trained with another prompt template. Set data.template as in "
                    "the checkpoint's run. With data.template chat, use the same tokenizer too."
                )
            self.take_from_data("response_end", data.response_end)
            self.configure_generation()
        if stage == "fit" and isinstance(data, HasPacking) and data.packing:
            self.check_packing()

    # -------------------------------------------------------------------------------------------------------- training

    def forward(self, batch: InstructionBatch) -> tuple[Tensor, Tensor]:
        """Return the logits that predict the response tokens, and the response tokens.

        Returns:
            Logits (response tokens, vocabulary) float32, and tokens (response tokens,) int64.
        """
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (batch, tokens): the next tokens
        selected = targets != IGNORE_INDEX
        arguments: dict[str, Any] = {
            key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", HIDDEN) if key in batch
        }
        with backbone_inputs(self.prefix, arguments) as inputs:
            return selected_logits(self.backbone, selected, **inputs, use_cache=False), targets[selected]

    def build_prefix(self) -> FrozenPrefix:
        """Return the embeddings and the blocks below the lowest adapter."""
        return transformers_prefix(self.backbone, self.projections, (), self.trainer, lambda batch: self(batch)[0])

    def loss(self, batch: InstructionBatch) -> Tensor:
        """Return the mean cross-entropy over all response tokens."""
        return F.cross_entropy(*self(batch))

    def items(self, batch: InstructionBatch) -> Tensor:
        """Return the number of response tokens."""
        return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    @torch.no_grad()
    def check_packing(self) -> None:
        """Check that the backbone separates packed sequences by `position_ids`.

        Raises:
            ModelError: If the logits of a packed sequence depend on the previous sequence.
        """
        vocabulary = self.backbone.config.get_text_config().vocab_size
        ids = torch.arange(12, device=self.backbone.device).remainder(vocabulary).repeat(2, 1)
        ids[1, :5] += 1  # The rows differ only in the first of two packed sequences.
        positions = torch.tensor([*range(5), *range(7)], device=ids.device).repeat(2, 1)
        try:
            with evaluating(self.backbone):
                logits = self.backbone(input_ids=ids, position_ids=positions, use_cache=False).logits
            first, second = logits[:, 5:].float()
        except TypeError:  # The model does not accept `position_ids`.
            first, second = torch.zeros(1), torch.ones(1)
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-4):
            raise ModelError(
                f"data.packing: {type(self.backbone).__name__} does not keep packed sequences apart. Set the key to "
                "false."
            )

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, stage: Stage, batch: InstructionBatch | QuestionBatch, dataloader_idx: int) -> None:
        """Update loss and token accuracy or, for multiple choice, the accuracy of the answers."""
        if "choices" in batch:
            scores = choice_log_probabilities(self.backbone, batch, self.prefix_cache)
            cast(MultipleChoiceAccuracy, self.choices[stage]).update(scores, batch["answers"], batch["subject"])
            return
        logits, targets = self(batch)
        self.update_loss(stage, F.cross_entropy(logits, targets), len(targets))
        self.update_metrics(stage, (logits.argmax(-1) == targets).float())

    def scores(self, stage: Stage) -> dict[str, Tensor]:
        """Return `<stage>/loss` per response token, its exponential `perplexity`, and `token_acc`.

        For multiple choice, return `<stage>/acc` and the other accuracies of `MultipleChoiceAccuracy`.
        """
        choices = cast(MultipleChoiceAccuracy, self.choices[stage])
        if choices.update_called:
            values = {f"{stage}/{name}": value for name, value in choices.compute().items()}
            choices.reset()
            self.prefix_cache = PrefixCache()
            return values
        values = super().scores(stage)
        return values | {f"{stage}/perplexity": values[f"{stage}/loss"].exp()}

    def generate(self, batch: InstructionBatch) -> list[str]:
        """Return responses to a batch of left-padded prompts.

        Raises:
            ModelError: If the longest prompt and its response exceed the backbone's positions.
        """
        length, limit = batch["input_ids"].shape[1], self.generation.max_new_tokens
        if self.position_limit is not None and length + limit > self.position_limit:
            raise ModelError(
                f"data.max_length: a prompt of {length} tokens and a response of model.generation.max_new_tokens "
                f"{limit} are more than the {self.position_limit} positions of the backbone. Lower one of the keys."
            )
        search: Any = self.backbone.generate
        tokens = search(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        responses = tokens[:, length:]  # (batch, at most max_new_tokens)
        texts: list[str] = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def predict_step(self, batch: InstructionBatch | QuestionBatch, batch_idx: int) -> dict[str, list[Any]]:
        """Return table rows: index and response, or for multiple choice the log-probability of each letter."""
        if "choices" in batch:
            scores = choice_log_probabilities(self.backbone, batch, self.prefix_cache)
            return {"index": batch["index"].tolist(), "log_probabilities": scores.tolist()}
        return {"index": batch["index"].tolist(), "response": self.generate(batch)}
