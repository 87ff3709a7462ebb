"""The theta grid, its folds, its batches and the synthesizer seeds of reconstructions."""

from collections import Counter

import pytest
import torch
from scipy import stats

from replication.data import ThetaGrid, meso_seeds


def test_the_grid_of_the_paper():
    grid = ThetaGrid()
    assert len(grid) == 5120
    assert grid.theta.shape == (5120, 2) and grid.theta.dtype == torch.float32
    counts = Counter(
        (round(float(a) * 33, 4), round(float(b) * 33, 4), int(s)) for (a, b), s in zip(grid.theta, grid.seed)
    )
    assert counts == Counter((i, j, s) for i in range(1, 33) for j in range(1, 33) for s in range(5))
    for index in (0, 33, 1023):
        rows = grid.theta[grid.theta_index == index]
        expected = torch.tensor([[index // 32 + 1, index % 32 + 1]]) / 33
        assert len(rows) == 5 and (rows - expected).abs().max() < 1e-7


def test_folds_share_no_theta_and_miss_no_item():
    grid = ThetaGrid()
    parts = [getattr(grid, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [3075, 1025, 1020]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(5120))
    for part, folds in zip(parts, ({0, 1, 2}, {3}, {4})):
        assert {int(i) % 5 for i in grid.theta_index[part]} == folds


def test_training_batches_are_a_permutation_that_depends_on_seed_and_epoch():
    grid = ThetaGrid()
    batches = grid.batches("train", 32, epoch=3, seed=1)
    items = torch.cat(batches)
    assert len(batches) == 96 and all(len(batch) == 32 for batch in batches)
    assert len(items.unique()) == 96 * 32 and torch.isin(items, grid.train).all()
    assert torch.equal(items, torch.cat(ThetaGrid().batches("train", 32, epoch=3, seed=1)))
    for epoch, seed in ((4, 1), (3, 2), (1, 3)):
        other = torch.cat(grid.batches("train", 32, epoch=epoch, seed=seed))
        assert (other == items).float().mean() < 0.01
    assert abs(stats.spearmanr(items.numpy(), range(len(items))).statistic) < 0.05


def test_validation_batches_are_complete_and_in_order():
    grid = ThetaGrid()
    for split in ("val", "test"):
        batches = grid.batches(split, 32)
        assert torch.equal(torch.cat(batches), getattr(grid, split))
        assert [len(batch) for batch in batches[:-1]] == [32] * (len(batches) - 1)
    assert len(grid.batches("val", 32)[-1]) == 1


def test_meso_seeds_are_fresh_and_never_those_of_the_data():
    drawn = [
        meso_seeds(seed, step, 8, split)
        for seed in range(3)
        for step in range(40)
        for split in ("train", "val", "test")
    ]
    seeds = torch.cat(drawn)
    assert seeds.dtype == torch.int64 and len(seeds) == 3 * 40 * 3 * 8
    assert len(seeds.unique()) == len(seeds)
    assert int(seeds.min()) >= 2**62 and int(ThetaGrid().seed.max()) == 4
    assert torch.equal(meso_seeds(2, 7, 8), meso_seeds(2, 7, 8))
    assert torch.equal(meso_seeds(2, 7, 8)[:3], meso_seeds(2, 7, 3))


def test_other_sizes():
    grid = ThetaGrid(grid_size=3, n_params=3, n_synth_seeds=1, fold_counts=(1, 1, 1))
    assert grid.theta.shape == (27, 3) and len(grid.train) == len(grid.val) == len(grid.test) == 9
    assert torch.equal(grid.theta[1] * 4, torch.tensor([1.0, 1.0, 2.0]))
    assert len(ThetaGrid(grid_size=5, n_params=1).theta) == 25


def test_bad_arguments_are_refused():
    grid = ThetaGrid(grid_size=4)
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'valid'"):
        grid.batches("valid", 8)
    with pytest.raises(ValueError, match="batch_size must be from 1 to the 50 items of split 'train', got 51"):
        grid.batches("train", 51)
    with pytest.raises(ValueError, match="split must be one of"):
        meso_seeds(0, 0, 8, "valid")
    with pytest.raises(ValueError, match="fold_counts"):
        ThetaGrid(fold_counts=(3, 2, 0))
    with pytest.raises(ValueError, match="fold_counts"):
        ThetaGrid(grid_size=2)
    with pytest.raises(ValueError, match="at least 1"):
        ThetaGrid(n_synth_seeds=0)
