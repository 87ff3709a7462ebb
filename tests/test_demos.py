"""What the notebooks' live demonstrations share."""

import functools

import pytest
import torch

from replication.data import meso_seeds
from replication.tasks import make_config
from replication.teaching import demo_config, path_losses, path_slopes
from replication.trainer import Training


@pytest.mark.parametrize(
    "task", ["granular", "chirplet_slow_slow"]
)  # the chirplet's window is a constant for the gradient
def test_slopes_of_all_paths_are_those_of_backward_passes(task):
    """Seed 0, smoke, 3 pairs; within 1e-6 of the largest slope (central differences over 1e-6)."""
    config = (
        demo_config("smoke", "scrapl_no_theta_is", 0)
        if task == "granular"
        else make_config(task, "scrapl_no_theta_is", 0, "smoke")
    )
    training = Training(config, torch.device("cpu"))
    theta = torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    render, x = functools.partial(training.synth, seeds=meso_seeds(0, 1, 3)), training.x[:3].double()
    losses = path_losses(training.loss, render(theta), x)
    expected = torch.stack([torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0] for loss in losses])
    found = path_slopes(training.loss, render, theta, x)
    assert found.shape == expected.shape == (training.loss.n_paths, 3, 2) and expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
