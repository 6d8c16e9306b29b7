"""The command `chat`: responses of the checkpoint's model, history in the prompt, options and bad input."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.cli import main
from app.export.load_run import find_checkpoint, load_module
from datamodules.tokens.conversations import ConversationEncoder
from tests.app.conftest import CommandLine
from tests.app.test_bad_input import refused

Chat = Callable[..., list[str]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Return a function that runs `chat` with these lines on stdin and returns the lines of stdout."""

    def talk(run: Any, lines: list[str], *options: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(run), *options]) == 0
        return capsys.readouterr().out.splitlines()

    return talk


def expected(run: Any, *turns: str, system: str | None = None) -> list[str]:
    """Return greedy responses to `turns`, each generated from the conversation up to its turn."""
    module: Any = load_module(find_checkpoint(str(run)), {})
    encoder = ConversationEncoder(
        module.tokenizer, module.hparams["prompt_template"], 10**6, module.hparams["response_end"]
    )
    messages = [{"role": "system", "content": system}] if system else []
    responses = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = torch.tensor([encoder.prompt(messages)])
        [response] = module.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        messages.append({"role": "assistant", "content": response})
        responses.append(response)
    return responses


def test_a_conversation_keeps_its_history_until_it_is_reset(fitted_instruction_cli: CommandLine, chat: Chat) -> None:
    run = fitted_instruction_cli.run()
    first, second = expected(run, "hello there", "and then")
    [without_history] = expected(run, "and then")
    printed = chat(run, ["hello there", "", "and then", "/reset", "and then", "/exit", "never read"])
    assert [line.strip() for line in printed] == [first, second, without_history]
    assert second != without_history


def test_system_message_and_sampling(fitted_instruction_cli: CommandLine, chat: Chat) -> None:
    run = fitted_instruction_cli.run()
    [line] = chat(run, ["hello there"], "--system=be brief", "--max_new_tokens=3", "--device=cpu")
    [response] = expected(run, "hello there", system="be brief")
    assert response.startswith(line.strip()) or line.strip() in response
    sampled = ["--temperature=30", "--max_new_tokens=8"]
    assert chat(run, ["hello"], *sampled, "--seed=5") == chat(run, ["hello"], *sampled, "--seed=5")
    responses = {chat(run, ["hello"], *sampled)[0] for _ in range(3)}
    assert len(responses) > 1


def test_bad_input_is_refused(
    fitted_instruction_cli: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(fitted_instruction_cli.run())
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 3000 + "\n"))
    refused(capsys, main(["chat", run]), "positions", "Shorten")
    refused(capsys, main(["chat", run, "--device=nowhere"]), "--device", "nowhere")
    refused(capsys, main(["chat", run, "--temperature=-1"]), "temperature", "-1")
    refused(capsys, main(["chat", "nowhere"]), "RUN", "nowhere")


def test_a_run_on_images_is_refused(fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["chat", str(fitted_cli.run())]), "RUN", "ImageClassifier", "LanguageModel")
