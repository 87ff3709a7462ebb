"""FFTs of band-limited signals, split into many short ones that stay in a core's cache.

A signal of W samples is held as R = W / M rows of M samples; row r holds samples r, r + R, r + 2 R, ... One step of Cooley
and Tukey, with samples t = R m + r, bins k = k' + M q and e(a) = exp(2 pi i a):

    synthesis   z[r, m] = sum_k' e(k' m / M) e(k' r / W) sum_q e(q r / R) Z[k' + M q]
    analysis    U[k' + M q] = 1 / W sum_r e(-q r / R) e(-k' r / W) sum_m e(-k' m / M) u[r, m]

The sums over m and k' are FFTs of length M, those over r and q matrix products, and only those q are computed that hold a
band. Nothing is left out, and on a CPU it is several times faster than FFTs of length W, which leave the cache. A modulus in
between does not mind the order of the samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**18  # complex numbers held at once by the innermost loops on a CPU: what fits in a core's cache
DEVICE_CHUNK = 2**27  # the same elsewhere, where it only bounds the memory
ROW = 2048  # samples of a row on a CPU; other devices take a signal whole


class _Linear(torch.autograd.Function):
    """A linear map and its adjoint, each the other's backward pass: differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, apply: Callable, adjoint: Callable, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.maps = apply, adjoint
        return apply(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        apply, adjoint = ctx.maps
        grad = _Linear.apply(adjoint, apply, *grads)
        return None, None, *(grad if isinstance(grad, tuple) else (grad,))


def linear(apply: Callable, adjoint: Callable, *x: Tensor) -> Any:
    """apply(*x), a tensor or a tuple; its gradient is adjoint(*gradients), the transpose for the product Re <a, b>."""
    return _Linear.apply(apply, adjoint, *x)


class BlockFFT:
    """Transforms of signals of `width` samples, a power of two from 2 on; the tables are on one device, in one precision."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.M = min(width, ROW) if device.type == "cpu" else width
        self.R = width // self.M
        self.order = np.arange(width).reshape(self.M, self.R).T.ravel()  # the samples, as the rows hold them
        self._half = self.M // 2
        self._to = {"device": device, "dtype": dtype.to_complex()}
        r, k = np.arange(self.R)[:, None], np.arange(self.M)
        turns = np.exp(2j * np.pi * r * k / width)
        self._turn, self._unturn = self._table(turns), self._table(turns.conj())
        positive = turns[:, : self._half + 1] / width
        doubled = np.where(np.arange(self._half + 1) % self._half == 0, 1, 0.5)  # what an irfft counts twice
        self._unturn_half, self._turn_half = self._table(positive.conj()), self._table(positive * doubled)
        self._matrices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _table(self, values: np.ndarray) -> Tensor:
        with torch.inference_mode(False):  # it outlives the caller's mode
            return torch.as_tensor(np.ascontiguousarray(values)).to(**self._to)

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
        """Real signals in rows (..., R, M) -> their bins 0 .. n_bins - 1, n_bins <= W / 2 + 1, divided by W.

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


def least(r: Tensor) -> float:
    """A modulus below this one is 0 by underflow, or as good as 0."""
    return math.sqrt(torch.finfo(r.dtype).tiny)


def modulus(z: Tensor) -> Tensor:
    """Complex modulus of any shape, real output, gradient 0 at 0."""
    return _Modulus.apply(z)


def _averaged_modulus(Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
    """|psi Y| phi: complex Y (B, n1, W), complex psi (M, n1), real phi (W, frames) -> (B, M, frames)."""
    return modulus(psi @ Y) @ phi


class AveragedModulus(torch.autograd.Function):
    """`_averaged_modulus` in pieces that stay in the cache; nothing of size M x W is ever held.

    The backward pass recomputes each piece; a backward pass that is itself differentiated uses the plain formula.
    Real and imaginary parts are kept in separate rows, so that everything is real arithmetic on contiguous memory.
    """

    @staticmethod
    def forward(ctx: Any, Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        ctx.save_for_backward(Y, psi, phi)
        pieces = _Pieces(psi, phi, Y)
        S = phi.new_zeros(len(Y), pieces.lanes, len(psi), phi.shape[1])
        for Y_rows, S_lanes in zip(pieces.of_rows(torch.cat([Y.real, Y.imag], dim=1)), pieces.of_lanes(S), strict=True):
            for time in pieces.times:
                _, r = pieces.convolved(Y_rows, time)
                S_lanes.baddbmm_(r, pieces.phi[:, time])
        return S.sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        Y, psi, phi = ctx.saved_tensors
        if torch.is_grad_enabled():
            Y_again = Y if Y.requires_grad else Y.detach().requires_grad_()
            return (
                *torch.autograd.grad(_averaged_modulus(Y_again, psi, phi), Y_again, grad, create_graph=True),
                None,
                None,
            )
        pieces, rows = _Pieces(psi, phi, Y), torch.cat([Y.real, Y.imag], dim=1)
        out, to_rows = torch.empty_like(rows), pieces.psi.mT
        grads = pieces.of_lanes(grad[:, None].expand(-1, pieces.lanes, -1, -1))
        for Y_rows, out_rows, grad_lanes in zip(pieces.of_rows(rows), pieces.of_rows(out), grads, strict=True):
            for time in pieces.times:
                z, r = pieces.convolved(Y_rows, time)
                torch.bmm(grad_lanes, pieces.phi[:, time].mT, out=pieces.grad).div_(r.clamp_min_(least(phi)))
                z.mul_(pieces.grad[:, None])
                out_rows[..., time] = torch.bmm(to_rows, z.flatten(1, 2))
        return torch.complex(*out.chunk(2, dim=1)), None, None


def _items_apart(Y: Tensor) -> bool:
    """Whether one item is worked on after the other, in pieces for a cache."""
    return Y.device.type == "cpu"


class _Pieces:
    """How `AveragedModulus` cuts its work, and the buffers that all pieces share: fresh memory costs more than arithmetic.

    A lane is a part of the time axis on a CPU, one for each thread (of 3 for 2, of 6 for 4: lanes are a power of two): batched
    products and elementwise functions then give each thread a lane of its own, which its cache holds. Elsewhere the items are
    the lanes.

    lanes: time is cut into so many. times: slices of a lane. psi: (lanes or items, 2 M, 2 n1) real, which maps stacked
    real and imaginary parts to the same. phi: (lanes or items, W / lanes, frames).
    """

    def __init__(self, psi: Tensor, phi: Tensor, Y: Tensor) -> None:
        self.apart = _items_apart(Y)
        self.lanes = min(2 ** int(math.log2(torch.get_num_threads())), Y.shape[2]) if self.apart else 1
        side_by_side, n, width = self.lanes if self.apart else len(Y), len(psi), Y.shape[2] // self.lanes
        step = max(64, 2 ** int(math.log2((CHUNK if self.apart else DEVICE_CHUNK / len(Y)) / n)))
        self.times = [slice(start, min(start + step, width)) for start in range(0, width, step)]
        rows = torch.cat([torch.cat([psi.real, -psi.imag], dim=1), torch.cat([psi.imag, psi.real], dim=1)])
        self.psi = rows.expand(side_by_side, -1, -1)
        self.phi = phi.unflatten(0, (self.lanes, -1)).expand(side_by_side, -1, -1)
        step = min(step, width)
        self._z, self._r = phi.new_empty(side_by_side, 2 * n, step), phi.new_empty(side_by_side, n, step)
        self.grad = torch.empty_like(self._r)

    def of_rows(self, rows: Tensor) -> Sequence[Tensor]:
        """(B, rows, W) -> views (lanes or items, rows, W / lanes), to be worked on one after the other."""
        return self.of_lanes(rows.unflatten(-1, (self.lanes, -1)).movedim(2, 1))

    def of_lanes(self, x: Tensor) -> Sequence[Tensor]:
        """(B, lanes, ...) -> the same for what is laid out so already."""
        return x.unbind(0) if self.apart else [x[:, 0]]

    def convolved(self, Y_rows: Tensor, time: slice) -> tuple[Tensor, Tensor]:
        """z = psi Y of a piece, (lanes or items, 2, M, step), and |z|, both in the shared buffers."""
        z = torch.bmm(self.psi, Y_rows[..., time], out=self._z).unflatten(1, (2, -1))
        torch.mul(z[:, 0], z[:, 0], out=self._r).addcmul_(z[:, 1], z[:, 1]).sqrt_()
        return z, self._r
