"""Encode conversations: Alpaca's columns or chat messages become tokens through a Jinja template, with a loss mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from datamodules.errors import DataError

Message = dict[str, str]  # Role, content, and in a user's message also Alpaca's input, if any.
ROLES = ("system", "user", "assistant")
SENDERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")}  # ShareGPT's roles.

# Alpaca's prompts (Taori et al. 2023) as a chat template. The same code then renders Alpaca's prompts and chats.
_INTRODUCTION = (
    "'Below is an instruction that describes a task' + (', paired with an input that provides further context' if "
    "message['input'] else '') + '. Write a response that appropriately completes the request.\\n\\n'"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' if message['content'] else '' }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}{{ " + _INTRODUCTION + " }}{% endif %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}"
    "{% else %}{{ '### Response:' + message['content'] + eos_token + ('' if loop.last else '\\n\\n') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
)


def alpaca_template(tokenizer: Any) -> str:
    """Return Alpaca's template, preceded by the begin token if the tokenizer puts this token before each text."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # True for LLaMA, False for GPT-2.
    return ("{{ bos_token }}" if begins else "") + ALPACA


@dataclass(frozen=True)
class Columns:
    """Columns of a table, and how a row becomes a conversation.

    Args:
        messages: Column of whole conversations; None if the next three columns are read.
        instruction: Column of the instructions.
        input: Column of the text that an instruction is about, or None.
        response: Column of the responses; None in prediction.
        input_section: If true, the template has a section for the input. Otherwise the input follows the instruction.
        system: System message for conversations without one.
        end_mark: Text to remove from the end of responses.
    """

    messages: str | None
    instruction: str
    input: str | None
    response: str | None
    input_section: bool
    system: str | None
    end_mark: str | None

    def names(self) -> list[str]:
        """Return the columns to read, each once."""
        names = [self.messages] if self.messages else [self.instruction, self.input, self.response]
        return list(dict.fromkeys(name for name in names if name is not None))

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        """Return the messages of a row, with the response if `response` is set.

        Raises:
            DataError: If the cell of the column `messages` holds no list of messages.
        """
        if self.messages:
            messages = read_messages(row[self.messages])
        else:
            messages = [{"role": "user", **self._question(row)}]
            if self.response:
                messages.append({"role": "assistant", "content": row[self.response] or ""})
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = self.without_mark(message["content"])
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _question(self, row: dict[str, Any]) -> Message:
        instruction, text = row[self.instruction], (row[self.input] or "") if self.input else ""
        if not text.strip():
            return {"content": instruction}
        return (
            {"content": instruction, "input": text} if self.input_section else {"content": f"{instruction}\n\n{text}"}
        )

    def without_mark(self, response: str) -> str:
        """Return a response without the mark at its end and the space before the mark."""
        if self.end_mark and response.rstrip().endswith(self.end_mark):
            return response.rstrip().removesuffix(self.end_mark).rstrip()
        return response


def read_messages(cell: Any) -> list[Message]:
    """Return the messages of a cell, with `role` and `content`, or with ShareGPT's `from` and `value`.

    An assistant's message may lack content.

    Args:
        cell: Content of a column of conversations.

    Raises:
        DataError: If the cell is not a list of such messages.
    """
    if not isinstance(cell, list):
        raise DataError(f"the cell must be a list of messages, not {str(cell)[:80]}")
    messages: list[Message] = []
    for message in cell:
        fields = message if isinstance(message, dict) else {}
        sender = fields.get("from") if fields.get("role") is None else fields["role"]
        role = SENDERS.get(sender, sender) if isinstance(sender, str) else None
        content = fields.get("value") if fields.get("content") is None else fields["content"]
        if role not in ROLES or not (isinstance(content, str) or (role == "assistant" and content is None)):
            raise DataError(
                f"a message must have `role` ({', '.join(ROLES)}) and text as `content`, or ShareGPT's `from` and "
                f"`value`, but the message is {str(message)[:80]}"
            )
        messages.append({"role": role, "content": content or ""})
    return messages


def response_end(tokenizer: Any, template: str) -> int:
    """Return the token with which a template ends a response. The token may differ from the tokenizer's end token.

    Raises:
        DataError: If the template ends responses with plain text, or refuses a conversation.
    """
    mark = "§"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    ending = render(tokenizer, template, messages, add_generation_prompt=False).rpartition(mark)[2]
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in tokenizer(ending, add_special_tokens=False)["input_ids"]:
        if token in special:
            return int(token)
    raise DataError(
        "data.template: the chat template has no special token after a response, so that generation would never end. "
        "Use template: alpaca."
    )


def render(tokenizer: Any, template: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Return a conversation as text.

    Args:
        tokenizer: Tokenizer of the backbone.
        template: Jinja template, which runs in the sandbox of transformers.
        messages: The conversation.
        add_generation_prompt: If true, the text ends where a response begins.

    Raises:
        DataError: If the template refuses the conversation.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # A template is a program and can raise any exception.
        raise DataError(
            f"data.template: the chat template refuses the conversation that begins {_begin(messages)!r}: {error}"
        ) from error
    return text


def prompt_messages(messages: list[Message]) -> list[Message]:
    """Return a conversation without its last response: the prompt for this response."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


@dataclass(frozen=True)
class ConversationEncoder:
    """Convert conversations to tokens.

    Args:
        tokenizer: Tokenizer of the backbone.
        template: Jinja template of the whole text, special tokens included.
        max_length: Largest number of tokens of a conversation.
        end: Token that ends a response, from `response_end`.
    """

    tokenizer: Any
    template: str
    max_length: int
    end: int

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt for a response. A prompt that is too long loses its middle."""
        text = self._render(self.clean(messages), add_generation_prompt=True)
        return _without_middle(self._tokens(text), self.max_length)

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation, and a mask of the tokens with loss: responses up to their end tokens.

        Prompt and response are tokenised together if the tokens of the prompt are then the same as without the
        response. Otherwise, prompt and response are tokenised separately.

        Raises:
            DataError: If the conversation begins with the assistant. Also if the template refuses the conversation,
                rewrites earlier turns, or leaves out all responses.
        """
        messages = self.clean(messages)
        if messages and messages[0]["role"] == "assistant":
            raise DataError(
                "data.messages_column: the conversation begins with the assistant, but must begin with the user."
            )
        tokens: list[int] = []
        loss_mask: list[bool] = []
        previous_text = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt_text = self._render(messages[:turn], add_generation_prompt=True)
            answered_text = self._render(messages[: turn + 1], add_generation_prompt=False)
            if not prompt_text.startswith(previous_text) or not answered_text.startswith(prompt_text):
                raise DataError(
                    "data.template: the chat template does not write a conversation turn by turn, so that prompts and "
                    f"responses cannot be told apart in the conversation that begins {_begin(messages)!r}. Give single "
                    "turns, or use template: alpaca."
                )
            prompt = self._tokens_after(previous_text, prompt_text)
            response = self._tokens_after(prompt_text, answered_text)
            ends = [i for i, token in enumerate(response) if token == self.end]
            trained = ends[-1] + 1 if ends else len(response)
            tokens += prompt + response
            loss_mask += [False] * len(prompt) + [i < trained for i in range(len(response))]
            previous_text = answered_text
        if True not in loss_mask:
            raise DataError(
                f"data.template: the template leaves out the responses of the conversation that begins "
                f"{_begin(messages)!r}. Use template: alpaca."
            )
        return truncate_conversation(tokens, loss_mask, self.max_length)

    def clean(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages without special tokens, which the tokenizer would read as tokens of the template."""
        return [{key: self._clean(text) for key, text in message.items()} for message in messages]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        texts = sorted((added | set(self.tokenizer.all_special_tokens)) - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def _clean(self, text: str) -> str:
        while self._special.search(text):  # Repeat, since the remaining text may form another special token.
            text = self._special.sub("", text)
        return text

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return render(self.tokenizer, self.template, messages, add_generation_prompt)

    def _tokens_after(self, before: str, text: str) -> list[int]:
        """Return the tokens of a text without the tokens of its beginning `before`."""
        start = max((match.start() for match in self._special.finditer(before)), default=0)
        # Text before a special token has no effect on the tokens after the special token.
        beginning, full = self._tokens(before[start:]), self._tokens(text[start:])
        if full[: len(beginning)] == beginning:
            return full[len(beginning) :]
        return self._tokens(text[len(before) :])

    @cached_property
    def _tokens(self) -> Callable[[str], list[int]]:
        plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}

        @lru_cache(maxsize=2)  # A prompt is tokenised alone, and then with its response.
        def tokens(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(text, **plain)["input_ids"] if text else []
            return ids

        return tokens


def truncate_conversation(tokens: list[int], loss_mask: list[bool], max_length: int) -> tuple[list[int], list[bool]]:
    """Truncate a conversation so that the first response keeps half of `max_length`, or all its tokens if fewer.

    The first prompt loses its middle, as in LongBench (Bai et al. 2023), since a template writes at both ends of a
    prompt. If the conversation is still too long, its end is cut.

    Args:
        tokens: The conversation.
        loss_mask: Mask of the tokens with loss, with at least one True.
        max_length: Number of tokens to keep, 2 or more.
    """
    if len(tokens) <= max_length:
        return tokens, loss_mask
    first = loss_mask.index(True)
    prompt = _without_middle(tokens[:first], max_length - min(len(tokens) - first, max_length // 2))
    rest = slice(first, first + max_length - len(prompt))
    return prompt + tokens[rest], [False] * len(prompt) + loss_mask[rest]


def _without_middle(tokens: list[int], most: int) -> list[int]:
    if len(tokens) <= most:
        return tokens
    return tokens[: most // 2] + tokens[len(tokens) - (most - most // 2) :]


def _begin(messages: Sequence[Message]) -> str:
    return next((m["content"][:60] for m in messages if m["role"] != "system"), "")
