"""Correlation of length and label: rank statistics for classes and for a regression."""

from __future__ import annotations

from torch import Tensor

STRONG_ETA_SQUARED = 0.25
STRONG_RHO = 0.5  # The square root of STRONG_ETA_SQUARED: the same share of the ranks' variance.


def rank_eta_squared(values: Tensor, classes: Tensor) -> float:
    """Return the effect of the class on the values: the share of the ranks' variance that lies between classes.

    The share is (H - k + 1) / (n - k) with H of Kruskal and Wallis for k classes and n values (Tomczak and Tomczak
    2014, The need to report effect size estimates revisited). The share is near 0 if the class has no effect, and
    at most 1. The result is 0 if the share is not defined: a single class, a class for each value, or equal values.

    Args:
        values: Numbers, (size,).
        classes: Class of each number, (size,).
    """
    import pandas as pd  # A run on images does not import the library.

    ranks = pd.Series(values.numpy()).rank()
    groups = ranks.groupby(classes.numpy())
    n, k, variance = len(ranks), groups.ngroups, ranks.var()
    if k in (1, n) or variance == 0:
        return 0.0
    within = float((ranks - groups.transform("mean")).pow(2).sum()) / (n - k)
    return 1 - within / float(variance)  # H is n - 1 times the share of the sum of squares between classes.


def strong_effect(lengths: Tensor, labels: Tensor) -> str | None:
    """Return in words how strongly length and label correlate; None unless the correlation is strong.

    Args:
        lengths: Length of each sample, (size,).
        labels: Classes (size,) int64, or scores (size,) of a floating dtype.
    """
    if labels.is_floating_point():
        import pandas as pd

        ranks = pd.DataFrame({"length": lengths.numpy(), "score": labels.numpy()}).rank()
        rho = ranks.corr().loc["length", "score"]  # NaN if lengths or scores are constant
        return f"Spearman's rank correlation {rho:.2f}" if abs(rho) >= STRONG_RHO else None
    eta = rank_eta_squared(lengths, labels)
    return f"the label explains {eta:.0%} of the variation in length" if eta >= STRONG_ETA_SQUARED else None
