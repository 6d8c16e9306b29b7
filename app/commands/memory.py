"""Predict the memory that a fit needs, by part, without weights and without training.

One training step of the recipe's model runs on tensors that have a shape and no values (`memory_estimate`). From the
hub only config.json and the tokenizer are fetched. Of the data only the classes are read, if the data are on this
machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from app.config.fit_keys import add_fit_arguments
from app.console import escape_controls
from datamodules.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from app.commands.memory_prediction import Prediction

MIB = 2**20
CLASSES = 1000
PARTS = {
    "weights": "frozen weights",
    "gathered": "weights gathered from other processes",
    "factors": "factors A and B",
    "heads": "heads",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--classes",
        metavar="N",
        type=int,
        default=CLASSES,
        help="Number of classes of the head, if neither the recipe nor the task names the classes and the data are not "
        "on this machine.",
    )
    add_fit_arguments(parser)


def run(arguments: Namespace) -> None:
    """Predict the memory of a fit and print it.

    Raises:
        UsageError: For a wrong value, or for data without training rows.
        DataError: If data on this machine are damaged.
        ModelError: If the model cannot be built from its configuration, or its memory cannot be predicted.
    """
    import torch
    from rich.console import Console

    from app.commands.memory_prediction import predict

    if arguments.classes < 2:
        raise UsageError(f"--classes: {arguments.classes} is too small. Give 2 or more.")
    prediction = predict(arguments.fit.parse, arguments.fit_arguments, arguments.classes)
    Console().print(table_of(prediction))
    print(escape_controls(f"For {prediction.setting}."))
    print(f"{prediction.trained:,} of {prediction.total:,} parameters are trained.")
    print("The CUDA context, kernels' workspaces and unused parts of the allocator's blocks need further memory.")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(device_line(properties.name, properties.total_memory, prediction.estimate.total), flush=True)


def device_line(name: str, capacity: int, needed: int) -> str:
    """Return a sentence that compares a prediction with the memory of a GPU, both in bytes."""
    line = f"{name} has {capacity / MIB:,.0f} MiB: the fit needs {needed / capacity:.0%} of it."
    if needed > capacity:
        line += (
            " That is too much. Choose a smaller data.batch_size or length, model.gradient_checkpointing true or "
            "model.backbone_dtype bfloat16."
        )
    return line


def table_of(prediction: Prediction) -> Table:
    """Return the table for the terminal; parts that a fit lacks are left out."""
    from rich import box
    from rich.table import Table

    table = Table("part", box=box.SIMPLE_HEAD, show_footer=True)
    table.columns[0].footer = "total"
    total = prediction.estimate.total
    table.add_column("MiB", justify="right", footer=f"{total / MIB:,.1f}")
    table.add_column("share", justify="right", footer="100.0 %")
    for part, name in PARTS.items():
        size: int = getattr(prediction.estimate, part)
        if size:
            shown = "weights, all trained" if part == "weights" and prediction.tuning == "full" else name
            table.add_row(shown, f"{size / MIB:,.1f}", f"{100 * size / total:.1f} %")
    return table
