"""The report card: each claim of the paper and each cell of its tables, ours beside the paper's, with a verdict.

data_published/claims.csv holds the claims: what is claimed, where, and the sides it compares, separated by "|"; a
method of a side stands for its runs of the claim's task, or of that after "@". The rules that judge claims are
functions of this module: they take the sides, each a list of `Cell`, and return (text, verdict); their docstrings are
the rules as printed. Notebook 09 says which rules were changed with records in view; so were the suspected causes
written.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from . import published, tables
from .baselines import MSS_NAMES
from .records import Run
from .stats import equivalence, holm, paired_comparison, share_ci95, standard_error
from .tables import METRICS, NAN, STEP, Cell, Cells, joined, measured, number
from .tasks import CHIRPLETS, METHODS, TASKS, TR808

PARTS = {"granular": ["granular"], "chirplet": list(CHIRPLETS), "drum": list(TR808)}  # a report card each: its tasks
_PRINTED = {*published.methods_in("table_1"), *published.methods_in("table_2")}
GROUPS = {  # of methods, in the sides of a claim
    "MSS": MSS_NAMES,
    "VARIANTS": ("scrapl", "scrapl_no_theta_is", "scrapl_padam", "scrapl_plain"),
    "OTHERS": tuple(m for m in METHODS if m in _PRINTED and m != "p_loss"),
}
LEAST_SEEDS, ALPHA = 3, 0.01
VERDICTS = ("holds", "holds in part", "does not hold", "too few seeds", "not run")
NEAR_SILENCE = 2000.0  # 20 dB, times 100 as printed
STILL_FALLING = 0.05  # who falls by more from the third to the last quarter has not finished learning
Groups = Sequence[Sequence[Cell]]


# ---- the rules ------------------------------------------------------------------------------------------------------


def _graded(holds: bool, in_part: bool) -> str:
    return "holds" if holds else "holds in part" if in_part else "does not hold"


def _ratio(mean: float, other: float) -> str:
    return number(mean / other) if other else "undefined, of 0"


def lower(groups: Groups) -> tuple[str, str]:
    """Holds: for every pair from the two sides the 95 % interval of the first lies below that of the second; in part:
    the means of every pair are in this order."""
    top = max(groups[0], key=lambda cell: cell.mean + cell.half_width)
    bottom = min(groups[1], key=lambda cell: cell.mean - cell.half_width)
    of = [f" (the {name} of {len(group)})" * (len(group) > 1) for name, group in zip(("highest", "lowest"), groups)]
    in_order = max(cell.mean for cell in groups[0]) < min(cell.mean for cell in groups[1])
    apart = top.mean + top.half_width < bottom.mean - bottom.half_width
    return f"{top}{of[0]} against {bottom}{of[1]}", _graded(apart, in_order)


def within_factor_2(groups: Groups) -> tuple[str, str]:
    """Holds: the mean is at most twice the other side's (of several methods, the mean of their means); in part: so with
    the 95 % intervals taken at their favourable ends."""
    (a,), others = groups
    mean, half_width = (sum(getattr(b, name) for b in others) / len(others) for name in ("mean", "half_width"))
    other = str(others[0]) if len(others) == 1 else f"{number(mean)}, the mean of {len(others)}"
    favourable = (a.mean - a.half_width) <= 2 * (mean + half_width)
    return f"ratio {_ratio(a.mean, mean)}: {a} against {other}", _graded(a.mean <= 2 * mean, favourable)


def within_a_quarter(groups: Groups) -> tuple[str, str]:
    """Holds: the mean is at most a quarter above the other side's; in part: the two 95 % intervals overlap."""
    ((a,), (b,)) = groups
    overlap = a.mean - a.half_width <= b.mean + b.half_width
    return f"ratio {_ratio(a.mean, b.mean)}: {a} against {b}", _graded(a.mean <= 1.25 * b.mean, overlap)


def grows(groups: Groups) -> tuple[str, str]:
    """Holds: the other side's mean is more than a quarter above, and the two 95 % intervals lie apart; in part: more
    than a quarter above."""
    ((a,), (b,)) = groups
    above, apart = b.mean > 1.25 * a.mean, a.mean + a.half_width < b.mean - b.half_width
    return f"ratio {_ratio(b.mean, a.mean)}: {a} → {b}", _graded(above and apart, above)


def at_chance(groups: Groups) -> tuple[str, str]:
    """Holds: every mean is at least 90 % of chance, which is what always guessing the middle costs on the run's own
    grid (mean |θ - 1/2| over its points: 242 per mille for the paper's 32, 235 for 16); in part: some are."""
    guessing = [cell.mean >= 0.9 * cell.chance for cell in groups[0]]
    text = ", ".join(map(str, groups[0])) + f" (chance {number(groups[0][0].chance)})"
    return text, _graded(all(guessing), any(guessing))


def _paired(groups: Groups) -> list[tuple[float, float, float]]:
    """`paired_comparison` of each method with the next over their common seeds; empty if a pair has too few."""
    pairs = [tables.pairs(before, after) for before, after in itertools.pairwise(itertools.chain(*groups))]
    return [paired_comparison(a, b) for a, b in pairs] if all(len(a) >= LEAST_SEEDS for a, _ in pairs) else []


def _changes(groups: Groups, sign: int) -> tuple[str, str]:
    for mean, half_width, p_value in _paired(groups):
        return measured(mean, half_width, p_value), _graded(sign * mean > 0 and p_value < ALPHA, sign * mean > 0)
    return "", "too few seeds"


def lowers(groups: Groups) -> tuple[str, str]:
    """Holds: the mean paired difference over seeds is negative with p < 0.01 (paired t-test); in part: negative."""
    return _changes(groups, -1)


def raises(groups: Groups) -> tuple[str, str]:
    """Holds: the mean paired difference over seeds is positive with p < 0.01 (paired t-test); in part: positive."""
    return _changes(groups, 1)


def falls_in_order(groups: Groups) -> tuple[str, str]:
    """Holds: each mean paired difference over seeds is negative; in part: the last mean is below the first. The paired
    p-values are given."""
    if not (steps := _paired(groups)):
        return "", "too few seeds"
    cells = [cell for group in groups for cell in group]
    text = " → ".join(map(str, cells)) + f" (p = {', '.join(f'{p_value:.2g}' for *_, p_value in steps)})"
    return text, _graded(all(mean < 0 for mean, *_ in steps), cells[-1].mean < cells[0].mean)


def improves(groups: Groups) -> tuple[str, str]:
    """Holds: the mean paired difference over seeds is negative with p < 0.01 (paired t-test); in part: negative. Where
    the values by seed are not known (the paper's), holds: the two 95 % intervals lie apart; in part: the means are in
    this order. The improvement is that of the means, in percent."""
    (before,), (after,) = groups
    percent = f"{100 * (1 - after.mean / before.mean):.0f} %" if before.mean else "undefined, of 0"
    text = f"{percent}: {before} → {after}"
    if before.seeds is None or after.seeds is None:
        return text, lower((groups[1], groups[0]))[1]
    change, verdict = lowers(groups)
    return f"{text}, paired {change}" if change else "", verdict


PAIRED = (lowers, raises, improves)  # the rules that ask for a p-value
RULES = (lower, within_factor_2, within_a_quarter, grows, at_chance, falls_in_order, *PAIRED)


# ---- the claims -----------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A claim of the paper, where it stands, the task and method of each cell it compares, the metric, the rule."""

    text: str
    place: str
    sides: list[list[tuple[str, str]]]
    metric: str
    judge: Callable[[Groups], tuple[str, str]]

    def groups(self, cells: Cells, least: int = 1) -> list[list[Cell]]:
        """The sides, each with those of its cells that have at least `least` seeds."""
        there = [[cells[*key, self.metric] for key in side if (*key, self.metric) in cells] for side in self.sides]
        return [[cell for cell in group if cell.n >= least] for group in there]


def _side(text: str, task: str) -> list[tuple[str, str]]:
    """ "jtfs MSS@tr808_micro" -> [("tr808_meso", "jtfs"), ("tr808_micro", "mss_linear"), ...] if task is tr808_meso."""
    names = (word.partition("@") for word in text.split())
    return [(place or task, method) for name, _, place in names for method in GROUPS.get(name, (name,))]


def _read_claims() -> dict[str, list[Claim]]:
    claims, rules = {part: [] for part in PARTS}, {rule.__name__: rule for rule in RULES}
    for row in pd.read_csv(published.DATA / "claims.csv", encoding="utf-8").itertuples():
        sides = [_side(text, row.task) for text in row.sides.split("|")]
        part = next(part for part, tasks in PARTS.items() if row.task in tasks)
        claims[part].append(Claim(row.claim, row.place, sides, row.metric, rules[row.rule]))
    return claims


CLAIMS = _read_claims()
"""What the paper claims, by report card; of Table 6, where it prints p < 0.01; of theta-IS on chirplets, where Tables 3
and 7 print both values."""


def _suspected_cause(claim: Claim, used: Groups, runs: dict[str, list[Run]], ours: Cells) -> str:
    """What may stand behind a claim that does not hold, or only in part, as its runs show it. used: its cells."""
    causes, n = [], min(cell.n for group in used for cell in group)
    if claim.judge in PAIRED and _paired(used)[0][2] >= ALPHA and n < 20:
        few, many = (stats.t.ppf(1 - ALPHA / 2, count - 1) for count in (n, 20))
        causes.append(f"few seeds: p < {ALPHA} takes |t| > {few:.1f} with {n}, {many:.1f} with the paper's 20")
    if claim.metric == STEP:
        samples = " and ".join(sorted({str(run.config["n_samples"]) for run in runs["granular"]}))
        here = f"{samples} samples here, on the machine of notebook 08_cost"
        return f"cost depends on machine and length: {here}; 32768 on a GPU in the paper"
    learning = []
    for task, method in itertools.chain(*claim.sides):
        curve = tables.curves(runs[task], [method])
        quarter = 4 * curve["step"] / curve["step"].max()
        gain = 1 - curve.loc[quarter > 3, "mean"].mean() / curve.loc[(quarter > 2) & (quarter <= 3), "mean"].mean()
        learning += [f"{METHODS[method].label} {100 * gain:.0f} %"] if gain > STILL_FALLING else []
    if learning:
        fell = "stopped while learning: the validation θ L1 fell from the third to the last quarter"
        causes.append(f"{fell}, {', '.join(learning)}")
    for cell in filter(None, (ours.get((*key, "transient_loudness_l1")) for key in claim.sides[0])):
        if cell.mean > NEAR_SILENCE:
            off = f"{cell.mean / 100:.0f} dB off in the loudness of the transient"
            causes.append(f"{cell.label} is next to silence: {off}")
    return "; ".join(causes)


def _left_out(claim: Claim, runs: dict[str, list[Run]], not_run: dict[str, str], ours: Cells) -> str:
    """The methods of a claim that its verdict leaves out, and those with failed seeds, with the reason."""
    left: dict[str, list[str]] = {}
    for task, method in itertools.chain(*claim.sides):
        cell = ours.get((task, method, claim.metric))
        if claim.metric == STEP:
            reason = "" if cell else f"not measured: {not_run.get(method, 'notebook 08_cost does it')}"
        else:
            n, tried = cell.n if cell else 0, sum(run.method == method for run in runs[task])
            few = f"seeds with a value: {n} of {tried}" if n < LEAST_SEEDS and tried else ""
            reason = joined(few, tables.row_note(runs[task], method, not_run))
        if reason:
            left.setdefault(reason, []).append(tables.label(task, method))
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in left.items())


def _in_words(groups: Groups) -> str:
    """What too few seeds say: "238 → 49.0, 0.206 times (one seed: no interval, no test)"."""
    n = min(cell.n for group in groups for cell in group)
    means = " → ".join(", ".join(number(cell.mean) for cell in group) for group in groups)
    single = [len(group) for group in groups] == [1, 1] and groups[0][0].mean
    ratio = f", {number(groups[1][0].mean / groups[0][0].mean)} times" if single else ""
    return f"{means}{ratio} ({'one seed: no interval' if n == 1 else f'{n} seeds'}, no test)"


def report_card(
    part: str, runs: Sequence[Run], not_run: dict[str, str], profile: str, costs: dict[str, float] | None = None
) -> pd.DataFrame:
    """The claims of one of `PARTS` judged by the runs of one profile; write it with `tables.write_table`.

    runs: of any task. not_run: method -> why not. costs: see `tables.step_costs`: claims on time are judged by these,
    not by the runs, whose steps shared the machine with others.
    paper_verdict is that of the same rule on the paper's numbers, p_value that of the paired test, uncorrected, where
    the rule has one. The verdict is "too few seeds" when a side of the comparison has no method with 3 seeds that have
    the value (failed ones and, for steps, those that never converged do not), or a pair fewer than 3 in common: what
    they say is then given without a judgement. It is "not run" when a side has no run. left_out names the methods left
    out for that, and failed seeds, with the reason.
    """
    by_task, rows = {task: [run for run in runs if run.task == task] for task in TASKS}, []
    ours = tables.cells_of(run for run in runs if run.task in PARTS[part]) | tables.cost_cells(costs or {})
    for claim in CLAIMS[part]:
        timed, text, p_value, cause = claim.metric == STEP, "", NAN, ""
        used = claim.groups(ours, 1 if timed else LEAST_SEEDS)
        if all(used):
            text, verdict = claim.judge(used)
            if claim.judge in PAIRED and (pairs := _paired(used)):
                p_value = pairs[0][2]
            if verdict in VERDICTS[1:3]:
                cause = _suspected_cause(claim, used, by_task, ours)
        else:
            any_run = all(any((run.task, run.method) in side for run in runs) for side in claim.sides)
            verdict = "too few seeds" if any_run and not timed else "not run"
            if any_run and all(few := claim.groups(ours)):
                used, text = few, _in_words(few)
        n = sorted({cell.n for group in used for cell in group})
        seeds = "" if timed else " to ".join(map(str, dict.fromkeys([*n[:1], *n[-1:]])))  # "5" or "3 to 5"
        place, theirs = (claim.text, claim.place, profile), claim.judge(claim.groups(tables.paper_cells()))
        left_out, rule = _left_out(claim, by_task, not_run, ours), " ".join((claim.judge.__doc__ or "").split())
        unit = METRICS[claim.metric].unit
        rows.append((*place, unit, text, seeds, *theirs, verdict, p_value, cause, left_out, rule))
    columns = "claim place profile unit ours seeds paper paper_verdict verdict p_value suspected_cause left_out rule"
    return pd.DataFrame(rows, columns=columns.split())


def summary(card: pd.DataFrame) -> str:
    """A report card in words (Markdown): what held, what did not and the suspected causes, what could not be judged."""
    parts = []
    for verdict in (verdict for verdict in VERDICTS if verdict in set(card["verdict"])):
        group = card[card["verdict"] == verdict]
        parts.append(f"**{verdict.capitalize()}** ({len(group)} of {len(card)})\n")
        for row in group.itertuples():
            cause = f" *Suspected cause:* {row.suspected_cause}." if row.suspected_cause else ""
            left_out = f" {row.left_out}." if row.left_out else ""
            numbers = f" Ours: {row.ours}; paper: {row.paper}." if row.ours else left_out
            parts.append(f"- {row.claim} ({row.place}).{numbers}{cause}")
        parts.append("")
    return "\n".join(parts)


# ---- every cell -----------------------------------------------------------------------------------------------------

MARGIN, LEVEL = 0.2, 0.05
_TEXTS = tomllib.loads((published.DATA / "captions.toml").read_text(encoding="utf-8"))
RULE = _TEXTS["cells"].format(least_seeds=LEAST_SEEDS, margin=f"{100 * MARGIN:.0f}", level=LEVEL)
"""How `cells` judges; stated before there was a run of the profile paper."""

COSTS = {"median_time": "ms", "iqr": "iqr_ms", "max_memory": "mib"}  # metric as printed: column of table_5.csv
COLUMNS = (
    "table task method metric unit n_seeds mean ci95 paper_mean paper_ci95 paper_n difference percent equivalence_p "
    "verdict p_value p_holm paper_p paper_p_holm note records"
).split()


def compared(profile: str) -> list[str]:
    """The profiles whose claims stand side by side."""
    return list(dict.fromkeys(["quick", "paper", profile]))


def _table_5(folder: Path) -> pd.DataFrame:
    """Table 5, as `tables.paper_table`, from what notebook 08_cost measured; n_seeds counts the calls timed."""
    stored = tables.read_table(folder / "table_5.csv", ["method", "n", *COSTS.values(), "note"]).set_index("method")
    rows = []
    for method, (metric, column) in itertools.product(published.methods_in("table_5"), COSTS.items()):
        row = stored.loc[method] if method in stored.index else {}
        ours = (METRICS[metric].unit, row.get("n", 0), row.get(column, NAN), NAN)
        printed = published.published("table_5", method, metric)
        rows.append(("cost", method, metric, *ours, *printed, row.get("note", "not run: notebook 08_cost measures it")))
    columns = "task method metric unit n_seeds mean ci95 paper_mean paper_ci95 paper_n note"
    return pd.DataFrame(rows, columns=columns.split())


def _judged(cell: Any, profile: str) -> tuple[float, str]:
    """The p-value of the equivalence tests (NaN: not tested) and the verdict on one row of `cells`, by `RULE`."""
    if math.isnan(cell.mean) and "not run" in cell.note:
        return NAN, "not run"
    if profile != "paper":
        return NAN, "reduced problem"
    if cell.table == "table_5":
        return NAN, "other machine"
    if math.isnan(cell.paper_mean):
        return NAN, "not printed"
    if cell.n_seeds < LEAST_SEEDS:
        return NAN, "too few seeds"
    if cell.metric.endswith("_rate"):
        low, high = share_ci95(cell.mean, cell.n_seeds)
        paper_low, paper_high = share_ci95(cell.paper_mean, cell.paper_n)
        return NAN, "intervals overlap" if low <= paper_high and paper_low <= high else "different"
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


def cells(runs: Sequence[Run], not_run: dict[str, str], profile: str, folder: Path) -> pd.DataFrame:
    """Every cell that the paper's Tables 1 to 9 print, 258, beside ours; judged by `RULE`.

    runs: of all tasks and one profile. not_run: method -> why it has no runs. folder: with table_5.csv of 08_cost.
    difference: ours minus the paper's, also in percent of it. Of Table 6 p-values are corrected (Holm) over the table;
    paper_p_holm comes from the authors' seeds. records: the folders that the cell is made of.
    """
    sixth = tables.table_6(tables.cells_of(runs), not_run)
    theirs = tables.table_6(tables.seed_cells(published.authors_seeds()), {})
    every = {f"table_{n}": tables.paper_table(n, runs, not_run) for n in tables.TABLES}
    every["table_5"] = _table_5(folder)
    every["table_6"] = sixth.assign(p_holm=holm(sixth["p_value"]), paper_p_holm=holm(theirs["p_value"]))
    table = pd.concat({name: every[name] for name in sorted(every)}, names=["table"])
    table = table.reset_index("table").fillna({"task": "granular"})
    table = table[table["paper_n"] > 0].reset_index(drop=True)  # a measure of our own is not printed
    table["difference"] = table["mean"] - table["paper_mean"]
    table["percent"] = 100 * table["difference"] / table["paper_mean"].abs().where(table["paper_mean"] != 0)
    table["equivalence_p"], table["verdict"] = zip(*(_judged(cell, profile) for cell in table.itertuples()))
    there = {(run.task, run.method) for run in runs}
    table["records"] = [_records(cell, profile, there) for cell in table.itertuples()]
    return table[COLUMNS]


def _cards(runs: Sequence[Run], not_run: dict[str, str], profile: str, folder: Path) -> pd.DataFrame:
    """The verdicts of all report cards of a profile, costs as notebook 08_cost judged them; p_holm: corrected over the
    claims of a place."""
    every = {part: report_card(part, runs, not_run, profile, tables.step_costs(folder)) for part in PARTS}
    costs = tables.read_table(folder / "cost_card.csv", ["claim", "verdict"])
    every["cost"] = costs.assign(place="Table 5", paper_verdict="", p_value=NAN)
    card = pd.concat(every, names=["part"]).reset_index("part")
    card["p_holm"] = card.groupby(["part", "place"])["p_value"].transform(holm)
    card = card.set_index(["part", "claim", "place", "paper_verdict"])[["verdict", "p_value", "p_holm"]]
    return card.set_axis([f"profile_{profile}_{name}" for name in ("verdict", "p", "p_holm")], axis=1)


def comparison(
    runs: dict[str, Sequence[Run]], not_run: dict[str, str], profile: str, output: Path
) -> dict[str, tuple[pd.DataFrame, str]]:
    """Two tables with their captions: "cells" of `profile`, and "claims", the verdicts of all profiles side by side,
    "not run" for a claim that one does not have. runs: by profile, of `compared`."""
    folders = {name: Path(output) / "results" / name / "tables" for name in runs}
    table = cells(runs[profile], not_run, profile, folders[profile])
    counts = ", ".join(f"{verdict} {n}" for verdict, n in table["verdict"].value_counts().items())
    claims = pd.concat([_cards(runs[name], not_run, name, folders[name]) for name in runs], axis=1)
    claims = claims.fillna({name: "not run" for name in claims if name.endswith("verdict")}).reset_index()
    others = [tables.profile_note(name) for name in runs if name != profile]
    caption = " ".join(filter(None, [_TEXTS["claims"], *others]))
    return {"cells": (table, f"{RULE} Here: {counts}."), "claims": (claims, caption)}
