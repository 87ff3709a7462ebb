"""Textures and the records of their runs, at toy size. Seeds are fixed; comparisons without a tolerance are exact."""

import itertools
import math

import pandas as pd
import pytest
import torch

from replication import images
from replication.doctor import _records
from replication.records import command_for
from scrapl_lib import Scattering2D, SCRAPLLoss

THETA = torch.tensor([[0.2, 0.3], [0.9, 0.8], [0.5, 0.0]], dtype=torch.float64)
SEEDS = torch.tensor([3, 4, 2**62])


def test_a_texture_is_of_its_theta_and_seed_alone_and_smooth_in_theta():
    """By the definition of a stroke, pixel by pixel, for one; then batches, energy, and derivatives twice."""
    synth = images.StrokeSynth(size=24, n_strokes=5)
    pictures = synth(THETA, SEEDS)
    assert pictures.shape == (3, 1, 24, 24) and (pictures.square().mean(dim=(1, 2, 3)) - 1).abs().max() < 1e-12
    for i in range(3):
        assert (synth(THETA[i : i + 1], SEEDS[i : i + 1])[0] - pictures[i]).abs().max() < 1e-12

    (place,), (turn,) = synth.draw(SEEDS[:1])
    density, angle = 0.2, turn * math.pi * (0.05 + 0.45 * 0.3)
    amplitude = torch.sigmoid(-2 * (1 - density) * 5 * (torch.arange(5) / 5 - 0.25 * density - 0.75 * density**2))
    far = 3 * synth.length + 1
    expected, axis = torch.zeros(24, 24, dtype=torch.float64), range(-24, 48)
    for (y0, x0), a, gain in zip(place, angle, amplitude):
        for y, x in itertools.product(axis, axis):
            dy, dx = y - y0, x - x0
            if max(abs(dy), abs(dx)) <= far:
                along, across = a.cos() * dx + a.sin() * dy, a.cos() * dy - a.sin() * dx
                bump = torch.exp(-((along / synth.length) ** 2 + (across / synth.width) ** 2) / 2)
                expected[y % 24, x % 24] += gain * bump
    expected /= expected.square().mean().sqrt()
    assert (pictures[0, 0] - expected).abs().max() < 0.02 * expected.max()  # where strokes are cut off: exp(-4.5)

    theta = THETA[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda theta: synth(theta, SEEDS[:1]), theta)
    assert torch.autograd.gradgradcheck(lambda theta: synth(theta, SEEDS[:1]), theta)


def test_the_averaged_losses_do_not_see_where_a_texture_is():
    """A texture in the middle of a picture, moved by the transform's stride; what its tails do at borders: 5 %."""
    x = torch.nn.functional.pad(images.StrokeSynth(size=16, n_strokes=8)(THETA[:2], SEEDS[:2]), (16, 16, 16, 16))
    moved, config = x.roll((8, -8), dims=(2, 3)), images.image_config("scrapl_plain", 0, "quick")
    transform, plain = images.scattering(config), Scattering2D((48, 48), 3, 4)
    S, S_moved = transform(x), transform(moved)
    assert S.shape == (2, transform.n_paths, 1) and S.min() > 0
    assert (S - plain(x).mean(dim=(-2, -1))).abs().max() < 1e-12
    assert ((S - S_moved).norm(dim=1) < 0.05 * S.norm(dim=1)).all()
    by_place = plain(x) - plain(moved)
    assert (by_place.flatten(1).norm(dim=1) > 0.3 * plain(x).flatten(1).norm(dim=1)).all()
    averaged, local = (images.make_loss(images.image_config(name, 0, "quick")) for name in ("fourier_mean", "fourier"))
    assert 0 < averaged(x, moved) < 0.3 * local(x, moved)


def smoke(method, seed=0):
    return images.image_config(method, seed, "smoke")


def test_runs_are_recorded_once_and_are_the_same_bits_again(tmp_path, monkeypatch, capsys):
    trained, train = [], images.Matching.train

    def counted(self, probs=None):
        trained.append((self.config.method, self.config.seed, probs is not None))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(self, probs)

    monkeypatch.setattr(images.Matching, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        images.ensure_runs("smoke", tmp_path / "a")
    runs = images.ensure_runs("smoke", tmp_path / "a")  # goes on at the fifth
    grid = [(method, seed) for seed in range(2) for method in images.METHODS]
    assert [(run.method, run.seed) for run in runs] == grid and len(trained) == len(grid) + 1
    assert all(with_probs == (method == "scrapl_theta_is") for method, _, with_probs in trained)
    assert len(images.ensure_runs("smoke", tmp_path / "a")) == len(grid) and len(trained) == len(grid) + 1

    again = images.ensure_run(smoke("scrapl_theta_is", 1), tmp_path / "b")
    first = runs[grid.index(("scrapl_theta_is", 1))]
    assert len(first.history) > 10 and again.history["value"].equals(first.history["value"])
    starts = {run.method: run.history.query("step == 0")["value"].tolist() for run in runs if run.seed == 0}
    assert len(set(map(tuple, starts.values()))) == 1  # the same weights

    probabilities = images.importance_table("smoke", tmp_path / "a")["probability"]
    assert len(probabilities) == images.scattering(smoke("scrapl_plain")).n_paths
    assert abs(probabilities.sum() - 1) < 1e-6 and probabilities.min() > 0

    found = list(_records(tmp_path / "a"))
    assert found == [("ok", "records of smoke: 19 whole, 0 stale, 0 broken", "")]
    monkeypatch.setitem(images.SIZES, "smoke", images.SIZES["smoke"] | {"lr": 1.0})
    with pytest.raises(ValueError, match="holds a record of another configuration"):
        images.ensure_run(smoke("pixels"), tmp_path / "a")
    expected = "python -m replication notebook 12_images --profile smoke --output "
    assert command_for(images.folder_of(smoke("pixels"), tmp_path)).startswith(expected)


def test_magnitudes_of_what_is_nearly_black_have_a_gradient():
    for size in (0, 1e-42, 1e-40, 1e-38):
        x = (size * torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))).requires_grad_()
        images.magnitudes(x, 8).sum().backward()
        assert torch.isfinite(x.grad).all() and (size == 0 or x.detach().count_nonzero() > 100)


def test_what_is_drawn_and_how_it_is_stepped():
    for method, n in (("scrapl_psaga", 60), ("scrapl_plain", 60), ("scrapl_scale", 6)):
        loss = images.make_loss(images.image_config(method, 3, "quick"))
        assert isinstance(loss, SCRAPLLoss) and loss.n_paths == n
    with pytest.raises(ValueError, match="unknown method 'scrapl_plan': did you mean 'scrapl_plain'"):
        images.image_config("scrapl_plan", 0, "quick")
    with pytest.raises(ValueError, match="unknown profile 'paper'"):
        images.image_config("pixels", 0, "paper")


class FakeRun:
    """Its error comes down to its last value from 900, 90 and 9 above it."""

    def __init__(self, method, seed):
        self.method, self.seed, place = method, seed, list(images.METHODS).index(method)
        self.values = {"theta_l1": 100.0 + 10 * place + (1 + place % 2) * seed, "density_l1": 1.0, "spread_l1": 2.0}
        self.value, errors = self.values.get, [self.values["theta_l1"] + extra for extra in (900, 90, 9, 0)]
        columns = {"step": [0, 20, 40, 200], "split": "test", "metric": "theta_l1", "value": errors}
        self.history = pd.DataFrame(columns)


def test_tables_pair_runs_seed_by_seed():
    orders = [(2, 0, 1), (0, 1, 2), (1, 2, 0)]
    runs = [FakeRun(method, seed) for i, method in enumerate(images.METHODS) for seed in orders[i % 3]]
    places = {method: i for i, method in enumerate(images.METHODS)}
    costs = {method: 2.0**i for method, i in places.items()}
    table, pairs = images.results_table(runs, costs), images.paired_table(runs, costs)
    assert table["seeds"].tolist() == [3] * 9
    assert table["step_ratio"].tolist() == [2.0 ** (i - places["scrapl_psaga"]) for i in range(9)]
    for (a, b), row in zip(images.PAIRS, pairs.itertuples()):
        slopes = places[b] % 2 - places[a] % 2  # of the difference over seeds 0, 1, 2
        assert abs(row.mean - (10 * (places[b] - places[a]) + slopes)) < 1e-9 and row.paired_p <= row.paired_p_holm
        assert (row.ci95 == 0) == (slopes == 0)  # as only pairs of one seed give
    equal = pairs[pairs["difference"].str.endswith("at equal time")].set_index("difference")["mean"]
    assert len(pairs) == 6 + 4 and len(equal) == 4
    of_full = {0.1: 90, 0.2: 9, 0.19: 90, 0.0999: 900, 1.0: 0}  # share of the steps: what is added to full scattering's
    run = next(run for run in runs if run.method == "scattering")
    assert {share: images.value_at(run, share) - run.values["theta_l1"] for share in of_full} == of_full
    for b in (method for method in images.METHODS if method.startswith("scrapl")):
        slopes, share = places[b] % 2 - places["scattering"] % 2, min(1.0, costs[b] / costs["scattering"])
        extra = images.value_at(run, share) - run.values["theta_l1"]
        expected = 10 * (places[b] - places["scattering"]) + slopes - extra
        label = f"{images.METHODS[b][0]} less {images.METHODS['scattering'][0]}, at equal time"
        assert abs(equal[label] - expected) < 1e-9
    steps = images.step_costs("smoke", 2)
    assert list(steps) == list(images.METHODS) and min(steps.values()) > 0
