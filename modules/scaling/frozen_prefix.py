"""The frozen prefix of a backbone: its embeddings and the blocks below the lowest adapter.

In eval mode the prefix computes the same output for a row each time, so that the output can be kept. Whether a backbone
can go on from that output is checked: for the first batch, with padding, the next block must receive the same bits both
ways, and both ways must end in the same output.
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
TOLERANCE = 1e-3  # of outputs, relative: the last blocks get the same hidden states except at padding
Batch = dict[str, Any]


class _Reached(Exception):
    """The forward pass has reached the end of the prefix."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class FrozenPrefix:
    """The blocks below the lowest adapter and the embeddings before them; with no adapter, all blocks.

    Args:
        backbone: The backbone, with its adapters.
        projections: The adapted projections.
        heads: Names of the backbone's modules that are trained whole.
        embeddings: Modules before the blocks that are called with the hidden states when a forward pass goes on from
            there.
        inputs: Keys of a batch that the hidden states take the place of.
        padding: Values at a token of padding, by key of a batch.
        identity: Facts besides the weights that decide what the prefix computes; JSON can hold them.
        outputs: Returns the output of the whole backbone for a batch.
        context: Gives the context of forward passes, that of the trainer's precision.

    Raises:
        ModelError: If the backbone has several stacks of blocks, an adapter in the first block, or adapters outside.
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
        """Return the output (batch, tokens, width) for a batch, in eval mode and in the dtype that the next block gets.

        Raises:
            ModelError: If the backbone cannot go on from that output.
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
        raise ModelError(f"{KEY}: the backbone does not call its blocks in order; set it to false.")

    def _padded(self, batch: Batch) -> Batch:
        """Return the batch with its last token as padding: another token could be beyond the backbone's positions."""
        if MASK not in batch or batch[MASK].shape[1] == 1:
            return batch
        padded = dict(batch)
        for key in self._padding.keys() & batch.keys():
            padded[key] = batch[key].clone()
            padded[key][:, -1] = self._padding[key]
        return padded

    def _check(self, batch: Batch) -> None:
        """Check that going on from the hidden states, without those of padding, gives the output of the backbone."""
        whole, reason = self._watch(batch), None
        mask = batch[MASK].bool() if MASK in batch else whole.hidden.new_ones(whole.hidden.shape[:2], dtype=torch.bool)
        rest = {key: value for key, value in batch.items() if key not in self.inputs}
        try:
            other = self._watch({**rest, HIDDEN: whole.hidden * mask[..., None].to(whole.hidden.dtype)})
            same = self.depth == len(self.blocks) or torch.equal(whole.received[mask], other.received[mask])
            same = same and bool((whole.outputs - other.outputs).norm() <= TOLERANCE * whole.outputs.norm())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a backbone with another interface may raise anything
            same, reason = False, error
        if not same:
            raise ModelError(
                f"{KEY}: {type(self.backbone).__name__} cannot go on from the output of one of its blocks; set it to "
                "false."
            ) from reason

    def _watch(self, batch: Batch) -> SimpleNamespace:
        """Return for a batch the `outputs`, the `hidden` of the prefix, and what the next block `received`."""
        seen = SimpleNamespace()

        def gives(module: nn.Module, args: Any, output: Any) -> None:
            seen.hidden = output[0] if isinstance(output, tuple) else output

        def receives(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.received = args[0] if args else kwargs.get("hidden_states")

        hooks = [self.blocks[self.depth - 1].register_forward_hook(gives)]
        hooks += [b.register_forward_pre_hook(receives, with_kwargs=True) for b in self.blocks[self.depth :][:1]]
        try:
            seen.outputs = self._outputs(batch).float()
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Make the prefix hand on the hidden states that it is given, within the context."""
        modules = [*self.embeddings, *self.blocks[: self.depth]]
        for module in modules:
            module.forward = _hand_on
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _hand_on(*args: Any, **kwargs: Any) -> Any:
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
        heads: Names of its modules that are trained whole.
        trainer: Knows the precision.
        outputs: Returns the output of the whole backbone for a batch.
    """
    names = {"id2label", "label2id", "_name_or_path", "architectures", "dtype", "transformers_version"}
    parts = dict(backbone.base_model.named_children())
    return FrozenPrefix(
        backbone,
        projections,
        heads,
        embeddings=[parts["embeddings"]] if "embeddings" in parts else [],  # an encoder's, with positions and a norm
        inputs=("input_ids", "token_type_ids"),
        padding={"input_ids": backbone.config.pad_token_id or 0, "token_type_ids": 0, MASK: 0, "labels": IGNORE_INDEX},
        identity={
            "config": {key: value for key, value in backbone.config.to_dict().items() if key not in names},
            "precision": trainer.precision,
        },
        outputs=outputs,
        context=trainer.precision_plugin.forward_context,
    )


@contextmanager
def backbone_inputs(prefix: FrozenPrefix | None, given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give the arguments of a backbone of transformers; hidden states among them enter behind the prefix."""
    if HIDDEN not in given:
        yield given
        return
    assert prefix is not None
    with prefix.skipped():
        yield {"inputs_embeds" if key == HIDDEN else key: value for key, value in given.items()}


def _only_stack(backbone: nn.Module) -> Stack:
    stacks = block_stacks(backbone)
    if len(stacks) != 1:
        names = ", ".join(stack.name for stack in stacks) or "none"
        raise ModelError(
            f"{KEY}: is for backbones with one stack of blocks, and {type(backbone).__name__} has {names}; set it to "
            "false."
        )
    return stacks[0]


def _depth(stack: Stack, projections: Sequence[Projection]) -> int:
    """Return the number of blocks below the lowest adapter."""
    lowest, name = len(stack.blocks), ""
    for projection in projections:
        block = block_of(projection.layer)
        if block is None or block[0] != stack.name:
            raise ModelError(
                f"{KEY}: {projection.name}, which is adapted, lies in no block of {stack.name}; choose other "
                "model.adapter.targets."
            )
        lowest, name = min((lowest, name), (block[1], projection.name))
    if lowest == 0:
        raise ModelError(
            f"{KEY}: nothing would be cached, since there is an adapter in the first block ({name}). Adapt the last "
            f"blocks alone with model.adapter.layers, which can be up to {len(stack.blocks) - 1} here."
        )
    return lowest


def _digest(backbone: nn.Module, skipped: tuple[str, ...], identity: Mapping[str, Any]) -> str:
    """Return a hash of the weights that are not skipped, to the last byte, and of the facts besides them."""
    libraries = {name: version(name) for name in ("torch", "timm", "transformers")}
    digest = hashlib.sha256(json.dumps({**identity, **libraries}, sort_keys=True, default=str).encode())
    for name, tensor in backbone.state_dict().items():
        if not name.startswith(skipped):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode; at the end every part has the mode it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
