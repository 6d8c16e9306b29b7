"""Format `compact`: adapters and heads, without the frozen factors that loading draws again."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from app.config.program_files import program_command
from app.export.loader_code import Loader
from app.export.peft import peft_content
from datamodules.errors import UsageError, counted
from modules.adapters import adapter_state
from modules.base import AdaptedModule
from modules.formats.compact import FILE_NAME as COMPACT
from modules.formats.compact import save_compact


def write_compact(module: AdaptedModule, dtype: torch.dtype, folder: Path, run: Path | None = None) -> Loader:
    """Write adapters and heads as a compact file. Print the stored factors, and the sizes as `compact` and as `peft`.

    Args:
        module: A module from `load_module`.
        dtype: Dtype of the stored tensors.
        folder: An empty directory.
        run: The run directory whose config.yaml the printed command names; None without a run directory.

    Returns:
        A function that returns the command for loading the file.

    Raises:
        UsageError: If the run has no adapters.
    """
    if module.tuning != "adapter":
        raise UsageError(
            f"--format: compact is for adapters, and this run has tuning: {module.tuning}. Export a run with tuning: "
            "adapter."
        )
    factors = {f"backbone.{name}" for name in adapter_state(module.backbone)}
    heads = {name: tensor for name, tensor in module.saved_state().items() if name not in factors}
    redrawn = save_compact(folder, module.backbone, module.adapter, heads, dtype)
    if redrawn:
        print(f"Left out: the frozen factors of {counted(len(redrawn), 'projection')}, which loading draws again.")
    if stored := len(module.projections) - len(redrawn):
        given = module.adapter.init_a == "given"
        reason = "they come from a file or a chain" if given else "only init signs can be drawn again"
        reason = "both are trained" if module.adapter.train == "both" else reason
        print(f"Stored: both factors of {counted(stored, 'projection')}, since {reason}.")
        if module.adapter.train != "both" and not given:
            frozen = "init_a" if module.adapter.train == "B" else "init_b"
            print(f"A compact file leaves out the frozen factor of runs with --model.adapter.{frozen} signs.")
    size = (folder / COMPACT).stat().st_size
    _, tensors = peft_content(module, module.saved_state())
    peft = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors.values())
    print(f"Size: {size / 1e6:.3g} MB; as --format peft: {peft / 1e6:.3g} MB, heads included in both.")

    def load(place: str, shared: bool = False) -> str:
        config = "RUN/config.yaml" if run is None or shared else str(run / "config.yaml")
        return shlex.join([*program_command(), "test", "--config", config, "--model.adapter_path", place])

    return load
