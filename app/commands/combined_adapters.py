"""Read the adapters of the command `combine`, combine factors and heads, and write the result in PEFT's format."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.commands.finished_runs import (
    PEFT_NAME,
    STATE_NAME,
    FinishedRun,
    check_same_backbone,
    peft_skeleton,
    read_run,
    short_path,
)
from app.config.program_files import program_command
from app.export.load_run import load_module
from app.export.loader_code import Loader, peft_loader
from app.export.low_rank import factor_state, given_config, replace_adapters, truncated_sums
from app.export.model_card import write_combination_card
from app.export.peft import LABELS, complete_peft, write_labels
from app.run.checkpoint_io import read_checkpoint
from datamodules.errors import UsageError
from modules.adapters import AdapterConfig, adapter_state, attach
from modules.analysis.combination import (
    SIDES,
    Method,
    Side,
    Sparsity,
    Update,
    combine_updates,
    first_difference,
    weighted_sum,
)
from modules.base import AdaptedModule
from modules.formats.compact import factor_digest
from modules.formats.peft import CONFIG, PREFIX, Heads, read_peft_files, write_peft_files
from modules.formats.peft_writing import to_peft

ADVICE = "Choose one head with --heads keep RUN, or none with --heads drop."


@dataclass(frozen=True)
class Combination:
    """Options of the command.

    Args:
        weights: Weight of each adapter.
        method: Method that combines the trained factors.
        density: Share of the entries that TIES and DARE keep.
        seed: Seed of DARE.
        rank: Adapter rank of a truncated sum; None for a combination over a shared factor.
        heads: `combine`, `drop`, or the index of the adapter whose head is kept.
    """

    weights: list[float]
    method: Method
    density: float
    seed: int
    rank: int | None
    heads: str | int


@dataclass(frozen=True, eq=False)
class Source:
    """One adapter to combine.

    Args:
        name: The argument RUN.
        run: Factors and configuration.
        content: Content of adapter_config.json; empty for a checkpoint.
        others: Tensors that are not factors, by name: the task's names for a checkpoint, else PEFT's names without the
            prefix.
        labels: Class names in the order of the logits, empty for a regression; None if unknown.
    """

    name: str
    run: FinishedRun
    content: dict[str, Any]
    others: dict[str, Tensor]
    labels: list[str] | None

    @property
    def is_checkpoint(self) -> bool:
        """True if the source is a checkpoint of this program."""
        return self.run.step is not None

    @property
    def base(self) -> str | None:
        """Last part of the backbone's name; None if unknown."""
        name = self.run.model.get("backbone") if self.is_checkpoint else self.content.get("base_model_name_or_path")
        return Path(str(name)).name if name else None

    def digest(self, side: Side) -> str:
        """Return the first digits of one digest over A, or over B, of all projections."""
        lines = [f"{name} {factor_digest(update.factor(side))}" for name, update in sorted(self.run.updates.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Combined:
    """A combined adapter, ready to be written.

    Args:
        content: Content of adapter_config.json.
        tensors: Content of adapter_model.safetensors.
        labels: Class names of the head; None without a head or if unknown.
        facts: Clauses about the combination by subject, for messages and the model card.
        rows: Rows of the model card's table of sources.
        module: The task with the combined adapters; None if all sources are PEFT directories.
    """

    content: dict[str, Any]
    tensors: dict[str, Tensor]
    labels: list[str] | None
    facts: dict[str, str]
    rows: list[list[str]]
    module: AdaptedModule | None

    def write(self, folder: Path, name: str) -> Loader:
        """Write the adapter, its class names and its model card into an empty directory.

        Args:
            folder: The directory.
            name: Name of the directory in the model card.

        Returns:
            A function that returns the code or the command for loading the directory.
        """
        write_peft_files(folder, self.content, self.tensors, torch.float32)
        if self.module is not None:
            complete_peft(self.module, folder)
        if self.labels is not None:
            write_labels(folder, self.labels)
        load: Loader = _load_command if self.module is None else peft_loader(self.module)
        write_combination_card(folder, self.module, self.facts, self.rows, load(name, shared=True))
        return load


def _load_command(place: str, shared: bool = False) -> str:
    return shlex.join([*program_command(), "test", "--config", "RECIPE", "--model.adapter_path", place])


# -------------------------------------------------------------------------------------------------------------- reading


def read_sources(names: Sequence[str]) -> list[Source]:
    """Read adapters, and check that they adapt the same projections of one backbone.

    Raises:
        UsageError: If an input has no adapters, or the adapters do not fit each other.
        CheckpointError: If an input cannot be read.
    """
    sources = [_read_source(name) for name in names]
    check_same_backbone(sorted((source.run for source in sources), key=lambda run: run.digest is None))
    named = [source for source in sources if source.base is not None]
    for source in named:
        has_same_digest = source.is_checkpoint and named[0].is_checkpoint  # Checked by `check_same_backbone`.
        if source.base != named[0].base and not has_same_digest:
            raise UsageError(
                f"RUN: {named[0].name} is for the backbone {named[0].base}, but {source.name} is for {source.base}. "
                f"Combine adapters of one backbone. If both names mean the same weights, write one name into {CONFIG}."
            )
    first = sources[0]
    for source in sources[1:]:
        if differing := first.run.updates.keys() ^ source.run.updates.keys():
            adapting, lacking = (first, source) if min(differing) in first.run.updates else (source, first)
            raise UsageError(
                f"RUN: {adapting.name} adapts {min(differing)}, but {lacking.name} does not ({len(differing)} "
                "projections differ). Combine adapters of the same projections."
            )
    return sources


def _read_source(name: str) -> Source:
    run = read_run(name)
    if run is None:
        raise UsageError(f"RUN: {name} has no adapters. Give runs with model.tuning: adapter.")
    if run.step is not None:
        state = read_checkpoint(run.source)["state_dict"]
        others = {key: tensor for key, tensor in state.items() if not STATE_NAME.fullmatch(key)}
        return Source(name, run, {}, others, run.model.get("class_names"))
    content, tensors = read_peft_files(run.source)
    others = {key.removeprefix(PREFIX): t.float() for key, t in tensors.items() if not PEFT_NAME.fullmatch(key)}
    return Source(name, run, content, others, _read_labels(run.source / LABELS))


def _read_labels(path: Path) -> list[str] | None:
    """Return the class names in a labels.json, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"RUN: {path} cannot be read as JSON ({error}). Correct or remove the file.") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UsageError(f"RUN: {path} is not a list of class names. Correct or remove the file.")
    return labels


# -------------------------------------------------------------------------------------------------------------- factors


def combine(sources: Sequence[Source], options: Combination) -> Combined:
    """Combine the factors and the heads of adapters.

    Raises:
        UsageError: If the adapters share no factor, or the heads cannot be combined. With `options.rank`, the
            adapters need no shared factor.
    """
    facts = {"Weights": ", ".join(f"{weight:g}" for weight in options.weights)}
    parts = {name: [source.run.updates[name] for source in sources] for name in sources[0].run.updates}
    if options.rank is None:
        shared = _shared_side(sources, parts)
        sparsity = Sparsity(options.density, options.seed)
        updates = {
            name: combine_updates(to_combine, options.weights, shared, options.method, sparsity, name)
            for name, to_combine in parts.items()
        }
        trained = "B" if shared == "A" else "A"
        settings = {"sum": "", "ties": f", density {options.density:g}"}
        settings["dare"] = f"{settings['ties']}, seed {options.seed}"
        facts["Method"] = f"{options.method} of {trained} over one {shared}{settings[options.method]}"
    else:
        orthonormal: Side = "B" if sources[0].run.adapter.train == "A" else "A"
        updates, facts["Method"] = _truncated_sum(parts, options.weights, options.rank, orthonormal)
    # the source of the result's backbone, class names and tokenizer: a checkpoint if possible
    kept = options.heads if isinstance(options.heads, int) else None
    template = next((s for s in sources if s.is_checkpoint), sources[0]) if kept is None else sources[kept]
    module = load_module(template.run.source, {}) if template.is_checkpoint else None
    names = module.peft_head_names() if module is not None else {}
    heads, facts["Head"] = _heads(sources, options, template, names)
    rows = [
        [short_path(source.run), f"{weight:g}", source.digest("A"), source.digest("B")]
        for source, weight in zip(sources, options.weights, strict=True)
    ]
    labels = template.labels if heads else None
    if module is None:
        content, tensors = _without_backbone(template, updates, heads)
    else:
        replace_adapters(module, updates)
        grouped = _by_module(heads, [name for peft_names in names.values() for name in peft_names])
        backbone, state = module.backbone, adapter_state(module.backbone)
        source = module.hparams["backbone"]
        content, tensors = to_peft(backbone, module.adapter, state, grouped, module.peft_task, source)
    return Combined(content, tensors, labels, facts, rows, module)


def _shared_side(sources: Sequence[Source], parts: Mapping[str, Sequence[Update]]) -> Side:
    """Return the factor that all adapters share.

    Raises:
        UsageError: If neither A nor B is the same in all adapters.
    """
    first = sources[0]
    frozen: Side = "B" if first.run.adapter.train == "A" else "A"
    for name, updates in parts.items():
        ranks = [update.a.shape[0] for update in updates]
        if other := next((i for i, rank in enumerate(ranks) if rank != ranks[0]), None):
            raise UsageError(
                f"RUN: {name} has adapter rank {ranks[0]} in {first.name} and {ranks[other]} in {sources[other].name}, "
                "so the adapters share neither A nor B. Use --via svd --rank r."
            )
    for side in sorted(SIDES, key=lambda side: side != frozen):
        if all(first_difference(updates, side) is None for updates in parts.values()):
            return side
    name, index = next((n, i) for n, updates in parts.items() if (i := first_difference(updates, frozen)) is not None)
    digests = [factor_digest(parts[name][i].factor(frozen))[:16] for i in (0, index)]
    raise UsageError(
        f"RUN: {first.name} and {sources[index].name} share no factor: {frozen} of {name} has the digest {digests[0]} "
        f"and {digests[1]}. Combine runs with one frozen factor (the same model.adapter.seed, rank and initialiser), "
        "or use --via svd --rank r."
    )


def _truncated_sum(
    parts: Mapping[str, Sequence[Update]], weights: Sequence[float], rank: int, orthonormal: Side
) -> tuple[dict[str, Update], str]:
    """Return the best approximation of the weighted sum with an adapter rank, and a clause about the loss."""
    largest = max(min(sum(u.a.shape[0] for u in us), us[0].b.shape[0], us[0].a.shape[1]) for us in parts.values())
    if rank > largest:
        raise UsageError(
            f"--rank: {rank} is larger than the largest rank of the sum ({largest}). Use {largest} or less."
        )
    truncated, loss = truncated_sums(parts, weights, lambda total: min(rank, len(total.sigma)), orthonormal)
    return truncated, f"singular value decomposition of the weighted sum, truncated to rank {rank}; {loss}"


# ---------------------------------------------------------------------------------------------------------------- heads


def _heads(
    sources: Sequence[Source], options: Combination, template: Source, names: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the result's head by PEFT's names, and a clause about the head.

    Args:
        sources: The adapters.
        options: Options of the command.
        template: The source of the result's class names.
        names: For each head of the task, its names in PEFT's format.

    Raises:
        UsageError: If the heads cannot be averaged, because class names, tensors or weights do not fit.
    """
    if options.heads == "drop":
        return {}, "dropped"
    if isinstance(options.heads, int):
        return _peft_heads(template, names), f"of {short_path(template.run)}"
    source_heads = [_peft_heads(source, names) for source in sources]
    if not any(source_heads):
        return {}, "none"
    reference = source_heads[sources.index(template)]
    for source, head in zip(sources, source_heads, strict=True):
        shapes = [{key: tuple(tensor.shape) for key, tensor in h.items()} for h in (reference, head)]
        if shapes[0].keys() != shapes[1].keys():
            tensor_name = min(shapes[0].keys() ^ shapes[1].keys())
            raise UsageError(
                f"RUN: only one of {template.name} and {source.name} has the tensor {tensor_name!r:.120}. {ADVICE}"
            )
        if source.labels is None:
            raise UsageError(
                f"RUN: {source.name} has no {LABELS}, so the order of the classes in its head is unknown. Write the "
                f"class names into this file, as a JSON list ([] for a regression). {ADVICE}"
            )
        if sorted(source.labels) != sorted(template.labels or []):
            raise UsageError(
                f"RUN: the heads have different classes: {_listed(template.labels or [])} in {template.name}, and "
                f"{_listed(source.labels)} in {source.name}. {ADVICE}"
            )
        if shapes[0] != shapes[1]:
            raise UsageError(f"RUN: the heads of {template.name} and {source.name} differ in shape. {ADVICE}")
    total = sum(options.weights)
    if abs(total) < 1e-9 * max(map(abs, options.weights)):
        raise UsageError(f"--weights: the sum is 0, so the heads have no weighted average. {ADVICE}")
    ordered = [
        _reordered(head, source, template.labels or []) for head, source in zip(source_heads, sources, strict=True)
    ]
    weights = [weight / total for weight in options.weights]
    average = {key: weighted_sum([head[key] for head in ordered], weights).to(t.dtype) for key, t in reference.items()}
    return average, "weighted average by class name, with weights that sum to 1"


def _peft_heads(source: Source, names: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the tensors of a source's head by PEFT's names."""
    if not source.is_checkpoint:
        return source.others
    return {
        f"{peft_name}.{key.removeprefix(f'{head}.')}": tensor
        for head, peft_names in names.items()
        for peft_name in peft_names
        for key, tensor in source.others.items()
        if key.startswith(f"{head}.")
    }


def _reordered(head: dict[str, Tensor], source: Source, labels: Sequence[str]) -> dict[str, Tensor]:
    """Return a head with its rows in the order of the given class names.

    Raises:
        UsageError: If the order differs, and two classes have one name or several layers could be the output layer.
    """
    assert source.labels is not None
    if list(source.labels) == list(labels):
        return head
    if len(set(labels)) < len(labels):
        raise UsageError(f"RUN: {source.name} has two classes with the same name. {ADVICE}")
    count = len(labels)
    if any(tensor.ndim == 2 and tensor.shape[1] == count for tensor in head.values()):
        raise UsageError(
            f"RUN: {source.name} has its classes in a different order, and its head has a layer with {count} inputs, "
            f"so the output layer is ambiguous. {ADVICE}"
        )
    order = [source.labels.index(label) for label in labels]
    return {key: t[order] if t.ndim and t.shape[0] == count else t for key, t in head.items()}


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(f"{label!r:.40}" for label in labels[:5]) + (", …" if len(labels) > 5 else "")


# -------------------------------------------------------------------------------------------------------------- writing


def _by_module(heads: Mapping[str, Tensor], modules: Sequence[str]) -> Heads:
    """Group the tensors of heads by their module.

    Args:
        heads: Tensors by name.
        modules: Names in PEFT's `modules_to_save`: full names, or ends of names.

    Raises:
        UsageError: If a tensor belongs to none of the modules.
    """
    grouped: Heads = {}
    ends = "|".join(re.escape(name) for name in modules)
    for key, tensor in heads.items():
        match = re.fullmatch(rf"((?:.*\.)?(?:{ends}))\.(.+)", key) if modules else None
        if match is None:
            raise UsageError(
                f"RUN: {key!r:.120} cannot be combined: the tensor is neither a LoRA factor, nor in modules_to_save of "
                f"{CONFIG}. Save the adapter without this tensor."
            )
        grouped.setdefault(match[1], {})[match[2]] = tensor
    return grouped


def _without_backbone(
    template: Source, updates: Mapping[str, Update], heads: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the contents of PEFT's two files for updates of an unknown backbone.

    `target_modules` lists full names, since a shorter name could match other layers of the backbone.
    """
    _, tensors = read_peft_files(template.run.source)
    skeleton: nn.Module = peft_skeleton(
        template.run.source, {k: t for k, t in tensors.items() if PEFT_NAME.fullmatch(k)}
    )
    targets = [f"regex:{re.escape(name)}" for name in updates]
    config = given_config(AdapterConfig(targets=targets, dropout=template.run.adapter.dropout), updates)
    projections = attach(skeleton, config)
    saved = template.content.get("modules_to_save")
    grouped = _by_module(heads, [str(name) for name in saved] if isinstance(saved, list) else [])
    values = (template.content.get(key) for key in ("task_type", "base_model_name_or_path"))
    task, base = (value if isinstance(value, str) else None for value in values)
    content, written = to_peft(skeleton, config, factor_state(projections, updates), grouped, task, base)
    return content | {"target_modules": sorted({p.layer for p in projections})}, written
