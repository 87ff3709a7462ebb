"""Scattering of images, one path at a time (beyond the paper, which is about sound).

Definitions. x is an image reflected at its borders, * a circular convolution; psi_{j,l} is a Morlet wavelet of scale
2^j turned by l pi / L, phi a Gaussian low-pass of scale 2^J. With 0 <= j1 < j2 < J:

    U1[j1, l1]         = | x * psi_{j1,l1} |              kept at every 2^j1-th pixel
    U2[j1, l1, j2, l2] = | U1[j1, l1] * psi_{j2,l2} |     kept at every 2^j2-th
    S                  = U * phi                          kept at every 2^J-th, without the border

A path is (j1, l1) or (j1, l1, j2, l2): P = J L + L^2 J (J - 1) / 2 of them. Filters, border and coefficients are those
of kymatio's Scattering2D, whose channel 0, x * phi, is no path: path i of `paths` is its channel i + 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kymatio.scattering2d.filter_bank import filter_bank
from kymatio.scattering2d.utils import compute_padding
from torch import Tensor, nn

from ._fast import constant, modulus
from ._filters import once
from .checks import check_finite, check_index, check_tensor, positive_int


class Path2D(NamedTuple):
    """One path: scale and angle of its first wavelet and, of second order, of its second (None in the first order)."""

    j1: int
    l1: int
    j2: int | None = None
    l2: int | None = None


def _every(k: int, x_hat: Tensor) -> Tensor:
    """Spectrum of every k-th pixel both ways: (..., M, N) -> (..., M / k, N / k), the mean over aliases."""
    if k == 1:
        return x_hat
    return x_hat.unflatten(-1, (k, -1)).mean(dim=-2).unflatten(-2, (k, -1)).mean(dim=-3)


class Scattering2D(nn.Module):
    """Scattering transform of images with rotated Morlet wavelets, a `PathTransform` for `SCRAPLLoss(transform=...)`.

    Args:
        shape: (H, W) of the images, both above 2^J.
        J: scales: the largest wavelet spans about 2^J pixels, over which coefficients are averaged. L: angles.

    Attributes:
        paths: tuple of Path2D, those of first order and then those of second order, in kymatio's order.
        groups: "scale": paths of the same (j1, j2), at all angles. "wavelet": paths of the same (j1, l1), which share
            the first order.

    Input is (batch, channels, H, W), float32 or float64, on any device; each channel is transformed by itself.
    Coefficients are twice differentiable and keep the input's precision; filters are kymatio's, made in float32.

    >>> scattering = Scattering2D(shape=(32, 48), J=2, L=4)
    >>> scattering.n_paths, scattering.paths[9], scattering.path(torch.zeros(3, 1, 32, 48), 9).shape
    (24, Path2D(j1=0, l1=0, j2=1, l2=1), torch.Size([3, 1, 8, 12]))

    Raises TypeError or ValueError for parameters that are no positive integers, and a shape too small for J.
    """

    def __init__(self, shape: tuple[int, int], J: int, L: int = 8) -> None:
        super().__init__()
        if not isinstance(shape, tuple | list) or len(shape) != 2:
            raise TypeError(f"shape must be (H, W) of the images, and comes first (kymatio: J, shape), got {shape!r}")
        H, W = self.shape = positive_int("shape[0]", shape[0]), positive_int("shape[1]", shape[1])
        self.J, self.L = positive_int("J", J), positive_int("L", L)
        if min(H, W) <= 2**self.J:
            raise ValueError(f"J = {J} needs images of more than 2^{J} pixels both ways, got {H} x {W}; lower J")
        self.settings = {"transform": type(self).__name__, "shape": [H, W], "J": self.J, "L": self.L}
        M, N = compute_padding(H, W, self.J)
        self._pad = ((M - H) // 2, (M - H + 1) // 2), ((N - W) // 2, (N - W + 1) // 2)
        bank = filter_bank(M, N, self.J, self.L)
        self._psi, self._phi = [wavelet["levels"] for wavelet in bank["psi"]], bank["phi"]["levels"]
        first = [(j, angle) for j in range(self.J) for angle in range(self.L)]
        second = [(*one, *two) for one in first for two in first if one[0] < two[0]]
        self.paths = tuple(Path2D(*path) for path in first + second)
        self.n_paths = len(self.paths)
        self._cache: dict = {}  # see `once`

    @property
    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """Numbers of the paths that one draw may take together, by the name of the grouping."""
        kinds = {"scale": [(path.j1, path.j2) for path in self.paths], "wavelet": [path[:2] for path in self.paths]}
        return {
            name: [tuple(i for i, key in enumerate(keys) if key == one) for one in dict.fromkeys(keys)]
            for name, keys in kinds.items()
        }

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_cache": {}}

    def extra_repr(self) -> str:
        return f"shape={self.shape}, J={self.J}, L={self.L}"

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is a finite (batch, channels, H, W), float32 or float64.

        A picture (H, W) of bytes becomes picture[None, None] / 255.
        """
        check_tensor("x", x, ("batch", "channels", *self.shape))
        check_finite(x, "x", "image")

    @once
    def _wavelet(self, j: int, angle: int, stride: int, like: Tensor) -> Tensor:
        """Spectrum of psi_{j,l} for images that keep every 2^stride-th pixel."""
        return constant(self._psi[self.L * j + angle][stride], like)

    @once
    def _lowpass(self, stride: int, like: Tensor) -> Tensor:
        return constant(self._phi[stride], like)

    def _reflected(self, x: Tensor) -> Tensor:
        """The image with its borders: (..., H, W) -> (..., M, N). (The gradient of torch's padding varies on CUDA.)"""
        for dim, (before, after) in zip((-2, -1), self._pad, strict=True):
            n = x.shape[dim]
            left, right = x.narrow(dim, 1, before).flip(dim), x.narrow(dim, n - 1 - after, after).flip(dim)
            x = torch.cat([left, x, right], dim=dim)
        return x

    def _filtered(self, U_hat: Tensor, j: int, angle: int, stride: int) -> Tensor:
        """Spectrum of | u * psi_{j,l} | at every 2^j-th pixel, from that of u at every 2^stride-th."""
        like = U_hat.real
        z_hat = _every(2 ** (j - stride), U_hat * self._wavelet(j, angle, stride, like))
        return torch.fft.fft2(modulus(torch.fft.ifft2(z_hat)))

    def _averaged(self, U_hat: Tensor, stride: int) -> Tensor:
        S_hat = _every(2 ** (self.J - stride), U_hat * self._lowpass(stride, U_hat.real))
        return torch.fft.ifft2(S_hat).real[..., 1:-1, 1:-1]

    def path(self, x: Tensor, index: int) -> Tensor:
        """Coefficients of one path, (batch, channels, about H / 2^J, about W / 2^J). Raises as `check`; IndexError."""
        return self.path_group(x, [index])[:, 0]

    def path_group(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """Coefficients of several paths, (batch, paths, channels, ...), which share their first order."""
        self.check(x)
        wanted = [self.paths[check_index("path_idx", i, self.n_paths, "this transform has paths")] for i in indices]
        x_hat, U1, S = torch.fft.fft2(self._reflected(x)), {}, []
        for j1, l1, j2, l2 in wanted:
            if (j1, l1) not in U1:
                U1[j1, l1] = self._filtered(x_hat, j1, l1, 0)
            U_hat, stride = U1[j1, l1], j1
            if j2 is not None:
                U_hat, stride = self._filtered(U_hat, j2, l2, j1), j2
            S.append(self._averaged(U_hat, stride))
        return torch.stack(S, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """All paths: (batch, channels, H, W) -> (batch, P, channels, ...)."""
        return self.path_group(x, range(self.n_paths))
