"""Write finished runs for other programs: an adapter for PEFT, a merged model, or a bank of several adapters.

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
from jsonargparse import ArgumentParser, Namespace

from app.console import escape_controls
from app.export.bank import member_of_checkpoint, read_members, split_names, write_bank
from app.export.compact import write_compact
from app.export.hub import OPTION, check_repository, push_to_hub
from app.export.load_run import find_checkpoint, load_module
from app.export.loader_code import Loader
from app.export.low_rank import check_options, truncate_adapters
from app.export.merged import write_merged
from app.export.model_card import write_card
from app.export.peft import export_peft
from app.export.validation import load_data, validation_scores
from app.run.checkpoint_io import run_of_checkpoint
from datamodules.atomic import WriteError, atomic_directory
from datamodules.errors import UsageError, counted
from modules.base import AdaptedModule
from modules.formats.rounding import Rounding, merge_rounding

_log = logging.getLogger(__name__)
Writer = Callable[[AdaptedModule, torch.dtype, Path], Loader]

# Share of an update's norm that rounding may change without a warning. Autocast to bfloat16 rounds both factors in each
# forward pass of training, by up to 2^-8 = 0.4 % of an entry. An error of that order is no reason for another dtype.
TOLERATED_ROUNDING = 0.01


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=str,
        help="A run directory (its best checkpoint), or a checkpoint. Only the format bank takes several.",
    )
    parser.add_argument(
        "--format",
        type=Literal["peft", "merged", "compact", "bank"],
        required=True,
        help="peft: the adapters, for PEFT or --model.adapter_path. merged: the whole model, for transformers or timm "
        "alone. compact: the adapters for --model.adapter_path, without a frozen factor of signs. bank: the adapters "
        "of several runs over one frozen A, as one file.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=str,
        required=True,
        help="New or empty directory to write. For the format bank: new file.",
    )
    parser.add_argument(
        "--names",
        metavar="A,B",
        type=str | None,
        help="For the format bank: names of the adapters. Default: names of the run directories.",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"] | None,
        default=None,
        help="Dtype of the written weights. Default: the backbone's dtype, or float32 for adapters. The merge is "
        "done in float32. Rounding to bfloat16 can lose a part of a small update; a warning gives the share.",
    )
    parser.add_argument(
        "--rank",
        metavar="r",
        type=int | None,
        help="Truncate each update s·B·A to this rank first. The loss in the update's norm is printed.",
    )
    parser.add_argument(
        "--keep",
        metavar="SHARE",
        type=float | None,
        help="Truncate each update to the smallest rank that keeps this share of its squared norm, such as 0.99.",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="With --rank or --keep: print the metrics of the validation split before and after the truncation.",
    )
    parser.add_argument(
        "--model.backbone", metavar="NAME", type=str | None, help="New path of the backbone, if it has moved."
    )
    parser.add_argument(
        "--model.weights", metavar="FILE", type=str | None, help="New path of the file of weights, if it has moved."
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
        UsageError: If an option has a wrong value, the output is not empty or cannot be written, the model has no
            such format, or the upload fails. The directory stays after a failed upload.
        CheckpointError: If the checkpoint is missing or damaged.
        ModelError: If the backbone is missing, or differs from the backbone of the training.
    """
    if arguments.format == "bank":
        export_bank(arguments)
        return
    if len(arguments.runs) > 1 or arguments.names is not None:
        raise UsageError(
            f"RUN: --format {arguments.format} takes one run and no --names. Use --format bank for several runs."
        )
    output = Path(arguments.output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"--output: {output} exists already. Give a new or an empty directory.")
    check_options(arguments.rank, arguments.keep)
    truncates = arguments.rank is not None or arguments.keep is not None
    if arguments.validate and not truncates:
        raise UsageError("--validate: needs --rank or --keep. To score a run, use the command validate.")
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    changes = {key: value for key, value in arguments.model.as_dict().items() if value is not None}
    checkpoint = find_checkpoint(arguments.runs[0])
    module = load_module(checkpoint, changes)
    notes = _truncate(module, checkpoint, arguments) if truncates else {}
    keeps_dtype = arguments.format == "merged" and module.class_names != []  # bfloat16 would round a score of 683.
    default_dtype = module.backbone_dtype if keeps_dtype else torch.float32
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype
    rounding = merge_rounding(module.backbone, dtype) if arguments.format == "merged" else None
    dtype_name = str(dtype).removeprefix("torch.")
    if rounding:
        notes[f"Update, rounded to {dtype_name}"] = _rounding_text(rounding)
    compact = partial(write_compact, run=run_of_checkpoint(checkpoint))
    writers: dict[str, Writer] = {"peft": export_peft, "merged": write_merged, "compact": compact}
    try:
        with atomic_directory(output) as folder:
            loader = writers[arguments.format](module, dtype, folder)
            load = loader(arguments.push_to_hub or output.name, shared=True)
            write_card(folder, module, checkpoint, arguments.format, load, notes)
    except WriteError as error:
        raise UsageError(f"--output: {error}") from error
    files = sorted(output.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    print(escape_controls(f"Wrote {', '.join(f.name for f in files)}: {size:.1f} MB, {dtype_name}."))
    print(escape_controls(f"Load it with\n\n{loader(str(output))}\n"))
    if rounding and rounding.overall > TOLERATED_ROUNDING:
        _log.warning(
            f"Rounded to {dtype_name}, the merged update is {_rounding_text(rounding)}. --dtype float32 keeps the "
            "trained update. --format peft keeps it too, beside a backbone of any dtype."
        )
    if arguments.push_to_hub is not None:
        print(escape_controls(f"Uploaded to {push_to_hub(output, arguments.push_to_hub)}"))
    print(escape_controls(f"Exported: {output}"), flush=True)


def _truncate(module: AdaptedModule, checkpoint: Path, arguments: Namespace) -> dict[str, str]:
    """Truncate the adapters, print the loss, and return the rows of the model card."""
    data = load_data(checkpoint) if arguments.validate else None
    before = validation_scores(module, data) if data else {}
    text = str(truncate_adapters(module, arguments.rank, arguments.keep or 1.0))
    print(escape_controls(f"Truncated {text}."))
    after = validation_scores(module, data) if data else {}
    scores = {name: f"{value:.4g} before the truncation, {after[name]:.4g} after" for name, value in before.items()}
    for name, score in scores.items():
        print(f"{name}: {score}")
    return {"Truncated": text, **scores}


def export_bank(arguments: Namespace) -> None:
    """Write the adapters of several runs as one file.

    Raises:
        UsageError: If the output exists or cannot be written, a name is taken, or an option is not for banks.
        AdapterError: If the runs do not share the backbone, the projections, the ranks or A.
    """
    output = Path(arguments.output).resolve()
    if output.exists():
        raise UsageError(f"--output: {output} exists already. Give a new file, or use the command bank add.")
    if arguments.rank is not None or arguments.keep is not None or arguments.validate:
        raise UsageError(
            "--rank, --keep, --validate: truncated adapters share no A. Remove the options, or use --format peft."
        )
    if arguments.push_to_hub is not None:
        raise UsageError(f"{OPTION}: a bank cannot be uploaded. Unpack an adapter and upload the directory.")
    changes = {key: value for key, value in arguments.model.as_dict().items() if value is not None}
    read = partial(member_of_checkpoint, changes=changes)
    members = read_members(arguments.runs, split_names(arguments.names), {}, read)
    first = next(iter(members.values()))
    dtype = getattr(torch, arguments.dtype or "float32")
    adapters = [(name, member.adapter) for name, member in members.items()]
    try:
        write_bank(output, first.shared, first.frozen, adapters, dtype)
    except WriteError as error:
        raise UsageError(f"--output: {error}") from error
    redrawn = sum(slot.seed is not None for slot in first.shared.slots)
    size = output.stat().st_size / 1e6
    print(
        f"Wrote {counted(len(members), 'adapter')}, {redrawn} of {len(first.shared.slots)} frozen A left out: "
        f"{size:.3g} MB."
    )
    print(escape_controls(f"Exported: {output}"), flush=True)


def _rounding_text(rounding: Rounding) -> str:
    total, worst = (f"{100 * share:.3g} %" for share in (rounding.overall, rounding.worst))
    return f"off by {total} of its norm, most in {rounding.layer} with {worst}"
