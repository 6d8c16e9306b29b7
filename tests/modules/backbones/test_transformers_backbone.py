"""Backbones in the hub's layout: what is loaded, which modules are heads, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from datamodules.errors import ModelError
from modules.backbones.transformers_backbone import (
    Built,
    build_transformers_model,
    load_tokenizer,
    position_limit,
    selected_logits,
)
from tests.backbones import CONFIGS, VOCABULARY, save_backbone, save_classifier, word_tokenizer
from tests.causal_backbones import CONFIGS as DECODERS
from tests.causal_backbones import save_decoder

ENCODERS = ["roberta", "bert", "deberta", "distilbert"]
HEADS = {
    "roberta": ["classifier"],
    "bert": ["classifier"],
    "deberta": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "bart": ["classification_head"],
    "t5": ["classification_head"],
}
every_kind = pytest.mark.parametrize("kind", list(CONFIGS))


def build(folder: Path | str, weights: str | Path = "pretrained", **args: Any) -> Built:
    return build_transformers_model(AutoModelForSequenceClassification, str(folder), str(weights), args)


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "roberta", "roberta")


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def encoder(built: Built) -> dict[str, Tensor]:
    return built.model.base_model.state_dict()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --------------------------------------------------------------------------------------------------------------- loads


@every_kind
def test_a_directory_loads_as_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    built = build(tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path).state_dict()
    expected = {name: theirs[name] for name in encoder(built)}  # RoBERTa's classifier has no pooler
    assert_same(encoder(built), expected)
    assert len(set(theirs) - set(expected)) == (2 if kind == "roberta" else 0)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_classifier_loads_as_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    save_classifier(tmp_path, kind, ["a", "b", "c"])
    built = build(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(built.model) is type(theirs)
    assert_same(built.model.state_dict(), theirs.state_dict())
    assert built.new == set()
    assert built.heads == HEADS[kind]


def test_weights_in_several_files_load(roberta: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(roberta).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(encoder(build(tmp_path / "shards")), encoder(build(roberta)))


def build_in_bfloat16(folder: Path, **keys: Any) -> Built:
    keys = {"args": {}, "dtype": torch.bfloat16, **keys}
    return build_transformers_model(AutoModelForSequenceClassification, str(folder), "pretrained", **keys)


@pytest.mark.parametrize("kind", [*ENCODERS, "bart"])
def test_heads_are_drawn_alike_beside_a_backbone_in_bfloat16(tmp_path: Path, kind: str) -> None:
    folder = save_backbone(tmp_path / kind, kind)
    torch.manual_seed(3)
    expected = build(folder)
    torch.manual_seed(3)
    built = build_in_bfloat16(folder)
    assert sorted(built.heads) == sorted(HEADS[kind])
    heads = tuple(f"{head}." for head in built.heads)
    for name, tensor in expected.model.state_dict().items():
        wanted = tensor if name.startswith(heads) else tensor.bfloat16()
        assert built.model.state_dict()[name].dtype == wanted.dtype, name
        assert torch.equal(built.model.state_dict()[name], wanted), name


@pytest.mark.parametrize("kind", ENCODERS)
def test_heads_with_weights_are_not_rounded(tmp_path: Path, kind: str) -> None:
    folder = save_classifier(tmp_path / kind, kind, ["a", "b", "c"])
    stored = load_file(folder / "model.safetensors")
    assert_same(build_in_bfloat16(folder).model.state_dict(), build(folder).model.state_dict())
    untrained = build_in_bfloat16(folder, trains_heads=False).model
    assert_same(untrained.state_dict(), {name: t.bfloat16() for name, t in untrained.state_dict().items()})
    assert stored.keys() <= untrained.state_dict().keys()


def test_quantised_weights_are_refused(roberta: Path) -> None:
    config = json.loads((roberta / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (roberta / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^model\.backbone: the weights of .*roberta are quantised"):
        build(roberta)


def test_weights_in_bfloat16_load_as_float32(roberta: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(roberta, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {name: t.bfloat16().float() for name, t in encoder(build(roberta)).items()}
    assert_same(encoder(build(tmp_path / "half")), expected)


@every_kind
def test_none_is_random_and_reads_no_weights(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    pretrained = encoder(build(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(3)
    built = build(tmp_path, "none")
    torch.manual_seed(3)
    again = build(tmp_path, "none")
    assert built.new == set(built.model.state_dict())
    assert built.heads == HEADS[kind]
    assert_same(built.model.state_dict(), again.model.state_dict())
    matrices = [name for name, t in encoder(built).items() if t.ndim > 1 and t.std() > 0]
    assert len(matrices) > 10
    assert not any(torch.equal(encoder(built)[name], pretrained[name]) for name in matrices)


@every_kind
def test_the_directorys_own_file_by_name_is_the_same(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    pretrained, by_name = build(tmp_path), build(tmp_path, tmp_path / "model.safetensors")
    assert_same(encoder(by_name), encoder(pretrained))
    assert type(by_name.model) is type(pretrained.model)
    assert by_name.heads == pretrained.heads
    assert by_name.new == pretrained.new


def test_another_file_takes_the_place_of_the_directorys_own(roberta: Path, tmp_path: Path) -> None:
    other = save_backbone(tmp_path / "other", "roberta", seed=1)
    assert_same(encoder(build(roberta, other / "model.safetensors")), encoder(build(other)))
    (roberta / "model.safetensors").unlink()
    assert_same(encoder(build(roberta, other / "model.safetensors")), encoder(build(other)))


def test_a_classifiers_file_brings_its_head(roberta: Path, tmp_path: Path) -> None:
    other = save_classifier(tmp_path / "other", "roberta", ["a", "b"], seed=1)
    built = build(roberta, other / "model.safetensors")
    assert_same(built.model.state_dict(), build(other).model.state_dict())
    assert built.new == set()


def test_backbone_args_change_the_configuration(roberta: Path) -> None:
    built = build(roberta, hidden_dropout_prob=0.4, attention_probs_dropout_prob=0)
    assert built.model.config.hidden_dropout_prob == 0.4
    probabilities = {m.p for m in built.model.base_model.modules() if isinstance(m, nn.Dropout)}
    assert probabilities == {0.4, 0.0}
    assert len(build(roberta, "none", num_hidden_layers=1).model.base_model.encoder.layer) == 1
    assert_same(encoder(built), encoder(build(roberta)))


# --------------------------------------------------------------------------------------------------------------- heads


@every_kind
def test_heads_are_what_the_pretrained_model_does_not_bring(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    built = build(tmp_path)
    assert built.heads == HEADS[kind]
    names = set(built.model.state_dict())
    assert built.new == {n for n in names if n.startswith(tuple(f"{head}." for head in HEADS[kind]))}
    assert len(built.new) >= 2 * len(HEADS[kind])


def bert_without_pooler(folder: Path) -> Path:
    save_backbone(folder, "bert")
    BertModel(CONFIGS["bert"], add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by_name", [False, True])
def test_a_pooler_without_weights_is_a_head(by_name: bool, tmp_path: Path) -> None:
    folder = bert_without_pooler(tmp_path)
    built = build(folder, folder / "model.safetensors" if by_name else "pretrained")
    assert sorted(built.heads) == ["bert.pooler", "classifier"]
    assert built.new == {f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}


def test_weights_missing_in_the_encoder_are_refused_by_name(roberta: Path) -> None:
    path = roberta / "model.safetensors"
    state = load_file(path)
    del state["encoder.layer.1.attention.self.query.weight"]
    save_file(state, path, metadata={"format": "pt"})
    for weights in ("pretrained", path):
        with pytest.raises(ModelError, match=r"^model\.weights: ") as error:
            build(roberta, weights)
        assert "1 tensors are missing" in str(error.value)
        assert "(roberta.encoder.layer.1.attention.self.query.weight)" in str(error.value)


@pytest.mark.parametrize(
    ("args", "count", "name"),
    [
        ({"num_hidden_layers": 3}, 16, "roberta.encoder.layer.2"),
        ({"vocab_size": 60}, 1, "roberta.embeddings.word_embeddings.weight"),
        ({"intermediate_size": 48}, 6, "roberta.encoder.layer.0.intermediate.dense"),
    ],
)
def test_another_shape_of_the_encoder_is_refused_by_name(
    roberta: Path, args: dict[str, Any], count: int, name: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"^model\.weights: .* {count} tensors are missing or of another shape"
    ) as error:
        build(roberta, **args)
    assert name in str(error.value)


def test_weights_of_another_family_are_refused(roberta: Path, tmp_path: Path) -> None:
    other = save_backbone(tmp_path / "other", "distilbert")
    with pytest.raises(ModelError, match=r"^model\.weights: .*other.* does not fit RobertaForSequenceClassification"):
        build(roberta, other / "model.safetensors")


OUTPUT = {"roberta": "classifier.out_proj", "bert": "classifier", "deberta": "classifier", "distilbert": "classifier"}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_classifier_of_other_labels_loads_all_but_its_output(kind: str, tmp_path: Path) -> None:
    saved = load_file(save_classifier(tmp_path, kind, list("abcde")) / "model.safetensors")
    built = build(tmp_path, num_labels=3)
    output = {f"{OUTPUT[kind]}.weight", f"{OUTPUT[kind]}.bias"}
    state = built.model.state_dict()
    assert built.new == output
    assert state[f"{OUTPUT[kind]}.weight"].shape == (3, 32)
    assert_same({k: v for k, v in state.items() if k not in output}, {k: saved[k] for k in state.keys() - output})


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("weights", ["pretrained", "none"])
def test_an_unknown_key_is_refused(roberta: Path, weights: str) -> None:
    with pytest.raises(ModelError, match=r"^model\.backbone_args: hiden_dropout, layers .* roberta's config\.json"):
        build(roberta, weights, hiden_dropout=0.1, hidden_dropout_prob=0.1, layers=3)


def test_a_value_of_another_type_is_refused(roberta: Path) -> None:
    with pytest.raises(ModelError, match="hidden_dropout_prob"):
        build(roberta, hidden_dropout_prob="a lot")


def test_a_value_that_the_model_cannot_have_is_refused(roberta: Path) -> None:
    with pytest.raises(ModelError, match="dropout probability"):
        build(roberta, hidden_dropout_prob=2.0)


def test_a_directory_without_configuration(roberta: Path) -> None:
    (roberta / "config.json").unlink()
    with pytest.raises(ModelError, match=r"^model\.backbone: the directory .* has no config\.json.*hub's layout"):
        build(roberta)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"model_type": "no-such-type"}', "{}"])
def test_a_damaged_configuration(roberta: Path, text: str) -> None:
    (roberta / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"^model\.backbone: .*roberta is no intact directory here"):
        build(roberta)


@pytest.mark.parametrize("name", ["no/such-model", "no-such-model", "./no/such/directory", "a b"])
def test_a_name_that_is_nowhere(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^model\.backbone: {name} .*Without a connection give a local directory"):
        build(name)


@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
def test_a_model_that_classifies_no_texts(roberta: Path, tmp_path: Path, weights: str) -> None:
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(tmp_path)
    file = roberta / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"^model\.backbone: .* is a vit, which has no model for SequenceClassif"):
        build(tmp_path, file if weights == "file" else weights)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
@pytest.mark.parametrize("by_name", [False, True])
def test_truncated_weights(roberta: Path, size: int, by_name: bool) -> None:
    path = roberta / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"^model\.weights: .*roberta"):
        build(roberta, path if by_name else "pretrained")


def test_a_directory_without_weights(roberta: Path) -> None:
    (roberta / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^model\.weights: .*roberta could not be loaded.*model\.safetensors"):
        build(roberta)


@pytest.mark.parametrize("name", ["absent.safetensors", "weights.pt", "."])
def test_a_file_of_weights_that_is_none(roberta: Path, name: str) -> None:
    (roberta / "weights.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"^model\.weights: .* is no \.safetensors file.*`pretrained` or `none`"):
        build(roberta, roberta / name)


# ---------------------------------------------------------------------------------------------------- code is never run


class Payload:
    """What pickle would run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("archive", [False, True])
def test_pickled_code_in_weights_is_not_run(roberta: Path, tmp_path: Path, name: str, archive: bool) -> None:
    trace = tmp_path / "trace"
    state = {"embeddings.word_embeddings.weight": Payload(trace)}
    pickle.loads(pickle.dumps(state))
    assert trace.exists()  # it would work
    trace.unlink()
    (roberta / "model.safetensors").unlink()
    if archive:
        torch.save(state, roberta / name)
    else:
        (roberta / name).write_bytes(pickle.dumps(state))
    with pytest.raises(ModelError, match=r"^model\.weights: .*roberta"):
        build(roberta)
    assert not trace.exists()


CODE = """
import pathlib
pathlib.Path({trace!r}).touch()
from transformers import RobertaConfig as Config, RobertaForSequenceClassification as Model, RobertaTokenizer as Words
"""


@pytest.fixture
def with_code(roberta: Path, tmp_path: Path) -> Path:
    """A repository that brings its own classes, and the file that they leave once imported."""
    (roberta / "own.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    edit_json(roberta / "config.json", auto_map={**classes, "AutoModelForSequenceClassification": "own.Model"})
    edit_json(roberta / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Words", "own.Words"]})
    return roberta


@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
def test_code_of_a_repository_gives_way_to_transformers_own(with_code: Path, tmp_path: Path, weights: str) -> None:
    built = build(with_code, with_code / "model.safetensors" if weights == "file" else weights)
    assert type(built.model).__module__ == "transformers.models.roberta.modeling_roberta"
    assert type(load_tokenizer(str(with_code), built.model)).__module__.startswith("transformers.")
    assert not (tmp_path / "trace").exists()


def test_a_model_that_is_only_code_is_refused(with_code: Path, tmp_path: Path) -> None:
    edit_json(with_code / "config.json", model_type="their-own")
    with pytest.raises(ModelError, match=r"^model\.backbone: "):
        build(with_code)
    assert not (tmp_path / "trace").exists()


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("kind", ["roberta", "bert", "deberta", "distilbert", "bart"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_directory_without_tokenizer(kind: str, kept: tuple[str, ...], tmp_path: Path) -> None:
    # transformers would make up one that knows its special tokens and no word
    save_backbone(tmp_path, kind)
    for path in tmp_path.glob("tokenizer*"):
        if path.name not in kept:
            path.unlink()
    with pytest.raises(ModelError, match=r"^model\.backbone: .* tokenizer .*tokenizer\.json"):
        load_tokenizer(str(tmp_path), build(tmp_path).model)


def test_a_damaged_tokenizer(roberta: Path) -> None:
    (roberta / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"^model\.backbone: .* no tokenizer that could be loaded.*tokenizer\.json"):
        load_tokenizer(str(roberta), build(roberta).model)


def test_a_tokenizer_that_cannot_pad(roberta: Path) -> None:
    word_tokenizer(pad_token=None).save_pretrained(roberta)
    with pytest.raises(ModelError, match=r"^model\.backbone: .* no padding token.*pad_token in tokenizer_config\.json"):
        load_tokenizer(str(roberta), build(roberta).model)


def test_a_tokenizer_of_more_tokens_than_embeddings(roberta: Path) -> None:
    size = len(VOCABULARY)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(roberta)
    model = build(roberta).model
    with pytest.raises(ModelError, match=rf"^model\.backbone: .* has {size + 1} tokens and the model only {size} "):
        load_tokenizer(str(roberta), model)
    model.resize_token_embeddings(size + 8)  # more embeddings than tokens are common, and fine
    assert len(load_tokenizer(str(roberta), model)) == size + 1


NAMES = ["input_ids", "token_type_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("kind", "types", "kept"),
    [("bert", 2, True), ("bert", 1, False), ("roberta", 1, False), ("deberta", 0, False), ("deberta", 2, True)],
)
@torch.no_grad()
def test_token_types_are_for_models_that_know_two(kind: str, types: int, kept: bool, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind, type_vocab_size=types)
    word_tokenizer(model_input_names=NAMES).save_pretrained(tmp_path)
    model = build(tmp_path).model
    tokenizer = load_tokenizer(str(tmp_path), model)
    encoded = tokenizer(["the film"], ["good ."], return_tensors="pt")
    assert set(encoded) == (set(NAMES) if kept else {"input_ids", "attention_mask"})
    assert model(**encoded).logits.isfinite().all()
    if kept:
        assert encoded["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_the_tokenizer_is_the_directorys_own(roberta: Path) -> None:
    tokenizer = load_tokenizer(str(roberta), build(roberta).model)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    words = ["good", "bad", "nobody-knows"]
    assert tokenizer.convert_tokens_to_ids(words) == [VOCABULARY["good"], VOCABULARY["bad"], VOCABULARY["<unk>"]]


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("kind", "changes", "limit"),
    [
        ("roberta", {}, 64),
        ("roberta", {"max_position_embeddings": 40}, 38),
        ("roberta", {"pad_token_id": 3}, 62),
        ("bert", {}, 64),
        ("bert", {"max_position_embeddings": 40}, 40),
        ("distilbert", {"max_position_embeddings": 40}, 40),
        ("bart", {}, 64),
    ],
)
@torch.no_grad()
def test_a_model_takes_as_many_tokens_as_it_has_positions(
    kind: str, changes: dict[str, int], limit: int, tmp_path: Path
) -> None:
    model = build(save_backbone(tmp_path, kind, **changes)).model.eval()
    assert position_limit(model) == limit
    tokens = torch.full((1, limit + 1), VOCABULARY["good"])
    tokens[:, -2:] = VOCABULARY["</s>"]  # BART classifies by it
    model(input_ids=tokens[:, 1:-1] if kind == "bart" else tokens[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens)


def test_relative_positions_have_no_limit(tmp_path: Path) -> None:
    assert position_limit(build(save_backbone(tmp_path, "t5")).model) is None


def test_the_limit_is_the_same_in_bfloat16(roberta: Path) -> None:
    model = build(roberta, "none", max_position_embeddings=18).model
    assert position_limit(model) == position_limit(model.to(torch.bfloat16)) == 16


# ------------------------------------------------------------------------------------------------ logits of some tokens

SELECTED = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]]).bool()


def decoder(folder: Path, kind: str, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    save_decoder(folder, kind, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens() -> dict[str, Tensor]:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 6] = 0
    return {"input_ids": torch.arange(21).reshape(3, 7) + 5, "attention_mask": mask}


@pytest.mark.parametrize("kind", list(DECODERS))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_the_whole(
    kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = decoder(tmp_path, kind, tied, dtype)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    found = selected_logits(model, SELECTED, **tokens())
    expected = model(**tokens()).logits[SELECTED].float()
    assert found.dtype == torch.float32
    near = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    assert [math.prod(shape[:-1]) for shape in seen] == [5, 21]  # the output layer saw no other


@pytest.mark.parametrize("kind", list(DECODERS))
def test_gradients_of_some_logits_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    model = decoder(tmp_path, kind, tied=kind == "llama")
    weights = torch.randn(5, model.config.vocab_size)

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((weights * logits).sum(), list(model.parameters())))

    found = gradients(selected_logits(model, SELECTED, **tokens()))
    for ours, theirs in zip(found, gradients(model(**tokens()).logits[SELECTED]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_of_the_selection_stays(tmp_path: Path) -> None:
    model = decoder(tmp_path, "llama", tied=True)
    expected = model(**tokens()).logits
    selected_logits(model, SELECTED, **tokens())
    with pytest.raises(IndexError):  # behind the embeddings
        selected_logits(model, SELECTED, input_ids=tokens()["input_ids"] + 10_000)
    with pytest.raises(IndexError):  # within the hook
        selected_logits(model, SELECTED[:, 1:], **tokens())
    assert torch.equal(model(**tokens()).logits, expected)
    assert len(selected_logits(model, torch.zeros_like(SELECTED), **tokens())) == 0
