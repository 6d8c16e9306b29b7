"""Tasks on tiny backbones of every family, each with a batch and with the loss of the backbone's library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertModel,
)

from datamodules.contract import IGNORE_INDEX
from datamodules.tokens.packing import PadSequences
from modules.adapters import AdapterConfig, detach
from modules.generation.beam_search import Generation
from modules.generation.decoding import Decoding
from modules.image_classification import ImageClassifier
from modules.language_modeling import LanguageModel
from modules.summarization import Summarizer
from modules.text_classification import TextClassifier
from modules.training.peft_baselines import METHODS
from tests import backbones, causal_backbones

Batch = dict[str, Any]
Reference = tuple[Tensor, Tensor]  # loss and outputs
CLASSES = ["bad", "middling", "good"]
END = 2
VIT = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}
SOURCES = ["the film was good .", "bad", "it is not a good film w1 w2 w3 w4", "w5 w6"]
TARGETS = ["good", "the film was bad .", "w7 w8 w9", "it is not bad ."]
SIZES = ((5, 4), (9, 2), (3, 7))  # numbers of tokens in prompt and response


@dataclass(frozen=True)
class Family:
    """A task on the backbones of one family.

    Args:
        task: Class of the task.
        save: Write a backbone into a folder.
        keys: Keyword arguments of the task for that folder.
        batch: Batch for a model of the task.
        outputs: Outputs of a model for a batch.
        reference: Loss and outputs of the library's model with the adapters merged into its weights.
        heads: Names of the fully trained linear layers in the task.
        without_gradient: Suffixes of the names of parameters that get no gradient in full tuning.
        tied: Number of names that share the tensor of the embeddings, or 0.
        tolerance: Largest allowed difference of outputs. Sums over a vocabulary have larger rounding errors.
    """

    task: Callable[..., Any]
    save: Callable[[Path], Any]
    keys: Callable[[Path], dict[str, Any]]
    batch: Callable[[Any], Batch]
    outputs: Callable[[Any, Batch], Tensor]
    reference: Callable[[Path, Any, Batch], Reference]
    heads: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    tied: int = 0
    tolerance: float = 1e-5

    @property
    def tunings(self) -> list[str]:
        """Return the names in `TUNINGS` that the tests of this family cover."""
        return [name for name in TUNINGS if name not in METHODS and (self.heads or name != "head")]


TUNINGS: dict[str, dict[str, Any]] = {
    "B": {"tuning": "adapter"},
    "A": {"adapter": AdapterConfig(train="A", rank=4, targets="all", init_a="zero", init_b="orthogonal")},
    "head": {"tuning": "head"},
    "full": {"tuning": "full"},
    **{method: {"tuning": method} for method in METHODS},  # PEFT's methods also have their own tests
}


class TaskFactory:
    """Build tasks by the name of their family. Each backbone is written once.

    Args:
        root: Folder of the backbones.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, family: str) -> Path:
        """Return the folder of a family's backbone."""
        folder = self.root / family
        if not folder.exists():
            folder.mkdir()
            FAMILIES[family].save(folder)
        return folder

    def __call__(self, family: str, seed: int = 0, **keys: Any) -> Any:
        """Return a task, in train mode, with adapters of rank 4 in every layer unless the keys say otherwise."""
        defaults = {"adapter": AdapterConfig(rank=4, targets="all"), "learning_rate": 0.01}
        of_family = FAMILIES[family].keys(self.folder(family))
        torch.manual_seed(seed)
        return FAMILIES[family].task(**{**defaults, **of_family, **keys})


def without_adapters(backbone: nn.Module) -> nn.Module:
    """Return a copy of a backbone with its adapters merged into the weights, and no adapted layer left."""
    plain = copy.deepcopy(backbone)
    detach(plain, merge_first=True)
    return plain


# -------------------------------------------------------------------------------------------------------------- images


def image_batch(size: int = 6, classes: int = 3, side: int = 16, seed: int = 3) -> Batch:
    """Return noise with labels in turn."""
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))
    names = [f"{i}.png" for i in range(size)]
    return {"image": images, "label": torch.arange(size) % classes, "index": torch.arange(size), "name": names}


def _images(name: str, side: int, sizes: dict[str, Any], dropout: dict[str, Any]) -> Family:
    def save(folder: Path) -> None:
        torch.manual_seed(0)
        size = {} if name.startswith("convnext") else {"img_size": side}
        model = timm.create_model(name, pretrained=False, num_classes=0, **size, **sizes)
        save_file(model.state_dict(), folder / "model.safetensors")

    def keys(folder: Path) -> dict[str, Any]:
        of_family = {"backbone": name, "weights": str(folder / "model.safetensors"), "class_names": CLASSES}
        return of_family | {"backbone_args": {**sizes, **dropout}, "image_size": side}

    def reference(folder: Path, model: Any, data: Batch) -> Reference:
        size = {} if name.startswith("convnext") else {"img_size": side}
        theirs = timm.create_model(name, num_classes=len(model.class_names), **size, **model.backbone_args).eval()
        classifier = theirs.pretrained_cfg["classifier"]
        head = {f"{classifier}.{part}": tensor for part, tensor in model.head.state_dict().items()}
        theirs.load_state_dict(without_adapters(model.backbone).state_dict() | head)
        logits = theirs(data["image"])
        return F.cross_entropy(logits, data["label"]), logits

    return Family(
        ImageClassifier,
        save,
        keys,
        batch=lambda _: image_batch(side=side),
        outputs=lambda model, data: model.logits(data),
        reference=reference,
        heads=("head",),
    )


# --------------------------------------------------------------------------------------------------------------- texts


def text_batch(model: Any) -> Batch:
    """Return pairs of unequal length, with a label of each class or a score."""
    first = ["the film was good .", "bad", "it is not a good film", "w1 w2 w3 w4 w5 w6 w7"]
    encoded = model.tokenizer(first, ["good", "it was bad .", "w9", "."], padding=True, return_tensors="pt")
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7])
    label = torch.tensor([2, 0, 1, 1]) % len(model.class_names) if model.class_names else scores
    return {**encoded, "label": label, "index": torch.arange(4)}


def save_text_backbone(folder: Path, kind: str) -> Path:
    """Write an encoder. With the usual initializer_range, outputs would hardly depend on the input at this width."""
    backbones.save_backbone(folder, kind.removesuffix("_without_pooler"), initializer_range=0.2)
    if kind == "bert_without_pooler":
        BertModel(backbones.CONFIGS["bert"], add_pooling_layer=False).save_pretrained(folder)
    return folder


def _text_reference(folder: Path, model: Any, data: Batch) -> Reference:
    outputs = max(len(model.class_names or []), 1)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    theirs.load_state_dict(without_adapters(model.backbone).state_dict())
    inputs = {name: tensor for name, tensor in data.items() if name not in ("label", "index")}
    result = theirs.eval()(**inputs, labels=data["label"])
    return result.loss, result.logits if model.class_names else result.logits.squeeze(-1)


def _texts(kind: str, *heads: str) -> Family:
    return Family(
        TextClassifier,
        lambda folder: save_text_backbone(folder, kind),
        lambda folder: {"backbone": str(folder), "class_names": CLASSES},
        batch=text_batch,
        outputs=lambda model, data: model(data),
        reference=_text_reference,
        heads=tuple(f"backbone.{head}" for head in heads),
    )


# ----------------------------------------------------------------------------------------------------------- summaries


def encode(texts: list[str]) -> Batch:
    """Return tokens and mask of texts."""
    encoded = backbones.word_tokenizer()(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def summary_batch(sources: list[str] = SOURCES, targets: list[str] = TARGETS) -> Batch:
    """Return sources and targets of unequal length."""
    encoded = encode(targets)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORE_INDEX)
    return {**encode(sources), "labels": labels, "reference": targets, "index": torch.arange(len(sources))}


def searched(model: Any, data: Batch) -> Tensor:
    """Return the tokens of the texts of `generate`, (batch, tokens), without the prompts of a decoder."""
    outputs: list[Tensor] = []
    search = model.backbone.generate

    def recorded(**keys: Any) -> Tensor:
        outputs.append(search(**keys))
        return outputs[-1]

    with patch.object(model.backbone, "generate", recorded):
        texts = model.generate(data)
    prompt = 0 if model.backbone.config.is_encoder_decoder else data["input_ids"].shape[1]
    tokens = outputs[0][:, prompt:]
    assert texts == [t.strip() for t in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return tokens


def inputs(data: Batch) -> Batch:
    """Return the part of a batch that a model of transformers takes without labels."""
    return {name: data[name] for name in ("input_ids", "attention_mask")}


def merged_summarizer(folder: Path, model: Any) -> Any:
    """Return transformers' model with a task's weights and merged adapters."""
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder)
    theirs.load_state_dict(without_adapters(model.backbone).state_dict())
    return theirs.eval()


def save_summary_backbone(folder: Path, kind: str) -> Path:
    """Write an encoder-decoder. `t5_gated` is like T5 1.1 and Flan-T5, with an untied output layer."""
    if kind != "t5_gated":
        return backbones.save_backbone(folder, kind, **({} if kind == "t5" else {"init_std": 0.3}))
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    backbones.save_backbone(folder, "t5", **gated)
    model = AutoModelForSeq2SeqLM.from_config(
        type(backbones.CONFIGS["t5"])(**{**backbones.CONFIGS["t5"].to_dict(), **gated})
    )
    # transformers unties the layer when it loads weights
    model.lm_head.weight = nn.Parameter(torch.randn(len(backbones.VOCABULARY), 32))
    model.save_pretrained(folder)
    return folder


def _summary_reference(folder: Path, model: Any, data: Batch) -> Reference:
    result = merged_summarizer(folder, model)(**inputs(data), labels=data["labels"])
    return result.loss, result.logits


def _summaries(kind: str, *without_gradient: str) -> Family:
    search = Generation(num_beams=3, max_length=14, no_repeat_ngram_size=3)
    return Family(
        Summarizer,
        lambda folder: save_summary_backbone(folder, kind),
        lambda folder: {"backbone": str(folder), "generation": search, "label_smoothing": 0.0},
        batch=lambda _: summary_batch(),
        outputs=lambda model, data: model(data),
        reference=_summary_reference,
        without_gradient=without_gradient,
        tied=3 if kind == "t5_gated" else 4,  # source, target and shared embeddings, and the output layer
        tolerance=1e-4,
    )


# ------------------------------------------------------------------------------------------------------------ decoders


def instruction_rows(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of random tokens, with labels for the tokens of the response."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, (prompt, response) in enumerate(sizes):
        size = len(causal_backbones.VOCABULARY)
        ids = torch.randint(3, size, (prompt + response,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "index": index})
    return rows


def instruction_batch(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> Batch:
    """Return prompts and responses of unequal length."""
    return dict(PadSequences(END)(instruction_rows(sizes, seed)))


def merged_decoder(folder: Path, model: Any) -> Any:
    """Return transformers' model with a task's weights and merged adapters."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.load_state_dict(without_adapters(model.backbone).state_dict())
    return theirs.eval()


def _decoder_reference(folder: Path, model: Any, data: Batch) -> Reference:
    result = merged_decoder(folder, model)(**inputs(data), labels=data["labels"])
    return result.loss, result.logits[:, :-1][data["labels"][:, 1:] != IGNORE_INDEX]


def _decoders(kind: str) -> Family:
    def keys(folder: Path) -> dict[str, Any]:
        of_family = {"backbone": str(folder), "backbone_dtype": "float32", "generation": Decoding(max_new_tokens=8)}
        return of_family | {"backbone_args": {"attention_dropout": 0.1}}

    return Family(
        LanguageModel,
        lambda folder: causal_backbones.save_decoder(folder, kind),
        keys,
        batch=lambda _: instruction_batch(),
        outputs=lambda model, data: model(data)[0],
        reference=_decoder_reference,
        tied=2 if causal_backbones.CONFIGS[kind].tie_word_embeddings else 0,
    )


FAMILIES: dict[str, Family] = {
    "vit": _images(VIT, 16, TINY, {"pos_drop_rate": 0.1}),
    "convnext": _images("convnext_tiny", 32, CONVNEXT, {"drop_path_rate": 0.4}),
    "roberta": _texts("roberta", "classifier.dense", "classifier.out_proj"),
    "bert": _texts("bert", "classifier"),
    "bert_without_pooler": _texts("bert_without_pooler", "bert.pooler.dense", "classifier"),
    "deberta": _texts("deberta", "pooler.dense", "classifier"),
    "distilbert": _texts("distilbert", "pre_classifier", "classifier"),
    "bart": _summaries("bart"),
    "t5": _summaries("t5"),
    "t5_gated": _summaries("t5_gated"),
    # sinusoidal positions are parameters without a gradient
    "pegasus": _summaries("pegasus", "embed_positions.weight"),
    **{kind: _decoders(kind) for kind in causal_backbones.CONFIGS},
}
