"""Losses between a reconstruction x_hat and its reference x, both audio (batch, 1, samples) (paper, section 4).

With `transform`, `SCRAPLLoss` and `ScatteringLoss` compare whatever that transform takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_bool, check_index, check_name, check_pair, check_probs, check_seed
from .jets import Jets
from .jtfs import JTFS, Span
from .transforms import LOG_FLOOR, Distances, PathTransform, ScatteringLoss, of_checked_inputs, path_group


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


JTFS_DEFAULTS = (32768, 12, 8, 2, 3, 2, None, None)  # shape to F of the paper's granular and chirplet tasks


class BackwardPasses(NamedTuple):
    """Whose gradients are pending: how many backward passes went through a loss, the path of the last one, and the
    number (from 1) of the first in the unbroken row of passes of that path."""

    n: int = 0
    path: int | None = None
    since: int = 0


class SCRAPLLoss(Distances):
    """Distance of one scattering path, drawn anew at every call (paper, section 3; as run: section 4 of the appendix).

    The value is the batch mean of || rho(phi_p(x_hat)) - rho(phi_p(x)) ||_2 with p drawn from `probs`: with uniform
    `probs` its gradient is an unbiased estimate of the gradient of the mean over all paths (Proposition 3.1), or with
    another `draw` over all draws. (If these share no path but differ in size, that is not the mean over paths:
    `probs` proportional to their sizes estimate that one.)

    Values and gradients are true ones, without the factor P of equation 3: gradients are of the order of 1e-9 for audio
    of unit norm. Adam's eps = 1e-8 would swallow them: multiply the loss by 1e8 before `backward()` (not with log1p).

    Evaluation: in `loss.eval()` and under `torch.no_grad()` draws come from a generator of their own, and neither
    `path_idx`, `weight` nor the draws of training change. A gradient taken there counts as one of a step, as it may
    have reached the weights: take it before the step's `zero_grad()`.

    Accumulation: a step's gradients must be of one path: `loss(x_hat, x, path_idx=loss.path_idx)` for all parts but the
    first (if unbiased, times `weight`). Activation checkpointing: `path = loss.draw()` outside,
    `loss(x_hat, x, path_idx=path)` inside. More: docs/training_loops.md.

    Args:
        shape, J, Q1, Q2, J_fr, Q_fr, T, F: see `JTFS`; by default the paper's granular and chirplet configuration.
        log1p: compress coefficients, rho(S) = log(1 + S / 1e-3) (TR-808), instead of the identity.
        seed: of the draws, 0 to 2^64 - 1. They are made on the CPU by the loss's own generators.
        unbiased: multiply a drawn path's distance by 1 / (P probs[path]). Value and gradient then estimate those of the
            mean over all draws whatever `probs` is, as long as none is 0; without it (the paper) they estimate those of
            the mean weighted by `probs`. A path asked for by `path_idx` is not weighted: see `weight`.
        draw: what one draw takes. "path": a single path. "rate" (or a name in the transform's `groups`): all paths of a
            second-order wavelet, which cost less than two of them on average (beyond the paper). Or a list of groups of
            path numbers: one of them is drawn, and with a single group the same subset is taken every time. The value
            is the mean over the paths taken. P, `n_paths`, `path_idx` and `probs` count draws: P-Adam, P-SAGA and
            theta-IS work with any kind.
        transform: in place of the JTFS that shape to F describe, any `PathTransform`, such as `Scattering2D` for images
            (beyond the paper).

    Attributes:
        n_paths: number of draws P, with draw="path" that of paths. probs: float64 (P,).
        draws: the numbers of the paths that each draw takes.
        path_idx: the path of the last training call or draw, None before the first.
        weight: 1 / (P probs[path_idx]) if unbiased, else 1: the factor of a drawn distance, by which those asked for by
            `path_idx` (accumulation, activation checkpointing) are to be multiplied.
        backward_passes: by which `PAdam` and `PSAGA` see that a gradient is of `path_idx`.

    `state_dict()` holds `probs`, `path_idx` and the state of the draws.

    Raises:
        ValueError, TypeError: audio that is not (batch, 1, shape), unequal or non-finite (what `transform.check` and
        `path` raise, with another transform); shape to F together with `transform`; IndexError: no such path;
        RuntimeError: a draw inside a backward pass, where activation checkpointing calls the loss a second time.
    """

    def __init__(
        self,
        shape: int = 32768,
        J: int = 12,
        Q1: int = 8,
        Q2: int = 2,
        J_fr: int = 3,
        Q_fr: int = 2,
        T: Span = None,
        F: Span = None,
        log1p: bool = False,
        seed: int = 0,
        unbiased: bool = False,
        draw: str | Sequence[Sequence[int]] = "path",
        transform: PathTransform | None = None,
    ) -> None:
        sizes = (shape, J, Q1, Q2, J_fr, Q_fr, T, F)
        if transform is not None and sizes != JTFS_DEFAULTS:
            raise TypeError("shape, J, ..., F describe a JTFS, and a transform is given, too: leave out one of the two")
        super().__init__(JTFS(*sizes) if transform is None else transform, log1p)
        self.draws = self._checked_draws(draw)
        seed, self.unbiased = check_seed(seed), check_bool("unbiased", unbiased)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.evaluation_generator = torch.Generator("cpu").manual_seed(seed ^ 0x9E3779B9)
        self.path_idx: int | None = None
        self.backward_passes = BackwardPasses()
        self._probs = torch.full((self.n_paths,), 1 / self.n_paths, dtype=torch.float64, device="cpu")

    @property
    def n_paths(self) -> int:
        """Number P of draws; with draw="path", of second-order paths."""
        return len(self.draws)

    def _checked_draws(self, draw: str | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        P = self.transform.n_paths
        single = {"path": [(p,) for p in range(P)]}
        groups = single | getattr(self.transform, "groups", {}) | single
        if isinstance(draw, str):
            draw = groups[check_name("draw", draw, groups)]
        try:
            draws = tuple(tuple(check_index("path number", p, P, "this transform has paths") for p in g) for g in draw)
        except TypeError as error:
            names = ", ".join(map(repr, groups))
            raise TypeError(f"draw must be {names} or a list of groups of path numbers: {error}") from error
        if not draws or not all(draws) or any(len(set(group)) < len(group) for group in draws):
            raise ValueError(f"draw must hold groups of different path numbers, none of them empty, got {draw!r:.200}")
        return draws

    @property
    def probs(self) -> Tensor:
        """Probability of each path, float64 (P,), summing to 1: a copy. Assign any array of P numbers to change it."""
        return self._probs.clone()

    @probs.setter
    def probs(self, value: Tensor) -> None:
        probs = check_probs(value, self.n_paths)
        self._probs = probs / probs.sum()

    @property
    def weight(self) -> float:
        """1 / (P probs[path_idx]) if unbiased and a path was drawn, else 1."""
        return 1.0 if self.path_idx is None else self._weight(self.path_idx)

    def _weight(self, path: int) -> float:
        if not self.unbiased:
            return 1.0
        if not (prob := float(self._probs[path])):
            raise ValueError(f"path {path} has probability 0, which no weight makes up for: give it more in `probs`")
        return 1 / (self.n_paths * prob)

    def _in_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def draw(self) -> int:
        """Draw a path from `probs` and return it; in training remember it as `path_idx`, too."""
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "SCRAPLLoss was to draw a path inside a backward pass: activation checkpointing calls it twice, and "
                "the gradient would be another path's. Call path = loss.draw() outside of the checkpointed function "
                "and loss(x_hat, x, path_idx=path) inside"
            )
        generator = self.generator if self._in_training() else self.evaluation_generator
        u = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
        cumulative = torch.cumsum(self._probs, 0)
        path = min(int(torch.searchsorted(cumulative, u, right=True)), int(torch.nonzero(self._probs)[-1]))
        if self._in_training():
            self.path_idx = path
        return path

    def coefficients(self, x: Tensor, path_idx: int) -> Tensor:
        """What a draw compares: `transform.path` if it takes a single path, else its `path_group`."""
        paths = self.draws[check_index("path_idx", path_idx, self.n_paths, "this loss has draws")]
        return self.transform.path(x, *paths) if len(paths) == 1 else path_group(self.transform, x, paths)

    @of_checked_inputs
    def forward(self, x_hat: Tensor, x: Tensor, path_idx: int | None = None, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, 1, shape) -> scalar. `path_idx` computes that path instead of a drawn one.

        S: `coefficients(x, path_idx)`, where it is known already (a reference that comes again).
        """
        weight = 1.0
        if path_idx is not None:
            path = check_index("path_idx", path_idx, self.n_paths, "this loss has draws")
        elif S is not None:
            raise ValueError(
                "S must be loss.coefficients(x, path_idx) for a given path_idx, got path_idx None: give both"
            )
        else:
            path = self.draw()
            weight = self._weight(path)
        if self._in_training():
            self.path_idx = path
        transform = functools.partial(self.coefficients, path_idx=path)
        dims = min(len(self.draws[path]), 2)  # batch; of a group batch and paths
        value = weight * self._distances(transform, x_hat, x, S, "loss.coefficients(x, path_idx)", dims).mean()
        if value.requires_grad:
            value.register_hook(functools.partial(self._count_backward, path))
        return value

    def _count_backward(self, path: int, grad: Tensor) -> None:
        n, last, since = self.backward_passes
        self.backward_passes = BackwardPasses(n + 1, path, since if path == last else n + 1)

    def derivatives(
        self, x_hat: Tensor, x: Tensor, jets: Jets, paths: Sequence[int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First and second derivatives of the distances of `paths` (draws, see `n_paths`) in U parameters that x_hat
        depends on, without a graph.

        x_hat: jets of the reconstructions (batch, K, shape), see `Jets`. x: (batch, 1, shape). Yields (path, gradient
        (batch, U), Hessian (batch, U, U)) of each item's own distance. Much cheaper than differentiating `forward`
        twice for each path. Only of a transform with `path_jets`; errors as there.
        """
        still, found = Jets(0), {}
        check_pair(x_hat[:, :1], x, self.transform.check)
        single = list(dict.fromkeys(p for path in paths for p in self.draws[path]))
        ours, theirs = self.transform.path_jets(x_hat, jets, single), self.transform.path_jets(x, still, single)
        for (path, S_hat), (_, S) in zip(ours, theirs, strict=True):
            if self.log1p:
                S_hat, S = jets.log1p(S_hat, LOG_FLOOR), still.log1p(S, LOG_FLOOR)
            S_hat[:, 0] -= S[:, 0]
            found[path] = jets.distance(S_hat)[1:]
        for path in paths:
            gradients, hessians = zip(*(found[p] for p in self.draws[path]), strict=True)
            yield path, torch.stack(gradients).mean(dim=0), torch.stack(hessians).mean(dim=0)

    def _settings(self) -> dict[str, object]:
        """All that decides what path number i measures."""
        own = {"transform": type(self.transform).__name__, "transform_paths": self.transform.n_paths}
        draws = "path" if self.draws == self._checked_draws("path") else [list(draw) for draw in self.draws]
        own = getattr(self.transform, "settings", own)
        return own | {"log1p": self.log1p, "unbiased": self.unbiased, "draws": draws}

    def get_extra_state(self) -> dict:
        """The state of the draws: no tensors, as `torch.load(map_location=...)` would move them to a device."""
        generators = {"generator": self.generator, "evaluation_generator": self.evaluation_generator}
        state = {name: bytes(generator.get_state().tolist()) for name, generator in generators.items()}
        return state | {"path_idx": self.path_idx, "probs": self._probs.tolist(), "settings": self._settings()}

    def set_extra_state(self, state: dict) -> None:
        """Go on from what `get_extra_state()` returned; ValueError, and nothing changes, if it is another loss's."""
        if not isinstance(state, dict) or not {"generator", "path_idx", "probs"} <= set(state):
            raise ValueError(f"expected what get_extra_state() of a SCRAPLLoss returned, got {state!r:.80}")
        path, own, generators = state["path_idx"], self._settings(), {}
        # earlier states have no settings or fewer, and generators as tensors
        theirs = {"unbiased": False, "draws": "path"} | dict(state.get("settings") or own)
        other = [name for name in {**own, **theirs} if theirs.get(name) != own.get(name)]
        if other:
            named = [f"{name} = {theirs.get(name)!s:.40} (here {own.get(name)!s:.40})" for name in other]
            raise ValueError(f"the state is of a loss with {', '.join(named)}: load it into one of the same settings")
        probs = check_probs(state["probs"], self.n_paths)
        for name in {"generator", "evaluation_generator"} & set(state):
            try:
                values = torch.tensor(list(state[name]), dtype=torch.uint8, device="cpu")
                generators[name] = torch.Generator("cpu").set_state(values)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{name} is no state of a generator ({error}): {state[name]!r:.80}") from error
        self.path_idx = None if path is None else check_index("path_idx", path, self.n_paths, "this loss has draws")
        self._probs = probs
        for name, generator in generators.items():
            setattr(self, name, generator)


class JTFSLoss(ScatteringLoss):
    """Full JTFS distance: mean over all first- and second-order paths of the L2 norm of the difference of coefficients.

    The first order is shared by all paths, and only averaged coefficients are kept for the backward pass, so that
    memory hardly grows with the number of paths. Frames of the reflected padding are dropped (section 10 of the paper's
    notes: SCRAPL's single paths keep them). Arguments, scale and errors as in `SCRAPLLoss`.
    """

    _known = "jtfs(x)"

    def __init__(
        self,
        shape: int = 32768,
        J: int = 12,
        Q1: int = 8,
        Q2: int = 2,
        J_fr: int = 3,
        Q_fr: int = 2,
        T: Span = None,
        F: Span = None,
        log1p: bool = False,
    ) -> None:
        super().__init__(JTFS(shape, J, Q1, Q2, J_fr, Q_fr, T, F), log1p)

    def _all(self, x: Tensor) -> Tensor:
        return self.jtfs(x)
