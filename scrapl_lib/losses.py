"""Losses between a reconstruction x_hat and its reference x, both audio of shape (batch, 1, samples) (paper, section 4)."""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import auraloss
import numpy as np
import torch
from scipy.signal.windows import flattop
from torch import Tensor, nn

from .jets import Jets
from .jtfs import JTFS, check_audio


def check_pair(x_hat: Tensor, x: Tensor, n_samples: int | None = None) -> None:
    """Raise unless x_hat and x are audio (see `check_audio`) of one shape and dtype."""
    check_audio(x_hat, "x_hat", n_samples)
    check_audio(x, "x", n_samples)
    if x_hat.shape != x.shape:
        raise ValueError(f"x_hat and x must have one shape, got {tuple(x_hat.shape)} and {tuple(x.shape)}")
    if x_hat.dtype != x.dtype:
        raise TypeError(f"x_hat and x must have one dtype, got {x_hat.dtype} and {x.dtype}: convert one with x.to(...)")


def p_loss(theta_hat: Tensor, theta: Tensor) -> Tensor:
    """Mean squared error of each parameter, summed over parameters: the supervised upper bound.

    theta_hat, theta: (batch, n_params) in [0, 1] -> scalar.
    """
    if theta_hat.shape != theta.shape or theta.ndim != 2 or theta.numel() == 0:
        raise ValueError(
            f"theta_hat and theta must both have shape (batch, n_params), got {tuple(theta_hat.shape)} and "
            f"{tuple(theta.shape)}"
        )
    return ((theta_hat - theta) ** 2).mean(dim=0).sum()


LOG_FLOOR = 1e-3  # rho(S) = log(1 + S / LOG_FLOOR)


def _without_autocast(method: Callable) -> Callable:
    @functools.wraps(method)
    def computed(self: nn.Module, x_hat: Tensor, *args: object, **options: object) -> Tensor:
        with torch.autocast(x_hat.device.type if isinstance(x_hat, Tensor) else "cpu", enabled=False):
            return method(self, x_hat, *args, **options)

    return computed


class _ScatteringLoss(nn.Module):
    """What SCRAPLLoss and JTFSLoss share: the transform, and the distance of one path's coefficients.

    Under torch.autocast the audio's own precision is kept; call `backward()` outside of it, as PyTorch asks.
    """

    def __init__(self, shape: int = 32768, J: int = 12, Q1: int = 8, Q2: int = 2, J_fr: int = 3, Q_fr: int = 2,
                 T: int | str | None = None, F: int | str | None = None, log1p: bool = False) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(log1p, bool):
            raise TypeError(f"log1p must be True or False, got {log1p!r}")
        self.jtfs = JTFS(shape, J, Q1, Q2, J_fr, Q_fr, T, F)
        self.log1p = log1p

    @property
    def n_paths(self) -> int:
        """Number P of second-order paths."""
        return self.jtfs.n_paths

    def _distance(self, S_hat: Tensor, S: Tensor) -> Tensor:
        """L2 norm of the difference of two items' coefficients, after rho: (batch, ...) twice -> (batch,).

        Where they are equal, first and second derivatives are 0 (those of `vector_norm` would be 0 and NaN).
        """
        if self.log1p:
            S_hat, S = torch.log1p(S_hat / LOG_FLOOR), torch.log1p(S / LOG_FLOOR)
        difference = (S_hat - S).flatten(1)
        equal = (difference == 0).all(dim=1)
        return torch.linalg.vector_norm(difference.masked_fill(equal[:, None], 1), dim=1).masked_fill(equal, 0)


class SCRAPLLoss(_ScatteringLoss):
    """Distance of one scattering path, drawn anew at every call (paper, section 3; as run: section 4 of the appendix).

    The value is the batch mean of || rho(phi_p(x_hat)) - rho(phi_p(x)) ||_2 with p drawn from `probs`: with uniform
    `probs` its gradient is an unbiased estimate of the gradient of the mean over all paths (Proposition 3.1).

    Values and gradients are true ones, without the factor P of equation 3: gradients are of the order of 1e-9 for audio
    of unit norm. Adam's eps = 1e-8 would swallow them: multiply the loss by 1e8 before `backward()` (not with log1p).

    Args:
        shape, J, Q1, Q2, J_fr, Q_fr, T, F: see `JTFS`; the defaults are the paper's granular and chirplet configuration.
        log1p: compress coefficients, rho(S) = log(1 + S / 1e-3) (TR-808), instead of the identity.
        seed: of the draws. They come from a generator of the loss's own, on the CPU, whatever the device of the audio.
        unbiased: multiply a drawn path's distance by 1 / (P probs[path]). Value and gradient then estimate those of the mean
            over all paths whatever `probs` is, as long as none is 0; without it (the paper) they estimate those of the
            mean weighted by `probs`. A path asked for by `path_idx` is never weighted.

    Attributes:
        n_paths: number of paths P. path_idx: the path of the last call, None before the first. probs: float64 (P,).
        weight: what the last call multiplied the distance by, 1 unless unbiased.
        generator: the torch.Generator of the draws; its state and `path_idx` are in `state_dict()`.

    Raises:
        ValueError, TypeError: audio that is not (batch, 1, shape), unequal or non-finite; IndexError: no such path.
    """

    def __init__(self, shape: int = 32768, J: int = 12, Q1: int = 8, Q2: int = 2, J_fr: int = 3, Q_fr: int = 2,
                 T: int | str | None = None, F: int | str | None = None, log1p: bool = False, seed: int = 0,
                 unbiased: bool = False) -> None:  # fmt: skip
        super().__init__(shape, J, Q1, Q2, J_fr, Q_fr, T, F, log1p)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.unbiased, self.weight = unbiased, 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.path_idx: int | None = None
        self._probs = torch.full((self.n_paths,), 1 / self.n_paths, dtype=torch.float64)

    @property
    def probs(self) -> Tensor:
        """Probability of each path, float64 (P,), summing to 1: a copy. Assign any array of P numbers to change it."""
        return self._probs.clone()

    @probs.setter
    def probs(self, value: Tensor) -> None:
        try:
            probs = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"probs must be an array of {self.n_paths} numbers, got {value!r}") from error
        if probs.shape != (self.n_paths,):
            raise ValueError(
                f"probs must have one entry per path, shape ({self.n_paths},), got {tuple(probs.shape)}: "
                "were they computed for another transform?"
            )
        if not torch.isfinite(probs).all() or (probs < 0).any():
            wrong = torch.nonzero(~torch.isfinite(probs) | (probs < 0)).flatten().tolist()
            raise ValueError(f"probs must be finite and not negative, got {probs[wrong[0]].item()} for path {wrong[0]}")
        if abs(probs.sum().item() - 1) > 1e-6:
            raise ValueError(f"probs must sum to 1 within 1e-6, got {probs.sum().item():.9g}: divide them by their sum")
        self._probs = probs / probs.sum()

    def draw(self) -> int:
        """Draw a path from `probs`, remember it as `path_idx` and return it."""
        cumulative = torch.cumsum(self._probs, 0)
        u = torch.rand((), dtype=torch.float64, generator=self.generator)
        self.path_idx = min(int(torch.searchsorted(cumulative, u, right=True)), int(torch.nonzero(self._probs)[-1]))
        return self.path_idx

    @_without_autocast
    def forward(self, x_hat: Tensor, x: Tensor, path_idx: int | None = None, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> scalar. `path_idx` computes that path instead of a drawn one.

        S: `jtfs.path(x, path_idx)`, where it is known already (a reference that comes again).
        """
        check_pair(x_hat, x, self.jtfs.shape)
        self.weight = 1.0
        if path_idx is None:
            self.draw()
            if self.unbiased:
                self.weight = 1 / (self.n_paths * float(self._probs[self.path_idx]))
        else:
            self.path_idx = self.jtfs.checked_path(path_idx).index
        S_hat = self.jtfs.path(x_hat, self.path_idx)
        if S is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                S = self.jtfs.path(x, self.path_idx)
        elif path_idx is None or S.shape != S_hat.shape:
            raise ValueError(f"S must be jtfs.path(x, path_idx), of shape {tuple(S_hat.shape)} here, for a given path_idx; got "
                             f"{tuple(S.shape)} for path_idx {path_idx}")  # fmt: skip
        return self.weight * self._distance(S_hat, S).mean()

    def derivatives(self, x_hat: Tensor, x: Tensor, jets: Jets, paths: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First and second derivatives of paths' distances in U parameters that x_hat depends on, without a graph.

        x_hat: jets of the reconstructions (batch, K, shape), see `Jets`. x: (batch, 1, shape). Yields (path, gradient
        (batch, U), Hessian (batch, U, U)) of each item's own distance. Much cheaper than to differentiate `forward` twice,
        path by path. Errors as in `JTFS.path_jets`.
        """
        still = Jets(0)
        check_pair(x_hat[:, :1], x, self.jtfs.shape)
        ours, theirs = self.jtfs.path_jets(x_hat, jets, paths), self.jtfs.path_jets(x, still, paths)
        for (path, S_hat), (_, S) in zip(ours, theirs, strict=True):
            if self.log1p:
                S_hat, S = jets.log1p(S_hat, LOG_FLOOR), still.log1p(S, LOG_FLOOR)
            S_hat[:, 0] -= S[:, 0]
            yield path, *jets.distance(S_hat)[1:]

    def get_extra_state(self) -> dict:
        return {"generator": self.generator.get_state(), "path_idx": self.path_idx, "probs": self._probs}

    def set_extra_state(self, state: dict) -> None:
        if not isinstance(state, dict) or not {"generator", "path_idx", "probs"} <= set(state):
            raise ValueError(f"expected what get_extra_state() of a SCRAPLLoss returned, got {state!r:.80}")
        self.probs = state["probs"]
        self.generator.set_state(state["generator"])
        self.path_idx = state["path_idx"]


class JTFSLoss(_ScatteringLoss):
    """Full JTFS distance: mean over all first- and second-order paths of the L2 norm of the difference of coefficients.

    The first order is shared by all paths, and only averaged coefficients are kept for the backward pass, so that memory
    hardly grows with the number of paths. Frames of the reflected padding are dropped (section 10 of the paper's
    notes: SCRAPL's single paths keep them). Arguments, scale and errors as in `SCRAPLLoss`.
    """

    def forward(self, x_hat: Tensor, x: Tensor, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> scalar, the batch mean of `per_item`."""
        return self.per_item(x_hat, x, S).mean()

    @_without_autocast
    def per_item(self, x_hat: Tensor, x: Tensor, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> distance of each item (batch,).

        S: `jtfs(x)`, where it is known already (a reference that comes again).
        """
        check_pair(x_hat, x, self.jtfs.shape)
        if S is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                S = self.jtfs(x)
        S_hat = self.jtfs(x_hat)
        if S.shape != S_hat.shape:
            raise ValueError(f"S must be jtfs(x), of shape {tuple(S_hat.shape)}, got {tuple(S.shape)}")
        return self._distance(S_hat.flatten(0, 1), S.flatten(0, 1)).unflatten(0, S.shape[:2]).mean(dim=1)


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
