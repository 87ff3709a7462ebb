"""What a caller may have set and no number depends on: torch's default dtype, device and precision, NumPy's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from scrapl_lib.precision import full_precision


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Makes tensors without a dtype or device float32 on the CPU, computes in full precision, lets NumPy's errors pass.

    A context manager and a decorator. The default dtype is torch's own, of all threads, and is set only if it differs.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(full_precision("cpu", convolutions=True))
        stack.enter_context(full_precision("cuda", convolutions=True))
        for kind in ("mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if before != torch.float32:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(torch.float32)
        yield
