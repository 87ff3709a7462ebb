"""Second-order Taylor coefficients ("jets") of a function of U parameters, carried forward through a computation.

A jet stacks the value f, its U first derivatives f_u, and its second derivatives f_uv for u <= v along dimension 1,
K = 1 + U + U (U + 1) / 2 in all. A linear map acts on each of them alike; `modulus` and `log1p` follow the chain rule,
`distance` ends in numbers. For few parameters and many outputs this is far cheaper than two backward passes.
"""

import torch
from torch import Tensor

from . import _fast
from .precision import in_full_precision


class Jets:
    """The layout for `n_params` parameters, and the functions that are not linear.

    `modulus` and `averaged_modulus` stand in for those of `_fast`: their batch holds jets item by item, (B K, ...).
    """

    def __init__(self, n_params: int) -> None:
        self.U = n_params
        self.pairs = [(u, v) for u in range(n_params) for v in range(u, n_params)]
        self.K = 1 + n_params + len(self.pairs)
        starts = [self.pairs.index((u, u)) for u in range(n_params)]
        self.rows = [(u, slice(start, start + n_params - u)) for u, start in enumerate(starts)]  # of (u, v), v >= u

    def modulus(self, z: Tensor) -> Tensor:
        """|z| of complex jets (B K, ...); where it underflows, 1 / |z| counts as 1, as in `_fast.modulus`."""
        value, tangents, seconds = self._split(z.unflatten(0, (-1, self.K)))
        r = value.abs()
        inverse = 1 / r.masked_fill(r < _fast.least(r), 1)
        out = r.new_empty(z.shape).unflatten(0, (-1, self.K))
        out[:, 0] = r
        r_u, r_uv = out[:, 1 : 1 + self.U], out[:, 1 + self.U :]
        torch.mul(_real_product(value[:, None], tangents), inverse[:, None], out=r_u)
        for u, row in self.rows:
            curved = _real_product(tangents[:, u, None], tangents[:, u:])
            curved += _real_product(value[:, None], seconds[:, row])
            torch.mul(curved - r_u[:, u, None] * r_u[:, u:], inverse[:, None], out=r_uv[:, row])
        return out.flatten(0, 1)

    @in_full_precision
    def averaged_modulus(self, Y: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        """|psi Y| phi in pieces of time: jets Y (B K, n1, W), psi (M, n1), phi (W, frames) -> (B K, M, frames)."""
        u = phi.new_zeros(len(Y), len(psi), phi.shape[1])
        step = max(64, _fast.chunk(Y) // (self.K * len(psi)))
        for Y_item, u_item in zip(Y.split(self.K), u.split(self.K), strict=True):
            for time in (slice(start, start + step) for start in range(0, len(phi), step)):
                u_item += self.modulus(psi @ Y_item[..., time]) @ phi[time]
        return u

    def log1p(self, s: Tensor, floor: float) -> Tensor:
        """log(1 + s / floor) of real jets (B, K, ...)."""
        value, tangents, seconds = self._split(s)
        inverse = 1 / (floor + value)
        first = tangents * inverse[:, None]
        second = [seconds[:, row] * inverse[:, None] - first[:, u, None] * first[:, u:] for u, row in self.rows]
        return torch.cat([torch.log1p(value / floor)[:, None], first, *second], dim=1)

    @in_full_precision
    def distance(self, difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L2 norm of real jets (B, K, ...): value (B,), gradient (B, U), Hessian (B, U, U); 0 where the value is 0."""
        value, tangents, seconds = self._split(difference.flatten(2))
        norm = value.norm(dim=1)
        inverse = torch.where(norm > 0, 1 / norm, 0)
        gradient = torch.einsum("bn,bun->bu", value, tangents) * inverse[:, None]
        hessian = torch.einsum("bun,bvn->buv", tangents, tangents)
        along = torch.einsum("bn,bkn->bk", value, seconds)
        for i, (u, v) in enumerate(self.pairs):
            hessian[:, u, v] += along[:, i]
            hessian[:, v, u] = hessian[:, u, v]
        hessian = (hessian - gradient[:, :, None] * gradient[:, None]) * inverse[:, None, None]
        return norm, gradient, hessian

    def _split(self, jet: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return jet[:, 0], jet[:, 1 : 1 + self.U], jet[:, 1 + self.U :]


def _real_product(a: Tensor, b: Tensor) -> Tensor:
    """Re(conj(a) b)."""
    return a.real * b.real + a.imag * b.imag
