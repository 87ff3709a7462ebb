"""Tests a trained problem on its test fold: parameter errors and audio distances, or, for drums, distances alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pandas as pd
import torch

from scrapl_lib.losses import JTFSLoss

from . import measures
from .baselines import WeightsUnavailable
from .data import meso_seeds
from .problem import Problem, in_chunks
from .records import COLUMNS


def evaluate(problem: Problem, history: Sequence[tuple]) -> tuple[pd.DataFrame, dict[str, object]]:
    """Test the encoder as it is now.

    history: rows of history.csv, from which convergence follows.
    Returns: test.csv, columns metric, value, unit; and what else goes into run.json: for drums `heard`, the parameters
    estimated for the first test sound of each kind.
    """
    rows, more = (_parameters(problem, history), {}) if problem.theta is not None else _drums(problem)
    return pd.DataFrame(rows, columns=COLUMNS["test.csv"]), more


def _parameters(problem: Problem, history: Sequence[tuple]) -> list[tuple]:
    config, items = problem.config, problem.data.test
    theta_hat = problem.estimate(items)
    rows = [(metric, value, "permille") for metric, value in problem.theta_errors(theta_hat, items).items()]
    names = {"theta_synth": "val"} | {f"theta_{p.name}": f"theta_{p.name}" for p in problem.synth.parameters}
    for name, shown in names.items():
        steps, values = zip(*[(row[0], row[3]) for row in history if row[1:3] == ("val", f"{name}_l1")], strict=True)
        if name == "theta_synth" and config.epochs > 1:
            rows.append(("val_total_variation", measures.total_variation(values[1:]), "permille"))
        if (converged := measures.convergence_step(steps, values)) is not None:
            rows.append((f"{shown}_convergence_steps", converged, "steps"))
    chosen = torch.linspace(0, len(items) - 1, min(config.n_audio_test, len(items))).round().long()
    x_hat = in_chunks(problem.synth, theta_hat[chosen], meso_seeds(config.seed, 0, len(chosen), "test"))
    return rows + _distances(problem, x_hat, problem.x[items[chosen]])


def _drums(problem: Problem) -> tuple[list[tuple], dict[str, object]]:
    """Reconstructions as they are, without a random shift, against the sounds (as the paper tests them)."""
    data, items, rate_hz = problem.data, problem.data.test, problem.config.sample_rate_hz
    theta_hat = problem.estimate(items)
    both = in_chunks(problem.synth.render, theta_hat, torch.zeros(len(items), dtype=torch.long)), problem.x[items]
    rows = _distances(problem, *both)
    both = [audio[..., problem.config.common_delay :] for audio in both]
    rows += [(f"{name}_l1", value, "1") for name, value in measures.drum_feature_distances(*both, rate_hz).items()]
    mel = measures.frechet_distance(*(measures.log_mel_statistics(audio, rate_hz) for audio in both))
    rows.append(("frechet_log_mel", mel, "1"))
    with contextlib.suppress(WeightsUnavailable):
        fad = measures.frechet_distance(*(measures.encodec_frames(audio, rate_hz) for audio in both))
        rows.append(("fad_encodec", fad, "1"))
    first = {data.kinds[item]: row for row, item in reversed(list(enumerate(items.tolist())))}
    heard = {data.names[items[row]]: theta_hat[row].tolist() for _, row in sorted(first.items())}
    return rows, {"heard": heard}


def _distances(problem: Problem, x_hat: torch.Tensor, x: torch.Tensor) -> list[tuple]:
    jtfs = problem.loss if problem.config.loss == "jtfs" else JTFSLoss(**problem.config.transform())
    found = measures.audio_distances(x_hat, x, ["jtfs", "mss_log_linear"], jtfs=jtfs, batch_size=8)
    return [(f"{name}_distance", value, "1") for name, value in found.items()]
