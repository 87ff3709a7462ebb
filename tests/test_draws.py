"""What a draw takes: a path, all paths of a rate, or a group of one's own. The twin is the loss of single paths.

Derivatives of draws and their states: test_losses.py. Draws of other transforms, and those refused: test_transforms.py.
"""

import pytest
import torch
from conftest import noise

from scrapl_lib import PSAGA, SCRAPLLoss

KW = dict(shape=1024, J=6, Q1=4, Q2=1, J_fr=2, Q_fr=1)  # 28 paths, 4 rates of 7
GROUPS = [[0, 9, 20], [27], [9, 3]]


def mean_of(loss, draws, x_hat, x):
    value = torch.stack([loss(x_hat, x, path_idx=i) for i in draws]).mean()
    return value, torch.autograd.grad(value, x_hat)[0]


@pytest.mark.parametrize("options", [{}, dict(log1p=True), dict(T="global", F="global"), dict(J_fr=1, F=1, T=8)])
def test_the_mean_over_rates_is_the_mean_over_paths(options):
    x_hat, x = noise(2, 1, 1024).requires_grad_(), noise(2, 1, 1024, seed=1)
    path, rate = SCRAPLLoss(**KW | options), SCRAPLLoss(**KW | options, draw="rate")
    assert rate.n_paths == 4 and sorted(sum(rate.draws, ())) == list(range(path.n_paths))
    for i, draw in enumerate(rate.draws):
        paths = [path.jtfs.paths[p] for p in draw]
        assert len({each.rate for each in paths}) == 1 and len(paths) == path.n_paths // 4
        (value, grad), (one, expected) = mean_of(path, draw, x_hat, x), mean_of(rate, [i], x_hat, x)
        assert value > 0 and abs(value - one) < 1e-12 * value
        assert (grad - expected).abs().max() < 1e-12 * expected.abs().max()
    with pytest.raises(IndexError, match="path_idx = 4 is out of range"):
        rate(x_hat, x, path_idx=4)
    with pytest.raises(IndexError, match="path_idx = -1 is out of range"):
        rate.coefficients(x, -1)


def test_groups_of_ones_own_take_the_mean_over_their_paths():
    x_hat, x = noise(2, 1, 1024).requires_grad_(), noise(2, 1, 1024, seed=1)
    path, groups, subset = SCRAPLLoss(**KW), SCRAPLLoss(**KW, draw=GROUPS), SCRAPLLoss(**KW, draw=[GROUPS[0]])
    assert groups.n_paths == 3 and groups.draws == ((0, 9, 20), (27,), (9, 3))
    for i, group in enumerate(GROUPS):
        assert abs(mean_of(groups, [i], x_hat, x)[0] - mean_of(path, group, x_hat, x)[0]) < 1e-14
    S = groups.coefficients(x, 0)
    for number, p in enumerate(GROUPS[0]):
        assert (S[:, number] - path.coefficients(x, p)).abs().max() < 1e-14 * S.abs().max()
    assert S.shape[1] == 3 and groups(x_hat, x, path_idx=0, S=S) == groups(x_hat, x, path_idx=0)
    assert subset(x_hat, x) == subset(x_hat, x) == groups(x_hat, x, path_idx=0)  # one group: always the same


def test_a_state_of_as_many_other_draws_is_refused_by_the_optimizer():
    def made(draw):
        return PSAGA([torch.ones(1, requires_grad=True)], SCRAPLLoss(**KW, draw=draw))

    four, shifted = [[0, 1], [2, 3], [4, 5], [6, 7]], [[(p + 1) % 28] for p in range(28)]
    for saved, own in ((four, "rate"), ("rate", four), ("path", shifted), (shifted, "path")):
        with pytest.raises(ValueError, match="the state is of a PSAGA whose draws took other paths: give the loss the"):
            made(own).load_state_dict(made(saved).state_dict())
    for draw in ("rate", "path", four):
        made(draw).load_state_dict(made(draw).state_dict())


def test_unbiased_draws_of_rates_are_weighted():
    """By 1 / (P probs), P being the number of draws. (Single paths, with gradients: test_importance.py.)"""
    loss, x_hat, x = SCRAPLLoss(**KW, draw="rate", unbiased=True), noise(3, 1, 1024), noise(3, 1, 1024, seed=1)
    loss.probs = [0.4, 0.3, 0.2, 0.1]
    assert loss.weight == 1
    for _ in range(20):
        value = float(loss(x_hat, x))
        expected = [0.625, 1 / 1.2, 1.25, 2.5][loss.path_idx]
        plain = float(loss(x_hat, x, path_idx=loss.path_idx))
        assert abs(loss.weight - expected) < 1e-12 * expected
        assert value > 0 and abs(value - expected * plain) < 1e-12 * value
    loss.probs, loss.path_idx = [0.5, 0.5, 0, 0], 2
    with pytest.raises(ValueError, match="path 2 has probability 0, which no weight makes up for"):
        assert loss.weight
