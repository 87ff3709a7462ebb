"""The losses that SCRAPL is compared with: multi-scale spectra and embeddings of pretrained models."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import auraloss
import numpy as np
import torch
from scipy.signal.windows import flattop
from torch import Tensor, nn

from scrapl_lib.checks import check_name, check_pair

from .surroundings import own_surroundings

MSS_NAMES = ("mss_linear", "mss_log_linear", "mss_revisited", "mss_random")
_OCTAVES = (64, 128, 256, 512, 1024, 2048)  # FFT sizes
_REVISITED = {67: 33, 127: 63, 257: 128, 509: 254, 1021: 510, 2053: 1026}  # window: hop
_RANDOM_MAX_FFT_SIZE = 32767
MIN_SAMPLES = max(_REVISITED) // 2 + 1  # the audio is reflected half a window beyond its ends


class MSSLoss(nn.Module):
    """Multi-scale spectral loss: distances of magnitude spectrograms at several resolutions.

    Args:
        name: "mss_linear": mean absolute difference of magnitudes, mean over the FFT sizes 64, 128, ..., 2048, with
            Hann windows of that size and a quarter of it as hop (auraloss). "mss_log_linear": the same plus that of log
            magnitudes. "mss_random": auraloss's RandomResolutionSTFTLoss: three resolutions below the audio's length,
            drawn anew at every call from NumPy's global generator, whose state repeats them. "mss_revisited":
            `RevisitedLoss`.

    `loss(x_hat, x)` -> scalar. Only mss_random is not symmetric: it divides by the norm of x's spectrogram.
    """

    @own_surroundings()
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = check_name("MSS loss", name, MSS_NAMES)
        if name == "mss_random":
            self.distance = auraloss.freq.RandomResolutionSTFTLoss(max_fft_size=_RANDOM_MAX_FFT_SIZE)
        elif name == "mss_revisited":
            self.distance = RevisitedLoss()
        else:
            hops, w_log_mag = [n // 4 for n in _OCTAVES], float(name == "mss_log_linear")
            self.distance = auraloss.freq.MultiResolutionSTFTLoss(
                _OCTAVES, hops, _OCTAVES, w_sc=0.0, w_log_mag=w_log_mag, w_lin_mag=1.0
            )

    @own_surroundings()
    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x (batch, 1, samples), at least 1027 samples -> scalar. Raises as `check_pair` does."""
        check_pair(x_hat, x)
        if x.shape[2] < MIN_SAMPLES:
            raise ValueError(f"{self.name} needs at least {MIN_SAMPLES} samples, got {x.shape[2]}: use longer audio")
        if self.name == "mss_random":
            self.distance.max_fft_size = min(_RANDOM_MAX_FFT_SIZE, x.shape[2] - 1)
        with x.device:  # where mss_random's windows are made: from the CPU, each would wait for the device
            return self.distance(x_hat, x)


def magnitude(z: Tensor) -> Tensor:
    """|z| of complex z, 0 where it is subnormal: the gradient of abs, z / |z|, overflows there to NaN."""
    return z.masked_fill(z.detach().abs() < torch.finfo(z.dtype).tiny, 0).abs()


class RevisitedLoss(nn.Module):
    """Schwaer and Mueller 2023: flat-top windows, log(1 + magnitude), L2 norm at each of six resolutions, summed.

    x_hat, x (batch, 1, samples) -> scalar, the mean over the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        for n in _REVISITED:
            self.register_buffer(f"window_{n}", torch.from_numpy(flattop(n, sym=False)).float(), persistent=False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        distance = x.new_zeros(len(x))
        for n, hop in _REVISITED.items():
            window = getattr(self, f"window_{n}").to(x)
            spectra = (torch.stft(y[:, 0], n, hop, window=window, return_complex=True) for y in (x_hat, x))
            log_hat, log_ref = (torch.log1p(magnitude(spectrum)) for spectrum in spectra)
            distance = distance + torch.linalg.vector_norm(log_hat - log_ref, dim=(1, 2))
        return distance.mean()


class WeightsUnavailable(RuntimeError):
    """A pretrained model cannot be loaded; the message says how to get it."""


@contextmanager
def pretrained(name: str, package: str, source: str) -> Iterator[None]:
    """Says where the model's weights come from if `package` is there, and turns what fails in loading (import, network,
    file) into WeightsUnavailable."""
    try:
        importlib.import_module(package)
        print(f"{name}: weights are downloaded at first use from {source}", file=sys.stderr, flush=True)
        yield
    except Exception as error:
        raise WeightsUnavailable(
            f"{name} needs a pretrained model that could not be loaded ({type(error).__name__}: {error}). "
            "In an environment of its own, with network access: pip install '.[embeddings]'; the weights are then "
            f"downloaded once from {source}"
        ) from error


def _load_ms_clap() -> nn.Module:
    from msclap import CLAP

    return CLAP(version="2023", use_cuda=False).clap.audio_encoder  # -> (batch, 1024), and class scores


def _load_panns_wavegram_logmel() -> nn.Module:
    from panns_AT_inference.models import Wavegram_Logmel_Cnn14

    sizes = {"window_size": 1024, "hop_size": 320, "mel_bins": 64, "fmin": 50, "fmax": 14000, "classes_num": 527}
    model = Wavegram_Logmel_Cnn14(sample_rate=32000, **sizes)
    model.load_state_dict(_panns_checkpoint()["model"])
    return model  # -> {"embedding": (batch, 2048), ...}


def panns_weights() -> Path:
    """Where PANNs' weights are, or will be."""
    return Path(torch.hub.get_dir(), "checkpoints", "Wavegram_Logmel_Cnn14_mAP=0.439.pth").absolute()


def _panns_checkpoint() -> dict:
    path = panns_weights()
    if not path.exists():
        print(f"downloading PANNs' weights (MD5 {_PANNS_MD5}) from {_PANNS_URL} to {path}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_PANNS_URL, str(path))
    if (md5 := hashlib.md5(path.read_bytes()).hexdigest()) != _PANNS_MD5:
        raise ValueError(f"{path} has MD5 {md5}, expected {_PANNS_MD5}: delete it, then it is downloaded again")
    # beside the weights it holds the sampler's arrays; NumPy 1 and 2 have other names for what makes them
    make = np.zeros(0).__reduce__()[0]
    makers: list = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in (np.int32, np.int64, np.float32)]
    with torch.serialization.safe_globals([*makers, np.ndarray, np.dtype, bytes, *kinds]):
        return torch.load(path, map_location="cpu", weights_only=True)


_MS_CLAP_SOURCE = "Hugging Face microsoft/msclap (CLAP_weights_2023.pth) and gpt2"
_PANNS_URL = "https://zenodo.org/records/3987831/files/Wavegram_Logmel_Cnn14_mAP%3D0.439.pth?download=1"
_PANNS_MD5 = "17fa9ab65af3c0eb5ffbc5f65552c4e1"  # as Zenodo publishes it
_EMBEDDINGS = {  # sample rate in Hz, samples, loader, package, where the weights come from
    "ms_clap": (44100, 7 * 44100, _load_ms_clap, "msclap", _MS_CLAP_SOURCE),
    "panns_wavegram_logmel": (32000, 10 * 32000, _load_panns_wavegram_logmel, "panns_AT_inference", _PANNS_URL),
}


class EmbeddingLoss(nn.Module):
    """L2 distance of a pretrained model's embeddings, mean over the batch.

    The audio is resampled to the model's rate (`resample`), then repeated or cut to the model's length. Embeddings with
    a time axis are averaged over it. The model is frozen, always in eval mode, and differentiated through.

    Args:
        name: "ms_clap" (44100 Hz, 7 s) or "panns_wavegram_logmel" (32000 Hz, 10 s).
        sample_rate_hz: of the audio.
        embed: a module to use instead of the pretrained one, (batch, samples) -> (batch, dim) or (batch, time, dim).
    Raises:
        WeightsUnavailable: the optional package or the weights cannot be had.
    """

    def __init__(self, name: str, sample_rate_hz: int, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.name, self.sample_rate_hz = check_name("embedding", name, _EMBEDDINGS), sample_rate_hz
        self.model_rate_hz, self.model_samples, load, package, source = _EMBEDDINGS[name]
        if embed is None:
            with pretrained(name, package, source), own_surroundings():
                embed = load()
        self.embed = embed.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> EmbeddingLoss:
        """Stays in eval mode: a random embedding would be no distance."""
        return super().train(False)

    @own_surroundings()
    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x (batch, 1, samples) -> scalar. Raises as `check_pair` does."""
        check_pair(x_hat, x)
        return torch.linalg.vector_norm(self._embedding(x_hat) - self._embedding(x), dim=1).mean()

    def _embedding(self, x: Tensor) -> Tensor:
        audio = resample(x[:, 0], self.sample_rate_hz, self.model_rate_hz)
        audio = audio.repeat(1, math.ceil(self.model_samples / audio.shape[1]))[:, : self.model_samples]
        embedding = self.embed(audio)
        if not isinstance(embedding, Tensor):  # the pretrained models return class scores, too
            embedding = embedding["embedding"] if isinstance(embedding, dict) else embedding[0]
        return embedding.mean(dim=1) if embedding.ndim == 3 else embedding


def resample(x: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """x (..., samples) -> (..., samples * to_hz / from_hz, rounded), periodic, without frequencies from the lower of
    the two Nyquist frequencies on."""
    if from_hz == to_hz:
        return x
    n, n_new = x.shape[-1], round(x.shape[-1] * to_hz / from_hz)
    spectrum = torch.fft.rfft(x)[..., : (min(n, n_new) + 1) // 2]
    return torch.fft.irfft(spectrum, n=n_new) * (n_new / n)
