"""Filters of the transform: those of kymatio 0.3.0, and what becomes of them on a grid."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from kymatio.scattering1d.filter_bank import compute_params_filterbank, gauss_1d, morlet_1d

__all__ = ["Wavelet", "circulant", "fold", "gauss_1d", "morlet_1d", "once", "reach", "support", "wavelets"]

SIGMA0 = 0.1  # bandwidth of the low-pass filter of scale 1, cycles per sample
ALPHA = 5.0  # a filter is subsampled as far as xi + ALPHA sigma stays below Nyquist
R_PSI = math.sqrt(0.5)  # where neighbouring wavelets intersect


class Wavelet(NamedTuple):
    """Centre frequency and bandwidth of a Morlet wavelet, cycles per sample, and the exponent j of its stride 2^j."""

    xi: float
    sigma: float
    j: int


def wavelets(J: int, Q: int) -> list[Wavelet]:
    """Q wavelets per octave over J octaves, from high to low."""
    return [Wavelet(*w) for w in zip(*compute_params_filterbank(SIGMA0 / 2**J, Q, ALPHA, R_PSI), strict=True)]


def support(wavelet: Wavelet, N: int, longest: int, floor: float) -> tuple[int, np.ndarray]:
    """First bin (it may be negative) and values of the wavelet's spectrum on N bins where they are above `floor` of the
    peak, at most `longest` of them."""
    middle = round(wavelet.xi * N) - N // 2
    psi = np.roll(morlet_1d(N, wavelet.xi, wavelet.sigma), -middle)
    inside = np.flatnonzero(np.abs(psi) > floor * psi.max())
    first, end = max(inside[0], (N - longest) // 2), min(inside[-1] + 1, (N + longest) // 2)
    return int(first) + middle, psi[first:end]


def reach(h_hat: np.ndarray) -> int:
    """Samples beyond which 1e-3 or less of a low-pass filter's weight lies on one side; at most half its length."""
    beyond = np.abs(np.fft.ifft(h_hat))[: len(h_hat) // 2][::-1].cumsum()[::-1]
    small = np.flatnonzero(beyond <= 1e-3)
    return int(small[0]) + 1 if len(small) else len(h_hat) // 2


def fold(h_hat: np.ndarray, width: int) -> np.ndarray:
    """Spectrum of a filter for signals of `width` samples: its aliases added up."""
    return h_hat.reshape(-1, width).sum(axis=0)


def circulant(h_hat: np.ndarray, stride: int) -> np.ndarray:
    """Matrix (W / stride, W) of the circular convolution with the filter of spectrum h_hat, every stride-th output."""
    h, n = np.fft.ifft(h_hat), np.arange(len(h_hat))
    return h[(n[::stride, None] - n) % len(h)]


def once(make: Callable) -> Callable:
    """A method that makes filters: once for its arguments, with the device and dtype of the last, in `self._cache`."""

    @functools.wraps(make)
    def made(self: Any, *args: Any) -> Any:
        *what, like = args
        key = (make.__name__, *what, like.device, like.dtype)
        if key not in self._cache:
            with np.errstate(under="ignore"):  # tails of Gaussians
                self._cache[key] = make(self, *args)
        return self._cache[key]

    return made
