"""The synthesizers against official audio, NumPy closed forms and finite differences; their draws and checks."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_surroundings import odd_surroundings
from scipy import stats
from scipy.signal import lfilter

from scrapl_lib.synths import ChirpletSynth, GranularSynth, Parameter, SnareSynth

REFERENCE = Path(__file__).parent / "reference"
RANGES = {  # of AM and FM, and how close to the official audio
    "slow_slow": ((0.9899, 1.9799), (0.5, 1), 6e-4),
    "slow_moderate": ((0.9899, 1.9799), (2, 4), 1.6e-4),
    "fast_moderate": ((3.9598, 7.9196), (2, 4), 1.6e-4),
    "fast_fast": ((3.9598, 7.9196), (8, 16), 4e-5),
}
GRANULAR = dict(sample_rate_hz=2048, n_samples=2048, n_grains=6, grain_samples=256, hop=16, f0_max_hz=512.0)
CHIRPLET = dict(am_hz=(8.0, 16.0), fm_oct_per_s=(4.0, 8.0), sample_rate_hz=2048, n_samples=1024, max_shift=64)
CHIRPLET |= {"f0_hz": 200.0, "bandwidth_oct": 1.5}
SNARE = {"sample_rate_hz": 8000, "n_samples": 1024, "common_delay": 128, "max_shift": 64}
SMALL = [GranularSynth(**GRANULAR), ChirpletSynth(**CHIRPLET), SnareSynth(**SNARE)]
each_synth = pytest.mark.parametrize("synth", SMALL, ids=lambda synth: type(synth).__name__)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
CORNERS = [[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [0.3, 0.8]]


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["granular", "snare", *RANGES])
def test_equals_the_official_audio(name):
    """Maximum difference, of the chirplets (every 7th sample) relative to the peak. What remains is a float32 phase of
    thousands of cycles; of the snare in float64 what rounding an envelope's factor to float32 does to a phase.

    Seen: granular 7.4e-6 of a peak of 0.03, snare 3.4e-5 and 1.4e-3 of peaks from 0.04 to 0.71.
    """
    stored = np.load(REFERENCE / ("snare.npz" if name == "snare" else "synths.npz"))
    if name in RANGES:
        *ranges, tolerance = RANGES[name]
        synth, kind, every, tolerances = ChirpletSynth(*ranges), "chirplet", 7, (tolerance, tolerance)
        official = stored[f"chirplet_{name}_audio_every_7th"]
    else:
        noise = torch.from_numpy(stored["snare_noise"]) if name == "snare" else None
        synth = SnareSynth(noise=noise) if name == "snare" else GranularSynth()
        kind, every, tolerances = name, 1, (1e-4, 2e-3) if name == "snare" else (1e-5, 1e-5)
        official = stored[f"{name}_audio"]
    theta, *draws = (torch.from_numpy(stored[f"{kind}_{k.replace('shift', 'delta')}"]) for k in ("theta", *synth.drawn))
    peak = np.abs(official).max(axis=1)
    assert len(peak) == 4 and peak.min() > 0.02
    for dtype, tolerance in zip((torch.float32, torch.float64), tolerances):
        audio = synth.render(theta.to(dtype), *draws)
        assert audio.shape == (4, 1, synth.n_samples) and audio.dtype == dtype
        error = np.abs(audio[:, 0, ::every].numpy() - official).max(axis=1)
        assert (error / (peak if name in RANGES else 1)).max() < tolerance


# ---- granular and chirplet ------------------------------------------------------------------------------------------


def granular_closed_form(synth, theta, f0_hz, onset):
    """One item, float64, grain by grain, from the formulas of the paper."""
    sr, n, n_grains = synth.sample_rate_hz, synth.grain_samples, synth.n_grains
    density, slope = theta[0], 2 * theta[1] - 1
    offset = 0.25 * density + 0.75 * density**2
    amplitude = [1 - 1 / (1 + np.exp(-2 * (1 - density) * n_grains * (i / n_grains - offset))) for i in range(n_grains)]
    gamma = np.tan(0.95 * slope * np.pi / 2) * sr / (12 * synth.hop) / 4
    t = (np.arange(n) - n / 2) / sr
    audio = np.zeros(synth.n_samples)
    for i in range(n_grains):
        phase = 2 * np.pi * np.cumsum(f0_hz[i] * 2 ** (gamma * t) / sr)
        window = np.sin(np.pi * np.arange(n) / n) ** 2
        audio[onset[i] : onset[i] + n] += np.sin(phase) * amplitude[i] / max(amplitude) * window / np.sqrt(f0_hz[i])
    return audio / np.sqrt(np.sum(audio**2))


def chirplet_closed_form(synth, theta, shift):
    """One item, float64, from the formulas of the paper."""
    sr, n, f0_hz = synth.sample_rate_hz, synth.n_samples, synth.f0_hz
    am_hz, fm = (lo * (hi / lo) ** u for u, (lo, hi) in zip(theta, (synth.am_hz, synth.fm_oct_per_s)))
    t = (np.arange(n) - n / 2) / sr
    phase = f0_hz / (fm * np.log(2)) * (2 ** (fm * t) - 1)
    window = np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (0.1 * synth.bandwidth_oct * sr / fm) ** 2))
    x = np.sin(2 * np.pi * phase) * window * fm * np.sin(2 * np.pi * am_hz / 2 * t)
    audio = np.zeros(n)
    audio[max(shift, 0) : n + min(shift, 0)] = x[max(-shift, 0) : n - max(shift, 0)]
    return audio


GRAINS, SHIFTS = SMALL[0].draw(torch.arange(6)), [torch.tensor([0, 64, -64, 1, -1, 17])]


@pytest.mark.parametrize(
    ("synth", "closed_form", "draws", "tolerances"),
    [
        (SMALL[0], granular_closed_form, GRAINS, {torch.float64: 1e-12, torch.float32: 2e-6}),  # peaks of 0.2
        (SMALL[1], chirplet_closed_form, SHIFTS, {torch.float64: 1e-10, torch.float32: 1e-5}),  # of 7
    ],
    ids=["granular", "chirplet"],
)
def test_equals_closed_form(synth, closed_form, draws, tolerances):
    """At the corners of the theta square, too, and where a part of a chirplet is shifted over an end."""
    for dtype, tolerance in tolerances.items():
        theta = torch.tensor(CORNERS, dtype=dtype)
        audio = synth.render(theta, *draws)[:, 0].double().numpy()
        for i in range(6):
            expected = closed_form(synth, theta[i].double().numpy(), *(draw[i].numpy() for draw in draws))
            assert np.abs(expected).max() > 0.05 and np.abs(audio[i] - expected).max() < tolerance


def test_chirplets_window_is_a_constant_to_gradients_as_run():
    """Two derivatives are those of the audio with the window that moves with the FM rate divided out."""
    full, as_run = (ChirpletSynth(**CHIRPLET, window_gradient=w) for w in (True, False))
    theta_0, shift = torch.tensor([[0.4, 0.55], [0.5, 0.45]], dtype=torch.float64), torch.tensor([3, -20])
    target = full.render(torch.tensor([[0.7, 0.3], [0.2, 0.6]], dtype=torch.float64), shift)
    t_s = (torch.arange(1024) - shift[:, None, None] - 511.5).double() / 2048

    def window(theta):
        fm = full.parameters[1].value(theta[:, 1:, None])
        return fm * torch.exp(-0.5 * (t_s / (0.15 / fm)) ** 2)

    sounds = [
        lambda theta: as_run.render(theta, shift),
        lambda theta: full.render(theta, shift) / window(theta) * window(theta_0),
        lambda theta: full.render(theta, shift),
    ]
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        found, expected, other = (derivative(lambda t, s=s: ((s(t) - target) ** 2).sum(), theta_0) for s in sounds)
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
        assert (found - other).abs().max() > 0.05 * expected.abs().max()


# ---- TR-808 snare ---------------------------------------------------------------------------------------------------

SNARE_MIN = np.array([20, -1, 20, -1, 10, 10, 10, 10, 20, 0.5, -60, -60, -60, -24])
SNARE_MAX = np.array([2000, 2, 2000, 2, 2000, 2000, 2000, 2000, np.nan, 10, 6, 6, 6, 24])


def high_pass_coefficients(cutoff_hz, q, sr):
    cos, alpha = np.cos(2 * np.pi * cutoff_hz / sr), np.sin(2 * np.pi * cutoff_hz / sr) / (2 * q)
    return [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2], [1 + alpha, -2 * cos, 1 - alpha]


def snare_closed_form(synth, theta, shift, dtype):
    """One item, float64, sample by sample, from the paper's formulas; `dtype` rounds an envelope's factor, as run."""
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


@each_dtype
def test_snare_equals_closed_form(dtype):
    """At random places, all-0 and all-1 corners, a cutoff of half the rate, noise that clips. Without audible noise, at
    its floor of -60 dB, within 1e-6 (float32 rounds by 6e-8); with it 1e-5: the filter is exact to 1e-6, gains x 32."""
    synth = SnareSynth(**SNARE, noise=2 * rand(1024, seed=1) - 1)
    theta, exact = rand(12, 14, dtype=dtype), {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    theta[0], theta[1], theta[2, 8], theta[:6, 12] = 0, 1, 1, 0
    theta[3:6, 13] = 0.9
    theta[6:8, 8:10] = torch.tensor([0.2, 1.0], dtype=dtype)
    shift, clipped = torch.tensor([0, 64, -64, 1, -1, 17] * 2), 0
    audio = synth.render(theta, shift)[:, 0].double().numpy()
    for i in range(12):
        expected, loudest = snare_closed_form(synth, theta[i].double().numpy(), int(shift[i]), exact)
        clipped += loudest > 1
        assert np.abs(expected).max() > (1e-5 if i == 0 else 0.01) and not audio[i, : 128 + shift[i]].any()
        assert np.abs(audio[i] - expected).max() < (1e-6 if i < 6 else 1e-5)
    assert clipped >= 2


def test_snare_filter_equals_the_time_domain_one():
    """Over one second of noise to the end, absolute 1e-5, also where it rings longer (20 Hz, Q 10: 60 dB in 1.1 s)."""
    synth = SnareSynth()
    for cutoff_hz, q in itertools.product((20, 40, 1000, 11025, 22000, 22050), (0.5, 10)):
        expected = lfilter(*high_pass_coefficients(cutoff_hz, q, 44100), synth.noise.numpy())
        assert np.abs(expected).max() > (0.05 if cutoff_hz < 22050 else -1)
        cutoff, quality = torch.tensor([[[cutoff_hz]], [[q]]], dtype=torch.float64)
        assert np.abs(synth._high_pass(synth.noise[None], cutoff, quality)[0].numpy() - expected).max() < 1e-5


@each_dtype
@pytest.mark.parametrize("sample_rate_hz", [4000, 44100])
def test_snare_has_finite_derivatives_at_the_ends(dtype, sample_rate_hz):
    synth = SnareSynth(sample_rate_hz, n_samples=4096)
    theta = torch.tensor([[0.0] * 14, [1.0] * 14, [0.0, 1.0] * 7, [1.0, 0.0] * 7], dtype=dtype, requires_grad=True)
    audio = synth(theta, torch.arange(4))
    assert audio.dtype == dtype and audio.isfinite().all()
    assert audio.abs().max() <= 1 and audio.abs().amax(2).min() > 1e-6
    (gradient,) = torch.autograd.grad(audio.square().sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), theta)
    assert gradient.abs().amax(1).min() > 0 and gradient.isfinite().all() and second.isfinite().all()


# ---- derivatives, parameters, draws, surroundings -------------------------------------------------------------------


def test_all_are_twice_differentiable_in_all_parameters():
    """Finite differences in float64. The snare's noise clips at places (seed 3: no sample is near a kink); its second
    derivatives reach 2e6, and differences over 1e-6 of gradients that large round to some 1e-3."""
    snare = SnareSynth(**(SNARE | {"n_samples": 512}), noise=1.5 * (2 * rand(512, seed=3) - 1))
    drum = 0.3 + 0.4 * rand(2, 14, dtype=torch.float64, seed=3)
    drum[:, 10:13] = 0.8  # audible
    drum[:, 8] = torch.tensor([0.9, 0.2])
    pair = torch.tensor([[0.4, 0.55], [0.5, 0.45]], dtype=torch.float64)
    chirplet = ChirpletSynth(**CHIRPLET, window_gradient=True)
    for synth, theta, atol in ((SMALL[0], pair, 1e-6), (chirplet, pair, 1e-4), (snare, drum, 1e-4)):
        draws = synth.draw(torch.arange(2))
        target = synth.render(torch.full_like(theta, 0.6), *draws)

        def loss(theta, synth=synth, draws=draws, target=target):
            return ((synth.render(theta, *draws) - target) ** 2).sum()

        assert torch.autograd.functional.jacobian(loss, theta).abs().min() > 1e-4
        theta.requires_grad_()
        assert torch.autograd.gradcheck(loss, theta, eps=1e-6, atol=atol, rtol=1e-5)
        assert torch.autograd.gradgradcheck(loss, theta, eps=1e-6, atol=100 * atol, rtol=1e-4)


def test_parameters_convert_both_ways():
    assert all(synth.n_params == len(synth.parameters) for synth in SMALL)
    theta = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    linear, octaves = Parameter("s", -1, 1, ""), Parameter("r", 2.0, 8.0, "Hz", "log2")
    alone = [Parameter("one", 3.0, 3.0, "", curve) for curve in ("linear", "log2")]
    for parameter, values in ((linear, [-1, 0, 1]), (octaves, [2, 4, 8]), *((one, [3, 3, 3]) for one in alone)):
        assert (parameter.value(theta) - torch.tensor(values)).abs().max() < 1e-12
        back = parameter.theta(parameter.value(theta))
        assert (back - theta * (parameter.min < parameter.max)).abs().max() < 1e-12


@each_synth
def test_an_item_depends_on_its_own_seed_and_theta_only(synth):
    """Draws bit for bit; audio to float32 rounding, 1e-6, as vectorized code rounds by batch size."""
    seeds = torch.tensor([7, 2**62 + 5, 0, 2**63 - 1, 7])
    theta = rand(5, synth.n_params)
    theta[4] = theta[0]
    draws, audio = synth.draw(seeds), synth(theta, seeds)
    for i in range(5):
        alone = synth.draw(seeds[[i]])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, draws, strict=True))
        assert (synth(theta[[i]], seeds[[i]])[0] - audio[i]).abs().max() < 1e-6
    assert len({tuple(map(str, item)) for item in zip(*draws)}) == 4
    assert (audio[0] - audio[4]).abs().max() < 1e-6 and (audio[0] - audio[1]).abs().max() > 0.1


def test_random_bits_are_splitmix64():
    """The first outputs for seed 1234567, as published with the algorithm; and one whole draw in Python integers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + i * golden) & mask) for i in (1, 2, 3)] == published
    f0_hz, onset = SMALL[0].draw(torch.tensor([41]))
    u = [(mix((mix(41 + golden) + k * golden) & mask) >> 11) / 2**53 for k in range(1, 13)]
    assert np.abs(f0_hz[0].numpy() - 256 * 2 ** np.array(u[::2])).max() < 1e-9
    assert onset[0].tolist() == [int(each * (2048 - 256)) for each in u[1::2]]


def test_draws_are_uniform_and_independent():
    """Grains: Kolmogorov-Smirnov and rank correlations, n = 64000; shifts: chi-square, n = 10000; p > 0.01."""
    f0_hz, onset = GranularSynth().draw(torch.arange(1000))
    octave, place = (torch.log2(f0_hz) - 8) / 3, onset.double() / 28672
    for u in (octave, place):
        assert u.shape == (1000, 64) and 0 <= u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
        assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01
    for a, b in ((octave, place), (octave[:, :-1], octave[:, 1:]), (place[:-1], place[1:])):
        assert stats.spearmanr(a.flatten().numpy(), b.flatten().numpy()).pvalue > 0.01
    for synth in (ChirpletSynth(*RANGES["slow_slow"][:2], max_shift=4), SnareSynth(max_shift=4)):
        counts = torch.bincount(synth.draw(torch.arange(10_000))[0] + 4)
        assert len(counts) == 9 and stats.chisquare(counts.numpy()).pvalue > 0.01


@each_synth
def test_surroundings_change_no_bit(synth):
    theta, seeds = torch.sigmoid(torch.linspace(-200, 200, 2 * synth.n_params)).view(2, -1), torch.arange(2)
    expected = synth(theta, seeds)
    assert theta.min() == 0 and theta.max() == 1 and expected.isfinite().all()  # of a saturated sigmoid, too
    with odd_surroundings(torch.bfloat16):
        again = dict(zip(map(type, SMALL), (GRANULAR, CHIRPLET, SNARE)))[type(synth)]
        assert torch.equal(type(synth)(**again)(theta, seeds), expected)


@pytest.mark.cuda
@each_synth
def test_cuda_gives_the_cpu_s_audio_and_is_not_waited_for(synth):
    """Float64, absolute 1e-9; the host neither looks at theta nor waits for a copy."""
    theta, seeds = rand(3, synth.n_params, dtype=torch.float64), torch.arange(3)
    on_device = theta.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        audio = synth(on_device, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert audio.device.type == "cuda" and (audio.cpu() - synth(theta, seeds)).abs().max() < 1e-9


# ---- refusals -------------------------------------------------------------------------------------------------------

THETA, SEEDS = torch.full((2, 2), 0.5), torch.arange(2)
F0_HZ, ONSET = SMALL[0].draw(SEEDS)


def refused(words, make, *args, **kwargs):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(*args, **kwargs)
    assert re.search(words, f"{caught.type.__name__}: {caught.value}"), caught.value


BAD_CALLS = [
    (THETA, [0, 1], r"TypeError: seeds must be int64, .* got list: write torch.as_tensor\(seeds, dtype"),
    (THETA, SEEDS.float(), r"ValueError: seeds must be int64, of shape \(batch,\), got torch.float32"),
    (THETA, SEEDS - 1, r"ValueError: seeds must lie in \[0, 9223372036854775807\], got values in \[-1, 0\]"),
    (THETA, torch.arange(3), "ValueError: one seed per item.* got 3 seeds for a theta of 2 items"),
    (torch.rand(2, 3), SEEDS, r"ValueError: theta .* shape \(batch, 2\), got .* \(2, 3\)"),
    (THETA[0], SEEDS, r"ValueError: theta must be .* shape \(batch, 2\), got .* \(2,\)"),
    (THETA.half(), SEEDS, "ValueError: theta must be float32 or float64, .* got torch.float16"),
    (THETA * np.nan, SEEDS, r"ValueError: theta must lie in \[0, 1\], got values in \[nan, nan\]"),
    (THETA + 0.6, SEEDS, r"ValueError: theta must lie in \[0, 1\], got values in \[1.1, 1.1\]: Parameter.theta"),
]
BAD_DRAWS = [
    ((F0_HZ[:, :5], ONSET), r"ValueError: f0_hz must be float32 .* \(2, 6\), got .* \(2, 5\)"),
    ((F0_HZ, F0_HZ), r"ValueError: onset must be int64, of shape \(2, 6\), got torch.float64"),
    ((F0_HZ, ONSET + 1793), r"ValueError: onset must lie in \[0, 1792\], got values in \[\d+, \d+\]"),
    ((F0_HZ,), "TypeError: render takes theta and f0_hz, onset, got theta and 1 others"),
]


def test_bad_calls_and_draws_are_refused():
    for theta, seeds, words in BAD_CALLS:
        refused(words, SMALL[1], theta, seeds)
    for draws, words in BAD_DRAWS:
        refused(words, SMALL[0].render, THETA, *draws)


@pytest.mark.parametrize(
    "make, change, words",
    [
        (GranularSynth, {"n_samples": 1000}, "grain_samples must be from 2 to n_samples - 1 = 999, got 4096: shorten"),
        (GranularSynth, {"f0_min_hz": 4000.0}, "expected 0 < f0_min_hz <= f0_max_hz, got 4000"),
        (GranularSynth, {"n_grains": 0}, "must be positive"),
        (ChirpletSynth, CHIRPLET | {"am_hz": (2.0, 1.0)}, "am must have a range 0 < min <= max, got 2.0 and 1.0"),
        (ChirpletSynth, CHIRPLET | {"f0_hz": 0.0}, "must be positive"),
        (ChirpletSynth, CHIRPLET | {"max_shift": 1024}, "max_shift must be from 0 to n_samples - 1 = 1023, got 1024"),
        (SnareSynth, {"sample_rate_hz": 3999}, "sample_rate_hz must be at least 4000 and finite, got 3999"),
        (SnareSynth, SNARE | {"max_shift": 129}, "max_shift <= common_delay .* got 129, 128 and n_samples 1024"),
        (SnareSynth, SNARE | {"common_delay": 1016}, r"common_delay < n_samples - 8 \(the attack\)"),
        (SnareSynth, SNARE | {"noise": torch.zeros(3)}, r"noise must be float32 .* \(1024,\), got .* \(3,\)"),
        (Parameter, dict(name="p", min=0, max=1, unit="", curve="log"), "unknown curve 'log': did you mean 'log2'"),
    ],
)
def test_bad_settings_are_refused(make, change, words):
    refused(words, make, **change)
