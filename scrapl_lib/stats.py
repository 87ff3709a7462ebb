"""Means, intervals and paired tests, as the paper computes its Tables 1, 2 and 6."""

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

    One value has no spread: its half-width is NaN, which tables leave blank. Raises ValueError for none or non-finite ones.
    """
    array = _finite(values, "values", 1)
    half_width = 1.96 * array.std() / np.sqrt(len(array)) if len(array) > 1 else np.nan
    return float(array.mean()), float(half_width)


def paired_comparison(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of b - a, its 95 % half-width (t interval, sample std, n - 1 degrees of freedom), two-sided paired t-test p.

    a, b: (n,) values of the same seeds in the same order, n >= 2. Differences that are all equal have half-width 0 and
    p = 1 when they are zero, else 0. Raises ValueError for other lengths or non-finite values. (Table 6)
    """
    a, b = _finite(a, "a", 2), _finite(b, "b", 2)
    if len(a) != len(b):
        raise ValueError(f"paired values must match seed by seed, got {len(a)} and {len(b)}")
    difference = b - a
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    if error == 0:
        return float(mean), 0.0, 1.0 if mean == 0 else 0.0
    freedom = len(difference) - 1
    p_value = 2 * stats.t.sf(abs(mean) / error, freedom)
    return float(mean), float(stats.t.ppf(0.975, freedom) * error), float(p_value)
