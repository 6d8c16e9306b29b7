"""Tiny transformers backbones in the hub's layout: config.json, model.safetensors and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    PegasusConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

WORDS = [f"w{i}" for i in range(40)] + ["good", "bad", "a", "the", "film", "was", "it", "is", "not", "."]
VOCABULARY = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
WIDTH, DEPTH, HEADS, POSITIONS = 32, 2, 2, 64

_BERT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "pad_token_id": 1,
    "max_position_embeddings": POSITIONS,
}
_TWO_SIDES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": POSITIONS,
}
_GENERATION = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    # RoBERTa numbers positions from pad_token_id + 1
    "roberta": RobertaConfig(**{**_BERT, "max_position_embeddings": POSITIONS + 2}, bos_token_id=0, eos_token_id=2),
    "bert": BertConfig(**_BERT),
    "deberta": DebertaV2Config(
        **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0
    ),
    "distilbert": DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=WIDTH, n_layers=DEPTH, n_heads=HEADS, hidden_dim=64, pad_token_id=1
    ),
    "bart": BartConfig(**_TWO_SIDES, decoder_start_token_id=2, forced_eos_token_id=2, **_GENERATION),
    "t5": T5Config(
        vocab_size=len(VOCABULARY),
        d_model=WIDTH,
        d_kv=16,
        num_layers=DEPTH,
        num_heads=HEADS,
        d_ff=64,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=2,
    ),
}
# families without a classifier in transformers
GENERATORS: dict[str, PreTrainedConfig] = {
    "pegasus": PegasusConfig(**_TWO_SIDES, decoder_start_token_id=1, forced_eos_token_id=2, **_GENERATION),
}


def word_tokenizer(**keys: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word. A pair is `<s> first </s> </s> second </s>`."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s>:1 $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{**special, "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<unk>", **keys},
    )


def save_backbone(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """Save a backbone with random weights and its tokenizer in the format of transformers. Return the folder."""
    default = (CONFIGS | GENERATORS)[kind]
    config = type(default)(**{**default.to_dict(), **changes})
    torch.manual_seed(seed)
    auto_class = AutoModelForSeq2SeqLM if kind in ("bart", "pegasus", "t5") else AutoModel
    auto_class.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_classifier(folder: Path, kind: str, class_names: list[str], seed: int = 0, **changes: Any) -> Path:
    """Save a backbone with a head for these classes ([] for regression) and its tokenizer. Return the folder."""
    labels = dict(enumerate(class_names or ["score"]))
    keys = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}, **changes}
    config = type(CONFIGS[kind])(**{**CONFIGS[kind].to_dict(), **keys})
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
