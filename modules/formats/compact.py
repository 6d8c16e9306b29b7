"""Compact files: the trained factors, and a recipe to redraw the frozen factors.

A compact directory holds one file, `adapter_compact.safetensors`. The tensors of the file are

- `adapter.<projection>.A` and `.B`: the stored factors, float32 or bfloat16;
- `head.<name>`: tensors of fully trained modules, by their names in the task's module.

The metadata key `recipe` holds a JSON object:

- `version`: 1;
- `adapter`: the keys of `AdapterConfig`. `rank_pattern` and `alpha_pattern` have one key for each projection whose
  value is not the default (`modules.adapters.patterns.exact_key`), and are missing if they are empty;
- `redrawn`: `{"shape": [rows, columns], "sha256": …}` for each projection whose frozen factor is not stored. The digest
  is of the factor's float32 bytes, little-endian, row by row;
- `frozen_fingerprint`: fingerprint of the backbone (`modules.adapters.state`); may be missing.

A frozen factor is omitted only if its initialiser is `signs`, which is reproducible, and the redrawn factor is
bit-identical. Loading redraws the factor and rejects another digest. All other factors are stored, so that every
compact file can be loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.adapters.config import AdapterConfig, AdapterError, Projection
from modules.adapters.init import Factor, sign_factor
from modules.adapters.linear import check_rank
from modules.adapters.patterns import exact_key, exact_patterns
from modules.adapters.roles import ROLES, find_projections, fused_layers, select
from modules.adapters.state import adapted_projections, frozen_fingerprint
from modules.formats.peft import KEY

FILE_NAME = "adapter_compact.safetensors"
VERSION = 1
DTYPES = (torch.float32, torch.bfloat16)
_AGAIN = "Get the file again, or export the run again (--format peft stores both factors)."


class Compact(NamedTuple):
    """Content of a compact file.

    Args:
        adapter: The adapter's configuration.
        factors: Both factors of every adapter by the names of `adapter_state`, float32.
        heads: Tensors of fully trained modules by the names of the task's module; floats are float32.
        fingerprint: Fingerprint of the frozen weights in training; None if the file has none.
    """

    adapter: AdapterConfig
    factors: dict[str, Tensor]
    heads: dict[str, Tensor]
    fingerprint: str | None


def is_compact(path: Path) -> bool:
    """Return True if a directory holds a compact file."""
    return (path / FILE_NAME).is_file()


def factor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a factor's float32 bytes, little-endian, row by row."""
    return hashlib.sha256(tensor.detach().cpu().numpy().astype("<f4").tobytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


def save_compact(
    folder: Path, model: nn.Module, config: AdapterConfig, heads: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """Write a model's adapters as a compact file.

    Args:
        folder: An existing directory.
        model: A model with adapters.
        config: Configuration of the attached adapters.
        heads: Tensors of fully trained modules by name.
        dtype: Dtype in the file, float32 or bfloat16. A redrawn factor is always float32.

    Returns:
        Names of the projections whose frozen factor is not stored.

    Raises:
        AdapterError: If the model has no adapters, or the dtype is not supported.
    """
    projections = adapted_projections(model)
    if not projections:
        raise AdapterError("The model has no adapters to write. Attach adapters first.")
    if dtype not in DTYPES:
        raise AdapterError(f"A compact file cannot store {dtype}. Use float32 or bfloat16.")
    tensors = {f"head.{name}": tensor for name, tensor in heads.items()}
    redrawn: dict[str, dict[str, Any]] = {}
    for name, (_, factors) in projections.items():
        for factor, parameter in factors.named_factors(trained=True).items():
            tensors[f"adapter.{name}.{factor}"] = parameter
        for factor, parameter in factors.named_factors(trained=False).items():
            digest = factor_digest(parameter)
            init = config.init_a if factor == "A" else config.init_b
            if init == "signs" and digest == factor_digest(_redraw(config, name, parameter.shape)):
                redrawn[name] = {"shape": list(parameter.shape), "sha256": digest}
            else:
                tensors[f"adapter.{name}.{factor}"] = parameter
    fingerprint = frozen_fingerprint(model)
    parts = [factors.projection for _, factors in projections.values()]
    recipe = {
        "version": VERSION,
        "adapter": _recipe_keys(config, parts),
        "redrawn": redrawn,
        "frozen_fingerprint": fingerprint,
    }
    stored = {  # Copies, since safetensors rejects tensors that share memory.
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / FILE_NAME, metadata={"recipe": json.dumps(recipe, separators=(",", ":"))})
    return list(redrawn)


def _recipe_keys(config: AdapterConfig, projections: list[Projection]) -> dict[str, Any]:
    """Return the configuration as JSON values, in a form that older versions can read.

    Empty patterns are left out. The chain is left out too, since a file has one adapter.
    """
    patterns = {
        "rank_pattern": exact_patterns({p.name: config.rank_of(p) for p in projections}, config.rank),
        "alpha_pattern": exact_patterns({p.name: config.alpha_of(p) for p in projections}, config.alpha),
    }
    keys = {key: value for key, value in (asdict(config) | patterns).items() if key not in patterns or value}
    del keys["chain"]
    return keys


def _redraw(config: AdapterConfig, name: str, shape: Collection[int]) -> Tensor:
    """Draw the frozen factor of a projection for a configuration with `signs`."""
    factor: Factor = "B" if config.train == "A" else "A"
    return sign_factor(factor, max(shape), min(shape), config.seed, name)


# -------------------------------------------------------------------------------------------------------------- loading


def load_compact(path: Path, backbone: nn.Module, exclude: Collection[str] = ()) -> Compact:
    """Read a compact directory for a model. The file is not trusted.

    Names and shapes of the factors are compared with the model before a tensor is read or drawn. A file therefore
    cannot exhaust the memory with factors to be redrawn.
    Patterns among the targets are replaced by names and never matched, since matching could take forever.

    Args:
        path: The directory.
        backbone: The model to adapt, with or without adapters; the model is not changed.
        exclude: Names of modules that take no adapter, as for `attach`.

    Raises:
        AdapterError: If the file is damaged, is no compact file or does not fit the model, or a redrawn factor has
            another digest.
    """
    file = f"{KEY}: {path / FILE_NAME}"
    projections = find_projections(backbone, exclude)
    try:
        with safe_open(path / FILE_NAME, framework="pt") as opened:
            config, redrawn, fingerprint = _read_recipe(file, (opened.metadata() or {}).get("recipe", ""))
            stored = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            layers = _check_factors(file, backbone, projections, config, stored, redrawn)
            tensors = {name: _read_tensor(file, name, opened.get_tensor(name)) for name in stored}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} cannot be read: {error}. {_AGAIN}") from error
    for name, entry in redrawn.items():
        factor = _redraw(config, name, entry["shape"])
        if factor_digest(factor) != entry["sha256"]:
            raise AdapterError(
                f"{file}: the frozen factor of {name}, redrawn with signs and seed {config.seed}, has another digest "
                f"than in the file. {_AGAIN}"
            )
        tensors[f"adapter.{name}.{'B' if config.train == 'A' else 'A'}"] = factor
    targets, last_blocks = _targets(file, config, projections, list(layers))
    factors = {
        f"{p.layer}.adapters.{p.role}.{factor}": tensors.pop(f"adapter.{name}.{factor}")
        for name, p in layers.items()
        for factor in "AB"
    }
    config = replace(config, targets=targets, layers=last_blocks)
    heads = {name.removeprefix("head."): tensor for name, tensor in tensors.items()}
    return Compact(config, factors, heads, fingerprint)


def _read_recipe(file: str, text: str) -> tuple[AdapterConfig, dict[str, Any], str | None]:
    """Validate a file's recipe, and return its configuration, redrawn factors and fingerprint."""
    problem = f"{file} is no compact file of this version"
    try:
        recipe = json.loads(text)
        if recipe["version"] != VERSION:
            raise ValueError(f"version {recipe['version']!r:.20} may need a newer program")
        keys, redrawn, fingerprint = recipe["adapter"], recipe["redrawn"], recipe.get("frozen_fingerprint")
        known = {field.name for field in fields(AdapterConfig)} - {"chain"}
        numbers = [type(keys[key]) in (int, float) for key in ("alpha", "dropout")]
        targets = [isinstance(target, str) for target in keys["targets"]]
        entries = [
            set(entry) == {"shape", "sha256"}
            and isinstance(entry["sha256"], str)
            and [type(size) for size in entry["shape"]] == [int, int]
            for entry in redrawn.values()
        ]
        # Older files have no `layers` and no patterns.
        has_keys = known - {"layers", "rank_pattern", "alpha_pattern"} <= set(keys) <= known
        fits = has_keys and type(keys["seed"]) is int and isinstance(keys["targets"], list)
        if not (fits and isinstance(fingerprint, str | None) and all(numbers + targets + entries)):
            raise TypeError("the recipe has unknown keys or values")
        config = AdapterConfig(**keys)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error!s:.500}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{problem} ({type(error).__name__}: {error}). {_AGAIN}") from error
    frozen = {"A": config.init_b, "B": config.init_a}.get(config.train)
    if redrawn and frozen != "signs":
        raise AdapterError(f"{file}: a frozen factor with initialiser {frozen} cannot be redrawn. {_AGAIN}")
    return config, redrawn, fingerprint


def _check_factors(
    file: str,
    backbone: nn.Module,
    projections: list[Projection],
    config: AdapterConfig,
    stored: Mapping[str, tuple[int, ...]],
    redrawn: Mapping[str, Any],
) -> dict[str, Projection]:
    """Check the names and shapes of a file's factors, and return the adapted projections by name.

    Raises:
        AdapterError: If factors are missing, unexpected or of another shape, or a pattern names no projection.
    """
    frozen = "B" if config.train == "A" else "A"
    shapes = {name: shape for name, shape in stored.items() if not name.startswith("head.")}
    duplicates = [name for name in redrawn if f"adapter.{name}.{frozen}" in shapes]
    shapes |= {f"adapter.{name}.{frozen}": tuple(entry["shape"]) for name, entry in redrawn.items()}
    layers = {
        p.name: p
        for p in [*projections, *fused_layers(projections)]
        if any(f"adapter.{p.name}.{factor}" in shapes for factor in "AB")
    }
    exact = {exact_key(name) for name in layers}
    if others := [key for key in {**config.rank_pattern, **config.alpha_pattern} if key not in exact]:
        # The regular expressions of an untrusted file could take forever to match.
        raise AdapterError(f"{file}: a pattern names no projection of the file ({_listed(others)}). {_AGAIN}")
    expected: dict[str, tuple[int, ...]] = {}
    for name, p in layers.items():
        d_in = cast(nn.Linear, backbone.get_submodule(p.layer)).in_features
        rank = check_rank(config, p, d_in)
        expected |= {f"adapter.{name}.A": (rank, d_in), f"adapter.{name}.B": (p.stop - p.start, rank)}
    kinds = {
        "unexpected": [name for name in shapes if name not in expected],
        "missing": [name for name in expected if name not in shapes],
        "both stored and to be drawn": duplicates,
        "of another shape": [
            f"{name} {shapes[name]}, not {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    if problems := [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]:
        raise AdapterError(f"{file} does not fit this model: {'; '.join(problems)}. Use the backbone of the training.")
    if not layers:
        raise AdapterError(f"{file} has no adapters. {_AGAIN}")
    return layers


def _targets(
    file: str, config: AdapterConfig, projections: list[Projection], names: list[str]
) -> tuple[list[str], int | None]:
    """Return targets and `layers` that select the named projections.

    The file's targets are returned if they are roles and select exactly the named projections. Otherwise the targets
    are the names of the projections.

    Raises:
        AdapterError: If the file adapts both a fused layer and its parts.
    """
    by_name = [f"regex:{re.escape(name)}" for name in names]
    by_role = {*ROLES, "attention", "all"}.issuperset(config.targets)
    in_file = (list(config.targets), config.layers)
    for targets, layers in (in_file, (by_name, None)) if by_role else ((by_name, None),):
        with suppress(AdapterError):  # The model may lack a role or have fewer blocks.
            if {p.name for p in select(projections, targets, layers)} == set(names):
                return targets, layers
    raise AdapterError(f"{file}: the file has factors of a layer and of its parts. {_AGAIN}")


def _listed(names: list[str], most: int = 3) -> str:
    """Return names from an untrusted file, escaped and truncated."""
    return ", ".join(f"{name!r:.120}" for name in names[:most]) + (", …" if len(names) > most else "")


def _read_tensor(file: str, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file, floats as float32.

    Raises:
        AdapterError: If the dtype is not supported, or values are not finite.
    """
    head = name.startswith("head.")
    if tensor.dtype not in DTYPES and not (head and not tensor.is_floating_point() and not tensor.is_complex()):
        raise AdapterError(f"{file}: {name} has dtype {tensor.dtype}, not float32 or bfloat16. {_AGAIN}")
    if not tensor.isfinite().all():
        raise AdapterError(f"{file}: {name} holds values that are not finite. {_AGAIN}")
    return tensor.float() if tensor.is_floating_point() else tensor
