"""GGUF files: weights and tokenizer equal those of the source, and unreadable files give one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

import modules.backbones.gguf
from datamodules.errors import ModelError
from modules.backbones.gguf import repository_and_file
from modules.backbones.transformers_backbone import Built, build_transformers_model, load_tokenizer
from tests.causal_backbones import CHAT, byte_tokenizer, save_decoder
from tests.support.gguf_files import write_gguf

TEXTS = ["Hello there,\n  it's 12345.", "北京 é <|im_start|>user\nA B<|im_end|>", " Answer: C"]
KEYS: dict[str, Any] = {"rms_norm_eps": 1e-4, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


def build(name: Path | str, weights: str | Path = "pretrained", **keys: Any) -> Built:
    return build_transformers_model(
        AutoModelForCausalLM, str(name), str(weights), keys.pop("args", {}), **keys, trains_heads=False
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(3, 90).view(1, -1)
    return model.eval()(tokens).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("gguf") / "llama", tie_word_embeddings=False, **KEYS)


@pytest.fixture(scope="module")
def shared_file(folder: Path) -> Path:
    return write_gguf(folder)


@pytest.fixture
def file(shared_file: Path, tmp_path: Path) -> Path:
    """Return a copy of the shared file that a test may damage."""
    return Path(shutil.copy(shared_file, tmp_path / "model.gguf"))


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_equal_those_of_the_source(tmp_path: Path, tied: bool) -> None:
    folder = save_decoder(tmp_path / "llama", tie_word_embeddings=tied, **KEYS)
    built, expected = build(write_gguf(folder)), build(folder)
    assert type(built.model) is type(expected.model)
    assert built.new == expected.new == set()
    state, theirs = built.model.state_dict(), expected.model.state_dict()
    assert state.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(state[name], theirs[name])] == []
    torch.testing.assert_close(logits(built.model), logits(expected.model), rtol=1e-5, atol=1e-5)
    head, embedding = built.model.get_output_embeddings(), built.model.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied


def test_other_architectures_load_too(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "qwen2", "qwen2", **KEYS)
    built = build(write_gguf(folder, "qwen2"))
    assert built.model.config.model_type == "qwen2"
    torch.testing.assert_close(logits(built.model), logits(build(folder).model), rtol=1e-5, atol=1e-5)


def test_the_tokenizer_equals_that_of_the_source(folder: Path, shared_file: Path) -> None:
    model = build(shared_file).model
    ours, theirs = load_tokenizer(str(shared_file), model, pads=False), load_tokenizer(str(folder), model)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == text
    assert (ours.eos_token_id, ours.bos_token_id, ours.chat_template) == (2, 1, CHAT)
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    # GPT-2's end token is not in this vocabulary
    assert max(ours("<|endoftext|>")["input_ids"]) < model.config.vocab_size


def test_a_begin_token_is_added_if_the_file_says_so(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "llama"))
    path = write_gguf(copy, add_fields=lambda writer: writer.add_add_bos_token(True))
    assert load_tokenizer(str(path), build(path).model, pads=False)("AB")["input_ids"][0] == 1


def test_quantised_weights_are_dequantised(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "llama"))
    built = build(write_gguf(copy, kind=gguf.GGMLQuantizationType.Q8_0))
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}
    ours, theirs = logits(built.model), logits(build(folder).model)
    assert 1e-4 < float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_bfloat16_applies_to_the_weights_alone(shared_file: Path) -> None:
    model, full = build(shared_file, dtype=torch.bfloat16).model, build(shared_file).model
    state, expected = model.state_dict(), full.state_dict()
    assert all(torch.equal(state[name], expected[name].bfloat16()) for name in expected)
    for (name, buffer), (_, theirs) in zip(model.named_buffers(), full.named_buffers(), strict=True):
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, theirs)


def test_a_loaded_model_is_saved_in_the_usual_format(shared_file: Path, tmp_path: Path) -> None:
    model = build(shared_file).model
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(build(tmp_path / "saved").model), logits(model))


def test_weights_are_always_dequantised(shared_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # with the package `kernels`, transformers would keep the weights quantised
    configs: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def recorded(*args: Any, **keys: Any) -> Any:
        configs.append(keys["quantization_config"])
        return load(*args, **keys)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    build(shared_file)
    assert isinstance(configs[0], GgufConfig)
    assert configs[0].dequantize


def test_loading_prints_nothing(shared_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_tokenizer(str(shared_file), build(shared_file).model, pads=False)
    assert capfd.readouterr() == ("", "")


def test_model_weights_may_name_another_file(folder: Path, shared_file: Path, tmp_path: Path) -> None:
    other = save_decoder(tmp_path / "other", seed=5, tie_word_embeddings=False, **KEYS)
    from_file = build(shared_file, other / "model.safetensors")
    assert from_file.new == set()
    torch.testing.assert_close(logits(from_file.model), logits(build(other).model), rtol=1e-5, atol=1e-5)
    random = build(shared_file, "none")
    assert random.new == set(random.model.state_dict())
    assert random.model.generation_config.eos_token_id == 2


def test_the_configuration_can_be_changed(shared_file: Path) -> None:
    assert build(shared_file, args={"attention_dropout": 0.5}).model.config.attention_dropout == 0.5
    with pytest.raises(ModelError, match=r"^model\.backbone_args: dropuot is no key of a llama's config\.json"):
        build(shared_file, args={"dropuot": 0.5})


# --------------------------------------------------------------------------------------------------- names of backbones


def test_a_local_name_is_a_directory_and_a_file(shared_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repository_and_file(str(shared_file)) == (str(shared_file.parent), {"gguf_file": "model.gguf"})
    assert repository_and_file("owner/name") == ("owner/name", {})
    monkeypatch.chdir(shared_file.parent)
    for name in ("model.gguf", "./model.gguf"):
        assert repository_and_file(name) == (".", {"gguf_file": "model.gguf"})
        assert build(name).new == set()


@pytest.mark.parametrize("inner", ["model.gguf", "F32/model.gguf"])
def test_a_hub_name_is_a_repository_and_a_file(
    shared_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    """The file is in the hub's cache, as after a download."""
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / inner).parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / inner).symlink_to(shared_file)
    name = f"someone/tiny/{inner}"
    assert repository_and_file(name) == ("someone/tiny", {"gguf_file": inner})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    built = build(name)
    assert torch.equal(logits(built.model), logits(build(shared_file).model))
    assert load_tokenizer(name, built.model, pads=False)("A B")["input_ids"] == byte_tokenizer()("A B")["input_ids"]


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(name: Path | str, pattern: str) -> None:
    with pytest.raises(ModelError, match=pattern) as error:
        build(name)
    assert "\n" not in str(error.value)
    assert "model.safetensors" not in str(error.value)  # this advice is for directories


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_refused(shared_file: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(modules.backbones.gguf, f"is_{package}_available", lambda: False)
    refused(
        shared_file, r"^model\.backbone: .*model\.gguf needs the packages gguf and accelerate\. Run: pip install gguf"
    )


@pytest.mark.parametrize("name", ["absent.gguf", "./absent.gguf", "/no/where/absent.gguf", "folder/absent.gguf"])
def test_a_missing_file_is_refused(name: str) -> None:
    refused(name, rf"^model\.backbone: there is no file {name}\. For a file on the hub use OWNER/NAME/FILE\.gguf")


def test_a_missing_file_in_an_existing_directory_is_refused(file: Path) -> None:
    refused(file.with_name("other.gguf"), r"^model\.backbone: there is no file .*other\.gguf")


def test_an_unreachable_repository_is_refused() -> None:
    refused("no/such/model.gguf", r"^model\.backbone: no/such/model\.gguf .*could not be loaded from the hub")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file, r"^model\.(backbone|weights): .*model\.gguf .* damaged")


def test_a_git_lfs_pointer_is_refused(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n")
    refused(file, r"^model\.backbone: .*model\.gguf cannot be read as GGUF \(.*magic.*\)\. The file is damaged")


def test_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "llama"))
    refused(write_gguf(copy, "rwkv6"), r"^model\.backbone: .* cannot be read as GGUF \(.*rwkv6 .*this architecture")


def test_a_tokenizer_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "llama"))
    path = write_gguf(copy)
    path.write_bytes(path.read_bytes().replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"))
    with pytest.raises(ModelError, match=r"^model\.backbone: .*no tokenizer .*'bert'.*directory in the hub's layout"):
        load_tokenizer(str(path), build(path).model)


def _frequencies(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.full(4, 8.0, np.float32))


def _linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


@pytest.mark.parametrize("scale", [_frequencies, _linear])
def test_scaled_rotary_positions_are_refused_unless_given_in_backbone_args(
    folder: Path, tmp_path: Path, scale: Callable[..., None]
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "llama"))
    path = write_gguf(copy, add_fields=scale)
    refused(path, r"^model\.backbone: .*model\.gguf scales its rotary positions.*rope_parameters .*backbone_args")
    args = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
    ours, expected = build(path, args=args).model, build(folder, args=args).model
    torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(build(folder).model), atol=1e-2)


def test_a_peft_adapter_in_the_directory_is_refused(file: Path) -> None:
    (file.parent / "adapter_config.json").write_text("{}")
    refused(file, r"^model\.backbone: .*model\.gguf holds a PEFT adapter")
