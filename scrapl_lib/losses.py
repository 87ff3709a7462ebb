"""Losses between a reconstruction x_hat and its reference x, both audio of shape (batch, 1, samples) (paper, section 4)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .checks import check_pair
from .jets import Jets
from .jtfs import JTFS


def p_loss(theta_hat: Tensor, theta: Tensor) -> Tensor:
    """Mean squared error of each parameter, summed over parameters: the supervised upper bound.

    theta_hat, theta: (batch, n_params) in [0, 1] -> scalar.
    """
    if theta_hat.shape != theta.shape or theta.ndim != 2 or theta.numel() == 0:
        raise ValueError(
            f"theta_hat and theta must both have shape (batch, n_params), got {tuple(theta_hat.shape)} and "
            f"{tuple(theta.shape)}"
        )
    return ((theta_hat - theta) ** 2).mean(dim=0).sum()


LOG_FLOOR = 1e-3  # rho(S) = log(1 + S / LOG_FLOOR)


def _without_autocast(method: Callable) -> Callable:
    @functools.wraps(method)
    def computed(self: nn.Module, x_hat: Tensor, *args: object, **options: object) -> Tensor:
        with torch.autocast(x_hat.device.type if isinstance(x_hat, Tensor) else "cpu", enabled=False):
            return method(self, x_hat, *args, **options)

    return computed


class _ScatteringLoss(nn.Module):
    """What SCRAPLLoss and JTFSLoss share: the transform, and the distance of one path's coefficients.

    Under torch.autocast the audio's own precision is kept; call `backward()` outside of it, as PyTorch asks.
    """

    def __init__(
        self,
        shape: int = 32768,
        J: int = 12,
        Q1: int = 8,
        Q2: int = 2,
        J_fr: int = 3,
        Q_fr: int = 2,
        T: int | str | None = None,
        F: int | str | None = None,
        log1p: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(log1p, bool):
            raise TypeError(f"log1p must be True or False, got {log1p!r}")
        self.jtfs = JTFS(shape, J, Q1, Q2, J_fr, Q_fr, T, F)
        self.log1p = log1p

    @property
    def n_paths(self) -> int:
        """Number P of second-order paths."""
        return self.jtfs.n_paths

    def _distance(self, S_hat: Tensor, S: Tensor) -> Tensor:
        """L2 norm of the difference of two items' coefficients, after rho: (batch, ...) twice -> (batch,).

        Where they are equal, first and second derivatives are 0 (those of `vector_norm` would be 0 and NaN).
        """
        if self.log1p:
            S_hat, S = torch.log1p(S_hat / LOG_FLOOR), torch.log1p(S / LOG_FLOOR)
        difference = (S_hat - S).flatten(1)
        equal = (difference == 0).all(dim=1)
        return torch.linalg.vector_norm(difference.masked_fill(equal[:, None], 1), dim=1).masked_fill(equal, 0)


class SCRAPLLoss(_ScatteringLoss):
    """Distance of one scattering path, drawn anew at every call (paper, section 3; as run: section 4 of the appendix).

    The value is the batch mean of || rho(phi_p(x_hat)) - rho(phi_p(x)) ||_2 with p drawn from `probs`: with uniform
    `probs` its gradient is an unbiased estimate of the gradient of the mean over all paths (Proposition 3.1).

    Values and gradients are true ones, without the factor P of equation 3: gradients are of the order of 1e-9 for audio
    of unit norm. Adam's eps = 1e-8 would swallow them: multiply the loss by 1e8 before `backward()` (not with log1p).

    Args:
        shape, J, Q1, Q2, J_fr, Q_fr, T, F: see `JTFS`; the defaults are the paper's granular and chirplet configuration.
        log1p: compress coefficients, rho(S) = log(1 + S / 1e-3) (TR-808), instead of the identity.
        seed: of the draws. They come from a generator of the loss's own, on the CPU, whatever the device of the audio.
        unbiased: multiply a drawn path's distance by 1 / (P probs[path]). Value and gradient then estimate those of the mean
            over all paths whatever `probs` is, as long as none is 0; without it (the paper) they estimate those of the
            mean weighted by `probs`. A path asked for by `path_idx` is never weighted.

    Attributes:
        n_paths: number of paths P. path_idx: the path of the last call, None before the first. probs: float64 (P,).
        weight: what the last call multiplied the distance by, 1 unless unbiased.
        generator: the torch.Generator of the draws; its state and `path_idx` are in `state_dict()`.

    Raises:
        ValueError, TypeError: audio that is not (batch, 1, shape), unequal or non-finite; IndexError: no such path.
    """

    def __init__(
        self,
        shape: int = 32768,
        J: int = 12,
        Q1: int = 8,
        Q2: int = 2,
        J_fr: int = 3,
        Q_fr: int = 2,
        T: int | str | None = None,
        F: int | str | None = None,
        log1p: bool = False,
        seed: int = 0,
        unbiased: bool = False,
    ) -> None:
        super().__init__(shape, J, Q1, Q2, J_fr, Q_fr, T, F, log1p)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.unbiased, self.weight = unbiased, 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.path_idx: int | None = None
        self._probs = torch.full((self.n_paths,), 1 / self.n_paths, dtype=torch.float64)

    @property
    def probs(self) -> Tensor:
        """Probability of each path, float64 (P,), summing to 1: a copy. Assign any array of P numbers to change it."""
        return self._probs.clone()

    @probs.setter
    def probs(self, value: Tensor) -> None:
        try:
            probs = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"probs must be an array of {self.n_paths} numbers, got {value!r}") from error
        if probs.shape != (self.n_paths,):
            raise ValueError(
                f"probs must have one entry per path, shape ({self.n_paths},), got {tuple(probs.shape)}: "
                "were they computed for another transform?"
            )
        if not torch.isfinite(probs).all() or (probs < 0).any():
            wrong = torch.nonzero(~torch.isfinite(probs) | (probs < 0)).flatten().tolist()
            raise ValueError(f"probs must be finite and not negative, got {probs[wrong[0]].item()} for path {wrong[0]}")
        if abs(probs.sum().item() - 1) > 1e-6:
            raise ValueError(f"probs must sum to 1 within 1e-6, got {probs.sum().item():.9g}: divide them by their sum")
        self._probs = probs / probs.sum()

    def draw(self) -> int:
        """Draw a path from `probs`, remember it as `path_idx` and return it."""
        cumulative = torch.cumsum(self._probs, 0)
        u = torch.rand((), dtype=torch.float64, generator=self.generator)
        self.path_idx = min(int(torch.searchsorted(cumulative, u, right=True)), int(torch.nonzero(self._probs)[-1]))
        return self.path_idx

    @_without_autocast
    def forward(self, x_hat: Tensor, x: Tensor, path_idx: int | None = None, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> scalar. `path_idx` computes that path instead of a drawn one.

        S: `jtfs.path(x, path_idx)`, where it is known already (a reference that comes again).
        """
        check_pair(x_hat, x, self.jtfs.shape)
        self.weight = 1.0
        if path_idx is None:
            self.draw()
            if self.unbiased:
                self.weight = 1 / (self.n_paths * float(self._probs[self.path_idx]))
        else:
            self.path_idx = self.jtfs.checked_path(path_idx).index
        S_hat = self.jtfs.path(x_hat, self.path_idx)
        if S is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                S = self.jtfs.path(x, self.path_idx)
        elif path_idx is None or S.shape != S_hat.shape:
            raise ValueError(
                f"S must be jtfs.path(x, path_idx), of shape {tuple(S_hat.shape)} here, for a given path_idx; got "
                f"{tuple(S.shape)} for path_idx {path_idx}"
            )
        return self.weight * self._distance(S_hat, S).mean()

    def derivatives(
        self, x_hat: Tensor, x: Tensor, jets: Jets, paths: Sequence[int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First and second derivatives of paths' distances in U parameters that x_hat depends on, without a graph.

        x_hat: jets of the reconstructions (batch, K, shape), see `Jets`. x: (batch, 1, shape). Yields (path, gradient
        (batch, U), Hessian (batch, U, U)) of each item's own distance. Much cheaper than to differentiate `forward` twice,
        path by path. Errors as in `JTFS.path_jets`.
        """
        still = Jets(0)
        check_pair(x_hat[:, :1], x, self.jtfs.shape)
        ours, theirs = self.jtfs.path_jets(x_hat, jets, paths), self.jtfs.path_jets(x, still, paths)
        for (path, S_hat), (_, S) in zip(ours, theirs, strict=True):
            if self.log1p:
                S_hat, S = jets.log1p(S_hat, LOG_FLOOR), still.log1p(S, LOG_FLOOR)
            S_hat[:, 0] -= S[:, 0]
            yield path, *jets.distance(S_hat)[1:]

    def get_extra_state(self) -> dict:
        return {"generator": self.generator.get_state(), "path_idx": self.path_idx, "probs": self._probs}

    def set_extra_state(self, state: dict) -> None:
        if not isinstance(state, dict) or not {"generator", "path_idx", "probs"} <= set(state):
            raise ValueError(f"expected what get_extra_state() of a SCRAPLLoss returned, got {state!r:.80}")
        self.probs = state["probs"]
        self.generator.set_state(state["generator"])
        self.path_idx = state["path_idx"]


class JTFSLoss(_ScatteringLoss):
    """Full JTFS distance: mean over all first- and second-order paths of the L2 norm of the difference of coefficients.

    The first order is shared by all paths, and only averaged coefficients are kept for the backward pass, so that memory
    hardly grows with the number of paths. Frames of the reflected padding are dropped (section 10 of the paper's
    notes: SCRAPL's single paths keep them). Arguments, scale and errors as in `SCRAPLLoss`.
    """

    def forward(self, x_hat: Tensor, x: Tensor, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> scalar, the batch mean of `per_item`."""
        return self.per_item(x_hat, x, S).mean()

    @_without_autocast
    def per_item(self, x_hat: Tensor, x: Tensor, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> distance of each item (batch,).

        S: `jtfs(x)`, where it is known already (a reference that comes again).
        """
        check_pair(x_hat, x, self.jtfs.shape)
        if S is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                S = self.jtfs(x)
        S_hat = self.jtfs(x_hat)
        if S.shape != S_hat.shape:
            raise ValueError(f"S must be jtfs(x), of shape {tuple(S_hat.shape)}, got {tuple(S.shape)}")
        return self._distance(S_hat.flatten(0, 1), S.flatten(0, 1)).unflatten(0, S.shape[:2]).mean(dim=1)
