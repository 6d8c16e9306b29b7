from __future__ import annotations

import json
from typing import Any

import pytest

from app.cli import parse_fit
from app.config.variants import VARIANTS
from app.sweep.check import fit_arguments
from app.sweep.plan import Plan, Range, SweepError, grid_points, parse_plan
from tests.app.sweep.conftest import CONTENT


def content(**changes: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(CONTENT)) | changes
    return {key: value for key, value in changed.items() if value is not None}


def plan(**changes: Any) -> Plan:
    return parse_plan(content(**changes), "tiny", parse_fit)


def test_variants_are_built_in_names_or_keys() -> None:
    variants = {
        "B": {},
        "lora": None,
        "wide": {"variant": "B", "model.adapter.rank": 16},
        "own": {"model.tuning": "head", "model.init_args.weight_decay": 0.1},
    }
    keys_by_name = {variant.name: variant.keys for variant in plan(variants=variants).variants}
    assert keys_by_name == {
        "B": VARIANTS["B"],
        "lora": VARIANTS["lora"],
        "wide": {**VARIANTS["B"], "model.adapter.rank": 16},
        "own": {"model.tuning": "head", "model.weight_decay": 0.1},
    }
    assert [variant.name for variant in plan(variants=["A", "head"]).variants] == ["A", "head"]


def test_search_values_are_numbers_in_ascending_order() -> None:
    rates = plan(search={"model.learning_rate": [0.01, "1e-3", "3E-3"]}).variants[0].search
    assert rates == {"model.learning_rate": (0.001, 0.003, 0.01)}
    sampled = plan(search={"model.learning_rate": {"low": "1e-4", "high": 1, "log": True}}, trials_per_variant=9)
    assert sampled.search == {"model.learning_rate": Range(1e-4, 1, log=True)}
    assert sampled.is_sampled


def test_a_variant_may_have_its_own_search_values() -> None:
    variants = {"B": {}, "full": {"search": {"model.learning_rate": [1e-5, 1e-4, 1e-3]}}}
    first, second = plan(variants=variants).variants
    assert [point["model.learning_rate"] for point in grid_points(first)] == [0.001, 0.002, 0.004]
    assert [point["model.learning_rate"] for point in grid_points(second)] == [1e-5, 1e-4, 1e-3]
    assert "search" not in second.keys


def test_arguments_of_a_trial_have_one_value_for_each_key() -> None:
    tiny = plan(set={"trainer.max_epochs": 2, "model.adapter.rank": 4, "data.mean": [0.5, 0.1]})
    words = fit_arguments(tiny, tiny.variants[1], {"model.learning_rate": 0.002}, seed=7)
    assert words[:3] == ["fit", "--config", "tests/conf/image.yaml"]
    for word in (
        "--trainer.max_epochs=2",
        "--model.adapter.rank=16",  # the key of the variant overrides the key of the sweep
        "--data.mean=[0.5, 0.1]",
        "--model.learning_rate=0.002",
        "--model.adapter.train=B",
        "--seed_everything=7",
        "--model.adapter.seed=7",
    ):
        assert words.count(word) == 1
    assert len({word.partition("=")[0] for word in words[3:]}) == len(words[3:])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"varaints": {}}, "no key varaints in a sweep; did you mean variants"),
    ({"select": {"metrics": "val/loss"}}, "no key select.metrics in a sweep; did you mean select.metric"),
    ({"select": None}, "select: the key is missing"),
    ({"select": {"mode": "min"}}, "select.metric: the key is missing"),
    ({"select": {"metric": "test/acc1"}}, "select.metric: test/acc1: a metric of the test split cannot choose a point"),
    ({"select": {"metric": "train/loss"}}, "select.metric: train/loss: this metric cannot choose a point"),
    ({"select": {"metric": "val/loss", "mode": "least"}}, "select.mode: 'least' is not known. Choose one of max, min"),
    ({"select": {"metric": "val/loss", "seeds": []}}, "select.seeds: [] is no list of seeds"),
    ({"select": {"metric": "val/loss", "seeds": [0, 0]}}, "select.seeds: [0, 0] has a seed twice"),
    ({"confirm": {"seeds": [-1]}}, "confirm.seeds: [-1] is no list of seeds"),
    ({"confirm": {"seeds": [0]}}, "confirm.seeds: 0 is in select.seeds too"),
    ({"base": []}, "base: [] is no list of names"),
    ({"base": ["conf/nowhere.yaml"]}, "base: there is no file 'conf/nowhere.yaml'"),
    ({"set": {"data": {"task": "cola"}}}, "set.data: write the key with dots"),
    ({"set": {"seed_everything": 3}}, "set.seed_everything: the sweep sets this key"),
    ({"set": {"model.learning_rate": 3}}, "set.model.learning_rate: search has this key too"),
    ({"variants": {}}, "variants: there is no variant"),
    ({"variants": {"lorra": {}}}, "variants.lorra: 'lorra' is not known; did you mean lora?"),
    ({"variants": {"x": {"variant": "Bee"}}}, "variants.x: 'Bee' is not known"),
    ({"variants": {"a/b": {"variant": "B"}}}, "variants.a/b: 'a/b' cannot name a variant"),
    ({"variants": {"B": 3}}, "variants.B: 3 is no mapping"),
    ({"variants": {"B": {"model.learning_rate": 1}}}, "variants.B.model.learning_rate: search has this key too"),
    ({"variants": {"B": {"search": {"data.x": [1]}}}}, "variants.B.search.data.x: search does not have this key"),
    ({"search": {"model.learning_rate": []}}, "search.model.learning_rate: [] is neither a list of values"),
    ({"search": {"model.learning_rate": [0.1, "1e-1"]}}, "has a value twice"),
    ({"search": {"model.learning_rate": {"low": 1}}}, "search.model.learning_rate.high: the key is missing"),
    ({"search": {"model.learning_rate": {"low": 2, "high": 1}}}, "low 2 and high 1 are no range"),
    ({"search": {"model.learning_rate": {"low": 0, "high": 1, "log": True}}}, "low: 0 has no logarithm"),
    ({"search": {"model.learning_rate": {"low": 0, "high": 1}}}, "trials_per_variant: search has a range"),
    ({"trials_per_variant": 2}, "trials_per_variant: 2 is less than the 3 points of search"),
    ({"trials_per_variant": 0}, "trials_per_variant: 0 is no number of trials"),
    (
        {"variants": {"B": {}, "A": {"search": {"model.learning_rate": [0.1, 0.2]}}}},
        "search: the variants try different numbers of points (B 3, A 2)",
    ),
    ({"prune": "third"}, "prune: 'third' is not known. Choose one of none, median, halving, hyperband"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_files_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError) as error:
        plan(**changes)
    assert message in str(error.value)
