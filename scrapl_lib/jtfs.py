"""Joint time-frequency scattering (JTFS), one path at a time or all at once (paper, section 2).

Definitions. x is a signal reflected at both ends to N samples, * a circular convolution over time, *_n1 one over
log-frequency; psi is a Morlet wavelet, phi a Gaussian low-pass.

    U1[n1, t]     = | x * psi_n1 |                    first order: Q1 wavelets per octave, n1 from high to low
    Y2[n2, n1, t] = U1[n1] * psi_n2                   bands of modulation rate: Q2 per octave, of the n1 with j1 < j2
    U2[n2, n_fr]  = | Y2[n2] *_n1 psi_n_fr |          n_fr: the low-pass, Q_fr per octave of spin +1, as many of -1
    S[n2, n_fr]   = U2[n2, n_fr] * phi_T *_n1 phi_F   averages over T samples and F bins (the low-pass is one over F)

A path is a pair (n2, n_fr): a modulation rate, a modulation scale along log-frequency and its spin. First-order paths
are the same of S1 = U1 * phi_T. What a filter of stride exponent j leaves is kept at every 2^min(j, log2 T)-th sample,
along log-frequency at every 2^min(j, log2 F)-th bin.

`reference.path_by_definition` computes this as it is written. Here a convolution keeps the run of bins that holds a
band, modulus and average are one step, and what is linear along log-frequency (a hundred bins) is a matrix.
Letters: B batch, W samples at a stride, M rows along log-frequency. Spectra are divided by their length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ._fast import BlockFFT, averaged_modulus, chunk, constant, cut, modulus, times
from ._filters import SIGMA0, Wavelet, circulant, fold, gauss_1d, morlet_1d, once, reach, support, wavelets
from .checks import check_audio, check_index, positive_int
from .jets import Jets

Span = int | str | None  # of an average: a number of samples or bins, "global", or the default
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


class JTFS(nn.Module):
    """Joint time-frequency scattering of mono signals.

    Args:
        shape: samples of the signals. J: the largest wavelet spans about 2^J of them.
        Q1, Q2: wavelets per octave of the first and second order.
        J_fr, Q_fr: octaves and wavelets per octave along log-frequency.
        T: samples the coefficients are averaged over (None: 2^J; "global": all of them).
        F: log-frequency bins (n1 steps) they are averaged over (None: 2^J_fr; "global": all of them).
            "global" is the mean over the padded axis, for every path; scrapl-loss 0.1.0 takes the sum of what it keeps
            (a constant factor for each path), and leaves the low-pass paths n_fr = 0 unaveraged.

    Attributes:
        paths: tuple of Path, the second-order ones in kymatio's order; `n_paths`, their number P; `settings` sets them.
        first_order_paths: number of first-order paths that the full transform has besides (one per n_fr of spin >= 0).

    Input is (batch, 1, shape), float32 or float64, on any device; coefficients keep its precision, also under
    torch.autocast. Filters are made in double precision, once per device and dtype; copies and pickles make their own.

    >>> jtfs = JTFS(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
    >>> jtfs.n_paths, jtfs.paths[8].spin, round(jtfs.paths[8].rate * 8000)  # the rate in Hz of 8 kHz audio
    (21, 1, 175)

    Raises TypeError or ValueError for parameters that are no positive integers, T > shape, wavelets that do not fit.
    """

    def __init__(
        self, shape: int, J: int, Q1: int, Q2: int, J_fr: int, Q_fr: int, T: Span = None, F: Span = None
    ) -> None:
        super().__init__()
        self.shape = positive_int("shape", shape)
        self.J, self.Q1, self.Q2 = positive_int("J", J), positive_int("Q1", Q1), positive_int("Q2", Q2)
        self.J_fr, self.Q_fr, self.T, self.F = positive_int("J_fr", J_fr), positive_int("Q_fr", Q_fr), T, F
        self._cache: dict = {}  # see `once`
        if self.J >= self.shape.bit_length():
            raise ValueError(f"J = {J} needs signals of at least 2^{J} samples, shape is {shape}; lower J")
        self._build_time()
        self._build_frequency()
        self._build_paths()
        self.settings = {name: getattr(self, name) for name in ("shape", "J", "Q1", "Q2", "J_fr", "Q_fr")}
        spans = {"T": T or 2**self.J, "F": F or 2**self.J_fr}
        self.settings |= {name: span if isinstance(span, str) else int(span) for name, span in spans.items()}

    # ---- filters ------------------------------------------------------------------------------------------------

    @np.errstate(under="ignore")  # tails of Gaussians
    def _build_time(self) -> None:
        n, everything = self.shape, isinstance(self.T, str) and self.T == "global"
        T = 2**self.J if self.T is None or everything else positive_int("T", self.T, " (or None, or 'global')")
        if T > n:
            raise ValueError(f"T = {T} is longer than the signal of {n} samples; lower T or use T='global'")
        border = n if everything else 3 * reach(gauss_1d(n, SIGMA0 / T))
        self.N = 2 ** min(math.ceil(math.log2(n + 2 * border)), math.floor(math.log2(3 * n - 2)))
        left = (self.N - n) // 2
        self._pad = left, self.N - n - left
        self.log2_T = int(math.log2(self.N if everything else T))
        self.n_frames = self.N >> self.log2_T
        first, end = (-(-sample // 2**self.log2_T) for sample in (left, left + n))
        self._kept = slice(0 if everything else first, end)
        self._phi_hat = np.eye(1, self.N)[0] if everything else gauss_1d(self.N, SIGMA0 / T)
        self._psi1, self._psi2 = wavelets(self.J, self.Q1), wavelets(self.J, self.Q2)
        js = [w.j for w in self._psi1]  # equal ones are contiguous in n1
        self._groups = [(j, range(js.index(j), js.index(j) + js.count(j))) for j in sorted(set(js))]

    @np.errstate(under="ignore")
    def _build_frequency(self) -> None:
        n1, self.global_F = len(self._psi1), isinstance(self.F, str) and self.F == "global"
        if self.J_fr >= max(n1, 8).bit_length():
            raise ValueError(f"J_fr = {self.J_fr} spans 2^J_fr log-frequency bins, there are {n1} wavelets; lower J_fr")
        step, bins = 2**self.J_fr, (self.J + 1) * self.Q1
        F = step if self.F is None or self.global_F else positive_int("F", self.F, " (or None, or 'global')")
        if F > max(step, bins):
            raise ValueError(f"F = {F} is longer than {max(step, bins)} log-frequency bins; lower F or use F='global'")
        self.N_fr = (bins + 8 * min(F, step)) // step * step
        if self.N_fr < n1:
            raise ValueError(f"{n1} first-order wavelets do not fit {self.N_fr} bins; raise F or lower J_fr")
        self.log2_F = min(math.floor(math.log2(F)), self.J_fr)
        self._phi_fr_hat = np.eye(1, self.N_fr)[0] if self.global_F else gauss_1d(self.N_fr, SIGMA0 / F)
        up = wavelets(self.J_fr, self.Q_fr)
        self._psi_fr = [Wavelet(0.0, SIGMA0 / step, self.J_fr), *up, *(Wavelet(-w.xi, w.sigma, w.j) for w in up)]
        self.first_order_paths = 1 + len(up)

    def _build_paths(self) -> None:
        used = [n2 for n2, w2 in enumerate(self._psi2) if any(w1.j < w2.j for w1 in self._psi1)]
        pairs = [(n2, n_fr) for n2 in used for n_fr in range(len(self._psi_fr))]
        about = [(self._psi2[n2].xi, self._psi_fr[n_fr].xi) for n2, n_fr in pairs]  # cycles per sample, per n1
        paths = enumerate(zip(pairs, about, strict=True))
        self.paths = tuple(Path(i, *pair, xi2, abs(xi) * self.Q1, int(np.sign(xi))) for i, (pair, (xi2, xi)) in paths)
        self.n_paths = len(self.paths)
        if not self.paths:
            raise ValueError(f"J = {self.J}, Q1 = {self.Q1}, Q2 = {self.Q2} leave no second-order path; raise J")

    def paths_of(self, n2: int) -> list[Path]:
        """The paths that share the temporal wavelet n2, in order."""
        return [path for path in self.paths if path.n2 == n2]

    @property
    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """Numbers of the paths that share most of their work: "rate", those of each n2, from fast to slow."""
        return {"rate": [tuple(path.index for path in self.paths_of(n2)) for n2 in sorted({p.n2 for p in self.paths})]}

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is audio of that shape, see `check_audio`."""
        check_audio(x, "x", self.shape)

    def checked_path(self, index: int) -> Path:
        """The path of that index. Raises: TypeError, IndexError."""
        return self.paths[check_index("path_idx", index, self.n_paths, "this transform has paths")]

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_cache": {}}

    @once
    def _fft(self, width: int, like: Tensor) -> BlockFFT:
        return BlockFFT(width, like)

    @once
    def _band(self, wavelet: Wavelet, like: Tensor) -> tuple[int, Tensor]:
        """First bin (it may be negative) and values (complex, all real) of the run of bins that holds the wavelet.

        What lies outside is below a hundredth of the dtype's rounding error, or beyond the stride's Nyquist frequency.
        """
        first, psi = support(wavelet, self.N, self._width(wavelet.j), torch.finfo(like.dtype).eps / 100)
        return first, constant(psi + 0j, like)

    @once
    def _scale_filters(self, n_fr: int, n1: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """psi_n_fr and phi_F on n1 wavelets, as matrices (M, n1) complex and (log-frequency, M) real.

        Of the padded axis only the M rows are kept that the filter reaches from the n1 wavelets (to rounding errors of
        its peak, or 1e-10). The low-pass n_fr = 0 averages itself: its rows are only put in their places.
        """
        wavelet = self._psi_fr[n_fr]
        j = min(wavelet.j, self.log2_F)
        psi = circulant(morlet_1d(self.N_fr, wavelet.xi or None, wavelet.sigma), 2**j)[:, :n1]
        stride = len(psi) if self.global_F else 2 ** (self.log2_F - j)
        phi = circulant(fold(self._phi_fr_hat, len(psi)), stride).real
        if n_fr == 0 and not self.global_F:
            phi = np.eye(len(psi))
        reach = np.abs(psi).max(axis=1)
        kept = reach > max(1e-10, torch.finfo(like.dtype).eps) * reach.max()
        return constant(psi[kept], like), constant(phi[:, kept], like)

    @once
    def _phi_matrix(self, width: int, like: Tensor) -> Tensor:
        """phi_T as a real matrix (W, frames), for signals in rows (see `BlockFFT`)."""
        phi = circulant(fold(self._phi_hat, width), width // self.n_frames).real
        return constant(phi.T[self._fft(width, like).order], like)

    @once
    def _phi_spectrum(self, width: int, like: Tensor) -> Tensor:
        return constant(fold(self._phi_hat, width)[: width // 2 + 1], like)

    def _width(self, j: int) -> int:
        """Samples of a signal at the stride of exponent j, which never goes beyond the averaging scale."""
        return self.N >> min(j, self.log2_T)

    # ---- the transform, in the order of its definition ----------------------------------------------------------

    def _first_order(self, x: Tensor, n2s: Sequence[int], j_end: int, jets: Jets | None = None) -> list[Tensor]:
        """U1 = |x * psi_n1| as half spectra (B, n1, bins), one tensor for each stride exponent below j_end.

        They hold the bins that the average and the bands of `n2s` need. With `jets`, the batch holds jets, item by
        item. Chunks of items and wavelets follow each other, forwards and backwards, so that each stays in the cache.
        """
        size, together, (left, right) = chunk(x), jets.K if jets else 1, self._pad
        n_items = max(1, size // (self.N * together)) * together
        if len(x) > n_items:
            parts = [self._first_order(part, n2s, j_end, jets) for part in x.split(n_items)]
            return [torch.cat(spectra) for spectra in zip(*parts, strict=True)]
        x = torch.cat([x[..., 1 : left + 1].flip(-1), x, x[..., -right - 1 : -1].flip(-1)], dim=-1)
        # float64: else each bin has the error of the strongest, and a synthesizer's gradients are twice as far off
        x_hat = torch.fft.rfft(x.double(), norm="forward").to(x.dtype.to_complex())
        chunks, pieces, shapes = [], [], []
        for j, n1s in (group for group in self._groups if group[0] < j_end):
            width = self._width(j)
            fft, step = self._fft(width, x), max(1, size // (width * len(x)))
            for start in range(0, len(n1s), step):
                bands = [self._band(self._psi1[n1], x) for n1 in n1s[start : start + step]]
                pieces += [(0, len(chunks), slice(row, row + 1), *band) for row, band in enumerate(bands)]
                shapes.append((len(x), len(bands), fft.whole_rows(max(len(psi) for _, psi in bands))))
                chunks.append((j, fft))
        spectra: dict[int, list[Tensor]] = {}
        for (j, fft), band in zip(chunks, cut(pieces, shapes, self.N, x_hat), strict=True):
            u = (jets.modulus if jets else modulus)(fft.synthesis(band))
            spectra.setdefault(j, []).append(fft.analysis(u, self._n_bins(j, n2s, x)))
        return [torch.cat(parts, dim=1) for parts in spectra.values()]

    def _n_bins(self, j: int, n2s: Sequence[int], like: Tensor) -> int:
        """How many bins of a first-order signal of stride exponent j enter its average and the bands of `n2s`."""
        width = self._width(j)
        bands = [self._band(self._psi2[n2], like) for n2 in n2s if j < self._psi2[n2].j]
        ends = [max(1 - first, first + len(psi)) for first, psi in bands]
        return min(width // 2 + 1, max([self.n_frames + 1, *ends]))

    def _bands(self, spectra: list[Tensor], n2s: Sequence[int]) -> list[Tensor]:
        """Y2[n2] = U1 * psi_n2 of each n2: complex (B, n1, W), time in rows, up to a pure tone common to all n1."""
        like, ffts, pieces, shapes = spectra[0].real, [], [], []
        for i, n2 in enumerate(n2s):
            j2, (first, psi) = self._psi2[n2].j, self._band(self._psi2[n2], like)
            groups = [(g, slice(n1s.start, n1s.stop)) for g, (j1, n1s) in enumerate(self._groups) if j1 < j2]
            pieces += [(g, i, n1s, first, psi) for g, n1s in groups]
            ffts.append(self._fft(self._width(j2), like))
            shapes.append((len(like), groups[-1][1].stop, ffts[-1].whole_rows(len(psi))))
        return [fft.synthesis(Z).flatten(-2) for fft, Z in zip(ffts, cut(pieces, shapes, self.N, *spectra))]

    def coefficients(self, Y2: Tensor, paths: Sequence[Path], jets: Jets | None = None) -> list[Tensor]:
        """S = |Y2 *_n1 psi_n_fr| * phi_T *_n1 phi_F of `paths`, all of one n2: each (B, log-frequency, frames).

        Y2: (B, n1, W), their band from `first_order_and_bands`. All paths of an n2 at once cost less than one by one.
        """
        width, like = Y2.shape[-1], Y2.real
        psi_fr, phi_fr = zip(*(self._scale_filters(path.n_fr, Y2.shape[1], like) for path in paths), strict=True)
        psi = torch.cat(psi_fr)
        if width * self.n_frames <= MATRIX_LIMIT:
            average = jets.averaged_modulus if jets else averaged_modulus
            u = average(Y2, psi, self._phi_matrix(width, like))
        else:
            fft, absolute = self._fft(width, like), jets.modulus if jets else modulus
            rows = absolute(times(psi, Y2)).unflatten(-1, (fft.R, fft.M))
            u = self._average(fft.analysis(rows, min(width // 2, self.n_frames) + 1), width)
        return [times(phi, part) for phi, part in zip(phi_fr, u.split([*map(len, psi_fr)], dim=1), strict=True)]

    def _average(self, U: Tensor, width: int) -> Tensor:
        """u * phi_T of signals of that width, by their half spectra: (..., bins) -> (..., frames)."""
        n = min(width, 2 * self.n_frames)  # beyond, phi_T has died out
        u = torch.fft.irfft(U[..., : n // 2 + 1] * self._phi_spectrum(n, U.real), n=n, norm="forward")
        return u[..., :: n // self.n_frames]

    # ---- paths, one or all --------------------------------------------------------------------------------------

    def path(self, x: Tensor, index: int) -> Tensor:
        """Coefficients of one path: (batch, 1, shape) -> (batch, log-frequency, time), all padded frames kept.

        The paper's runs keep those of the reflected padding (`unpad` drops them). Raises as `check`; IndexError.
        """
        return self.path_group(x, [index])[:, 0]

    def path_group(self, x: Tensor, indices: Sequence[int], apart: bool = False) -> Tensor:
        """Coefficients of several paths as `path` gives them: (batch, paths, log-frequency, time); errors likewise.

        All paths of one rate (`groups`) cost little more than one of them; `apart`, some more, with the bits of `path`.
        """
        self.check(x)
        paths = [self.checked_path(index) for index in indices]
        found = dict(self._by_n2(x, paths, apart=apart))
        return torch.stack([found[path] for path in paths], dim=1)

    @torch.no_grad()
    def path_jets(self, x: Tensor, jets: Jets, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Coefficients of several paths with their derivatives in parameters that the signal depends on.

        x: jets of the signal (batch, K, shape). Yields, by n2, (path, jets of its coefficients (batch, K,
        log-frequency, time)). The first order is shared by all paths. Raises: as `path`.
        """
        paths = [self.checked_path(index) for index in indices]
        if x.ndim != 3 or x.shape[1] != jets.K:
            raise ValueError(f"x must be jets, (batch, {jets.K}, {self.shape}), got {tuple(x.shape)}")
        signals = x.flatten(0, 1)[:, None]
        self.check(signals)
        for path, S in self._by_n2(signals, paths, jets):
            yield path.index, S.unflatten(0, (-1, jets.K))

    def _by_n2(self, x: Tensor, paths: list[Path], jets: Jets | None = None, apart: bool = False) -> Iterator[tuple]:
        n2s = sorted({path.n2 for path in paths})
        spectra = self._first_order(x, n2s, max((self._psi2[n2].j for n2 in n2s), default=0), jets)
        for n2 in n2s:
            (Y2,) = self._bands(spectra, [n2])
            wanted = [path for path in paths if path.n2 == n2]
            for part in [[path] for path in wanted] if jets or apart else [wanted]:  # jets of one path are large
                yield from zip(part, self.coefficients(Y2, part, jets), strict=True)

    def first_order_and_bands(self, x: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        """What all paths share: (batch, 1, shape) -> first-order paths, {n2: Y2[n2]}.

        The first-order paths, one per n_fr of spin >= 0, are (batch, log-frequency, frames) with padded frames kept.
        Y2[n2] is complex (batch, n1, time), up to a pure tone common to all n1, its samples in the order of `BlockFFT`.
        """
        self.check(x)
        n2s = sorted({path.n2 for path in self.paths})
        spectra = self._first_order(x, n2s, self.J + 1)
        S1 = torch.cat([self._average(U, self._width(j)) for (j, _), U in zip(self._groups, spectra)], dim=1)
        filters = [self._scale_filters(n_fr, S1.shape[1], S1) for n_fr in range(self.first_order_paths)]
        first = [times(phi, modulus(times(psi, S1.to(psi.dtype)))) for psi, phi in filters]
        return first, dict(zip(n2s, self._bands(spectra, n2s), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """All coefficients: (batch, 1, shape) -> (batch, first-order paths + P, log-frequency, time), padding dropped.

        First-order paths come first, then the second order in the order of `paths`. Raises as `check` does.
        """
        first, bands = self.first_order_and_bands(x)
        second = [S for n2, Y2 in bands.items() for S in self.coefficients(Y2, self.paths_of(n2))]
        return self.unpad(torch.stack(first + second, dim=1))

    def unpad(self, coefficients: Tensor) -> Tensor:
        """Drop the frames (last axis) that come from the reflected padding."""
        return coefficients[..., self._kept]
