"""Theta-importance sampling: draw a path as often as its loss curves, seen through the synthesizer's parameters.

Paper, section 2, equations 10 to 12. Letters: w weights of the encoder E (W numbers); N items, U parameters, P paths;
theta_n = E(x_n; w) in [0, 1]^U; L_p the loss of path p, a mean over the batch, as a function of the batch's theta;
J_{n,u} = grad_w theta_{n,u}.

    pi_p    = 1/U sum_u C_{u,p} / sum_p' C_{u,p'}                                                            (eq. 10)
    s_{n,u} = dL_p / dtheta_{n,u}                                                                            (eq. 11)
    C_{u,p} = |largest eigenvalue of M_u|,   M_u = d/dw sum_n s_{n,u}(w) J_{n,u}(w)                          (eq. 12)

`reference.dense_m` writes M_u down as it stands. Here it is never formed. An item's loss depends on w through its own
theta_n alone, so with H_n = d2L_p / dtheta_n2 (U x U)

    M_u v = sum_n J_{n,u} sum_u' H_n[u, u'] (J_{n,u'} . v)  +  sum_n s_{n,u} (d2 theta_{n,u} / dw2) v.

s and H need no encoder: first and second derivatives of the audio are carried forward through the transform, whose
first order all paths share (`SCRAPLLoss.derivatives`). The J are shared by all paths. The first (Gauss-Newton) term has
at most rank N; the second takes one Hessian-vector product of the encoder. M_u is not symmetric: its eigenvalues may be
negative or complex, and C is the magnitude. Arnoldi iteration, in place of power iteration, converges for complex pairs
and nearly opposite eigenvalues, too, and both are common here.

s and H are float64, because H is the small difference of two numbers up to 400 times as large (the audio's phases turn
by thousands of radians with theta); J and the products with M have the weights' dtype. Several batches: L is the mean
over each, M the sum over batches, and C an eigenvalue of that sum.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checks import check_as, check_audio, positive_int
from .curvature import Encode, Encoder, Report, Synthesize, audio_jets, slopes_and_curvatures
from .precision import full_precision


def probabilities(curvature: Tensor, floor: float = 0.0) -> Tensor:
    """Equation 10: curvature (U, P) -> probabilities (P,), float64.

    A parameter whose curvature is 0 for every path has no preference and is left out of the mean over parameters.
    `floor` mixes the uniform distribution in: pi <- (1 - floor) pi + floor / P.
    Raises: ValueError for curvature that is negative, not finite, or 0 everywhere, and for a floor outside [0, 1].
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be a fraction of the uniform probability, from 0 to 1, got {floor}")
    C = torch.as_tensor(curvature, dtype=torch.float64, device="cpu")
    if C.ndim != 2 or C.numel() == 0 or not torch.isfinite(C).all() or (C < 0).any():
        raise ValueError(
            f"curvature must be (U, P), finite, at least 0 (paths that were not computed are NaN), got {C}"
        )
    total = C.sum(dim=1, keepdim=True)
    if not (total > 0).any():
        raise ValueError("curvature is 0 for every path and parameter: the loss does not depend on theta")
    pi = (C / total)[total[:, 0] > 0].mean(dim=0)
    return (1 - floor) * pi / pi.sum() + floor / C.shape[1]


@dataclass(frozen=True)
class Importance:
    """What `theta_importance` finds. curvature: C, float64 (U, P), NaN for paths that were not asked for."""

    curvature: Tensor
    floor: float = 0.0

    @property
    def probs(self) -> Tensor:
        """pi, float64 (P,), see `probabilities`. Raises ValueError unless all paths are there."""
        return probabilities(self.curvature, self.floor)


def theta_importance(
    loss: torch.nn.Module,
    encode: Encode,
    synthesize: Synthesize | Sequence[Synthesize],
    inputs: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    n_iter: int = 20,
    tol: float = 1e-4,
    floor: float = 0.0,
    gauss_newton: bool = False,
    paths: Iterable[int] | None = None,
) -> Importance:
    """Compute the curvature of every path in every parameter, and the sampling probabilities that follow.

    `encode` and `synthesize` must be deterministic (eval mode, seeds fixed) and treat items independently; `encode` is
    called with parts of a batch, too. Gradients that `params` hold, and the path that the loss drew last, are left
    alone. `curvature_by_path` yields the same path by path, to be saved on the way.

    Args:
        loss: SCRAPLLoss, or anything with `n_paths` and loss(x_hat, x, path_idx=p) -> mean over the batch, twice
            differentiable. Those whose transform has no `path_jets` take longer: two backward passes for each path.
        encode: audio (batch, 1, samples) -> theta (batch, U). It gets float32 audio if all its weights are float32.
        synthesize: theta (batch, U), float64 -> audio (batch, 1, samples), twice differentiable by torch's own
            operations; one per batch if there are several.
        inputs: reference audio (batch, 1, samples), one batch or several; or what else the loss's transform takes,
            images, say, which `encode` takes and `synthesize` returns then.
        params: the weights of `encode`, float32 or float64.
        n_iter, tol: see `arnoldi`: most products with M for each path and parameter, and the fraction of itself by
            which the last may have changed the eigenvalue. A warning names paths not yet there.
        floor: least probability of a path as a fraction of the uniform one.
        gauss_newton: leave out the second term of M: no iteration, but other values wherever the slope s matters.
        paths: only these; default all.
    Raises:
        TypeError, ValueError: wrong shapes, types or numbers; stochastic `encode` or `synthesize`; weights that
            `encode` does not use. FloatingPointError: derivatives or curvature that are not finite.
    """
    probabilities(np.ones((1, 1)), floor)  # refuses a wrong floor now rather than after hours
    found = dict(curvature_by_path(loss, encode, synthesize, inputs, params, n_iter, tol, gauss_newton, paths))
    columns = torch.stack(list(found.values()), dim=1)
    curvature = columns.new_full((len(columns), loss.n_paths), torch.nan)
    curvature[:, list(found)] = columns
    return Importance(curvature, floor)


def curvature_by_path(
    loss: torch.nn.Module,
    encode: Encode,
    synthesize: Synthesize | Sequence[Synthesize],
    inputs: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    n_iter: int = 20,
    tol: float = 1e-4,
    gauss_newton: bool = False,
    paths: Iterable[int] | None = None,
    report: Report = lambda phase, done, total: None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (path, its curvature in each parameter, float64 (U,) on the CPU): `theta_importance` as it goes along.

    With SCRAPLLoss the derivatives of all paths are computed first, all at once; a path's own products come after.
    Arguments, errors and the warning, which comes at the end, as in `theta_importance`. report: called with the phase
    ("derivatives" or "curvature"), how much of it is done, and how much there is; may raise to stop.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    synthesize = [synthesize] if callable(synthesize) else list(synthesize)
    if len(synthesize) != len(inputs) or not inputs:
        n = len(inputs)
        raise ValueError(f"expected a synthesize function for each of the {n} batches, got {len(synthesize)} functions")
    for x in inputs:
        check_as("inputs", x, getattr(getattr(loss, "transform", None), "check", check_audio))
    n_iter = positive_int("n_iter", n_iter)
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    paths = list(range(loss.n_paths) if paths is None else paths)
    if not paths or len(set(paths)) < len(paths) or not set(paths) <= set(range(loss.n_paths)):
        raise ValueError(f"paths must be different numbers from 0 to {loss.n_paths - 1}, at least one, got {paths}")
    params, slow, device = list(params), [], inputs[0].device.type
    with torch.enable_grad(), full_precision(device, convolutions=True):
        encoder = Encoder(encode, inputs, params)
        jets = [audio_jets(*parts) for parts in zip(inputs, encoder.thetas, synthesize, strict=True)]
    U = encoder.J.shape[1]
    derivatives = slopes_and_curvatures(loss, list(zip(jets, inputs)), U, paths, report)
    for done in range(len(paths)):
        with torch.enable_grad(), full_precision(device, convolutions=True):
            p, s, H = next(derivatives)
            found = [encoder.largest_eigenvalue(s, H, u, n_iter, tol, gauss_newton) for u in range(U)]
        values, converged = zip(*found, strict=True)
        if not np.isfinite(values).all():
            raise FloatingPointError(f"path {p}: curvature {values} is not finite: look at its loss and derivatives")
        slow += [] if all(converged) else [p]
        report("curvature", done + 1, len(paths))
        yield p, torch.tensor(values, dtype=torch.float64, device="cpu")
    if slow:
        said = f"the largest eigenvalues of paths {slow} have not converged to {tol} after n_iter = {n_iter} products"
        warnings.warn(f"{said}: raise n_iter", stacklevel=2)
