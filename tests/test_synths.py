"""The synthesizers against the official audio, NumPy closed forms and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.signal import lfilter

from scrapl_lib.synths import ChirpletSynth, GranularSynth, Parameter, SnareSynth, _check_theta, _mix64, _signed

REFERENCE = Path(__file__).parent / "reference" / "synths.npz"
SMALL = {"sample_rate_hz": 2048, "n_samples": 2048, "n_grains": 6, "grain_samples": 256, "hop": 16, "f0_max_hz": 512.0}


def closed_form(synth, theta, f0_hz, onset):
    """One item, float64, grain by grain, from the formulas of the paper (granular synthesizer)."""
    sr, n, n_grains = synth.sample_rate_hz, synth.grain_samples, synth.n_grains
    density, slope = theta[0], 2 * theta[1] - 1
    offset = 0.25 * density + 0.75 * density**2
    amplitude = [1 - 1 / (1 + np.exp(-2 * (1 - density) * n_grains * (i / n_grains - offset))) for i in range(n_grains)]
    gamma = np.tan(0.95 * slope * np.pi / 2) * sr / (12 * synth.hop) / 4
    t = (np.arange(n) - n / 2) / sr
    audio = np.zeros(synth.n_samples)
    for i in range(n_grains):
        phase = 2 * np.pi * np.cumsum(f0_hz[i] * 2 ** (gamma * t) / sr)
        grain = (
            np.sin(phase) * amplitude[i] / max(amplitude) * np.sin(np.pi * np.arange(n) / n) ** 2 / np.sqrt(f0_hz[i])
        )
        audio[onset[i] : onset[i] + n] += grain
    return audio / np.sqrt(np.sum(audio**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_official_audio(dtype):
    """Absolute 1e-5 of a peak of 0.03; the official float32 phase itself is off by up to 7.4e-6."""
    reference = np.load(REFERENCE)
    theta = torch.from_numpy(reference["granular_theta"]).to(dtype)
    draws = (torch.from_numpy(reference[f"granular_{name}"]) for name in ("f0_hz", "onset"))
    audio = GranularSynth().render(theta, *draws)
    assert audio.shape == (4, 1, 32768) and audio.dtype == dtype
    assert np.abs(audio[:, 0].numpy() - reference["granular_audio"]).max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6)],
)
def test_equals_closed_form(dtype, tolerance):
    """Also at the corners of the theta square; peak about 0.2."""
    synth = GranularSynth(**SMALL)
    theta = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [0.3, 0.8]], dtype=dtype)
    f0_hz, onset = synth.draw(torch.arange(6))
    audio = synth.render(theta, f0_hz, onset)[:, 0].double().numpy()
    for i in range(6):
        expected = closed_form(synth, theta[i].double().numpy(), f0_hz[i].numpy(), onset[i].numpy())
        assert np.abs(expected).max() > 0.05
        assert np.abs(audio[i] - expected).max() < tolerance


def test_audio_has_norm_one():
    audio = GranularSynth(**SMALL)(torch.rand(5, 2, generator=torch.Generator().manual_seed(0)), torch.arange(5))
    assert (torch.linalg.vector_norm(audio, dim=2) - 1).abs().max() < 1e-6


def test_density_adds_grains_and_slope_glides():
    """Energy spreads over more frames with density; the instantaneous frequency rises for s > 0, falls for s < 0."""
    synth = GranularSynth()
    sounding = [
        float((synth(torch.tensor([[d, 0.5]]), torch.tensor([3]))[0, 0].view(64, 512).square().sum(1) > 1e-4).sum())
        for d in (0.05, 0.5, 0.95)
    ]
    assert sounding[0] < sounding[1] < sounding[2]

    one = GranularSynth(n_grains=1)
    centroids = []
    for slope in (0.02, 0.98):
        grain = one.render(torch.tensor([[0.5, slope]]), torch.tensor([[700.0]]), torch.tensor([[1000]]))[
            0, 0, 1000:5096
        ]
        power = [torch.fft.rfft(half).abs().square() for half in (grain[:2048], grain[2048:])]
        centroids.append([float((p * torch.arange(len(p))).sum() / p.sum()) for p in power])
    assert centroids[0][0] > 1.3 * centroids[0][1]
    assert centroids[1][1] > 1.3 * centroids[1][0]


def test_twice_differentiable_in_both_parameters():
    """Finite differences in float64, first and second order."""
    synth = GranularSynth(**SMALL)
    f0_hz, onset = synth.draw(torch.arange(2))
    target = synth.render(torch.tensor([[0.7, 0.3], [0.2, 0.6]], dtype=torch.float64), f0_hz, onset)
    theta = torch.tensor([[0.4, 0.55], [0.5, 0.45]], dtype=torch.float64, requires_grad=True)

    def loss(theta):
        return ((synth.render(theta, f0_hz, onset) - target) ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    assert gradient.abs().min() > 1e-4
    assert torch.autograd.gradcheck(loss, theta, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(loss, theta, eps=1e-6, atol=1e-5)


def test_draw_depends_on_its_own_seed_only():
    """Draws bit for bit; audio to float32 rounding, 1e-6 of a peak of 0.2, as vectorized code rounds by batch size."""
    synth = GranularSynth(**SMALL)
    seeds = torch.tensor([7, 2**62 + 5, 0, 2**63 - 1])
    f0_hz, onset = synth.draw(seeds)
    for i, seed in enumerate(seeds):
        alone = synth.draw(seed[None])
        assert torch.equal(alone[0][0], f0_hz[i]) and torch.equal(alone[1][0], onset[i])
    assert len(set(map(tuple, onset.tolist()))) == 4

    theta = torch.full((4, 2), 0.4)
    audio = synth(theta, seeds)
    for i in range(4):
        assert (synth(theta[[i]], seeds[[i]])[0] - audio[i]).abs().max() < 1e-6


def test_random_bits_are_splitmix64():
    """The first outputs for seed 1234567, as published with the algorithm; and one whole draw in Python integers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    counter = 1234567 + torch.arange(1, 6) * _signed(golden)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(z) & mask for z in _mix64(counter)] == published

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    synth = GranularSynth(**SMALL)
    f0_hz, onset = synth.draw(torch.tensor([41]))
    start = mix(41 + golden)
    for i in range(synth.n_grains):
        u = [(mix((start + k * golden) & mask) >> 11) / 2**53 for k in (2 * i + 1, 2 * i + 2)]
        assert abs(f0_hz[0, i].item() - 256 * 2 ** u[0]) < 1e-9
        assert onset[0, i].item() == int(u[1] * (2048 - 256))


def test_draws_are_uniform_and_independent():
    """Seeds 0 ... 999: Kolmogorov-Smirnov and rank correlations, n = 64000, p > 0.01; and the ranges."""
    synth = GranularSynth()
    f0_hz, onset = synth.draw(torch.arange(1000))
    octave, place = (torch.log2(f0_hz) - 8) / 3, onset.double() / 28672
    assert octave.shape == (1000, 64)
    assert 0 <= octave.min() < 1e-3 and 1 - 1e-3 < octave.max() < 1
    assert onset.min() >= 0 and 28672 - 30 < onset.max() < 28672
    assert stats.kstest(octave.flatten().numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(place.flatten().numpy(), "uniform").pvalue > 0.01
    for a, b in ((octave, place), (octave[:, :-1], octave[:, 1:]), (place[:-1], place[1:])):
        assert stats.spearmanr(a.flatten().numpy(), b.flatten().numpy()).pvalue > 0.01


def test_parameter_curves():
    theta = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    linear, log2 = Parameter("slope", -1, 1, ""), Parameter("rate", 2.0, 8.0, "Hz", "log2")
    assert (linear.value(theta) - torch.tensor([-1.0, 0.0, 1.0])).abs().max() < 1e-12
    assert (log2.value(theta) - torch.tensor([2.0, 4.0, 8.0])).abs().max() < 1e-12
    assert [p.name for p in GranularSynth.parameters] == ["density", "slope"] and GranularSynth.n_params == 2


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (torch.rand(2, 3), r"shape \(batch, 2\)"),
        (torch.rand(2), r"shape \(batch, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "float32 or float64"),
        (torch.tensor([[0.5, -0.1], [0.5, 0.5]]), r"\[0, 1\], got values in \[-0.1"),
        (torch.tensor([[0.5, float("nan")], [0.5, 0.5]]), "theta must be finite, got 1 NaN"),
    ],
)
def test_bad_theta_is_refused(theta, message):
    with pytest.raises(ValueError, match=message):
        GranularSynth(**SMALL)(theta, torch.arange(2))


def test_bad_draws_are_refused():
    synth = GranularSynth(**SMALL)
    theta = torch.rand(2, 2)
    f0_hz, onset = synth.draw(torch.arange(2))
    with pytest.raises(ValueError, match="seeds must be int64"):
        synth.draw(torch.rand(2))
    with pytest.raises(ValueError, match=r"f0_hz must have shape \(batch, n_grains\) = \(2, 6\)"):
        synth.render(theta, f0_hz[:, :5], onset)
    with pytest.raises(ValueError, match=r"onset must be int64 in \[0, 1792\]"):
        synth.render(theta, f0_hz, onset + 1793)
    with pytest.raises(ValueError, match="grain_samples must be from 2 to n_samples - 1 = 999"):
        GranularSynth(n_samples=1000)
    with pytest.raises(ValueError, match="f0_min_hz <= f0_max_hz"):
        GranularSynth(f0_min_hz=4000.0)
    with pytest.raises(ValueError, match="must be positive"):
        GranularSynth(n_grains=0)


# ---- chirplet -------------------------------------------------------------------------------------------------------

RANGES = {
    "slow_slow": ((0.9899, 1.9799), (0.5, 1)),
    "slow_moderate": ((0.9899, 1.9799), (2, 4)),
    "fast_moderate": ((3.9598, 7.9196), (2, 4)),
    "fast_fast": ((3.9598, 7.9196), (8, 16)),
}
SMALL_CHIRPLET = {
    "am_hz": (8.0, 16.0),
    "fm_oct_per_s": (4.0, 8.0),
    "sample_rate_hz": 2048,
    "n_samples": 1024,
    "max_shift": 64,
    "f0_hz": 200.0,
    "bandwidth_oct": 1.5,
}


def chirplet_closed_form(am_hz, fm, theta, shift, sr, n, f0_hz, bandwidth):
    """One item, float64, from the formulas of the paper (chirplet synthesizer)."""
    am_hz, fm = (lo * (hi / lo) ** u for u, (lo, hi) in zip(theta, (am_hz, fm)))
    t = (np.arange(n) - n / 2) / sr
    phase = f0_hz / (fm * np.log(2)) * (2 ** (fm * t) - 1)
    window = np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (0.1 * bandwidth * sr / fm) ** 2))
    x = np.sin(2 * np.pi * phase) * window * fm * np.sin(2 * np.pi * am_hz / 2 * t)
    audio = np.zeros(n)
    audio[max(shift, 0) : n + min(shift, 0)] = x[max(-shift, 0) : n - max(shift, 0)]
    return audio


@pytest.mark.parametrize(
    ("task", "tolerance"),
    [("slow_slow", 6e-4), ("slow_moderate", 1.6e-4), ("fast_moderate", 1.6e-4), ("fast_fast", 4e-5)],
)
def test_chirplet_equals_the_official_audio(task, tolerance):
    """Every 7th sample, relative to the peak (0.36 to 2.8). What remains is the official code's float32 phase, of up to thousands
    of cycles and the more of them the slower the FM: the same formulas in float32 torch come to 2e-7 in most items."""
    reference = np.load(REFERENCE)
    theta, shift = (torch.from_numpy(reference[f"chirplet_{name}"]) for name in ("theta", "delta"))
    official = reference[f"chirplet_{task}_audio_every_7th"]
    audio = ChirpletSynth(*RANGES[task]).render(theta, shift)
    assert audio.shape == (4, 1, 32768) and audio.dtype == torch.float32
    peak = np.abs(official).max(axis=1)
    assert len(peak) == 4 and peak.min() > 0.3
    assert (np.abs(audio[:, 0, ::7].numpy() - official).max(axis=1) / peak).max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chirplet_equals_closed_form(dtype, tolerance):
    """At the corners of the theta square, and where a part is shifted over an end; the peak is about 7."""
    synth = ChirpletSynth(**SMALL_CHIRPLET)
    theta = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [0.3, 0.8]], dtype=dtype)
    shift = torch.tensor([0, 64, -64, 1, -1, 17])
    audio = synth.render(theta, shift)[:, 0].double().numpy()
    for i in range(6):
        expected = chirplet_closed_form((8, 16), (4, 8), theta[i].double().numpy(), int(shift[i]), 2048, 1024, 200, 1.5)
        assert np.abs(expected).max() > 0.5
        assert np.abs(audio[i] - expected).max() < tolerance
    assert not audio[1, :64].any() and not audio[2, -64:].any()


@pytest.mark.parametrize("window_gradient", [False, True])
def test_chirplet_is_twice_differentiable(window_gradient):
    """Against finite differences in float64; as run the window is that of the unchanged FM rate, which changes the gradient."""
    theta_0 = torch.tensor([[0.4, 0.55], [0.5, 0.45]], dtype=torch.float64)
    full, as_run = (ChirpletSynth(**SMALL_CHIRPLET, window_gradient=w) for w in (True, False))
    shift = torch.tensor([3, -20])
    target = full.render(torch.tensor([[0.7, 0.3], [0.2, 0.6]], dtype=torch.float64), shift)

    def windows(theta):
        t_s = (torch.arange(1024) - shift[:, None, None] - 511.5).double() / 2048
        fm = full.parameters[1].value(theta[:, 1:, None])
        return fm * torch.exp(-0.5 * (t_s / (0.15 / fm)) ** 2)

    def loss(theta, synth=full if window_gradient else as_run):
        return ((synth.render(theta, shift) - target) ** 2).sum()

    def by_hand(theta):  # as run: the window of theta_0 instead of theta's
        x = full.render(theta, shift)
        return (((x if window_gradient else x / windows(theta) * windows(theta_0)) - target) ** 2).sum()

    def derivatives(function):
        theta = theta_0.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(theta), theta, create_graph=True)
        return gradient.detach(), torch.stack(
            [torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient.flatten()]
        )

    def difference(function, u, step=1e-6):
        nudge = torch.zeros(4, dtype=torch.float64)
        nudge[u] = step
        return (function(theta_0 + nudge.view(2, 2)) - function(theta_0 - nudge.view(2, 2))) / (2 * step)

    gradient, hessian = derivatives(loss)
    numeric = torch.stack([difference(by_hand, u) for u in range(4)]).view(2, 2)
    assert gradient.abs().min() > 1 and (gradient - numeric).abs().max() < 1e-4 * gradient.abs().max()
    numeric = torch.stack([difference(lambda theta: derivatives_at(by_hand, theta), u, 1e-5) for u in range(4)])
    assert hessian.abs().amax((1, 2)).min() > 10 and (hessian - numeric).abs().max() < 1e-4 * hessian.abs().max()
    if window_gradient:
        other, _ = derivatives(lambda theta: loss(theta, as_run))
        assert (other - gradient)[:, 1].abs().min() > 1 and (other - gradient)[:, 0].abs().max() < 1e-9


def derivatives_at(function, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def test_chirplet_shifts_are_uniform_and_an_item_s_own():
    """Seeds 0 ... 9999: both ends are drawn, chi-square over 9 bins with p > 0.01."""
    synth = ChirpletSynth(*RANGES["slow_slow"], max_shift=4)
    (shift,) = synth.draw(torch.arange(10_000))
    counts = torch.bincount(shift + 4)
    assert len(counts) == 9 and stats.chisquare(counts.numpy()).pvalue > 0.01
    assert all(synth.draw(torch.tensor([seed]))[0] == shift[seed] for seed in (0, 7, 9999))
    theta, seeds = torch.full((3, 2), 0.4), torch.tensor([7, 2**62 + 5, 0])
    audio = ChirpletSynth(**SMALL_CHIRPLET)(theta, seeds)
    for i in range(3):
        assert (ChirpletSynth(**SMALL_CHIRPLET)(theta[[i]], seeds[[i]])[0] - audio[i]).abs().max() < 1e-6
    assert (audio[0] - audio[1]).abs().max() > 0.1


def test_chirplet_parameters_have_their_units():
    am, fm = ChirpletSynth(*RANGES["fast_moderate"]).parameters
    assert (am.name, am.unit, am.curve, fm.name, fm.unit, fm.curve) == ("am", "Hz", "log2", "fm", "octaves/s", "log2")
    middle = torch.tensor(0.5, dtype=torch.float64)
    assert abs(am.value(middle) - (3.9598 * 7.9196) ** 0.5) < 1e-12 and abs(fm.value(middle) - 8**0.5) < 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"am_hz": (2.0, 1.0)}, r"am_hz must be a range .* got \(2.0, 1.0\)"),
        ({"fm_oct_per_s": (0.0, 1.0)}, r"fm_oct_per_s must be a range .* got \(0.0, 1.0\)"),
        ({"f0_hz": 0.0}, "must be positive"),
        ({"max_shift": 1024}, "max_shift must be from 0 to n_samples - 1 = 1023, got 1024"),
    ],
)
def test_bad_chirplets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ChirpletSynth(**(SMALL_CHIRPLET | change))


@pytest.mark.parametrize(
    "shift", [torch.tensor([0, 65]), torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([[0], [1]])]
)
def test_bad_shifts_are_refused(shift):
    with pytest.raises(ValueError, match=r"shift must be int64 of shape \(batch,\) = \(2,\) and in \[-64, 64\]"):
        ChirpletSynth(**SMALL_CHIRPLET).render(torch.rand(2, 2), shift)
    with pytest.raises(ValueError, match="theta must lie in"):
        ChirpletSynth(**SMALL_CHIRPLET)(torch.full((2, 2), 1.5), torch.arange(2))


BATCH_OF_2 = (torch.full((2, 2), 0.5), torch.arange(2))


@pytest.mark.parametrize(
    "synth", [GranularSynth(**SMALL), ChirpletSynth(**SMALL_CHIRPLET)], ids=["granular", "chirplet"]
)
@pytest.mark.parametrize(
    "theta, seeds, error, message",
    [
        (
            BATCH_OF_2[0],
            [0, 1],
            TypeError,
            r"seeds must be an int64 tensor .* got list: write torch.as_tensor\(seeds\)",
        ),
        (BATCH_OF_2[0], np.arange(2), TypeError, "seeds must be an int64 tensor .* got ndarray"),
        (BATCH_OF_2[0], torch.arange(2).int(), ValueError, r"seeds must be int64 of shape \(batch,\), got torch.int32"),
        (
            BATCH_OF_2[0],
            torch.zeros(2, 1).long(),
            ValueError,
            r"seeds must be int64 of shape \(batch,\), got .* \(2, 1\)",
        ),
        (BATCH_OF_2[0], torch.arange(3), ValueError, "one seed per item.* got 3 seeds for a theta of 2 items"),
        (
            [[0.1, 0.2], [0.3, 0.4]],
            BATCH_OF_2[1],
            TypeError,
            r"theta must be a .* tensor .* got list: write torch.as_tensor\(theta",
        ),
        (
            torch.zeros(0, 2),
            torch.arange(0),
            ValueError,
            r"theta must .* shape \(batch, 2\) with a batch of at least 1, got .* \(0, 2\)",
        ),
        (torch.rand(2, 2).half(), BATCH_OF_2[1], ValueError, "theta must be float32 or float64 .* got torch.float16"),
        (torch.rand(2), BATCH_OF_2[1], ValueError, r"theta must be .* shape \(batch, 2\).* got .* \(2,\)"),
        (
            torch.tensor([[0.5, np.nan], [np.inf, 1]]),
            BATCH_OF_2[1],
            ValueError,
            "theta must be finite, got 2 NaN or infinite values",
        ),
        (
            torch.tensor([[0.5, 1.1], [0, 1]]),
            BATCH_OF_2[1],
            ValueError,
            r"theta must lie in \[0, 1\], got values in \[0, 1.1\]",
        ),
    ],
)
def test_bad_calls_are_refused(synth, theta, seeds, error, message):
    with pytest.raises(error, match=message):
        synth(theta, seeds)


@pytest.mark.parametrize(
    "synth", [GranularSynth(**SMALL), ChirpletSynth(**SMALL_CHIRPLET)], ids=["granular", "chirplet"]
)
def test_a_saturated_sigmoid_is_a_valid_theta(synth):
    """It rounds to exactly 0 and 1, never beyond."""
    theta = torch.sigmoid(torch.tensor([[-200.0, 200.0], [200.0, -200.0]]))
    assert theta.unique().tolist() == [0, 1] and synth(theta, torch.arange(2)).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "synth", [GranularSynth(**SMALL), ChirpletSynth(**SMALL_CHIRPLET)], ids=["granular", "chirplet"]
)
def test_on_cuda_theta_is_not_waited_for(synth):
    """Only shape and dtype are checked there: the host does not look at theta."""
    theta = torch.full((2, 2), float("nan"), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _check_theta(theta, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="shape"):
        synth(theta[:0], torch.arange(0))


# ---- TR-808 snare ---------------------------------------------------------------------------------------------------

SNARE_REFERENCE = Path(__file__).parent / "reference" / "snare.npz"
SMALL_SNARE = {"sample_rate_hz": 8000, "n_samples": 1024, "common_delay": 128, "max_shift": 64}
SNARE_MIN = np.array([20, -1, 20, -1, 10, 10, 10, 10, 20, 0.5, -60, -60, -60, -24])
SNARE_MAX = np.array([2000, 2, 2000, 2, 2000, 2000, 2000, 2000, np.nan, 10, 6, 6, 6, 24])


def high_pass_coefficients(cutoff_hz, q, sr):
    cos, alpha = np.cos(2 * np.pi * cutoff_hz / sr), np.sin(2 * np.pi * cutoff_hz / sr) / (2 * q)
    return [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2], [1 + alpha, -2 * cos, 1 - alpha]


def snare_closed_form(synth, theta, shift, dtype):
    """One item, float64, sample by sample, from the formulas of the paper; `dtype` rounds an envelope's factor, as run."""
    sr, n, attack = synth.sample_rate_hz, synth.n_samples, round(0.001 * synth.sample_rate_hz)
    p = SNARE_MIN + (np.where(np.isnan(SNARE_MAX), sr / 2, SNARE_MAX) - SNARE_MIN) * theta

    def envelope(decay_ms):
        level, factor = 1.0, float(dtype(1 - 6.91 / (decay_ms / 1000 * sr)))
        values = [i / (attack - 1) for i in range(attack)]
        for _ in range(n - attack):
            values.append(level)
            level *= factor
        return np.array(values)

    bend, phase, oscillators = envelope(p[4]), [0.0, 0.0], np.zeros(n)
    amplitudes = [10 ** (p[10 + k] / 20) * envelope(p[5 + k]) for k in range(2)]
    for i in range(n):
        for k in range(2):
            oscillators[i] += amplitudes[k][i] * np.sin(phase[k])
            phase[k] += 2 * np.pi * p[2 * k] / sr * (1 + p[2 * k + 1] * bend[i])
    noise = lfilter(*high_pass_coefficients(p[8], p[9], sr), synth.noise.numpy() * envelope(p[7]))
    dry = np.tanh(10 ** (p[13] / 20) * (oscillators + 10 ** (p[12] / 20) * np.clip(noise, -1, 1)))
    audio = np.zeros(n)
    audio[synth.common_delay + shift :] = dry[: n - synth.common_delay - shift]
    return audio, np.abs(noise).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 2e-3)])
def test_snare_equals_the_official_audio(dtype, tolerance):
    """Absolute, of peaks of 0.04 to 0.71. In float32 3.4e-5 was seen, the official float32 phase of thousands of radians; in
    float64 1.4e-3, what one rounding of an envelope's factor to float32 does to a phase."""
    reference = np.load(SNARE_REFERENCE)
    theta, shift = torch.from_numpy(reference["snare_theta"]).to(dtype), torch.from_numpy(reference["snare_delta"])
    assert shift.tolist() == [0, 2048, -2048, 500]
    audio = SnareSynth(noise=torch.from_numpy(reference["snare_noise"])).render(theta, shift)
    assert audio.shape == (4, 1, 44100) and audio.dtype == dtype
    assert np.abs(audio[:, 0].numpy() - reference["snare_audio"]).max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snare_equals_closed_form(dtype):
    """At random places, all-0 and all-1 corners, a cutoff of half the rate, noise that clips. Without audible noise, its gain at
    the floor of -60 dB, within 1e-6 (float32 rounds by 6e-8); with it 1e-5: the filter is exact to 1e-6, and gains times 32."""
    synth = SnareSynth(**SMALL_SNARE, noise=2 * torch.rand(1024, generator=torch.Generator().manual_seed(1)) - 1)
    theta = torch.rand(12, 14, dtype=dtype, generator=torch.Generator().manual_seed(0))
    theta[0], theta[1], theta[2, 8], theta[:6, 12] = 0, 1, 1, 0
    theta[3:6, 13] = 0.9
    theta[6:8, 8:10] = torch.tensor([0.2, 1.0], dtype=dtype)
    shift = torch.tensor([0, 64, -64, 1, -1, 17] * 2)
    audio = synth.render(theta, shift)[:, 0].double().numpy()
    clipped = 0
    for i in range(12):
        expected, loudest = snare_closed_form(
            synth,
            theta[i].double().numpy(),
            int(shift[i]),
            {torch.float32: np.float32, torch.float64: np.float64}[dtype],
        )
        clipped += loudest > 1
        assert np.abs(expected).max() > (1e-5 if i == 0 else 0.01)
        assert np.abs(audio[i] - expected).max() < (1e-6 if i < 6 else 1e-5)
    assert clipped >= 2


@pytest.mark.parametrize("cutoff_hz", [20, 40, 1000, 11025, 22000, 22050])
@pytest.mark.parametrize("q", [0.5, 10])
def test_snare_filter_equals_the_time_domain_one(cutoff_hz, q):
    """Over one second of noise to the end, absolute 1e-5, with ringing longer than a second (20 Hz, Q 10: 60 dB in 1.1 s)."""
    synth = SnareSynth()
    x, (cutoff, quality) = synth.noise, torch.tensor([[cutoff_hz], [q]], dtype=torch.float64).split(1)
    expected = lfilter(*high_pass_coefficients(cutoff_hz, q, 44100), x.numpy())
    assert np.abs(expected).max() > (0.05 if cutoff_hz < 22050 else -1)
    assert np.abs(synth._high_pass(x[None], cutoff, quality)[0].numpy() - expected).max() < 1e-5


def test_snare_is_twice_differentiable_in_all_parameters():
    """Finite differences in float64, first and second order; the noise is clipped at places, but no sample is near a kink."""
    noise = 1.5 * (2 * torch.rand(512, generator=torch.Generator().manual_seed(3)) - 1)
    synth = SnareSynth(**(SMALL_SNARE | {"n_samples": 512}), noise=noise)
    theta = 0.3 + 0.4 * torch.rand(2, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    theta[:, 10:13] = 0.8  # audible
    theta[:, 8] = torch.tensor([0.9, 0.2])
    value = [p.value(theta[:, [u]]) for u, p in enumerate(synth.parameters)]
    envelope = synth._envelopes(value[7], torch.float64)[:, 0]
    filtered = synth._high_pass(synth.noise * envelope, value[8], value[9]).abs()
    assert (filtered > 1).sum(1).min() >= 5 and (filtered - 1).abs().min() > 1e-4
    shift = torch.tensor([5, -20])
    target = synth.render(torch.full((2, 14), 0.6, dtype=torch.float64), shift)
    theta.requires_grad_()

    def loss(theta):
        return ((synth.render(theta, shift) - target) ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    assert gradient.abs().min() > 1e-3
    assert torch.autograd.gradcheck(loss, theta, eps=1e-6, atol=1e-4, rtol=1e-5)
    # the second derivatives reach 2e6, and differences over 1e-6 of gradients that large round to some 1e-3, on each CPU otherwise
    assert torch.autograd.gradgradcheck(loss, theta, eps=1e-6, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample_rate_hz", [4000, 8192, 44100])
def test_snare_has_finite_derivatives_at_the_ends(dtype, sample_rate_hz):
    synth = SnareSynth(sample_rate_hz, n_samples=4096)
    theta = torch.tensor([[0.0] * 14, [1.0] * 14, [0.0, 1.0] * 7, [1.0, 0.0] * 7], dtype=dtype, requires_grad=True)
    audio = synth(theta, torch.arange(4))
    assert (
        audio.dtype == dtype and audio.isfinite().all() and audio.abs().max() <= 1 and audio.abs().amax(2).min() > 1e-6
    )
    (gradient,) = torch.autograd.grad(audio.square().sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), theta)
    assert gradient.abs().amax(1).min() > 0 and gradient.isfinite().all() and second.isfinite().all()


def test_snare_starts_at_the_common_delay_plus_its_shift():
    """Exact zeros before; shifted audio is the same audio, bit for bit, less its end."""
    synth = SnareSynth(**SMALL_SNARE)
    theta = torch.full((3, 14), 0.6)
    audio = synth.render(theta, torch.tensor([0, 64, -64]))[:, 0]
    for row, start in zip(audio, (128, 192, 64)):
        assert not row[:start].any() and row[start].abs() < 1e-7 < row[start + 1].abs()  # an envelope begins with 0
        assert torch.equal(row[start:], audio[2, 64 : 64 + 1024 - start])
    micro = SnareSynth(**(SMALL_SNARE | {"max_shift": 0}))
    assert micro.draw(torch.arange(50))[0].unique().tolist() == [0]
    assert torch.equal(micro(theta[:1], torch.tensor([3]))[0, 0], audio[0])


def test_snare_draws_are_an_item_s_own():
    """Shifts are uniform (seeds 0 ... 9999, chi-square over 9 bins, p > 0.01), audio does not depend on the batch (1e-6)."""
    (shift,) = SnareSynth(max_shift=4).draw(torch.arange(10_000))
    counts = torch.bincount(shift + 4)
    assert len(counts) == 9 and stats.chisquare(counts.numpy()).pvalue > 0.01
    synth = SnareSynth(**SMALL_SNARE)
    theta = torch.rand(4, 14, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([7, 2**62 + 5, 0, 7])
    theta[3] = theta[0]
    audio = synth(theta, seeds)
    for i in range(4):
        assert synth.draw(seeds[[i]])[0] == synth.draw(seeds)[0][i]
        assert (SnareSynth(**SMALL_SNARE)(theta[[i]], seeds[[i]])[0] - audio[i]).abs().max() < 1e-6
    assert (audio[0] - audio[3]).abs().max() < 1e-6 and (audio[0] - audio[1]).abs().max() > 0.1


def test_snare_noise_is_fixed_and_uniform():
    """Kolmogorov-Smirnov, n = 44100, p > 0.01; a shorter buffer is the beginning of a longer one, and no global seed counts."""
    torch.manual_seed(1)
    noise = SnareSynth().noise
    torch.manual_seed(2)
    assert torch.equal(SnareSynth(**SMALL_SNARE).noise, noise[:1024]) and noise.dtype == torch.float64
    assert stats.kstest(noise.numpy() / 2 + 0.5, "uniform").pvalue > 0.01
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.01


def test_snare_parameters_are_the_paper_s():
    parameters = SnareSynth().parameters
    assert len(parameters) == SnareSynth.n_params == 14 and {p.curve for p in parameters} == {"linear"}
    assert [p.min for p in parameters] == SNARE_MIN.tolist()
    assert [p.max for p in parameters] == np.where(np.isnan(SNARE_MAX), 22050, SNARE_MAX).tolist()
    assert " ".join(p.name for p in parameters) == (
        "osc1_freq osc1_mod osc2_freq osc2_mod freq_decay osc1_decay osc2_decay noise_decay noise_cutoff noise_q "
        "osc1_gain osc2_gain noise_gain tanh_gain"
    )
    assert [p.unit for p in parameters] == [
        "Hz",
        "",
        "Hz",
        "",
        "ms",
        "ms",
        "ms",
        "ms",
        "Hz",
        "",
        "dB",
        "dB",
        "dB",
        "dB",
    ]
    assert SnareSynth(**SMALL_SNARE).parameters[8].max == 4000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample_rate_hz": 3999}, "sample_rate_hz must be at least 4000 and finite, got 3999"),
        ({"max_shift": 129}, "max_shift <= common_delay .* got max_shift 129, common_delay 128 and n_samples 1024"),
        ({"max_shift": -1}, "0 <= max_shift"),
        ({"common_delay": 1016}, r"common_delay < n_samples - 8 \(the attack\)"),
        (
            {"noise": torch.zeros(1023)},
            r"noise must be a float tensor of shape \(n_samples,\) = \(1024,\), got .* \(1023,\)",
        ),
        ({"noise": np.zeros(1024)}, "noise must be a float tensor .* got ndarray"),
        ({"noise": torch.zeros(1024).long()}, "noise must be a float tensor .* got torch.int64"),
        ({"noise": torch.full((1024,), torch.nan)}, "noise must be finite, got 1024 NaN"),
    ],
)
def test_bad_snares_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SnareSynth(**(SMALL_SNARE | change))


def test_bad_snare_calls_are_refused():
    synth, theta = SnareSynth(**SMALL_SNARE), torch.full((2, 14), 0.5)
    for shift in (torch.tensor([0, 65]), torch.tensor([0.0, 1.0]), torch.tensor([0])):
        with pytest.raises(ValueError, match=r"shift must be int64 of shape \(batch,\) = \(2,\) and in \[-64, 64\]"):
            synth.render(theta, shift)
    with pytest.raises(ValueError, match=r"theta must be .* \(batch, 14\)"):
        synth(theta[:, :13], torch.arange(2))
    with pytest.raises(ValueError, match=r"theta must lie in \[0, 1\]"):
        synth(theta + 1, torch.arange(2))
    with pytest.raises(ValueError, match="one seed per item.* got 3 seeds"):
        synth(theta, torch.arange(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_snare_on_cuda_is_that_of_the_cpu():
    """Float64, absolute 1e-9."""
    synth, seeds = SnareSynth(**SMALL_SNARE), torch.arange(3)
    theta = torch.rand(3, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    audio = synth(theta.cuda(), seeds)
    assert audio.device.type == "cuda" and (audio.cpu() - SnareSynth(**SMALL_SNARE)(theta, seeds)).abs().max() < 1e-9
