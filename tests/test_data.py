"""The theta grid, its folds, its batches and the synthesizer seeds of reconstructions."""

import pytest
import torch
from scipy import stats

from replication.data import ThetaGrid, meso_seeds

SPLITS = ("train", "val", "test")


def test_the_grid_of_the_paper():
    """Every theta with every seed; theta's last parameter is the fastest but for the seed; no theta in two folds."""
    grid = ThetaGrid()
    assert len(grid) == 5120 and grid.theta.shape == (5120, 2) and grid.theta.dtype == torch.float32
    index = torch.arange(5120)
    places = torch.stack([index // 160, index // 5 % 32], dim=1)
    assert (grid.theta - (places + 1) / 33).abs().max() < 1e-7 and torch.equal(grid.seed, index % 5)
    parts = grid.train, grid.val, grid.test
    assert [len(part) for part in parts] == [3075, 1025, 1020] and torch.equal(torch.cat(parts).sort().values, index)
    assert [set((part // 5 % 5).tolist()) for part in parts] == [{0, 1, 2}, {3}, {4}]


def test_other_sizes():
    grid = ThetaGrid(grid_size=3, n_params=3, n_synth_seeds=1)
    assert grid.theta.shape == (27, 3) and [len(grid.train), len(grid.val), len(grid.test)] == [17, 5, 5]
    assert torch.equal(grid.theta[1] * 4, torch.tensor([1.0, 1.0, 2.0]))


def test_batches():
    """Those of training are a permutation that depends on seed and epoch, the others all items in their order."""
    grid = ThetaGrid()
    batches = grid.batches("train", 32, epoch=3, seed=1)
    items = torch.cat(batches)
    assert len(batches) == 96 and all(len(batch) == 32 for batch in batches)
    assert len(items.unique()) == 96 * 32 and torch.isin(items, grid.train).all()
    assert torch.equal(items, torch.cat(ThetaGrid().batches("train", 32, epoch=3, seed=1)))
    for epoch, seed in ((4, 1), (3, 2), (1, 3)):
        assert (torch.cat(grid.batches("train", 32, epoch, seed)) == items).float().mean() < 0.01
    assert abs(stats.spearmanr(items.numpy(), range(len(items))).statistic) < 0.05
    val = grid.batches("val", 32)
    assert torch.equal(torch.cat(val), grid.val) and [len(batch) for batch in val] == [32] * 32 + [1]


def test_meso_seeds_are_fresh_and_never_those_of_the_data():
    seeds = torch.cat([meso_seeds(seed, step, 8, s) for seed in range(3) for step in range(40) for s in SPLITS])
    assert seeds.dtype == torch.int64 and len(seeds.unique()) == len(seeds) == 3 * 40 * 3 * 8
    assert int(seeds.min()) >= 2**62 and int(ThetaGrid().seed.max()) == 4
    assert torch.equal(meso_seeds(2, 7, 8), meso_seeds(2, 7, 8))
    assert torch.equal(meso_seeds(2, 7, 8)[:3], meso_seeds(2, 7, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ThetaGrid(grid_size=4).batches("valid", 8), "unknown split 'valid': .* valid are train, val, test"),
        (lambda: ThetaGrid(grid_size=4).batches("train", 51), "from 1 to the 50 items of split 'train', got 51"),
        (lambda: meso_seeds(0, 0, 8, "valid"), "unknown split 'valid'"),
        (lambda: ThetaGrid(grid_size=2), r"expected 5 grid points and 1 synthesizer seed or more, got 2\^2 and 5"),
        (lambda: ThetaGrid(n_synth_seeds=0), r"or more, got 32\^2 and 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
