"""The granular synthesizer against the official audio, a NumPy closed form and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scrapl_lib.synths import GranularSynth, Parameter, _mix64, _signed

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
        (torch.tensor([[0.5, float("nan")], [0.5, 0.5]]), r"\[0, 1\]"),
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
