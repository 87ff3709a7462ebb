"""What is on disk of a grid: done, failed, stale, missing or under way; hours spent and hours to go."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import pandas as pd

from scrapl_lib.losses import SCRAPLLoss

from . import records
from .checkpoints import checkpoint_folder
from .path_probabilities import saved_curvature
from .records import IMPORTANCE, ROOT, Run, config_hash, run_folder
from .tasks import BEYOND, METHODS, NOT_RUN, TASKS, RunConfig, grid, importance_config, methods_of, step_cost


def states(configs: Iterable[RunConfig], output: Path = ROOT) -> dict[RunConfig, str]:
    """What is on disk of each run: done, failed, stale or missing. Raises BrokenRecord."""
    folders = {c: run_folder(c.profile, c.task, c.method, c.seed, output) for c in configs}
    return {config: records.run_state(folder, config_hash(config.flat)) for config, folder in folders.items()}


def runs_on_disk(
    task: str, profile: str = "quick", output: Path = ROOT, methods: Iterable[str] | None = None
) -> list[Run]:
    """The finished and failed runs of a task's grid, or of other `methods`; stale ones are left out with a warning.
    Raises BrokenRecord."""
    expected = {(c.method, c.seed): config_hash(c.flat) for c in grid(task, profile, methods)}
    return records.load_runs(profile, task, expected, output)


@functools.cache
def n_paths(config: RunConfig) -> int:
    """Number of paths of a config's transform."""
    return SCRAPLLoss(**config.transform()).n_paths


def kept_of(config: RunConfig, output: Path = ROOT) -> str:
    """What there is of a run, or of path probabilities, for the next call to go on from; "" for nothing."""
    if config.method == IMPORTANCE:
        n_done = len(saved_curvature(config, output))
        return f"{n_done} paths" if n_done else ""
    steps = [int(path.stem.removeprefix("step_")) for path in checkpoint_folder(config, output).glob("step_*.pt")]
    return f"step {max(steps)}" if steps else ""


def progress_of(config: RunConfig, output: Path) -> tuple[float, str]:
    """How much of a run under way is done, from 0 to 1, and what its worker says of it."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if config.method == IMPORTANCE:
            return len(saved_curvature(config, output)) / n_paths(config), ""
        progress = json.loads((checkpoint_folder(config, output) / "progress.json").read_text(encoding="utf-8"))
        return progress["done"], f"{config.method} {config.seed}: {progress['words']}"
    return 0.0, ""


def _hours_of_a_run(method: str, known: dict[str, list[float]]) -> float:
    """Hours that a run of a task takes; nan: unknown. known: hours of finished runs by method.

    The mean of the method's own, else what those of the other methods say by `step_cost`."""
    others = (hours / step_cost(other) for other in known if other != IMPORTANCE for hours in known[other])
    found = known.get(method) or [step_cost(method) * hours for hours in others]
    return mean(found) if found else math.nan


def tally(task: str, profile: str, output: Path) -> pd.DataFrame:
    """A row per method and for the path probabilities: how many are done, failed, stale and missing, the hours spent on
    the done and failed ones and to go for the missing (nan: unknown), and the most memory that one took, in MiB."""
    rows, known = {}, {}
    wanted = [*grid(task, profile), *grid(task, profile, BEYOND), importance_config(task, profile)]
    for config, state in states(wanted, output).items():
        if config.method in BEYOND and state == "missing":
            continue  # run when asked for
        row = rows.setdefault(
            config.method, dict.fromkeys(("done", "failed", "stale", "missing", "spent", "memory"), 0)
        )
        row[state] += 1
        if state in ("done", "failed"):
            folder = run_folder(profile, task, config.method, config.seed, output)
            info, _ = records.read_record(folder)
            hours = records.hours_of(info) if config.method == IMPORTANCE else records.read_run(folder).hours
            row["spent"] += hours
            row["memory"] = max(row["memory"], info["peak_memory_mb"])
            if state == "done":
                known.setdefault(config.method, []).append(hours)
    for method, row in rows.items():
        row["to_go"] = row["missing"] * _hours_of_a_run(method, known) if row["missing"] else 0
    return pd.DataFrame(rows).T


def _hours(value: float) -> str:
    return "?" if math.isnan(value) else "0" if value == 0 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _cell(n: pd.Series) -> str:
    stale = f"+{n['stale']:.0f} stale" if n["stale"] else ""
    return f"{n['done']:.0f}/{n['failed']:.0f}/{n['missing']:.0f}{stale} {_hours(n['spent'])}+{_hours(n['to_go'])}"


def overview(profile: str, output: Path = ROOT) -> str:
    """All tasks by method, as a text: how many runs are done, failed, stale and missing, hours spent and to go."""
    tallies, matrix = {task: tally(task, profile, output) for task in TASKS}, {}
    for task, table in tallies.items():
        not_run = dict.fromkeys(NOT_RUN.keys() & methods_of(task), "not run")
        matrix[tuple(task.partition("_")[::2])] = not_run | table.apply(_cell, axis=1).to_dict()
    whole = pd.concat(tallies)
    n, unknown = whole.sum(), whole.loc[whole["to_go"].isna(), "missing"].sum()
    besides = f" and {unknown:.0f} times ?" if unknown else ""
    frame = pd.DataFrame(matrix)
    shown = [name for name in [*METHODS, IMPORTANCE] if name in frame.index or name not in BEYOND]
    table = frame.reindex(shown).fillna("").to_string()
    lines = [
        f"profile {profile}: done/failed/missing, hours spent+to go",
        f"\n{table}\n",
        f"in all {n['done']:.0f} done, {n['failed']:.0f} failed, {n['stale']:.0f} stale, {n['missing']:.0f} missing; "
        f"{_hours(n['spent'])} hours spent, {_hours(n['to_go'])} to go{besides}",
        "Hours are one worker's. Spent: by the records, which know a resumed run's training steps or its last part.",
        "To go: by the finished runs of the task and method, else roughly by its other methods'; ?: there are none.",
    ]
    return "\n".join(lines + [f"{method} not run: {why}" for method, why in NOT_RUN.items()])
