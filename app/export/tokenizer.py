"""Complete the tokenizer of an export, so that its users need no run directory."""

from __future__ import annotations

import inspect
from typing import Any, cast

from modules.base import AdaptedModule


def complete_tokenizer(module: AdaptedModule, tokenizer: Any) -> None:
    """Set the settings that a tokenizer's own files lack: input names, maximum length, prompt template, padding side.

    `save_pretrained` writes the values of `init_kwargs`.
    """
    accepted = inspect.signature(cast(Any, module.backbone).forward).parameters
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids" or name in accepted]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    if module.position_limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, module.position_limit)
    template = module.hparams.get("prompt_template")
    if template is not None:  # the model was trained with this template
        tokenizer.chat_template = template
    if module.peft_task == "CAUSAL_LM":  # no padding between the prompt and its response
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
