"""Export with truncated adapters, compared with dense singular value decompositions, PEFT and this program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from jsonargparse import ArgumentError
from torch import Tensor

from app.export.low_rank import truncate_adapters
from modules.adapters import AdapterConfig, adapted_projections
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine
from tests.app.export.test_peft import CONFIG, TASKS, logits, module_of, run_export
from tests.support.adapters import randomize
from tests.support.refusals import refused
from tests.support.tasks import TaskFactory


def dense(module: Any) -> dict[str, Tensor]:
    """Return the update s·B·A of each projection, in float64."""
    projections = adapted_projections(module.backbone).items()
    return {name: f.scale * f.B.detach().double() @ f.A.detach().double() for name, (_, f) in projections}


def best(update: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("train", ["A", "B", "both"])
@pytest.mark.parametrize("family", ["vit", "roberta"])
def test_each_update_is_the_best_approximation_of_its_rank(tmp_path: Path, family: str, train: str) -> None:
    initial = {"init_a": "zero", "init_b": "orthogonal"} if train == "A" else {}
    config = AdapterConfig(train=train, rank=4, targets="all", rank_pattern={"value": 2}, **initial)  # type: ignore[arg-type]
    module = randomize(TaskFactory(tmp_path)(family, adapter=config)).eval()
    before = dense(module)
    truncation = truncate_adapters(module, 3)
    after = dense(module)
    expected = {name: best(update, min(3, truncation.ranks[name][0])) for name, update in before.items()}
    assert before.keys() == after.keys()
    for name, update in after.items():
        torch.testing.assert_close(update, expected[name], atol=1e-6, rtol=1e-6)
    ranks = set(truncation.ranks.values())
    assert ranks == {(4, 3), (2, 2)}
    losses = {name: float((expected[name] - before[name]).norm() / before[name].norm()) for name in before}
    assert truncation.loss.worst == pytest.approx(max(losses.values()), rel=1e-6)
    assert truncation.loss.projection == max(losses, key=lambda name: losses[name])
    total = [
        sum(float(t.square().sum()) for t in tensors)
        for tensors in ([expected[name] - before[name] for name in before], before.values())
    ]
    assert truncation.loss.total == pytest.approx((total[0] / total[1]) ** 0.5, rel=1e-6)
    for _, factors in adapted_projections(module.backbone).values():
        frozen = factors.B.T if train == "A" else factors.A
        torch.testing.assert_close(frozen @ frozen.T, torch.eye(frozen.shape[0]), atol=1e-6, rtol=0)
        assert (factors.A.requires_grad, factors.B.requires_grad) == (train in ("A", "both"), train in ("B", "both"))


def test_each_projection_has_the_smallest_rank_that_keeps_the_share(tmp_path: Path) -> None:
    module = randomize(TaskFactory(tmp_path)("roberta")).eval()
    with torch.no_grad():
        for i, (_, factors) in enumerate(adapted_projections(module.backbone).values()):
            factors.B[:, 1 + i % 4 :] = 0  # ranks 1 to 4
    before = dense(module)
    truncation = truncate_adapters(module, None, 1.0)
    assert [after for _, after in truncation.ranks.values()] == [1 + i % 4 for i in range(len(before))]
    assert truncation.loss.total < 1e-6
    for name, update in dense(module).items():
        torch.testing.assert_close(update, before[name], atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cli", "text_cli"])
def test_peft_and_this_program_load_truncated_exports(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli: CommandLine = request.getfixturevalue(f"fitted_{name}")
    make_base, logits_of = TASKS[name]
    for option in ("--rank=2", "--keep=0.8"):
        output = tmp_path / option
        assert run_export(cli.run(), output, option) == 0
        printed = re.search(r"Truncated from rank 4 to (\S+); the update is off by (\S+) %", capsys.readouterr().out)
        assert printed is not None
        module = module_of(cli.run())
        truncation = truncate_adapters(module, 2) if option == "--rank=2" else truncate_adapters(module, None, 0.8)
        assert float(printed[2]) == pytest.approx(100 * truncation.loss.total, rel=0.01)
        base = make_base(module, Path(cli.backbone[1]) if cli.backbone else Path()).eval()
        model = peft.PeftModel.from_pretrained(base, output).eval()
        torch.testing.assert_close(logits_of(model), logits(name, module), atol=1e-5, rtol=1e-5)
        assert f"off by {printed[2]}" in (output / "README.md").read_text().replace("&#46;", ".")
        if name == "text_cli":
            content = json.loads((output / CONFIG).read_text())
            if option == "--rank=2":
                assert (content["r"], content["lora_alpha"], content["rank_pattern"]) == (2, 2, {})
            options = {"weights": "pretrained", "class_names": module.class_names, "adapter_path": str(output)}
            loaded = TextClassifier(cli.backbone[1], **options).eval()
            torch.testing.assert_close(logits(name, loaded), logits(name, module), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["merged", "compact"])
def test_other_formats_hold_the_truncated_adapter(fitted_text_cli: CommandLine, tmp_path: Path, form: str) -> None:
    assert run_export(fitted_text_cli.run(), tmp_path / form, f"--format={form}", "--rank=1") == 0
    module = module_of(fitted_text_cli.run())
    truncate_adapters(module, 1)
    options = {"weights": "pretrained", "class_names": module.class_names}
    if form == "compact":
        loaded = TextClassifier(fitted_text_cli.backbone[1], adapter_path=str(tmp_path / form), **options)
    else:
        loaded = TextClassifier(str(tmp_path / form), tuning="head", **options)
    torch.testing.assert_close(logits("text_cli", loaded.eval()), logits("text_cli", module), atol=1e-5, rtol=1e-5)


def test_validate_prints_the_metrics_before_and_after(
    fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = fitted_text_cli
    assert run_export(cli.run(), tmp_path / "output", "--rank=4", "--validate") == 0
    printed = dict(re.findall(r"^(val/\w+): (.+)$", capsys.readouterr().out, re.MULTILINE))
    assert cli("validate", "--ckpt_path", str(cli.run())) == 0
    scores = {key: value for key, value in cli.metrics().items() if key in printed}
    assert {"val/loss", "val/score"} <= scores.keys()
    for key, value in scores.items():
        before, after = re.findall(r"[-\d.e]+(?= before| after)", printed[key])
        assert float(before) == pytest.approx(value, rel=1e-3, abs=1e-4)
        assert float(after) == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--rank=2", "--keep=0.9"], ["--rank and --keep", "Give one"]),
        (["--rank=0"], ["--rank", "1 or more"]),
        (["--rank=5"], ["--rank", "5", "adapter rank (4)"]),
        (["--keep=0"], ["--keep", "(0, 1]"]),
        (["--keep=1.1"], ["--keep", "(0, 1]"]),
        (["--validate"], ["--validate", "--rank or --keep"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") and "=" in value[0] else "",
)
def test_wrong_options_are_refused(
    fitted_text_cli: CommandLine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    parts: list[str],
) -> None:
    refused(capsys, run_export(fitted_text_cli.run(), tmp_path / "output", *options), *parts)
    assert not (tmp_path / "output").exists()


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    module = TaskFactory(tmp_path)("vit", tuning="head")
    with pytest.raises(ArgumentError, match="--keep: this run has tuning: head"):
        truncate_adapters(module, None, 0.9)
