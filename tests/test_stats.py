"""Means, intervals and paired tests against hand-made numbers, SciPy's own test and the paper's Tables 1, 2 and 6."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from scrapl_lib.paper import authors_seeds, published
from scrapl_lib.stats import mean_ci95, paired_comparison

SEEDS = authors_seeds().set_index(["method", "metric", "seed"])["value"].sort_index()
STEPS = {"plus_padam": ("scrapl_plain", "scrapl_padam"), "plus_psaga": ("scrapl_padam", "scrapl_no_theta_is"),
         "plus_theta_is": ("scrapl_no_theta_is", "scrapl")}  # fmt: skip
TABLE_2 = {"test_theta_synth_l1": "theta_synth_l1", "val_total_variation": "val_total_variation",
           "val_convergence_steps": "val_convergence_steps"}  # fmt: skip


def round_as_printed(value, digits):
    return float(f"{value:.{digits}g}")


def test_mean_ci95_by_hand():
    mean, half_width = mean_ci95([1.0, 2.0, 3.0, 6.0])
    assert abs(mean - 3.0) < 1e-12
    assert abs(half_width - 1.96 * math.sqrt(14 / 4) / 2) < 1e-12  # population variance 14/4, n = 4


def test_mean_ci95_of_one_seed_has_no_half_width():
    mean, half_width = mean_ci95([42.4])
    assert mean == 42.4 and math.isnan(half_width)


def test_paired_comparison_equals_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 12))
    mean, half_width, p_value = paired_comparison(a, b)
    test = ttest_rel(b, a)
    interval = test.confidence_interval(0.95)
    assert abs(mean - (b - a).mean()) < 1e-12 and abs(p_value - test.pvalue) < 1e-12
    assert abs(mean - half_width - interval.low) < 1e-12 and abs(mean + half_width - interval.high) < 1e-12


def test_paired_comparison_without_spread():
    assert paired_comparison([1, 2, 3], [1, 2, 3]) == (0.0, 0.0, 1.0)
    assert paired_comparison([1, 2, 3], [3, 4, 5]) == (2.0, 0.0, 0.0)


@pytest.mark.parametrize("values, match", [([], "at least 1"), ([[1.0, 2.0]], "shape"), ([1.0, float("nan")], r"at \[1\]")])
def test_mean_ci95_refuses(values, match):
    with pytest.raises(ValueError, match=match):
        mean_ci95(values)


@pytest.mark.parametrize("a, b, match", [([1.0], [2.0], "at least 2"), ([1.0, 2.0], [1.0, 2.0, 3.0], "2 and 3"),
                                         ([1.0, 2.0], [1.0, math.inf], "b has non-finite")])  # fmt: skip
def test_paired_comparison_refuses(a, b, match):
    with pytest.raises(ValueError, match=match):
        paired_comparison(a, b)


@pytest.mark.parametrize("method", ["scrapl_plain", "scrapl_padam", "scrapl_no_theta_is", "scrapl"])
@pytest.mark.parametrize("metric", TABLE_2)
def test_printed_table_2_from_the_authors_seeds(method, metric):
    values = SEEDS[method, TABLE_2[metric]]
    mean, half_width = mean_ci95(values)
    printed = published("table_2", method, metric)
    assert len(values) == printed.n == 20
    assert abs(mean - printed.value) <= (0.5 if metric == "val_convergence_steps" else 0.05)
    digits = 3 if printed.ci95 > 600 else 2  # steps are printed to the step or to 3 digits
    assert abs(round_as_printed(half_width, digits) - printed.ci95) <= 1e-9 * printed.ci95


@pytest.mark.parametrize("method", ["scrapl_no_theta_is", "scrapl"])
@pytest.mark.parametrize("metric", ["theta_synth_l1", "theta_density_l1", "theta_slope_l1"])
def test_printed_table_1_from_the_authors_seeds(method, metric):
    mean, half_width = mean_ci95(SEEDS[method, metric])
    printed = published("table_1", method, metric)
    assert abs(mean - printed.value) <= 0.05
    assert abs(round_as_printed(half_width, 2) - printed.ci95) <= 1e-9


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("metric", TABLE_2)
def test_printed_table_6_from_the_authors_seeds(step, metric):
    before, after = (SEEDS[method, TABLE_2[metric]].to_numpy() for method in STEPS[step])
    assert len(before) == len(after) == 20  # no seed is missing, convergence included
    mean, half_width, p_value = paired_comparison(before, after)
    printed = published("table_6", step, f"delta_{metric}")
    digits = 2 if abs(printed.value) in (2900, 710) else 3  # as printed: -12.3, 1.68, -2900, -710, -1280
    assert round_as_printed(mean, digits) == printed.value
    assert round_as_printed(half_width, 2) == printed.ci95
    printed_p = published("table_6", step, f"delta_{metric}_p_value").value
    assert p_value < 0.01 if printed_p == "<0.01" else round(p_value, 2) == printed_p
