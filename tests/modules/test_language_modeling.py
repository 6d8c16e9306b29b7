"""LanguageModel, beyond the conformance tests: loss, metrics, checkpointing, generation, packing and bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, RobertaForCausalLM

from datamodules.contract import IGNORE_INDEX
from datamodules.errors import ModelError
from datamodules.tokens.packing import PadPacks, PadSequences
from modules.adapters import AdapterConfig, AdapterError, adapted_layers, adapter_state
from modules.generation.decoding import Decoding
from modules.language_modeling import LanguageModel
from tests.backbones import CONFIGS as ENCODERS
from tests.backbones import word_tokenizer
from tests.causal_backbones import CONFIGS, POSITIONS, VOCABULARY, byte_tokenizer, save_decoder
from tests.support.adapters import changed, copied, randomize
from tests.support.refusals import refuses
from tests.support.rows import edit_json
from tests.support.tasks import (
    END,
    SIZES,
    Batch,
    TaskFactory,
    inputs,
    instruction_batch,
    instruction_rows,
    merged_decoder,
    searched,
)
from tests.support.trainers import ReadyData, quiet_trainer, stub_trainer

PROMPTS = ["Who?", "What is it that there is?", "A", "Say B or C."]
every_kind = pytest.mark.parametrize("kind", list(CONFIGS))
every_source = pytest.mark.parametrize("weights", ["pretrained", "none", "file"])


def decoder(folder: Path, **keys: Any) -> Any:
    """Return a model with random adapters from this folder."""
    torch.manual_seed(0)
    if keys.get("weights") == "file":
        keys["weights"] = str(folder / "model.safetensors")
    keys = {"adapter": AdapterConfig(rank=4, targets="all"), "backbone_dtype": "float32", **keys}
    return randomize(LanguageModel(str(folder), **{"generation": Decoding(max_new_tokens=8), **keys}))


def prompts(texts: list[str] = PROMPTS) -> Batch:
    encoded = byte_tokenizer()(texts, padding=True, padding_side="left", return_tensors="pt")
    return inputs(dict(encoded)) | {"index": torch.arange(len(texts))}


def with_data(model: Any, **properties: Any) -> Any:
    model._trainer = stub_trainer(datamodule=ReadyData([], **properties))
    return model


# --------------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def test_the_loss_covers_responses_alone(tasks: TaskFactory) -> None:
    model, data = randomize(tasks("llama")).eval(), instruction_batch()
    expected = model.loss(data)
    logits, targets = model(data)
    rows = instruction_rows()
    assert targets.tolist() == [token for row in rows for token in row["labels"] if token != IGNORE_INDEX]
    assert logits.shape == (sum(response for _, response in SIZES), len(VOCABULARY))
    first = {**data, "labels": data["labels"].clone()}
    first["labels"][:, 0] = 7  # no token predicts the first token
    assert torch.equal(model.loss(first), expected)
    row, (prompt, response) = 2, SIZES[2]
    for place, learns in ((prompt - 1, True), (prompt + response - 1, False)):  # the last token predicts nothing
        tokens = data["input_ids"].clone()
        tokens[row, place] = 9
        assert torch.equal(model.loss({**data, "input_ids": tokens}), expected) is not learns


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_do_not_depend_on_padding(tasks: TaskFactory, kind: str, side: str) -> None:
    model, rows = randomize(tasks(kind)).eval(), instruction_rows()
    separate = [model(PadSequences(END)([row])) for row in rows[:2]]
    together = model(PadSequences(END, side)([*rows[:2], *instruction_rows(((20, 11),), seed=4)]))
    assert torch.equal(together[1][:6], torch.cat([targets for _, targets in separate]))
    torch.testing.assert_close(together[0][:6], torch.cat([logits for logits, _ in separate]), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ metrics


@torch.no_grad()
def test_metrics_are_means_over_the_tokens_of_all_responses(tasks: TaskFactory) -> None:
    model, run = randomize(tasks("llama")), quiet_trainer()
    first, second = [instruction_batch(), instruction_batch(((4, 30),), seed=2)], [instruction_batch(((2, 3), (1, 1)))]
    logits, _ = model.eval()(first[0])
    first[0]["labels"][0, 5] = logits[0].argmax()  # a token that the model predicts
    reference = merged_decoder(tasks.folder("llama"), model)

    def by_hand(stage: str, batches: list[Batch]) -> dict[str, float]:
        losses, hits = [], []
        for data in batches:
            log_p = reference(**inputs(data)).logits.double().log_softmax(-1)
            for row, labels in enumerate(data["labels"].tolist()):
                for place, label in enumerate(labels[1:]):
                    if label != IGNORE_INDEX:
                        losses.append(-float(log_p[row, place, label]))
                        hits.append(float(log_p[row, place].argmax() == label))
        loss = sum(losses) / len(losses)
        values = {"loss": loss, "perplexity": math.exp(loss), "token_acc": sum(hits) / len(hits)}
        return {f"{stage}/{name}": value for name, value in values.items()}

    expected = by_hand("val", first)
    assert 0 < expected["val/token_acc"] < 0.5
    assert run.validate(model, datamodule=ReadyData(first), verbose=False) == [pytest.approx(expected, rel=1e-4)]
    for stage, evaluate in (("test", run.test), ("val", run.validate)):  # each evaluation starts anew
        metrics = evaluate(model, datamodule=ReadyData(second), verbose=False)
        assert metrics == [pytest.approx(by_hand(stage, second), rel=1e-4)]


def test_predictions_have_row_numbers_and_texts(tasks: TaskFactory) -> None:
    model, data = randomize(tasks("llama")).eval(), prompts()
    assert model.predict_step(data, 0) == {"index": [0, 1, 2, 3], "response": model.generate(data)}


# ---------------------------------------------------------------------------------------------- gradient checkpointing


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model.loss(instruction_batch()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("train", ["B", "A", "both"])
def test_gradient_checkpointing_does_not_change_gradients(tasks: TaskFactory, train: Any, dropout: float) -> None:
    inits: dict[str, Any] = {"init_a": "zero", "init_b": "orthogonal"} if train == "A" else {}
    adapter = AdapterConfig(rank=4, targets="all", train=train, dropout=dropout, **inits)
    models = [randomize(tasks("llama", adapter=adapter, gradient_checkpointing=flag)) for flag in (False, True)]
    expected, actual = map(gradients, models)
    assert actual.keys() == expected.keys()
    assert {name[-1] for name in expected} == set("AB" if train == "both" else train)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flag", [False, True])
def test_layers_are_recomputed_only_in_the_backward_pass_of_training(tasks: TaskFactory, flag: bool) -> None:
    model, calls = tasks("llama", gradient_checkpointing=flag), []
    for layer in model.backbone.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == (4 if flag else 2)
    calls.clear()
    gradients(model.eval())
    assert len(calls) == 2
    assert torch.equal(searched(model, prompts()), searched(tasks("llama").eval(), prompts()))


def test_checkpointing_is_refused_or_works_without_a_warning(
    tasks: TaskFactory, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    tasks("llama", gradient_checkpointing=True)
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with refuses("model.gradient_checkpointing: LlamaForCausalLM does not support recomputation", error=ModelError):
        tasks("llama", gradient_checkpointing=True)


# ----------------------------------------------------------------------------------------------- adapted layers


@every_kind
def test_roles_of_grouped_queries_and_gated_layers(tasks: TaskFactory, kind: str) -> None:
    model = tasks(kind)
    wide = {"query": (32, 32), "key": (16, 32), "value": (16, 32), "output": (32, 32)}
    wide |= {"mlp_gate": (64, 32), "mlp_in": (64, 32), "mlp_out": (32, 64)}
    assert [p.role for p in model.projections] == 2 * list(wide)
    state = adapter_state(model.backbone)
    for p in model.projections:
        rows, columns = wide[p.role]
        shapes = {name.rpartition(".")[2]: t.shape for name, t in state.items() if name.startswith(f"{p.layer}.")}
        assert shapes == {"A": (4, columns), "B": (rows, 4)}, p.name
    assert len(state) == 2 * 2 * 7
    assert model.head_names == []
    assert not any("lm_head" in name for name in adapted_layers(model.backbone))


@every_source
def test_rotary_frequencies_stay_in_float32(tasks: TaskFactory, weights: str) -> None:
    folder = tasks.folder("llama")
    half, full = (decoder(folder, weights=weights, backbone_dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert half.backbone.get_input_embeddings().weight.dtype == torch.bfloat16
    expected = {name: buffer for name, buffer in full.backbone.named_buffers() if name.endswith("inv_freq")}
    assert expected
    for name, buffer in expected.items():
        assert half.backbone.get_buffer(name).dtype == torch.float32
        assert torch.equal(half.backbone.get_buffer(name), buffer)


def test_a_tied_output_layer_cannot_be_adapted(tasks: TaskFactory) -> None:
    adapter = AdapterConfig(rank=4, targets=["query", "regex:lm_head"])
    with refuses("'regex:lm_head' matches nothing", error=AdapterError):
        tasks("llama", adapter=adapter)
    assert tasks("qwen2", adapter=adapter).projections[-1].layer == "lm_head"  # an untied output layer can be adapted


# --------------------------------------------------------------------------------------------------------- generation


@every_kind
@torch.no_grad()
def test_greedy_text_equals_that_of_the_merged_model(tasks: TaskFactory, kind: str) -> None:
    model, data = tasks(kind).eval(), prompts()
    at_start = searched(model, data)
    tokens = searched(randomize(model), data)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": END, "eos_token_id": END}
    expected = merged_decoder(tasks.folder(kind), model).generate(**inputs(data), **settings)
    assert torch.equal(tokens, expected[:, data["input_ids"].shape[1] :])
    assert not torch.equal(tokens, at_start)


@every_kind
def test_a_text_does_not_depend_on_its_batch(tasks: TaskFactory, kind: str) -> None:
    model = randomize(tasks(kind)).eval()
    batch = prompts([*PROMPTS, "And what of this one, which is far longer than they are?"])
    separate = [model.generate(prompts([text]))[0] for text in PROMPTS]
    assert model.generate(batch)[:4] == separate
    assert len(set(separate)) > 1


def test_sampled_text_depends_on_the_seed(tasks: TaskFactory) -> None:
    sampling = Decoding(max_new_tokens=8, do_sample=True, temperature=2.0)
    model = randomize(tasks("llama", generation=sampling)).eval()

    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return searched(model, prompts()).tolist()

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    greedy = searched(randomize(tasks("llama")).eval(), prompts()).tolist()
    assert sampled(1) != greedy
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-5}):
        config = Decoding(max_new_tokens=8, do_sample=True, **settings)
        model.backbone.generation_config = config.config(model.backbone.generation_config, {END}, END)
        assert sampled(1) == greedy, settings


@pytest.mark.parametrize(
    ("of_backbone", "ends"), [(None, [2]), (2, [2]), (7, [2, 7]), ([7, 5], [2, 5, 7]), ([2, 9], [2, 9])], ids=str
)
def test_end_tokens_of_backbone_and_tokenizer_are_combined(of_backbone: Any, ends: list[int]) -> None:
    config_of_backbone = GenerationConfig(eos_token_id=of_backbone, bos_token_id=1, pad_token_id=0)
    config = Decoding().config(config_of_backbone, {END}, 3)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (ends, 3, 1)
    assert config_of_backbone.eos_token_id == of_backbone


SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
OWN = {"do_sample": True, **SAMPLING, "max_length": 9, "min_new_tokens": 3, "num_beams": 2}


def test_other_generation_settings_of_a_backbone_are_ignored() -> None:
    backbone_settings = GenerationConfig(**OWN, bos_token_id=1).to_dict()
    for decoding in (Decoding(max_new_tokens=7), Decoding(do_sample=True, temperature=0.9, top_k=5)):
        config = decoding.config(GenerationConfig.from_dict(backbone_settings), {END}, END)
        assert (config.max_new_tokens, config.do_sample) == (decoding.max_new_tokens, decoding.do_sample)
        fresh = GenerationConfig()
        for key in OWN.keys() - {"do_sample"}:
            is_set = decoding.do_sample and key in ("temperature", "top_k", "top_p")
            assert getattr(config, key) == (getattr(decoding, key) if is_set else getattr(fresh, key)), key
        config.validate(strict=True)


@every_source
def test_sampling_settings_of_a_repository_are_ignored(tmp_path: Path, weights: str) -> None:
    folder = save_decoder(tmp_path)
    expected = searched(decoder(folder, weights=weights).eval(), prompts())
    other = next(token for token in range(3, 99) if token not in expected)
    edit_json(folder / "generation_config.json", **OWN, eos_token_id=[END, other])
    model = decoder(folder, weights=weights).eval()
    assert torch.equal(searched(model, prompts()), expected)
    assert model.backbone.generation_config.eos_token_id == [END, other]


@pytest.mark.parametrize("end", [END, 5, 7])
def test_a_response_stops_at_any_end_token(tmp_path: Path, end: int) -> None:
    """The end tokens are those of the tokenizer, the backbone and the template."""
    folder = save_decoder(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=5)
    model = decoder(folder, response_end=7).eval()

    def tilt(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        logits[..., end] += 1000
        return logits

    model.backbone.lm_head.register_forward_hook(tilt)
    assert searched(model, prompts()).tolist() == [[end]] * 4


def test_generation_does_not_change_the_model(tasks: TaskFactory) -> None:
    model = randomize(tasks("llama")).eval()
    before, settings = copied(model), model.backbone.generation_config.to_dict()
    assert model.generate(prompts()) == model.generate(prompts())
    assert changed(before, model) == set()
    assert model.backbone.generation_config.to_dict() == settings


def test_the_template_comes_from_the_data_and_cannot_change(tasks: TaskFactory) -> None:
    model = with_data(tasks("llama"), response_end=END, prompt_template="{{ one }}")
    model.setup("fit")
    assert model.hparams["prompt_template"] == "{{ one }}"
    model.setup("validate")
    reloaded = tasks("llama", prompt_template=model.hparams["prompt_template"])
    for other, stage in ((model, "fit"), (model, "predict"), (reloaded, "predict")):
        with_data(other, response_end=END, prompt_template="{{ other }}")
        with refuses("data.template: the checkpoint was trained with another prompt template", error=ModelError):
            other.setup(stage)
    assert model.hparams["prompt_template"] == "{{ one }}"
    with_data(model).setup("test")  # multiple choice has no template
    with_data(tasks("llama")).setup("test")


# ------------------------------------------------------------------------------------------------------------ packing


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoders_that_separate_packed_sequences_are_accepted(tasks: TaskFactory, kind: str, dtype: str) -> None:
    adapter = AdapterConfig(rank=4, targets="all", dropout=0.5)
    model = randomize(tasks(kind, backbone_dtype=dtype, adapter=adapter))
    state = torch.get_rng_state()
    with_data(model, packing=True).setup("fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    model.eval().check_packing()
    assert not any(module.training for module in model.modules())


MIXED = ("data.packing: ", "ForCausalLM does not keep packed sequences apart. Set the key to false")


def test_a_decoder_that_ignores_positions_is_refused(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=len(VOCABULARY), hidden_size=32, n_layer=1, n_head=2, initializer_range=0.2)
    torch.manual_seed(0)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = with_data(decoder(tmp_path, adapter=AdapterConfig(rank=2, targets=["regex:.*dense_h_to_4h"])), packing=True)
    with refuses(*MIXED, error=ModelError):
        model.setup("fit")
    assert all(module.training for module in model.modules())
    model.setup("test")
    with_data(model, packing=False).setup("fit")


@pytest.mark.parametrize("error", [None, TypeError])
def test_a_decoder_that_mixes_packed_sequences_is_refused(
    tasks: TaskFactory, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    model = tasks("llama")
    plain = model.backbone.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **keys: Any) -> Any:
        if error is not None:
            raise error("got an unexpected keyword argument 'position_ids'")
        # with an attention mask, transformers treats the positions as one sequence
        return plain(input_ids, torch.ones_like(input_ids), position_ids, **keys)

    monkeypatch.setattr(model.backbone, "forward", forward)
    with refuses(*MIXED, error=ModelError):
        model.check_packing()


@every_kind
def test_loss_and_gradients_of_packs_equal_those_of_separate_sequences(tasks: TaskFactory, kind: str) -> None:
    model = randomize(tasks(kind, adapter=AdapterConfig(train="both", rank=4, targets="all"))).eval()
    rows = instruction_rows(((5, 4), (9, 2), (3, 7), (1, 1), (4, 6)))
    packs = [rows[:2], rows[2:]]

    def loss_and_gradients(batch: Any) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed, apart = PadPacks(END)(packs), PadSequences(END)(rows)
    assert "attention_mask" not in packed
    assert (packed["position_ids"] == 0).sum() > len(rows)  # the shorter pack is padded
    (loss, gradients_of_packs), (expected, expected_gradients) = loss_and_gradients(packed), loss_and_gradients(apart)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert len(gradients_of_packs) == len(expected_gradients) == 2 * len(model.projections)
    for ours, theirs in zip(gradients_of_packs, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        # another padding token
        torch.testing.assert_close(model.loss(PadPacks(77)(packs)), expected, rtol=0, atol=1e-5)
        del packed["position_ids"]
        assert (model.loss(packed) - expected).abs() > 1e-3  # without positions, the loss would differ


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_tokenizer_without_padding_token_pads_with_the_end_token(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path)
    expected = decoder(folder).eval().generate(prompts())
    byte_tokenizer(pad_token=None).save_pretrained(folder)
    model = decoder(folder).eval()
    assert model.tokenizer.pad_token_id == END == model.backbone.generation_config.pad_token_id
    assert model.generate(prompts()) == expected


def _without_end(folder: Path) -> None:
    byte_tokenizer(eos_token=None).save_pretrained(folder)


def _one_token_more(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)


def _an_encoder(folder: Path) -> None:
    RobertaForCausalLM(ENCODERS["roberta"]).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def _without_output_layer(folder: Path) -> None:
    save_decoder(folder, tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "weights", "parts"),
    [
        (_without_end, "pretrained", ["model.backbone: the tokenizer of ", " no end-of-text token", "eos_token in"]),
        (_one_token_more, "pretrained", [f" has {len(VOCABULARY) + 1} tokens and the model only {len(VOCABULARY)} "]),
        (_an_encoder, "pretrained", ["model.backbone: ", " is a roberta, an encoder whose tokens attend to later"]),
        (_without_output_layer, "pretrained", ["model.weights: ", " has no weights of lm_head.weight"]),
        (_without_output_layer, "file", ["model.weights: ", " has no weights of lm_head.weight"]),
    ],
)
def test_a_backbone_without_decoder_weights_or_tokenizer_is_refused(
    tmp_path: Path, change: Any, weights: str, parts: list[str]
) -> None:
    save_decoder(tmp_path)
    change(tmp_path)
    with refuses(*parts, error=ModelError):
        decoder(tmp_path, weights=weights)
    if change is _without_output_layer:
        decoder(tmp_path, weights="none")


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"tuning": "full", "backbone_dtype": "bfloat16"}, ["model.backbone_dtype: bfloat16 is for frozen weights"]),
        ({"generation": {"max_new_tokens": 0}}, ["model.generation.max_new_tokens: 0 must be 1 or more"]),
        (
            {"generation": {"temperature": 0.0}},
            ["model.generation.temperature: 0.0 must be finite and above 0"],
        ),
        ({"generation": {"temperature": math.nan}}, ["model.generation.temperature: nan must be finite"]),
        ({"generation": {"top_k": -1}}, ["model.generation: top_k -1 must not be negative"]),
        ({"generation": {"top_p": 0.0}}, ["model.generation: ", " top_p 0.0 must lie in (0, 1]"]),
        ({"generation": {"top_p": 1.1}}, ["model.generation: ", " top_p 1.1 must lie in (0, 1]"]),
        (
            {"generation": Decoding(max_new_tokens=POSITIONS)},
            [f"model.generation.max_new_tokens: {POSITIONS} leaves no room for a prompt"],
        ),
    ],
    ids=str,
)
def test_bad_input_is_refused(tasks: TaskFactory, keys: dict[str, Any], parts: list[str]) -> None:
    with refuses(*parts, error=ModelError):
        tasks("llama", **keys)


def test_tuning_head_is_not_offered() -> None:
    assert get_args(get_type_hints(LanguageModel.__init__)["tuning"]) == ("adapter", "full", "adalora", "ia3")


def test_a_response_leaves_room_for_a_prompt(tasks: TaskFactory) -> None:
    assert tasks("llama", generation=Decoding(max_new_tokens=POSITIONS - 1)).position_limit == POSITIONS
    model = tasks("llama", backbone_args={"max_position_embeddings": 12}).eval()
    model.generate(prompts(["Why?"]))  # 4 tokens of the prompt and 8 of the response
    with refuses("data.max_length: a prompt of 7 tokens and ", " 8 are more than the 12", error=ModelError):
        model.generate(prompts(["Why so?", "Who?"]))
    more = {"max_position_embeddings": 2 * POSITIONS}
    tasks("llama", generation=Decoding(max_new_tokens=POSITIONS), backbone_args=more)
