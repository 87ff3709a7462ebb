"""Joint time-frequency scattering (JTFS): filters, paths and coefficients, one path at a time or all at once.

Kymatio's definition of the transform (paper, section 2 and appendix), built from the filter functions of kymatio 0.3.0:

    U1[n1, t]     = |x * psi_n1|(t)                  first order, Q1 wavelets per octave
    Y2[n2, n1, t] = U1[n1] * psi_n2 (t)              for the n1 whose stride exponent j1 < j2
    S[n2, n_fr]   = | Y2[n2] *_n1 psi_n_fr | * phi_T(t) * phi_F(n1)

A path is a pair (n2, n_fr): one temporal modulation rate, one modulation scale along log-frequency and its spin.

How it is computed. Every filter is band-limited, so a subsampled convolution keeps only a window of the spectrum: the
window is cut out, weighted and transformed back at the low rate. The window starts at a frequency of its own instead of
0, which multiplies the result by a pure tone: harmless under a modulus, and kept equal for all n1 of one n2. Along
log-frequency (a hundred or two samples) a convolution is one complex matrix product, averaging one real product.

Letters: B batch, N padded samples, W_j = N / 2^j samples at stride 2^j, N_fr padded log-frequency samples.
`c_hat` is a spectrum with norm="forward" (divided by its length), so that spectra are comparable at every stride.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from kymatio.scattering1d.filter_bank import (
    compute_params_filterbank,
    compute_temporal_support,
    gauss_1d,
    morlet_1d,
)
from kymatio.scattering1d.utils import compute_border_indices, compute_padding
from torch import Tensor, nn

from ._fast import CHUNK, DEVICE_CHUNK, AveragedModulus, BlockFFT, least, linear, modulus
from .checks import check_audio, positive_int
from .jets import Jets

SIGMA0 = 0.1  # bandwidth of the low-pass filter of scale 1, cycles per sample
ALPHA = 5.0  # a filter is subsampled as far as xi + ALPHA sigma stays below Nyquist
R_PSI = math.sqrt(0.5)  # where neighbouring wavelets intersect
MATRIX_LIMIT = 2**22  # largest time-averaging matrix; beyond it an FFT is faster


@dataclass(frozen=True)
class Path:
    """One scattering path (n2, n_fr).

    rate: centre frequency of psi_n2, cycles per sample (times the sample rate: Hz). scale: centre frequency along
    log-frequency, cycles per octave (0 for the low-pass). spin: +1, -1, or 0 for the low-pass.
    """

    index: int
    n2: int
    n_fr: int
    rate: float
    scale: float
    spin: int


@dataclass(frozen=True)
class _Wavelet:
    xi: float
    sigma: float
    j: int


def _wavelets(J: int, Q: int) -> list[_Wavelet]:
    xis, sigmas, js = compute_params_filterbank(SIGMA0 / 2**J, Q, ALPHA, R_PSI)
    return [_Wavelet(*w) for w in zip(xis, sigmas, js, strict=True)]


def _reflected(x: Tensor, left: int, right: int) -> Tensor:
    """x (..., samples) with so many reflected samples before and after it.

    Where determinism is asked for, by an index: on CUDA the gradient of PyTorch's padding sums in no fixed order.
    """
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return nn.functional.pad(x, (left, right), mode="reflect")
    return x.index_select(-1, _reflection(x.shape[-1], left, right, x.device))


def _reflection(n: int, left: int, right: int, device: torch.device) -> Tensor:
    """Of n samples, those that reflection padding puts in its left + n + right places."""
    return (n - 1) - ((n - 1) - torch.arange(-left, n + right, device=device).abs()).abs()


@lru_cache(maxsize=8)  # psi_n2 is folded for several strides in a row
def _morlet(N: int, xi: float, sigma: float) -> np.ndarray:
    return morlet_1d(N, xi, sigma)


def _fold(h_hat: np.ndarray, level: int) -> np.ndarray:
    """Spectrum of a filter for signals of stride 2^level: its aliases added up."""
    return h_hat.reshape(2**level, -1).sum(axis=0)


def _circulant(h_hat: np.ndarray, stride: int) -> np.ndarray:
    """Matrix (M / stride, M) of the circular convolution with the filter of spectrum h_hat (M), every stride-th output."""
    h = np.fft.ifft(h_hat)
    M = len(h)
    return h[(stride * np.arange(M // stride)[:, None] - np.arange(M)[None, :]) % M]


class JTFS(nn.Module):
    """Joint time-frequency scattering of mono signals.

    Args:
        shape: samples of the signals. J: the largest wavelet spans about 2^J samples. Q1, Q2: wavelets per octave of the
        first and second order. J_fr, Q_fr: octaves and wavelets per octave along log-frequency. T: samples the
        coefficients are averaged over (None: 2^J; "global": all of them). F: log-frequency bins (n1 steps) they are
        averaged over (None: 2^J_fr; "global": all of them). "global" is the plain mean over the padded axis, for every
        path; scrapl-loss 0.1.0 takes the sum of the samples it keeps (a constant factor for each path), and leaves the
        low-pass paths n_fr = 0 unaveraged.

    Attributes:
        paths: tuple of Path, the second-order paths in kymatio's order; `n_paths` their number P.
        first_order_paths: number of first-order paths that the full transform has besides (one per n_fr of spin >= 0).

    Input is (batch, 1, shape), float32 or float64, on any device. Filters are kept in double precision and cast once per
    device and dtype.

    >>> jtfs = JTFS(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
    >>> jtfs.n_paths, jtfs.paths[8].spin, round(jtfs.paths[8].rate * 8000)  # the rate in Hz of 8 kHz audio
    (21, 1, 175)

    Raises:
        TypeError, ValueError: parameters that are no positive integers, T > shape, wavelets that do not fit the signal.
    """

    def __init__(
        self,
        shape: int,
        J: int,
        Q1: int,
        Q2: int,
        J_fr: int,
        Q_fr: int,
        T: int | str | None = None,
        F: int | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = positive_int("shape", shape)
        self.J, self.Q1, self.Q2 = positive_int("J", J), positive_int("Q1", Q1), positive_int("Q2", Q2)
        self.J_fr, self.Q_fr = positive_int("J_fr", J_fr), positive_int("Q_fr", Q_fr)
        if self.J >= self.shape.bit_length():
            at_least = 2**self.J if self.J < 64 else f"2^{self.J}"
            raise ValueError(f"J = {J} needs signals of at least 2^J = {at_least} samples, shape is {shape}; lower J")
        self.T, self.F = T, F
        self._build_time()
        self._build_frequency()
        self._build_paths()
        self._cache: dict = {}
        self._starts: dict = {}

    # ---- construction -------------------------------------------------------------------------------------------

    def _build_time(self) -> None:
        n = self.shape
        self.global_T = isinstance(self.T, str) and self.T == "global"
        if self.global_T:
            T = 2 ** math.ceil(math.log2(n))
        else:
            T = 2**self.J if self.T is None else positive_int("T", self.T, " (or None, or 'global')")
            if T > n:
                raise ValueError(f"T = {T} is longer than the signal of {n} samples; lower T or use T='global'")
        border = (
            3 * compute_temporal_support(gauss_1d(n, SIGMA0 / T).reshape(1, -1), criterion_amplitude=1e-3)
            if not self.global_T
            else n
        )
        exponent = min(math.ceil(math.log2(n + 2 * border)), math.floor(math.log2(3 * n - 2)))
        self.N = 2**exponent
        self._pad = compute_padding(self.N, n)
        self.log2_T = math.floor(math.log2(T))
        starts, ends = compute_border_indices(self.log2_T, self.J, self._pad[0], self._pad[0] + n)
        self._kept = slice(0, 1) if self.global_T else slice(starts[self.log2_T], ends[self.log2_T])
        self._phi_hat = gauss_1d(self.N, SIGMA0 / T)
        self._psi1, self._psi2 = _wavelets(self.J, self.Q1), _wavelets(self.J, self.Q2)
        if not self._psi1 or not self._psi2:
            raise ValueError(f"J = {self.J} is too small for Q1 = {self.Q1}, Q2 = {self.Q2}: no wavelet; raise J")
        # first-order wavelets of one stride exponent are contiguous in n1: (stride exponent, first n1, end n1)
        js = [w.j for w in self._psi1]
        self._groups = [(j, js.index(j), js.index(j) + js.count(j)) for j in sorted(set(js))]

    def _build_frequency(self) -> None:
        self.global_F = isinstance(self.F, str) and self.F == "global"
        n1 = len(self._psi1)
        if self.J_fr >= max(n1, 8).bit_length():
            raise ValueError(f"J_fr = {self.J_fr} spans 2^J_fr log-frequency bins, there are {n1} wavelets; lower J_fr")
        step = 2**self.J_fr
        F = step if self.F is None or self.global_F else positive_int("F", self.F, " (or None, or 'global')")
        bins = (self.J + 1) * self.Q1
        if F > max(step, bins):
            raise ValueError(f"F = {F} is longer than {max(step, bins)} log-frequency bins; lower F or use F='global'")
        self.N_fr = (bins + 8 * min(F, step)) // step * step
        if self.N_fr < n1:
            raise ValueError(
                f"{n1} first-order wavelets do not fit {self.N_fr} log-frequency bins; raise F or lower J_fr"
            )
        self.log2_F = min(math.floor(math.log2(F)), self.J_fr)
        self._phi_fr_hat = gauss_1d(self.N_fr, SIGMA0 / F)
        positive = _wavelets(self.J_fr, self.Q_fr)
        lowpass = _Wavelet(0.0, SIGMA0 / step, self.J_fr)
        self._psi_fr = [lowpass, *positive, *(_Wavelet(-w.xi, w.sigma, w.j) for w in positive)]
        self.first_order_paths = 1 + len(positive)

    def _build_paths(self) -> None:
        self._n1_end = [sum(w1.j < w2.j for w1 in self._psi1) for w2 in self._psi2]
        keys = [(n2, n_fr) for n2, end in enumerate(self._n1_end) if end for n_fr in range(len(self._psi_fr))]
        self.paths = tuple(
            Path(
                i,
                n2,
                n_fr,
                self._psi2[n2].xi,
                abs(self._psi_fr[n_fr].xi) * self.Q1,
                int(np.sign(self._psi_fr[n_fr].xi)),
            )
            for i, (n2, n_fr) in enumerate(keys)
        )
        if not self.paths:
            raise ValueError(f"J = {self.J}, Q1 = {self.Q1}, Q2 = {self.Q2} leave no second-order path; raise J")

    @property
    def n_paths(self) -> int:
        """Number P of second-order paths."""
        return len(self.paths)

    def paths_of(self, n2: int) -> list[Path]:
        """The paths that share the temporal wavelet n2, in order."""
        return [path for path in self.paths if path.n2 == n2]

    # ---- filters on the device ----------------------------------------------------------------------------------

    def _get(self, key: tuple, like: Tensor, make: Callable[[], np.ndarray]) -> Tensor:
        """The constant called `key`, made once in double precision, cast once per device and dtype of `like`."""
        full_key = (*key, like.device, like.dtype)
        if full_key not in self._cache:
            with torch.inference_mode(False):  # it outlives the caller's mode, and may be part of a graph later
                value = torch.as_tensor(np.ascontiguousarray(make()))
                dtype = like.dtype.to_complex() if value.is_complex() else like.dtype
                self._cache[full_key] = value.to(device=like.device, dtype=dtype)
        return self._cache[full_key]

    def _stride(self, j: int) -> int:
        """Stride exponent at which a band of exponent j is kept: never beyond the averaging scale."""
        return j if self.global_T else min(j, self.log2_T)

    def _stride_fr(self, j: int) -> int:
        return j if self.global_F else min(j, self.log2_F)

    def _fft(self, stride: int, like: Tensor) -> BlockFFT:
        """The transforms of signals of stride exponent `stride`."""
        key = ("fft", stride, like.device, like.dtype)
        if key not in self._cache:
            self._cache[key] = BlockFFT(self.N >> stride, like.device, like.dtype)
        return self._cache[key]

    def _band(self, wavelet: _Wavelet, like: Tensor) -> tuple[int, Tensor]:
        """First bin (it may be negative) and values (complex, all real) of the run of bins that holds the wavelet: what lies
        outside is below a hundredth of the rounding error of `like`'s dtype, or beyond the stride's Nyquist frequency."""
        key = (wavelet, like.dtype)
        if key not in self._starts:
            psi = _morlet(self.N, wavelet.xi, wavelet.sigma)
            middle = round(wavelet.xi * self.N) - self.N // 2
            inside = np.flatnonzero(np.abs(np.roll(psi, -middle)) > torch.finfo(like.dtype).eps / 100 * psi.max())
            longest = self.N >> self._stride(wavelet.j)
            first = max(inside[0], (self.N - longest) // 2)
            self._starts[key] = first + middle, min(inside[-1] + 1, (self.N + longest) // 2) - first
        first, length = self._starts[key]
        return first, self._get(
            key, like, lambda: np.roll(_morlet(self.N, wavelet.xi, wavelet.sigma), -first)[:length] + 0j
        )

    def _phi_matrix(self, like: Tensor, stride: int) -> Tensor:
        """phi_T from a signal of N / 2^stride samples in rows (see `BlockFFT`) to frames, a real matrix."""
        n, step = self.N >> stride, 2 ** (self.log2_T - stride)

        def make() -> np.ndarray:
            if self.global_T:
                return np.full((n, 1), 1 / n)
            return _circulant(_fold(self._phi_hat, stride), step).real.T[self._fft(stride, like).order]

        return self._get(("phi", stride), like, make)

    def _fits_matrix(self, stride: int) -> bool:
        return self.global_T or (self.N >> stride) * (self.N >> self.log2_T) <= MATRIX_LIMIT

    def _n_average(self, stride: int) -> int:
        """Samples at which phi_T is applied to a spectrum: twice the frames, where it has died out, if there are as many."""
        return 2 if self.global_T else min(self.N >> stride, 2 * (self.N >> self.log2_T))

    def _average_of_spectrum(self, U: Tensor, stride: int) -> Tensor:
        """phi_T over signals given by their half spectra: (..., bins) -> (..., frames)."""
        if self.global_T:
            return U[..., :1].real
        n = self._n_average(stride)
        phi_hat = self._get(
            ("phi_hat", n), U.real, lambda: _fold(self._phi_hat, int(math.log2(self.N // n)))[: n // 2 + 1]
        )
        return torch.fft.irfft(U[..., : n // 2 + 1] * phi_hat, n=n, norm="forward")[
            ..., :: n // (self.N >> self.log2_T)
        ]

    # ---- the transform ------------------------------------------------------------------------------------------

    def _half_spectra(self, x: Tensor, n2s: Sequence[int], j_end: int, jets: Jets | None = None) -> list[Tensor]:
        """Spectra of U1, from bin 0 as far as the psi_n2 of `n2s` want them: (B, n1 of the group, bins) per stride group, for
        the groups of stride exponents below j_end. With `jets`, the batch holds them item by item.

        Forwards and backwards, one chunk of items and wavelets is done after the other, so that each stays in the cache.
        """
        # in float64, or each bin has an error as large as the strongest bins', and a synthesizer's gradients are almost twice as far off
        x_hat = torch.fft.fft(_reflected(x, *self._pad).double(), norm="forward")[:, 0].to(x.dtype.to_complex())
        chunk, together = CHUNK if x.device.type == "cpu" else DEVICE_CHUNK, jets.K if jets else 1
        groups, chunks = [], []
        for j, start, end in self._groups:
            if j >= j_end:
                break
            stride = self._stride(j)
            fft, width = self._fft(stride, x), self.N >> stride
            n_items = min(len(x), max(1, chunk // (width * together)) * together)
            n_wavelets = max(1, chunk // (width * n_items))
            items = [slice(item, item + n_items) for item in range(0, len(x), n_items)]
            wavelets = [range(n1, min(n1 + n_wavelets, end)) for n1 in range(start, end, n_wavelets)]
            groups.append((fft, self._n_bins(j, n2s, x), wavelets, items))
            for part in wavelets:
                bands = [self._band(self._psi1[n1], x) for n1 in part]
                n_bins = -(-max(len(psi) for _, psi in bands) // fft.M) * fft.M
                chunks += [(item, bands, n_bins) for item in items]
        under = max(0, *(-first for _, bands, _ in chunks for first, _ in bands))
        over = max(0, *(first + len(psi) - self.N for _, bands, _ in chunks for first, psi in bands))

        def cut(x_hat: Tensor) -> tuple[Tensor, ...]:
            x_hat, cuts = torch.cat([x_hat[:, self.N - under :], x_hat, x_hat[:, :over]], dim=-1), []
            for items, bands, n_bins in chunks:
                cuts.append(x_hat.new_zeros(len(x_hat[items]), len(bands), n_bins))
                for i, (first, psi) in enumerate(bands):
                    torch.mul(x_hat[items, under + first :][:, : len(psi)], psi, out=cuts[-1][:, i, : len(psi)])
            return tuple(cuts)

        def put_back(*cuts: Tensor) -> Tensor:
            x_hat = cuts[0].new_zeros(len(x), under + self.N + over)
            for cut, (items, bands, _) in zip(cuts, chunks, strict=True):
                for i, (first, psi) in enumerate(bands):
                    x_hat[items, under + first :][:, : len(psi)].addcmul_(cut[:, i, : len(psi)], psi)
            x_hat[:, under : under + over] += x_hat[:, under + self.N :]
            x_hat[:, self.N : self.N + under] += x_hat[:, :under]
            return x_hat[:, under : under + self.N]

        def absolute(z: Tensor) -> Tensor:
            return (
                modulus(z) if jets is None else jets.modulus(z.unflatten(0, (-1, jets.K)), least(z.real)).flatten(0, 1)
            )

        cuts = iter(linear(cut, put_back, x_hat))
        return [
            torch.cat(
                [
                    torch.cat([fft.analysis(absolute(fft.synthesis(next(cuts))), n_bins) for _ in items])
                    for _ in wavelets
                ],
                dim=1,
            )
            for fft, n_bins, wavelets, items in groups
        ]

    def _n_bins(self, j: int, n2s: Sequence[int], like: Tensor) -> int:
        """How many bins of the half spectrum of a first-order signal of stride exponent j enter its average and the bands of
        the psi_n2 of `n2s`."""
        n_bins = self._n_average(self._stride(j)) // 2 + 1
        for n2 in n2s:
            if j < self._psi2[n2].j:
                first, psi = self._band(self._psi2[n2], like)
                n_bins = max(n_bins, 1 - first, first + len(psi))
        return min((self.N >> self._stride(j)) // 2 + 1, n_bins)

    def _rate_bands(self, spectra: list[Tensor], n2s: Sequence[int]) -> list[Tensor]:
        """Y2[n2] of each n2 from the half spectra of U1: complex (B, n1_end, W) with time in rows, up to a pure tone common to
        all n1."""
        parts = []  # of each n2: transforms, first bin and values of psi_n2, bins of the rows, its groups
        for n2 in n2s:
            fft = self._fft(self._stride(self._psi2[n2].j), spectra[0].real)
            first, psi = self._band(self._psi2[n2], spectra[0].real)
            groups = [(slice(a, b), i) for i, (j1, a, b) in enumerate(self._groups) if j1 < self._psi2[n2].j]
            parts.append((fft, first, psi, -(-len(psi) // fft.M) * fft.M, groups))

        def cut(*spectra: Tensor) -> tuple[Tensor, ...]:
            bands = []
            for _, first, psi, n_bins, groups in parts:
                band = spectra[0].new_zeros(len(spectra[0]), groups[-1][0].stop, n_bins)
                negative = max(0, -first)
                for n1, i in groups:
                    band[:, n1, negative : len(psi)] = spectra[i][..., first + negative : first + len(psi)]
                    band[:, n1, :negative] = spectra[i][..., 1 : negative + 1].flip(-1).conj()
                band[..., : len(psi)] *= psi
                bands.append(band)
            return tuple(bands)

        def put_back(*bands: Tensor) -> tuple[Tensor, ...]:
            totals = [torch.zeros_like(half) for half in spectra]
            for band, (_, first, psi, _, groups) in zip(bands, parts, strict=True):
                band, negative = band[..., : len(psi)] * psi, max(0, -first)
                for n1, i in groups:
                    totals[i][..., first + negative : first + len(psi)] += band[:, n1, negative:]
                    totals[i][..., 1 : negative + 1] += band[:, n1, :negative].flip(-1).conj()
            return tuple(totals)

        bands = linear(cut, put_back, *spectra)
        return [part[0].synthesis(band).flatten(-2) for part, band in zip(parts, bands, strict=True)]

    def _scale_filter(self, like: Tensor, n_fr: int, n1: int) -> tuple[Tensor, Tensor]:
        """psi_n_fr and the averaging along log-frequency for n1 wavelets, as matrices (M, n1) complex and (frames, M) real.

        Of the padded axis only the M rows are kept that the filter reaches from the n1 wavelets (to rounding errors of its
        peak, or 1e-10). The low-pass path n_fr = 0 is averaged by its own filter: its rows are only put in their places.
        """
        wavelet = self._psi_fr[n_fr]
        stride = self._stride_fr(wavelet.j)

        def psi_rows() -> tuple[np.ndarray, np.ndarray]:
            psi = _circulant(_morlet(self.N_fr, wavelet.xi or None, wavelet.sigma), 2**stride)[:, :n1]
            reach = np.abs(psi).max(axis=1)
            return psi, reach > max(1e-10, torch.finfo(like.dtype).eps) * reach.max()

        def phi_columns() -> np.ndarray:
            kept = psi_rows()[1]
            if self.global_F:
                phi = np.full((1, len(kept)), 1 / len(kept))
            elif n_fr == 0:
                phi = np.eye(len(kept))
            else:
                phi = _circulant(_fold(self._phi_fr_hat, stride), 2 ** (self.log2_F - stride)).real
            return phi[:, kept]

        psi = self._get(("psi_fr", n_fr, n1), like, lambda: np.compress(*psi_rows()[::-1], axis=0))
        return psi, self._get(("phi_fr", n_fr, n1), like, phi_columns)

    def coefficients(self, Y2: Tensor, paths: Sequence[Path]) -> list[Tensor]:
        """S of `paths` of one n2, each (B, log-frequency, frames), from their band Y2[n2] (see `first_order_and_bands`)."""
        stride = self._stride(self._psi2[paths[0].n2].j)
        filters = [self._scale_filter(Y2.real, path.n_fr, Y2.shape[1]) for path in paths]
        psi = torch.cat([psi for psi, _ in filters])
        if self._fits_matrix(stride):
            u = AveragedModulus.apply(Y2, psi, self._phi_matrix(Y2.real, stride))
        else:
            fft = self._fft(stride, Y2.real)
            U = fft.analysis(modulus(psi @ Y2).unflatten(-1, (fft.R, fft.M)), self._n_average(stride) // 2 + 1)
            u = self._average_of_spectrum(U, stride)
        rows = u.split([len(psi) for psi, _ in filters], dim=1)
        return [phi @ part for part, (_, phi) in zip(rows, filters, strict=True)]

    def path(self, x: Tensor, index: int) -> Tensor:
        """Coefficients of one path: (batch, 1, shape) -> (batch, log-frequency, time), all padded frames kept.

        The paper's runs keep the frames of the reflected padding in SCRAPL's paths (`unpad` drops them).

        Raises: ValueError, TypeError for wrong audio; IndexError for a path outside 0 .. n_paths - 1.
        """
        check_audio(x, "x", self.shape)
        path = self.checked_path(index)
        spectra = self._half_spectra(x, [path.n2], self._psi2[path.n2].j)
        return self.coefficients(*self._rate_bands(spectra, [path.n2]), [path])[0]

    @torch.no_grad()
    def path_jets(self, x: Tensor, jets: Jets, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Coefficients of several paths with their derivatives in parameters that the signal depends on.

        x: jets of the signal (batch, K, shape). Yields (path, jets of its coefficients (batch, K, log-frequency, time)), by
        n2. The first order is shared by all paths.

        Raises: ValueError, TypeError for a wrong shape or values that are not finite; IndexError as in `path`.
        """
        paths = [self.checked_path(index) for index in indices]
        if x.ndim != 3 or x.shape[1] != jets.K:
            raise ValueError(
                f"x must be the jets of {jets.U} parameters, (batch, {jets.K}, {self.shape}), got {tuple(x.shape)}"
            )
        signals = x.flatten(0, 1)[:, None]
        check_audio(signals, "x", self.shape)
        n2s = sorted({path.n2 for path in paths})
        spectra = self._half_spectra(signals, n2s, max(self._psi2[n2].j for n2 in n2s), jets)
        for n2 in n2s:
            (Y2,) = self._rate_bands(spectra[: sum(j < self._psi2[n2].j for j, _, _ in self._groups)], [n2])
            stride = self._stride(self._psi2[n2].j)
            for path in (path for path in paths if path.n2 == n2):
                psi, phi = self._scale_filter(Y2.real, path.n_fr, Y2.shape[1])
                u = self._average_jets(Y2.unflatten(0, (-1, jets.K)), psi, stride, jets)
                yield path.index, phi @ u

    def _average_jets(self, Y: Tensor, psi: Tensor, stride: int, jets: Jets) -> Tensor:
        """|psi Y| averaged by phi_T: complex jets (B, K, n1, W) -> (B, K, M, frames)."""
        smallest = least(Y.real)
        if not self._fits_matrix(stride):
            fft = self._fft(stride, Y.real)
            rows = jets.modulus(psi @ Y, smallest).unflatten(-1, (fft.R, fft.M))
            return self._average_of_spectrum(fft.analysis(rows, self._n_average(stride) // 2 + 1), stride)
        phi = self._phi_matrix(Y.real, stride)
        u = Y.real.new_zeros(*Y.shape[:2], len(psi), phi.shape[1])
        width = max(64, CHUNK // (jets.K * len(psi)))
        for b in range(len(Y)):
            for start in range(0, Y.shape[-1], width):
                time = slice(start, start + width)
                u[b] += jets.modulus((psi @ Y[b, ..., time])[None], smallest)[0] @ phi[time]
        return u

    def checked_path(self, index: int) -> Path:
        """The path of that index. Raises: TypeError, IndexError."""
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"path_idx must be an integer, got {index!r}")
        if not 0 <= index < self.n_paths:
            raise IndexError(f"path_idx = {index} is out of range: this transform has paths 0 .. {self.n_paths - 1}")
        return self.paths[index]

    def unpad(self, coefficients: Tensor) -> Tensor:
        """Drop the frames (last axis) that come from the reflected padding."""
        return coefficients[..., self._kept]

    def first_order_and_bands(self, x: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        """What all paths share: (batch, 1, shape) -> first-order paths, {n2: Y2[n2]}.

        The first-order paths, one per n_fr of spin >= 0, are (batch, log-frequency, frames) with padded frames kept. Y2[n2]
        is complex (batch, n1, time), up to a pure tone common to all n1, its samples in the order of `BlockFFT`.
        """
        check_audio(x, "x", self.shape)
        n2s = [n2 for n2, end in enumerate(self._n1_end) if end]
        spectra = self._half_spectra(x, n2s, self.J + 1)
        pairs = zip(self._groups, spectra, strict=True)
        S1 = torch.cat([self._average_of_spectrum(U, self._stride(j)) for (j, _, _), U in pairs], dim=1)
        first = []
        for n_fr in range(self.first_order_paths):
            psi, phi = self._scale_filter(S1, n_fr, S1.shape[1])
            first.append(phi @ modulus(psi @ S1.to(psi.dtype)))
        return first, dict(zip(n2s, self._rate_bands(spectra, n2s), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """All coefficients: (batch, 1, shape) -> (batch, first-order paths + P, log-frequency, time), padding dropped.

        First-order paths come first, then the second order in the order of `paths`.

        Raises: ValueError, TypeError for wrong audio.
        """
        first, bands = self.first_order_and_bands(x)
        second = [S for n2, Y2 in bands.items() for S in self.coefficients(Y2, self.paths_of(n2))]
        return self.unpad(torch.stack(first + second, dim=1))
