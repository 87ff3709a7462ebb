"""The transform against official values, against its definition as a loop, and by its own properties."""

import contextlib
import copy
import functools
import io
import math
import pathlib
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from scrapl_lib import JTFS, _fast
from scrapl_lib import jtfs as jtfs_module
from scrapl_lib.checks import check_audio, check_name, check_seed
from scrapl_lib.jets import Jets
from scrapl_lib.reference import path_by_definition

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = ROOT / "tests/reference"
OFFICIAL = {  # configuration, number of paths; values computed with scrapl-loss 0.1.0
    "small": (dict(shape=4096, J=8, Q1=4, Q2=1, J_fr=2, Q_fr=1), 42),
    "granular": (dict(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2), 315),
    "tr808": (dict(shape=44100, J=12, Q1=8, Q2=2, J_fr=5, Q_fr=2, T=2048, F=1), 483),
}


@functools.cache
def reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(found, expected):
    """Largest absolute difference, in units of the largest expected value."""
    found, expected = (np.asarray(torch.as_tensor(a).detach()) for a in (found, expected))
    assert found.shape == expected.shape and expected.size and np.abs(expected).max() > 0
    return np.abs(found - expected).max() / np.abs(expected).max()


# ---- official values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_path_table_is_the_official_one(name):
    config, n_paths = OFFICIAL[name]
    jtfs, official = JTFS(**config), reference(name)
    assert jtfs.n_paths == len(jtfs.paths) == len(official["keys"]) == n_paths
    assert [(p.n2, p.n_fr) for p in jtfs.paths] == [tuple(key) for key in official["keys"]]
    assert [p.index for p in jtfs.paths] == list(range(n_paths))
    rate, scale = official["rate_cycles_per_sample"], official["scale_cycles_per_filter"]
    assert np.abs(np.array([p.rate for p in jtfs.paths]) - rate).max() <= 1e-12
    assert np.abs(np.array([p.scale for p in jtfs.paths]) - np.abs(scale) * config["Q1"]).max() <= 1e-12
    assert [p.spin for p in jtfs.paths] == list(np.sign(scale))


@pytest.mark.parametrize("name", OFFICIAL)
def test_coefficients_are_the_official_ones(name):
    """In float32, to 1e-5 of the peak: two orders above what two float32 implementations differ by."""
    jtfs, official = JTFS(**OFFICIAL[name][0]), reference(name)
    x = torch.from_numpy(official["x_hat"])[:, None]
    indices = [int(key[5:]) for key in official if key.startswith("coef_")]
    assert len(indices) >= 2
    for index in indices:
        assert relative_error(jtfs.path(x, index), official[f"coef_{index}"]) < 1e-5


@pytest.mark.parametrize("name", ["small", "granular"])
def test_shape_of_the_full_transform_is_the_official_one(name):
    jtfs, official = JTFS(**OFFICIAL[name][0]), reference(name)
    with torch.no_grad():
        S = jtfs(torch.from_numpy(official["x"])[:, None])
    batch, channels, *rest = official["jtfs_shape"]
    assert channels == 1 and tuple(S.shape) == (batch, *rest)
    assert S.shape[1] == jtfs.first_order_paths + jtfs.n_paths


# ---- the definition -------------------------------------------------------------------------------------------------

TINY = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
TINY_CONFIGS = {
    "plain": TINY,
    "T < 2^J": dict(TINY, T=8),
    "T = 1": dict(TINY, shape=100, T=1),
    "T no power of two": dict(TINY, T=23),
    "T > 2^J, no power of two": dict(TINY, T=100),
    "T global": dict(TINY, T="global"),
    "F = 1": dict(TINY, F=1),
    "F no power of two": dict(TINY, F=3),
    "F > 2^J_fr": dict(TINY, F=9),
    "F global": dict(TINY, F="global"),
    "both global": dict(TINY, T="global", F="global"),
    "odd shape": dict(TINY, shape=397, T=20, F=1),
    "several per octave": dict(TINY, shape=300, J=6, Q1=5, Q2=2, J_fr=3, Q_fr=2, T=33, F=2),
}


@pytest.mark.parametrize("case", TINY_CONFIGS)
def test_every_path_is_the_one_of_the_definition(case):
    """Largest difference of any path to 1e-9 of its peak, in float64 (found: 2e-11).

    What makes it more than rounding: rows of the log-frequency axis below 1e-10 of the peak are left out, and what lies
    beyond the new Nyquist frequency is dropped where the definition folds it back.
    """
    config = TINY_CONFIGS[case]
    jtfs, x = JTFS(**config), noise(1, 1, config["shape"], seed=1)
    by_definition = functools.partial(path_by_definition, x[0, 0].numpy(), **dict(list(config.items())[1:]))
    first = jtfs.first_order_and_bands(x)[0]
    assert len(first) == jtfs.first_order_paths and jtfs.n_paths >= 7
    for n_fr, found in enumerate(first):
        assert relative_error(found[0], by_definition(None, n_fr)) < 1e-9
    for path in jtfs.paths:
        assert relative_error(jtfs.path(x, path.index)[0], by_definition(path.n2, path.n_fr)) < 1e-9


@pytest.mark.parametrize("case", TINY_CONFIGS)
def test_a_single_path_is_its_slice_of_the_full_transform(case):
    """To 1e-12 in float64: the same numbers, summed in another order."""
    config = TINY_CONFIGS[case]
    jtfs, x = JTFS(**config), noise(2, 1, config["shape"], seed=2)
    S = jtfs(x)
    assert S.shape[:2] == (2, jtfs.first_order_paths + jtfs.n_paths)
    for path in jtfs.paths:
        single = jtfs.unpad(jtfs.path(x, path.index))
        assert relative_error(single, S[:, jtfs.first_order_paths + path.index]) < 1e-12


def test_unpad_keeps_the_frames_of_the_signal():
    """4096 samples, T 256: 16 frames of 32; an impulse lights the frame of its own time."""
    jtfs = JTFS(4096, 8, 4, 1, 2, 1)
    times = [512, 2048, 3584]
    x = torch.zeros(len(times), 1, 4096, dtype=torch.float64)
    x[torch.arange(len(times)), 0, torch.tensor(times)] = 1
    padded = jtfs.path(x, 1)
    kept = jtfs.unpad(padded)
    assert padded.shape[-1] == 32 and kept.shape[-1] == 16
    peaks = kept.sum(1).argmax(-1) * 256
    assert (peaks - torch.tensor(times)).abs().max() <= 128


# ---- two ways to compute, one number --------------------------------------------------------------------------------


@pytest.fixture
def both_ways(monkeypatch):
    """Coefficients and gradient of one transform before and after `change(monkeypatch)`, compared to 1e-12 (gradient
    1e-10)."""

    def compare(change, T=200):
        jtfs, x = JTFS(**dict(TINY, T=T)), noise(2, 1, 512, seed=5).requires_grad_()
        results = []
        for setting in (lambda _: None, change):
            setting(monkeypatch)
            S = jtfs(x)
            results += [S, *torch.autograd.grad((S * noise(*S.shape, seed=6)).sum(), x)]
        assert relative_error(results[2], results[0]) < 1e-12 and relative_error(results[3], results[1]) < 1e-10

    return compare


@pytest.mark.parametrize("T", [None, 8, 23, "global"])
def test_matrix_and_fft_averages_agree(both_ways, T):
    both_ways(lambda patch: patch.setattr(jtfs_module, "MATRIX_LIMIT", 0), T)


def test_the_backward_pass_is_the_plain_formula(both_ways):
    def plain(patch):
        patch.setattr(jtfs_module, "averaged_modulus", lambda Y, psi, phi: (psi @ Y).abs() @ phi)
        patch.setattr(jtfs_module, "modulus", torch.abs)

    both_ways(plain)


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize(("threads", "on_gpu"), [(1, False), (2, False), (3, False), (1, True)])
def test_neither_chunks_nor_lanes_nor_threads_matter(both_ways, chunk, threads, on_gpu):
    """A lane for each thread (a power of two); one for each item, all at once, as on a GPU; pieces of 64 samples, or
    one."""
    before = torch.get_num_threads()

    def change(patch):
        for name in ("CHUNK", "DEVICE_CHUNK"):
            patch.setattr(_fast, name, chunk)
        patch.setattr(_fast, "_items_apart", lambda Y: not on_gpu)
        torch.set_num_threads(threads)
        Y = torch.zeros(2, 5, 512, dtype=torch.complex128)
        lanes = _fast._Lanes(Y, Y[0, :, :5], Y[0, 0, :, None].real)
        assert (lanes.n, lanes.at_once) == ((1, 2) if on_gpu else (min(threads, 2), min(threads, 2)))
        assert len(lanes.times) == (512 // lanes.n // 64 if chunk == 1 else 1)

    try:
        both_ways(change)
    finally:
        torch.set_num_threads(before)


def test_modulus_has_the_closed_forms_gradient_and_none_at_zero():
    """g z / |z| with and without a graph, 0 at 0 and where |z| underflows; the second derivative is at most about g
    there."""
    z = torch.tensor([3 + 4j, -1e-3j, 0, 1e-25 + 1e-25j, -2], dtype=torch.complex64, requires_grad=True)
    g = torch.tensor([2.0, -1, 1e8, 1, 0.5])
    expected = torch.tensor([1.2 + 1.6j, 1j, 0, 0, -0.5], dtype=torch.complex64)
    for create_graph in (False, True):
        r = _fast.modulus(z)
        (grad,) = torch.autograd.grad(r, z, g, create_graph=create_graph)
        assert (r.detach() - torch.tensor([5, 1e-3, 0, 0, 2])).abs().max() < 1e-6
        assert (grad.detach() - expected).abs().max() < 1e-5 and grad[2] == 0
    (second,) = torch.autograd.grad(torch.view_as_real(grad).sum(), z)
    assert second.abs().max() < 2 * g.max() and second[0] != 0


@pytest.mark.parametrize(("T", "limit"), [(None, 2**22), (None, 0), ("global", 2**22)], ids=["matrix", "fft", "global"])
def test_finite_differences(T, limit, monkeypatch):
    """First and second derivatives of whole coefficients with respect to every sample, in float64."""
    monkeypatch.setattr(jtfs_module, "MATRIX_LIMIT", limit)
    jtfs, x = JTFS(32, 3, 1, 1, 1, 1, T=T), noise(1, 1, 32, seed=9).requires_grad_()
    index = jtfs.n_paths - 1
    assert torch.autograd.gradcheck(lambda x: jtfs.path(x, index), x, rtol=1e-4, atol=1e-8)
    assert torch.autograd.gradgradcheck(lambda x: jtfs.path(x, index), x, fast_mode=True)


# ---- a user's surroundings ------------------------------------------------------------------------------------------


def everything(T=None, x=None):
    """Coefficients and gradients of whatever is public, in float32; the transform is built anew."""
    jtfs, jets = JTFS(**dict(TINY, T=T)), Jets(2)
    x = noise(2, 1, 512, dtype=torch.float32) if x is None else x
    found = []
    for y in (jtfs(x.requires_grad_()), jtfs.path(x, 3), *jtfs.first_order_and_bands(x)[0]):
        found += [y, *torch.autograd.grad(y.square().sum(), x, retain_graph=True)]
    (_, S), *_ = jtfs.path_jets(torch.cat([x.detach()] * jets.K, dim=1), jets, [3, 7])
    return [*found, S, *jets.distance(S)]


@contextlib.contextmanager
def changed(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("T", [None, 8, 500, "global"])
@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: changed(torch.set_default_device, "meta", "cpu"),
        lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
        lambda: changed(torch.use_deterministic_algorithms, True, False),
        lambda: np.errstate(all="raise"),
        warnings_as_errors,
    ],
    ids=["autocast", "with meta", "default meta", "float64", "deterministic", "numpy errors", "warnings"],
)
def test_surroundings_do_not_move_a_bit(surroundings, T):
    """Values and gradients, forward and backward, under the setting; T = 500 of 512 samples makes kymatio warn."""
    expected, x = everything(T), noise(2, 1, 512, dtype=torch.float32)
    with surroundings():
        found = everything(T, x)
    assert len(found) > 8 and all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected))


def test_filters_made_in_inference_mode_serve_training_and_copies_make_their_own():
    expected = everything()[:4]
    with torch.inference_mode():
        jtfs = JTFS(**TINY)
        S = jtfs(noise(2, 1, 512, dtype=torch.float32)), jtfs.path(noise(2, 1, 512, dtype=torch.float32), 3)
    file = io.BytesIO()
    torch.save(jtfs, file)
    file.seek(0)
    for copied in (jtfs, copy.deepcopy(jtfs), pickle.loads(pickle.dumps(jtfs)), torch.load(file, weights_only=False)):
        x = noise(2, 1, 512, dtype=torch.float32).requires_grad_()
        for i, y in enumerate((copied(x), copied.path(x, 3))):
            assert torch.equal(y, S[i]) and torch.equal(y, expected[2 * i])
            assert torch.equal(*torch.autograd.grad(y.square().sum(), x), expected[2 * i + 1])
    assert len(file.getvalue()) < 100_000  # no filters


def test_a_fresh_process_that_takes_warnings_for_errors():
    """Import and a step of both losses; T is so close to shape that kymatio would warn."""
    code = """
import torch
from scrapl_lib import JTFSLoss, SCRAPLLoss
for Loss in (JTFSLoss, SCRAPLLoss):
    loss = Loss(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1, T=500)
    loss(torch.randn(2, 1, 512, requires_grad=True), torch.randn(2, 1, 512)).backward()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


# ---- scale, precision, batch ----------------------------------------------------------------------------------------


def test_items_and_precisions_agree():
    jtfs, x = JTFS(**TINY), noise(3, 1, 512, seed=10)
    S = jtfs(x)
    assert S.dtype == torch.float64
    assert relative_error(torch.cat([jtfs(item[None]) for item in x]), S) < 1e-12
    single = jtfs(x.float())
    assert single.dtype == torch.float32 and relative_error(single.double(), S) < 1e-5


def test_homogeneous():
    """S(a x) = a S(x) for a > 0, and silence gives zeros with zero gradient."""
    jtfs, x = JTFS(**TINY), noise(1, 1, 512, seed=11)
    assert relative_error(jtfs(1e-3 * x), 1e-3 * jtfs(x)) < 1e-12
    silence = torch.zeros(1, 1, 512, requires_grad=True)
    S = jtfs(silence)
    (grad,) = torch.autograd.grad(S.sum(), silence)
    assert S.abs().max() == 0 and grad.abs().max() == 0


# ---- properties -----------------------------------------------------------------------------------------------------


def chirp(n, octaves, centre=0.09):
    """Rising exponential chirp of that many octaves around `centre` (cycles per sample), in a Hann window: (1, 1,
    n)."""
    rate = octaves / n
    phase = 2 * np.pi * centre / (rate * np.log(2)) * 2 ** (rate * (np.arange(n) - n / 2))
    return torch.from_numpy(np.sin(phase) * np.hanning(n)).reshape(1, 1, n)


def test_time_reversal_swaps_the_spins():
    """A rising chirp has its energy at spin +1, played backwards at -1, path by path (to 1e-3 of the largest energy:
    the frames start at the other end of a stride)."""
    jtfs = JTFS(4096, 8, 8, 1, 3, 1)
    x = chirp(4096, 4)
    up, down = (jtfs(y)[0, jtfs.first_order_paths :].square().sum((1, 2)) for y in (x, x.flip(-1)))
    spin = torch.tensor([p.spin for p in jtfs.paths])
    assert up[spin == 1].sum() > 30 * up[spin == -1].sum()
    assert down[spin == -1].sum() > 30 * down[spin == 1].sum()
    of = {(p.n2, p.scale, p.spin): p.index for p in jtfs.paths}
    mirrored = torch.tensor([of[p.n2, p.scale, -p.spin] for p in jtfs.paths])
    assert (mirrored != torch.arange(jtfs.n_paths)).sum() > 10
    assert (up - down[mirrored]).abs().max() < 1e-3 * up.max()


def test_rate_of_a_path_is_where_it_responds_most():
    """A tone whose amplitude is modulated at each of 41 rates within 20 % of a path's: the peak is within 1 % of it."""
    jtfs = JTFS(8192, 8, 1, 1, 1, 1)
    low_pass = [p for p in jtfs.paths if p.spin == 0 and 1 / 128 < p.rate < 0.06]
    assert len(low_pass) >= 2
    t = torch.arange(8192, dtype=torch.float64)
    for path in low_pass:
        rates = path.rate * torch.linspace(0.8, 1.2, 41, dtype=torch.float64)[:, None]
        x = (1 + 0.5 * torch.cos(2 * math.pi * rates * t)) * torch.cos(2 * math.pi * 0.35 * t)
        S = jtfs.unpad(jtfs.path(x[:, None], path.index))[:, 0, 8:-8].mean(-1)  # around n1 = 0; the ends left out
        assert abs(parabolic_peak(rates[:, 0], S) / path.rate - 1) < 0.01


def parabolic_peak(at, values):
    """Where the parabola through the largest value and its neighbours peaks, on an even grid `at`."""
    i = int(values.argmax())
    assert 0 < i < len(values) - 1
    a, b, c = (float(values[i + k]) for k in (-1, 0, 1))
    return float(at[i]) + float(at[1] - at[0]) * 0.5 * (a - c) / (a - 2 * b + c)


@pytest.fixture(scope="module")
def scale_responses():
    """Configuration with 256 log-frequency bins, {(n2, n_fr): response to exp(2 pi i k n1 / 256) for every k}."""
    jtfs = JTFS(2048, 9, 24, 1, 4, 1, F=2)
    assert jtfs.N_fr == 256
    n = torch.arange(256, dtype=torch.float64)
    ripples = torch.polar(torch.ones(256, 256, dtype=torch.float64), 2 * math.pi * n[:, None] * n / 256)
    n2 = jtfs.paths[-1].n2
    paths = jtfs.paths_of(n2)
    width = jtfs.first_order_and_bands(torch.zeros(1, 1, 2048, dtype=torch.float64))[1][n2].shape[-1]
    bands = ripples[:, :, None].expand(256, 256, width)  # constant in time: phi_T leaves it as it is
    responses = jtfs.coefficients(bands, paths)
    return jtfs, {path.n_fr: S.mean((1, 2)) for path, S in zip(paths, responses)}, paths


def test_scale_and_spin_of_a_path_are_where_it_responds_most(scale_responses):
    jtfs, responses, paths = scale_responses
    bands = [p for p in paths if p.spin]
    assert len(bands) >= 8
    for path in bands:
        xi = path.spin * path.scale / jtfs.Q1
        k = torch.arange(256, dtype=torch.float64)
        frequency = torch.where(k < 128, k, k - 256) / 256
        order = frequency.argsort()
        peak = parabolic_peak(frequency[order], responses[path.n_fr][order].log())
        assert abs(peak - xi) < max(0.01 * abs(xi), 0.1 / 256)  # 1 %, or a tenth of a bin where bins are coarser


def test_wavelets_have_zero_mean_and_the_low_pass_has_mean_one(scale_responses):
    _, responses, paths = scale_responses
    for path in paths:
        at_zero, peak = responses[path.n_fr][0], responses[path.n_fr].max()
        if path.spin:
            assert at_zero < 1e-10 * peak  # the rows that _scale_filter leaves out are below 1e-10 of the peak
        else:
            assert abs(at_zero - 1) < 1e-9 and responses[path.n_fr].argmax() == 0


def test_spins_are_mirrored(scale_responses):
    """To 1e-4 of the peak: kymatio samples a wavelet's spectrum on [-1, 2), which cuts the tails of -xi at 4.6
    sigma."""
    _, responses, paths = scale_responses
    half = sum(p.spin > 0 for p in paths)
    for n_fr in range(1, half + 1):
        up, down = responses[n_fr], responses[n_fr + half]
        assert (up - down.flip(0).roll(1)).abs().max() < 1e-4 * up.max()
        assert (up - down).abs().max() > 0.5 * up.max()


def test_wavelets_along_time_have_zero_mean():
    """A constant sound has no energy in any path: reflection keeps it constant."""
    jtfs = JTFS(**TINY)
    S = jtfs(torch.ones(1, 1, 512, dtype=torch.float64))
    assert S.abs().max() < 1e-12


# ---- illegal configurations (and, at random, test_properties.py) ----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(shape=0), ValueError, "shape must be at least 1, got 0"),
        (dict(J=10), ValueError, r"J = 10 needs signals of at least 2\^10 samples, shape is 512; lower J"),
        (dict(J=True), TypeError, "J must be an integer, got True"),
        (dict(J_fr=20), ValueError, r"J_fr = 20 spans 2\^J_fr log-frequency bins, there are 11 wavelets; lower J_fr"),
        (dict(T=513), ValueError, "T = 513 is longer than the signal of 512 samples; lower T or use T='global'"),
        (dict(T=0), ValueError, r"T must be at least 1 \(or None, or 'global'\), got 0"),
        (dict(T="all"), TypeError, r"T must be an integer \(or None, or 'global'\), got 'all'"),
        (dict(F=13), ValueError, "F = 13 is longer than 12 log-frequency bins; lower F or use F='global'"),
        (dict(F=0), ValueError, r"F must be at least 1 \(or None, or 'global'\), got 0"),
        (dict(J=1), ValueError, "J = 1, Q1 = 2, Q2 = 1 leave no second-order path; raise J"),
        (
            dict(J=6, Q1=3, J_fr=4, F=1),
            ValueError,
            "17 first-order wavelets do not fit 16 bins; raise F or lower J_fr",
        ),
    ],
)
def test_wrong_configurations_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        JTFS(**{**TINY, **change})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 512), ValueError, "got \\(2, 512\\): reshape"),
        (torch.zeros(1, 2, 512), ValueError, "got \\(1, 2, 512\\).*x.mean\\(1, keepdim=True\\)"),
        (torch.zeros(0, 1, 512), ValueError, "got \\(0, 1, 512\\)"),
        (torch.zeros(1, 1, 0), ValueError, "got \\(1, 1, 0\\)"),
        (torch.zeros(1, 1, 511), ValueError, "x must have 512 samples, got 511: pad or crop it"),
        (torch.zeros(1, 1, 512, dtype=torch.float16), TypeError, "float32 or float64 tensor, got torch.float16"),
        (torch.zeros(1, 1, 512, dtype=torch.int64), TypeError, "got torch.int64: convert it"),
        (np.zeros((1, 1, 512)), TypeError, "got ndarray: convert it with torch.as_tensor"),
        (torch.full((1, 1, 512), torch.nan), ValueError, "x must be finite, got 512 NaN or infinite values"),
    ],
)
def test_wrong_audio_says_what_is_wrong(x, error, message):
    jtfs = JTFS(**TINY)
    for call in (jtfs, lambda x: jtfs.path(x, 0), lambda x: check_audio(x, "x", 512)):
        with pytest.raises(error, match=message):
            call(x)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (21, IndexError, "path_idx = 21 is out of range: this transform has paths 0 .. 20"),
        (-1, IndexError, "path_idx = -1 is out of range"),
        (1.0, TypeError, "path_idx must be an integer, got 1.0"),
        (True, TypeError, "path_idx must be an integer, got True"),
    ],
)
def test_wrong_paths_say_what_is_wrong(index, error, message):
    jtfs = JTFS(**TINY)
    assert jtfs.n_paths == 21
    with pytest.raises(error, match=message):
        jtfs.path(torch.zeros(1, 1, 512), index)
    assert jtfs.path(torch.ones(1, 1, 512), np.int64(20)).shape[0] == 1


@pytest.mark.parametrize(
    ("seed", "error"),
    [(True, TypeError), (1.0, TypeError), (None, TypeError), (-1, ValueError), (2**64, ValueError)],
)
def test_seeds_are_integers_of_64_bits(seed, error):
    for good in (0, 2**64 - 1, np.int64(3), np.uint64(2**64 - 1)):
        assert type(check_seed(good)) is int and check_seed(good) == int(good)
    with pytest.raises(error, match=r"^seed must be .*from 0 to 2\^64 - 1, got .*: "):
        check_seed(seed)


def test_an_unknown_name_is_answered_with_the_nearest_one():
    assert check_name("task", "granular", ["granular"]) == "granular"
    with pytest.raises(
        ValueError, match="^unknown task 'granulr': did you mean 'granular'. valid are chirplet, granular$"
    ):
        check_name("task", "granulr", ["chirplet", "granular"])
