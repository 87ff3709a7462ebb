"""The synthetic data set: a grid of parameters times a few synthesizer seeds, its folds and its batches (paper, section 7).

Nothing here holds state: a batch is a function of (seed, epoch), a fresh synthesizer seed of (seed, step), so that a
killed run resumes from its step counter alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "val", "test")
_FIRST_MESO_SEED = 2**62
_ORDER_STREAM, _MESO_STREAM = 0, 1  # keep the two kinds of random numbers apart


class ThetaGrid:
    """All pairs of a grid point theta and a data set synthesizer seed.

    Each coordinate takes the interior points (i + 1) / (grid_size + 1) of [0, 1], i = 0 ... grid_size - 1. Items are
    ordered by theta, and by synthesizer seed within one theta.

    Args:
        grid_size: points along each parameter.
        n_params: number of parameters U.
        n_synth_seeds: every theta is rendered with each of the synthesizer seeds 0 ... n_synth_seeds - 1.
        fold_counts: how many of the folds (theta index modulo sum(fold_counts)) go to train, val and test.

    The defaults are the paper's: 32 x 32 x 5 = 5120 items, folds 3/1/1.

    Attributes:
        theta: (N, n_params) float32, in [0, 1].
        theta_index: (N,) int64, the grid point's number; the last parameter varies fastest.
        seed: (N,) int64, the synthesizer seed.
        train, val, test: (n,) int64 item numbers, ascending. No theta is in two of them.
    """

    def __init__(
        self,
        grid_size: int = 32,
        n_params: int = 2,
        n_synth_seeds: int = 5,
        fold_counts: tuple[int, int, int] = (3, 1, 1),
    ) -> None:
        if min(grid_size, n_params, n_synth_seeds) < 1:
            raise ValueError(
                "grid_size, n_params and n_synth_seeds must be at least 1, "
                f"got {grid_size}, {n_params} and {n_synth_seeds}"
            )
        n_folds = sum(fold_counts)
        if len(fold_counts) != 3 or min(fold_counts) < 1 or grid_size**n_params < n_folds:
            raise ValueError(
                f"fold_counts must be three positive numbers of folds (train, val, test), at most one fold per grid point "
                f"({grid_size**n_params}), got {fold_counts}"
            )
        axis = torch.arange(1, grid_size + 1, dtype=torch.float64) / (grid_size + 1)
        points = torch.cartesian_prod(*[axis] * n_params).view(-1, n_params).float()
        self.theta_index = torch.arange(len(points)).repeat_interleave(n_synth_seeds)
        self.theta = points[self.theta_index]
        self.seed = torch.arange(n_synth_seeds).repeat(len(points))

        fold = self.theta_index % n_folds
        n_train, n_val, _ = fold_counts
        self.train = torch.nonzero(fold < n_train).flatten()
        self.val = torch.nonzero((fold >= n_train) & (fold < n_train + n_val)).flatten()
        self.test = torch.nonzero(fold >= n_train + n_val).flatten()

    def __len__(self) -> int:
        return len(self.theta)

    def batches(self, split: str, batch_size: int, epoch: int = 0, seed: int = 0) -> list[Tensor]:
        """Item numbers of one epoch, batch by batch.

        Training items come in an order that depends on (seed, epoch) alone, and an incomplete last batch is dropped;
        validation and test items come in their own order, all of them, the last batch possibly smaller.

        Args:
            split: "train", "val" or "test".
            batch_size: items per batch.
            epoch, seed: numbers from 0; ignored unless split is "train".
        Returns:
            int64 tensors of shape (batch_size,).
        """
        _check_split(split)
        items = getattr(self, split)
        if not 1 <= batch_size <= len(items):
            raise ValueError(
                f"batch_size must be from 1 to the {len(items)} items of split {split!r}, got {batch_size}"
            )
        if split != "train":
            return list(items.split(batch_size))
        order = torch.from_numpy(np.random.default_rng([_ORDER_STREAM, seed, epoch]).permutation(len(items)))
        n_batches = len(items) // batch_size
        return list(items[order[: n_batches * batch_size]].view(n_batches, batch_size))


def meso_seeds(seed: int, step: int, batch_size: int, split: str = "train") -> Tensor:
    """Fresh synthesizer seeds for the reconstructions of one step (the "meso" condition).

    They are a function of (split, seed, step, position in the batch) and lie in [2^62, 2^63), away from the data set's own
    seeds: a reconstruction is never rendered with the draw of its reference.

    Args:
        seed: the run's seed, from 0.
        step: the step's number, from 0.
        batch_size: number of seeds.
        split: "train", "val" or "test".
    Returns:
        (batch_size,) int64.
    """
    _check_split(split)
    rng = np.random.default_rng([_MESO_STREAM, SPLITS.index(split), seed, step])
    return torch.from_numpy(rng.integers(_FIRST_MESO_SEED, 2**63 - 1, size=batch_size, dtype=np.int64, endpoint=True))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
