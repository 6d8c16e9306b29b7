"""Talk to a fine-tuned decoder: each line of input is a message, and the response is printed as it is generated.

The conversation so far is part of each prompt. `/reset` begins a new conversation, and `/exit` or the end of the input
ends the program.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from datamodules.errors import UsageError

if TYPE_CHECKING:  # a run on images imports no transformers
    from datamodules.tokens.conversations import ConversationEncoder, Message
    from modules.language_modeling import LanguageModel

_log = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=str, help="A run directory (its best checkpoint), or a checkpoint.")
    parser.add_argument(
        "--system", metavar="TEXT", type=str | None, help="System message. Default: data.system_prompt of the run."
    )
    parser.add_argument(
        "--temperature", type=float | None, help="Sample at this temperature. Default: as the run generates."
    )
    parser.add_argument(
        "--max_new_tokens", type=int | None, help="Largest number of tokens of a response. Default: the run's."
    )
    parser.add_argument("--seed", type=int | None, help="Seed of sampling. Default: a new seed in each call.")
    parser.add_argument("--device", type=str | None, help="Such as cuda. Default: the accelerator, or else the CPU.")


def run(arguments: Namespace) -> None:
    """Answer each line of the standard input.

    Raises:
        UsageError: If the run has no decoder with a prompt template, the device cannot be used, or a message is too
            long.
        CheckpointError: If the checkpoint is missing or damaged.
        ModelError: If the backbone is missing, or differs from the backbone of the training.
    """
    import torch

    from app.export.load_run import find_checkpoint, load_module
    from app.run.checkpoint_io import read_checkpoint, saved_configuration
    from datamodules.tokens.conversations import ConversationEncoder
    from modules.language_modeling import LanguageModel

    checkpoint = find_checkpoint(arguments.run)
    module = load_module(checkpoint, {})
    if not isinstance(module, LanguageModel):
        raise UsageError(f"RUN: {arguments.run} is a {type(module).__name__}. chat needs a LanguageModel.")
    name = arguments.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        module.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {name} cannot be used ({error}). Use --device cpu.") from error
    changes = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    options: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    if "temperature" in options:
        options["do_sample"] = True
    module.generation = replace(module.generation, **options)
    module.configure_generation()
    data = saved_configuration(read_checkpoint(checkpoint)).get("data", {}).get("init_args", {})
    system = arguments.system if arguments.system is not None else data.get("system_prompt")
    template, end = module.hparams["prompt_template"], module.hparams["response_end"]
    if template is None:
        raise UsageError(
            f"RUN: {arguments.run} was not trained on conversations, so it has no prompt template. Give another run."
        )
    encoder = ConversationEncoder(module.tokenizer, template, sys.maxsize, end)
    _ = torch.seed() if arguments.seed is None else torch.manual_seed(arguments.seed)
    with torch.inference_mode():
        _talk(module, encoder, system)


def _talk(module: LanguageModel, encoder: ConversationEncoder, system: str | None) -> None:
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    for line in _lines():
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        response = _answer(module, encoder, messages)
        messages.append({"role": "assistant", "content": response})


def _lines() -> Iterator[str]:
    """Yield the lines of the standard input up to `/exit`. A terminal gets a prompt and line editing."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - input() then has history and editing keys

        print("/reset begins a new conversation; /exit ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _answer(module: LanguageModel, encoder: ConversationEncoder, messages: list[Message]) -> str:
    """Stream a response and return it. While the prompt is too long, the oldest turns are dropped.

    Raises:
        UsageError: If a single message and its response exceed the positions of the backbone.
    """
    import torch
    from transformers import TextStreamer

    limit, response = module.position_limit, module.generation.max_new_tokens
    tokens = encoder.prompt(messages)
    while limit is not None and len(tokens) + response > limit:
        first = 1 if messages[0]["role"] == "system" else 0
        if len(messages) - first < 3:
            raise UsageError(
                f"The message has {len(tokens)} tokens. Message and response (--max_new_tokens {response}) exceed the "
                f"{limit} positions of the backbone. Shorten the message, or lower --max_new_tokens."
            )
        del messages[first : first + 2]
        _log.warning("The conversation no longer fits: its oldest message and response are left out.")
        tokens = encoder.prompt(messages)
    streamer = TextStreamer(module.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([tokens], device=module.device)
    generate: Any = module.backbone.generate
    generated = generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    return str(module.tokenizer.decode(generated[0, len(tokens) :], skip_special_tokens=True)).strip()
