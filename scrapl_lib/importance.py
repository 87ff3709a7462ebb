"""Theta-importance sampling: draw a path as often as the loss curves along it, seen through the synthesizer's parameters.

Paper, section 2, equations 10 to 12. Letters: w weights of the encoder E (W numbers); N items, U parameters, P paths;
theta_n = E(x_n; w) in [0, 1]^U; L_p the loss of path p, a mean over the batch, as a function of the batch's theta;
J_{n,u} = grad_w theta_{n,u}.

    pi_p    = 1/U sum_u C_{u,p} / sum_p' C_{u,p'}                                                            (eq. 10)
    s_{n,u} = dL_p / dtheta_{n,u}                                                                            (eq. 11)
    C_{u,p} = |largest eigenvalue of M_u|,   M_u = d/dw sum_n s_{n,u}(w) J_{n,u}(w)                          (eq. 12)

How it is computed. An item's loss depends on w through its own theta_n alone, so with H_n = d2L_p / dtheta_n2 (U x U)

    M_u v = sum_n J_{n,u} sum_u' H_n[u, u'] (J_{n,u'} . v)  +  sum_n s_{n,u} (d2 theta_{n,u} / dw2) v.

s and H come from the synthesizer and the transform, without the encoder: first and second derivatives of the audio are
carried forward through the transform, whose first order all paths share (`SCRAPLLoss.derivatives`). The J are shared by all
paths, and the first (Gauss-Newton) term has at most rank N. The second term takes one Hessian-vector product of the encoder
alone. M_u is not symmetric (its first term is not), so its eigenvalues may be negative or complex: C is the magnitude. The
power iteration of the paper is replaced by Arnoldi's: from the same products M_u v it takes the best eigenvalue of the
whole space they span, and it converges for complex pairs and for nearly opposite eigenvalues, too (common here; 20 power
iterations are then far from the end, and scrapl-loss 0.1.0 returns less).

Many paths. The J and the Hessians A_{n,u} = d2 theta_{n,u} / dw2 are the same for all paths: only the numbers s and H are a
path's own. So whatever products A_{n,u} q one path's iteration has made serve all that follow (`_Space`): among the directions
q of earlier paths, M is a small matrix that costs no product, and its best vector is where the iteration starts; often the
first product shows it to be good enough. What is orthogonal to all these directions shows in no such matrix: random probes,
multiplied once, bound the eigenvalues that M may have there, and with what M takes from the directions to outside of them also
those of vectors half in, half out. Where the bound is above the eigenvalue among the directions, an iteration explores that first.

Precision. s and H come in float64: as the phases of the audio turn by thousands of radians with theta, H is the small
difference of two large numbers (400 times as large on path 100 of the granular configuration; in float32 the values are
7 % off on path 5). J and the products with M have the weights' dtype.

Several batches: L is the mean over each batch, and M the sum over batches; C is the eigenvalue of that sum.
"""

import functools
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigs
from torch import Tensor
from tqdm.auto import tqdm

from .jets import Jets

Encode = Callable[[Tensor], Tensor]
Synthesize = Callable[[Tensor], Tensor]
START_NOISE = 1.0  # random part of Arnoldi's first vector beside the Gauss-Newton one: eigenvectors outside the span of the J
# are found through it
SHARED_PATHS = 16  # so many paths are worth the probes
PROBES, LEAST = 64, 34.6  # the sum of so many squares of normal numbers is less than this once in 1000 times
SKETCH = 1021  # numbers that stand for a vector of weights where only scalar products are asked for: to 3 % of the lengths' product
ABOVE = 0.01  # an eigenvalue that shared directions may hide is looked for where it could be larger by more than this fraction
NEW = 0.1  # a unit vector with less than this outside of the shared directions adds none
DIRECTIONS = 2048  # at most, of all parameters together: 5 GB with 604 k weights in float32
SAME = 1e-5  # two calls of a deterministic function agree to this fraction of the largest value, on CUDA too


def probabilities(curvature: Tensor, floor: float = 0.0) -> Tensor:
    """Equation 10: curvature (U, P) -> probabilities (P,), float64.

    A parameter whose curvature is 0 for every path has no preference and is left out of the mean over parameters.
    `floor` mixes the uniform distribution in: pi <- (1 - floor) pi + floor / P, so that no pi_p is below floor / P.

    Raises: ValueError for curvature that is negative, not finite, or 0 everywhere, and for a floor outside [0, 1].
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be a fraction of the uniform probability, from 0 to 1, got {floor}")
    C = torch.as_tensor(curvature, dtype=torch.float64)
    if C.ndim != 2 or C.numel() == 0 or not torch.isfinite(C).all() or (C < 0).any():
        raise ValueError(
            f"curvature must be finite and not negative, of shape (U, P), got {C}: a part of the paths has NaN for the "
            "others, `merge` all parts first"
        )
    total = C.sum(dim=1, keepdim=True)
    if not (total > 0).any():
        raise ValueError("curvature is 0 for every path and parameter: the loss does not depend on theta")
    pi = (C / total)[total[:, 0] > 0].mean(dim=0)
    return (1 - floor) * pi / pi.sum() + floor / C.shape[1]


@dataclass(frozen=True)
class Importance:
    """What `theta_importance` and `merge` find.

    curvature: C, float64 (U, P), NaN for the paths that were not asked for. floor: see `probabilities`.
    fingerprint: of the transform, options, weights and inputs it belongs to.
    """

    curvature: Tensor
    floor: float
    fingerprint: str

    @property
    def paths(self) -> list[int]:
        """The paths that are there."""
        return torch.nonzero(~self.curvature.isnan().any(dim=0)).flatten().tolist()

    @property
    def probs(self) -> Tensor:
        """pi, float64 (P,). Raises ValueError unless all paths are there."""
        return probabilities(self.curvature, self.floor)


def theta_importance(
    loss: torch.nn.Module, encode: Encode, synthesize: Synthesize | Sequence[Synthesize], inputs: Tensor | Sequence[Tensor],
    params: Iterable[Tensor], n_iter: int = 20, tol: float = 1e-4, *, floor: float = 0.0, gauss_newton: bool = False,
    paths: Sequence[int] | None = None, save: Path | str | None = None, fingerprint: str | None = None,
    dtype: torch.dtype = torch.float64, chunk: int = 32, audio_chunk: int = 4, progress: bool = True,
) -> Importance:  # fmt: skip
    """Curvature of every path with respect to every parameter, and the sampling probabilities that follow.

    `encode` and `synthesize` must be deterministic (eval mode, synthesizer seeds fixed) and treat items independently;
    `encode` is called with parts of a batch, too. Gradients that `params` hold are left alone, and so is the path that
    the loss drew last.

    Args:
        loss: SCRAPLLoss, or anything with `n_paths` and loss(x_hat, x, path_idx=p) -> mean over the batch, twice
            differentiable (which takes longer).
        encode: audio (batch, 1, samples) -> theta (batch, U).
        synthesize: theta (batch, U) -> audio (batch, 1, samples), twice differentiable by torch's own operations; one per
            batch if there are several.
        inputs: reference audio, one batch or several.
        params: the weights of `encode`.
        n_iter: largest number of products with M per path and parameter. tol: stop once the eigenvalue changes by less
            than this fraction and its residual is below the root of it (for all but strongly asymmetric M the eigenvalue's
            error goes with the residual's square). A warning names the paths where n_iter came first.
            As with power iteration, a largest eigenvalue only a little above the next may be missed for that one, where
            paths share directions by some per cent (seen: 5 %); a smaller tol looks longer.
        floor: least probability of a path as a fraction of the uniform one.
        gauss_newton: leave out the second term of M. No iteration then, but other values wherever the slope s matters.
        paths: only these (default: all); `merge` puts parts together.
        save: JSON file written after each path and resumed from. It does not hold the derivatives, which come first, and the
            directions of earlier paths: what is computed in several goes may differ by what a value may be off, see tol.
        fingerprint: stands for everything that the curvature depends on. Default: SHA-256 of transform, options, weights,
            inputs and synthesized audio to the last bit; give one if parts come from machines that round differently.
        dtype: of synthesizer and transform. In float32 H is a small difference of large numbers, and some are lost.
        chunk: items the encoder is differentiated for at once; only with no more than that in all do paths share
            directions. audio_chunk: items at once in the transform. Besides, the J take N U W numbers; shared
            directions at most DIRECTIONS W, and N U W more for gradients with their graphs.
        progress: show a bar with the time left.
    Raises:
        TypeError, ValueError: wrong shapes, types or lengths; stochastic `encode` or `synthesize`; weights that `encode`
            does not use; a saved file of another problem. FloatingPointError: curvature that is not finite.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    synthesize = [synthesize] * len(inputs) if callable(synthesize) and len(inputs) == 1 else synthesize
    if callable(synthesize) or len(synthesize) != len(inputs) or not inputs:
        got = "one function" if callable(synthesize) else f"{len(synthesize)} functions"
        raise ValueError(f"expected a synthesize function for each of the {len(inputs)} batches, got {got}")
    for name, value in {"n_iter": n_iter, "chunk": chunk, "audio_chunk": audio_chunk}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    probabilities(torch.ones(1, 1), floor)  # complains about the floor now rather than after hours
    wanted = list(range(loss.n_paths) if paths is None else paths)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(loss.n_paths)):
        raise ValueError(f"paths must be different numbers from 0 to {loss.n_paths - 1}, at least one, got {wanted}")

    encoder = _Encoder(encode, inputs, list(params), chunk)
    batches = [_Batch(*parts, dtype, audio_chunk) for parts in zip(inputs, encoder.thetas, synthesize, strict=True)]
    options = {"gauss_newton": gauss_newton, "n_iter": n_iter, "tol": tol, "dtype": str(dtype)}
    fingerprint = fingerprint or _fingerprint(loss, options, encoder.params, inputs, [batch.audio for batch in batches])
    curvature = torch.full((encoder.n_params, loss.n_paths), torch.nan, dtype=torch.float64)
    if save is not None and Path(save).exists():
        saved = _read(save)
        if saved.fingerprint != fingerprint or saved.curvature.shape != curvature.shape:
            raise ValueError(f"{save} holds curvature of another configuration, weights or inputs: delete it, or save elsewhere")
        curvature = saved.curvature
    kept, slow = getattr(loss, "path_idx", None), []
    todo = [p for p in wanted if curvature[:, p].isnan().any()]
    shown = {"disable": not progress, "mininterval": 0.5 if sys.stderr.isatty() else 10}
    def derivatives() -> Iterator[tuple[int, Tensor, Tensor]]:
        """Path, s (N, U) and H (N, U, U) of all batches' items."""
        for group in [todo] if hasattr(loss, "derivatives") else [[p] for p in todo]:
            n = len(group) * sum(map(len, inputs))
            with tqdm(total=n, desc="derivatives", unit="item", leave=False, **shown) as bar:
                found = [batch.slopes_and_curvatures(loss, group, bar) for batch in batches]
            for p in group:
                yield p, *(torch.cat(parts) for parts in zip(*(of_batch[p] for of_batch in found), strict=True))

    if len(todo) >= SHARED_PATHS and sum(map(len, inputs)) <= chunk and not gauss_newton:
        encoder.share(shown)
    try:
        for p, s, H in tqdm(derivatives(), total=len(todo), desc="theta-IS", unit="path", **shown):
            if not (torch.isfinite(s).all() and torch.isfinite(H).all()):
                raise FloatingPointError(f"path {p}: its derivatives with respect to theta are not finite, look at that path's loss")
            values, converged = zip(
                *(encoder.largest_eigenvalue(s, H, u, n_iter, tol, gauss_newton) for u in range(encoder.n_params)), strict=True
            )
            if not np.isfinite(values).all():
                raise FloatingPointError(f"path {p}: its curvature is not finite ({values}), look at the encoder's derivatives")
            slow += [] if all(converged) else [p]
            curvature[:, p] = torch.tensor(values, dtype=torch.float64)
            if save is not None:
                _write(Path(save), curvature, fingerprint)
    finally:
        if hasattr(loss, "path_idx"):
            loss.path_idx = kept
    if slow:
        warnings.warn(f"the eigenvalues of paths {slow} still moved by more than {tol} after n_iter = {n_iter}", stacklevel=2)
    return Importance(curvature, floor, fingerprint)


def merge(files: Iterable[Path | str], floor: float = 0.0) -> Importance:
    """Put together what `theta_importance(paths=..., save=...)` wrote in parts.

    Raises: ValueError for broken files, parts of different problems, and paths that are missing or there twice.
    """
    found = {str(file): _read(file) for file in files}
    if not found:
        raise ValueError("no files to merge")
    (first, part), *others = found.items()
    curvature, owner = part.curvature.clone(), dict.fromkeys(part.paths, first)
    for name, other in others:
        if other.fingerprint != part.fingerprint or other.curvature.shape != curvature.shape:
            raise ValueError(f"{first} and {name} come from different configurations, weights or inputs")
        if twice := [p for p in other.paths if p in owner]:
            raise ValueError(f"paths {twice} are in {name} and in {owner[twice[0]]}: leave one of them out")
        owner |= dict.fromkeys(other.paths, name)
        curvature[:, other.paths] = other.curvature[:, other.paths]
    if missing := [p for p in range(curvature.shape[1]) if p not in owner]:
        raise ValueError(f"paths {missing} are in none of {', '.join(found)}: compute them first")
    return Importance(curvature, floor, part.fingerprint)


class AdaptiveProbs:
    """Re-estimates `loss.probs` while training, from gradients that the backward pass computes anyway.

    Not in the paper, which names it as an open end. Instead of the curvature C, equation 10 gets the running mean of
    sum_n |s_{n,u}| over the draws of path p: paths are drawn as often as they pull at theta at present. Paths not drawn
    yet count as the mean of the others. The loss that is minimized is then a mean weighted by changing `probs`, unless
    the loss is `unbiased`: its weights are taken out here.

        theta_hat = encoder(x); theta_hat.retain_grad()
        loss(synth(theta_hat), x).backward(); optimizer.step(); adaptive.update(theta_hat.grad)

    Args:
        loss: SCRAPLLoss. n_params: U.
        decay: of the running mean at each draw of a path; its first 1 / (1 - decay) draws count alike.
        floor: see `probabilities`; above 0, so that every path keeps a chance and an unbiased weight at most 1 / floor.

    `state_dict()` and `load_state_dict()` resume it; `probs` itself is in the state of the loss.
    """

    def __init__(self, loss: torch.nn.Module, n_params: int, decay: float = 0.9, floor: float = 0.1) -> None:
        if not 0 <= decay < 1 or not 0 < floor <= 1 or n_params < 1:
            raise ValueError(
                f"expected 0 <= decay < 1, 0 < floor <= 1, n_params >= 1, got decay {decay}, floor {floor}, n_params {n_params}"
            )
        self.loss, self.decay, self.floor = loss, decay, floor
        self.mean = torch.zeros(n_params, loss.n_paths, dtype=torch.float64)
        self.count = torch.zeros(loss.n_paths, dtype=torch.int64)

    def update(self, theta_grad: Tensor) -> None:
        """Take in d loss / d theta_hat (batch, U) of the loss's last call, times any constant (such as gradient_scale)."""
        p, U = self.loss.path_idx, len(self.mean)
        if not isinstance(theta_grad, Tensor) or theta_grad.ndim != 2 or theta_grad.shape[1] != U:
            got = tuple(theta_grad.shape) if isinstance(theta_grad, Tensor) else theta_grad
            raise ValueError(f"expected the gradient of theta_hat, (batch, {U}), got {got}: call theta_hat.retain_grad() first")
        size = theta_grad.detach().abs().sum(dim=0).double().cpu() / getattr(self.loss, "weight", 1.0)
        if not torch.isfinite(size).all():
            raise FloatingPointError(f"path {p}: the gradient of theta_hat is not finite")
        self.count[p] += 1
        self.mean[:, p] += (size - self.mean[:, p]) * max(1 / int(self.count[p]), 1 - self.decay)
        drawn = self.count > 0
        filled = torch.where(drawn, self.mean, self.mean[:, drawn].mean(dim=1, keepdim=True))
        if filled.any():
            self.loss.probs = probabilities(filled, self.floor)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["mean"].shape != self.mean.shape:
            raise ValueError(f"state of {tuple(state['mean'].shape)} (U, P), expected {tuple(self.mean.shape)}")
        self.mean, self.count = state["mean"].clone(), state["count"].clone()


# ---- slopes s and curvatures H with respect to theta --------------------------------------------------------------


def _grad(y: Tensor, x: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
    """d y.sum() / dx, zero where y does not depend on x."""
    if not y.requires_grad:
        return tuple(torch.zeros_like(t) for t in x)
    return torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True, **options)


def _check_same(name: str, first: Tensor, second: Tensor, advice: str) -> None:
    if first.shape != second.shape or not (first - second).abs().max() <= SAME * first.abs().max():
        raise ValueError(f"{name}: {advice}")


class _Batch:
    """One batch: its audio, and how that moves with theta."""

    def __init__(self, x: Tensor, theta: Tensor, synthesize: Synthesize, dtype: torch.dtype, chunk: int) -> None:
        self.x, self.synthesize, self.chunk = x.to(dtype), synthesize, chunk
        self.theta = theta.to(dtype).requires_grad_()
        audio = synthesize(self.theta)
        if not isinstance(audio, Tensor) or audio.shape != x.shape:
            got = tuple(audio.shape) if isinstance(audio, Tensor) else type(audio).__name__
            raise ValueError(f"synthesize must return audio of the shape of its reference, {tuple(x.shape)}, got {got}")
        if not audio.requires_grad:
            raise ValueError("synthesize returned audio without a graph: it must be differentiable in theta")
        self.audio = audio.detach()
        again = synthesize(self.theta).detach()
        _check_same("synthesize is not deterministic", self.audio, again, "two calls on one theta differ; fix its seeds")
        # a backward pass is linear in its input y, and its derivative with respect to y is what y is multiplied by
        U, y = theta.shape[1], torch.zeros_like(audio, requires_grad=True)
        (back,) = torch.autograd.grad(audio, self.theta, y, create_graph=True)
        firsts = [_grad(back[:, u], [y], retain_graph=True)[0] for u in range(U)]
        seconds = {}
        for u in range(U):
            (again,) = _grad(back[:, u], [self.theta], create_graph=True)
            seconds |= {(u, v): _grad(again[:, v], [y], retain_graph=True)[0] for v in range(u, U)}
        self.jets = Jets(U)
        self.moving = self.jets.stack(self.audio, firsts, seconds).squeeze(2)

    def slopes_and_curvatures(self, loss: torch.nn.Module, paths: Sequence[int], bar: tqdm) -> dict[int, tuple[Tensor, Tensor]]:
        """s (N, U) and H (N, U, U) of each path, `chunk` items at a time."""
        N, U = self.theta.shape
        found = {p: (self.theta.new_empty(N, U), self.theta.new_empty(N, U, U)) for p in paths}
        of_loss = loss.derivatives if hasattr(loss, "derivatives") else functools.partial(_derivatives, loss)
        for start in range(0, N, self.chunk):
            c = slice(start, start + self.chunk)
            for p, s, H in of_loss(self.moving[c], self.x[c], self.jets, paths):
                found[p][0][c], found[p][1][c] = s / N, H / N
                bar.update(len(s))
        return found


def _derivatives(
    loss: torch.nn.Module, moving: Tensor, x: Tensor, jets: Jets, paths: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`SCRAPLLoss.derivatives` for any loss(x_hat, x, path_idx=p): its gradient in x_hat is differentiated once more for each
    parameter, H = <gradient, d2 x_hat / dtheta2> + <tangents, Hessian tangents>."""
    value, tangents, seconds = moving[:, 0], moving[:, 1 : 1 + jets.U], moving[:, 1 + jets.U :]
    for p in paths:
        x_hat = value[:, None].clone().requires_grad_()
        total = loss(x_hat, x, path_idx=p)
        if not isinstance(total, Tensor) or total.ndim:
            raise ValueError(f"the loss must return a scalar tensor, got {getattr(total, 'shape', total)} for path {p}")
        (g,) = _grad(total * len(x), [x_hat], create_graph=True)
        s = torch.einsum("bun,bn->bu", tangents, g[:, 0].detach())
        H = s.new_empty(*s.shape, jets.U)
        for u in range(jets.U):
            (curved,) = _grad(g[:, 0] * tangents[:, u], [x_hat], retain_graph=True)
            H[:, u] = torch.einsum("bvn,bn->bv", tangents, curved[:, 0])
        for i, (u, v) in enumerate(jets.pairs):
            bent = (g[:, 0].detach() * seconds[:, i]).sum(dim=1)
            H[:, u, v] += bent
            if u != v:
                H[:, v, u] += bent
        yield p, s, H


# ---- the encoder, and the eigenvalues of M ------------------------------------------------------------------------


class _Encoder:
    """thetas: [(batch, U)]; J: (N, U, W); products with M. spaces: of each parameter if paths share directions, else none."""

    def __init__(self, encode: Encode, inputs: list[Tensor], params: list[Tensor], chunk: int) -> None:
        if not params or not all(isinstance(w, Tensor) and w.requires_grad for w in params):
            raise ValueError("params must be the encoder's weights: at least one tensor, all with requires_grad")
        self.encode, self.params, self.graph = encode, params, None
        self.parts = torch.cat(inputs).split(chunk)
        self.thetas = [self._checked_theta(x) for x in inputs]
        self.n_params = self.thetas[0].shape[1]
        pairs = [(x[n : n + 1], theta[n : n + 1]) for x, theta in zip(inputs, self.thetas, strict=True) for n in range(len(x))]
        J = [self._jacobian(*pair) for pair in pairs]
        self.J = torch.stack(J)
        flat = self.J.flatten(0, 1)
        self.gram = (flat @ flat.T).double().view(len(J), self.n_params, len(J), self.n_params)
        self.random = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat)
        self.random /= self.random.norm()
        self.spaces: list[_Space] = []

    def share(self, shown: dict) -> None:
        """Keep every item's gradients with their graphs, and begin the directions that all paths share."""
        thetas = [self.encode(x)[0] for part in self.parts for x in part.split(1)]
        self.gradients = [[_grad(theta[u], self.params, create_graph=True) for u in range(self.n_params)] for theta in thetas]
        probes = torch.randn(PROBES, self.J.shape[2], generator=torch.Generator().manual_seed(1)).to(self.J)
        self.spaces = [_Space(self, u, probes, shown) for u in range(self.n_params)]

    def hessian_products(self, v: Tensor, u: int) -> Tensor:
        """A_{n,u} v of every item n: (N, W)."""
        like_params = self._like_params(v)
        along = (sum((a * g).sum() for a, g in zip(like_params, of_item[u], strict=True)) for of_item in self.gradients)
        return torch.stack([_flat(_grad(a, self.params, retain_graph=True)) for a in along])

    def _like_params(self, v: Tensor) -> list[Tensor]:
        return [a.view_as(w) for a, w in zip(v.split([w.numel() for w in self.params]), self.params, strict=True)]

    def _checked_theta(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            theta, again = self.encode(x), self.encode(x)
        if not isinstance(theta, Tensor) or theta.ndim != 2 or len(theta) != len(x):
            got = tuple(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
            raise ValueError(f"encode must return theta of shape (batch, U), batch = {len(x)}, got {got}")
        _check_same("encode is not deterministic", theta, again, "two calls on one input differ; put it into eval mode")
        return theta

    def _jacobian(self, x: Tensor, theta: Tensor) -> Tensor:
        """One item (1, 1, samples) and its theta -> (U, W)."""
        alone = self.encode(x)
        advice = "an item's theta is another one alone than in its batch; batch statistics cannot be used"
        _check_same("encode does not treat items independently", theta, alone.detach(), advice)
        used = torch.autograd.grad(alone.sum(), self.params, retain_graph=True, allow_unused=True) if alone.requires_grad \
            else [None] * len(self.params)
        if unused := [i for i, g in enumerate(used) if g is None]:
            raise ValueError(f"encode does not use params {unused} of 0 ... {len(used) - 1} (or was called without gradients): "
                             "leave those out")  # fmt: skip
        return torch.stack([_flat(_grad(alone[0, u], self.params, retain_graph=True)) for u in range(theta.shape[1])])

    def largest_eigenvalue(self, s: Tensor, H: Tensor, u: int, n_iter: int, tol: float, gauss_newton: bool) -> tuple[float, bool]:
        """|largest eigenvalue| of M_u for slopes s (N, U) and curvatures H (N, U, U), and whether it has converged."""
        s, H = s[:, u], H[:, u]
        scale = float(torch.maximum(s.abs().max(), H.abs().max()))
        if scale == 0:
            return 0.0, True
        s, H = s / scale, H / scale  # a gradient of 1e-9 and its square stay away from float32's end
        # Gauss-Newton: if A c = lambda c, then J_u^T c is an eigenvector of the first term
        A = torch.einsum("nv,nvm->nm", H.to(self.gram), self.gram[..., u])
        size, c = _largest(A)
        if gauss_newton:
            return scale * size, True
        s, H = s.to(self.J), H.to(self.J)
        if self.spaces:
            product = functools.partial(self.spaces[u].product, s, H)
            start, last, outside, probe = self.spaces[u].look(s, H)
            if not outside <= last:
                if not self.spaces[u].full:
                    _arnoldi(product, probe, np.nan, n_iter, tol**0.5)  # it leaves its directions in the space
                    start, last, *_ = self.spaces[u].look(s, H)
                if self.spaces[u].full:  # it left none, or not all
                    start, last = start / start.norm() + probe, np.nan
        else:
            product = self._product(s, H, u)
            start, last = c.to(self.J) @ self.J[:, u], np.nan
            start = start / start.norm().clamp_min(torch.finfo(start.dtype).tiny) + START_NOISE * self.random
        size, converged = _arnoldi(product, start, last, n_iter, tol)
        return scale * size, converged

    def _product(self, s: Tensor, H: Tensor, u: int) -> Callable[[Tensor], Tensor]:
        """v -> M_u v. If all items are one part, its graph serves all products; else it is made anew for each."""
        sizes = [len(part) for part in self.parts]
        kept = [self._slope_gradient(self.parts[0], s, u)] if len(sizes) == 1 else None

        def product(v: Tensor) -> Tensor:
            like_params = self._like_params(v)
            out = (H * (self.J @ v)).sum(dim=1) @ self.J[:, u]
            for part, s_part in zip(self.parts, s.split(sizes), strict=True):
                gradient = kept[0] if kept else self._slope_gradient(part, s_part, u)
                along = sum((a * g).sum() for a, g in zip(like_params, gradient, strict=True))
                out += _flat(_grad(along, self.params, retain_graph=kept is not None))
            return out

        return product

    def _slope_gradient(self, part: Tensor, s: Tensor, u: int) -> tuple[Tensor, ...]:
        """grad_w sum_n s_n theta_{n,u}, with its graph."""
        if len(self.parts) > 1:
            theta = self.encode(part)
        else:
            theta = self.graph = self.encode(part) if self.graph is None else self.graph
        return torch.autograd.grad(theta[:, u] @ s.to(theta), self.params, create_graph=True)


class _Space:
    """Directions of the weights that all paths share, and what M_u of any path does among them and around them.

    Q: orthonormal directions (k, W), the first of them those of a random vector and of the J_u, so that outside of Q, M is its
    second term (but for what NEW leaves out of the J_u). Of the products A_n q only K = Q A_n Q^T, (N, k, k), and sketches
    SAQ, (N, k, SKETCH), are kept; besides JQ = J_n Q^T, (N, U, k), and sketches SQ. G: the m probes, random and not
    normalized, with GQ = G Q^T, GAQ = G A_n Q^T and sketches SAG of the same kind. limit: the largest k.
    """

    def __init__(self, encoder: _Encoder, u: int, probes: Tensor, shown: dict) -> None:
        J, self.encoder, self.u, self.G, self.k = encoder.J, encoder, u, probes, 0
        N, U, W = J.shape
        self.limit = DIRECTIONS // U
        self.sign = (2 * torch.randint(2, (W,), generator=torch.Generator().manual_seed(2)) - 1).to(J)
        self.Q, self.SQ, self.SAQ = J.new_zeros(0, W), J.new_zeros(0, SKETCH), J.new_zeros(N, 0, SKETCH)
        self.K, self.JQ = J.new_zeros(N, 0, 0), J.new_zeros(N, U, 0)
        self.GQ, self.GAQ = J.new_zeros(PROBES, 0), J.new_zeros(N, PROBES, 0)
        with tqdm(total=PROBES + 1 + N, desc=f"directions of parameter {u}", leave=False, **shown) as bar:
            SAG = []
            for g in self.G:
                SAG.append(self._sketch(encoder.hessian_products(g, u)))
                bar.update()
            self.SAG = torch.stack(SAG, dim=1)
            for v in [encoder.random, *J[:, u]]:
                if length := float(v.norm()):
                    self._take_in(v / length, encoder.hessian_products(v / length, u))
                bar.update()

    @property
    def full(self) -> bool:
        return self.k == self.limit

    def _sketch(self, v: Tensor) -> Tensor:
        """(..., W) -> (..., SKETCH): sums of some weights each, with random signs. Scalar products stay about as they are."""
        return torch.nn.functional.pad(v * self.sign, (0, -v.shape[-1] % SKETCH)).unflatten(-1, (-1, SKETCH)).sum(dim=-2)

    def _take_in(self, v: Tensor, A_v: Tensor) -> None:
        """Make what is new in the unit vector v a direction, from the products A_n v (N, W)."""
        k, Q, c = self.k, self.Q[: self.k], v.new_zeros(self.k)
        q = v
        for _ in range(2):  # once leaves rounding errors in the directions of Q
            along = Q @ q
            q, c = q - along @ Q, c + along
        length = q.norm()
        if not length > NEW or self.full:
            return
        q = q / length
        if k == len(self.Q):
            pad, more = torch.nn.functional.pad, min(64, self.limit - k)
            self.Q, self.SQ, self.SAQ = (pad(rows, (0, 0, 0, more)) for rows in (self.Q, self.SQ, self.SAQ))
            self.JQ, self.GQ, self.GAQ = (pad(columns, (0, more)) for columns in (self.JQ, self.GQ, self.GAQ))
            self.K = pad(self.K, (0, more, 0, more))
        # q is (v - c Q) / length, so that the products with q follow from those with v and Q
        Q_A_q = (A_v @ Q.T - self.K[:, :k, :k] @ c) / length
        self.K[:, k, :k] = self.K[:, :k, k] = Q_A_q
        self.K[:, k, k] = (A_v @ q - Q_A_q @ c) / length
        self.GAQ[..., k] = (A_v @ self.G.T - self.GAQ[..., :k] @ c) / length
        self.SAQ[:, k] = (self._sketch(A_v) - c @ self.SAQ[:, :k]) / length
        self.Q[k], self.SQ[k], self.JQ[..., k], self.GQ[:, k], self.k = q, self._sketch(q), self.encoder.J @ q, self.G @ q, k + 1

    def product(self, s: Tensor, H: Tensor, v: Tensor) -> Tensor:
        """M_u v of the path with these s (N,) and H (N, U), for a unit vector v; what is new in v is taken in."""
        A_v, J = self.encoder.hessian_products(v, self.u), self.encoder.J
        self._take_in(v, A_v)
        return (H * (J @ v)).sum(dim=1) @ J[:, self.u] + s @ A_v

    def look(self, s: Tensor, H: Tensor) -> tuple[Tensor, float, float, Tensor]:
        """Without a product: the best vector among the directions, the size of its eigenvalue, a bound of the others, and a vector
        from which to look for what is above it.

        Outside of Q: B is what M does among all that is orthogonal to Q, symmetric. For random g the matrix of (B g_i) . (B g_j)
        is at least |B|^2 a a^T, a = m normal random numbers, so that its largest eigenvalue is at least |B|^2 |a|^2. The sum of
        probes that shows most there is what to look from.
        Half in Q: with A = Q M Q^T and C what M takes from Q to outside of it, no eigenvalue of a symmetric M is larger than those of
        [[A, C], [C^T, +-|B|]] (a sign only for other M). That may be above A's by little because the best vector is not exact yet, which the iteration mends;
        if it is above by more, the vector of that matrix is added to what to look from.
        """
        Q, SQ, JQ = self.Q[: self.k], self.SQ[: self.k], self.JQ[..., : self.k]
        A = torch.einsum("n,nij->ij", s, self.K[:, : self.k, : self.k])
        M = A + JQ[:, self.u].T @ torch.einsum("nv,nvk->nk", H, JQ)
        size, y = _largest(M)
        if np.isnan(size):
            return self.encoder.random, np.nan, np.inf, self.encoder.random
        GQ, GAQ = self.GQ[:, : self.k], torch.einsum("n,nik->ik", s, self.GAQ[..., : self.k])
        SAQ = torch.einsum("n,nkd->kd", s, self.SAQ[:, : self.k])
        BG = torch.einsum("n,nid->id", s, self.SAG) - GQ @ SAQ - (GAQ - GQ @ A) @ SQ
        spread, sums = torch.linalg.eigh((BG @ BG.T).double())
        outside = float(spread[-1].clamp(min=0) / LEAST) ** 0.5
        inside, across = M.double().cpu().numpy(), (SAQ - A @ SQ).double().cpu().numpy()
        reach, way = max((_largest_across(inside, across, sign * outside) for sign in (1, -1)), key=lambda found: found[0])
        probe = self.G.T @ sums[:, -1].to(Q)
        probe = probe - Q.T @ (Q @ probe)
        probe = probe / probe.norm().clamp_min(torch.finfo(probe.dtype).tiny)
        if reach > (1 + ABOVE) * size:
            return y.to(Q) @ Q, size, reach, probe + torch.as_tensor(way).to(Q) @ Q
        return y.to(Q) @ Q, size, outside, probe


def _largest(T: Tensor) -> tuple[float, Tensor]:
    """|largest eigenvalue| of a small matrix, and its vector's real part; NaN and zeros if T is not finite."""
    if not torch.isfinite(T).all():
        return np.nan, T.new_zeros(len(T))
    values, vectors = np.linalg.eig(T.double().cpu().numpy())
    first = np.abs(values).argmax()
    return float(abs(values[first])), torch.as_tensor(vectors[:, first].real)


def _largest_across(A: np.ndarray, C: np.ndarray, b: float) -> tuple[float, np.ndarray]:
    """|largest eigenvalue| of [[A, C], [C^T, b]], to 0.1 %, and the part of its vector that A acts on, of unit length or 0."""
    k, width = len(A), sum(C.shape)
    apply = LinearOperator((width, width), matvec=lambda v: np.concatenate([A @ v[:k] + C @ v[k:], v[:k] @ C + b * v[k:]]), dtype=float)
    values, vectors = eigs(apply, k=1, v0=np.random.default_rng(0).standard_normal(width), tol=1e-3)
    part = vectors[:k, 0].real
    return float(abs(values[0])), part / max(np.linalg.norm(part), np.finfo(float).tiny)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, last: float, n_iter: int, tol: float) -> tuple[float, bool]:
    """|largest eigenvalue| of a linear map (W,) -> (W,), and whether it has converged (see `theta_importance`).

    Q has orthonormal rows that span start, M start, M^2 start, ...; the eigenvalues of T = Q M Q^T approach the outer
    ones of M. A space that M maps into itself ends the iteration. last: what the eigenvalue is known to be about, or NaN.
    """
    Q, T = start.new_empty(n_iter + 1, len(start)), np.zeros((n_iter + 1, n_iter))
    Q[0], size = start / start.norm(), np.nan
    for k in range(n_iter):
        v = product(Q[k])
        for _ in range(2):  # once leaves rounding errors in the directions of Q
            along = Q[: k + 1] @ v
            v = v - along @ Q[: k + 1]
            T[: k + 1, k] += along.double().cpu().numpy()
        T[k + 1, k] = float(v.norm())
        if not np.isfinite(T).all():
            return np.nan, False
        values, vectors = np.linalg.eig(T[: k + 1, : k + 1])
        first = np.abs(values).argmax()
        size, residual = abs(values[first]), T[k + 1, k] * abs(vectors[k, first])
        closed = T[k + 1, k] <= 10 * torch.finfo(Q.dtype).eps * np.abs(T).max()
        if closed or (abs(size - last) <= tol * size and residual <= tol**0.5 * size):
            return float(size), True
        Q[k + 1], last = v / T[k + 1, k], size
    return float(size), False


# ---- files --------------------------------------------------------------------------------------------------------


def _fingerprint(loss: torch.nn.Module, options: dict, params: list[Tensor], inputs: list[Tensor], audio: list[Tensor]) -> str:
    """SHA-256 of what curvature depends on."""
    names = ("shape", "J", "Q1", "Q2", "J_fr", "Q_fr", "T", "F")
    transform = {name: getattr(getattr(loss, "jtfs", None), name, None) for name in names}
    transform |= {"loss": type(loss).__name__, "n_paths": loss.n_paths, "log1p": getattr(loss, "log1p", None)}
    digest = hashlib.sha256(json.dumps([transform, options], sort_keys=True).encode())
    for tensor in [*params, *inputs, *audio]:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, curvature: Tensor, fingerprint: str) -> None:
    """Atomically: {"fingerprint", "shape": [U, P], "curvature": {path: [U values]}}."""
    there = torch.nonzero(~curvature.isnan().any(dim=0)).flatten().tolist()
    content = {"fingerprint": fingerprint, "shape": list(curvature.shape), "curvature": {p: curvature[:, p].tolist() for p in there}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _read(path: Path | str) -> Importance:
    try:
        content = json.loads(Path(path).read_text())
        curvature = torch.full(tuple(content["shape"]), torch.nan, dtype=torch.float64)
        for p, values in content["curvature"].items():
            curvature[:, int(p)] = torch.tensor(values, dtype=torch.float64)
        return Importance(curvature, 0.0, content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of theta_importance ({error}): delete it and compute its paths again") from error
