"""The command `similarity`: values against SciPy, groups of runs, answers, and bad input."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import t

from app.cli import main
from app.commands.similarity_report import answers
from tests.app.commands.conftest import assert_page_has_pictures
from tests.support.refusals import refused

PICTURES = ("groups", "layers", "pairs")
GIVEN = ("both", "both_other_seed", "b", "b_other_rate", "b_other_rank")


def similarity(output: Path, *runs: Path) -> int:
    return main(["similarity", *map(str, runs), "--output", str(output)])


@pytest.fixture(scope="module")
def output(finished_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("similarity") / "new"
    assert similarity(folder, *(finished_runs[name] for name in GIVEN)) == 0
    return folder


def pair(frame: pd.DataFrame, first: int, second: int, factor: str) -> pd.DataFrame:
    """Return the rows of the pair of runs with these numbers."""
    numbers = [frame[side].str.partition(":")[0].astype(int) for side in ("first", "second")]
    return frame[(numbers[0] == first) & (numbers[1] == second) & (frame["factor"] == factor)]


def test_the_report_is_one_file_with_all_figures(output: Path) -> None:
    page = assert_page_has_pictures(output, *PICTURES)
    assert "Does A&#39;s similarity vanish when A starts from different seeds?" in page


@pytest.mark.parametrize("second", [2, 5])
def test_similarities_equal_scipys_principal_angles(output: Path, finished_runs: dict[str, Path], second: int) -> None:
    states = [
        torch.load(finished_runs[GIVEN[i - 1]] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for i in (1, second)
    ]
    frame = pd.read_parquet(output / "similarity.parquet")
    for factor in "AB":
        rows = pair(frame, 1, second, factor)
        assert len(rows) == 4  # query and value in two blocks
        for row in rows.itertuples():
            layer = row.projection.removesuffix(f".{row.role}")
            x, y = (state[f"backbone.{layer}.adapters.{row.role}.{factor}"].double().numpy() for state in states)
            x, y = (x.T, y.T) if factor == "A" else (x, y)
            assert row.similarity == pytest.approx(np.mean(np.cos(subspace_angles(x, y)) ** 2), abs=1e-9)
            assert row.chance == 4 / 32
        mean = pair(pd.read_parquet(output / "pairs.parquet"), 1, second, factor).iloc[0]
        values = rows["similarity"].to_numpy()
        reach = t.ppf(0.975, 3) * values.std(ddof=1) / 2
        assert mean["similarity"] == pytest.approx(values.mean())
        assert mean["high"] == pytest.approx(min(values.mean() + reach, 1))
        assert mean["chance"] == 4 / 32


def test_the_permutation_interval_covers_all_assignments_of_the_blocks(
    output: Path, finished_runs: dict[str, Path]
) -> None:
    """Two blocks allow two pairings of the queries and two pairings of the values, and so four means."""
    states = [
        torch.load(finished_runs[GIVEN[run]] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for run in (0, 1)
    ]
    frame = pd.read_parquet(output / "pairs.parquet")
    for factor in "AB":
        means: dict[str, list[float]] = {}
        for role in ("query", "value"):
            names = [f"backbone.blocks.{block}.attn.qkv.adapters.{role}.{factor}" for block in (0, 1)]
            x, y = ([(s[n].T if factor == "A" else s[n]).double().numpy() for n in names] for s in states)
            cross = np.array([[np.mean(np.cos(subspace_angles(u, v)) ** 2) for v in y] for u in x])
            means[role] = [cross.trace() / 2, (cross.sum() - cross.trace()) / 2]
        expected = sorted((query + value) / 2 for query, value in product(means["query"], means["value"]))
        row = pair(frame, 1, 2, factor).iloc[0]
        assert np.unique(row["permuted"].round(9)) == pytest.approx(expected, abs=1e-8)
        assert row[["permutation_low", "permutation_high"]].tolist() == pytest.approx([expected[0], expected[-1]])


def test_the_permutation_interval_of_a_group_is_computed_from_its_mean(output: Path) -> None:
    pairs, groups = (pd.read_parquet(output / f"{name}.parquet") for name in ("pairs", "groups"))
    group = groups.query("factor == 'B'").iloc[0]
    members = pairs.query("factor == 'B' and variant == @group.variant")
    assert len(members) == group["pairs"] > 1
    limits = np.quantile(np.mean(members["permuted"].tolist(), axis=0), [0.025, 0.975])
    assert group[["permutation_low", "permutation_high"]].tolist() == pytest.approx(limits.tolist())
    assert limits[0] < limits[1]


def test_equal_frozen_factors_have_similarity_one_and_are_marked_as_equal(output: Path) -> None:
    row = pair(pd.read_parquet(output / "pairs.parquet"), 3, 4, "A").iloc[0]
    assert row["similarity"] == pytest.approx(1, abs=1e-9)
    assert (row["state"], row["start"]) == ("frozen", "same start")
    groups = pd.read_parquet(output / "groups.parquet").query("factor == 'A'")
    assert groups.iloc[0]["group"].startswith("frozen, same start")
    assert groups.iloc[0]["group"].endswith("(equal by construction)")


def test_pairs_are_grouped_by_what_the_runs_share(output: Path) -> None:
    pairs = pd.read_parquet(output / "pairs.parquet")
    facts = {
        (1, 2, "A"): ("trained", "other start", "same data", "same variant"),
        (1, 3, "A"): ("one trained", "same start", "same data", "other variant"),
        (3, 5, "A"): ("frozen", "other start", "same data", "same variant"),  # another rank draws another A
        (1, 3, "B"): ("trained", "both from zero", "same data", "other variant"),
    }
    for (first, second, factor), expected in facts.items():
        row = pair(pairs, first, second, factor).iloc[0]
        assert (row["state"], row["start"], row["data"], row["variant"]) == expected
    groups = pd.read_parquet(output / "groups.parquet")
    assert groups.groupby("factor")["pairs"].sum().tolist() == [10, 10]
    trained = groups.query("factor == 'B'").iloc[0]
    members = pairs.query("factor == 'B' and variant == @trained.variant")
    assert trained["similarity"] == pytest.approx(members["similarity"].mean())


def test_a_trained_factor_is_compared_with_its_own_start(output: Path) -> None:
    runs = pd.read_parquet(output / "runs.parquet")
    similarities = runs["A to its start"]
    assert similarities[:2].between(0.2, 1 - 1e-6).all()
    assert similarities[2:].isna().all()  # frozen
    assert runs["B to its start"].isna().all()  # B starts at zero


def test_peft_files_give_the_factors_of_the_checkpoint(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without checkpoints uses adapter/. Files outside of a run do not record the frozen factor."""
    run = finished_runs["b"]
    copied = Path(shutil.copytree(run, tmp_path / "version_0", ignore=shutil.ignore_patterns("checkpoints")))
    exported = Path(shutil.copytree(run / "adapter", tmp_path / "exported"))
    assert similarity(tmp_path / "out", run, copied, exported) == 0
    error = capsys.readouterr().err
    assert "adapter/ is used instead" in error
    assert "exported does not say which factor was frozen" in error
    assert "no digest of the frozen weights" in error
    assert "These runs cannot tell" in assert_page_has_pictures(tmp_path / "out", *PICTURES)
    pairs = pd.read_parquet(tmp_path / "out" / "pairs.parquet")
    assert pairs["similarity"].tolist() == pytest.approx([1] * 6, abs=1e-6)
    assert pair(pairs, 1, 2, "A").iloc[0]["state"] == "frozen"


def test_different_backbones_are_refused_and_the_difference_is_named(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = similarity(tmp_path / "out", finished_runs["b"], finished_runs["other_backbone"])
    refused(capsys, code, "different backbones", "seed_everything, which draws the weights, is 0 and 1")
    assert not (tmp_path / "out").exists()


def test_too_few_runs_are_refused(
    finished_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_runs["b"]
    refused(capsys, similarity(tmp_path / "out", run), "in 1 given path", "2 or more")
    assert similarity(tmp_path / "out", run, run / "checkpoints" / "best.ckpt") == 2
    assert "is given twice" in capsys.readouterr().err
    refused(capsys, similarity(tmp_path / "out", run, finished_runs["head"]), "1 different run ", "2 or more")
    broken = Path(shutil.copytree(run / "adapter", tmp_path / "broken"))
    (broken / "adapter_config.json").write_text("{")
    refused(capsys, similarity(tmp_path / "out", run, broken), "RUN: ", "cannot be read as JSON")


VERDICTS = [
    # similarity of the three pairs with other starts, similarity of the pair with the same start, start of the answer
    ((0.12, 0.12, 0.12), 0.9, "Yes: "),
    ((0.20, 0.12, 0.12), 0.9, "Yes, as far as these runs can tell: "),
    ((0.15, 0.15, 0.15), 0.9, "Almost: "),
    ((0.50, 0.50, 0.50), 0.9, "Not entirely: "),
    ((0.50, 0.50, 0.50), None, "Not entirely: "),
    ((), 0.9, "These runs cannot tell: "),
]


@pytest.mark.parametrize(("other", "same", "beginning"), VERDICTS)
def test_the_answer_follows_from_the_intervals(other: tuple[float, ...], same: float | None, beginning: str) -> None:
    """Chance is 8 / 64 = 0.125. The permuted means lie between 0.118 and 0.132."""
    of_start = [*((pair, "other start", v) for pair, v in zip(("12", "13", "23"), other, strict=False))]
    of_start += [] if same is None else [("14", "same start", same)]
    facts = {"factor": "A", "state": "trained", "data": "same data", "chance": 8 / 64}
    permuted = np.linspace(0.118, 0.132, 1000)
    pairs = pd.DataFrame(
        [
            {"first": p[0], "second": p[1], "start": start, "similarity": v, "permuted": permuted, **facts}
            for p, start, v in of_start
        ]
    )
    answer, *others = answers(pairs, pd.DataFrame({"A to its start": [0.5]}))
    assert answer.startswith(beginning)
    assert "0.500 to its own random start (1 run)" in others[0]
    alone = pairs.assign(permuted=[np.full(9, value) for value in pairs["similarity"]])  # one block has no permutations
    assert "permuted" not in answers(alone, pd.DataFrame({"A to its start": [0.5]}))[0]
    # permuted means above chance: all blocks are alike, so the answer compares A with chance
    shifted = pairs.assign(permuted=[permuted + 0.3] * len(pairs))
    if len(other) and min(other) > 8 / 64:
        assert answers(shifted, pd.DataFrame({"A to its start": [0.5]}))[0].startswith(("Almost", "Not entirely"))
