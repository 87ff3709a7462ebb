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
from collections.abc import Iterator, Sequence
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

SIGMA0 = 0.1  # bandwidth of the low-pass filter of scale 1, cycles per sample
ALPHA = 5.0  # a filter is subsampled as far as xi + ALPHA sigma stays below Nyquist
R_PSI = math.sqrt(0.5)  # where neighbouring wavelets intersect
CHUNK = 2**17  # complex numbers held at once by the innermost loop: what fits in a core's cache
MATRIX_LIMIT = 2**22  # largest time-averaging matrix; beyond it an FFT is faster


def check_audio(x: Tensor, name: str, n_samples: int | None = None) -> None:
    """Raise unless x is finite mono audio of shape (batch, 1, samples).

    On CUDA the values are not looked at (every step would wait for the device): NaN audio gives a NaN loss there.

    Args:
        x: the audio.
        name: what the error message calls it.
        n_samples: expected length, if any.
    Raises:
        TypeError: x is no float32 or float64 tensor.
        ValueError: another shape or length, nothing in it, or a value that is not finite.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a float32 or float64 tensor, got {got}: convert it with torch.as_tensor(...).float()"
        )
    if x.ndim != 3 or x.shape[1] != 1 or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape (batch, 1, samples), mono, got {tuple(x.shape)}: "
            "reshape it to that, mix several channels down with x.mean(1, keepdim=True)"
        )
    if n_samples is not None and x.shape[2] != n_samples:
        raise ValueError(
            f"{name} must have {n_samples} samples, got {x.shape[2]}: pad or crop it, or build for its length"
        )
    if x.device.type == "cpu" and not torch.isfinite(x).all():
        raise ValueError(
            f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite values: "
            "look for them where the audio is made"
        )


class _Modulus(torch.autograd.Function):
    """|z| with gradient 0 where z = 0; differentiable twice. Three times faster than torch.abs on complex numbers."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        parts = torch.view_as_real(z)
        r = parts[..., 0].square()
        r.addcmul_(parts[..., 1], parts[..., 1]).sqrt_()
        ctx.save_for_backward(z, r)
        return r

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, r = ctx.saved_tensors
        return z * (grad / r.masked_fill(r == 0, 1))


def modulus(z: Tensor) -> Tensor:
    """Complex modulus of any shape, real output, gradient 0 at 0."""
    return _Modulus.apply(z)


def _averaged_modulus(Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
    """|psi Y| phi: complex Y (B, n1, W), complex psi (M, n1), real phi (W, frames) -> (B, M, frames)."""
    return modulus(psi @ Y) @ phi


class _AveragedModulus(torch.autograd.Function):
    """`_averaged_modulus` in chunks of time that stay in the cache; nothing of size M x W is ever held.

    The backward pass recomputes each chunk; a backward pass that is itself differentiated uses the plain formula.
    Real and imaginary parts are kept in separate rows, so that everything is real arithmetic on contiguous memory.
    """

    @staticmethod
    def forward(ctx, Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        ctx.save_for_backward(Y, psi, phi)
        A, planar = _real_rows(psi), torch.cat([Y.real, Y.imag], dim=1)
        S = phi.new_zeros(Y.shape[0], psi.shape[0], phi.shape[1])
        for b, time in _chunks(Y, psi):
            z = (A @ planar[b, :, time]).view(2, len(psi), -1)
            S[b].addmm_(_modulus_of_rows(z), phi[time])
        return S

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        Y, psi, phi = ctx.saved_tensors
        if torch.is_grad_enabled():
            Y_again = Y if Y.requires_grad else Y.detach().requires_grad_()
            return *torch.autograd.grad(_averaged_modulus(Y_again, psi, phi), Y_again, grad, create_graph=True), None, None
        A, planar = _real_rows(psi), torch.cat([Y.real, Y.imag], dim=1)
        grad_planar = torch.empty_like(planar)
        A_T, phi_T = A.T.contiguous(), phi.T.contiguous()
        floor = math.sqrt(torch.finfo(phi.dtype).tiny)  # below it r is 0 by underflow, and so is z / floor
        for b, time in _chunks(Y, psi):
            z = (A @ planar[b, :, time]).view(2, len(psi), -1)
            z *= (grad[b] @ phi_T[:, time]).div_(_modulus_of_rows(z).clamp_min_(floor))
            grad_planar[b, :, time] = A_T @ z.view(2 * len(psi), -1)
        return torch.complex(*grad_planar.chunk(2, dim=1)), None, None


def _real_rows(psi: Tensor) -> Tensor:
    """Complex (M, n) -> real (2 M, 2 n) that maps stacked real and imaginary parts to the same."""
    return torch.cat([torch.cat([psi.real, -psi.imag], dim=1), torch.cat([psi.imag, psi.real], dim=1)])


def _modulus_of_rows(z: Tensor) -> Tensor:
    return z[0].square().addcmul_(z[1], z[1]).sqrt_()


def _chunks(Y: Tensor, psi: Tensor) -> Iterator[tuple[int, slice]]:
    """(item, slice of time) pieces of at most CHUNK numbers after the product with psi."""
    width = max(64, CHUNK // len(psi))
    for b in range(Y.shape[0]):
        for start in range(0, Y.shape[2], width):
            yield b, slice(start, start + width)


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


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _spectrum(u: Tensor) -> Tensor:
    return torch.fft.rfft(u, norm="forward")


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

    Raises:
        TypeError, ValueError: parameters that are no positive integers, T > shape, wavelets that do not fit the signal.
    """

    def __init__(self, shape: int, J: int, Q1: int, Q2: int, J_fr: int, Q_fr: int,
                 T: int | str | None = None, F: int | str | None = None) -> None:  # fmt: skip
        super().__init__()
        self.shape = _positive_int("shape", shape)
        self.J, self.Q1, self.Q2 = _positive_int("J", J), _positive_int("Q1", Q1), _positive_int("Q2", Q2)
        self.J_fr, self.Q_fr = _positive_int("J_fr", J_fr), _positive_int("Q_fr", Q_fr)
        if 2**self.J > self.shape:
            raise ValueError(f"J = {J} needs signals of at least 2^J = {2**self.J} samples, shape is {shape}; lower J")
        self.T, self.F = T, F
        self._build_time()
        self._build_frequency()
        self._build_paths()
        self._cache: dict = {}

    # ---- construction -------------------------------------------------------------------------------------------

    def _build_time(self) -> None:
        n = self.shape
        self.global_T = self.T == "global"
        if self.global_T:
            T = 2 ** math.ceil(math.log2(n))
        else:
            T = 2**self.J if self.T is None else _positive_int("T", self.T)
            if T > n:
                raise ValueError(f"T = {T} is longer than the signal of {n} samples; lower T or use T='global'")
        border = 3 * compute_temporal_support(gauss_1d(n, SIGMA0 / T).reshape(1, -1), criterion_amplitude=1e-3) \
            if not self.global_T else n
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
        step = 2**self.J_fr
        self.global_F = self.F == "global"
        n1 = len(self._psi1)
        F = step if self.F is None or self.global_F else _positive_int("F", self.F)
        bins = (self.J + 1) * self.Q1
        if F > max(step, bins):
            raise ValueError(f"F = {F} is longer than {max(step, bins)} log-frequency bins; lower F or use F='global'")
        self.N_fr = (bins + 8 * min(F, step)) // step * step
        if self.N_fr < n1:
            raise ValueError(f"{n1} first-order wavelets do not fit {self.N_fr} log-frequency bins; raise F or lower Q1")
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
            Path(i, n2, n_fr, self._psi2[n2].xi, abs(self._psi_fr[n_fr].xi) * self.Q1, int(np.sign(self._psi_fr[n_fr].xi)))
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

    def _get(self, key: tuple, like: Tensor, make) -> Tensor:
        """The constant called `key`, made once in double precision, cast once per device and dtype of `like`."""
        full_key = (*key, like.device, like.dtype)
        if full_key not in self._cache:
            value = torch.as_tensor(np.ascontiguousarray(make()))
            dtype = like.dtype.to_complex() if value.is_complex() else like.dtype
            self._cache[full_key] = value.to(device=like.device, dtype=dtype)
        return self._cache[full_key]

    def _stride(self, j: int) -> int:
        """Stride exponent at which a band of exponent j is kept: never beyond the averaging scale."""
        return j if self.global_T else min(j, self.log2_T)

    def _stride_fr(self, j: int) -> int:
        return j if self.global_F else min(j, self.log2_F)

    def _window(self, wavelets: list[_Wavelet], stride: int) -> int:
        """First bin of the window of N / 2^stride bins that holds the bands of all `wavelets`."""
        middle = (min(w.xi - 8 * w.sigma for w in wavelets) + max(w.xi + 8 * w.sigma for w in wavelets)) / 2
        width = self.N >> stride
        return 0 if stride == 0 else round(middle * self.N) - width // 2

    def _phi_matrix(self, like: Tensor, stride: int) -> Tensor:
        """phi_T from N / 2^stride samples to frames, a real matrix (N / 2^stride, frames)."""
        if self.global_T:
            n = self.N >> stride
            return self._get(("phi", stride), like, lambda: np.full((n, 1), 1 / n))
        step = 2 ** (self.log2_T - stride)
        return self._get(("phi", stride), like, lambda: _circulant(_fold(self._phi_hat, stride), step).real.T)

    def _fits_matrix(self, stride: int) -> bool:
        return self.global_T or (self.N >> stride) * (self.N >> self.log2_T) <= MATRIX_LIMIT

    def _time_average(self, u: Tensor, stride: int) -> Tensor:
        """phi_T over the last axis: (..., N / 2^stride) -> (..., frames)."""
        if self._fits_matrix(stride):
            return u @ self._phi_matrix(u, stride)
        phi_hat = self._get(("phi_hat", stride), u, lambda: _fold(self._phi_hat, stride)[: (self.N >> stride) // 2 + 1])
        averaged = torch.fft.irfft(torch.fft.rfft(u) * phi_hat, n=u.shape[-1])
        return averaged[..., :: 2 ** (self.log2_T - stride)]

    # ---- the transform ------------------------------------------------------------------------------------------

    def _scalogram(self, x: Tensor, j_end: int | None = None) -> list[Tensor]:
        """U1 of all wavelets with stride exponent below j_end: one tensor (B, n1 of the group, W) per stride group."""
        x = nn.functional.pad(x, self._pad, mode="reflect")
        x_hat = torch.fft.fft(x, norm="forward")
        groups = []
        for j, start, end in self._groups:
            if j_end is not None and j >= j_end:
                break
            stride = self._stride(j)
            wavelets = self._psi1[start:end]
            low, width = self._window(wavelets, stride), self.N >> stride
            bins = (low + np.arange(width)) % self.N
            psi = self._get(("psi1", j), x, lambda w=wavelets, b=bins: np.stack(
                [_morlet(self.N, v.xi, v.sigma)[b] for v in w]))  # fmt: skip
            if low < 0:
                window = torch.cat([x_hat[..., low:], x_hat[..., : low + width]], dim=-1)
            else:
                window = x_hat[..., low : low + width]
            groups.append(modulus(torch.fft.ifft(window * psi, norm="forward")))
        return groups

    def _rate_band(self, spectra: list[Tensor], n2: int) -> Tensor:
        """Y2[n2] from the half spectra of U1: complex (B, n1_end, W), up to a pure tone common to all n1."""
        wavelet = self._psi2[n2]
        stride2 = self._stride(wavelet.j)
        low, width = self._window([wavelet], stride2), self.N >> stride2
        bands = []
        for (j1, _, _), half in zip(self._groups, spectra, strict=False):
            if j1 >= wavelet.j:
                break
            stride1 = self._stride(j1)
            n = self.N >> stride1
            pieces = []
            if low < 0:
                pieces.append(half[..., 1 : 1 - low].conj().flip(-1))
            pieces.append(half[..., max(low, 0) : min(low + width, n // 2 + 1)])
            if low + width > n // 2 + 1:
                pieces.append(half[..., n - low - width + 1 : n - n // 2].conj().flip(-1))
            window = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
            psi = self._get(("psi2", n2, stride1), half.real, lambda s=stride1, n=n: _fold(
                _morlet(self.N, wavelet.xi, wavelet.sigma), s)[(low + np.arange(width)) % n])  # fmt: skip
            bands.append(window * psi)
        return torch.fft.ifft(torch.cat(bands, dim=-2), norm="forward")

    def _scale_filter(self, like: Tensor, n_fr: int, n1: int) -> tuple[Tensor, Tensor]:
        """psi_n_fr and the averaging along log-frequency for n1 wavelets, as matrices (M, n1) complex and (frames, M) real.

        Of the padded axis only the M rows are kept that the filter reaches from the n1 wavelets (to 1e-10 of its peak). The
        low-pass path n_fr = 0 is averaged by its own filter: its rows are only put in their places.
        """
        wavelet = self._psi_fr[n_fr]
        stride = self._stride_fr(wavelet.j)

        def psi_rows() -> tuple[np.ndarray, np.ndarray]:
            psi = _circulant(_morlet(self.N_fr, wavelet.xi or None, wavelet.sigma), 2**stride)[:, :n1]
            reach = np.abs(psi).max(axis=1)
            return psi, reach > 1e-10 * reach.max()

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
            u = _AveragedModulus.apply(Y2, psi, self._phi_matrix(Y2.real, stride))
        else:
            u = self._time_average(modulus(psi @ Y2), stride)
        rows = u.split([len(psi) for psi, _ in filters], dim=1)
        return [phi @ part for part, (_, phi) in zip(rows, filters, strict=True)]

    def path(self, x: Tensor, index: int) -> Tensor:
        """Coefficients of one path: (batch, 1, shape) -> (batch, log-frequency, time), all padded frames kept.

        The paper's runs keep the frames of the reflected padding in SCRAPL's paths (`unpad` drops them).

        Raises: ValueError, TypeError for wrong audio; IndexError for a path outside 0 .. n_paths - 1.
        """
        check_audio(x, "x", self.shape)
        path = self.checked_path(index)
        spectra = [_spectrum(u) for u in self._scalogram(x, self._psi2[path.n2].j)]
        return self.coefficients(self._rate_band(spectra, path.n2), [path])[0]

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
        is complex (batch, n1, time), up to a pure tone common to all n1.
        """
        check_audio(x, "x", self.shape)
        scalogram = self._scalogram(x)
        pairs = zip(self._groups, scalogram, strict=True)
        S1 = torch.cat([self._time_average(u, self._stride(j)) for (j, _, _), u in pairs], dim=1)
        first = []
        for n_fr in range(self.first_order_paths):
            psi, phi = self._scale_filter(S1, n_fr, S1.shape[1])
            first.append(phi @ modulus(psi @ S1.to(psi.dtype)))
        spectra = [_spectrum(u) for u in scalogram]
        return first, {n2: self._rate_band(spectra, n2) for n2, end in enumerate(self._n1_end) if end}

    def forward(self, x: Tensor) -> Tensor:
        """All coefficients: (batch, 1, shape) -> (batch, first-order paths + P, log-frequency, time), padding dropped.

        First-order paths come first, then the second order in the order of `paths`.

        Raises: ValueError, TypeError for wrong audio.
        """
        first, bands = self.first_order_and_bands(x)
        second = [S for n2, Y2 in bands.items() for S in self.coefficients(Y2, self.paths_of(n2))]
        return self.unpad(torch.stack(first + second, dim=1))
