"""Parameter errors, total variation, convergence, audio distances, drum features and the Fréchet distance."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_surroundings import odd_surroundings
from scipy.linalg import sqrtm
from scipy.signal import lfilter
from torch import nn

from replication import measures
from replication.baselines import MSS_NAMES, EmbeddingLoss, MSSLoss
from replication.measures import audio_distances, drum_feature_distances, drum_features, frechet_distance
from scrapl_lib.losses import JTFSLoss

REFERENCE = Path(__file__).parent / "reference"
SYMMETRIC = ("mss_linear", "mss_log_linear", "mss_revisited")
FEATURES = ("loudness", "spectral_centroid", "spectral_flatness")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_theta_l1_in_permille():
    theta_hat = torch.tensor([[0.1, 0.5], [0.3, 0.9], [0.2, 0.4]], requires_grad=True)
    theta = torch.tensor([[0.2, 0.5], [0.1, 0.3], [0.2, 1.0]])
    found = measures.theta_l1(theta_hat, theta)
    assert found.shape == (2,) and found.dtype == torch.float64 and not found.requires_grad
    assert (found - torch.tensor([100.0, 400.0])).abs().max() < 1e-4


def test_total_variation_and_convergence():
    """Epochs 300, 250, 260, 240: changes 50 + 10 + 20 over 4 epochs."""
    assert abs(measures.total_variation([300, 250, 260, 240]) - 20) < 1e-12
    steps = [0, 96, 192, 288]
    assert measures.convergence_step(steps, [300, 120, 100, 140]) == 192
    assert measures.convergence_step(np.array(steps), np.array([300, 120, 100.1, 140])) is None
    assert measures.convergence_step(steps, [300, 120, 100.1, 140], threshold=120) == 96


def test_audio_distances_are_means_over_items_whatever_the_batch_size():
    """With a small transform; with the default one at another length than the paper's."""
    x_hat, x = randn(2, 7, 1, 2048).unbind(0)
    x_hat = x_hat * torch.arange(7, dtype=torch.float64)[:, None, None]
    names, jtfs = ("jtfs", *SYMMETRIC), JTFSLoss(2048, J=6, Q1=2, Q2=1, J_fr=2, Q_fr=1)
    found = audio_distances(x_hat, x, names, jtfs=jtfs, batch_size=3)
    assert tuple(found) == names and all(isinstance(value, float) for value in found.values())
    for name in names:
        loss = jtfs if name == "jtfs" else MSSLoss(name)
        per_item = [float(loss(x_hat[[i]], x[[i]])) for i in range(7)]
        assert np.std(per_item) > 1e-5 and abs(found[name] / np.mean(per_item) - 1) < 1e-10
    assert set(audio_distances(x, x, names, jtfs=jtfs).values()) == {0.0}
    x_hat, x = randn(2, 1, 1, 4096, dtype=torch.float32).unbind(0)
    assert abs(audio_distances(x_hat, x, ["jtfs"])["jtfs"] / float(JTFSLoss(4096)(x_hat, x)) - 1) < 1e-6


def test_surroundings_change_no_bit():
    """Of measures and of the losses they are made of."""
    x_hat, x = randn(2, 2, 1, 4096, dtype=torch.float32).unbind(0)
    jtfs = JTFSLoss(4096, J=6, Q1=2, Q2=1, J_fr=2, Q_fr=1)
    encoder, embed = nn.Conv1d(1, 3, 64, stride=64).requires_grad_(False), nn.Linear(308700, 2)

    def measured():
        np.random.seed(2)
        yield from (MSSLoss(name)(x_hat, x) for name in MSS_NAMES)
        yield EmbeddingLoss("ms_clap", 8192, embed)(x_hat, x)
        yield from audio_distances(x_hat, x, ["jtfs", *SYMMETRIC], jtfs=jtfs).values()
        yield from drum_feature_distances(x_hat, x).values()
        yield frechet_distance(measures.log_mel_statistics(x_hat, 44100), measures.log_mel_statistics(x, 44100))
        yield measures.encodec_frames(x, 44100, encoder).sum()
        yield measures.total_variation([300.1, 250.2, 260.3])

    expected = list(measured())
    with odd_surroundings():
        assert list(measured()) == expected


def frame_twin(frame, sample_rate_hz):
    """Loudness (at 44.1 kHz), centroid and flatness of one frame in NumPy, windows and K-weighting written out."""
    y, size = frame, len(frame)
    for b, a in K_WEIGHTING_44100:
        y = np.clip(lfilter(b, a, y), -1, 1)
    loudness = -0.691 + 10 * np.log10(np.mean(y**2) + 1e-8)
    n, coefficients = np.arange(size), (0.21557895, -0.41663158, 0.277263158, -0.083578947, 0.006947368)
    flat_top = sum(c * np.cos(2 * np.pi * k * n / (size - 1)) for k, c in enumerate(coefficients))
    y = np.log1p(np.maximum(np.abs(np.fft.rfft(frame * flat_top)), 1e-4))
    f_hz = np.sum(y * np.arange(size // 2 + 1) * sample_rate_hz / size) / np.sum(y)
    power = np.abs(np.fft.rfft(frame * (0.5 - 0.5 * np.cos(2 * np.pi * n / size)))) ** 2
    power = np.maximum(power, 1e-10)
    flatness = 20 * np.log10(np.exp(np.mean(np.log(power))) / np.mean(power) + 1e-8)
    return loudness, 21.2985 - 34.61 * f_hz**-0.1621, flatness


# pyloudnorm 0.2.0's default filters at 44.1 kHz, and the table of ITU-R BS.1770-4 for 48 kHz
K_WEIGHTING_44100 = [
    ([1.5309095946396625, -2.651169032402396, 1.1691668584809876], [1, -1.663750110244495, 0.7126575309627482]),
    ([0.994607809439911, -1.989215618879822, 0.994607809439911], [1, -1.9892010416922554, 0.9892301960673886]),
]
K_WEIGHTING_48000 = [
    ([1.53512485958697, -2.69169618940638, 1.19839281085285], [1, -1.69065929318241, 0.73248077421585]),
    ([1, -2, 1], [1, -1.99004745483398, 0.99007225036621]),
]


def test_drum_features_equal_the_official_ones():
    """Seen: 2.6e-5 dB, 1.5e-4, and 7.8e-4 dB of flatnesses down to -139 dB, as theirs are float32."""
    reference = np.load(REFERENCE / "features.npz")
    audio = torch.from_numpy(np.load(REFERENCE / "snare.npz")["snare_audio"])[:, None]
    found = drum_features(audio)  # with the common delay: so were the reference values computed
    assert len(found) == 6 and all(value.dtype == torch.float64 for value in found.values())
    for name, tolerance in zip(FEATURES, (1e-4, 5e-4, 2e-3)):
        for part, frames in (("transient", "0_2"), ("decay", "2_64")):
            expected = reference[f"{name.title().replace('_', '')}_{frames}"]
            assert expected.shape == (4, int(frames[2:])) == tuple(found[f"{part}_{name}"].shape)
            assert np.abs(found[f"{part}_{name}"].numpy() - expected).max() < tolerance


def test_drum_features_equal_a_numpy_twin_frame_by_frame():
    """1e-9; 70 frames of loud noise, which clips in the K-weighting, then of quiet noise; other rates."""
    x = randn(2, 1, 2048 + 69 * 512)
    x[1] *= torch.logspace(0, -9, x.shape[2])
    found = drum_features(x)
    assert {k: v.shape[1] for k, v in found.items() if "loud" in k} == {"transient_loudness": 2, "decay_loudness": 64}
    for item, frame in ((0, 0), (0, 1), (0, 65), (1, 2), (1, 40), (1, 65)):
        part, i = ("transient", frame) if frame < 2 else ("decay", frame - 2)
        expected = frame_twin(x[item, 0, frame * 512 : frame * 512 + 2048].numpy(), 44100)
        for name, value in zip(FEATURES, expected):
            assert abs(found[f"{part}_{name}"][item, i] - value) < 1e-9, (item, frame, name)
    other = drum_features(x, 22050)["transient_spectral_centroid"][0, 0]
    assert abs(other - frame_twin(x[0, 0, :1024].numpy(), 22050)[1]) < 1e-9  # half the rate, half the samples
    assert drum_features(x, 8820)["transient_loudness"].shape == (2, 2)
    fifth = drum_features(x, 8820)["decay_spectral_flatness"][1, 5]  # 410 samples would be the time: 512, 128 apart
    assert abs(fifth - frame_twin(x[1, 0, 7 * 128 : 7 * 128 + 512].numpy(), 8820)[2]) < 1e-9


def test_short_sounds_have_fewer_decay_frames():
    x = torch.randn(2, 1, 2048 + 70 * 512, generator=torch.Generator().manual_seed(0))
    full = drum_features(x)
    for samples, frames in ((3072, 1), (3583, 1), (3584, 2), (2048 + 65 * 512, 64)):
        found = drum_features(x[..., :samples])["decay_spectral_flatness"]
        assert found.shape == (2, frames) and torch.equal(found, full["decay_spectral_flatness"][:, :frames])


def test_k_weighting_is_the_standard_s():
    """For 48 kHz within 2e-4, but for the numerator of the high-pass; pyloudnorm's of 44.1 kHz: in the twin above."""
    shelf, high_pass = np.array(measures.k_weighting(48000))
    assert np.abs(shelf - np.array(K_WEIGHTING_48000[0])).max() < 2e-4
    assert np.abs(high_pass[1] - K_WEIGHTING_48000[1][1]).max() < 2e-4
    assert np.abs(high_pass[0] / high_pass[0][0] - K_WEIGHTING_48000[1][0]).max() < 1e-12
    assert abs(20 * np.log10(high_pass[0][0])) < 0.05


def test_drum_feature_distances_by_hand():
    """Centroid and flatness count by how far their own frame is above silence; and no more items at a time than 32."""
    generator = torch.Generator().manual_seed(0)
    x_hat, x = (gain * torch.randn(35, 1, 3600, generator=generator) for gain in (0.1, 0.02))
    found, alone = (drum_feature_distances(x_hat[items], x[items]) for items in (slice(None), slice(34, 35)))
    assert list(found) == [f"{part}_{name}" for part in ("transient", "decay") for name in FEATURES]
    both = [[drum_features(audio[[i]]) for i in range(35)] for audio in (x_hat, x)]
    for name, value in found.items():
        loudness = name.split("_")[0] + "_loudness"
        weighted = [
            np.stack([f[name][0] * (1 if name == loudness else f[loudness][0] + 80.691) for f in of_items])
            for of_items in both
        ]
        by_item = np.abs(weighted[0] - weighted[1]).mean(axis=1)
        assert isinstance(value, float) and value > 0.1 and abs(value - by_item.mean()) < 1e-9
        assert abs(alone[name] - by_item[34]) < 1e-9
    assert set(drum_feature_distances(x, x).values()) == {0.0}


def test_frechet_distance_equals_the_matrix_square_root():
    """scipy.linalg.sqrtm in full rank, 6 dimensions, sets of different sizes; relative 1e-10."""
    a, b = randn(40, 6) @ randn(6, 6, seed=1), randn(25, 6, seed=2) + 0.3
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert expected > 1
    for distance in (frechet_distance(a, b), frechet_distance(b, a)):
        assert abs(distance / expected - 1) < 1e-10
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert abs(frechet_distance(a, b) - 6) < 1e-12  # (1 - 3)^2 + (sqrt 2 - sqrt 8)^2


def test_frechet_distance_with_fewer_items_than_dimensions():
    """Rotating and moving 3-D sets into 50-D changes nothing, nor does order; a set is at 0 from itself. 1e-10 of 4."""
    a, b, basis = randn(8, 3, seed=1), 2 * randn(5, 3, seed=2), torch.linalg.qr(randn(50, 50, seed=3)).Q[:3]
    expected = frechet_distance(a, b)
    assert expected > 1 and abs(frechet_distance(a.flip(0) @ basis + 7, b @ basis + 7) - expected) < 1e-10
    assert 0 <= frechet_distance(a @ basis, a @ basis) < 1e-10


def test_encodec_frames_are_those_of_all_sounds_at_24_khz():
    """600 Hz at 44.1 kHz are 600 Hz at 24 kHz (1e-5; the periods fit); a stand-in encodes 40 frames of 600 samples."""

    class Frames(nn.Module):
        def forward(self, x):
            assert x.shape[1:] == (1, 24000) and x.dtype == torch.float32
            return x.unflatten(2, (40, 600))[:, 0].mT[:, :7]  # (batch, dims, frames)

    x = torch.sin(2 * torch.pi * 600 * torch.arange(44100).double() / 44100).float()
    x = x * torch.linspace(0.1, 1, 35)[:, None, None]
    found = measures.encodec_frames(x, 44100, Frames())
    assert found.shape == (35 * 40, 7) and found.dtype == torch.float64
    sine = torch.sin(2 * torch.pi * 600 * torch.arange(7) / 24000)
    assert (found.view(35, 40, 7) - torch.linspace(0.1, 1, 35)[:, None, None] * sine).abs().max() < 1e-5


def test_log_mel_statistics_of_a_tone_and_of_silence():
    """Bin 46 of amplitude 1/2: powers 1/16, 1/4, 1/16 in bins 45 to 47, through triangles written out here; 1e-9."""
    tone = 0.5 * torch.sin(2 * math.pi * 46 / 2048 * torch.arange(4096, dtype=torch.float64))
    x = torch.stack([tone, torch.zeros_like(tone)])[:, None]
    found = measures.log_mel_statistics(x, 44100)
    assert found.shape == (2, 128) and found.dtype == torch.float64
    assert (found[1, :64] - math.log(1e-8)).abs().max() < 1e-9 and found[:, 64:].abs().max() < 1e-6
    mel = np.linspace(0, 2595 * np.log10(1 + 22050 / 700), 66)
    corners = 700 * (10 ** (mel / 2595) - 1)
    for i in range(64):
        low, peak, high = corners[i : i + 3]
        heights = [np.interp(k * 44100 / 2048, [low, peak, high], [0, 1, 0]) for k in (45, 46, 47)]
        assert abs(float(found[0, i]) - np.log(np.dot(heights, [1 / 16, 1 / 4, 1 / 16]) + 1e-8)) < 1e-9
    assert (found[0, :64] > -3).sum() >= 2


def test_log_mel_statistics_are_an_item_s_own():
    """Also where computed in parts; gain moves the means by 2 ln gain; other rates have other frames, no empty mel."""
    x = 0.1 * torch.randn(34, 1, 4096, generator=torch.Generator().manual_seed(0))
    found, louder = (measures.log_mel_statistics(gain * x, 44100) for gain in (1, 10))
    assert found.shape == (34, 128) and (found[33] - measures.log_mel_statistics(x[[33]], 44100)[0]).abs().max() < 1e-9
    assert (louder[:, :64] - found[:, :64] - 2 * math.log(10)).abs().max() < 0.01
    assert 0.1 < found[:, 64:].mean() < 1.5
    for rate in (8192, 16000, 96000):
        statistics = measures.log_mel_statistics(x[:2].repeat(1, 1, 2), rate)
        assert statistics.shape == (2, 128) and statistics[:, :64].min() > -15


X, SET = torch.zeros(2, 1, 8192), torch.zeros(4, 3)
REFUSED = {
    r"must both have shape \(n, n_params\), got \(4, 3\) and \(2, 3\)": lambda: measures.theta_l1(SET, SET[:2]),
    "at least 2 epochs, got 1": lambda: measures.total_variation([300]),
    "shorter than argument 1": lambda: measures.convergence_step([1, 2, 3, 4], [300, 200, 200]),
    "unknown audio distance 'mss_random': .*valid are jtfs": lambda: audio_distances(X, X, ["mss_random"]),
    "names must be a list of names, got the text 'jtfs'": lambda: audio_distances(X, X, "jtfs"),
    r"one shape, got \(2, 1, 8192\) and \(1": lambda: audio_distances(X, X[:1], ["mss_linear"]),
    "batch_size must be at least 1, got 0": lambda: audio_distances(X, X, ["mss_linear"], batch_size=0),
    r"at least 3072 samples \(3 frames at 44100 Hz\), got 3071": lambda: drum_features(X[..., :3071]),
    r"x must have shape \(batch, 1, samples\)": lambda: drum_features(X[:, 0]),
    "sample_rate_hz must be at least 4000 and finite, got 0": lambda: drum_features(X, 0),
    "must be at least 4000 and finite, got '44100'": lambda: drum_features(X, "44100"),
    "one shape": lambda: drum_feature_distances(X, X[:1]),
    "at least 2048 samples .* got 2047": lambda: measures.log_mel_statistics(X[..., :2047], 44100),
    r"a must have shape \(n, d\) with at least 2 items, got \(1, 3\)": lambda: frechet_distance(SET[:1], SET),
    r"b must have shape \(n, d\) with at least 2 items, got \(4,\)": lambda: frechet_distance(SET, SET[:, 0]),
    r"same number of columns d, got \(4, 3\) and \(4, 2\)": lambda: frechet_distance(SET, SET[:, :2]),
    "a must be finite, got 12 NaN": lambda: frechet_distance(SET * torch.nan, SET),
    "a must be a torch tensor, got ndarray": lambda: frechet_distance(np.zeros((3, 2)), SET),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_requests_are_refused(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()
