"""Two ranks all-reduce the gradients of trained parameters and nothing else."""

from __future__ import annotations

from benchmarks.gradient_bytes import ARMS, measure


def test_each_trained_parameter_needs_four_bytes() -> None:
    rows = {row["arm"]: row for row in measure(quick=True, rounds=1)}
    assert list(rows) == list(ARMS)
    for row in rows.values():
        assert row["gradient_bytes"] == 4 * row["trained_parameters"] == row["expected_bytes"]
    assert rows["B"]["gradient_bytes"] < rows["both"]["gradient_bytes"] < rows["full"]["gradient_bytes"] / 5
    assert rows["B, frozen weights shared"]["gradient_bytes"] == rows["B"]["gradient_bytes"]
