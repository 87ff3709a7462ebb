"""The method in its plainest form, a page for each part: slow, with nothing in it but the definition.

Tests hold the library to these pages, and the notebooks show them beside the mathematics.
"""

import math

import numpy as np
import torch
from kymatio.scattering1d.filter_bank import compute_params_filterbank, compute_temporal_support, gauss_1d, morlet_1d
from torch import Tensor

from .curvature import Encode, Synthesize

# ---- joint time-frequency scattering --------------------------------------------------------------------------------


def wavelets(J: int, Q: int) -> list[tuple[float, float, int]]:
    """Centre frequency xi, bandwidth sigma, stride exponent j of each Morlet wavelet: Q per octave, over J octaves."""
    return list(zip(*compute_params_filterbank(0.1 / 2**J, Q, alpha=5.0, r_psi=math.sqrt(0.5)), strict=True))


def convolve(u: np.ndarray, h_hat: np.ndarray, stride: int) -> np.ndarray:
    """u * h (circular, along the last axis), every stride-th sample; aliases of h_hat add up to the length of u."""
    h_hat = h_hat.reshape(-1, u.shape[-1]).sum(axis=0)
    return np.fft.ifft(np.fft.fft(u) * h_hat)[..., ::stride]


@np.errstate(under="ignore")  # tails of Gaussians
def path_by_definition(
    x: np.ndarray,
    n2: int | None,
    n_fr: int,
    J: int,
    Q1: int,
    Q2: int,
    J_fr: int,
    Q_fr: int,
    T: int | str | None = None,
    F: int | str | None = None,
) -> np.ndarray:
    """Coefficients of one path of one sound: x (samples,) -> (log-frequency, time), frames of the padding kept.

        S[n2, n_fr] = | (|x * psi_n1| * psi_n2) *_n1 psi_n_fr | * phi_T *_n1 phi_F

    n2: second-order wavelet; None for the first-order path | (|x * psi_n1| * phi_T) *_n1 psi_n_fr | *_n1 phi_F.
    n_fr: wavelet along log-frequency: 0 is the low-pass, then come those of spin +1, then those of spin -1.
    The others are those of `JTFS`.
    """
    up = wavelets(J_fr, Q_fr)
    psi_fr = [(0, 0.1 / 2**J_fr, J_fr), *up, *((-xi, sigma, j) for xi, sigma, j in up)]
    xi_fr, sigma_fr, j_fr = psi_fr[n_fr]

    # scales of averaging, lengths of the padded axes
    n, mean_T, mean_F = len(x), T == "global", F == "global"
    T = 2**J if T is None or mean_T else T
    F = 2**J_fr if F is None or mean_F else F
    border = n if mean_T else 3 * compute_temporal_support(gauss_1d(n, 0.1 / T)[None], criterion_amplitude=1e-3)
    N = 2 ** min(math.ceil(math.log2(n + 2 * border)), math.floor(math.log2(3 * n - 2)))
    N_fr = ((J + 1) * Q1 + 8 * min(F, 2**J_fr)) // 2**J_fr * 2**J_fr
    step_T = N if mean_T else 2 ** math.floor(math.log2(T))
    step_F = 2 ** min(math.floor(math.log2(F)), J_fr)

    def average(u: np.ndarray, step: int) -> np.ndarray:
        """u * phi_T, where u has every step-th sample."""
        return u.mean(axis=-1, keepdims=True) if mean_T else convolve(u, gauss_1d(N, 0.1 / T), step_T // step).real

    left = (N - n) // 2
    x = np.pad(x, (left, N - n - left), mode="reflect")
    rows = []
    for xi_1, sigma_1, j_1 in wavelets(J, Q1):
        step_1 = min(2**j_1, step_T)
        U1 = np.abs(convolve(x, morlet_1d(N, xi_1, sigma_1), step_1))
        if n2 is None:
            rows.append(average(U1, step_1))
            continue
        xi_2, sigma_2, j_2 = wavelets(J, Q2)[n2]
        step_2 = min(2**j_2, step_T)
        if j_1 < j_2:
            rows.append(convolve(U1, morlet_1d(N, xi_2, sigma_2), step_2 // step_1))

    Y2 = np.pad(rows, ((0, N_fr - len(rows)), (0, 0)))
    step_fr = min(2**j_fr, step_F)
    U2 = np.abs(convolve(Y2.T, morlet_1d(N_fr, xi_fr or None, sigma_fr), step_fr)).T
    S = U2 if n2 is None else average(U2, step_2)
    if mean_F:
        return S.mean(axis=0, keepdims=True)
    if n_fr == 0:  # the low-pass psi_n_fr has averaged already
        return S
    return convolve(S.T, gauss_1d(N_fr, 0.1 / F), step_F // step_fr).real.T


# ---- P-Adam and P-SAGA ----------------------------------------------------------------------------------------------


def p_adam(w, gradient, draws, P, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """P-Adam (Algorithm 1, eq. 6 to 8): yields the weights after each step.

    w: the weights, an array. gradient(p, w): gradient of path p's loss at w. draws: the path of each step, in [0, P).
    """
    b1, b2 = betas
    m, v, tau = {}, {}, {}  # of the paths drawn so far
    for k, p in enumerate(draws, start=1):
        g = gradient(p, w)
        a = (k - tau.get(p, 0)) / P
        m[p] = b1**a * m.get(p, 0) + (1 - b1**a) * g  # eq. 6
        v[p] = b2**a * v.get(p, 0) + (1 - b2**a) * g * g  # eq. 7
        m_hat, v_hat = m[p] / (1 - b1 ** (k / P)), v[p] / (1 - b2 ** (k / P))
        tau[p] = k
        w = w - lr * weight_decay * w - lr * m_hat / (eps + v_hat**0.5)  # eq. 8
        yield w


def p_saga(w, gradient, draws, P, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """P-SAGA (Algorithm 1, eq. 6 to 9): yields the weights after each step. Arguments as in `p_adam`."""
    b1, b2 = betas
    m, v, tau, ghat, Gamma = {}, {}, {}, {}, set()  # ghat: the update that a path gave when it was drawn last
    for k, p in enumerate(draws, start=1):
        g = gradient(p, w)
        a = (k - tau.get(p, 0)) / P
        m[p] = b1**a * m.get(p, 0) + (1 - b1**a) * g  # eq. 6
        v[p] = b2**a * v.get(p, 0) + (1 - b2**a) * g * g  # eq. 7
        g_cur = m[p] / (1 - b1 ** (k / P)) / (eps + (v[p] / (1 - b2 ** (k / P))) ** 0.5)  # eq. 8
        tau[p] = k
        mean = sum(ghat[q] for q in Gamma) / max(1, len(Gamma))
        w = w - lr * weight_decay * w - lr * (g_cur - ghat.get(p, 0) + mean)  # eq. 9
        ghat[p] = g_cur
        Gamma.add(p)
        yield w


# ---- M_u as a dense matrix (equations 10 to 12) ---------------------------------------------------------------------


def dense_m(
    loss: torch.nn.Module, encode: Encode, synthesize: Synthesize, x: Tensor, params: list[Tensor], path: int, u: int
) -> Tensor:
    """M_u of one path as it is defined, (W, W), by automatic differentiation: for encoders of a few dozen weights.

    x: reference audio (N, 1, samples). encode: audio -> theta (N, U), smooth. synthesize: theta -> audio. params: the
    encoder's weights w, W numbers in all. loss: as in `theta_importance`.
    """

    def grad_w(value: Tensor, **graph: bool) -> Tensor:
        if not value.requires_grad:  # as the Jacobian of a linear encoder
            return value.new_zeros(sum(w.numel() for w in params))
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, params, materialize_grads=True, **graph)])

    theta = encode(x)
    L = loss(synthesize(theta), x, path_idx=path)
    (s,) = torch.autograd.grad(L, theta, create_graph=True)  # eq. 11: s_{n,u} = dL / dtheta_{n,u}
    M = 0.0
    for n in range(len(x)):  # eq. 12: M_u = d/dw sum_n s_{n,u} J_{n,u}, by the product rule
        J_nu = grad_w(theta[n, u], create_graph=True)
        ds_dw = grad_w(s[n, u], retain_graph=True)
        dJ_dw = torch.stack([grad_w(component, retain_graph=True) for component in J_nu])
        M = M + torch.outer(J_nu, ds_dw) + s[n, u] * dJ_dw
    return M.detach()


def dense_curvature(M: Tensor) -> float:
    """C = |largest eigenvalue| of a dense matrix."""
    return float(np.abs(np.linalg.eigvals(M.cpu().numpy())).max())


def dense_probabilities(C: Tensor) -> Tensor:
    """Equation 10: pi_p = 1/U sum_u C_{u,p} / sum_p' C_{u,p'}, (U, P) -> (P,)."""
    return (C / C.sum(dim=1, keepdim=True)).mean(dim=0)
