"""The published numbers of the SCRAPL paper (Mitcheltree et al., arXiv 2602.11145), under this project's names.

In data_published: ``published_tables.csv``, Tables 1 to 9 and Figures 1 and 3 as printed;
``published_granular_seeds.json``, the authors' values seed by seed behind Tables 2 and 6;
``published_hyperparameters.toml``, Tables 10 to 12; ``names.toml``, what this project calls the methods and metrics of
these files.
"""

from __future__ import annotations

import json
import math
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .tasks import METHODS, check_name

DATA = Path(__file__).resolve().parent / "data_published"
HYPERPARAMETERS = tomllib.loads((DATA / "published_hyperparameters.toml").read_text(encoding="utf-8"))
"""What the authors ran SCRAPL with, by table ("table_10" granular, "table_11" chirplet, "table_12" TR-808) and field of
a run's config."""

NAMES = tomllib.loads((DATA / "names.toml").read_text(encoding="utf-8"))
"""This project's names and units for those of the data files."""


class Published(NamedTuple):
    """A printed number: value (float, or "<0.01" for a p-value so printed), 95 % half-width (NaN: none), seeds."""

    value: float | str
    ci95: float
    n: int


@cache
def _table(name: str) -> pd.DataFrame:
    table = pd.read_csv(DATA / "published_tables.csv", dtype={"value": str}, encoding="utf-8")
    table = table.replace({"method": NAMES["tables"]}).fillna({"value": "nan"})
    return _only(table.assign(metric=table["metric"].str.replace("test_", "")), "table", name)


def _only(table: pd.DataFrame, column: str, wanted: str) -> pd.DataFrame:
    check_name(f"published {column}", wanted, table[column].unique())
    return table[table[column] == wanted]


def published(table: str, method: str, metric: str, condition: str | None = None) -> Published:
    """The number printed in `table` ("table_1" .. "table_9", "figure_1", "figure_3") for `method` (this project's
    names, or "plus_padam", "plus_psaga", "plus_theta_is" in Table 6) and `metric`, in the unit the table prints.

    condition: needed where the table has several per method (chirplet ranges; "micro", "meso").
    A value printed as blank (never converged) is NaN. Raises ValueError naming the nearest entry for what is not there.
    """
    rows = _only(_only(_table(table), "method", method), "metric", metric)
    if condition is not None:
        rows = _only(rows, "condition", condition)
    if len(rows) != 1:
        raise ValueError(f"{table} {method} {metric} is printed for {list(rows['condition'])}; give one as condition")
    value, ci95, n = rows[["value", "ci95", "n_seeds"]].iloc[0]
    return Published(value if value.startswith("<") else float(value), float(ci95), int(n))


def find(table: str, method: str, metric: str, condition: str | None = None) -> Published:
    """As `published`, but blanks where the table has none, as for a method, a measure or a task of one's own."""
    wanted = {"method": method, "metric": metric} | ({} if condition is None else {"condition": condition})
    there = (_table(table)[list(wanted)] == list(wanted.values())).all(axis=1).any()
    return published(table, method, metric, condition) if there else Published(math.nan, math.nan, 0)


def methods_in(table: str) -> list[str]:
    """The methods that `table` prints, under this project's names."""
    return list(_table(table)["method"].unique())


def step_ms() -> dict[str, float]:
    """Milliseconds of a training step by method in the paper's Figure 1: loss (Table 5), encoder and synthesizer.

    Table 5 has one SCRAPL: its variants share the loss. Measured on an RTX A5000, batch 4, 32768 samples.
    """
    model = published("figure_1", "encoder_and_synth", "model_step_time").value
    times = {loss: model + published("table_5", loss, "median_time").value for loss in methods_in("table_5")}
    return {name: times[method.loss] for name, method in METHODS.items() if method.loss in times}


def authors_seeds() -> pd.DataFrame:
    """The authors' granular values behind Tables 2 and 6: columns task, method, seed (0..19), metric, value (per mille;
    steps for val_convergence_steps), grid_size. All reached the convergence threshold: no value is missing."""
    stored = json.loads((DATA / "published_granular_seeds.json").read_text(encoding="utf-8"))
    rows = [
        ("granular", method, seed, metric, value * (1 if metric.endswith("_steps") else 1000))
        for stored_method, method in NAMES["seed_methods"].items()
        for stored_metric, metric in NAMES["seed_metrics"].items()
        for seed, value in enumerate(stored[stored_method][stored_metric])
    ]
    table = pd.DataFrame(rows, columns=["task", "method", "seed", "metric", "value"])
    return table.assign(grid_size=HYPERPARAMETERS["table_10"]["grid_size"])
