"""Means, intervals and paired tests against hand-made numbers, SciPy's own test and the paper's Tables 1, 2 and 6."""

import math
import warnings

import numpy as np
import pytest
from scipy.stats import sem, ttest_1samp, ttest_ind_from_stats, ttest_rel

from replication.published import authors_seeds, published
from replication.stats import equivalence, holm, mean_ci95, paired_comparison, share_ci95, standard_error

SEEDS = authors_seeds().set_index(["method", "metric", "seed"])["value"].sort_index()
VARIANTS = ("scrapl_plain", "scrapl_padam", "scrapl_no_theta_is", "scrapl")
TABLE_2 = ("theta_synth_l1", "val_total_variation", "val_convergence_steps")


def test_paired_comparison_equals_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 12))
    mean, half_width, p_value = paired_comparison(a, b)
    test = ttest_rel(b, a)
    interval = test.confidence_interval(0.95)
    assert abs(mean - (b - a).mean()) < 1e-12 and abs(p_value - test.pvalue) < 1e-12
    assert abs(mean - half_width - interval.low) < 1e-12 and abs(mean + half_width - interval.high) < 1e-12


def test_without_spread():
    assert math.isnan(mean_ci95([42.4])[1])
    assert paired_comparison([1, 2, 3], [1, 2, 3]) == (0.0, 0.0, 1.0)
    assert paired_comparison([1, 2, 3], [3, 4, 5]) == (2.0, 0.0, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SciPy's own test warns here
        mean, half_width, p_value = paired_comparison([1, 2, 3], [1.1, 2.1, 3.1])
    assert abs(mean - 0.1) < 1e-12 and half_width < 1e-12 and p_value < 1e-12
    assert [equivalence(d, [(0.0, 3), (0.0, 20)], 2.0) for d in (-1.9, 2.0, 3.0)] == [0.0, 1.0, 1.0]


def test_bad_values_are_refused():
    for function, *values, match in (
        (mean_ci95, [], "at least 1"),
        (mean_ci95, [[1.0, 2.0]], "shape"),
        (mean_ci95, [1.0, math.nan], r"at \[1\]"),
        (paired_comparison, [1.0], [2.0], "at least 2"),
        (paired_comparison, [1.0, 2.0], [1.0, 2.0, 3.0], "2 and 3"),
        (paired_comparison, [1.0, 2.0], [1.0, math.inf], "b has non-finite"),
    ):
        with pytest.raises(ValueError, match=match):
            function(*values)


@pytest.mark.parametrize("method", VARIANTS)
def test_printed_tables_1_and_2_from_the_authors_seeds(method):
    """Table 6: test_tables_figures."""
    printed = [("table_2", metric) for metric in TABLE_2]
    printed += [("table_1", f"theta_{name}_l1") for name in ("density", "slope") if method in VARIANTS[2:]]
    for table, metric in printed:
        values, expected = SEEDS[method, metric], published(table, method, metric)
        mean, half_width = mean_ci95(values)
        assert len(values) == expected.n == 20
        assert abs(mean - expected.value) <= (0.5 if metric == "val_convergence_steps" else 0.05)
        digits = 3 if expected.ci95 > 600 else 2  # steps are printed to the step or to 3 digits
        assert abs(float(f"{half_width:.{digits}g}") - expected.ci95) <= 1e-9 * expected.ci95


@pytest.mark.parametrize("n", [2, 3, 20])
def test_standard_error_is_that_of_the_values(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    assert abs(standard_error(mean_ci95(a)[1], n) - sem(a)) < 1e-12
    assert abs(standard_error(paired_comparison(a, b)[1], n, paired=True) - sem(b - a)) < 1e-12


@pytest.mark.parametrize("mean", [9.3, 10.0, 11.1, 12.5, 6.0])
def test_equivalence_is_the_larger_of_scipys_two_one_sided_welch_tests(mean):
    """Ours with std 0.8 over 5, theirs 10 with std 2 over 20, margin 2."""
    shifted = [
        ttest_ind_from_stats(mean + shift, 0.8, 5, 10.0, 2.0, 20, equal_var=False, alternative=side).pvalue
        for shift, side in ((2, "greater"), (-2, "less"))
    ]
    found = equivalence(mean - 10.0, [(0.8 / math.sqrt(5), 5), (2.0 / math.sqrt(20), 20)], 2.0)
    assert abs(found - max(shifted)) < 1e-12 and (found < 0.05) == (mean in (9.3, 10.0))


def test_equivalence_with_a_fixed_number_is_a_one_sample_test():
    values = [41.0, 43.5, 44.0, 46.0]
    margin = 0.2 * 42.4
    expected = max(
        ttest_1samp(values, 42.4 - margin, alternative="greater").pvalue,
        ttest_1samp(values, 42.4 + margin, alternative="less").pvalue,
    )
    assert abs(equivalence(np.mean(values) - 42.4, [(sem(values), 4)], margin) - expected) < 1e-12


@pytest.mark.parametrize(("k", "n"), [(8, 10), (20, 20), (0, 5)])
def test_share_ci95_is_wilsons_interval(k, n):
    z = 1.959964
    share, scale = k / n, 1 + z * z / n
    half_width = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    by_hand = [(share + z * z / (2 * n)) / scale + sign * half_width for sign in (-1, 1)]
    assert np.abs(np.array(share_ci95(100 * k / n, n)) / 100 - by_hand).max() < 1e-6


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not be below the one before."""
    assert np.abs(holm([0.01, 0.04, 0.03, 0.005]) - [0.03, 0.06, 0.06, 0.02]).max() < 1e-12
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    found = holm([math.nan, 0.02, math.nan, 0.01])  # tests not made do not count
    assert np.isnan(found[[0, 2]]).all() and np.abs(found[[1, 3]] - 0.02).max() < 1e-12
    assert holm([]).tolist() == [] and np.isnan(holm([math.nan])).all()
