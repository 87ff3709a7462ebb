"""Tables and figures from synthetic records: what failed, was not run or never converged, files written whole.

What committed runs decide, of which none failed, test_pinned holds to the byte.
"""

import functools
import locale
import math
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import synthetic_records as synthetic
import torch
from odd_surroundings import odd_surroundings
from PIL import Image

from replication import figures, tables
from replication.published import authors_seeds
from replication.records import BrokenRecord
from replication.report_card import PARTS, report_card
from replication.tables import NAN
from replication.tasks import CHIRPLETS, METHODS, Method, importance_config, make_config, methods_of

SLOW, MODERATE = "chirplet_slow_slow", "chirplet_slow_moderate"
COSTS = {method: 1000 * k for k, method in enumerate(METHODS, 1)}  # made up, ms
FIGURES = ("figure_1", "figure_2", "figure_4")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    synthetic.write_everything(folder)
    return {part: synthetic.load(folder, tasks=tasks) for part, tasks in PARTS.items()}


@pytest.fixture(scope="module")
def runs(made_up):
    return made_up["granular"]


def draw(name, runs, profile="quick", not_run=synthetic.NOT_RUN, costs=COSTS):
    """A figure of the granular task by name."""
    options = {} if name == "figure_4" else {"costs": costs}
    return getattr(figures, name)(runs, profile, not_run, **options)


def save(plot, name, folder):
    return figures.save_figure(plot.figure, plot.data, name, "quick", folder, plot.caption)


def cell(table, method, metric, task="granular"):
    rows = table.assign(task=table.get("task", "granular")).set_index(["task", "method", "metric"])
    assert rows.index.is_unique
    return rows.loc[(task, method, metric)]


def off(found, expected):
    """The largest difference."""
    return np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)).max()


# ---- tables ---------------------------------------------------------------------------------------------------------

GRANULAR, PLAIN, NO_IS = "granular", "scrapl_plain", "scrapl_no_theta_is"
BY_HAND = [  # number, task, method, metric: mean, n_seeds, n_failed, paper_mean, note
    (1, GRANULAR, "p_loss", "theta_synth_l1", 30, 5, 0, 20.5, ""),
    (1, GRANULAR, "mss_random", "theta_slope_l1", 242 * 0.99, 4, 1, 242, "seed 4 failed:nonfinite loss at step 7"),
    (1, GRANULAR, "ms_clap", "theta_synth_l1", NAN, 0, 0, 166, "not run: weights unavailable"),
    (2, GRANULAR, PLAIN, "val_convergence_steps", 891, 4, 0, 10906, "1 of 5 seeds without steps to 100 ‰"),
    (3, SLOW, "scrapl", "theta_am_l1", 60 * 1.01, 4, 1, 77.7, "seed 0 failed:nonfinite"),
    (3, MODERATE, "scrapl", "theta_fm_l1", NAN, 0, 0, 44.4, "not run: needs theta-importance"),
    (7, SLOW, NO_IS, "theta_fm_convergence_rate", 80, 5, 0, 45, ""),
    (7, SLOW, NO_IS, "theta_fm_convergence_steps", 402, 4, 0, 4064, "1 of 5 seeds without FM steps to 100 ‰"),
    (7, MODERATE, NO_IS, "theta_am_convergence_rate", 0, 1, 0, 100, ""),
    (7, MODERATE, "scrapl", "theta_am_convergence_rate", NAN, 0, 0, 100, "not run: needs theta-importance"),
]


def test_tables_by_hand(made_up):
    both = [*made_up["granular"], *made_up["chirplet"]]
    found = {number: tables.paper_table(number, both, synthetic.NOT_RUN) for number in (1, 2, 3, 7)}
    for number, task, method, metric, *numbers, note in BY_HAND:
        row = cell(found[number], method, metric, task)
        ours = row[["mean", "n_seeds", "n_failed", "paper_mean"]].astype(float)
        assert np.allclose(ours, numbers, rtol=1e-7, equal_nan=True), (method, metric)
        assert row["note"].startswith(note) and bool(row["note"]) == bool(note)


def test_a_table_is_written_for_machines_and_for_people(runs, tmp_path):
    table = tables.paper_table(1, runs, synthetic.NOT_RUN)
    written = tables.write_table(table, "table_1", "quick", tmp_path, "Test error.")
    assert written == [tmp_path / f"results/quick/tables/table_1.{kind}" for kind in ("csv", "md")]
    lines = written[1].read_text(encoding="utf-8").splitlines()
    assert lines[0] == "**Table 1.** Test error. Profile quick: a reduced problem, not the paper's configuration."
    assert len(lines) == 2 + 2 + 10 and "| MSS random | 4 (1 failed) |" in lines[11]
    assert "rofile" not in tables.as_markdown(table, "table_1", "paper")
    shown = tables.show(tables.paper_table(2, runs, {})).set_index("method")["steps to 100 ‰"]
    assert shown[["JTFS", "SCRAPL"]].tolist() == ["none", "not run"]


def test_a_method_of_ones_own_has_blank_cells_where_the_papers_would_be(runs, monkeypatch):
    mine = Method("mine", "Mine", ("#123456", "h", "-"), lambda config: torch.nn.functional.mse_loss)
    monkeypatch.setitem(METHODS, "mine", mine)
    table = tables.paper_table(1, runs, {"mine": "new", "p_loss": "some reason"})
    row = cell(table, "mine", "theta_synth_l1")
    assert math.isnan(row["paper_mean"]) and row["paper_n"] == 0 and row["note"] == "not run: new"
    assert cell(table, "p_loss", "theta_synth_l1")["note"] == ""  # a run beats its reason not to run
    assert cell(table, "ms_clap", "theta_synth_l1")["note"] == "not run: no record yet"
    plot = draw("figure_1", runs)
    assert set(plot.data["method"]) == set(methods_of("granular")) - {"mine"}
    assert "Mine (no record yet)" in plot.caption
    plot = figures.by_seed(runs, "theta_slope_l1", "quick", {})
    assert [label.get_text() for label in plot.figure.axes[0].get_yticklabels()][-1] == "Mine"
    assert set(report_card("granular", runs, {}, "quick")["paper_verdict"]) == {"holds"}


def test_table_6_of_the_authors_is_the_printed_one():
    table = tables.table_6(tables.seed_cells(authors_seeds()), {})
    assert len(table) == 9 and (table["n_seeds"] == 20).all() and (table["note"] == "").all()
    half_unit = {"theta_synth_l1": 0.05, "val_total_variation": 0.005, "val_convergence_steps": 5.0}
    for row in table.itertuples():
        assert abs(row.mean - row.paper_mean) <= half_unit[row.metric] and float(f"{row.ci95:.2g}") == row.paper_ci95
        assert row.p_value < 0.01 if row.paper_p == "<0.01" else round(row.p_value, 2) == float(row.paper_p)
    html = tables.styled(table, "As printed.").to_html()
    assert "-13.6 ± 5.6 (p &lt; 0.01)" in html and "<caption>As printed.</caption>" in html


def test_table_6_pairs_by_seed(tmp_path):
    synthetic.write_all(tmp_path, ["scrapl_plain", "scrapl_padam"])
    synthetic.write(tmp_path, "scrapl_plain", 1, status="failed:killed")
    synthetic.write(tmp_path, "scrapl_padam", 0, val_convergence_steps=None)
    synthetic.write(tmp_path, "scrapl_no_theta_is", 0)
    table = tables.table_6(tables.cells_of(synthetic.load(tmp_path)), synthetic.NOT_RUN)
    accuracy = cell(table, "plus_padam", "theta_synth_l1")
    expected = np.mean([synthetic.spread(seed) * (140 - 185) for seed in (0, 2, 3, 4)])
    assert accuracy["n_seeds"] == 4 and off(accuracy["mean"], expected) < 1e-6 and 0 < accuracy["p_value"] < 1e-4
    steps = cell(table, "plus_padam", "val_convergence_steps")
    assert steps["n_seeds"] == 3 and steps["note"] == "3 of 4 pairs have steps to 100 ‰"
    notes = table.groupby("method")["note"].agg(set)
    assert notes["plus_psaga"] == {"seeds in common: 1, a comparison takes 2"}
    assert notes["plus_theta_is"] == {"SCRAPL not run: needs theta-importance sampling, not built yet"}


def test_table_10_puts_the_config_beside_the_paper():
    small, full = {"J": 10, "lr": 1e-3, "pools": ((2, 2), (2, 2)), "own": True}, {"J": 12, "dropout": 0.25, "own": 1}
    table = tables.table_10({"quick": small, "full": full | {"lr": 1e-5}}).set_index("name")
    assert list(table.columns) == ["quick", "full", "paper", "note"]
    expected = {"J": ["10", "12", "12", ""], "lr": ["0.001", "1e-05", "1e-05", ""], "own": ["True", "1", "", ""]}
    expected |= {"dropout": ["", "0.25", "0.5", "differs"], "epochs": ["", "", "200", ""]}
    assert {name: table.loc[name].tolist() for name in expected} == expected
    assert table.loc["pools", "quick"] == "[[2, 2], [2, 2]]"


def test_tables_that_are_not_there_lack_columns_or_are_broken(tmp_path):
    assert tables.read_table(tmp_path / "none.csv", ["a", "note"]).columns.tolist() == ["a", "note"]
    (tmp_path / "some.csv").write_text("a,b,note\n1,2,\n")
    assert tables.read_table(tmp_path / "some.csv", ["a", "note"]).to_dict("records") == [{"a": 1, "note": ""}]
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="broken table .*empty.csv"):
        tables.read_table(tmp_path / "empty.csv", ["a"])
    assert tables.step_costs(tmp_path) == {}


def test_curves_leave_out_failed_seeds_and_steps_that_one_lacks(runs, tmp_path, monkeypatch):
    data = tables.curves(runs, ["jtfs", "mss_random", "scrapl"]).set_index("method")
    assert data.loc["jtfs", "step"].tolist() == list(synthetic.STEPS)
    assert set(data.loc["mss_random", "n_seeds"]) == {4} and "scrapl" not in data.index
    synthetic.write(tmp_path, "jtfs", 0)
    monkeypatch.setattr(synthetic, "STEPS", (0, 50))
    synthetic.write(tmp_path, "jtfs", 1)
    assert tables.curves(synthetic.load(tmp_path), ["jtfs"])["step"].tolist() == [0, 50]


# ---- figures of the granular task -----------------------------------------------------------------------------------


def test_a_figure_is_written_with_its_numbers_and_caption(runs, tmp_path):
    plot = draw("figure_1", runs)
    pdf, png, csv = written = save(plot, "figure_1", tmp_path)
    assert written == [tmp_path / f"figures/quick/figure_1.{kind}" for kind in ("pdf", "png", "csv")]
    assert sorted((tmp_path / "figures/quick").iterdir()) == sorted(written)
    assert pdf.read_bytes().startswith(b"%PDF") and len(pd.read_csv(csv)) == len(plot.data) > 0
    said = ("Seeds: 5 (JTFS 3", "Failed: MSS random seed 4", "Not run: SCRAPL (needs theta-importance")
    assert all(part in plot.caption for part in said)
    assert Image.open(png).text["Description"] == plot.caption
    assert plot.caption.split()[:9] == plot.figure.texts[-1].get_text().split()[:9]


def test_the_users_own_settings_change_no_figure_and_no_table(runs, tmp_path, request):
    """matplotlib, seaborn, numpy, pandas, torch, the locale, all set oddly, warnings as errors: the same bytes."""

    def everything(folder):
        plots = {name: draw(name, runs) for name in FIGURES}
        plots["seeds"] = figures.by_seed(runs, "theta_slope_l1", "quick", {})
        paths = [path for name, plot in plots.items() for path in save(plot, name, folder)]
        found = {
            "one": tables.paper_table(1, runs, {}),
            "six": tables.table_6(tables.cells_of(runs), {}),
            "ten": tables.table_10({"quick": make_config("granular", "jtfs", 0, "quick").flat}),
            "card": report_card("granular", runs, {}, "quick", COSTS),
        }
        for name, table in found.items():
            paths += tables.write_table(table, name, "quick", folder)
        return [path.read_bytes() for path in paths]

    plain = everything(tmp_path / "plain")
    odd = {"font.size": 23, "axes.grid": False, "lines.linewidth": 9, "savefig.dpi": 17, "font.family": "serif"}
    odd |= {"axes.facecolor": "black", "figure.figsize": (1, 1), "axes.formatter.use_locale": True, "text.color": "red"}
    options = pd.option_context("display.precision", 1, "display.float_format", "{:.0f}".format)
    printing = np.printoptions(precision=1, suppress=True)
    request.addfinalizer(functools.partial(locale.setlocale, locale.LC_ALL, locale.setlocale(locale.LC_ALL)))
    with odd_surroundings(), matplotlib.rc_context(), options, printing, warnings.catch_warnings():
        locale.setlocale(locale.LC_ALL, "")
        sns.set_theme(context="poster", style="dark", palette="bright", font_scale=3)
        matplotlib.rcParams.update(odd)
        warnings.simplefilter("error")
        settings = str(matplotlib.rcParams)
        assert everything(tmp_path / "odd") == plain
        assert str(matplotlib.rcParams) == settings and "font.size: 23.0" in settings


def test_axes_are_labelled_and_time_starts_where_a_logarithm_can(runs):
    for name in FIGURES:
        for ax in draw(name, runs).figure.axes:
            assert " " in ax.get_xlabel() and ("(" in ax.get_ylabel() or "relative" in ax.get_ylabel())
    left, right = draw("figure_2", runs).figure.axes
    assert left.get_xscale() == "log" and all(line.get_xdata().min() > 0 for line in left.get_lines())
    assert len(left.get_lines()) == len(right.get_lines()) == 9 and right.get_lines()[0].get_xdata().min() == 0


def test_what_cannot_be_drawn_is_said(runs, tmp_path):
    for name in ("figure_1", "figure_2"):
        plot = draw(name, runs, costs={})
        assert "ours is not drawn: notebook 08_cost, which measures it, was not run" in plot.caption
        assert name == "figure_2" or set(plot.data["source"]) == {"paper"}
    for name in FIGURES:
        plot = draw(name, [], "paper", {})
        assert "no record yet" in plot.caption and "rofile" not in plot.caption
        assert plot._repr_png_().startswith(b"\x89PNG")
    folder = synthetic.write(tmp_path, "jtfs", 0)
    plot = draw("figure_1", synthetic.load(tmp_path))
    assert set(plot.data["source"]) == {"paper"} and "no finished P-loss run" in plot.caption
    with pytest.raises(ValueError, match="quick/granular.*paper/granular"):
        figures.figure_4(runs, "paper", {})
    (folder / "history.csv").write_text((folder / "history.csv").read_text().replace("val", "vol", 1))
    with pytest.raises(BrokenRecord, match="history.csv"):
        figures.figure_4(synthetic.load(tmp_path), "quick", {})


def test_learning_curves_show_intervals_and_what_guessing_costs(runs):
    plot = figures.learning_curves(runs, ["jtfs", "scrapl"], "theta_slope_l1", "quick", synthetic.NOT_RUN)
    (ax,) = plot.figure.axes
    assert ax.get_legend_handles_labels()[1] == ["JTFS", "always guessing 1/2"]
    line, chance = ax.get_lines()
    assert off(chance.get_ydata()[0], 4 / 17 * 1000) < 1e-9  # a grid of 16 points
    assert len(plot.data) == 4 and off(line.get_ydata(), plot.data["mean"]) < 1e-9
    ends = ax.collections[0].get_paths()[0].vertices
    for row in plot.data.itertuples():
        heights = ends[ends[:, 0] == row.step, 1]
        assert off([heights.min(), heights.max()], [row.mean - row.ci95, row.mean + row.ci95]) < 1e-9


def test_each_seed_is_a_tick_and_each_method_has_a_look_of_its_own(runs):
    (ax,) = figures.by_seed(runs, "theta_slope_l1", "quick", synthetic.NOT_RUN).figure.axes
    ticks = [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "|" and line.get_markersize() == 9]
    assert [len(x) for x in ticks] == [5, 3, 5, 5, 5, 5, 5, 5, 4] and ax.get_xlabel() == "slope L1 (‰)"
    colours, markers, _ = zip(*(method.style for method in METHODS.values()))
    assert len(set(colours)) == len(set(markers)) == len(METHODS) >= 12


# ---- chirplets and drum sounds --------------------------------------------------------------------------------------


def test_theta_is_effect_is_paired_and_in_percent(made_up):
    effect = tables.theta_is_effect(made_up["chirplet"], {})
    am = cell(effect, "plus_theta_is", "theta_am_l1", SLOW)
    assert am["n_seeds"] == 4 and "SCRAPL: seed 0 failed:nonfinite" in am["note"]
    assert off(am[["mean", "improvement", "paper_improvement"]], [-40 * 1.01, 40, 100 * (1 - 77.7 / 124)]) < 1e-6
    steps = cell(effect, "plus_theta_is", "theta_fm_convergence_steps", SLOW)
    assert steps["n_seeds"] == 3 and steps["note"].endswith("3 of 4 pairs have FM steps to 100 ‰")
    said = effect.groupby("metric")["paper_improvement"].agg(["min", "max"]).round()  # the text's are these
    assert said.loc[list(tables.TABLES[3])].to_numpy().tolist() == [[25, 55], [14, 80]]
    steps = said[said.index.str.endswith("steps")]
    assert (steps["min"].min(), steps["max"].max()) == (23, 50)


CENTRES = pd.DataFrame(  # sample rate 1000: AM 1, 1, 4, 2 Hz; FM 2, infinite, 4, 1.01 octaves/s
    [(0, 1e-3, 0.5, 1, 0.4), (1, 1e-3, 0.0, 0, 0.3), (2, 4e-3, 1.0, -1, 0.1), (3, 2e-3, 2 / 1.01, -1, 0.2)],
    columns=["path_idx", "rate", "scale", "spin", "probability"],
)
PLANE = {"sample_rate_hz": 1000, "am_hz": (0.9, 1.99), "fm_oct_per_s": (1.02, 2.0)}


def test_modulation_of_paths_and_mass_in_the_range():
    paths = tables.modulation_of_paths(CENTRES, PLANE)
    assert off(paths["am_hz"], [1, 1, 4, 2]) < 1e-12 and np.isinf(paths["fm_oct_per_s"][1])
    assert off(paths["fm_oct_per_s"][[0, 2, 3]], [2, 4, 1.01]) < 1e-12
    assert paths["inside"].tolist() == [True, False, False, True]  # the last lies within 1 % of the border
    table = tables.mass_in_range({SLOW: paths}, {MODERATE: "a reason"}).set_index("task")
    assert off(table.loc[SLOW, ["mass", "uniform", "ratio", "n_inside", "n_paths"]], [0.6, 0.5, 1.2, 2, 4]) < 1e-12
    assert table.loc[MODERATE, "note"] == "not run: a reason"
    outside = tables.modulation_of_paths(CENTRES, PLANE | {"am_hz": (10, 20)})
    assert tables.mass_in_range({SLOW: outside}, {})["note"][0] == "no path has its centre in the range"


def test_figure_5(made_up, runs):
    plot = figures.figure_5(made_up["chirplet"], "quick", {"scrapl": "some reason"})
    axes = plot.figure.axes
    assert len(axes) == 8 and set(plot.data["task"]) == {SLOW, MODERATE}
    assert [line.get_label() for line in axes[0].get_lines()] == ["SCRAPL (no θ-IS)", "SCRAPL", "always guessing 1/2"]
    assert axes[3].get_title() == "fast AM, fast FM" and not axes[3].get_lines()
    assert [text.get_text() for text in axes[-1].texts] == ["not run"]
    for part in ("Failed: SCRAPL seed 0", "Fast AM, fast FM: Seeds: 0", "(some reason)"):
        assert part in plot.caption
    with pytest.raises(ValueError, match="quick/granular"):
        figures.figure_5(runs, "quick", {})


def test_figure_6():
    twice = pd.concat([CENTRES, CENTRES.tail(1).assign(spin=1, probability=0.0)])
    ranges = {task: importance_config(task, "quick").flat for task in CHIRPLETS} | {SLOW: PLANE}
    plot = figures.figure_6({SLOW: tables.modulation_of_paths(twice, PLANE)}, ranges, "quick", {MODERATE: "a reason"})
    ax, other, *_ = plot.figure.axes
    (rectangle,), (dots,) = ax.get_lines(), ax.collections
    ends = [(data.min(), data.max()) for data in (rectangle.get_xdata(), rectangle.get_ydata())]
    assert ends == [(1.02, 2.0), (0.9, 1.99)]
    found = dict(zip(map(tuple, np.round(dots.get_offsets(), 6).tolist()), dots.get_array().tolist()))
    expected = {(2.0, 1.0): 0.4 * 5, (4.0, 4.0): 0.1 * 5, (1.01, 2.0): 0.1 * 5}  # the two spins of a centre: their mean
    assert found.keys() == expected.keys() and all(abs(found[key] - value) < 1e-9 for key, value in expected.items())
    assert "low-pass paths, not drawn, have 1.5 times" in plot.caption
    assert "Slow AM, moderate FM: not run, a reason." in plot.caption and other.texts[0].get_text() == "not run"
    assert plot._repr_png_().startswith(b"\x89PNG") and figures.figure_6({}, ranges, "paper", {}).data.empty


def test_the_figure_of_drums_without_runs_shows_the_papers_numbers():
    empty = figures.drum_features([], ("transient_loudness_l1", "decay_loudness_l1"), "smoke", {})
    assert [[text.get_text() for text in ax.texts] for ax in empty.figure.axes] == [["not run"]] * 2 + [[]] * 2
