"""Slopes, curvatures, products with M and largest eigenvalues: see `importance` for mathematics and letters."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .checks import SINGLE_OR_DOUBLE
from .jets import Jets

Encode = Callable[[Tensor], Tensor]
Synthesize = Callable[[Tensor], Tensor]
Report = Callable[[str, int, int], object]  # phase, how much of it is done, how much there is
AUDIO_CHUNK = 4  # items whose derivatives go through the transform at once: bounds the memory
ENCODER_CHUNK = 32  # items whose encoder graph is held at once: bounds the memory
SAME = 1e-5  # two calls of a deterministic function agree to this fraction of the largest value, on CUDA too


# ---- slopes s and curvatures H with respect to theta ----------------------------------------------------------------


def _grad(y: Tensor, x: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
    """d y.sum() / dx, zero where y does not depend on x."""
    if not y.requires_grad:
        return tuple(torch.zeros_like(t) for t in x)
    return torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True, **options)


def _check_same(name: str, first: Tensor, second: Tensor, advice: str) -> None:
    if first.shape != second.shape or not (first - second).abs().max() <= SAME * first.abs().max():
        raise ValueError(f"{name}: {advice}")


def audio_jets(x: Tensor, theta: Tensor, synthesize: Synthesize) -> Tensor:
    """The audio of theta (n, U) with its derivatives in theta, in float64: jets (n, K, samples), see `Jets`.

    x: the reference (n, 1, samples); or (n, ...), such as images, whose jets are flat, (n, K, numbers). Raises:
    ValueError for other shapes, no graph, or two calls that differ.
    """
    theta = theta.detach().double().clone().requires_grad_()
    audio = synthesize(theta)
    if not isinstance(audio, Tensor) or audio.shape != x.shape:
        got = tuple(audio.shape) if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"synthesize must return what has the shape of its reference, {tuple(x.shape)}, got {got}")
    if not audio.requires_grad:
        raise ValueError("synthesize returned audio without a graph: it must be differentiable in theta")
    advice = "two calls on one theta differ; fix its seeds"
    _check_same("synthesize is not deterministic", audio.detach(), synthesize(theta).detach(), advice)
    # A backward pass is linear in the y that it starts from: its derivative in y is the tangent of the audio.
    U, y = theta.shape[1], torch.zeros_like(audio, requires_grad=True)
    (back,) = torch.autograd.grad(audio, theta, y, create_graph=True)
    jet = [audio.detach(), *(_grad(back[:, u], [y], retain_graph=True)[0] for u in range(U))]
    for u in range(U):
        (bent,) = _grad(back[:, u], [theta], create_graph=True)
        jet += [_grad(bent[:, v], [y], retain_graph=True)[0] for v in range(u, U)]
    return torch.stack([part.flatten(1) for part in jet], dim=1).double()


def slopes_and_curvatures(
    loss: torch.nn.Module, batches: Sequence[tuple[Tensor, Tensor]], U: int, paths: Sequence[int], report: Report
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each path with its s (N, U) and H (N, U, U). batches: jets of audio, and reference audio; N: all items.

    A loss whose transform has `path_jets` gives those of all paths before the first is yielded; others go path by path.
    """
    at_once, done = hasattr(getattr(loss, "transform", None), "path_jets"), 0
    total = len(paths) * sum(len(x) for _, x in batches)
    of_loss = loss.derivatives if at_once else functools.partial(_derivatives_backwards, loss)
    for group in [paths] if at_once else [[p] for p in paths]:
        found: dict[int, list] = {p: [] for p in group}
        for moving, x in batches:
            for part in zip(moving.split(AUDIO_CHUNK), x.double().split(AUDIO_CHUNK), strict=True):
                for p, s, H in of_loss(*part, Jets(U), group):
                    found[p].append((s / len(x), H / len(x)))
                    done += len(s)
                    report("derivatives", done, total)
        for p, parts in found.items():
            s, H = zip(*parts, strict=True)
            yield p, torch.cat(s), torch.cat(H)


def _derivatives_backwards(
    loss: torch.nn.Module, moving: Tensor, x: Tensor, jets: Jets, paths: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`SCRAPLLoss.derivatives` for any loss(x_hat, x, path_idx=p), by two backward passes.

    With the tangents x_u and second derivatives x_uv of x_hat, and g the loss's gradient in x_hat:
    s_u = g . x_u and H_uv = x_v . (dg / dx_hat) x_u + g . x_uv.
    """
    value, tangents, seconds = moving[:, 0], moving[:, 1 : 1 + jets.U], moving[:, 1 + jets.U :]
    for p in paths:
        x_hat, drawn = value.reshape(x.shape).clone().requires_grad_(), getattr(loss, "path_idx", None)
        try:
            total = loss(x_hat, x, path_idx=p)
        finally:
            if hasattr(loss, "path_idx"):
                loss.path_idx = drawn
        if not isinstance(total, Tensor) or total.ndim:
            raise ValueError(f"the loss must return a scalar tensor, got {getattr(total, 'shape', total)} for path {p}")
        (g,) = _grad(total * len(x), [x_hat], create_graph=True)
        flat = g.flatten(1)
        if g.requires_grad and torch.autograd.grad(g.sum(), x_hat, retain_graph=True, allow_unused=True)[0] is None:
            why = "an operation in it has no second derivative, such as one marked once_differentiable"
            raise ValueError(f"the gradient of path {p} cannot be differentiated in x_hat: {why}")
        s = torch.einsum("bun,bn->bu", tangents, flat.detach())
        H = s.new_empty(*s.shape, jets.U)
        for u in range(jets.U):
            (curved,) = _grad(flat * tangents[:, u], [x_hat], retain_graph=True)
            H[:, u] = torch.einsum("bvn,bn->bv", tangents, curved.flatten(1))
        bent = (flat[:, None].detach() * seconds).sum(dim=2)
        for i, (u, v) in enumerate(jets.pairs):
            H[:, [u, v], [v, u]] += bent[:, i, None]  # once where u = v
        yield p, s, H


# ---- the encoder's Jacobians and the products with M ----------------------------------------------------------------


class Encoder:
    """The encoder's estimates and their Jacobians at the present weights.

    thetas: of each batch, (n, U). J: d theta_{n,u} / dw, (N, U, W), in the weights' dtype. gram: products of any two of
    its rows, (N, U, N, U), float64.
    """

    def __init__(self, encode: Encode, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        good = [isinstance(w, Tensor) and w.requires_grad and w.dtype in SINGLE_OR_DOUBLE for w in params]
        if not good or not all(good):
            raise ValueError("params must be the encoder's weights, float32 or float64 tensors that require gradients")
        self.encode, self.params = encode, params
        if all(w.dtype == torch.float32 for w in params):
            inputs = [x.float() for x in inputs]
        self.thetas, x = [self._checked_theta(x) for x in inputs], torch.cat(list(inputs))
        self.parts = x.split(ENCODER_CHUNK)
        self.graph = encode(x) if len(self.parts) == 1 else None  # kept for all paths
        items = zip(x.split(1), torch.cat(self.thetas).split(1), strict=True)
        self.J = torch.stack([self._jacobian(*item) for item in items])
        flat = self.J.flatten(0, 1)
        self.gram = (flat @ flat.T).double().unflatten(0, self.J.shape[:2]).unflatten(2, self.J.shape[:2])
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randn(self.J.shape[2], generator=generator, dtype=torch.float32, device="cpu").to(self.J)
        self.random = random / random.norm()

    def _checked_theta(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            theta, again = self.encode(x), self.encode(x)
        if not isinstance(theta, Tensor) or theta.ndim != 2 or len(theta) != len(x):
            got = tuple(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
            raise ValueError(f"encode must return theta of shape (batch, U), batch = {len(x)}, got {got}")
        _check_same("encode is not deterministic", theta, again, "two calls on one input differ; put it into eval mode")
        return theta

    def _jacobian(self, x: Tensor, theta: Tensor) -> Tensor:
        """One item (1, 1, samples) and its theta (1, U) -> (U, W)."""
        alone = self.encode(x)
        advice = "an item's theta is another one alone than in its batch; batch statistics cannot be used"
        _check_same("encode does not treat items independently", theta, alone.detach(), advice)
        used: Sequence[Tensor | None] = [None] * len(self.params)
        if alone.requires_grad:
            used = torch.autograd.grad(alone.sum(), self.params, retain_graph=True, allow_unused=True)
        if unused := [i for i, g in enumerate(used) if g is None]:
            raise ValueError(f"encode does not use (or detaches) params {unused} of 0 ... {len(used) - 1}: omit them")
        return torch.stack([_flat(_grad(alone[0, u], self.params, retain_graph=True)) for u in range(theta.shape[1])])

    def largest_eigenvalue(
        self, s: Tensor, H: Tensor, u: int, n_iter: int, tol: float, gauss_newton: bool
    ) -> tuple[float, bool]:
        """|largest eigenvalue| of M_u for s (N, U), H (N, U, U) of a path, and whether it converged, see `arnoldi`."""
        s, H = s[:, u], H[:, u]
        scale = float(torch.maximum(s.abs().max(), H.abs().max()))
        if scale == 0:
            return 0.0, True
        s, H = s / scale, H / scale  # numbers of 1e-9 and their products stay away from the end of float32
        # If A c = lambda c with A = sum_v H_v (J_v . J_u), then J_u^T c is an eigenvector of the Gauss-Newton term.
        A = torch.einsum("nv,nvm->nm", H.to(self.gram), self.gram[..., u])
        if not torch.isfinite(A).all():
            return np.nan, False
        values, vectors = np.linalg.eig(A.cpu().numpy())
        first = np.abs(values).argmax()
        if gauss_newton:
            return scale * float(np.abs(values[first])), True
        start = torch.from_numpy(vectors[:, first].real.copy()).to(self.J) @ self.J[:, u]
        start = start / start.norm().clamp_min(torch.finfo(start.dtype).tiny) + self.random
        size, converged = arnoldi(self.product(s.to(self.J), H.to(self.J), u), start, n_iter, tol)
        return scale * size, converged

    def product(self, s: Tensor, H: Tensor, u: int) -> Callable[[Tensor], Tensor]:
        """v -> sum_n J_nu sum_u' H_nu' (J_nu' . v) + d/dw (v . grad_w sum_n s_n theta_nu) for s (N,), H (N, U).

        The graph of grad_w sum_n s_n theta_nu is built once if there are at most ENCODER_CHUNK items, else each time.
        """

        def gradient(part: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            theta = self.encode(part) if self.graph is None else self.graph
            return torch.autograd.grad(theta[:, u] @ s.to(theta), self.params, create_graph=True)

        kept = None if self.graph is None else gradient(self.parts[0], s)
        slopes = s.split([len(part) for part in self.parts])

        def product(v: Tensor) -> Tensor:
            pieces = [a.view_as(w) for a, w in zip(v.split([w.numel() for w in self.params]), self.params, strict=True)]
            out = (H * (self.J @ v)).sum(dim=1) @ self.J[:, u]
            for part, s_part in zip(self.parts, slopes, strict=True):
                along = sum((a * g).sum() for a, g in zip(pieces, kept or gradient(part, s_part), strict=True))
                out += _flat(_grad(along, self.params, retain_graph=kept is not None))
            return out

        return product


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, n_iter: int, tol: float) -> tuple[float, bool]:
    """|largest eigenvalue| of a linear map (W,) -> (W,) from at most n_iter products, and whether it has converged.

    The rows of Q are an orthonormal basis of start, M start, M^2 start, ...; the eigenvalues of T = Q M Q^T approach
    the outer ones of M. Converged: with the last product the largest changed by at most `tol` of itself; and its
    residual |M y - value y|, and that of any value which its own may lift above it, is at most the root of `tol` of it
    (where M is nearly symmetric, errors go with the squares of residuals). Or M maps the basis into itself. As with
    power iteration, an eigenvalue whose vector `start` hardly has may be missed. NaN: a product is not finite.
    """
    Q, T = start.new_empty(n_iter + 1, len(start)), np.zeros((n_iter + 1, n_iter))
    Q[0], last = start / start.norm(), np.nan
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
        sizes, residuals = np.abs(values), T[k + 1, k] * np.abs(vectors[k])
        size = float(sizes.max())
        closed = T[k + 1, k] <= 10 * torch.finfo(Q.dtype).eps * np.abs(T).max()
        rivals = sizes + residuals > size  # the largest itself, and those that may yet outgrow it
        if closed or (abs(size - last) <= tol * size and (residuals[rivals] <= tol**0.5 * size).all()):
            return size, True
        Q[k + 1], last = v / T[k + 1, k], size
    return last, False
