"""Predict the memory of a fit by running one training step on fake tensors.

The step runs the real model with its adapters. Fake tensors have a shape, a dtype and a place in autograd's graph, but
no numbers. So everything that autograd keeps is counted, for every architecture. A model of 7 billion weights takes
seconds, and no memory for its weights. `docs/results/memory.json` compares predictions with measured runs.

Memory that PyTorch does not allocate as a tensor is not counted: the CUDA context, workspaces of kernels, buffers of
communication, and unused parts of the allocator's blocks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from datamodules.contract import DataKind, SummaryBatch, TextBatch
from datamodules.errors import ModelError, first_line
from modules.adapters import AdapterConfig, adapted_layers, adapter_state, attach
from modules.backbones.transformers_backbone import checkpoint_activations, selected_logits
from modules.base import AdaptedModule, BackboneDtype
from modules.scaling.sharding import sharded_stacks

if TYPE_CHECKING:  # the recipe decides which class is imported
    from modules.image_classification import ImageClassifier
    from modules.language_modeling import LanguageModel
    from modules.summarization import Summarizer
    from modules.text_classification import TextClassifier

GIB = 2**30
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
AUTOCAST: dict[Precision, torch.dtype] = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the peak of a training step, by purpose.

    Args:
        weights: Weights and buffers of the backbone, or this process's share of them. Frozen except in full tuning.
        gathered: Frozen weights gathered from other processes, while they are used.
        factors: Both factors of all adapters, trained or frozen.
        gradients: Gradients of all trained parameters.
        optimizer: State of the optimizer, such as AdamW's two moments of all trained parameters.
        activations: Activations kept for backward, and temporary tensors.
        logits: Tensors with an entry for each token of the vocabulary: logits, log-probabilities and their gradients.
            0 if the peak is elsewhere, such as in a layer under gradient checkpointing.
        heads: Trained heads.
    """

    weights: int
    gathered: int
    factors: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    heads: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all parts, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


class LiveBytes(TorchDispatchMode):
    """Track the bytes of all live tensors, real or fake, by part. Keep the bytes of each part at the peak of the sum.

    Args:
        kind: Function that returns the part of a new tensor: a field of `MemoryEstimate`, such as `logits`.
    """

    def __init__(self, kind: Callable[[Tensor], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kind = kind
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count existing tensors, unless they share memory with a counted tensor."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive:
                continue

            def released(_: weakref.ref[torch.UntypedStorage], key: int = key, size: int = size) -> None:
                self.now[kind] -= size
                del self._alive[key]

            self._alive[key] = weakref.ref(storage, released)  # lives as long as any tensor uses the memory
            self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self.hold([tensor], self._kind(tensor))
        return results


def training_memory(
    config: PreTrainedConfig,
    adapter: AdapterConfig,
    *,
    batch_size: int,
    tokens: int,
    response_tokens: int | None = None,
    backbone_dtype: BackboneDtype = "bfloat16",
    precision: Precision = "32-true",
    gradient_checkpointing: bool = False,
    shard_frozen: int = 1,
) -> MemoryEstimate:
    """Predict the bytes of a training step of a decoder's adapters, by part.

    Gradients and moments exist throughout the step, as in every step but the first. Attention gets a mask, as for
    padded batches. Its kernels keep the same tensors here and on a GPU: queries, keys, values, the result and a number
    for each row.

    Args:
        config: Configuration of the backbone; `LlamaConfig()` is LLaMA-2-7B.
        adapter: The adapters.
        batch_size: Sequences of a batch on a process, without accumulation.
        tokens: Length of a sequence, padding included.
        response_tokens: Number of positions of a sequence in the loss. The output layer skips the others. None: all.
        backbone_dtype: Dtype of the frozen weights; the factors are float32.
        precision: Lightning's precision.
        gradient_checkpointing: Whether activations within a layer are computed again in backward.
        shard_frozen: Processes over which the layers' frozen weights are divided (`modules.scaling.sharding`). The
            factors and weights outside of layers are on every process. Two layers at a time are gathered: the current
            layer and the next.

    Raises:
        ModelError: If a number is out of range, the model is not a decoder, or its layers cannot be divided.
    """
    positions = tokens if response_tokens is None else response_tokens
    if min(batch_size, shard_frozen) < 1 or not 1 <= positions <= tokens:
        raise ModelError(
            f"Memory of {batch_size} sequences, {positions} of {tokens} tokens learnt, {shard_frozen} processes: all "
            f"must be 1 or more, and at most {tokens} tokens can be learnt."
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
        peak = _peak_of_step(
            model,
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
            factors=adapter_state(model).values(),
            heads=(),
            logits=[(batch_size * positions, config.get_text_config().vocab_size)],
            loss=lambda: _decoder_loss(model, batch_size, tokens, positions),
            precision=precision,
        )
    return _estimate(peak, model, shard_frozen)


# ---------------------------------------------------------------------------------------------------- fits of any task


@dataclass(frozen=True)
class BatchSize:
    """Size of the largest training batch of a process.

    Args:
        samples: Images, texts or conversations.
        tokens: Number of tokens of each text or conversation, with padding; 0 for images.
        targets: Number of tokens of each summary; 0 for other tasks.
    """

    samples: int
    tokens: int = 0
    targets: int = 0


def fit_memory(module: AdaptedModule, size: BatchSize, precision: Precision, shard_frozen: int = 1) -> MemoryEstimate:
    """Predict the memory of a training step of a fit, by part.

    Args:
        module: The model, built under `torch.device("meta")` without weights. It cannot be used afterwards.
        size: The largest batch. Every token of a conversation counts as learnt.
        precision: Lightning's precision.
        shard_frozen: Processes that share the blocks' frozen weights, as for `training_memory`.

    Raises:
        ModelError: If the task cannot be predicted, a text exceeds the backbone's positions, or the forward pass
            depends on values.
    """
    kind = next((kind for kind in module.kinds if kind in _LOSSES), None)
    if kind is None:
        raise ModelError(
            f"model: the memory of {type(module).__name__} cannot be predicted. Tasks on {', '.join(_LOSSES)} can."
        )
    _check_positions("max_source_length" if size.targets else "max_length", size.tokens, module.position_limit)
    _check_positions("max_target_length", size.targets, module.position_limit)
    with FakeTensorMode():
        _make_fake(module)
        factors = adapter_state(module.backbone) if module.baseline is None else module.baseline.parameters()
        try:
            peak = _peak_of_step(
                module,
                module.optimizer_spec.build(module.trained_groups()),
                factors=factors.values(),
                heads=[p for name in module.head_names for p in module.get_submodule(name).parameters()],
                logits=_logits(module, kind, size),
                loss=partial(_LOSSES[kind], module, size),
                precision=precision,
            )
        except Exception as error:  # any backbone's own code runs here
            raise ModelError(
                f"model.backbone: the memory of {module.hparams['backbone']} cannot be predicted, since its forward "
                f"pass needs values and not shapes alone ({first_line(error)}). Measure a fit with "
                "--trainer.max_steps 2: metrics.json then has memory/peak_bytes."
            ) from error
    return _estimate(peak, module.backbone, shard_frozen)


def _make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake tensors on the CPU. Tied parameters stay tied.

    On the CPU, the kernels of attention keep the same tensors as on a GPU. On the meta device, the kernels would not.
    """
    fakes: dict[int, tuple[Tensor, Tensor]] = {}  # the original stays alive, so its id stays unique
    for owner in module.modules():
        for name, old in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if id(old) not in fakes:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                is_parameter = isinstance(old, nn.Parameter)
                fakes[id(old)] = old, nn.Parameter(new, old.requires_grad) if is_parameter else new
            setattr(owner, name, fakes[id(old)][1])


def _image_loss(module: ImageClassifier, size: BatchSize) -> Tensor:
    images = torch.zeros(size.samples, *module.preprocessing["input_size"])
    return module.loss({"image": images, "label": torch.zeros(size.samples, dtype=torch.long)})


def _text_loss(module: TextClassifier, size: BatchSize) -> Tensor:
    label = torch.zeros(size.samples, dtype=torch.long if module.class_names else torch.float32)
    names = [name for name in module.tokenizer.model_input_names if name != "attention_mask"]
    inputs = {name: torch.zeros(size.samples, size.tokens, dtype=torch.long) for name in names}
    others = {"attention_mask": torch.ones_like(inputs["input_ids"]), "label": label}
    return module.loss(cast(TextBatch, {**inputs, **others}))


def _summary_loss(module: Summarizer, size: BatchSize) -> Tensor:
    ids = torch.zeros(size.samples, size.tokens, dtype=torch.long)
    labels = torch.zeros(size.samples, size.targets, dtype=torch.long)
    index = torch.arange(size.samples)
    return module.loss(SummaryBatch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, index=index))


def _instruction_loss(module: LanguageModel, size: BatchSize) -> Tensor:
    return _decoder_loss(module.backbone, size.samples, size.tokens, size.tokens)


# loss of a batch, by the kind of a task's data
_LOSSES: dict[DataKind, Callable[[Any, BatchSize], Tensor]] = {
    DataKind.IMAGES: _image_loss,
    DataKind.LABELLED_TEXTS: _text_loss,
    DataKind.SUMMARIES: _summary_loss,
    DataKind.INSTRUCTIONS: _instruction_loss,
}


def _logits(module: AdaptedModule, kind: DataKind, size: BatchSize) -> list[tuple[int, ...]]:
    """Return the shapes of tensors with an entry for each token of the vocabulary."""
    if kind not in (DataKind.SUMMARIES, DataKind.INSTRUCTIONS):
        return []
    vocabulary = cast(PreTrainedModel, module.backbone).config.get_text_config().vocab_size
    if kind == DataKind.INSTRUCTIONS:
        return [(size.samples * size.tokens, vocabulary)]
    return [(size.samples, size.targets, vocabulary), (size.samples * size.targets, vocabulary)]


def _check_positions(key: str, tokens: int, limit: int | None) -> None:
    if limit is not None and tokens > limit:
        raise ModelError(
            f"data.{key}: {tokens} tokens are more than the {limit} that the backbone has positions for. Choose a "
            "smaller number."
        )


# ------------------------------------------------------------------------------------------------------------ one step


def _peak_of_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    factors: Iterable[Tensor],
    heads: Iterable[Tensor],
    logits: list[tuple[int, ...]],
    loss: Callable[[], Tensor],
    precision: Precision,
) -> Counter[str]:
    """Return the bytes at the peak of a step by part. Gradients and moments exist throughout the step.

    Args:
        model: The model, in train mode.
        optimizer: The optimizer of all trained parameters. Its moments are created here.
        factors: Factors of the adapters.
        heads: Parameters of the heads.
        logits: Shapes of the tensors that count as logits.
        loss: Function that makes a batch and returns its loss.
        precision: Lightning's precision.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    live = LiveBytes(lambda result: "logits" if tuple(result.shape) in logits else "activations")
    live.hold(factors, "factors")
    live.hold(heads, "heads")
    live.hold([*model.parameters(), *model.buffers()], "weights")
    live.hold([p.grad for p in trained if p.grad is not None], "gradients")
    live.hold(tree_leaves([list(s.values()) for s in optimizer.state.values()]), "optimizer")
    with live:
        with torch.autocast("cpu", AUTOCAST[precision]) if precision in AUTOCAST else nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
    return live.peak


def _estimate(peak: Counter[str], model: nn.Module, processes: int) -> MemoryEstimate:
    parts = {field.name: peak[field.name] for field in fields(MemoryEstimate)}
    return MemoryEstimate(**parts | (_sharded(model, processes) if processes > 1 else {}))


def _decoder_loss(model: PreTrainedModel, batch_size: int, tokens: int, positions: int) -> Tensor:
    """Return the loss of `modules.language_modeling.LanguageModel` over the last positions of each sequence."""
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    rows = torch.arange(batch_size).repeat_interleave(positions)
    columns = torch.arange(tokens - positions, tokens).repeat(batch_size)
    # positions instead of a mask, since a fake mask has no values to count
    selected = cast(Tensor, (rows, columns))
    logits = selected_logits(model, selected, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return F.cross_entropy(logits, ids[selected])


def _sharded(model: nn.Module, processes: int) -> dict[str, int]:
    """Return the bytes of one process that depend on sharding.

    `weights` are the frozen weights outside of blocks, a share of each block, and all buffers. `gathered` is
    at most two whole blocks.
    """
    factors = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}

    def size(module: nn.Module, shares: int = 1) -> int:
        frozen = [p for p in module.parameters() if id(p) not in factors and not p.requires_grad]
        # FSDP2 divides by rows and rounds up
        return sum(-(-len(p) // shares) * p[0].numel() * p.element_size() for p in frozen)

    blocks = [block for stack in sharded_stacks(model) for block in stack.blocks]
    sizes = [size(block) for block in blocks]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return {
        "weights": size(model) - sum(sizes) + sum(size(block, processes) for block in blocks) + buffers,
        "gathered": min(2 * max(sizes), sum(sizes)),
    }
