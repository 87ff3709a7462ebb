"""Full precision, whatever the caller allows in its own computations."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(kind: str, convolutions: bool = False) -> Iterator[None]:
    """Compute in the precision of the tensors on devices of that kind ("cpu", "cuda").

    Without torch.autocast, and without TF32 or bfloat16 inside of float32 matrix products (and convolutions), which
    `torch.set_float32_matmul_precision` and `torch.backends` allow: a distance between close sounds is the difference
    of nearly equal numbers, and would come out several times too large. Settings that are full are not touched. The
    others are those of the whole process: while they are raised here, other threads compute in full precision, too.
    """
    of_cpu = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    of_cuda = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    with ExitStack() as restored:
        if torch.amp.is_autocast_available(kind):
            restored.enter_context(torch.autocast(kind, enabled=False))
        for backend in (of_cpu if kind == "cpu" else of_cuda)[: 1 + convolutions]:
            if backend.fp32_precision not in ("none", "ieee"):
                restored.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        yield


def in_full_precision(function: Callable) -> Callable:
    """The function in `full_precision` on the device of its last tensor."""

    @functools.wraps(function)
    def computed(*args: Any) -> Any:
        with full_precision(next(arg.device.type for arg in reversed(args) if isinstance(arg, Tensor))):
            return function(*args)

    return computed
