"""Write a finished run as a model that needs nothing of this project: the adapters merged into the weights.

Backbones of transformers become a directory for `from_pretrained` (model, tokenizer, generation settings), those of
timm one for `timm.create_model("local-dir:DIR", pretrained=True)`.
"""

from __future__ import annotations

import inspect
import logging
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from app.arguments import saved_configuration
from app.checkpoint_io import read_checkpoint, run_of_checkpoint
from app.commands.loading import Loader, is_timm, merged_timm_loader, merged_transformers_loader
from app.commands.model_card import write_card
from app.commands.peft import peft_content, write_peft
from app.commands.timm_head import timm_model
from app.console import escape_controls
from app.run_directory import resolve_checkpoint
from app.yaml_files import read_yaml
from datamodules.atomic import WriteError, atomic_directory
from datamodules.contract import TextModel
from datamodules.errors import CheckpointError
from modules.adapters import adapter_state, detach
from modules.base import AdaptedModule
from modules.formats.compact import FILE_NAME as COMPACT
from modules.formats.compact import save_compact
from modules.formats.rounding import Rounding, merge_rounding
from modules.training.peft_baselines import METHODS

if TYPE_CHECKING:  # a run on text imports no timm, one on images no transformers
    from modules.image_classification import ImageClassifier

_log = logging.getLogger(__name__)
Writer = Callable[[AdaptedModule, torch.dtype, Path], Loader]

# Share of an update's norm that rounding may cost unsaid. Autocast to bfloat16 rounds both factors in each forward pass
# of training, by up to 2^-8 = 0.4 % of an entry: an error of that order is no reason to choose another dtype.
ROUNDING_UNSAID = 0.01


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
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


def run(arguments: Namespace) -> None:
    """Export a run.

    Raises:
        ArgumentError: For an output that is taken or cannot be written, or a model that has no such form.
        CheckpointError: If there is no checkpoint, or a damaged one.
        ModelError: If the backbone is not to be had, or not the one that was trained.
    """
    output = Path(arguments.output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ArgumentError(None, f"--output: {output} is there already; give a new directory, or an empty one.")
    changes = {key: value for key, value in arguments.model.as_dict().items() if value is not None}
    checkpoint = find_checkpoint(arguments.run)
    module = load_module(checkpoint, changes)
    own_dtype = module.backbone_dtype if arguments.format == "merged" else torch.float32
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else own_dtype
    rounding = merge_rounding(module.backbone, dtype) if arguments.format == "merged" else None
    dtype_name = str(dtype).removeprefix("torch.")
    notes = {f"Update, rounded to {dtype_name}": _in_words(rounding)} if rounding else {}
    compact = partial(write_compact, run=run_of_checkpoint(checkpoint))
    writers: dict[str, Writer] = {"peft": write_peft, "merged": write_merged, "compact": compact}
    try:
        with atomic_directory(output) as folder:
            loader = writers[arguments.format](module, dtype, folder)
            write_card(folder, module, checkpoint, arguments.format, loader(output.name), notes)
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
    print(escape_controls(f"Exported: {output}"), flush=True)


def _in_words(rounding: Rounding) -> str:
    whole, worst = (f"{100 * share:.3g} %" for share in (rounding.whole, rounding.worst))
    return f"off by {whole} of its norm, most in {rounding.layer} with {worst}"


# -------------------------------------------------------------------------------------------------------------- reading


def find_checkpoint(name: str) -> Path:
    """The checkpoint that RUN means.

    Raises:
        CheckpointError: If there is none.
    """
    if not Path(name).exists():
        raise CheckpointError(f"RUN: there is no run directory or checkpoint {name}.")
    checkpoint = resolve_checkpoint(os.path.abspath(name), Path(), prefer_best=True)
    if not checkpoint.is_file():
        raise CheckpointError(
            f"RUN: {name} has no {checkpoint.parent.name}/{checkpoint.name}; give a run directory that fit has written "
            "(runs/<recipe>/version_K), or a checkpoint file."
        )
    return checkpoint


def load_module(path: Path, changes: dict[str, Any]) -> AdaptedModule:
    """The module that a checkpoint is of, with its weights, in eval mode on the CPU.

    Args:
        path: The checkpoint.
        changes: Values of the module's arguments that replace the checkpoint's.

    Raises:
        CheckpointError: If it cannot be read, or does not say what it is of.
        ModelError: If the module cannot be built, or its frozen weights are not those of the checkpoint.
    """
    checkpoint = read_checkpoint(path)
    saved = saved_configuration(checkpoint).get("model")
    if saved is None:
        raise CheckpointError(f"RUN: {path} does not say what model it is of; it was not written by this program.")
    saved["init_args"] |= changes
    run_directory = run_of_checkpoint(path)
    if run_directory is not None and (run_directory / "config.yaml").is_file():  # frozen weights may be random ones
        L.seed_everything(read_yaml(str(run_directory / "config.yaml")).get("seed_everything", 0), verbose=False)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AdaptedModule, "model", required=True)
    module = parser.instantiate_classes(parser.parse_object({"model": saved})).model
    assert isinstance(module, AdaptedModule)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


# -------------------------------------------------------------------------------------------------------------- writing


def write_merged(module: AdaptedModule, dtype: torch.dtype, folder: Path) -> Loader:
    """Merge the adapters and write the model in its own library's layout.

    Args:
        module: A module as `load_module` gives it; it has no adapters afterwards.
        dtype: Dtype of the weights written.
        folder: An empty directory.

    Returns:
        The code that loads it.

    Raises:
        ArgumentError: If the backbone is of another library, takes no such head, or has layers of PEFT.
    """
    backbone: Any = module.backbone
    if module.tuning in METHODS:
        raise ArgumentError(
            None, f"--format: merged is not supported for tuning: {module.tuning}, which is there to compare with."
        )
    if isinstance(module, TextModel):
        if dtype == torch.float32:
            backbone.float()  # before the merge, or that would round
        detach(backbone, merge_first=True)
        return _write_transformers(module, backbone.to(dtype), folder)
    if is_timm(module):
        backbone.float()
        detach(backbone, merge_first=True)
        return _write_timm(cast("ImageClassifier", module), dtype, folder)
    raise ArgumentError(None, f"--format: a {type(backbone).__name__} has no form without this project.")


def write_compact(module: AdaptedModule, dtype: torch.dtype, folder: Path, run: Path | None = None) -> Loader:
    """Write the adapters and the heads as a compact file; print what it stores, and its size beside PEFT's.

    Args:
        module: A module as `load_module` gives it.
        dtype: Dtype of what is stored.
        folder: An empty directory.
        run: The run directory, whose config.yaml the command names; None if there is none.

    Returns:
        The command that loads it.

    Raises:
        ArgumentError: If the run has no adapters.
    """
    if module.tuning != "adapter":
        raise ArgumentError(None, f"--format: compact is for adapters, and this run has tuning: {module.tuning}.")
    factors = {f"backbone.{name}" for name in adapter_state(module.backbone)}
    heads = {name: tensor for name, tensor in module.saved_state().items() if name not in factors}
    redrawn = save_compact(folder, module.backbone, module.adapter, heads, dtype)
    if redrawn:
        print(f"Left out, as loading draws them again: the frozen factors of {len(redrawn)} projections.")
    if stored := len(module.projections) - len(redrawn):
        reason = "both are trained" if module.adapter.train == "both" else "only those of init signs can be drawn again"
        print(f"Stored: both factors of {stored} projections, since {reason}.")
        if module.adapter.train != "both":
            frozen = "init_a" if module.adapter.train == "B" else "init_b"
            print(f"A compact file leaves out the frozen factor of runs with --model.adapter.{frozen} signs.")
    size = (folder / COMPACT).stat().st_size
    peft = _peft_bytes(module, dtype)
    print(f"Size: {size / 1e6:.3g} MB; as --format peft: {peft / 1e6:.3g} MB, heads included in both.")
    config = "RUN/config.yaml" if run is None else str(run / "config.yaml")
    return lambda output: shlex.join(["python", "main.py", "test", "--config", config, "--model.adapter_path", output])


def _peft_bytes(module: AdaptedModule, dtype: torch.dtype) -> int:
    """Return the bytes of the tensors in PEFT's file of the same run."""
    _, tensors = peft_content(module, module.saved_state())
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors.values())


def _write_transformers(module: AdaptedModule, backbone: Any, folder: Path) -> Loader:
    tokenizer: Any = module.tokenizer
    _complete_tokenizer(module, tokenizer)
    config = backbone.config
    config.task_specific_params = None  # pipelines would generate by these
    classes = module.class_names
    if classes is not None:  # pipelines choose between softmax, sigmoid and the score itself by it
        config.problem_type = "single_label_classification" if classes else "regression"
    if backbone.can_generate() and backbone.generation_config.num_beams == 1:  # keys for beams would be refused
        backbone.generation_config.update(early_stopping=None, length_penalty=None)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return merged_transformers_loader(type(backbone).__name__)


def _complete_tokenizer(module: AdaptedModule, tokenizer: Any) -> None:
    """Give a tokenizer what its own files lack: the model's inputs and length, the prompts' template, padding.

    `save_pretrained` keeps what stands in `init_kwargs`.
    """
    accepted = inspect.signature(cast(Any, module.backbone).forward).parameters
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids" or name in accepted]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    if module.position_limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, module.position_limit)
    template = module.hparams.get("prompt_template")
    if template is not None:  # what the model was trained on
        tokenizer.chat_template = template
    if module.peft_task == "CAUSAL_LM":  # a response follows the last token
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def _write_timm(module: ImageClassifier, dtype: torch.dtype, folder: Path) -> Loader:
    from timm.models import save_for_hf

    assert module.class_names is not None  # a checkpoint has them
    save_for_hf(
        timm_model(module, module.class_names).to(dtype),
        str(folder),
        model_config={"label_names": module.class_names},
        safe_serialization=True,
        data_config=module.preprocessing,
    )
    return merged_timm_loader()
