"""A GPU rehearsed without one: losses, training, checkpoints and theta-IS, on a device that only seems to be one.

On fake tensors of "cuda" (forward, without values), and on the device of `elsewhere` (whole runs, with values). Sounds,
encoder and measures on "cuda": tests/test_rehearsal_sounds.py.
"""

import io

import numpy as np
import pytest
import torch
from conftest import smoke
from elsewhere import Elsewhere, There
from test_rehearsal_sounds import Indexing
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from replication import path_probabilities, trainer
from replication.checkpoints import load_checkpoint, save_checkpoint
from replication.evaluate import evaluate
from replication.problem import Problem
from replication.tasks import METHODS, NOT_RUN, make_config
from replication.trainer import Training
from scrapl_lib import _fast, JTFS, PSAGA, JTFSLoss, PAdam, SCRAPLLoss
from scrapl_lib.importance import curvature_by_path
from scrapl_lib.losses import p_loss

SIZES = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
RUNS = [("granular", method) for method in METHODS if method not in NOT_RUN and method != "scrapl"]
RUNS += [("chirplet_fast_fast", "scrapl_padam"), ("tr808_meso", "scrapl_no_theta_is"), ("tr808_micro", "jtfs")]


class SettingToo(Indexing):
    """x[...] = y likewise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            return super().__torch_function__(torch.Tensor.__getitem__, types, args[:2]).zero_().add_(args[2])
        return super().__torch_function__(func, types, args, kwargs)


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- what a rehearsal notices -------------------------------------------------------------------------------------


def test_the_device_notices_what_it_is_for():
    with Elsewhere() as device:
        x, i = noise(2, 3).to("meta", non_blocking=True), torch.tensor([0])
        ((x + torch.ones(())) * 2).sum(), torch.zeros(2, device="meta") + x[:, 0], x.T.conj().mT
        assert device.waits == [] and x.device.type == "meta" and isinstance(x, There)
        for n, wait in enumerate(
            (x[0, 0].item, x.tolist, x.cpu, lambda: x[i], lambda: x[x > 0], lambda: bool((x > 0).any()), lambda: i.to(x))
        ):
            wait()
            assert len(device.waits) == n + 1
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)


# ---- losses -------------------------------------------------------------------------------------------------------

KINDS = {
    "path": lambda **more: SCRAPLLoss(**SIZES, **more),
    "rate": lambda **more: SCRAPLLoss(**SIZES, **more, draw="rate"),
    "jtfs": lambda **more: JTFSLoss(**SIZES, **more),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_on_cuda_are_looked_at_by_nobody(kind, dtype):
    """Every result is on "cuda", and a look at one would raise. The draw is made before: here a CPU has no values."""
    loss = KINDS[kind](log1p=True)
    path = {} if kind == "jtfs" else {"path_idx": loss.draw()}
    with FakeTensorMode(allow_non_fake_inputs=True), SettingToo():
        x_hat, x, theta = (torch.rand(*shape, device="cuda", dtype=dtype) for shape in [(2, 1, 512)] * 2 + [(2, 3)])
        with torch.no_grad():
            S = loss.jtfs(x), loss.jtfs.path(x, 3), JTFS(**SIZES, T=8)(x)
            found = [loss(x_hat, x, **path), p_loss(theta, theta), *S]
        assert {(value.device.type, value.dtype) for value in found} == {("cuda", dtype)}
        assert found[0].shape == () and S[1].shape == (*S[0][:, 0, :, 0].shape, loss.jtfs.n_frames)


@pytest.mark.parametrize("options", [{}, {"T": 8}, {"T": "global"}, {"log1p": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_computes_what_a_cpu_does(kind, options, monkeypatch):
    """Value, gradient and a product with the Hessian by the branches for devices, in float64: to 1e-12 of the largest
    (1e-10 for the product). Once its filters are there, a loss waits for nothing, whatever it draws."""
    results = []
    monkeypatch.setattr(_fast, "ROW", 64)  # so that short signals have many rows on a CPU
    monkeypatch.setattr(_fast, "CHUNK", 2**12)
    for place in ("cpu", "meta"):
        loss = KINDS[kind](**options)
        with Elsewhere() as device:
            x, v = noise(2, 1, 512, seed=1).to(place), noise(2, 1, 512, seed=2).to(place)
            x_hat = noise(2, 1, 512).to(place).requires_grad_()
            for _ in range(2):
                device.waits.clear()
                value = loss(x_hat, x, **({} if kind == "jtfs" else {"path_idx": 2}))
                (grad,) = torch.autograd.grad(value, x_hat, create_graph=True)
                (product,) = torch.autograd.grad((grad * v).sum(), x_hat)
            assert kind == "jtfs" or 0 <= loss.draw() < loss.n_paths
            assert device.waits == [] and product.device.type == place
            results.append([y.detach().cpu() for y in (value, grad, product)])
    for ours, theirs, limit in zip(*results, (1e-12, 1e-12, 1e-10), strict=True):
        assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= limit * theirs.abs().max()
