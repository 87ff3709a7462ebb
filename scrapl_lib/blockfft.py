"""FFTs of band-limited signals, split into many short ones that stay in a core's cache.

A signal of W samples is held as R = W / M rows of M samples; row r holds samples r, r + R, r + 2 R, ... One step of Cooley
and Tukey, with samples t = R m + r, bins k = k' + M q and e(a) = exp(2 pi i a):

    synthesis   z[r, m] = sum_k' e(k' m / M) e(k' r / W) sum_q e(q r / R) Z[k' + M q]
    analysis    U[k' + M q] = 1 / W sum_r e(-q r / R) e(-k' r / W) sum_m e(-k' m / M) u[r, m]

The sums over m and k' are FFTs of length M, those over r and q matrix products, and only those q are computed that hold a
band. Nothing is left out, and on a CPU it is several times faster than FFTs of length W, which leave the cache. A modulus in
between does not mind the order of the samples.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
