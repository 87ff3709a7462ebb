"""What a loss asks of a scattering transform, and the distances of its coefficients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checks import check_bool, check_pair, positive_int
from .jtfs import JTFS
from .precision import full_precision

LOG_FLOOR = 1e-3  # rho(S) = log(1 + S / LOG_FLOOR)


class PathTransform(Protocol):
    """A transform of which one path can be computed alone: `JTFS`, `Scattering2D`, or one of your own.

    It may also have

        groups: dict[str, list[tuple[int, ...]]]      numbers of paths that share work, by the name of the grouping
        path_group(x, indices) -> (batch, paths, ...) several paths, sharing that work; by default one after the other
        settings: dict                                what decides the paths, plain values: states of others are refused
        path_jets(x, jets, indices)                   as `JTFS.path_jets`: theta-importance without backward passes
    """

    @property
    def n_paths(self) -> int:
        """Number P of paths."""

    def path(self, x: Tensor, index: int) -> Tensor:
        """Coefficients (batch, ...) of the items x (batch, ...). For theta-importance twice differentiable."""

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x can be transformed. Messages begin with "x", the loss's arguments."""


def checked_transform(transform: object) -> Any:
    """The transform. Raises TypeError for what is none, ValueError for one without paths."""
    lacking = [name for name in ("path", "check") if not callable(getattr(transform, name, None))]
    lacking += [] if hasattr(transform, "n_paths") else ["n_paths"]
    if lacking or isinstance(transform, type):
        needed = "an object with n_paths, path(x, index) and check(x), as JTFS(...) and Scattering2D(...) are"
        lacks = f", which has no {' and no '.join(lacking)}" if lacking else ", a class: make one, with parentheses"
        raise TypeError(f"transform must be {needed}; got {transform!r:.200}{lacks}")
    positive_int("transform.n_paths", transform.n_paths)
    return transform


def path_group(transform: PathTransform, x: Tensor, indices: Sequence[int]) -> Tensor:
    """Coefficients of several paths, all of one shape: (batch, paths, ...)."""
    if hasattr(transform, "path_group"):
        return transform.path_group(x, indices)
    found = [transform.path(x, index) for index in indices]
    if len(shapes := {tuple(S.shape): index for S, index in zip(found, indices)}) > 1:
        said = ", ".join(f"{shape} of path {index}" for shape, index in shapes.items())
        raise ValueError(f"paths that are taken together must have coefficients of one shape, got {said}")
    return torch.stack(found, dim=1)


def of_checked_inputs(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check x_hat and x, then call `method` in full precision, and outside of torch.compile's graph.

    A graph would hold one path only: a draw, on the host, decides which filters are used.
    """

    @functools.wraps(method)
    def computed(self: nn.Module, x_hat: Tensor, x: Tensor, *args: object, **options: object) -> Tensor:
        if torch.compiler.is_compiling():  # not at import: what `disable` needs takes seconds to load
            return torch.compiler.disable(computed)(self, x_hat, x, *args, **options)
        check_pair(x_hat, x, self.transform.check)
        with full_precision(x_hat.device.type):
            return method(self, x_hat, x, *args, **options)

    return computed


class Distances(nn.Module):
    """What SCRAPLLoss and the full losses share: the transform, and the distances of its coefficients."""

    def __init__(self, transform: PathTransform, log1p: bool = False) -> None:
        super().__init__()
        self.log1p = check_bool("log1p", log1p)
        self.transform = checked_transform(transform)

    @property
    def jtfs(self) -> JTFS:
        """The transform of a loss of audio."""
        return self.transform

    @property
    def n_paths(self) -> int:
        """Number P of paths, of the JTFS those of second order."""
        return self.transform.n_paths

    def _distances(
        self, transform: Callable[[Tensor], Tensor], x_hat: Tensor, x: Tensor, S: Tensor | None, known: str, dims: int
    ) -> Tensor:
        """|| rho(transform(x_hat)) - rho(transform(x)) ||_2, over all but the first `dims` dimensions.

        S: transform(x), if it is known already; `known` is what the error message calls it.
        """
        S_hat = transform(x_hat)
        if not isinstance(S_hat, Tensor) or S_hat.ndim < dims or len(S_hat) != len(x_hat):
            got = tuple(S_hat.shape) if isinstance(S_hat, Tensor) else type(S_hat).__name__
            what = "batch" if dims == 1 else "batch, paths"
            raise ValueError(f"the transform must return coefficients ({what}, ...) of {len(x_hat)} items, got {got}")
        if S is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                S = transform(x)
        if S.shape != S_hat.shape:
            raise ValueError(f"S must be {known}, of shape {tuple(S_hat.shape)} here, got {tuple(S.shape)}")
        if S.dtype != S_hat.dtype:
            raise TypeError(f"S must be {known} of the same x, {S_hat.dtype} here, got {S.dtype}: compute it anew")
        if self.log1p:
            S_hat, S = torch.log1p(S_hat / LOG_FLOOR), torch.log1p(S / LOG_FLOOR)
        difference = (S_hat - S)[..., None].flatten(dims)
        # where they are equal, derivatives are 0: those of vector_norm would be 0 and, the second ones, NaN
        equal = (difference == 0).all(dim=-1)
        return torch.linalg.vector_norm(difference.masked_fill(equal[..., None], 1), dim=-1).masked_fill(equal, 0)


class ScatteringLoss(Distances):
    """Full distance of any transform: mean over all paths of the L2 norm of the difference of coefficients.

    The paths share what work `transform.path_group` lets them share. log1p: as in `SCRAPLLoss`.
    """

    _known = "path_group(transform, x, range(n_paths))"

    def forward(self, x_hat: Tensor, x: Tensor, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, ...) -> scalar, the batch mean of `per_item`."""
        return self.per_item(x_hat, x, S).mean()

    @of_checked_inputs
    def per_item(self, x_hat: Tensor, x: Tensor, S: Tensor | None = None) -> Tensor:
        """x_hat, x (batch, ...) -> distance of each item (batch,).

        S: the coefficients of x, of JTFSLoss jtfs(x), where they are known already (a reference that comes again).
        """
        return self._distances(self._all, x_hat, x, S, self._known, 2).mean(dim=1)

    def _all(self, x: Tensor) -> Tensor:
        return path_group(self.transform, x, range(self.n_paths))
