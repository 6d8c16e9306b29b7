"""Statistics of a sweep: means over seeds, paired differences between variants and their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

LEVEL = 0.95
STUDENT_SEEDS = 3  # fewest seeds for an interval: two seeds give ± 12.7 standard errors
BOOTSTRAP_SEEDS = 5  # fewest seeds for a bootstrap interval: with four seeds, resamples have only 35 distinct means
RESAMPLES = 9999


@dataclass(frozen=True)
class Mean:
    """Mean over seeds.

    Args:
        value: The mean; NaN without seeds.
        error: Standard error of the mean, s / sqrt(n) with the sample's standard deviation s; None below two
            seeds.
        seeds: Number of seeds n.
    """

    value: float
    error: float | None
    seeds: int


@dataclass(frozen=True)
class PairedDifference:
    """Difference between two variants over the seeds that both have, first minus second.

    Args:
        first: Name of a variant.
        second: Name of the variant that is subtracted.
        mean: Mean of the differences; NaN without seeds.
        seeds: Number of shared seeds.
        student: 95 % Student interval of the mean difference; None below `STUDENT_SEEDS`.
        bootstrap: 95 % percentile interval of the bootstrap; None below `BOOTSTRAP_SEEDS`.
    """

    first: str
    second: str
    mean: float
    seeds: int
    student: tuple[float, float] | None
    bootstrap: tuple[float, float] | None

    @property
    def sign(self) -> int:
        """Return 1 or -1 if the Student interval lies on one side of zero, otherwise 0.

        The Student interval decides, since a bootstrap interval from few seeds is too narrow. For normal differences, a
        bootstrap interval holds the true difference in 84 % of cases with five seeds and in 92 % with twenty. A Student
        interval holds the true difference in 95 %.
        """
        if self.student is None:
            return 0
        low, high = self.student
        return int(low > 0) - int(high < 0)


def mean_over_seeds(values: pd.Series[float]) -> Mean:
    """Return the mean and its standard error of values, one for each seed."""
    count = len(values)
    if not count:
        return Mean(float("nan"), None, 0)
    return Mean(float(values.mean()), float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else None, count)


def paired_difference(
    first: str, first_values: pd.Series[float], second: str, second_values: pd.Series[float]
) -> PairedDifference:
    """Compare two variants over their shared seeds.

    Args:
        first: Name of a variant.
        first_values: Metric of the first variant, indexed by seed.
        second: Name of the variant that is subtracted.
        second_values: Metric of the second variant, indexed by seed.

    Returns:
        The mean difference with a Student interval and a bootstrap interval (Efron, 1979, percentile method).
        Seeds are resampled, and both variants of a seed stay together.
    """
    differences = (first_values - second_values).dropna().sort_index().to_numpy(dtype=np.float64)
    count = len(differences)
    mean = float(differences.mean()) if count else float("nan")
    student = student_interval(differences) if count >= STUDENT_SEEDS else None
    bootstrap = bootstrap_interval(differences) if count >= BOOTSTRAP_SEEDS else None
    return PairedDifference(first, second, mean, count, student, bootstrap)


def student_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t. Equal values give an interval of zero width."""
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def bootstrap_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean's bootstrap; the same values give the same interval."""
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)
