"""Means, intervals and paired tests, as in the paper's Tables 1, 2 and 6; tests of ours against printed numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def _finite(values: Sequence[float], name: str, least: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < least:
        raise ValueError(f"{name} must be a list of at least {least} number(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array)).tolist()
        raise ValueError(f"{name} has non-finite values at {bad}; leave those runs out and say how many they were")
    return array


def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Mean and 95 % half-width 1.96 * population std / sqrt(n), in the unit of `values` (n,).

    One value has no spread: its half-width is NaN, a blank in tables. Raises ValueError for none or non-finite ones.

    >>> mean_ci95([1.0, 3.0])  # 1.96 * 1 / sqrt(2)
    (2.0, 1.3859292911256331)
    """
    array = _finite(values, "values", 1)
    half_width = 1.96 * array.std() / np.sqrt(len(array)) if len(array) > 1 else np.nan
    return float(array.mean()), float(half_width)


def paired_comparison(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of b - a, its 95 % half-width (t interval, n - 1 degrees of freedom), two-sided paired t-test p. (Table 6)

    a, b: (n,) values of the same seeds in the same order, n >= 2. Differences that are all equal have half-width 0 and
    p = 1 when they are zero, else 0. Raises ValueError for other lengths or non-finite values.
    """
    a, b = _finite(a, "a", 2), _finite(b, "b", 2)
    if len(a) != len(b):
        raise ValueError(f"paired values must match seed by seed, got {len(a)} and {len(b)}")
    mean, error, freedom = float((b - a).mean()), stats.sem(b - a), len(a) - 1
    if error == 0:
        return mean, 0.0, float(mean == 0)
    # as stats.ttest_rel, which also warns where the differences are nearly equal
    return mean, float(stats.t.ppf(0.975, freedom) * error), float(2 * stats.t.sf(abs(mean) / error, freedom))


def standard_error(half_width: float, n: int, paired: bool = False) -> float:
    """Sample std / sqrt(n) behind a 95 % half-width over n values, of `mean_ci95` or (paired) `paired_comparison`."""
    if paired:
        return float(half_width / stats.t.ppf(0.975, n - 1))
    return float(half_width / 1.96 * np.sqrt(n / (n - 1)))


def equivalence(difference: float, sides: Sequence[tuple[float, int]], margin: float) -> float:
    """The larger p-value of two one-sided t-tests (TOST, Schuirmann 1987): small when a difference of means lies
    between -margin and margin. Without any spread it is 0 or 1.

    sides: (standard error, n) of the two means (Welch's test), or of the one that is compared with a fixed number.
    """
    variances, freedoms = np.array([(error**2, n - 1) for error, n in sides]).T
    if not variances.any():
        return float(abs(difference) >= margin)
    freedom = variances.sum() ** 2 / (variances**2 / freedoms).sum()
    return float(stats.t.sf((margin - abs(difference)) / np.sqrt(variances.sum()), freedom))


def share_ci95(percent: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval, in percent, of a share of n."""
    low, high = stats.binomtest(round(percent * n / 100), n).proportion_ci(0.95, "wilson")
    return 100 * low, 100 * high


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values (n,) corrected for all of them together (Holm 1979): the i-th smallest of m times m - i + 1, at least
    the one before it, at most 1. NaN, a test not made, stays and does not count."""
    p_values = np.asarray(p_values, dtype=np.float64)
    corrected = np.full_like(p_values, np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN sort last
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1)
    return corrected
