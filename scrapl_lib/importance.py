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
path's own. So whatever products A_{n,u} q one path's iteration has made serve all that follow (`curvature._Space`): among the
directions q of earlier paths, M is a small matrix that costs no product. Three things about its largest eigenvalue are known
without one, from sketches of the products: how far it is off, how large eigenvalues of vectors orthogonal to all directions may be
(random probes, multiplied once, tell), and with both how far those of vectors half in, half out may reach. Where these leave a doubt, an
iteration from the most doubtful vector adds directions until they do not, or until, after some products, the value no longer moves.

Precision. s and H come in float64: as the phases of the audio turn by thousands of radians with theta, H is the small
difference of two large numbers (400 times as large on path 100 of the granular configuration; in float32 the values are
7 % off on path 5). J and the products with M have the weights' dtype.

Several batches: L is the mean over each batch, and M the sum over batches; C is the eigenvalue of that sum.
"""

import hashlib
import io
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .curvature import DIRECTIONS, SHARED_PATHS, Batch, Encode, Encoder, Synthesize


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
    loss: torch.nn.Module,
    encode: Encode,
    synthesize: Synthesize | Sequence[Synthesize],
    inputs: Tensor | Sequence[Tensor],
    params: Iterable[Tensor],
    n_iter: int = 20,
    tol: float = 1e-4,
    *,
    floor: float = 0.0,
    gauss_newton: bool = False,
    paths: Sequence[int] | None = None,
    save: Path | str | None = None,
    fingerprint: str | None = None,
    dtype: torch.dtype = torch.float64,
    chunk: int = 32,
    audio_chunk: int = 4,
    progress: bool = True,
    watch: Callable[[], object] | None = None,
) -> Importance:
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
            error goes with the residual's square); with shared directions, once its error is about this fraction. A warning
            names the paths where n_iter came first. As with power iteration, a largest eigenvalue a little above the next may be
            missed for that one: with shared directions by up to 1 % where the bound is close; where it is not, a value that no
            longer moves is taken, and nothing is proved of those above it.
        floor: least probability of a path as a fraction of the uniform one.
        gauss_newton: leave out the second term of M. No iteration then, but other values wherever the slope s matters.
        paths: only these (default: all); `merge` puts parts together.
        save: JSON file written after each path and resumed from. Beside it, until all is done, <save>.derivatives.npz keeps the
            derivatives, which come before the first path. The directions of earlier paths are not kept: what is computed in several goes may
            differ by what a value may be off, see tol.
        fingerprint: stands for everything that the curvature depends on. Default: SHA-256 of transform, options, weights,
            inputs and synthesized audio to the last bit; give one if parts come from machines that round differently, and with
            a loss of your own, of which it knows only its type and n_paths.
        dtype: of synthesizer and transform. In float32 H is a small difference of large numbers, and some are lost.
        chunk: items the encoder is differentiated for at once; only with no more than that in all do paths share
            directions. audio_chunk: items at once in the transform. Besides, the J take N U W numbers; shared
            directions at most DIRECTIONS W, and N U W more for gradients with their graphs.
        progress: show a bar with the time left. watch: called every few seconds; may raise to stop.
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

    encoder = Encoder(encode, inputs, list(params), chunk, watch)
    batches = [Batch(*parts, dtype, audio_chunk) for parts in zip(inputs, encoder.thetas, synthesize, strict=True)]
    options = {"gauss_newton": gauss_newton, "n_iter": n_iter, "tol": tol, "dtype": str(dtype)}
    fingerprint = fingerprint or _fingerprint(loss, options, encoder.params, inputs, [batch.audio for batch in batches])
    curvature = torch.full((encoder.n_params, loss.n_paths), torch.nan, dtype=torch.float64)
    if save is not None and Path(save).exists():
        saved = _read(save)
        if saved.fingerprint != fingerprint or saved.curvature.shape != curvature.shape:
            raise ValueError(
                f"{save} holds curvature of another configuration, weights or inputs: delete it, or save elsewhere"
            )
        curvature = saved.curvature
    kept, slow = getattr(loss, "path_idx", None), []
    todo = [p for p in wanted if curvature[:, p].isnan().any()]
    shown = {"disable": not progress, "mininterval": 0.5 if sys.stderr.isatty() else 10}
    derivatives_file = None if save is None else Path(f"{save}.derivatives.npz")
    n_items = sum(map(len, inputs))
    if (
        len(todo) >= SHARED_PATHS
        and n_items <= chunk
        and (n_items + 1) * encoder.n_params < DIRECTIONS
        and not gauss_newton
    ):
        encoder.share(shown)
    try:
        found = _derivatives(loss, batches, todo, derivatives_file, fingerprint, shown, encoder.watch)
        for p, s, H in tqdm(found, total=len(todo), desc="theta-IS", unit="path", **shown):
            if not (torch.isfinite(s).all() and torch.isfinite(H).all()):
                raise FloatingPointError(
                    f"path {p}: its derivatives with respect to theta are not finite, look at that path's loss"
                )
            values, converged = zip(
                *(encoder.largest_eigenvalue(s, H, u, n_iter, tol, gauss_newton) for u in range(encoder.n_params)),
                strict=True,
            )
            if not np.isfinite(values).all():
                raise FloatingPointError(
                    f"path {p}: its curvature is not finite ({values}), look at the encoder's derivatives"
                )
            slow += [] if all(converged) else [p]
            curvature[:, p] = torch.tensor(values, dtype=torch.float64)
            if save is not None:
                _write(Path(save), curvature, fingerprint)
    finally:
        if hasattr(loss, "path_idx"):
            loss.path_idx = kept
    if derivatives_file is not None:
        derivatives_file.unlink(missing_ok=True)
    if slow:
        warnings.warn(
            f"the largest eigenvalues of paths {slow} have not converged to {tol} after n_iter = {n_iter} products",
            stacklevel=2,
        )
    return Importance(curvature, floor, fingerprint)


def _derivatives(
    loss: torch.nn.Module,
    batches: list[Batch],
    paths: list[int],
    file: Path | None,
    fingerprint: str,
    shown: dict,
    watch: Callable[[], object],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each path with its s (N, U) and H (N, U, U) of all batches' items.

    A loss with `derivatives` has them of all paths at once, some items after the other: those that are done are kept in `file`.
    """
    U, at_once = batches[0].jets.U, hasattr(loss, "derivatives")
    for group in [paths] if at_once and paths else [[p] for p in paths]:
        s, H = torch.zeros(0, len(group), U, dtype=torch.float64), torch.zeros(0, len(group), U, U, dtype=torch.float64)
        if at_once and file is not None:
            s, H = _read_derivatives(file, group, fingerprint) or (s, H)
        n_items = sum(len(batch.theta) for batch in batches)
        with tqdm(
            total=len(group) * n_items,
            initial=len(group) * len(s),
            desc="derivatives",
            unit="item",
            leave=False,
            **shown,
        ) as bar:
            start = 0
            for batch, items in [(of, items) for of in batches for items in of.chunks()]:
                end = start + len(batch.theta[items])
                if end > len(s):
                    watch()
                    new = batch.slopes_and_curvatures(loss, group, items, bar)
                    s, H = (torch.cat([old[:start].to(part), part]) for old, part in zip((s, H), new, strict=True))
                    if at_once and file is not None:
                        _write_derivatives(file, group, fingerprint, s, H)
                start = end
        for i, p in enumerate(group):
            yield p, s[:, i], H[:, i]


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


def paths_in(file: Path | str, fingerprint: str) -> list[int]:
    """The paths that `theta_importance(save=file)` has written.

    Raises: ValueError for a broken file, and for one of another problem.
    """
    if (found := _read(file)).fingerprint != fingerprint:
        raise ValueError(f"{file} holds curvature of another configuration, weights or inputs: delete it")
    return found.paths


def forget(file: Path | str, paths: Iterable[int]) -> None:
    """Take paths out of what `theta_importance(save=file)` wrote, such as those that another part has, too.

    Raises: ValueError for a broken file.
    """
    found, paths = _read(file), set(paths)
    if gone := [p for p in found.paths if p in paths]:
        found.curvature[:, gone] = torch.nan
        _write(Path(file), found.curvature, found.fingerprint)


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
            raise ValueError(
                f"expected the gradient of theta_hat, (batch, {U}), got {got}: call theta_hat.retain_grad() first"
            )
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


# ---- files --------------------------------------------------------------------------------------------------------


def _fingerprint(
    loss: torch.nn.Module, options: dict, params: list[Tensor], inputs: list[Tensor], audio: list[Tensor]
) -> str:
    """SHA-256 of what curvature depends on."""
    names = ("shape", "J", "Q1", "Q2", "J_fr", "Q_fr", "T", "F")
    transform = {name: getattr(getattr(loss, "jtfs", None), name, None) for name in names}
    transform |= {"loss": type(loss).__name__, "n_paths": loss.n_paths, "log1p": getattr(loss, "log1p", None)}
    digest = hashlib.sha256(json.dumps([transform, options], sort_keys=True).encode())
    for tensor in [*params, *inputs, *audio]:
        digest.update(
            f"{tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes()
        )
    return digest.hexdigest()


def _write(path: Path, curvature: Tensor, fingerprint: str) -> None:
    """{"fingerprint", "shape": [U, P], "curvature": {path: [U values]}}."""
    there = torch.nonzero(~curvature.isnan().any(dim=0)).flatten().tolist()
    content = {
        "fingerprint": fingerprint,
        "shape": list(curvature.shape),
        "curvature": {p: curvature[:, p].tolist() for p in there},
    }
    _write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _read(path: Path | str) -> Importance:
    try:
        content = json.loads(Path(path).read_text())
        curvature = torch.full(tuple(content["shape"]), torch.nan, dtype=torch.float64)
        for p, values in content["curvature"].items():
            curvature[:, range(curvature.shape[1])[int(p)]] = torch.tensor(values, dtype=torch.float64)
        return Importance(curvature, 0.0, content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no file of theta_importance ({error}): delete it and compute its paths again"
        ) from error


def _write_derivatives(path: Path, paths: list[int], fingerprint: str, s: Tensor, H: Tensor) -> None:
    content = io.BytesIO()
    np.savez(content, paths=np.array(paths), fingerprint=np.array(fingerprint), s=s.cpu().numpy(), H=H.cpu().numpy())
    _write_atomic(path, content.getvalue())


def _read_derivatives(path: Path, paths: list[int], fingerprint: str) -> tuple[Tensor, Tensor] | None:
    """s and H of the first items, as far as they were computed; None if there is no file, or not of all these paths."""
    if not path.exists():
        return None
    try:
        with np.load(path) as content:
            there, of, s, H = content["paths"].tolist(), str(content["fingerprint"]), content["s"], content["H"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of theta_importance ({error}): delete it") from error
    if of != fingerprint:
        raise ValueError(
            f"{path} holds derivatives of another configuration, weights or inputs: delete it, or save elsewhere"
        )
    if not set(paths) <= set(there):
        return None
    rows = [there.index(p) for p in paths]
    return torch.from_numpy(s[:, rows]), torch.from_numpy(H[:, rows])


def _write_atomic(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
