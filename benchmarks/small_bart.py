"""Build a small BART from MiniLM, for machines without a hub, since no small pretrained BART is available offline.

MiniLM's layers are BART's encoder layers with other names (post-norm, GELU, learned positions). The encoder is thus
pretrained and has MiniLM's output. The decoder has copies of the same embeddings, self-attention and MLPs. Its cross
attention is a copy of the self-attention, since training would long ignore a cross attention with small random weights.
The output directory is in the hub's layout.

    python -m benchmarks.small_bart --source ../shared/backbones/minilm_roberta --output DIR
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, RobertaModel


def build(source: Path, decoder_layers: int, seed: int) -> BartForConditionalGeneration:
    """Build a BART with the encoder of a RoBERTa.

    Args:
        source: Directory of a RoBERTa with one token type and a BERT tokenizer.
        decoder_layers: Number of decoder layers, copied from evenly spaced layers of the source.
        seed: Seed of the random weights.
    """
    roberta = RobertaModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    c = roberta.config
    first = c.pad_token_id + 1  # RoBERTa's first position.
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=c.vocab_size,
            d_model=c.hidden_size,
            encoder_layers=c.num_hidden_layers,
            decoder_layers=decoder_layers,
            encoder_attention_heads=c.num_attention_heads,
            decoder_attention_heads=c.num_attention_heads,
            encoder_ffn_dim=c.intermediate_size,
            decoder_ffn_dim=c.intermediate_size,
            max_position_embeddings=c.max_position_embeddings - first,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
            forced_bos_token_id=tokenizer.cls_token_id,
            forced_eos_token_id=tokenizer.sep_token_id,
        )
    )
    embeddings = roberta.embeddings
    with torch.no_grad():
        model.model.shared.weight.copy_(embeddings.word_embeddings.weight)
        for part in (model.model.encoder, model.model.decoder):
            positions = embeddings.position_embeddings.weight[first:] + embeddings.token_type_embeddings.weight[0]
            part.embed_positions.weight[2:].copy_(positions)  # BART's positions start at row 2.
            copy(embeddings.LayerNorm, part.layernorm_embedding)
        chosen = torch.linspace(0, c.num_hidden_layers - 1, decoder_layers).round().int().tolist()
        layers = list(roberta.encoder.layer)
        pairs = [*zip(layers, model.model.encoder.layers, strict=True)]
        pairs += zip([layers[i] for i in chosen], model.model.decoder.layers, strict=True)
        for source_layer, bart_layer in pairs:
            attention = source_layer.attention
            for name in ("self_attn", "encoder_attn") if hasattr(bart_layer, "encoder_attn") else ("self_attn",):
                target = getattr(bart_layer, name)
                copy(attention.self.query, target.q_proj)
                copy(attention.self.key, target.k_proj)
                copy(attention.self.value, target.v_proj)
                copy(attention.output.dense, target.out_proj)
                copy(attention.output.LayerNorm, getattr(bart_layer, f"{name}_layer_norm"))
            copy(source_layer.intermediate.dense, bart_layer.fc1)
            copy(source_layer.output.dense, bart_layer.fc2)
            copy(source_layer.output.LayerNorm, bart_layer.final_layer_norm)
    return model


def copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weight and bias."""
    target.load_state_dict(source.state_dict())


def main() -> None:
    """Build and save the model with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--decoder_layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.source, arguments.decoder_layers, arguments.seed).save_pretrained(arguments.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.source / name, arguments.output / name)


if __name__ == "__main__":
    main()
