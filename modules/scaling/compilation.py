"""Compilation of a backbone's blocks by torch.compile, one by one and in place. State-dict names do not change.

All blocks of a stack share the compiled code of the first block ("regional compilation" in PyTorch's recipes). A deep
backbone therefore compiles as fast as a shallow backbone. Only training is compiled. Evaluation is not, since
generation has another shape at every token.
"""

from __future__ import annotations

import os
import shutil

import lightning as L
import torch
from torch import nn

from datamodules.errors import ModelError
from modules.scaling.blocks import block_stacks

BACKEND = "inductor"


def compile_blocks(backbone: nn.Module, device: torch.device) -> None:
    """Compile the blocks of a backbone at their first call, in place.

    The first batch compiles code for its shape. A batch of another shape compiles code for all shapes. Blocks that
    differ in a constant, such as the drop-path rate, are compiled separately.

    Args:
        backbone: A model of timm or transformers, with its adapters.
        device: The device that trains.

    Raises:
        ModelError: If the backbone has no stack of blocks, or no compiler is installed.
    """
    stacks = block_stacks(backbone)
    if not stacks:
        raise ModelError(
            f"model.compile: {type(backbone).__name__} has no stack of blocks to compile. Set the key to false."
        )
    check_compiler(device)
    import torch._dynamo.config as dynamo  # This import takes seconds.

    # Each block is a separate graph. DDP's splitting of graphs does not support autograd functions.
    dynamo.optimize_ddp = False
    # The limit counts all blocks of a class together, with and without adapters.
    dynamo.recompile_limit = 64
    for stack in stacks:
        for block in stack.blocks:
            block.compile(backend=BACKEND)


def check_compiler(device: torch.device) -> None:
    """Check that a compiler is installed: C++ for code on the CPU, C for Triton's launchers of GPU kernels.

    Raises:
        ModelError: If no compiler is installed.
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
        has_compiler = False
    else:
        has_compiler = "CC" in os.environ or any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    if not has_compiler:
        raise ModelError(
            "model.compile: torch.compile needs a compiler, and there is none. Install g++, or set the environment "
            "variable CXX to a C++ compiler and CC to a C compiler. Or set the key to false."
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
