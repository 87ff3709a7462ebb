"""Scattering coefficients of the references, which come again in every epoch and run: computed once, kept in files."""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scrapl_lib import _fast, _filters, jtfs

from .files import kept_array

PIECE = 64  # sounds in a file
SHARE_OF_DISK = 0.1  # of what is free, at most


def kept_references(
    transform: jtfs.JTFS, x: Tensor, items: Tensor, folder: Path, report: Callable[[float], object]
) -> dict[int, Tensor]:
    """All paths of x[items], (P, log-frequency, frames) each, from files in `folder` for all runs with the same sounds.

    They have the bits of `transform.path`, so that a run is the same with and without them. A file holds PIECE sounds
    and is named by all that decides its bits: sounds, transform, code, PyTorch, processor, number of threads. What is
    missing or broken is made, by all processes that want it together. Without room the answer is empty.

    x: (N, 1, samples) on the CPU. items: (n,) int64. report: told, where some are missing, which share is there.
    """
    settings = [getattr(transform, name) for name in ("shape", "J", "Q1", "Q2", "J_fr", "Q_fr", "T", "F")]
    machine = [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    about, pieces = repr([settings, machine, *map(inspect.getsource, (jtfs, _fast, _filters))]).encode(), []
    for part in items.split(PIECE):
        name = hashlib.sha256(about + x[part].numpy().tobytes()).hexdigest()[:16]
        pieces.append((folder / f"references_{name}.npy", part))
    folder.mkdir(parents=True, exist_ok=True)
    if n_missing := sum(not path.exists() for path, _ in pieces):
        size = n_missing * PIECE * transform.n_paths * transform.path(x[:1], 0).nbytes
        fits = size <= SHARE_OF_DISK * shutil.disk_usage(folder).free
        why = "once for all runs" if fits else f"not made, as that is over {SHARE_OF_DISK:.0%} of what is free there"
        print(f"all paths of the references, {size / 1e6:.0f} MB in {folder}: {why}", file=sys.stderr, flush=True)
        if not fits:
            return {}
    kept: dict[int, Tensor] = {}
    for path, part in random.Random(os.getpid()).sample(pieces, len(pieces)):  # processes seldom meet at the same file
        S = kept_array(path, lambda part=part: _all_paths(transform, x[part]))
        kept |= zip(part.tolist(), torch.from_numpy(S), strict=True)
        if n_missing:
            report(len(kept) / len(items))
    return kept


def _all_paths(transform: jtfs.JTFS, x: Tensor) -> np.ndarray:
    """(n, 1, samples) -> (n, P, log-frequency, frames); costs as much as some 16 (quick) or 47 (paper) single paths."""
    rows = []
    for part in x.split(4):  # more of them would not stay in a core's cache
        found = {}
        for group in transform.groups["rate"]:
            found |= zip(group, transform.path_group(part, group, apart=True).unbind(dim=1), strict=True)
        rows.append(torch.stack([found[path] for path in range(transform.n_paths)], dim=1))
    return torch.cat(rows).numpy()


def drawn(kept: dict[int, Tensor], items: Tensor, paths: Sequence[int]) -> Tensor:
    """What `SCRAPLLoss.coefficients` of the items' sounds is for a draw that takes `paths`."""
    S = torch.stack([kept[item][list(paths)] for item in items.tolist()])
    return S[:, 0] if len(paths) == 1 else S
