"""References that are computed once: their bits, the files that hold them, and the runs that take them from there."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import folder_of, smoke

from replication import references
from replication.records import ROOT
from replication.references import drawn, kept_references
from replication.tasks import make_config
from replication.trainer import Training, train, train_steps
from scrapl_lib.losses import SCRAPLLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def files(output):
    return sorted((output / "cache").glob("references_*.npy"))


@pytest.fixture
def computed(monkeypatch):
    """Lists the numbers of sounds whose paths are computed."""
    calls, true = [], references._all_paths
    monkeypatch.setattr(references, "_all_paths", lambda transform, x: calls.append(len(x)) or true(transform, x))
    return calls


@pytest.fixture
def training(monkeypatch):
    """A run whose 15 training sounds take four files."""
    monkeypatch.setattr(references, "PIECE", 4)
    return Training(smoke())


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_they_have_the_bits_of_the_loss(tmp_path, profile):
    """Of single paths, whatever the batch; of groups to 1e-6, as these are computed together."""
    config = make_config("granular", "scrapl_no_theta_is", 0, profile)
    loss, by_rate = (SCRAPLLoss(**config.transform(), draw=draw) for draw in ("path", "rate"))
    data, items = config.data(), torch.tensor([9, 2, 5])
    x = config.synth()(data.theta[:10], data.seed[:10])
    kept = kept_references(loss.jtfs, x, torch.arange(1, 10), tmp_path, lambda share: None)
    assert sorted(kept) == list(range(1, 10))
    for path in range(loss.n_paths):
        S = loss.coefficients(x[items], path)
        assert S.abs().max() > 0 and torch.equal(drawn(kept, items, loss.draws[path]), S)
    for path in range(by_rate.n_paths):
        S, found = by_rate.coefficients(x[items], path), drawn(kept, items, by_rate.draws[path])
        assert len(by_rate.draws[path]) > 1 and found.shape == S.shape and (found - S).norm() < 1e-6 * S.norm()


@pytest.mark.parametrize("method", ["scrapl_no_theta_is", "scrapl_plain"])
def test_a_run_is_the_same_with_and_without_them(tmp_path, method, computed):
    """Without, with new ones, with those of another run, stopped and resumed: the same bits, the same draws."""
    config, found = smoke(method, dropout=0.5), []
    for kept in (False, True, True):
        run = Training(config)
        if kept:
            run.keep_references(tmp_path)
            assert sorted(run.kept) == run.data.train.tolist()
        paths = []
        for step in run.steps():
            paths.append(run.loss.path_idx)
            if kept and step == 4:
                assert len(set(paths)) > 1
        found.append((paths, [row[:4] for row in run.history], run.weights()))
    assert sum(computed) == 15
    for paths, history, weights in found[1:]:
        assert len(paths) == 9 and paths == found[0][0] and history == found[0][1]
        assert all(torch.equal(weights[name], found[0][2][name]) for name in weights)
