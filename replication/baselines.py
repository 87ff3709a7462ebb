"""The losses that SCRAPL is compared with: multi-scale spectra and embeddings of pretrained models."""

from __future__ import annotations

import difflib
import hashlib
import math
import pathlib
import sys
from collections.abc import Callable

import auraloss
import numpy as np
import torch
from scipy.signal.windows import flattop
from torch import Tensor, nn

from scrapl_lib.checks import check_pair

MSS_NAMES = ("mss_linear", "mss_log_linear", "mss_random", "mss_revisited")

_OCTAVE_FFT_SIZES = (64, 128, 256, 512, 1024, 2048)

_REVISITED_WINDOWS = (67, 127, 257, 509, 1021, 2053)

_REVISITED_HOPS = (33, 63, 128, 254, 510, 1026)

_RANDOM_MAX_FFT_SIZE = 32767

_MIN_SAMPLES = max(_REVISITED_WINDOWS) // 2 + 1  # the audio is reflected half a window beyond its ends


class MSSLoss(nn.Module):
    """Multi-scale spectral loss: distances of magnitude spectrograms at several resolutions.

    Args:
        name:
            "mss_linear": mean absolute difference of magnitudes, mean over the FFT sizes 64, 128, ..., 2048, with Hann
            windows of that size and a quarter of it as hop (auraloss).
            "mss_log_linear": the same plus that of log magnitudes.
            "mss_random": auraloss's RandomResolutionSTFTLoss: three resolutions drawn anew at every call from NumPy's global
            generator; save and restore np.random.get_state() to repeat or resume. FFT sizes stay below the audio's length.
            "mss_revisited": Schwaer and Mueller 2023: flat-top windows, log(1 + magnitude), L2 norm at each resolution,
            summed; mean over the batch.

    `loss(x_hat, x)` -> scalar. Only mss_random is not symmetric: it divides by the norm of x's spectrogram.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        if name in ("mss_linear", "mss_log_linear"):
            self._auraloss = auraloss.freq.MultiResolutionSTFTLoss(
                fft_sizes=_OCTAVE_FFT_SIZES,
                hop_sizes=tuple(n // 4 for n in _OCTAVE_FFT_SIZES),
                win_lengths=_OCTAVE_FFT_SIZES,
                w_sc=0.0,
                w_log_mag=float(name == "mss_log_linear"),
                w_lin_mag=1.0,
            )
        elif name == "mss_random":
            self._auraloss = auraloss.freq.RandomResolutionSTFTLoss(max_fft_size=_RANDOM_MAX_FFT_SIZE)
        elif name == "mss_revisited":
            for n in _REVISITED_WINDOWS:
                self.register_buffer(f"window_{n}", torch.from_numpy(flattop(n, sym=False)).float(), persistent=False)
        else:
            near = difflib.get_close_matches(str(name), MSS_NAMES, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"name must be one of {', '.join(MSS_NAMES)}, got {name!r}{hint}")

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x (batch, 1, samples), at least 1027 samples -> scalar. Raises as `check_pair` does."""
        check_pair(x_hat, x)
        if x.shape[2] < _MIN_SAMPLES:
            raise ValueError(f"{self.name} needs at least {_MIN_SAMPLES} samples, got {x.shape[2]}: use longer audio")
        if self.name == "mss_revisited":
            return self._revisited(x_hat, x)
        if self.name == "mss_random":
            self._auraloss.max_fft_size = min(_RANDOM_MAX_FFT_SIZE, x.shape[2] - 1)
        return self._auraloss(x_hat, x)

    def _revisited(self, x_hat: Tensor, x: Tensor) -> Tensor:
        distance = x.new_zeros(len(x))
        for n, hop in zip(_REVISITED_WINDOWS, _REVISITED_HOPS):
            window = getattr(self, f"window_{n}").to(x)
            log_hat, log_ref = (
                torch.log1p(torch.stft(y[:, 0], n, hop, window=window, return_complex=True).abs()) for y in (x_hat, x)
            )
            distance = distance + torch.linalg.vector_norm(log_hat - log_ref, dim=(1, 2))
        return distance.mean()


class WeightsUnavailable(RuntimeError):
    """A pretrained model cannot be loaded; the message says how to get it."""


_MS_CLAP_SOURCE = "Hugging Face microsoft/msclap (CLAP_weights_2023.pth) and gpt2"


def _load_ms_clap() -> nn.Module:
    from msclap import CLAP

    print(f"MS-CLAP: weights are downloaded at first use from {_MS_CLAP_SOURCE}", file=sys.stderr, flush=True)

    class AudioEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = CLAP(version="2023", use_cuda=False).clap.audio_encoder

        def forward(self, audio: Tensor) -> Tensor:
            return self.encoder(audio)[0]  # (batch, 1024); [1] would be class scores

    return AudioEncoder()


def _load_panns_wavegram_logmel() -> nn.Module:
    from panns_AT_inference.models import Wavegram_Logmel_Cnn14

    class AudioEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Wavegram_Logmel_Cnn14(
                sample_rate=32000, window_size=1024, hop_size=320, mel_bins=64, fmin=50, fmax=14000, classes_num=527
            )
            self.model.load_state_dict(_panns_checkpoint()["model"])

        def forward(self, audio: Tensor) -> Tensor:
            return self.model(audio)["embedding"]  # (batch, 2048)

    return AudioEncoder()


_PANNS_URL = "https://zenodo.org/records/3987831/files/Wavegram_Logmel_Cnn14_mAP%3D0.439.pth?download=1"

_PANNS_MD5 = "17fa9ab65af3c0eb5ffbc5f65552c4e1"  # as Zenodo publishes it


def panns_weights() -> pathlib.Path:
    """Where PANNs' weights are, or will be."""
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints" / "Wavegram_Logmel_Cnn14_mAP=0.439.pth"


def _panns_checkpoint() -> dict:
    path = panns_weights()
    if not path.exists():
        print(f"downloading PANNs' weights (MD5 {_PANNS_MD5}) from {_PANNS_URL} to {path}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_PANNS_URL, str(path))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    if md5 != _PANNS_MD5:
        raise ValueError(
            f"{path} has MD5 {md5}, expected {_PANNS_MD5}: delete it and download it again from {_PANNS_URL}"
        )
    # beside the weights it holds the sampler's state, arrays of integers; NumPy 1 and 2 have other names for what makes them
    make = np.zeros(0).__reduce__()[0]
    makers: list = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in (np.int32, np.int64, np.float32)]
    with torch.serialization.safe_globals([*makers, np.ndarray, np.dtype, bytes, *kinds]):
        return torch.load(path, map_location="cpu", weights_only=True)


# name: (sample rate in Hz, samples, loader, where the weights come from)
_EMBEDDINGS: dict[str, tuple[int, int, Callable[[], nn.Module], str]] = {
    "ms_clap": (44100, 7 * 44100, _load_ms_clap, _MS_CLAP_SOURCE),
    "panns_wavegram_logmel": (32000, 10 * 32000, _load_panns_wavegram_logmel, _PANNS_URL),
}


class EmbeddingLoss(nn.Module):
    """L2 distance of a pretrained model's embeddings, mean over the batch.

    The audio is resampled to the model's rate (in the frequency domain, so the audio counts as periodic), then repeated
    or cut to the model's length. Embeddings with a time axis are averaged over it. The model is frozen, always in
    eval mode, and differentiated through.

    Args:
        name: "ms_clap" (44100 Hz, 7 s) or "panns_wavegram_logmel" (32000 Hz, 10 s).
        sample_rate_hz: of the audio.
        embed: a module to use instead of the pretrained one, (batch, samples) -> (batch, dim) or (batch, time, dim).
    Raises:
        WeightsUnavailable: the optional package or the weights cannot be had. Both come with network access and
            `pip install ".[embeddings]"`.
    """

    def __init__(self, name: str, sample_rate_hz: int, embed: nn.Module | None = None) -> None:
        super().__init__()
        if name not in _EMBEDDINGS:
            raise ValueError(f"name must be one of {', '.join(_EMBEDDINGS)}, got {name!r}")
        self.name = name
        self.sample_rate_hz = sample_rate_hz
        self.model_rate_hz, self.model_samples, load, source = _EMBEDDINGS[name]
        if embed is None:
            try:
                embed = load()
            except Exception as error:  # third-party loaders fail in many ways: import, network, unpickling
                raise WeightsUnavailable(
                    f"{name} needs a pretrained model that could not be loaded ({type(error).__name__}: {error}). "
                    f"In an environment of its own, with network access: pip install '.[embeddings]'; the weights are then "
                    f"downloaded once from {source}"
                ) from error
        self.embed = embed.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> EmbeddingLoss:
        """Stays in eval mode: a random embedding would be no distance."""
        return super().train(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x (batch, 1, samples) -> scalar. Raises as `check_pair` does."""
        check_pair(x_hat, x)
        return torch.linalg.vector_norm(self._embedding(x_hat) - self._embedding(x), dim=1).mean()

    def _embedding(self, x: Tensor) -> Tensor:
        audio = resample(x[:, 0], self.sample_rate_hz, self.model_rate_hz)
        audio = audio.repeat(1, math.ceil(self.model_samples / audio.shape[1]))[:, : self.model_samples]
        embedding = self.embed(audio)
        return embedding.mean(dim=1) if embedding.ndim == 3 else embedding


def resample(x: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """x (..., samples) -> (..., samples * to_hz / from_hz, rounded): band-limited and periodic.

    Frequencies from the lower of the two Nyquist frequencies on are left out.
    """
    if from_hz == to_hz:
        return x
    n, n_new = x.shape[-1], round(x.shape[-1] * to_hz / from_hz)
    spectrum = torch.fft.rfft(x)[..., : (min(n, n_new) + 1) // 2]
    return torch.fft.irfft(spectrum, n=n_new) * (n_new / n)
