"""What audio and sizes must be; errors say what came, what was expected and how to mend it."""

import numpy as np
import torch
from torch import Tensor


def check_audio(x: Tensor, name: str, n_samples: int | None = None) -> None:
    """Raise unless x is finite mono audio of shape (batch, 1, samples).

    On CUDA the values are not looked at (every step would wait for the device): NaN audio gives a NaN loss there.

    Args:
        x: the audio.
        name: what the error message calls it.
        n_samples: expected length, if any.
    Raises:
        TypeError: x is no float32 or float64 tensor.
        ValueError: another shape or length, nothing in it, or a value that is not finite.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a float32 or float64 tensor, got {got}: convert it with torch.as_tensor(...).float()"
        )
    if x.ndim == 3 and x.shape[1] == 1 and x.numel() == 0:
        raise ValueError(f"{name} must have items and samples, got {tuple(x.shape)}: it is empty")
    if x.ndim != 3 or x.shape[1] != 1:
        raise ValueError(
            f"{name} must have shape (batch, 1, samples), mono, got {tuple(x.shape)}: "
            "reshape it to that, mix several channels down with x.mean(1, keepdim=True)"
        )
    if n_samples is not None and x.shape[2] != n_samples:
        raise ValueError(
            f"{name} must have {n_samples} samples, got {x.shape[2]}: pad or crop it, or build for its length"
        )
    if x.device.type == "cpu" and not torch.isfinite(x).all():
        raise ValueError(
            f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite values: "
            "look for them where the audio is made"
        )


def check_pair(x_hat: Tensor, x: Tensor, n_samples: int | None = None) -> None:
    """Raise unless x_hat and x are audio (see `check_audio`) of one shape and dtype."""
    check_audio(x_hat, "x_hat", n_samples)
    check_audio(x, "x", n_samples)
    if x_hat.shape != x.shape:
        raise ValueError(f"x_hat and x must have one shape, got {tuple(x_hat.shape)} and {tuple(x.shape)}")
    if x_hat.dtype != x.dtype:
        raise TypeError(f"x_hat and x must have one dtype, got {x_hat.dtype} and {x.dtype}: convert one with x.to(...)")


def positive_int(name: str, value: object, or_else: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer{or_else}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{or_else}, got {value}")
    return int(value)


def check_seed(value: object, name: str = "seed") -> int:
    """The seed as a Python integer. Raises TypeError for no integer (bool is none), ValueError outside 0 .. 2^64 - 1."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer from 0 to 2^64 - 1, got {value!r}")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name} must be an integer from 0 to 2^64 - 1, got {value}")
    return int(value)
