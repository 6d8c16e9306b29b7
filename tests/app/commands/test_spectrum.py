"""The command `spectrum`: values against full SVDs, omitted parts of the report, and bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file

from app.cli import main
from app.commands.finished_runs import read_run, read_spectra
from app.export.load_run import load_module
from modules.adapters import adapted_projections
from tests.app.commands.conftest import QUICK, assert_page_has_pictures
from tests.app.conftest import CommandLine
from tests.support.refusals import refused

ALWAYS = ("kept_shares", "ranks", "singular_values")


def spectrum(output: Path, *runs: Path, options: tuple[str, ...] = ()) -> int:
    return main(["spectrum", *map(str, runs), "--output", str(output), *options])


@pytest.fixture(scope="module")
def output(finished_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spectrum") / "new"
    assert spectrum(folder, finished_runs["both"], finished_runs["b_other_rank"], options=("--top=5",)) == 0
    return folder


def test_the_report_is_one_file_with_all_figures(output: Path) -> None:
    page = assert_page_has_pictures(output, *ALWAYS, "intruders", "relative_norms")
    assert "1: both, rank 4" in page
    assert "2: B, rank 2" in page


def _of(frame: pd.DataFrame, projection: str) -> pd.DataFrame:
    return frame[frame["projection"] == projection]


def test_values_equal_those_of_full_decompositions(output: Path, finished_runs: dict[str, Path]) -> None:
    """Compare with full SVDs of W + s·B·A in float64."""
    module = load_module(finished_runs["both"] / "checkpoints" / "best.ckpt", {})
    frames = {
        path.stem: pd.read_parquet(path).query("run == '1: both, rank 4'") for path in output.glob("[!r]*.parquet")
    }
    ranks = pd.read_parquet(output / "ranks.parquet").query("run == '1: both, rank 4' and at_checkpoint")
    for name, (layer, factors) in adapted_projections(module.backbone).items():
        weight = layer.weight[factors.projection.rows].detach().double()
        update = (4 * factors.B @ factors.A).detach().double()  # s = alpha 16 / rank 4
        sigma = torch.linalg.svdvals(update)
        values = _of(frames["spectra"], name).query("at_checkpoint and factor == 's·BA'")
        assert values["singular_value"].tolist() == pytest.approx(sigma[:4].tolist(), rel=1e-4, abs=1e-6)
        row = _of(ranks, name).query("factor == 's·BA'").iloc[0]
        assert row["relative_norm"] == pytest.approx(float(update.norm() / weight.norm()), rel=1e-5)
        assert row["stable_rank"] == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-4)
        kept = _of(frames["kept_shares"], name)["kept_share"].tolist()
        assert kept[1] == pytest.approx(float(sigma[:2].square().sum() / sigma.square().sum()), rel=1e-4)
        u, tuned = torch.linalg.svd(weight).U, torch.linalg.svd(weight + update).U
        expected = (u.T @ tuned[:, :5]).abs().amax(0).tolist()
        assert _of(frames["intruders"], name)["largest_cosine"].tolist() == pytest.approx(expected)


def test_spectra_over_training_include_the_scale(output: Path, finished_runs: dict[str, Path]) -> None:
    rows = pq.read_table(finished_runs["both"] / "spectrum.parquet").to_pandas().query("factor == 'BA'")
    found = pd.read_parquet(output / "spectra.parquet").query("run == '1: both, rank 4' and factor == 's·BA'")
    for _, row in rows.iterrows():
        own = found[
            (found["step"] == row["step"]) & (found["projection"] == row["projection"]) & ~found["at_checkpoint"]
        ]
        assert own["singular_value"].tolist() == pytest.approx((4 * row["singular_values"]).tolist())


def test_an_earlier_report_is_overwritten_and_other_files_stay(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.html", "intruders.png", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    assert spectrum(tmp_path, finished_runs["b"], options=("--top=0",)) == 0
    assert "replaced or removed: report.html, intruders.png." in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "earlier"
    page = assert_page_has_pictures(tmp_path, *ALWAYS, "relative_norms")  # no stale intruders.png
    assert "left out by --top 0" in page


def test_without_the_backbone_only_intruder_dimensions_are_left_out(
    tmp_path: Path, parquet_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    # as in tests/conf/image.yaml
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    }
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).state_dict(), weights)
    cli = CommandLine(tmp_path / "runs", parquet_path)
    assert cli("fit", *QUICK, f"--model.weights={weights}") == 0
    weights.unlink()
    assert spectrum(tmp_path / "without", cli.run()) == 0
    error = capsys.readouterr().err
    assert "intruder dimensions are left out: " in error
    assert str(weights) in error
    page = assert_page_has_pictures(tmp_path / "without", *ALWAYS, "relative_norms")
    assert "Frozen weights not loaded: run 1: B." in page
    rows = pq.read_table(cli.run() / "spectrum.parquet").to_pylist()
    last = [row["relative_norm"] for row in rows if row["factor"] == "BA" and row["step"] == rows[-1]["step"]]
    ranks = pd.read_parquet(tmp_path / "without" / "ranks.parquet").query("at_checkpoint and factor == 's·BA'")
    assert ranks["relative_norm"].tolist() == pytest.approx(last, rel=1e-5)  # the checkpoint was saved at the last step


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_columns(path: Path) -> None:
    pd.DataFrame({"step": ["one"], "projection": [1]}).to_parquet(path)


def other_values(path: Path) -> None:
    rows = pq.read_table(path).to_pylist()
    rows[0]["singular_values"], rows[1]["singular_values"] = [float("nan")], []
    pd.DataFrame(rows[:9]).to_parquet(path)


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (Path.unlink, "does not exist", 0),
        (damage, "is damaged", 0),
        (other_columns, "is damaged", 0),
        (other_values, "skipped 2 damaged rows of 9", 7),
    ],
)
def test_damaged_rows_and_files_of_spectra_are_skipped_with_a_warning(
    finished_runs: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    message: str,
    left: int,
) -> None:
    run = Path(shutil.copytree(finished_runs["b"], tmp_path / "version_0"))
    change(run / "spectrum.parquet")
    read = read_run(str(run))
    assert read is not None
    assert len(read_spectra(read)) == left
    assert "spectrum.parquet" in caplog.text
    assert message in caplog.text


def test_runs_without_spectra_and_without_adapters(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without spectra is shown from its checkpoint. A run without adapters is skipped, or refused if alone."""
    checkpoint = Path(shutil.copy(finished_runs["b"] / "checkpoints" / "best.ckpt", tmp_path / "moved.ckpt"))
    assert spectrum(tmp_path / "out", finished_runs["head"], checkpoint, options=("--top=0",)) == 0
    error = capsys.readouterr().err
    assert "model.tuning: head, so it has no adapters. The run is skipped." in error
    assert "moved.ckpt is in no run directory" in error
    page = assert_page_has_pictures(tmp_path / "out", *ALWAYS)
    assert "No usable spectrum.parquet: run 1: B." in page
    refused(
        capsys,
        spectrum(tmp_path / "none", finished_runs["head"]),
        "RUN",
        "0 different runs",
        "model.tuning",
    )
    assert not (tmp_path / "none").exists()


def test_bad_input_is_refused(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_runs["b"]
    (tmp_path / "file").write_text("")
    refused(capsys, spectrum(tmp_path / "out", tmp_path / "nowhere"), "RUN", "nowhere")
    refused(capsys, spectrum(tmp_path / "file", run), "--output", "is a file")
    refused(capsys, spectrum(tmp_path / "out", run, options=("--top=-1",)), "--top", "-1")
    refused(capsys, main(["spectrum", "--output", str(tmp_path / "out")]), "run")
    copies = [Path(shutil.copytree(run, tmp_path / f"copy_{i}" / "version_0")) for i in range(9)]
    refused(capsys, spectrum(tmp_path / "out", *copies), "RUN", "9 runs", "8 or fewer")
    checkpoint = copies[0] / "checkpoints" / "best.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    refused(capsys, spectrum(tmp_path / "out", checkpoint), "ckpt_path", str(checkpoint))
    assert not (tmp_path / "out").exists()
