"""The report card: rules at their borders, the paper's own numbers, claims and cells of made-up runs."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from scipy.stats import sem

from replication import __main__, report_card, tables
from replication.__main__ import main
from replication.data import ThetaGrid
from replication.published import DATA, NAMES, methods_in
from replication.records import load_runs
from replication.report_card import CLAIMS, summary
from replication.stats import equivalence, mean_ci95
from replication.tables import Cell, chance_permille
from replication.tasks import TASKS

EACH = "with each technique the mean error is lower: plain, + P-Adam, + P-SAGA, + θ-IS"
P_LOSS = (20.0, 20.4, 20.9, 21.0, 20.6)


def card_of(part, output, not_run=(), costs=None):
    """A report card of the runs of `output`, by claim."""
    runs = synthetic.load(output, tasks=TASKS)
    return report_card.report_card(part, runs, dict(not_run), "quick", costs).set_index("claim")


def write_errors(output, method, values, profile="paper", metric="theta_synth_l1"):
    """Runs of the granular task with these test errors, seed by seed."""
    for seed, value in enumerate(values):
        synthetic.write(output, method, seed, profile=profile, **{metric: value})


def cells_of(output, profile):
    folder = output / "results" / profile / "tables"
    return report_card.cells(synthetic.load(output, profile, TASKS), synthetic.NOT_RUN, profile, folder)


def cell(table, number, method, metric, task="granular"):
    places = table.set_index(["table", "task", "method", "metric"])
    assert places.index.is_unique
    return places.loc[(f"table_{number}", task, method, metric)]


# ---- the rules ------------------------------------------------------------------------------------------------------


BORDERS = """
lower            | 10±1          | 13±1 20     | holds
lower            | 10±1 11.5±1   | 13±1        | holds in part
lower            | 10±5 11±0.1   | 13±0.5      | holds in part
lower            | 10±1 14±0.1   | 13±1        | does not hold
within_factor_2  | 20            | 10          | holds
within_factor_2  | 30            | 10 20       | holds
within_factor_2  | 21±1          | 10±0.1      | holds in part
within_factor_2  | 21±0.5        | 10±0.1      | does not hold
within_factor_2  | 0             | 0           | holds
within_a_quarter | 125           | 100         | holds
within_a_quarter | 125.1±25.1    | 100         | holds in part
within_a_quarter | 125.1±25.0    | 100         | does not hold
within_a_quarter | 1             | 0           | does not hold
grows            | 0             | 0           | does not hold
grows            | 3±0.3         | 3.8±0.3     | holds
grows            | 3±0.5         | 3.8±0.5     | holds in part
grows            | 3±0.1         | 3.7±0.1     | does not hold
at_chance        | 219 500       | holds
at_chance        | 217@235.3     | holds
at_chance        | 217 240       | holds in part
at_chance        | 217 100       | does not hold
lowers           | 5,6,7,8       | 3,4,5.1,6   | holds
lowers           | 5,6,7,8       | 3,6.5,5,8   | holds in part
lowers           | 5,6,7,8       | 4,4,6,7.8   | holds in part
lowers           | 3,4,5.1,6     | 5,6,7,8     | does not hold
lowers           | 3,4           | 5,6,7       | too few seeds
raises           | 3,4,5.1,6     | 5,6,7,8     | holds
raises           | 5,6,7,8       | 3,4,5.1,6   | does not hold
improves         | 5,6,7,8       | 3,4,5.1,6   | holds
improves         | 5,6,7,8       | 3,6.5,5,8   | holds in part
improves         | 3,4,5.1,6     | 5,6,7,8     | does not hold
improves         | 0,0,0         | 1,2,3       | does not hold
improves         | 3,4           | 5,6,7       | too few seeds
improves         | 10±1*         | 7±1*        | holds
improves         | 10±1*         | 8.5±1*      | holds in part
improves         | 10±1*         | 11±1*       | does not hold
falls_in_order   | 6,6,6         | 5,5,5       | 4,3,5  | holds
falls_in_order   | 6,6,6         | 4,3,5       | 5,5,5  | holds in part
falls_in_order   | 4,3,5         | 6,6,6       | 5,5,5  | does not hold
falls_in_order   | 6,6           | 5,5,5       | too few seeds
"""


def made_up(word):
    """A cell, of mean±half-width or of values by seed; * has no values by seed, @ tells what guessing costs."""
    numbers, _, chance = word.rstrip("*").partition("@")
    mean, _, half_width = numbers.partition("±")
    seeds = pd.Series([float(value) for value in mean.split(",")])
    known = None if word.endswith("*") else seeds
    return Cell("x", float(seeds.mean()), float(half_width or 0), max(len(seeds), 2), known, float(chance or 242.4))


@pytest.mark.parametrize("line", BORDERS.strip().splitlines())
def test_rules_at_their_borders(line):
    rule, *sides, verdict = (part.strip() for part in line.split("|"))
    groups = [[made_up(word) for word in side.split()] for side in sides]
    assert getattr(report_card, rule)(groups)[1] == verdict
    assert report_card._in_words(groups).endswith("no test)")


def test_chance_is_the_mean_distance_from_the_middle():
    assert abs(chance_permille(32) - 8000 / 33) < 1e-9 and abs(chance_permille(16) - 4000 / 17) < 1e-9
    grid = ThetaGrid(grid_size=5, n_synth_seeds=1)
    assert abs(chance_permille(5) - 1000 * (grid.theta - 0.5).abs().mean()) < 1e-4


# ---- the claims -----------------------------------------------------------------------------------------------------


def test_the_papers_own_numbers_hold_but_for_two():
    """Its SCRAPL without theta-IS misses one interval on drums: 1050 +- 50 against 1140 +- 48 in JTFS distance."""
    assert {part: len(claims) for part, claims in CLAIMS.items()} == {"granular": 18, "chirplet": 15, "drum": 14}
    tasks = [claim.sides[0][0][0] for claim in CLAIMS["chirplet"]]
    assert [tasks.count(task) for task in dict.fromkeys(tasks)] == [4, 4, 3, 4]  # one uniform cell of Table 7 is blank
    in_part = {
        "fast AM, fast FM: θ-IS lowers FM L1 (text: by 14 to 80 %)",
        "aligned, θ-IS lowers SCRAPL's JTFS distance",
    }
    for part, claims in CLAIMS.items():
        card = report_card.report_card(part, [], {}, "paper")
        assert len(card) == card["claim"].nunique() == len(claims) and set(card["verdict"]) == {"not run"}
        assert all(all(claim.groups(tables.paper_cells())) for claim in claims) and (card["paper"] != "").all()
        assert set(card["rule"]) == {" ".join(claim.judge.__doc__.split()) for claim in claims}
        expected = ["holds in part" if claim in in_part else "holds" for claim in card["claim"]]
        assert card["paper_verdict"].tolist() == expected


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    synthetic.write_everything(folder)
    return folder


JUDGED = {  # claim: verdict, ours, what else is said
    "P-loss, the supervised bound, is the most accurate": (
        "holds",
        "P-loss 30.0 ± 0.74 against JTFS 61.7 ± 1.2 (the lowest of 8)",
        "P-loss 20.5 ± 0.20 against JTFS 42.4 (the lowest of 11)",
        "MS-CLAP, PANNs Wavegram-Logmel (not run: weights unavailable)",
        "MSS random (seed 4 failed:nonfinite loss at step 7)",
    ),
    "SCRAPL (no θ-IS) is within a factor 2 of JTFS in accuracy": ("holds", "ratio 1.70: "),
    "SCRAPL is within a factor 2 of JTFS in accuracy": ("not run", ""),
    "MSS losses never learn slope": (
        "holds",
        "MSS linear 243 ± 6.0, ",
        "MSS random 240 ± 5.3 (chance 235)",
    ),  # 16 points
    EACH: ("not run", ""),
    "P-SAGA lowers the θ L1": ("holds", "-35.0 ± 1.4 (p = "),
    "slow AM, slow FM: θ-IS lowers AM L1 (text: by 25 to 55 %)": (
        "holds",
        "39 %: SCRAPL (no θ-IS) 100 ± 2.5 → SCRAPL 60.6 ± ",
        "37 %: SCRAPL (no θ-IS) 124 ± 10 → SCRAPL 77.7 ± 6.7",
    ),
    "slow AM, slow FM: θ-IS lowers FM L1 (text: by 14 to 80 %)": ("does not hold", "-1 %: "),
    "JTFS keeps the transient when misaligned": ("holds", "ratio 1.10: JTFS, misaligned 220 ± "),
    "MSS random loses the transient when misaligned: its loudness error grows": ("holds", "ratio 3.00: "),
    "MSS linear loses the transient when misaligned: its loudness error grows": (
        "does not hold",
        "ratio 0.960: ",
        "MSS linear, aligned is next to silence: 25 dB off in the loudness of the transient",
    ),
    "misaligned, JTFS and SCRAPL are closer than any MSS in transient loudness": ("holds", "", "SCRAPL, misaligned"),
}


@pytest.mark.parametrize("part", CLAIMS)
def test_cards_of_made_up_runs(output, part):
    card = card_of(part, output, synthetic.NOT_RUN)
    for claim in card.index.intersection(list(JUDGED)):
        verdict, ours, *more = JUDGED[claim]
        row = card.loc[claim]
        assert row["verdict"] == verdict and row["ours"].startswith(ours), claim
        said = " ".join(row[["ours", "paper", "suspected_cause", "left_out"]])
        assert all(text in said for text in more), claim
    text = summary(card.reset_index())
    assert all(text.count(f"- {claim} (") == 1 for claim in card.index)
    assert text.index("**Holds**") < text.index("**Not run**")


def test_claims_on_time_are_judged_by_measured_costs(tmp_path):
    """Not by the steps of runs, which shared the machine: 46 ms of SCRAPL in these, 27.5 of the MSS."""
    synthetic.write_all(tmp_path)
    others = dict.fromkeys(report_card.GROUPS["MSS"], 20.0) | {"jtfs": 900.0}
    for ms, verdict in ((39, "holds"), (41, "does not hold"), (None, "not run")):
        card = card_of("granular", tmp_path, costs=others | {"scrapl_no_theta_is": ms} if ms else None)
        row = card.loc["SCRAPL (no θ-IS) is within a factor 2 of MSS in time per step"]
        assert row["verdict"] == verdict and row["seeds"] == ""
        assert row["ours"].startswith(f"ratio {ms / 20:.2f}: ") if ms else row["ours"] == ""
        assert ("not measured: notebook 08_cost does it" in row["left_out"]) == (ms is None)


def test_few_seeds_are_left_out_by_name(tmp_path):
    synthetic.write_all(tmp_path, ["p_loss", "mss_linear"])
    synthetic.write(tmp_path, "mss_random", 0)
    for seed in range(5):
        for method in ("scrapl_plain", "scrapl_padam")[: 1 + (seed < 4)]:
            synthetic.write(tmp_path, method, seed, val_convergence_steps=None)
    card = card_of("granular", tmp_path)
    slope = card.loc["MSS losses never learn slope"]
    assert slope["verdict"] == "holds" and slope["ours"] == "MSS linear 243 ± 6.0 (chance 235)"
    assert "MSS random (seeds with a value: 1 of 1)" in slope["left_out"]
    assert "MSS revisited (not run: no record yet)" in slope["left_out"]
    assert card.loc[EACH, "verdict"] == "not run"
    steps = card.loc["P-Adam lowers the steps to 100 ‰"]  # they never converged
    assert steps["verdict"] == "too few seeds" and steps["ours"] == ""
    assert steps["left_out"].startswith("SCRAPL (plain) (seeds with a value: 0 of 5); SCRAPL (P-Adam) (seeds with")
    assert card.loc["P-Adam raises the total variation", "verdict"] == "holds"


def test_one_seed_is_told_in_words_without_a_verdict(tmp_path):
    for method, value in (("scrapl_no_theta_is", 238.0), ("scrapl", 49.0)):
        synthetic.write_chirplet(tmp_path, "chirplet_fast_moderate", method, 0, 1, value / synthetic.spread(0))
    card = card_of("chirplet", tmp_path)
    row = card[card.index.str.startswith("fast AM, moderate FM: θ-IS lowers FM L1")].iloc[0]
    assert (
        row["verdict"] == "too few seeds" and row["ours"] == "238 → 49.0, 0.206 times (one seed: no interval, no test)"
    )


def test_suspected_causes_are_those_that_the_runs_show(tmp_path, monkeypatch):
    synthetic.write_all(tmp_path, ["jtfs"])
    write_errors(tmp_path, "scrapl_padam", [100] * 5, "quick")
    write_errors(tmp_path, "scrapl_no_theta_is", [70, 110, 70, 70, 110], "quick")  # lower on average, p > 0.01
    card = card_of("granular", tmp_path)
    row = card.loc["P-SAGA lowers the θ L1"]
    assert row["verdict"] == "holds in part"
    assert row["suspected_cause"] == "few seeds: p < 0.01 takes |t| > 4.6 with 5, 2.9 with the paper's 20"
    factor_2 = card.loc["SCRAPL (no θ-IS) is within a factor 2 of JTFS in accuracy"]
    assert factor_2["verdict"] == "holds" and factor_2["suspected_cause"] == ""
    monkeypatch.setattr(synthetic, "STEPS", (0, 1, 2, 3))
    write_errors(tmp_path, "scrapl_padam", [10] * 5, "quick")
    row = card_of("granular", tmp_path).loc["P-SAGA lowers the θ L1"]
    fall = 100 * (1 - (140 + 260 / 4) / (140 + 260 / 3))
    learning = "stopped while learning: the validation θ L1 fell from the third to the last quarter"
    assert (row["verdict"], row["suspected_cause"]) == ("does not hold", f"{learning}, SCRAPL (P-Adam) {fall:.0f} %")


def test_report_card_as_people_read_it(tmp_path):
    card = report_card.report_card("granular", [], {}, "paper")
    lines = tables.as_markdown(card, "report_card", "paper").splitlines()
    assert lines[0] == "**Report card.**" and len(lines) == 4 + 18
    assert lines[2] == "| claim | place | unit | ours | seeds | paper | verdict | suspected_cause | left_out |"
    green, grey = "background-color: #c8e6c9", "background-color: #eeeeee"
    for column, there, absent in (("paper_verdict", green, grey), ("verdict", grey, green)):
        html = tables.styled(card[["claim", column]]).to_html()
        assert there in html and absent not in html


# ---- every cell -----------------------------------------------------------------------------------------------------


def test_every_printed_cell_is_there_once(tmp_path):
    table = report_card.cells([], {}, "paper", tmp_path)
    assert list(table.columns) == report_card.COLUMNS
    assert set(table["verdict"]) == {"not run"} and set(table["records"]) == {""} and table["difference"].isna().all()
    printed = pd.read_csv(DATA / "published_tables.csv")
    printed = printed[printed["table"].str.startswith("table_") & ~printed["metric"].str.endswith("p_value")]
    printed["metric"] = printed["metric"].str.replace("^(delta_)?(test_)?", "", regex=True)
    theirs = printed.replace({"method": NAMES["tables"]}).astype({"value": float}).rename(columns={"n_seeds": "n"})
    ours = table.drop(columns="ci95").rename(columns={"paper_mean": "value", "paper_ci95": "ci95", "paper_n": "n"})
    columns = ["table", "method", "metric", "value", "ci95", "n"]
    both = [frame[columns].fillna(-1.0).sort_values(columns).to_numpy().tolist() for frame in (ours, theirs)]
    assert len(table) == 258 and both[0] == both[1]
    assert table.value_counts(["table", "task", "method", "metric"]).max() == 1


ERRORS = {  # seed by seed; the paper's: 20.5 +- 0.2, 42.4, 195, 370 +- 0.52, 99.7, 87.4, 73.8 +- 13
    "p_loss": P_LOSS,
    "jtfs": (41.0, 43.5, 44.0, 46.0),
    "mss_random": (195.0, 195.0),
    "mss_linear": (200, 201, 202),
    "scrapl_plain": (100.0, 90, 120, 80, 105),
    "scrapl_padam": (85.0, 79, 107, 66, 95),
    "scrapl_no_theta_is": (40, 110, 70, 60, 95),
}
FAST = "chirplet_fast_moderate"


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Cells of runs of the paper profile. Chirplets: 5 and then 1 of 5 seeds converge in FM, the paper's 0 and 20."""
    folder = tmp_path_factory.mktemp("paper")
    for method, values in ERRORS.items():
        write_errors(folder, method, values)
    for seed in range(5):
        for method, steps in (("scrapl_no_theta_is", 300), ("scrapl", 300 if seed == 0 else None)):
            synthetic.write_chirplet(folder, FAST, method, seed, 50, 50, fm_steps=steps, profile="paper")
    return cells_of(folder, "paper")


def test_verdicts_of_the_paper_profile(paper):
    """The tests themselves: test_stats."""
    verdicts = {m: cell(paper, 1, m, "theta_synth_l1")["verdict"] for m in methods_in("table_1")}
    found = {"p_loss": "equivalent", "jtfs": "equivalent", "mss_random": "too few seeds", "mss_linear": "different"}
    found["scrapl_no_theta_is"] = "intervals overlap"
    assert verdicts == dict.fromkeys(verdicts, "not run") | found
    row = cell(paper, 1, "p_loss", "theta_synth_l1")
    their_error = 0.2 / 1.96 * math.sqrt(20 / 19)  # of 20 seeds
    expected = equivalence(0.08, [(sem(P_LOSS), 5), (their_error, 20)], 4.1)
    assert abs(row["equivalence_p"] / expected - 1) < 1e-6 and row["records"] == "results/paper/granular/p_loss"
    assert abs(row["difference"] - 0.08) < 1e-6 and abs(row["percent"] - 8 / 20.5) < 1e-6
    alone = equivalence(43.625 - 42.4, [(sem(ERRORS["jtfs"]), 4)], 0.2 * 42.4)  # printed without an interval
    assert abs(cell(paper, 1, "jtfs", "theta_synth_l1")["equivalence_p"] / alone - 1) < 1e-6
    assert cell(paper, 1, "ms_clap", "theta_synth_l1")["note"] == "not run: weights unavailable"
    assert math.isnan(cell(paper, 1, "mss_random", "theta_synth_l1")["equivalence_p"])


@pytest.mark.parametrize(
    ("printed", "ours", "verdict"),
    [
        ((70.4, 8.8), (70, 71, 75), "equivalent"),  # a margin of 14.1
        ((70.4, 8.8), (78.0, 79.0, 80.0), "intervals overlap"),
        ((70.4, 8.8), (74.0, 80.0, 86.0), "intervals overlap"),  # 9.6 apart, ours +- 5.5
        ((70.4, 8.8), (80.2, 81.2, 82.2), "different"),
        ((24.7, 0.31), (26.0, 26.1, 26.2), "equivalent"),  # apart, but within the margin of 4.9
        ((24.7, 0.31), (29.5, 29.6, 29.7), "different"),
    ],
)
def test_the_order_of_the_rules(printed, ours, verdict):
    row = dict(zip(("paper_mean", "paper_ci95", "mean", "ci95"), (*printed, *mean_ci95(ours))))
    row |= {"difference": row["mean"] - printed[0], "n_seeds": 3, "paper_n": 20}
    row |= {"table": "table_1", "metric": "theta_density_l1", "note": ""}
    assert report_card._judged(SimpleNamespace(**row), "paper")[1] == verdict


def write_table_5(output, profile, **change):
    folder = output / "results" / profile / "tables"
    folder.mkdir(parents=True)
    rows = [("p_loss", 20, 0.4, 0.1, 0.01, ""), ("ms_clap", 0, None, None, None, "not run: weights unavailable")]
    frame = pd.DataFrame(rows, columns=["method", "n", "ms", "iqr_ms", "mib", "note"])
    frame.rename(columns=change).to_csv(folder / "table_5.csv", index=False)
    return folder


def test_reduced_problems_and_costs_are_not_compared(tmp_path):
    write_errors(tmp_path, "p_loss", P_LOSS, "quick")
    table = cells_of(tmp_path, "quick")
    row = cell(table, 2, "p_loss", "theta_synth_l1")
    assert row["verdict"] == "reduced problem" and math.isnan(row["equivalence_p"])
    assert abs(row["difference"] - 0.08) < 1e-6 and row["records"] == "results/quick/granular/p_loss"
    assert set(table["verdict"]) == {"reduced problem", "not run"}
    table = report_card.cells([], {}, "paper", write_table_5(tmp_path, "paper"))
    row = cell(table, 5, "p_loss", "median_time", "cost")
    assert (row["mean"], row["paper_mean"], row["n_seeds"], row["verdict"]) == (0.4, 0.516, 20, "other machine")
    assert row["records"] == "results/paper/tables/table_5.csv"
    assert cell(table, 5, "p_loss", "max_memory", "cost")["mean"] == 0.01
    for method, note in (("ms_clap", "weights unavailable"), ("scrapl", "notebook 08_cost measures it")):
        row = cell(table, 5, method, "iqr", "cost")
        assert (row["verdict"], row["note"], row["records"]) == ("not run", f"not run: {note}", "")


def test_shares_of_seeds_are_judged_by_their_intervals(paper):
    for kind, expected in {
        "am_convergence_rate": ["intervals overlap", "intervals overlap"],
        "fm_convergence_rate": ["different", "different"],
        "fm_convergence_steps": ["not printed", "too few seeds"],
    }.items():
        assert [cell(paper, 7, m, f"theta_{kind}", FAST)["verdict"] for m in tables.SAMPLERS] == expected, kind
    blank = cell(paper, 7, "scrapl_no_theta_is", "theta_fm_convergence_rate", FAST)
    assert blank["paper_mean"] == 0 and math.isnan(blank["percent"]) and blank["difference"] == 100


def test_table_6_compares_differences_and_corrects_for_its_tests(paper):
    rows = paper[paper["table"] == "table_6"].set_index(["method", "metric"])
    row = rows.loc["plus_padam", "theta_synth_l1"]  # the paper: -12.3 +- 17
    assert abs(row["mean"] + 12.6) < 1e-6 and abs(row["difference"] + 0.3) < 1e-6
    error = sem(np.subtract(ERRORS["scrapl_padam"], ERRORS["scrapl_plain"]))
    expected = equivalence(-0.3, [(error, 5), (17 / 2.0930240544, 20)], 2.46)  # 17: behind a t interval
    assert abs(row["equivalence_p"] / expected - 1) < 1e-6 and row["verdict"] == "intervals overlap"
    assert row["records"] == "results/paper/granular/scrapl_plain results/paper/granular/scrapl_padam"
    tested = rows[["p_value", "p_holm"]].dropna().sort_values("p_value")
    assert len(tested) == 6 and set(rows.loc["plus_theta_is"]["verdict"]) == {"not run"}
    expected = np.minimum(np.maximum.accumulate(tested["p_value"] * [6, 5, 4, 3, 2, 1]), 1)
    assert np.abs(tested["p_holm"] - expected).max() < 1e-12
    text = tables.as_markdown(paper, "cells", "paper", report_card.RULE)
    assert len(text.splitlines()) == 4 + 258
    assert "ours are fewer than 3." in text and "within 20 % of the paper's value, p < 0.05." in text
    shown = tables.show(paper)
    assert set(shown["task"]) == {"cost", *(task.label for task in TASKS.values())}
    row = shown[(shown["table"] == "6") & (shown["metric"] == "θ L1 (‰)") & (shown["method"] == "+ P-Adam")].iloc[0]
    expected = ["-12.6 ± 2.6 (p = 0.00017)", "-12.3 ± 17 (p = 0.15)", "0.3", "-0.300", "-2.4"]
    assert row[["ours", "paper", "paper: Holm", "difference", "in %"]].tolist() == expected


def test_claims_stand_side_by_side(tmp_path):
    synthetic.write_all(tmp_path)
    (tmp_path / "results/quick/tables").mkdir(parents=True)
    cost = pd.DataFrame({"claim": ["a path is cheaper"], "ours": ["2"], "verdict": ["holds"]})
    cost.to_csv(tmp_path / "results/quick/tables/cost_card.csv", index=False)
    runs = {name: synthetic.load(tmp_path, name, TASKS) for name in report_card.compared("quick")}
    table, caption = report_card.comparison(runs, synthetic.NOT_RUN, "quick", tmp_path)["claims"]
    counts = {"granular": 18, "chirplet": 15, "drum": 14, "cost": 1}
    assert table.groupby("part", sort=False).size().to_dict() == counts
    assert set(table["profile_paper_verdict"]) == {"not run"} and table["profile_paper_p"].isna().all()
    verdicts = table.set_index("claim")[["paper_verdict", "profile_quick_verdict"]]
    assert verdicts.loc["P-SAGA lowers the θ L1"].tolist() == ["holds", "holds"]
    assert verdicts.loc["a path is cheaper"].tolist() == ["", "holds"]
    tested = table[table["profile_quick_p"].notna()]
    assert set(tested["place"]) == {"Table 6"} and len(tested) == 5
    p, corrected = tested["profile_quick_p"].to_numpy(), tested["profile_quick_p_holm"].to_numpy()
    assert abs(corrected[p.argmin()] - 5 * p.min()) < 1e-12 and (corrected >= p).all()
    assert "Profile quick" not in caption  # which the heading says
    assert "Profile quick: a reduced problem" in report_card.comparison(runs, {}, "paper", tmp_path)["claims"][1]
    assert report_card.compared("smoke") == ["quick", "paper", "smoke"]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_compare_prints_both_tables_whatever_the_verdicts_and_writes_nothing(tmp_path, monkeypatch, capsys):
    write_errors(tmp_path, "p_loss", [500.0, 510.0, 520.0])
    write_errors(tmp_path, "jtfs", [100.0, 101.0, 102.0])
    monkeypatch.setattr(__main__, "runs_on_disk", lambda task, profile, output: load_runs(profile, task, None, output))
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", "--profile", "paper", "--output", str(tmp_path)]) == 0
    cells, claims = capsys.readouterr().out.split("**Claims.**")
    assert cells.startswith("**Cells.** Verdicts, by the first rule")
    assert re.search(r" Here: .*not run 2\d\d.*different \d", cells)
    assert "| 1 | granular | P-loss | θ L1 (‰) | 3 | 510 ± 9.2 |" in cells
    claim = "P-loss, the supervised bound, is the most accurate | Table 1 | holds | not run |  |  | does not hold |"
    assert f"| granular | {claim}" in claims
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_record_or_table_stops_compare(tmp_path, capsys):
    folder = synthetic.write(tmp_path, "p_loss", 0)
    (folder / "test.csv").write_text("metric,value,unit\n")
    assert main(["compare", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: broken record ") and "test.csv: expected" in said.err and said.out == ""
    broken = write_table_5(tmp_path / "other", "quick", ms="milliseconds") / "table_5.csv"
    assert main(["compare", "--output", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: broken table {broken}: ") and "['ms']" in said and len(said.splitlines()) == 1
