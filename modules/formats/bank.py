"""Banks: one file with many adapters that share the frozen A of every projection.

A bank is a safetensors file. Its tensors are

- `frozen.<projection>`: A (r, d_in), float32. An A of the initialiser `signs` is not stored, but drawn again;
- `adapter.<name>`: one adapter as a single row of numbers, float32 or bfloat16. The row has B (d_out, r) of every
  projection in the order of the metadata, then the tensors of the head.

A single tensor for each adapter keeps the header short, so that a bank of a thousand adapters opens in milliseconds.
The file is memory-mapped: a command reads only the adapters that it uses.

The metadata key `bank` holds a JSON object:

- `version`: 1;
- `projections`: `{"layer", "role", "start", "stop", "fused", "rank", "d_in", "d_out", "sha256", "seed"}` for each
  adapted projection. `d_out` counts the outputs of the whole layer. `sha256` is the digest of A
  (`modules.formats.compact.factor_digest`). `seed` is the seed of an A that is drawn again, and null for a stored A;
- `heads`: for each head of the task, the possible names of the head in the model of timm or transformers;
- `frozen_fingerprint`: fingerprint of the backbone (`modules.adapters.state`);
- `adapter`, `peft`: keys of `AdapterConfig` and of PEFT's adapter_config.json, as the first adapter has them;
- `adapters`: for each adapter by name, `{"adapter", "peft", "labels", "head", "sha256"}`. `adapter` and `peft` have the
  keys that differ from the first adapter's. `labels` are the class names, or null. `head` maps names to shapes.
  `sha256` is the digest of the stored row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from datamodules.errors import counted
from modules.adapters import AdapterConfig, AdapterError, Projection, adapted_projections, attach, load_adapter_state
from modules.adapters.init import sign_factor
from modules.adapters.mixed import RowWeights, mixed_batch
from modules.adapters.patterns import exact_key, exact_patterns
from modules.adapters.state import frozen_fingerprint
from modules.formats.compact import DTYPES, factor_digest
from modules.formats.peft import PREFIX
from modules.formats.peft_writing import stack_parts

VERSION = 1
NAME = re.compile(r"\w[\w.+-]{0,99}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """A projection that every adapter of a bank adapts.

    Args:
        projection: The projection.
        rank: Rank r.
        d_in: Length of a row of A.
        d_out: Number of outputs of the whole layer.
        sha256: Digest of A.
        seed: Seed from which the initialiser `signs` draws A again; None if A is stored.
    """

    projection: Projection
    rank: int
    d_in: int
    d_out: int
    sha256: str
    seed: int | None

    @property
    def name(self) -> str:
        """Return the projection's name."""
        return self.projection.name

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of B."""
        return self.projection.stop - self.projection.start, self.rank


@dataclass(frozen=True)
class Shared:
    """Properties that all adapters of a bank share.

    Args:
        slots: The adapted projections.
        heads: For each head of the task, the possible names of the head in the model of timm or transformers.
        fingerprint: Fingerprint of the backbone.
    """

    slots: tuple[Slot, ...]
    heads: dict[str, tuple[str, ...]]
    fingerprint: str


class BankAdapter(NamedTuple):
    """One adapter of a bank, without the shared A.

    Args:
        config: Configuration of the adapter.
        bs: B by the projection's name, float32.
        heads: Tensors of the heads by the task's names, float32.
        labels: Class names by label; None without classes.
        peft: Content of PEFT's adapter_config.json.
    """

    config: AdapterConfig
    bs: dict[str, Tensor]
    heads: dict[str, Tensor]
    labels: list[str] | None
    peft: dict[str, Any]


class Member(NamedTuple):
    """A new adapter for a bank, with the frozen A of its training.

    Args:
        shared: Properties that all adapters of the bank must share.
        frozen: A by the projection's name.
        adapter: The adapter.
    """

    shared: Shared
    frozen: dict[str, Tensor]
    adapter: BankAdapter


def member_of(
    model: nn.Module,
    config: AdapterConfig,
    heads: Mapping[str, Tensor],
    labels: Sequence[str] | None,
    peft: Mapping[str, Any],
    head_names: Mapping[str, Sequence[str]],
) -> Member:
    """Return the adapter of a model as a member of a bank.

    Args:
        model: A backbone with adapters.
        config: Configuration of the attached adapters.
        heads: Tensors of the heads by the task's names.
        labels: Class names by label.
        peft: Content of PEFT's adapter_config.json.
        head_names: For each head of the task, the possible names of the head in the model of timm or transformers.

    Raises:
        AdapterError: If A is trained, or a tensor of the head is not a floating-point tensor.
    """
    if config.train != "B":
        raise AdapterError(
            f"model.adapter.train: {config.train} trains A, but all adapters of a bank share one frozen A. Use runs "
            "with model.adapter.train: B."
        )
    if unsupported := [name for name, tensor in heads.items() if not tensor.is_floating_point()]:
        raise AdapterError(
            f"A bank cannot store {unsupported[0]}, which holds no floating-point numbers. Use runs of another task."
        )
    slots, frozen = [], {}
    for name, (layer, factors) in adapted_projections(model).items():
        a = frozen[name] = _copied(factors.A)
        digest = factor_digest(a)
        redraws = config.init_a == "signs" and digest == factor_digest(_redraw(config.seed, name, *a.shape))
        seed = config.seed if redraws else None
        slots.append(Slot(factors.projection, a.shape[0], a.shape[1], layer.out_features, digest, seed))
    bs = {name: _copied(factors.B) for name, (_, factors) in adapted_projections(model).items()}
    names = {head: tuple(names) for head, names in head_names.items()}
    shared = Shared(tuple(slots), names, frozen_fingerprint(model))
    copies = {name: _copied(tensor) for name, tensor in heads.items()}
    adapter = BankAdapter(config, bs, copies, None if labels is None else list(labels), dict(peft))
    return Member(shared, frozen, adapter)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _redraw(seed: int, name: str, rank: int, d_in: int) -> Tensor:
    return sign_factor("A", d_in, rank, seed, name)


def check_member(shared: Shared, other: Shared, name: str) -> None:
    """Check that an adapter has the backbone, the projections, the ranks and the A of a bank.

    Args:
        shared: Properties of the bank.
        other: Properties of the adapter.
        name: Name of the adapter, for the message.

    Raises:
        AdapterError: If a property differs. The message has both values, and the first projection that differs.
    """
    if shared.fingerprint != other.fingerprint:
        raise AdapterError(
            f"{name} has another backbone than the bank: its frozen weights have the fingerprint "
            f"{other.fingerprint[:12]}, not {shared.fingerprint[:12]}. Use runs over one backbone of one dtype."
        )
    slots, other_slots = ({slot.name: slot for slot in each.slots} for each in (shared, other))
    if different := [n for n in [*slots, *other_slots] if not (n in slots and n in other_slots)]:
        change = "lacks" if different[0] in slots else "adapts"
        raise AdapterError(
            f"{name} {change} {different[0]}, unlike the bank "
            f"({counted(len(different), 'projection differs', 'projections differ')}). Use runs with equal "
            "model.adapter.targets and model.adapter.layers."
        )
    for projection, slot in slots.items():
        if other_slots[projection].shape != slot.shape:
            raise AdapterError(
                f"{name} has adapter rank {other_slots[projection].rank} in {projection}, but the bank has rank "
                f"{slot.rank}. Use runs with equal model.adapter.rank and rank_pattern."
            )
    for projection, slot in slots.items():
        if other_slots[projection].sha256 != slot.sha256:
            raise AdapterError(
                f"{name} was trained over another frozen A: in {projection} the digest of A is "
                f"{other_slots[projection].sha256[:12]}, but {slot.sha256[:12]} in the bank. Use runs with equal "
                "model.adapter.seed and model.adapter.init_a."
            )
    if shared.heads != other.heads:
        raise AdapterError(
            f"{name} has the heads {', '.join(other.heads) or 'none'}, but the bank has "
            f"{', '.join(shared.heads) or 'none'}. Use runs of one task."
        )


# -------------------------------------------------------------------------------------------------------------- writing


def save_bank(
    file: IO[bytes],
    shared: Shared,
    frozen: Mapping[str, Tensor],
    adapters: Iterable[tuple[str, BankAdapter]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a bank.

    Args:
        file: A file that is open for writing.
        shared: Properties that all adapters share. The caller must have called `check_member`.
        frozen: A by the projection's name.
        adapters: Names and adapters, at least one.
        dtype: Dtype of the rows, float32 or bfloat16. A is always float32.

    Raises:
        AdapterError: If a name or the dtype is not supported.
    """
    if dtype not in DTYPES:
        raise AdapterError(f"A bank cannot store {dtype}. Use float32 or bfloat16.")
    tensors = {f"frozen.{s.name}": frozen[s.name].float().contiguous() for s in shared.slots if s.seed is None}
    base: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for name, adapter in adapters:
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"{name!r:.120} cannot be the name of an adapter. Use up to 100 letters, digits and . _ + - alone."
            )
        parts = [*(adapter.bs[slot.name] for slot in shared.slots), *adapter.heads.values()]
        row = torch.cat([part.flatten() for part in parts]).to(dtype)
        keys = {"adapter": _config_keys(adapter.config, shared.slots), "peft": adapter.peft}
        base = base or keys
        changes = {
            key: {k: v for k, v in content.items() if k not in base[key] or base[key][k] != v}
            for key, content in keys.items()
        }
        head = {key: list(tensor.shape) for key, tensor in adapter.heads.items()}
        entries[name] = {**changes, "labels": adapter.labels, "head": head, "sha256": _row_digest(row)}
        tensors[f"adapter.{name}"] = row
    header = {
        "version": VERSION,
        "projections": [
            asdict(s.projection) | {key: getattr(s, key) for key in ("rank", "d_in", "d_out", "sha256", "seed")}
            for s in shared.slots
        ],
        "heads": shared.heads,
        "frozen_fingerprint": shared.fingerprint,
        **base,
        "adapters": entries,
    }
    file.write(save(tensors, metadata={"bank": json.dumps(header, separators=(",", ":"))}))


def _config_keys(config: AdapterConfig, slots: Sequence[Slot]) -> dict[str, Any]:
    """Return a configuration as JSON values. The keys of its patterns are exact names of projections.

    The key `chain` is left out, since a bank has one adapter for each run.
    """
    projections = [slot.projection for slot in slots]
    return {key: value for key, value in asdict(config).items() if key != "chain"} | {
        "rank_pattern": exact_patterns({p.name: config.rank_of(p) for p in projections}, config.rank),
        "alpha_pattern": exact_patterns({p.name: config.alpha_of(p) for p in projections}, config.alpha),
    }


def _row_digest(row: Tensor) -> str:
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


class _Entry(NamedTuple):
    """Header of an adapter, without the stored numbers."""

    config: AdapterConfig
    peft: dict[str, Any]
    labels: list[str] | None
    head: dict[str, list[int]]
    sha256: str


class _Resident(NamedTuple):
    """An adapter on the device of the attached model: all Bᵀ as one row, and weight and bias of the head by layer."""

    row: Tensor
    head: dict[str, tuple[Tensor, Tensor | None]]


class Bank:
    """A file with many adapters that share A. `Bank.open` reads the header, and `read` reads one adapter.

    A mixed batch gives each row its own adapter in one forward pass:

        bank = Bank.open("bank.safetensors")
        bank.attach(model)
        with bank.batch(["ada", "bob", "ada"]):
            logits = model(x)  # x has three rows

    Args:
        path: The file.
        opened: The opened file.
        shared: Properties that all adapters share.
        entries: Headers of the adapters by name.
    """

    def __init__(self, path: Path, opened: Any, shared: Shared, entries: dict[str, _Entry]) -> None:
        self.path, self.shared = path, shared
        self._opened, self._entries = opened, entries
        self._model: nn.Module | None = None
        self._task: nn.Module | None = None
        self._layers: dict[str, str] = {}
        self._resident: Callable[[str], _Resident]
        self._stacked: Tensor | None = None  # Buffer for the adapters of a batch, since an allocation is slow.

    @classmethod
    def open(cls, path: str | Path) -> Bank:
        """Open a bank. The file is not trusted: names, sizes and configurations are checked before use.

        Raises:
            AdapterError: If the file is missing or damaged, or is no bank.
        """
        path = Path(path)
        try:
            opened: Any = safe_open(path, framework="pt")
            shared, entries, expected = _parse(path, (opened.metadata() or {}).get("bank", ""))
            stored = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{path} cannot be read as a bank: {error}. Give the file of a bank.") from error
        if different := {name for name, _ in stored.items() ^ expected.items()}:
            raise AdapterError(
                f"{path}: the tensor {min(different)!r:.120} is missing, unexpected or has another shape than in the "
                "header. Write the bank again."
            )
        return cls(path, opened, shared, entries)

    @property
    def names(self) -> list[str]:
        """Return the names of the adapters, in the order in which they were added."""
        return list(self._entries)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the stored rows."""
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
        stored = self._opened.get_slice(f"adapter.{self.names[0]}").get_dtype()
        if stored not in dtypes:
            raise AdapterError(f"{self.path}: the dtype {stored} is not supported. Write the bank again.")
        return dtypes[stored]

    def labels(self, name: str) -> list[str] | None:
        """Return the class names of an adapter by label; None without classes."""
        return self._entry(name).labels

    def digest(self, name: str) -> str:
        """Return the sha256 of an adapter's stored numbers."""
        return self._entry(name).sha256

    def config(self, name: str) -> AdapterConfig:
        """Return the configuration of an adapter."""
        return self._entry(name).config

    def _entry(self, name: str) -> _Entry:
        if name in self._entries:
            return self._entries[name]
        close = get_close_matches(name, self._entries, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Its adapters begin with {', '.join(self.names[:3])}."
        raise AdapterError(f"The bank {self.path} has no adapter {name!r:.120}. {hint}")

    @cached_property
    def frozen(self) -> dict[str, Tensor]:
        """Return A by the projection's name. A is read or drawn again, and its digest is checked."""
        frozen = {}
        for slot in self.shared.slots:
            if slot.seed is None:
                a = self._tensor(f"frozen.{slot.name}")
            else:
                a = _redraw(slot.seed, slot.name, slot.rank, slot.d_in)
            if factor_digest(a) != slot.sha256:
                raise AdapterError(
                    f"{self.path}: the frozen A of {slot.name} has another digest than in the header. Write the bank "
                    "again."
                )
            frozen[slot.name] = a
        return frozen

    def read(self, name: str) -> BankAdapter:
        """Read one adapter.

        Raises:
            AdapterError: If the bank has no such adapter, or its numbers are damaged.
        """
        entry = self._entry(name)
        stored = self._tensor(f"adapter.{name}")
        if _row_digest(stored) != entry.sha256:
            raise AdapterError(f"{self.path}: {name} has another digest than in the header. Write the bank again.")
        row = stored.float()
        if not row.isfinite().all():
            raise AdapterError(f"{self.path}: {name} holds values that are not finite. Remove the adapter.")
        shapes = {slot.name: slot.shape for slot in self.shared.slots}
        parts = row.split([math.prod(shape) for shape in [*shapes.values(), *entry.head.values()]])
        views = [part.view(shape) for part, shape in zip(parts, [*shapes.values(), *entry.head.values()], strict=True)]
        bs = dict(zip(shapes, views[: len(shapes)], strict=True))
        heads = dict(zip(entry.head, views[len(shapes) :], strict=True))
        return BankAdapter(entry.config, bs, heads, entry.labels, entry.peft)

    def _tensor(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{self.path}: {name} cannot be read ({error}). Get the file again.") from error
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"{self.path}: {name} has dtype {tensor.dtype}, not float32 or bfloat16. Write the bank again."
            )
        return tensor

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter for PEFT's adapter_model.safetensors."""
        adapter = self.read(name)
        tensors: dict[str, Tensor] = {}
        for layer, slots in groupby(self.shared.slots, key=lambda slot: slot.projection.layer):
            parts = list(slots)
            a, b = stack_parts(
                [slot.projection for slot in parts],
                [adapter.config.scale_of(slot.projection) for slot in parts],
                [self.frozen[slot.name] for slot in parts],
                [adapter.bs[slot.name] for slot in parts],
                parts[0].d_out,
            )
            tensors |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
        for head, peft_names in self.shared.heads.items():
            content = {
                key.removeprefix(f"{head}."): t for key, t in adapter.heads.items() if key.startswith(f"{head}.")
            }
            tensors |= {f"{PREFIX}{peft_name}.{key}": t for peft_name in peft_names for key, t in content.items()}
        return tensors

    # ---------------------------------------------------------------------------------------------------- mixed batches

    def attach(self, model: nn.Module, task: nn.Module | None = None, cached: int = 256) -> None:
        """Attach the bank's A to a model, with B = 0. Outside `batch` the model computes as without adapters.

        Args:
            model: The backbone, without adapters.
            task: The task of this program that owns the backbone, if the heads belong to the task. With None, the model
                has the heads, by the names of timm or transformers.
            cached: Number of adapters that stay in memory on the model's device.

        Raises:
            AdapterError: If the model has adapters, or lacks a projection or a head of the bank.
        """
        root = model if task is None else task
        first = next(iter(self._entries.values()))
        has_task = task is not None
        self._layers = self._head_layers(root, has_task)
        heads = list(self.shared.heads) if has_task else [names[0] for names in self.shared.heads.values() if names]
        exclude = [head.removeprefix("backbone.") for head in heads if not has_task or head.startswith("backbone.")]
        names = [f"regex:{re.escape(slot.name)}" for slot in self.shared.slots]
        config = replace(first.config, targets=names, layers=None, init_a="given", init_b="given")
        attach(model, config, exclude=exclude)
        projections = adapted_projections(model)
        for slot in self.shared.slots:
            layer, factors = projections[slot.name]
            if (factors.B.shape, factors.A.shape[1]) != (slot.shape, slot.d_in):
                raise AdapterError(
                    f"The bank {self.path} does not fit this model: {slot.name} is {slot.shape[0]} × {slot.d_in} in "
                    f"the bank, but {factors.B.shape[0]} × {layer.in_features} in the model. Use the backbone of the "
                    "bank."
                )
        state: dict[str, Tensor] = {}
        for name, (_, factors) in projections.items():
            prefix = f"{factors.projection.layer}.adapters.{factors.projection.role}"
            state |= {f"{prefix}.A": self.frozen[name], f"{prefix}.B": torch.zeros_like(factors.B)}
        load_adapter_state(model, state)
        if frozen_fingerprint(model) != self.shared.fingerprint:
            _log.warning(
                f"The adapters of {self.path} were trained over other frozen weights than this backbone has, or over "
                "another dtype. The outputs will differ from the outputs in training. Use the backbone of the training."
            )
        self._model, self._task, self._stacked = model, task, None
        self._resident = lru_cache(maxsize=cached)(self._load)

    def _head_layers(self, root: nn.Module, is_task: bool) -> dict[str, str]:
        """Return the names of the head's linear layers in `root`, by their names in the bank."""
        modules = dict(root.named_modules())
        layers = {}
        for key in next(iter(self._entries.values())).head:
            layer = key.rpartition(".")[0]
            head = next((h for h in self.shared.heads if layer == h or layer.startswith(f"{h}.")), "")
            name = layer if is_task else self.shared.heads[head][0] + layer.removeprefix(head) if head else layer
            if not isinstance(modules.get(name), nn.Linear):
                raise AdapterError(
                    f"The bank {self.path} has the head {layer}, but {name} is no linear layer of this model. Use a "
                    "model with the head of the task. Mixed batches support only heads of linear layers."
                )
            layers[layer] = name
        return layers

    def _load(self, name: str) -> _Resident:
        """Return an adapter on the model's device. B is rescaled to the scale s of the attached adapters."""
        assert self._model is not None
        adapter = self.read(name)
        projections = adapted_projections(self._model)
        device = next(iter(projections.values()))[1].B.device
        dtypes = {layer.frozen.dtype for layer, _ in projections.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # With the dtype of W, a batch needs no cast.
        row = torch.cat(
            [
                adapter.config.scale_of(slot.projection)
                / projections[slot.name][1].scale
                * adapter.bs[slot.name].T.flatten()
                for slot in self.shared.slots
            ]
        )
        head = {
            layer: (
                adapter.heads[f"{layer}.weight"].to(device),
                adapter.heads[f"{layer}.bias"].to(device) if f"{layer}.bias" in adapter.heads else None,
            )
            for layer in self._layers
        }
        return _Resident(row.to(device, dtype), head)

    def batch(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch has its own adapter and head.

        If adapters have different numbers of classes, the logits of the missing classes are -inf.

        Args:
            names: Name of the adapter of each row.

        Raises:
            AdapterError: If the bank has no such adapter or is not attached, or there are no names.
        """
        if self._model is None:
            raise AdapterError("The bank is not attached. Call bank.attach(model) first.")
        if not names:
            raise AdapterError("A mixed batch has no names of adapters. Give one name for each row.")
        for name in names:
            self._entry(name)  # Raises for an unknown name.
        return self._batch(names)

    @contextmanager
    def _batch(self, names: Sequence[str]) -> Iterator[None]:
        assert self._model is not None
        positions = {name: i for i, name in enumerate(dict.fromkeys(names))}
        chosen = [self._resident(name) for name in positions]
        stacked, self._stacked = self._stacked, None  # A nested batch cannot overwrite the buffer of this batch.
        if stacked is None or len(stacked) < len(chosen):
            with torch.inference_mode(False):  # Outside inference mode, no inference tensor can be overwritten.
                stacked = chosen[0].row.new_empty(len(chosen), len(chosen[0].row))
        rows = torch.stack([adapter.row for adapter in chosen], out=stacked[: len(chosen)])
        index = torch.tensor([positions[name] for name in names], device=rows.device)
        slots = self.shared.slots
        parts = rows.split([math.prod(slot.shape) for slot in slots], dim=1)
        # Each part is Bᵀ of one projection, and `mT` views the part as B.
        bs = {slot.name: part.unflatten(1, slot.shape[::-1]).mT for slot, part in zip(slots, parts, strict=True)}
        heads = {
            name: _row_weights([adapter.head[layer] for adapter in chosen], index)
            for layer, name in self._layers.items()
        }
        with mixed_batch(self._model, bs, index, heads, self._task):
            yield
        self._stacked = stacked


def _row_weights(layers: Sequence[tuple[Tensor, Tensor | None]], index: Tensor) -> RowWeights:
    """Stack the weights of the adapters' heads. A head with fewer outputs is padded with outputs of -inf."""
    width = max(len(weight) for weight, _ in layers)
    if all(bias is None and len(weight) == width for weight, bias in layers):
        return RowWeights(torch.stack([weight for weight, _ in layers]), None, index)
    weights = [F.pad(weight, (0, 0, 0, width - len(weight))) for weight, _ in layers]
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers]
    biases = [F.pad(bias, (0, width - len(bias)), value=-math.inf) for bias in biases]
    return RowWeights(torch.stack(weights), torch.stack(biases), index)


def _parse(path: Path, text: str) -> tuple[Shared, dict[str, _Entry], dict[str, tuple[int, ...]]]:
    """Validate the header of a bank.

    Returns:
        The shared properties, the headers of the adapters by name, and the shapes of the file's tensors by name.

    Raises:
        AdapterError: If the header is not valid.
    """
    try:
        header = json.loads(text)
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']!r:.20} is not supported and may need a newer program")
        slots = tuple(_parse_slot(entry) for entry in header["projections"])
        heads = {str(head): tuple(map(str, names)) for head, names in header["heads"].items()}
        shared = Shared(slots, heads, str(header["frozen_fingerprint"]))
        exact = {exact_key(slot.name) for slot in slots}
        entries = dict(_parse_entries(header, exact))
        if not slots or not entries:
            raise ValueError("the bank is empty")
        numbers = sum(math.prod(slot.shape) for slot in slots)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error!s:.500}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{path} is no bank of this version ({type(error).__name__}: {error!s:.200}). Give the file of a bank."
        ) from error
    shapes: dict[str, tuple[int, ...]] = {f"frozen.{s.name}": (s.rank, s.d_in) for s in slots if s.seed is None}
    shapes |= {f"adapter.{n}": (numbers + sum(map(math.prod, e.head.values())),) for n, e in entries.items()}
    return shared, entries, shapes


def _parse_slot(entry: Mapping[str, Any]) -> Slot:
    projection = Projection(**{field.name: entry[field.name] for field in fields(Projection)})
    slot = Slot(projection, entry["rank"], entry["d_in"], entry["d_out"], entry["sha256"], entry["seed"])
    sizes = [slot.rank, slot.d_in, projection.stop - projection.start, slot.d_out - projection.stop + 1]
    texts = [projection.layer, projection.role, slot.sha256]
    if not (
        all(type(size) is int and 0 < size < 1 << 24 for size in sizes)
        and all(isinstance(text, str) for text in texts)
        and isinstance(slot.seed, int | None)
        and isinstance(projection.fused, bool)
        and projection.start >= 0
        and slot.rank <= min(sizes[1:3])
    ):
        raise ValueError("a projection has impossible sizes")
    return slot


def _parse_entries(header: Mapping[str, Any], exact: set[str]) -> Iterator[tuple[str, _Entry]]:
    known = {field.name for field in fields(AdapterConfig)} - {"chain"}
    for name, entry in header["adapters"].items():
        keys = {**header["adapter"], **entry["adapter"]}
        labels, head = entry["labels"], entry["head"]
        valid = [
            NAME.fullmatch(name) is not None,
            keys.keys() == known,
            keys["train"] == "B",
            {*keys["rank_pattern"], *keys["alpha_pattern"]} <= exact,  # Other patterns could take forever to match.
            labels is None or all(isinstance(label, str) for label in labels),
            all(type(size) is int and 0 < size < 1 << 24 for shape in head.values() for size in shape),
            isinstance(entry["sha256"], str),
        ]
        if not all(valid):
            raise ValueError(f"the adapter {name!r:.120} has unknown keys or values")
        peft = {**header["peft"], **entry["peft"]}
        yield name, _Entry(AdapterConfig(**keys), peft, labels, head, entry["sha256"])
