"""What theta-importance sampling asks of an encoder, a synthesizer and a loss: slopes s, curvatures H, and eigenvalues of M.

The mathematics and its letters are told in `importance`. Parts: `Batch` finds s and H of every path; `Encoder` has the
gradients J and the products with M, one path at a time or, by a `_Space` of directions that all paths share, of many.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import eig
from scipy.sparse.linalg import ArpackError, LinearOperator, eigs
from torch import Tensor
from tqdm.auto import tqdm

from .jets import Jets

Encode = Callable[[Tensor], Tensor]
Synthesize = Callable[[Tensor], Tensor]
START_NOISE = (
    1.0  # random part of Arnoldi's first vector beside the Gauss-Newton one: eigenvectors outside the span of the J
)
# are found through it
SHARED_PATHS = 16  # so many paths are worth the probes
PROBES, LEAST = 64, 34.6  # the sum of so many squares of normal numbers is less than this once in 1000 times
SKETCH = 1021  # numbers that stand for a vector of weights where only scalar products are asked for: to 3 % of the lengths' product
ABOVE = 0.01  # no eigenvalue is taken for the largest while another may be larger than it by more than this fraction
NEW = 0.1  # a unit vector with less than this outside of the shared directions adds none
SETTLED, DOUBT = (
    8,
    2.0,
)  # after so many products of its own a path's value is taken when it no longer moves, unless one so many
# times as large is possible
DIRECTIONS = 2048  # at most, of all parameters together: 5 GB with 604 k weights in float32
DENSE = 150  # matrices up to this size have all their eigenvalues computed
SAME = 1e-5  # two calls of a deterministic function agree to this fraction of the largest value, on CUDA too


# ---- slopes s and curvatures H with respect to theta --------------------------------------------------------------


def _grad(y: Tensor, x: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
    """d y.sum() / dx, zero where y does not depend on x."""
    if not y.requires_grad:
        return tuple(torch.zeros_like(t) for t in x)
    return torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True, **options)


def _check_same(name: str, first: Tensor, second: Tensor, advice: str) -> None:
    if first.shape != second.shape or not (first - second).abs().max() <= SAME * first.abs().max():
        raise ValueError(f"{name}: {advice}")


class Batch:
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
        _check_same(
            "synthesize is not deterministic", self.audio, again, "two calls on one theta differ; fix its seeds"
        )
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

    def chunks(self) -> list[slice]:
        """The items, so many at once as are differentiated together."""
        return [slice(start, start + self.chunk) for start in range(0, len(self.theta), self.chunk)]

    def slopes_and_curvatures(
        self, loss: torch.nn.Module, paths: Sequence[int], c: slice, bar: tqdm
    ) -> tuple[Tensor, Tensor]:
        """s (n, paths, U) and H (n, paths, U, U) of the n items c."""
        of_loss = loss.derivatives if hasattr(loss, "derivatives") else functools.partial(_derivatives_backwards, loss)
        found = {}
        for p, s, H in of_loss(self.moving[c], self.x[c], self.jets, paths):
            found[p] = s / len(self.theta), H / len(self.theta)
            bar.update(len(s))
        s, H = zip(*(found[p] for p in paths), strict=True)
        return torch.stack(s, dim=1), torch.stack(H, dim=1)


def _derivatives_backwards(
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


class Encoder:
    """thetas: [(batch, U)]; J: (N, U, W); products with M. spaces: of each parameter if paths share directions, else none.
    watch: called before each product."""

    def __init__(
        self,
        encode: Encode,
        inputs: list[Tensor],
        params: list[Tensor],
        chunk: int,
        watch: Callable[[], object] | None = None,
    ) -> None:
        if not params or not all(isinstance(w, Tensor) and w.requires_grad for w in params):
            raise ValueError("params must be the encoder's weights: at least one tensor, all with requires_grad")
        self.encode, self.params, self.graph, self.watch = encode, params, None, watch or (lambda: None)
        self.parts = torch.cat(inputs).split(chunk)
        self.thetas = [self._checked_theta(x) for x in inputs]
        self.n_params = self.thetas[0].shape[1]
        pairs = [
            (x[n : n + 1], theta[n : n + 1])
            for x, theta in zip(inputs, self.thetas, strict=True)
            for n in range(len(x))
        ]
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
        self.gradients = [
            [_grad(theta[u], self.params, create_graph=True) for u in range(self.n_params)] for theta in thetas
        ]
        probes = torch.randn(PROBES, self.J.shape[2], generator=torch.Generator().manual_seed(1)).to(self.J)
        self.spaces = [_Space(self, u, probes, shown) for u in range(self.n_params)]

    def hessian_products(self, v: Tensor, u: int) -> Tensor:
        """A_{n,u} v of every item n: (N, W)."""
        self.watch()
        like_params = self._like_params(v)

        def of_item(gradients: list[tuple[Tensor, ...]]) -> Tensor:
            along = sum((a * g).sum() for a, g in zip(like_params, gradients[u], strict=True))
            return _flat(_grad(along, self.params, retain_graph=True))

        return torch.stack(
            _side_by_side(of_item, self.gradients, torch.get_num_threads() if v.device.type == "cpu" else 1)
        )

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
        used = (
            torch.autograd.grad(alone.sum(), self.params, retain_graph=True, allow_unused=True)
            if alone.requires_grad
            else [None] * len(self.params)
        )
        if unused := [i for i, g in enumerate(used) if g is None]:
            raise ValueError(
                f"encode does not use params {unused} of 0 ... {len(used) - 1} (or was called without gradients): "
                "leave those out"
            )
        return torch.stack([_flat(_grad(alone[0, u], self.params, retain_graph=True)) for u in range(theta.shape[1])])

    def largest_eigenvalue(
        self, s: Tensor, H: Tensor, u: int, n_iter: int, tol: float, gauss_newton: bool
    ) -> tuple[float, bool]:
        """|largest eigenvalue| of M_u for slopes s (N, U) and curvatures H (N, U, U), and whether it has converged."""
        s, H = s[:, u], H[:, u]
        scale = float(torch.maximum(s.abs().max(), H.abs().max()))
        if scale == 0:
            return 0.0, True
        s, H = s / scale, H / scale  # a gradient of 1e-9 and its square stay away from float32's end
        if self.spaces:
            size, converged = self.spaces[u].largest_eigenvalue(s.to(self.J), H.to(self.J), n_iter, tol)
            return scale * size, converged
        # Gauss-Newton: if A c = lambda c, then J_u^T c is an eigenvector of the first term
        size, c, _ = _largest(torch.einsum("nv,nvm->nm", H.to(self.gram), self.gram[..., u]).cpu().numpy())
        converged = True
        if not gauss_newton:
            s, H = s.to(self.J), H.to(self.J)
            start = torch.as_tensor(c.real).to(self.J) @ self.J[:, u]
            start = start / start.norm().clamp_min(torch.finfo(start.dtype).tiny) + START_NOISE * self.random
            size, converged = _arnoldi(self._product(s, H, u), start, n_iter, tol)
        return scale * size, converged

    def _product(self, s: Tensor, H: Tensor, u: int) -> Callable[[Tensor], Tensor]:
        """v -> M_u v. If all items are one part, its graph serves all products; else it is made anew for each."""
        sizes = [len(part) for part in self.parts]
        kept = [self._slope_gradient(self.parts[0], s, u)] if len(sizes) == 1 else None

        def product(v: Tensor) -> Tensor:
            self.watch()
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

    Q: orthonormal directions (k, W), the first of them those of a random vector and of the J_u, so that what M leads out of Q comes of its
    second term alone; and of all other J, where they leave room for more, so that what it leads into Q does, too. Of the products A_n q
    only K = Q A_n Q^T, (N, k, k), and sketches SAQ, (N, k, SKETCH), are kept; besides JQ = J_n Q^T, (N, U, k), and sketches SQ and SJ. G: the m probes, random and not
    normalized, with GQ = G Q^T, GAQ = G A_n Q^T and sketches SAG of the same kind. limit: the largest k.
    """

    def __init__(self, encoder: Encoder, u: int, probes: Tensor, shown: dict) -> None:
        J, self.encoder, self.u, self.G, self.k = encoder.J, encoder, u, probes, 0
        N, U, W = J.shape
        self.limit = DIRECTIONS // U
        self.sign = (2 * torch.randint(2, (W,), generator=torch.Generator().manual_seed(2)) - 1).to(J)
        self.SJ = torch.stack([self._sketch(of_item) for of_item in J])
        self.Q, self.SQ, self.SAQ = J.new_zeros(0, W), J.new_zeros(0, SKETCH), J.new_zeros(N, 0, SKETCH)
        self.K, self.JQ = J.new_zeros(N, 0, 0), J.new_zeros(N, U, 0)
        self.GQ, self.GAQ = J.new_zeros(PROBES, 0), J.new_zeros(N, PROBES, 0)
        of_others = [J[:, v] for v in range(U) if v != u and 2 * (1 + N * U) <= self.limit]
        first = torch.cat([encoder.random[None], J[:, u], *of_others])
        with tqdm(total=PROBES + len(first), desc=f"directions of parameter {u}", leave=False, **shown) as bar:
            SAG = []
            for g in self.G:
                SAG.append(self._sketch(encoder.hessian_products(g, u)))
                bar.update()
            self.SAG = torch.stack(SAG, dim=1)
            for v in first:
                q = _orthogonal(v / v.norm().clamp_min(torch.finfo(v.dtype).tiny), self.Q[: self.k])
                if (length := float(q.norm())) > 100 * torch.finfo(q.dtype).eps:
                    self._take_in(q / length, encoder.hessian_products(q / length, u))
                bar.update()

    @property
    def full(self) -> bool:
        return self.k == self.limit

    def _sketch(self, v: Tensor) -> Tensor:
        """(..., W) -> (..., SKETCH): sums of some weights each, with random signs. Scalar products stay about as they are."""
        return (
            torch.nn.functional.pad(v * self.sign, (0, -v.shape[-1] % SKETCH)).unflatten(-1, (-1, SKETCH)).sum(dim=-2)
        )

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
        self.Q[k], self.SQ[k], self.JQ[..., k], self.GQ[:, k], self.k = (
            q,
            self._sketch(q),
            self.encoder.J @ q,
            self.G @ q,
            k + 1,
        )

    def product(self, s: Tensor, H: Tensor, v: Tensor, take_in: bool = True) -> Tensor:
        """M_u v of the path with these s (N,) and H (N, U), for a unit vector v; what is new in v becomes a direction."""
        A_v, J = self.encoder.hessian_products(v, self.u), self.encoder.J
        if take_in:
            self._take_in(v, A_v)
        return (H * (J @ v)).sum(dim=1) @ J[:, self.u] + s @ A_v

    def largest_eigenvalue(self, s: Tensor, H: Tensor, n_iter: int, tol: float) -> tuple[float, bool]:
        """|largest eigenvalue| of M of the path with these s (N,) and H (N, U), and whether it has converged (see `theta_importance`).

        Looks; where what it sees is not sure, a row of Arnoldi's vectors begins with the most promising one, and it looks again after
        every other of their products. Where the bound stays too wide to be sure, a value that no longer moves will do.
        """
        row, n, last, seen = [], 0, np.nan, self.look(s, H)
        while not (seen.sure(tol) or (n >= SETTLED and seen.settled(last, tol))):
            if n >= n_iter or not np.isfinite(seen.size):
                return seen.size, False
            if self.full:
                return _arnoldi(functools.partial(self.product, s, H), seen.way, n_iter - n, tol)
            if not row:
                start = seen.way
                if (
                    seen.outside > seen.size
                ):  # a sum of probes taken in would hide from them what they show; what M makes of it does not
                    start, n = self.product(s, H, start, take_in=False), 1
                row = [start / start.norm()]
            for _ in range(min(2, n_iter - n)):
                v = _orthogonal(self.product(s, H, row[-1]), torch.stack(row))
                row.append(v / v.norm().clamp_min(torch.finfo(v.dtype).tiny))
                n += 1
            last, seen = seen.size, self.look(s, H)
        return seen.size, True

    def look(self, s: Tensor, H: Tensor) -> "_Seen":
        """What can be said of a path without a product.

        Among the directions Q: A = Q M Q^T. Q M y = size y for its best vector y, and z Q M = size z for the one on the other side. What
        M takes of them to outside of Q, C y and z L, tells how far the eigenvalue is off: by about |z L| |C y| / size / |z y|.
        Outside of Q: B is what M does among all that is orthogonal to Q, symmetric. For random g the matrix of (B g_i) . (B g_j)
        is |B|^2 a a^T, a = m normal random numbers, and another positive one that knows nothing of a: along a it is about its trace
        / m. So its largest eigenvalue, less its own trace / m, is at least about |B|^2 |a|^2.
        Both: no eigenvalue of a symmetric M is larger than those of [[A, L], [C, +-|B|]], the reach (for other M it says less).
        The vector that reaches farthest is the way to go, with the sum of probes that shows most where |B| may be the largest.
        """
        Q, SQ, JQ = self.Q[: self.k], self.SQ[: self.k], self.JQ[..., : self.k]
        S = torch.einsum("n,nij->ij", s, self.K[:, : self.k, : self.k])
        A = S + JQ[:, self.u].T @ torch.einsum("nv,nvk->nk", H, JQ)
        GQ, GAQ = self.GQ[:, : self.k], torch.einsum("n,nik->ik", s, self.GAQ[..., : self.k])
        SAQ = torch.einsum("n,nkd->kd", s, self.SAQ[:, : self.k])
        C = SAQ - S @ SQ  # a row for each direction: transposed
        L = C + JQ[:, self.u].T @ torch.einsum("nv,nvd->nd", H, self.SJ - JQ @ SQ)
        BG = torch.einsum("n,nid->id", s, self.SAG) - GQ @ SAQ - (GAQ - GQ @ S) @ SQ
        if not all(torch.isfinite(matrix).all() for matrix in (A, C, L, BG)):
            return _Seen(np.nan, np.nan, np.nan, np.nan, self.encoder.random)
        A, C, L = (matrix.double().cpu().numpy() for matrix in (A, C, L))
        size, y, z = _largest(A)
        error = np.linalg.norm(z @ L) * np.linalg.norm(y @ C) / np.maximum(size * abs(z @ y), np.finfo(float).tiny)
        spread, sums = torch.linalg.eigh((BG @ BG.T).double())
        outside = float((spread[-1] - spread.mean()) / LEAST) ** 0.5
        reach, way = max((_largest_across(A, L, C, sign * outside) for sign in (1, -1)), key=lambda found: found[0])
        way = torch.as_tensor(way if way.any() else y.real).to(Q) @ Q
        if outside > size:
            probe = _orthogonal(self.G.T @ sums[:, -1].to(Q), Q)
            way = way + probe / probe.norm().clamp_min(torch.finfo(probe.dtype).tiny)
        return _Seen(size, float(error), outside, reach, way / way.norm().clamp_min(torch.finfo(way.dtype).tiny))


class _Seen(NamedTuple):
    """What `_Space.look` finds. size: |largest eigenvalue| among the directions; error: about how far off it is, if it is the largest;
    outside: a bound of the eigenvalues orthogonal to them; reach: a bound of all; way: the vector (W,) to look from for more."""

    size: float
    error: float
    outside: float
    reach: float
    way: Tensor

    def sure(self, tol: float) -> bool:
        return self.error <= tol * self.size and self.reach <= (1 + ABOVE) * self.size

    def settled(self, last: float, tol: float) -> bool:
        return max(self.error, abs(self.size - last)) <= tol * self.size and self.reach <= DOUBT * self.size


def _largest(A: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """|largest eigenvalue| of a small matrix and its vectors y, z of length 1, A y = value y, z A = value z; NaN if A is not finite."""
    if not np.isfinite(A).all():
        return np.nan, np.zeros(len(A)), np.zeros(len(A))
    values = None
    if len(A) > DENSE:
        with contextlib.suppress(ArpackError):  # zero, or too hard for it
            (values, right), (again, left) = (_outer(of, 4) for of in (A, A.T))
    if values is None:
        values, left, right = eig(A, left=True)
        again, left = values, left.conj()
    first = np.abs(values).argmax()
    return float(abs(values[first])), right[:, first], left[:, np.abs(again - values[first]).argmin()]


def _largest_across(A: np.ndarray, L: np.ndarray, C: np.ndarray, b: float) -> tuple[float, np.ndarray]:
    """|largest eigenvalue| of [[A, L], [C^T, b]], and the real part, of its vector of length 1, that A acts on; infinity and 0 if not found."""
    k, width = len(A), sum(C.shape)
    if not (A.any() or L.any() or C.any() or b):
        return 0.0, np.zeros(k)
    apply = LinearOperator(
        (width, width), matvec=lambda v: np.concatenate([A @ v[:k] + L @ v[k:], v[:k] @ C + b * v[k:]]), dtype=float
    )
    try:
        values, vectors = _outer(apply, 1, tol=1e-3)
    except ArpackError:
        return np.inf, np.zeros(k)
    return float(abs(values[0])), vectors[:k, 0].real


def _outer(A: np.ndarray | LinearOperator, n: int, tol: float = 1e-9) -> tuple[np.ndarray, np.ndarray]:
    """The n eigenvalues of largest magnitude, and their vectors. Raises: ArpackError."""
    return eigs(A, k=n, ncv=40, v0=np.random.default_rng(0).standard_normal(A.shape[0]), tol=tol)


def _side_by_side(function: Callable[[object], Tensor], items: Sequence, n_threads: int) -> list[Tensor]:
    """[function(item), ...], by threads of one core each: the operations of a single item are too small to share."""
    if n_threads == 1:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(n_threads)  # the pool's own setting would hold for threads to come


def _orthogonal(v: Tensor, Q: Tensor) -> Tensor:
    """What of v is orthogonal to the rows of Q, which are so to each other."""
    for _ in range(2):  # once leaves rounding errors in the directions of Q
        v = v - (Q @ v) @ Q
    return v


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, n_iter: int, tol: float) -> tuple[float, bool]:
    """|largest eigenvalue| of a linear map (W,) -> (W,), and whether it has converged (see `theta_importance`).

    Q has orthonormal rows that span start, M start, M^2 start, ...; the eigenvalues of T = Q M Q^T approach the outer
    ones of M. A space that M maps into itself ends the iteration.
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
        first = np.abs(values).argmax()
        size, residual = abs(values[first]), T[k + 1, k] * abs(vectors[k, first])
        closed = T[k + 1, k] <= 10 * torch.finfo(Q.dtype).eps * np.abs(T).max()
        if closed or (abs(size - last) <= tol * size and residual <= tol**0.5 * size):
            return float(size), True
        Q[k + 1], last = v / T[k + 1, k], size
    return float(last), False
