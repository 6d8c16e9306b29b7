"""Backbones from GGUF files, llama.cpp's format. transformers dequantises the weights."""

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
    """Return True if a backbone's name is the name of a GGUF file."""
    return name.endswith(".gguf")


def repository_and_file(name: str) -> tuple[str, dict[str, str]]:
    """Return a backbone's directory or repository, and the arguments of `from_pretrained` that select its file."""
    if not is_gguf(name):
        return name, {}
    parts = Path(name).parts
    split = len(parts) - 1 if Path(name).is_file() else 2  # A repository is OWNER/NAME, and may have folders.
    return str(Path(*parts[:split])), {"gguf_file": "/".join(parts[split:])}


def check_readable(name: str) -> None:
    """Check that a GGUF file can be read.

    Raises:
        ModelError: If a package or a local file is missing.
    """
    if not (is_gguf_available() and is_accelerate_available()):
        raise ModelError(
            f"model.backbone: {name} needs the packages gguf and accelerate. Run: pip install gguf accelerate"
        )
    local = name.startswith((".", "/", "~")) or name.count("/") < 2 or Path(name).parent.is_dir()
    if local and not Path(name).is_file():
        raise ModelError(f"model.backbone: there is no file {name}. For a file on the hub use OWNER/NAME/FILE.gguf.")


def check_positions(name: str, config: PreTrainedConfig) -> None:
    """Check that a configuration from a GGUF file has the right rotary positions.

    transformers does not read the scaling of rotary positions from GGUF.

    Args:
        name: The file.
        config: The configuration read from the file.

    Raises:
        ModelError: If the file scales its rotary positions, as LLaMA since 3.1 does, and the configuration does not.
    """
    folder, file = repository_and_file(name)
    path = cached_file(folder, file["gguf_file"])
    assert path is not None
    metadata, tensors = read_gguf_metadata(path)
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    scaled = kind != "none" or any(tensor.startswith("rope_f") for tensor in tensors)  # rope_freqs, rope_factors_…
    if scaled and (config.to_dict().get("rope_parameters") or {}).get("rope_type") == "default":
        raise ModelError(
            f"model.backbone: {name} scales its rotary positions, but transformers cannot read the scaling from GGUF. "
            "Copy rope_parameters of the original model's config.json to model.backbone_args, or use that model."
        )


@contextlib.contextmanager
def dequantize_arguments(name: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `from_pretrained` that dequantise a GGUF file, and hide the progress bar.

    For other backbones, the arguments are empty.
    """
    if not is_gguf(name):
        yield {}
        return
    # transformers cannot switch this progress bar off.
    with contextlib.redirect_stderr(io.StringIO()):
        # By default, weights stay quantised if kernels are installed, and could not be adapted or saved.
        yield {"quantization_config": GgufConfig(dequantize=True)}


def remove_tokens_without_embedding(tokenizer: Any) -> None:
    """Remove tokens that transformers adds beyond the vocabulary of a GGUF file, such as GPT-2's end token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(state["model"]["vocab"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
