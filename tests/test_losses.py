"""SCRAPLLoss and JTFSLoss: official values, derivatives, Proposition 3.1, draws, invariances, bad input."""

import functools
import io
import math
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from replication.baselines import MSSLoss
from scrapl_lib import JTFSLoss, SCRAPLLoss
from scrapl_lib import jtfs as jtfs_module
from scrapl_lib.curvature import _derivatives_backwards
from scrapl_lib.jets import Jets

REFERENCE = pathlib.Path(__file__).parent / "reference"
OFFICIAL = {  # values computed with scrapl-loss 0.1.0
    "small": dict(shape=4096, J=8, Q1=4, Q2=1, J_fr=2, Q_fr=1),
    "granular": dict(),  # the defaults
    "tr808": dict(shape=44100, J=12, Q1=8, Q2=2, J_fr=5, Q_fr=2, T=2048, F=1, log1p=True),
}
TINY = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)  # 21 paths


@functools.cache
def reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def official_pair(name):
    return (torch.from_numpy(reference(name)[key])[:, None] for key in ("x_hat", "x"))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_l2(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape and torch.linalg.vector_norm(expected) > 0
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


# ---- official values ------------------------------------------------------------------------------------------------


def test_a_known_path_of_the_reference_is_taken_as_it_is(monkeypatch):
    loss, x = SCRAPLLoss(**TINY), torch.randn(3, 2, 1, 512, generator=torch.Generator().manual_seed(0))
    S, expected, calls = loss.jtfs.path(x[1], 5), loss(x[0], x[1], path_idx=5), []
    path = loss.jtfs.path
    monkeypatch.setattr(loss.jtfs, "path", lambda x, p: calls.append(p) or path(x, p))
    assert expected > 0 and loss(x[0], x[1], path_idx=5, S=S).item() == expected.item() and calls == [5]
    assert loss(x[0], x[2], path_idx=5, S=S).item() == expected.item()
    for options in ({"S": S}, {"S": S[:1], "path_idx": 5}):
        with pytest.raises(ValueError, match=r"S must be jtfs.path\(x, path_idx\), of shape"):
            loss(x[0], x[1], **options)


@pytest.mark.parametrize("make", [SCRAPLLoss, JTFSLoss])
def test_autocast_does_not_touch_the_transform(make):
    """bfloat16 would be off by 1e-2."""
    loss, x = (
        make(shape=2048, J=7, Q1=4, Q2=1, J_fr=2, Q_fr=1),
        torch.randn(2, 2, 1, 2048, generator=torch.Generator().manual_seed(0)),
    )
    options = {"path_idx": 3} if make is SCRAPLLoss else {}
    x_hat = x[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x_hat[0] @ x_hat[0].mT).dtype == torch.bfloat16
        found = loss(x_hat, x[1], **options)
    expected = loss(x_hat, x[1], **options)
    assert found.dtype == torch.float32 and expected > 0 and found.item() == expected.item()
    assert torch.autograd.grad(found, x_hat)[0].abs().max() > 0


def test_the_nearest_mss_is_named():
    with pytest.raises(
        ValueError, match="name must be one of mss_linear, .*, got 'mss_log': did you mean 'mss_log_linear'"
    ):
        MSSLoss("mss_log")


@pytest.mark.parametrize(("name", "evaluated"), [("small", 42), ("granular", 315), ("tr808", 69)])
def test_path_losses_are_the_official_ones(name, evaluated):
    loss, (x_hat, x), official = SCRAPLLoss(**OFFICIAL[name]), official_pair(name), reference(name)
    with torch.no_grad():
        found = np.array([float(loss(x_hat, x, int(i))) for i in official["path_idx"]])
    assert found.shape == (evaluated,)
    assert np.abs(found / official["path_loss"] - 1).max() < 1e-5


@pytest.mark.parametrize("name", OFFICIAL)
def test_path_gradients_are_the_official_ones(name):
    """Relative L2 norm of the difference: u / |u| amplifies float32 rounding where coefficients are small."""
    loss, (x_hat, x), official = SCRAPLLoss(**OFFICIAL[name]), official_pair(name), reference(name)
    x_hat.requires_grad_()
    indices = [int(key[5:]) for key in official if key.startswith("grad_")]
    assert len(indices) >= 2
    for index in indices:
        (grad,) = torch.autograd.grad(loss(x_hat, x, index), x_hat)
        assert relative_l2(grad[:, 0], official[f"grad_{index}"]) < 1e-4


@pytest.mark.parametrize("name", ["small", "granular"])
def test_full_distance_is_the_official_one(name):
    with torch.no_grad():
        found = float(JTFSLoss(**OFFICIAL[name])(*official_pair(name)))
    assert abs(found / float(reference(name)["jtfs_distance"]) - 1) < 1e-5


# ---- definition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log1p", [False, True])
def test_losses_are_norms_of_coefficients(log1p):
    """Mean over items of the norm, not squared, without the factor P; the full loss: also over channels, unpadded."""
    x_hat, x = noise(3, 1, 512, seed=1), noise(3, 1, 512, seed=2)
    scrapl, full = SCRAPLLoss(**TINY, log1p=log1p), JTFSLoss(**TINY, log1p=log1p)

    def rho(S):
        return torch.log(1 + S / 1e-3) if log1p else S

    difference = rho(scrapl.jtfs.path(x_hat, 8)) - rho(scrapl.jtfs.path(x, 8))
    assert abs(float(scrapl(x_hat, x, 8) / difference.square().sum((1, 2)).sqrt().mean()) - 1) < 1e-12
    difference = rho(full.jtfs(x_hat)) - rho(full.jtfs(x))
    per_item = difference.square().sum((2, 3)).sqrt().mean(1)
    assert relative_l2(full.per_item(x_hat, x), per_item) < 1e-12
    assert abs(float(full(x_hat, x) / per_item.mean()) - 1) < 1e-12


# ---- Proposition 3.1 ------------------------------------------------------------------------------------------------


def synthesize(theta):
    """A small differentiable synth: (batch, 3) -> an amplitude- and frequency-modulated tone (batch, 1, 512)."""
    t = torch.arange(512, dtype=theta.dtype) / 512
    slope, tremolo, depth = theta.sigmoid().split(1, dim=1)
    phase = 2 * math.pi * (60 * t + 40 * (slope - 0.5) * t**2)
    envelope = torch.sin(math.pi * t) ** 2 * (1 + depth * torch.cos(2 * math.pi * (4 + 12 * tremolo) * t))
    return (envelope * torch.sin(phase))[:, None]


@pytest.fixture
def autoencoder():
    """Encoder, its features, and the reference sound, in float64."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return encoder, noise(4, 8, seed=3), synthesize(noise(4, 3, seed=4))


def weight_gradient(encoder, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(encoder.parameters()))])


@pytest.mark.parametrize("probs", ["uniform", "other"])
@pytest.mark.parametrize("log1p", [False, True])
def test_proposition_3_1(autoencoder, log1p, probs):
    """The expected gradient of one path with respect to encoder weights is that of the full loss, to 1e-9 in float64.

    The full loss takes another route: all paths of one n2 at once, the first order shared.
    """
    encoder, features, x = autoencoder
    loss = SCRAPLLoss(**TINY, log1p=log1p)
    if probs == "other":
        weights = torch.rand(loss.n_paths, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        loss.probs = weights / weights.sum()
    gradients = []
    for index in range(loss.n_paths):
        gradients.append(weight_gradient(encoder, loss(synthesize(encoder(features)), x, index)))
    expected_gradient = loss.probs @ torch.stack(gradients)

    jtfs, full = loss.jtfs, 0.0
    bands_hat, bands = (jtfs.first_order_and_bands(audio)[1] for audio in (synthesize(encoder(features)), x))
    for n2 in bands:
        paths = jtfs.paths_of(n2)
        for path, *S in zip(paths, *(jtfs.coefficients(b[n2], paths) for b in (bands_hat, bands))):
            S_hat, S = (torch.log1p(s / 1e-3) for s in S) if log1p else S
            full = full + loss.probs[path.index] * (S_hat - S).flatten(1).norm(dim=1).mean()
    assert relative_l2(expected_gradient, weight_gradient(encoder, full)) < 1e-9
    spread = torch.stack([g / g.norm() for g in gradients]).mean(0).norm()
    assert spread < 0.95  # the paths' gradients do differ


def test_full_loss_is_the_mean_over_its_paths(autoencoder):
    """JTFSLoss against its own paths one by one, unpadded: first order and second, gradients to 1e-9."""
    encoder, features, x = autoencoder
    full = JTFSLoss(**TINY)
    expected = weight_gradient(encoder, full(synthesize(encoder(features)), x))
    jtfs, gradients = full.jtfs, []
    for index in range(jtfs.n_paths):
        S_hat, S = (jtfs.unpad(jtfs.path(audio, index)) for audio in (synthesize(encoder(features)), x))
        gradients.append(weight_gradient(encoder, (S_hat - S).flatten(1).norm(dim=1).mean()))
    for channel in range(jtfs.first_order_paths):
        S_hat, S = (jtfs(audio)[:, channel] for audio in (synthesize(encoder(features)), x))
        gradients.append(weight_gradient(encoder, (S_hat - S).flatten(1).norm(dim=1).mean()))
    assert len(gradients) == jtfs.n_paths + jtfs.first_order_paths
    assert relative_l2(torch.stack(gradients).mean(0), expected) < 1e-9


def test_a_reference_known_already_changes_nothing(autoencoder):
    encoder, features, x = autoencoder
    full = JTFSLoss(**TINY)
    S = full.jtfs(x)
    (found, grad), (expected, grad_0) = (
        (loss, weight_gradient(encoder, loss))
        for loss in (full(synthesize(encoder(features)), x, *given) for given in ([S], []))
    )
    assert found > 0 and abs(float(found - expected)) < 1e-12 and relative_l2(grad, grad_0) < 1e-12
    assert abs(float(full(synthesize(encoder(features)), x, S.roll(1, 0)) - expected)) > 1e-3 * float(
        expected
    )  # it is used
    with pytest.raises(ValueError, match=r"S must be jtfs\(x\), of shape"):
        full(synthesize(encoder(features)), x, S[:1])


def test_a_loss_that_was_used_can_be_pickled(autoencoder):
    encoder, features, x = autoencoder
    loss = SCRAPLLoss(**TINY)
    expected = loss(synthesize(encoder(features)), x, path_idx=3)
    again = pickle.loads(pickle.dumps(loss))
    assert (
        expected > 0 and again(synthesize(encoder(features)), x, path_idx=3) == expected and again.draw() == loss.draw()
    )


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2**22, 0], ids=["matrix", "fft"])
@pytest.mark.parametrize("log1p", [False, True])
def test_first_and_second_derivatives_of_a_path(log1p, limit, monkeypatch):
    """Against finite differences, with respect to three synth parameters, relative tolerance 1e-4 (1e-3 for the second)."""
    monkeypatch.setattr(jtfs_module, "MATRIX_LIMIT", limit)
    loss, x = SCRAPLLoss(**TINY, log1p=log1p), synthesize(noise(2, 3, seed=6))
    theta = noise(2, 3, seed=7).requires_grad_()
    for index in (0, 4, 20):

        def value(theta, index=index):
            return loss(synthesize(theta), x, index)

        (grad,) = torch.autograd.grad(value(theta), theta)
        scale = float(grad.abs().max())
        assert scale > 1e-4
        assert torch.autograd.gradcheck(value, theta, rtol=1e-4, atol=1e-5 * scale)
        assert torch.autograd.gradgradcheck(value, theta, rtol=1e-3, atol=1e-4 * scale)


def test_first_and_second_derivatives_of_the_full_loss():
    loss, x, theta = JTFSLoss(**TINY), synthesize(noise(1, 3, seed=8)), noise(1, 3, seed=9).requires_grad_()

    def value(theta):
        return loss(synthesize(theta), x)

    scale = float(torch.autograd.grad(value(theta), theta)[0].abs().max())
    assert torch.autograd.gradcheck(value, theta, rtol=1e-4, atol=1e-5 * scale)
    assert torch.autograd.gradgradcheck(value, theta, rtol=1e-3, atol=1e-4 * scale)


def test_memory_of_the_full_loss():
    """Granular configuration, batch 4, forward and backward: the whole process stays below 1 GiB (712 MiB measured, of which
    Python and torch take a third). A process of its own, as peak memory never falls."""
    code = (
        "import resource, torch; from scrapl_lib import JTFSLoss; "
        "x, x_hat = torch.randn(2, 4, 1, 32768, generator=torch.Generator().manual_seed(0)); "
        "JTFSLoss(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2)(x_hat.requires_grad_(), x).backward(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 100 < float(done.stdout) < 1024


def test_a_gradient_may_be_taken_twice_with_the_same_result():
    """The curvature of theta-IS needs create_graph=True: the same first derivative, whichever backward pass computes it."""
    loss, x, theta = SCRAPLLoss(**TINY), synthesize(noise(2, 3, seed=10)), noise(2, 3, seed=11).requires_grad_()
    plain, recorded = (
        torch.autograd.grad(loss(synthesize(theta), x, 4), theta, create_graph=create)[0] for create in (False, True)
    )
    assert not plain.requires_grad and recorded.requires_grad
    assert relative_l2(recorded.detach(), plain) < 1e-12


# ---- draws ----------------------------------------------------------------------------------------------------------


def draws(loss, n):
    return [loss.draw() for _ in range(n)]


def uneven(n_paths):
    probs = torch.arange(n_paths, dtype=torch.float64) % 4
    return probs / probs.sum()


@pytest.mark.parametrize("probs", ["uniform", "uneven"])
def test_draws_follow_the_probabilities(probs):
    """Chi-square test of 20,000 draws with seed 0 at the 0.001 level; a path of probability 0 is never drawn."""
    loss, n = SCRAPLLoss(**TINY, seed=0), 20_000
    assert (loss.probs - 1 / 21).abs().max() < 1e-15 and loss.probs.dtype == torch.float64
    if probs == "uneven":
        loss.probs = uneven(21)
    counts = np.bincount(draws(loss, n), minlength=21)
    expected = n * loss.probs.numpy()
    possible = expected > 0
    assert possible.sum() == (21 if probs == "uniform" else 15) and counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert 1 < statistic < chi2.ppf(0.999, possible.sum() - 1)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_a_possible_path(u, monkeypatch):
    """Also where rounding leaves the cumulative sum below the largest uniform number."""
    loss = SCRAPLLoss(**TINY)
    probs = torch.zeros(21, dtype=torch.float64)
    probs[3:13] = 0.1
    loss.probs = probs
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(u, dtype=torch.float64))
    assert loss.draw() == {0.0: 3, 0.5: 8}.get(u, 12)


def test_a_call_draws_and_tells_its_path():
    x_hat, x = noise(1, 1, 512, seed=12), noise(1, 1, 512, seed=13)
    loss, twin = SCRAPLLoss(**TINY, seed=3), SCRAPLLoss(**TINY, seed=3)
    assert loss.path_idx is None
    for _ in range(5):
        value = loss(x_hat, x)
        assert loss.path_idx == twin.draw()
        assert float(value) == float(twin(x_hat, x, path_idx=loss.path_idx))
    loss(x_hat, x, path_idx=np.int64(7))
    assert loss.path_idx == 7 and draws(loss, 10) == draws(twin, 10)  # a given path draws none


def test_a_seed_fixes_the_draws_and_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draws(SCRAPLLoss(**TINY, seed=1), 50)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert draws(SCRAPLLoss(**TINY, seed=1), 50) == first
    assert draws(SCRAPLLoss(**TINY, seed=2), 50) != first


def test_state_dict_resumes_the_draws():
    loss = SCRAPLLoss(**TINY, seed=1)
    loss.probs = uneven(21)
    draws(loss, 10)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    last, later = loss.path_idx, draws(loss, 50)
    file.seek(0)
    resumed = SCRAPLLoss(**TINY, seed=77)
    resumed.load_state_dict(torch.load(file))  # weights_only: nothing but tensors and numbers inside
    assert resumed.path_idx == last and torch.equal(resumed.probs, loss.probs)
    assert draws(resumed, 50) == later


def test_state_of_another_transform_is_refused():
    state = SCRAPLLoss(**TINY).state_dict()
    with pytest.raises(ValueError, match="shape \\(28,\\), got \\(21,\\): were they computed for another transform"):
        SCRAPLLoss(**dict(TINY, J=6)).load_state_dict(state)


# ---- invariances ----------------------------------------------------------------------------------------------------


def both_losses(**change):
    return [functools.partial(SCRAPLLoss(**TINY, **change), path_idx=8), JTFSLoss(**TINY, **change)]


@pytest.mark.parametrize("log1p", [False, True])
def test_the_two_signals_may_be_exchanged(log1p):
    a, b = (noise(2, 1, 512, seed=s).requires_grad_() for s in (14, 15))
    for loss in both_losses(log1p=log1p):
        value, exchanged = loss(a, b), loss(b, a)
        assert value.item() == exchanged.item() > 0
        for one, other in zip(torch.autograd.grad(value, (a, b)), torch.autograd.grad(exchanged, (a, b))):
            assert relative_l2(one, other) < 1e-12


def test_the_reference_carries_no_graph(monkeypatch):
    """Unless it asks for one; then its gradient comes too."""
    loss, graphs = SCRAPLLoss(**TINY), []
    path = loss.jtfs.path

    def spy(x, index):
        S = path(x, index)
        graphs.append(S.requires_grad)
        return S

    monkeypatch.setattr(loss.jtfs, "path", spy)
    x_hat, x = noise(1, 1, 512, seed=16).requires_grad_(), noise(1, 1, 512, seed=17)
    loss(x_hat, x, 8).backward()
    assert sorted(graphs) == [False, True] and x_hat.grad.abs().max() > 0 and x.grad is None
    graphs.clear()
    with torch.no_grad():
        assert not loss(x_hat, x.requires_grad_(), 8).requires_grad
    assert graphs == [False, False]
    loss(x_hat.detach(), x, 8).backward()
    assert x.grad.abs().max() > 0


def test_equal_signals_and_silence_have_distance_and_gradient_zero():
    for dtype in (torch.float32, torch.float64):
        for x in (torch.zeros(2, 1, 512, dtype=dtype), noise(2, 1, 512, seed=18, dtype=dtype)):
            for loss in [*both_losses(), *both_losses(log1p=True)]:
                x_hat = x.clone().requires_grad_()
                value = loss(x_hat, x)
                (grad,) = torch.autograd.grad(value, x_hat)
                assert value.item() == 0 and grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silence_beside_sound_has_finite_derivatives(dtype):
    """First and second, also in an item where both signals are silent: theta-IS differentiates whole batches twice."""
    x = noise(2, 1, 512, seed=19, dtype=dtype)
    x[1] = 0
    for loss in [*both_losses(), *both_losses(log1p=True)]:
        x_hat = torch.zeros_like(x).requires_grad_()
        (grad,) = torch.autograd.grad(loss(x_hat, x), x_hat, create_graph=True)
        (second,) = torch.autograd.grad((grad * noise(*x.shape, seed=26, dtype=dtype)).sum(), x_hat)
        assert torch.isfinite(grad).all() and torch.isfinite(second).all()


def test_an_item_of_distance_zero_leaves_the_others_their_curvature():
    """The Hessian-vector product of a batch of two, the second item equal to its reference, is half that of the first alone."""
    x, v = noise(2, 1, 512, seed=27), noise(2, 1, 512, seed=28)
    x_hat = torch.cat([noise(1, 1, 512, seed=29), x[1:]])
    for loss in both_losses():

        def product(n, loss=loss):
            y = x_hat[:n].clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(y, x[:n]), y, create_graph=True)
            return torch.autograd.grad((grad * v[:n]).sum(), y)[0]

        both, alone = product(2), product(1)
        assert relative_l2(2 * both[:1], alone) < 1e-12 and both[1].abs().max() == 0


def test_very_soft_sound_has_its_true_gradient():
    """At amplitude 1e-12 squared coefficients underflow in float32; the gradient does not depend on the amplitude."""
    x_hat, x = noise(1, 1, 512, seed=20, dtype=torch.float32), noise(1, 1, 512, seed=21, dtype=torch.float32)
    loss = SCRAPLLoss(**TINY)
    for index in (0, 8):
        loud, soft = (
            torch.autograd.grad(loss(y, a * x, index), y)[0]
            for a, y in ((a, (a * x_hat).requires_grad_()) for a in (1, 1e-12))
        )
        assert relative_l2(soft, loud) < 1e-3


def test_batch_size_does_not_matter():
    x_hat, x = noise(3, 1, 512, seed=22), noise(3, 1, 512, seed=23)
    for loss in both_losses():
        single = torch.stack([loss(a[None], b[None]) for a, b in zip(x_hat, x)])
        assert abs(float(loss(x_hat, x) / single.mean()) - 1) < 1e-12


def test_float32_agrees_with_float64():
    x_hat, x = synthesize(noise(2, 3, seed=24)), synthesize(noise(2, 3, seed=25))
    for loss in [*both_losses(), *both_losses(log1p=True)]:
        value = loss(x_hat.float(), x.float())
        assert value.dtype == torch.float32 and loss(x_hat, x).dtype == torch.float64
        assert abs(value.item() / loss(x_hat, x).item() - 1) < 1e-4


def clicks(seed, lowest, highest):
    """Twelve short clicks at random times in 8192 samples, pitch in octaves re 1 cycle per sample: (1, 1, 8192)."""
    rng, t = np.random.default_rng(seed), np.arange(32)
    y = np.zeros(8192)
    for _ in range(12):
        pitch, start = 2 ** rng.uniform(lowest, highest), rng.integers(1024, 7000)
        y[start : start + 32] += np.hanning(32) * np.sin(2 * np.pi * pitch * t)
    return torch.from_numpy(y / np.linalg.norm(y)).reshape(1, 1, -1)


def test_a_shift_moves_scattering_little_and_spectrograms_much():
    """Twelve clicks shifted by 128 samples, T / 16; distances in units of that to twelve other clicks, two octaves higher."""
    config = dict(shape=8192, J=11, Q1=4, Q2=1, J_fr=2, Q_fr=1)
    x, other = clicks(1, -5, -3.5), clicks(2, -3.5, -2)
    shifted = torch.roll(x, 128, dims=-1)

    def moved(loss):
        with torch.no_grad():
            return float(loss(shifted, x) / loss(other, x))

    scrapl = SCRAPLLoss(**config)
    paths = [moved(functools.partial(scrapl, path_idx=i)) for i in range(0, scrapl.n_paths, 7)]
    spectrograms = [moved(MSSLoss(name)) for name in ("mss_linear", "mss_log_linear", "mss_revisited")]
    assert len(paths) == 9 and max(paths) < 0.15 and sum(paths) / len(paths) < 0.06
    assert moved(JTFSLoss(**config)) < 0.06
    assert min(spectrograms) > 0.25


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 1, 512)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(512), ValueError, "have shape \\(batch, 1, samples\\), mono, got \\(512,\\)"),
        (torch.zeros(2, 512), ValueError, "have shape .* got \\(2, 512\\)"),
        (torch.zeros(2, 2, 512), ValueError, "mono, got \\(2, 2, 512\\).*mix several channels down"),
        (torch.zeros(0, 1, 512), ValueError, "got \\(0, 1, 512\\)"),
        (torch.zeros(2, 1, 500), ValueError, "have 512 samples, got 500: pad or crop it"),
        (torch.zeros(2, 1, 512, dtype=torch.bfloat16), TypeError, "float32 or float64 tensor, got torch.bfloat16"),
        (torch.zeros(2, 1, 512, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (np.zeros((2, 1, 512)), TypeError, "got ndarray"),
        (GOOD.clone().fill_(torch.nan), ValueError, "be finite, got 1024 NaN or infinite values"),
        (GOOD.clone().index_fill_(2, torch.tensor(5), torch.inf), ValueError, "be finite, got 2 NaN"),
    ],
)
def test_wrong_audio_says_what_is_wrong(bad, error, message):
    for loss in both_losses():
        with pytest.raises(error, match=f"^x_hat must .*{message}"):
            loss(bad, GOOD)
        with pytest.raises(error, match=f"^x must .*{message}"):
            loss(GOOD, bad)


def test_signals_that_do_not_match_say_so():
    for loss in both_losses():
        with pytest.raises(ValueError, match="one shape, got \\(2, 1, 512\\) and \\(1, 1, 512\\)"):
            loss(GOOD, GOOD[:1])
        with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.float64"):
            loss(GOOD, GOOD.double())


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (21, IndexError, "path_idx = 21 is out of range: this transform has paths 0 .. 20"),
        (-1, IndexError, "path_idx = -1 is out of range"),
        (2.0, TypeError, "path_idx must be an integer, got 2.0"),
    ],
)
def test_wrong_paths_say_what_is_wrong(index, error, message):
    loss = SCRAPLLoss(**TINY)
    with pytest.raises(error, match=message):
        loss(GOOD, GOOD, path_idx=index)
    assert loss.path_idx is None


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.full((20,), 1 / 20), "one entry per path, shape \\(21,\\), got \\(20,\\)"),
        (torch.full((21, 1), 1 / 21), "got \\(21, 1\\)"),
        (1.0, "got \\(\\)"),
        (torch.full((21,), 1 / 20), "must sum to 1 within 1e-6, got 1.0500000.*: divide them by their sum"),
        (np.zeros(21), "must sum to 1 within 1e-6, got 0"),
        ([-0.5, 1.5] + [0] * 19, "finite and not negative"),
        ([math.nan] + [0.05] * 20, "finite and not negative"),
        ([math.inf] + [0] * 20, "finite and not negative"),
    ],
)
def test_wrong_probabilities_say_what_is_wrong(probs, message):
    loss = SCRAPLLoss(**TINY)
    with pytest.raises(ValueError, match=message):
        loss.probs = probs
    assert (loss.probs - 1 / 21).abs().max() < 1e-15


def test_probabilities_of_any_kind_of_array():
    loss = SCRAPLLoss(**TINY)
    weights = torch.arange(1, 22) / 231
    for probs in (weights.clone().requires_grad_(), weights.numpy(), weights.tolist()):
        loss.probs = probs
        assert loss.probs.dtype == torch.float64 and not loss.probs.requires_grad
        assert abs(float(loss.probs.sum()) - 1) < 1e-15 and abs(float(loss.probs[20]) - 21 / 231) < 1e-7


@pytest.mark.parametrize("Loss", [SCRAPLLoss, JTFSLoss])
def test_wrong_configurations_say_what_is_wrong(Loss):
    for change, error, message in (
        (dict(T=513), ValueError, "T = 513 is longer than the signal of 512 samples"),
        (dict(J=10), ValueError, "J = 10 needs signals of at least 2\\^J = 1024 samples, shape is 512"),
        (dict(F=13), ValueError, "F = 13 is longer than 12 log-frequency bins"),
        (dict(Q1=2.0), TypeError, "Q1 must be an integer, got 2.0"),
    ):
        with pytest.raises(error, match=message):
            Loss(**{**TINY, **change})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"seed": True}, "seed must be"),
        ({"log1p": "no"}, "log1p must be True or False, got 'no'"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        SCRAPLLoss(**TINY, **options)


def test_a_state_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"expected what get_extra_state\(\) of a SCRAPLLoss returned, got {}"):
        SCRAPLLoss(**TINY).set_extra_state({})


@pytest.mark.parametrize("options", [{}, {"log1p": True}, {"T": "global", "F": "global"}, {"T": 1}], ids=str)
def test_derivatives_are_those_of_autograd(options):
    """Gradient and Hessian of every path's distance in two parameters that a sound with a silent end depends on, against two
    backward passes through `forward`: 1e-10 of the largest entry in float64."""
    loss = SCRAPLLoss(shape=256, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1, **options)
    jets, x = Jets(2), torch.randn(3, 1, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moving = torch.randn(3, jets.K, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moving[:, :, 180:] = 0
    found = {path: derivatives for path, *derivatives in loss.derivatives(moving, x, jets, range(loss.n_paths))}
    assert sorted(found) == list(range(loss.n_paths)) and loss.n_paths >= 7
    for path, gradient, hessian in _derivatives_backwards(loss, moving, x, jets, range(loss.n_paths)):
        for ours, expected in zip(found[path], (gradient, hessian), strict=True):
            assert ours.shape == expected.shape and (ours - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("kind", [SCRAPLLoss, JTFSLoss])
def test_a_loss_first_used_in_inference_mode_can_train_later(kind):
    """The filters it makes then may become part of a graph."""
    loss, x = (
        kind(shape=256, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1),
        torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0)),
    )
    options = {"path_idx": 3} if kind is SCRAPLLoss else {}
    with torch.inference_mode():
        before = loss(x, 0.5 * x, **options)
    x_hat = x.clone().requires_grad_()
    value = loss(x_hat, 0.5 * x, **options)
    value.backward()
    assert float(value.detach()) == float(before) > 0 and x_hat.grad.abs().max() > 0


def test_probs_are_a_copy_and_say_what_is_wrong_with_them():
    loss = SCRAPLLoss(shape=256, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
    loss.probs[:] = 0
    assert abs(float(loss.probs.sum()) - 1) < 1e-12
    with pytest.raises(TypeError, match="probs must be an array of .* numbers, got 'abc'"):
        loss.probs = "abc"
    wrong = loss.probs
    wrong[4] = math.nan
    with pytest.raises(ValueError, match="got nan for path 4"):
        loss.probs = wrong
