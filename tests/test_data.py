"""The theta grid, its folds, its batches and the synthesizer seeds of reconstructions."""

from collections import Counter

import pytest
import torch
from scipy import stats

from replication.data import ThetaGrid, meso_seeds

SPLITS = ("train", "val", "test")


def test_the_grid_of_the_paper():
    grid = ThetaGrid()
    assert len(grid) == 5120 and grid.theta.shape == (5120, 2) and grid.theta.dtype == torch.float32
    places = (grid.theta.double() * 33).round(decimals=4).tolist()
    counts = Counter((a, b, s) for (a, b), s in zip(places, grid.seed.tolist()))
    assert counts == Counter((i, j, s) for i in range(1, 33) for j in range(1, 33) for s in range(5))
    for index in (0, 33, 1023):
        expected = torch.tensor([[index // 32 + 1, index % 32 + 1]]) / 33
        assert (grid.theta[5 * index : 5 * index + 5] - expected).abs().max() < 1e-7


def test_folds_share_no_theta_and_miss_no_item():
    grid = ThetaGrid()
    parts = [getattr(grid, split) for split in SPLITS]
    assert [len(part) for part in parts] == [3075, 1025, 1020]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(5120))
    for part, folds in zip(parts, ({0, 1, 2}, {3}, {4})):
        assert {int(i) // 5 % 5 for i in part} == folds


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
