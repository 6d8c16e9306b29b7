"""RUN/evaluations.json: one entry for each step, split and set of differences. A resume drops later steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.run.evaluations import (
    STATE,
    Evaluation,
    add_evaluation,
    drop_evaluations_after,
    evaluations_of_checkpoint,
    metrics_of_split,
    read_evaluations,
)


def evaluation(step: int, value: float = 0.5, split: str = "test", differences: tuple[str, ...] = ()) -> Evaluation:
    return Evaluation(split, step, differences, {f"{split}/acc1": value})


def test_a_repeated_evaluation_replaces_the_earlier_one(tmp_path: Path) -> None:
    others = [evaluation(8), evaluation(8, split="val"), evaluation(8, differences=("data.path",)), evaluation(16)]
    for entry in (*others, evaluation(8, 0.9)):
        add_evaluation(tmp_path, entry)
    assert read_evaluations(tmp_path) == [*others[1:], evaluation(8, 0.9)]


def test_names_with_spaces_are_kept_and_names_with_control_characters_left_out(tmp_path: Path) -> None:
    kept = {"test/subjects/high school physics": 0.25, "test/subjects/C++ (2nd)": 0.5, "test/acc": 0.4}
    left_out = {"test/a\nb": 1.0, "test/\x1b[2J": 1.0, "test/": 1.0, f"test/{'a' * 101}": 1.0, "val/acc": 1.0}
    assert metrics_of_split(kept | left_out, "test") == kept
    add_evaluation(tmp_path, Evaluation("test", 8, (), kept))
    assert read_evaluations(tmp_path)[0].metrics == kept


def test_a_resumed_run_keeps_the_evaluations_up_to_its_step(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        add_evaluation(tmp_path, evaluation(step))
    drop_evaluations_after(tmp_path, 8)
    assert read_evaluations(tmp_path) == [evaluation(7), evaluation(8)]


def test_a_checkpoint_has_the_evaluations_of_its_own_step(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        add_evaluation(tmp_path, evaluation(step))
    saved = {"split": "val", "step": 8, "differences": [], "metrics": {"val/acc1": 0.7, "val/odd": float("nan")}}
    checkpoint: dict[str, Any] = {"global_step": 8, "callbacks": {STATE: saved}}
    assert evaluations_of_checkpoint(checkpoint, tmp_path) == [evaluation(8, 0.7, "val"), evaluation(8)]
    assert evaluations_of_checkpoint(checkpoint, None) == [evaluation(8, 0.7, "val")]
    assert evaluations_of_checkpoint({"global_step": 8, "callbacks": {STATE: saved | {"step": 7}}}, None) == []
