"""A digest of all frozen weights, computed in a thread while the data are read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from modules.adapters import adapter_state

CHUNK = 1 << 26  # bytes that are copied at a time from an accelerator


class FrozenDigest:
    """Digest of a model's frozen parameters and of its buffers: every bit, by name, dtype and shape.

    XXH3 (128 bits) reads memory at its full speed and finds any accidental change; it is no protection against somebody
    who makes two files of weights with one digest. Factors do not count, and neither does anything that is trained.

    A copy of the model has the same digest, without a thread of its own.

    Args:
        model: The model; it keeps its weights as they are from here on, and may move them to another device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = _frozen_tensors(model)
        self._digest: str | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        self._digest = digest_of(self._tensors)
        self._tensors = {}  # an accelerator may hold them by now

    def hexdigest(self) -> str:
        """Return the digest, 32 hexadecimal digits, once it is there."""
        self._thread.join()
        if self._digest is None:  # the thread has ended with an error, or was of the process that forked this one
            self._compute()
        assert self._digest is not None
        return self._digest

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDigest:
        return self

    def __reduce__(self) -> Any:
        return _known_digest, (self.hexdigest(),)


def _known_digest(digest: str) -> FrozenDigest:
    known = FrozenDigest(nn.Module())
    known._thread.join()
    known._digest = digest
    return known


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    factors = adapter_state(model)
    # tied ones under all their names, as in the state
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in trained and name not in factors}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of tensors by name; of those on the meta device there is a shape alone."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            for chunk in flat.split(CHUNK):
                digest.update(chunk.cpu().numpy())
    return digest.hexdigest()
