"""P-loss, multi-scale spectral losses and embedding losses against NumPy twins."""

import hashlib
import pickle
import subprocess
import sys
from types import SimpleNamespace

import auraloss
import numpy as np
import pytest
import torch
from scipy.signal.windows import flattop
from torch import nn

from replication import baselines
from replication.baselines import MSS_NAMES, EmbeddingLoss, MSSLoss, WeightsUnavailable, panns_weights, resample
from replication.measures import encodec_frames
from scrapl_lib.losses import p_loss


def pair(n_samples=4096, batch=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 1, n_samples, dtype=dtype, generator=generator).unbind(0)


def magnitudes(x, n, hop, window):
    """x (samples,) -> (frames, bins): frames centred on multiples of hop, reflected at the ends, frame by frame."""
    padded = np.pad(x, n // 2, mode="reflect")
    frames = [padded[start : start + n] * window for start in range(0, len(padded) - n + 1, hop)]
    return np.abs(np.fft.rfft(frames, axis=1))


def hann(n):
    return np.sin(np.pi * np.arange(n) / n) ** 2


def test_p_loss():
    theta_hat, theta = torch.tensor([[0.1, 0.5], [0.3, 0.5]]), torch.tensor([[0.0, 0.5], [0.0, 0.9]])
    assert abs(float(p_loss(theta_hat, theta)) - ((0.01 + 0.09) / 2 + (0.0 + 0.16) / 2)) < 1e-7
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2,\)"):
        p_loss(theta_hat, theta[:, 0])


@pytest.mark.parametrize("name", ["mss_linear", "mss_log_linear"])
def test_mss_equals_a_literal_twin(name):
    """Means over items, frames and bins, then FFT sizes; magnitudes floored at 1e-4. 1e-6 of about 10, in float64, as
    auraloss's windows come in float32."""
    x_hat, x = pair()
    x_hat[0] = 0  # silence meets the floor
    expected = []
    for n in (64, 128, 256, 512, 1024, 2048):
        a, b = (
            np.maximum([magnitudes(item, n, n // 4, hann(n)) for item in y[:, 0].numpy()], 1e-4) for y in (x_hat, x)
        )
        log = np.mean(np.abs(np.log(a) - np.log(b))) if name == "mss_log_linear" else 0
        expected.append(np.mean(np.abs(a - b)) + log)
    assert np.mean(expected) > 1
    assert abs(float(MSSLoss(name)(x_hat, x)) - np.mean(expected)) < 1e-6


def test_mss_revisited_equals_a_literal_twin():
    """Float64; 1e-6 relative, because the windows are stored in float32."""
    x_hat, x = pair()
    expected = 0
    for n, hop in zip((67, 127, 257, 509, 1021, 2053), (33, 63, 128, 254, 510, 1026)):
        window = flattop(n + 1)[:-1]
        for a, b in zip(x_hat[:, 0].numpy(), x[:, 0].numpy()):
            difference = np.log(1 + magnitudes(a, n, hop, window)) - np.log(1 + magnitudes(b, n, hop, window))
            expected += np.sqrt(np.sum(difference**2)) / len(x)
    assert expected > 1
    assert abs(float(MSSLoss("mss_revisited")(x_hat, x)) / expected - 1) < 1e-6


def test_mss_random_is_auraloss_and_repeats_from_numpy_state():
    """On the paper's 32768 samples: the same NumPy state gives auraloss's value, bit for bit; the next call another."""
    x_hat, x = pair(32768, batch=1, dtype=torch.float32)
    loss = MSSLoss("mss_random")
    np.random.seed(5)
    values = [loss(x_hat, x), loss(x_hat, x)]
    np.random.seed(5)
    assert [loss(x_hat, x), loss(x_hat, x)] == values and values[0] != values[1]
    official = auraloss.freq.RandomResolutionSTFTLoss(max_fft_size=32767)  # draws once when built, again when called
    np.random.seed(5)
    assert torch.equal(values[0], official(x_hat, x))
    x_hat, x = pair(2048)
    values = [float(loss(x_hat, x)) for _ in range(20)]
    assert len(set(values)) == 20 and np.isfinite(values).all()
    assert max(r.fft_size for r in loss.distance.stft_losses) < 2048


@pytest.mark.parametrize("name", MSS_NAMES[:3])
def test_mss_properties(name):
    """Zero for equal audio, float32 like float64, finite gradients at and near silence."""
    loss, (x_hat, x) = MSSLoss(name), pair()
    single = loss(x_hat.float(), x.float())
    assert single.dtype == torch.float32 and abs(float(single / loss(x_hat, x) - 1)) < 1e-4
    assert float(loss(x, x)) == 0
    for size in (0, 1e-42, 1e-40, 1e-38):  # silence, and subnormal float32
        quiet = (size * x_hat / x_hat.abs().max()).float().requires_grad_()
        loss(quiet, x.float()).backward()
        assert torch.isfinite(quiet.grad).all() and (size == 0 or quiet.detach().count_nonzero() > 100)


class Band(nn.Module):
    """A small embedding: mean square of fixed linear filters, per frame (3-D) or over the whole audio (2-D)."""

    def __init__(self, frames, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.frames = frames
        self.filters = nn.Conv1d(1, 5, 64, stride=32, bias=False, dtype=dtype, device="cpu")
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, audio):
        self.seen.append(audio.detach())
        energy = self.dropout(self.filters(audio[:, None]) ** 2)  # (batch, 5, time)
        return energy.transpose(1, 2) if self.frames else energy.mean(2)


@pytest.mark.parametrize(
    ("name", "rate", "length"), [("ms_clap", 44100, 308700), ("panns_wavegram_logmel", 32000, 320000)]
)
def test_embedding_loss_resamples_repeats_and_takes_the_l2_distance(name, rate, length):
    """A tone of 440 Hz stays one at the model's rate and is repeated to its length; distance as the twin's, 1e-10."""
    t, model_t = torch.arange(8192, dtype=torch.float64) / 8192, torch.arange(length, dtype=torch.float64) / rate
    x = torch.stack([torch.sin(2 * torch.pi * f * t) for f in (440, 300)])[:, None]
    embed = Band(frames=False)
    value = EmbeddingLoss(name, 8192, embed)(0.5 * x.flip(0), x)
    heard_hat, heard = embed.seen
    assert heard.shape == (2, length)
    for item, f in enumerate((440, 300)):
        assert (heard[item] - torch.sin(2 * torch.pi * f * model_t)).abs().max() < 1e-9
    with torch.no_grad():
        difference = embed(heard_hat) - embed(heard)
    assert float(value) > 1e-4
    assert abs(float(value) - np.mean([np.sqrt(np.sum(d**2)) for d in difference.numpy()])) < 1e-10


def test_embeddings_are_averaged_over_time_and_long_audio_is_cut():
    x_hat, x = pair()
    values = [EmbeddingLoss("panns_wavegram_logmel", 8192, Band(frames))(x_hat, x) for frames in (True, False)]
    assert float(values[0]) > 1e-4 and abs(float(values[0] - values[1])) < 1e-12
    embed, (x_hat, x) = Band(frames=False), pair(10 * 44100, batch=1)
    EmbeddingLoss("ms_clap", 44100, embed)(x_hat, x)
    assert torch.equal(embed.seen[1], x[:, 0, : 7 * 44100])


def test_embedding_model_is_frozen_but_the_audio_has_a_gradient():
    x_hat, x = pair()
    loss = EmbeddingLoss("ms_clap", 8192, Band(frames=True)).train()
    assert torch.equal(loss(x_hat.requires_grad_(), x), loss(x_hat, x))  # no dropout
    loss(x_hat, x).backward()
    assert x_hat.grad.abs().max() > 0 and not any(weight.requires_grad for weight in loss.parameters())


@pytest.mark.parametrize(
    ("n", "from_hz", "to_hz"), [(8192, 8192, 44100), (8192, 8192, 32000), (44100, 44100, 32000), (999, 3, 2)]
)
def test_resampling_keeps_tones_and_drops_what_does_not_fit(n, from_hz, to_hz):
    """Periodic tones below both Nyquist frequencies keep amplitude and phase, 1e-9; one at the lower vanishes."""
    n_new = round(n * to_hz / from_hz)
    t, t_new, top = np.arange(n) / n, np.arange(n_new) / n_new, (min(n, n_new) - 1) // 2
    x, expected = (sum(np.cos(2 * np.pi * k * times + k) for k in (0, 3, top)) for times in (t, t_new))
    y = resample(torch.from_numpy(x)[None], from_hz, to_hz)[0].numpy()
    assert y.shape == (n_new,) and np.abs(y - expected).max() < 1e-9
    nyquist = torch.from_numpy(np.cos(2 * np.pi * (top + 1) * t))[None]
    assert resample(nyquist, from_hz, to_hz).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "package", "source"),
    [
        ("ms_clap", "msclap", "microsoft/msclap"),
        ("panns_wavegram_logmel", "panns_AT_inference", "zenodo.org"),
        ("FAD", "encodec", "fbaipublicfiles"),
    ],
)
def test_missing_weights_say_how_to_get_them(name, package, source, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # import fails, as without the extra
    words = rf"{name} needs a pretrained model .*ModuleNotFoundError.*{package}.*\[embeddings\].*{source}"
    with pytest.raises(WeightsUnavailable, match=words):
        encodec_frames(torch.zeros(1, 1, 44100), 44100) if name == "FAD" else EmbeddingLoss(name, 8192)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_panns_file_is_read_without_trusting_it(monkeypatch, tmp_path, capsys, legacy):
    """Beside the weights lies the sampler's state, as the authors' training writes it; only arrays are accepted, and
    no file but the published one is unpickled."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(state):
        def fetch(url, path):
            torch.save(state, path, _use_new_zipfile_serialization=not legacy)
            data = panns_weights().read_bytes()
            if legacy:  # and written beside NumPy 1
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                panns_weights().write_bytes(data)
            monkeypatch.setattr(baselines, "_PANNS_MD5", hashlib.md5(data).hexdigest())

        panns_weights().unlink(missing_ok=True)
        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        return baselines._panns_checkpoint()

    found = download({"model": {"scale": torch.tensor(3.0)}, "sampler": [np.arange(3), np.zeros(0, dtype=int)]})
    assert found["model"]["scale"] == 3 and found["sampler"][0].tolist() == [0, 1, 2]
    assert f"from {baselines._PANNS_URL} to {panns_weights()}" in capsys.readouterr().err
    with pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only"):
        download({"model": subprocess.Popen})
    panns_weights().write_bytes(b"an aborted download")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled an unknown file"))
    with pytest.raises(ValueError, match="has MD5 .*, expected .*: delete it"):
        baselines._panns_checkpoint()


def test_pretrained_models_are_called_as_their_packages_want(monkeypatch, capsys):
    """With stand-ins of the packages' shapes: CLAP's audio encoder returns (embedding, classes), PANNs a dictionary."""

    class Encoder(nn.Module):
        def forward(self, audio):
            return audio[:, :4], audio[:, 4:6]

    class Panns(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            sizes = {"sample_rate": 32000, "window_size": 1024, "hop_size": 320, "mel_bins": 64}
            assert settings == sizes | {"fmin": 50, "fmax": 14000, "classes_num": 527}
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, audio):
            return {"embedding": self.scale * audio[:, :4], "clipwise_output": audio}

    clap = {("2023", False): SimpleNamespace(clap=SimpleNamespace(audio_encoder=Encoder()))}
    fake = SimpleNamespace(CLAP=lambda version, use_cuda: clap[version, use_cuda], Wavegram_Logmel_Cnn14=Panns)
    for module in ("msclap", "panns_AT_inference", "panns_AT_inference.models"):
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr("replication.baselines._panns_checkpoint", lambda: {"model": {"scale": torch.tensor(3.0)}})
    x_hat, x = pair(4096, batch=1, dtype=torch.float32)
    for name, rate, scale in (("ms_clap", 44100, 1), ("panns_wavegram_logmel", 32000, 3)):
        a, b = (resample(y[:, 0], 8192, rate)[0, :4] for y in (x_hat, x))
        assert abs(float(EmbeddingLoss(name, 8192)(x_hat, x)) - scale * float((a - b).norm())) < 1e-5
        assert f"{name}: weights are downloaded at first use from" in capsys.readouterr().err


def test_bad_names_and_lengths_are_refused():
    with pytest.raises(ValueError, match="unknown MSS loss 'mss': .*valid are mss_linear"):
        MSSLoss("mss")
    with pytest.raises(ValueError, match="unknown embedding 'clap': did you mean 'ms_clap'"):
        EmbeddingLoss("clap", 8192)
    with pytest.raises(ValueError, match="mss_linear needs at least 1027 samples, got 1026"):
        MSSLoss("mss_linear")(torch.zeros(1, 1, 1026), torch.zeros(1, 1, 1026))
