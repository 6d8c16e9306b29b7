"""The command `combine`: the result in PEFT and in this program, heads, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from app.cli import main
from modules.adapters import AdapterConfig, adapted_projections
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine
from tests.app.export.test_peft import CONFIG, TASKS, WEIGHTS, logits, module_of, run_export
from tests.support.refusals import refused

RANK, PREFIX = 4, "base_model.model."
IDS = torch.arange(4, 18).view(2, 7)


def combine(*arguments: Any) -> int:
    return main(["combine", *map(str, arguments)])


def dense(module: Any) -> dict[str, Tensor]:
    """Return the update s·B·A of each projection, in float64."""
    projections = adapted_projections(module.backbone).items()
    return {name: f.scale * f.B.detach().double() @ f.A.detach().double() for name, (_, f) in projections}


# ------------------------------------------------------------------------------------------------------------ of runs


@torch.no_grad()
@pytest.mark.parametrize("name", ["cli", "text_cli"])
def test_runs_are_combined_exactly_and_peft_loads_the_result(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli: CommandLine = request.getfixturevalue(f"fitted_{name}")
    assert cli("fit", "--trainer.max_epochs=1", "--model.learning_rate=0.02", "--trainer.logger=false") == 0
    capsys.readouterr()
    output, weights = tmp_path / "combined", (0.75, 0.5)
    assert combine(cli.run(0), cli.run(1), "--weights", "0.75,0.5", "--output", output) == 0
    printed = capsys.readouterr().out
    assert "Weights: 0.75, 0.5\nMethod: sum of B over one A\nHead: weighted average by class name" in printed
    assert f"Combined: {output}" in printed
    first, second = (module_of(cli.run(i)) for i in (0, 1))
    updates = [dense(first), dense(second)]
    heads = {n: [m.state_dict()[n] for m in (first, second)] for n in first.state_dict() if first._in_head(n)}
    expected = first  # The first run gets the dense sum as factors and the average as head.
    for projection, (_, factors) in adapted_projections(expected.backbone).items():
        total = sum(w * update[projection] for w, update in zip(weights, updates, strict=True))
        inverse = torch.linalg.pinv(factors.A.double())
        factors.B.data.copy_(total @ inverse / factors.scale)
    expected.load_state_dict(expected.saved_state() | {n: 0.6 * a + 0.4 * b for n, (a, b) in heads.items()})
    make_base, logits_of = TASKS[name]
    base = make_base(first, Path(cli.backbone[1]) if cli.backbone else Path()).eval()
    model = peft.PeftModel.from_pretrained(base, output).eval()
    torch.testing.assert_close(logits_of(model), logits(name, expected), atol=1e-5, rtol=1e-5)
    assert json.loads((output / "labels.json").read_text()) == first.class_names
    card = (output / "README.md").read_text()
    assert "2 combined adapters" in card and "0.75" in card and "runs/version_1" in card and "PeftModel" in card
    if name == "text_cli":
        options = {"weights": "pretrained", "class_names": first.class_names, "adapter_path": str(output)}
        loaded = TextClassifier(cli.backbone[1], **options).eval()
        torch.testing.assert_close(logits(name, loaded), logits(name, expected), atol=1e-5, rtol=1e-5)
        for projection, update in dense(loaded).items():
            total = sum(w * u[projection] for w, u in zip(weights, updates, strict=True))
            assert float((update - total).norm() / total.norm()) < 1e-7
        assert cli("validate", "--model.adapter_path", str(output), "--trainer.logger=false") == 0


def test_an_export_combines_like_its_run(fitted_cli: CommandLine, tmp_path: Path) -> None:
    cli = fitted_cli
    assert cli("fit", "--trainer.max_epochs=1", "--model.learning_rate=0.02", "--trainer.logger=false") == 0
    assert run_export(cli.run(1), tmp_path / "export") == 0
    results = []
    for i, other in enumerate((cli.run(1), tmp_path / "export")):
        assert combine(other, cli.run(0), "--weights=2,1", "--output", tmp_path / str(i)) == 0
        results.append(load_file(tmp_path / str(i) / WEIGHTS))
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_runs_over_other_frozen_weights_are_refused(
    fitted_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = fitted_cli
    assert cli("fit", "--trainer.max_epochs=1", "--seed_everything=1", "--trainer.logger=false") == 0
    capsys.readouterr()
    refused(capsys, combine(cli.run(0), cli.run(1), "--output", tmp_path / "output"), "different backbones")


# ----------------------------------------------------------------------------------------------------- of PEFT's files

Maker = Callable[..., Path]


@pytest.fixture
def adapters(tmp_path: Path, roberta_path: Path) -> Maker:
    """Return a function that writes an adapter of the last block with PEFT, with random factors and a random head."""

    def make(
        name: str, seed: int, a_seed: int = 0, labels: list[str] | None = None, base: str | None = None, **keys: Any
    ) -> Path:
        folder = tmp_path / name
        torch.manual_seed(seed)
        labels = ["no", "yes"] if labels is None else labels
        model = AutoModelForSequenceClassification.from_pretrained(roberta_path, num_labels=max(len(labels), 1))
        options = {"r": RANK, "lora_alpha": 8, "target_modules": ["query", "value"], "layers_to_transform": [1]} | keys
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                generator = torch.Generator().manual_seed(a_seed if "lora_A" in key else seed + 100)
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)
        (folder / "labels.json").write_text(json.dumps(labels))
        if base is not None:
            content = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": base}))
        return folder

    return make


def update_of(folder: Path, layer: str) -> Tensor:
    """Return s·B·A of a layer, in float64, as PEFT computes it."""
    content, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    a, b = (tensors[f"{PREFIX}{layer}.lora_{side}.weight"].double() for side in "AB")
    alpha = next((v for k, v in content["alpha_pattern"].items() if k in layer), content["lora_alpha"])
    return alpha / a.shape[0] * b @ a


LAYER = "roberta.encoder.layer.1.attention.self.query"


def dense_sum(folders: list[Path], weights: list[float], layer: str = LAYER) -> Tensor:
    return torch.stack([w * update_of(folder, layer) for folder, w in zip(folders, weights, strict=True)]).sum(0)


@torch.no_grad()
def test_directories_of_peft_are_combined_without_their_backbone(
    adapters: Maker, roberta_path: Path, tmp_path: Path
) -> None:
    """The scales differ, and the second adapter has its classes in another order."""
    folders = [adapters("one", 1), adapters("two", 2, labels=["yes", "no"], lora_alpha=16)]
    output = tmp_path / "output"
    assert combine(*folders, "--weights=3,-1", "--output", output) == 0
    for layer in (LAYER, LAYER.replace("query", "value")):
        total = dense_sum(folders, [3, -1], layer)
        assert float((update_of(output, layer) - total).norm() / total.norm()) < 1e-7
    one, two, combined = (load_file(folder / WEIGHTS) for folder in (*folders, output))
    for part in ("weight", "bias"):
        name = f"{PREFIX}classifier.out_proj.{part}"
        torch.testing.assert_close(combined[name], 1.5 * one[name] - 0.5 * two[name].flip(0))
        dense_name = name.replace("out_proj", "dense")
        torch.testing.assert_close(combined[dense_name], 1.5 * one[dense_name] - 0.5 * two[dense_name])
    base = AutoModelForSequenceClassification.from_pretrained(roberta_path)
    model = peft.PeftModel.from_pretrained(base, output).eval()
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {f"{PREFIX}{LAYER}.lora_A.default.weight", f"{PREFIX}{LAYER[:-5]}value.lora_A.default.weight"}
    options = {"weights": "pretrained", "class_names": ["no", "yes"], "adapter": AdapterConfig()}
    loaded = TextClassifier(str(roberta_path), adapter_path=str(output), **options).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, loaded.backbone(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert json.loads((output / "labels.json").read_text()) == ["no", "yes"]


def test_an_average_of_equal_adapters_is_the_adapter(adapters: Maker, tmp_path: Path) -> None:
    folder, output = adapters("one", 1), tmp_path / "output"
    assert combine(*[folder] * 4, "--output", output) == 0
    before, after = load_file(folder / WEIGHTS), load_file(output / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-7, rtol=1e-6)


def test_adapters_can_share_b(adapters: Maker, tmp_path: Path) -> None:
    folders = [adapters("one", 1), adapters("two", 1, a_seed=5)]
    assert combine(*folders, "--output", tmp_path / "output") == 0
    total = dense_sum(folders, [0.5, 0.5])
    assert float((update_of(tmp_path / "output", LAYER) - total).norm() / total.norm()) < 1e-7


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_sparse_methods_keep_the_shared_factor(method: str, adapters: Maker, tmp_path: Path) -> None:
    folders, output = [adapters("one", 1), adapters("two", 2)], tmp_path / "output"
    assert combine(*folders, f"--method={method}", "--density=0.3", "--output", output) == 0
    names = [f"{PREFIX}{LAYER}.lora_{side}.weight" for side in "AB"]
    before, after = load_file(folders[0] / WEIGHTS), load_file(output / WEIGHTS)
    assert torch.equal(before[names[0]], after[names[0]])
    assert (
        0.2 < float((after[names[1]] != 0).double().mean()) < 0.65
    )  # Each adapter keeps 0.3 of its entries, so both keep at most 0.6.


def test_adapters_without_a_shared_factor_are_combined_by_a_truncated_decomposition(
    adapters: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders, output = [adapters("one", 1), adapters("two", 2, a_seed=7, r=3)], tmp_path / "output"
    refused(capsys, combine(*folders, "--output", output), "adapter rank 4", "and 3", "--via svd --rank r")
    assert combine(*folders, "--weights=1,2", "--via=svd", "--rank=5", "--output", output) == 0
    out = capsys.readouterr().out
    lost = total = 0.0
    for layer in (LAYER, LAYER.replace("query", "value")):
        whole = dense_sum(folders, [1, 2], layer)
        u, s, vh = torch.linalg.svd(whole)
        best = u[:, :5] * s[:5] @ vh[:5]
        assert float((update_of(output, layer) - best).norm() / best.norm()) < 2e-7
        lost, total = lost + float(s[5:].square().sum()), total + float(s.square().sum())
    assert f"off by {100 * (lost / total) ** 0.5:.3g} % of its norm" in out
    content = json.loads((output / CONFIG).read_text())
    assert (content["r"], content["lora_alpha"], content["rank_pattern"], content["alpha_pattern"]) == (5, 5, {}, {})


# --------------------------------------------------------------------------------------------------------------- heads


def test_a_head_is_kept_or_dropped(adapters: Maker, tmp_path: Path) -> None:
    folders = [adapters("one", 1), adapters("two", 2, labels=["a", "b", "c"])]
    assert combine(*folders, "--heads", "keep", folders[1], "--output", tmp_path / "kept") == 0
    kept, second = (load_file(folder / WEIGHTS) for folder in (tmp_path / "kept", folders[1]))
    name = f"{PREFIX}classifier.out_proj.weight"
    assert torch.equal(kept[name], second[name])
    assert json.loads((tmp_path / "kept" / "labels.json").read_text()) == ["a", "b", "c"]
    assert combine(*folders, "--heads", "drop", "--output", tmp_path / "dropped") == 0
    assert all("lora_" in name for name in load_file(tmp_path / "dropped" / WEIGHTS))
    assert not (tmp_path / "dropped" / "labels.json").exists()


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        ({"labels": ["no", "perhaps"]}, ["different classes", "'perhaps'", "--heads keep RUN", "--heads drop"]),
        ({"labels": None, "unlabelled": True}, ["no labels.json", "order of the classes"]),
        ({"broken": True}, ["labels.json", "not a list of class names"]),
        ({"a_seed": 3}, ["share no factor", "A of roberta.encoder.layer.1", "digest", "--via svd --rank r"]),
        ({"target_modules": ["query"]}, ["adapts roberta.encoder.layer.1.attention.self.value", "same projections"]),
        ({"base": "elsewhere/other"}, ["backbone roberta", "for other"]),
        ({"extra": True}, ["'roberta.pooler.weight'", "modules_to_save"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_that_do_not_fit_are_refused(
    adapters: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str], second: dict[str, Any], parts: list[str]
) -> None:
    changes = {key: second.pop(key) for key in ("unlabelled", "broken", "extra") if key in second}
    folders = [adapters("one", 1, base="hub/roberta"), adapters("two", 2, **({"base": "roberta"} | second))]
    if "unlabelled" in changes:
        (folders[1] / "labels.json").unlink()
    if "broken" in changes:
        (folders[1] / "labels.json").write_text('{"no": 0}')
    if "extra" in changes:
        for folder in folders:
            save_file(load_file(folder / WEIGHTS) | {f"{PREFIX}roberta.pooler.weight": torch.ones(2)}, folder / WEIGHTS)
    refused(capsys, combine(*folders, "--output", tmp_path / "output"), *parts)
    assert not (tmp_path / "output").exists()


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--weights=1"], ["--weights", "1 weight cannot match 2 adapters"]),
        (["--weights=1,x"], ["--weights", "not a list of numbers"]),
        (["--weights=1,nan"], ["--weights", "finite"]),
        (["--weights=0,0"], ["--weights", "not all zero"]),
        (["--weights=1,-1"], ["--weights", "sum is 0", "--heads drop"]),
        (["--method=mean"], ["method", "'ties'"]),
        (["--method=ties", "--density=0"], ["--density", "(0, 1]"]),
        (["--density=0.5"], ["--density", "--method ties"]),
        (["--method=ties", "--seed=1"], ["--seed", "--method dare"]),
        (["--via=svd"], ["--via svd --rank r"]),
        (["--rank=2"], ["--via svd --rank r"]),
        (["--via=qr", "--rank=2"], ["--via", "'qr'"]),
        (["--via=svd", "--rank=0"], ["--rank", "1 or more"]),
        (["--via=svd", "--rank=9"], ["--rank", "9", "8 or less"]),
        (["--via=svd", "--rank=2", "--method=ties"], ["--method", "ties"]),
        (["--heads", "keep"], ["--heads", "keep RUN"]),
        (["--heads", "keep", "elsewhere"], ["--heads", "'elsewhere'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_wrong_options_are_refused(
    adapters: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]
) -> None:
    folders = [adapters("one", 1), adapters("two", 2)]
    refused(capsys, combine(*folders, *options, "--output", tmp_path / "output"), *parts)
    assert not (tmp_path / "output").exists()


def test_one_adapter_a_missing_adapter_and_a_full_output_are_refused(
    adapters: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapters("one", 1)
    refused(capsys, combine(folder, "--output", tmp_path / "output"), "RUN", "two or more")
    refused(capsys, combine(folder, tmp_path / "gone", "--output", tmp_path / "output"), "RUN", "gone")
    refused(capsys, combine(folder, folder, "--output", folder), "--output", "exists already")
