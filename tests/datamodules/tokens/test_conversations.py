"""Tokens of conversations: exact texts of templates, responses in the loss, and cuts of long conversations."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from datamodules.tokens.conversations import (
    ALPACA,
    Columns,
    ConversationEncoder,
    Message,
    alpaca_template,
    prompt_messages,
    response_end,
    truncate_conversation,
)
from tests.causal_backbones import CHAT, byte_tokenizer
from tests.support.refusals import refuses

END = 2  # <|im_end|>, also the padding token
ALPACA_COLUMNS: dict[str, Any] = {
    "messages": None,
    "instruction": "instruction",
    "input": "input",
    "response": "output",
    "input_section": True,
    "system": None,
    "end_mark": None,
}


def columns(**keys: Any) -> Columns:
    return Columns(**{**ALPACA_COLUMNS, **keys})


def encoder(template: str = CHAT, max_length: int = 10_000, tokenizer: Any = None) -> ConversationEncoder:
    tokenizer = tokenizer or byte_tokenizer()
    return ConversationEncoder(tokenizer, template, max_length, tokenizer.eos_token_id)


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """Return messages of a user and an assistant in turn, after a system message if given."""
    roles = ["user", "assistant"]
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def text(tokens: list[int]) -> str:
    return byte_tokenizer().decode(tokens)


def learnt_runs(tokens: list[int], learnt: list[bool]) -> list[str]:
    """Return the texts of consecutive tokens in the loss."""
    edges = [0, *(i for i in range(1, len(tokens)) if learnt[i] != learnt[i - 1]), len(tokens)]
    return [text(tokens[a:b]) for a, b in pairwise(edges) if learnt[a]]


# -------------------------------------------------------------------------------------------------------------- Alpaca

WITHOUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name a colour.

### Response:"""
WITH = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add them.

### Input:
1 and 2

### Response:"""


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Name a colour.", "input": ""}, WITHOUT),
        ({"instruction": "Name a colour.", "input": None}, WITHOUT),
        ({"instruction": "Name a colour.", "input": " \n"}, WITHOUT),
        ({"instruction": "Add them.", "input": "1 and 2"}, WITH),
    ],
)
def test_prompts_equal_alpacas(row: dict[str, Any], prompt: str) -> None:
    made = encoder(ALPACA)
    assert text(made.prompt(columns(response=None).conversation(row))) == prompt
    tokens, learnt = made.conversation(columns().conversation({**row, "output": " Red\n  or so "}))
    assert text(tokens) == prompt + " Red\n  or so <|im_end|>"
    assert learnt_runs(tokens, learnt) == [" Red\n  or so <|im_end|>"]
    assert tokens[-1] == END
    assert tokens[: learnt.index(True)] == made.prompt(columns(response=None).conversation(row))


def test_alpaca_without_inputs_and_with_a_system_message_instead_of_its_introduction() -> None:
    messages = columns(input=None, response=None).conversation({"instruction": "Name a colour."})
    assert text(encoder(ALPACA).prompt(messages)) == WITHOUT
    for system, begin in (("Be brief.", "Be brief.\n\n"), ("", "")):
        messages = columns(system=system).conversation({"instruction": "Hi", "input": "", "output": "Yo"})
        tokens, _ = encoder(ALPACA).conversation(messages)
        assert text(tokens) == f"{begin}### Instruction:\nHi\n\n### Response:Yo<|im_end|>"


def test_alpacas_template_accepts_several_turns() -> None:
    tokens, learnt = encoder(ALPACA).conversation(talk("Name a colour.", "Red", "Another?", "Blue"))
    assert text(tokens) == (WITHOUT + "Red<|im_end|>\n\n### Instruction:\nAnother?\n\n### Response:Blue<|im_end|>")
    assert learnt_runs(tokens, learnt) == ["Red<|im_end|>", "Blue<|im_end|>"]
    assert text(encoder(ALPACA).prompt(talk("Name a colour.", "Red", "Another?"))) + "Blue<|im_end|>" == text(tokens)


def llama_tokenizer(begins: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters that begins a text with <s> and `▁`, and writes spaces as `▁`, like LLaMA's."""
    letters = [chr(i) for i in range(33, 127)]
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, "▁", "\n", *letters, "▁a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="first")
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize("begins", [True, False])
def test_alpacas_text_has_the_begin_token_that_the_tokenizer_adds(begins: bool) -> None:
    tokenizer = llama_tokenizer(begins)
    alpaca_encoder = encoder(alpaca_template(tokenizer), tokenizer=tokenizer)
    messages = talk("Name a colour.", "Red", "Another?", "Blue")
    tokens, _ = alpaca_encoder.conversation(messages)
    assert tokens.count(1) == begins
    assert (
        alpaca_encoder.prompt(messages[:1])
        == tokenizer("<s>" * begins + WITHOUT, add_special_tokens=False)["input_ids"]
    )
    assert tokens[: len(alpaca_encoder.prompt(messages[:1]))] == alpaca_encoder.prompt(messages[:1])
    assert (tokens[0] == 1) == begins


# --------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("contents", [("Hi", "Yo"), ("Hi", "Yo", "And A?", " B\n\nor C ", "No", "D")])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_equals_the_tokenizers_output_for_the_complete_conversation(
    contents: tuple[str, ...], system: str | None
) -> None:
    messages = talk(*contents, system=system)
    tokens, learnt = encoder().conversation(messages)
    assert tokens == byte_tokenizer().apply_chat_template(messages, return_dict=False)
    assert learnt_runs(tokens, learnt) == [f"{content}<|im_end|>" for content in contents[1::2]]
    prompt = encoder().prompt(messages[:-1])
    assert prompt == tokens[: len(prompt)]
    assert learnt[len(prompt) - 1 : len(prompt) + 1] == [False, True]


LLAMA_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_response_is_tokenised_in_its_context() -> None:
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = LLAMA_CHAT
    messages = talk("Why?", "as ever", "Why not?", "ask me")
    chat_encoder = encoder(LLAMA_CHAT, tokenizer=tokenizer)
    tokens, learnt = chat_encoder.conversation(messages)
    assert tokens == tokenizer.apply_chat_template(messages, return_dict=False)
    first = learnt.index(True)
    assert tokenizer.convert_ids_to_tokens(tokens[first : first + 2]) == ["▁a", "s"]
    for turn in (1, 3):
        prompt = chat_encoder.prompt(messages[:turn])
        assert prompt == tokens[: len(prompt)]
        assert learnt[len(prompt)] and not learnt[len(prompt) - 1]


def test_a_prompt_keeps_its_tokens_if_the_tokenizer_would_merge_its_end_with_the_response() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q:' + m['content'] + ' ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    for response, joins in (("A and B", True), ("F and B", False)):  # ` A` is one token, ` F` is two
        tokens, learnt = encoder(template).conversation(talk("who?", response))
        prompt = encoder(template).prompt(talk("who?"))
        assert text(tokens) == f"Q:who? {response}<|im_end|>"
        assert tokens[: len(prompt)] == prompt
        assert learnt == [i >= len(prompt) for i in range(len(tokens))]
        assert (tokens != byte_tokenizer()(text(tokens))["input_ids"]) == joins


TWICE = CHAT.replace("<|im_end|>\n", "<|im_end|>{{ '<|im_end|>' if message['role'] == 'assistant' }}\n")


@pytest.mark.parametrize(("template", "end"), [(CHAT, "<|im_end|>"), (TWICE, "<|im_end|><|im_end|>")])
def test_the_loss_covers_every_end_token_of_a_response(template: str, end: str) -> None:
    assert byte_tokenizer().pad_token_id == byte_tokenizer().eos_token_id == END
    tokens, learnt = encoder(template).conversation(talk("Hi", "Yo", "Go", "No"))
    assert learnt_runs(tokens, learnt) == [f"Yo{end}", f"No{end}"]  # without the end tokens of the user
    assert text([tokens[-1]]) == "\n" and not learnt[-1]  # the line break that the template writes after the end


def test_a_response_ends_with_the_end_token_of_its_template() -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    tokens, learnt = encoder(template).conversation(talk("Hi", "Yo"))
    assert text(tokens) == "<user>Hi</><assistant>Yo</>"
    assert learnt_runs(tokens, learnt) == ["<assistant>Yo</>"]  # everything after the prompt
    with refuses("no special token after a response"):
        response_end(byte_tokenizer(), template)
    # in Qwen's base models this token differs from the template's end token
    tokenizer = byte_tokenizer(eos_token="<unk>")
    assert tokenizer.eos_token_id != response_end(tokenizer, CHAT) == END
    chat_encoder = ConversationEncoder(tokenizer, CHAT, 200, response_end(tokenizer, CHAT))
    assert learnt_runs(*chat_encoder.conversation(talk("a", "bc"))) == ["bc<|im_end|>"]
    assert response_end(tokenizer, alpaca_template(tokenizer)) == tokenizer.eos_token_id


def test_a_last_message_of_the_user_is_left_out_of_training() -> None:
    messages = talk("Hi", "Yo", "Thanks")
    assert encoder().conversation(messages) == encoder().conversation(messages[:2])
    assert text(encoder().prompt(prompt_messages(messages))).endswith("Thanks<|im_end|>\n<|im_start|>assistant\n")
    assert prompt_messages(messages[:2]) == messages[:1]
    assert prompt_messages([]) == []


FORGETS = (
    "{% for m in messages %}{{ m['role'] + ':' }}"
    "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BOT = CHAT.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}")
RAISES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
IN_TURNS = "does not write a conversation turn by turn"


@pytest.mark.parametrize(
    ("template", "contents", "parts"),
    [
        (FORGETS, ("Hi", "Yo", "Why?", "So"), (IN_TURNS, "'Hi'", "template: alpaca")),
        (BOT, ("Hi", "Yo"), (IN_TURNS, "'Hi'")),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            ("Hi", "Yo"),
            ("leaves out the",),
        ),
        *(
            (template, ("Hi", "Yo"), ("the chat template refuses the conversation that begins 'Hi'", reason))
            for template, reason in (
                (RAISES, "no system"),
                ("{{ messages[0]['content'] + 1 }}", "str"),
                ("{{ messages[9].content.upper() }}", "element 9"),
                ("{% for m in messages %}", "end"),
            )
        ),
    ],
)
def test_unsupported_templates_are_refused(template: str, contents: tuple[str, ...], parts: tuple[str, ...]) -> None:
    messages = talk(*contents, system="Be brief.")
    with refuses("data.template:", *parts):
        encoder(template).conversation(messages)
    if "refuses" in parts[0]:
        with refuses("data.template:", *parts):
            encoder(template).prompt(messages[:2])


# ------------------------------------------------------------------------------------------------------ special tokens


def test_special_tokens_in_contents_are_removed() -> None:
    system, user, assistant = "S<unk>", "a<|im_end|>\n<|im_start|>assistant\nb", "<|im_<|im_end|>end|>c<|im_start|"
    tokens, learnt = encoder().conversation(talk(user, assistant, system=system))
    clean = talk("a\nassistant\nb", "c<|im_start|", system="S")
    assert (tokens, learnt) == encoder().conversation(clean)
    assert encoder().clean(talk(user, assistant, system=system)) == clean
    assert encoder().prompt(talk(user)) == encoder().prompt(clean[1:2])
    assert [token for token in tokens if token < 3] == [1, END] * 3
    row = {"instruction": "a", "input": "x<|im_end|>y", "output": "b"}
    assert "### Input:\nxy\n" in text(encoder(ALPACA).conversation(columns().conversation(row))[0])


def test_added_tokens_that_are_not_special_are_kept() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.add_tokens([AddedToken("<tool.>", special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<tool.><more>", special=True)], special_tokens=True)
    messages = talk("a", "<think>b<tool.><more>c<toolx>")
    assert encoder(tokenizer=tokenizer).clean(messages) == talk("a", "<think>bc<toolx>")


# ------------------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("output", "mark", "response"),
    [
        ("Yes<|endoftext|>", "<|endoftext|>", "Yes"),
        ("Yes \n<|endoftext|>\n", "<|endoftext|>", "Yes"),
        ("  Yes<|endoftext|><|endoftext|>", "<|endoftext|>", "  Yes<|endoftext|>"),
        ("No<|endoftext|> Yes ", "<|endoftext|>", "No<|endoftext|> Yes "),
        ("    indented\n", "<|endoftext|>", "    indented\n"),
        ("Yes<|endoftext|>", None, "Yes<|endoftext|>"),
        ("Yes END", "END", "Yes"),
        ("END", "END", ""),
        (None, "END", ""),
    ],
)
def test_end_marks_are_removed_from_responses(output: str | None, mark: str | None, response: str) -> None:
    row = {"instruction": "a END", "input": "", "output": output}
    *_, message = columns(end_mark=mark).conversation(row)
    assert message == {"role": "assistant", "content": response}
    chat = {"chat": [{"role": "user", "content": "a END"}, {"role": "assistant", "content": output}]}
    assert columns(messages="chat", end_mark=mark).conversation(chat) == talk("a END", response)


def test_an_input_is_appended_to_the_instruction_in_templates_without_inputs() -> None:
    row = {"instruction": "Add them. ", "input": "1 and 2\n", "output": "3"}
    assert columns(input_section=False).conversation(row) == talk("Add them. \n\n1 and 2\n", "3")
    assert columns(input_section=False).conversation({**row, "input": None}) == talk("Add them. ", "3")
    assert columns(input_section=False, input=None).conversation(row) == talk("Add them. ", "3")
    assert columns(input_section=False, response=None).names() == ["instruction", "input"]


def test_a_system_prompt_is_added_to_conversations_without_one() -> None:
    chat_columns = columns(messages="chat", system="Default.")
    assert chat_columns.names() == ["chat"]
    assert chat_columns.conversation({"chat": talk("Hi", "Yo")}) == talk("Hi", "Yo", system="Default.")
    assert chat_columns.conversation({"chat": talk("Hi", "Yo", system="")}) == talk("Hi", "Yo", system="")
    assert chat_columns.conversation({"chat": []}) == talk(system="Default.")


# --------------------------------------------------------------------------------------------------------------- cuts


def test_a_long_prompt_is_cut_in_its_middle() -> None:
    complete = encoder().prompt(talk("0123456789" * 20))
    shortened = encoder(max_length=81).prompt(talk("0123456789" * 20))
    assert len(shortened) == 81
    assert shortened == complete[:40] + complete[-41:]
    assert encoder(max_length=len(complete)).prompt(talk("0123456789" * 20)) == complete


@pytest.mark.parametrize(
    ("prompt", "response", "most", "kept_prompt", "kept_response"),
    [
        (6, 4, 10, 6, 4),  # everything fits
        (20, 4, 10, 6, 4),  # a short response is not cut
        (20, 9, 10, 5, 5),  # a long response keeps half of the room
        (3, 20, 10, 3, 7),  # a long response takes the room that a short prompt leaves
        (0, 20, 10, 0, 10),
        (20, 1, 2, 1, 1),
    ],
)
def test_cut_divides_the_room_between_prompt_and_response(
    prompt: int, response: int, most: int, kept_prompt: int, kept_response: int
) -> None:
    tokens, learnt = truncate_conversation([*range(prompt + response)], [False] * prompt + [True] * response, most)
    assert learnt == [False] * kept_prompt + [True] * kept_response
    assert tokens[kept_prompt:] == [*range(prompt, prompt + kept_response)]
    left = kept_prompt // 2 if kept_prompt < prompt else kept_prompt
    assert tokens[:left] == [*range(left)]
    assert tokens[left:kept_prompt] == [*range(prompt - kept_prompt + left, prompt)]


def test_a_cut_fits_and_keeps_half_of_the_room_or_the_complete_first_response() -> None:
    draw = random.Random(0)
    for _ in range(500):
        turns = [draw.randrange(1, 40) for _ in range(2 * draw.randrange(1, 4))]
        learnt = [bool(i % 2) for i, size in enumerate(turns) for _ in range(size)]
        tokens, most = [*range(len(learnt))], draw.randrange(2, 90)
        kept, marks = truncate_conversation(tokens, learnt, most)
        assert len(kept) == len(marks) == min(most, len(tokens))
        assert kept == sorted(set(kept))  # in order, without repeats
        assert marks == [learnt[token] for token in kept]
        first = range(turns[0], turns[0] + turns[1])
        spared = sum(token in first for token in kept)
        assert spared >= min(len(first), most // 2)
        assert [token for token in kept if token in first] == [*first][:spared]
