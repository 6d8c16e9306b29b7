"""Backbones in a GGUF file, llama.cpp's format; transformers unpacks what is quantised in it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GgufConfig, PreTrainedConfig
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

from datamodules.errors import ModelError


def is_gguf(name: str) -> bool:
    """Whether a backbone is a GGUF file."""
    return name.endswith(".gguf")


def located(name: str) -> tuple[str, dict[str, str]]:
    """Directory or repository of a backbone, and what `from_pretrained` is told of the file in it, if one is named."""
    if not is_gguf(name):
        return name, {}
    parts = Path(name).parts
    split = len(parts) - 1 if Path(name).is_file() else 2  # a repository has two, and may have folders
    return str(Path(*parts[:split])), {"gguf_file": "/".join(parts[split:])}


def check_readable(name: str) -> None:
    """See that a GGUF file is there and can be read.

    Raises:
        ModelError: If a package is missing, or a file that can only be a local one.
    """
    if not (is_gguf_available() and is_accelerate_available()):
        raise ModelError(f"model.backbone: {name} takes the packages gguf and accelerate; pip install gguf accelerate.")
    local = name.startswith((".", "/", "~")) or name.count("/") < 2 or Path(name).parent.is_dir()
    if local and not Path(name).is_file():
        raise ModelError(f"model.backbone: there is no file {name}; on the hub it would be OWNER/NAME/FILE.gguf.")


def check_positions(name: str, config: PreTrainedConfig) -> None:
    """See that a file's rotary positions are those of the configuration read from it, which leaves out their scaling.

    Args:
        name: The file.
        config: Its configuration.

    Raises:
        ModelError: If they are scaled, as LLaMA's since 3.1, and the configuration does not say how.
    """
    folder, file = located(name)
    path = cached_file(folder, file["gguf_file"])
    assert path is not None
    metadata, tensors = read_gguf_metadata(path)
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    scaled = kind != "none" or any(tensor.startswith("rope_f") for tensor in tensors)  # rope_freqs, rope_factors_…
    if scaled and (config.to_dict().get("rope_parameters") or {}).get("rope_type") == "default":
        raise ModelError(
            f"model.backbone: {name} scales its rotary positions, and transformers does not read from GGUF how; give "
            "rope_parameters of the original's config.json in model.backbone_args, or take the original."
        )


@contextlib.contextmanager
def unpacking(name: str) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` is told to unpack a GGUF file, and quiet meanwhile; nothing for another backbone."""
    if not is_gguf(name):
        yield {}
        return
    # the library's progress bar cannot be switched off
    with contextlib.redirect_stderr(io.StringIO()):
        # or where there are kernels for packed weights they stay packed, and cannot be adapted or saved
        yield {"quantization_config": GgufConfig(dequantize=True)}


def forget_invented_tokens(tokenizer: Any) -> None:
    """Take out what the library adds to a file's vocabulary unasked, GPT-2's end; the model has no embedding for it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(state["model"]["vocab"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
