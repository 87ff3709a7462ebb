"""Kernels of the transform, each with its plain formula: here is what makes it fast, in `jtfs` what it means.

    cut                 Z[k] = X[first + k] psi[k]                   a band of a spectrum, weighted by a wavelet
    BlockFFT.synthesis  z[t] = sum_k e(k t / W) Z[k]                 e(a) = exp(2 pi i a); W samples
    BlockFFT.analysis   U[k] = 1 / W sum_t e(-k t / W) u[t]
    modulus             |z|
    averaged_modulus    |psi Y| phi                                  a matrix product on either side
    times               A x

A wavelet is band-limited, so a subsampled convolution keeps a short run of bins, which goes back to time at the low rate.
The run starts at bin 0 there instead of `first`: the signal is multiplied by a pure tone, harmless under a modulus.

A signal of W samples is held as R = W / M rows of M samples; row r holds samples r, r + R, r + 2 R, ... One step of Cooley
and Tukey, with samples t = R m + r and bins k = k' + M q, splits its FFT into short ones that stay in a core's cache:

    synthesis   z[r, m] = sum_k' e(k' m / M) e(k' r / W) sum_q e(q r / R) Z[k' + M q]
    analysis    U[k' + M q] = 1 / W sum_r e(-q r / R) e(-k' r / W) sum_m e(-k' m / M) u[r, m]

The sums over m and k' are FFTs of length M, those over r and q matrix products, and only those q are computed that hold a
band. Nothing is left out, and on a CPU it is several times faster than FFTs of length W. Modulus and average do not depend on
the order of the samples.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**18  # complex numbers held at once by the innermost loops on a CPU: what fits in a core's cache
DEVICE_CHUNK = 2**27  # the same elsewhere, where it only bounds the memory
ROW = 2048  # samples of a row on a CPU; other devices take a signal whole


def chunk(like: Tensor) -> int:
    """Complex numbers held at once on that device."""
    return CHUNK if like.device.type == "cpu" else DEVICE_CHUNK


def constant(values: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A filter or table on that device, in the real dtype or the complex one beside it; may enter a graph later."""
    with torch.inference_mode(False):
        value = torch.from_numpy(np.ascontiguousarray(values))
        return value.to(device=device, dtype=dtype.to_complex() if value.is_complex() else dtype)


def without_autocast(function: Callable) -> Callable:
    """The function with torch.autocast off on the device of its last tensor: results keep the precision of the audio."""

    @functools.wraps(function)
    def computed(*args: Any) -> Any:
        kind = next(arg.device.type for arg in reversed(args) if isinstance(arg, Tensor))
        if not torch.amp.is_autocast_available(kind):
            return function(*args)
        with torch.autocast(kind, enabled=False):
            return function(*args)

    return computed


# ---- linear maps ----------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """A linear map and its adjoint, each the other's backward pass: differentiable any number of times."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, apply: Callable, adjoint: Callable, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.maps = apply, adjoint
        return apply(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        apply, adjoint = ctx.maps
        grad = _Linear.apply(adjoint, apply, *grads)
        return None, None, *(grad if isinstance(grad, tuple) else (grad,))


def linear(apply: Callable, adjoint: Callable, *x: Tensor) -> Any:
    """apply(*x), a tensor or a tuple; its gradient is adjoint(*gradients), the transpose for the product Re <a, b>."""
    return _Linear.apply(apply, adjoint, *x)


def times(A: Tensor, x: Tensor) -> Tensor:
    """A x, for a constant matrix A."""
    return linear(lambda x: A @ x, lambda grad: A.mH @ grad, x)


def _runs(first: int, psi: Tensor, N: int) -> Iterator[tuple[slice, slice, Tensor, bool]]:
    """Where bins `first` (it may be negative) and following of a real signal's N bins are in its half spectrum.

    Yields (place in the half, place in the run, psi there, mirrored), mirrored where the half has -k or N - k instead of k.
    """
    end, half = first + len(psi), N // 2 + 1
    for a, b, zero in ((first, min(end, 0), 0), (max(first, 0), min(end, half), None), (max(first, half), end, N)):
        if a < b:
            at = slice(a, b) if zero is None else slice(zero - b + 1, zero - a + 1)
            yield at, slice(a - first, b - first), psi[a - first : b - first], zero is not None


def cut(pieces: Sequence[tuple], shapes: Sequence[tuple[int, ...]], N: int, *spectra: Tensor) -> tuple[Tensor, ...]:
    """Z_i[rows, k] = X_s[:, first + k] psi[k] for each piece (s, i, rows, first, psi), and 0 elsewhere.

    spectra: X, the half spectra (B, n1, bins) of real signals, of N bins in all. shapes: those of Z.
    """
    runs = [(s, i, rows, *run) for s, i, rows, first, psi in pieces for run in _runs(first, psi, N)]

    def apply(*X: Tensor) -> tuple[Tensor, ...]:
        Z = [X[0].new_zeros(shape) for shape in shapes]
        for s, i, rows, at, to, psi, mirrored in runs:
            x = X[s][..., at].flip(-1).conj() if mirrored else X[s][..., at]
            torch.mul(x, psi, out=Z[i][:, rows, to])
        return tuple(Z)

    def adjoint(*Z: Tensor) -> tuple[Tensor, ...]:
        X = [torch.zeros_like(x) for x in spectra]
        for s, i, rows, at, to, psi, mirrored in runs:
            if mirrored:
                X[s][..., at] += (Z[i][:, rows, to] * psi).flip(-1).conj()
            else:
                X[s][..., at].addcmul_(Z[i][:, rows, to], psi)
        return tuple(X)

    return linear(apply, adjoint, *spectra)


class BlockFFT:
    """Transforms of signals of `width` samples, a power of two from 2 on; the tables are on one device, in one precision."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.width = width
        self.M = min(width, ROW) if device.type == "cpu" else width
        self.R = width // self.M
        self.order = np.arange(width).reshape(self.M, self.R).T.ravel()  # the samples, as the rows hold them
        self._half = self.M // 2
        self._table = functools.partial(constant, device=device, dtype=dtype)
        turns = np.exp(2j * np.pi * np.arange(self.R)[:, None] * np.arange(self.M) / width)
        self._turn, self._unturn = self._table(turns), self._table(turns.conj())
        positive = turns[:, : self._half + 1] / width
        doubled = np.where(np.arange(self._half + 1) % self._half == 0, 1, 0.5)  # what an irfft counts twice
        self._unturn_half, self._turn_half = self._table(positive.conj()), self._table(positive * doubled)
        self._matrices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def whole_rows(self, n_bins: int) -> int:
        """The next multiple of M: so many bins `synthesis` takes."""
        return -(-n_bins // self.M) * self.M

    def _rows(self, q: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """e(q r / R) as a matrix (R, len(q)), and its adjoint; made once."""
        if q not in self._matrices:
            table = np.exp(2j * np.pi * np.arange(self.R)[:, None] * np.array(q) / self.R)
            self._matrices[q] = self._table(table), self._table(table.conj().T)
        return self._matrices[q]

    def synthesis(self, bands: Tensor) -> Tensor:
        """Bins 0 .. Q M - 1, complex (..., Q M), the others being 0 -> complex signals in rows (..., R, M)."""
        from_bands, to_bands = self._rows(tuple(range(bands.shape[-1] // self.M)))

        def apply(Z: Tensor) -> Tensor:
            Z = Z.unflatten(-1, (-1, self.M))
            if self.R > 1:
                Z = (from_bands @ Z).mul_(self._turn)
            return torch.fft.ifft(Z, norm="forward")

        def adjoint(grad: Tensor) -> Tensor:
            grad = torch.fft.fft(grad)
            if self.R > 1:
                grad = to_bands @ grad.mul_(self._unturn)
            return grad.flatten(-2)

        return linear(apply, adjoint, bands)

    def analysis(self, u: Tensor, n_bins: int) -> Tensor:
        """Real signals in rows (..., R, M) -> their bins 0 .. n_bins - 1, n_bins <= W / 2 + 1.

        Bins come in pieces of M / 2: those of q = 0, then the negative ones of q = -1 reversed, those of q = 1, and so on.
        """
        n_pieces = -(-n_bins // self._half)
        to_rows, from_rows = self._rows(tuple((p + 1) // 2 * (-1) ** p for p in range(n_pieces)))

        def apply(u: Tensor) -> Tensor:
            V = torch.fft.rfft(u).mul_(self._unturn_half)
            V = from_rows @ V if n_pieces > 1 else V.sum(dim=-2, keepdim=True)
            U = V.new_empty(*V.shape[:-1], self._half)
            U[..., 0::2, :] = V[..., 0::2, :-1]
            U[..., 1::2, :] = V[..., 1::2, 1:].flip(-1).conj()
            return U.flatten(-2)[..., :n_bins]

        def adjoint(grad: Tensor) -> Tensor:
            grad = torch.nn.functional.pad(grad, (0, n_pieces * self._half - n_bins)).unflatten(-1, (n_pieces, -1))
            V = grad.new_zeros(*grad.shape[:-1], self._half + 1)
            V[..., 0::2, :-1] = grad[..., 0::2, :]
            V[..., 1::2, 1:] = grad[..., 1::2, :].flip(-1).conj()
            V = (to_rows @ V).mul_(self._turn_half) if n_pieces > 1 else V * self._turn_half
            return torch.fft.irfft(V, n=self.M, norm="forward")

        return linear(apply, adjoint, u)


# ---- modulus --------------------------------------------------------------------------------------------------------


class _Modulus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        squares = torch.view_as_real(z).flatten(-2).square()
        r = (squares[..., 0::2] + squares[..., 1::2]).sqrt_()
        ctx.save_for_backward(z, r)
        return r

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # the derivative of this one stays small at 0
            return (grad / r.masked_fill(r < least(r), 1)).to(z.dtype) * z
        return (grad / r.clamp_min(least(r))).to(z.dtype).mul_(z)


def least(r: Tensor) -> float:
    """A modulus below this one is 0 by underflow, or as good as 0."""
    return math.sqrt(torch.finfo(r.dtype).tiny)


def modulus(z: Tensor) -> Tensor:
    """|z| with gradient 0 where z = 0; differentiable twice. Several times faster than torch.abs on complex numbers."""
    return _Modulus.apply(z)


def averaged_modulus(Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
    """|psi Y| phi in pieces, nothing of size M x W ever held: Y (B, n1, W), psi (M, n1), phi (W, frames) -> (B, M, frames).

    Y and psi are complex, phi is real. The backward pass computes each piece again.
    """
    return _AveragedModulus.apply(Y, psi, phi)


class _AveragedModulus(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        ctx.save_for_backward(Y, psi, phi)
        lanes = _Lanes(Y, psi, phi)
        S = phi.new_zeros(len(Y) * lanes.n, len(psi), phi.shape[1])
        for Y_part, S_part in zip(lanes.of(Y), S.split(lanes.at_once), strict=True):
            for time in lanes.times:
                S_part.baddbmm_(lanes.convolved(Y_part[..., time])[1], lanes.phi[:, time])
        return S.unflatten(0, (-1, lanes.n)).sum(dim=1)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        Y, psi, phi = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated itself: by the plain formula
            Y = Y if Y.requires_grad else Y.detach().requires_grad_()
            S = times(phi.mT, modulus(psi @ Y).mT).mT
            return *torch.autograd.grad(S, Y, grad, create_graph=True), None, None
        lanes, parts = _Lanes(Y, psi, phi), []
        grads = grad.repeat_interleave(lanes.n, dim=0).split(lanes.at_once)
        for Y_part, grad_part in zip(lanes.of(Y), grads, strict=True):
            parts.append(torch.empty_like(Y_part))
            for time in lanes.times:
                z, r = lanes.convolved(Y_part[..., time])
                torch.bmm(grad_part, lanes.phi[:, time].mT, out=lanes.grad).div_(r.clamp_min_(least(phi)))
                z.mul_(lanes.grad[:, None])
                parts[-1][..., time] = torch.bmm(lanes.psi.mT, z.flatten(1, 2))
        return lanes.joined(parts), None, None


def _items_apart(Y: Tensor) -> bool:
    """Whether one item is worked on after the other, in pieces for a cache."""
    return Y.device.type == "cpu"


class _Lanes:
    """How `averaged_modulus` cuts its work, and the buffers that all pieces share: fresh memory costs more than arithmetic.

    A lane is one of `n` parts of an item's time axis. On a CPU an item has one for each thread (of 3 for 2, of 6 for 4: a power of
    two), and the lanes of one item are worked on at once: batched products and elementwise functions then give each thread a
    lane of its own, which its cache holds. Elsewhere an item is one lane, and all items are worked on at once.

    Real and imaginary parts are kept in separate rows, so that everything is real arithmetic on contiguous memory.
    at_once: lanes worked on at once. times: slices of a lane. psi (at_once, 2 M, 2 n1) maps stacked real and imaginary parts to
    the same; phi (at_once, W / n, frames).
    """

    def __init__(self, Y: Tensor, psi: Tensor, phi: Tensor) -> None:
        apart, M, W = _items_apart(Y), len(psi), Y.shape[2]
        self.n = min(2 ** int(math.log2(torch.get_num_threads())), W) if apart else 1
        self.at_once, width = self.n if apart else len(Y), W // self.n
        step = min(width, max(64, 2 ** int(math.log2((CHUNK if apart else DEVICE_CHUNK / len(Y)) / M))))
        self.times = [slice(start, start + step) for start in range(0, width, step)]
        rows = torch.cat([torch.cat([psi.real, -psi.imag], dim=1), torch.cat([psi.imag, psi.real], dim=1)])
        self.psi = rows.expand(self.at_once, -1, -1)
        self.phi = phi.unflatten(0, (self.n, -1)).expand(self.at_once, -1, -1)
        self._z, self._r = (phi.new_empty(self.at_once, n, step) for n in (2 * M, M))
        self.grad = torch.empty_like(self._r)

    def of(self, Y: Tensor) -> Sequence[Tensor]:
        """(B, n1, W) complex -> real (at_once, 2 n1, W / n) several times, to be worked on one after the other."""
        parts = torch.view_as_real(Y).unflatten(2, (self.n, -1)).permute(0, 2, 4, 1, 3)
        return parts.flatten(2, 3).flatten(0, 1).split(self.at_once)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back from `of`."""
        rows = torch.cat(parts).unflatten(1, (2, -1)).unflatten(0, (-1, self.n))
        return torch.view_as_complex(rows.permute(0, 3, 1, 4, 2).flatten(2, 3).contiguous())

    def convolved(self, Y_part: Tensor) -> tuple[Tensor, Tensor]:
        """z = psi Y of a piece, (at_once, 2, M, step), and |z|, both in the shared buffers."""
        z = torch.bmm(self.psi, Y_part, out=self._z).unflatten(1, (2, -1))
        torch.mul(z[:, 0], z[:, 0], out=self._r).addcmul_(z[:, 1], z[:, 1]).sqrt_()
        return z, self._r
