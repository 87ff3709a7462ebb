"""Figures 1 to 6 of the paper, drawn from records only; each comes with the numbers it shows and a caption.

    plot = figure_1(runs, "quick", not_run, costs)
    save_figure(*plot[:2], "figure_1", "quick", caption=plot.caption)

In a notebook a `Plot` as the last value of a cell shows itself.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .claims import chance_permille, drum_paper_cells, paper_cells
from .published import CHIRPLETS, METHODS, TIMED_AS, TR808
from .records import ROOT, Run, write_bytes_atomic, write_csv
from .stats import mean_ci95
from .tables import (
    ABLATION,
    DRUM_METHODS,
    DRUM_SCALES,
    METRICS,
    SAMPLERS,
    TABLE_3_METRICS,
    curves,
    profile_note,
    read_table,
    seed_values,
    seeds_note,
    values_by_seed,
)

STYLE = {  # method: colour (Okabe & Ito, Tol), marker, line; one for every figure
    "p_loss": ("#000000", "*", "-"),
    "jtfs": ("#0072B2", "s", "-"),
    "scrapl": ("#D55E00", "o", "-"),
    "scrapl_no_theta_is": ("#E69F00", "p", "--"),
    "scrapl_padam": ("#CC79A7", "D", "-."),
    "scrapl_plain": ("#882255", "P", ":"),
    "mss_linear": ("#009E73", "^", "-"),
    "mss_log_linear": ("#56B4E9", "v", "--"),
    "mss_revisited": ("#999933", "<", "-."),
    "mss_random": ("#332288", ">", ":"),
    "ms_clap": ("#999999", "X", "--"),
    "panns_wavegram_logmel": ("#661100", "d", "-."),
}
BAND = "mean and 95 % interval over seeds (± 1.96 population standard deviations / √n)"


class Plot(NamedTuple):
    """A figure, the numbers drawn in it (tidy) and its caption, which is also written below it."""

    figure: Figure
    data: pd.DataFrame
    caption: str

    def _repr_png_(self) -> bytes:
        return _bytes(self, "png")


def _bytes(plot: Plot, kind: str) -> bytes:
    stream = io.BytesIO()
    about = {"Description": plot.caption} if kind == "png" else {"Subject": plot.caption, "CreationDate": None}
    plot.figure.savefig(stream, format=kind, dpi=200, bbox_inches="tight", metadata=about)
    return stream.getvalue()


def save_figure(
    figure: Figure, data: pd.DataFrame, name: str, profile: str, output: Path = ROOT, caption: str = ""
) -> list[Path]:
    """Write figures/<profile>/<name>.pdf, .png (the caption as its Description) and .csv (`data` with a profile column).

    The same figure gives the same bytes. Returns the three paths.
    """
    base = Path(output) / "figures" / profile
    paths = [base / f"{name}.{kind}" for kind in ("pdf", "png", "csv")]
    for path in paths[:2]:
        write_bytes_atomic(path, _bytes(Plot(figure, data, caption), path.suffix[1:]))
    write_csv(paths[2], data.assign(profile=profile))
    return paths


def _start(
    runs: Sequence[Run], profile: str, width: float, panels: int, tasks: Collection[str] = ("granular",), rows: int = 1
) -> tuple[Figure, np.ndarray]:
    wanted = [f"{profile}/{task}" for task in tasks]
    other = sorted({f"{run.profile}/{run.task}" for run in runs}.difference(wanted))
    if other:
        raise ValueError(f"runs of {other} given for a figure of {', '.join(wanted)}; load them with load_runs")
    figure = Figure(figsize=(width, 4.2 if rows == 1 else 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, panels, squeeze=False).ravel()
    for ax in axes:
        ax.grid(True, which="major", color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(
    figure: Figure, axes: Sequence[Axes], data: pd.DataFrame, title: str, notes: Iterable[str], profile: str
) -> Plot:
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    caption = " ".join([f"{title}.", *filter(None, [profile_note(profile), *notes])])
    figure.suptitle(title + ("" if profile == "paper" else f" [profile {profile}]"), fontsize=10, x=0.01, ha="left")
    wrapped = textwrap.fill(caption, width=int(figure.get_figwidth() * 18))
    figure.text(0.01, -0.02, wrapped, fontsize=7, va="top", color="0.25")
    return Plot(figure, data, caption)


def _plain_log(axis_name: str, ax: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, ..., the more of them the less it spans."""
    getattr(ax, f"set_{axis_name}scale")("log")
    axis = getattr(ax, f"{axis_name}axis")
    low, high = axis.get_view_interval()
    spans = {3000: (1,), 100: (1, 3), 10: (1, 2, 5), 4: (1, 2, 3, 5)}
    subs = next((subs for span, subs in spans.items() if high > span * low), (1, 1.2, 1.5, 2, 3, 4, 5, 7))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def step_costs(folder: Path) -> dict[str, float]:
    """Milliseconds of a training step by method: Table 5's loss plus encoder and synthesizer, as `paper.step_ms` has it.

    folder: holds table_5.csv, written by notebook 08_cost. Without it {}: nothing was measured.
    """
    ms = read_table(folder / "table_5.csv", ["method", "ms"]).set_index("method")["ms"].dropna()
    return {method: float(ms[name] + ms["model"]) for method, name in TIMED_AS.items() if name in ms.index}


OURS_COST = "our Table 5 (08_cost, batch 4) plus encoder and synthesizer"
NO_COSTS = "ours is not drawn: notebook 08_cost, which measures it, was not run"


def _against_cost(runs: Sequence[Run], costs: dict[str, float], metric: str, relative: bool) -> pd.DataFrame:
    """Rows method, source ("ours", "paper"), n_seeds, cost (train step relative to P-loss's), value, ci95."""
    values, cells, rows = seed_values(runs), paper_cells(), []
    for method in METHODS:
        seeds = values_by_seed(values, method, metric)
        if len(seeds) and method in costs:
            rows.append((method, "ours", len(seeds), costs[method], *mean_ci95(seeds)))
        if (method, metric) in cells and (method, "train_step_ms") in cells:
            cell = cells[method, metric]
            rows.append(
                (method, "paper", cell.n, cells[method, "train_step_ms"].mean, cell.mean, cell.half_width or math.nan)
            )
    data = pd.DataFrame(rows, columns=["method", "source", "n_seeds", "train_step_ms", "value", "ci95"])
    data.insert(4, "cost", np.nan)
    for _, group in data.groupby("source"):
        base = group[group["method"] == "p_loss"]
        if len(base):
            data.loc[group.index, "cost"] = group["train_step_ms"] / base["train_step_ms"].iloc[0]
            if relative:
                data.loc[group.index, ["value", "ci95"]] /= base["value"].iloc[0]
    return data.dropna(subset="cost").reset_index(drop=True)


def _scatter(
    runs: Sequence[Run],
    profile: str,
    not_run: dict[str, str],
    costs: dict[str, float],
    metric: str,
    title: str,
    ylabel: str,
    relative: bool = False,
) -> Plot:
    data = _against_cost(runs, costs, metric, relative)
    figure, axes = _start(runs, profile, 7.2, 1)
    for row in data.itertuples():
        colour, marker, _ = STYLE[row.method]
        ours = row.source == "ours"
        error = None if math.isnan(row.ci95) else row.ci95
        axes[0].errorbar(
            row.cost,
            row.value,
            error,
            fmt=marker,
            color=colour,
            markersize=9 if marker == "*" else 7,
            markerfacecolor=colour if ours else "white",
            elinewidth=1,
            capsize=2,
            zorder=3 if ours else 2,
        )
    for method in data["method"].unique():
        colour, marker, _ = STYLE[method]
        face = colour if "ours" in set(data.loc[data["method"] == method, "source"]) else "white"
        axes[0].plot([], [], marker, color=colour, markerfacecolor=face, label=METHODS[method])
    axes[0].plot([], [], "o", color="0.4", markerfacecolor="white", label="hollow: the paper's")
    _plain_log("x", axes[0])
    _plain_log("y", axes[0])
    axes[0].set_xlabel("time of one training step, relative to P-loss")
    axes[0].set_ylabel(ylabel)
    notes = [
        f"Filled: ours, hollow: the paper's. Bars: {BAND}.",
        seeds_note(runs, METHODS, not_run),
        f"Cost: {OURS_COST}; the paper's: Table 5 plus 54.7 ms for the model.",
    ]
    if not costs:
        notes.append(f"Cost: {NO_COSTS}.")
    elif "ours" not in set(data["source"]):
        notes.append("Ours is not drawn: there is no finished P-loss run to relate the cost to.")
    return _finish(figure, axes, data.rename(columns={"value": metric}), title, notes, profile)


def figure_1(runs: Sequence[Run], profile: str, not_run: dict[str, str], costs: dict[str, float]) -> Plot:
    """Figure 1: test error (theta L1, per mille) against the cost of a training step relative to P-loss, log axes.

    runs: finished and failed ones of the granular task and this profile (ValueError otherwise), as `records.load_runs` gives
    them. not_run: method -> why it has no runs. costs: see `step_costs`. data: method, source, n_seeds, train_step_ms, cost,
    the metric, ci95.
    """
    return _scatter(
        runs,
        profile,
        not_run,
        costs,
        "theta_synth_l1",
        "Figure 1: error against cost, granular synthesizer",
        "test L1 of θ (‰)",
    )


def figure_3(runs: Sequence[Run], profile: str, not_run: dict[str, str], costs: dict[str, float]) -> Plot:
    """Figure 3: JTFS distance on test against cost, both relative to P-loss (the paper's axis has an arbitrary scale).

    Arguments and data as in `figure_1`.
    """
    return _scatter(
        runs,
        profile,
        not_run,
        costs,
        "jtfs_distance",
        "Figure 3: JTFS distance against cost, granular synthesizer",
        "JTFS distance on test, relative to P-loss",
        relative=True,
    )


def _draw_curves(ax: Axes, data: pd.DataFrame, x: str, metric: str = "theta_synth_l1") -> None:
    for method, group in data.groupby("method", sort=False):
        colour, _, line = STYLE[method]
        band = group["ci95"].fillna(0)
        ax.plot(group[x], group["mean"], line, color=colour, linewidth=1.6, label=METHODS[method])
        ax.fill_between(group[x], group["mean"] - band, group["mean"] + band, color=colour, alpha=0.18, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training step" if x == "step" else "time spent on training steps (s)")
    ax.set_ylabel(f"validation {METRICS[metric][0]} (‰)")


def figure_2(runs: Sequence[Run], profile: str, not_run: dict[str, str], costs: dict[str, float]) -> Plot:
    """Figure 2: validation error against wall-clock time (left, log axis) and training steps (right), all methods.

    Arguments as in `figure_1`; data as in `tables.curves`, and wall_s, the steps' cost.
    """
    data = curves(runs, METHODS)
    data.insert(2, "wall_s", data["step"] * data["method"].map(costs) / 1000)
    figure, axes = _start(runs, profile, 9.6, 2)
    _draw_curves(axes[0], data[data["wall_s"] > 0], "wall_s")
    _plain_log("x", axes[0])
    _draw_curves(axes[1], data, "step")
    notes = [
        f"Lines and bands: {BAND}.",
        f"Time of a step: {OURS_COST if costs else NO_COSTS}.",
        seeds_note(runs, METHODS, not_run),
    ]
    return _finish(
        figure, axes, data, "Figure 2: convergence in time and in steps, granular synthesizer", notes, profile
    )


def learning_curves(
    runs: Sequence[Run], methods: Sequence[str], metric: str, profile: str, not_run: dict[str, str], title: str = ""
) -> Plot:
    """Validation error per step of some methods, with what always guessing the middle of the range costs.

    metric: theta_synth_l1, theta_density_l1 or theta_slope_l1. Other arguments as in `figure_1`, data as in `tables.curves`.
    """
    data = curves(runs, methods, metric)
    figure, axes = _start(runs, profile, 7.2, 1)
    _draw_curves(axes[0], data, "step", metric)
    for grid_size in {run.config["grid_size"] for run in runs}:
        axes[0].axhline(
            chance_permille(grid_size), color="0.3", linewidth=1.2, linestyle=(0, (1, 3)), label="always guessing 1/2"
        )
    notes = [f"Lines and bands: {BAND}.", seeds_note(runs, methods, not_run)]
    title = title or f"Validation {METRICS[metric][0]} while training, granular synthesizer"
    return _finish(figure, axes, data, title, notes, profile)


def figure_4(runs: Sequence[Run], profile: str, not_run: dict[str, str]) -> Plot:
    """Figure 4: validation error per step of the ablation, with JTFS and P-loss; as `learning_curves`."""
    title = "Figure 4: convergence of the ablation, granular synthesizer"
    return learning_curves(runs, ABLATION, "theta_synth_l1", profile, not_run, title)


def by_seed(runs: Sequence[Run], metric: str, profile: str, not_run: dict[str, str]) -> Plot:
    """One metric of every method, seed by seed, beside the paper's mean.

    metric: any of `tables.METRICS`. Other arguments as in `figure_1`. data: method, source ("ours", "paper"), seed (blank for
    a mean), n_seeds, value, ci95.
    """
    values, printed, rows = seed_values(runs), paper_cells(), []
    figure, axes = _start(runs, profile, 7.2, 1)
    for height, method in enumerate(METHODS):
        colour, marker, _ = STYLE[method]
        if len(seeds := values_by_seed(values, method, metric)):
            mean, half_width = mean_ci95(seeds)
            rows += [(method, "ours", seed, 1, value, math.nan) for seed, value in seeds.items()]
            rows.append((method, "ours", None, len(seeds), mean, half_width))
            axes[0].plot(seeds, [height - 0.16] * len(seeds), "|", color=colour, markersize=9)
            axes[0].errorbar(
                mean,
                height - 0.16,
                xerr=0 if math.isnan(half_width) else half_width,
                fmt=marker,
                color=colour,
                capsize=2,
            )
        if cell := printed.get((method, metric)):
            rows.append((method, "paper", None, cell.n, cell.mean, cell.half_width or math.nan))
            axes[0].errorbar(
                cell.mean,
                height + 0.16,
                xerr=cell.half_width,
                fmt=marker,
                color=colour,
                markerfacecolor="white",
                capsize=2,
            )
    data = pd.DataFrame(rows, columns=["method", "source", "seed", "n_seeds", "value", "ci95"]).astype(
        {"seed": "Int64"}
    )
    label, unit = METRICS[metric]
    axes[0].set_yticks(range(len(METHODS)), METHODS.values(), fontsize=8)
    axes[0].invert_yaxis()
    _plain_log("x", axes[0])
    axes[0].set_xlabel(f"{label} ({unit})" if unit and unit not in label else label)
    notes = [f"Filled: ours, ticks: its seeds; hollow: the paper's. Bars: {BAND}.", seeds_note(runs, METHODS, not_run)]
    return _finish(figure, axes, data, f"{label[0].upper()}{label[1:]} by seed, granular synthesizer", notes, profile)


def figure_5(runs: Sequence[Run], profile: str, not_run: dict[str, str]) -> Plot:
    """Figure 5: validation error of AM (above) and FM (below) per step on the chirplet tasks, with uniform and with
    theta-importance sampling, and what always guessing the middle costs.

    runs: of the chirplet tasks and this profile. data: task, metric and the columns of `tables.curves`.
    """
    figure, axes = _start(runs, profile, 12.0, len(CHIRPLETS), CHIRPLETS, rows=len(TABLE_3_METRICS))
    parts, notes = [], [f"Lines and bands: {BAND}."]
    for column, (task, (_, name)) in enumerate(CHIRPLETS.items()):
        mine = [run for run in runs if run.task == task]
        for row, metric in enumerate(TABLE_3_METRICS):
            ax, data = axes[row * len(CHIRPLETS) + column], curves(mine, SAMPLERS, metric)
            _draw_curves(ax, data, "step", metric)
            for grid_size in {run.config["grid_size"] for run in mine}:
                ax.axhline(chance_permille(grid_size), color="0.3", linestyle=(0, (1, 3)), label="always guessing 1/2")
            ax.set_title("" if row else name, fontsize=9)
            if data.empty:
                ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4")
            parts.append(data.assign(task=task, metric=metric))
        notes.append(f"{name[0].upper()}{name[1:]}: {seeds_note(mine, SAMPLERS, not_run)}")
    return _finish(figure, axes, pd.concat(parts), "Figure 5: convergence on chirplets", notes, profile)


def figure_6(paths: dict[str, pd.DataFrame], ranges: dict[str, dict], profile: str, not_run: dict[str, str]) -> Plot:
    """Figure 6: probability of each path over the uniform one, in the plane of FM rate and AM rate; the synthesizer's range is
    the dashed rectangle. Spins +1 and -1 share a centre and are shown by their mean; low-pass paths have no FM rate.

    paths: task -> `tables.modulation_of_paths`. ranges: task -> am_hz and fm_oct_per_s. not_run: task -> why it has no
    probabilities. data: the rows of `paths` with their task.
    """
    figure, axes = _start([], profile, 12.0, len(CHIRPLETS))
    notes, dots = ["Dots: centres of paths."], None
    for ax in axes[1:]:
        ax.sharex(axes[0])
        ax.sharey(axes[0])
    for ax, (task, (_, name)) in zip(axes, CHIRPLETS.items()):
        ax.set_title(name, fontsize=9)
        (am_low, am_high), (fm_low, fm_high) = ranges[task]["am_hz"], ranges[task]["fm_oct_per_s"]
        ax.plot(
            [fm_low, fm_high, fm_high, fm_low, fm_low],
            [am_low, am_low, am_high, am_high, am_low],
            "--",
            color="black",
            zorder=4,
            label="range of the synthesizer",
        )
        if task in paths:
            centres = (
                paths[task][paths[task]["spin"] != 0]
                .groupby(["fm_oct_per_s", "am_hz"], as_index=False)["over_uniform"]
                .mean()
            )
            dots = ax.scatter(
                centres["fm_oct_per_s"],
                centres["am_hz"],
                c=centres["over_uniform"],
                s=min(60, 3000 / len(centres)),
                cmap="viridis",
                norm=LogNorm(0.1, 10),
                edgecolors="0.4",
                linewidths=0.5,
                zorder=3,
            )
            low_pass = paths[task].loc[paths[task]["spin"] == 0, "over_uniform"].mean()
            notes.append(
                f"{name[0].upper()}{name[1:]}: low-pass paths, not drawn, have {low_pass:.2g} times the uniform probability."
            )
        else:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4")
            notes.append(f"{name[0].upper()}{name[1:]}: not run, {not_run.get(task, 'no record yet')}.")
        ax.set(xlabel="FM rate (octaves/s)", ylabel="AM rate (Hz)")
    for axis in ("x", "y"):
        _plain_log(axis, axes[0])
    if dots is not None:
        figure.colorbar(
            dots,
            ax=list(axes),
            label="probability over uniform",
            location="bottom",
            shrink=0.3,
            format="{x:g}",
            extend="both",
        )
    data = (
        pd.concat([table.assign(task=task) for task, table in paths.items()])
        if paths
        else pd.DataFrame(columns=["task"])
    )
    return _finish(figure, axes, data, "Figure 6: path probabilities of theta-importance sampling", notes, profile)


def drum_features(runs: Sequence[Run], metrics: Sequence[str], profile: str, not_run: dict[str, str]) -> Plot:
    """Some measures of drum sounds by method, aligned and misaligned: ours above, the paper's below.

    runs: of the TR-808 tasks and this profile. metrics: of `tables.METRICS`. data: task, source ("ours", "paper"), method, metric,
    n_seeds, value, ci95.
    """
    figure, axes = _start(runs, profile, 12.0, len(metrics), TR808, rows=2)
    printed, rows = drum_paper_cells(), []
    for task, (condition, _) in TR808.items():
        values = seed_values([run for run in runs if run.task == task])
        for method, metric in ((method, metric) for method in DRUM_METHODS for metric in metrics):
            if len(seeds := values_by_seed(values, method, metric)):
                rows.append((task, "ours", method, metric, len(seeds), *mean_ci95(seeds)))
            cell = printed[f"{method} {condition}", metric]
            rows.append((task, "paper", method, metric, cell.n, cell.mean, cell.half_width))
    data = pd.DataFrame(rows, columns=["task", "source", "method", "metric", "n_seeds", "value", "ci95"])
    panels = ((source, metric) for source in ("ours", "paper") for metric in metrics)
    for number, (ax, (source, metric)) in enumerate(zip(axes, panels)):
        mine = data[(data["source"] == source) & (data["metric"] == metric)]
        for row in mine.itertuples():
            colour, marker, _ = STYLE[row.method]
            place, face = DRUM_METHODS.index(row.method), colour if row.task == "tr808_meso" else "white"
            error = 0 if math.isnan(row.ci95) else row.ci95
            ax.errorbar(row.value, place, xerr=error, fmt=marker, color=colour, markerfacecolor=face, capsize=2)
        labels = [METHODS[method] for method in DRUM_METHODS] if number % len(metrics) == 0 else []
        ax.set_yticks(range(len(DRUM_METHODS)), labels or [""] * len(DRUM_METHODS), fontsize=8)
        ax.set_ylim(len(DRUM_METHODS) - 0.5, -0.5)
        if mine.empty:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4")
            ax.set_xticks([])
        else:
            _plain_log("x", ax)
            ax.tick_params(axis="x", labelsize=8)
        ax.set_title(f"{METRICS[metric][0]}, {source}", fontsize=9)
    axes[0].plot([], [], "o", color="0.4", markerfacecolor="white", label="aligned")
    axes[0].plot([], [], "o", color="0.4", label="misaligned")
    notes = [
        f"Hollow: aligned, filled: misaligned. Bars: {BAND}; one that reaches the left edge goes on below. {DRUM_SCALES}"
    ]
    notes += [
        f"{name.capitalize()}: {seeds_note([run for run in runs if run.task == task], DRUM_METHODS, not_run)}"
        for task, (_, name) in TR808.items()
    ]
    return _finish(figure, axes, data, "Drum sounds, aligned and misaligned", notes, profile)
