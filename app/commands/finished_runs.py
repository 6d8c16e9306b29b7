"""Read finished runs for analyses: factors, configuration and spectra, without the frozen backbone."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from app.config.yaml_files import read_yaml
from app.export.load_run import find_checkpoint, load_module
from app.export.low_rank import given_config, stack_links
from app.run.checkpoint_io import check_contents, read_checkpoint, run_of_checkpoint, saved_configuration
from app.run.failures import bad_input
from app.run.run_directory import ADAPTER
from app.run.spectrum_file import FILE as SPECTRUM
from app.run.spectrum_file import DamagedSpectra
from app.run.spectrum_file import read_spectra as read_rows
from datamodules.atomic import atomic_write
from datamodules.errors import CheckpointError, UsageError, counted
from modules.adapters import AdapterConfig, AdapterError, Projection
from modules.adapters.chain import check_links
from modules.adapters.init import init_factor
from modules.adapters.roles import LAYERS, block_of, find_projections, fused_layers
from modules.analysis.combination import SIDES, Side, Update
from modules.formats.peft import CONFIG, KEY, PREFIX, read_peft_files
from modules.formats.peft_reading import from_peft
from modules.training.checkpoints import CHAIN

if TYPE_CHECKING:
    import pandas as pd

    from app.reports.report import Report

_log = logging.getLogger(__name__)
STATE_NAME = re.compile(r"backbone\.(.+)\.adapters\.(\w+)\.([AB])")
PEFT_NAME = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight")
BACKBONE_KEYS = ("backbone", "weights", "backbone_args", "backbone_dtype", "image_size")


@dataclass
class FinishedRun:
    """A run with adapters.

    Args:
        source: The checkpoint that was read, or a directory in PEFT's format.
        directory: The run directory; None if the source is in no run directory.
        step: Optimizer steps of the checkpoint; None for PEFT's format.
        adapter: Configuration of the adapters.
        projections: Adapted projections by name, in the order of the backbone's modules.
        updates: The updates s·B·A by the name of the projection, in the same order, float32.
        digest: Digest of the frozen weights; None if the source has none.
        model: Arguments of the model's class.
        data: Arguments of the data module's class, with its `class_path`.
        seed: `seed_everything`; None if it is unknown.
        label: Name in figures; `read_runs` sets it.
    """

    source: Path
    directory: Path | None
    step: int | None
    adapter: AdapterConfig
    projections: dict[str, Projection]
    updates: dict[str, Update]
    digest: str | None
    model: dict[str, Any]
    data: dict[str, Any]
    seed: int | None
    label: str = field(default="")

    def columns(self, factor: Side, name: str) -> Tensor:
        """Return the matrix whose column space is compared, (d, r): B, or Aᵀ for the row space of A."""
        return self.updates[name].a.T if factor == "A" else self.updates[name].b

    def trains(self, factor: Side) -> bool:
        """Return True if a factor was trained."""
        return self.adapter.trains_a if factor == "A" else self.adapter.trains_b

    def init(self, factor: Side) -> str:
        """Return the initialiser of a factor."""
        return self.adapter.init_a if factor == "A" else self.adapter.init_b

    def start(self, factor: Side) -> tuple[Any, ...] | None:
        """Return everything that determines the initial values of a factor over a given backbone; None if unknown.

        The vectors of `svd`, `svd_minor` and `signs` at a smaller rank are also vectors of a larger rank.
        """
        init, adapter = self.init(factor), self.adapter
        if init == "given":
            return None
        if init in ("zero", "svd", "svd_minor"):
            return (init,)
        if init == "signs":
            return (init, adapter.seed)
        return (init, adapter.seed, adapter.rank, *adapter.rank_pattern.items())

    def drawn_start(self, factor: Side, name: str) -> Tensor | None:
        """Draw the initial values of a factor of a projection again; None unless the values were drawn at random."""
        init = self.init(factor)
        if init in ("zero", "given", "svd", "svd_minor"):
            return None
        update = self.updates[name]
        weight = torch.empty(update.b.shape[0], update.a.shape[1], device="meta")  # only the shape is used
        drawn = init_factor(init, factor, weight, update.a.shape[0], self.adapter.seed, name)  # type: ignore[arg-type]
        return drawn.T if factor == "A" else drawn

    @property
    def data_key(self) -> tuple[str, str]:
        """Return path and task of the data. Runs with the same key count as trained on the same data."""
        path = str(self.data.get("path"))
        place = os.path.realpath(path) if os.path.exists(path) else path
        return place, str(self.data.get("task"))

    @property
    def data_name(self) -> str:
        """Short name of the data."""
        return str(self.data.get("task") or Path(str(self.data.get("path", "unknown data"))).name)

    @property
    def variant(self) -> tuple[str, str, str]:
        """The trained factor, and the initialisers of A and B."""
        return self.adapter.train, self.adapter.init_a, self.adapter.init_b

    @property
    def rank(self) -> str:
        """Adapter rank of the projections; a range if the ranks differ."""
        ranks = sorted({update.a.shape[0] for update in self.updates.values()})
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


# -------------------------------------------------------------------------------------------------------------- reading


def read_runs(names: Sequence[str], least: int, most: int | None = None) -> list[FinishedRun]:
    """Read runs, and log which checkpoint of each is used and what is skipped.

    Args:
        names: Each a run directory, a checkpoint, or a directory in PEFT's format.
        least: Number of runs with adapters that the command needs.
        most: Largest number of runs that the command can show; None for no limit.

    Raises:
        UsageError: If fewer than `least` or more than `most` runs with adapters are left.
        CheckpointError: If a run cannot be read.
    """
    runs: list[FinishedRun] = []
    for name in names:
        run = read_run(name)
        if run is None:
            continue
        if any(other.source.resolve() == run.source.resolve() for other in runs):
            _log.warning(f"RUN: {name} is given twice. The run is used once.")
            continue
        runs.append(run)
    if len(runs) < least:
        raise UsageError(
            f"RUN: {counted(len(runs), 'different run')} with adapters in {counted(len(names), 'given path')}, and "
            f"{least} or more are needed. Give runs with model.tuning: adapter."
        )
    if most is not None and len(runs) > most:
        raise UsageError(f"RUN: {len(runs)} runs do not fit in one figure. Give {most} or fewer.")
    for number, (run, label) in enumerate(zip(runs, _labels(runs), strict=True), 1):
        run.label = f"{number}: {label}"
        step = "" if run.step is None else f", step {run.step}"
        _log.info(f"Run {run.label} is {run.source}{step}.")
    return runs


def read_run(name: str) -> FinishedRun | None:
    """Read one run. For a run without adapters, warn and return None.

    Raises:
        CheckpointError: If the run is missing or cannot be read.
    """
    path = Path(name)
    if (path / CONFIG).is_file():
        return _from_peft_folder(path)
    try:
        checkpoint = find_checkpoint(name)
    except CheckpointError as error:
        if not (path / ADAPTER / CONFIG).is_file():
            raise
        _log.warning(f"{error} The run's {ADAPTER}/ is used instead.")
        return _from_peft_folder(path / ADAPTER)
    return _from_checkpoint(checkpoint)


def _from_checkpoint(path: Path) -> FinishedRun | None:
    content = read_checkpoint(path)
    check_contents(path, content, trains=False)
    saved = saved_configuration(content)
    model, data = (saved.get(section, {"class_path": None, "init_args": {}}) for section in ("model", "data"))
    tuning = model["init_args"].get("tuning")
    if tuning != "adapter":
        _log.warning(f"RUN: {path} has model.tuning: {tuning}, so it has no adapters. The run is skipped.")
        return None
    directory = run_of_checkpoint(path)
    adapter = _adapter_config(path, model["init_args"].get("adapter"))
    projections, updates = _read_updates(path, content["state_dict"], adapter)
    if CHAIN in content:
        updates = _whole_chain(path, content, adapter, updates)
        adapter = given_config(adapter, updates)
    return FinishedRun(
        source=path,
        directory=directory,
        step=int(content["global_step"]),
        adapter=adapter,
        projections=projections,
        updates=updates,
        digest=content.get("frozen_digest"),
        model=model["init_args"],
        data={**data["init_args"], "class_path": data["class_path"]},
        seed=_run_configuration(directory).get("seed_everything"),
    )


def _whole_chain(
    path: Path, content: Mapping[str, Any], adapter: AdapterConfig, last: dict[str, Update]
) -> dict[str, Update]:
    """Return the stacked factors of all links of a chain, with the rank r times the links.

    Raises:
        CheckpointError: If a link does not have the factors of the last link.
    """
    names = {name: tensor for name, tensor in content["state_dict"].items() if STATE_NAME.fullmatch(name)}
    try:
        links = check_links(content[CHAIN], {name.removeprefix("backbone."): t for name, t in names.items()})
    except AdapterError as error:
        raise CheckpointError(f"RUN: {path}: {error}") from error
    states = [{f"backbone.{name}": factor for name, factor in link.items()} for link in links]
    parts = [*(_read_updates(path, state, adapter)[1] for state in states), last]
    _log.info(f"RUN: {path} is a chain. The factors of its {len(parts)} links are stacked.")
    return {name: stack_links([part[name] for part in parts]) for name in last}


def _from_peft_folder(folder: Path) -> FinishedRun:
    """Read a directory in PEFT's format, and the config.yaml of its run for the keys that PEFT's files lack."""
    inside = (folder.absolute().parent / "config.yaml").is_file() and folder.absolute().name == ADAPTER
    directory = folder.absolute().parent if inside else None
    configuration = _run_configuration(directory)
    model, data = (configuration.get(section) or {} for section in ("model", "data"))
    saved = (model.get("init_args") or {}).get("adapter")
    adapter = _adapter_config(folder, saved) if saved else AdapterConfig(train="both", init_a="given", init_b="given")
    if saved is None:
        _log.warning(
            f"RUN: {folder} does not say which factor was frozen. spectrum and similarity take both factors as "
            "trained; combine and bank compare A."
        )
    try:
        content, tensors = read_peft_files(folder)
        tensors = {key: tensor for key, tensor in tensors.items() if PEFT_NAME.fullmatch(key)}
        loaded = from_peft(peft_skeleton(folder, tensors), content, tensors, adapter)
    except AdapterError as error:
        raise CheckpointError(f"RUN: {str(error).removeprefix(f'{KEY}: ')}") from error
    state = {f"backbone.{key}": tensor for key, tensor in loaded.factors.items()}
    projections, updates = _read_updates(folder, state, loaded.config)
    return FinishedRun(
        source=folder,
        directory=directory,
        step=None,
        adapter=adapter if saved else loaded.config,
        projections=projections,
        updates=updates,
        digest=None,
        model=model.get("init_args") or {},
        data={**(data.get("init_args") or {}), "class_path": data.get("class_path")},
        seed=configuration.get("seed_everything"),
    )


def _run_configuration(directory: Path | None) -> dict[str, Any]:
    """Return the content of a run's config.yaml; empty if there is none."""
    path = directory / "config.yaml" if directory else None
    return read_yaml(str(path)) if path is not None and path.is_file() else {}


def _adapter_config(path: Path, values: Any) -> AdapterConfig:
    try:
        return AdapterConfig(**values)
    except (TypeError, AdapterError) as error:
        raise CheckpointError(f"RUN: {path} has no usable model.adapter ({error}). Use another checkpoint.") from error


def _read_updates(
    path: Path, state: Mapping[str, Tensor], adapter: AdapterConfig
) -> tuple[dict[str, Projection], dict[str, Update]]:
    """Return the adapted projections and their updates in a state, by the name of the projection.

    Raises:
        CheckpointError: If there are no factors, the shapes of A and B do not match, or an adapter rank contradicts the
            configuration.
    """
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := STATE_NAME.fullmatch(name):
            pairs.setdefault((match[1], match[2]), {})[match[3]] = tensor.float()
    projections, updates = {}, {}
    for (layer, role), pair in pairs.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"RUN: {path} has no A (r, d_in) and B (d_out, r) of {layer}. Use another checkpoint."
            )
        projection = Projection(layer, role, 0, b.shape[0], _is_fused(layer, role))
        if adapter.rank_of(projection) != a.shape[0]:
            raise CheckpointError(
                f"RUN: {path} has rank {a.shape[0]} for {projection.name}, and its model.adapter says "
                f"{adapter.rank_of(projection)}. Use another checkpoint."
            )
        projections[projection.name] = projection
        updates[projection.name] = Update(a, b, adapter.scale_of(projection))
    if not updates:
        raise CheckpointError(f"RUN: {path} has no factors of adapters. Use another checkpoint.")
    return projections, updates


def _is_fused(layer: str, role: str) -> bool:
    """Return True if a role is one of several parts of a layer."""
    roles = next((roles for end, roles in LAYERS if re.fullmatch(rf"(?:.*\.)?{end}", layer)), ())
    return len(roles) > 1 and role in roles


def peft_skeleton(folder: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model without weights that has only the adapted layers, with their names and shapes."""
    root = nn.Module()
    for layer in dict.fromkeys(match[1] for name in tensors if (match := PEFT_NAME.fullmatch(name))):
        a, b = (tensors.get(f"{PREFIX}{layer}.lora_{factor}.weight") for factor in SIDES)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2:
            raise CheckpointError(f"RUN: {folder} lacks lora_A or lora_B of {layer!r:.120}. Export the files again.")
        *parents, last = layer.split(".")
        module = root
        try:
            for part in parents:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.add_module(last, nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta"))
        except (KeyError, AttributeError) as error:
            raise CheckpointError(
                f"RUN: {folder} has {layer!r:.120}, which is no name of a layer. Export the files again."
            ) from error
    return root


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """Return short names: the variant, and the other facts in which the runs differ."""
    facts = [
        {
            "data": run.data_name,
            "start": f"A {run.adapter.init_a}, B {run.adapter.init_b}",
            "rank": f"rank {run.rank}",
            "adapter seed": f"adapter seed {run.adapter.seed}",
            "seed": f"seed {run.seed}",
        }
        for run in runs
    ]
    # in most comparisons, the trained factor determines how both factors start
    starts_vary = any(
        run.adapter.train == other.adapter.train and run.variant != other.variant for run in runs for other in runs
    )
    varying = [
        key for key in facts[0] if (starts_vary if key == "start" else len({of_run[key] for of_run in facts}) > 1)
    ]
    labels = [
        ", ".join([run.adapter.train, *(of_run[key] for key in varying)])
        for run, of_run in zip(runs, facts, strict=True)
    ]
    repeated = Counter(labels)
    return [
        label if repeated[label] == 1 else f"{label}, {short_path(run)}"
        for label, run in zip(labels, runs, strict=True)
    ]


def short_path(run: FinishedRun) -> str:
    """Return the last two parts of a run's path."""
    return "/".join((run.directory or run.source).absolute().parts[-2:])


# ----------------------------------------------------------------------------------------------------------- comparison


def check_same_backbone(runs: Sequence[FinishedRun]) -> None:
    """Check that all runs were trained over the same frozen weights.

    Raises:
        UsageError: If the backbones differ. The message lists the differences.
    """
    first = runs[0]
    for run in runs[1:]:
        differing = _differing_shape(first, run)
        if differing is None and (first.digest is None or run.digest is None or first.digest == run.digest):
            continue
        keys = [
            f"model.{key} is {first.model.get(key)} and {run.model.get(key)}"
            for key in BACKBONE_KEYS
            if first.model.get(key) != run.model.get(key)
        ]
        if first.model.get("weights") == "none" and first.seed != run.seed:
            keys.append(f"seed_everything, which draws the weights, is {first.seed} and {run.seed}")
        if differing:
            keys.append(differing)
        if not keys:
            keys.append("the keys are the same, and the digests of the frozen weights differ, so a file has changed")
        raise UsageError(
            f"RUN: {first.source} and {run.source} were trained over different backbones: {'; '.join(keys)}. Give "
            "runs over one backbone."
        )
    if unknown := [str(run.source) for run in runs if run.digest is None]:
        _log.warning(
            f"{', '.join(unknown)}: there is no digest of the frozen weights, as in all files of PEFT. Only names and "
            "shapes of the projections were compared."
        )


def _differing_shape(first: FinishedRun, second: FinishedRun) -> str | None:
    for name in first.updates.keys() & second.updates.keys():
        shapes = [(run.updates[name].b.shape[0], run.updates[name].a.shape[1]) for run in (first, second)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0][0]} × {shapes[0][1]} and {shapes[1][0]} × {shapes[1][1]}"
    return None


# -------------------------------------------------------------------------------------------------------------- weights


def frozen_weights(run: FinishedRun, names: Sequence[str], labels: Sequence[str]) -> dict[str, Tensor] | None:
    """Return W of projections of a run's backbone. If the backbone cannot be built, warn and return None.

    Args:
        run: The run.
        names: Names of projections.
        labels: Labels of all runs over this backbone, for the warning.

    Returns:
        W by the name of the projection, (d_out, d_in).
    """
    if run.step is None:
        reason = f"{run.source} is no checkpoint, so its backbone is not known"
    else:
        try:
            module = load_module(run.source, {})
        except Exception as error:
            cause = bad_input(error)
            if cause is None:
                raise
            reason = str(cause)
        else:
            parts = find_projections(module.backbone)
            projections = {p.name: p for p in [*parts, *fused_layers(parts)]}
            return {name: _weight(module.backbone, projections[name]) for name in names}
    _log.warning(
        f"The frozen weights of run {', '.join(labels)} cannot be loaded, so intruder dimensions are left out: {reason}"
    )
    return None


def _weight(backbone: nn.Module, projection: Projection) -> Tensor:
    return cast(nn.Linear, backbone.get_submodule(projection.layer)).weight.detach()[projection.rows]


# -------------------------------------------------------------------------------------------------------------- spectra


def read_spectra(run: FinishedRun) -> list[dict[str, Any]]:
    """Return the rows of a run's spectrum.parquet.

    For a chain of adapters, BA is the sum over all links, and A and B are of the current link.

    Returns:
        One row for each step, projection and factor: `step`, `projection`, `role`, `factor` (A, B, or BA without the
        scale s), `singular_values` and `relative_norm`. Empty, with a warning, if there is no usable file.
    """
    path = None if run.directory is None else run.directory / SPECTRUM
    if path is None or not path.is_file():
        place = f"{run.source} is in no run directory" if path is None else f"{path} does not exist"
        _log.warning(f"{place}. Spectra over training are left out for this run: its checkpoint alone is shown.")
        return []
    try:
        rows = read_rows(path)
    except DamagedSpectra as error:
        _log.warning(f"{error} The run's checkpoint alone is shown.")
        return []
    usable = [row for row in rows if _is_usable(row)]
    if len(usable) < len(rows):
        _log.warning(f"{path}: skipped {counted(len(rows) - len(usable), 'damaged row')} of {len(rows):,}.")
    sums = {(row["step"], row["projection"]) for row in usable if row["factor"] == "sum"}
    if sums:
        _log.info(f"{path}: the run is a chain. Over training, A and B are of the current link, and BA of all links.")
    return [
        {**row, "factor": "BA" if row["factor"] == "sum" else row["factor"]}
        for row in usable
        if row["factor"] != "BA" or (row["step"], row["projection"]) not in sums
    ]


def _is_usable(row: Mapping[str, Any]) -> bool:
    values = row["singular_values"]
    complete = all(row[key] is not None for key in ("step", "projection", "role", "factor"))
    return complete and bool(values) and all(v is not None and math.isfinite(v) and v >= 0 for v in values)


# -------------------------------------------------------------------------------------------------------------- results


def runs_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Return one row a run, with what was trained, on which data, and from which seeds."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "run": run.label.partition(":")[0],
                "path": str(run.source),
                "step": run.step,
                "data": run.data_name,
                "trained": run.adapter.train,
                "rank": run.rank,
                "start of A": run.adapter.init_a,
                "start of B": run.adapter.init_b,
                "adapter seed": run.adapter.seed,
                "seed": run.seed,
                "learning rate": run.model.get("learning_rate"),
            }
            for run in runs
        ]
    ).astype({"step": "Int64", "seed": "Int64"})


def shown_runs(runs: Sequence[FinishedRun], table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of runs for a page, with the shortened path as last column and without empty columns."""
    shown = table.drop(columns=["path", "step"]).replace("", None).dropna(axis="columns", how="all")
    return shown.assign(path=[short_path(run) for run in runs])


def block_names(names: Sequence[str]) -> dict[str, str]:
    """Return the block of each projection, by name, in the order of the names.

    Args:
        names: Names of projections or layers.

    Returns:
        The number of the block, after the name of its stack if there are several stacks; `–` outside of all blocks.
    """
    blocks = {name: block_of(name) for name in names}
    stacks = {block[0] for block in blocks.values() if block is not None}
    return {
        name: "–" if block is None else f"{block[0]} {block[1]}" if len(stacks) > 1 else str(block[1])
        for name, block in blocks.items()
    }


def write_results(output: Path, report: Report, tables: Mapping[str, pd.DataFrame], file_names: Sequence[str]) -> Path:
    """Write the page, its pictures and the tables. The files of an earlier report are logged.

    Args:
        output: Directory; made if missing.
        report: The page.
        tables: Tables by the stem of their Parquet file.
        file_names: Names of all files that the command may write. If the new report lacks a file of these names, an
            earlier file is removed.

    Returns:
        Path of the page.

    Raises:
        WriteError: If a file cannot be written.
    """
    earlier = {name: (output / name).stat().st_ino for name in file_names if (output / name).is_file()}
    if earlier:
        _log.info(f"{output} holds an earlier report. Its files are replaced or removed: {', '.join(earlier)}.")
    page = report.write(output)
    for name, frame in tables.items():
        with atomic_write(output / f"{name}.parquet") as file:
            frame.to_parquet(file, index=False)
    for name, inode in earlier.items():
        if (output / name).stat().st_ino == inode:  # not replaced, so this report has no such file
            (output / name).unlink()
    return page
