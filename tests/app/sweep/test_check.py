from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from app.cli import parse_fit, restricted_imports
from app.config.yaml_files import checked_yaml
from app.sweep.check import check_plan, logged_metrics
from app.sweep.plan import SweepError, parse_plan
from tests.app.sweep.test_plan import content


@pytest.fixture(autouse=True)
def as_in_main() -> Iterator[None]:
    with restricted_imports(), checked_yaml():
        yield


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"variants": {"B": {}, "x": {"variant": "A", "model.adaptor.rank": 3}}},
        "variants.x at learning_rate 0.001: model: ImageClassifier has no key adaptor.rank; did you mean adapter",
    ),
    ({"variants": {"x": {"model.adapter.rank": "many"}}}, "variants.x at learning_rate 0.001: model.adapter.rank"),
    ({"search": {"model.learning_rate": [0.1, "fast"]}}, "variants.B at learning_rate fast: model.learning_rate"),
    ({"set": {"trainer.max_epoch": 1}}, "There is no key trainer.max_epoch; did you mean trainer.max_epochs"),
    ({"set": {"data.task": "cola"}}, "has no key task"),
    ({"select": {"metric": "val/score"}}, "select.metric: no trial would log val/score"),
    ({"confirm": {"seeds": [2], "report": ["test/los"]}}, "no trial would log test/los; did you mean test/loss?"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_sweeps_with_invalid_fits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError) as error:
        check_plan(parse_plan(content(**changes), "tiny", parse_fit), parse_fit)
    assert message in str(error.value)


def test_every_built_in_variant_is_parsed() -> None:
    plan = parse_plan(
        content(variants=["B", "A", "lora", "lora-fa", "rslora", "lora+", "head", "full"]), "tiny", parse_fit
    )
    check_plan(plan, parse_fit)


@pytest.mark.parametrize(
    ("config", "options", "metrics"),
    [
        ("image", [], ["loss", "acc1", "acc5", "macro_f1", "ece"]),
        ("text", ["--data.task=cola"], ["score", "loss", "matthews", "macro_f1", "ece"]),
        (
            "text",
            ["--data.task=mnli"],
            [
                "score",
                "loss",
                *(f"{n}_{s}" for n in ("accuracy", "macro_f1", "ece") for s in ("matched", "mismatched")),
            ],
        ),
        ("text", ["--data.task=null", "--model.metrics=[f1]"], ["score", "loss", "f1", "macro_f1", "ece"]),
        ("summary", [], ["loss", "rouge1", "rouge2", "rougeL", "rougeLsum"]),
        ("instructions", [], ["loss", "perplexity", "token_acc"]),
    ],
)
def test_logged_metrics_of_each_model(config: str, options: list[str], metrics: list[str]) -> None:
    assert logged_metrics(parse_fit(["--config", f"tests/conf/{config}.yaml", *options])) == metrics
