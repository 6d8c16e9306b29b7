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
    """Return True if the name of a backbone is that of a GGUF file."""
    return name.endswith(".gguf")


def located(name: str) -> tuple[str, dict[str, str]]:
    """Return the directory or repository of a backbone, and the arguments of `from_pretrained` that name its file."""
    if not is_gguf(name):
        return name, {}
    parts = Path(name).parts
    split = len(parts) - 1 if Path(name).is_file() else 2  # a repository has two, and may have folders
    return str(Path(*parts[:split])), {"gguf_file": "/".join(parts[split:])}


def check_readable(name: str) -> None:
    """Check that a GGUF file can be read.

    Raises:
        ModelError: If a package or a local file is missing.
    """
    if not (is_gguf_available() and is_accelerate_available()):
        raise ModelError(f"model.backbone: {name} takes the packages gguf and accelerate; pip install gguf accelerate.")
    local = name.startswith((".", "/", "~")) or name.count("/") < 2 or Path(name).parent.is_dir()
    if local and not Path(name).is_file():
        raise ModelError(f"model.backbone: there is no file {name}; on the hub it would be OWNER/NAME/FILE.gguf.")


def check_positions(name: str, config: PreTrainedConfig) -> None:
    """Check that the configuration read from a file has the file's rotary positions: it leaves out their scaling.

    Args:
        name: The file.
        config: The configuration read from the file.

    Raises:
        ModelError: If the positions are scaled, as LLaMA's since 3.1, and the configuration does not say how.
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
    """Give the arguments of `from_pretrained` that unpack a GGUF file, and hide its progress bar; otherwise nothing."""
    if not is_gguf(name):
        yield {}
        return
    # the library's progress bar cannot be switched off
    with contextlib.redirect_stderr(io.StringIO()):
        # or where there are kernels for packed weights they stay packed, and cannot be adapted or saved
        yield {"quantization_config": GgufConfig(dequantize=True)}


def forget_invented_tokens(tokenizer: Any) -> None:
    """Remove GPT-2's end token, which the library adds to a file's vocabulary: the model has no embedding for it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(state["model"]["vocab"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
