"""Tests a trained problem on its test fold: parameter errors and audio distances, or, for drums, distances alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pandas as pd
import torch

from scrapl_lib.losses import JTFSLoss

from .baselines import WeightsUnavailable
from .data import meso_seeds
from .measures import (
    audio_distances,
    convergence_step,
    drum_feature_distances,
    encodec_frames,
    frechet_distance,
    log_mel_statistics,
    total_variation,
)
from .problem import CHUNK, Problem
from .records import COLUMNS

History = Sequence[tuple[int, str, str, float, float]]  # rows of history.csv


def evaluate(problem: Problem, history: History) -> tuple[pd.DataFrame, dict[str, object]]:
    """Test the encoder as it is now.

    history: of the training, from which convergence follows.
    Returns: test.csv, columns metric, value, unit; and what else goes into run.json: for drums `heard`, the parameters
    estimated for the first test sound of each kind.
    """
    rows, more = (_parameters(problem, history), {}) if problem.theta is not None else _drums(problem)
    return pd.DataFrame(rows, columns=COLUMNS["test.csv"]), more


def _parameters(problem: Problem, history: History) -> list[tuple]:
    config, items = problem.config, problem.data.test
    theta_hat = problem.estimate(items)
    rows = [(metric, value, "permille") for metric, value in problem.theta_errors(theta_hat, items).items()]
    names = {"theta_synth": "val"} | {f"theta_{p.name}": f"theta_{p.name}" for p in problem.synth.parameters}
    for name, shown in names.items():
        validated = [(row[0], row[3]) for row in history if row[1:3] == ("val", f"{name}_l1")]
        steps, values = zip(*validated, strict=True)
        if name == "theta_synth" and config.epochs > 1:
            rows.append(("val_total_variation", total_variation(values[1:]), "permille"))
        if (converged := convergence_step(steps, values)) is not None:
            rows.append((f"{shown}_convergence_steps", converged, "steps"))
    chosen = torch.linspace(0, len(items) - 1, min(config.n_audio_test, len(items))).round().long()
    seeds = meso_seeds(config.seed, 0, len(chosen), "test")
    with torch.no_grad():
        pairs = zip(theta_hat[chosen].split(CHUNK), seeds.split(CHUNK), strict=True)
        x_hat = torch.cat([problem.synth(theta, part) for theta, part in pairs])
    return rows + [(name, value, "1") for name, value in _distances(problem, x_hat, problem.x[items[chosen]]).items()]


def _drums(problem: Problem) -> tuple[list[tuple], dict[str, object]]:
    """Reconstructions as they are, without a random shift, against the sounds (as the paper tests them)."""
    config, data, items = problem.config, problem.data, problem.data.test
    theta_hat, x = problem.estimate(items), problem.x[items]
    with torch.no_grad():
        still = torch.zeros(len(items), dtype=torch.long)
        pairs = zip(theta_hat.split(CHUNK), still.split(CHUNK), strict=True)
        x_hat = torch.cat([problem.synth.render(theta, shift) for theta, shift in pairs])
    values = _distances(problem, x_hat, x)
    x_hat, x = (audio[..., config.common_delay :] for audio in (x_hat, x))
    features = drum_feature_distances(x_hat, x, config.sample_rate_hz)
    values |= {f"{name}_l1": value for name, value in features.items()}
    statistics = [log_mel_statistics(audio, config.sample_rate_hz) for audio in (x_hat, x)]
    values["frechet_log_mel"] = frechet_distance(*statistics)
    with contextlib.suppress(WeightsUnavailable):
        frames = [encodec_frames(audio, config.sample_rate_hz) for audio in (x_hat, x)]
        values["fad_encodec"] = frechet_distance(*frames)
    first = {data.kinds[item]: row for row, item in reversed(list(enumerate(items.tolist())))}
    heard = {data.names[items[row]]: theta_hat[row].tolist() for _, row in sorted(first.items())}
    return [(metric, value, "1") for metric, value in values.items()], {"heard": heard}


def _distances(problem: Problem, x_hat: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    jtfs = problem.loss if problem.config.loss == "jtfs" else JTFSLoss(**problem.config.transform())
    found = audio_distances(x_hat, x, ["jtfs", "mss_log_linear"], jtfs=jtfs, batch_size=8)
    return {f"{name}_distance": value for name, value in found.items()}
