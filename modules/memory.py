"""How much memory a decoder takes, to tune and to ask, found by running one step that computes nothing.

The step is the real one, of the real model under its adapters, on fake tensors: these have a shape, a dtype and a place
in autograd's graph, but no numbers. So whatever autograd keeps is counted, for every architecture, and a model of 7
billion weights takes seconds and no memory. `docs/results/memory.json` has measured runs beside it.

Not counted is what PyTorch does not allocate as a tensor: the CUDA context, workspaces of kernels,
buffers of communication, and what an allocator loses between its blocks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from datamodules.errors import ModelError
from modules.adapters import AdapterConfig, adapted_layers, adapter_state, attach
from modules.base import BackboneDtype
from modules.multiple_choice import PrefixCache
from modules.sharding import sharded_stacks
from modules.transformers_backbone import checkpoint_activations, selected_logits

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process in the fullest moment of a training step, by what they are for.

    Args:
        weights: Frozen weights and buffers, or this process' share of them.
        gathered: Frozen weights of other processes' shares that are here while they are used.
        factors: Both factors of all adapters, the frozen one too.
        gradients: Of the trained factors.
        optimizer: AdamW's two moments.
        activations: What backward needs of each layer, and what is on the way.
        logits: What has an entry for each token of the vocabulary: logits, log-probabilities and their gradients. 0 if
            the fullest moment is elsewhere: under gradient checkpointing it may be in a layer.
    """

    weights: int
    gathered: int
    factors: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}
        return "\n".join(f"{name:<12}{size / GIB:9.3f} GiB" for name, size in parts.items())


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are alive, real or fake, and keeps the parts of the fullest moment.

    Args:
        kind: What a new tensor is for.
    """

    def __init__(self, kind: Callable[[Tensor], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kind = kind
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that were made before, unless they share the memory of one that is counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive:
                continue

            def released(_: weakref.ref[torch.UntypedStorage], key: int = key, size: int = size) -> None:
                self.now[kind] -= size
                del self._alive[key]

            self._alive[key] = weakref.ref(storage, released)  # lives as long as autograd or anybody holds the memory
            self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it has made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.hold([tensor], self._kind(tensor))
        return made


def training_memory(
    config: PreTrainedConfig,
    adapter: AdapterConfig,
    *,
    batch_size: int,
    tokens: int,
    response_tokens: int | None = None,
    backbone_dtype: BackboneDtype = "bfloat16",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    gradient_checkpointing: bool = False,
    shard_frozen: int = 1,
) -> MemoryEstimate:
    """Bytes that a step of training a decoder's adapters takes, by part.

    Gradients and moments are there throughout, as they are in every step but the first. Attention is given a mask, as
    for padded batches; the kernels that a GPU has keep what those that are run here keep: queries, keys, values, the
    result and a number a row.

    Args:
        config: The backbone's; `LlamaConfig()` is LLaMA-2-7B.
        adapter: The adapters.
        batch_size: Sequences a process and step (not accumulated ones).
        tokens: Length of a sequence, padding included.
        response_tokens: Positions of a sequence that are learnt, to which alone the output layer is applied; all if
            None.
        backbone_dtype: Of the frozen weights; the factors are float32.
        precision: Lightning's.
        gradient_checkpointing: Whether activations within a layer are computed again in backward.
        shard_frozen: Processes over which the layers' frozen weights are divided (`modules.sharding`); what is in
            no layer, and the factors, are on all of them. Two layers at a time are gathered, the one that is used and
            the next.

    Raises:
        ModelError: If a number is out of range, the configuration is no decoder's, or its layers cannot be divided.
    """
    positions = tokens if response_tokens is None else response_tokens
    if min(batch_size, shard_frozen) < 1 or not 1 <= positions <= tokens:
        raise ModelError(
            f"Memory of {batch_size} sequences, {positions} of {tokens} tokens learnt, {shard_frozen} processes: all "
            "must be 1 or more, and of the tokens no more are learnt than there are."
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"Memory of a {config.model_type}: transformers has no decoder of this kind.")
    with FakeTensorMode():
        dtype = getattr(torch, backbone_dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        attach(model, adapter)
        model.train()
        if gradient_checkpointing:
            checkpoint_activations(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments

        logits = (batch_size * positions, config.get_text_config().vocab_size)
        live = LiveBytes(lambda made: "logits" if made.shape == logits else "activations")
        live.hold(adapter_state(model).values(), "factors")
        live.hold([*model.parameters(), *model.buffers()], "weights")
        live.hold([p.grad for p in trained if p.grad is not None], "gradients")
        live.hold(tree_leaves([list(s.values()) for s in optimizer.state.values()]), "optimizer")
        with live:
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
                loss = _loss(model, batch_size, tokens, positions)
            loss.backward()
            optimizer.step()
    parts = {field.name: live.peak[field.name] for field in fields(MemoryEstimate)}
    if shard_frozen > 1:
        parts |= _sharded(model, shard_frozen)
    return MemoryEstimate(**parts)


def scoring_memory(
    config: PreTrainedConfig, *, batch_size: int, prefix: int, tokens: int, backbone_dtype: BackboneDtype = "bfloat16"
) -> MemoryEstimate:
    """Bytes that scoring multiple choice takes (`modules.multiple_choice`); adapters, a hundredth of it, do not count.

    Args:
        config: The backbone's.
        batch_size: Questions at a time.
        prefix: Tokens that all prompts begin with, 1 or more.
        tokens: Those of the longest question behind them.
        backbone_dtype: Of the weights.

    Raises:
        ModelError: If a number is out of range, or the backbone's keys and values cannot be shared.
    """
    if min(batch_size, prefix, tokens) < 1:
        raise ModelError(f"Memory of {batch_size} questions of {prefix} + {tokens} tokens: all must be 1 or more.")
    vocabulary = config.get_text_config().vocab_size
    with FakeTensorMode(), torch.no_grad():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, backbone_dtype))  # type: ignore[no-untyped-call]
        live = LiveBytes(lambda made: "logits" if made.shape == (batch_size, vocabulary) else "activations")
        live.hold([*model.parameters(), *model.buffers()], "weights")
        with live:
            keys = PrefixCache().keys_of(model.eval(), torch.zeros(prefix, dtype=torch.long))  # type: ignore[no-untyped-call]
            if keys is None:
                raise ModelError(f"Memory of a {config.model_type}: its keys and values cannot be shared.")
            selected_logits(
                model,
                cast(Tensor, (torch.arange(batch_size), torch.full((batch_size,), tokens - 1))),
                input_ids=torch.zeros(batch_size, tokens, dtype=torch.long),
                attention_mask=torch.ones(batch_size, prefix + tokens, dtype=torch.long),
                position_ids=(prefix + torch.arange(tokens)).expand(batch_size, -1),
                past_key_values=keys,
            ).log_softmax(-1)
    return MemoryEstimate(**{field.name: live.peak[field.name] for field in fields(MemoryEstimate)})


def _loss(model: PreTrainedModel, batch_size: int, tokens: int, positions: int) -> Tensor:
    """The loss of `modules.language_modeling.LanguageModel` over the last positions of each sequence."""
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    rows = torch.arange(batch_size).repeat_interleave(positions)
    columns = torch.arange(tokens - positions, tokens).repeat(batch_size)
    # numbers of the positions in place of a mask, which on fake tensors has no values to count
    selected = cast(Tensor, (rows, columns))
    logits = selected_logits(model, selected, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return F.cross_entropy(logits, ids[selected])


def _sharded(model: PreTrainedModel, processes: int) -> dict[str, int]:
    """Bytes of frozen weights when each process keeps a share of every block, and of those gathered from the others."""
    factors = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}

    def size(module: nn.Module, shares: int = 1) -> int:
        frozen = [p for p in module.parameters() if id(p) not in factors]
        # FSDP2 divides by rows and rounds up
        return sum(-(-len(p) // shares) * p[0].numel() * p.element_size() for p in frozen)

    blocks = [block for stack in sharded_stacks(model) for block in stack.blocks]
    whole = [size(block) for block in blocks]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return {
        "weights": size(model) - sum(whole) + sum(size(block, processes) for block in blocks) + buffers,
        "gathered": min(2 * max(whole), sum(whole)),
    }
