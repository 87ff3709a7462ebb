"""What is reported about a trained encoder: parameter errors, audio distances, drum features, Fréchet distances.

Audio is (batch, 1, samples). Measures neither keep a graph nor depend on autocast or torch's default dtype and device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.signal import lfilter
from scipy.signal.windows import flattop, hann
from torch import Tensor, nn

from scrapl_lib.checks import check_audio, check_name, check_pair, positive_int
from scrapl_lib.losses import JTFSLoss

from .baselines import MSS_NAMES, MSSLoss, pretrained, resample
from .surroundings import own_surroundings

AUDIO_DISTANCES = ("jtfs", *MSS_NAMES[:3])  # mss_random draws

# drum features: one frame's length in seconds, and how many frames each part has, the decay at most
FRAME_S = 2048 / 44100
TRANSIENT_FRAMES, DECAY_FRAMES = 2, 64
POWER_FLOOR = 1e-8
CHUNK = 32  # sounds computed at a time, does not change the result
N_MELS = 64
LOUDNESS_FLOOR_DB = -0.691 + 10 * math.log10(POWER_FLOOR)  # of silence: -80.691
ENCODEC_SOURCE = "https://dl.fbaipublicfiles.com/encodec/v0"


def theta_l1(theta_hat: Tensor, theta: Tensor) -> Tensor:
    """Mean absolute error of each parameter, per mille of its range.

    theta_hat, theta: (n, n_params) in [0, 1] -> (n_params,) float64.
    """
    if theta_hat.shape != theta.shape or theta.ndim != 2 or theta.numel() == 0:
        got = f"{tuple(theta_hat.shape)} and {tuple(theta.shape)}"
        raise ValueError(f"theta_hat and theta must both have shape (n, n_params), got {got}")
    return 1000 * (theta_hat.detach().double() - theta.double()).abs().mean(dim=0)


def total_variation(theta_l1_by_epoch: Sequence[float]) -> float:
    """The sum of the validation theta L1's changes from epoch to epoch / number of epochs, as both in per mille.

    theta_l1_by_epoch: one value per epoch, at least 2 (the validation before training is left out).
    """
    if len(theta_l1_by_epoch) < 2:
        raise ValueError(f"total variation needs the values of at least 2 epochs, got {len(theta_l1_by_epoch)}")
    values = torch.as_tensor(theta_l1_by_epoch, dtype=torch.float64, device="cpu")
    return float(values.diff().abs().sum() / len(values))


def convergence_step(steps: Sequence[int], values: Sequence[float], threshold: float = 100.0) -> int | None:
    """The first of `steps` whose value is at most `threshold` (both in per mille), None if there is none."""
    return next((int(step) for step, value in zip(steps, values, strict=True) if value <= threshold), None)


@torch.no_grad()
@own_surroundings()
def audio_distances(
    x_hat: Tensor, x: Tensor, names: Iterable[str], *, jtfs: nn.Module | None = None, batch_size: int = 32
) -> dict[str, float]:
    """Distances between reconstructions and references, mean over items, unscaled (the paper prints them times 1000).

    Args:
        x_hat, x: (n, 1, samples).
        names: a list of any of jtfs, mss_linear, mss_log_linear, mss_revisited.
        jtfs: the JTFSLoss to measure "jtfs" with; by default the paper's granular configuration at the audio's length.
        batch_size: items computed at a time; does not change the result.
    """
    check_pair(x_hat, x)
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got the text {names!r}: write [{names!r}]")
    batch_size, distances = positive_int("batch_size", batch_size), {}
    for name in names:
        check_name("audio distance", name, AUDIO_DISTANCES)
        loss = MSSLoss(name) if name != "jtfs" else JTFSLoss(x.shape[2]).to(x.device) if jtfs is None else jtfs
        parts = zip(x_hat.split(batch_size), x.split(batch_size))
        distances[name] = sum(float(loss(a, b)) * len(a) for a, b in parts) / len(x)
    return distances


@torch.no_grad()
@own_surroundings()
def drum_features(x: Tensor, sample_rate_hz: float = 44100) -> dict[str, Tensor]:
    """Loudness, spectral centroid and spectral flatness of the beginning of a drum sound and of its decay.

    Of frames of 2048 samples, 512 apart (at other rates than 44.1 kHz of the power of two closest to as many
    milliseconds), the first 2 are the transient and the next 64, or as many as there are, the decay. Clipping, windows
    and the 1e-8 of the flatness are what reproduces the authors' values.
    - Loudness, dB: -0.691 + 10 log10(mean square + 1e-8) of the frame, K-weighted from rest, with the output of either
      filter clipped to [-1, 1].
    - Spectral centroid: mean frequency f in Hz under log(1 + X), with X the magnitudes under a symmetric flat-top
      window, at least 1e-4; then -34.61 f^-0.1621 + 21.2985.
    - Spectral flatness, dB: 20 log10(G / A + 1e-8), with G and A the geometric and arithmetic means of the power
      spectrum under a periodic Hann window, at least 1e-10.

    Args:
        x: (batch, 1, samples) without the synthesizer's common delay; samples at least one and a half frames, 3072.
    Returns:
        {name: (batch, frames) float64} for transient_ and decay_ each: loudness, spectral_centroid, spectral_flatness.
    """
    x, size, f_hz = _frames(x, sample_rate_hz, TRANSIENT_FRAMES + 1)
    flat_top, periodic_hann = (torch.from_numpy(w).to(x.device) for w in (flattop(size), hann(size, sym=False)))
    # from rest, a frame ends before any later part of the filters' responses comes
    responses = [torch.from_numpy(lfilter(b, a, np.eye(1, size))).to(x.device) for b, a in k_weighting(sample_rate_hz)]
    parts = []
    for frames in x[:, : TRANSIENT_FRAMES + DECAY_FRAMES].split(CHUNK):  # (batch, frames, size)
        weighted = frames
        for response in responses:
            filtered = torch.fft.irfft(torch.fft.rfft(weighted, 2 * size) * torch.fft.rfft(response, 2 * size))
            weighted = filtered[..., :size].clamp(-1, 1)
        loudness = -0.691 + 10 * torch.log10(weighted.square().mean(2) + POWER_FLOOR)
        weight = torch.log1p(torch.fft.rfft(frames * flat_top).abs().clamp(min=1e-4))
        centroid = -34.61 * ((weight * f_hz).sum(2) / weight.sum(2)) ** -0.1621 + 21.2985
        power = torch.fft.rfft(frames * periodic_hann).abs().square().clamp(min=1e-10)
        flatness = 20 * torch.log10(power.log().mean(2).exp() / power.mean(2) + 1e-8)
        parts.append(torch.stack([loudness, centroid, flatness]))
    named = dict(zip(("loudness", "spectral_centroid", "spectral_flatness"), torch.cat(parts, dim=1)))
    transient = {f"transient_{name}": value[:, :TRANSIENT_FRAMES] for name, value in named.items()}
    return transient | {f"decay_{name}": value[:, TRANSIENT_FRAMES:] for name, value in named.items()}


def drum_feature_distances(x_hat: Tensor, x: Tensor, sample_rate_hz: float = 44100) -> dict[str, float]:
    """Mean absolute difference over items and frames of each of `drum_features`, unscaled (the paper prints loudness
    times 100 and centroid times 10). Centroid and flatness of a frame are first multiplied by how far its own loudness
    is above that of silence, in dB.

    x_hat, x: (batch, 1, samples) as for `drum_features`.
    """
    check_pair(x_hat, x)
    a, b = drum_features(x_hat, sample_rate_hz), drum_features(x, sample_rate_hz)
    for features in (a, b):
        for part in ("transient", "decay"):
            above_silence = features[f"{part}_loudness"] - LOUDNESS_FLOOR_DB
            features[f"{part}_spectral_centroid"] *= above_silence
            features[f"{part}_spectral_flatness"] *= above_silence
    return {name: float((a[name] - b[name]).abs().mean()) for name in a}


def k_weighting(sample_rate_hz: float) -> list[tuple[list[float], list[float]]]:
    """ITU-R BS.1770's filters, (b, a) with a[0] = 1: high shelf (4 dB, 1500 Hz, Q 2^-1/2), high-pass (38 Hz, Q 1/2).

    From these constants for any sample rate. At 48 kHz they come within 2e-4 of the coefficients that the standard
    gives, except for the high-pass's numerator, which it rounds to (1, -2, 1): 0.04 dB.
    """
    g = 10 ** (4 / 40)  # the shelf's gain at 1500 Hz
    omega = 2 * math.pi * 1500 / sample_rate_hz
    cos, alpha = math.cos(omega), math.sqrt(2 * g) * math.sin(omega)
    up, down = (g + 1) + (g - 1) * cos, (g + 1) - (g - 1) * cos
    shelf = (
        [g * (up + alpha), -2 * g * ((g - 1) + (g + 1) * cos), g * (up - alpha)],
        [down + alpha, 2 * ((g - 1) - (g + 1) * cos), down - alpha],
    )
    omega = 2 * math.pi * 38 / sample_rate_hz
    cos, alpha = math.cos(omega), math.sin(omega)
    high_pass = [(1 + cos) / 2, -1 - cos, (1 + cos) / 2], [1 + alpha, -2 * cos, 1 - alpha]
    return [([v / a[0] for v in b], [v / a[0] for v in a]) for b, a in (shelf, high_pass)]


@torch.no_grad()
@own_surroundings()
def log_mel_statistics(x: Tensor, sample_rate_hz: float) -> Tensor:
    """Mean and standard deviation over time of a log-mel spectrogram: embeddings of sounds without trained weights.

    `frechet_distance` of two sets of these is a Fréchet distance of log-mel statistics, not FAD: the paper's FAD uses
    EnCodec. Frames as in `drum_features` (46 ms), under a Hann window, not padded; power relative to a sine of
    amplitude 1; 64 triangles of height 1 from 0 Hz to half the sample rate, equally spaced in mel, 2595 log10(1 + f /
    700); log(sum + 1e-8).

    x: (batch, 1, samples) of at least one frame -> (batch, 128) float64, means first.
    """
    x, size, f_hz = _frames(x, sample_rate_hz, 1)
    window = torch.hann_window(size, dtype=torch.float64, device=x.device)
    top_mel = 2595 * math.log10(1 + sample_rate_hz / 2 / 700)
    corner_mel = torch.linspace(0, top_mel, N_MELS + 2, dtype=torch.float64, device=x.device)
    corner_hz = 700 * (10 ** (corner_mel / 2595) - 1)
    rise = (f_hz[:, None] - corner_hz[:-1]) / corner_hz.diff()  # (bins, N_MELS + 1)
    triangles = torch.minimum(rise[:, :-1], 1 - rise[:, 1:]).clamp(min=0)  # (bins, N_MELS)
    parts = []
    for frames in x.split(CHUNK):
        spectrum = torch.fft.rfft(frames * window) / (size / 4)  # (batch, frames, bins)
        log_mel = torch.log(spectrum.abs().square() @ triangles + 1e-8)
        parts.append(torch.cat([log_mel.mean(1), log_mel.std(1, correction=0)], dim=1))
    return torch.cat(parts)


@functools.cache
def _encodec() -> nn.Module:
    with pretrained("FAD", "encodec", ENCODEC_SOURCE):
        from encodec import EncodecModel

        return EncodecModel.encodec_model_24khz().encoder.eval()


@torch.no_grad()
@own_surroundings()
def encodec_frames(x: Tensor, sample_rate_hz: int, encoder: nn.Module | None = None) -> Tensor:
    """EnCodec's embeddings of all frames of all sounds: `frechet_distance` of two sets of these is the paper's FAD.

    Args:
        x: (batch, 1, samples), resampled to 24 kHz. encoder: in place of the 24 kHz model's, (batch, 1, samples) ->
            (batch, dims, frames).
    Returns:
        (batch * frames, dims) float64; 128 dimensions. Raises WeightsUnavailable, which says how to get them.
    """
    check_audio(x, "x")
    encoder = (_encodec() if encoder is None else encoder).to(x.device)
    frames = [encoder(resample(part, sample_rate_hz, 24000).float()) for part in x.split(CHUNK)]
    return torch.cat([part.movedim(1, 2).flatten(0, 1) for part in frames]).double()


@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between the Gaussians with the means and covariances of two sets.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with n - 1 in the covariances C. With A and B the centred sets
    over sqrt(n - 1), C_a = A^T A, and the trace of the root is the sum of the singular values of A B^T: no root of a
    matrix is taken, which is singular for n <= d.

    a, b: (n_a, d), (n_b, d) finite, n_a and n_b at least 2 -> at least 0; computed in float64. Raises TypeError for
    what is no tensor, ValueError for other shapes and what is not finite.
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}: torch.as_tensor makes one")
        if value.ndim != 2 or len(value) < 2 or value.shape[1] < 1:
            raise ValueError(f"{name} must have shape (n, d) with at least 2 items, got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} NaN or infinite values")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of columns d, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    # the triangular factor of QR has the same A^T A, and at most d rows
    root_a, root_b = (torch.linalg.qr((v - v.mean(0)) / math.sqrt(len(v) - 1), mode="r").R for v in (a, b))
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * shared
    return max(float(distance), 0.0)


def _frames(x: Tensor, sample_rate_hz: float, n_least: int) -> tuple[Tensor, int, Tensor]:
    """Frames (batch, frames, size) float64, a quarter of their size apart; their size; their bins' frequencies."""
    check_audio(x, "x")
    if not isinstance(sample_rate_hz, (int, float)) or not 4000 <= sample_rate_hz < math.inf:
        raise ValueError(f"sample_rate_hz must be at least 4000 and finite, got {sample_rate_hz!r}")
    size = 2 ** round(math.log2(FRAME_S * sample_rate_hz))
    shortest = size + (n_least - 1) * size // 4
    if x.shape[2] < shortest:
        raise ValueError(
            f"x must have at least {shortest} samples ({n_least} frames at {sample_rate_hz} Hz), got {x.shape[2]}: "
            "render longer sounds, or pad them with zeros"
        )
    f_hz = torch.fft.rfftfreq(size, 1 / sample_rate_hz, dtype=torch.float64, device=x.device)
    return x[:, 0].double().unfold(1, size, size // 4), size, f_hz
