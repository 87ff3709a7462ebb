"""Figures 1 to 6 of the paper, drawn from records only; each comes with the numbers it shows and a caption.

    plot = figure_1(runs, "quick", not_run, costs)
    save_figure(*plot[:2], "figure_1", "quick", caption=plot.caption)

In a notebook a `Plot` as the last value of a cell shows itself. The user's own settings of matplotlib and seaborn
neither change a figure nor are changed by one.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import tables
from .files import write_bytes_atomic, write_csv
from .records import ROOT, Run
from .tables import ABLATION, DRUM_METHODS, METRICS, NAN, SAMPLERS, STEP, TABLES, seeds_note
from .tasks import CHIRPLETS, METHODS, TR808, methods_of

BAND = "mean and 95 % interval over seeds (± 1.96 population standard deviations / √n)"
OURS_COST = "our Table 5 (08_cost, batch 4) plus encoder and synthesizer"
NO_COSTS = "ours is not drawn: notebook 08_cost, which measures it, was not run"
_OWN = {"axes.grid": True, "grid.color": "0.9", "axes.spines.top": False, "axes.spines.right": False}
_OWN["font.sans-serif"] = ["DejaVu Sans"]  # comes with matplotlib
LOOK = sns.axes_style("ticks", _OWN) | {"grid.linewidth": 0.6}
_themed = matplotlib.style.context(["default", LOOK])  # a decorator: whatever the settings around it, which stay


class Plot(NamedTuple):
    """A figure, the numbers drawn in it (tidy) and its caption, which is also written below it."""

    figure: Figure
    data: pd.DataFrame
    caption: str

    def _repr_png_(self) -> bytes:
        return _bytes(self, "png")


@_themed
def _bytes(plot: Plot, kind: str) -> bytes:
    stream = io.BytesIO()
    about = {"Description": plot.caption} if kind == "png" else {"Subject": plot.caption, "CreationDate": None}
    plot.figure.savefig(stream, format=kind, dpi=200, bbox_inches="tight", metadata=about)
    return stream.getvalue()


def save_figure(
    figure: Figure, data: pd.DataFrame, name: str, profile: str, output: Path = ROOT, caption: str = ""
) -> list[Path]:
    """Write figures/<profile>/<name>.pdf, .png (the caption its Description) and .csv (`data` with a profile column).

    The same figure gives the same bytes. Returns the three paths.
    """
    paths = [Path(output) / "figures" / profile / f"{name}.{kind}" for kind in ("pdf", "png", "csv")]
    for path in paths[:2]:
        write_bytes_atomic(path, _bytes(Plot(figure, data, caption), path.suffix[1:]))
    write_csv(paths[2], data.assign(profile=profile))
    return paths


# ---- what figures share ---------------------------------------------------------------------------------------------


def _start(
    runs: Sequence[Run], profile: str, width: float, panels: int, tasks: Collection[str] = ("granular",), rows: int = 1
) -> tuple[Figure, np.ndarray]:
    wanted = [f"{profile}/{task}" for task in tasks]
    other = sorted({f"{run.profile}/{run.task}" for run in runs}.difference(wanted))
    if other:
        raise ValueError(f"runs of {other} given for a figure of {', '.join(wanted)}; load them with load_runs")
    figure = Figure(figsize=(width, 4.2 if rows == 1 else 2.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, panels, squeeze=False).ravel()


def _finish(
    figure: Figure, axes: Sequence[Axes], data: pd.DataFrame, title: str, notes: Iterable[str], profile: str
) -> Plot:
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    caption = " ".join([f"{title}.", *filter(None, [tables.profile_note(profile), *notes])])
    figure.suptitle(title + ("" if profile == "paper" else f" [profile {profile}]"), fontsize=10, x=0.01, ha="left")
    wrapped = textwrap.fill(caption, width=int(figure.get_figwidth() * 18))
    figure.text(0.01, -0.02, wrapped, fontsize=7, va="top", color="0.25")
    return Plot(figure, data, caption)


def _plain_log(ax: Axes, *names: str) -> None:
    """Logarithmic axes with plain numbers at 1, 2, 5, 10, ..., the more of them the less an axis spans."""
    for name in names:
        ax.set(**{f"{name}scale": "log"})
        axis = getattr(ax, f"{name}axis")
        low, high = axis.get_view_interval()
        spans = {3000: (1,), 100: (1, 3), 10: (1, 2, 5), 4: (1, 2, 3, 5)}
        subs = next((subs for span, subs in spans.items() if high > span * low), (1, 1.2, 1.5, 2, 3, 4, 5, 7))
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _point(ax: Axes, method: str, x: float, y: float, filled: bool, **errors: float) -> None:
    """A method's marker with bars; errors: xerr or yerr, NaN for none."""
    colour, marker, _ = METHODS[method].style
    errors = {name: 0.0 if math.isnan(error) else error for name, error in errors.items()}
    look = {"markersize": 9 if marker == "*" else 7, "elinewidth": 1, "capsize": 2 if any(errors.values()) else 0}
    face = colour if filled else "white"
    ax.errorbar(x, y, fmt=marker, color=colour, markerfacecolor=face, zorder=2 + filled, **look, **errors)


def _key(ax: Axes, label: str, filled: bool, colour: str = "0.4", marker: str = "o") -> None:
    """An entry of the legend."""
    ax.plot([], [], marker, color=colour, markerfacecolor=colour if filled else "white", label=label)


def _not_run(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4")


def _draw_curves(ax: Axes, curves: pd.DataFrame, metric: str, x: str = "step") -> None:
    """`tables.curves` as lines and bands, per step or over wall_s."""
    for method, group in curves.groupby("method", sort=False):
        colour, _, line = METHODS[method].style
        ax.plot(group[x], group["mean"], color=colour, linestyle=line, linewidth=1.6, label=METHODS[method].label)
        low, high = (group["mean"] + sign * group["ci95"].fillna(0) for sign in (-1, 1))
        ax.fill_between(group[x], low, high, color=colour, alpha=0.18, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training step" if x == "step" else "time spent on training steps (s)")
    ax.set_ylabel(f"validation {METRICS[metric].label} (‰)")


def _draw_chance(ax: Axes, runs: Sequence[Run]) -> None:
    for grid_size in {run.config["grid_size"] for run in runs}:
        look = {"color": "0.3", "linewidth": 1.2, "linestyle": (0, (1, 3))}
        ax.axhline(tables.chance_permille(grid_size), label="always guessing 1/2", **look)


def _capital(label: str) -> str:
    return label[0].upper() + label[1:]


# ---- the granular task ----------------------------------------------------------------------------------------------


def _against_cost(runs: Sequence[Run], costs: dict[str, float], metric: str, methods: Sequence[str]) -> pd.DataFrame:
    """Columns method, source ("ours", "paper"), n_seeds, train_step_ms, cost (relative to P-loss's), value, ci95."""
    theirs, rows = tables.paper_cells(), []
    sides = {"ours": (tables.cells_of(runs), tables.cost_cells(costs)), "paper": (theirs, theirs)}
    for method, (source, (cells, steps)) in itertools.product(methods, sides.items()):
        bases = cells.get(("granular", "p_loss", metric)), steps.get(("granular", "p_loss", STEP))
        cell, step = cells.get(("granular", method, metric)), steps.get(("granular", method, STEP))
        if cell and step and all(bases):
            unit = bases[0].mean if metric == "jtfs_distance" else 1.0
            cost = step.mean / bases[1].mean
            rows.append((method, source, cell.n, step.mean, cost, cell.mean / unit, cell.ci95 / unit))
    return pd.DataFrame(rows, columns=["method", "source", "n_seeds", "train_step_ms", "cost", "value", "ci95"])


@_themed
def figure_1(
    runs: Sequence[Run],
    profile: str,
    not_run: dict[str, str],
    costs: dict[str, float],
    metric: str = "theta_synth_l1",
    methods: Sequence[str] | None = None,
) -> Plot:
    """Figure 1: test error (theta L1, per mille) against the cost of a training step relative to P-loss, log axes. With
    metric "jtfs_distance" Figure 3: JTFS distance on test, relative to P-loss, too (the paper's axis has an arbitrary
    scale).

    runs: finished and failed ones of the granular task and this profile (ValueError otherwise), as `records.load_runs`
    gives them. not_run: method -> why it has no runs. costs: see `tables.step_costs`. methods: None is the paper's.
    """
    methods = methods_of("granular") if methods is None else methods
    data = _against_cost(runs, costs, metric, methods)
    figure, (ax,) = _start(runs, profile, 7.2, 1)
    for row in data.itertuples():
        _point(ax, row.method, row.cost, row.value, row.source == "ours", yerr=row.ci95)
    for method, group in data.groupby("method", sort=False):
        _key(ax, METHODS[method].label, "ours" in set(group["source"]), *METHODS[method].style[:2])
    _key(ax, "hollow: the paper's", False)
    _plain_log(ax, "x", "y")
    title, ylabel = "Figure 1: error", "test L1 of θ (‰)"
    if metric == "jtfs_distance":
        title, ylabel = "Figure 3: JTFS distance", "JTFS distance on test, relative to P-loss"
    ax.set(xlabel="time of one training step, relative to P-loss", ylabel=ylabel)
    notes = [f"Filled: ours, hollow: the paper's. Bars: {BAND}.", seeds_note(runs, methods, not_run)]
    notes.append(f"Cost: {OURS_COST}; the paper's: Table 5 plus 54.7 ms for the model.")
    if not costs:
        notes.append(f"Cost: {NO_COSTS}.")
    elif "ours" not in set(data["source"]):
        notes.append("Ours is not drawn: there is no finished P-loss run to relate the cost to.")
    title = f"{title} against cost, granular synthesizer"
    return _finish(figure, [ax], data.rename(columns={"value": metric}), title, notes, profile)


@_themed
def figure_2(
    runs: Sequence[Run],
    profile: str,
    not_run: dict[str, str],
    costs: dict[str, float],
    methods: Sequence[str] | None = None,
    title: str = "Figure 2: convergence in time and in steps",
) -> Plot:
    """Figure 2: validation error against wall-clock time (left, log axis; wall_s: the steps' cost) and training steps
    (right). Arguments as in `figure_1`."""
    methods = methods_of("granular") if methods is None else methods
    figure, axes = _start(runs, profile, 9.6, 2)
    data = tables.curves(runs, methods)
    data.insert(2, "wall_s", data["step"] * data["method"].map(costs).astype(float) / 1000)
    _draw_curves(axes[0], data[data["wall_s"] > 0], "theta_synth_l1", "wall_s")
    _plain_log(axes[0], "x")
    _draw_curves(axes[1], data, "theta_synth_l1")
    notes = [f"Lines and bands: {BAND}.", f"Time of a step: {OURS_COST if costs else NO_COSTS}."]
    notes.append(seeds_note(runs, methods, not_run))
    return _finish(figure, axes, data, f"{title}, granular synthesizer", notes, profile)


@_themed
def learning_curves(
    runs: Sequence[Run], methods: Sequence[str], metric: str, profile: str, not_run: dict[str, str], title: str = ""
) -> Plot:
    """Validation error per step of some methods, with what always guessing the middle of the range costs.

    metric: theta_synth_l1, theta_density_l1 or theta_slope_l1. Otherwise as `figure_1`.
    """
    figure, (ax,) = _start(runs, profile, 7.2, 1)
    data = tables.curves(runs, methods, metric)
    _draw_curves(ax, data, metric)
    _draw_chance(ax, runs)
    notes = [f"Lines and bands: {BAND}.", seeds_note(runs, methods, not_run)]
    title = title or f"Validation {METRICS[metric].label} while training, granular synthesizer"
    return _finish(figure, [ax], data, title, notes, profile)


def figure_4(runs: Sequence[Run], profile: str, not_run: dict[str, str]) -> Plot:
    """Figure 4: validation error per step of the ablation, with JTFS and P-loss; as `learning_curves`."""
    title = "Figure 4: convergence of the ablation, granular synthesizer"
    return learning_curves(runs, ABLATION, "theta_synth_l1", profile, not_run, title)


@_themed
def by_seed(runs: Sequence[Run], metric: str, profile: str, not_run: dict[str, str]) -> Plot:
    """One metric (of `tables.METRICS`) of every method, seed by seed, beside the paper's mean; as `figure_1`."""
    figure, (ax,) = _start(runs, profile, 7.2, 1)
    sides, rows, methods = {"ours": tables.cells_of(runs), "paper": tables.paper_cells()}, [], methods_of("granular")
    for (height, method), (source, cells) in itertools.product(enumerate(methods), sides.items()):
        if cell := cells.get(("granular", method, metric)):
            ours, place = source == "ours", height + (-0.16 if source == "ours" else 0.16)
            if ours:
                rows += [(method, source, seed, 1, value, NAN) for seed, value in cell.seeds.items()]
                ax.plot(cell.seeds, [place] * cell.n, "|", color=METHODS[method].style[0], markersize=9)
            rows.append((method, source, None, cell.n, cell.mean, cell.ci95))
            _point(ax, method, cell.mean, place, ours, xerr=cell.ci95)
    data = pd.DataFrame(rows, columns=["method", "source", "seed", "n_seeds", "value", "ci95"])
    ax.set_yticks(range(len(methods)), [METHODS[method].label for method in methods], fontsize=8)
    ax.invert_yaxis()
    _plain_log(ax, "x")
    ax.set_xlabel(str(METRICS[metric]))
    notes = [f"Filled: ours, ticks: its seeds; hollow: the paper's. Bars: {BAND}.", seeds_note(runs, methods, not_run)]
    title = f"{_capital(METRICS[metric].label)} by seed, granular synthesizer"
    return _finish(figure, [ax], data.astype({"seed": "Int64"}), title, notes, profile)


# ---- chirplets and drum sounds --------------------------------------------------------------------------------------


@_themed
def figure_5(runs: Sequence[Run], profile: str, not_run: dict[str, str]) -> Plot:
    """Figure 5: validation error of AM (above) and FM (below) per step on the chirplet tasks, with uniform and with
    theta-importance sampling, and what always guessing the middle costs. runs: of the chirplet tasks and this profile.
    """
    figure, axes = _start(runs, profile, 12.0, len(CHIRPLETS), CHIRPLETS, rows=len(TABLES[3]))
    parts, notes = [], [f"Lines and bands: {BAND}."]
    for (task, about), column in zip(CHIRPLETS.items(), axes.reshape(len(TABLES[3]), -1).T):
        mine = [run for run in runs if run.task == task]
        for ax, metric in zip(column, TABLES[3]):
            data = tables.curves(mine, SAMPLERS, metric)
            _draw_curves(ax, data, metric)
            _draw_chance(ax, mine)
            if data.empty:
                _not_run(ax)
            parts.append(data.assign(task=task, metric=metric))
        column[0].set_title(about.label, fontsize=9)
        notes.append(f"{_capital(about.label)}: {seeds_note(mine, SAMPLERS, not_run)}")
    return _finish(figure, axes, pd.concat(parts), "Figure 5: convergence on chirplets", notes, profile)


@_themed
def figure_6(paths: dict[str, pd.DataFrame], ranges: dict[str, dict], profile: str, not_run: dict[str, str]) -> Plot:
    """Figure 6: probability of each path over the uniform one, in the plane of FM rate and AM rate. Spins +1 and -1
    share a centre and are shown by their mean; low-pass paths have no FM rate.

    paths: task -> `tables.modulation_of_paths`. ranges: task -> am_hz and fm_oct_per_s. not_run: task -> why it has no
    probabilities.
    """
    figure, axes = _start([], profile, 12.0, len(CHIRPLETS))
    notes, dots = ["Dots: centres of paths."], None
    for ax, (task, about) in zip(axes, CHIRPLETS.items()):
        if ax is not axes[0]:
            ax.sharex(axes[0])
            ax.sharey(axes[0])
        (am_low, am_high), (fm_low, fm_high) = ranges[task]["am_hz"], ranges[task]["fm_oct_per_s"]
        fm, am = [fm_low, fm_high, fm_high, fm_low, fm_low], [am_low, am_low, am_high, am_high, am_low]
        ax.plot(fm, am, "--", color="black", zorder=4, label="range of the synthesizer")
        if task in paths:
            with_spin = paths[task]["spin"] != 0
            centres = paths[task][with_spin].groupby(["fm_oct_per_s", "am_hz"])["over_uniform"].mean().reset_index()
            fm_oct, am_hz, over_uniform = centres.to_numpy().T
            look = {"cmap": "viridis", "norm": LogNorm(0.1, 10), "edgecolors": "0.4", "linewidths": 0.5, "zorder": 3}
            dots = ax.scatter(fm_oct, am_hz, c=over_uniform, s=min(60, 3000 / len(centres)), **look)
            low_pass = f"{paths[task].loc[~with_spin, 'over_uniform'].mean():.2g} times the uniform probability"
            notes.append(f"{_capital(about.label)}: low-pass paths, not drawn, have {low_pass}.")
        else:
            _not_run(ax)
            notes.append(f"{_capital(about.label)}: not run, {not_run.get(task, 'no record yet')}.")
        ax.set(xlabel="FM rate (octaves/s)", ylabel="AM rate (Hz)")
        ax.set_title(about.label, fontsize=9)
    _plain_log(axes[0], "x", "y")
    if dots is not None:
        look = {"location": "bottom", "shrink": 0.3, "format": "{x:g}", "extend": "both"}
        figure.colorbar(dots, ax=list(axes), label="probability over uniform", **look)
    parts = [table.assign(task=task) for task, table in paths.items()]
    data = pd.concat(parts) if parts else pd.DataFrame(columns=["task"])
    return _finish(figure, axes, data, "Figure 6: path probabilities of theta-importance sampling", notes, profile)


@_themed
def drum_features(runs: Sequence[Run], metrics: Sequence[str], profile: str, not_run: dict[str, str]) -> Plot:
    """Some measures (of `tables.METRICS`) of drum sounds by method, aligned and misaligned: ours above, the paper's
    below. runs: of the TR-808 tasks and this profile."""
    figure, axes = _start(runs, profile, 12.0, len(metrics), TR808, rows=2)
    sides, rows, notes = {"ours": tables.cells_of(runs), "paper": tables.paper_cells()}, [], []
    for task, about in TR808.items():
        for method, metric, (source, cells) in itertools.product(DRUM_METHODS, metrics, sides.items()):
            if cell := cells.get((task, method, metric)):
                rows.append((task, source, method, metric, cell.n, cell.mean, cell.ci95))
        of_task = seeds_note([run for run in runs if run.task == task], DRUM_METHODS, not_run)
        notes.append(f"{_capital(about.label)}: {of_task}")
    data = pd.DataFrame(rows, columns=["task", "source", "method", "metric", "n_seeds", "value", "ci95"])
    panels = [(source, metric) for source in ("ours", "paper") for metric in metrics]
    for ax, (source, metric) in zip(axes, panels):
        mine = data[(data["source"] == source) & (data["metric"] == metric)]
        for row in mine.itertuples():
            _point(ax, row.method, row.value, DRUM_METHODS.index(row.method), row.task == "tr808_meso", xerr=row.ci95)
        labels = [METHODS[method].label if metric == metrics[0] else "" for method in DRUM_METHODS]
        ax.set_yticks(range(len(DRUM_METHODS)), labels, fontsize=8)
        ax.set_ylim(len(DRUM_METHODS) - 0.5, -0.5)
        if mine.empty:
            _not_run(ax)
            ax.set_xticks([])
        else:
            _plain_log(ax, "x")
            ax.tick_params(axis="x", labelsize=8)
        ax.set_title(f"{METRICS[metric].label}, {source}", fontsize=9)
    for task, about in TR808.items():
        _key(axes[0], about.label, task == "tr808_meso")
    bars = f"Bars: {BAND}; one that reaches the left edge goes on below."
    notes.insert(0, f"Hollow: aligned, filled: misaligned. {bars} {tables.DRUM_SCALES}")
    return _finish(figure, axes, data, "Drum sounds, aligned and misaligned", notes, profile)
