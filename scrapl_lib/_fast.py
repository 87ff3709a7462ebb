"""Kernels of the transform, each with its plain formula: `jtfs` says what they are for, this file makes them fast.

    cut                 Z[k] = X[first + k] psi[k]             a band of a spectrum, weighted by a wavelet
    BlockFFT.synthesis  z[t] = sum_k e(k t / W) Z[k]           W samples; e(a) = exp(2 pi i a)
    BlockFFT.analysis   U[k] = 1 / W sum_t e(-k t / W) u[t]
    modulus             |z|
    averaged_modulus    |psi Y| phi                            a matrix on either side
    times               A x

A band is moved to bin 0, which multiplies its signal by a pure tone: a modulus does not see it. A signal of W samples
is held as R = W / M rows, row r with the samples r, r + R, r + 2 R, ... With t = R m + r, k = k' + M q (Cooley, Tukey)

    synthesis   z[r, m] = sum_k' e(k' m / M) e(k' r / W) sum_q e(q r / R) Z[k' + M q]
    analysis    U[k' + M q] = 1 / W sum_r e(-q r / R) e(-k' r / W) sum_m e(-k' m / M) u[r, m]

The sums over m and k' are FFTs of length M, which stay in a core's cache; those over r and q are matrix products, only
of the q that hold a band. Modulus and average do not depend on the order of the samples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .precision import in_full_precision

CHUNK = 2**18  # complex numbers held at once by the innermost loops on a CPU: what fits in a core's cache
DEVICE_CHUNK = 2**27  # the same elsewhere, where it only bounds the memory
ROW = 2048  # samples of a row on a CPU; other devices take a signal whole


def chunk(like: Tensor) -> int:
    """Complex numbers held at once on that device."""
    return CHUNK if like.device.type == "cpu" else DEVICE_CHUNK


def constant(values: np.ndarray, like: Tensor) -> Tensor:
    """A filter or table on the device of the real tensor `like`, in its precision, real or complex as it is."""
    dtype = like.dtype.to_complex() if np.iscomplexobj(values) else like.dtype
    with torch.inference_mode(False):  # it may be part of a graph later
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=like.device, dtype=dtype)


# ---- linear maps ----------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """linear(apply, adjoint, *x) is apply(*x), a tensor or a tuple, with the gradient adjoint(*gradients).

    The adjoint is the transpose for the product Re <a, b>; each is the other's backward pass, any number of times.
    """

    @staticmethod
    @in_full_precision
    def forward(ctx: Any, apply: Callable, adjoint: Callable, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.maps = apply, adjoint
        return apply(*x)

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        grad = linear(*reversed(ctx.maps), *grads)
        return None, None, *(grad if isinstance(grad, tuple) else (grad,))


linear = _Linear.apply


def times(A: Tensor, x: Tensor) -> Tensor:
    """A x, for a constant matrix A."""
    return linear(lambda x: A @ x, lambda grad: A.mH @ grad, x)


def _runs(first: int, psi: Tensor, N: int) -> Iterator[tuple[slice, slice, Tensor, bool]]:
    """Where bins `first` (it may be negative) and following of a real signal's N bins are in its half spectrum.

    Yields (place in the half, place in the run, psi there, mirrored): mirrored, the half has -k or N - k instead of k.
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
    """Transforms of signals of `width` samples, a power of two from 2 on, on the device and in the dtype of `like`."""

    def __init__(self, width: int, like: Tensor) -> None:
        self.M = M = min(width, ROW) if like.device.type == "cpu" else width
        self.R = R = width // M
        self.order = np.arange(width).reshape(M, R).T.ravel()  # the samples, as the rows hold them
        turns = np.exp(2j * np.pi * np.arange(R)[:, None] * np.arange(M) / width)
        half = turns[:, : M // 2 + 1] / width
        doubled = np.where(np.arange(M // 2 + 1) % (M // 2) == 0, 1, 0.5)  # what an irfft counts twice
        tables = (turns, turns.conj(), half * doubled, half.conj())
        self._turn, self._unturn, self._turn_half, self._unturn_half = (constant(table, like) for table in tables)
        self._like, self._matrices = like.new_empty(0), {}

    def whole_rows(self, n_bins: int) -> int:
        """The next multiple of M: so many bins `synthesis` takes."""
        return -(-n_bins // self.M) * self.M

    def _rows(self, *q: int) -> Tensor:
        """e(q r / R) as a matrix (R, len(q)); made once."""
        if q not in self._matrices:
            table = np.exp(2j * np.pi * np.arange(self.R)[:, None] * np.array(q) / self.R)
            self._matrices[q] = constant(table, self._like)
        return self._matrices[q]

    def synthesis(self, bands: Tensor) -> Tensor:
        """Bins 0 .. Q M - 1, complex (..., Q M), the others being 0 -> complex signals in rows (..., R, M)."""
        Z = bands.unflatten(-1, (-1, self.M))
        if self.R > 1:
            Z = times(self._rows(*range(Z.shape[-2])), Z) * self._turn
        return torch.fft.ifft(Z, norm="forward")

    def analysis(self, u: Tensor, n_bins: int) -> Tensor:
        """Real signals in rows (..., R, M) -> their bins 0 .. n_bins - 1, n_bins <= W / 2 + 1.

        Bins come in pieces of M / 2: those of q = 0, the negative ones of q = -1 reversed, those of q = 1, and so on.
        """
        half = self.M // 2
        q = [(piece + 1) // 2 * (-1) ** piece for piece in range(-(-n_bins // half))]
        to_rows, from_rows = self._rows(*q), self._rows(*(-each for each in q)).mT

        def apply(u: Tensor) -> Tensor:
            V = torch.fft.rfft(u).mul_(self._unturn_half)
            V = from_rows @ V if len(q) > 1 else V.sum(dim=-2, keepdim=True)
            U = V.new_empty(*V.shape[:-1], half)
            U[..., 0::2, :] = V[..., 0::2, :-1]
            U[..., 1::2, :] = V[..., 1::2, 1:].flip(-1).conj()
            return U.flatten(-2)[..., :n_bins]

        def adjoint(grad: Tensor) -> Tensor:
            U = torch.nn.functional.pad(grad, (0, len(q) * half - n_bins)).unflatten(-1, (-1, half))
            V = U.new_zeros(*U.shape[:-1], half + 1)
            V[..., 0::2, :-1] = U[..., 0::2, :]
            V[..., 1::2, 1:] = U[..., 1::2, :].flip(-1).conj()
            V = (to_rows @ V).mul_(self._turn_half) if len(q) > 1 else V * self._turn_half
            return torch.fft.irfft(V, n=self.M, norm="forward")

        return linear(apply, adjoint, u)


# ---- modulus --------------------------------------------------------------------------------------------------------


def least(r: Tensor) -> float:
    """A modulus below this one is 0 by underflow, or as good as 0."""
    return math.sqrt(torch.finfo(r.dtype).tiny)


class _Modulus(torch.autograd.Function):
    """|z| with gradient 0 where z = 0; differentiable twice. Several times faster than torch.abs on complex numbers."""

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


modulus = _Modulus.apply


class _AveragedModulus(torch.autograd.Function):
    """|psi Y| phi: complex Y (B, n1, W), complex psi (M, n1), real phi (W, frames) -> (B, M, frames).

    It works in pieces, nothing of size M x W is ever held. The backward pass computes each piece again.
    """

    @staticmethod
    @in_full_precision
    def forward(ctx: Any, Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        ctx.save_for_backward(Y, psi, phi)
        lanes = _Lanes(Y, psi, phi)
        S = phi.new_zeros(len(Y) * lanes.n, len(psi), phi.shape[1])
        for Y_part, S_part in lanes.parts(lanes.rows(Y), S):
            for time in lanes.times:
                S_part.baddbmm_(lanes.convolved(Y_part[..., time])[1], lanes.phi[:, time])
        return S.unflatten(0, (-1, lanes.n)).sum(dim=1)

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        Y, psi, phi = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated itself: by the plain formula
            Y = Y if Y.requires_grad else Y.detach().requires_grad_()
            S = times(phi.mT, modulus(times(psi, Y)).mT).mT
            return *torch.autograd.grad(S, Y, grad, create_graph=True), None, None
        lanes = _Lanes(Y, psi, phi)
        rows = lanes.rows(Y)
        out = torch.empty_like(rows)
        for Y_part, out_part, grad_part in lanes.parts(rows, out, grad.repeat_interleave(lanes.n, dim=0)):
            for time in lanes.times:
                z, r = lanes.convolved(Y_part[..., time])
                torch.bmm(grad_part, lanes.phi[:, time].mT, out=lanes.grad).div_(r.clamp_min_(least(phi)))
                z.mul_(lanes.grad[:, None])
                out_part[..., time] = torch.bmm(lanes.psi.mT, z.flatten(1, 2))
        out = out.unflatten(1, (2, -1)).unflatten(0, (-1, lanes.n)).permute(0, 3, 1, 4, 2)
        return torch.view_as_complex(out.flatten(2, 3).contiguous()), None, None


averaged_modulus = _AveragedModulus.apply


def _items_apart(Y: Tensor) -> bool:
    """Whether one item is worked on after the other, in pieces for a cache."""
    return Y.device.type == "cpu"


class _Lanes:
    """How `averaged_modulus` cuts its work, and buffers that all pieces share: fresh memory costs more than arithmetic.

    A lane is one of `n` parts of an item's time axis. On a CPU an item has one for each thread (a power of two: 2 of 3,
    4 of 6), and the lanes of one item are worked on at once: batched products and elementwise functions then give each
    thread a lane of its own, which its cache holds. Elsewhere an item is one lane, and all items are worked on at once.

    Everything is real arithmetic: psi (lanes at once, 2 M, 2 n1) maps stacked real and imaginary parts to the same.
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
        self._z, self._r, self.grad = (phi.new_empty(self.at_once, n, step) for n in (2 * M, M, M))

    def rows(self, Y: Tensor) -> Tensor:
        """(B, n1, W) complex -> (B n, 2 n1, W / n) real."""
        rows = torch.view_as_real(Y.resolve_conj()).unflatten(2, (self.n, -1)).permute(0, 2, 4, 1, 3)
        return rows.flatten(2, 3).flatten(0, 1)

    def parts(self, *of_lanes: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What is worked on one after the other, of tensors (B n, ...)."""
        return zip(*(x.split(self.at_once) for x in of_lanes), strict=True)

    def convolved(self, Y_part: Tensor) -> tuple[Tensor, Tensor]:
        """z = psi Y of a piece, (lanes at once, 2, M, step), and |z|, both in the shared buffers."""
        z = torch.bmm(self.psi, Y_part, out=self._z).unflatten(1, (2, -1))
        torch.mul(z[:, 0], z[:, 0], out=self._r).addcmul_(z[:, 1], z[:, 1]).sqrt_()
        return z, self._r
