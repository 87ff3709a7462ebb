"""The report card: each claim of the paper that the granular task can test, and the rule that judges it; the same for the
chirplet tasks, which show what theta-importance sampling is for, and for drum sounds, aligned and misaligned. Notebook 09 says which rules were changed with
records in view; so were the suspected causes written.

A judge takes the groups of methods a claim compares and returns (text, verdict); its docstring is the rule as printed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
from scipy import stats

from . import published as paper
from . import tables
from .records import Run
from .stats import mean_ci95, paired_comparison
from .tables import METRICS, TABLE_2_METRICS, curves, measured, number, values_by_seed

MSS = ("mss_linear", "mss_log_linear", "mss_revisited", "mss_random")
VARIANTS = ("scrapl", "scrapl_no_theta_is", "scrapl_padam", "scrapl_plain")
OTHERS = tuple(
    m for m in paper.METHODS if m != "p_loss" and m in paper.methods_in("table_1") + paper.methods_in("table_2")
)
LEAST_SEEDS = 3
ALPHA = 0.01
VERDICTS = ("holds", "holds in part", "does not hold", "too few seeds", "not run")
STEP = "train_step_ms"
DRUM_LOUDNESS, NEAR_SILENCE = "transient_loudness_l1", 2000.0  # 20 dB, times 100 as printed
STILL_FALLING = (
    0.05  # a method that gains more than this share from the third to the last quarter has not finished learning
)


def chance_permille(grid_size: int) -> float:
    """What always guessing 1/2 costs: mean |theta - 1/2| over the points (i + 1) / (grid_size + 1) of a grid; 242 for 32."""
    return 1000 * sum(abs((i + 1) / (grid_size + 1) - 0.5) for i in range(grid_size)) / grid_size


class Cell(NamedTuple):
    """One method in one metric: mean, 95 % half-width (0 where none is known), number of seeds, values by seed if known, and
    what guessing costs on its grid."""

    label: str
    mean: float
    half_width: float
    n: int
    seeds: pd.Series | None = None
    chance: float = chance_permille(32)

    def __str__(self) -> str:
        return f"{self.label} {measured(self.mean, self.half_width or math.nan)}"


Groups = Sequence[Sequence[Cell]]


def _verdict(holds: bool, in_part: bool) -> str:
    return "holds" if holds else "holds in part" if in_part else "does not hold"


def lower(groups: Groups) -> tuple[str, str]:
    """Holds: for every pair from the two sides the 95 % interval of the first lies below that of the second; in part: the
    means of every pair are in this order."""
    top = max(groups[0], key=lambda cell: cell.mean + cell.half_width)
    bottom = min(groups[1], key=lambda cell: cell.mean - cell.half_width)
    of = [f" (the {name} of {len(group)})" * (len(group) > 1) for name, group in zip(("highest", "lowest"), groups)]
    in_order = max(cell.mean for cell in groups[0]) < min(cell.mean for cell in groups[1])
    apart = top.mean + top.half_width < bottom.mean - bottom.half_width
    return f"{top}{of[0]} against {bottom}{of[1]}", _verdict(apart, in_order)


def within_factor_2(groups: Groups) -> tuple[str, str]:
    """Holds: the mean is at most twice the other side's (of several methods, the mean of their means); in part: so with the
    95 % intervals taken at their favourable ends."""
    (a,), others = groups
    mean, half_width = (sum(getattr(b, name) for b in others) / len(others) for name in ("mean", "half_width"))
    other = str(others[0]) if len(others) == 1 else f"{number(mean)}, the mean of {len(others)}"
    favourable = (a.mean - a.half_width) <= 2 * (mean + half_width)
    return f"ratio {number(a.mean / mean)}: {a} against {other}", _verdict(a.mean <= 2 * mean, favourable)


def within_a_quarter(groups: Groups) -> tuple[str, str]:
    """Holds: the mean is at most a quarter above the other side's; in part: the two 95 % intervals overlap."""
    ((a,), (b,)) = groups
    overlap = a.mean - a.half_width <= b.mean + b.half_width
    return f"ratio {number(a.mean / b.mean)}: {a} against {b}", _verdict(a.mean <= 1.25 * b.mean, overlap)


def grows(groups: Groups) -> tuple[str, str]:
    """Holds: the other side's mean is more than a quarter above, and the two 95 % intervals lie apart; in part: more than a
    quarter above."""
    ((a,), (b,)) = groups
    apart = a.mean + a.half_width < b.mean - b.half_width
    return f"ratio {number(b.mean / a.mean)}: {a} → {b}", _verdict(
        b.mean > 1.25 * a.mean and apart, b.mean > 1.25 * a.mean
    )


def at_chance(groups: Groups) -> tuple[str, str]:
    """Holds: every mean is at least 90 % of chance, which is what always guessing the middle costs on the run's own grid (mean
    |θ - 1/2| over its points: 242 per mille for the paper's 32, 235 for 16); in part: some are."""
    guessing = [cell.mean >= 0.9 * cell.chance for cell in groups[0]]
    return ", ".join(map(str, groups[0])) + f" (chance {number(groups[0][0].chance)})", _verdict(
        all(guessing), any(guessing)
    )


def _paired(groups: Groups) -> list[tuple[float, float, float]]:
    """`paired_comparison` of each method with the next over their common seeds; empty when a pair has too few of them."""
    cells, results = [cell for group in groups for cell in group], []
    for before, after in itertools.pairwise(cells):
        seeds = before.seeds.index.intersection(after.seeds.index)
        if len(seeds) < LEAST_SEEDS:
            return []
        results.append(paired_comparison(before.seeds[seeds], after.seeds[seeds]))
    return results


def _changes(groups: Groups, sign: int) -> tuple[str, str]:
    for mean, half_width, p_value in _paired(groups):
        return measured(mean, half_width, p_value), _verdict(sign * mean > 0 and p_value < ALPHA, sign * mean > 0)
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
    return text, _verdict(all(mean < 0 for mean, *_ in steps), cells[-1].mean < cells[0].mean)


def improves(groups: Groups) -> tuple[str, str]:
    """Holds: the mean paired difference over seeds is negative with p < 0.01 (paired t-test); in part: negative. Where the values
    by seed are not known (the paper's), holds: the two 95 % intervals lie apart; in part: the means are in this order. The
    improvement is that of the means, in percent."""
    (before,), (after,) = groups
    text = f"{100 * (1 - after.mean / before.mean):.0f} %: {before} → {after}"
    if before.seeds is None or after.seeds is None:
        return text, lower((groups[1], groups[0]))[1]
    change, verdict = lowers(groups)
    return f"{text}, paired {change}" if change else "", verdict


PAIRED = (lowers, raises, improves)  # the judges that ask for a p-value


class Claim(NamedTuple):
    """A claim of the paper: where it stands, the sides it compares, in which metric, and who judges it."""

    text: str
    place: str
    groups: tuple[tuple[str, ...], ...]
    metric: str
    judge: Callable[[Groups], tuple[str, str]]


def _change(step: str, metric: str, judge: Callable) -> Claim:
    label, before, after = tables.STEPS[step]
    text = f"{label.removeprefix('+ ')} {judge.__name__} the {METRICS[metric][0]}"
    return Claim(text, "Table 6", ((before,), (after,)), metric, judge)


CLAIMS = (
    Claim(
        "P-loss, the supervised bound, is the most accurate", "Table 1", (("p_loss",), OTHERS), "theta_synth_l1", lower
    ),
    *(
        Claim(
            f"{paper.METHODS[m]} is within a factor 2 of JTFS in accuracy",
            "Section 1, Table 1",
            ((m,), ("jtfs",)),
            "theta_synth_l1",
            within_factor_2,
        )
        for m in VARIANTS[:2]
    ),
    *(
        Claim(
            f"{paper.METHODS[m]} is within a factor 2 of MSS in time per step",
            "Section 1, Table 5",
            ((m,), MSS),
            STEP,
            within_factor_2,
        )
        for m in VARIANTS[:2]
    ),
    Claim("a SCRAPL step takes less time than a JTFS step", "Table 5", (VARIANTS, ("jtfs",)), STEP, lower),
    Claim("MSS losses never learn slope", "Table 1", (MSS,), "theta_slope_l1", at_chance),
    Claim(
        "JTFS and every SCRAPL variant learn slope better than any MSS",
        "Tables 1 and 2",
        (("jtfs", *VARIANTS), MSS),
        "theta_slope_l1",
        lower,
    ),
    Claim(
        "JTFS and every SCRAPL variant are more accurate than any MSS",
        "Tables 1 and 2",
        (("jtfs", *VARIANTS), MSS),
        "theta_synth_l1",
        lower,
    ),
    Claim(
        "JTFS and SCRAPL end at a lower JTFS distance than any MSS",
        "Figure 3",
        (("jtfs", *VARIANTS[:2]), MSS),
        "jtfs_distance",
        lower,
    ),
    Claim(
        "with each technique the mean error is lower: plain, + P-Adam, + P-SAGA, + θ-IS",
        "Table 2",
        tuple((m,) for m in tables.ABLATION[:4]),
        "theta_synth_l1",
        falls_in_order,
    ),
    _change("plus_padam", "val_total_variation", raises),
    _change("plus_padam", "val_convergence_steps", lowers),
    *(_change("plus_psaga", metric, lowers) for metric in TABLE_2_METRICS),
    *(_change("plus_theta_is", metric, lowers) for metric in TABLE_2_METRICS[1:]),
)
"""What the paper claims of the granular task; of Table 6, where it prints p < 0.01."""


_SAID = {"theta_am_l1": "25 to 55 %", "theta_fm_l1": "14 to 80 %"}  # by the text; of steps, 23 to 50 %


def chirplet_claims(task: str) -> tuple[Claim, ...]:
    """What the paper claims of theta-importance sampling on one chirplet task: accuracy and convergence of AM and FM, where it
    prints both values."""
    cells, claims = chirplet_paper_cells(task), []
    for metric in (*tables.TABLE_3_METRICS, *tables.TABLE_7_METRICS[1::2]):
        if all((method, metric) in cells for method in tables.SAMPLERS):
            text = f"{paper.CHIRPLETS[task][1]}: θ-IS lowers {METRICS[metric][0]} (text: by {_SAID.get(metric, '23 to 50 %')})"
            place = "Table 3" if metric in tables.TABLE_3_METRICS else "Table 7"
            claims.append(Claim(text, place, tuple((method,) for method in tables.SAMPLERS), metric, improves))
    return tuple(claims)


def chirplet_paper_cells(task: str) -> dict[tuple[str, str], Cell]:
    """The printed numbers of a chirplet task by (method, metric); what never converged is left out."""
    cells = {}
    for method in tables.SAMPLERS:
        for table, metrics in (("table_3", tables.TABLE_3_METRICS), ("table_7", tables.TABLE_7_METRICS[1::2])):
            for metric in metrics:
                printed = paper.published(table, method, metric, paper.CHIRPLETS[task][0])
                if not math.isnan(printed.value):
                    cells[method, metric] = Cell(paper.METHODS[method], *printed)
    return cells


def chirplet_card(runs: Sequence[Run], not_run: dict[str, str], profile: str) -> pd.DataFrame:
    """`chirplet_claims` of every task, judged by the runs of the chirplet tasks of one profile; as `report_card`."""
    cards = []
    for task in paper.CHIRPLETS:
        mine = [run for run in runs if run.task == task]
        cards.append(report_card(mine, not_run, profile, chirplet_claims(task), chirplet_paper_cells(task)))
    return pd.concat(cards, ignore_index=True)


DRUM_LOSSES = ("jtfs", "scrapl", "scrapl_no_theta_is")


def drum_claims() -> tuple[Claim, ...]:
    """What the paper's Tables 4, 8 and 9 say of drum sounds. A method's runs of the one task and of the other are told apart as
    "jtfs micro" (aligned) and "jtfs meso" (misaligned)."""

    def at(condition: str, *methods: str) -> tuple[str, ...]:
        return tuple(f"{method} {condition}" for method in methods)

    labels = paper.METHODS
    return (
        *(
            Claim(
                f"{labels[m]} loses the transient when misaligned: its loudness error grows",
                "Table 8",
                (at("micro", m), at("meso", m)),
                DRUM_LOUDNESS,
                grows,
            )
            for m in MSS
        ),
        *(
            Claim(
                f"{labels[m]} keeps the transient when misaligned",
                "Table 8",
                (at("meso", m), at("micro", m)),
                DRUM_LOUDNESS,
                within_a_quarter,
            )
            for m in DRUM_LOSSES
        ),
        *(
            Claim(
                f"misaligned, JTFS and SCRAPL are closer than any MSS in {METRICS[metric][0].removesuffix(' L1')}",
                "Table 8",
                (at("meso", *DRUM_LOSSES), at("meso", *MSS)),
                metric,
                lower,
            )
            for metric in (DRUM_LOUDNESS, "transient_spectral_centroid_l1")
        ),
        Claim(
            "misaligned, JTFS and SCRAPL end at a lower JTFS distance than any MSS",
            "Table 4",
            (at("meso", *DRUM_LOSSES[:2]), at("meso", *MSS)),
            "jtfs_distance",
            lower,
        ),
        *(
            Claim(
                f"{name}, every MSS is closer than SCRAPL in decay loudness",
                "Table 9",
                (at(condition, *MSS), at(condition, *DRUM_LOSSES[1:])),
                "decay_loudness_l1",
                lower,
            )
            for condition, name in paper.TR808.values()
        ),
        *(
            Claim(
                f"{name}, θ-IS lowers SCRAPL's JTFS distance",
                "Table 4",
                (at(condition, "scrapl_no_theta_is"), at(condition, "scrapl")),
                "jtfs_distance",
                improves,
            )
            for condition, name in paper.TR808.values()
        ),
    )


def drum_paper_cells() -> dict[tuple[str, str], Cell]:
    """The printed numbers of Tables 4, 8 and 9 by (method and condition, metric)."""
    cells = {}
    for table, metrics in (
        ("table_4", tables.TABLE_4_METRICS[:2]),
        ("table_8", tables.TABLE_8_METRICS),
        ("table_9", tables.TABLE_9_METRICS),
    ):
        for method, (condition, _), metric in itertools.product(tables.DRUM_METHODS, paper.TR808.values(), metrics):
            key = f"{method} {condition}"
            cells[key, metric] = Cell(_label(key), *paper.published(table, method, metric, condition))
    return cells


def drum_card(runs: Sequence[Run], not_run: dict[str, str], profile: str) -> pd.DataFrame:
    """`drum_claims` judged by the runs of the TR-808 tasks of one profile; as `report_card`."""
    runs = [replace(run, method=f"{run.method} {paper.TR808[run.task][0]}") for run in runs]
    return report_card(runs, not_run, profile, drum_claims(), drum_paper_cells())


def _label(key: str) -> str:
    method, _, condition = key.partition(" ")
    return paper.METHODS[method] + (f", {dict(paper.TR808.values())[condition]}" if condition else "")


def _cells(values: pd.DataFrame, grid_size: int) -> dict[tuple[str, str], Cell]:
    cells, chance = {}, chance_permille(grid_size)
    for method, metric in values[["method", "metric"]].drop_duplicates().itertuples(index=False):
        if len(seeds := values_by_seed(values, method, metric)):
            mean, half_width = mean_ci95(seeds)
            half_width = 0.0 if math.isnan(half_width) else half_width
            cells[method, metric] = Cell(_label(method), mean, half_width, len(seeds), seeds, chance)
    return cells


def paper_cells() -> dict[tuple[str, str], Cell]:
    """The paper's numbers the claims rest on by (method, metric): from the authors' seeds where they are known, else printed."""
    cells = {(m, STEP): Cell(paper.METHODS[m], ms, 0.0, 1) for m, ms in paper.step_ms().items()}
    for table, metric in [*(("table_1", metric) for metric in list(METRICS)[:3]), ("figure_3", "jtfs_distance")]:
        for method in paper.methods_in(table):
            mean, ci95, n = paper.published(table, method, metric if table == "table_1" else f"test_{metric}")
            cells[method, metric] = Cell(paper.METHODS[method], mean, 0.0 if math.isnan(ci95) else ci95, n)
    return cells | _cells(paper.authors_seeds(), paper.HYPERPARAMETERS["grid_size"])


def groups_of(claim: Claim, cells: dict[tuple[str, str], Cell], least: int = 1) -> list[list[Cell]]:
    """The sides of a claim, each with those of its methods that have at least `least` seeds."""
    there = [[cells[m, claim.metric] for m in group if (m, claim.metric) in cells] for group in claim.groups]
    return [[cell for cell in group if cell.n >= least] for group in there]


def _suspected_cause(claim: Claim, used: Groups, runs: Sequence[Run], cells: dict[tuple[str, str], Cell]) -> str:
    """What may stand behind a claim that does not hold, or only in part, as far as its runs show it. used: its sides.
    cells: all there are by (method, metric)."""
    causes, n = [], min(cell.n for group in used for cell in group)
    if claim.judge in PAIRED and _paired(used)[0][2] >= ALPHA and n < 20:
        ours, theirs = (stats.t.ppf(1 - ALPHA / 2, count - 1) for count in (n, 20))
        causes.append(f"few seeds: p < {ALPHA} takes |t| > {ours:.1f} with {n}, {theirs:.1f} with the paper's 20")
    if claim.metric == STEP:
        samples = " and ".join(sorted({str(run.config["n_samples"]) for run in runs}))
        return f"cost depends on machine and length: {samples} samples here, on the machine of notebook 08_cost; 32768 on a GPU in the paper"
    learning = []
    for method, curve in curves(runs, itertools.chain(*claim.groups)).groupby("method", sort=False):
        quarter = 4 * curve["step"] / curve["step"].max()
        gain = 1 - curve.loc[quarter > 3, "mean"].mean() / curve.loc[(quarter > 2) & (quarter <= 3), "mean"].mean()
        learning += [f"{paper.METHODS[method]} {100 * gain:.0f} %"] if gain > STILL_FALLING else []
    if learning:
        causes.append(
            f"stopped while learning: the validation θ L1 fell from the third to the last quarter, {', '.join(learning)}"
        )
    for cell in filter(None, (cells.get((method, DRUM_LOUDNESS)) for method in claim.groups[0])):
        if cell.mean > NEAR_SILENCE:
            causes.append(
                f"{cell.label} is next to silence: {cell.mean / 100:.0f} dB off in the loudness of the transient"
            )
    return "; ".join(causes)


def report_card(
    runs: Sequence[Run],
    not_run: dict[str, str],
    profile: str,
    claims: Sequence[Claim] = CLAIMS,
    theirs: dict[tuple[str, str], Cell] | None = None,
    costs: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Each of `claims` judged by the runs of one profile and task, granular by default; write it with `tables.write_table`.

    claims, theirs: of another task, with the paper's numbers. costs: milliseconds of a step, see `figures.step_costs`: claims on
    time are judged by these, not by the runs, whose steps shared the machine with others. runs: as `records.load_runs` gives
    them. not_run: method -> why it has no runs. Columns claim, place (in the paper),
    profile, unit, ours, seeds ("5" or "3 to 5"), paper, paper_verdict (the same rule on the paper's numbers), verdict,
    p_value (of the paired test, uncorrected, where the rule has one), suspected_cause (of claims that do not hold or only in
    part), left_out, rule.
    The verdict is "holds", "holds in part" or "does not hold" by the rule; "too few seeds" when a side of the comparison has
    no method with 3 seeds that have the value (failed ones and, for steps, those that never converged do not), or a pair
    fewer than 3 in common; "not run" when a side has no run. left_out names the methods of the claim left out of it for
    that, and failed seeds, with the reason.
    """
    grid_size = runs[0].config.get("grid_size", 32) if runs else 32  # drum sounds have none, and no claim on guessing
    ours, theirs, rows = _cells(tables.seed_values(runs), grid_size), paper_cells() if theirs is None else theirs, []
    ours |= {(method, STEP): Cell(paper.METHODS[method], ms, 0.0, 1) for method, ms in (costs or {}).items()}
    for claim in claims:
        timed = claim.metric == STEP
        used, left = groups_of(claim, ours, 1 if timed else LEAST_SEEDS), {}
        if all(used):
            text, verdict = claim.judge(used)
        elif timed:
            text, verdict = "", "not run"
        else:
            any_run = all(any(run.method in group for run in runs) for group in claim.groups)
            text, verdict = "", "too few seeds" if any_run else "not run"
        for method in itertools.chain(*claim.groups):
            cell, reason = ours.get((method, claim.metric)), tables.row_note(runs, method, not_run)
            if timed:
                if cell is None:
                    left.setdefault(f"not measured: {not_run.get(method, 'notebook 08_cost does it')}", []).append(
                        _label(method)
                    )
                continue
            n, tried = cell.n if cell else 0, sum(run.method == method for run in runs)
            few = f"seeds with a value: {n} of {tried}" if n < LEAST_SEEDS and tried else ""
            if few or reason:
                left.setdefault("; ".join(filter(None, (few, reason))), []).append(_label(method))
        n = sorted({cell.n for group in used for cell in group})
        pairs = _paired(used) if all(used) and claim.judge in PAIRED else []
        p_value = pairs[0][2] if pairs else math.nan
        cause = _suspected_cause(claim, used, runs, ours) if verdict in VERDICTS[1:3] else ""
        seeds = "" if timed else " to ".join(map(str, dict.fromkeys([*n[:1], *n[-1:]])))
        left_out = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in left.items())
        rule = " ".join((claim.judge.__doc__ or "").split())
        rows.append(
            (
                claim.text,
                claim.place,
                profile,
                METRICS[claim.metric][1],
                text,
                seeds,
                *claim.judge(groups_of(claim, theirs)),
                verdict,
                p_value,
                cause,
                left_out,
                rule,
            )
        )
    columns = [
        "claim",
        "place",
        "profile",
        "unit",
        "ours",
        "seeds",
        "paper",
        "paper_verdict",
        "verdict",
        "p_value",
        "suspected_cause",
        "left_out",
        "rule",
    ]
    return pd.DataFrame(rows, columns=columns)


def summary(card: pd.DataFrame) -> str:
    """A report card in words (Markdown): what held, what did not and the suspected causes, what could not be judged."""
    parts = []
    for verdict in VERDICTS:
        group = card[card["verdict"] == verdict]
        if group.empty:
            continue
        parts.append(f"**{verdict.capitalize()}** ({len(group)} of {len(card)})\n")
        for row in group.itertuples():
            cause = f" *Suspected cause:* {row.suspected_cause}." if row.suspected_cause else ""
            numbers = (
                f" Ours: {row.ours}; paper: {row.paper}." if row.ours else f" {row.left_out}." if row.left_out else ""
            )
            parts.append(f"- {row.claim} ({row.place}).{numbers}{cause}")
        parts.append("")
    return "\n".join(parts)
