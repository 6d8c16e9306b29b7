"""Multiple choice: scores equal those of a plain loop over prompts, and accuracies equal counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.utilities import dim_zero_cat
from transformers import AutoModelForCausalLM, Lfm2Config, PreTrainedModel

from modules.adapters import AdapterConfig, adapted_layers, attach
from modules.generation.choices import PrefixCache, choice_log_probabilities
from modules.metrics.multiple_choice import CATEGORIES, MultipleChoiceAccuracy
from tests.causal_backbones import VOCABULARY, byte_tokenizer, save_decoder

PREFIX = "The following are questions.\n\nWho?\nA. he\nB. she\nAnswer: B\n\n"
QUESTIONS = ["Why?\nAnswer:", "What is it that is there, and since when?\nA. it\nB. this\nAnswer:", "No\nAnswer:"]
CHOICES = torch.tensor([VOCABULARY[f"Ġ{letter}"] for letter in "ABCD"])
WINDOW = 20  # shorter than the prefix
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral in windows": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),  # the window of every second layer is wider than the prompts
    "gemma2 in windows": ("gemma2", {"sliding_window": WINDOW}),
}


def tokens_of(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer()(text)["input_ids"]
    return ids


def make(folder: Path, family: str = "llama", **keys: Any) -> PreTrainedModel:
    kind, changes = FAMILIES[family]
    model = AutoModelForCausalLM.from_pretrained(save_decoder(folder, kind, **changes), dtype=torch.float32, **keys)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return make(tmp_path_factory.mktemp("llama"))


def batch_of(prefix: str = PREFIX, questions: list[str] = QUESTIONS, shared: int | None = None) -> dict[str, Any]:
    """Return tokenized prompts, split after the prefix or after `shared` tokens."""
    prompts = [tokens_of(prefix + question) for question in questions]
    shared = len(tokens_of(prefix)) if shared is None else shared
    assert all(ids[:shared] == prompts[0][:shared] for ids in prompts)
    rests = [torch.tensor(ids[shared:]) for ids in prompts]
    return {
        "prefix": torch.tensor(prompts[0][:shared], dtype=torch.int64),
        "input_ids": pad_sequence(rests, batch_first=True),
        "lengths": torch.tensor([len(rest) for rest in rests]),
        "choices": CHOICES,
    }


@torch.no_grad()
def reference_scores(model: PreTrainedModel, prefix: str = PREFIX, questions: list[str] = QUESTIONS) -> Tensor:
    """Return the scores of each complete prompt, computed one by one without padding and cache."""
    rows = [
        model(torch.tensor([tokens_of(prefix + question)]), use_cache=False).logits[0, -1] for question in questions
    ]
    return torch.stack(rows).float().log_softmax(-1)[:, CHOICES]


def assert_alike(scores: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=atol)


class Passes:
    """Record the shape of the tokens in each forward pass of a decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, inputs: Any, keys: dict[str, Any]) -> None:
        self.shapes.append(tuple(keys["input_ids"].shape))


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_a_plain_loop(tmp_path: Path, family: str) -> None:
    model = make(tmp_path, family)
    expected = reference_scores(model)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # scores depend on the question
    passes, batch = Passes(model), batch_of()
    assert_alike(choice_log_probabilities(model, batch, PrefixCache()), expected)
    assert passes.shapes == [(1, len(batch["prefix"])), tuple(batch["input_ids"].shape)]  # the prefix runs once


@pytest.mark.parametrize("family", ["llama", "gemma2 in windows"])
def test_scores_in_bfloat16_are_as_close_as_a_plain_loop(tmp_path: Path, family: str) -> None:
    model = make(tmp_path, family)
    exact = reference_scores(model)
    model.bfloat16()
    scores = choice_log_probabilities(model, batch_of(), PrefixCache())
    assert_alike(scores, exact, atol=3 * float((reference_scores(model) - exact).abs().max()))


def test_scores_with_adapters_equal_those_of_a_plain_loop(tmp_path: Path) -> None:
    model = make(tmp_path)
    before = reference_scores(model)
    attach(model, AdapterConfig(train="B", rank=4, alpha=8, targets=["all"]))
    for layer in adapted_layers(model).values():
        for factor in layer.factors():
            for parameter in factor.named_factors(trained=True).values():
                torch.nn.init.normal_(parameter, std=0.5)
    expected = reference_scores(model)
    assert (expected - before).abs().max() > 0.1
    assert_alike(choice_log_probabilities(model, batch_of(), PrefixCache()), expected)


@pytest.mark.parametrize("shared", [0, 1, 30])
def test_any_part_of_the_common_prefix_may_be_shared(llama: PreTrainedModel, shared: int) -> None:
    assert_alike(choice_log_probabilities(llama, batch_of(shared=shared), PrefixCache()), reference_scores(llama))


def test_a_single_question_may_have_one_token_after_the_prefix(llama: PreTrainedModel) -> None:
    batch = batch_of(questions=QUESTIONS[:1], shared=len(tokens_of(PREFIX + QUESTIONS[0])) - 1)
    assert batch["input_ids"].shape == (1, 1)
    assert_alike(
        choice_log_probabilities(llama, batch, PrefixCache()), reference_scores(llama, questions=QUESTIONS[:1])
    )


def test_a_model_with_another_kind_of_cache_runs_complete_prompts() -> None:
    """LFM2's convolutions have a state that is not keys and values."""
    config = Lfm2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    passes, batch = Passes(model), batch_of()
    expected = reference_scores(model)
    passes.shapes.clear()
    assert_alike(choice_log_probabilities(model, batch, PrefixCache()), expected)
    assert passes.shapes == [(3, len(batch["prefix"]) + batch["input_ids"].shape[1])]


def test_the_output_layer_computes_one_position_per_question(llama: PreTrainedModel) -> None:
    shapes = []
    output = llama.get_output_embeddings()
    hook = output.register_forward_hook(lambda module, inputs, logits: shapes.append(tuple(logits.shape)))
    choice_log_probabilities(llama, batch_of(), PrefixCache())
    hook.remove()
    assert shapes == [(3, len(VOCABULARY))]


# --------------------------------------------------------------------------------------------------------------- cache


def cached_tensors(cache: PrefixCache) -> list[Tensor]:
    assert cache._keys is not None
    return [tensor for layer in cache._keys.layers for tensor in (layer.keys, layer.values)]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gemma2 in windows"])
def test_a_prefix_is_computed_once_and_not_changed(tmp_path: Path, family: str) -> None:
    model = make(tmp_path, family)
    cache, passes = PrefixCache(), Passes(model)
    first = choice_log_probabilities(model, batch_of(), cache)
    before = [tensor.clone() for tensor in cached_tensors(cache)]
    for questions in (QUESTIONS[:1], QUESTIONS[1:], QUESTIONS):
        last = choice_log_probabilities(model, batch_of(questions=questions), cache)
    assert torch.equal(first, last)
    assert all(torch.equal(a, b) for a, b in zip(before, cached_tensors(cache), strict=True))
    assert [shape[0] for shape in passes.shapes] == [1, 3, 1, 2, 3]
    other = "Another subject.\n\n"
    assert_alike(choice_log_probabilities(model, batch_of(other), cache), reference_scores(model, other))
    assert_alike(choice_log_probabilities(model, batch_of(), cache), first)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_invalidates_the_cache(tmp_path: Path, optimizer: Any) -> None:
    model = make(tmp_path)
    trained = model.get_input_embeddings().weight
    cache = PrefixCache()
    before = choice_log_probabilities(model, batch_of(), cache)
    trained.grad = torch.ones_like(trained) * torch.arange(len(trained))[:, None].remainder(7)
    optimizer([trained], lr=0.05).step()
    expected = reference_scores(model)
    assert (expected - before).abs().max() > 0.01
    assert_alike(choice_log_probabilities(model, batch_of(), cache), expected)


def test_a_cache_filled_in_inference_mode_works_outside(llama: PreTrainedModel) -> None:
    cache = PrefixCache()
    with torch.inference_mode():
        inside = choice_log_probabilities(llama, batch_of(), cache)
    outside = choice_log_probabilities(llama, batch_of(), cache)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


# -------------------------------------------------------------------------------------------------------------- metric


def updated(*updates: tuple[str, list[int], list[int]]) -> MultipleChoiceAccuracy:
    """Return a metric after updates. Each update has a subject, the most likely letters and the answers."""
    metric = MultipleChoiceAccuracy()
    for subject, likeliest, answers in updates:
        scores = torch.full((len(likeliest), 4), -2.0)
        scores[range(len(likeliest)), likeliest] = -1.0
        metric.update(scores, torch.tensor(answers), subject)
    return metric


def values(metric: MultipleChoiceAccuracy) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


SEEN = [  # correct: astronomy 2 of 3, virology 0 of 1, anatomy 2 of 2, and 1 of 4 in a subject that MMLU lacks
    ("astronomy", [0, 1], [0, 2]),
    ("virology", [3], [0]),
    ("astronomy", [3], [3]),
    ("anatomy", [1, 2], [1, 2]),
    ("cookery – sauces", [0, 0, 0, 0], [0, 1, 2, 3]),
]
EXPECTED = {
    "acc": 5 / 10,
    "acc_stderr": (0.5 * 0.5 / 10) ** 0.5,
    "acc_subjects": (2 / 3 + 0 + 1 + 1 / 4) / 4,
    "acc_stem": 2 / 3,
    "acc_other": 2 / 3,  # over questions; the mean over subjects would be 1/2
    "subjects/anatomy": 1.0,
    "subjects/astronomy": 2 / 3,
    "subjects/cookery – sauces": 1 / 4,
    "subjects/virology": 0.0,
}


def test_accuracies_equal_counts_by_hand() -> None:
    assert values(updated(*SEEN)) == pytest.approx(EXPECTED)


def test_metrics_of_a_single_subject() -> None:
    metrics = values(updated(("unknown", [0, 1, 2], [0, 1, 3])))
    assert metrics == pytest.approx({"acc": 2 / 3, "acc_subjects": 2 / 3, "acc_stderr": (2 / 27) ** 0.5})
    assert set(values(updated(("philosophy", [0], [0])))) == {"acc", "acc_subjects", "acc_stderr", "acc_humanities"}


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_ranks_with_different_subjects_are_merged(cut: int) -> None:
    merged, other = updated(*SEEN[:cut]), updated(*SEEN[cut:])
    merged.merge_state(other)
    assert values(merged) == pytest.approx(EXPECTED)

    metric = updated(*SEEN[:cut])
    states = {torch.uint8: dim_zero_cat(other.names), torch.int64: dim_zero_cat(other.counts)}
    metric.sync(
        dist_sync_fn=lambda tensor, group: [tensor, states[tensor.dtype]],
        distributed_available=lambda: True,
    )
    assert metric._reductions["names"] is metric._reductions["counts"] is dim_zero_cat
    metric._to_sync = False
    assert values(metric) == pytest.approx(EXPECTED)


def test_the_categories_have_the_sizes_of_mmlus() -> None:
    counts = {name: list(CATEGORIES.values()).count(name) for name in CATEGORIES.values()}
    assert counts == {"humanities": 13, "stem": 18, "social_sciences": 12, "other": 14}
