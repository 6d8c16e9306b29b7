"""The summariser by itself: what it computes, what it generates, what it trains and what it saves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, GPT2Config

from app.cli import main
from datamodules.errors import ModelError
from modules.adapters import AdaptedLinear, AdapterConfig, adapted_layers, adapter_state, detach
from modules.generation.beam_search import Generation
from modules.summarization import Summarizer
from modules.training.checks import IdleAdapterCheck
from tests.backbones import CONFIGS, POSITIONS, VOCABULARY, save_backbone, word_tokenizer
from tests.conftest import sentences

Batch = dict[str, Any]
SOURCES = ["the film was good .", "bad", "it is not a good film w1 w2 w3 w4", "w5 w6"]
TARGETS = ["good", "the film was bad .", "w7 w8 w9", "it is not bad ."]
EVERY = AdapterConfig(rank=4, targets="all")
SEARCHES = {
    "greedy": Generation(num_beams=1, max_length=14, no_repeat_ngram_size=0),
    "beams": Generation(num_beams=3, max_length=14, no_repeat_ngram_size=3),
    "long": Generation(num_beams=3, max_length=20, min_length=9, length_penalty=2.0, no_repeat_ngram_size=2),
    "short": Generation(num_beams=3, max_length=20, length_penalty=-1.0, no_repeat_ngram_size=0),
}
END = 2
every_kind = pytest.mark.parametrize("kind", ["bart", "t5", "t5_gated", "pegasus"])
every_tuning = pytest.mark.parametrize("tuning", ["adapter", "full"])
every_search = pytest.mark.parametrize("search", list(SEARCHES))
beams = pytest.mark.parametrize("num_beams", [1, 3])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A backbone of each kind; at so small a width the usual spread of 0.02 leaves next to nothing of the input."""
    root = tmp_path_factory.mktemp("backbones")
    paths = {kind: save_backbone(root / kind, kind, init_std=0.3) for kind in ("bart", "pegasus")}
    paths["t5"] = save_backbone(root / "t5", "t5")
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # as version 1.1 and Flan-T5
    paths["t5_gated"] = save_backbone(root / "t5_gated", "t5", **gated)
    model = AutoModelForSeq2SeqLM.from_config(type(CONFIGS["t5"])(**{**CONFIGS["t5"].to_dict(), **gated}))
    model.lm_head.weight = nn.Parameter(torch.randn(len(VOCABULARY), 32))  # loading unties it, the configuration no
    model.save_pretrained(paths["t5_gated"])
    return paths


@pytest.fixture
def bart(folders: dict[str, Path]) -> Path:
    return folders["bart"]


def summarizer(folder: Path, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    keys = {"adapter": EVERY, "generation": SEARCHES["beams"], "learning_rate": 0.01, **keys}
    return Summarizer(str(folder), **keys)


def encode(texts: list[str]) -> Batch:
    return dict(word_tokenizer()(texts, padding=True, return_tensors="pt"))


def batch(sources: list[str] = SOURCES, targets: list[str] = TARGETS) -> Batch:
    """Sources and targets of unequal length."""
    encoded = encode(targets)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    source = {name: encode(sources)[name] for name in ("input_ids", "attention_mask")}
    return {**source, "labels": labels, "reference": targets, "index": torch.arange(len(sources))}


def inputs(data: Batch) -> Batch:
    return {name: data[name] for name in ("input_ids", "attention_mask")}


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
    reference = AutoModelForSeq2SeqLM.from_pretrained(folder)
    reference.load_state_dict(plain.state_dict())
    return reference.eval()


def searched(model: Any, data: Batch) -> Tensor:
    """The tokens behind what `generate` says, (batch, tokens)."""
    found: list[Tensor] = []
    search = model.backbone.generate

    def recorded(**keys: Any) -> Tensor:
        found.append(search(**keys))
        return found[-1]

    with patch.object(model.backbone, "generate", recorded):
        texts = model.generate(data)
    assert texts == [t.strip() for t in model.tokenizer.batch_decode(found[0], skip_special_tokens=True)]
    return found[0]


def settings(search: Generation) -> dict[str, Any]:
    """The same search in transformers' own words."""
    return asdict(search)


def generated(row: Tensor) -> list[int]:
    """Tokens of one text from the start to the end, both included; BART's start is the token of the end."""
    ids = row.tolist()
    return ids[: ids.index(END, 1) + 1] if END in ids[1:] else ids


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def trainer() -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **quiet, enable_model_summary=False, max_epochs=1)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- loss


@every_kind
@pytest.mark.parametrize("b", ["zero", "random"])
@torch.no_grad()
def test_loss_is_that_of_transformers(folders: dict[str, Path], kind: str, b: str) -> None:
    model = summarizer(folders[kind], label_smoothing=0.0).eval()
    data = batch()
    assert (data["labels"] == -100).any()
    if b == "random":
        randomize(model)
    expected = merged(folders[kind], model)(**inputs(data), labels=data["labels"])
    assert float(model.training_step(data, 0)) == pytest.approx(float(expected.loss), abs=1e-5)
    torch.testing.assert_close(model(data), expected.logits, rtol=1e-5, atol=1e-4)
    untouched = AutoModelForSeq2SeqLM.from_pretrained(folders[kind]).eval()(**inputs(data), labels=data["labels"])
    assert (abs(float(untouched.loss - expected.loss)) < 1e-5) is (b == "zero")


@every_kind
@torch.no_grad()
def test_label_smoothing_is_its_closed_form(folders: dict[str, Path], kind: str) -> None:
    model = randomize(summarizer(folders[kind], label_smoothing=0.3)).eval()
    data = batch()
    logits = merged(folders[kind], model)(**inputs(data), labels=data["labels"]).logits
    real = data["labels"] != -100
    log_p = logits.double().log_softmax(-1)[real]  # (tokens, vocabulary)
    right = log_p.gather(-1, data["labels"][real].unsqueeze(-1)).squeeze(-1)
    expected = float(-(0.7 * right + 0.3 * log_p.mean(-1)).mean())
    assert float(model.training_step(data, 0)) == pytest.approx(expected, abs=1e-5)
    model.evaluate("val", {**data, "reference": [""] * len(data["labels"])}, 0)
    assert float(model.scores("val")["val/loss"]) == pytest.approx(float(-right.mean()), abs=1e-5)  # none in evaluation


@every_kind
@torch.no_grad()
def test_padding_does_not_matter(folders: dict[str, Path], kind: str) -> None:
    model = randomize(summarizer(folders[kind])).eval()
    together = model(batch())
    alone = model(batch(SOURCES[1:2], TARGETS[:1]))
    mixed = model(batch([SOURCES[1], SOURCES[2]], [TARGETS[0], TARGETS[1]]))
    assert alone.shape[1] < mixed.shape[1]
    torch.testing.assert_close(mixed[0, : alone.shape[1]], alone[0], rtol=0, atol=1e-4)
    assert not torch.allclose(together[1, : alone.shape[1]], alone[0], atol=1e-2)  # another target before it


def test_a_length_penalty_that_is_no_number_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^model\.generation\.length_penalty: nan must be finite"):
        Generation(length_penalty=math.nan)


# --------------------------------------------------------------------------------------------------------- generation


@every_kind
@every_search
def test_generation_is_that_of_transformers_with_merged_weights(
    folders: dict[str, Path], kind: str, search: str
) -> None:
    model = summarizer(folders[kind], generation=SEARCHES[search]).eval()
    data = batch()
    at_start = searched(model, data)
    tokens = searched(randomize(model), data)
    expected = merged(folders[kind], model).generate(**inputs(data), **settings(SEARCHES[search]))
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, at_start)


@every_kind
def test_every_search_finds_other_texts(folders: dict[str, Path], kind: str) -> None:
    data = batch(sentences(12))
    found = {
        name: tuple(randomize(summarizer(folders[kind], generation=search)).eval().generate(data))
        for name, search in SEARCHES.items()
    }
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_forced_tokens_are_the_repositorys_wherever_the_weights_come_from(
    tmp_path: Path, weights: str, file: str
) -> None:
    folder = save_backbone(tmp_path, "bart")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    keys = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**keys, "forced_bos_token_id": 7}))
    given = {"file": str(folder / "model.safetensors")}.get(weights, weights)
    model = summarizer(folder, weights=given).eval()
    assert (searched(model, batch())[:, 1] == 7).all()


@every_kind
@beams
@pytest.mark.parametrize("end", ["wanted", "shunned"])
def test_lengths_are_obeyed_whatever_the_padding(folders: dict[str, Path], kind: str, num_beams: int, end: str) -> None:
    data = batch(sentences(12))
    assert (data["attention_mask"] == 0).any()

    def tilt(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        """Every text would end at once, or never."""
        logits[..., END] += 1000 if end == "wanted" else -1000
        return logits

    def lengths(**keys: int) -> set[int]:
        search = Generation(num_beams=num_beams, no_repeat_ngram_size=2, **keys)
        model = randomize(summarizer(folders[kind], generation=search)).eval()
        model.backbone.lm_head.register_forward_hook(tilt)
        return {len(generated(row)) for row in searched(model, data)}

    if end == "wanted":
        assert max(lengths(max_length=20)) < 8
        assert lengths(max_length=20, min_length=8) <= {8, 9}  # transformers does not count the end
    else:
        assert lengths(max_length=13, min_length=8) == {13}
        assert lengths(max_length=20) == {20}


def ngrams(ids: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]


@every_kind
@beams
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_comes_twice(folders: dict[str, Path], kind: str, num_beams: int, size: int) -> None:
    def repeated(no_repeat_ngram_size: int) -> int:
        search = Generation(num_beams=num_beams, max_length=24, no_repeat_ngram_size=no_repeat_ngram_size)
        model = randomize(summarizer(folders[kind], generation=search)).eval()
        rows = [generated(row)[1:-1] for row in searched(model, batch(sentences(8)))]
        return sum(len(ngrams(row, size)) - len(set(ngrams(row, size))) for row in rows)

    assert repeated(0) > 0
    assert repeated(size) == 0


@pytest.mark.parametrize("kind", ["bart", "t5"])
@beams
def test_a_summary_does_not_depend_on_its_company(folders: dict[str, Path], kind: str, num_beams: int) -> None:
    search = Generation(num_beams=num_beams, max_length=16, no_repeat_ngram_size=2)
    model = randomize(summarizer(folders[kind], generation=search)).eval()
    sources = sentences(8)
    alone = [model.generate(encode([source]))[0] for source in sources]
    assert len(set(alone)) > 2
    assert model.generate(encode(sources)) == alone
    assert model.generate(encode(sources[::-1])) == alone[::-1]
    assert model.generate(encode([sources[0], " ".join(["w3"] * 30)]))[0] == alone[0]


def own_settings(folder: Path, target: Path, **keys: Any) -> Path:
    """A copy of a backbone whose generation_config.json has more keys."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    known = json.loads((folder / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps({**known, **keys}))
    return target


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 2, "max_length": 5, "min_length": 4, "length_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 3},
        {"min_new_tokens": 18},
        {"do_sample": True},
    ],
    ids=["same_keys", "max_new_tokens", "min_new_tokens", "do_sample"],
)
def test_the_settings_win_over_the_backbones_own(
    folders: dict[str, Path], tmp_path: Path, kind: str, own: dict[str, Any]
) -> None:
    folder = own_settings(folders[kind], tmp_path / "own", **own)
    model, plain = (randomize(summarizer(f, generation=SEARCHES["short"])).eval() for f in (folder, folders[kind]))
    expected = plain.generate(batch())
    assert any(3 < len(text.split()) < 17 for text in expected)
    assert model.generate(batch()) == expected


@every_kind
def test_forced_tokens_are_the_backbones_own(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    first = searched(randomize(summarizer(folders[kind])).eval(), batch())[:, 1]
    other = next(token for token in range(4, 50) if token not in first)
    folder = own_settings(folders[kind], tmp_path / "own", forced_bos_token_id=other)
    assert (searched(randomize(summarizer(folder)).eval(), batch())[:, 1] == other).all()


def test_generation_leaves_the_model_as_it_was(bart: Path) -> None:
    model = randomize(summarizer(bart)).eval()
    before, known = copied(model.state_dict()), model.backbone.generation_config.to_dict()
    first = model.generate(batch())
    assert model.generate(batch()) == first
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])] == []
    assert model.backbone.generation_config.to_dict() == known


# --------------------------------------------------------------------------------------------------- what is trained


@every_kind
@every_tuning
def test_factors_alone_are_trained_or_everything(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = summarizer(folders[kind], tuning=tuning)
    assert model.head_names == []
    factors = {f"backbone.{name}" for name in adapter_state(model.backbone) if name.endswith(".B")}
    assert bool(factors) is (tuning == "adapter")
    expected = {name for name, _ in model.named_parameters()} if tuning == "full" else factors
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)
    groups = model.configure_optimizers()["optimizer"].param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}


@every_kind
def test_cross_attention_has_adapters_and_they_get_a_gradient(folders: dict[str, Path], kind: str) -> None:
    model = summarizer(folders[kind])
    model.loss(batch()).backward()
    IdleAdapterCheck().on_after_backward(trainer(), model)  # no idle factor
    of_decoder = "EncDecAttention" if kind.startswith("t5") else "encoder_attn"
    b = {name: p for name, p in model.named_parameters() if of_decoder in name and name.endswith(".B")}
    assert len(b) == 2 * 4  # four projections in each block
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in b.values())


@every_kind
@every_tuning
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_move_what_is_trained_alone(folders: dict[str, Path], kind: str, tuning: str, dtype: str) -> None:
    if tuning == "full" and dtype == "bfloat16":
        with pytest.raises(ModelError, match=r"^model\.backbone_dtype: bfloat16 is for frozen weights"):
            summarizer(folders[kind], tuning=tuning, backbone_dtype=dtype)
        return
    model = summarizer(folders[kind], tuning=tuning, backbone_dtype=dtype).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = copied(dict(model.named_parameters()))
    losses = []
    for _ in range(8):
        loss = model.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if kind == "pegasus":  # its sinusoids are parameters that have no gradient
        trained = {name for name in trained if "embed_positions" not in name}
    assert moved == trained
    assert_tied(model, kind)


@every_kind
@every_tuning
@torch.no_grad()
def test_dropout_is_on_in_training_alone(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = summarizer(folders[kind], tuning=tuning)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(batch()), model(batch()))
    model.eval()
    assert torch.equal(model(batch()), model(batch()))


@pytest.mark.parametrize(("kind", "keys"), [("bart", ["dropout"]), ("t5", ["dropout_rate"])])
@torch.no_grad()
def test_backbone_args_switch_dropout_off(folders: dict[str, Path], kind: str, keys: list[str]) -> None:
    model = summarizer(folders[kind], backbone_args=dict.fromkeys(keys, 0.0))
    assert torch.equal(model(batch()), model(batch()))


def tied(model: Any) -> list[nn.Parameter]:
    inner = model.backbone.base_model
    tables = [inner.shared, inner.encoder.embed_tokens, inner.decoder.embed_tokens, model.backbone.lm_head]
    return [table.weight for table in tables]


def assert_tied(model: Any, kind: str) -> None:
    shared, encoder, decoder, head = tied(model)
    assert shared is encoder is decoder
    assert (head is shared) is (kind != "t5_gated")


@every_kind
@pytest.mark.parametrize("keys", [{}, {"backbone_dtype": "bfloat16"}, {"tuning": "full"}], ids=str)
def test_embeddings_stay_tied(folders: dict[str, Path], kind: str, keys: dict[str, Any]) -> None:
    model = summarizer(folders[kind], **keys)
    assert_tied(model, kind)
    state = {name: t + 1 if t.is_floating_point() else t for name, t in copied(model.saved_state()).items()}
    model.load_state_dict(state)
    assert_tied(model, kind)
    saved = "backbone.shared.weight" if kind.startswith("t5") else "backbone.model.shared.weight"
    assert (saved in state) is ("tuning" in keys)
    if "tuning" in keys:
        assert torch.equal(tied(model)[3], state[saved] if kind != "t5_gated" else state["backbone.lm_head.weight"])


@every_kind
@torch.no_grad()
def test_a_bfloat16_backbone_computes_about_the_same(folders: dict[str, Path], kind: str) -> None:
    full = randomize(summarizer(folders[kind])).eval()
    half = summarizer(folders[kind], backbone_dtype="bfloat16").eval()
    half.load_state_dict(full.saved_state())
    factors = {
        id(p) for layer in adapted_layers(half.backbone).values() for f in layer.factors() for p in f.parameters()
    }
    assert {p.dtype for p in half.parameters() if id(p) in factors} == {torch.float32}
    assert {p.dtype for p in half.parameters() if id(p) not in factors} == {torch.bfloat16}
    ours, theirs = half(batch()), full(batch())
    assert ours.dtype == torch.float32
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.1
    assert len(half.generate(batch())) == 4


# ------------------------------------------------------------------------------------------------------ what is saved


@every_kind
def test_a_checkpoint_of_adapters_holds_their_factors_alone(folders: dict[str, Path], kind: str) -> None:
    model = summarizer(folders[kind])
    state = model.saved_state()
    assert set(state) == {f"backbone.{name}" for name in adapter_state(model.backbone)}
    assert len(state) == 2 * len(model.projections)
    assert not any("final_logits_bias" in name or "lm_head" in name or "shared" in name for name in state)


def test_an_output_layer_of_its_own_is_frozen_like_the_rest(tmp_path: Path) -> None:
    model = summarizer(save_backbone(tmp_path, "bart", tie_word_embeddings=False))
    head = model.backbone.lm_head.weight
    assert torch.equal(head, load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    assert not torch.equal(head, model.backbone.get_input_embeddings().weight)
    assert model.head_names == []
    assert set(model.saved_state()) == {f"backbone.{name}" for name in adapter_state(model.backbone)}


@every_kind
def test_a_checkpoint_of_full_tuning_holds_everything_once(folders: dict[str, Path], kind: str) -> None:
    model = summarizer(folders[kind], tuning="full")
    state = model.saved_state()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    everything = {tensor.data_ptr() for tensor in model.backbone.state_dict().values()}
    assert {tensor.data_ptr() for tensor in state.values()} == everything
    assert len(state) < len(model.state_dict())


@every_kind
@every_tuning
@torch.no_grad()
def test_round_trip_into_a_module_of_another_seed(folders: dict[str, Path], kind: str, tuning: str) -> None:
    model = summarizer(folders[kind], tuning=tuning).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    state = copied(model.saved_state())
    other = summarizer(folders[kind], seed=7, tuning=tuning).eval()
    assert not torch.allclose(other(batch()), model(batch()), atol=1e-3)
    assert other.fingerprint == model.fingerprint
    other.load_state_dict(state)
    assert torch.equal(other(batch()), model(batch()))
    assert other.generate(batch()) == model.generate(batch())


@every_kind
def test_a_full_checkpoint_does_not_ask_where_training_began(folders: dict[str, Path], kind: str) -> None:
    first, second = (summarizer(folders[kind], seed=seed, tuning="full", weights="none").eval() for seed in (0, 1))
    checkpoint: dict[str, Any] = {"hyper_parameters": {}, "state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    second.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        assert torch.equal(first(batch()), second(batch()))


@every_kind
@pytest.mark.parametrize("tuning", ["adapter", "full"])
@torch.no_grad()
def test_a_checkpoints_hyper_parameters_build_the_same_model(
    folders: dict[str, Path], tmp_path: Path, kind: str, tuning: str
) -> None:
    search = Generation(num_beams=3, max_length=11, min_length=4, length_penalty=1.5, no_repeat_ngram_size=2)
    keys = {"adapter": AdapterConfig(rank=3, targets=["query", "mlp_in"]), "generation": search, "label_smoothing": 0.2}
    model = randomize(summarizer(folders[kind], tuning=tuning, **keys)).eval()
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "some.ckpt")
    loaded = torch.load(tmp_path / "some.ckpt", weights_only=True)
    known = loaded["hyper_parameters"]
    assert known["generation"] == settings(search)
    assert type(known["adapter"]) is dict
    torch.manual_seed(5)
    other: Any = Summarizer(**known).eval()
    other.on_load_checkpoint(loaded)
    other.load_state_dict(loaded["state_dict"])
    assert (other.generation, other.adapter, other.label_smoothing) == (search, model.adapter, 0.2)
    assert (other.tuning, other.learning_rate) == (tuning, 0.01)
    assert torch.equal(other(batch()), model(batch()))
    assert torch.equal(searched(other, batch()), searched(model, batch()))


def test_a_state_of_other_targets_is_refused(bart: Path) -> None:
    state = summarizer(bart, adapter=AdapterConfig(rank=4, targets=["query"])).saved_state()
    with pytest.raises(ModelError, match=r"another model than the one configured: .* missing"):
        summarizer(bart).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------- steps


class Sets(L.LightningDataModule):
    """Batches that are there already."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.batches, batch_size=None)]  # type: ignore[arg-type]

    test_dataloader = val_dataloader


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_rouge_of_the_texts_and_the_loss_of_a_token(bart: Path, stage: str) -> None:
    model = randomize(summarizer(bart))
    data = [batch(sentences(4), TARGETS), batch(sentences(2, seed=1), ["w25 w25 w1 w5", "good"])]
    run = trainer()
    evaluate: Callable[..., Any] = run.validate if stage == "val" else run.test
    evaluate(model, datamodule=Sets(data), verbose=False)
    model.eval()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = [pair for b in data for pair in zip(b["reference"], model.generate(b), strict=True)]
    scores = [scorer.score(reference, summary) for reference, summary in pairs]
    expected = {name: sum(s[name].fmeasure for s in scores) / 6 for name in ("rouge1", "rouge2", "rougeL")}
    with torch.no_grad():
        logits = torch.cat([model(b).flatten(0, 1) for b in data])
    expected["loss"] = float(F.cross_entropy(logits, torch.cat([b["labels"].flatten() for b in data])))
    actual = {name: float(value) for name, value in run.callback_metrics.items()}
    assert set(actual) == {f"{stage}/{name}" for name in (*expected, "rougeLsum")}
    assert expected["rouge1"] > 0
    assert {k: actual[f"{stage}/{k}"] for k in expected} == pytest.approx(expected, abs=1e-5)


def test_a_second_evaluation_starts_anew(bart: Path) -> None:
    model, run = randomize(summarizer(bart)), trainer()
    first = Sets([batch(targets=["w25 w25", "w1", "w5 w25", "w25"])])
    second = Sets([batch(sentences(4), targets=["w10", "w29 w10", "w17", "good"])])
    expected = trainer().validate(randomize(summarizer(bart)), datamodule=second, verbose=False)
    assert run.validate(model, datamodule=first, verbose=False) != expected
    assert run.validate(model, datamodule=second, verbose=False) == expected


def test_predictions_need_no_target(bart: Path) -> None:
    model = randomize(summarizer(bart)).eval()
    data = {name: batch()[name] for name in ("input_ids", "attention_mask", "index")}
    assert model.predict_step(data, 0) == {"index": [0, 1, 2, 3], "summary": model.generate(data)}


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_beams": 0}, r"^model\.generation\.num_beams: 0 must be 1 or more"),
        ({"min_length": 11, "max_length": 10}, r"^model\.generation: min_length 11 and max_length 10"),
        ({"min_length": -1}, r"^model\.generation: min_length -1"),
        ({"max_length": 1}, r"^model\.generation: .* max_length 2 or more"),
        ({"no_repeat_ngram_size": -1}, r"^model\.generation\.no_repeat_ngram_size: -1 must not be negative"),
    ],
    ids=str,
)
def test_a_search_out_of_range_is_refused(bart: Path, keys: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Generation(**keys)
    with pytest.raises(ModelError, match=message):
        summarizer(bart, generation={"max_length": 20, **keys})


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_longer_texts_than_there_are_positions_for_are_refused(folders: dict[str, Path], kind: str) -> None:
    assert summarizer(folders[kind], generation=Generation(max_length=POSITIONS)).position_limit == POSITIONS
    message = rf"^model\.generation\.max_length: {POSITIONS + 1} tokens are more than the {POSITIONS} that"
    with pytest.raises(ModelError, match=message):
        summarizer(folders[kind], generation=Generation(max_length=POSITIONS + 1))


def test_relative_positions_have_no_limit(folders: dict[str, Path]) -> None:
    model = summarizer(folders["t5"], generation=Generation(max_length=4096))
    assert model.position_limit is None


@pytest.mark.parametrize("label_smoothing", [1.0, 1.5, -0.1])
def test_label_smoothing_out_of_range_is_refused(bart: Path, label_smoothing: float) -> None:
    with pytest.raises(ModelError, match=rf"^model\.label_smoothing: {label_smoothing} must lie in \[0, 1\)"):
        summarizer(bart, label_smoothing=label_smoothing)


def save_one_sided(folder: Path, kind: str) -> Path:
    """A model with an encoder or a decoder alone."""
    sizes = {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 1, "n_head": 2}
    (GPT2Config(**sizes) if kind == "gpt2" else CONFIGS[kind]).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, *options: str) -> str:
    """The one message that a command ends with."""
    words = ["--trainer.default_root_dir", str(tmp_path / "runs"), "--data.path", str(data), *options]
    assert main(["fit", "--config", "tests/conf/summary.yaml", *words]) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    assert not (tmp_path / "runs/version_0/checkpoints").exists()
    return line


@pytest.mark.parametrize("kind", ["roberta", "deberta", "gpt2"])
def test_an_encoder_or_a_decoder_alone_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pairs_path: Path, kind: str
) -> None:
    folder = save_one_sided(tmp_path / kind, kind)
    line = refused(capsys, tmp_path, pairs_path, f"--model.backbone={folder}")
    name = "deberta-v2" if kind == "deberta" else kind
    assert line == (
        f"error: model.backbone: {folder} is a {name}, which has no model for Seq2SeqLM. Choose another backbone."
    )


def test_there_is_no_head_to_tune(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pairs_path: Path, bart_path: Path
) -> None:
    line = refused(capsys, tmp_path, pairs_path, f"--model.backbone={bart_path}", "--model.tuning=head")
    for part in ("tuning", "'adapter'", "'full'", "head"):
        assert part in line
