"""Conversion of adapters to and from the content of PEFT's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import Tensor

from modules.adapters import AdapterConfig, adapter_state, attach, load_adapter_state
from modules.formats.peft import Heads
from modules.formats.peft_reading import PeftAdapter, from_peft
from modules.formats.peft_writing import to_peft
from tests.support.bare_backbones import Backbone


def exported(backbone: Backbone, config: AdapterConfig, heads: Heads) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content, tensors = to_peft(backbone.model, config, adapter_state(backbone.model), heads)
    return json.loads(json.dumps(content)), tensors


def pefts_output(backbone: Backbone, folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.reference), folder).eval()
    return backbone.run(model)


def imported(backbone: Backbone, content: Any, tensors: Any, **keys: Any) -> PeftAdapter:
    """Attach adapters from this content to a new copy of the reference model. Return the loaded adapters."""
    config = AdapterConfig(**({"init_a": "given", "init_b": "given"} | keys))
    backbone.model = copy.deepcopy(backbone.reference)
    loaded = from_peft(backbone.model, content, tensors, config, backbone.head, backbone.head)
    attach(backbone.model, loaded.config, exclude=backbone.head)
    load_adapter_state(backbone.model, loaded.factors)
    for name, tensors_of_head in loaded.heads.items():
        backbone.model.get_submodule(name).load_state_dict(tensors_of_head)
    return loaded


def read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
