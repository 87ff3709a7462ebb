"""The published numbers of the SCRAPL paper (Mitcheltree et al., ICLR 2026, arXiv 2602.11145), under this project's names.

``data_published/published_tables.csv`` holds Tables 1 to 9 and Figures 1 and 3 as printed;
``data_published/published_granular_seeds.json`` the authors' values seed by seed behind Tables 2 and 6.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

DATA = Path(__file__).resolve().parent / "data_published"

METHODS = {
    "p_loss": "P-loss",
    "jtfs": "JTFS",
    "scrapl": "SCRAPL",
    "scrapl_no_theta_is": "SCRAPL (no θ-IS)",
    "scrapl_padam": "SCRAPL (P-Adam)",
    "scrapl_plain": "SCRAPL (plain)",
    "mss_linear": "MSS linear",
    "mss_log_linear": "MSS log + linear",
    "mss_revisited": "MSS revisited",
    "mss_random": "MSS random",
    "ms_clap": "MS-CLAP",
    "panns_wavegram_logmel": "PANNs Wavegram-Logmel",
}
"""The methods in display order, with their labels."""

_RENAMED = {  # the paper's own names in the data files, by place
    "scrapl_padam_psaga": "scrapl_no_theta_is",
    "scrapl_padam_psaga_theta_is": "scrapl",
    "scrapl_uniform": "scrapl_no_theta_is",
    "scrapl_theta_is": "scrapl",
}
_SEED_METHODS = {
    "scrapl": "scrapl_plain",
    "scrapl_padam": "scrapl_padam",
    "scrapl_padam_psaga": "scrapl_no_theta_is",
    "scrapl_padam_psaga_thetais": "scrapl",
}
_SEED_METRICS = {  # stored name -> ours, factor to its unit
    "l1_theta": ("theta_synth_l1", 1000.0),
    "l1_density": ("theta_density_l1", 1000.0),
    "l1_slope": ("theta_slope_l1", 1000.0),
    "total_variation": ("val_total_variation", 1000.0),
    "convergence_step": ("val_convergence_steps", 1.0),
}

HYPERPARAMETERS = {
    "sample_rate_hz": 8192,
    "n_samples": 32768,
    "n_grains": 64,
    "grain_samples": 4096,
    "slope_hop": 256,
    "grid_size": 32,
    "n_synth_seeds": 5,
    "J": 12,
    "Q1": 8,
    "Q2": 2,
    "J_fr": 3,
    "Q_fr": 2,
    "T": 4096,
    "F": 8,
    "n_paths": 315,
    "cqt_octaves": 5,
    "cqt_hop": 256,
    "channels": 128,
    "pools": [[2, 2]] * 5,
    "dense": 64,
    "dropout": 0.5,
    "n_weights": 604106,
    "epochs": 200,
    "n_steps": 19200,
    "batch_size": 32,
    "lr": 1e-5,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "gradient_scale": 1e8,
    "n_seeds": 20,
}
"""The granular task as the authors ran SCRAPL (Table 10 and the configurations of their runs), by the names of a run's config;
JTFS ran one seed, with batches of 6, 5 of them accumulated."""


CHIRPLETS = {  # task: its condition in Tables 3 and 7, its name
    "chirplet_slow_slow": ("slow_am_slow_fm", "slow AM, slow FM"),
    "chirplet_slow_moderate": ("slow_am_moderate_fm", "slow AM, moderate FM"),
    "chirplet_fast_moderate": ("fast_am_moderate_fm", "fast AM, moderate FM"),
    "chirplet_fast_fast": ("fast_am_fast_fm", "fast AM, fast FM"),
}

_GRANULAR_ONLY = ("n_grains", "grain_samples", "slope_hop")
CHIRPLET_HYPERPARAMETERS = {name: value for name, value in HYPERPARAMETERS.items() if name not in _GRANULAR_ONLY} | {
    "f0_hz": 512.0,
    "bandwidth_oct": 2.0,
    "max_shift": 2048,
    "epochs": 50,
    "n_steps": 4800,
    "lr": 1e-4,
    "importance_examples": 32,
    "slow AM (Hz)": [0.9899, 1.9799],
    "fast AM (Hz)": [3.9598, 7.9196],
    "slow FM (octaves/s)": [0.5, 1.0],
    "moderate FM (octaves/s)": [2.0, 4.0],
    "fast FM (octaves/s)": [8.0, 16.0],
}
"""The chirplet tasks as the authors ran SCRAPL (Table 11 and the configurations of their runs)."""


TR808 = {  # task: its condition in Tables 4, 8 and 9, its name
    "tr808_micro": ("micro", "aligned"),
    "tr808_meso": ("meso", "misaligned"),
}

_COMMON = ("J", "Q1", "Q2", "Q_fr", "cqt_hop", "channels", "beta1", "beta2", "weight_decay")
TR808_HYPERPARAMETERS = {name: HYPERPARAMETERS[name] for name in _COMMON} | {
    "sample_rate_hz": 44100,
    "n_samples": 44100,
    "common_delay": 2048,
    "max_shift": 2048,
    "n_sounds": 681,
    "J_fr": 5,
    "T": 2048,
    "F": 1,
    "rho": "log1p",
    "n_paths": 483,
    "cqt_octaves": 9,
    "pools": [[2, 2], [2, 2], [2, 3], [3, 3], [3, 3]],
    "dense": 128,
    "dropout": 0.25,
    "epochs": 50,
    "n_steps": 2650,
    "batch_size": 8,
    "lr": 1e-4,
    "lr_end": 1e-5,
    "importance_examples": 16,
    "n_seeds": 40,
}
"""The misaligned TR-808 task as the authors ran SCRAPL (Table 12 and section 7); JTFS ran 4 seeds."""

NAMES = {task: name for task, (_, name) in (CHIRPLETS | TR808).items()}
"""What tables call a task."""


TIMED_AS = {method: "scrapl" if method.startswith("scrapl") else method for method in METHODS}
"""A method's row in Table 5, which has one SCRAPL: its variants share the loss."""


class Published(NamedTuple):
    """A printed number: value (float, or "<0.01" for a p-value so printed), 95 % half-width (NaN: none printed), seeds."""

    value: float | str
    ci95: float
    n: int


@cache
def _table(name: str) -> pd.DataFrame:
    table = pd.read_csv(DATA / "published_tables.csv", dtype={"value": str})
    table["method"] = table["method"].replace(_RENAMED)
    return _only(table, "table", name)


def _only(table: pd.DataFrame, column: str, wanted: str) -> pd.DataFrame:
    names = list(dict.fromkeys(table[column]))
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1)
        raise ValueError(
            f"no published {column} {wanted!r}; " + (f"did you mean {near[0]!r}? " if near else "") + f"{names}"
        )
    return table[table[column] == wanted]


def published(table: str, method: str, metric: str, condition: str | None = None) -> Published:
    """The number printed in `table` ("table_1" .. "table_9", "figure_1", "figure_3") for `method` (this project's names,
    or "plus_padam", "plus_psaga", "plus_theta_is" in Table 6) and `metric`, in the unit the table prints.

    condition: needed where the table has several per method (chirplet ranges; "micro", "meso").
    A value printed as blank (never converged) is NaN. Raises ValueError naming the nearest entry for what is not there.
    """
    rows = _only(_only(_table(table), "method", method), "metric", metric)
    if condition is not None:
        rows = _only(rows, "condition", condition)
    if len(rows) != 1:
        raise ValueError(f"{table} {method} {metric} is printed for {list(rows['condition'])}; give one as condition")
    row = rows.iloc[0]
    text = "nan" if pd.isna(row["value"]) else row["value"]
    return Published(text if text.startswith("<") else float(text), float(row["ci95"]), int(row["n_seeds"]))


def step_ms() -> dict[str, float]:
    """Milliseconds of one training step by method in the paper's Figure 1: the loss (Table 5) plus encoder and synthesizer.

    Measured on an RTX A5000, batch 4, 32768 samples.
    """
    model = published("figure_1", "encoder_and_synth", "model_step_time").value
    times = {method: model + published("table_5", method, "median_time").value for method in methods_in("table_5")}
    return {method: times[name] for method, name in TIMED_AS.items() if name in times}


def methods_in(table: str) -> list[str]:
    """The methods that `table` prints, under this project's names."""
    return list(dict.fromkeys(_table(table)["method"]))


def prints(table: str, method: str, metric: str) -> bool:
    """Whether `table` has a number for a method and metric, under this project's names."""
    rows = _table(table)
    return bool(((rows["method"] == method) & (rows["metric"] == metric)).any())


def authors_seeds() -> pd.DataFrame:
    """The authors' granular values behind Tables 2 and 6: columns method, seed (0..19), metric, value.

    Units: per mille for theta_*_l1 (test) and val_total_variation, steps for val_convergence_steps. All 20 seeds of all
    four variants reached the convergence threshold: no value is missing.
    """
    stored = json.loads((DATA / "published_granular_seeds.json").read_text())
    rows = [
        (_SEED_METHODS[method], seed, _SEED_METRICS[metric][0], value * _SEED_METRICS[metric][1])
        for method, metrics in stored.items()
        for metric, values in metrics.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "metric", "value"])
