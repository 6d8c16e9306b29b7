"""The frozen prefix of a backbone: its embeddings and the blocks below the lowest adapter.

In eval mode, the output of the prefix for a row never changes, so the output can be cached. The first batch checks that
the backbone can continue from a cached output. With and without the cache, the next block must receive identical bits,
and the outputs of the backbone must agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from datamodules.contract import HIDDEN, IGNORE_INDEX, MASK
from datamodules.errors import ModelError
from modules.adapters import Projection
from modules.adapters.roles import block_of
from modules.scaling.blocks import Stack, block_stacks

KEY = "data.cache_prefix"
TOLERANCE = 1e-3  # Relative tolerance of the outputs, since the hidden states differ at padding.
Batch = dict[str, Any]


class _Reached(Exception):
    """Raised to stop a forward pass at the end of the prefix."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class FrozenPrefix:
    """The embeddings and the blocks below the lowest adapter; without adapters, all blocks.

    Args:
        backbone: The backbone, with its adapters.
        projections: The adapted projections.
        heads: Names of the backbone's modules that are fully trained.
        embeddings: Modules before the blocks that receive the hidden states when a forward pass starts from a cached
            output.
        inputs: Keys of a batch that the hidden states replace.
        padding: Values of a padding token by key of a batch.
        identity: JSON-serialisable values that, besides the weights, determine the output of the prefix.
        outputs: Function from a batch to the output of the whole backbone.
        context: Function that returns the context of a forward pass, for the trainer's precision.

    Raises:
        ModelError: If the backbone does not have exactly one stack of blocks, an adapter is in the first block, or an
            adapter is outside the blocks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projections: Sequence[Projection],
        heads: Sequence[str],
        embeddings: Sequence[nn.Module],
        inputs: Sequence[str],
        padding: Mapping[str, int],
        identity: Mapping[str, Any],
        outputs: Callable[[Any], Tensor],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        stack = _only_stack(backbone)
        self.blocks, self.depth = stack.blocks, _depth(stack, projections)
        self.backbone, self.embeddings, self.inputs = backbone, list(embeddings), tuple(inputs)
        self._padding, self._outputs, self._context = dict(padding), outputs, context
        self._checked = False
        above = tuple(f"{stack.name}.{i}." for i in range(self.depth, len(self.blocks)))
        skipped = (*above, *(f"{head}." for head in heads))
        self.key = _digest(backbone, skipped, {**identity, "depth": self.depth})

    def __str__(self) -> str:
        return f"{self.depth} of {len(self.blocks)} blocks"

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Return the output of the prefix (batch, tokens, width) in eval mode, in the dtype of the next block's input.

        Raises:
            ModelError: If the backbone cannot continue from the output.
        """
        with evaluating(self.backbone), self._context():
            hidden = self._run(batch)
            if not self._checked:
                self._check(self._padded(batch))
                self._checked = True
        return hidden

    def _run(self, batch: Batch) -> Tensor:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        hook = self.blocks[self.depth - 1].register_forward_hook(stop)
        try:
            self._outputs(batch)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise ModelError(f"{KEY}: the backbone does not call its blocks in order. Set the key to false.")

    def _padded(self, batch: Batch) -> Batch:
        """Return the batch with its last token replaced by padding.

        An appended token could exceed the backbone's positions.
        """
        if MASK not in batch or batch[MASK].shape[1] == 1:
            return batch
        padded = dict(batch)
        for key in self._padding.keys() & batch.keys():
            padded[key] = batch[key].clone()
            padded[key][:, -1] = self._padding[key]
        return padded

    def _check(self, batch: Batch) -> None:
        """Check that continuing from the hidden states, zeroed at padding, gives the output of the backbone."""
        full, reason = self._watch(batch), None
        mask = batch[MASK].bool() if MASK in batch else full.hidden.new_ones(full.hidden.shape[:2], dtype=torch.bool)
        rest = {key: value for key, value in batch.items() if key not in self.inputs}
        try:
            resumed = self._watch({**rest, HIDDEN: full.hidden * mask[..., None].to(full.hidden.dtype)})
            agrees = self.depth == len(self.blocks) or torch.equal(full.received[mask], resumed.received[mask])
            agrees = agrees and bool((full.outputs - resumed.outputs).norm() <= TOLERANCE * full.outputs.norm())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # A backbone with another interface may raise any exception.
            agrees, reason = False, error
        if not agrees:
            raise ModelError(
                f"{KEY}: {type(self.backbone).__name__} cannot continue from the output of one of its blocks. Set the "
                "key to false."
            ) from reason

    def _watch(self, batch: Batch) -> SimpleNamespace:
        """Record a forward pass: `hidden` of the prefix, the input `received` by the next block, and `outputs`."""
        recorded = SimpleNamespace()

        def record_output(module: nn.Module, args: Any, output: Any) -> None:
            recorded.hidden = output[0] if isinstance(output, tuple) else output

        def record_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            recorded.received = args[0] if args else kwargs.get("hidden_states")

        hooks = [self.blocks[self.depth - 1].register_forward_hook(record_output)]
        hooks += [b.register_forward_pre_hook(record_input, with_kwargs=True) for b in self.blocks[self.depth :][:1]]
        try:
            recorded.outputs = self._outputs(batch).float()
        finally:
            for hook in hooks:
                hook.remove()
        return recorded

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Make the prefix return its input unchanged, within the context."""
        modules = [*self.embeddings, *self.blocks[: self.depth]]
        for module in modules:
            module.forward = _return_input
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _return_input(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["inputs_embeds"]


def transformers_prefix(
    backbone: Any,
    projections: Sequence[Projection],
    heads: Sequence[str],
    trainer: L.Trainer,
    outputs: Callable[[Any], Tensor],
) -> FrozenPrefix:
    """Return the frozen prefix of a backbone of transformers.

    Args:
        backbone: The backbone, with its adapters.
        projections: The adapted projections.
        heads: Names of the backbone's modules that are fully trained.
        trainer: The trainer, which has the precision.
        outputs: Function from a batch to the output of the whole backbone.
    """
    irrelevant = {"id2label", "label2id", "_name_or_path", "architectures", "dtype", "transformers_version"}
    parts = dict(backbone.base_model.named_children())
    return FrozenPrefix(
        backbone,
        projections,
        heads,
        # The embeddings of an encoder add positions and a norm to `inputs_embeds`, so the prefix must skip them.
        embeddings=[parts["embeddings"]] if "embeddings" in parts else [],
        inputs=("input_ids", "token_type_ids"),
        padding={"input_ids": backbone.config.pad_token_id or 0, "token_type_ids": 0, MASK: 0, "labels": IGNORE_INDEX},
        identity={
            "config": {key: value for key, value in backbone.config.to_dict().items() if key not in irrelevant},
            "precision": trainer.precision,
        },
        outputs=outputs,
        context=trainer.precision_plugin.forward_context,
    )


@contextmanager
def backbone_inputs(prefix: FrozenPrefix | None, arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the arguments of a backbone of transformers; the prefix is skipped if there are hidden states."""
    if HIDDEN not in arguments:
        yield arguments
        return
    assert prefix is not None
    with prefix.skipped():
        yield {"inputs_embeds" if key == HIDDEN else key: value for key, value in arguments.items()}


def _only_stack(backbone: nn.Module) -> Stack:
    stacks = block_stacks(backbone)
    if len(stacks) != 1:
        names = ", ".join(stack.name for stack in stacks) or "none"
        raise ModelError(
            f"{KEY}: true needs a backbone with one stack of blocks, and {type(backbone).__name__} has {names}. Set "
            "the key to false."
        )
    return stacks[0]


def _depth(stack: Stack, projections: Sequence[Projection]) -> int:
    """Return the number of blocks below the lowest adapter."""
    lowest, name = len(stack.blocks), ""
    for projection in projections:
        block = block_of(projection.layer)
        if block is None or block[0] != stack.name:
            raise ModelError(
                f"{KEY}: the adapted projection {projection.name} is in no block of {stack.name}. Choose other "
                "model.adapter.targets."
            )
        lowest, name = min((lowest, name), (block[1], projection.name))
    if lowest == 0:
        raise ModelError(
            f"{KEY}: nothing would be cached, since there is an adapter in the first block ({name}). Adapt only the "
            f"last blocks with model.adapter.layers: {len(stack.blocks) - 1} or less."
        )
    return lowest


def _digest(backbone: nn.Module, skipped: tuple[str, ...], identity: Mapping[str, Any]) -> str:
    """Return a hash of every byte of the weights that are not skipped, of `identity`, and of library versions."""
    libraries = {name: version(name) for name in ("torch", "timm", "transformers")}
    digest = hashlib.sha256(json.dumps({**identity, **libraries}, sort_keys=True, default=str).encode())
    for name, tensor in backbone.state_dict().items():
        if not name.startswith(skipped):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode within the context; restore the mode of every submodule on exit."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
