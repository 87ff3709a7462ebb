"""Tables of the paper, from records only.

Tables are tidy: one row per method and metric, numbers unrounded (`write_table` stores them as CSV); `show` turns one into
the wide, rounded text that people read, which is also the Markdown file beside the CSV.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from . import published as paper
from .records import ROOT, Run, write_csv, write_text_atomic
from .stats import mean_ci95, paired_comparison

METRICS = {  # metric: label, unit
    "theta_synth_l1": ("θ L1", "‰"),
    "theta_density_l1": ("density L1", "‰"),
    "theta_slope_l1": ("slope L1", "‰"),
    "val_total_variation": ("total variation", "‰"),
    "val_convergence_steps": ("steps to 100 ‰", "steps"),
    "jtfs_distance": ("JTFS distance", ""),
    "train_step_ms": ("time per step", "ms"),
    "theta_am_l1": ("AM L1", "‰"),
    "theta_fm_l1": ("FM L1", "‰"),
    "theta_am_convergence_rate": ("AM converged", "%"),
    "theta_am_convergence_steps": ("AM steps to 100 ‰", "steps"),
    "theta_fm_convergence_rate": ("FM converged", "%"),
    "theta_fm_convergence_steps": ("FM steps to 100 ‰", "steps"),
    "mss_log_linear_distance": ("MSS distance", ""),
    "fad_encodec": ("FAD, EnCodec", ""),
    "frechet_log_mel": ("Fréchet distance, log-mel statistics", ""),
    "median_time": ("time of the loss", "ms"),
    "iqr": ("interquartile range of the time", "ms"),
    "max_memory": ("memory of tensors (MiB, paper: MB of the process)", "MiB, paper: MB"),
    **{
        f"{part}_{name}_l1": (f"{part} {name.replace('_', ' ')} L1", unit)
        for part in ("transient", "decay")
        for name, unit in {"loudness": "0.01 dB", "spectral_centroid": "0.1 dB", "spectral_flatness": "dB²"}.items()
    },
}
_DRUM_SCALE = {
    "jtfs_distance": 1000,
    "mss_log_linear_distance": 1000,
    "transient_loudness_l1": 100,
    "decay_loudness_l1": 100,
    "transient_spectral_centroid_l1": 10,
    "decay_spectral_centroid_l1": 10,
}
DRUM_SCALES = (
    "MSS and JTFS distances times 1000, loudness times 100, centroid times 10, as printed; centroid and flatness are weighted by "
    "the decibels above silence."
)
STEPS = {  # Table 6: technique: label, before, after
    "plus_padam": ("+ P-Adam", "scrapl_plain", "scrapl_padam"),
    "plus_psaga": ("+ P-SAGA", "scrapl_padam", "scrapl_no_theta_is"),
    "plus_theta_is": ("+ θ-IS", "scrapl_no_theta_is", "scrapl"),
}
ABLATION = ("scrapl_plain", "scrapl_padam", "scrapl_no_theta_is", "scrapl", "jtfs", "p_loss")
SAMPLERS = ("scrapl_no_theta_is", "scrapl")
DRUM_METHODS = tuple(method for method in paper.METHODS if method in paper.methods_in("table_4"))
TABLE_3_METRICS = ("theta_am_l1", "theta_fm_l1")
TABLE_7_METRICS = tuple(metric for metric in METRICS if "convergence" in metric and metric.startswith("theta_"))
TABLE_4_METRICS = ("mss_log_linear_distance", "jtfs_distance", "fad_encodec", "frechet_log_mel")
TABLE_8_METRICS, TABLE_9_METRICS = (tuple(m for m in METRICS if m.startswith(part)) for part in ("transient", "decay"))
TABLE_2_METRICS = ("theta_synth_l1", "val_total_variation", "val_convergence_steps")


def seed_values(runs: Iterable[Run]) -> pd.DataFrame:
    """The test values of the finished runs: columns method, seed, metric, value, as `paper.authors_seeds` has them.

    train_step_ms, the median over a run's training steps, is added as a metric. Values a run lacks are NaN or absent. Those of
    the TR-808 tasks are scaled as the paper prints them.
    """
    rows = []
    for run in (run for run in runs if run.ok):
        scale = _DRUM_SCALE if run.task in paper.TR808 else {}
        rows += [
            (run.method, run.seed, row.metric, scale.get(row.metric, 1) * row.value) for row in run.test.itertuples()
        ]
        rows += [(run.method, run.seed, "train_step_ms", (run.info["train_step_ms"] or {}).get("median"))]
    return pd.DataFrame(rows, columns=["method", "seed", "metric", "value"]).astype({"value": float})


def values_by_seed(values: pd.DataFrame, method: str, metric: str) -> pd.Series:
    """Values by seed of one cell of `values`, missing ones left out."""
    chosen = values[(values["method"] == method) & (values["metric"] == metric)]
    return chosen.set_index("seed")["value"].dropna().sort_index()


def pairs_by_seed(values: pd.DataFrame, before: str, after: str, metric: str) -> tuple[pd.Series, pd.Series]:
    """The two cells at the seeds that both have."""
    a, b = values_by_seed(values, before, metric), values_by_seed(values, after, metric)
    seeds = a.index.intersection(b.index)
    return a[seeds], b[seeds]


def curves(runs: Iterable[Run], methods: Iterable[str], metric: str = "theta_synth_l1") -> pd.DataFrame:
    """Validation values of `metric` of finished runs at the steps all seeds of a method share.

    Columns method, step, n_seeds, mean, ci95 (NaN for one seed).
    """
    rows, runs = [], list(runs)
    for method in methods:
        histories = [run.history for run in runs if run.method == method and run.ok]
        if not histories:
            continue
        every = pd.concat(h[(h["split"] == "val") & (h["metric"] == metric)] for h in histories)
        for step, group in every.groupby("step"):
            if len(group) == len(histories):
                rows.append((method, step, len(group), *mean_ci95(group["value"])))
    return pd.DataFrame(rows, columns=["method", "step", "n_seeds", "mean", "ci95"])


def seeds_note(runs: Sequence[Run], methods: Iterable[str], not_run: dict[str, str]) -> str:
    """ "Seeds: 5 (JTFS 3). Failed: none. Not run: MS-CLAP (weights unavailable)." for a caption."""
    methods = list(methods)
    counts = {m: n for m in methods if (n := sum(run.ok for run in runs if run.method == m))}
    usual = max(set(counts.values()), key=list(counts.values()).count, default=0)
    others = ", ".join(f"{paper.METHODS[m]} {n}" for m, n in counts.items() if n != usual)
    failed = ", ".join(
        f"{paper.METHODS[run.method]} seed {run.seed}" for run in runs if run.method in methods and not run.ok
    )
    absent: dict[str, list[str]] = {}
    for method in methods:
        if not any(run.method == method for run in runs):
            absent.setdefault(not_run.get(method, "no record yet"), []).append(paper.METHODS[method])
    missing = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in absent.items())
    notes = [f"Seeds: {usual}{f' ({others})' if others else ''}.", f"Failed: {failed or 'none'}."]
    return " ".join([*notes, f"Not run: {missing}." if missing else ""]).strip()


def row_note(runs: Sequence[Run], method: str, not_run: dict[str, str]) -> str:
    """Why a row is empty, or which of its seeds failed and how."""
    mine = [run for run in runs if run.method == method]
    if not mine:
        return f"not run: {not_run.get(method, 'no record yet')}"
    return "; ".join(f"seed {run.seed} {run.status}" for run in mine if not run.ok)


def _table(
    runs: Sequence[Run],
    methods: Sequence[str],
    metrics: Sequence[str],
    not_run: dict[str, str],
    table: str,
    prefix: dict[str, str],
    condition: str | None = None,
) -> pd.DataFrame:
    values, rows = seed_values(runs), []
    for method in methods:
        finished = sum(run.ok for run in runs if run.method == method)
        failed = sum(not run.ok for run in runs if run.method == method)
        for metric in metrics:
            cell = values_by_seed(values, method, metric.replace("_rate", "_steps"))
            n, lack = len(cell), ""
            mean, half_width = mean_ci95(cell) if n else (math.nan, math.nan)
            if metric.endswith("_rate"):
                n, mean, half_width = finished, 100 * n / finished if finished else math.nan, math.nan
            elif metric == "fad_encodec" and finished and not n:
                lack = "FAD not run: EnCodec's weights unavailable"
            elif n < finished:
                lack = f"{finished - n} of {finished} seeds without {METRICS[metric][0]}"
            name = prefix.get(metric, "") + metric
            there = paper.prints(table, method, name)  # a method or measure of one's own is not
            printed = paper.published(table, method, name, condition) if there else (math.nan, math.nan, 0)
            note = "; ".join(filter(None, [row_note(runs, method, not_run), lack]))
            rows.append((method, metric, METRICS[metric][1], n, failed, mean, half_width, *printed, note))
    columns = [
        "method",
        "metric",
        "unit",
        "n_seeds",
        "n_failed",
        "mean",
        "ci95",
        "paper_mean",
        "paper_ci95",
        "paper_n",
        "note",
    ]
    return pd.DataFrame(rows, columns=columns)


def table_1(runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """Table 1, granular accuracy: test L1 of theta, density and slope in per mille, mean and 1.96 population std / sqrt(n).

    runs: of the task granular and one profile. not_run: method -> why it has no runs (methods with runs need none).
    Columns method, metric, unit, n_seeds, n_failed, mean, ci95 (NaN for one seed), paper_mean, paper_ci95, paper_n, note.
    """
    methods = [method for method in paper.METHODS if method not in ("scrapl_padam", "scrapl_plain")]
    return _table(runs, methods, list(METRICS)[:3], not_run, "table_1", {})


def table_2(runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """Table 2, the ablation: test L1 of theta, total variation (both per mille) and steps to a validation L1 of 100 per mille.

    Arguments and columns as in `table_1`. Steps are averaged over the seeds that converged, the others are counted in the note.
    """
    return _table(runs, ABLATION, TABLE_2_METRICS, not_run, "table_2", {"theta_synth_l1": "test_"})


def _by_task(
    tasks: dict[str, tuple[str, str]],
    runs: Sequence[Run],
    methods: Sequence[str],
    metrics: Sequence[str],
    not_run: dict[str, str],
    table: str,
) -> pd.DataFrame:
    parts = []
    for task, (condition, _) in tasks.items():
        part = _table([run for run in runs if run.task == task], methods, metrics, not_run, table, {}, condition)
        part.insert(0, "task", task)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def table_3(runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """Table 3, chirplet accuracy: test L1 of AM and FM in per mille with uniform and with theta-importance sampling.

    runs: of the chirplet tasks and one profile. Columns task and those of `table_1`.
    """
    return _by_task(paper.CHIRPLETS, runs, SAMPLERS, TABLE_3_METRICS, not_run, "table_3")


def table_7(runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """Table 7, chirplet convergence, per parameter: share of seeds in percent that reach a validation L1 of 100 per mille, and
    their steps. Arguments and columns as in `table_3`."""
    return _by_task(paper.CHIRPLETS, runs, SAMPLERS, TABLE_7_METRICS, not_run, "table_7")


def drum_table(table: str, runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """Tables 4, 8 and 9, reconstructions of drum sounds, aligned (micro) and misaligned (meso): audio distances, then L1 of
    loudness, spectral centroid and flatness of the transient and of the decay.

    table: "table_4", "table_8" or "table_9". runs: of the TR-808 tasks and one profile. Columns task and those of `table_1`.
    The Fréchet distance of log-mel statistics stands beside FAD, which takes EnCodec's weights, and is not in the paper.
    """
    metrics = {"table_4": TABLE_4_METRICS, "table_8": TABLE_8_METRICS, "table_9": TABLE_9_METRICS}[table]
    return _by_task(paper.TR808, runs, DRUM_METHODS, metrics, not_run, table)


def theta_is_effect(runs: Sequence[Run], not_run: dict[str, str]) -> pd.DataFrame:
    """What theta-importance sampling changes on the chirplet tasks: paired differences over seeds (with minus without), 95 % t
    interval, paired t-test, and the improvement of the mean in percent, beside the one in the paper's Tables 3 and 7.

    The improvement takes the same pairs; steps are compared where both seeds converged, and the note says how many did.
    Arguments as in `table_3`. Columns task, method, metric, unit, n_seeds, mean, ci95, p_value, improvement,
    paper_improvement (both in percent, positive is better), note.
    """
    rows = []
    for task, (condition, _) in paper.CHIRPLETS.items():
        mine = [run for run in runs if run.task == task]
        values = seed_values(mine)
        for metric in (*TABLE_3_METRICS, *TABLE_7_METRICS[1::2]):
            a, b = pairs_by_seed(values, *SAMPLERS, metric)
            result = paired_comparison(a, b) if len(a) >= 2 else (math.nan,) * 3
            table = "table_3" if metric in TABLE_3_METRICS else "table_7"
            before, after = (paper.published(table, method, metric, condition).value for method in SAMPLERS)
            improvement = 100 * (1 - b.mean() / a.mean()) if a.any() else math.nan
            finished = [sum(run.method == method and run.ok for run in mine) for method in SAMPLERS]
            reasons = [f"{paper.METHODS[m]}: {note}" for m in SAMPLERS if (note := row_note(mine, m, not_run))]
            note = f"{len(a)} of {min(finished)} pairs have {METRICS[metric][0]}" if len(a) < min(finished) else ""
            rows.append(
                (
                    task,
                    "plus_theta_is",
                    metric,
                    METRICS[metric][1],
                    len(a),
                    *result,
                    improvement,
                    100 * (1 - after / before),
                    "; ".join(filter(None, [*reasons, note])),
                )
            )
    return pd.DataFrame(
        rows,
        columns=[
            "task",
            "method",
            "metric",
            "unit",
            "n_seeds",
            "mean",
            "ci95",
            "p_value",
            "improvement",
            "paper_improvement",
            "note",
        ],
    )


def modulation_of_paths(probabilities: pd.DataFrame, config: dict[str, Any]) -> pd.DataFrame:
    """Where the paths of a chirplet task lie: `probabilities` (columns path_idx, rate, scale, spin, probability, ...) with am_hz
    = rate, fm_oct_per_s = rate / scale (infinite for the low-pass paths), over_uniform = probability times the number of
    paths, and inside: whether the path's centre lies in the synthesizer's range, or within 1 % of its border.

    config: of a run, with sample_rate_hz, am_hz and fm_oct_per_s.
    """
    rate_hz = probabilities["rate"] * config["sample_rate_hz"]
    fm_oct_per_s = rate_hz / probabilities["scale"].where(probabilities["spin"] != 0, 0)
    inside = True
    for rate, (low, high) in ((rate_hz, config["am_hz"]), (fm_oct_per_s, config["fm_oct_per_s"])):
        inside &= (rate > low / 1.01) & (rate < high * 1.01)
    return probabilities.assign(
        am_hz=rate_hz,
        fm_oct_per_s=fm_oct_per_s,
        inside=inside,
        over_uniform=probabilities["probability"] * len(probabilities),
    )


def mass_in_range(paths: dict[str, pd.DataFrame], not_run: dict[str, str]) -> pd.DataFrame:
    """How much of the probability theta-importance sampling gives to the paths inside each synthesizer's range of AM and FM.

    paths: task -> `modulation_of_paths`. not_run: task -> why it has none. Columns task, n_paths, n_inside, mass (sum of the
    probabilities of the paths inside), uniform (their share of all paths), ratio, note.
    """
    rows = []
    for task in paper.CHIRPLETS:
        if task not in paths:
            rows.append((task, 0, 0, *(math.nan,) * 3, f"not run: {not_run.get(task, 'no record yet')}"))
            continue
        inside = paths[task]["inside"]
        mass, uniform = paths[task].loc[inside, "probability"].sum(), inside.mean()
        ratio, note = (mass / uniform, "") if uniform else (math.nan, "no path has its centre in the range")
        rows.append((task, len(inside), int(inside.sum()), mass, uniform, ratio, note))
    return pd.DataFrame(rows, columns=["task", "n_paths", "n_inside", "mass", "uniform", "ratio", "note"])


def table_6(values: pd.DataFrame, not_run: dict[str, str]) -> pd.DataFrame:
    """Table 6, what each technique changes: paired differences over seeds, 95 % t interval, paired t-test.

    values: `seed_values(runs)`, or `paper.authors_seeds()` to recompute the printed table. Pairs are the seeds in which both
    variants have the value; a seed without one (failed, or never converged) is left out and n_seeds says how many remain.
    Columns as in `table_1`, with p_value and paper_p ("<0.01" where so printed) and without n_failed.
    """
    rows = []
    for step, (_, before, after) in STEPS.items():
        for metric in TABLE_2_METRICS:
            a, b = pairs_by_seed(values, before, after, metric)
            result = paired_comparison(a, b) if len(a) >= 2 else (math.nan,) * 3
            absent = [m for m in (before, after) if m not in set(values["method"])]
            note = "; ".join(f"{paper.METHODS[m]} not run: {not_run.get(m, 'no record yet')}" for m in absent)
            possible = len(pairs_by_seed(values, before, after, "theta_synth_l1")[0])
            if not absent and possible < 2:
                note = f"seeds in common: {possible}, a comparison takes 2"
            elif len(a) < possible:
                note = f"{len(a)} of {possible} pairs have {METRICS[metric][0]}"
            name = f"delta_{'test_' if metric == 'theta_synth_l1' else ''}{metric}"
            printed, p_value = (paper.published("table_6", step, name + suffix) for suffix in ("", "_p_value"))
            rows.append((step, metric, METRICS[metric][1], len(a), *result, *printed, p_value.value, note))
    return pd.DataFrame(
        rows,
        columns=[
            "method",
            "metric",
            "unit",
            "n_seeds",
            "mean",
            "ci95",
            "p_value",
            "paper_mean",
            "paper_ci95",
            "paper_n",
            "paper_p",
            "note",
        ],
    )


def table_10(configs: dict[str, dict[str, Any]], printed: dict[str, Any] = paper.HYPERPARAMETERS) -> pd.DataFrame:
    """Table 10, hyperparameters, or Tables 11 and 12 if `printed` is
    `paper.CHIRPLET_HYPERPARAMETERS` or `TR808_HYPERPARAMETERS`: columns name, one per config of the code that runs, paper (as printed), and note, which marks
    the rows where the last config differs from the paper. What a side does not have is blank."""
    sides = {**configs, "paper": printed}
    rows = []
    for name in dict.fromkeys(name for side in sides.values() for name in side):
        texts = [_text(side[name]) if name in side else "" for side in sides.values()]
        rows.append((name, *texts, "differs" if len({*texts[-2:], ""}) > 2 else ""))
    return pd.DataFrame(rows, columns=["name", *sides, "note"])


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("(", "[").replace(")", "]")


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent: 0.0531, 42.4, 10906; "" for NaN."""
    if math.isnan(value):
        return ""
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def measured(mean: float, half_width: float, p_value: float | str = math.nan) -> str:
    """ "73.8 ± 13 (p = 0.15)", the p-value also as printed ("<0.01"); what is NaN is left out."""
    text = number(mean) + ("" if math.isnan(half_width) else f" ± {number(half_width, 2)}")
    if isinstance(p_value, str):
        return f"{text} (p {p_value[0]} {p_value[1:]})"
    return text if math.isnan(p_value) else f"{text} (p = {p_value:.2g})"


def show(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table as people read it: one row per method, "ours" and "paper" per metric, rounded; of a report card what one
    looks for; of all cells (`compare.cells`) one row each; others unchanged."""
    labels, rows = {**paper.METHODS, **{step: label for step, (label, *_) in STEPS.items()}}, []
    if "equivalence_p" in table:
        for cell in table.itertuples():
            rows.append(
                {
                    "table": cell.table.removeprefix("table_"),
                    "task": paper.NAMES.get(cell.task, cell.task),
                    "method": labels[cell.method],
                    "metric": _with_unit(cell.metric),
                    "seeds": cell.n_seeds,
                    "ours": measured(cell.mean, cell.ci95, cell.p_value),
                    "Holm": _p_text(cell.p_holm),
                    "paper": measured(cell.paper_mean, cell.paper_ci95, cell.paper_p),
                    "paper: Holm": _p_text(cell.paper_p_holm),
                    "difference": number(cell.difference),
                    "in %": number(cell.percent, 2),
                    "verdict": cell.verdict,
                    "note": cell.note,
                    "records": cell.records,
                }
            )
        return pd.DataFrame(rows)
    if "verdict" in table:
        return table.drop(columns=["profile", "paper_verdict", "p_value", "rule"], errors="ignore")
    if "metric" not in table:
        floats = table.select_dtypes("float")
        numbers = {name: floats[name].map(_p_text if name.endswith(("_p", "_p_holm")) else number) for name in floats}
        return table.assign(**numbers, **_named_tasks(table))
    for place, group in table.groupby(["task", "method"] if "task" in table else ["method"], sort=False):
        method, failed = place[-1], group["n_failed"].max() if "n_failed" in group else 0
        row = {name: values.iloc[0] for name, values in _named_tasks(group).items()} | {
            "method": labels[method],
            "seeds": str(group["n_seeds"].max()) + (f" ({failed} failed)" if failed else ""),
        }
        for cell in group.itertuples():
            label, name = METRICS[cell.metric][0], _with_unit(cell.metric)
            p_value, paper_p = getattr(cell, "p_value", math.nan), getattr(cell, "paper_p", math.nan)
            row[name] = measured(cell.mean, cell.ci95, p_value) or ("not run" if "not run" in cell.note else "none")
            if "improvement" in group:
                row[f"{label} better by (%)"], row["paper: " + label] = (
                    number(cell.improvement, 2),
                    number(cell.paper_improvement, 2),
                )
            else:
                row[f"paper: {name}"] = measured(cell.paper_mean, cell.paper_ci95, paper_p)
        row["note"] = "; ".join(dict.fromkeys(filter(None, group["note"])))
        rows.append(row)
    return pd.DataFrame(rows)


def _with_unit(metric: str) -> str:
    label, unit = METRICS[metric]
    return label if unit in label else f"{label} ({unit})"


def _p_text(p_value: float) -> str:
    return "" if math.isnan(p_value) else f"{p_value:.2g}"


def _named_tasks(table: pd.DataFrame) -> dict[str, pd.Series]:
    return {"task": table["task"].map(paper.NAMES)} if "task" in table else {}


def styled(table: pd.DataFrame, caption: str = "") -> Styler:
    """`show` for a notebook: nothing cut off, texts to the left, verdicts coloured, the caption above."""
    green, yellow, red = "#c8e6c9", "#fff3c4", "#ffcdd2"
    colours = {"holds": green, "holds in part": yellow, "does not hold": red}
    colours |= {"equivalent": green, "intervals overlap": yellow, "different": red}
    shown = show(table)
    style = (
        shown.style.hide(axis="index")
        .format(escape="html")
        .set_properties(**{"text-align": "left", "vertical-align": "top"})
    )
    style.set_caption(caption).set_table_styles([{"selector": "th, caption", "props": "text-align: left"}])
    verdicts = [name for name in shown if name.endswith("verdict")]
    return style.map(
        lambda verdict: f"background-color: {colours.get(verdict, '#eeeeee')}; color: black", subset=verdicts
    )


def write_table(table: pd.DataFrame, name: str, profile: str, output: Path = ROOT, caption: str = "") -> list[Path]:
    """Write results/<profile>/tables/<name>.csv (numbers, with a profile column) and .md (`show`, the caption above it,
    the profile's name in it unless it is "paper"). Returns the two paths."""
    base = Path(output) / "results" / profile / "tables"
    paths = [base / f"{name}.csv", base / f"{name}.md"]
    write_csv(paths[0], table.assign(profile=profile))
    write_text_atomic(paths[1], as_markdown(table, name, profile, caption))
    return paths


def as_markdown(table: pd.DataFrame, name: str, profile: str, caption: str = "") -> str:
    """What `write_table` writes for people to read."""
    shown = show(table).astype(str).apply(lambda column: column.str.replace("|", "\\|"))
    lines = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    heading = " ".join(
        filter(
            None,
            [
                f"**{name.replace('_', ' ').capitalize().replace('Theta is', 'Theta-IS')}.**",
                caption,
                profile_note(profile),
            ],
        )
    )
    return heading + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a table that `write_table` wrote before; no row when it is not there.

    Raises ValueError for a file without them."""
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    try:
        return pd.read_csv(path, usecols=columns, dtype={"note": "str"}).fillna({"note": ""})
    except ValueError as error:
        raise ValueError(
            f"broken table {path}: {error}. Delete it and execute the notebook that writes it again"
        ) from error


def profile_note(profile: str) -> str:
    """What every table and figure says when its profile is not "paper"."""
    kinds = {"paper": "", "smoke": "Profile smoke: a toy problem, its numbers mean nothing."}
    return kinds.get(profile, f"Profile {profile}: a reduced problem, not the paper's configuration.")
