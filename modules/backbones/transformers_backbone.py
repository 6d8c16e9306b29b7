"""Hugging Face backbones by hub name, local directory or GGUF file, with or without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.errors import ModelError, counted, first_line
from modules.backbones.gguf import (
    check_positions,
    check_readable,
    dequantize_arguments,
    is_gguf,
    remove_tokens_without_embedding,
    repository_and_file,
)

# `_new_poolers` checks for missing weights, so the warnings of transformers are not needed.
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Built:
    """A model for a task, on the CPU.

    Args:
        model: The model. Trained heads are in float32, other modules in the requested dtype or in float32.
        heads: Names of the modules outside the base model, and of a pooler without pretrained weights.
        new: Names of the tensors that were not loaded.
    """

    model: PreTrainedModel
    heads: list[str]
    new: set[str]


def build_transformers_model(
    auto_class: Any,
    name: str,
    weights: str,
    args: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    trains_heads: bool = True,
) -> Built:
    """Build a model for a task. Code in a repository is never run.

    Args:
        auto_class: `AutoModelForSequenceClassification` or a similar class.
        name: A name on the hub, or a directory in the hub's layout (config.json, model.safetensors, tokenizer.json).
            With `/FILE.gguf` appended, a GGUF file of the repository or directory.
        weights: `pretrained` (from the repository), `none`, or a local .safetensors file.
        args: Values of the configuration to change, such as `hidden_dropout_prob`.
        dtype: Dtype to load the weights in, so that no larger copy is in memory.
        trains_heads: If true, heads are trained, so heads are in float32. New heads are drawn in float32. If a head has
            pretrained weights, or no weights are loaded, the whole model is loaded in float32.

    Raises:
        ModelError: If the model does not exist, is quantised or does not support the task. Or if a key is not in the
            configuration, or weights are missing outside the heads.
    """
    config = _read_config(name, args)
    # AutoModelForCausalLM can load the decoder of an encoder-decoder, which was not trained to run alone.
    decoder_alone = config.is_encoder_decoder and auto_class is transformers.AutoModelForCausalLM
    if decoder_alone or type(config) not in auto_class._model_mapping:
        task = auto_class.__name__.removeprefix("AutoModelFor")
        raise ModelError(
            f"model.backbone: {name} is a {config.model_type}, which has no model for {task}. Choose another backbone."
        )
    from_config = weights == "none" or torch.empty(0).is_meta  # On the meta device there are no weights to load.
    state = None if from_config or weights == "pretrained" else _read(weights)

    def load(dtype: torch.dtype) -> tuple[Any, set[str]]:
        info: dict[str, Any] = {}
        if from_config:
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
        elif state is None:
            model, info = _from_pretrained(auto_class, name, config, dtype)
        else:
            model, info = _from_pretrained(auto_class, None, config, dtype, state_dict=state)
        return model, {*info.get("missing_keys", ()), *(key for key, *_ in info.get("mismatched_keys", ()))}

    rng_state = torch.get_rng_state()
    try:
        model, absent = load(torch.float32 if trains_heads and weights == "none" else dtype)
    except Exception as error:  # The network, the file and the constructor can raise many exceptions.
        raise ModelError(
            f"model.weights: the weights of {name} could not be loaded ({first_line(error)}). Without a connection set "
            "model.backbone to a local directory with config.json and model.safetensors."
        ) from error
    children = [(n, m) for n, m in model.named_children() if n != model.base_model_prefix]
    heads = [name for name, module in children if _has_own_parameters(model, module)]
    heads += _new_poolers(model, heads, absent, name if weights == "pretrained" else weights)
    if trains_heads and model.dtype != torch.float32:
        torch.set_rng_state(rng_state)  # The random heads must not depend on the dtype.
        if all(f"{head}.{key}" in absent for head in heads for key in model.get_submodule(head).state_dict()):
            _draw_anew(model, heads)
        else:
            model, _ = load(torch.float32)
    if weights != "pretrained" and model.can_generate() and not is_gguf(name):
        _read_generation_config(model, name)
    new = {key for key in model.state_dict() if weights == "none" or key in absent}
    return Built(model.to(torch.float32) if dtype == torch.float32 else model, heads, new)


def load_tokenizer(
    name: str, model: PreTrainedModel, pads: bool = True, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a backbone.

    Args:
        name: As for `build_transformers_model`.
        model: The backbone.
        pads: If true, the tokenizer must have a padding token.
        pad_token: Padding token from the vocabulary; None uses the tokenizer's padding token.

    Raises:
        ModelError: If there is no tokenizer or no vocabulary, the padding token is missing, or the tokenizer has more
            tokens than the model has embeddings. Also if the name of a chat template is no safe file name.
    """
    folder, file = repository_and_file(name)
    advice = "put tokenizer.json and tokenizer_config.json beside config.json"
    if is_gguf(name):
        advice = "use a directory in the hub's layout instead"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **file)
    except Exception as error:  # The network and the file can raise many exceptions.
        raise ModelError(
            f"model.backbone: {name} has no tokenizer that could be loaded ({first_line(error)}); {advice}."
        ) from error
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    # An export writes a file for each chat template, so a template's name must be a safe file name.
    if unsafe := [template for template in templates if not re.fullmatch(r"[\w.-]+", str(template))]:
        raise ModelError(
            f"model.backbone: the tokenizer of {name} has a chat template {unsafe[0]!r}, which is no safe file name; "
            f"{advice}."
        )
    if is_gguf(name):
        remove_tokens_without_embedding(tokenizer)
    # Without files, transformers invents a tokenizer that has only special tokens.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise ModelError(f"model.backbone: the tokenizer of {name} has no vocabulary; {advice}.")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"model.pad_token: {pad_token!r} is no token of {name}. Use another token, such as "
                f"{tokenizer.eos_token!r}."
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None and pads:
        raise ModelError(
            f"model.backbone: the tokenizer of {name} has no padding token, and batches need padding. Set "
            f"model.pad_token to a token of the vocabulary, such as {tokenizer.eos_token!r}, or set pad_token in "
            "tokenizer_config.json."
        )
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        raise ModelError(
            f"model.backbone: the tokenizer of {name} has {len(tokenizer)} tokens and the model only "
            f"{embeddings.num_embeddings} embeddings. Use the tokenizer of this model."
        )
    if "token_type_ids" in tokenizer.model_input_names and config_value(model.config, "type_vocab_size", 2) < 2:
        # The model has only one token type, but the tokenizer would give a second sentence type 1.
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    return tokenizer


def selected_logits(model: PreTrainedModel, selected: Tensor, **inputs: Any) -> Tensor:
    """Return the logits of selected positions only, to save memory in the output layer.

    Args:
        model: A decoder.
        selected: Mask of the positions, (batch, tokens) bool.
        inputs: Arguments of the model, including `input_ids` (batch, tokens).

    Returns:
        (selected positions, vocabulary), float32, in the order of `selected.nonzero()`.
    """

    def select(module: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (hidden[0][selected],)  # (selected positions, width)

    # With a hook, the model still applies operations after the output layer, such as Gemma's soft cap.
    output: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = output.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return logits.float()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, which recomputes each layer's activations in backward.

    Raises:
        ValueError: If the model does not support gradient checkpointing.
    """
    # Reentrant checkpointing would need gradients in the frozen embeddings, and so a backward pass of every layer.
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]


def config_value(config: PreTrainedConfig, key: str, default: Any = None) -> Any:
    """Return a value of a configuration by transformers' common name, or the default if the key is missing."""
    return getattr(config, key, default)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens that a model has positions for; None without a limit, as in T5."""
    limit: int | None = config_value(model.config.get_text_config(), "max_position_embeddings")
    if not config_value(model.config, "position_biased_input", True):  # DeBERTa-v3's positions are relative.
        limit = None
    for name, module in model.named_modules():
        # RoBERTa's positions start at the padding token's id plus 1.
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return limit if limit is not None and limit > 0 else None


def _read_config(name: str, args: dict[str, Any]) -> PreTrainedConfig:
    folder, file = repository_and_file(name)
    if is_gguf(name):
        check_readable(name)
    elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"model.backbone: the directory {name} has no config.json. Give a directory in the hub's layout."
        )
    if (Path(folder) / "adapter_config.json").is_file():  # transformers would silently apply the adapter.
        raise ModelError(
            f"model.backbone: {name} holds a PEFT adapter. Give the adapter's base model, or merge the adapter."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **file)
    except Exception as error:  # The network and the file can raise many exceptions.
        if Path(name).is_file():
            raise ModelError(
                f"model.backbone: {name} cannot be read as GGUF ({first_line(error)}). The file is damaged, or "
                "transformers does not read this architecture from GGUF. Use another file or the original model."
            ) from error
        raise ModelError(
            f"model.backbone: {name} is no intact directory here, and could not be loaded from the hub "
            f"({first_line(error)}). Without a connection give a local directory in the hub's layout."
        ) from error
    known = {*config.to_dict(), *config.attribute_map, "num_labels"}
    if unknown := [key for key in args if key not in known]:
        raise ModelError(
            f"model.backbone_args: {', '.join(unknown)} is no key of a {config.model_type}'s config.json. Choose from "
            f"{', '.join(sorted(known))}."
        )
    for key, value in args.items():
        try:
            setattr(config, key, value)
        except Exception as error:  # Configurations validate types with various exceptions.
            raise ModelError(
                f"model.backbone_args: {key} cannot be {value!r} ({first_line(error)}). Give a valid value."
            ) from error
    if config_value(config, "quantization_config") is not None:
        raise ModelError(
            f"model.backbone: the weights of {name} are quantised, and adapters need dense weights. Give the original "
            "repository or a GGUF file."
        )
    if is_gguf(name) and "rope_parameters" not in args:
        check_positions(name, config)
    return config


def _from_pretrained(
    auto_class: Any, name: str | None, config: PreTrainedConfig, dtype: torch.dtype, **kwargs: Any
) -> tuple[Any, Any]:
    folder = None
    if name is None:  # The weights are in a state dict, so the model class is enough.
        auto_class = auto_class._model_mapping[type(config)]
    else:
        folder, file = repository_and_file(name)
        kwargs |= {"trust_remote_code": False, **file}
    with dequantize_arguments(name or "") as quantization:
        return auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            weights_only=True,
            output_loading_info=True,
            # A head may have another number of classes. `_new_poolers` rejects other mismatches.
            ignore_mismatched_sizes=True,
            **kwargs,
            **quantization,
        )


def _draw_anew(model: PreTrainedModel, heads: list[str]) -> None:
    """Draw new heads again in float32, since transformers has drawn the heads in the model's dtype."""
    for name in sorted(heads, key=[n for n, _ in model.named_modules()].index):  # transformers draws in this order.
        head = model.get_submodule(name).float()
        for parameter in head.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # transformers skips initialised parameters.
        head.apply(model._init_weights)


def _read_generation_config(model: PreTrainedModel, name: str) -> None:
    """Read a repository's generation configuration, for a model whose weights are not from the repository."""
    for file in ("generation_config.json", "config.json"):  # Older repositories have the values in config.json.
        try:
            model.generation_config = GenerationConfig.from_pretrained(name, config_file_name=file)
        except (OSError, ValueError):
            continue
        return


def _has_own_parameters(model: PreTrainedModel, module: nn.Module) -> bool:
    """Return True if a module has parameters that are not tied to the base model."""
    base = {id(p) for p in model.base_model.parameters()}
    return any(id(p) not in base for p in module.parameters())


def _new_poolers(model: PreTrainedModel, heads: list[str], absent: set[str], source: str) -> list[str]:
    """Return the poolers without pretrained weights, which are trained like a head.

    Raises:
        ModelError: If weights are missing outside heads and poolers.
    """
    absent = {key for key in absent if not any(key.startswith(f"{head}.") for head in heads)}
    names = [key.split(".") for key in absent]
    poolers = sorted({".".join(parts[: parts.index("pooler") + 1]) for parts in names if "pooler" in parts})
    others = sorted(key for key in absent if not any(key.startswith(f"{pooler}.") for pooler in poolers))
    if others:
        raise ModelError(
            f"model.weights: {source} does not fit {type(model).__name__}: "
            f"{counted(len(others), 'tensor is', 'tensors are')} missing or of another shape "
            f"({', '.join(others[:3])}{', …' if len(others) > 3 else ''}). Use weights of this model."
        )
    return poolers


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file() or not path.endswith(".safetensors"):
        raise ModelError(
            f"model.weights: {path} is no .safetensors file here. Give a .safetensors file, `pretrained` or `none`."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model.weights: {path} cannot be read as safetensors ({error}). Use an intact file."
        ) from error
