"""Backbones in the hub's layout: loading, heads, tokenizers, positions and bad input."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Sequence
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
from tests.support.refusals import refuses
from tests.support.rows import edit_json
from tests.support.tasks import save_text_backbone

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


# ------------------------------------------------------------------------------------------------------------- loading


@every_kind
def test_a_directory_is_loaded_as_by_transformers(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    built = build(tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path).state_dict()
    expected = {name: theirs[name] for name in encoder(built)}  # RoBERTa's classifier has no pooler, AutoModel has one
    assert_same(encoder(built), expected)
    assert len(set(theirs) - set(expected)) == (2 if kind == "roberta" else 0)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_classifier_is_loaded_as_by_transformers(kind: str, tmp_path: Path) -> None:
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
def test_new_heads_do_not_depend_on_the_dtype_of_the_backbone(tmp_path: Path, kind: str) -> None:
    folder = save_backbone(tmp_path / kind, kind)
    torch.manual_seed(3)
    expected = build(folder)
    torch.manual_seed(3)
    built = build_in_bfloat16(folder)
    assert sorted(built.heads) == sorted(HEADS[kind])
    heads = tuple(f"{head}." for head in built.heads)
    for name, tensor in expected.model.state_dict().items():
        expected_tensor = tensor if name.startswith(heads) else tensor.bfloat16()
        assert built.model.state_dict()[name].dtype == expected_tensor.dtype, name
        assert torch.equal(built.model.state_dict()[name], expected_tensor), name


@pytest.mark.parametrize("kind", ENCODERS)
def test_heads_with_weights_are_not_rounded(tmp_path: Path, kind: str) -> None:
    folder = save_classifier(tmp_path / kind, kind, ["a", "b", "c"])
    stored = load_file(folder / "model.safetensors")
    assert_same(build_in_bfloat16(folder).model.state_dict(), build(folder).model.state_dict())
    untrained = build_in_bfloat16(folder, trains_heads=False).model
    assert_same(untrained.state_dict(), {name: t.bfloat16() for name, t in untrained.state_dict().items()})
    assert stored.keys() <= untrained.state_dict().keys()


def test_weights_in_bfloat16_load_as_float32(roberta: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(roberta, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {name: t.bfloat16().float() for name, t in encoder(build(roberta)).items()}
    assert_same(encoder(build(tmp_path / "half")), expected)


@every_kind
def test_weights_none_is_random_and_reads_no_file(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    pretrained = encoder(build(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(3)
    built = build(tmp_path, "none")
    torch.manual_seed(3)
    rebuilt = build(tmp_path, "none")
    assert built.new == set(built.model.state_dict())
    assert built.heads == HEADS[kind]
    assert_same(built.model.state_dict(), rebuilt.model.state_dict())
    matrices = [name for name, t in encoder(built).items() if t.ndim > 1 and t.std() > 0]
    assert len(matrices) > 10
    assert not any(torch.equal(encoder(built)[name], pretrained[name]) for name in matrices)


@pytest.mark.parametrize("kind", ["roberta", "bart"])
def test_the_directorys_weight_file_may_be_named(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    pretrained, by_name = build(tmp_path), build(tmp_path, tmp_path / "model.safetensors")
    assert_same(encoder(by_name), encoder(pretrained))
    assert type(by_name.model) is type(pretrained.model)
    assert by_name.heads == pretrained.heads
    assert by_name.new == pretrained.new


def test_another_weight_file_replaces_the_directorys(roberta: Path, tmp_path: Path) -> None:
    other = save_backbone(tmp_path / "other", "roberta", seed=1)
    assert_same(encoder(build(roberta, other / "model.safetensors")), encoder(build(other)))
    (roberta / "model.safetensors").unlink()
    assert_same(encoder(build(roberta, other / "model.safetensors")), encoder(build(other)))


def test_the_weight_file_of_a_classifier_includes_its_head(roberta: Path, tmp_path: Path) -> None:
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
def test_heads_are_the_modules_without_pretrained_weights(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind)
    built = build(tmp_path)
    assert built.heads == HEADS[kind]
    names = set(built.model.state_dict())
    assert built.new == {n for n in names if n.startswith(tuple(f"{head}." for head in HEADS[kind]))}
    assert len(built.new) >= 2 * len(HEADS[kind])


@pytest.mark.parametrize("by_name", [False, True])
def test_a_pooler_without_weights_is_a_head(by_name: bool, tmp_path: Path) -> None:
    folder = save_text_backbone(tmp_path, "bert_without_pooler")
    built = build(folder, folder / "model.safetensors" if by_name else "pretrained")
    assert sorted(built.heads) == ["bert.pooler", "classifier"]
    assert built.new == {f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}


OUTPUT = {"roberta": "classifier.out_proj", "bert": "classifier", "deberta": "classifier", "distilbert": "classifier"}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_classifier_of_other_labels_is_loaded_except_its_output_layer(kind: str, tmp_path: Path) -> None:
    saved = load_file(save_classifier(tmp_path, kind, list("abcde")) / "model.safetensors")
    built = build(tmp_path, num_labels=3)
    output = {f"{OUTPUT[kind]}.weight", f"{OUTPUT[kind]}.bias"}
    state = built.model.state_dict()
    assert built.new == output
    assert state[f"{OUTPUT[kind]}.weight"].shape == (3, 32)
    assert_same({k: v for k, v in state.items() if k not in output}, {k: saved[k] for k in state.keys() - output})


# ------------------------------------------------------------------------------------------------------------ refusals


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def _cut(size: int) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return cut


def _without_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["encoder.layer.1.attention.self.query.weight"]
    save_file(state, path, metadata={"format": "pt"})


def _another_family(folder: Path) -> None:
    save_backbone(folder / "other", "distilbert")
    shutil.copy(folder / "other" / "model.safetensors", folder / "weights.safetensors")


def _quantised(folder: Path) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(folder / "config.json", quantization_config=quantised)


def _images(folder: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTConfig(**sizes).save_pretrained(folder)


def _empty_pickle(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"")


MISSING = "1 tensor is missing", "(roberta.encoder.layer.1.attention.self.query.weight)"
NO_TEXTS = "model.backbone: ", " is a vit, which has no model for SequenceClassif"
NO_FILE = "model.weights: ", " is no .safetensors file", "`pretrained` or `none`"
SHAPES = "missing or of another shape"


@pytest.mark.parametrize(
    ("change", "weights", "args", "parts"),
    [
        (_without_a_tensor, "pretrained", {}, ["model.weights: ", *MISSING]),
        (_without_a_tensor, "model.safetensors", {}, ["model.weights: ", *MISSING]),
        (
            None,
            "pretrained",
            {"num_hidden_layers": 3},
            ["model.weights: ", f" 16 tensors are {SHAPES}", "roberta.encoder.layer.2"],
        ),
        (
            None,
            "pretrained",
            {"vocab_size": 60},
            [f" 1 tensor is {SHAPES}", "roberta.embeddings.word_embeddings.weight"],
        ),
        (
            None,
            "pretrained",
            {"intermediate_size": 48},
            [f" 6 tensors are {SHAPES}", "roberta.encoder.layer.0.intermediate.dense"],
        ),
        (_another_family, "weights.safetensors", {}, ["model.weights: ", "does not fit RobertaForSequenceClassif"]),
        (_quantised, "pretrained", {}, ["model.backbone: the weights of ", "roberta are quantised"]),
        *(
            (None, weights, {"hiden_dropout": 0.1, "hidden_dropout_prob": 0.1, "layers": 3}, parts)
            for weights in ("pretrained", "none")
            for parts in [["model.backbone_args: hiden_dropout, layers ", "roberta's config.json"]]
        ),
        (None, "pretrained", {"hidden_dropout_prob": "a lot"}, ["hidden_dropout_prob"]),
        (None, "pretrained", {"hidden_dropout_prob": 2.0}, ["dropout probability"]),
        (
            _without("config.json"),
            "pretrained",
            {},
            ["model.backbone: the directory ", "no config.json", "hub's layout"],
        ),
        *(
            (_config(text), "pretrained", {}, ["model.backbone: ", "roberta is no intact directory here"])
            for text in ("{", "[]", "", '{"model_type": "no-such-type"}', "{}")
        ),
        (_images, "pretrained", {}, NO_TEXTS),
        (_images, "none", {}, NO_TEXTS),
        (_images, "model.safetensors", {}, NO_TEXTS),
        *(
            (_cut(size), weights, {}, ["model.weights: ", "roberta"])
            for size in (0, 4, 200, -1)
            for weights in ("pretrained", "model.safetensors")
        ),
        (_without("model.safetensors"), "pretrained", {}, ["model.weights: ", "could not be loaded", "safetensors"]),
        (None, "absent.safetensors", {}, NO_FILE),
        (_empty_pickle, "weights.pt", {}, NO_FILE),
        (None, ".", {}, NO_FILE),
    ],
)
def test_unloadable_backbones_are_refused(
    roberta: Path, change: Callable[[Path], object] | None, weights: str, args: dict[str, Any], parts: Sequence[str]
) -> None:
    if change is not None:
        change(roberta)
    with refuses(*parts, error=ModelError):
        build(roberta, weights if weights in ("pretrained", "none") else roberta / weights, **args)


@pytest.mark.parametrize("name", ["no/such-model", "no-such-model", "./no/such/directory", "a b"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with refuses(f"model.backbone: {name} ", "Without a connection give a local directory", error=ModelError):
        build(name)


# --------------------------------------------------------------------------------------------- code in files is not run


class Payload:
    """An object whose unpickling creates the file `trace`."""

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
    assert trace.exists()  # unpickling does create the file
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
    """Return a repository with its own classes, whose import would create `trace`."""
    (roberta / "own.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    edit_json(roberta / "config.json", auto_map={**classes, "AutoModelForSequenceClassification": "own.Model"})
    edit_json(roberta / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Words", "own.Words"]})
    return roberta


@pytest.mark.parametrize("weights", ["pretrained", "none", "file"])
def test_classes_of_transformers_are_used_instead_of_a_repositorys_code(
    with_code: Path, tmp_path: Path, weights: str
) -> None:
    built = build(with_code, with_code / "model.safetensors" if weights == "file" else weights)
    assert type(built.model).__module__ == "transformers.models.roberta.modeling_roberta"
    assert type(load_tokenizer(str(with_code), built.model)).__module__.startswith("transformers.")
    assert not (tmp_path / "trace").exists()


def test_a_model_that_needs_a_repositorys_code_is_refused(with_code: Path, tmp_path: Path) -> None:
    edit_json(with_code / "config.json", model_type="their-own")
    with pytest.raises(ModelError, match=r"^model\.backbone: "):
        build(with_code)
    assert not (tmp_path / "trace").exists()


# ----------------------------------------------------------------------------------------------------------- tokenizer


def _no_tokenizer(folder: Path, kept: str = "") -> None:
    # transformers would create a tokenizer that knows special tokens and no words
    for path in folder.glob("tokenizer*"):
        if path.name != kept:
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        *((kind, _no_tokenizer, [" tokenizer ", "tokenizer.json"]) for kind in ("bert", "deberta", "bart")),
        *(
            (kind, lambda folder: _no_tokenizer(folder, "tokenizer_config.json"), [" tokenizer ", "tokenizer.json"])
            for kind in ("roberta", "distilbert", "bart")
        ),
        ("roberta", lambda folder: (folder / "tokenizer.json").write_text("{"), [" no tokenizer that could be loaded"]),
        (
            "roberta",
            lambda folder: word_tokenizer(pad_token=None).save_pretrained(folder),
            [" no padding token", "pad_token in tokenizer_config.json"],
        ),
    ],
)
def test_a_directory_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, kind: str, change: Callable[[Path], object], parts: list[str]
) -> None:
    change(save_backbone(tmp_path, kind))
    with refuses("model.backbone: ", *parts, error=ModelError):
        load_tokenizer(str(tmp_path), build(tmp_path).model)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(roberta: Path) -> None:
    size = len(VOCABULARY)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(roberta)
    model = build(roberta).model
    with pytest.raises(ModelError, match=rf"^model\.backbone: .* has {size + 1} tokens and the model only {size} "):
        load_tokenizer(str(roberta), model)
    model.resize_token_embeddings(size + 8)  # more embeddings than tokens are common and accepted
    assert len(load_tokenizer(str(roberta), model)) == size + 1


NAMES = ["input_ids", "token_type_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("kind", "types", "kept"),
    [("bert", 2, True), ("bert", 1, False), ("roberta", 1, False), ("deberta", 0, False), ("deberta", 2, True)],
)
@torch.no_grad()
def test_token_types_are_kept_for_models_with_two_types(kind: str, types: int, kept: bool, tmp_path: Path) -> None:
    save_backbone(tmp_path, kind, type_vocab_size=types)
    word_tokenizer(model_input_names=NAMES).save_pretrained(tmp_path)
    model = build(tmp_path).model
    tokenizer = load_tokenizer(str(tmp_path), model)
    encoded = tokenizer(["the film"], ["good ."], return_tensors="pt")
    assert set(encoded) == (set(NAMES) if kept else {"input_ids", "attention_mask"})
    assert model(**encoded).logits.isfinite().all()
    if kept:
        assert encoded["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


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
def test_the_position_limit_is_the_longest_input_of_the_model(
    kind: str, changes: dict[str, int], limit: int, tmp_path: Path
) -> None:
    model = build(save_backbone(tmp_path, kind, **changes)).model.eval()
    assert position_limit(model) == limit
    tokens = torch.full((1, limit + 1), VOCABULARY["good"])
    tokens[:, -2:] = VOCABULARY["</s>"]  # BART's classifier reads the hidden state of this token
    model(input_ids=tokens[:, 1:-1] if kind == "bart" else tokens[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens)


def test_relative_positions_have_no_limit(tmp_path: Path) -> None:
    assert position_limit(build(save_backbone(tmp_path, "t5")).model) is None


def test_the_position_limit_is_the_same_in_bfloat16(roberta: Path) -> None:
    model = build(roberta, "none", max_position_embeddings=18).model
    assert position_limit(model) == position_limit(model.to(torch.bfloat16)) == 16


# -------------------------------------------------------------------------------------------- logits of selected tokens

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
def test_selected_logits_equal_those_of_all_tokens(kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = decoder(tmp_path, kind, tied, dtype)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    selected = selected_logits(model, SELECTED, **tokens())
    expected = model(**tokens()).logits[SELECTED].float()
    assert selected.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(selected, expected, rtol=tolerance, atol=tolerance)
    # the output layer has computed the selected tokens alone
    assert [math.prod(shape[:-1]) for shape in shapes] == [5, 21]


@pytest.mark.parametrize("kind", list(DECODERS))
def test_gradients_of_selected_logits_equal_those_of_all_tokens(kind: str, tmp_path: Path) -> None:
    model = decoder(tmp_path, kind, tied=kind == "llama")
    weights = torch.randn(5, model.config.vocab_size)

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((weights * logits).sum(), list(model.parameters())))

    gradients_of_selected = gradients(selected_logits(model, SELECTED, **tokens()))
    for ours, theirs in zip(gradients_of_selected, gradients(model(**tokens()).logits[SELECTED]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_selection_ends_with_the_call_even_after_an_error(tmp_path: Path) -> None:
    model = decoder(tmp_path, "llama", tied=True)
    expected = model(**tokens()).logits
    selected_logits(model, SELECTED, **tokens())
    with pytest.raises(IndexError):  # an error in the embeddings
        selected_logits(model, SELECTED, input_ids=tokens()["input_ids"] + 10_000)
    with pytest.raises(IndexError):  # an error in the hook
        selected_logits(model, SELECTED[:, 1:], **tokens())
    assert torch.equal(model(**tokens()).logits, expected)
    assert len(selected_logits(model, torch.zeros_like(SELECTED), **tokens())) == 0
