import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from app.sweep import figures
from app.sweep.facts import PlanFacts
from app.sweep.findings import findings, introduction
from app.sweep.outcome import Outcome
from app.sweep.plan import Variant
from app.sweep.report import difference_table, main_table, rich_table, write_report
from app.sweep.statistics import mean_over_seeds, paired_difference
from tests.support.pages import check_single_file

RATES = (0.001, 0.002, 0.004)
KEYS: dict[str, dict[str, Any]] = {
    "B": {"model.tuning": "adapter", "model.adapter.train": "B"},
    "B16": {"model.tuning": "adapter", "model.adapter.train": "B", "model.adapter.rank": 16},
    "lora": {"model.tuning": "adapter", "model.adapter.train": "both"},
    "head": {"model.tuning": "head"},
    "full": {"model.tuning": "full"},
}
PARAMETERS = {"B": 200_000, "B16": 300_000, "lora": 300_000, "head": 100_000, "full": 22_000_000}
SEARCH = {"model.learning_rate": RATES}
FACTS = PlanFacts(
    name="tiny",
    metric="val/score",
    mode="max",
    select_seeds=(0, 1),
    confirm_seeds=(2, 3, 4, 5, 6),
    report=("test/score", "test/loss"),
    base=("conf/quickstart.yaml",),
    set={"trainer.max_epochs": 3},
    variants=tuple(Variant(name, keys, SEARCH) for name, keys in KEYS.items()),
    search=SEARCH,
    notes=("B: the grid was extended to 0.004.",),
    finished=True,
    trials_per_variant=3,
    prune="none",
    command=["python", "main.py", "sweep", "--config", "conf/sweeps/tiny.yaml"],
)
# scores of five seeds in percent; pairing by seed removes the variation that the lists share
LORA = [80.1, 81.0, 79.2, 80.4, 79.3]
CLOSE = [80.3, 80.6, 79.6, 80.3, 79.0]
LOWER = [76.2, 77.2, 75.0, 76.5, 75.3]


def trial(variant: str, phase: str, seed: int, rate: float = 0.002, **more: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "phase": phase,
        "point": json.dumps({"model.learning_rate": rate}),
        "search/model.learning_rate": rate,
        "seed": seed,
        "state": "complete",
        "error": None,
        "run": f"runs/{variant}_{seed}",
        "chosen": rate == 0.002,
        "seconds": 10.0,
        "curve_steps": [10, 20],
        "curve_values": [0.5, 0.6],
        "val/score": 0.7 if rate == 0.002 else 0.6,
        "test/loss": 0.5,
        "params/trainable": PARAMETERS.get(variant, 1),
        "memory/peak_bytes": 2**30,
        "time/fit_seconds": 60.0,
        "adapter/bytes": 0 if variant in ("head", "full") else 4 * PARAMETERS.get(variant, 1),
    } | more


def frame(confirmed: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    rows = []
    for variant, values in confirmed.items():
        rows += [trial(variant, "select", seed, rate) for rate in RATES for seed in (0, 1)]
        rows += [trial(variant, "confirm", seed, **{"test/score": v / 100}) for seed, v in enumerate(values, 2)]
    return pd.DataFrame(rows)


def facts_of(results: pd.DataFrame) -> PlanFacts:
    names = results["variant"].unique()
    return replace(FACTS, variants=tuple(Variant(name, KEYS.get(name, {}), SEARCH) for name in names))


def words(confirmed: Mapping[str, Sequence[float]]) -> str:
    results = frame(confirmed)
    return " ".join(findings(facts_of(results), results))


def series(values: Sequence[float], first_seed: int = 2) -> "pd.Series[float]":
    return pd.Series(list(values), index=range(first_seed, first_seed + len(values)), dtype=float)


def failed(variant: str, phase: str, seed: int, error: str = "train/loss is nan") -> dict[str, Any]:
    lost = dict.fromkeys(("val/score", "test/loss", "params/trainable", "memory/peak_bytes", "time/fit_seconds"))
    return trial(variant, phase, seed, state="failed", error=error, chosen=False, **lost)


@pytest.mark.parametrize(
    ("one_side", "both", "answer"),
    [
        (LORA, LOWER, "One side is enough by this sweep: B is clearly better than lora."),
        (LOWER, LORA, "One side is not enough by this sweep: B is clearly worse than lora."),
        (
            CLOSE,
            LORA,
            "One side may be enough: B cannot be told from lora. By the interval, B may be up to 0.46 points",
        ),
        (LORA[:2], LOWER[:2], "There are too few seeds to decide whether one side is enough"),
    ],
)
def test_findings_answer_whether_one_side_is_enough(
    one_side: Sequence[float], both: Sequence[float], answer: str
) -> None:
    assert answer in words({"B": one_side, "lora": both})


# ---------------------------------------------------------------------------------------------------------- statistics


def test_mean_and_standard_error() -> None:
    mean = mean_over_seeds(series([1, 2, 3, 4]))
    assert (mean.value, mean.seeds) == (2.5, 4)
    assert mean.error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert mean_over_seeds(series([3])).error is None
    assert mean_over_seeds(series([])).seeds == 0


def test_student_interval_equals_that_of_the_paired_t_test() -> None:
    found = paired_difference("a", series(LORA), "b", series(CLOSE))
    expected = stats.ttest_rel(LORA, CLOSE).confidence_interval(0.95)
    assert found.student == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(LORA) - np.mean(CLOSE))


def test_bootstrap_interval_agrees_with_all_resamples() -> None:
    found = paired_difference("a", series(LORA), "b", series(CLOSE))
    differences = np.subtract(LORA, CLOSE)
    means = [np.mean(resample) for resample in product(differences, repeat=5)]
    assert found.bootstrap == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert found.bootstrap == paired_difference("a", series(LORA), "b", series(CLOSE)).bootstrap


def test_variants_are_paired_by_seed_whatever_the_order() -> None:
    others = series(CLOSE, first_seed=4).iloc[::-1]
    found = paired_difference("a", series(LORA), "b", others)
    assert found.seeds == 3
    assert found.mean == pytest.approx(np.mean(np.subtract(LORA[2:], CLOSE[:3])))


@pytest.mark.parametrize(("seeds", "has"), [(0, ""), (1, ""), (2, ""), (3, "t"), (4, "t"), (5, "tb")])
def test_intervals_need_enough_seeds(seeds: int, has: str) -> None:
    found = paired_difference("a", series(LORA[:seeds]), "b", series(LOWER[:seeds]))
    assert (found.student is not None, found.bootstrap is not None) == ("t" in has, "b" in has)
    assert found.sign == (1 if has else 0)


def test_equal_differences_give_intervals_of_zero_width() -> None:
    found = paired_difference("a", series([3.0] * 5), "b", series([1.0] * 5))
    assert found.student == found.bootstrap == (2.0, 2.0)


# ------------------------------------------------------------------------------------------------------------ findings


@pytest.mark.parametrize(
    ("confirmed", "present", "absent"),
    [
        pytest.param(
            {"lora": LORA, "B": LOWER, "head": LOWER},
            [
                "lora has the best mean of test/score: 80.00 ± 0.34 (mean ± standard error, five seeds)",
                "lora is clearly better than each of the other two variants",
                "B is clearly worse than lora (difference −3.96 points, 95 % interval −4.15 to −3.77, five seeds)",
                "trained parameters 67 %, adapter file size 67 %, fit time 100 %, peak memory 100 %",
                "The head alone is clearly worse than lora",
            ],
            ["cannot", "fewest"],
            id="clear winner, B clearly below LoRA",
        ),
        pytest.param(
            {"lora": LORA, "B": CLOSE},
            [
                "This sweep cannot tell lora from B",
                "B is within 0.46 points of lora (difference −0.04 points, 95 % interval −0.46 to +0.38, five seeds)",
                "this sweep cannot tell them apart",
                "B trains the fewest parameters (200,000, 67 % of lora)",
                "B may be up to 0.46 points worse",
            ],
            ["clearly", "pairs"],
            id="cannot tell",
        ),
        pytest.param(
            {"lora": LORA, "B": LORA, "head": CLOSE},
            [
                "This sweep shows no gain from adapters",
                "A gain of up to 0.46 points is not excluded",
                "B is within 0.00 points of lora",
                "3 pairs of variants were compared",
            ],
            ["adapters help", "clearly"],
            id="head alone as good",
        ),
        pytest.param(
            {"lora": LOWER, "B": LOWER, "head": LORA},
            ["The head alone is clearly better than lora", "adapters do not help here"],
            ["not excluded"],
            id="head better",
        ),
        pytest.param(
            {"lora": LOWER, "B": LORA},
            ["B is clearly better than lora", "difference +3.96 points"],
            ["cannot"],
            id="B above LoRA",
        ),
        pytest.param(
            {"lora": LORA[:2], "B": LOWER[:2], "head": LOWER[:2]},
            [
                "No interval is given for lora against B and head",
                "fewer than three confirmed seeds (2)",
                "The order of their means can be chance",
                "difference −3.85 points, two seeds, no interval",
            ],
            ["clearly", "95 %", "pay"],
            id="two seeds",
        ),
        pytest.param(
            {"lora": LORA[:1], "B": LOWER[:1]},
            ["lora has the best mean of test/score: 80.10 (one seed)", "No interval is given"],
            ["±", "clearly"],
            id="one seed",
        ),
        pytest.param(
            {"B": LORA},
            ["B reaches test/score 80.00 ± 0.34", "There is no second variant"],
            ["best", "clearly", "lora"],
            id="one variant",
        ),
        pytest.param(
            {"mine": LORA, "yours": CLOSE},
            ["This sweep cannot tell mine from yours (+0.04; −0.38 to +0.46)"],
            ["LoRA", "lora", "head"],
            id="variants of unknown kinds",
        ),
    ],
)
def test_findings_have_the_expected_phrases(
    confirmed: dict[str, list[float]], present: list[str], absent: list[str]
) -> None:
    text = words(confirmed)
    assert [phrase for phrase in present if phrase not in text] == [], text
    assert [phrase for phrase in absent if phrase in text] == [], text


def test_lower_is_better_for_losses() -> None:
    results = frame({"lora": LORA, "B": LOWER}).rename(columns={"test/score": "test/perplexity"})
    text = " ".join(findings(replace(facts_of(results), report=("test/perplexity",)), results))
    assert "B has the best mean of test/perplexity: 0.7604 ± 0.0040" in text
    assert "lower is better. B is clearly better than lora" in text
    assert "points" not in text


def test_selecting_mode_decides_the_direction_of_its_metric() -> None:
    results = frame({"lora": LORA, "B": LOWER})
    text = " ".join(findings(replace(facts_of(results), mode="min"), results))
    assert "B is clearly better than lora" in text


def test_findings_when_every_trial_failed() -> None:
    results = pd.DataFrame([failed(name, "select", seed) for name in ("B", "lora") for seed in (0, 1)])
    text = " ".join(findings(facts_of(results), results))
    assert text == (
        "No trial succeeded, so nothing can be compared. 4 failed. The most frequent error: train/loss is nan"
    )


def test_variant_without_results_is_named() -> None:
    results = pd.concat([frame({"lora": LORA, "B": LOWER}), pd.DataFrame([failed("full", "select", 0)])])
    text = " ".join(findings(facts_of(results), results))
    assert "full is missing from the comparison, since it has no confirmed result: 1 of its 1 trial failed." in text


def test_failed_confirmation_is_left_out_of_the_pairs_and_named() -> None:
    results = frame({"lora": LORA, "B": CLOSE})
    lost = (results["variant"] == "B") & (results["seed"] == 6)
    results.loc[lost, ["state", "test/score"]] = ["failed", np.nan]
    facts = facts_of(results)
    assert "1 of 5 confirming trials of B failed and is left out of its means." in findings(facts, results)[-1]
    table = difference_table(Outcome(facts, results))
    assert table[["seeds", "95 % bootstrap"]].to_numpy().tolist() == [["4", "–"]]
    assert main_table(Outcome(facts, results))["seeds"].tolist() == ["5", "4"]


def test_findings_of_an_unfinished_sweep_count_the_remaining_trials() -> None:
    results = frame({"lora": LORA, "B": CLOSE})
    results.loc[results["seed"] == 6, "state"] = "waiting"
    text = " ".join(findings(replace(facts_of(results), finished=False), results))
    assert f"two trials of {len(results)} are still to run" in text
    assert "cannot tell B from lora" in text


def test_results_of_an_earlier_choice_are_left_out() -> None:
    results = frame({"lora": LORA, "B": CLOSE})
    own = results["variant"] == "B"
    results["chosen"] = np.where(own, results["search/model.learning_rate"] == 0.001, results["chosen"])
    outcome = Outcome(facts_of(results), results)
    assert outcome.ranked == ["lora"]
    assert main_table(outcome)["test/score × 100 ↑"].tolist() == ["80.00 ± 0.34", "–"]


def test_introduction_names_the_metric_and_data_of_the_choice() -> None:
    results = frame({"lora": LORA, "B": CLOSE})
    facts = facts_of(results)
    text = introduction(facts, results)
    assert "two variants (lora and B) on conf/quickstart.yaml with trainer.max_epochs = 3" in text
    assert "seeds 0 and 1 chose learning_rate by the highest mean val/score" in text
    assert "come from other seeds: 2, 3, 4, 5 and 6" in text
    assert "test/score are shown times 100" in text
    assert "flatter" in introduction(replace(facts, confirm_seeds=()), results)
    assert "validation data, which made the choice too" in introduction(replace(facts, report=("val/score",)), results)


# -------------------------------------------------------------------------------------------------------------- tables


def test_table_of_variants() -> None:
    results = frame({"lora": LORA, "head": LOWER[:1]})
    table = main_table(Outcome(facts_of(results), results))
    assert table.to_dict("records") == [
        {
            "variant": "lora",
            "learning_rate": "0.002",
            "seeds": "5",
            "test/score × 100 ↑": "80.00 ± 0.34",
            "test/loss ↓": "0.5000 ± 0.0000",
            "trained parameters": "300,000",
            "adapter file": "1.2 MB",
            "fit time": "1 min",
            "peak memory": "1.1 GB",
        },
        {
            "variant": "head",
            "learning_rate": "0.002",
            "seeds": "1",
            "test/score × 100 ↑": "76.20",
            "test/loss ↓": "0.5000",
            "trained parameters": "100,000",
            "adapter file": "none",
            "fit time": "1 min",
            "peak memory": "1.1 GB",
        },
    ]


def test_rich_table_shows_control_characters() -> None:
    results = frame({"lo\x1b[31mra": LORA})
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(facts_of(results), results))
    assert "lo\\x1b[31mra" in console.export_text()


def test_scores_above_one_are_not_shown_as_percent() -> None:
    results = frame({"lora": [v * 100 for v in LORA], "B": [v * 100 for v in CLOSE]})
    assert "test/score ↑" in main_table(Outcome(facts_of(results), results))
    assert "points" not in " ".join(findings(facts_of(results), results))


# -------------------------------------------------------------------------------------------------------------- report


def test_report_of_a_complete_sweep(tmp_path: Path) -> None:
    results = frame({"lora": LORA, "B": CLOSE, "B16": CLOSE, "head": LOWER, "full": LORA})
    more = [failed("full", "select", 1, "CUDA out of memory | <b>"), trial("B", "select", 1, 0.008, state="pruned")]
    results = pd.concat([results, pd.DataFrame(more)], ignore_index=True)
    write_report(FACTS, results, tmp_path)
    page, table = (tmp_path / "report.html").read_text(), (tmp_path / "table.md").read_text()
    captions = re.findall(r"<figcaption><b>(.*?)</b>", page)
    assert len(check_single_file(page)) == 4
    assert captions == [
        "Paired differences in test/score with 95 % intervals",
        "val/score by learning_rate on the selecting seeds",
        "test/score by trained parameters",
        "val/score by optimizer step at the chosen points",
    ]
    assert "CUDA out of memory | &lt;b&gt;" in page
    assert "1 pruned" in page
    assert "B: the grid was extended to 0.004." in page
    assert "B: the grid was extended to 0.004." in table
    assert "| lora | 0.002 | 5 | 80.00 ± 0.34 |" in table
    assert all(sentence in table for sentence in findings(FACTS, results))


@pytest.mark.parametrize("rows", [[], [failed("B", "select", 0)], [trial("B", "select", 0, state="running")]])
def test_report_without_a_complete_trial(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    facts = replace(FACTS, finished=False)
    write_report(facts, pd.DataFrame(rows), tmp_path)
    assert "No trial is complete yet" in (tmp_path / "table.md").read_text()
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert rich_table(facts, pd.DataFrame(rows)).row_count == len(KEYS)


def test_report_works_with_missing_columns_and_null_curves(tmp_path: Path) -> None:
    results = frame({"lora": LORA, "B": CLOSE})[["variant", "phase", "point", "seed", "state", "chosen", "test/score"]]
    results["curve_steps"] = None
    write_report(facts_of(results), results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "No complete trial has a value of val/score and model.learning_rate yet." in page
    assert "No trial at a chosen point has validations of val/score yet." in page
    assert "Fewer than two variants have confirmed results with a number of parameters." in page


def test_report_reads_the_table_that_parquet_returns(tmp_path: Path) -> None:
    results = frame({"lora": LORA, "B": CLOSE})
    results.to_parquet(tmp_path / "results.parquet")
    write_report(facts_of(results), results, tmp_path / "a")
    write_report(facts_of(results), pd.read_parquet(tmp_path / "results.parquet"), tmp_path / "b")
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


def test_each_searched_key_has_a_figure(tmp_path: Path) -> None:
    results = frame({"lora": LORA, "B": CLOSE})
    results["search/model.adapter.init_a"] = ["svd", "orthogonal"] * (len(results) // 2)
    facts = replace(facts_of(results), search={**SEARCH, "model.adapter.init_a": ("svd", "orthogonal")})
    write_report(facts, results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "val/score by learning_rate on the selecting seeds" in page
    assert "val/score by init_a on the selecting seeds" in page


# ------------------------------------------------------------------------------------------------------------- figures


def test_response_joins_seed_means_and_marks_choice_and_failures() -> None:
    rows = [
        trial("B", "select", seed, rate, **{"val/score": rate * 100 + seed / 10}) for rate in RATES for seed in (0, 1)
    ]
    rows.append(failed("B", "select", 0) | {"search/model.learning_rate": 0.008, "point": "{}"})
    results = pd.DataFrame(rows)
    figure = figures.response(Outcome(facts_of(results), results), "model.learning_rate")
    assert figure is not None
    axes = figure.axes[0]
    line, ring = axes.lines
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[1] > 0.008
    assert line.get_xydata() == pytest.approx(np.array([[0.001, 15], [0.002, 25], [0.004, 45]]))
    assert ring.get_xydata() == pytest.approx(np.array([[0.002, 25]]))
    trials, crosses = axes.collections
    assert len(trials.get_offsets()) == 6
    assert crosses.get_offsets().tolist() == [pytest.approx([0.008, 0.03])]


def test_diverged_loss_is_marked_at_the_edge_and_does_not_squeeze_the_axis() -> None:
    losses = {0.001: 0.5, 0.002: 0.4, 0.004: 1e5}
    rows = [trial("B", "select", 0, rate, **{"val/loss": loss}) for rate, loss in losses.items()]
    results = pd.DataFrame(rows)
    facts = replace(facts_of(results), metric="val/loss", mode="min")
    figure = figures.response(Outcome(facts, results), "model.learning_rate")
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_ylim()[1] < 2
    assert axes.collections[1].get_offsets().tolist() == [pytest.approx([0.004, 0.97])]


def test_equal_scores_push_no_other_score_off_the_axis() -> None:
    scores = {0.001: 0.7, 0.002: 0.7, 0.004: 0.6}
    results = pd.DataFrame([trial("B", "select", 0, rate, **{"val/score": score}) for rate, score in scores.items()])
    figure = figures.response(Outcome(facts_of(results), results), "model.learning_rate")
    assert figure is not None
    trials, crosses = figure.axes[0].collections
    assert (len(trials.get_offsets()), len(crosses.get_offsets())) == (3, 0)


def test_curves_have_one_panel_for_each_variant_with_its_seeds_and_all_means() -> None:
    rows = [trial("B", "confirm", s, curve_steps=[5, 9], curve_values=[s / 10, s / 5]) for s in (2, 3, 4)]
    rows.append(trial("lora", "confirm", 2, curve_steps=[5, 9], curve_values=[0.1, np.nan]))
    results = pd.DataFrame([*rows, trial("B", "select", 0)])
    figure = figures.curves(Outcome(facts_of(results), results))
    assert figure is not None
    first, second, unused = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["B", "lora"]
    assert not unused.axison
    other, *seeds, mean = (line.get_xydata() for line in first.lines)
    assert mean == pytest.approx(np.array([[5, 30], [9, 60]]))
    assert seeds == [pytest.approx(np.array([[5, 10 * s], [9, 20 * s]])) for s in (2, 3, 4)]
    assert other[0] == pytest.approx([5, 10])
    assert first.get_ylim()[1] >= 80


def test_more_variants_than_colours_go_to_a_second_panel() -> None:
    names = [f"v{i}" for i in range(9)]
    results = frame(dict.fromkeys(names, LORA))
    figure = figures.response(Outcome(facts_of(results), results), "model.learning_rate")
    assert figure is not None
    shown = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert shown == [names[:7], names[7:]]


def test_forest_of_many_pairs_keeps_the_pairs_with_the_best_variant() -> None:
    results = frame({f"v{i}": [value - i for value in LORA] for i in range(7)})
    outcome = Outcome(facts_of(results), results)
    assert [(pair.first, pair.second) for pair in figures.forest_pairs(outcome)] == [
        ("v0", f"v{i}") for i in range(1, 7)
    ]
    assert len(difference_table(outcome)) == 21
