"""Conversations as tokens: Alpaca's columns or chat messages, through a Jinja template, with what is to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from datamodules.errors import DataError

Message = dict[str, str]  # role, content, and of a user's perhaps Alpaca's input
ROLES = ("system", "user", "assistant")

# Alpaca's prompts (Taori et al. 2023) as a chat template, so that one code serves both and any tokenizer can carry it.
_INTRODUCTION = (
    "'Below is an instruction that describes a task' + (', paired with an input that provides further context' if "
    "message['input'] else '') + '. Write a response that appropriately completes the request.\\n\\n'"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}{{ " + _INTRODUCTION + " }}{% endif %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}"
    "{% else %}{{ '### Response:' + message['content'] + eos_token + ('' if loop.last else '\\n\\n') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
)


def alpaca_template(tokenizer: Any) -> str:
    """Alpaca's template for a tokenizer, which begins a text as the tokenizer does."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # LLaMA's does, GPT-2's does not
    return ("{{ bos_token }}" if begins else "") + ALPACA


def special_texts(tokenizer: Any) -> list[str]:
    """Texts that a tokenizer takes for special tokens, longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


@dataclass(frozen=True)
class ConversationEncoder:
    """Makes tokens of conversations.

    Args:
        tokenizer: The backbone's.
        template: Jinja template of the whole text, special tokens included.
        max_length: Most tokens of a conversation.
        special: What is taken out of all contents, since the tokenizer would take it for the template's own.
    """

    tokenizer: Any
    template: str
    max_length: int
    special: tuple[str, ...]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt that waits for a response; one that is too long loses its middle."""
        tokens: list[int] = self._tokens(self._render(messages, waiting=True))
        return _without_middle(tokens, self.max_length)

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which are to be learnt: those of responses, to the token that ends each.

        Raises:
            DataError: If the template refuses it, or rewrites earlier turns in view of later ones.
        """
        tokens: list[int] = []
        learnt: list[bool] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:turn], waiting=True)
            answered = self._render(messages[: turn + 1], waiting=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise DataError(
                    "data.template: the chat template does not write a conversation turn by turn, so that prompts and "
                    f"responses cannot be told apart, as in the one that begins {_begin(messages)!r}; use template: "
                    "alpaca."
                )
            prompt, response = self._tokens(asked[len(done) :]), self._tokens(answered[len(asked) :])
            ends = [i for i, token in enumerate(response) if token == self.tokenizer.eos_token_id]
            taught = ends[-1] + 1 if ends else len(response)
            tokens += prompt + response
            learnt += [False] * len(prompt) + [i < taught for i in range(len(response))]
            done = answered
        return cut(tokens, learnt, self.max_length)

    def _render(self, messages: Sequence[Message], waiting: bool) -> str:
        clean = [{key: self._clean(text) for key, text in message.items()} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                clean, chat_template=self.template, tokenize=False, add_generation_prompt=waiting
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"data.template: the chat template refuses the conversation that begins {_begin(messages)!r}: {error}"
            ) from error
        return text

    def _clean(self, text: str) -> str:
        for special in self.special:
            text = text.replace(special, "")
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def cut(tokens: list[int], learnt: list[bool], most: int) -> tuple[list[int], list[bool]]:
    """Cut a conversation so that the first response keeps half of the room, or all of itself if it takes less.

    The first prompt loses its middle, as in LongBench (Bai et al. 2023), since a template has its say at both ends;
    what is still too long behind it loses its end.

    Args:
        tokens: The conversation.
        learnt: Which of them are to be learnt, at least one.
        most: Tokens to keep, 2 or more.
    """
    if len(tokens) <= most:
        return tokens, learnt
    first = learnt.index(True)
    prompt = _without_middle(tokens[:first], most - min(len(tokens) - first, most // 2))
    rest = slice(first, first + most - len(prompt))
    return prompt + tokens[rest], [False] * len(prompt) + learnt[rest]


def _without_middle(tokens: list[int], most: int) -> list[int]:
    if len(tokens) <= most:
        return tokens
    return tokens[: most // 2] + tokens[len(tokens) - (most - most // 2) :]


def _begin(messages: Sequence[Message]) -> str:
    return messages[0]["content"][:60] if messages else ""
