"""Tiny decoders in the hub's layout. Their tokenizer has tokens for all bytes, so that any text can be encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
LETTERS = [f"Ġ{letter}" for letter in "ABCDE"]  # answers with one token, as in real tokenizers
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *LETTERS])}
POSITIONS = 512
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_DECODER: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "mistral": MistralConfig(**_DECODER, sliding_window=None),
    "qwen2": Qwen2Config(**_DECODER),
    # applies tanh to the logits after the output layer
    "gemma2": Gemma2Config(**_DECODER, head_dim=8, query_pre_attn_scalar=8),
}


def byte_tokenizer(chat_template: str | None = CHAT, **keys: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte and for ` A` to ` E`. The padding token is the end token."""
    tokenizer = Tokenizer(models.BPE(VOCABULARY, [("Ġ", letter) for letter in "ABCDE"], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|im_end|>"}
    tokenizer_fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **keys})
    tokenizer_fast.chat_template = chat_template
    return tokenizer_fast


def save_decoder(folder: Path, kind: str = "llama", seed: int = 0, scale: float = 0.2, **changes: Any) -> Path:
    """Save a decoder and its tokenizer in the format of transformers. Large random weights make the logits differ."""
    config = type(CONFIGS[kind])(**{**CONFIGS[kind].to_dict(), "initializer_range": scale, **changes})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
