"""SCRAPLLoss and JTFSLoss: official values, derivatives, Proposition 3.1, draws, states, invariances, bad input."""

import functools
import math
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, noise, through_file
from scipy.stats import chi2
from torch import nn

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
BOTH = pytest.mark.parametrize("kind", [SCRAPLLoss, JTFSLoss])


@functools.cache
def reference(name):
    """The official values, and the two sounds they are of."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        official = dict(file)
    return official, *(torch.from_numpy(official[key])[:, None] for key in ("x_hat", "x"))


def relative_l2(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape and torch.linalg.vector_norm(expected) > 0
    return float((torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).detach())


def both_losses(**change):
    return [functools.partial(SCRAPLLoss(**TINY, **change), path_idx=8), JTFSLoss(**TINY, **change)]


# ---- official values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "evaluated"), [("small", 42), ("granular", 315), ("tr808", 69)])
def test_values_and_gradients_are_the_official_ones(name, evaluated):
    """Values within 1e-5; gradients within 1e-4 in L2: u / |u| amplifies rounding where coefficients are small."""
    loss, (official, x_hat, x) = SCRAPLLoss(**OFFICIAL[name]), reference(name)
    with torch.no_grad():
        found = np.array([float(loss(x_hat, x, int(i))) for i in official["path_idx"]])
        assert found.shape == (evaluated,) and np.abs(found / official["path_loss"] - 1).max() < 1e-5
        assert ("jtfs_distance" in official) == (name != "tr808")
        if name != "tr808":
            assert abs(float(JTFSLoss(**OFFICIAL[name])(x_hat, x)) / float(official["jtfs_distance"]) - 1) < 1e-5
    indices = [int(key[5:]) for key in official if key.startswith("grad_")]
    assert len(indices) >= 2
    for index in indices:
        y = x_hat.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(y, x, index), y)
        assert relative_l2(grad[:, 0], official[f"grad_{index}"]) < 1e-4


@pytest.mark.parametrize("log1p", [False, True])
def test_the_full_loss_is_the_mean_of_norms(log1p):
    """Over items and channels, without padding; not squared. (Single paths: official values, Proposition 3.1.)"""
    x_hat, x, full = noise(3, 1, 512, seed=1), noise(3, 1, 512, seed=2), JTFSLoss(**TINY, log1p=log1p)
    S_hat, S = (torch.log(1 + S / 1e-3) if log1p else S for S in (full.jtfs(x_hat), full.jtfs(x)))
    per_item = (S_hat - S).square().sum((2, 3)).sqrt().mean(1)
    assert relative_l2(full.per_item(x_hat, x), per_item) < 1e-12
    assert abs(float(full(x_hat, x) / per_item.mean()) - 1) < 1e-12


def synthesize(theta):
    """A small differentiable synth: (batch, 3) -> an amplitude- and frequency-modulated tone (batch, 1, 512)."""
    t = torch.arange(512, dtype=theta.dtype) / 512
    slope, tremolo, depth = theta.sigmoid().split(1, dim=1)
    phase = 2 * math.pi * (60 * t + 40 * (slope - 0.5) * t**2)
    envelope = torch.sin(math.pi * t) ** 2 * (1 + depth * torch.cos(2 * math.pi * (4 + 12 * tremolo) * t))
    return (envelope * torch.sin(phase))[:, None]


@pytest.mark.parametrize("log1p", [False, True])
def test_proposition_3_1(log1p):
    """The expected gradient of one path with respect to encoder weights is that of the full loss, to 1e-9 in float64.

    The full loss takes another route: all paths of one n2 at once, the first order shared.
    """
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    features, x, loss = noise(4, 8, seed=3), synthesize(noise(4, 3, seed=4)), SCRAPLLoss(**TINY, log1p=log1p)
    weights = noise(loss.n_paths, seed=5).abs()
    loss.probs = weights / weights.sum()

    def weight_gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(encoder.parameters()))])

    gradients = [weight_gradient(loss(synthesize(encoder(features)), x, path)) for path in range(loss.n_paths)]
    jtfs, full = loss.jtfs, 0.0
    bands_hat, bands = (jtfs.first_order_and_bands(audio)[1] for audio in (synthesize(encoder(features)), x))
    for n2 in bands:
        paths = jtfs.paths_of(n2)
        for path, *S in zip(paths, *(jtfs.coefficients(b[n2], paths) for b in (bands_hat, bands))):
            S_hat, S = (torch.log1p(s / 1e-3) for s in S) if log1p else S
            full = full + loss.probs[path.index] * (S_hat - S).flatten(1).norm(dim=1).mean()
    assert relative_l2(loss.probs @ torch.stack(gradients), weight_gradient(full)) < 1e-9
    spread = torch.stack([g / g.norm() for g in gradients]).mean(0).norm()
    assert spread < 0.95  # the paths' gradients do differ


@BOTH
def test_coefficients_of_the_reference_that_are_known_are_taken_as_they_are(kind):
    """Value and gradient are the same; those of another sound count; those of another shape or dtype are refused."""
    loss, given = kind(**TINY), {"path_idx": 5} if kind is SCRAPLLoss else {}
    transform = functools.partial(loss.jtfs.path, index=5) if kind is SCRAPLLoss else loss.jtfs
    x_hat, x, other = noise(3, 2, 1, 512, seed=3)
    S = transform(x)
    (found, grad), (expected, grad_0) = (
        (value, torch.autograd.grad(value, y)[0])
        for y in [x_hat.requires_grad_()]
        for value in (loss(y, other, **given, S=S), loss(y, x, **given))
    )
    assert expected > 0 and found == expected and torch.equal(grad, grad_0) and loss(x_hat, other, **given) != expected
    with pytest.raises(ValueError, match=r"S must be \w+.*\(x.*\), of shape \(2, .* here, got \(1, "):
        loss(x_hat, x, **given, S=S[:1])
    with pytest.raises(TypeError, match=r"S must be \w+.* torch.float64 here, got torch.bfloat16: compute it anew"):
        loss(x_hat, x, **given, S=S.bfloat16())
    if given:
        with pytest.raises(ValueError, match="got path_idx None: give both"):
            loss(x_hat, x, S=S)


@BOTH
@pytest.mark.parametrize("limit", [2**22, 0], ids=["matrix", "fft"])
def test_the_precision_of_a_callers_products_changes_nothing(kind, limit, monkeypatch):
    """Under autocast, and settings as of torch.set_float32_matmul_precision("medium"), which are the caller's again
    afterwards: distances of close sounds would come out up to five times too large."""
    monkeypatch.setattr(jtfs_module, "MATRIX_LIMIT", limit)
    loss, x = kind(**TINY), noise(2, 1, 512, dtype=torch.float32)
    x_hat = (x + 1e-3 * noise(2, 1, 512, seed=1)).float().requires_grad_()
    backends = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    for given in [{"path_idx": path} for path in range(21)] if kind is SCRAPLLoss else [{}]:
        expected = loss(x_hat, x, **given)
        (gradient,) = torch.autograd.grad(expected, x_hat)
        try:
            for backend in backends:
                backend.fp32_precision = "bf16"
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert (x_hat[0] @ x_hat[0].mT).dtype == torch.bfloat16
                found = loss(x_hat, x, **given)
            assert found == expected > 0 and torch.equal(torch.autograd.grad(found, x_hat)[0], gradient)
            assert found.dtype == torch.float32 and all(backend.fp32_precision == "bf16" for backend in backends)
        finally:
            for backend in backends:
                backend.fp32_precision = "none"


@pytest.mark.parametrize("limit", [2**22, 0], ids=["matrix", "fft"])
@pytest.mark.parametrize("log1p", [False, True])
def test_first_and_second_derivatives(log1p, limit, monkeypatch):
    """Of three paths and the full loss against finite differences, in three synth parameters: within 1e-4 and 1e-3."""
    monkeypatch.setattr(jtfs_module, "MATRIX_LIMIT", limit)
    x, theta, path = synthesize(noise(1, 3, seed=6)), noise(1, 3, seed=7), SCRAPLLoss(**TINY, log1p=log1p)
    losses = [functools.partial(path, path_idx=index) for index in (0, 4, 20)]
    for loss in [*losses, JTFSLoss(**TINY, log1p=log1p)]:

        def value(theta, loss=loss):
            return loss(synthesize(theta), x)

        (grad,) = torch.autograd.grad(value(theta.requires_grad_()), theta)
        scale = float(grad.abs().max())
        assert scale > 1e-4
        assert torch.autograd.gradcheck(value, theta, rtol=1e-4, atol=1e-5 * scale)
        assert torch.autograd.gradgradcheck(value, theta, rtol=1e-3, atol=1e-4 * scale)


DRAWS = [{"draw": "rate"}, {"draw": [[0, 9, 20], [20], [9, 3]], "log1p": True}]


@pytest.mark.parametrize("options", [{}, {"log1p": True}, {"T": "global", "F": "global"}, {"T": 1}, *DRAWS], ids=str)
def test_derivatives_are_those_of_autograd(options):
    """Gradient and Hessian of every draw's distance in two parameters of a sound with a silent end, against two
    backward passes through `forward`: 1e-10 of the largest entry in float64."""
    loss, jets, x = SCRAPLLoss(**TINY | {"shape": 256} | options), Jets(2), noise(3, 1, 256)
    moving = noise(3, jets.K, 256, seed=1)
    moving[:, :, 180:] = 0
    found = {path: derivatives for path, *derivatives in loss.derivatives(moving, x, jets, range(loss.n_paths))}
    assert sorted(found) == list(range(loss.n_paths)) and loss.n_paths >= (3 if "draw" in options else 7)
    for path, gradient, hessian in _derivatives_backwards(loss, moving, x, jets, range(loss.n_paths)):
        for ours, expected in zip(found[path], (gradient, hessian), strict=True):
            assert ours.shape == expected.shape and expected.abs().max() > 0
            assert (ours - expected).abs().max() < 1e-10 * expected.abs().max()


def test_memory_of_the_full_loss():
    """Granular configuration, batch 4, in a process of its own: below 1 GiB (640 MiB measured, a third of it torch)."""
    code = (
        "import torch; from scrapl_lib import JTFSLoss; from replication.records import peak_memory_mb; "
        "x, x_hat = torch.randn(2, 4, 1, 32768, generator=torch.Generator().manual_seed(0)); "
        "JTFSLoss(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2)(x_hat.requires_grad_(), x).backward(); "
        "print(peak_memory_mb())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 100 < float(done.stdout) < 1024


# ---- draws -----------------------------------------------------------------------------------------------------------


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
    """A path that is given draws none."""
    x_hat, x = noise(2, 1, 1, 512, seed=12)
    loss, twin = SCRAPLLoss(**TINY, seed=3), SCRAPLLoss(**TINY, seed=3)
    assert loss.path_idx is None
    for _ in range(5):
        value = loss(x_hat, x)
        assert loss.path_idx == twin.draw() and float(value) == float(twin(x_hat, x, path_idx=loss.path_idx))
    loss(x_hat, x, path_idx=np.int64(7))
    assert loss.path_idx == 7 and draws(loss, 10) == draws(twin, 10)


def test_a_seed_fixes_the_draws_and_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draws(SCRAPLLoss(**TINY, seed=1), 50)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert draws(SCRAPLLoss(**TINY, seed=np.int64(1)), 50) == first
    assert draws(SCRAPLLoss(**TINY, seed=2), 50) != first and draws(SCRAPLLoss(**TINY, seed=2**64 - 1), 50) != first


SEED = r"^seed must be an integer from 0 to 2\^64 - 1, got"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(({"seed": seed}, TypeError, SEED) for seed in ("a", True, 3.0, None)),
        *(({"seed": seed}, ValueError, f"{SEED} {seed}") for seed in (2**64, np.int64(-1))),
        ({"log1p": "no"}, TypeError, "log1p must be True or False, got 'no'"),
        ({"unbiased": "no"}, TypeError, "unbiased must be True or False, got 'no'"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SCRAPLLoss(**TINY, **options)


def test_a_state_or_a_pickle_resumes_the_draws():
    """Also from a checkpoint that is mapped to a device, and one of a version that kept generators as tensors."""
    loss, (x_hat, x) = SCRAPLLoss(**TINY, seed=1, unbiased=True), noise(2, 1, 1, 512)
    loss.probs = uneven(21)
    loss(x_hat, x)
    earlier = {"generator": loss.generator.get_state(), "path_idx": loss.path_idx, "probs": loss.probs}
    resumed, tensors = (SCRAPLLoss(**TINY, seed=77, unbiased=True) for _ in range(2))
    resumed.load_state_dict(through_file(loss.state_dict(), map_location="meta"))
    tensors.set_extra_state(through_file(earlier))
    others = resumed, tensors, pickle.loads(pickle.dumps(loss))
    last, weight, later = loss.path_idx, loss.weight, draws(loss, 50)
    for other in others:
        assert (other.path_idx, other.weight) == (last, weight) and torch.equal(other.probs, loss.probs)
        assert draws(other, 50) == later


@pytest.mark.parametrize(
    ("change", "own", "message"),
    [
        ({"T": 16}, {}, r"of a loss with T = 16 \(here 32\): load it"),
        ({"F": "global"}, {}, r"F = global \(here 4\)"),
        ({"log1p": True, "shape": 500}, {}, r"shape = 500 \(here 512\), log1p = True \(here False\)"),
        ({"J": 6}, {}, r"J = 6 \(here 5\)"),
        ({"unbiased": True}, {}, "unbiased = True .here False"),
        ({"draw": "rate"}, {}, r"draws = \[\[0.*here path"),
        ({"draw": "rate"}, {"draw": [[0], [1], [2]]}, "draws = "),
    ],
)
def test_the_state_of_another_transform_is_refused_and_changes_nothing(change, own, message):
    loss, other = SCRAPLLoss(**TINY | own), SCRAPLLoss(**TINY | change, seed=5)
    other.draw()
    other.probs, before = uneven(other.n_paths), loss.get_extra_state()
    with pytest.raises(ValueError, match=message):
        loss.load_state_dict(other.state_dict())
    assert loss.get_extra_state() == before
    for broken in ({"path_idx": 21}, {"generator": b"too short"}, {"probs": [1.0]}):
        with pytest.raises((ValueError, IndexError)):
            loss.set_extra_state(SCRAPLLoss(**TINY | own, seed=9).get_extra_state() | broken)
    with pytest.raises(ValueError, match=r"expected what get_extra_state\(\) of a SCRAPLLoss returned, got {}"):
        loss.set_extra_state({})
    assert loss.get_extra_state() == before
    SCRAPLLoss(**TINY | {"T": np.int64(32), "F": 4} | own).load_state_dict(loss.state_dict())  # what None stands for


def test_a_reference_that_asks_for_its_gradient_gets_it():
    """That of exchanged sounds, to 1e-12."""
    x_hat, x = (noise(2, 1, 512, seed=seed).requires_grad_() for seed in (16, 17))
    for loss in [*both_losses(), *both_losses(log1p=True)]:
        (found,), (expected,) = (torch.autograd.grad(loss(*pair), x) for pair in ((x_hat, x), (x, x_hat)))
        assert relative_l2(found, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silence_and_equal_sounds_have_finite_derivatives(dtype):
    """First and second, also in an item where both are silent: theta-IS differentiates whole batches twice."""
    x = noise(2, 1, 512, seed=19, dtype=dtype)
    x[1] = 0
    for loss in [*both_losses(), *both_losses(log1p=True)]:
        x_hat, equal = torch.zeros_like(x).requires_grad_(), x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x_hat, x), x_hat, create_graph=True)
        (second,) = torch.autograd.grad((grad * noise(*x.shape, seed=26, dtype=dtype)).sum(), x_hat)
        assert torch.isfinite(grad).all() and torch.isfinite(second).all()
        value = loss(equal, x)
        assert value.item() == 0 and torch.autograd.grad(value, equal)[0].abs().max() == 0


def test_an_item_of_distance_zero_leaves_the_others_their_curvature():
    """The Hessian-vector product of two items, the second equal to its reference, is half that of the first alone."""
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


GOOD = torch.zeros(2, 1, 512)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (GOOD[:, 0], ValueError, r"mono, got \(2, 512\): reshape"),
        (GOOD.expand(2, 2, 512), ValueError, r"got \(2, 2, 512\).*x.mean\(1, keepdim=True\)"),
        (GOOD[:0], ValueError, r"got \(0, 1, 512\)"),
        (GOOD[..., :0], ValueError, r"got \(2, 1, 0\)"),
        (GOOD[..., :511], ValueError, "512 samples, got 511: pad or crop it"),
        (GOOD.bfloat16(), TypeError, "float32 or float64 tensor, got torch.bfloat16"),
        (GOOD.long(), TypeError, "got torch.int64: convert it"),
        (GOOD.numpy(), TypeError, "got ndarray"),
        (GOOD.clone().index_fill_(2, torch.tensor(5), torch.inf), ValueError, "finite, got 2 NaN or infinite"),
    ],
)
def test_wrong_audio_says_what_is_wrong(x, error, said):
    """As a reconstruction, as a reference and for the transform; and draws nothing. (Pairs: test_transforms.py.)"""
    drawing = SCRAPLLoss(**TINY)
    for loss in [*both_losses(), drawing]:
        for name, pair in (("x_hat", (x, GOOD)), ("x", (GOOD, x))):
            with pytest.raises(error, match=f"^{name} must .*{said}"):
                loss(*pair)
    for transform in (drawing.jtfs, lambda x: drawing.jtfs.path(x, 0)):
        with pytest.raises(error, match=f"^x must .*{said}"):
            transform(x)
    assert drawing.path_idx is None and drawing.draw() == SCRAPLLoss(**TINY).draw()


def test_wrong_paths_say_what_is_wrong():
    loss = SCRAPLLoss(**TINY)
    for index, error, said in (
        (21, IndexError, "path_idx = 21 is out of range: this .* has (paths|draws) 0 .. 20"),
        (-1, IndexError, "path_idx = -1 is out of range"),
        (2.0, TypeError, "path_idx must be an integer, got 2.0"),
    ):
        for call in (lambda path: loss(GOOD, GOOD, path_idx=path), lambda path: loss.jtfs.path(GOOD, path)):
            with pytest.raises(error, match=said):
                call(index)
    assert loss.path_idx is None


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.full((20,), 1 / 20), r"one entry per draw, shape \(21,\), got \(20,\)"),
        (torch.full((21, 1), 1 / 21), r"got \(21, 1\)"),
        (1.0, r"got \(\)"),
        (torch.full((21,), 1 / 20), "must sum to 1 within 1e-6, got 1.0500000.*: divide them"),
        (np.zeros(21), "must sum to 1 within 1e-6, got 0"),
        ([-0.5, 1.5] + [0] * 19, "finite and not negative"),
        ([0.05] * 4 + [math.nan] + [0.05] * 16, "finite and not negative, got nan for path 4"),
        ([math.inf] + [0] * 20, "finite and not negative"),
    ],
)
def test_wrong_probabilities_say_what_is_wrong(probs, message):
    loss = SCRAPLLoss(**TINY)
    with pytest.raises(ValueError, match=message):
        loss.probs = probs
    assert (loss.probs - 1 / 21).abs().max() < 1e-15


def test_probabilities_of_any_kind_of_array_and_a_copy_to_read():
    loss = SCRAPLLoss(**TINY)
    weights = torch.arange(1, 22) / 231
    for probs in (weights.clone().requires_grad_(), weights.numpy(), weights.tolist()):
        loss.probs = probs
        assert loss.probs.dtype == torch.float64 and not loss.probs.requires_grad
        assert abs(float(loss.probs.sum()) - 1) < 1e-15 and abs(float(loss.probs[20]) - 21 / 231) < 1e-7
    loss.probs[:] = 0
    assert abs(float(loss.probs.sum()) - 1) < 1e-12
    with pytest.raises(TypeError, match="probs must be an array of 21 numbers, got 'abc'"):
        loss.probs = "abc"
