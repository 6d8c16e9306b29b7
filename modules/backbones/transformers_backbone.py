"""Hugging Face backbones: by hub name or local directory, with their own weights, those of a file, or none."""

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

from datamodules.errors import ModelError, first_line
from modules.backbones.gguf import (
    check_positions,
    check_readable,
    forget_invented_tokens,
    is_gguf,
    located,
    unpacking,
)

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it would say of missing weights is checked below
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Built:
    """A model for a task, on the CPU.

    Args:
        model: The model; trained heads are in float32, the rest in the dtype that was asked for or in float32.
        heads: Names of its modules behind the base model, and of a pooler that came without weights.
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
    """Build a model for a task; code that a repository brings along is never run.

    Args:
        auto_class: `AutoModelForSequenceClassification` or a sibling.
        name: A name on the hub, or a directory in the hub's layout (config.json, model.safetensors, tokenizer.json);
            with `/FILE.gguf` behind it, that file of either.
        weights: `pretrained` (the repository's own), `none`, or a local .safetensors file in their place.
        args: Values of the configuration to change, such as `hidden_dropout_prob`.
        dtype: What the weights are loaded in, so that there is no wider copy of them.
        trains_heads: Whether heads are trained, and so must be exact: those without weights are drawn in float32, and
            if any came with weights, or nothing did, all is loaded in float32.

    Raises:
        ModelError: If there is no such model, it is quantised or not made for this task, a key is not its
            configuration's, or weights of anything but a head are missing.
    """
    config = _read_config(name, args)
    half = config.is_encoder_decoder and auto_class is transformers.AutoModelForCausalLM  # a decoder never used alone
    if half or type(config) not in auto_class._model_mapping:
        task = auto_class.__name__.removeprefix("AutoModelFor")
        raise ModelError(
            f"model.backbone: {name} is a {config.model_type}, which has no model for {task}; choose another backbone."
        )
    from_config = weights == "none" or torch.empty(0).is_meta  # shapes alone take no weights
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

    draws = torch.get_rng_state()
    try:
        model, absent = load(torch.float32 if trains_heads and weights == "none" else dtype)
    except Exception as error:  # whatever a network, a file or a constructor can raise
        raise ModelError(
            f"model.weights: those of {name} could not be loaded ({first_line(error)}). Without a connection "
            "--model.backbone takes a local directory with config.json and model.safetensors."
        ) from error
    heads = [child for child, m in model.named_children() if child != model.base_model_prefix and _is_own(model, m)]
    heads += _new_poolers(model, heads, absent, name if weights == "pretrained" else weights)
    if trains_heads and model.dtype != torch.float32:
        torch.set_rng_state(draws)  # heads are the same in every dtype
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
    """Return the tokenizer beside a backbone.

    Args:
        name: As for `build_transformers_model`.
        model: The backbone.
        pads: Whether its padding token is seen by the model; decoders are often without one.
        pad_token: Token of its vocabulary to pad with; None takes its own.

    Raises:
        ModelError: If there is none, it cannot pad, or it has more tokens than the model has embeddings.
    """
    folder, more = located(name)
    advice = "put tokenizer.json and tokenizer_config.json beside config.json"
    if is_gguf(name):
        advice = "take a directory in the hub's layout instead"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **more)
    except Exception as error:  # whatever a network or a file can raise
        raise ModelError(
            f"model.backbone: {name} has no tokenizer that could be loaded ({first_line(error)}); {advice}."
        ) from error
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    # names of files in an export
    if odd := [template for template in templates if not re.fullmatch(r"[\w.-]+", str(template))]:
        raise ModelError(f"model.backbone: the tokenizer of {name} names a chat template {odd[0]!r}; {advice}.")
    if is_gguf(name):
        forget_invented_tokens(tokenizer)
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:  # made up for want of files
        raise ModelError(f"model.backbone: the tokenizer of {name} has no vocabulary; {advice}.")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(f"model.pad_token: {pad_token!r} is no token of {name}. Use {tokenizer.eos_token!r}, say.")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None and pads:
        raise ModelError(
            f"model.backbone: the tokenizer of {name} has no padding token, and batches need one. Set model.pad_token "
            f"to one that its model knows, such as {tokenizer.eos_token!r}, or pad_token in tokenizer_config.json."
        )
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        raise ModelError(
            f"model.backbone: the tokenizer of {name} has {len(tokenizer)} tokens and the model only "
            f"{embeddings.num_embeddings} embeddings; they do not belong together."
        )
    if "token_type_ids" in tokenizer.model_input_names and config_value(model.config, "type_vocab_size", 2) < 2:
        # a second sentence would have a type that the model has no embedding for
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    return tokenizer


def selected_logits(model: PreTrainedModel, selected: Tensor, **inputs: Any) -> Tensor:
    """Return the logits of some positions alone: the output layer, which takes most memory, never sees the others.

    Args:
        model: A decoder.
        selected: Mask of the positions, (batch, tokens) bool.
        inputs: Arguments of the model, `input_ids` (batch, tokens) among them.

    Returns:
        (selected positions, vocabulary), float32, in the order of `selected.nonzero()`.
    """

    def select(module: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (hidden[0][selected],)  # (selected positions, width)

    # a hook keeps what the model computes behind its output layer, such as Gemma's soft cap
    output: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = output.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return logits.float()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: each layer's activations are computed again in backward rather than kept.

    Raises:
        ValueError: If the model does not support it.
    """
    # not the reentrant kind: it needs a gradient in the frozen embeddings, which would differentiate every layer
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]


def config_value(config: PreTrainedConfig, key: str, default: Any = None) -> Any:
    """Return a key of a config.json that not every architecture has, under transformers' common name for the key."""
    return getattr(config, key, default)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model has positions for; None if its positions are relative."""
    limit: int | None = config_value(model.config.get_text_config(), "max_position_embeddings")
    if not config_value(model.config, "position_biased_input", True):  # DeBERTa-v3's are relative
        limit = None
    for name, module in model.named_modules():
        # RoBERTa's positions begin behind the padding token's number
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return limit if limit is not None and limit > 0 else None


def _read_config(name: str, args: dict[str, Any]) -> PreTrainedConfig:
    folder, more = located(name)
    if is_gguf(name):
        check_readable(name)
    elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"model.backbone: the directory {name} has no config.json; it must be in the hub's layout.")
    if (Path(folder) / "adapter_config.json").is_file():  # which the library would put into the model unasked
        raise ModelError(
            f"model.backbone: {name} holds a PEFT adapter; give the model that it belongs to, or merge it."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **more)
    except Exception as error:  # whatever a network or a file can raise
        if Path(name).is_file():
            raise ModelError(
                f"model.backbone: {name} cannot be read as GGUF ({first_line(error)}): it is damaged, or of an "
                "architecture that transformers does not read from GGUF."
            ) from error
        raise ModelError(
            f"model.backbone: {name} is no directory here, or a damaged one, and from the hub it could not be had "
            f"({first_line(error)}). Without a connection give a local directory in the hub's layout."
        ) from error
    known = {*config.to_dict(), *config.attribute_map, "num_labels"}
    if unknown := [key for key in args if key not in known]:
        raise ModelError(
            f"model.backbone_args: {', '.join(unknown)} is no key of a {config.model_type}'s config.json, which has "
            f"{', '.join(sorted(known))}."
        )
    for key, value in args.items():
        try:
            setattr(config, key, value)
        except Exception as error:  # the library checks the types of its configurations
            raise ModelError(f"model.backbone_args: {key} cannot be {value!r} ({first_line(error)}).") from error
    if config_value(config, "quantization_config") is not None:
        raise ModelError(
            f"model.backbone: the weights of {name} are quantised, and adapters need them as numbers; give the "
            "repository that they were made from, or a GGUF file."
        )
    if is_gguf(name) and "rope_parameters" not in args:
        check_positions(name, config)
    return config


def _from_pretrained(
    auto_class: Any, name: str | None, config: PreTrainedConfig, dtype: torch.dtype, **more: Any
) -> tuple[Any, Any]:
    folder = None
    if name is None:  # the class that the configuration stands for
        auto_class = auto_class._model_mapping[type(config)]
    else:
        folder, file = located(name)
        more |= {"trust_remote_code": False, **file}
    with unpacking(name or "") as how:
        return auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head for another number of classes; others are refused below
            **more,
            **how,
        )


def _draw_anew(model: PreTrainedModel, heads: list[str]) -> None:
    """Draw heads that came without weights in float32, where the model drew them in its own dtype."""
    for name in sorted(heads, key=[n for n, _ in model.named_modules()].index):  # the library's order
        head = model.get_submodule(name).float()
        for parameter in head.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # by which the library spares it
        head.apply(model._init_weights)


def _read_generation_config(model: PreTrainedModel, name: str) -> None:
    """Give a model that was not loaded from its repository the special tokens of generation that lie there."""
    for file in ("generation_config.json", "config.json"):  # older repositories keep them in the latter
        try:
            model.generation_config = GenerationConfig.from_pretrained(name, config_file_name=file)
        except (OSError, ValueError):
            continue
        return


def _is_own(model: PreTrainedModel, module: nn.Module) -> bool:
    """Return True if a module has parameters that are not tied to the base model's, as an output layer may be."""
    base = {id(p) for p in model.base_model.parameters()}
    return any(id(p) not in base for p in module.parameters())


def _new_poolers(model: PreTrainedModel, heads: list[str], absent: set[str], source: str) -> list[str]:
    """Return the poolers that came without weights; they are trained like a head.

    Raises:
        ModelError: If anything else but a head is missing.
    """
    absent = {key for key in absent if not any(key.startswith(f"{head}.") for head in heads)}
    names = [key.split(".") for key in absent]
    poolers = sorted({".".join(parts[: parts.index("pooler") + 1]) for parts in names if "pooler" in parts})
    others = sorted(key for key in absent if not any(key.startswith(f"{pooler}.") for pooler in poolers))
    if others:
        raise ModelError(
            f"model.weights: {source} does not fit {type(model).__name__}: {len(others)} tensors are missing or of "
            f"another shape ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})."
        )
    return poolers


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file() or not path.endswith(".safetensors"):
        raise ModelError(f"model.weights: {path} is no .safetensors file here; give one, `pretrained` or `none`.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.weights: {path} cannot be read as safetensors ({error}).") from error
