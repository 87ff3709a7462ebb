"""Tables of the paper, from records only.

Tables are tidy: one row per method and metric, numbers unrounded (`write_table` stores them as CSV); `show` turns one
into the wide, rounded text that people read, which is also the Markdown file beside the CSV.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pandas.io.formats.style import Styler

from . import published
from .files import write_csv, write_text_atomic
from .records import ROOT, Run
from .stats import mean_ci95, paired_comparison
from .tasks import CHIRPLETS, METHODS, TASKS, TR808, methods_in

NAN, STEP = math.nan, "train_step_ms"


class Metric(NamedTuple):
    """What a value is called, its unit, what the paper multiplies it by for drum sounds, the tables that print it."""

    label: str
    unit: str
    drum_scale: int
    tables: str

    def __str__(self) -> str:
        return self.label if self.unit in self.label else f"{self.label} ({self.unit})"


_STORED = pd.read_csv(
    Path(__file__).parent / "data_tasks" / "metrics.csv", dtype=str, na_filter=False, encoding="utf-8"
)
METRICS = {name: Metric(label, unit, int(scale), of) for name, label, unit, scale, of in _STORED.to_numpy().tolist()}
DRUM_SCALES = (
    "MSS and JTFS distances times 1000, loudness times 100, centroid times 10, as printed; centroid and flatness are "
    "weighted by the decibels above silence."
)
TABLES = {  # number: metrics
    number: tuple(name for name, metric in METRICS.items() if str(number) in metric.tables)
    for number in (1, 2, 3, 4, 7, 8, 9)
}
STEPS = {  # Table 6: technique: label, before, after
    "plus_padam": ("+ P-Adam", "scrapl_plain", "scrapl_padam"),
    "plus_psaga": ("+ P-SAGA", "scrapl_padam", "scrapl_no_theta_is"),
    "plus_theta_is": ("+ θ-IS", "scrapl_no_theta_is", "scrapl"),
}
ABLATION, SAMPLERS, DRUM_METHODS = methods_in(2)[::-1], methods_in(3)[::-1], methods_in(4)


# ---- ours and theirs ------------------------------------------------------------------------------------------------


def chance_permille(grid_size: int) -> float:
    """What always guessing 1/2 costs: mean |theta - 1/2| over the points (i + 1) / (grid_size + 1); 242 for 32."""
    return 1000 * sum(abs((i + 1) / (grid_size + 1) - 0.5) for i in range(grid_size)) / grid_size


class Cell(NamedTuple):
    """One method in one metric; ci95: half-width, NaN where none is known; chance: what guessing costs."""

    label: str
    mean: float
    ci95: float
    n: int
    seeds: pd.Series | None = None
    chance: float = chance_permille(32)

    @property
    def half_width(self) -> float:
        """The half-width, 0 where none is known."""
        return 0.0 if math.isnan(self.ci95) else self.ci95

    def __str__(self) -> str:
        return f"{self.label} {measured(self.mean, self.ci95 or NAN)}"


Cells = dict[tuple[str, str, str], Cell]  # by task, method and metric


def label(task: str, method: str) -> str:
    """What a report card calls a method's runs of a task."""
    return METHODS[method].label + (f", {TASKS[task].label}" if task in TR808 else "")


def seed_cells(values: pd.DataFrame) -> Cells:
    """Cells of a table with columns task, method, seed, metric, value, grid_size, as `published.authors_seeds` has."""
    cells = {}
    for key, group in values.dropna(subset="value").groupby(["task", "method", "metric"], sort=False):
        seeds = group.set_index("seed")["value"].sort_index()
        chance = chance_permille(group["grid_size"].iloc[0])
        cells[key] = Cell(label(*key[:2]), *mean_ci95(seeds), len(seeds), seeds, chance)
    return cells


def cells_of(runs: Iterable[Run]) -> Cells:
    """The test values of the finished runs, drum sounds' scaled as the paper prints them. What no run has is absent."""
    rows = []
    for run in (run for run in runs if run.ok):
        scales = {name: metric.drum_scale for name, metric in METRICS.items() if run.task in TR808}
        values = {row.metric: scales.get(row.metric, 1) * row.value for row in run.test.itertuples()}
        grid_size = run.config.get("grid_size", 32)  # drum sounds have none, and no claim on guessing
        rows += [(run.task, run.method, run.seed, name, value, grid_size) for name, value in values.items()]
    columns = ["task", "method", "seed", "metric", "value", "grid_size"]
    return seed_cells(pd.DataFrame(rows, columns=columns).astype({"value": float}))


def cost_cells(ms: dict[str, float]) -> Cells:
    """Milliseconds of a training step by method, see `step_costs`, as cells."""
    return {("granular", method, STEP): Cell(label("granular", method), cost, NAN, 1) for method, cost in ms.items()}


@cache
def paper_cells() -> Cells:
    """The paper's numbers, from the authors' seeds where known, else as printed. What never converged is left out."""
    places = [(f"table_{n}", task, m) for task in TASKS.values() for n in task.tables if n != 2 for m in TABLES[n]]
    cells = cost_cells(published.step_ms())
    for table, task, metric in [*places, ("figure_3", TASKS["granular"], "jtfs_distance")]:
        for method in published.methods_in(table):
            printed = published.find(table, method, metric, task.condition)
            if not math.isnan(printed.value):
                cells[task.name, method, metric] = Cell(label(task.name, method), *printed)
    return cells | seed_cells(published.authors_seeds())


def step_costs(folder: Path) -> dict[str, float]:
    """Milliseconds of a training step by method, as `published.step_ms`, from the table_5.csv of notebook 08_cost in
    `folder`. Without it {}: nothing was measured."""
    ms = read_table(folder / "table_5.csv", ["method", "ms"]).set_index("method")["ms"].dropna()
    return {name: float(ms[method.loss] + ms["model"]) for name, method in METHODS.items() if method.loss in ms.index}


def curves(runs: Iterable[Run], methods: Iterable[str], metric: str = "theta_synth_l1") -> pd.DataFrame:
    """Mean and interval (NaN for one seed) of the validation values of finished runs, at the steps that all seeds of a
    method have."""
    rows, runs = [], list(runs)
    for method in methods:
        histories = [run.history for run in runs if run.method == method and run.ok]
        parts = [h.loc[(h["split"] == "val") & (h["metric"] == metric), ["step", "value"]] for h in histories]
        for step, values in pd.concat(parts).groupby("step")["value"] if parts else ():
            if len(values) == len(histories):
                rows.append((method, step, len(values), *mean_ci95(values)))
    return pd.DataFrame(rows, columns=["method", "step", "n_seeds", "mean", "ci95"])


def seeds_note(runs: Sequence[Run], methods: Iterable[str], not_run: dict[str, str]) -> str:
    """ "Seeds: 5 (JTFS 3). Failed: none. Not run: MS-CLAP (weights unavailable)." for a caption."""
    methods = list(methods)
    counts = Counter(run.method for run in runs if run.ok)
    counts = {method: counts[method] for method in methods if counts[method]}
    usual = max(set(counts.values()), key=list(counts.values()).count, default=0)
    others = ", ".join(f"{METHODS[m].label} {n}" for m, n in counts.items() if n != usual)
    failed = [f"{METHODS[run.method].label} seed {run.seed}" for run in runs if run.method in methods and not run.ok]
    absent: dict[str, list[str]] = {}
    for method in methods:
        if not any(run.method == method for run in runs):
            absent.setdefault(not_run.get(method, "no record yet"), []).append(METHODS[method].label)
    missing = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in absent.items())
    notes = [f"Seeds: {usual}{f' ({others})' if others else ''}.", f"Failed: {', '.join(failed) or 'none'}."]
    return " ".join([*notes, f"Not run: {missing}." if missing else ""]).strip()


def row_note(runs: Sequence[Run], method: str, not_run: dict[str, str]) -> str:
    """Why a row is empty, or which of its seeds failed and how."""
    mine = [run for run in runs if run.method == method]
    failed = [f"seed {run.seed} {run.status}" for run in mine if not run.ok]
    return "; ".join(failed) if mine else f"not run: {not_run.get(method, 'no record yet')}"


def joined(*notes: str) -> str:
    """The notes that say something."""
    return "; ".join(filter(None, notes))


# ---- the tables -----------------------------------------------------------------------------------------------------


def paper_table(number: int, runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """Table 1, 2, 3, 4, 7, 8 or 9 of the paper, ours beside what it prints.

    1  granular accuracy; 2  the ablation; 3  chirplet accuracy; 7  chirplet convergence: share of seeds that reach a
    validation L1 of 100 per mille, and their steps; 4, 8, 9  drum sounds: audio distances (the Fréchet distance of
    log-mel statistics, ours, stands beside FAD, which takes EnCodec's weights), transient, decay

    runs: of one profile, any task. not_run: method -> why it has no runs.
    ci95 is 1.96 population std / sqrt(n), NaN for one seed. Steps are averaged over the seeds that converged; the note
    counts others.
    """
    methods = {1: methods_in(1), 2: ABLATION, 3: SAMPLERS, 7: SAMPLERS}.get(number, DRUM_METHODS)
    rows, tasks = [], [task for task in TASKS.values() if number in task.tables]
    for task, method in itertools.product(tasks, methods):
        mine = [run for run in runs if (run.task, run.method) == (task.name, method)]
        ours, finished, why = cells_of(mine), sum(run.ok for run in mine), row_note(mine, method, not_run)
        for metric in TABLES[number]:
            cell, lack = ours.get((task.name, method, metric.replace("_rate", "_steps"))), ""
            n, mean, ci95 = (cell.n, cell.mean, cell.ci95) if cell else (0, NAN, NAN)
            if metric.endswith("_rate"):
                n, mean, ci95 = finished, 100 * n / finished if finished else NAN, NAN
            elif metric == "fad_encodec" and finished and not n:
                lack = "FAD not run: EnCodec's weights unavailable"
            elif n < finished:
                lack = f"{finished - n} of {finished} seeds without {METRICS[metric].label}"
            printed = published.find(f"table_{number}", method, metric, task.condition)
            counts = (METRICS[metric].unit, n, len(mine) - finished)
            rows.append((task.name, method, metric, *counts, mean, ci95, *printed, joined(why, lack)))
    columns = "task method metric unit n_seeds n_failed mean ci95 paper_mean paper_ci95 paper_n note"
    return pd.DataFrame(rows, columns=columns.split()).drop(columns="task" if number <= 2 else [])


def pairs(before: Cell | None, after: Cell | None) -> tuple[pd.Series, pd.Series]:
    """The values by seed of two cells at the seeds that both have."""
    a, b = (pd.Series(dtype=float) if cell is None else cell.seeds for cell in (before, after))
    seeds = a.index.intersection(b.index)
    return a[seeds], b[seeds]


def _change(before: Cell | None, after: Cell | None, metric: str, possible: int) -> tuple[list, str]:
    """Unit, n, mean, 95 % half-width and p-value of the paired differences; a note where n is less than possible."""
    a, b = pairs(before, after)
    note = f"{len(a)} of {possible} pairs have {METRICS[metric].label}" if len(a) < possible else ""
    return [METRICS[metric].unit, len(a), *(paired_comparison(a, b) if len(a) >= 2 else (NAN,) * 3)], note


def table_6(cells: Cells, not_run: dict[str, str]) -> pd.DataFrame:
    """Table 6, what each technique changes: paired differences over seeds, 95 % t interval, paired t-test.

    cells: `cells_of(runs)`, or `seed_cells(published.authors_seeds())` to recompute the printed table. A seed in which
    a variant lacks the value (it failed, or never converged) is left out. paper_p is "<0.01" where so printed.
    """
    rows = []
    for step, (_, *methods) in STEPS.items():
        of = {metric: [cells.get(("granular", method, metric)) for method in methods] for metric in TABLES[2]}
        absent = [method for method, cell in zip(methods, of["theta_synth_l1"]) if cell is None]
        why = "; ".join(f"{METHODS[m].label} not run: {not_run.get(m, 'no record yet')}" for m in absent)
        possible = len(pairs(*of["theta_synth_l1"])[0])
        if not absent and possible < 2:
            why = f"seeds in common: {possible}, a comparison takes 2"
        for metric, both in of.items():
            ours, note = _change(*both, metric, possible)
            printed = published.published("table_6", step, f"delta_{metric}")
            paper_p = published.published("table_6", step, f"delta_{metric}_p_value").value
            rows.append((step, metric, *ours, *printed, paper_p, why or note))
    columns = "method metric unit n_seeds mean ci95 p_value paper_mean paper_ci95 paper_n paper_p note"
    return pd.DataFrame(rows, columns=columns.split())


def theta_is_effect(runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """What theta-importance sampling changes on the chirplet tasks (with minus without), as in `table_6`, and the
    improvement of the mean in percent, of the same pairs, beside that of the paper's Tables 3 and 7."""
    rows, cells, theirs = [], cells_of(runs), paper_cells()
    for task in CHIRPLETS:
        mine = [run for run in runs if run.task == task]
        finished = min(sum(run.method == method and run.ok for run in mine) for method in SAMPLERS)
        reasons = [f"{METHODS[m].label}: {note}" for m in SAMPLERS if (note := row_note(mine, m, not_run))]
        for metric in (*TABLES[3], *TABLES[7][1::2]):
            both, printed = ([side.get((task, m, metric)) for m in SAMPLERS] for side in (cells, theirs))
            (a, b), (ours, note) = pairs(*both), _change(*both, metric, finished)
            before, after = (getattr(cell, "mean", NAN) for cell in printed)
            better = (100 * (1 - b.mean() / a.mean()) if a.any() else NAN, 100 * (1 - after / before))
            rows.append((task, "plus_theta_is", metric, *ours, *better, joined(*reasons, note)))
    columns = "task method metric unit n_seeds mean ci95 p_value improvement paper_improvement note"
    return pd.DataFrame(rows, columns=columns.split())


def modulation_of_paths(probabilities: pd.DataFrame, config: dict[str, Any]) -> pd.DataFrame:
    """`probabilities` (columns path_idx, rate, scale, spin, probability, ...) with am_hz = rate, fm_oct_per_s = rate /
    scale (infinite for the low-pass paths), over_uniform = probability times the number of paths, and inside: whether
    the path's centre lies in the ranges of config's am_hz and fm_oct_per_s, or within 1 % of their borders."""
    am_hz = probabilities["rate"] * config["sample_rate_hz"]
    fm_oct_per_s = am_hz / probabilities["scale"].where(probabilities["spin"] != 0, 0)
    inside = True
    for rate, (low, high) in ((am_hz, config["am_hz"]), (fm_oct_per_s, config["fm_oct_per_s"])):
        inside &= (rate > low / 1.01) & (rate < high * 1.01)
    over = probabilities["probability"] * len(probabilities)
    return probabilities.assign(am_hz=am_hz, fm_oct_per_s=fm_oct_per_s, inside=inside, over_uniform=over)


def mass_in_range(paths: dict[str, pd.DataFrame], not_run: dict[str, str]) -> pd.DataFrame:
    """The probability (mass) that theta-importance sampling gives to the paths inside each synthesizer's range of AM
    and FM, and their share of all paths (uniform).

    paths: task -> `modulation_of_paths`. not_run: task -> why it has none.
    """
    rows = []
    for task in CHIRPLETS:
        if task not in paths:
            rows.append((task, 0, 0, *(NAN,) * 3, f"not run: {not_run.get(task, 'no record yet')}"))
            continue
        inside = paths[task]["inside"]
        mass, uniform = paths[task].loc[inside, "probability"].sum(), inside.mean()
        ratio, note = (mass / uniform, "") if uniform else (NAN, "no path has its centre in the range")
        rows.append((task, len(inside), int(inside.sum()), mass, uniform, ratio, note))
    return pd.DataFrame(rows, columns=["task", "n_paths", "n_inside", "mass", "uniform", "ratio", "note"])


def table_10(configs: dict[str, dict[str, Any]], task: str = "granular") -> pd.DataFrame:
    """Table 10, the hyperparameters of the granular task, or by another `task` Table 11 or 12: a column for each of
    `configs` and the paper's; the note marks where the last config differs from it."""

    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value).replace("(", "[").replace(")", "]")

    sides = {**configs, "paper": published.HYPERPARAMETERS[TASKS[task].hyperparameters]}
    rows = []
    for name in dict.fromkeys(name for side in sides.values() for name in side):
        texts = [text(side[name]) if name in side else "" for side in sides.values()]
        rows.append((name, *texts, "differs" if len({*texts[-2:], ""}) > 2 else ""))
    return pd.DataFrame(rows, columns=["name", *sides, "note"])


# ---- what people read -----------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent: 0.0531, 42.4, 10906; "" for NaN."""
    if math.isnan(value):
        return ""
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def measured(mean: float, half_width: float, p_value: float | str = NAN) -> str:
    """ "73.8 ± 13 (p = 0.15)", the p-value also as printed ("<0.01"); what is NaN is left out."""
    text = number(mean) + ("" if math.isnan(half_width) else f" ± {number(half_width, 2)}")
    if isinstance(p_value, str):
        return f"{text} (p {p_value[0]} {p_value[1:]})"
    return text if math.isnan(p_value) else f"{text} (p = {p_value:.2g})"


def _p_text(p_value: float) -> str:
    return "" if math.isnan(p_value) else f"{p_value:.2g}"


def show(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table as people read it: one row per method, "ours" and "paper" per metric, rounded; of a report card what
    one looks for; of all cells (`report_card.cells`) one row each; of others the numbers rounded."""
    if "verdict" in table and "equivalence_p" not in table:
        return table.drop(columns=["profile", "paper_verdict", "p_value", "rule"], errors="ignore")
    if "task" in table:
        table = table.assign(task=[TASKS[task].label if task in TASKS else task for task in table["task"]])
    if "metric" not in table:
        floats = table.select_dtypes("float")
        texts = {name: _p_text if name.endswith(("_p", "_p_holm")) else number for name in floats}
        return table.assign(**{name: floats[name].map(text) for name, text in texts.items()})
    labels = {m.name: m.label for m in METHODS.values()} | {step: label for step, (label, *_) in STEPS.items()}
    table = table.assign(method=table["method"].map(labels))
    return _show_cells(table) if "verdict" in table else _show_wide(table)


def _show_cells(table: pd.DataFrame) -> pd.DataFrame:
    columns = "table task method metric seeds ours Holm paper paper:_Holm difference in_% verdict note records"
    rows = [
        (cell.table.removeprefix("table_"), cell.task, cell.method, str(METRICS[cell.metric]), cell.n_seeds)
        + (measured(cell.mean, cell.ci95, cell.p_value), _p_text(cell.p_holm))
        + (measured(cell.paper_mean, cell.paper_ci95, cell.paper_p), _p_text(cell.paper_p_holm))
        + (number(cell.difference), number(cell.percent, 2), cell.verdict, cell.note, cell.records)
        for cell in table.itertuples()
    ]
    return pd.DataFrame(rows, columns=[name.replace("_", " ") for name in columns.split()])


def _show_wide(table: pd.DataFrame) -> pd.DataFrame:
    rows, place = [], [name for name in ("task", "method") if name in table]
    for names, group in table.groupby(place, sort=False):
        failed = group["n_failed"].max() if "n_failed" in group else 0
        row = dict(zip(place, names)) | {"seeds": f"{group['n_seeds'].max()}{f' ({failed} failed)' if failed else ''}"}
        for cell in group.itertuples():
            metric, absent = METRICS[cell.metric], "not run" if "not run" in cell.note else "none"
            row[str(metric)] = measured(cell.mean, cell.ci95, getattr(cell, "p_value", NAN)) or absent
            if "improvement" in group:
                row[f"{metric.label} better by (%)"] = number(cell.improvement, 2)
                row[f"paper: {metric.label}"] = number(cell.paper_improvement, 2)
            else:
                row[f"paper: {metric}"] = measured(cell.paper_mean, cell.paper_ci95, getattr(cell, "paper_p", NAN))
        rows.append(row | {"note": joined(*dict.fromkeys(group["note"]))})
    return pd.DataFrame(rows)


def styled(table: pd.DataFrame, caption: str = "") -> Styler:
    """`show` for a notebook: nothing cut off, texts to the left, verdicts coloured, the caption above."""
    green, yellow, red = "#c8e6c9", "#fff3c4", "#ffcdd2"
    colours = {"holds": green, "holds in part": yellow, "does not hold": red}
    colours |= {"equivalent": green, "intervals overlap": yellow, "different": red}
    shown, left = show(table), {"text-align": "left", "vertical-align": "top"}
    style = shown.style.hide(axis="index").format(escape="html").set_properties(**left).set_caption(caption)
    style.set_table_styles([{"selector": "th, caption", "props": "text-align: left"}])
    verdicts = [name for name in shown if name.endswith("verdict")]
    look = "background-color: {}; color: black"
    return style.map(lambda verdict: look.format(colours.get(verdict, "#eeeeee")), subset=verdicts)


def write_table(table: pd.DataFrame, name: str, profile: str, output: Path = ROOT, caption: str = "") -> list[Path]:
    """Write results/<profile>/tables/<name>.csv (numbers, with a profile column) and .md (`as_markdown`); the paths."""
    paths = [Path(output) / "results" / profile / "tables" / f"{name}.{kind}" for kind in ("csv", "md")]
    write_csv(paths[0], table.assign(profile=profile))
    write_text_atomic(paths[1], as_markdown(table, name, profile, caption))
    return paths


def as_markdown(table: pd.DataFrame, name: str, profile: str, caption: str = "") -> str:
    """`show` under its caption, which names the profile unless it is "paper"."""
    shown = show(table).astype(str).apply(lambda column: column.str.replace("|", "\\|"))
    lines = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    title = name.replace("_", " ").capitalize().replace("Theta is", "Theta-IS")
    heading = " ".join(filter(None, [f"**{title}.**", caption, profile_note(profile)]))
    return heading + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a table that `write_table` wrote; no row when it is not there, ValueError for a file without them."""
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    try:
        return pd.read_csv(path, usecols=columns, dtype={"note": "str"}, encoding="utf-8").fillna({"note": ""})
    except ValueError as error:
        advice = "Delete it and execute the notebook that writes it again"
        raise ValueError(f"broken table {path}: {error}. {advice}") from error


def profile_note(profile: str) -> str:
    """What every table and figure says when its profile is not "paper"."""
    kinds = {"paper": "", "smoke": "Profile smoke: a toy problem, its numbers mean nothing."}
    return kinds.get(profile, f"Profile {profile}: a reduced problem, not the paper's configuration.")
