"""Parameter errors, total variation, convergence and audio distances."""

import numpy as np
import pytest
import torch
from torch import nn

from scrapl_lib.losses import JTFSLoss, MSSLoss
from scrapl_lib.measures import audio_distances, convergence_step, theta_l1, total_variation


def test_theta_l1_in_permille():
    theta_hat = torch.tensor([[0.1, 0.5], [0.3, 0.9], [0.2, 0.4]], requires_grad=True)
    theta = torch.tensor([[0.2, 0.5], [0.1, 0.3], [0.2, 1.0]])
    found = theta_l1(theta_hat, theta)
    assert found.shape == (2,) and found.dtype == torch.float64 and not found.requires_grad
    assert (found - torch.tensor([100.0, 400.0])).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2, 2\)"):
        theta_l1(theta_hat, theta[:2])


def test_guessing_the_middle_is_a_quarter():
    """E|u - 1/2| = 1/4 for uniform u: what a method that learns nothing can reach."""
    theta = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0))
    assert (theta_l1(torch.full_like(theta, 0.5), theta) - 250).abs().max() < 2


def test_total_variation():
    """Epochs 300, 250, 260, 240: changes 50 + 10 + 20 over 4 epochs."""
    assert abs(total_variation([300, 250, 260, 240]) - 20) < 1e-12
    assert total_variation([5.0] * 10) == 0
    with pytest.raises(ValueError, match="at least 2 epochs, got 1"):
        total_variation([300])


def test_convergence_step():
    steps = [0, 96, 192, 288]
    assert convergence_step(steps, [300, 120, 100, 140]) == 192
    assert convergence_step(np.array(steps), np.array([300, 120, 100.1, 140])) is None
    assert convergence_step(steps, [300, 120, 100.1, 140], threshold=120) == 96
    with pytest.raises(ValueError, match="got 4 and 3"):
        convergence_step(steps, [1, 2, 3])


class Stub(nn.Module):
    """Stands in for JTFSLoss: mean over items of the L1 distance."""

    def forward(self, x_hat, x):
        assert not torch.is_grad_enabled()  # no graph of a whole test set
        return (x_hat - x).abs().mean()


def test_audio_distances_are_means_over_items_whatever_the_batch_size():
    generator = torch.Generator().manual_seed(0)
    x_hat, x = torch.randn(2, 7, 1, 2048, dtype=torch.float64, generator=generator).unbind(0)
    x_hat = x_hat * torch.arange(7, dtype=torch.float64)[:, None, None]
    names = ("jtfs", "mss_linear", "mss_log_linear", "mss_revisited")
    found = audio_distances(x_hat, x, names, jtfs=Stub(), batch_size=3)
    assert tuple(found) == names and all(isinstance(value, float) for value in found.values())
    assert abs(found["jtfs"] - float((x_hat - x).abs().mean())) < 1e-12
    for name in names[1:]:
        per_item = [float(MSSLoss(name)(x_hat[[i]], x[[i]])) for i in range(7)]
        assert np.std(per_item) > 1e-3
        assert abs(found[name] - np.mean(per_item)) < 1e-10
    assert all(value == 0 for value in audio_distances(x, x, names, jtfs=Stub()).values())


def test_jtfs_distance_is_the_mean_over_items():
    """With a small transform, and with the default one at another length than the paper's."""
    generator = torch.Generator().manual_seed(1)
    x_hat, x = torch.randn(2, 3, 1, 4096, generator=generator).unbind(0)
    jtfs = JTFSLoss(4096, J=6, Q1=2, Q2=1, J_fr=2, Q_fr=1)
    per_item = jtfs.per_item(x_hat, x)
    found = audio_distances(x_hat, x, ["jtfs"], jtfs=jtfs, batch_size=2)["jtfs"]
    assert found > 1e-4
    assert abs(found / float(per_item.mean()) - 1) < 1e-6
    default = audio_distances(x_hat[:1], x[:1], ["jtfs"])["jtfs"]
    assert default > 1e-4
    assert abs(default / float(JTFSLoss(4096)(x_hat[:1], x[:1])) - 1) < 1e-6


def test_bad_requests_are_refused():
    x = torch.zeros(2, 1, 2048)
    with pytest.raises(ValueError, match="names must be among jtfs, mss_linear, .* got 'mss_random'"):
        audio_distances(x, x, ["mss_random"])
    with pytest.raises(TypeError, match=r"names must be a list of names, got the text 'jtfs': write \['jtfs'\]"):
        audio_distances(x, x, "jtfs")
    with pytest.raises(ValueError, match="one shape"):
        audio_distances(x, x[:1], ["mss_linear"])
