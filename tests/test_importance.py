"""theta_importance against dense matrices and the paper's power iteration; Arnoldi on known matrices; refusals."""

import math

import numpy as np
import pytest
import torch
from odd_surroundings import odd_surroundings
from torch import nn

from replication.tasks import make_config
from replication.teaching import AdaptiveProbs
from scrapl_lib import SCRAPLLoss, curvature, theta_importance
from scrapl_lib.curvature import arnoldi
from scrapl_lib.importance import curvature_by_path, probabilities
from scrapl_lib.reference import dense_curvature, dense_m, dense_probabilities
from scrapl_lib.synths import GranularSynth

TINY = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)  # 21 paths
SYNTH = GranularSynth(n_samples=512, n_grains=4, grain_samples=128, hop=16)
SEEDS = torch.tensor([5, 6, 7])
PATHS = list(range(0, 21, 4))  # those whose dense matrices are made
EXACT = dict(n_iter=60, tol=1e-10)


class SmallEncoder(nn.Module):
    """audio (batch, 1, 512) -> theta (batch, n_params), 18 weights for 2: fixed features, a hidden layer, sigmoids."""

    def __init__(self, n_params=2, dtype=torch.float64, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.project = 0.5 * torch.randn(512, 3, generator=generator, dtype=torch.float64).to(dtype)
        shapes = {"inner": (3, 2), "bias": (2 + n_params,), "outer": (2, n_params), "gain": (2, n_params)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(values))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        hidden = torch.tanh(x[:, 0] @ self.project @ self.inner + self.bias[:2])
        return torch.sigmoid(self.dropout(hidden) @ self.outer + hidden**2 @ self.gain + self.bias[2:])


def reference_audio(n=3, first_seed=20):
    theta = torch.rand(n, 2, generator=torch.Generator().manual_seed(first_seed), dtype=torch.float64)
    return SYNTH(theta, torch.arange(first_seed, first_seed + n))


def synthesizer(seeds=SEEDS):
    return lambda theta: SYNTH(torch.cat([theta, theta.new_full((len(theta), 2 - theta.shape[1]), 0.5)], 1), seeds)


class Polynomials(nn.Module):
    """A loss of given functions of x_hat's first samples: path p -> batch mean of functions[p](x_hat[:, 0])."""

    def __init__(self, *functions):
        super().__init__()
        self.functions, self.n_paths, self.path_idx = functions, len(functions), 17

    def forward(self, x_hat, x, path_idx):
        self.path_idx = path_idx
        return self.functions[path_idx](x_hat[:, 0]).mean()


def linear_problem(J):
    """theta_{n,u} = J[n, u] . w, audio whose first U samples are theta: (encode, synthesize, inputs, params)."""
    n, U, W = J.shape
    w = nn.Parameter(torch.linspace(0.2, 1.0, W, dtype=torch.float64))

    def synthesize(theta):
        return nn.functional.pad(theta, (0, U * W - U))[:, None]

    return lambda x: x.view(-1, U, W).to(w) @ w, synthesize, J.reshape(n, 1, U * W), [w]


def relative(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape and found.numel() and (expected.abs() > 0).all()
    return float((found / expected - 1).abs().max())


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 1])
def tiny(request):
    """(problem, dense matrices [u][path of PATHS]): small encoder, granular synthesizer, real transform."""
    encoder, U = SmallEncoder(request.param), request.param
    problem = SCRAPLLoss(**TINY), encoder, synthesizer(), reference_audio(), list(encoder.parameters())
    return problem, [[dense_m(*problem, path, u) for path in PATHS] for u in range(U)]


def test_curvature_is_that_of_the_dense_matrices(tiny):
    """Asymmetric for two parameters, symmetric for one; some of the dominant eigenvalues are negative."""
    problem, matrices = tiny
    found = theta_importance(*problem, **EXACT)
    assert found.curvature.dtype == found.probs.dtype == torch.float64 and found.curvature.shape == (len(matrices), 21)
    dense = [[dense_curvature(M) for M in of_u] for of_u in matrices]
    assert relative(found.curvature[:, PATHS], dense) < 1e-7
    assert float((found.probs - dense_probabilities(found.curvature)).abs().max()) < 1e-15
    assert relative(theta_importance(*problem, paths=PATHS).curvature[:, PATHS], dense) < 1e-3  # default tolerance
    flat = [M for of_u in matrices for M in of_u]
    asymmetry = [float((M - M.T).norm() / M.norm()) for M in flat]
    assert max(asymmetry) > 0.1 if len(matrices) == 2 else max(asymmetry) < 1e-12
    dominant = [max(np.linalg.eigvals(M.numpy()), key=abs) for M in flat]
    assert len(matrices) == 1 or 2 <= sum(value.real < 0 for value in dominant) < len(dominant)
    problem[0].probs = found.probs


def test_second_term_matters_and_gauss_newton_leaves_it_out(tiny):
    (loss, encoder, synthesize, x, params), matrices = tiny
    found = theta_importance(loss, encoder, synthesize, x, params, gauss_newton=True, paths=PATHS).curvature[:, PATHS]
    exact = torch.tensor([[dense_curvature(M) for M in of_u] for of_u in matrices])
    assert float((found / exact - 1).abs().max()) > 0.1
    theta = encoder(x)
    grads = [torch.autograd.grad(value, params, retain_graph=True) for value in theta.flatten()]
    J = torch.stack([torch.cat([g.reshape(-1) for g in of_value]) for of_value in grads]).unflatten(0, theta.shape)
    for i, p in enumerate(PATHS):
        at = theta.detach().requires_grad_()
        (s,) = torch.autograd.grad(loss(synthesize(at), x, path_idx=p), at, create_graph=True)
        for u in range(theta.shape[1]):
            (H_u,) = torch.autograd.grad(s[:, u].sum(), at, retain_graph=True)
            assert relative(found[u, i], dense_curvature(torch.einsum("nw,nv,nvz->wz", J[:, u], H_u, J))) < 1e-8


def test_batches_add_up_their_matrices():
    loss, encoder = SCRAPLLoss(**TINY), SmallEncoder()
    params, inputs = list(encoder.parameters()), [reference_audio(2, 20), reference_audio(1, 40)]
    synths = [synthesizer(SEEDS[:2]), synthesizer(SEEDS[2:])]
    found = theta_importance(loss, encoder, synths, inputs, params, paths=[4, 15], **EXACT)
    for p in (4, 15):
        sums = [sum(dense_m(loss, encoder, s, x, params, p, u) for s, x in zip(synths, inputs)) for u in range(2)]
        assert relative(found.curvature[:, p], [dense_curvature(M) for M in sums]) < 1e-8
    assert torch.nonzero(~found.curvature.isnan().any(0)).flatten().tolist() == [4, 15]


@pytest.mark.parametrize("audio_chunk, encoder_chunk", [(3, 1), (1, 2), (99, 99)])
def test_chunks_change_nothing(tiny, audio_chunk, encoder_chunk, monkeypatch):
    monkeypatch.setattr(curvature, "AUDIO_CHUNK", audio_chunk)
    monkeypatch.setattr(curvature, "ENCODER_CHUNK", encoder_chunk)
    problem, matrices = tiny
    found = theta_importance(*problem, paths=[8], **EXACT)
    assert relative(found.curvature[:, 8], [dense_curvature(of_u[2]) for of_u in matrices]) < 1e-8


def test_power_iteration_through_the_whole_chain_gives_the_same():
    """The paper's algorithm literally, with encoder (float32), synthesizer and transform of the smoke profile."""
    config = make_config("granular", "scrapl_no_theta_is", 0, "smoke")
    torch.manual_seed(0)
    encoder, loss, data = config.encoder().eval(), SCRAPLLoss(**config.transform()), config.data()
    synth, params, seeds = config.synth(), list(encoder.parameters()), torch.arange(100, 102)
    x = synth(data.theta[:2], data.seed[:2])
    problem = loss, lambda x: encoder(encoder.features(x)), lambda theta: synth(theta, seeds), x, params
    found = theta_importance(*problem, paths=[20])
    theta = encoder(encoder.features(x))
    value = loss(synth(theta.double(), seeds), x.double(), path_idx=20)
    (s,) = torch.autograd.grad(value, theta, create_graph=True)
    for u in range(2):
        gradient = torch.autograd.grad(theta[:, u], params, grad_outputs=s[:, u], create_graph=True)
        generator = torch.Generator().manual_seed(1)
        v = [torch.randn(w.shape, generator=generator) for w in params]
        for _ in range(25):
            size = math.sqrt(sum(float(a.double().square().sum()) for a in v))
            along = sum((g * a).sum() for g, a in zip(gradient, v, strict=True)) * (1e6 / size)
            v = torch.autograd.grad(along, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        expected = math.sqrt(sum(float(a.double().square().sum()) for a in v)) / 1e6
        assert abs(float(found.curvature[u, 20]) / expected - 1) < 5e-3


# ---- Arnoldi on known matrices --------------------------------------------------------------------------------------


def matrix(case):
    """A matrix (200, 200), float64, with a known spectrum, in a random basis."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64, generator=generator))
    D = torch.diag(0.5 * 0.9 ** torch.arange(200, dtype=torch.float64))
    if case == "nearly opposite":
        D[0, 0], D[1, 1] = 1, -0.995
    elif case == "complex pair":
        D[:2, :2] = torch.tensor([[0.0, 1], [-1, 0]])
    elif case == "asymmetric":
        D += torch.triu(0.05 * torch.randn(200, 200, dtype=torch.float64, generator=generator), 1)
        D[0, 0] = -1
    elif case == "zero":
        D *= 0
    return Q @ D @ Q.T


@pytest.mark.parametrize("case", ["nearly opposite", "complex pair", "asymmetric", "zero"])
def test_arnoldi_finds_the_largest_eigenvalue(case):
    M, products = matrix(case), []
    start = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    size, converged = arnoldi(lambda v: products.append(v) or M @ v, start, 60, 1e-6)
    assert converged and abs(size - (case != "zero")) < 1e-5 and len(products) < 60
    if case != "zero":
        products.clear()
        size, converged = arnoldi(lambda v: products.append(v) or M @ v, start, 2, 1e-6)
        assert not converged and len(products) == 2 and 0 < size < 2


def test_arnoldi_waits_for_a_rival_that_may_outgrow_the_largest():
    """-0.9 is nearly the start, found exactly with the fifth product; what becomes 1 is only 0.8 by then."""
    D = 0.8 * 0.95 ** torch.arange(200, dtype=torch.float64)
    start = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    D[0], D[1], start[0], start[1] = 1, -0.9, 0.1, 10
    size, converged = arnoldi(lambda v: D * v, start, 60, 1e-4)
    assert converged and abs(size - 1) < 1e-4


def test_arnoldi_ends_where_the_space_does_and_at_nan():
    D = torch.tensor([2.0, -5.0, 1.0], dtype=torch.float64)
    size, converged = arnoldi(lambda v: D * v, torch.ones_like(D), 20, 1e-15)
    assert converged and abs(size - 5) < 1e-12
    assert np.isnan(arnoldi(lambda v: v * torch.nan, torch.ones_like(D), 20, 1e-4)[0])


def test_flat_paths_and_parameters_get_zero_or_the_floor_never_nan():
    """Linear in theta, which is linear in the weights: M is 0 though the slopes are not. Nothing depends on theta_1."""
    functions = lambda y: y[:, 0] ** 2, lambda y: 3 * y[:, 0], lambda y: torch.ones(2), lambda y: -3 * y[:, 0] ** 2
    problem = Polynomials(*functions), *linear_problem(torch.eye(4, dtype=torch.float64).view(2, 2, 4))
    found = theta_importance(*problem)
    assert float((found.curvature - torch.tensor([[1.0, 0, 0, 3], [0, 0, 0, 0]])).abs().max()) < 1e-12
    assert float((found.probs - torch.tensor([0.25, 0, 0, 0.75])).abs().max()) < 1e-12
    floored = theta_importance(*problem, floor=0.2).probs
    assert float((floored - torch.tensor([0.25, 0.05, 0.05, 0.65], dtype=torch.float64)).abs().max()) < 1e-12


def test_probabilities():
    C = torch.tensor([[1.0, 3.0], [20.0, 20.0]])
    assert float((probabilities(1e-12 * C) - torch.tensor([0.375, 0.625])).abs().max()) < 1e-15
    for bad, floor in ((C, -0.1), (C, 1.1), (-C, 0), (C * torch.nan, 0), (C[0], 0), (0 * C, 0)):
        with pytest.raises(ValueError, match="curvature|floor"):
            probabilities(bad, floor)


# ---- path by path, what it leaves alone, what it refuses ------------------------------------------------------------


def arguments(**changes):
    """Of a call that works, with some replaced."""
    encoder = SmallEncoder()
    kept = dict(loss=SCRAPLLoss(**TINY), encode=encoder, synthesize=synthesizer(), inputs=reference_audio())
    return kept | dict(params=list(encoder.parameters()), paths=[1]) | changes


def test_paths_come_one_by_one_in_the_order_asked_for_and_report_may_stop():
    told, seen = [], []
    for path, values in curvature_by_path(**arguments(paths=[5, np.int64(1)]), report=lambda *args: told.append(args)):
        seen.append(path)
        assert values.shape == (2,) and told[-1] == ("curvature", len(seen), 2)
    assert seen == [5, 1] and told[:2] == [("derivatives", 3, 6), ("derivatives", 6, 6)] and len(told) == 4
    with pytest.raises(ZeroDivisionError):
        list(curvature_by_path(**arguments(), report=lambda phase, done, total: done / 0))


def test_nothing_else_is_touched():
    encoder, loss = SmallEncoder(), SCRAPLLoss(**TINY)
    loss(reference_audio(), reference_audio(), path_idx=11)
    encoder.inner.grad = torch.ones_like(encoder.inner)
    state, random = loss.get_extra_state(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    theta_importance(**arguments(loss=loss, encode=encoder, params=encoder.parameters()))
    assert loss.path_idx == 11 and loss.get_extra_state() == state and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items()) and len(weights) == 4
    assert torch.equal(encoder.inner.grad, torch.ones_like(encoder.inner)) and encoder.outer.grad is None


@pytest.mark.parametrize("around", [odd_surroundings, torch.no_grad])
def test_the_callers_surroundings_change_nothing(around):
    drawn, encoder = SYNTH.draw(SEEDS), SmallEncoder(dtype=torch.float32)  # autocast leaves float64 alone
    problem = arguments(synthesize=lambda theta: SYNTH.render(theta, *drawn), encode=encoder)
    problem["params"] = list(encoder.parameters())
    before = theta_importance(**problem).curvature[:, 1:2]
    with around():
        for _, _ in curvature_by_path(**problem):  # the caller's, between two paths
            assert torch.is_grad_enabled() == torch.is_autocast_enabled("cpu") == (around is odd_surroundings)
        after = theta_importance(**problem).curvature[:, 1:2]
        probs = probabilities(after.tolist(), 0.5)
    assert torch.equal(after, before) and torch.equal(probs, probabilities(before, 0.5))


ENCODER, STOCHASTIC, HALF = SmallEncoder(), SmallEncoder(dropout=0.5), SmallEncoder().half()
OWN = {"params": list(ENCODER.parameters())}


REFUSED = [
    ({"encode": STOCHASTIC, "params": list(STOCHASTIC.parameters())}, "encode is not deterministic.*eval mode"),
    ({"synthesize": lambda theta: SYNTH(theta, torch.randint(999, (3,)))}, "synthesize is not determin.*seeds"),
    ({"encode": lambda x: ENCODER(x) - ENCODER(x).mean(dim=0), **OWN}, "encode does not treat items independently"),
    ({"encode": lambda x: ENCODER(x).detach(), **OWN}, r"does not use .* params \[0, 1, 2, 3\]"),
    ({"encode": ENCODER, "params": [*OWN["params"], nn.Parameter(torch.ones(3))]}, r"params \[4\] of 0 ... 4"),
    ({"encode": ENCODER, "params": []}, "params must be"),
    ({"encode": ENCODER, "params": [torch.ones(3)]}, "params must be"),
    ({"encode": HALF, "params": list(HALF.parameters())}, "params must be .* float32 or float64"),
    ({"encode": lambda x: ENCODER(x)[1:], **OWN}, r"encode must return theta of shape \(batch, U\)"),
    ({"synthesize": lambda theta: SYNTH(theta, SEEDS)[..., :-1]}, "shape of its reference"),
    ({"synthesize": lambda theta: SYNTH(theta.detach(), SEEDS)}, "without a graph"),
    ({"synthesize": [synthesizer(), synthesizer()]}, "for each of the 1 batches, got 2"),
    ({"inputs": reference_audio()[0]}, r"inputs must have shape \(batch, 1, samples\)"),
    ({"paths": [21]}, "from 0 to 20"),
    ({"paths": [1, 1]}, "different"),
    ({"paths": []}, "at least one"),
    ({"n_iter": 0}, "n_iter must be"),
    ({"tol": 0}, "tol must be"),
    ({"floor": 2}, "floor must be"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(changes, message):
    torch.manual_seed(0)
    with pytest.raises((ValueError, TypeError), match=message):
        theta_importance(**arguments(**changes))


def test_curvature_that_is_not_finite_is_refused_with_its_path():
    problem = linear_problem(torch.eye(2, dtype=torch.float64).view(2, 1, 2))
    loss = Polynomials(lambda y: y[:, 0] ** 2, lambda y: (y[:, 0] - y[:, 0].detach()).abs().sqrt())
    work = curvature_by_path(loss, *problem)
    assert next(work)[0] == 0
    with pytest.raises(FloatingPointError, match="path 1"):
        next(work)
    assert loss.path_idx == 17


def test_too_few_iterations_are_said_once_with_all_paths():
    with pytest.warns(UserWarning, match=r"paths \[1, 7\] have not converged to 0.0001 after n_iter = 2 .* raise"):
        found = theta_importance(**arguments(n_iter=2, paths=[1, 7]))
    with pytest.raises(ValueError, match="paths that were not computed are NaN"):
        _ = found.probs


# ---- re-estimated while training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
def test_adaptive_probs_come_to_the_gradients_shares(unbiased):
    """Constant gradients G[p, u]: after every path was drawn, pi is equation 10 with |G| for C, in whatever units."""
    loss = SCRAPLLoss(**TINY, unbiased=unbiased)
    adaptive = AdaptiveProbs(loss, 2, floor=0.1)
    x, G = reference_audio(1), torch.rand(21, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.01
    for _ in range(200):
        loss(x, x)
        adaptive.update(1e8 * loss.weight * torch.stack([G[loss.path_idx], -2 * G[loss.path_idx]]))
        assert float(loss.probs.min()) >= 0.1 / 21 - 1e-12
    assert (adaptive.count > 0).all()
    assert float((loss.probs - probabilities(G.T, 0.1)).abs().max()) < 1e-12
    with pytest.raises(FloatingPointError, match="gradient of theta_hat is not finite"):
        adaptive.update(torch.full((2, 2), torch.nan))
