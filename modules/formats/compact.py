"""Compact files: the trained factor, and a recipe that draws the frozen factor again.

A compact directory holds `adapter_compact.safetensors`, complete in itself. Its tensors are

- `adapter.<projection>.A` and `.B`, the factors that are stored, float32 or bfloat16,
- `head.<name>`, tensors of modules that were trained whole, by their names in the task's module,

and its metadata has, under `recipe`, a JSON object:

- `version`: 1,
- `adapter`: the keys of `AdapterConfig`, of `rank_pattern` and `alpha_pattern` those that are not empty, with one key
  for each projection (`modules.adapters.patterns.exact_key`),
- `redrawn`: for each projection whose frozen factor is not stored `{"shape": [rows, columns], "sha256": …}`, the digest
  being that of its float32 bytes, little-endian, row by row,
- `frozen_fingerprint`: fingerprint of the backbone (`modules.adapters.state`); may be missing.

A frozen factor is left out only if its initialiser is `signs`, which is reproducible by construction, and the factor is
to the bit what the recipe draws. Loading draws the factor again and refuses any other digest. All other factors are
stored, so that a compact file can always be loaded.
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
from modules.formats.peft import WHERE

FILE_NAME = "adapter_compact.safetensors"
VERSION = 1
DTYPES = (torch.float32, torch.bfloat16)
_AGAIN = "Get the file anew, or export the run again (--format peft stores both factors)."


class Compact(NamedTuple):
    """Content of a compact file.

    Args:
        adapter: The adapter's configuration.
        factors: Both factors of every adapter under the names of `adapter_state`, float32.
        heads: Tensors of modules that were trained whole, under the names of the task's module; floats as float32.
        fingerprint: Fingerprint of the frozen weights of the training; None if the file has none.
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
        config: Configuration that the adapters were attached with.
        heads: Tensors of modules that were trained whole, by name.
        dtype: Dtype in the file, float32 or bfloat16. A factor that is drawn again is float32 in any case.

    Returns:
        The projections whose frozen factor is not stored.

    Raises:
        AdapterError: If the model has no adapters, or for another dtype.
    """
    projections = adapted_projections(model)
    if not projections:
        raise AdapterError("There are no adapters to write in this model.")
    if dtype not in DTYPES:
        raise AdapterError(f"A compact file stores float32 or bfloat16, not {dtype}.")
    tensors = {f"head.{name}": tensor for name, tensor in heads.items()}
    redrawn: dict[str, dict[str, Any]] = {}
    for name, (_, factors) in projections.items():
        for factor, parameter in factors.named_factors(trained=True).items():
            tensors[f"adapter.{name}.{factor}"] = parameter
        for factor, parameter in factors.named_factors(trained=False).items():
            digest = factor_digest(parameter)
            if _init(config, factor) == "signs" and digest == factor_digest(_redraw(config, name, parameter.shape)):
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
    stored = {  # copies: safetensors takes no tensors that share memory
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / FILE_NAME, metadata={"recipe": json.dumps(recipe, separators=(",", ":"))})
    return list(redrawn)


def _recipe_keys(config: AdapterConfig, projections: list[Projection]) -> dict[str, Any]:
    """Return the keys of the configuration, empty patterns left out, so that older programs read the file."""
    patterns = {
        "rank_pattern": exact_patterns({p.name: config.rank_of(p) for p in projections}, config.rank),
        "alpha_pattern": exact_patterns({p.name: config.alpha_of(p) for p in projections}, config.alpha),
    }
    return {key: value for key, value in (asdict(config) | patterns).items() if key not in patterns or value}


def _init(config: AdapterConfig, factor: str) -> str:
    return config.init_a if factor == "A" else config.init_b


def _redraw(config: AdapterConfig, name: str, shape: Collection[int]) -> Tensor:
    """Return the frozen factor that a configuration with `signs` gives a projection."""
    factor: Factor = "B" if config.train == "A" else "A"
    return sign_factor(factor, max(shape), min(shape), config.seed, name)


# -------------------------------------------------------------------------------------------------------------- loading


def load_compact(path: Path, backbone: nn.Module, exclude: Collection[str] = ()) -> Compact:
    """Read a compact directory for a model. The file is not trusted.

    Names and shapes are compared with the model's before a tensor is read or drawn. So the file never decides how much
    memory is taken. Targets that are patterns are replaced by names, and never matched.

    Args:
        path: The directory.
        backbone: The model that the adapter is for, with or without adapters; it is not changed.
        exclude: Names of modules that take no adapter, as for `attach`.

    Raises:
        AdapterError: If the file is damaged, is no compact file or is of another model, or if a factor that is drawn
            again has another digest than the file says.
    """
    file = f"{WHERE}: {path / FILE_NAME}"
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
                f"{file}: the frozen factor of {name}, drawn again from its recipe (signs, seed {config.seed}), has "
                f"another digest than the file gives. {_AGAIN}"
            )
        tensors[f"adapter.{name}.{'B' if config.train == 'A' else 'A'}"] = factor
    targets, last = _targets(file, config, projections, list(layers))
    factors = {
        f"{p.layer}.adapters.{p.role}.{factor}": tensors.pop(f"adapter.{name}.{factor}")
        for name, p in layers.items()
        for factor in "AB"
    }
    config = replace(config, targets=targets, layers=last)
    heads = {name.removeprefix("head."): tensor for name, tensor in tensors.items()}
    return Compact(config, factors, heads, fingerprint)


def _read_recipe(file: str, text: str) -> tuple[AdapterConfig, dict[str, Any], str | None]:
    """Return the configuration, the redrawn factors and the fingerprint of a file's metadata, of the right types."""
    problem = f"{file} is no compact file that this version reads"
    try:
        recipe = json.loads(text)
        if recipe["version"] != VERSION:
            raise ValueError(f"version {recipe['version']!r:.20}, which a newer program may read")
        keys, redrawn, fingerprint = recipe["adapter"], recipe["redrawn"], recipe.get("frozen_fingerprint")
        known = {field.name for field in fields(AdapterConfig)}
        numbers = [type(keys[key]) in (int, float) for key in ("alpha", "dropout")]
        targets = [isinstance(target, str) for target in keys["targets"]]
        entries = [
            set(entry) == {"shape", "sha256"}
            and isinstance(entry["sha256"], str)
            and [type(size) for size in entry["shape"]] == [int, int]
            for entry in redrawn.values()
        ]
        # an older file is of all layers and has no patterns
        named = known - {"layers", "rank_pattern", "alpha_pattern"} <= set(keys) <= known
        fits = named and type(keys["seed"]) is int and isinstance(keys["targets"], list)
        if not (fits and isinstance(fingerprint, str | None) and all(numbers + targets + entries)):
            raise TypeError("its recipe has other keys or values")
        config = AdapterConfig(**keys)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error!s:.500}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{problem} ({type(error).__name__}: {error}). {_AGAIN}") from error
    frozen = {"A": config.init_b, "B": config.init_a}.get(config.train)
    if redrawn and frozen != "signs":
        raise AdapterError(f"{file}: its frozen factor ({frozen}) cannot be drawn again. {_AGAIN}")
    return config, redrawn, fingerprint


def _check_factors(
    file: str,
    backbone: nn.Module,
    projections: list[Projection],
    config: AdapterConfig,
    stored: Mapping[str, tuple[int, ...]],
    redrawn: Mapping[str, Any],
) -> dict[str, Projection]:
    """Return the projections that a file has factors of, by name; check that each factor has the model's shape.

    Raises:
        AdapterError: With the names that are missing, unexpected or of another shape.
    """
    frozen = "B" if config.train == "A" else "A"
    given = {name: shape for name, shape in stored.items() if not name.startswith("head.")}
    twice = [name for name in redrawn if f"adapter.{name}.{frozen}" in given]
    given |= {f"adapter.{name}.{frozen}": tuple(entry["shape"]) for name, entry in redrawn.items()}
    layers = {
        p.name: p
        for p in [*projections, *fused_layers(projections)]
        if any(f"adapter.{p.name}.{factor}" in given for factor in "AB")
    }
    exact = {exact_key(name) for name in layers}
    if others := [key for key in {**config.rank_pattern, **config.alpha_pattern} if key not in exact]:
        # a stranger's regular expression could take for ever to match
        raise AdapterError(f"{file}: a pattern names no projection of the file ({_listed(others)}). {_AGAIN}")
    expected: dict[str, tuple[int, ...]] = {}
    for name, p in layers.items():
        d_in = cast(nn.Linear, backbone.get_submodule(p.layer)).in_features
        rank = check_rank(config, p, d_in)
        expected |= {f"adapter.{name}.A": (rank, d_in), f"adapter.{name}.B": (p.stop - p.start, rank)}
    kinds = {
        "unexpected": [name for name in given if name not in expected],
        "missing": [name for name in expected if name not in given],
        "both stored and to be drawn": twice,
        "of another shape": [
            f"{name} {given[name]}, not {shape}" for name, shape in expected.items() if given.get(name, shape) != shape
        ],
    }
    if problems := [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]:
        raise AdapterError(f"{file} does not fit this model: {'; '.join(problems)}. Take the backbone it was made for.")
    if not layers:
        raise AdapterError(f"{file} has no adapters. {_AGAIN}")
    return layers


def _targets(
    file: str, config: AdapterConfig, projections: list[Projection], names: list[str]
) -> tuple[list[str], int | None]:
    """Return the targets and `layers` of a configuration if they are roles that select the named projections.

    Otherwise the targets are the names of the projections.

    Raises:
        AdapterError: If a layer has an adapter as a whole and adapters of its parts.
    """
    by_name = [f"regex:{re.escape(name)}" for name in names]
    by_role = {*ROLES, "attention", "all"}.issuperset(config.targets)
    own = (list(config.targets), config.layers)
    for targets, layers in (own, (by_name, None)) if by_role else ((by_name, None),):
        with suppress(AdapterError):  # a role or a number of blocks that this model does not have
            if {p.name for p in select(projections, targets, layers)} == set(names):
                return targets, layers
    raise AdapterError(f"{file}: it has factors of a layer and of its parts. {_AGAIN}")


def _listed(names: list[str], most: int = 3) -> str:
    """Return names from an untrusted file, escaped and cut."""
    return ", ".join(f"{name!r:.120}" for name in names[:most]) + (", …" if len(names) > most else "")


def _read_tensor(file: str, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file, floats as float32.

    Raises:
        AdapterError: For a dtype that no compact file has, or values that are not finite.
    """
    head = name.startswith("head.")
    if tensor.dtype not in DTYPES and not (head and not tensor.is_floating_point() and not tensor.is_complex()):
        raise AdapterError(f"{file}: {name} is of {tensor.dtype}, not float32 or bfloat16. {_AGAIN}")
    if not tensor.isfinite().all():
        raise AdapterError(f"{file}: {name} holds values that are not finite. {_AGAIN}")
    return tensor.float() if tensor.is_floating_point() else tensor
