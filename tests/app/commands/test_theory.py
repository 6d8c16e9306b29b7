import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from app.cli import main, parse_fit
from app.commands.moments import measure
from app.commands.theory_report import STYLES, _style
from modules.adapters import ROLES, adapter_state
from tests.app.commands.conftest import assert_page_has_pictures
from tests.app.conftest import CommandLine

SHORT = ("--batches=2", "--head_steps=2")


def fit_words(cli: CommandLine, *options: str) -> list[str]:
    return cli.words("theory", *options)[1:]


@pytest.mark.parametrize(
    "name",
    ["cli", pytest.param("text_cli", marks=pytest.mark.slow), pytest.param("instruction_cli", marks=pytest.mark.slow)],
)
def test_report_is_one_page_with_its_figures_and_tables(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli: CommandLine = request.getfixturevalue(name)
    output = tmp_path / "theory"
    assert main(["theory", *fit_words(cli), "--output", str(output), *SHORT]) == 0
    assert capsys.readouterr().out.strip().endswith(f"Report: {output / 'report.html'}")
    assert_page_has_pictures(output, "shares", "spectrum", "effective_rank")
    assert {path.name for path in output.iterdir()} == {
        *("report.html", "theory.parquet", "projections.parquet"),
        *("shares.png", "spectrum.png", "effective_rank.png"),
    }
    assert not cli.root.exists()  # no run directory
    shares, projections = (pd.read_parquet(output / f"{file}.parquet") for file in ("theory", "projections"))
    assert set(projections["role"]) == {"query", "value"}
    assert (projections["tokens"] > 0).all()
    assert shares["share"].between(0, 1 + 1e-9).all()
    exact = shares["rank"] / shares["d_out"]
    random_b = (shares["trained"] == "A") & (shares["outputs"] == "equal")
    np.testing.assert_allclose(shares["share"][random_b], exact[random_b])
    at_full = shares[(shares["rank"] == shares["d_in"]) & (shares["trained"] == "B")]
    np.testing.assert_allclose(at_full["share"], 1)


def test_a_role_beyond_the_styles_has_a_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.commands.theory_report.STYLES", STYLES[:3])
    assert [_style(role)["label"] for role in (*ROLES, "other")] == [*ROLES, "other"]


def test_moments_equal_those_of_the_batches_of_fit(text_cli: CommandLine) -> None:
    """Without dropout, ∂L/∂B = s·G·Aᵀ. Compare with autograd on the same batches."""
    options = ("--model.adapter.dropout=0", "--trainer.precision=32-true", "--model.adapter.rank=4")
    dropout = "--model.backbone_args={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    measured = measure(parse_fit, fit_words(text_cli, *options, dropout), batches=2, head_steps=0)
    module = measured.module
    assert measured.samples == 50
    assert all(not t.any() for name, t in adapter_state(module.backbone).items() if name.endswith("B"))
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    module._trainer = None  # without a trainer, `self.log` does nothing
    module.zero_grad()
    data._position, data._seed = {}, None
    loader = iter(data.train_dataloader())
    padding = tokens = 0
    for _ in range(2):
        batch = next(loader)
        module.training_step(batch, 0).backward()
        tokens += int(batch["attention_mask"].sum())
        padding += int((1 - batch["attention_mask"]).sum())
    from modules.adapters import adapted_projections

    for name, (_, factors) in adapted_projections(module.backbone).items():
        moments = measured.moments[name]
        assert factors.B.grad is not None
        expected = factors.scale * moments.gradient.float() @ factors.A.T
        torch.testing.assert_close(factors.B.grad, expected, rtol=1e-3, atol=1e-6)
        assert moments.tokens + moments.idle == tokens + padding
        assert moments.idle >= padding


def test_heads_are_trained_before_the_measurement_and_not_during_it(text_cli: CommandLine) -> None:
    def head(steps: int, batches: int) -> torch.Tensor:
        module = measure(parse_fit, fit_words(text_cli), batches, steps).module
        return torch.cat([p.detach().flatten() for n, p in module.named_parameters() if "classifier" in n])

    untouched = head(0, 1)
    torch.testing.assert_close(head(0, 3), untouched, rtol=0, atol=0)
    assert (head(2, 1) - untouched).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.tuning=head"], "model.tuning: head adapts no projection to measure. Set model.tuning to adapter."),
        (["--ckpt_path=last"], "ckpt_path"),
        (["--batches=0"], "--batches: 0 is too small. Give 1 or more."),
        (["--model.adapter.rnk=3"], "rnk"),
        (["--output="], "--output"),
    ],
)
def test_wrong_use_is_one_message(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    output = [] if "--output=" in options else ["--output", str(tmp_path / "out")]
    assert main(["theory", *fit_words(cli), *output, *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_model_adapter_path_is_refused(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    options = ["--output", str(tmp_path / "out"), f"--model.adapter_path={tmp_path}"]
    assert main(["theory", *fit_words(cli), *options]) == 2
    assert "model.adapter_path" in capsys.readouterr().err
