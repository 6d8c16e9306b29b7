from __future__ import annotations

from typing import Any

import pytest

from app.cli import parse_fit
from app.sweep.plan import Plan, parse_plan
from app.sweep.schedule import Job, Outline, Record, outline
from tests.app.sweep.test_plan import content

KEY = "model.learning_rate"


def plan(values: list[Any], **changes: Any) -> Plan:
    return parse_plan(content(variants={"B": {}, "A": {}}, search={KEY: values}, **changes), "tiny", parse_fit)


def job(variant: str, value: Any, seed: int, phase: Any = "select") -> Job:
    return Job(variant, phase, f'{{"{KEY}": {value}}}', seed)


def finished(scores: dict[str, dict[Any, Any]], phase: Any = "select", seeds: tuple[int, ...] = (0, 1)) -> list[Record]:
    """Return records of trials with these scores, by variant and value. A score of None is a failed trial."""
    return [
        Record(job(v, value, seed, phase), "complete" if score is not None else "failed", score)
        for v, of_values in scores.items()
        for value, score in of_values.items()
        for seed in seeds
    ]


def left(sweep: Plan, records: list[Record]) -> Outline:
    return outline(sweep, records, {})


def test_all_points_come_before_the_choice() -> None:
    sweep = plan([1, 2, 4])
    start = left(sweep, [])
    assert start.needed[:3] == [job("B", 1, 0), job("A", 1, 0), job("B", 2, 0)]
    assert len(start.needed) == 12
    assert start.expected == 12 + 4
    done = finished({"B": {1: 0.1, 2: 0.3, 4: 0.2}, "A": {1: 0.1, 2: 0.3}})
    assert left(sweep, done).needed == [job("A", 4, 0), job("A", 4, 1)]
    running = [*done, Record(job("A", 4, 0), "running"), Record(job("A", 4, 1), "complete", 0.2)]
    assert left(sweep, running).needed == [job("A", 4, 0)]
    assert not left(sweep, running).chosen


def test_best_mean_over_seeds_is_confirmed() -> None:
    sweep = plan([1, 2, 4])
    records = finished({"B": {1: 0.1, 2: 0.3, 4: 0.2}, "A": {1: 0.1, 2: 0.2, 4: 0.1}})
    outcome = left(sweep, records)
    assert outcome.chosen == {"B": job("B", 2, 0).point, "A": job("A", 2, 0).point}
    assert outcome.needed == [job(v, 2, seed, "confirm") for seed in (2, 3) for v in ("B", "A")]
    confirmed = finished({"B": {2: 0.3}, "A": {2: 0.3}}, "confirm", (2, 3))
    assert left(sweep, [*records, *confirmed]).is_finished
    lowest = parse_plan(
        content(search={KEY: [1, 2, 4]}, select={"metric": "val/loss", "mode": "min"}), "tiny", parse_fit
    )
    scores = {1: 0.2, 2: 0.1, 4: 0.3}
    assert left(lowest, finished({"B": scores, "B16": scores}, seeds=(0,))).chosen["B"] == job("B", 2, 0).point


@pytest.mark.parametrize("state", ["failed", "pruned"])
def test_point_with_an_unfinished_seed_ranks_last(state: Any) -> None:
    sweep = plan([1, 2, 4, 8])
    records = finished({"B": {1: 0.1, 2: 0.3, 4: 0.2, 8: 0.1}, "A": {1: 0.1, 2: 0.3, 4: 0.2, 8: None}})
    records = [r for r in records if r.job != job("B", 2, 1)] + [Record(job("B", 2, 1), state)]
    assert left(sweep, records).chosen["B"] == job("B", 4, 0).point
    nothing = left(sweep, finished({"B": dict.fromkeys((1, 2, 4, 8)), "A": {1: 0.1, 2: 0.3, 4: 0.2, 8: 0.1}}))
    assert "B" not in nothing.chosen
    assert nothing.notes == ["B: no point is chosen, since no point is complete with all seeds."]


@pytest.mark.parametrize(
    ("values", "best", "extended", "between"),
    [
        ([0.001, 0.002, 0.004], 0.004, 0.008, 0.0014),  # constant factor
        ([0.001, 0.003, 0.01], 0.01, 0.033, 0.0017),
        ([0.001, 0.002, 0.004], 0.001, 0.0005, 0.0014),
        ([0.1, 0.2, 0.3], 0.3, 0.4, 0.15),  # constant step
        ([8, 16, 64], 64, 256, 11),  # integers stay integers
    ],
)
def test_grid_is_extended_once_and_other_variants_get_as_many_trials(
    values: list[Any], best: Any, extended: Any, between: Any
) -> None:
    sweep = plan(values)
    at_end = {v: 0.9 if v == best else 0.1 for v in values}
    inside = {values[0]: 0.5, values[1]: 0.9, values[2]: 0.1}  # the better neighbour is the lower one
    records = finished({"B": at_end, "A": inside})
    outcome = left(sweep, records)
    assert outcome.needed == [job(*pair, seed) for seed in (0, 1) for pair in (("B", extended), ("A", between))]
    assert outcome.notes[0] == (
        f"B: the best {KEY} of the grid, {best:g}, lies at its end, so the grid was extended to {extended:g}."
    )
    after = left(sweep, [*records, *finished({"B": {extended: 1.0}, "A": {between: 0.2}})])
    assert after.chosen == {"B": job("B", extended, 0).point, "A": job("A", values[1], 0).point}
    assert {j.phase for j in after.needed} == {"confirm"}  # no second extension


def test_no_extension_below_zero_or_of_strings() -> None:
    zero = left(plan([0.0, 0.1, 0.2]), finished({v: {0.0: 0.9, 0.1: 0.2, 0.2: 0.1} for v in "BA"}))
    assert not zero.extra
    words = parse_plan(content(variants={"B": {}}, search={"model.schedule": ["linear", "cosine"]}), "tiny", parse_fit)
    points = ['{"model.schedule": "linear"}', '{"model.schedule": "cosine"}']
    records = [Record(Job("B", "select", point, seed), "complete", 0.1) for point in points for seed in (0, 1)]
    assert left(words, records).chosen == {"B": points[0]}


def test_one_point_needs_no_choice() -> None:
    outcome = left(plan([3]), [])
    assert outcome.needed == [job(v, 3, seed, "confirm") for seed in (2, 3) for v in ("B", "A")]


def test_sampling_starts_with_the_variant_that_misses_most_points() -> None:
    ranged = {"search": {KEY: {"low": 1, "high": 9}}, "trials_per_variant": 2}
    sweep = parse_plan(content(variants={"B": {}, "A": {}}, **ranged), "tiny", parse_fit)
    outcome = outline(sweep, [Record(job("B", 3, 0), "complete", 0.1)], {"B": [job("B", 3, 0).point], "A": []})
    assert outcome.sampling == ["A", "B"]
    assert outcome.needed == [job("B", 3, 1)]
    assert outcome.expected == 2 + 3 * 2 + 4
