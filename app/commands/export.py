"""Write a finished run for other programs: its adapter for PEFT, or the whole model with the adapter merged.

A merged backbone of transformers becomes a directory for `from_pretrained` (model, tokenizer, generation settings). A
merged backbone of timm becomes a directory for `timm.create_model("local-dir:DIR", pretrained=True)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from app.console import escape_controls
from app.export.compact import write_compact
from app.export.hub import OPTION, check_repository, push_to_hub
from app.export.load_run import find_checkpoint, load_module
from app.export.loader_code import Loader
from app.export.merged import write_merged
from app.export.model_card import write_card
from app.export.peft import export_peft
from app.run.checkpoint_io import run_of_checkpoint
from datamodules.atomic import WriteError, atomic_directory
from modules.base import AdaptedModule
from modules.formats.rounding import Rounding, merge_rounding

_log = logging.getLogger(__name__)
Writer = Callable[[AdaptedModule, torch.dtype, Path], Loader]

# Share of an update's norm that rounding may cost unsaid. Autocast to bfloat16 rounds both factors in each forward pass
# of training, by up to 2^-8 = 0.4 % of an entry: an error of that order is no reason to choose another dtype.
ROUNDING_UNSAID = 0.01


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=str, help="A run directory (its best checkpoint), or a checkpoint.")
    parser.add_argument(
        "--format",
        type=Literal["peft", "merged", "compact"],
        required=True,
        help="peft: the adapters, for PEFT or --model.adapter_path. merged: the whole model, for transformers or timm "
        "alone. compact: the adapters for --model.adapter_path, without the frozen factor if it is of signs.",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=str, required=True, help="Directory to write; new, or else empty."
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"] | None,
        default=None,
        help="Of the weights that are written, default the backbone's own (of adapters: float32); the merge itself is "
        "done in float32. In bfloat16 what is small beside the weight is rounded away; a warning says how much.",
    )
    parser.add_argument(
        "--model.backbone", metavar="NAME", type=str | None, help="Where the backbone lies now, if it has been moved."
    )
    parser.add_argument(
        "--model.weights", metavar="FILE", type=str | None, help="Where its file of weights lies now, likewise."
    )
    parser.add_argument(
        OPTION,
        metavar="NAME",
        type=str | None,
        help="Upload DIR to this repository of the Hugging Face hub, such as OWNER/NAME. A new repository is private.",
    )


def run(arguments: Namespace) -> None:
    """Export a run.

    Raises:
        ArgumentError: For an output that is taken or cannot be written, a model that has no such form, or an upload
            that fails. The directory stays after a failed upload.
        CheckpointError: If there is no checkpoint, or a damaged one.
        ModelError: If the backbone is not to be had, or not the one that was trained.
    """
    output = Path(arguments.output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ArgumentError(None, f"--output: {output} is there already; give a new directory, or an empty one.")
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    changes = {key: value for key, value in arguments.model.as_dict().items() if value is not None}
    checkpoint = find_checkpoint(arguments.run)
    module = load_module(checkpoint, changes)
    own_dtype = module.backbone_dtype if arguments.format == "merged" else torch.float32
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else own_dtype
    rounding = merge_rounding(module.backbone, dtype) if arguments.format == "merged" else None
    dtype_name = str(dtype).removeprefix("torch.")
    notes = {f"Update, rounded to {dtype_name}": _in_words(rounding)} if rounding else {}
    compact = partial(write_compact, run=run_of_checkpoint(checkpoint))
    writers: dict[str, Writer] = {"peft": export_peft, "merged": write_merged, "compact": compact}
    try:
        with atomic_directory(output) as folder:
            loader = writers[arguments.format](module, dtype, folder)
            load = loader(arguments.push_to_hub or output.name, shared=True)
            write_card(folder, module, checkpoint, arguments.format, load, notes)
    except WriteError as error:
        raise ArgumentError(None, f"--output: {error}") from error
    files = sorted(output.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    print(escape_controls(f"Wrote {', '.join(f.name for f in files)}: {size:.1f} MB, {dtype_name}."))
    print(escape_controls(f"Load it with\n\n{loader(str(output))}\n"))
    if rounding and rounding.whole > ROUNDING_UNSAID:
        _log.warning(
            f"Rounded to {dtype_name}, the merged update is {_in_words(rounding)}. With --dtype float32 it is what was "
            "trained; --format peft keeps it beside weights of any dtype."
        )
    if arguments.push_to_hub is not None:
        print(escape_controls(f"Uploaded to {push_to_hub(output, arguments.push_to_hub)}"))
    print(escape_controls(f"Exported: {output}"), flush=True)


def _in_words(rounding: Rounding) -> str:
    whole, worst = (f"{100 * share:.3g} %" for share in (rounding.whole, rounding.worst))
    return f"off by {whole} of its norm, most in {rounding.layer} with {worst}"
