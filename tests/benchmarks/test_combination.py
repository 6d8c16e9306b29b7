"""The benchmark of combined updates against closed forms."""

from __future__ import annotations

import pytest

from benchmarks.combination import COUNT, KINDS, errors

EQUAL, ONE_A, DIFFERENT = KINDS


def test_errors_against_closed_forms() -> None:
    records = errors(width=24, rank=3)
    value = {method: {k: r and float(r["error"]) for k, r in kinds.items()} for method, kinds in records.items()}
    assert value["combine"][DIFFERENT] is None
    assert value["combine"][EQUAL] < 1e-6 and value["combine"][ONE_A] < 1e-6
    assert max(value["PEFT cat"].values()) < 1e-6
    # With √(w·s) on both sides, n equal adapters add up to n · B·A instead of B·A.
    assert value["PEFT linear"][EQUAL] == pytest.approx(COUNT - 1, rel=0.01)
    # Both truncations are the best approximation.
    assert value["combine --via svd"][DIFFERENT] == pytest.approx(value["PEFT svd"][DIFFERENT], rel=0.02)
    ranks = {method: {r["rank"] for r in kinds.values() if r} for method, kinds in records.items()}
    assert ranks == {m: {3 * COUNT if m == "PEFT cat" else 3} for m in records}
