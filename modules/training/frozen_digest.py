"""Digest of all frozen weights, computed in a thread while the data load."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from modules.adapters import adapter_state

CHUNK = 1 << 26  # Bytes per copy from an accelerator, to limit the memory on the host.


class FrozenDigest:
    """Digest of the names, dtypes, shapes and all bits of a model's frozen parameters and persistent buffers.

    XXH3 (128 bits) is as fast as memory and detects accidental changes. XXH3 does not protect against a deliberate
    collision. Factors and trained parameters are excluded.

    A copy of the model shares the digest and starts no thread.

    Args:
        model: The model. Its frozen weights must not change after this call, but may move to another device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = _frozen_tensors(model)
        self._digest: str | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        self._digest = digest_of(self._tensors)
        self._tensors = {}  # Release the host memory: the model may have moved to an accelerator.

    def hexdigest(self) -> str:
        """Wait for the thread and return the digest, 32 hexadecimal digits."""
        self._thread.join()
        if self._digest is None:  # The thread has failed, or has run in the parent of this forked process.
            self._compute()
        assert self._digest is not None
        return self._digest

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDigest:
        return self

    def __reduce__(self) -> Any:
        return _known_digest, (self.hexdigest(),)


def _known_digest(digest: str) -> FrozenDigest:
    frozen_digest = FrozenDigest(nn.Module())
    frozen_digest._thread.join()
    frozen_digest._digest = digest
    return frozen_digest


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    factors = adapter_state(model)
    # The state dict below has tied parameters under all their names.
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in trained and name not in factors}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of tensors by name. Tensors on the meta device contribute only name, dtype and shape."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            for chunk in flat.split(CHUNK):
                digest.update(chunk.cpu().numpy())
    return digest.hexdigest()
