"""The method in its plainest form: slow, short, and what tests hold the fast code to."""

import numpy as np
import torch
from torch import Tensor

from .curvature import Encode, Synthesize

# ---- M_u as a dense matrix (equations 10 to 12) ---------------------------------------------------------------------


def dense_m(
    loss: torch.nn.Module, encode: Encode, synthesize: Synthesize, x: Tensor, params: list[Tensor], path: int, u: int
) -> Tensor:
    """M_u of one path as it is defined, (W, W), by automatic differentiation: for encoders of a few dozen weights.

    x: reference audio (N, 1, samples). encode: audio -> theta (N, U), smooth. synthesize: theta -> audio. params: the
    encoder's weights w, W numbers in all. loss: as in `theta_importance`.
    """

    def grad_w(value: Tensor, **graph: bool) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, params, materialize_grads=True, **graph)])

    theta = encode(x)
    L = loss(synthesize(theta), x, path_idx=path)
    (s,) = torch.autograd.grad(L, theta, create_graph=True)  # eq. 11: s_{n,u} = dL / dtheta_{n,u}
    field = 0.0
    for n in range(len(x)):
        J_nu = grad_w(theta[n, u], create_graph=True)
        field = field + s[n, u] * J_nu
    rows = []
    for component in field:  # eq. 12: M_u = d/dw sum_n s_{n,u} J_{n,u}
        rows.append(grad_w(component, retain_graph=True))
    return torch.stack(rows)


def dense_curvature(M: Tensor) -> float:
    """C = |largest eigenvalue| of a dense matrix."""
    return float(np.abs(np.linalg.eigvals(M.cpu().numpy())).max())


def dense_probabilities(C: Tensor) -> Tensor:
    """Equation 10: pi_p = 1/U sum_u C_{u,p} / sum_p' C_{u,p'}, (U, P) -> (P,)."""
    U, P = C.shape
    pi = torch.zeros(P, dtype=C.dtype, device=C.device)
    for u in range(U):
        pi += C[u] / C[u].sum() / U
    return pi
