import json
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cli import main, parse_fit
from app.commands.moments import measure
from benchmarks.harness import load
from benchmarks.theory import correlation, find_runs, settings, whitened_norms
from benchmarks.theory import main as compare
from modules.adapters import adapted_layers

VARIANTS = {
    "B": ("--model.adapter.train=B",),
    "A": ("--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"),
    "both": ("--model.adapter.train=both",),
}
FITS = (("B", 0, 0.01), ("B", 1, 0.01), ("B", 0, 1e-9), ("A", 0, 0.01), ("A", 1, 0.01), ("both", 0, 0.01))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, parquet_path: Path) -> Path:
    """Return the folder of the runs in FITS: variant, seed and learning rate."""
    root = tmp_path_factory.mktemp("runs")
    recipe = ["--config", "tests/conf/image.yaml", "--data.path", str(parquet_path), "--trainer.max_epochs=1"]
    quiet = ["--spectrum.every_n_epochs=null", f"--trainer.default_root_dir={root}", "--trainer.logger=false"]
    for trained, seed, rate in FITS:
        keys = [f"--seed_everything={seed}", f"--model.adapter.seed={seed}", f"--model.learning_rate={rate}"]
        assert main(["fit", *recipe, *quiet, *VARIANTS[trained], *keys]) == 0
    return root


@pytest.mark.slow
def test_runs_are_grouped_by_setting_at_the_best_learning_rate(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (setting,) = settings(find_runs([runs]))
    assert {trained: [run.seed for run in of] for trained, of in setting.items()} == {"B": [0, 1], "A": [0, 1]}
    assert all(run.rate == 0.01 for of in setting.values() for run in of)
    assert "the run trains both" in capsys.readouterr().out


@pytest.mark.slow
def test_norms_equal_those_of_the_update_on_the_inputs(runs: Path) -> None:
    """Compare with ‖ΔW·Σ^½‖, where Σ is the mean of x·xᵀ over tokens."""
    (setting,) = settings(find_runs([runs]))
    run = setting["B"][1]
    words = ["--config", str(run.path / "config.yaml"), "--model.adapter.dropout=0"]
    measured = measure(parse_fit, words, batches=2, head_steps=0)
    norms = whitened_norms(run, measured)
    state = torch.load(run.path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    measured.module.load_state_dict(state)
    for layer in adapted_layers(measured.module.backbone).values():
        for f in layer.factors():
            moments = measured.moments[f.projection.name]
            values, vectors = torch.linalg.eigh(moments.inputs / moments.tokens)
            root = vectors * values.clamp(min=0).sqrt()
            update = layer.delta()[f.projection.rows].double()
            assert norms[f.projection.name] == pytest.approx(float((update @ root).norm()), rel=1e-4)


@pytest.mark.slow
def test_the_result_has_every_figure(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "theory.json"
    words = ["theory", "--runs", str(runs), "--batches", "2", "--head_steps", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    compare()
    sections = load(output)
    (name,) = [key for key in sections if key != "over settings"]
    assert "query+value, rank 4" in name
    record = sections[name]
    assert record["measured"]["metric"] == "val/acc1"
    assert record["measured"]["gap"]["mean"] == pytest.approx(record["measured"]["B"] - record["measured"]["A"])
    forecast = record["forecast"]["least squares, equal outputs"]
    assert forecast["A"] == pytest.approx(4 / 32)
    assert forecast["gap"] == pytest.approx(forecast["B"] - forecast["A"], abs=2e-6)
    correlations = record["projections"]["A"]["correlations"]
    assert correlations["share, least squares, equal outputs"] is None  # constant: r / d_out for every projection
    assert -1 <= correlations["input energy"]["rho"] <= 1
    assert json.dumps(sections)


def test_correlation_lies_in_its_interval() -> None:
    x = np.random.default_rng(0).normal(size=40)
    result = correlation(x.tolist(), (x + np.random.default_rng(1).normal(size=40)).tolist())
    assert result is not None
    assert 0 < result["low"] < result["rho"] < result["high"] < 1
    assert correlation([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]) is None
    assert correlation([1, 2], [1, 2]) is None
