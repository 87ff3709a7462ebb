"""A GPU rehearsed without one: losses, training, checkpoints and theta-IS, on the device of `elsewhere`, which only
seems to be one. Without values, on "cuda": test_rehearsal_sounds.py."""

import numpy as np
import pytest
import torch
from elsewhere import Elsewhere, There
from torch.utils._pytree import tree_leaves, tree_map

from replication import path_probabilities, trainer
from replication.baselines import EmbeddingLoss
from replication.checkpoints import load_checkpoint, save_checkpoint
from replication.evaluate import evaluate
from replication.problem import Problem
from replication.tasks import make_config
from replication.trainer import Training
from scrapl_lib import PSAGA, JTFSLoss, PAdam, SCRAPLLoss, _fast
from scrapl_lib.importance import curvature_by_path

SIZES = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
METHODS = ("p_loss", "jtfs", "scrapl_no_theta_is", "mss_log_linear", "mss_revisited", "mss_random")
RUNS = [("chirplet_fast_fast", "scrapl_padam"), ("tr808_meso", "scrapl_plain"), *(("granular", m) for m in METHODS)]


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_device_notices_what_it_is_for():
    with Elsewhere() as device:
        x, i = noise(2, 3).to("meta", non_blocking=True), torch.tensor([0])
        ((x + torch.ones(())) * 2).sum(), torch.zeros(2, device="meta") + x[:, 0], x.T.conj().mT
        assert device.waits == [] and x.device.type == "meta" and isinstance(x, There)
        looks = x[0, 0].item, x.tolist, x.cpu, lambda: x[i], lambda: x[x > 0], lambda: bool((x > 0).any())
        for n, wait in enumerate((*looks, lambda: i.to(x)), start=1):
            wait()
            assert len(device.waits) == n
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)


# ---- losses -------------------------------------------------------------------------------------------------------

KINDS = {
    "path": lambda **more: SCRAPLLoss(**SIZES, **more),
    "rate": lambda **more: SCRAPLLoss(**SIZES, **more, draw="rate"),
    "jtfs": lambda **more: JTFSLoss(**SIZES, **more),
    "embedding": lambda: EmbeddingLoss("ms_clap", 8192, torch.nn.Flatten()),
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("path", {"T": 8}),
        ("path", {"T": "global"}),
        ("rate", {"log1p": True}),
        ("jtfs", {"T": "global", "log1p": True}),
        ("embedding", {}),
    ],
    ids=str,
)
def test_a_device_computes_what_a_cpu_does(kind, options, monkeypatch):
    """Value, gradient and a product with the Hessian by the branches for devices, in float64: to 1e-12 of the largest
    (1e-10 for the product). Once its filters are there, a loss waits for nothing, whatever it draws."""
    results, draws = [], kind in ("path", "rate")
    monkeypatch.setattr(_fast, "ROW", 64)  # so that short signals have many rows on a CPU
    monkeypatch.setattr(_fast, "CHUNK", 2**12)
    for place in ("cpu", "meta"):
        loss = KINDS[kind](**options)
        with Elsewhere() as device:
            x_hat, x, v = (noise(2, 1, 512, seed=seed).to(place) for seed in range(3))
            x_hat.requires_grad_()
            for _ in range(2):
                device.waits.clear()
                value = loss(x_hat, x, **({"path_idx": 2} if draws else {}))
                (grad,) = torch.autograd.grad(value, x_hat, create_graph=True)
                (product,) = torch.autograd.grad((grad * v).sum(), x_hat)
            assert not draws or 0 <= loss.draw() < loss.n_paths
            assert device.waits == [] and product.device.type == place
            results.append([y.detach().cpu() for y in (value, grad, product)])
    for ours, theirs, limit in zip(*results, (1e-12, 1e-12, 1e-10), strict=True):
        assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= limit * theirs.abs().max()


# ---- training, tests of runs, checkpoints -------------------------------------------------------------------------


@pytest.fixture
def seldom_looked_at(monkeypatch):
    """As on CUDA."""
    monkeypatch.setitem(trainer.LOOK_EVERY, "meta", trainer.LOOK_EVERY["cuda"])


def weights(run):
    return [w.detach().cpu() for w in run.encoder.parameters()]


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # it is none here
@pytest.mark.parametrize(("task", "method"), RUNS, ids=str)
def test_runs_train_as_on_a_cpu_wait_for_nothing_and_resume(task, method, tmp_path, seldom_looked_at):
    """An epoch with dropout. All logged and tested values to 1e-3 of those of a CPU (float32; both draw alike). Steps
    that are not looked at wait for nothing once filters are there. The checkpoint of step 2, of which everything is
    read to the CPU, goes on bit for bit."""
    config = make_config(task, method, 0, "smoke", epochs=1, dropout=0.5)
    cpu = Training(config)
    list(cpu.steps())
    with Elsewhere() as device:
        run = Training(config, "meta")
        for path in range(run.loss.n_paths) if config.loss == "scrapl" else []:
            run.loss.coefficients(run.x[:1], path)
        for step in run.steps():
            assert run.looked == (step == run.n_steps) and (step != 2 or device.waits == [])
            device.waits.clear()
            if step == 2:
                save_checkpoint(run, tmp_path)
        assert run.step == run.n_steps > 2 and device.waits == []
        resumed = Training(config, "meta")
        load_checkpoint(resumed, tmp_path)
        list(resumed.steps())
        assert all(map(torch.equal, weights(resumed), weights(run)))
        state = [x for x in tree_leaves(resumed.optimizer.state_dict()["state"]) if torch.is_tensor(x) and x.ndim]
        assert len(state) > 10 and {x.device.type for x in (*state, *resumed.encoder.parameters())} == {"meta"}
        assert [row[:4] for row in resumed.history] == [row[:4] for row in run.history]
        found = evaluate(run, run.history)[0]
    expected = evaluate(cpu, cpu.history)[0]
    for a, b in ((run.history_table(), cpu.history_table()), (found, expected)):
        assert len(a) > 2 and a["metric"].equals(b["metric"]) and np.allclose(a["value"], b["value"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("draw", ["path", "rate"])
@pytest.mark.parametrize("optimizer", [PAdam, PSAGA], ids=lambda cls: cls.__name__)
def test_states_that_were_moved_whole_go_on(optimizer, draw, monkeypatch):
    """Six steps, and three, all tensors of all states moved to a device, and three: the same weights, to 1e-12.

    P-SAGA sums afresh at every second step; no update waits for the device."""
    monkeypatch.setattr(PSAGA, "SUM_AFRESH", 2 / SCRAPLLoss(**SIZES, draw=draw).n_paths)

    def made(seed=0):
        model, loss = torch.nn.Linear(2, 512, dtype=torch.float64), SCRAPLLoss(**SIZES, draw=draw, seed=seed)
        model.load_state_dict({"weight": noise(512, 2), "bias": noise(512)})
        return model, loss

    def trained(model, loss, optimizer, steps, waits=()):
        for step in steps:
            optimizer.zero_grad()
            theta, x = (noise(2, *shape, seed=step).to(model.weight) for shape in ((2,), (1, 512)))
            (1e8 * loss(model(theta)[:, None], x)).backward()
            before = list(waits)
            optimizer.step()
            assert list(waits) == before
        return model.weight.detach().cpu()

    def with_optimizer(model, loss):
        return model, loss, optimizer(model.parameters(), loss, lr=1e-2)

    expected, first = trained(*with_optimizer(*made()), range(6)), with_optimizer(*made())
    trained(*first, range(3))
    with Elsewhere() as device:
        states = [part.state_dict() for part in first]
        states = tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, states)
        model, loss = made(seed=1)
        second = with_optimizer(model.to("meta"), loss)
        for part, state in zip(second, states, strict=True):
            part.load_state_dict(state)
        found = trained(*second, range(3, 6), device.waits)
    assert (found - expected).abs().max() < 1e-12 and (found - first[0].weight).abs().max() > 1e-3


@pytest.fixture
def tf32():
    """As cuDNN has it by default; other tests turn it off."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_importance_is_computed_as_on_a_cpu(tf32):
    """Curvatures of two paths to 1e-6; the encoder in full float32, without the TF32 that cuDNN allows by default."""
    config, found, precisions = path_probabilities.importance_config("granular", "smoke"), [], set()
    for place in ("cpu", "meta"):
        with Elsewhere():
            problem = Problem(config, place)
            layer = problem.encoder.convolutions[0]
            if place == "meta":
                layer.register_forward_hook(lambda *_: precisions.add(torch.backends.cudnn.conv.fp32_precision))
            arguments = path_probabilities._arguments(problem, 1)
            found.append(torch.stack([c for _, c in curvature_by_path(*arguments, 20, 1e-3, paths=[0, 8])]))
    assert precisions == {"ieee"} and (found[1] / found[0] - 1).abs().max() < 1e-6 and found[0].min() > 0
