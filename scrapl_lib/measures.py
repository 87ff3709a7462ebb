"""What is reported about a trained encoder: parameter errors and audio distances (paper, section 8)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .losses import JTFSLoss, MSSLoss, check_pair

PERMILLE = 1000.0
AUDIO_DISTANCES = ("jtfs", "mss_linear", "mss_log_linear", "mss_revisited")


def theta_l1(theta_hat: Tensor, theta: Tensor) -> Tensor:
    """Mean absolute error of each parameter, per mille of its range.

    theta_hat, theta: (n, n_params) in [0, 1] -> (n_params,) float64.
    """
    if theta_hat.shape != theta.shape or theta.ndim != 2 or theta.numel() == 0:
        raise ValueError(
            f"theta_hat and theta must both have shape (n, n_params), got {tuple(theta_hat.shape)} and {tuple(theta.shape)}"
        )
    return PERMILLE * (theta_hat.detach().double() - theta.double()).abs().mean(dim=0)


def total_variation(theta_l1_by_epoch: Sequence[float]) -> float:
    """How restless a training was: sum of absolute changes of the validation theta L1 from epoch to epoch / number of epochs.

    theta_l1_by_epoch: one value per epoch, at least 2, in per mille (the validation before training is left out). The result
    is in per mille too: the paper's "times 1000".
    """
    if len(theta_l1_by_epoch) < 2:
        raise ValueError(f"total variation needs the values of at least 2 epochs, got {len(theta_l1_by_epoch)}")
    values = torch.as_tensor(theta_l1_by_epoch, dtype=torch.float64)
    return float(values.diff().abs().sum() / len(values))


def convergence_step(steps: Sequence[int], values: Sequence[float], threshold: float = 100.0) -> int | None:
    """The first of `steps` whose value is at most `threshold` (both in per mille), None if there is none."""
    if len(steps) != len(values):
        raise ValueError(f"steps and values must have one length, got {len(steps)} and {len(values)}")
    return next((int(step) for step, value in zip(steps, values) if value <= threshold), None)


@torch.no_grad()
def audio_distances(
    x_hat: Tensor, x: Tensor, names: Iterable[str], *, jtfs: nn.Module | None = None, batch_size: int = 32
) -> dict[str, float]:
    """Distances between reconstructions and references, mean over items.

    Args:
        x_hat, x: (n, 1, samples).
        names: a list of any of jtfs, mss_linear, mss_log_linear, mss_revisited.
        jtfs: the JTFSLoss to measure "jtfs" with; by default the paper's granular configuration at the audio's length.
        batch_size: items computed at a time; does not change the result.
    Returns:
        {name: distance}, unscaled (the paper prints those of TR-808 times 1000).
    """
    check_pair(x_hat, x)
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got the text {names!r}: write [{names!r}]")
    distances = {}
    for name in names:
        if name not in AUDIO_DISTANCES:
            raise ValueError(f"names must be among {', '.join(AUDIO_DISTANCES)}, got {name!r}")
        if name == "jtfs":
            loss = JTFSLoss(x.shape[2]).to(x.device) if jtfs is None else jtfs
        else:
            loss = MSSLoss(name).to(x.device)
        total = 0.0
        for a, b in zip(x_hat.split(batch_size), x.split(batch_size)):
            total += float(loss(a, b)) * len(a)
        distances[name] = total / len(x)
    return distances
