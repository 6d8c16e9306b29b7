"""What a configuration may name: classes of this program and of Lightning, unless the command line allows more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import ArgumentError, set_parsing_settings
from jsonargparse._common import parsing_settings  # which has no other way back

# Every dotted path in a YAML, an option or a checkpoint's hyper-parameters lies below one of these, and so does the
# place where what it names is defined: `modules.base.torch.load` is torch.serialization's. Of Lightning, the packages
# whose classes a trainer takes: not its core, whose load_from_checkpoint unpickles. Of torch, what strategies take.
ALLOWED = (
    "app.callbacks",
    "datamodules",
    "modules",
    "lightning.fabric.accelerators",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.fsdp",
    "torch.nn.modules",
)
OPTION = "--allow_imports"
HELP = f"{OPTION} PREFIX, on the command line only: what else configurations may import, such as my_package.callbacks."


def split_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prefixes that the command line allows, and the other words in their order.

    Raises:
        ArgumentError: For the option without a prefix.
    """
    prefixes, others = [], []
    rest = iter(words)
    for word in rest:
        if word == OPTION:
            prefixes.append(next(rest, ""))
        elif word.startswith(f"{OPTION}="):
            prefixes.append(word.partition("=")[2])
        else:
            others.append(word)
    if "" in prefixes:
        raise ArgumentError(None, f"{OPTION}: name a module or a package, such as my_package.callbacks.")
    return prefixes, others


@contextmanager
def restricted_imports(prefixes: Sequence[str] = ()) -> Iterator[None]:
    """Have every parser refuse, before anything is imported, what is not below an allowed prefix.

    It holds for the whole process, and as long as the context.

    Args:
        prefixes: What is allowed besides `ALLOWED`.

    Raises:
        ArgumentError: For a prefix that is no dotted path, or that of the parser itself.
    """
    before = dict(parsing_settings)
    try:
        try:
            set_parsing_settings(
                import_path_denylist=["*"],
                import_path_allowlist=[*ALLOWED, *prefixes],
                # where a class takes anything, what looks like the description of an object stays a dict
                instantiate_subclass_spec_in_any=False,
            )
        except ValueError as error:
            raise ArgumentError(None, f"{OPTION}: {error}") from error
        yield
    finally:
        parsing_settings.update(before)


def denied_message(path: str) -> str:
    """What to say of a path that was refused."""
    return (
        f"{path} is not imported: configurations name classes of this program and of Lightning. If you know what it "
        f"runs and want that, put {OPTION} {path.rpartition('.')[0] or path} on the command line."
    )
