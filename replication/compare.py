"""Ours beside the paper's: every cell of Tables 1 to 9, and every claim by profile. For `make compare` and notebook 09."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import published as paper
from . import tables
from .claims import LEAST_SEEDS, chirplet_card, drum_card, report_card
from .figures import step_costs
from .records import Run
from .stats import equivalence, holm, share_ci95, standard_error

MARGIN, LEVEL = 0.2, 0.05
RULE = (
    f"Verdicts, by the first rule that applies. Not run: there is no run or measurement of ours. Reduced problem: of another "
    f"profile than paper, not to be compared number by number. Other machine: a cost. Not printed: the paper's cell is blank. "
    f"Too few seeds: ours are fewer than {LEAST_SEEDS}. Equivalent: two one-sided t-tests (Welch; against the printed value as "
    f"it stands where the paper has no interval) put the difference within {100 * MARGIN:.0f} % of the paper's value, p < "
    f"{LEVEL}. Intervals overlap: the two 95 % intervals do, which shows neither a difference nor equivalence. Different: they "
    f"do not. Shares of seeds are judged by overlap alone, of their Wilson intervals. Table 6 compares differences."
)
"""How `cells` judges; stated before there was a run of the profile paper."""

CARDS = (
    "The verdict on each claim, by the paper's own numbers and by the runs of each profile. p: the paired t-test of ours, where "
    "the rule has one; p holm: the same corrected (Holm) over the claims tested of one table of the paper; of Table 6, `cells` "
    "corrects over all its tests, claimed or not. The correction changes no verdict: the rules ask for p < 0.01 uncorrected."
)
COSTS = {"median_time": "ms", "iqr": "iqr_ms", "max_memory": "mib"}  # metric as printed: column of table_5.csv
COLUMNS = [
    "table",
    "task",
    "method",
    "metric",
    "unit",
    "n_seeds",
    "mean",
    "ci95",
    "paper_mean",
    "paper_ci95",
    "paper_n",
    "difference",
    "percent",
    "equivalence_p",
    "verdict",
    "p_value",
    "p_holm",
    "paper_p",
    "paper_p_holm",
    "note",
    "records",
]


def compared(profile: str) -> list[str]:
    """The profiles whose claims stand side by side."""
    return list(dict.fromkeys(["quick", "paper", profile]))


def _costs(folder: Path) -> pd.DataFrame:
    """Table 5 in the columns of `tables.table_1`, from what notebook 08_cost measured; n_seeds counts the calls timed."""
    measured, rows = (
        tables.read_table(folder / "table_5.csv", ["method", "n", *COSTS.values(), "note"]).set_index("method"),
        [],
    )
    for method in paper.methods_in("table_5"):
        known = method in measured.index
        row = measured.loc[method] if known else {"n": 0, "note": "not run: notebook 08_cost measures it"}
        for metric, column in COSTS.items():
            printed, value = paper.published("table_5", method, metric), row[column] if known else math.nan
            rows.append((method, metric, tables.METRICS[metric][1], row["n"], value, math.nan, *printed, row["note"]))
    names = ["method", "metric", "unit", "n_seeds", "mean", "ci95", "paper_mean", "paper_ci95", "paper_n", "note"]
    return pd.DataFrame(rows, columns=names).assign(task="cost")


def _verdict(cell: Any, profile: str) -> tuple[float, str]:
    """The p-value of the equivalence tests (NaN: not tested) and the verdict on one row of `cells`, by `RULE`."""
    if math.isnan(cell.mean) and "not run" in cell.note:
        return math.nan, "not run"
    if profile != "paper":
        return math.nan, "reduced problem"
    if cell.table == "table_5":
        return math.nan, "other machine"
    if math.isnan(cell.paper_mean):
        return math.nan, "not printed"
    if cell.n_seeds < LEAST_SEEDS:
        return math.nan, "too few seeds"
    if cell.metric.endswith("_rate"):
        (low, high), (paper_low, paper_high) = (
            share_ci95(cell.mean, cell.n_seeds),
            share_ci95(cell.paper_mean, cell.paper_n),
        )
        return math.nan, "intervals overlap" if low <= paper_high and paper_low <= high else "different"
    both = ((cell.ci95, cell.n_seeds), (cell.paper_ci95, cell.paper_n))
    sides = [(half_width, n) for half_width, n in both if not math.isnan(half_width)]
    errors = [(standard_error(half_width, n, paired=cell.table == "table_6"), n) for half_width, n in sides]
    p_value = equivalence(cell.difference, errors, MARGIN * abs(cell.paper_mean))
    overlap = abs(cell.difference) <= sum(half_width for half_width, _ in sides)
    return p_value, "equivalent" if p_value < LEVEL else "intervals overlap" if overlap else "different"


def _records(cell: Any, profile: str, there: set[tuple[str, str]]) -> str:
    if cell.table == "table_5":
        return f"results/{profile}/tables/table_5.csv" if cell.n_seeds else ""
    methods = tables.STEPS[cell.method][1:] if cell.table == "table_6" else (cell.method,)
    return " ".join(f"results/{profile}/{cell.task}/{method}" for method in methods if (cell.task, method) in there)


def _of(runs: Sequence[Run], tasks: Sequence[str]) -> list[Run]:
    return [run for run in runs if run.task in tasks]


def cells(runs: Sequence[Run], not_run: dict[str, str], profile: str, folder: Path) -> pd.DataFrame:
    """Every cell that the paper's Tables 1 to 9 print, 258, beside ours; judged by `RULE`.

    runs: of all tasks and one profile. not_run: method -> why it has no runs. folder: holds table_5.csv of notebook 08_cost.
    Columns `COLUMNS`: mean and ci95 as each table has them; difference (ours minus the paper's), also in percent of the paper's
    value; of Table 6 p-values of the paired tests, corrected (Holm) over the table, paper_p as printed, paper_p_holm from the
    authors' seeds; records: the folders (below `output`) that the cell is made of.
    """
    granular, chirplets, drums = (_of(runs, tasks) for tasks in (["granular"], paper.CHIRPLETS, paper.TR808))
    table_6 = tables.table_6(tables.seed_values(granular), not_run)
    theirs = tables.table_6(paper.authors_seeds(), {})
    every = {
        "table_1": tables.table_1(granular, not_run),
        "table_2": tables.table_2(granular, not_run),
        "table_3": tables.table_3(chirplets, not_run),
        "table_4": tables.drum_table("table_4", drums, not_run),
        "table_5": _costs(folder),
        "table_6": table_6.assign(p_holm=holm(table_6["p_value"]), paper_p_holm=holm(theirs["p_value"])),
        "table_7": tables.table_7(chirplets, not_run),
        **{name: tables.drum_table(name, drums, not_run) for name in ("table_8", "table_9")},
    }
    table = pd.concat(every, names=["table"]).reset_index("table").fillna({"task": "granular"})
    table = table[table["paper_n"] > 0].reset_index(drop=True)  # a measure of our own is not
    table["difference"] = table["mean"] - table["paper_mean"]
    table["percent"] = 100 * table["difference"] / table["paper_mean"].abs().where(table["paper_mean"] != 0)
    table["equivalence_p"], table["verdict"] = zip(*(_verdict(cell, profile) for cell in table.itertuples()))
    there = {(run.task, run.method) for run in runs}
    table["records"] = [_records(cell, profile, there) for cell in table.itertuples()]
    return table[COLUMNS]


def cards(runs: Sequence[Run], not_run: dict[str, str], profile: str, folder: Path) -> pd.DataFrame:
    """The verdicts of all report cards of one profile: columns part, claim, place, paper_verdict ("" of costs), verdict, p_value,
    p_holm (over the claims of a place). Arguments as in `cells`; costs are those that notebook 08_cost judged."""
    costs = tables.read_table(folder / "cost_card.csv", ["claim", "verdict"])
    of = {
        "granular": report_card(_of(runs, ["granular"]), not_run, profile, costs=step_costs(folder)),
        "chirplet": chirplet_card(_of(runs, paper.CHIRPLETS), not_run, profile),
        "drum": drum_card(_of(runs, paper.TR808), not_run, profile),
        "cost": costs.assign(place="Table 5", paper_verdict="", p_value=math.nan),
    }
    card = pd.concat(of, names=["part"]).reset_index("part")
    card["p_holm"] = card.groupby(["part", "place"])["p_value"].transform(holm)
    return card[["part", "claim", "place", "paper_verdict", "verdict", "p_value", "p_holm"]]


def claims(by_profile: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """`cards` of several profiles side by side: columns part, claim, place, paper_verdict (by the paper's own numbers), and of each
    profile profile_<name>_verdict ("not run" for a claim it does not have), profile_<name>_p and profile_<name>_p_holm."""
    sides = []
    for profile, card in by_profile.items():
        side = card.set_index(["part", "claim", "place", "paper_verdict"]).set_axis(["verdict", "p", "p_holm"], axis=1)
        sides.append(side.add_prefix(f"profile_{profile}_"))
    table = pd.concat(sides, axis=1)
    return table.fillna({name: "not run" for name in table if name.endswith("verdict")}).reset_index()


def comparison(
    runs: dict[str, Sequence[Run]], not_run: dict[str, str], profile: str, output: Path
) -> dict[str, tuple[pd.DataFrame, str]]:
    """The tables "cells" (of `profile`) and "claims" (of all), each with its caption. runs: by profile, of `compared`."""
    folders = {name: Path(output) / "results" / name / "tables" for name in runs}
    table = cells(runs[profile], not_run, profile, folders[profile])
    counts = ", ".join(f"{verdict} {n}" for verdict, n in table["verdict"].value_counts().items())
    others = [tables.profile_note(name) for name in runs if name != profile]
    by_profile = {name: cards(runs[name], not_run, name, folders[name]) for name in runs}
    return {
        "cells": (table, f"{RULE} Here: {counts}."),
        "claims": (claims(by_profile), " ".join(filter(None, [CARDS, *others]))),
    }
