"""The published numbers are found under this project's names, and mistakes are answered with the nearest entry.

The authors' values by seed are held by the printed Tables 1, 2 and 6: test_stats, test_tables_figures.
"""

import math

import pandas as pd
import pytest

from replication.published import DATA, NAMES, find, published, step_ms
from replication.tasks import methods_of


def test_known_numbers():
    assert published("table_2", "scrapl_no_theta_is", "theta_synth_l1") == (73.8, 13.0, 20)  # P-Adam + P-SAGA
    assert published("table_2", "scrapl", "val_convergence_steps") == (6014.0, 642.0, 20)  # all three
    assert published("table_3", "scrapl_no_theta_is", "theta_fm_l1", "fast_am_fast_fm") == (95.6, 20.0, 20)  # uniform
    assert published("table_6", "plus_psaga", "delta_theta_synth_l1_p_value").value == "<0.01"


def test_blanks_are_nan():
    jtfs = published("table_1", "jtfs", "theta_slope_l1")
    assert jtfs.value == 19.0 and math.isnan(jtfs.ci95) and jtfs.n == 1
    for place in (("mine", "theta_synth_l1"), ("jtfs", "mine"), ("jtfs", "theta_synth_l1", "mine")):
        absent = find("table_1", *place)  # what the paper does not have
        assert math.isnan(absent.value) and math.isnan(absent.ci95) and absent.n == 0


def test_every_printed_number_can_be_reached():
    """One is blank: a method that never converged."""
    rows = pd.read_csv(DATA / "published_tables.csv")
    assert len(rows) == 277
    for row in rows.itertuples():
        method = NAMES["tables"].get(row.method, row.method)
        found = published(row.table, method, row.metric.replace("test_", ""), row.condition)
        expected = float(row.value) if not str(row.value).startswith("<") else row.value
        assert found.n == row.n_seeds and (found.value == expected or math.isnan(found.value) and math.isnan(expected))


def test_step_time_is_loss_plus_model():
    times = step_ms()
    assert list(times) == list(methods_of("granular"))
    assert abs(times["jtfs"] - 1784.727) < 1e-9 and abs(times["scrapl_padam"] - 144.527) < 1e-9


def test_mistakes_name_the_nearest():
    for *arguments, match in (
        ("table_11", "jtfs", "theta_synth_l1", "did you mean 'table_1'"),
        ("table_1", "scrapl_plane", "theta_synth_l1", "did you mean 'scrapl'"),
        ("table_1", "jtfs", "theta_slope", "did you mean 'theta_slope_l1'"),
        ("table_4", "jtfs", "fad_encodec", r"\['micro', 'meso'\]; give one"),
        ("table_4", "jtfs", "fad_encodec", "mesa", "did you mean 'meso'"),
    ):
        with pytest.raises(ValueError, match=match):
            published(*arguments)
