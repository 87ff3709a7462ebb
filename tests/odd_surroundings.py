"""What a user may have set around the code under test."""

import warnings
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def odd_surroundings(default=torch.float64):
    """Another default dtype and device, autocast, NumPy's errors raised, warnings as errors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"), torch.autocast("cpu"), np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.set_default_dtype(before)
