"""Blocks compiled by torch.compile: one by one and in place, so that no name in a state dict changes.

All blocks of a stack share what is compiled of the first ("regional compilation" in PyTorch's recipes), so a deep
backbone takes no longer to compile than a shallow one. Only training is compiled: evaluation runs as it is written,
since generation has another shape at every token.
"""

from __future__ import annotations

import shutil

import lightning as L
import torch
from torch import nn

from datamodules.errors import ModelError
from modules.scaling.blocks import block_stacks

BACKEND = "inductor"


def compile_blocks(backbone: nn.Module, device: torch.device) -> None:
    """Compile the blocks of a backbone at their first call, in place.

    The first batch is compiled for its shape. A second shape, as of batches by length, compiles once more for any
    shape. Blocks that differ in a constant, such as their rate of drop path, are compiled one by one.

    Args:
        backbone: A model of timm or transformers, with its adapters.
        device: The device that trains.

    Raises:
        ModelError: If the backbone has no blocks, or there is no compiler for the generated code.
    """
    stacks = block_stacks(backbone)
    if not stacks:
        raise ModelError(
            f"model.compile: {type(backbone).__name__} has no stack of blocks to compile; set it to false."
        )
    check_compiler(device)
    import torch._dynamo.config as dynamo  # seconds of imports that other runs do not need

    # each block is a graph of its own already, and DDP's splitting of graphs refuses autograd functions
    dynamo.optimize_ddp = False
    # blocks of one class count together, of both stacks and with and without adapters
    dynamo.recompile_limit = 64
    for stack in stacks:
        for block in stack.blocks:
            block.compile(backend=BACKEND)


def check_compiler(device: torch.device) -> None:
    """Check that there is a compiler: of C++ for the CPU, of C for the code that Triton puts around a GPU's kernels.

    Raises:
        ModelError: If there is no compiler.
    """
    if BACKEND != "inductor":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        if device.type == "cpu":
            get_cpp_compiler()
            return
    except InvalidCxxCompiler:
        found = False
    else:
        found = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    if not found:
        raise ModelError(
            "model.compile: torch.compile needs a compiler, and there is none; install g++ (or name another one in the "
            "environment variable CXX, a C compiler in CC), or set the key to false."
        )


class UncompiledEvaluation(L.Callback):
    """Run the blocks uncompiled in validation, test and prediction."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch compilation off."""
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch compilation on again."""
        torch.compiler.set_stance("default")

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Switch compilation on again for the next run of this process."""
        torch.compiler.set_stance("default")
