"""Tokenizer of an export: complete without the run."""

from __future__ import annotations

import inspect
from typing import Any, cast

from modules.base import AdaptedModule


def complete_tokenizer(module: AdaptedModule, tokenizer: Any) -> None:
    """Give a tokenizer what its own files lack: the model's inputs and length, the prompts' template, padding.

    `save_pretrained` keeps what stands in `init_kwargs`.
    """
    accepted = inspect.signature(cast(Any, module.backbone).forward).parameters
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids" or name in accepted]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    if module.position_limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, module.position_limit)
    template = module.hparams.get("prompt_template")
    if template is not None:  # what the model was trained on
        tokenizer.chat_template = template
    if module.peft_task == "CAUSAL_LM":  # a response follows the last token
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
