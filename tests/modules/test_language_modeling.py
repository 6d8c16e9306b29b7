"""The language model by itself: its loss and metrics, what it trains and saves, what it generates, what it refuses."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    RobertaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from datamodules.errors import ModelError
from datamodules.tokens.packing import PadPacks, PadSequences
from modules.adapters import AdaptedLinear, AdapterConfig, adapted_layers, adapter_state, detach
from modules.generation.decoding import Decoding
from modules.language_modeling import LanguageModel
from tests.backbones import CONFIGS as ENCODERS
from tests.backbones import word_tokenizer
from tests.causal_backbones import CONFIGS, POSITIONS, VOCABULARY, byte_tokenizer, save_decoder

Batch = dict[str, Any]
EVERY = AdapterConfig(rank=4, targets="all")
KINDS = list(CONFIGS)
END = 2
PROMPTS = ["Who?", "What is it that there is?", "A", "Say B or C."]
SIZES = ((5, 4), (9, 2), (3, 7))  # prompt and response
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    return {kind: save_decoder(root / kind, kind) for kind in KINDS}


@pytest.fixture
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def decoder(folder: Path, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    keys = {"adapter": EVERY, "backbone_dtype": "float32", "generation": Decoding(max_new_tokens=8), **keys}
    return LanguageModel(str(folder), **{"learning_rate": 0.01, **keys})


@torch.no_grad()
def randomize(model: Any) -> Any:
    """Away from the start, where B is zero."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state(model.backbone).values():
        tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
    return model


def merged(folder: Path, model: Any) -> Any:
    """Transformers' own model with the module's weights, adapters merged into them."""
    plain = copy.deepcopy(model.backbone)
    detach(plain, merge_first=True)
    assert not any(isinstance(module, AdaptedLinear) for module in plain.modules())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.load_state_dict(plain.state_dict())
    return reference.eval()


def rows(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (prompt, response) in enumerate(sizes):
        ids = torch.randint(3, len(VOCABULARY), (prompt + response,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "index": index})
    return found


def batch(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0, side: str = "right") -> Batch:
    """Prompts and responses of unequal length."""
    return PadSequences(END, side)(rows(sizes, seed))


def inputs(data: Batch) -> Batch:
    return {name: data[name] for name in ("input_ids", "attention_mask")}


def prompts(texts: list[str] = PROMPTS) -> Batch:
    encoded = byte_tokenizer()(texts, padding=True, padding_side="left", return_tensors="pt")
    return inputs(dict(encoded)) | {"index": torch.arange(len(texts))}


def searched(model: Any, data: Batch) -> Tensor:
    """The tokens behind what `generate` says, (batch, tokens), without the prompts."""
    found: list[Tensor] = []
    search = model.backbone.generate

    def recorded(**keys: Any) -> Tensor:
        found.append(search(**keys))
        return found[-1]

    with patch.object(model.backbone, "generate", recorded):
        texts = model.generate(data)
    tokens = found[0][:, data["input_ids"].shape[1] :]
    assert texts == [t.strip() for t in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return tokens


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_data(model: Any, **data: Any) -> Any:
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(**data), precision="32-true")
    return model


# --------------------------------------------------------------------------------------------------------------- loss


@every_kind
@torch.no_grad()
def test_loss_is_that_of_transformers(folders: dict[str, Path], kind: str) -> None:
    model, data = decoder(folders[kind]).eval(), batch()
    untouched = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    expected = untouched(**inputs(data), labels=data["labels"]).loss
    assert float(model.training_step(data, 0)) == pytest.approx(float(expected), abs=1e-5)
    moved = merged(folders[kind], randomize(model))(**inputs(data), labels=data["labels"]).loss
    assert float(model.training_step(data, 0)) == pytest.approx(float(moved), abs=1e-5)
    assert abs(float(moved - expected)) > 1e-2


@every_kind
@torch.no_grad()
def test_responses_alone_are_learnt(folders: dict[str, Path], kind: str) -> None:
    model, data = randomize(decoder(folders[kind])).eval(), batch()
    expected = model.loss(data)
    logits, targets = model(data)
    assert targets.tolist() == [token for row in rows() for token in row["labels"] if token != -100]
    assert logits.shape == (sum(response for _, response in SIZES), len(VOCABULARY))
    first = {**data, "labels": data["labels"].clone()}
    first["labels"][:, 0] = 7  # nothing is before it
    assert torch.equal(model.loss(first), expected)
    for token in (-1, 0):  # of a response, its last and the last of the prompt
        changed = {**data, "input_ids": data["input_ids"].clone()}
        row, end = 2, sum(SIZES[2])
        changed["input_ids"][row, SIZES[2][0] - 1 if token == 0 else end - 1] = 9
        # labels stay: a response's last token is learnt, and nothing behind it
        assert torch.equal(model.loss(changed), expected) is (token == -1)


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_matter(folders: dict[str, Path], kind: str, side: str) -> None:
    model = randomize(decoder(folders[kind])).eval()
    alone = [model(batch(SIZES[:1])), model(PadSequences(END)(rows()[1:2]))]
    together = model(PadSequences(END, side)([*rows()[:2], *rows(((20, 11),), seed=4)]))
    assert torch.equal(together[1][:6], torch.cat([targets for _, targets in alone]))
    torch.testing.assert_close(together[0][:6], torch.cat([logits for logits, _ in alone]), rtol=0, atol=1e-4)


@every_kind
@torch.no_grad()
def test_a_pack_is_its_sequences_one_by_one(folders: dict[str, Path], kind: str) -> None:
    model = randomize(decoder(folders[kind])).eval()
    packed, padded = PadPacks(END)([rows()[:2], rows()[2:]]), batch()
    assert "attention_mask" not in packed
    (ours, targets), (logits, expected) = model(packed), model(padded)
    assert torch.equal(targets, expected)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ metrics


class Sets(L.LightningDataModule):
    """Batches that are there already."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def trainer() -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **quiet, enable_model_summary=False)  # type: ignore[arg-type]


@torch.no_grad()
def test_metrics_are_means_over_the_tokens_of_all_responses(llama: Path) -> None:
    model, run = randomize(decoder(llama)), trainer()
    first, second = [batch(), batch(((4, 30),), seed=2)], [batch(((2, 3), (1, 1)), seed=3)]
    with torch.no_grad():  # a token that it gets right
        logits, _ = model.eval()(first[0])
        first[0]["labels"][0, 5] = logits[0].argmax()

    def by_hand(batches: list[Batch]) -> dict[str, float]:
        reference = merged(llama, model)
        losses, hits = [], []
        for data in batches:
            log_p = reference(**inputs(data)).logits.double().log_softmax(-1)
            for row, labels in enumerate(data["labels"].tolist()):
                for place, label in enumerate(labels[1:]):
                    if label != -100:
                        losses.append(-float(log_p[row, place, label]))
                        hits.append(float(log_p[row, place].argmax() == label))
        mean = sum(losses) / len(losses)
        return {"loss": mean, "perplexity": float(torch.tensor(mean).exp()), "token_acc": sum(hits) / len(hits)}

    (found,) = run.validate(model, datamodule=Sets(first), verbose=False)
    expected = by_hand(first)
    assert 0 < expected["token_acc"] < 0.5
    assert found == pytest.approx({f"val/{name}": value for name, value in expected.items()}, rel=1e-4)
    (found,) = run.test(model, datamodule=Sets(second), verbose=False)  # begins anew
    assert found == pytest.approx({f"test/{name}": value for name, value in by_hand(second).items()}, rel=1e-4)
    (found,) = run.validate(model, datamodule=Sets(second), verbose=False)
    assert found == pytest.approx({f"val/{name}": value for name, value in by_hand(second).items()}, rel=1e-4)


def test_predictions_are_texts_by_number(llama: Path) -> None:
    model = randomize(decoder(llama)).eval()
    data = prompts()
    assert model.predict_step(data, 0) == {"index": [0, 1, 2, 3], "response": model.generate(data)}


# ---------------------------------------------------------------------------------------------- gradient checkpointing


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model.loss(batch()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("train", ["B", "A", "both"])
def test_checkpointing_leaves_the_gradients_as_they_are(llama: Path, train: str, dropout: float) -> None:
    inits: dict[str, Any] = {"init_a": "zero", "init_b": "orthogonal"} if train == "A" else {}
    adapter = AdapterConfig(rank=4, targets="all", train=train, dropout=dropout, **inits)  # type: ignore[arg-type]
    plain, saving = (randomize(decoder(llama, adapter=adapter, gradient_checkpointing=flag)) for flag in (False, True))
    expected, found = gradients(plain), gradients(saving)
    factors = ".A" if train == "A" else ".B"
    assert len(expected) == (2 if train == "both" else 1) * len(plain.projections)
    assert all(name.endswith(factors) for name in expected) or train == "both"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flag", [False, True])
def test_layers_run_again_in_backward_of_training_alone(llama: Path, flag: bool) -> None:
    model = decoder(llama, gradient_checkpointing=flag)
    calls = []
    for layer in model.backbone.model.layers:
        assert isinstance(layer, LlamaDecoderLayer)
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == (4 if flag else 2)
    calls.clear()
    gradients(model.eval())
    assert len(calls) == 2
    calls.clear()
    assert torch.equal(searched(model, prompts()), searched(decoder(llama).eval(), prompts()))


def test_checkpointing_is_said_to_be_impossible_or_nothing_is(
    llama: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    decoder(llama, gradient_checkpointing=True)
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"^model\.gradient_checkpointing: LlamaForCausalLM does not support it"):
        decoder(llama, gradient_checkpointing=True)


# --------------------------------------------------------------------------------------------------- what is trained


@every_kind
def test_roles_of_grouped_queries_and_gated_layers(folders: dict[str, Path], kind: str) -> None:
    model = decoder(folders[kind])
    wide = {"query": (32, 32), "key": (16, 32), "value": (16, 32), "output": (32, 32)}
    wide |= {"mlp_gate": (64, 32), "mlp_in": (64, 32), "mlp_out": (32, 64)}
    assert [p.role for p in model.projections] == 2 * list(wide)
    state = adapter_state(model.backbone)
    assert len(state) == 2 * 2 * 7
    for p in model.projections:
        rows_, columns = wide[p.role]
        shapes = {name.rpartition(".")[2]: t.shape for name, t in state.items() if name.startswith(f"{p.layer}.")}
        assert shapes == {"A": (4, columns), "B": (rows_, 4)}, p.name
    assert model.head_names == []
    assert not any("lm_head" in name for name in adapted_layers(model.backbone))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # tied and not
def test_a_tied_output_layer_is_no_target(folders: dict[str, Path], kind: str) -> None:
    adapter = AdapterConfig(rank=4, targets=["query", "regex:lm_head"])
    if kind == "llama":
        with pytest.raises(ValueError, match="'regex:lm_head' matches nothing"):
            decoder(folders[kind], adapter=adapter)
    else:
        assert [p.layer for p in decoder(folders[kind], adapter=adapter).projections][-1] == "lm_head"


@every_kind
@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
def test_bfloat16_is_of_the_frozen_weights_alone(folders: dict[str, Path], kind: str, weights: str) -> None:
    given = {"file": str(folders[kind] / "model.safetensors")}.get(weights, weights)
    half = decoder(folders[kind], weights=given, backbone_dtype="bfloat16")
    full = decoder(folders[kind], weights=given)
    factors = {f"backbone.{name}" for name in adapter_state(half.backbone)}
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name in factors} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in factors} == {torch.bfloat16}
    ours, theirs = (dict(model.backbone.named_buffers()) for model in (half, full))
    assert any("inv_freq" in name for name in theirs)
    assert ours.keys() == theirs.keys()
    for name in (name for name in theirs if "inv_freq" in name):
        assert ours[name].dtype == torch.float32, name
        assert torch.equal(ours[name], theirs[name]), name
    if weights != "none":
        assert 0 < abs(float(half.loss(batch()) - full.loss(batch()))) < 0.2


@every_kind
@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_steps_move_what_is_trained_alone(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = decoder(folders[kind], tuning=tuning)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    b = {f"backbone.{name}" for name in adapter_state(model.backbone) if name.endswith(".B")}
    assert trained == (b if tuning == "adapter" else {name for name, _ in model.named_parameters()})
    assert all(module.training for module in model.modules())
    before = copied(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    if kind == "llama":  # tied
        assert model.backbone.lm_head.weight is model.backbone.model.embed_tokens.weight


def test_full_tuning_takes_float32_and_there_is_no_head(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.backbone_dtype: bfloat16 is for frozen weights"):
        decoder(llama, tuning="full", backbone_dtype="bfloat16")
    assert get_args(get_type_hints(LanguageModel.__init__)["tuning"]) == ("adapter", "full", "adalora", "ia3")


# --------------------------------------------------------------------------------------------------------- generation


@every_kind
@torch.no_grad()
def test_greedy_text_is_that_of_the_merged_model(folders: dict[str, Path], kind: str) -> None:
    model, data = decoder(folders[kind]).eval(), prompts()
    at_start = searched(model, data)
    tokens = searched(randomize(model), data)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": END, "eos_token_id": END}
    expected = merged(folders[kind], model).generate(**inputs(data), **settings)
    assert torch.equal(tokens, expected[:, data["input_ids"].shape[1] :])
    assert not torch.equal(tokens, at_start)


@every_kind
def test_a_text_does_not_depend_on_its_company(folders: dict[str, Path], kind: str) -> None:
    model = randomize(decoder(folders[kind])).eval()
    together = model.generate(prompts())
    assert together == [model.generate(prompts([text]))[0] for text in PROMPTS]
    assert len(set(together)) > 1
    longer = prompts([*PROMPTS, "And what of this one, which is far longer than they are?"])
    assert model.generate(longer)[:4] == together


def test_drawn_text_is_a_function_of_the_seed(llama: Path) -> None:
    model = randomize(decoder(llama, generation=Decoding(max_new_tokens=8, do_sample=True, temperature=2.0))).eval()

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return searched(model, prompts()).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    greedy = searched(randomize(decoder(llama)).eval(), prompts()).tolist()
    assert drawn(1) != greedy
    for near in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-5}):
        model.backbone.generation_config = Decoding(max_new_tokens=8, do_sample=True, **near).config(
            model.backbone.generation_config, {END}, END
        )
        assert drawn(1) == greedy, near


@pytest.mark.parametrize(
    ("own", "ends"), [(None, [2]), (2, [2]), (7, [2, 7]), ([7, 5], [2, 5, 7]), ([2, 9], [2, 9])], ids=str
)
def test_a_response_has_the_ends_of_backbone_and_tokenizer(own: Any, ends: list[int]) -> None:
    given = GenerationConfig(eos_token_id=own, bos_token_id=1, pad_token_id=0)
    config = Decoding().config(given, {END}, 3)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (ends, 3, 1)
    assert given.eos_token_id == own


SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
OWN = {"do_sample": True, **SAMPLING, "max_length": 9, "min_new_tokens": 3, "num_beams": 2}


def test_other_settings_of_a_backbone_do_not_count() -> None:
    known = GenerationConfig(**OWN, bos_token_id=1).to_dict()
    for decoding in (Decoding(max_new_tokens=7), Decoding(do_sample=True, temperature=0.9, top_k=5)):
        config = decoding.config(GenerationConfig.from_dict(known), {END}, END)
        assert (config.max_new_tokens, config.do_sample) == (decoding.max_new_tokens, decoding.do_sample)
        fresh = GenerationConfig()
        for key in OWN.keys() - {"do_sample"}:
            asked = decoding.do_sample and key in ("temperature", "top_k", "top_p")
            assert getattr(config, key) == (getattr(decoding, key) if asked else getattr(fresh, key)), key
        config.validate(strict=True)


@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
def test_a_repositorys_own_sampling_does_not_leak_in(tmp_path: Path, weights: str) -> None:
    folder = save_decoder(tmp_path)
    given = {"file": str(folder / "model.safetensors")}.get(weights, weights)
    expected = searched(randomize(decoder(folder, weights=given)).eval(), prompts())
    other = next(token for token in range(3, 99) if token not in expected)
    edit_json(folder / "generation_config.json", **OWN, eos_token_id=[END, other])
    model = randomize(decoder(folder, weights=given)).eval()
    assert torch.equal(searched(model, prompts()), expected)
    assert model.backbone.generation_config.eos_token_id == [END, other]


@pytest.mark.parametrize("end", [END, 5])
def test_a_response_stops_at_either_end(tmp_path: Path, end: int) -> None:
    folder = save_decoder(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=5)
    model = decoder(folder).eval()

    def tilt(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        logits[..., end] += 1000
        return logits

    model.backbone.lm_head.register_forward_hook(tilt)
    assert searched(model, prompts()).tolist() == [[end]] * 4


def test_generation_leaves_the_model_as_it_was(llama: Path) -> None:
    model = randomize(decoder(llama)).eval()
    before, known = copied(model.state_dict()), model.backbone.generation_config.to_dict()
    assert model.generate(prompts()) == model.generate(prompts())
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])] == []
    assert model.backbone.generation_config.to_dict() == known


# ------------------------------------------------------------------------------------------------------ what is saved


@every_kind
def test_a_checkpoint_of_adapters_holds_their_factors_alone(folders: dict[str, Path], kind: str) -> None:
    model = decoder(folders[kind], backbone_dtype="bfloat16")
    state = model.saved_state()
    assert set(state) == {f"backbone.{name}" for name in adapter_state(model.backbone)}
    assert len(state) == 2 * 14
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("tuning", ["adapter", "full"])
@torch.no_grad()
def test_a_checkpoint_and_its_hyper_parameters_build_the_same_model(llama: Path, tmp_path: Path, tuning: str) -> None:
    search = Decoding(max_new_tokens=5, do_sample=True, temperature=0.7, top_k=9, top_p=0.9)
    model = randomize(decoder(llama, tuning=tuning, generation=search)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "some.ckpt")
    loaded = torch.load(tmp_path / "some.ckpt", weights_only=True)
    torch.manual_seed(5)
    other: Any = LanguageModel(**loaded["hyper_parameters"]).eval()
    other.on_load_checkpoint(loaded)
    other.load_state_dict(loaded["state_dict"])
    assert (other.generation, other.adapter) == (search, model.adapter)
    assert torch.equal(other(batch())[0], model(batch())[0])


def test_the_template_is_the_datas_and_stays(llama: Path) -> None:
    model = with_data(decoder(llama), response_end=END, prompt_template="{{ one }}")
    model.setup("fit")
    assert model.hparams["prompt_template"] == "{{ one }}"
    model.setup("validate")
    with_data(model, response_end=END, prompt_template="{{ other }}")
    for stage in ("fit", "predict"):
        with pytest.raises(ModelError, match=r"^data\.template: the checkpoint was trained with another prompt templ"):
            model.setup(stage)
    assert model.hparams["prompt_template"] == "{{ one }}"
    with_data(model).setup("test")  # questions have none
    with_data(decoder(llama)).setup("test")
    again = decoder(llama, prompt_template=model.hparams["prompt_template"])
    with pytest.raises(ModelError, match=r"^data\.template: "):
        with_data(again, response_end=END, prompt_template="{{ other }}").setup("predict")


# ------------------------------------------------------------------------------------------------------------ packing


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoders_that_keep_packed_sequences_apart(folders: dict[str, Path], kind: str, dtype: str) -> None:
    adapter = AdapterConfig(rank=4, targets="all", dropout=0.5)
    model = randomize(decoder(folders[kind], backbone_dtype=dtype, adapter=adapter))
    state = torch.get_rng_state()
    with_data(model, packing=True).setup("fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    model.eval().check_packing()
    assert not any(module.training for module in model.modules())


MIXED = r"^data\.packing: \w+ForCausalLM does not keep packed sequences apart. Set the key to false"


def test_a_decoder_that_ignores_positions(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=len(VOCABULARY), hidden_size=32, n_layer=1, n_head=2, initializer_range=0.2)
    torch.manual_seed(0)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = with_data(decoder(tmp_path, adapter=AdapterConfig(rank=2, targets=["regex:.*dense_h_to_4h"])), packing=True)
    with pytest.raises(ModelError, match=MIXED):
        model.setup("fit")
    assert all(module.training for module in model.modules())
    model.setup("test")
    with_data(model, packing=False).setup("fit")


@pytest.mark.parametrize("error", [None, TypeError])
def test_positions_that_do_not_part_what_is_seen(
    llama: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    model = decoder(llama)
    plain = model.backbone.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **keys: Any) -> Any:
        if error is not None:
            raise error("got an unexpected keyword argument 'position_ids'")
        # with a mask transformers takes the positions to be of one sequence
        return plain(input_ids, torch.ones_like(input_ids), position_ids, **keys)

    monkeypatch.setattr(model.backbone, "forward", forward)
    with pytest.raises(ModelError, match=MIXED):
        model.check_packing()


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_tokenizer_without_padding_pads_with_the_end(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path)
    expected = decoder(folder).eval().generate(prompts())
    byte_tokenizer(pad_token=None).save_pretrained(folder)
    model = decoder(folder).eval()
    assert model.tokenizer.pad_token_id == END == model.backbone.generation_config.pad_token_id
    assert model.generate(prompts()) == expected


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path)
    byte_tokenizer(eos_token=None).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"^model\.backbone: the tokenizer of .* no end-of-text token.*eos_token in"):
        decoder(folder)


def test_a_tokenizer_of_more_tokens_than_embeddings(tmp_path: Path) -> None:
    folder, size = save_decoder(tmp_path), len(VOCABULARY)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"^model\.backbone: .* has {size + 1} tokens and the model only {size} "):
        decoder(folder)


def test_an_output_layer_without_weights(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path, tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for weights in ("pretrained", str(folder / "model.safetensors")):
        with pytest.raises(ModelError, match=r"^model\.weights: .* has no weights of lm_head\.weight"):
            decoder(folder, weights=weights)
    decoder(folder, weights="none")


def test_an_encoder_that_sees_what_it_is_to_predict(tmp_path: Path) -> None:
    RobertaForCausalLM(ENCODERS["roberta"]).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^model\.backbone: .* is a roberta, an encoder whose tokens attend to later"):
        decoder(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_new_tokens": 0}, r"^model\.generation\.max_new_tokens: 0 must be 1 or more"),
        (
            {"temperature": 0.0},
            r"^model\.generation\.temperature: 0\.0 must be finite and above 0",
        ),
        ({"temperature": math.nan}, r"^model\.generation\.temperature: nan must be finite"),
        ({"top_k": -1}, r"^model\.generation: top_k -1 must not be negative"),
        ({"top_p": 0.0}, r"^model\.generation: .* top_p 0\.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"^model\.generation: .* top_p 1\.1 must lie in \(0, 1\]"),
    ],
    ids=str,
)
def test_a_search_out_of_range_is_refused(llama: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Decoding(**keys)
    with pytest.raises(ModelError, match=message):
        decoder(llama, generation=keys)


def test_a_response_leaves_room_for_a_prompt(llama: Path) -> None:
    assert decoder(llama, generation=Decoding(max_new_tokens=POSITIONS - 1)).position_limit == POSITIONS
    with pytest.raises(ModelError, match=rf"^model\.generation\.max_new_tokens: {POSITIONS} leaves no room for a pr"):
        decoder(llama, generation=Decoding(max_new_tokens=POSITIONS))
    model, data = decoder(llama, backbone_args={"max_position_embeddings": 12}).eval(), prompts(["Why?"])
    model.generate(data)  # 4 + 8
    data = prompts(["Why so?", "Who?"])
    with pytest.raises(ModelError, match=r"^data\.max_length: a prompt of 7 tokens and .* 8 are more than the 12"):
        model.generate(data)
    more = {"max_position_embeddings": 2 * POSITIONS}
    decoder(llama, generation=Decoding(max_new_tokens=POSITIONS), backbone_args=more)


def one_update(folder: Path, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradients of the factors in one optimizer step over some batches."""
    model = randomize(decoder(folder))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=len(batches),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_token_of_an_update_weighs_the_same(llama: Path) -> None:
    every = batch()
    apart = [{key: value[i : i + 1] for key, value in every.items()} for i in range(len(every["labels"]))]
    learnt = [int((one["labels"] != -100).sum()) for one in apart]
    assert len(set(learnt)) > 1  # or a mean of means would be the same
    together, accumulated = one_update(llama, [every]), one_update(llama, apart)
    assert together
    for name, gradient in together.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_end_of_the_template_ends_responses_too(llama: Path) -> None:
    assert decoder(llama, response_end=7).backbone.generation_config.eos_token_id == [2, 7]
